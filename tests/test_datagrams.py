"""UDP ASSOCIATE over real sockets.  RFC 1928 section 7."""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import threading
import time
from contextlib import ExitStack
from io import BytesIO
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import pytest

from socks5srv import datagrams, outbound, relay, trains
from socks5srv.capture.pcap import CaptureWriter, open_file
from socks5srv.capture.sockets import Capture
from socks5srv.handler import Socks5Handler
from socks5srv.observer import Observer
from socks5srv.outbound import Route
from socks5srv.protocol import UNSPECIFIED, Address, AddressType, Command, Datagram, ReplyCode, Request
from socks5srv.rules import Rules
from socks5srv.session import Session
from socks5srv.upstream import UpstreamHandler

from .conftest import LOCALHOST, TIMEOUT, Client, eventually, name, needs_ipv6, needs_neighbour
from .test_trains import needs_trains, send_train


class UdpSocket:
    """A UDP socket on this computer; `address` is its own."""

    def __init__(self, host: str = LOCALHOST, port: int = 0) -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(TIMEOUT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.bind((host, port))
        self.address = Address.of(self.socket.getsockname())

    def send(self, octets: bytes, to: Address) -> None:
        self.socket.sendto(octets, (to.host, to.port))

    def receive(self) -> Tuple[bytes, Address]:
        octets, sockaddr = self.socket.recvfrom(65535)
        return octets, Address.of(sockaddr)

    def send_back(self) -> bytes:
        """What comes next goes back to where it has come from."""
        octets, source = self.receive()
        self.send(octets, source)
        return octets

    def is_next(self, octets: bytes) -> bool:
        """Whether these come next, and soon."""
        self.socket.settimeout(0.05)
        try:
            return self.receive()[0] == octets
        except socket.timeout:
            return False
        finally:
            self.socket.settimeout(TIMEOUT)

    def has_nothing(self) -> bool:
        return not select.select([self.socket], [], [], 0)[0]


class UdpClient(UdpSocket):
    """A client with an association: `control` is its TCP connection, `relay` where it sends to."""

    association: datagrams.Association      # on the server's side, if a test needs it

    def __init__(self, control: Client, host: str, asked: Callable[[Address], Address]) -> None:
        super().__init__(host)
        self.control = control
        reply = control.ask(Command.UDP_ASSOCIATE, asked(self.address))
        assert reply.code is ReplyCode.SUCCEEDED
        self.relay = reply.bound

    def send_to(self, target: Address, data: bytes, frag: int = 0, sender: Optional[UdpSocket] = None) -> None:
        """From its own socket, or from another."""
        (sender or self).send(bytes(Datagram(target, data, frag)), self.relay)

    def answer(self) -> Datagram:
        octets, source = self.receive()
        assert source == self.relay
        return Datagram.read(BytesIO(octets))

    def echo(self, target: UdpSocket, data: bytes = b"hello") -> None:
        """Have `target` receive it and send it back; both see what they should."""
        self.send_to(target.address, data)
        assert target.send_back() == data
        assert self.answer() == Datagram(target.address, data)

    def reach(self, target: UdpSocket) -> Address:
        """Where it is that what it sends to the target comes from."""
        self.send_to(target.address, b"question")
        return target.receive()[1]

    def is_heard(self, sender: UdpSocket, target: UdpSocket) -> bool:
        """Whether what this socket sends to the client's relay arrives."""
        self.send_to(target.address, b"moved", sender=sender)
        return target.is_next(b"moved")


def association_of(server: Any) -> datagrams.Association:
    """Of the server's one client."""
    return eventually(lambda: [each.association for each in server.relays[0].watched.values() if isinstance(each, datagrams.ClientSocket)])[0]


@pytest.fixture
def new_socket() -> Iterator[Callable[..., UdpSocket]]:
    with ExitStack() as stack:
        def make(host: str = LOCALHOST, port: int = 0) -> UdpSocket:
            made = UdpSocket(host, port)
            stack.enter_context(made.socket)
            return made

        yield make


@pytest.fixture
def associate(new_client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., UdpClient]]:
    """
    A client with an association: ``associate(server, host)``; with ``idle_timeout=0.1`` that is the `idle_timeout` of all.

    `asked` makes of the client's own address the one that it asks with.
    """
    with ExitStack() as stack:
        def make(
            server: Any, host: str = LOCALHOST, asked: Callable[[Address], Address] = lambda _own: UNSPECIFIED, **seconds: float,
        ) -> UdpClient:
            for key, value in seconds.items():
                monkeypatch.setattr(datagrams.Association, key, value)
            client = UdpClient(new_client(server), host, asked)
            stack.enter_context(client.socket)
            return client

        yield make


class Named(Socks5Handler):
    """Knows ``here.invalid``, and counts how often it was asked; ``slow.invalid`` takes until `release` is set."""

    asked: ClassVar[List[str]] = []
    release = threading.Event()

    def resolve(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if host == "slow.invalid":
            assert self.release.wait(TIMEOUT)
        elif host != "here.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        return [LOCALHOST]


def answering(*answers: Union[Sequence[str], Exception]) -> Any:
    """One that answers so, whatever it is asked for: first the first, and when there are no more always the last."""
    class Answering(Named):
        def resolve(self, host: str) -> Sequence[str]:
            self.asked.append(host)
            answer = answers[min(len(self.asked), len(answers)) - 1]
            if isinstance(answer, Exception):
                raise type(answer)(*answer.args)    # a new one: the traceback of one that is raised again and again grows
            return answer

    return Answering


@pytest.fixture(autouse=True)
def _forget_what_was_asked() -> Iterator[None]:
    Named.asked = []
    Named.release = threading.Event()
    yield
    Named.release.set()


@pytest.fixture(params=["epoll", "selectors"])
def waiter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "selectors":
        monkeypatch.setattr(relay, "EpollWaiter", relay.SelectorWaiter)


@pytest.fixture
def server(start_server: Any) -> Any:
    return start_server(Named)


@pytest.fixture
def client(server: Any, associate: Any) -> UdpClient:
    return associate(server)


@pytest.fixture
def target(new_socket: Any) -> UdpSocket:
    return new_socket()


# --- the way there and back ---

@pytest.mark.usefixtures("waiter")
def test_a_datagram_is_unwrapped_on_the_way_out_and_wrapped_on_the_way_back(client: UdpClient, target: UdpSocket) -> None:
    client.echo(target)


def test_bnd_is_concrete_and_where_the_control_connection_came_in(start_server: Any, associate: Any) -> None:
    client = associate(start_server(address=("0.0.0.0", 0)))
    assert client.relay.host == LOCALHOST
    assert client.relay.port > 0


@needs_ipv6
def test_every_association_has_a_port_of_its_own_that_cannot_be_guessed(server: Any, new_client: Any) -> None:
    ports = []
    for _ in range(8):
        with new_client(server) as one, new_client(server) as other:
            ports += [client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound.port for client in (one, other)]
        assert ports[-1] != ports[-2]
        eventually(lambda: not server.policy.relays)
    assert len(set(ports)) > 8


@needs_neighbour
def test_datagrams_leave_from_the_source_address_and_their_answers_come_back(
        start_server: Any, associate: Any, new_socket: Any) -> None:
    client, target = associate(start_server(route=Route(source="127.0.0.2"))), new_socket("127.0.0.2")
    proxy = client.reach(target)
    assert proxy.host == "127.0.0.2"
    target.send(b"and back", proxy)
    assert client.answer() == Datagram(target.address, b"and back")


@pytest.mark.parametrize("route", [Route(), pytest.param(Route(source="127.0.0.2"), marks=needs_neighbour)], ids=["any", "a source"])
def test_an_outer_socket_has_its_port_before_anything_waits_for_it(
        route: Route, monkeypatch: pytest.MonkeyPatch, start_server: Any, associate: Any, new_socket: Any) -> None:
    """Where select() is all there is, it does not take others."""
    watch, ports = relay.Relay.watch, []

    def watch_and_note(self: Any, *newcomers: Any) -> None:
        ports.extend(sock.getsockname()[1] for sock, watched, _interest in newcomers if isinstance(watched, datagrams.TargetSocket))
        watch(self, *newcomers)

    monkeypatch.setattr(relay.Relay, "watch", watch_and_note)
    associate(start_server(route=route)).echo(new_socket(route.source or LOCALHOST))
    [port] = ports
    assert port


def test_ipv4_ipv6_and_names_go_through_one_association(client: UdpClient, new_socket: Any) -> None:
    four, six = new_socket(), new_socket("::1")
    for _ in range(2):
        client.echo(four)
        client.echo(six)
        client.send_to(name("here.invalid", four.address.port), b"by name")
        four.send_back()
        # The answer names its source as it is: a number, RFC 1928 has no other.
        assert client.answer() == Datagram(four.address, b"by name")
    assert Named.asked == ["here.invalid"]      # remembered


@needs_ipv6
def test_an_address_in_brackets_is_sent_to_and_judged_as_one(server: Any, client: UdpClient, new_socket: Any) -> None:
    six, denied = new_socket("::1"), new_socket("::1")
    server.rules = Rules.parse([f"deny [::1]:{denied.address.port}"])
    client.send_to(name("[::1]", denied.address.port), b"denied")
    client.send_to(name("[::1]", six.address.port), b"hello")
    six.send_back()
    assert client.answer() == Datagram(six.address, b"hello")
    assert denied.has_nothing(), "it was handled before"


@needs_ipv6
def test_a_client_on_ipv6_reaches_ipv4(start_server: Any, associate: Any, new_socket: Any) -> None:
    client = associate(start_server(address=("::1", 0)), "::1")
    assert client.relay.address_type is AddressType.IPV6
    client.echo(new_socket())
    client.echo(new_socket("::1"))


@needs_ipv6
def test_a_dual_stack_listener_gives_an_ipv4_client_an_ipv4_relay(start_server: Any, new_client: Any) -> None:
    control = new_client((LOCALHOST, start_server(address=("::", 0)).server_address[1]))
    assert control.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound[::2] == (LOCALHOST, AddressType.IPV4)


# On this computer's network, and no UDP socket can be connected to them: a broadcast address, and link-local without a link.
NO_IPV4, NO_IPV6 = "127.255.255.255", "fe80::1"


@needs_ipv6
@pytest.mark.parametrize(("here", "addresses", "there"), [
    (LOCALHOST, ["::1", LOCALHOST], "::1"), (LOCALHOST, [NO_IPV4, "::1"], "::1"), ("::1", [NO_IPV6, LOCALHOST], LOCALHOST),
    (LOCALHOST, LOCALHOST, LOCALHOST),
], ids=["both families", "no way to IPv4", "no way to IPv6", "one, as a str"])
def test_a_name_is_sent_to_the_first_of_its_addresses_that_has_a_route(
        here: str, addresses: Sequence[str], there: str, start_server: Any, associate: Any, new_socket: Any) -> None:
    """
    The resolver puts first what this computer reaches best, whatever the client's own family is.

    On a computer with one family only, a name with both leads to that one, wherever the client comes from.
    """
    target = new_socket(there)
    client = associate(start_server(answering(addresses), (here, 0)), here)
    client.send_to(name("any.invalid", target.address.port), b"x")
    assert target.receive()[0] == b"x"


@pytest.mark.parametrize("asked", [
    UNSPECIFIED, Address.numeric("::", 0), name("0", 5353), Address.numeric("10.1.2.3", 4), name("no.such.invalid", 1),
], ids=str)
def test_what_the_request_asks_for_does_not_matter(asked: Address, start_server: Any, associate: Any, target: UdpSocket) -> None:
    """E42: behind NAT it is wrong, PySocks writes the name ``0``, others the target's address."""
    associate(start_server(), asked=lambda _own: asked).echo(target)


@pytest.mark.parametrize("size", [0, 65497])
def test_the_shortest_and_the_longest_datagram_pass(size: int, client: UdpClient, target: UdpSocket) -> None:
    """E48: 65,507 is what UDP over IPv4 has room for, less ten for the header."""
    client.echo(target, os.urandom(size))


def test_an_answer_too_long_for_its_header_is_dropped_and_harms_nobody(client: UdpClient, target: UdpSocket) -> None:
    target.send(os.urandom(65500), client.reach(target))
    client.echo(target)


def test_payload_is_counted_both_ways(server: Any, client: UdpClient, new_socket: Any) -> None:
    client.echo(new_socket(), b"12345")
    client.echo(new_socket(), b"123")
    client.control.close()
    session = server.next_ended()
    assert (session.outcome, session.up, session.down, session.reason) == ("close", 8, 8, "closed by client")


class Watching(Observer):
    """With one, each datagram is told of, and takes another way."""

    def datagram(self, session: Session, to_client: bool, octets: bytes, outcome: str) -> None:
        """It is enough to be there."""


def counted(session: Session) -> Tuple[int, ...]:
    return session.datagrams_up, session.dropped_up, session.datagrams_down, session.dropped_down


@needs_neighbour
@pytest.mark.parametrize("observers", [(), (Watching(),)], ids=["by themselves", "while they are told of"])
def test_datagrams_and_drops_are_counted_both_ways(
        observers: Sequence[Observer], start_server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    server = start_server(handler=Named, rules=["deny 127.0.0.3"], observers=observers)
    client = associate(server)
    (session,) = server.sessions
    proxy = client.reach(target)
    for _ in range(40):             # more than in one turn
        client.send_to(target.address, b"x")
        target.send(b"x", proxy)
    eventually(lambda: counted(session) == (41, 0, 40, 0))
    new_socket().send(bytes(Datagram(target.address, b"of another program")), client.relay)
    for _ in range(2):
        client.send(b"nonsense", client.relay)
        client.send_to(target.address, b"a fragment", LAST | 1)
        client.send_to(Address.numeric("127.0.0.3", 7), b"denied")
        client.send_to(Address.numeric("255.255.255.255", 7), b"cannot be sent")
        client.send_to(name("nowhere.invalid", 7), b"has no address")
    eventually(lambda: counted(session) == (51, 10, 40, 0))
    target.send(os.urandom(65_500), proxy)      # too long with its header
    new_socket("127.0.0.2").send(b"unasked", proxy)
    eventually(lambda: counted(session) == (51, 10, 42, 2))


@needs_neighbour
@pytest.mark.parametrize("reassemble", [False, True])
def test_a_whole_of_fragments_that_goes_nowhere_is_counted_once(reassemble: bool, start_server: Any, associate: Any) -> None:
    server = start_server(rules=["deny 127.0.0.3"], reassemble=reassemble)
    client = associate(server)
    (session,) = server.sessions
    for frag in (1, LAST | 2):
        client.send_to(Address.numeric("127.0.0.3", 7), b"part", frag)
    eventually(lambda: counted(session) == (2, 1 if reassemble else 2, 0, 0))


def test_a_hundred_datagrams_at_once_arrive(client: UdpClient, target: UdpSocket) -> None:
    for number in range(100):
        client.send_to(target.address, b"%d" % number)
    assert [int(target.receive()[0]) for _ in range(100)] == list(range(100))


# --- who is heard ---

@needs_neighbour
def test_another_host_is_not_heard(client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    """R36."""
    client.send_to(target.address, b"forged", sender=new_socket("127.0.0.2"))
    client.echo(target)


def test_another_port_of_the_clients_host_is_not_heard_after_the_first_datagram(
        client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    """E43."""
    client.echo(target)
    client.send_to(target.address, b"forged", sender=new_socket())
    client.echo(target)


def own(address: Address) -> Address:
    return address


def own_as_name(address: Address) -> Address:
    return name(address.host, address.port)


@pytest.mark.usefixtures("waiter")
@pytest.mark.parametrize("named", [own, own_as_name])
@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_if_the_client_has_named_its_port_only_that_one_is_heard_from_the_beginning(
        host: str, named: Any, start_server: Any, associate: Any, new_socket: Any) -> None:
    client, target = associate(start_server(address=(host, 0)), host, asked=named), new_socket(host)
    client.send_to(target.address, b"forged", sender=new_socket(host))
    client.echo(target)


def test_what_a_neighbour_has_sent_before_the_named_port_was_locked_is_not_heard(
        monkeypatch: pytest.MonkeyPatch, server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    neighbour, expect = new_socket(), datagrams.ClientSocket.expect

    def late(inner: datagrams.ClientSocket, client: Address) -> None:
        neighbour.send(bytes(Datagram(target.address, b"forged")), inner.association.bound)
        expect(inner, client)

    monkeypatch.setattr(datagrams.ClientSocket, "expect", late)
    associate(server, asked=own).echo(target)


@needs_neighbour
def test_a_port_that_is_named_with_another_host_locks_nothing(
        server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    client = associate(server, asked=lambda address: address._replace(host="127.0.0.2"))
    client.socket = new_socket().socket
    client.echo(target)


def test_a_client_that_does_not_use_the_port_it_has_named_is_heard_after_a_while(
        server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    client, moved = associate(server, asked=own, idle_timeout=0.05), new_socket()
    eventually(lambda: client.is_heard(moved, target))


@pytest.mark.usefixtures("waiter")
def test_a_client_that_was_silent_for_a_while_may_go_on_from_another_port(
        server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    """A NAT that forgets gives it another."""
    assert datagrams.Association.idle_timeout == 30
    client, moved = associate(server, idle_timeout=0.05), new_socket()
    client.echo(target)
    proxy = client.reach(target)
    eventually(lambda: client.is_heard(moved, target))
    target.send(b"answer", proxy)
    assert Datagram.read(BytesIO(moved.receive()[0])) == Datagram(target.address, b"answer")
    assert client.is_heard(moved, target)


def test_a_client_that_only_listens_gets_its_answers_for_as_long_as_it_likes(
        server: Any, associate: Any, target: UdpSocket) -> None:
    client = associate(server, idle_timeout=0.02)
    proxy = client.reach(target)
    eventually(lambda: not association_of(server).client_socket.locked)
    for number in range(3):
        target.send(b"%d" % number, proxy)
        assert client.answer().data == b"%d" % number
    client.echo(target)
    assert server.sessions[0].down >= 3


def test_answers_that_do_not_arrive_do_not_keep_a_silent_client_locked(
        server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    """The client's computer says that there is no such port any more, which is not the client's word."""
    client, moved = associate(server, idle_timeout=0.1), new_socket()
    proxy = client.reach(target)
    client.socket.close()

    def goes_on() -> bool:
        target.send(b"into the void", proxy)
        return client.is_heard(moved, target)

    eventually(goes_on)


@pytest.mark.usefixtures("waiter")
def test_a_client_that_speaks_keeps_its_port(server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    client, neighbour = associate(server, idle_timeout=0.4), new_socket()
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        client.echo(target)
        client.send_to(target.address, b"forged", sender=neighbour)
    client.echo(target)


@pytest.mark.usefixtures("waiter")
def test_a_port_that_is_lost_while_the_client_is_silent_ends_its_association(
        monkeypatch: pytest.MonkeyPatch, server: Any, associate: Any, target: UdpSocket) -> None:
    client = associate(server, idle_timeout=0.2)
    client.echo(target)

    def taken(_route: Route, _sockaddr: Any, share: bool) -> socket.socket:
        raise OSError(98, f"Address already in use, to share it: {share}")

    monkeypatch.setattr(Route, "udp", taken)
    monkeypatch.setattr(outbound, "PORT_CAN_BE_SHARED", False)
    assert server.next_ended().reason == "its UDP port is lost: Address already in use, to share it: False"
    assert client.control.rest() == b""


@pytest.mark.skipif(not outbound.PORT_CAN_BE_SHARED, reason="not on this platform: a port for two sockets")
def test_no_other_process_can_take_it_then(monkeypatch: pytest.MonkeyPatch, server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    """Nor afterwards."""
    client, refused, udp = associate(server, idle_timeout=0.1), [], Route.udp

    def try_it(port: int) -> None:
        with pytest.raises(OSError, match="in use"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((LOCALHOST, port))
        refused.append(port)

    def udp_later(route: Route, sockaddr: Any, share: bool = False) -> socket.socket:
        if share:
            try_it(sockaddr[1])
        sock = udp(route, sockaddr, share)
        if share:
            try_it(sockaddr[1])
        return sock

    monkeypatch.setattr(Route, "udp", udp_later)
    client.echo(target)
    eventually(lambda: client.is_heard(new_socket(), target))
    assert set(refused) == {client.relay.port}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind((LOCALHOST, client.relay.port))


@needs_neighbour
def test_what_strangers_had_queued_before_the_port_was_locked_is_not_heard(
        client: UdpClient, target: UdpSocket, new_socket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, go_on = threading.Event(), threading.Event()
    ready = datagrams.ClientSocket.ready

    def ready_later(inner: datagrams.ClientSocket, events: int) -> None:
        stop.set()
        assert go_on.wait(TIMEOUT)
        ready(inner, events)

    monkeypatch.setattr(datagrams.ClientSocket, "ready", ready_later)
    client.send_to(target.address, b"first")
    assert stop.wait(TIMEOUT)
    client.send_to(target.address, b"forged", sender=new_socket("127.0.0.2"))
    client.send_to(target.address, b"second")
    go_on.set()
    assert [target.receive()[0] for _ in range(2)] == [b"first", b"second"]


@needs_trains
def test_what_strangers_had_queued_behind_a_flood_is_not_heard(server: Any, client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    """Whose a train is, is not looked at; so none may be asked for as long as others can be among what waits."""
    neighbour, go_on = new_socket(), threading.Event()
    server.relay_thread().call(lambda: go_on.wait(TIMEOUT))
    for _ in range(datagrams.TURN):
        client.send_to(target.address, b"client")
    for _ in range(4):
        client.send_to(target.address, b"forged", sender=neighbour)
    client.send_to(target.address, b"last")
    go_on.set()
    assert [target.receive()[0] for _ in range(datagrams.TURN + 1)] == [*[b"client"] * datagrams.TURN, b"last"]


def test_nonsense_from_the_client_does_not_lock_the_port(client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    new_socket().send(b"nonsense", client.relay)
    client.echo(target)


@needs_neighbour
def test_only_hosts_that_were_written_to_can_answer_but_from_any_port(
        client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    """E52: a TFTP server answers from a new port."""
    same_host, other_host = new_socket(), new_socket("127.0.0.2")
    proxy = client.reach(target)
    other_host.send(b"unasked", proxy)
    same_host.send(b"answer", proxy)
    assert client.answer() == Datagram(same_host.address, b"answer")


def test_associations_do_not_mix(server: Any, associate: Any, target: UdpSocket) -> None:
    clients = [associate(server) for _ in range(20)]
    for number, client in enumerate(clients):
        client.send_to(target.address, b"%d" % number)
    for _ in clients:
        target.send_back()
    assert [int(client.answer().data) for client in clients] == list(range(20))


def test_a_datagram_to_a_relay_does_not_loop(server: Any, associate: Any, new_socket: Any) -> None:
    """E55: neither to one's own nor to another's."""
    client, other = associate(server), associate(server)
    assert server.policy.relays == {client.relay, other.relay}
    for victim in (client.relay, other.relay):
        client.send_to(victim, bytes(Datagram(client.address, b"round and round")))
    other.echo(new_socket())            # whose port was not taken
    client.echo(new_socket())
    assert [session.up for session in server.sessions] == [5, 5]        # the echoes: nothing went to a relay


def test_a_flood_is_moved_a_few_datagrams_at_a_time(
        monkeypatch: pytest.MonkeyPatch, server: Any, client: UdpClient, target: UdpSocket) -> None:
    ready, moved = datagrams.ClientSocket.ready, []

    def ready_and_count(self: Any, events: int) -> None:
        before = self.association.session.up
        ready(self, events)
        moved.append(self.association.session.up - before)

    monkeypatch.setattr(datagrams.ClientSocket, "ready", ready_and_count)
    go_on = threading.Event()
    client.echo(target, b"1")
    server.relays[0].call(lambda: go_on.wait(TIMEOUT))
    for _ in range(3 * datagrams.TURN):
        client.send_to(target.address, b"1")
    go_on.set()
    for _ in range(3 * datagrams.TURN):
        assert target.receive()[0] == b"1"
    assert max(moved) <= datagrams.TURN


def test_both_sockets_ask_for_room_for_bursts(server: Any, client: UdpClient, target: UdpSocket) -> None:
    client.echo(target)
    [handler] = server.registry.serving()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as usual:
        for sock in (handler._tunnel.client_socket.socket, handler._tunnel.target_sockets[socket.AF_INET].socket):
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                assert sock.getsockopt(socket.SOL_SOCKET, option) > usual.getsockopt(socket.SOL_SOCKET, option)


def test_a_client_that_is_gone_before_its_reply_leaves_no_socket(start_server: Any, new_client: Any) -> None:
    made: List[Any] = []

    class Failing(Socks5Handler):
        def _association(self) -> Any:
            made.append(super()._association())
            return made[-1]

        def succeed(self, bound: Address) -> None:
            raise BrokenPipeError

    server = start_server(handler=Failing)
    with new_client(server) as client:
        client.greet()
        client.send(Request(Command.UDP_ASSOCIATE, UNSPECIFIED))
        assert client.rest() == b""
    server.next_ended()
    assert made[0].client_socket.socket.fileno() == -1


# --- what is dropped ---

@pytest.mark.parametrize("octets", [
    b"", b"\0", b"\0\0\0\1\x7f", b"\0\0\0\2\x7f\0\0\1\0\7data", b"\0\0\0\3", b"\0\0\0\3\xff", b"\0\0\0\3\0\0\7data",
    b"\0\0\0\3\4a\0b.\0\7data", b"\0\0\0\4" + bytes(17), b"\0\0\0\1\0\0\0\0\0\0", b"\xff" * 40,
    b"\0\0\0\1\x7f\0\0\1\0\0port 0", b"\0\0\0\1\xff\xff\xff\xff\0\7broadcast",
], ids=bytes.hex)
def test_an_odd_datagram_costs_nothing_but_itself(octets: bytes, start_server: Any, associate: Any, target: UdpSocket) -> None:
    """E47, E54."""
    client = associate(start_server())
    for _ in range(2):
        client.send(octets, client.relay)
        client.echo(target)


def test_a_port_where_nobody_listens_costs_nothing_but_its_datagram(
        client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    """E49: its ICMP error shows up later."""
    gone = new_socket()
    gone.socket.close()
    for _ in range(5):
        client.send_to(gone.address, b"x")
        client.echo(target)


def test_a_client_that_refuses_its_answers_does_not_end_its_association(
        client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    proxy = client.reach(target)
    client.socket.close()
    for _ in range(5):
        target.send(b"nobody home", proxy)
    client.socket = new_socket(LOCALHOST, client.address.port).socket
    client.send_to(target.address, b"back again")
    target.send_back()
    while client.answer().data != b"back again":    # the others may have been under way
        pass


def test_rules_are_asked_for_each_destination(start_server: Any, associate: Any, new_socket: Any) -> None:
    good, bad = new_socket(), new_socket()

    class Judging(Named):
        def allow(self, command: Command, address: Address) -> bool:
            assert command is Command.UDP_ASSOCIATE
            return address.port != bad.address.port and address.host != "denied.invalid"

    client = associate(start_server(handler=Judging))
    client.send_to(bad.address, b"denied")
    client.send_to(name("here.invalid", bad.address.port), b"denied by its address")
    client.send_to(name("denied.invalid", good.address.port), b"denied by its name")
    client.echo(good)
    assert "denied.invalid" not in Named.asked
    assert bad.has_nothing()


# --- trains ---

def trains_of(rng: random.Random, number: int, header: bytes = b"") -> Iterator[List[bytes]]:
    """So many datagrams of random sizes, in trains: all of one are of one size, but for a shorter last one; each with this header."""
    while number:
        size, length = rng.choice([1, 8, 200, 1200, rng.randrange(1, 1400)]), min(number, rng.randint(1, 40))
        last = rng.choice([size, rng.randint(1, size)])
        yield [header + rng.getrandbits(8 * n).to_bytes(n, "big") for n in [size] * (length - 1) + [last]]
        number -= length


@pytest.fixture
def writer(tmp_path: Any) -> Iterator[CaptureWriter]:
    writer = CaptureWriter(open_file(str(tmp_path / "pcap")))
    yield writer
    writer.close()


def check_a_flood(client: UdpClient, target: UdpSocket, number: int) -> None:
    """So many datagrams each way, each train when the one before has come back: as they were sent, in their order, and none is lost."""
    target_sees, client_sees, header = hashlib.sha256(), hashlib.sha256(), bytes(Datagram(target.address, b""))
    sent = hashlib.sha256()
    for train in trains_of(random.Random(number), number, header):
        send_train(client.socket, train, (client.relay.host, client.relay.port))
        back = []
        for datagram in train:
            sent.update(len(datagram).to_bytes(2, "big") + datagram)
            octets, source = target.receive()
            target_sees.update(len(header + octets).to_bytes(2, "big") + header + octets)
            back.append(octets)
        send_train(target.socket, back, (source.host, source.port))
        for _ in train:
            octets = client.receive()[0]
            client_sees.update(len(octets).to_bytes(2, "big") + octets)
    assert target_sees.digest() == client_sees.digest() == sent.digest()


@needs_trains
@pytest.mark.parametrize("way", ["in trains", "one by one", "recorded", "observed"])
def test_a_flood_of_trains_arrives_both_ways(
        way: str, monkeypatch: pytest.MonkeyPatch, start_server: Any, associate: Any, target: UdpSocket, writer: CaptureWriter) -> None:
    settings: Dict[str, Any] = {}
    if way == "one by one":
        monkeypatch.setattr(trains, "takes_trains", lambda _sock: False)
    elif way == "recorded":
        settings["route"] = Route(socket_factory=Capture(writer).socket)
    elif way == "observed":
        settings["observers"] = [Watcher()]
    server = start_server(**settings)
    client = associate(server)
    client.echo(target)         # the port is locked now
    association, number = association_of(server), 100_000 if way == "in trains" else 5_000
    check_a_flood(client, target, number)
    assert association.client_socket.arrivals.coalescing == (way == "in trains")
    [session] = server.sessions
    eventually(lambda: session.up == session.down)         # counted when it has been sent
    assert session.up > 100 * number


@needs_trains
def test_a_train_of_datagrams_to_several_places_is_taken_apart(server: Any, client: UdpClient, new_socket: Any) -> None:
    """All of one length, as they may be in a train: targets, a name, a fragment, headers that cannot be read, and one that is known by now."""
    one, other = new_socket(), new_socket()
    client.echo(one)
    gone = new_socket()
    gone.socket.close()

    def wrap(address: Address, data: bytes, frag: int = 0) -> bytes:
        datagram = bytes(Datagram(address, b"", frag))
        return datagram + data + b"." * (40 - len(datagram) - len(data))

    pieces = [
        wrap(one.address, b"1"), wrap(one.address, b"2"), wrap(other.address, b"3"), wrap(name("here.invalid", one.address.port), b"4"),
        wrap(other.address, b"lost", 1), wrap(other.address, b"5"), b"?" * 40, wrap(gone.address, b"lost"), wrap(one.address, b"6"),
        wrap(name("no.invalid", 9), b"lost"), bytes(40), wrap(other.address, b"7"), wrap(one.address, b"8"), bytes(Datagram(one.address, b"")),
    ]
    arrivals = association_of(server).client_socket.arrivals
    for _ in range(20):
        if not arrivals.coalescing:
            arrivals.ask(True)
        send_train(client.socket, pieces, (client.relay.host, client.relay.port))
        assert sorted(one.receive()[0].rstrip(b".") for _ in range(6)) == [b"", b"1", b"2", b"4", b"6", b"8"]
        assert [other.receive()[0].rstrip(b".") for _ in range(3)] == [b"3", b"5", b"7"]
    assert one.has_nothing()
    assert other.has_nothing()


@needs_trains
def test_answers_of_several_targets_that_leave_together_are_each_under_their_own_name(client: UdpClient, new_socket: Any) -> None:
    targets = [new_socket() for _ in range(5)] + [new_socket("::1")]
    proxies = [client.reach(target) for target in targets]
    for turn in range(20):
        data = [b"%d %d" % (turn, number) for number in range(len(targets))]
        for target, proxy, octets in zip(targets, proxies, data):
            send_train(target.socket, [octets] * 3, (proxy.host, proxy.port))
        answers = [client.answer() for _ in range(3 * len(targets))]
        for target, octets in zip(targets, data):
            assert [answer.data for answer in answers if answer.address == target.address] == [octets] * 3


@needs_trains
def test_rules_are_asked_for_each_destination_in_a_train(start_server: Any, associate: Any, new_socket: Any) -> None:
    good, bad = new_socket(), new_socket()
    client = associate(start_server(rules=[f"deny {bad.address}"]))
    pieces = [bytes(Datagram(target.address, b"x")) for target in (good, bad, good, bad, good)]
    for _ in range(20):
        send_train(client.socket, pieces, (client.relay.host, client.relay.port))
        assert [good.receive()[0] for _ in range(3)] == [b"x"] * 3
    assert bad.has_nothing()


# --- names ---

def test_a_slow_name_holds_up_no_other_datagram(client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    """E50."""
    for number in range(3):
        client.send_to(name("slow.invalid", target.address.port), b"%d" % number)
    client.echo(new_socket())
    Named.release.set()
    assert [target.receive()[0] for _ in range(3)] == [b"0", b"1", b"2"]


def test_only_so_many_datagrams_wait_for_their_name(client: UdpClient, target: UdpSocket, new_socket: Any) -> None:
    slow = name("slow.invalid", target.address.port)
    for number in range(datagrams.QUEUED + 10):
        client.send_to(slow, b"%d" % number)
    client.echo(new_socket())
    Named.release.set()
    assert [target.receive()[0] for _ in range(datagrams.QUEUED)] == [b"%d" % number for number in range(datagrams.QUEUED)]
    client.send_to(slow, b"the next one")
    assert target.receive()[0] == b"the next one"


def test_a_name_that_does_not_exist_is_dropped_and_remembered(client: UdpClient, target: UdpSocket) -> None:
    for _ in range(2):
        client.send_to(name("nowhere.invalid", 7), b"x")
        eventually(lambda: Named.asked)
        client.echo(target)
    assert Named.asked == ["nowhere.invalid"]


def test_a_bug_in_a_look_up_costs_nothing_but_its_datagram(
        start_server: Any, associate: Any, target: UdpSocket, bugs: List[Any]) -> None:
    client = associate(start_server(answering(ZeroDivisionError("a bug"))))
    client.send_to(name("any.invalid", 7), b"x")
    eventually(lambda: bugs)
    bugs.clear()
    client.echo(target)


def test_a_flood_of_names_is_looked_up_a_few_at_a_time(start_server: Any, associate: Any, target: UdpSocket) -> None:
    class Slow(Named):
        def resolve(self, host: str) -> Sequence[str]:
            return super().resolve("slow.invalid")

    client = associate(start_server(handler=Slow))
    for number in range(100):
        client.send_to(name(f"{number}.invalid", target.address.port), b"x")
    client.echo(target)
    assert len(Named.asked) <= datagrams.LOOK_UPS
    Named.release.set()


def test_an_answer_to_a_look_up_that_comes_after_the_end_is_dropped(server: Any, client: UdpClient) -> None:
    client.send_to(name("slow.invalid", 7), b"x")
    eventually(lambda: Named.asked)
    client.control.close()
    assert server.next_ended().reason == "closed by client"
    Named.release.set()


@pytest.mark.parametrize(("code", "seconds"), [(socket.EAI_AGAIN, "dead"), (socket.EAI_NONAME, "missing")], ids=["again", "none"])
def test_a_failed_look_up_is_not_remembered_for_long(
        code: int, seconds: str, start_server: Any, associate: Any, target: UdpSocket) -> None:
    assert 0 < datagrams.Association.dead <= 2 < datagrams.Association.missing <= 10
    error = socket.gaierror(code, "not now")
    client = associate(start_server(answering(error, error, [LOCALHOST])), **{"dead": 100.0, "missing": 100.0, seconds: 0.01})

    def arrived() -> bool:
        client.send_to(name("late.invalid", target.address.port), b"x")
        return target.is_next(b"x")

    eventually(arrived)
    assert len(Named.asked) == 3


def send_until_asked(client: UdpClient, target: UdpSocket, times: int) -> None:
    """Datagrams to a name, each of which has to reach this target, until the resolver has been asked so often."""
    def asked() -> bool:
        client.send_to(name("here.invalid", target.address.port), b"x")
        assert target.receive()[0] == b"x"
        return len(Named.asked) >= times

    eventually(asked)


@needs_neighbour
def test_a_flow_to_a_name_stays_with_its_host_while_the_name_has_that_address(
        start_server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    other = new_socket("127.0.0.2", target.address.port)
    turning = answering(*[[LOCALHOST, "127.0.0.2"], ["127.0.0.2", LOCALHOST]] * 4)
    send_until_asked(associate(start_server(turning), forget=0.01), target, 8)
    assert other.has_nothing()


@needs_neighbour
def test_a_flow_to_a_name_moves_when_the_name_has_moved(
        start_server: Any, associate: Any, target: UdpSocket, new_socket: Any) -> None:
    other = new_socket("127.0.0.2", target.address.port)
    client = associate(start_server(answering([LOCALHOST], [LOCALHOST], ["127.0.0.2"])), forget=0.01)
    send_until_asked(client, target, 2)

    def moved() -> bool:
        client.send_to(name("here.invalid", target.address.port), b"moved")
        return other.is_next(b"moved")

    eventually(moved)


def test_a_flow_to_a_name_goes_on_while_it_is_looked_up_again(start_server: Any, associate: Any, target: UdpSocket) -> None:
    class SlowLater(Named):
        def resolve(self, host: str) -> Sequence[str]:
            return super().resolve("slow.invalid" if self.asked else host)

    client = associate(start_server(handler=SlowLater), forget=0.01)
    send_until_asked(client, target, 2)
    for _ in range(20):         # and the answer has not come
        send_until_asked(client, target, 2)
    assert Named.asked == ["here.invalid", "slow.invalid"]
    Named.release.set()


@pytest.mark.parametrize("error", [socket.EAI_AGAIN, socket.EAI_NONAME], ids=["again", "none"])
def test_only_a_name_that_is_gone_ends_the_flow_to_it(error: int, start_server: Any, associate: Any, target: UdpSocket) -> None:
    client = associate(start_server(answering([LOCALHOST], socket.gaierror(error, "not now"))), forget=0.01)
    if error == socket.EAI_AGAIN:
        send_until_asked(client, target, 4)
        return

    def lost() -> bool:
        client.send_to(name("gone.invalid", target.address.port), b"x")
        return not target.is_next(b"x")

    eventually(lost)


def test_what_is_known_is_forgotten_after_a_while(server: Any, associate: Any, target: UdpSocket) -> None:
    send_until_asked(associate(server, forget=0.01), target, 3)


def test_tables_stay_bounded(monkeypatch: pytest.MonkeyPatch, server: Any, client: UdpClient, new_socket: Any) -> None:
    monkeypatch.setattr(datagrams, "REMEMBERED", 3)
    for _ in range(10):
        client.echo(new_socket())
    association = association_of(server)
    assert len(association.targets) <= 3
    assert len(association.headers) <= 3


# --- how it ends ---

@pytest.mark.parametrize("how", [Client.close, Client.end, Client.reset])
def test_it_ends_with_its_tcp_connection_and_at_once(
        how: Callable[[Client], None], server: Any, client: UdpClient, target: UdpSocket) -> None:
    """R28."""
    client.echo(target)
    how(client.control)
    assert server.next_ended().event == "close"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:     # the port is free again
        probe.bind((client.relay.host, client.relay.port))
    assert not server.policy.relays


def test_octets_on_the_tcp_connection_mean_nothing(client: UdpClient, target: UdpSocket) -> None:
    """E51."""
    client.echo(target)
    client.control.send(b"are you there?" * 1000)
    client.echo(target)


def test_closing_the_server_ends_it(server: Any, client: UdpClient, target: UdpSocket) -> None:
    client.echo(target)
    server.server_close()
    assert client.control.rest() == b""
    assert server.next_ended().reason == "server stopped"


def test_it_is_refused_where_udp_is_switched_off(start_server: Any, new_client: Any) -> None:
    server = start_server(commands=frozenset({Command.CONNECT}))
    assert new_client(server).ask(Command.UDP_ASSOCIATE, UNSPECIFIED).code is ReplyCode.COMMAND_NOT_SUPPORTED


def test_without_a_socket_to_be_had_the_reply_is_a_failure(monkeypatch: pytest.MonkeyPatch, server: Any, new_client: Any) -> None:
    def none_left(_route: Route, _host: str) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Route, "udp_relay", none_left)
    assert new_client(server).ask(Command.UDP_ASSOCIATE, UNSPECIFIED).code is ReplyCode.GENERAL_FAILURE


# --- fragments ---

LAST = Datagram.LAST_FRAGMENT


@pytest.mark.parametrize("frag", [1, 2, 127, LAST | 1, LAST | 2, 255])
def test_fragments_are_dropped(frag: int, client: UdpClient, target: UdpSocket) -> None:
    """R37."""
    client.send_to(target.address, b"part", frag)
    client.echo(target)


# What is sent, as (FRAG, data, target: 0 or 1), and what arrives.
REASSEMBLY = {
    "two parts": ([(1, b"a", 0), (LAST | 2, b"b", 0)], b"ab"),
    "one part": ([(LAST | 1, b"a", 0)], b"a"),
    "four parts": ([(1, b"a", 0), (2, b"b", 0), (3, b"", 0), (LAST | 4, b"d", 0)], b"abd"),
    "a lower number begins anew": ([(1, b"a", 0), (2, b"b", 0), (1, b"c", 0), (LAST | 2, b"d", 0)], b"cd"),
    "a part is missing": ([(1, b"a", 0), (LAST | 3, b"c", 0)], None),
    "the first is missing": ([(2, b"b", 0), (LAST | 3, b"c", 0)], None),
    "twice the same": ([(1, b"a", 0), (2, b"b", 0), (2, b"b", 0), (LAST | 3, b"c", 0)], None),
    "another target": ([(1, b"a", 1), (LAST | 2, b"b", 0)], None),
    "too much": ([(1, b"a" * 60000, 0), (2, b"b" * 60000, 0), (LAST | 3, b"c", 0)], None),
}


@pytest.mark.parametrize(("sent", "arrives"), REASSEMBLY.values(), ids=REASSEMBLY)
def test_fragments_are_put_together_when_that_is_switched_on(
        sent: List[Tuple[int, bytes, int]], arrives: bytes, start_server: Any, associate: Any, new_socket: Any) -> None:
    """R38."""
    client = associate(start_server(reassemble=True))
    targets = new_socket(), new_socket()
    for frag, data, which in sent:
        client.send_to(targets[which].address, data, frag)
    if arrives is not None:
        assert targets[0].receive()[0] == arrives
    client.echo(targets[0])             # and nothing else has come


def test_fragments_of_more_than_a_datagram_has_room_for_are_dropped() -> None:
    address, queue = Address.numeric(LOCALHOST, 7), datagrams.Fragments()
    for position in (1, 2, 3):
        queue.add(Datagram(address, b"", position), bytes(40_000))
    assert queue.add(Datagram(address, b"", 4 | Datagram.LAST_FRAGMENT), b"") is None
    assert queue.parts == []


def test_fragments_wait_five_seconds_for_the_rest(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, associate: Any, target: UdpSocket) -> None:
    assert datagrams.Fragments.timeout >= 5
    monkeypatch.setattr(datagrams.Fragments, "timeout", 0.01)
    server = start_server(reassemble=True)
    client = associate(server)
    client.send_to(target.address, b"a", 1)
    client.echo(target)
    association = association_of(server)
    eventually(lambda: time.monotonic() >= association.fragments.expires)
    client.send_to(target.address, b"b", LAST | 2)
    client.echo(target)


# --- observed ---

class Watcher(Observer):
    """Keeps what it is told of datagrams: the direction, the octets, and the outcome."""

    def __init__(self) -> None:
        self.told: List[Tuple[bool, bytes, str]] = []

    def datagram(self, session: Session, to_client: bool, octets: bytes, outcome: str) -> None:
        self.told.append((to_client, octets, outcome))

    def outcomes(self, number: int) -> List[str]:
        """Of that many datagrams from the client's side, once they have come."""
        eventually(lambda: sum(not to_client for to_client, _octets, _outcome in self.told) >= number)
        return [outcome for to_client, _octets, outcome in self.told if not to_client]


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def watched(start_server: Any, associate: Any, watcher: Watcher) -> Callable[..., UdpClient]:
    """A client whose datagrams are observed."""
    def make(handler: Any = Named, **settings: Any) -> UdpClient:
        server = start_server(handler, observers=(watcher,), **settings)
        client = associate(server)
        client.association = association_of(server)
        return client

    return make


@pytest.mark.usefixtures("waiter")
def test_observers_are_told_of_each_datagram_and_what_became_of_it(watched: Any, watcher: Watcher, target: UdpSocket) -> None:
    client = watched()
    for _ in range(3):
        client.echo(target)
    there, port = bytes(Datagram(target.address, b"hello")), client.reach(target).port
    way = f"It goes to {target.address} without the header, from port {port}."
    assert watcher.told[:6] == [(False, there, way), (True, there, "")] * 3


@pytest.mark.usefixtures("waiter")
def test_so_they_are_after_the_client_has_gone_on_from_another_port(
        monkeypatch: pytest.MonkeyPatch, watched: Any, watcher: Watcher, target: UdpSocket, new_socket: Any) -> None:
    monkeypatch.setattr(datagrams.Association, "idle_timeout", 0.05)
    client, moved, answer = watched(), new_socket(), bytes(Datagram(target.address, b"answer"))
    proxy = client.reach(target)
    eventually(lambda: client.is_heard(moved, target))
    target.send(b"answer", proxy)
    assert moved.receive()[0] == answer
    eventually(lambda: watcher.told[-1] == (True, answer, ""))


@needs_neighbour
def test_observers_are_told_why_a_datagram_is_dropped(watched: Any, watcher: Watcher, target: UdpSocket, new_socket: Any) -> None:
    client = watched(rules=Rules.parse(["deny 127.0.0.3", "deny *.bad.invalid"]))
    sent = [b"\0\0", *(bytes(datagram) for datagram in (
        Datagram(target.address, b"a fragment", LAST | 1), Datagram(name("nowhere.invalid", 7), b""), Datagram(Address.numeric("127.0.0.3", 7), b""),
        Datagram(name("very.bad.invalid", 7), b""), Datagram(Address.numeric("127.0.0.3", 7), b"again"),
    )), b"\0\0\0\3\1\n\0\7"]
    new_socket("127.0.0.2").send(b"from another host", client.relay)
    watcher.outcomes(1)
    for octets in sent:
        client.send(octets, client.relay)
    watcher.outcomes(8)
    eventually(lambda: not client.association.looking_up)
    client.send_to(name("nowhere.invalid", 7), b"again")
    assert watcher.outcomes(9) == [
        "Dropped: it comes from 127.0.0.2, and the client is 127.0.0.1.", "Dropped: its header cannot be read.",
        "Dropped: this proxy puts no fragments together.", "It waits until the name has been looked up.", "Dropped: rule: deny 127.0.0.3.",
        "Dropped: rule: deny *.bad.invalid.", "Dropped: rule: deny 127.0.0.3.", r"Dropped: a name that cannot exist: '\n'.", "Dropped: no such host.",
    ]
    assert [octets for _to_client, octets, _outcome in watcher.told[1:8]] == sent


def test_observers_are_told_of_what_a_neighbour_has_sent_before_the_port_was_locked(
        watched: Any, watcher: Watcher, target: UdpSocket, new_socket: Any) -> None:
    """And of a whole datagram with its last fragment."""
    client, neighbour = watched(reassemble=True), new_socket()
    go_on = threading.Event()
    client.association.relay.call(lambda: go_on.wait(TIMEOUT))
    client.send_to(target.address, b"a", 1)
    client.send_to(target.address, b"forged", sender=neighbour)
    client.send_to(target.address, b"b", LAST | 2)
    go_on.set()
    waits, forged, goes = watcher.outcomes(3)
    assert (waits, target.receive()[0]) == ("It waits for the other fragments.", b"ab")
    assert forged == f"Dropped: it comes from port {neighbour.address.port}, and the client sends from another."
    assert goes.startswith(f"It goes to {target.address} ")


def test_observers_are_told_of_datagrams_that_go_on_to_an_upstream(
        server: Any, watched: Any, watcher: Watcher, target: UdpSocket) -> None:
    class Chained(UpstreamHandler):
        upstream = f"socks5h://{Address.of(server.server_address)}"

    client = watched(Chained)
    client.send_to(name("here.invalid", target.address.port), b"?")
    target.send(b"!", target.receive()[1])
    answer = bytes(client.answer())
    eventually(lambda: watcher.told[1:] == [(True, answer, "")])
    assert watcher.outcomes(1) == ["It goes to the upstream's relay as it is."]


# --- sources ---

@needs_ipv6
@needs_neighbour
@pytest.mark.parametrize("source", ["127.0.0.2", ("127.0.0.2",), ("::1", "127.0.0.2")])
def test_datagrams_leave_from_the_source_and_by_its_family_only(
        start_server: Any, associate: Any, target: UdpSocket, new_socket: Any, source: Any) -> None:
    client, other = associate(start_server(route=Route(source=source))), new_socket("::1")
    client.send_to(other.address, b"by IPv6")
    client.send_to(target.address, b"by IPv4")
    assert target.receive()[1].host == "127.0.0.2"
    # The relay has taken the first datagram before the second.
    assert other.receive()[1].host == "::1" if "::1" in source else other.has_nothing()
