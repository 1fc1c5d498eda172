"""
A SOCKS5 server in a thread, and one HTTP request that goes through it.

Goal: to see the three programs that take part (client, proxy, web server), and who tells whom what.

Run it:

    python examples/quickstart.py

You should see (the ports are others each time):

    web server  listens on 127.0.0.1:40001
    proxy       listens on 127.0.0.1:40002
    client      asks the proxy for localhost port 40001
    proxy       is connected, from 127.0.0.1:40003
    client      asks for /hello
    web server  answers 200 OK: Hello, 127.0.0.1:40003!
    proxy       #1 127.0.0.1:40004 - connect localhost:40001 -> 127.0.0.1:40001 ok 73 up 42 down 0.0s target closed

The web server greets the proxy (40003), not the client (40004), of which it never hears.  And the
client never looked up a name: it said "localhost", and the proxy found out where that is.
"""

import http.client
import http.server
import os
import queue
import socket
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, ReplyCode, Request, Socks5Handler, Socks5Server
from socks5srv.protocol import Greeting, MethodSelection, Reply


class Hello(http.server.BaseHTTPRequestHandler):
    """A web server that greets whoever is connected to it."""

    def do_GET(self):
        host, port = self.client_address
        self.send_response_only(200)
        self.end_headers()
        self.wfile.write(f"Hello, {host}:{port}!".encode())

    def log_message(self, *_arguments):
        """Says nothing: the proxy's log is the one to look at."""


class Telling(Socks5Handler):
    """Hands its log lines to whoever waits for them; the default logs them."""

    def session_ended(self):
        self.server.lines.put(str(self.session))


def connect_through(proxy, host, port):
    """A socket that is connected to `host` by way of the proxy."""
    sock = socket.create_connection(proxy, timeout=5)
    with sock.makefile("rb", buffering=0) as stream:
        sock.sendall(bytes(Greeting(b"\x00")))              # I can do without a login
        MethodSelection.read(stream)                        # so can I
        sock.sendall(bytes(Request(Command.CONNECT, Address.named(host, port))))
        reply = Reply.read(stream)
    if reply.code is not ReplyCode.SUCCEEDED:
        sock.close()
        raise ConnectionError(f"the proxy says: {reply.code.phrase}")
    print(f"proxy       is connected, from {reply.bound}")
    return sock


def main():
    with http.server.HTTPServer(("127.0.0.1", 0), Hello) as web, Socks5Server(("127.0.0.1", 0), Telling) as proxy:
        proxy.lines = queue.SimpleQueue()
        for server in (web, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        port = web.server_address[1]
        print(f"web server  listens on 127.0.0.1:{port}")
        print(f"proxy       listens on 127.0.0.1:{proxy.server_address[1]}")

        print(f"client      asks the proxy for localhost port {port}")
        connection = http.client.HTTPConnection("localhost", port)
        connection.sock = connect_through(proxy.server_address, "localhost", port)
        print("client      asks for /hello")
        connection.request("GET", "/hello")
        with connection.getresponse() as answer:
            print(f"web server  answers {answer.status} {answer.reason}: {answer.read().decode()}")
        connection.close()
        print("proxy      ", proxy.lines.get(timeout=5))
        web.shutdown()


if __name__ == "__main__":
    main()
