"""
Who may use the proxy: a dict of users, or a method that decides.

Goal: to let clients in by name and password, first from a mapping, then by an `authenticate()` of
one's own; here each password is good for one login only.

Run it:

    python examples/users.py

You should see (the ports are others each time):

    users={"anna": "sesame"}
      anna says sesame: welcome
        #1 127.0.0.1:40001 user anna CONNECT 127.0.0.1:40002 ok, 0 B up, 12 B down, 0.0 s, closed by target
      anna says open: refused
        #2 127.0.0.1:40003 user anna login failed: wrong name or password
    authenticate() with passwords for one use
      ben says 4711: welcome
        #1 127.0.0.1:40004 user ben CONNECT 127.0.0.1:40002 ok, 0 B up, 12 B down, 0.0 s, closed by target
      ben says 4711: refused
        #2 127.0.0.1:40005 user ben login failed: wrong name or password
      ben says 0815: welcome
        #3 127.0.0.1:40006 user ben CONNECT 127.0.0.1:40002 ok, 0 B up, 12 B down, 0.0 s, closed by target

The lines with a # are the proxy's log, in which no password is ever found.  On the wire it is
there for all to read (RFC 1929 section 3).
"""

import os
import queue
import socket
import socketserver
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, Method, Request, Socks5Handler, Socks5Server
from socks5srv.protocol import Credentials, CredentialsReply, Greeting, MethodSelection, Reply


class Telling(Socks5Handler):
    """Hands its log lines to whoever waits for them; the default logs them."""

    def session_ended(self):
        self.server.lines.put(str(self.session))


one_time_passwords = {"ben": {"4711", "0815"}}
lock = threading.Lock()         # every client has a thread of its own, and two may come at once


class OneTime(Telling):
    """To override authenticate() is to ask every client for a login."""

    def authenticate(self, username, password):
        with lock:
            left = one_time_passwords.get(username, set())
            good = password in left
            left.discard(password)
            return good


class Welcome(socketserver.BaseRequestHandler):
    """What the clients want to reach: it greets, and hangs up."""

    def handle(self):
        self.request.sendall(b"you are in!\n")


def knock(proxy, target, username, password):
    """Log in, and read the target's greeting; in a word, how that went."""
    with socket.create_connection(proxy, timeout=5) as sock, sock.makefile("rb", buffering=0) as stream:
        sock.sendall(bytes(Greeting(bytes([Method.USERNAME_PASSWORD]))))
        MethodSelection.read(stream)
        sock.sendall(bytes(Credentials(username.encode(), password.encode())))
        if CredentialsReply.read(stream).status != CredentialsReply.SUCCESS:
            return "refused"
        sock.sendall(bytes(Request(Command.CONNECT, Address.of(target))))
        Reply.read(stream)
        return "welcome" if stream.readall() == b"you are in!\n" else "lost"


def show(title, logins, target, handler, users=None):
    """Start such a proxy and try the logins one after the other, each with what the proxy logs."""
    print(title)
    with Socks5Server(("127.0.0.1", 0), handler, users=users) as proxy:
        proxy.lines = queue.SimpleQueue()
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for username, password in logins:
            print(f"  {username} says {password}: {knock(proxy.server_address, target, username, password)}")
            print("   ", proxy.lines.get(timeout=5))


def main():
    with socketserver.TCPServer(("127.0.0.1", 0), Welcome) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = server.server_address
        show('users={"anna": "sesame"}', [("anna", "sesame"), ("anna", "open")], target,
             Telling, users={"anna": "sesame"})
        show("authenticate() with passwords for one use", [("ben", "4711"), ("ben", "4711"), ("ben", "0815")], target,
             OneTime)
        server.shutdown()


if __name__ == "__main__":
    main()
