"""
Which hosts does this program talk to?  A proxy in the background, and a program that is told to use it.

Goal: to see the list of sessions that a proxy of `socks5srv.testing` keeps, and what a proxy knows of a
program that leaves names to it.

Run it:

    python examples/who_is_called.py

You should see:

    the program says     "nothing to see here"
    the proxy says       api.example.com:80       41 octets sent
                         metrics.example.net:80   83 octets sent
                         www.example.org:443      refused: www.example.org is not in hosts=, and only internet=True looks further

Any program can stand in place of this one that reads ALL_PROXY, curl for instance; with ``start(internet=True)``
it gets what it asks for.

Questions (answers in examples/README.rst): What of the traffic does the proxy know, and what not?  What does a
program look like here that does not obey ALL_PROXY?
"""

import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv.testing import start
from socks5srv.testing.targets import WebServer

# Some program, of which nobody has the source at hand.
PROGRAM = r"""
import os, socket
from urllib.parse import urlsplit

proxy = urlsplit(os.environ["ALL_PROXY"])

def call(host, port, line):
    with socket.create_connection((proxy.hostname, proxy.port), 5) as sock:
        sock.sendall(b"\5\1\0" b"\5\1\0\3" + bytes([len(host)]) + host.encode() + port.to_bytes(2, "big"))
        with sock.makefile("rb") as stream:
            if stream.read(12)[3] == 0:
                sock.sendall(f"GET {line} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                stream.read()

call("api.example.com", 80, "/")
call("metrics.example.net", 80, "/?what=everything&of=yours&since=always")
call("www.example.org", 443, "")
print('"nothing to see here"')
"""


def main():
    with WebServer() as web, WebServer() as metrics, \
         start(hosts={"api.example.com": web.address, "metrics.example.net": metrics.address}) as proxy:
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=proxy.env, stdout=subprocess.PIPE, text=True, timeout=10, check=True)
        print("the program says    ", done.stdout.strip())
        title = "the proxy says"
        for session in proxy.wait_for(3, closed=True):
            told = f"{session.up} octets sent" if session.reply == 0 else f"refused: {session.reason}"
            print(f"{title:<20} {session.destination!s:<24} {told}")
            title = ""


if __name__ == "__main__":
    main()
