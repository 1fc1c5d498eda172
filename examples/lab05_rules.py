"""
Lab 5.  Rules: what may be reached, and how a rule is dodged.

Goal: to see which rule catches what.  A proxy may refuse a request; the reply's second octet, REP, is then 02,
"connection not allowed by ruleset", where 00 means success.  A rule can speak of what the client has *said* (a name), or of
where that *leads* (an address and a port); a client that is forbidden a name can say something else.

Run it:

    python examples/lab05_rules.py

You should see (the ports are others each time):

    deny games.example
      games.example:40001    REP 02  rule: deny games.example
      GAMES.Example.:40001   REP 02  rule: deny games.example
      127.0.0.1:40001        REP 00  dodged
      mirror.example:40001   REP 00  dodged
      news.example:40002     REP 00  and so it should be
    deny 127.0.0.0/8:40001
      games.example:40001    REP 02  rule: deny 127.0.0.0/8:40001
      GAMES.Example.:40001   REP 02  rule: deny 127.0.0.0/8:40001
      127.0.0.1:40001        REP 02  rule: deny 127.0.0.0/8:40001
      mirror.example:40001   REP 02  rule: deny 127.0.0.0/8:40001
      news.example:40002     REP 00  and so it should be
    allow news.example, deny *
      games.example:40001    REP 02  rule: deny *
      GAMES.Example.:40001   REP 02  rule: deny *
      127.0.0.1:40001        REP 02  rule: deny *
      mirror.example:40001   REP 02  rule: deny *
      news.example:40002     REP 00  and so it should be
    no rule, but a clock: games from 17 to 22 only
      at 12, games.example   REP 02  127.0.0.1:40001 is not allowed
      at 20, games.example   REP 00

The games are at port 40001 of 127.0.0.1, also under the name mirror.example; the news are at another port of it.  What
stands to the right is the proxy's log: the client gets the number only.

Questions (answers in docs/course/labs.rst): What did the proxy know of games.example in the two dodges?  What does the
second list cost, if the games move, and if they share their address with others?  Why is the third one the safest?  Why does
the proxy judge the addresses that it has found, and then connect to one of these, instead of to the name?
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import RequestFailed, Socks5Handler, client
from socks5srv.testing import start
from socks5srv.testing.targets import EchoServer

HOSTS = dict.fromkeys(["games.example", "mirror.example", "news.example"], "127.0.0.1")


class Evenings(Socks5Handler):
    """What no list can say, a method can: it is asked for the name, and for each address that the name leads to."""

    hour = 0                    # in earnest: time.localtime().tm_hour
    games = None                # their port

    def allow(self, command, address):
        return address.port != self.games or address.literal is None or 17 <= self.hour < 22


def ask(proxy, host, port):
    """The reply's code, and the reason in the proxy's log."""
    proxy.clear()
    try:
        client.connect(proxy.url, host, port).close()
        return 0, ""
    except RequestFailed as refusal:
        (session,) = proxy.wait_for(closed=True)
        return int(refusal.code), session.reason


def main():
    codes = {}
    with EchoServer() as games, EchoServer() as news:
        attempts = [(host, games.port) for host in ("games.example", "GAMES.Example.", "127.0.0.1", "mirror.example")]
        attempts.append(("news.example", news.port))
        for rules in (["deny games.example"], [f"deny 127.0.0.0/8:{games.port}"], ["allow news.example", "deny *"]):
            print(", ".join(rules))
            with start(hosts=HOSTS, rules=rules) as proxy:
                for host, port in attempts:
                    code, reason = ask(proxy, host, port)
                    what = reason or ("dodged" if port == games.port else "and so it should be")
                    print(f"  {f'{host}:{port}':<22} REP {code:02x}  {what}")
                    codes.setdefault(host, []).append(code)

        print("no rule, but a clock: games from 17 to 22 only")
        Evenings.games = games.port
        with start(Evenings, hosts=HOSTS) as proxy:
            for Evenings.hour in (12, 20):
                code, reason = ask(proxy, "games.example", games.port)
                print(f"  at {Evenings.hour}, games.example   REP {code:02x}  {reason}".rstrip())
                codes.setdefault("by the clock", []).append(code)
    return codes


def check(codes):
    assert codes["games.example"] == codes["GAMES.Example."] == [2, 2, 2], "each list denies the name"
    assert codes["127.0.0.1"] == codes["mirror.example"] == [0, 2, 2], "only the first one can be dodged"
    assert codes["news.example"] == [0, 0, 0], "and none denies the neighbour"
    assert codes["by the clock"] == [2, 0]


if __name__ == "__main__":
    codes = main()
    if "--check" in sys.argv:
        check(codes)
