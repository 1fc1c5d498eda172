"""
Two proxies in a row, and a target whose name only the second one knows.

Goal: to see who learns what when one proxy goes out through another: which name, which addresses, which login.

Run it:

    python examples/two_in_a_row.py

You should see (the ports are others each time):

    client       asks the first proxy for db.internal:40001
    db.internal  says: hello
    first        #1 127.0.0.1:40002 - connect db.internal:40001 -> 127.0.0.1:40003 ok 5 up 5 down 0.0s client closed
    second       #1 127.0.0.1:40004 anna connect db.internal:40001 -> 127.0.0.1:40001 ok 5 up 5 down 0.0s client closed
    target       was called from 127.0.0.1:40005

The first proxy is connected to the second (40003), which has the login that the URL says; only the second one looks the
name up, and only it is seen by the target.

Questions (answers in examples/README.rst): Who knows both ends, the client's address and the target's?  What would the
second proxy have to know for the first one not to be needed?
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import client
from socks5srv.testing import start
from socks5srv.testing.targets import EchoServer


def main():
    with EchoServer() as db, \
         start(hosts={"db.internal": "127.0.0.1"}, users={"anna": "sesame"}) as second, \
         start(upstream=second.url) as first:
        print(f"client       asks the first proxy for db.internal:{db.port}")
        with client.connect(first.url, "db.internal", db.port) as sock:
            sock.sendall(b"hello")
            print("db.internal  says:", sock.recv(5).decode())
        for name, proxy in [("first", first), ("second", second)]:
            (session,) = proxy.wait_for(closed=True)
            print(f"{name:<12} {session}")
        print("target       was called from {}:{}".format(*db.clients[0]))


if __name__ == "__main__":
    main()
