"""
Lab 11.  What a password shows on the wire, and what Kerberos does not.

Goal: to see a login that is worth nothing to those who listen (GSSAPI, RFC 1961), and a tunnel that they cannot read.  It needs
a KDC, which gives out tickets, and the package gssapi, and says so if one is missing.  The realm is its own, and goes with it.

Run it:

    python examples/lab11_kerberos.py

You should see (the lengths may be others):

    password           05 02 +2, 01 04 +11, 05 01 +16, 74 68 +14
    Kerberos, level 1  05 01 +1, 01 01 +696, 01 02 +31, 01 03 +48, 01 03 +46
    Kerberos, level 2  05 01 +1, 01 01 +696, 01 02 +31, 01 03 +80, 01 03 +78

    who listens finds         password           level 1      level 2
    the name "anna"           yes                no           no
    the password              yes                no           no
    the service "rcmd"        no                 yes          yes
    the name "db.internal"    yes                yes          no
    "this is a secret"        yes                yes          no
    and says the same again   05 02 01 00 05 00  05 01 01 ff  05 01 01 ff
    or changes an octet       this is a secreu   nothing      nothing

Each message is shown by its first two octets, and how many follow.  Frames have a token in them; in the first one is the
ticket, which only the proxy can read, and a proof that who sends it knows the key in there, now: the same again is a replay.
Then they agree on a level.  From there on frames are signed at level 1, encrypted at level 2: up to the proxy, no farther.

Questions (answers in docs/course/labs.rst): How can the proxy read the ticket, and anna not, who has it?  What does the KDC learn
of where anna goes?  Why is it not enough that the login is safe?  Who else reads "this is a secret" at level 2?
"""

import os
import select
import socket
import sys
import threading
from contextlib import suppress

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import client
from socks5srv.testing import kerberos, start, targets

SECRET = b"this is a secret"
ROWS = ['the name "anna"', "the password", 'the service "rcmd"', 'the name "db.internal"', '"this is a secret"', "and says the same again", "or changes an octet"]


class Wire(threading.Thread):
    """What a client says to a proxy passes here; `said` is all of it.  With `changes` the last octet of each message gets another bit."""

    def __init__(self, proxy):
        super().__init__()
        self.listener, self.said, self.changes = socket.create_server(("127.0.0.1", 0)), [], False
        self.far = socket.create_connection(proxy.address)
        self.start()

    def run(self):
        with self.listener, self.far, self.listener.accept()[0] as near, suppress(OSError):
            octets = b"-"
            while octets:
                sock = select.select([near, self.far], [], [])[0][0]
                octets = sock.recv(65536)
                if octets and sock is near:
                    self.said.append(octets)
                    octets = octets[:-1] + bytes([octets[-1] ^ self.changes])
                (self.far if sock is near else near).sendall(octets)


def visit(proxy, url, port, changes=False):
    """What anna says on the wire, and what comes back of her secret."""
    wire, answer = Wire(proxy), ""
    with client.connect(url.format(wire.listener.getsockname()[1]), "db.internal", port) as sock, suppress(ConnectionError):
        wire.changes = changes
        sock.sendall(SECRET)
        answer = sock.recv(100).decode()
    wire.join()
    return wire.said, answer or "nothing"


def said_again(proxy, said):
    """What the proxy answers to the same octets."""
    with socket.create_connection(proxy.address) as sock:
        answer = b""
        while said and not answer.endswith(b"\xff"):
            sock.sendall(said.pop(0))
            answer += sock.recv(6 - len(answer))
    return answer.hex(" ")


def column(name, proxy, url, port):
    """What there is to be seen of one way to log in."""
    said, _answer = visit(proxy, url, port)
    print(f"{name:<18}", ", ".join(f"{octets[:2].hex(' ')} +{len(octets) - 2}" for octets in said))
    found = ("yes" if mark in b"".join(said) else "no" for mark in (b"anna", b"sesame", b"rcmd", b"db.internal", SECRET))
    return [*found, said_again(proxy, said[:3]), visit(proxy, url, port, changes=True)[1]]


def main():
    if kerberos.missing():
        sys.exit(f"This lab needs more than others.  {kerberos.missing()}")
    from socks5srv.gssapi.handler import Gssapi, GssapiHandler

    hosts = {"db.internal": "127.0.0.1"}
    with kerberos.realm(clients=["anna"]) as realm, realm.entered(), targets.EchoServer() as db, start(users={"anna": "sesame"}, hosts=hosts) as proxy:
        columns = [column("password", proxy, "socks5h://anna:sesame@localhost:{}", db.port)]
        for level in (1, 2):
            with start(GssapiHandler, gssapi=Gssapi(str(realm.keytab), levels=[level]), hosts=hosts) as proxy:
                columns.append(column(f"Kerberos, level {level}", proxy, "socks5h+gssapi://localhost:{}", db.port))
    print("\nwho listens finds         password           level 1      level 2")
    for what, *cells in zip(ROWS, *columns):
        print("{:<25} {:<18} {:<12} {}".format(what, *cells))
    return tuple(columns)


def check(password, signed, encrypted):
    assert password == ["yes", "yes", "no", "yes", "yes", "05 02 01 00 05 00", "this is a secreu"]
    assert signed == ["no", "no", "yes", "yes", "yes", "05 01 01 ff", "nothing"]
    assert encrypted == ["no", "no", "yes", "no", "no", "05 01 01 ff", "nothing"]


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
