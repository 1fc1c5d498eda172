"""
Lab 9.  A chain of two proxies: who learns what, and what happens when a chain is a circle.

Goal: to see what each hop of a chain (each proxy on the way) sees.  A proxy that goes out through another one is a server
to its client, and a client to the other one, which is called its upstream.

    client ------> proxy A ------> proxy B ------> target, "db.internal", a name that only B knows

Run it:

    python examples/lab09_two_proxies.py

You should see (the ports are others each time):

    A is asked   05 01 00 03 0b 64 62 2e 69 6e 74 65 72 6e 61 6c 9c 41
    B is asked   05 01 00 03 0b 64 62 2e 69 6e 74 65 72 6e 61 6c 9c 41
    db.internal  says: hello
    A's log      #1 127.0.0.1:40002 CONNECT db.internal:40001 (127.0.0.1:40003) ok, 5 B up, 5 B down, 0.0 s, closed by client
    B's log      #1 127.0.0.1:40004 user anna CONNECT db.internal:40001 (127.0.0.1:40001) ok, 5 B up, 5 B down, 0.0 s, closed by client
    target       was called from 127.0.0.1:40005

    now A goes out through B, and B through A
    A is asked   for db.internal 32 times
    B's warning  the upstream socks5h://127.0.0.1:40006 leads back to this server: no client can be served
    client       the proxy says: general SOCKS server failure (REP 01)

The request passes A as it came, and B (40003) looks the name up.  A has logged in to B as anna; the client needed no login,
and has none to lose.  The target sees B only.  Each hop sees its two neighbours.

In the circle every request makes a new one, until somebody has no sockets left.  Nothing in SOCKS5 forbids that, or counts
hops.  When 32 clients wait, B asks its upstream for a name that it has made up a moment ago; and is asked for it itself.

Questions (answers in docs/course/labs.rst): Who knows both ends, the client's address and the target's?  What does it take to
find out who has talked to whom all the same?  IP has a field against circles: which, and what would it be here?
"""

import logging
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import RequestFailed, Socks5Handler, client
from socks5srv.testing import start
from socks5srv.testing.targets import EchoServer


asked = []          # the requests, as they were on the wire
warned = []         # what the proxies of this program warn of


class Telling(Socks5Handler):
    """A proxy that keeps what it is asked."""

    def perform(self, request):
        asked.append(bytes(request).hex(" "))
        super().perform(request)


class Warnings(logging.Handler):
    """Keeps what would be printed otherwise."""

    def emit(self, record):
        warned.append(record.getMessage())


def chain():
    with EchoServer() as db, \
         start(Telling, hosts={"db.internal": "127.0.0.1"}, users={"anna": "sesame"}) as b, start(Telling, upstream=b.url) as a:
        with client.connect(a.url, "db.internal", db.port) as sock:
            sock.sendall(b"hello")
            answer = sock.recv(5).decode()
        print(f"A is asked   {asked[0]}\nB is asked   {asked[1]}")
        print("db.internal  says:", answer)
        sessions = [proxy.wait_for(closed=True)[0] for proxy in (a, b)]
        print(f"A's log      {sessions[0]}\nB's log      {sessions[1]}")
        print("target       was called from {}:{}".format(*db.clients[0]))
        return (*sessions, db.clients[0])


def circle(port):
    with start() as b:
        pass                                # it has a port, which is free again
    with start(upstream=b.url) as a, start(port=b.port, upstream=a.url) as b:
        try:
            client.connect(a.url, "db.internal", port).close()
        except RequestFailed as refusal:
            count = len(a.find(host="db.internal"))
            print(f"A is asked   for db.internal {count} times")
            print("B's warning ", warned[0])
            print(f"client       {refusal} (REP {refusal.code:02x})")
            return count, refusal.code


def main():
    logging.getLogger("socks5srv").addHandler(Warnings(logging.WARNING))
    in_a, in_b, seen = chain()
    print("\nnow A goes out through B, and B through A")
    return in_a, in_b, seen, circle(in_a.destination.port)


def check(in_a, in_b, seen, refused):
    assert asked[0] == asked[1], "the request is passed on as it came"
    assert (in_a.user, in_b.user) == ("", "anna"), "the login is A's"
    assert in_b.client.port != in_a.client.port, "B does not see the client"
    assert seen == (in_b.bound.host, in_b.bound.port), "the target sees B"
    assert refused == (32, 1), "the circle has been noticed"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
