"""
Lab 1.  The first request: a client, a proxy, a web server, and who sees whom.

Goal: to see that a proxy makes *two* connections out of one, and that each end knows only its own.

    client ------ one connection ------> proxy ------ another one ------> web server

A proxy is a program that connects to somebody in your place.  SOCKS5 (RFC 1928) is the language in which the client
says to whom.  It is spoken once, at the beginning; after that the proxy carries octets (bytes) both ways, and neither
reads nor changes them.  The octets on their way, with a connection at each end of the proxy, are called a tunnel.

Run it:

    python examples/lab01_first_request.py

You should see (the ports are others each time):

    web server  listens on 127.0.0.1:40001
    proxy       listens on 127.0.0.1:40002
    client      is connected to the proxy, from 127.0.0.1:40003; asks it for localhost, port 40001
    client      asks for /hello, as if there were no proxy
    web server  answers 200 OK: Hello, 127.0.0.1:40004!
    proxy's log #1 127.0.0.1:40003 CONNECT localhost:40001 (127.0.0.1:40001) ok, 73 B up, 42 B down, 0.0 s, closed by target

The log has a line for each client: its number and address; its user (- for nobody, see lab 4); what it asked for
and where that was; how it went; how many octets went up to the web server and came down from it; and who hung up first.

Questions (answers in docs/course/labs.rst): Who is 40004, and why is it not 40003?  Which of the three programs finds
out where "localhost" is?  How many of the 73 octets are SOCKS?  How could the web server learn of 40003?
"""

import http.client
import http.server
import os
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import client
from socks5srv.testing import start     # a proxy in a thread of this program, on a free port


class Hello(http.server.BaseHTTPRequestHandler):
    """A web server that greets whoever is connected to it."""

    def do_GET(self):
        host, port = self.client_address
        self.send_response_only(200)
        self.end_headers()
        self.wfile.write(f"Hello, {host}:{port}!".encode())

    def log_message(self, *_arguments):
        """Says nothing: the proxy's log is the one to look at."""


def main():
    with http.server.HTTPServer(("127.0.0.1", 0), Hello) as web, start() as proxy:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        port = web.server_address[1]
        print(f"web server  listens on 127.0.0.1:{port}")
        print(f"proxy       listens on 127.0.0.1:{proxy.port}")

        sock = client.connect(proxy.url, "localhost", port)     # here SOCKS is spoken: lab 2 has it in slow motion
        host, from_port = sock.getsockname()
        print(f"client      is connected to the proxy, from {host}:{from_port}; asks it for localhost, port {port}")

        connection = http.client.HTTPConnection("localhost", port)
        connection.sock = sock                                  # a socket like any other, from now on
        print("client      asks for /hello, as if there were no proxy")
        connection.request("GET", "/hello")
        with connection.getresponse() as answer:
            greeting = answer.read().decode()
        print(f"web server  answers {answer.status} {answer.reason}: {greeting}")
        connection.close()

        (session,) = proxy.wait_for(closed=True)                # what the proxy knows of a client is a session
        print("proxy's log", session)
        web.shutdown()
        return session, from_port, greeting


def check(session, from_port, greeting):
    assert session.client.port == from_port, "the proxy sees the client"
    assert greeting == f"Hello, {session.bound}!", "the web server sees the proxy"
    assert session.bound.port != from_port, "and not the client: there are two connections"
    assert session.destination.host == "localhost", "the client has not looked the name up"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
