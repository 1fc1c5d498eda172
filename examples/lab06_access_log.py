"""
Lab 6.  The access log: what the operator of a proxy learns, also of encrypted connections.

Goal: to see what can be counted (destinations, users, octets, how many at once), and that encryption hides what is said,
not to whom.  TLS, the S of HTTPS, is spoken between client and web server; the proxy carries it.

Run it:

    python examples/lab06_access_log.py

You should see (the ports are others each time):

    as text
      #1 127.0.0.1:40001 user anna CONNECT bank.example:443 (127.0.0.1:40002) ok, 3.0 kB up, 3.0 kB down, 0.0 s, closed by client
      #2 127.0.0.1:40003 user ben CONNECT news.example:80 (127.0.0.1:40002) ok, 200 B up, 200 B down, 0.0 s, closed by client
    the first of them as JSON
      {"time": "2026-11-22T10:27:56.123Z", "event": "close", "id": 1, "client": "127.0.0.1:40001", "via": null,
      "user": "anna", "command": "connect", "host": "bank.example", "port": 443, "peer": "127.0.0.1:40002", "reply":
      0, "reason": "closed by client", "up": 3000, "down": 3000, "seconds": 0.003}
    added up
      destinations  bank.example:443 6000, news.example:80 400
      users         anna 6000, ben 400
      at once       2 at most
    the next time anna looks bank.example up by herself, so that her request is for 127.0.0.1:40002
      the tunnel begins with 16 03, as TLS does, and has this in it for all to read: bank.example

Nobody can read what Anna said, and yet the operator knows with which bank, when, for how long, and how much.  The last
part is a real ClientHello, with which TLS begins: the server's name is in it.

Questions (answers in docs/course/labs.rst): What can be guessed from octets and times alone?  How could a client keep the
destination from the operator, too?  For how long would you keep such a log, and who may read it?
"""

import collections
import json
import os
import socket
import ssl
import sys
import textwrap

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Socks5Handler, client
from socks5srv.testing import start
from socks5srv.testing.targets import EchoServer


class Curious(Socks5Handler):
    """An operator who looks into each tunnel before it is handed over to the thread that carries it."""

    def relay(self, target):
        self.session.begins = self.connection.recv(4096, socket.MSG_PEEK)
        super().relay(target)


def say(sock, octets):
    """Send them, and wait until all have come back."""
    sock.sendall(octets)
    sock.recv(len(octets), socket.MSG_WAITALL)


def client_hello(name):
    """What a TLS client says first."""
    outgoing = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:        # for the server's answer
        return outgoing.read()


def most_at_once(sessions):
    """How many were there at the same time: whenever one came, how many had come, and had not gone?"""
    return max(sum(other.clock <= one.clock < other.clock + other.seconds for other in sessions) for one in sessions)


def add_up(title, sessions, of):
    """The octets of these sessions, by what they have in common."""
    octets = collections.Counter()
    for session in sessions:
        octets[of(session)] += session.up + session.down
    print(f"  {title:<13}", ", ".join(f"{name} {count}" for name, count in octets.items()))
    return octets


def main():
    with EchoServer() as target, start(Curious, users={"anna": "sesame", "ben": "4711"},
                                       hosts={"bank.example": target.address, "news.example": target.address}) as proxy:
        anna, ben = proxy.url, proxy.url.replace("anna:sesame", "ben:4711")
        with client.connect(anna, "bank.example", 443) as bank, client.connect(ben, "news.example", 80) as news:
            say(news, b"x" * 200)
            say(bank, os.urandom(3000))     # what encryption looks like to those without the key
        proxy.wait_for(2, closed=True)
        with client.connect(anna, *target.address) as bank:
            say(bank, client_hello("bank.example"))
        *sessions, hidden = proxy.sessions

    print("as text", *sessions, sep="\n  ")
    record = textwrap.fill(json.dumps(sessions[0].as_dict()), 112, initial_indent="  ", subsequent_indent="  ")
    print("the first of them as JSON", record, "added up", sep="\n")
    by_host = add_up("destinations", sessions, lambda session: str(session.destination))
    by_user = add_up("users", sessions, lambda session: session.user)
    print("  at once      ", most_at_once(sessions), "at most")
    name = "bank.example" if b"bank.example" in hidden.begins else "nothing"
    print(f"the next time anna looks bank.example up by herself, so that her request is for {hidden.destination}")
    print(f"  the tunnel begins with {hidden.begins[:2].hex(' ')}, as TLS does, and has this in it for all to read: {name}")
    return by_host, by_user, most_at_once(sessions), name


def check(by_host, by_user, most, name):
    assert (by_host, by_user) == ({"bank.example:443": 6000, "news.example:80": 400}, {"anna": 6000, "ben": 400})
    assert (most, name) == (2, "bank.example"), "ben came while anna was there; and the name is in clear"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
