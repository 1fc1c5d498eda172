"""
Clients, targets and listeners at link-local addresses: fe80::1, and which link is meant.

The zone, as in fe80::1%eth0, is for this computer only: it is on no message, and in no line of the log.
"""

from __future__ import annotations

import socket
from io import BytesIO
from ipaddress import ip_network
from typing import Any, Callable, Iterator

import pytest

from socks5srv import check, locality, outbound
from socks5srv.client import Conversation, Proxy, bind, connect, udp_associate
from socks5srv.handler import Socks5Handler
from socks5srv.outbound import Route
from socks5srv.protocol import UNSPECIFIED, Address, AddressType, Command, Datagram, Method, Reply, ReplyCode, RequestFailed
from socks5srv.resolver import look_up
from socks5srv.rules import Rules
from socks5srv.upstream import UpstreamHandler

from .conftest import LOCALHOST, TIMEOUT, Client, exchange, handler_with, name
from .networks import LinkLocal


@pytest.fixture
def server(link_local: LinkLocal, start_server: Callable[..., Any]) -> Any:
    return start_server(address=(link_local.named, 0))


@pytest.fixture
def call(link_local: LinkLocal, new_client: Callable[..., Client]) -> Callable[[int], Client]:
    """A client of what listens there: ``call(port)``."""
    return lambda port: new_client((link_local.zoned, port))


@pytest.fixture
def port(server: Any) -> int:
    return server.server_address[1]


@pytest.fixture
def client(call: Callable[[int], Client], port: int) -> Client:
    return call(port)


@pytest.fixture
def udp(link_local: LinkLocal) -> Iterator[socket.socket]:
    """A UDP socket at the link-local address."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.bind((link_local.host, 0, 0, link_local.scope))
        yield sock


@pytest.fixture
def udp_target() -> Iterator[socket.socket]:
    """A UDP socket that has nothing to do with the link."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.bind((LOCALHOST, 0))
        yield sock


def without_zone(reply: Reply) -> Address:
    assert (reply.code, reply.bound.address_type, reply.bound.scope) == (ReplyCode.SUCCEEDED, AddressType.IPV6, 0)
    return reply.bound


# --- where it listens ---

def test_it_listens_on_a_zone_by_name_and_by_number(link_local: LinkLocal, start_server: Any, call: Any, echo: Any) -> None:
    first = start_server(address=(link_local.named, 0))
    more = start_server(Socks5Handler, (LOCALHOST, 0), (link_local.zoned, 0))
    for port in (first.server_address[1], more.addresses[1][1]):
        client = call(port)
        client.connect(echo)
        exchange(client)
    assert Address.of(first.server_address).zoned == Address.of(more.addresses[1]).zoned == link_local.zoned


def test_the_number_of_a_zone_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver would open a socket for that, which nobody has counted."""
    monkeypatch.delattr(socket, "getaddrinfo")
    assert outbound.with_scope(("fe80::1%7", 1080)) == ("fe80::1", 1080, 0, 7)
    assert outbound.with_scope(("2001:db8::1", 1080)) == ("2001:db8::1", 1080)
    assert outbound.with_scope(("fe80::1", 1080, 0, 7)) == ("fe80::1", 1080, 0, 7)


def test_a_zone_that_there_is_not_cannot_be_listened_on(start_server: Any) -> None:
    with pytest.raises(OSError, match=r"not known|No such"):
        start_server(address=("fe80::1%no-such-if", 0))


def test_it_stops_in_no_time(server: Any) -> None:
    """It calls itself for that."""
    [listener] = server.listeners
    server.shutdown()
    listener.join(TIMEOUT)
    assert listener.threads == set()


def test_its_own_listener_is_no_target(link_local: LinkLocal, server: Any, start_server: Any, call: Any) -> None:
    for each in (server, start_server(address=("::", 0))):
        port = each.server_address[1]
        assert call(port).ask(Command.CONNECT, (link_local.host, port)) == Reply(ReplyCode.NOT_ALLOWED)
        assert each.next_ended().reason.endswith("is this server itself")


# --- a client at such an address ---

@pytest.mark.parametrize("listening", ["%", "::"])
def test_a_client_on_the_link_has_all_three_commands(
        link_local: LinkLocal, start_server: Any, call: Any, echo: Any, udp: Any, udp_target: Any, listening: str) -> None:
    port = start_server(address=(link_local.named if listening == "%" else listening, 0)).server_address[1]
    client = call(port)
    client.connect(echo)
    exchange(client)

    client = call(port)
    bound = without_zone(client.ask(Command.BIND, UNSPECIFIED))
    assert bound.host == link_local.host
    peer = call(bound.port)
    assert without_zone(Reply.read(client)) == Address.of(peer.socket.getsockname())._replace(scope=0)
    peer.send(b"hello")
    assert client.exactly(5) == b"hello"

    client = call(port)
    bound = without_zone(client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED))
    assert bound.host == link_local.host
    there = Address.of(udp_target.getsockname())
    udp.sendto(bytes(Datagram(there, b"out")), (bound.host, bound.port, 0, link_local.scope))
    data, source = udp_target.recvfrom(100)
    assert data == b"out"
    udp_target.sendto(b"and back", source)
    assert udp.recv(100) == bytes(Datagram(there, b"and back"))


def test_it_reaches_targets_on_its_own_link(
        link_local: LinkLocal, client: Client, call: Any, port: int, listen: Any, udp: Any) -> None:
    """It cannot say which link it means; the one by which it has come is the only one that it can know."""
    target = listen("::")
    reply = client.ask(Command.CONNECT, (link_local.host, target.getsockname()[1]))
    accepted, peer = target.accept()
    with accepted:
        assert without_zone(reply) == Address.of(peer)._replace(scope=0)
        accepted.sendall(b"from the link")
        assert client.exactly(13) == b"from the link"

    client = call(port)
    bound = without_zone(client.ask(Command.BIND, (link_local.host, 0)))
    with call(bound.port):
        assert Reply.read(client).code is ReplyCode.SUCCEEDED

    client = call(port)
    bound = without_zone(client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED))
    here = Address.of(udp.getsockname())
    udp.sendto(bytes(Datagram(here, b"to itself")), (bound.host, bound.port, 0, link_local.scope))
    data, outer = udp.recvfrom(100)
    assert data == b"to itself"
    udp.sendto(b"again", outer)
    answer = Datagram.read(BytesIO(udp.recv(100)))
    assert (answer.address, answer.data) == (here._replace(scope=0), b"again")


def test_a_client_of_another_link_reaches_none(link_local: LinkLocal, start_server: Any, new_client: Any) -> None:
    """The address alone does not say where."""
    assert new_client(start_server()).ask(Command.CONNECT, (link_local.host, 9)).code is ReplyCode.GENERAL_FAILURE


def test_a_name_leads_to_the_zone_that_the_resolver_knows(
        link_local: LinkLocal, start_server: Any, new_client: Any, listen: Any) -> None:
    target, handler = listen("::"), handler_with(resolve=lambda _self, _host: look_up(link_local.named))
    without_zone(new_client(start_server(handler)).connect(name("printer.local", target.getsockname()[1])))
    target.accept()[0].close()


@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND, Command.UDP_ASSOCIATE])
def test_a_zone_from_a_client_is_refused(link_local: LinkLocal, client: Client, command: Command) -> None:
    assert client.ask(command, name(link_local.named, 80)).code is not ReplyCode.SUCCEEDED


# --- whose address it is ---

def test_a_program_on_this_computer_is_known_by_it(link_local: LinkLocal, server: Any, client: Client, echo: Any) -> None:
    assert locality.is_own_address(link_local.zoned)
    assert locality.is_own_address(link_local.named)
    assert server.policy.is_here(link_local.zoned)
    assert not server.policy.is_here(f"fe80::dead%{link_local.scope}")
    assert not server.policy.is_here(link_local.host), "without its zone it is no address of anybody's"
    client.connect(echo)        # which only this computer reaches


def test_other_computers_on_the_link_do_not_reach_it(link_local: LinkLocal, server: Any, call: Any, port: int) -> None:
    server.policy.is_here = lambda _host: False
    for host in (link_local.host, "fe80::2"):
        assert call(port).ask(Command.CONNECT, (host, 9)) == Reply(ReplyCode.NOT_ALLOWED)


def test_rules_and_networks_know_it_without_its_zone(link_local: LinkLocal, server: Any, call: Any, port: int, echo: Any) -> None:
    server.allow_from, server.max_per_client = [ip_network("fe80::/10")], 1
    client = call(port)
    client.connect(echo)
    assert list(server.registry.hosts) == [link_local.host]
    assert call(port).rest() == b"", "it has its one connection already"
    client.close()
    server.next_ended()
    server.rules = Rules.parse([f"deny {link_local.host}"])
    assert call(port).ask(Command.CONNECT, (link_local.host, 9)) == Reply(ReplyCode.NOT_ALLOWED)
    assert server.next_ended().reason == f"rule: deny {link_local.host}"
    server.allow_from = [ip_network("192.0.2.0/24")]
    assert call(port).rest() == b""


def test_the_log_has_no_zone_either(link_local: LinkLocal, server: Any, client: Client, echo: Any, caplog: Any) -> None:
    """A program that bans clients, and one that reads the log as JSON, know addresses without."""
    caplog.set_level("DEBUG", "socks5srv")
    client.connect(echo)
    client.close()
    session = server.next_ended()
    assert session.client.scope == link_local.scope
    assert session.as_dict()["client"].startswith(f"[{link_local.host}]:")
    assert f"[{link_local.host}]:" in caplog.text
    assert "%" not in caplog.text


def test_logins_are_slowed_down_as_ever(link_local: LinkLocal, start_server: Any, call: Any) -> None:
    server = start_server(address=(link_local.named, 0), users={"anna": "sesame"})
    for password in ("wrong", "sesame"):
        with call(server.server_address[1]) as client:
            client.greet(Method.USERNAME_PASSWORD)
            assert (client.login("anna", password).status == 0) is (password == "sesame")


# --- going on from there ---

@pytest.mark.parametrize("zone", ["named", "zoned"])
def test_the_client_reaches_a_proxy_there(link_local: LinkLocal, port: int, start_echo: Any, udp_target: Any, zone: str) -> None:
    url = str(Proxy(getattr(link_local, zone), port))
    assert "%25" in url
    with connect(url, *start_echo("::1").server_address[:2]) as sock:
        exchange(sock)
    with bind(url) as waiting:
        assert waiting.address == Address.numeric(link_local.zoned, waiting.address.port)
        with socket.create_connection((waiting.address.zoned, waiting.address.port), TIMEOUT):
            waiting.accept()[0].close()
    with udp_associate(url) as relay:
        relay.socket.settimeout(TIMEOUT)
        relay.sendto(b"out", udp_target.getsockname())
        udp_target.sendto(*udp_target.recvfrom(100))
        assert relay.recvfrom() == (b"out", udp_target.getsockname())


def test_the_client_tells_the_proxy_no_zone(link_local: LinkLocal, start_server: Any) -> None:
    """It would not know what to do with it: the zones are this computer's."""
    server = start_server(handler_with(allow=lambda *_: False))
    for host in (link_local.named, link_local.zoned):
        with pytest.raises(RequestFailed, match="not allowed"):
            connect(f"socks5h://{LOCALHOST}:{server.server_address[1]}", host, 80)
        assert server.next_ended().destination == Address(link_local.host, 80, AddressType.IPV6)


def test_zeros_in_a_reply_are_on_the_link_of_the_connection(link_local: LinkLocal, client: Client) -> None:
    conversation = Conversation(client.socket, 0.0)
    for told, host in (("0.0.0.0", link_local.host), ("::", link_local.host), ("fe80::9", "fe80::9")):
        there = conversation.here(Address.numeric(told, 7))
        assert (there.host, there.scope) == (host, link_local.scope)
    assert conversation.here(Address.numeric("2001:db8::9", 7)).scope == 0


@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND, Command.UDP_ASSOCIATE])
def test_an_upstream_may_be_there(
        link_local: LinkLocal, port: int, start_server: Any, new_client: Any, call: Any, echo: Any, udp_target: Any,
        command: Command) -> None:
    url = f"socks5h://[{link_local.host}%25{link_local.interface}]:{port}"
    client = new_client(start_server(type("Through", (UpstreamHandler,), {"upstream": url})))
    reply = client.ask(command, echo if command is Command.CONNECT else UNSPECIFIED)
    assert reply.code is ReplyCode.SUCCEEDED
    if command is Command.CONNECT:
        exchange(client)
    elif command is Command.BIND:
        with call(reply.bound.port):
            assert without_zone(Reply.read(client)).host == link_local.host
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((LOCALHOST, 0))
            sock.sendto(bytes(Datagram(Address.of(udp_target.getsockname()), b"through both")), reply.bound.sockaddr)
            assert udp_target.recv(100) == b"through both"


def test_a_source_can_be_given_for_other_addresses(server: Any, client: Client, start_echo: Any) -> None:
    server.route = Route(source=("::1", LOCALHOST))
    client.connect(start_echo("::1").server_address)
    exchange(client)


def test_the_questions_of_the_rfcs_can_be_asked_there(link_local: LinkLocal, port: int) -> None:
    examiner = check.Examiner(Proxy(link_local.named, port), link_local.named, timeout=2.0)
    assert [(answer.name, answer.observed) for answer in examiner.examine() if answer.verdict == "fail"] == []
