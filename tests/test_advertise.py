"""What BND says, where that is not the address by which the client has come, and the ports that it may name."""

from __future__ import annotations

import random
import re
import socket
from collections import Counter
from contextlib import ExitStack
from ipaddress import ip_network
from typing import Any, Callable, List, Optional, Tuple

import pytest

from socks5srv import advertise
from socks5srv.advertise import Advertised, host_told_to, parse, shuffled
from socks5srv.handler import Socks5Handler
from socks5srv.observer import Observer
from socks5srv.outbound import Route
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Reply, ReplyCode
from socks5srv.upstream import UpstreamHandler

from .conftest import LOCALHOST, Client, eventually, in_thread, needs_ipv6, needs_neighbour
from .test_datagrams import UdpClient, associate, association_of, new_socket

__all__ = ["associate", "new_socket"]       # fixtures

NEIGHBOUR, OTHER = "127.0.0.2", "127.0.0.3"
ON_LOOPBACK = "127.0.0.0/8="                # whose computers are told another address only if it is asked for


# --- as it is written ---

@pytest.mark.parametrize(("text", "network", "host"), [
    ("203.0.113.7", "0.0.0.0/0", "203.0.113.7"), ("2001:DB8:0::7", "::/0", "2001:db8::7"), ("127.0.0.1", "0.0.0.0/0", "127.0.0.1"),
    ("0.0.0.0", "0.0.0.0/0", "0.0.0.0"), ("10.0.0.0/8=10.0.0.5", "10.0.0.0/8", "10.0.0.5"), ("10.0.0.0/8=auto", "10.0.0.0/8", "auto"),
    ("10.1.2.3=auto", "10.1.2.3/32", "auto"), ("fd00::/8=fd00::5", "fd00::/8", "fd00::5"), ("::/0=auto", "::/0", "auto"),
])
def test_it_is_an_address_with_the_network_that_it_is_for_or_without(text: str, network: str, host: str) -> None:
    assert parse(text) == (Advertised(ip_network(network), host),)


def test_auto_for_everybody_is_what_it_does_anyway() -> None:
    """Files that are made by programs have no way to leave an option out."""
    assert parse("auto", "203.0.113.7", "auto") == parse("203.0.113.7")


@pytest.mark.parametrize(("texts", "says"), [
    (["proxy.example.com"], "invalid address 'proxy.example.com': expected an IP address, or one with its network, as in 10.0.0.0/8=10.0.0.5"),
    ([""], "invalid address ''"), (["203.0.113.7:1080"], "invalid address '203.0.113.7:1080'"), (["10.0.0.0/8="], "invalid address ''"),
    (["fe80::1%eth0"], "invalid address"), (["fe80::1"], "neither link-local nor multicast"), (["224.0.0.1"], "neither link-local nor multicast"),
    (["10.0.0.1/8=auto"], "invalid network '10.0.0.1/8': expected NETWORK/BITS without host bits, such as 10.0.0.0/8"),
    (["=203.0.113.7"], "invalid network ''"), (["office=auto"], "invalid network 'office'"),
    (["10.0.0.0/8=fd00::5"], "invalid address '10.0.0.0/8=fd00::5': nobody reaches fd00::5 from an IPv4 network"),
    (["203.0.113.7", "203.0.113.8"], "203.0.113.7 and 203.0.113.8 are for the same clients: name the network that one of them is for"),
    (["10.0.0.0/8=auto", "203.0.113.7", "10.0.0.0/8=10.0.0.5"], "as in 10.0.0.0/8=10.0.0.5"),
])
def test_what_cannot_be_meant_is_refused_with_the_way_out(texts: List[str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(*texts)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("peer", "host"), [
    ("198.51.100.9", "203.0.113.7"), ("10.1.2.3", None), ("10.9.2.3", "10.9.0.5"), ("2001:db8::9", "2001:db8::7"), ("fd00::9", None),
    # It would be of no use to them: what they sent to it would come from another address.
    ("127.0.0.1", None), ("::1", None), ("169.254.1.1", None), ("fe80::9", None),
])
def test_the_smallest_network_decides_whatever_the_order(peer: str, host: Optional[str], order: int) -> None:
    advertised = parse("203.0.113.7", "10.0.0.0/8=auto", "10.9.0.0/16=10.9.0.5", "2001:db8::7", "fd00::/8=auto")[::order]
    assert host_told_to(Address.numeric(peer, 0), advertised) == host


def test_one_family_says_nothing_of_the_other() -> None:
    assert host_told_to(Address.numeric("2001:db8::9", 0), parse("203.0.113.7")) is None


@pytest.mark.parametrize(("first", "last"), [(1, 1), (5, 6), (65535, 65535), (20000, 20999), (20000, 20096)])
def test_ports_are_tried_once_each_in_another_order_each_time(first: int, last: int) -> None:
    ports = range(first, last + 1)
    orders = [list(shuffled(ports)) for _ in range(5)]
    assert all(sorted(order) == list(ports) for order in orders)
    assert len(ports) < 10 or len(set(map(tuple, orders))) > 1


# --- UDP ASSOCIATE ---

@pytest.fixture(params=["the system tells where a datagram arrives", "it does not"])
def tells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Windows does not, nor macOS by the module socket of an old Python."""
    if request.param == "it does not":
        monkeypatch.setattr(advertise, "IP_PKTINFO", 0)
    elif not advertise.tells_arrival():
        pytest.skip("not on this platform: IP_PKTINFO")
    return bool(advertise.tells_arrival())


@pytest.fixture
def told(start_server: Any, associate: Any) -> Callable[..., UdpClient]:
    """A client on loopback that is told this address, with its association."""
    def make(host: str, client: str = LOCALHOST, **settings: Any) -> UdpClient:
        network = "::1/128=" if ":" in host else ON_LOOPBACK
        server = start_server(address=("::1" if ":" in host else LOCALHOST, 0), route=Route(advertise=parse(network + host)))
        found: UdpClient = associate(server, client, **settings)
        found.association = association_of(server)
        return found

    return make


LOOPBACKS = [LOCALHOST, pytest.param(NEIGHBOUR, marks=needs_neighbour), pytest.param("::1", marks=needs_ipv6)]


@pytest.mark.parametrize("host", LOOPBACKS)
def test_a_client_is_told_the_address_and_comes_by_it(host: str, tells: bool, told: Any, new_socket: Any) -> None:
    """Its answers come from there, or it would not take them: UdpClient.answer() looks."""
    client = told(host, "::1" if host == "::1" else LOCALHOST)
    assert client.relay.host == host
    target = new_socket(client.address.host)
    if not tells and host == NEIGHBOUR:
        client.send_to(target.address, b"heard at least")
        assert target.receive()[0] == b"heard at least"
        return
    for number in range(3):
        client.echo(target, b"%d" % number)
    own = client.association.client_socket
    assert own.connected == (tells and host != NEIGHBOUR), "the kernel keeps strangers out if the route leads back from there"


@needs_neighbour
@pytest.mark.parametrize("arrives_at", [NEIGHBOUR, OTHER, LOCALHOST])
def test_whichever_of_our_addresses_a_datagram_arrives_at_it_is_answered_from_that(
        arrives_at: str, told: Any, new_socket: Any) -> None:
    """NAT chooses it, and takes an answer from no other.  Nothing of ours has to have what is told."""
    if not advertise.tells_arrival():
        pytest.skip("not on this platform: IP_PKTINFO")
    client, target = told("203.0.113.7"), new_socket()
    assert client.relay.host == "203.0.113.7"
    client.relay = client.relay._replace(host=arrives_at)       # as the NAT in front of us would translate it
    client.echo(target)
    client.echo(target, b"again")


@needs_neighbour
def test_a_client_that_is_moved_to_another_of_our_addresses_is_answered_from_there(told: Any, new_socket: Any) -> None:
    if not advertise.tells_arrival():
        pytest.skip("not on this platform: IP_PKTINFO")
    client, target = told(NEIGHBOUR), new_socket()
    for host in (NEIGHBOUR, OTHER, NEIGHBOUR, LOCALHOST):       # from the last one on it can be heard there only
        client.relay = client.relay._replace(host=host)
        client.echo(target)
    assert client.association.client_socket.connected


@needs_neighbour
@pytest.mark.usefixtures("tells")
@pytest.mark.parametrize("host", [LOCALHOST, NEIGHBOUR])
def test_nobody_else_is_heard_nor_sent_anything(host: str, told: Any, new_socket: Any) -> None:
    """Another host is not before the client has come, another port is not after that."""
    client, target, stranger, neighbour = told(host), new_socket(), new_socket(OTHER), new_socket()
    assert not client.is_heard(stranger, target)
    client.send_to(target.address, b"first")
    assert target.receive()[0] == b"first"
    for other in (stranger, neighbour):
        assert not client.is_heard(other, target)
        assert other.has_nothing()
    client.send_to(target.address, b"and on")
    assert target.receive()[0] == b"and on"


@needs_neighbour
@pytest.mark.parametrize("host", [LOCALHOST, NEIGHBOUR])
def test_a_client_that_names_its_port_is_heard_from_there_only(host: str, start_server: Any, associate: Any, new_socket: Any) -> None:
    server = start_server(route=Route(advertise=parse(ON_LOOPBACK + host)))
    client, target, neighbour = associate(server, asked=lambda own: own), new_socket(), new_socket()
    assert not client.is_heard(neighbour, target)
    client.echo(target)


@needs_neighbour
@pytest.mark.usefixtures("tells")
@pytest.mark.parametrize("host", [LOCALHOST, NEIGHBOUR])
def test_a_client_that_has_been_silent_may_go_on_from_another_port(host: str, told: Any, new_socket: Any) -> None:
    client, target, moved = told(host, idle_timeout=0.1), new_socket(), new_socket()
    client.send_to(target.address, b"first")
    assert target.receive()[0] == b"first"
    eventually(lambda: client.is_heard(moved, target))
    assert client.relay.port == client.association.client_socket.socket.getsockname()[1]


@needs_neighbour
@pytest.mark.parametrize("victim", [LOCALHOST, NEIGHBOUR, OTHER])
def test_a_datagram_to_a_relay_does_not_loop_by_whichever_address(victim: str, start_server: Any, associate: Any, new_socket: Any) -> None:
    server = start_server(route=Route(advertise=parse(ON_LOOPBACK + NEIGHBOUR)))
    client, other = associate(server), associate(server)
    for relay in (client.relay, other.relay):
        client.send_to(relay._replace(host=victim), bytes(Datagram(client.address, b"round and round")))
    other.send_to(new_socket().address, b"5 oct")           # its port was not taken
    client.echo(new_socket())
    eventually(lambda: sorted(session.up for session in server.sessions) == [5, 5])
    other.control.close()
    client.control.close()
    eventually(lambda: not server.policy.relays)


@needs_neighbour
def test_the_observers_of_datagrams_see_these_too(start_server: Any, associate: Any, new_socket: Any) -> None:
    seen: List[Tuple[bool, bytes]] = []

    class Seeing(Observer):
        def datagram(self, session: Any, to_client: bool, octets: bytes, outcome: str) -> None:
            seen.append((to_client, octets[-5:]))

    server = start_server(observers=[Seeing()], route=Route(advertise=parse(ON_LOOPBACK + NEIGHBOUR)))
    associate(server).echo(new_socket())
    eventually(lambda: seen == [(False, b"hello"), (True, b"hello")])


@needs_neighbour
def test_a_server_that_goes_through_another_one_says_the_same(start_server: Any, associate: Any, new_socket: Any) -> None:
    """And needs one port of them: its own datagrams to the other leave from any."""
    ports, upstream = free_ports(1), f"socks5h://{LOCALHOST}:{start_server().server_address[1]}"
    client = associate(start_server(UpstreamHandler, upstream=upstream, route=Route(advertise=parse(ON_LOOPBACK + NEIGHBOUR), udp_ports=ports)))
    assert client.relay == Address.numeric(NEIGHBOUR, ports[0])
    client.echo(new_socket())


@needs_ipv6
@pytest.mark.parametrize(("client", "family"), [(NEIGHBOUR, "127.0.0."), ("::1", "::1")])
def test_a_client_that_has_come_by_a_balancer_is_told_where_it_can_reach_us(client: str, family: str, start_server: Any, associate: Any, new_socket: Any) -> None:
    """The balancer may have come by another family, or on loopback.  The client is who its datagrams have to come from."""
    class Behind(Socks5Handler):
        def setup(self) -> None:
            self.session.client = Address.numeric(client, 1)
            super().setup()

    found, target, balancer = associate(start_server(Behind), client), new_socket(client), new_socket()
    assert found.relay.host.startswith(family)
    if family != "::1":
        assert not found.is_heard(balancer, target)
    found.echo(target)


# --- BIND ---

@needs_neighbour
def test_the_peer_of_bind_is_told_the_address_that_it_can_reach(start_server: Any, new_client: Any) -> None:
    """It counts where the peer is, if the client has said so, and else where the client is."""
    server = start_server(route=Route(advertise=parse("127.0.0.2/32=127.0.0.4", "127.0.0.1/32=127.0.0.5")))
    for asked, host, caller in (((NEIGHBOUR, 0), "127.0.0.4", NEIGHBOUR), ((LOCALHOST, 0), "127.0.0.5", LOCALHOST), (UNSPECIFIED, "127.0.0.5", OTHER)):
        client = new_client(server)
        first = client.ask(Command.BIND, asked)
        assert (first.code, first.bound.host) == (ReplyCode.SUCCEEDED, host)
        peer = new_client((host, first.bound.port), caller)
        assert Reply.read(client).bound == Address.of(peer.socket.getsockname())
        peer.send(b"220 ready")
        assert client.exactly(9) == b"220 ready"


def test_what_is_told_need_not_be_an_address_of_ours(start_server: Any, new_client: Any) -> None:
    server = start_server(route=Route(advertise=parse(ON_LOOPBACK + "203.0.113.7")))
    client = new_client(server)
    first = client.ask(Command.BIND, UNSPECIFIED)
    assert first.bound.host == "203.0.113.7"
    peer = new_client((LOCALHOST, first.bound.port))        # as NAT would have it
    assert Reply.read(client).bound == Address.of(peer.socket.getsockname())
    assert server.sessions[0].bound == first.bound


# --- the ports ---

def free_ports(number: int) -> range:
    """Ports in a row of which nothing on this computer has one, for UDP nor for TCP; beside those that the system hands out."""
    for _ in range(100):
        first = random.randrange(10_000, 30_000)
        with ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                        stack.enter_context(socket.socket(socket.AF_INET, kind)).bind(("0.0.0.0", port))
            except OSError:
                continue
            return range(first, first + number)
    raise AssertionError("there are none")


@pytest.fixture(params=[Command.UDP_ASSOCIATE, Command.BIND], ids=["UDP", "BIND"])
def command(request: pytest.FixtureRequest) -> Command:
    return Command(request.param)


@pytest.mark.parametrize("texts", [(), (ON_LOOPBACK + LOCALHOST,)], ids=["where they come", "everywhere"])
def test_each_client_has_a_port_of_those_until_there_are_no_more(texts: Any, command: Command, start_server: Any, new_client: Any) -> None:
    ports = free_ports(5)
    server = start_server(route=Route(udp_ports=ports, advertise=parse(*texts)))
    clients = [new_client(server) for _ in ports]
    assert sorted(client.ask(command, UNSPECIFIED).bound.port for client in clients) == list(ports)
    one_too_many = new_client(server)
    assert one_too_many.ask(command, UNSPECIFIED) == Reply(ReplyCode.GENERAL_FAILURE)
    session = server.next_ended()
    assert str(session).endswith(f"failed (reply 01): all ports of --udp-ports {ports[0]}-{ports[-1]} are in use")
    clients[3].close()
    server.next_ended()
    assert new_client(server).ask(command, UNSPECIFIED).bound.port in ports


@needs_ipv6
def test_both_families_and_both_commands_have_them_all(start_server: Any, new_client: Any) -> None:
    """They are not in each other's way."""
    ports = free_ports(1)
    server = start_server(Socks5Handler, (LOCALHOST, 0), ("::1", 0), route=Route(udp_ports=ports, advertise=parse("127.0.0.1=127.0.0.1", "::1=::1")))
    for address in server.addresses:
        for command in (Command.UDP_ASSOCIATE, Command.BIND):
            assert new_client(address).ask(command, UNSPECIFIED).bound == Address.numeric(address[0], ports[0])


def test_a_port_can_be_had_again_as_soon_as_its_peer_has_come(start_server: Any, new_client: Any) -> None:
    """And while that connection is there, and when we have closed it first."""
    [port] = ports = free_ports(1)
    server = start_server(route=Route(udp_ports=ports))
    for _ in range(5):
        client = new_client(server)
        assert client.ask(Command.BIND, UNSPECIFIED).bound.port == port
        new_client((LOCALHOST, port))
        assert Reply.read(client).code is ReplyCode.SUCCEEDED
        client.close()


def test_only_what_clients_send_to_is_on_these_ports(start_server: Any, associate: Any, new_socket: Any) -> None:
    ports = free_ports(1)
    client = associate(start_server(route=Route(udp_ports=ports)))
    assert client.relay.port in ports
    assert client.reach(new_socket()).port not in ports


def test_many_clients_at_once_each_get_a_port_of_their_own(command: Command, start_server: Any) -> None:
    """As many as there are, and the others are told."""
    ports = free_ports(20)
    server = start_server(route=Route(udp_ports=ports))
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.server_address)) for _ in range(30)]
        replies = [reply() for reply in [in_thread(client.ask, command, UNSPECIFIED) for client in clients]]
    found = Counter(reply.bound.port for reply in replies if reply.code is ReplyCode.SUCCEEDED)
    assert found == Counter(ports)
    assert [reply.code for reply in replies].count(ReplyCode.GENERAL_FAILURE) == 10
