"""
Clients, servers and targets on computers of their own, with routers and NAT between them: what loopback cannot show.

    client ---- router ---- node1, node2        the router is a balancer, too: it shares out what comes to BALANCED
                   |
                 target

The hosts are network namespaces: see networks.py.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import socketserver
import struct
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any, Callable, Iterator, List, NamedTuple, Set, Tuple

import pytest

from socks5srv import relay
from socks5srv.client import bind, connect, udp_associate
from socks5srv.descriptors import descriptors
from socks5srv.outbound import Route
from socks5srv.protocol import Address, Command, Datagram, ReplyCode, RequestFailed

from .conftest import TIMEOUT, Client, eventually, exchange, handler_with, socket_for, udp_socket
from .networks import Host, Networks, set_up
from .program import Outcome, Service
from .test_upstream import url_of

Start = Callable[..., Service]

BALANCED, PUBLIC = "203.0.113.1", ("203.0.113.5", "203.0.113.6")    # of both nodes, and of each
CLIENT, STRANGER, TARGET = "198.51.100.10", "198.51.100.11", "192.0.2.9"
BALANCER = "10.0.3.2"
PORTS = range(20000, 20010)

# What comes to BALANCED goes to one node after the other; the rest straight to the node that the address says, at an
# address of it that is not the one to which the balancer goes.  The nodes go out from an address of the router.
NAT = """
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat
        ip daddr 203.0.113.1 tcp dport 1080 dnat to numgen inc mod 2 map { 0 : 10.0.1.5, 1 : 10.0.2.5 }
        ip daddr 203.0.113.5 meta l4proto { tcp, udp } th dport 20000-20009 dnat to 10.0.1.5
        ip daddr 203.0.113.6 meta l4proto { tcp, udp } th dport 20000-20009 dnat to 10.0.2.15
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 10.0.0.0/16 ip daddr != 10.0.0.0/16 masquerade
    }
}
"""


@pytest.fixture
def networks() -> Iterator[Networks]:
    found = Networks()
    yield found
    found.close()


class Site(NamedTuple):
    """The picture above, and what serves on the nodes."""

    client: Host
    router: Host
    target: Host
    nodes: Tuple[Host, Host]
    services: List[Service]


@pytest.fixture
def site(networks: Networks, start: Start) -> Site:
    client, router, target, *nodes = map(networks.host, ("client", "router", "target", "node1", "node2"))
    networks.cable(client, f"{CLIENT}/24 {STRANGER}/24", router, "198.51.100.1/24")
    networks.cable(target, f"{TARGET}/24", router, "192.0.2.1/24")
    networks.cable(nodes[0], "10.0.1.5/24", router, "10.0.1.1/24")
    networks.cable(nodes[1], "10.0.2.5/24 10.0.2.15/24", router, "10.0.2.1/24")
    for host, gateway in ((client, "198.51.100.1"), (target, "192.0.2.1"), (nodes[0], "10.0.1.1"), (nodes[1], "10.0.2.1")):
        host.ip(f"route add default via {gateway}")
    router.forward()
    router.nft(NAT)
    services = []
    for node, public, words in zip(nodes, PUBLIC, ([], ["--workers", "2"])):
        with node.inside():
            services.append(start(
                "-b", "0.0.0.0", "--allow-open-proxy", "--advertise", public, "--advertise", "10.0.0.0/8=auto",
                "--udp-ports", f"{PORTS[0]}-{PORTS[-1]}", "--proxy-protocol", BALANCER, *words, port="1080",
            ))
    return Site(client, router, target, (nodes[0], nodes[1]), services)


@pytest.fixture
def hosted() -> Iterator[ExitStack]:
    """What tests open on hosts is closed at the end."""
    with ExitStack() as stack:
        yield stack


def udp_echo(relay: Any, target: socket.socket, data: bytes = b"hello") -> str:
    """Have `target` receive a datagram by the relay and send it back; where it came from."""
    relay.socket.settimeout(TIMEOUT)
    relay.sendto(data, target.getsockname())
    received, source = target.recvfrom(65535)
    assert received == data
    target.sendto(data, source)
    assert relay.recvfrom() == (data, target.getsockname())
    return str(source[0])


def test_datagrams_come_straight_to_the_node_that_the_balancer_has_chosen(site: Site, hosted: ExitStack) -> None:
    """Through its NAT, at whichever of its addresses; and back from where they went: the client's socket is connected to BND."""
    with site.target.inside():
        target = hosted.enter_context(udp_socket(TARGET))
    told: Set[Address] = set()
    with site.client.inside():
        for _ in range(8):
            relay = hosted.enter_context(udp_associate(f"socks5h://{BALANCED}:1080"))
            assert relay.address.port in PORTS
            told.add(relay.address)
            for _ in range(3):
                assert udp_echo(relay, target) == "192.0.2.1", "it goes out by NAT"
    assert len(told) == 8
    assert {address.host for address in told} == set(PUBLIC)


def test_a_stranger_is_not_heard_through_nat_either(site: Site, hosted: ExitStack) -> None:
    """Neither from another address, nor from another port of the client's."""
    with site.target.inside():
        target = hosted.enter_context(udp_socket(TARGET))
    forged = bytes(Datagram(Address.of(target.getsockname()), b"forged"))
    with site.client.inside():
        stranger, neighbour = (hosted.enter_context(udp_socket(host)) for host in (STRANGER, CLIENT))
        for _ in site.nodes:
            relay = hosted.enter_context(udp_associate(f"socks5h://{BALANCED}:1080"))
            there = relay.address.host, relay.address.port
            stranger.sendto(forged, there)
            udp_echo(relay, target)
            neighbour.sendto(forged, there)
            stranger.sendto(forged, there)
            udp_echo(relay, target)         # it is the next that comes


def test_the_peer_of_bind_comes_straight_to_the_node(site: Site, hosted: ExitStack) -> None:
    told = set()
    for _ in range(4):
        with site.client.inside():
            waiting = hosted.enter_context(bind(f"socks5h://{BALANCED}:1080", TARGET))
        assert waiting.address[1] in PORTS
        told.add(waiting.address[0])
        with site.target.inside():
            peer = hosted.enter_context(socket.create_connection(waiting.address[:2], TIMEOUT))
        accepted, address = waiting.accept()
        hosted.enter_context(accepted)
        assert address == Address.of(peer.getsockname())
        peer.sendall(b"220 ready")
        accepted.settimeout(TIMEOUT)
        assert accepted.recv(100) == b"220 ready"
    assert told == set(PUBLIC)


def test_who_is_beside_a_node_is_told_its_own_address(site: Site, hosted: ExitStack) -> None:
    with site.nodes[1].inside():
        target = hosted.enter_context(udp_socket("10.0.2.15"))
        relay = hosted.enter_context(udp_associate("socks5h://10.0.1.5:1080"))
        assert (relay.address.host, relay.address.port in PORTS) == ("10.0.1.5", True)
        assert udp_echo(relay, target) == "10.0.1.5"


def test_the_workers_of_a_node_share_its_ports(site: Site, hosted: ExitStack) -> None:
    """Each client has one of its own, and the log of the first for whom there is none says so."""
    with site.nodes[0].inside():
        relays = [hosted.enter_context(udp_associate("socks5h://10.0.2.5:1080")) for _ in PORTS]
        assert sorted(relay.address.port for relay in relays) == list(PORTS)
        with pytest.raises(RequestFailed) as refused:
            udp_associate("socks5h://10.0.2.5:1080")
    assert refused.value.code is ReplyCode.GENERAL_FAILURE
    site.services[1].wait_for("all ports of --udp-ports 20000-20009 are in use")


def test_a_client_behind_nat_of_its_own_has_its_association_too(site: Site, networks: Networks, hosted: ExitStack) -> None:
    """The node sees neither its address nor its port, and what it has named in its request is nothing to go by."""
    home = networks.host("home")
    networks.cable(home, "192.168.1.10/24", site.client, "192.168.1.1/24")
    home.ip("route add default via 192.168.1.1")
    site.client.forward()
    site.client.nft("table ip nat { chain postrouting { type nat hook postrouting priority srcnat; ip saddr 192.168.1.0/24 masquerade random; }; }")
    with site.target.inside():
        target = hosted.enter_context(udp_socket(TARGET))
    for named in ("0.0.0.0", "192.168.1.10", TARGET):
        with home.inside():
            sock = hosted.enter_context(udp_socket("192.168.1.10"))
            control = hosted.enter_context(Client((BALANCED, 1080)))
            bound = control.ask(Command.UDP_ASSOCIATE, (named, sock.getsockname()[1])).bound
        sock.connect((bound.host, bound.port))
        for data in (b"hello", b"again"):
            sock.send(bytes(Datagram(Address.of(target.getsockname()), data)))
            received, source = target.recvfrom(100)
            assert received == data
            target.sendto(data[::-1], source)
            assert sock.recv(100)[-5:] == data[::-1]


def test_tunnels_go_through_the_balancer_as_ever(site: Site, hosted: ExitStack) -> None:
    with site.target.inside():
        listener = hosted.enter_context(socket.create_server((TARGET, 0)))
    with site.client.inside():
        client = hosted.enter_context(connect(f"socks5h://{BALANCED}:1080", *listener.getsockname()))
    accepted = hosted.enter_context(listener.accept()[0])
    client.sendall(b"hello")
    assert accepted.recv(5) == b"hello"


# --- a balancer that tells the nodes of the client: the PROXY protocol ---

class TellingBalancer(socketserver.ThreadingTCPServer):
    """Goes to one node after the other, with a header of this version, and passes on what comes."""

    daemon_threads = allow_reuse_address = True

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((next(self.server.nodes), 1080), TIMEOUT) as node:
                node.sendall(self.server.header(self.client_address, self.request.getsockname()))
                threading.Thread(target=self.copy, args=(node, self.request), daemon=True).start()
                self.copy(self.request, node)

        def copy(self, source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                for octets in iter(lambda: source.recv(4096), b""):
                    sink.sendall(octets)
                sink.shutdown(socket.SHUT_WR)

    def __init__(self, version: int) -> None:
        super().__init__((BALANCER, 1080), self.Handler)
        self.version, self.nodes = version, itertools.cycle(("10.0.1.5", "10.0.2.5"))

    def header(self, client: Any, here: Any) -> bytes:
        if self.version == 1:
            return f"PROXY TCP4 {client[0]} {here[0]} {client[1]} {here[1]}\r\n".encode()
        addresses = socket.inet_aton(client[0]) + socket.inet_aton(here[0]) + struct.pack("!HH", client[1], here[1])
        return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x21, 0x11, len(addresses)) + addresses


@pytest.mark.parametrize("version", [1, 2])
def test_behind_the_proxy_protocol_the_client_is_heard_and_the_balancer_is_not(
        version: int, site: Site, networks: Networks, hosted: ExitStack) -> None:
    """The datagrams go past the balancer, to the node that it has chosen, and have to come from the client of its header."""
    host = networks.host("balancer")
    networks.cable(host, f"{BALANCER}/24", site.router, "10.0.3.1/24")
    host.ip("route add default via 10.0.3.1")
    with host.inside():
        balancer = hosted.enter_context(TellingBalancer(version))
        threading.Thread(target=balancer.serve_forever, args=(0.02,), daemon=True).start()
        hosted.callback(balancer.shutdown)
        forger = hosted.enter_context(udp_socket(BALANCER))
    with site.target.inside():
        target = hosted.enter_context(udp_socket(TARGET))
        listener = hosted.enter_context(socket.create_server((TARGET, 0)))
    forged = bytes(Datagram(Address.of(target.getsockname()), b"forged"))
    told = set()
    for _ in range(4):
        with site.client.inside():
            relay = hosted.enter_context(udp_associate(f"socks5h://{BALANCER}:1080"))
            stranger = hosted.enter_context(udp_socket(STRANGER))
        for other in (forger, stranger):
            other.sendto(forged, relay.address[:2])
        udp_echo(relay, target)             # it is the first that comes
        told.add(relay.address.host)
    assert told == set(PUBLIC)
    with site.client.inside():
        waiting = hosted.enter_context(bind(f"socks5h://{BALANCER}:1080", TARGET))
    assert waiting.address[0] in PUBLIC
    with site.target.inside():
        peer = hosted.enter_context(socket.create_connection(waiting.address[:2], TIMEOUT))
    accepted, address = waiting.accept()
    hosted.enter_context(accepted)
    assert address == Address.of(peer.getsockname())
    with site.client.inside():
        client = hosted.enter_context(connect(f"socks5h://{BALANCER}:1080", *listener.getsockname()))
    client.sendall(b"hello")
    assert hosted.enter_context(listener.accept()[0]).recv(5) == b"hello"


# --- no IPv4 at all ---

@pytest.fixture
def ipv6_only(networks: Networks) -> Tuple[Host, Host]:
    """A node and a peer of it that have no IPv4 address, not even that of loopback."""
    node, peer = networks.host("node"), networks.host("peer")
    networks.cable(node, "2001:db8::5/64", peer, "2001:db8::9/64")
    node.ip("address del 127.0.0.1/8 dev lo")
    return node, peer


def test_a_host_without_ipv4_serves_all_commands(ipv6_only: Tuple[Host, Host], start_server: Any, hosted: ExitStack) -> None:
    """A name leads to the address that there is a way to; for an IPv4 address there is none, and the client is told."""
    node, peer = ipv6_only
    handler = handler_with(resolve=lambda _self, _host: ["192.0.2.9", "2001:db8::9"])
    with node.inside():
        server = start_server(handler, ("2001:db8::5", 0))
    with peer.inside():
        listener = hosted.enter_context(socket_for("::1"))
        listener.bind(("2001:db8::9", 0))
        listener.listen()
        target = hosted.enter_context(udp_socket("2001:db8::9"))
        url = f"socks5h://[2001:db8::5]:{server.server_address[1]}"
        for host in ("2001:db8::9", "both.example"):
            client = hosted.enter_context(connect(url, host, listener.getsockname()[1]))
            accepted = hosted.enter_context(listener.accept()[0])
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
        relay = hosted.enter_context(udp_associate(url))
        relay.socket.settimeout(TIMEOUT)
        for host in ("2001:db8::9", "both.example"):
            relay.sendto(b"hello", (host, target.getsockname()[1]))
            received, source = target.recvfrom(100)
            target.sendto(received, source)
            assert relay.recvfrom() == (b"hello", Address.of(target.getsockname())[:2])
        waiting = hosted.enter_context(bind(url, "2001:db8::9"))
        caller = hosted.enter_context(socket.create_connection(waiting.address[:2], TIMEOUT))
        accepted, address = waiting.accept()
        hosted.enter_context(accepted)
        assert address == Address.of(caller.getsockname())
        with pytest.raises(RequestFailed) as refused:
            connect(url, "192.0.2.9", 80)
        assert refused.value.code is ReplyCode.NETWORK_UNREACHABLE


def test_the_program_starts_there_and_says_how(ipv6_only: Tuple[Host, Host], start: Start, run_command: Callable[..., Outcome]) -> None:
    node, _peer = ipv6_only
    with node.inside():
        assert "socks5srv -b ::1" in run_command("0").error(1)
        assert start("-b", "::1").stop() == 0
        done = run_command("--self-test")
    assert (done.code, done.stdout.count(" ok, ")) == (0, 3)


# --- a path that lets through no more than 1,280 octets at a time ---

@pytest.fixture(params=["IPv4", "IPv6"])
def narrow(request: pytest.FixtureRequest, networks: Networks) -> Tuple[Host, Host, str, str]:
    """
    A client, and a node with a narrow path between them, which neither can see; the address of each.

        client -- 1,500 -- router1 -- 1,280 -- router2 -- 1,500 -- node
    """
    client, router1, router2, node = map(networks.host, ("client", "router1", "router2", "node"))
    is_ipv6 = request.param == "IPv6"
    net: Callable[[int, int], str] = (lambda link, number: f"2001:db8:{link}::{number}") if is_ipv6 else (lambda link, number: f"10.0.{link}.{number}")
    bits = 64 if is_ipv6 else 24
    for link, (one, other) in enumerate(((client, router1), (router1, router2), (router2, node)), 1):
        networks.cable(one, f"{net(link, 1)}/{bits}", other, f"{net(link, 2)}/{bits}", mtu=1280 if link == 2 else 1500)
    router1.forward()
    router2.forward()
    for host, gateway in ((client, net(1, 2)), (router1, net(2, 2)), (router2, net(2, 1)), (node, net(3, 1))):
        host.ip(f"route add default via {gateway}")
    return client, node, net(1, 1), net(3, 2)


def test_a_tunnel_carries_megabytes_through_it(narrow: Any, start_server: Any, start_echo: Any, hosted: ExitStack) -> None:
    """Both ends find out by path MTU discovery."""
    client_host, node, _own, address = narrow
    with node.inside():
        server, echo = start_server(address=(address, 0), allow_local_targets=True), start_echo(address)
    octets = os.urandom(2_000_000)
    with client_host.inside():
        client = hosted.enter_context(connect(url_of(server), *echo.server_address[:2]))
        client.settimeout(TIMEOUT)
        exchange(client, octets)


@pytest.mark.parametrize("size", [1, 1200, 1400, 1472, 4000, 60_000])
def test_datagrams_larger_than_that_come_through_in_fragments(
        size: int, narrow: Any, start_server: Any, hosted: ExitStack) -> None:
    """
    Of those that a link of our own lets through whole the first is lost, since the kernel forbids others to fragment it:
    from the answer of the router it learns how narrow the path is, and tells it once as an error.  So it is each way.
    Then all of them arrive.
    """
    client_host, node, _own, address = narrow
    with node.inside():
        server, target = start_server(address=(address, 0), allow_local_targets=True), hosted.enter_context(udp_socket(address))
    data = os.urandom(size)
    with client_host.inside():
        relay = hosted.enter_context(udp_associate(url_of(server)))
    arrived = [comes_back(relay, target, data) for _ in range(8)]
    assert arrived[-4:] == [True] * 4
    assert size > 1200 or all(arrived)


def comes_back(relay: Any, target: socket.socket, data: bytes) -> bool:
    """Whether `target` has it, and the client what `target` sends back."""
    with suppress(OSError):
        relay.sendto(data, target.getsockname()[:2])
    if not select.select([target], [], [], 0.5)[0]:
        return False
    received, source = target.recvfrom(65535)
    assert received == data
    target.sendto(received, source)
    if not select.select([relay.socket], [], [], 0.5)[0]:
        return False
    with suppress(OSError):
        assert relay.recvfrom()[0] == data
        return True
    return False


# --- a peer that has vanished: nothing comes from it any more, no end and no reset ---

CUT = "table ip cut { chain forward { type filter hook forward priority 0; ip saddr %s drop; ip daddr %s drop; }; }"
KEEPALIVE, HANDSHAKE = 5, 3     # seconds: two of silence and three questions; and less, to tell the two apart


class Line(NamedTuple):
    """A node between a client and a target, and who passes on what is between them."""

    client: Host
    router: Host
    target: Host
    server: Any

    def cut(self, host: str) -> None:
        """Nothing from this address or to it is passed on any more."""
        self.router.nft(CUT % (host, host))


@pytest.fixture
def line(networks: Networks, start_server: Any, monkeypatch: pytest.MonkeyPatch) -> Line:
    """Its node asks soon whether others are still there, and gives up soon."""
    if not hasattr(socket, "TCP_KEEPIDLE"):
        pytest.skip("not on this platform: TCP_KEEPIDLE")
    soon = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 3}
    monkeypatch.setattr(relay, "TUNING", [(level, name, soon.get(name, value) if level == socket.IPPROTO_TCP else value) for level, name, value in relay.TUNING])
    client, router, target, node = map(networks.host, ("client", "router", "target", "node"))
    for host, own, gateway in ((client, CLIENT, "198.51.100.1"), (target, TARGET, "192.0.2.1"), (node, "10.0.1.5", "10.0.1.1")):
        networks.cable(host, f"{own}/24", router, f"{gateway}/24")
        host.ip(f"route add default via {gateway}")
    router.forward()
    with node.inside():
        set_up("ipv4/tcp_retries2", "2")        # how often what is not acknowledged is sent again: 15 times by default, a quarter of an hour
        server = start_server(address=("10.0.1.5", 0), handshake_timeout=HANDSHAKE, route=Route(udp_ports=range(20000, 20001)))
    return Line(client, router, target, server)


def is_acknowledged(sock: socket.socket) -> bool:
    """Whether all that was sent has arrived, as the system knows by now."""
    import fcntl
    import termios

    return not struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def test_what_a_client_that_has_vanished_has_had_is_freed(line: Line, hosted: ExitStack) -> None:
    """
    Keepalive finds out, in a tunnel that is silent as in an association and while BIND waits for its peer.  Of what is sent
    to it the system tells that it is not acknowledged.  One that has not asked for anything yet has its deadline.
    """
    with line.target.inside():
        listener = hosted.enter_context(socket.create_server((TARGET, 0)))
    began = time.monotonic()
    with line.client.inside():
        silent, receiving, waiting, relayed, greeted = (hosted.enter_context(Client(line.server.server_address)) for _ in range(5))
        accepted = []
        for client in (silent, receiving):
            client.connect(listener.getsockname())
            accepted.append(hosted.enter_context(listener.accept()[0]))
        assert waiting.ask(Command.BIND, (TARGET, 0)).bound == Address.numeric("10.0.1.5", 20000)
        assert relayed.ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0)).bound == Address.numeric("10.0.1.5", 20000)
        greeted.greet()
    eventually(lambda: all(is_acknowledged(handler.request) for handler in line.server.registry.everyone()))
    line.cut(CLIENT)
    accepted[1].sendall(b"never to be acknowledged")
    reasons = {session.client.port: session.reason for session in (line.server.next_ended() for _ in range(5))}
    assert time.monotonic() - began > KEEPALIVE - 0.5
    assert reasons.pop(greeted.socket.getsockname()[1]) == "the handshake took too long"
    assert list(reasons.values()) == ["client: timed out"] * 4
    for sock in accepted:
        sock.settimeout(TIMEOUT)
        with suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    eventually(lambda: descriptors.taken == 0)
    assert not line.server.policy.relays


def test_a_target_that_has_vanished_is_told_to_the_client(line: Line, hosted: ExitStack) -> None:
    with line.target.inside():
        listener = hosted.enter_context(socket.create_server((TARGET, 0)))
    with line.client.inside():
        client, late = (hosted.enter_context(Client(line.server.server_address)) for _ in range(2))
    client.connect(listener.getsockname())
    hosted.enter_context(listener.accept()[0])
    line.cut(TARGET)
    line.server.connect_timeout = 1
    assert late.ask(Command.CONNECT, listener.getsockname()).code is ReplyCode.TTL_EXPIRED
    assert line.server.next_ended().reason == "the target did not answer in time"
    assert client.rest() == b""
    assert line.server.next_ended().reason == "target: timed out"
