"""The list of allow and deny: reading it, and what it decides."""

from __future__ import annotations

import socket
from ipaddress import ip_network
from typing import Any, List, Optional

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from socks5srv import locality
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Reply, ReplyCode
from socks5srv.rules import ALL_PORTS, BadRule, Rule, Rules, is_local

from .conftest import LOCALHOST, Client, address_of, exchange, handler_with, name, needs_ipv6, udp_socket

TARGETS = {
    "example.com": ("example.com", None, ALL_PORTS), "Example.COM.": ("example.com", None, ALL_PORTS),
    "b\u00fccher.example": ("xn--bcher-kva.example", None, ALL_PORTS), "fa\u00df.test": ("xn--fa-hia.test", None, ALL_PORTS),
    "*.FA\u1e9e\u3002test\u3002": ("*.xn--fa-hia.test", None, ALL_PORTS),
    "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.com:80": ("xn--mgba3gch31f060k.com", None, range(80, 81)),
    "*.ads.example": ("*.ads.example", None, ALL_PORTS), "example.com:443": ("example.com", None, range(443, 444)),
    "*.example.com:80-90": ("*.example.com", None, range(80, 91)),
    ":25": (None, None, range(25, 26)), ":0-1023": (None, None, range(1024)),
    "*": (None, None, ALL_PORTS), "*:25": (None, None, range(25, 26)), "192.0.2.1": (None, "192.0.2.1/32", ALL_PORTS),
    "10.0.0.0/8": (None, "10.0.0.0/8", ALL_PORTS), "10.0.0.0/8:22": (None, "10.0.0.0/8", range(22, 23)),
    "::1": (None, "::1/128", ALL_PORTS), "[::1]": (None, "::1/128", ALL_PORTS),
    "2001:db8::/32": (None, "2001:db8::/32", ALL_PORTS),
    "[2001:db8::]/32:80-90": (None, "2001:db8::/32", range(80, 91)), "[2001:db8::/32]:80": (None, "2001:db8::/32", range(80, 81)),
}


@pytest.mark.parametrize(("text", "parts"), TARGETS.items(), ids=TARGETS)
@pytest.mark.parametrize("action", ["allow", "deny"])
def test_a_target_is_read(action: str, text: str, parts: Any) -> None:
    rule = Rule.parse(f"  {action} {text} ")
    host, network, ports = parts
    assert rule == Rule(action == "allow", host, ip_network(network) if network else None, ports, f"{action} {text}")


@pytest.mark.parametrize(("text", "says"), [
    ("", "allow TARGET or deny TARGET"), ("deny", "allow TARGET or deny TARGET"), ("refuse x", "allow TARGET or deny TARGET"),
    ("deny :", "PORT or PORT-PORT"), ("deny a:http", "PORT or PORT-PORT"), ("deny a:65536", "PORT or PORT-PORT"),
    ("deny a:-5", "PORT or PORT-PORT"), ("deny a:5-", "PORT or PORT-PORT"), ("deny a:90-80", "the lower one comes first"),
    ("deny 10.0.0.1/8", "did you mean 10.0.0.0/8"), ("deny 127.1", "write it out"), ("deny 2130706433", "write it out"),
    ("deny 0x7f000001", "write it out"), ("deny 10.0.0.0/33", "write it out"),
    ("deny [::1", "closing bracket"), ("deny a*b", "invalid host"), ("deny *.", "invalid host"), ("deny a b", "invalid host"),
    ("deny a\x07b", "invalid host"), ("deny \u00e4..b", "invalid host"), ("deny *.a\u200bb*", "invalid host"), ("deny \u2100.test", "invalid host"),
    ("deny \uff11\uff12\uff17.1", "write it out"), ("deny \uff0a.test", "invalid host"), ("deny :::", "write it out"),
    ("deny fe80::1%eth0", "leave out the zone"), ("deny fe80::1%2", "leave out the zone"), ("allow [fe80::%eth0]/64:80", "leave out the zone"),
])
def test_what_is_no_rule_is_refused_with_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(BadRule, match=says):
        Rule.parse(text)


@given(st.text())
@example("has host bits set")       # which is what ip_network() says of some
def test_any_text_is_a_rule_or_refused_as_one(text: str) -> None:
    for line in (text, f"allow {text}", f"deny {text}"):
        try:
            rule = Rule.parse(line)
        except BadRule:
            continue
        rule.matches(Address.numeric("192.0.2.1", 80), "example.com")


def text_of(rule: Optional[Rule]) -> Optional[str]:
    return rule and rule.text


@pytest.mark.parametrize(("rules", "host", "port", "by", "decides"), [
    ([], "192.0.2.1", 80, None, None),
    (["deny 10.0.0.0/8"], "10.1.2.3", 80, None, 0), (["deny 10.0.0.0/8"], "10.1.2.3", 80, "innocent.example", 0),
    (["deny 10.0.0.0/8:22"], "10.1.2.3", 80, None, None), (["deny :25"], "2001:db8::1", 25, None, 0),
    (["deny ads.example"], "192.0.2.1", 80, "ads.example", 0), (["deny ads.example"], "192.0.2.1", 80, "ADS.example.", 0),
    (["deny ads.example"], "192.0.2.1", 80, "www.ads.example", None), (["deny ads.example"], "192.0.2.1", 80, None, None),
    (["deny *.ads.example"], "192.0.2.1", 80, "www.ads.example", 0), (["deny *.ads.example"], "192.0.2.1", 80, "ads.example", 0),
    (["deny *.ads.example"], "192.0.2.1", 80, "badads.example", None),
    (["deny *.b\u00fccher.example"], "192.0.2.1", 80, "www.xn--bcher-kva.example", 0),
    (["deny xn--bcher-kva.example"], "192.0.2.1", 80, "B\u00dcCHER.example", 0),
    (["deny fa\u00df.test"], "192.0.2.1", 80, "xn--fa-hia.test", 0),
    (["deny fa\u00df.test"], "192.0.2.1", 80, "fass.test", None), (["deny fass.test"], "192.0.2.1", 80, "fa\u00df.test", None),
    # The first match decides, whatever it looks at.
    (["allow ok.example", "deny 0.0.0.0/0"], "192.0.2.1", 80, "ok.example", 0),
    (["allow ok.example", "deny 0.0.0.0/0"], "192.0.2.1", 80, "other.example", 1),
    (["deny 10.0.0.0/8", "allow *.example"], "10.0.0.1", 80, "in.example", 0),
    (["allow 10.0.0.5", "deny 10.0.0.0/8"], "10.0.0.5", 80, None, 0), (["allow :443", "deny *"], "192.0.2.1", 80, None, 1),
    # An IPv4 address in other clothes.
    (["deny 127.0.0.0/8"], "::ffff:127.0.0.1", 80, None, 0), (["deny 10.0.0.0/8"], "2002:0a01:0203::1", 80, None, 0),
    (["deny 10.0.0.0/8"], "64:ff9b::10.1.2.3", 80, None, 0), (["allow 10.0.0.0/8", "deny *"], "64:ff9b::10.1.2.3", 80, None, 1),
    (["deny 10.0.0.0/8"], "64:ff9b:1:abcd::10.1.2.3", 80, None, 0),         # wherever the prefix of the local gateway ends: /96
    (["deny 10.0.0.0/8"], "64:ff9b:1:abcd:a:102:300:0", 80, None, 0),       # /64
    (["deny 10.0.0.0/8"], "64:ff9b:1:ab0a:1:203::", 80, None, 0),           # /56
    (["deny 10.0.0.0/8"], "64:ff9b:1:a01:2:300::", 80, None, 0),            # /48
    (["deny 10.0.0.0/8"], "64:ff9b:1::192.0.2.1", 80, None, None), (["deny 0.0.0.0/8"], "64:ff9b:1::192.0.2.1", 80, None, None),
    (["allow 10.0.0.0/8", "deny *"], "64:ff9b:1::10.1.2.3", 80, None, 1), (["deny 127.0.0.0/8"], "0.0.0.0", 80, None, 0),
    (["deny ::1"], "::", 80, None, 0), (["deny 10.0.0.0/8"], "2001:db8::10.1.2.3", 80, None, None),
    # Whoever denies localhost means its addresses; other names have others tomorrow.
    (["deny localhost"], "127.0.0.1", 80, None, 0), (["deny *.Localhost."], "127.9.9.9", 80, "innocent.example", 0), (["deny localhost"], "::1", 80, None, 0),
    (["deny localhost"], "64:ff9b::127.0.0.1", 80, None, 0), (["deny localhost"], "::", 80, None, 0), (["deny localhost"], "192.0.2.1", 80, "localhost", 0),
    (["deny localhost:22"], "127.0.0.1", 80, None, None), (["deny localhost:22"], "127.0.0.1", 22, None, 0), (["deny localhost"], "192.0.2.1", 80, None, None),
    (["allow 127.0.0.1", "deny localhost"], "127.0.0.1", 80, None, 0), (["allow localhost", "deny *"], "127.0.0.1", 80, None, 1),
    (["deny localhost.example"], "127.0.0.1", 80, None, None),
])
def test_the_first_rule_that_matches_decides(rules: List[str], host: str, port: int, by: str, decides: Optional[int]) -> None:
    assert text_of(Rules.parse(rules).decide(Address.numeric(host, port), by)) == (None if decides is None else rules[decides])


@pytest.mark.parametrize(("rules", "decides"), [
    (["deny ads.example"], 0), (["deny :80"], 0), (["allow ads.example", "deny *"], 0), (["deny :25"], None), ([], None),
    (["deny 10.0.0.0/8", "deny ads.example"], 1),           # every address is denied, by the one or by the other
    (["deny 10.0.0.0/8", "deny 2001:db8::/32", "deny *"], 2), (["allow 10.0.0.0/8", "allow *.example"], 1),
    (["allow 10.0.0.0/8", "deny ads.example"], None), (["deny 10.0.0.0/8", "allow ads.example"], None),
    (["deny 10.0.0.0/8", "allow 192.0.2.0/24", "deny ads.example"], None), (["deny 10.0.0.0/8"], None),
    (["allow 10.0.0.0/8:22", "deny ads.example"], 1), (["allow 10.0.0.0/8:22-80", "deny ads.example"], None),
    (["deny 10.0.0.0/8", "deny ads.example:81-90", "allow *"], None), (["deny 10.0.0.0/8", "deny ads.example:80-90", "allow *"], 1),
    (["deny 0.0.0.0/0", "deny ::/0"], 1), (["deny 10.0.0.0/8", "deny ::/0", "deny 0.0.0.0/0", "allow *"], 2),
    (["deny 0.0.0.0/0", "deny [::]/0:81", "allow *"], None), (["allow 10.0.0.0/8", "deny 0.0.0.0/0", "deny ::/0"], None), (["deny 0.0.0.0/0"], None),
])
def test_a_name_is_denied_without_a_look_up_if_nothing_depends_on_its_addresses(rules: List[str], decides: Optional[int]) -> None:
    assert text_of(Rules.parse(rules).decide_by_name(name("ads.example", 80))) == (None if decides is None else rules[decides])


TARGETS_OF_RULES = st.sampled_from([
    "localhost", "*.localhost",
    "ads.example", "*.example", "other.example", "*", "10.0.0.0/8", "10.1.0.0/16", "192.0.2.1", "0.0.0.0/0", "::/0", "2001:db8::/32", "::1",
])
PORTS_OF_RULES = st.sampled_from(["", ":80", ":443", ":80-443", ":81-90"])
RULES = st.lists(st.builds(
    lambda action, host, ports: f"{action} {'[' + host.replace('/', ']/') + ']' * ('/' not in host) if ':' in host and ports else host}{ports}",
    st.sampled_from(["allow", "deny"]), TARGETS_OF_RULES, PORTS_OF_RULES,
), max_size=8)
EVERYWHERE = [Address.numeric(host, 80) for host in (        # one in each part into which those networks divide all addresses
    "10.1.2.3", "10.2.0.0", "64:ff9b:1::10.1.2.3", "192.0.2.1", "8.8.8.8", "127.0.0.1", "2001:db8::1", "::1", "2a00::1", "64:ff9b::10.1.2.3", "2002:0a02:0203::1", "::", "0.0.0.0",
)]


@given(RULES, st.sampled_from(["ads.example", "ADS.example.", "nothing.test", "localhost", "x.localhost"]))
@example(["deny 127.0.0.5", "deny ads.example"], "ads.example")
@example(["deny localhost", "allow *"], "ads.example")
@example(["deny localhost", "allow *"], "localhost")
@example(["deny 0.0.0.0/0", "deny [::]/0:80"], "nothing.test")
def test_what_is_decided_by_name_is_the_answer_for_every_address(rules: List[str], host: str) -> None:
    parsed = Rules.parse(rules)
    decided = parsed.decide_by_name(name(host, 80))
    deciding = [parsed.decide(address, host) for address in EVERYWHERE]
    answers = {rule is None or rule.allows for rule in deciding}
    if decided is not None:
        assert answers == {decided.allows}
    elif all(rule is not None for rule in deciding):        # by several rules, or it would have been decided
        actions = {rule.allows for rule in parsed if 80 in rule.ports}
        assert actions == {True, False}


@pytest.mark.parametrize(("host", "local"), [
    *((host, True) for host in (
        "127.0.0.1", "127.8.9.10", "::1", "0.0.0.0", "::", "169.254.169.254", "fe80::1", "fd00:ec2::254", "::ffff:127.0.0.1",
        "64:ff9b::127.0.0.1", "2002:7f00:1::", "224.0.0.1", "239.255.255.250", "255.255.255.255", "ff01::1", "ff02::fb",
        "ff0e::1", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:42::42", "fd00:a9fe:a9fe::1",
        "64:ff9b::168.63.129.16", "64:ff9b:1::169.254.169.254", "64:ff9b:1:7f00:0:100::", "::ffff:224.0.0.1", "64:ff9b::224.0.0.1",
    )),
    *((host, False) for host in (
        "192.168.1.1", "8.8.8.8", "2001:db8::1", "fd00::1", "64:ff9b:1::8.8.8.8", "64:ff9b:2::127.0.0.1", "100.100.100.201",
        "223.255.255.255", "240.0.0.1", "fe00::1",
    )),
])
def test_what_only_this_computer_should_reach(host: str, local: bool) -> None:
    assert is_local(Address.numeric(host, 80)) is local


# --- in the server ---

HERE = handler_with(resolve=lambda _self, _host: [LOCALHOST])       # as if every name were this computer's


def is_denied(client: Client, place: Any) -> bool:
    return client.ask(Command.CONNECT, place).code is ReplyCode.NOT_ALLOWED


@pytest.mark.parametrize("asked", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "0"])
def test_a_denied_network_is_denied_however_it_is_spelled(asked: str, start_server: Any, new_client: Any, echo: Any) -> None:
    """E17."""
    server = start_server(rules=["deny 127.0.0.0/8", "deny ::1"])
    assert is_denied(new_client(server), name(asked, echo[1]))
    assert server.next_ended().reason == "rule: deny 127.0.0.0/8" or asked == "localhost"     # which may be ::1 first


def test_a_denied_name_is_not_looked_up(start_server: Any, new_client: Any) -> None:
    asked: List[str] = []
    noting = handler_with(resolve=lambda _self, host: asked.append(host))
    server = start_server(noting, rules=["deny 127.0.0.5", "deny *.ads.example"])
    assert is_denied(new_client(server), name("www.ads.example", 80))
    session = server.next_ended()
    assert (session.outcome, session.reason, asked) == ("denied", "rule: deny *.ads.example", [])


def test_a_name_that_is_allowed_is_allowed_whatever_its_address(start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(HERE, rules=["allow good.example", "deny *"])
    client = new_client(server)
    client.connect(name("good.example", echo[1]))
    exchange(client)
    assert is_denied(new_client(server), name("bad.example", echo[1]))
    assert is_denied(new_client(server), echo)


def test_datagrams_are_judged_by_the_same_list(start_server: Any, new_client: Any) -> None:
    server = start_server(HERE, rules=["allow good.example", "deny *"])
    relay = new_client(server).ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    with udp_socket() as client, udp_socket() as target:
        port = target.getsockname()[1]
        for place, data in ((Address.numeric(LOCALHOST, port), b"by address"), (name("bad.example", port), b"by a bad name"),
                            (name("good.example", port), b"by a good name")):
            client.sendto(bytes(Datagram(place, data)), relay[:2])
        assert target.recv(100) == b"by a good name"


def test_the_peer_of_bind_is_judged(start_server: Any, new_client: Any) -> None:
    client = new_client(start_server(rules=["deny 127.0.0.2", "allow *"]))
    bound = client.ask(Command.BIND, Address.numeric("0.0.0.0", 0)).bound
    with socket.create_connection(bound[:2], 10, ("127.0.0.2", 0)) as stranger:
        assert stranger.recv(1) == b""
    with socket.create_connection(bound[:2], 10) as peer:
        assert Reply.read(client).bound == Address.of(peer.getsockname())


# --- other computers ---

@pytest.mark.parametrize("asked", [LOCALHOST, "localhost", "0.0.0.0", "127.1", pytest.param("::1", marks=needs_ipv6)])
def test_other_computers_do_not_reach_this_ones_own_addresses(asked: str, start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(elsewhere=True)
    assert is_denied(new_client(server), name(asked, echo[1]))
    assert "for this computer only" in server.next_ended().reason


def test_an_address_of_this_computer_is_its_own_although_it_is_none_of_loopback(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any) -> None:
    monkeypatch.setattr(locality, "kind_of_route", lambda host: locality.LOCAL if host == "192.0.2.7" else locality.NO_ROUTE)
    server = start_server(elsewhere=True)
    for host in ("192.0.2.7", "64:ff9b::c000:207", "64:ff9b:1::c000:207", "2002:c000:207::1"):      # by way of a gateway, too
        assert is_denied(new_client(server), name(host, 9))
        assert server.next_ended().reason == f"{address_of((host, 9))} is for this computer only"


def test_other_computers_reach_them_where_that_is_switched_on(start_server: Any, new_tunnel: Any) -> None:
    new_tunnel(start_server(elsewhere=True, allow_local_targets=True))


def test_a_client_on_this_computer_is_known_as_one(start_server: Any) -> None:
    server = start_server()
    assert [server.policy.is_here(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "192.0.2.1")] == [True, True, True, False]
