"""
A unit test of a program that uses a SOCKS5 proxy: a proxy in setUp(), names of its own, and no Internet.

Goal: to see how a test proves that a program really goes through the proxy, leaves names to it, logs in, and
copes with a refusal.  With pytest there are fixtures for that (docs/testing.rst); unittest does
as well.

Run it:

    python examples/unit_test.py

You should see:

    ....
    ----------------------------------------------------------------------
    Ran 4 tests in 0.020s

    OK

Questions (answers in examples/README.rst): How does a test know that the program did not look the name up by
itself?  Why can the assertion behind the call not come too early?  What would happen to a program that asks for
www.example.com here?
"""

import os
import socket
import sys
import unittest
from urllib.parse import urlsplit

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

import socks5srv.testing
from socks5srv import Address, Command, Method, ReplyCode, Request
from socks5srv.protocol import Credentials, CredentialsReply, Greeting, MethodSelection, Reply
from socks5srv.testing.faults import ReplyWith


# --- the program to be tested; yours is another one ---

class Refused(Exception):
    pass


def download(host, port, path, proxy_url):
    """What a web server answers, by way of a proxy."""
    proxy = urlsplit(proxy_url)
    with socket.create_connection((proxy.hostname, proxy.port), timeout=5) as sock, sock.makefile("rb", buffering=0) as stream:
        sock.sendall(bytes(Greeting(bytes([Method.USERNAME_PASSWORD if proxy.username else 0]))))
        if MethodSelection.read(stream).method == Method.USERNAME_PASSWORD:
            sock.sendall(bytes(Credentials(proxy.username.encode(), proxy.password.encode())))
            CredentialsReply.read(stream)
        sock.sendall(bytes(Request(Command.CONNECT, Address.named(host, port))))
        reply = Reply.read(stream)
        if reply.code != 0:
            raise Refused(f"{host}: reply {reply.code}")
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return stream.readall().partition(b"\r\n\r\n")[2]


# --- its tests ---

class TestDownload(unittest.TestCase):
    def setUp(self):
        self.web = socks5srv.testing.targets.WebServer({"/hello": "Hello."})
        self.addCleanup(self.web.close)

    def start(self, **keywords):
        """A proxy for which api.example.com, port 80, is the web server."""
        proxy = socks5srv.testing.start(hosts={"api.example.com": self.web.address}, **keywords)
        self.addCleanup(proxy.stop)
        return proxy

    def test_it_goes_through_the_proxy_and_leaves_the_name_to_it(self):
        proxy = self.start()
        self.assertEqual(download("api.example.com", 80, "/hello", proxy.url), b"Hello.")
        proxy.assert_used(host="api.example.com", port=80, times=1)

    def test_it_logs_in(self):
        proxy = self.start(users={"anna": "sesame"})
        download("api.example.com", 80, "/hello", proxy.url)
        self.assertEqual(proxy.last().user, "anna")

    def test_it_tells_of_a_refusal(self):
        proxy = self.start(faults=[ReplyWith(ReplyCode.NOT_ALLOWED, times=1)])
        with self.assertRaisesRegex(Refused, "api.example.com: reply 2"):
            download("api.example.com", 80, "/hello", proxy.url)
        self.assertEqual(self.web.requests, [])
        self.assertEqual(download("api.example.com", 80, "/hello", proxy.url), b"Hello.")       # that was the one time

    def test_it_says_so_when_there_is_no_proxy(self):
        proxy = self.start()
        proxy.stop()
        with self.assertRaises(ConnectionRefusedError):
            download("api.example.com", 80, "/hello", proxy.url)


if __name__ == "__main__":
    unittest.main(testRunner=unittest.TextTestRunner(stream=sys.stdout))
