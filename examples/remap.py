"""
A name that leads elsewhere: api.example.com port 80 is a server on this computer.

Goal: to try out a program that wants the real api.example.com, without the Internet: it only has
to use the proxy.  The proxy sends it to a loopback server, counts, and lets nothing else out.

Run it:

    python examples/remap.py

You should see (the ports are others each time):

    api.example.com:80: HTTP/1.0 200 OK, from api.example.com
      #1 127.0.0.1:40001 CONNECT api.example.com:80 (127.0.0.1:40002) ok, 41 B up, 34 B down, 0.0 s, closed by target
    api.example.com:80: HTTP/1.0 200 OK, from api.example.com
      #2 127.0.0.1:40003 CONNECT api.example.com:80 (127.0.0.1:40002) ok, 41 B up, 34 B down, 0.0 s, closed by target
    www.example.com:80: host unreachable
      #3 127.0.0.1:40004 CONNECT www.example.com:80 failed (reply 04): www.example.com is not on the map
    192.0.2.1:80: connection not allowed by ruleset
      #4 127.0.0.1:40005 CONNECT 192.0.2.1:80 denied (reply 02): 192.0.2.1:80 is not allowed
    asked for:
      2 x api.example.com:80
      1 x www.example.com:80
      1 x 192.0.2.1:80

The lines with a # are the proxy's log.  The web server is asked for api.example.com, as the Host
header that it sends back shows: only the way there is another one.
"""

import collections
import dataclasses
import http.server
import os
import queue
import socket
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, ReplyCode, Request, RequestFailed, Socks5Handler, Socks5Server
from socks5srv.protocol import Greeting, MethodSelection, Reply


class Remap(Socks5Handler):
    """`self.server.map` has where to go instead; what is not on it is not reached."""

    def connect(self, request):
        """Another destination is another request; the session keeps what the client asked for."""
        wanted = request.destination
        instead = self.server.map.get((wanted.host, wanted.port))
        if instead is not None:
            request = dataclasses.replace(request, destination=Address.of(instead))
        return super().connect(request)

    def resolve(self, host):
        """Called for names only, so for none that connect() has replaced."""
        raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{host} is not on the map")

    def allow(self, command, address):
        """Names are judged by resolve(), addresses here."""
        return address.literal is None or address.host == "127.0.0.1"

    def session_ended(self):
        self.server.counts[str(self.session.destination)] += 1      # always the same thread: no lock is needed
        self.server.lines.put(str(self.session))


class Api(http.server.BaseHTTPRequestHandler):
    """The stand-in: it says by which name it was asked for."""

    def do_GET(self):
        self.send_response_only(200)
        self.end_headers()
        self.wfile.write(self.headers["Host"].encode())

    def log_message(self, *_arguments):
        """Says nothing: the proxy's log is the one to look at."""


def get(proxy, host, port):
    """What a program would see of http://host:port/, in a line."""
    with socket.create_connection(proxy, timeout=5) as sock, sock.makefile("rb", buffering=0) as stream:
        sock.sendall(bytes(Greeting(b"\x00")))
        MethodSelection.read(stream)
        sock.sendall(bytes(Request(Command.CONNECT, Address.named(host, port))))
        reply = Reply.read(stream)
        if reply.code is not ReplyCode.SUCCEEDED:
            return reply.code.phrase
        sock.sendall(f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        head, _, body = stream.readall().decode().partition("\r\n\r\n")
        return f"{head}, from {body}"


def main():
    with http.server.HTTPServer(("127.0.0.1", 0), Api) as api, Socks5Server(("127.0.0.1", 0), Remap) as proxy:
        proxy.map = {("api.example.com", 80): api.server_address}
        proxy.counts = collections.Counter()
        proxy.lines = queue.SimpleQueue()
        for server in (api, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        for host in ("api.example.com", "api.example.com", "www.example.com", "192.0.2.1"):
            print(f"{host}:80: {get(proxy.server_address, host, 80)}")
            print(" ", proxy.lines.get(timeout=5))
        print("asked for:")
        for destination, count in proxy.counts.items():
            print(f"  {count} x {destination}")
        api.shutdown()


if __name__ == "__main__":
    main()
