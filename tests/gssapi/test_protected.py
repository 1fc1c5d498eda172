"""What follows the log-in at levels 1 and 2: requests, replies, tunnels and datagrams in frames, and frames that are no good."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from contextlib import suppress
from io import BytesIO
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

pytest.importorskip("gssapi")

from socks5srv import datagrams, relay
from socks5srv.service.kerberos import GssapiUpstreamHandler
from socks5srv.gssapi.context import Initiator, Protection
from socks5srv.gssapi.messages import Encapsulated
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Reply, ReplyCode, Request

from ..conftest import LOCALHOST, TIMEOUT, address_of, eventually, exchange, handler_with, in_thread, udp_socket, within
from ..kerberos import REALM
from ..test_relay import busy
from .harness import KerberosClient
from .test_handler import broken_off

MIB = 1024 * 1024
both_levels = pytest.mark.parametrize("level", [1, 2])


@pytest.fixture
def entered(new_server: Any, new_kerberos: Any) -> Callable[..., Tuple[KerberosClient, Any]]:
    """A client that has logged in, and its server: ``entered(level, **settings)``."""
    def make(level: int = 2, **settings: Any) -> Tuple[KerberosClient, Any]:
        server = new_server(**settings)
        client = new_kerberos(server)
        client.enter(level)
        return client, server

    return make


@pytest.fixture
def tunnel(entered: Any, listen: Any) -> Iterator[Callable[..., Tuple[KerberosClient, socket.socket, Any]]]:
    """Both ends of a tunnel, and the server: ``client, target, server = tunnel(level, **settings)``."""
    targets: List[socket.socket] = []

    def make(level: int = 2, **settings: Any) -> Tuple[KerberosClient, socket.socket, Any]:
        listener = listen()
        client, server = entered(level, **settings)
        client.connect(listener.getsockname())
        targets.append(listener.accept()[0])
        targets[0].settimeout(TIMEOUT)
        return client, targets[0], server

    yield make
    for target in targets:
        target.close()


def until_the_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


# --- requests and replies ---

@both_levels
def test_r60_a_reply_is_one_frame(entered: Any, echo: Any, level: int) -> None:
    client, _server = entered(level)
    client.send(Request(Command.CONNECT, address_of(echo)))
    assert len(client.frame()) == len(bytes(Reply(ReplyCode.SUCCEEDED, UNSPECIFIED)))


@both_levels
def test_a_request_may_have_a_frame_for_each_octet_and_empty_ones(entered: Any, echo: Any, level: int) -> None:
    client, _server = entered(level)
    frame = client.protection.frame
    request = bytes(Request(Command.CONNECT, address_of(echo)))
    client.socket.sendall(b"".join(frame(request[i:i + 1]) + frame(b"") for i in range(len(request))))
    assert client.exactly(10)[1] == ReplyCode.SUCCEEDED
    client.exchange()


@both_levels
def test_early_data_is_kept_from_the_same_frame_and_from_the_next_one_and_from_a_part_of_one(entered: Any, echo: Any, level: int) -> None:
    client, _server = entered(level)
    last = client.protection.frame
    frames = last(bytes(Request(Command.CONNECT, address_of(echo))) + b"same,") + last(b"") + last(b"next,") + last(b"last")
    client.socket.sendall(frames[:-20])
    assert client.exactly(10)[1] == ReplyCode.SUCCEEDED
    assert client.exactly(10) == b"same,next,"
    client.socket.sendall(frames[-20:])
    assert client.exactly(4) == b"last"


@both_levels
def test_a_refusal_is_wrapped_as_well(entered: Any, refusing: Any, level: int) -> None:
    client, server = entered(level)
    assert client.request(Command.CONNECT, refusing()).code is ReplyCode.CONNECTION_REFUSED
    assert client.read(1) == b""
    assert server.next_ended().reply is ReplyCode.CONNECTION_REFUSED


@pytest.mark.parametrize(("request_", "code"), [
    (b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", ReplyCode.GENERAL_FAILURE), (b"\x05\x09\x00\x01\x7f\x00\x00\x01\x00\x50", ReplyCode.COMMAND_NOT_SUPPORTED),
    (b"\x05\x01\x00\x02", ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED),
])
def test_so_is_one_of_what_is_no_request(entered: Any, request_: bytes, code: ReplyCode) -> None:
    client, server = entered()
    client.send(request_)
    assert Reply.read(client).code is code
    assert client.read(1) == b""
    server.next_ended()


@both_levels
def test_bind_has_two_replies_and_may_be_told_more_meanwhile(entered: Any, level: int) -> None:
    client, _server = entered(level)
    first = client.request(Command.BIND, UNSPECIFIED)
    frames = client.encoded(b"ahead,") + client.encoded(b"further")
    client.socket.sendall(frames[:-9])
    with socket.create_connection((first.bound.host, first.bound.port), TIMEOUT) as peer:
        second = Reply.read(client)
        assert second.bound == Address.of(peer.getsockname())
        assert peer.recv(100) == b"ahead,"
        client.socket.sendall(frames[-9:])
        assert peer.recv(100) == b"further"
        peer.sendall(b"and back")
        assert client.exactly(8) == b"and back"


def test_a_frame_that_stays_a_part_does_not_keep_bind_from_its_peer(entered: Any) -> None:
    client, server = entered(bind_timeout=0.3)
    client.request(Command.BIND, UNSPECIFIED)
    client.socket.sendall(b"\x01\x03\xff\xff")
    assert Reply.read(client).code is ReplyCode.TTL_EXPIRED
    server.next_ended()


# --- tunnels ---

@both_levels
def test_every_octet_goes_through_unchanged_both_ways_at_once(entered: Any, echo: Any, level: int) -> None:
    client, server = entered(level)
    client.connect(echo)
    octets = os.urandom(MIB)
    digest = hashlib.sha256(octets * 20).digest()

    def send() -> None:
        for _ in range(20):
            client.send(octets)
        client.end()

    sent, received = in_thread(send), hashlib.sha256()
    for more in iter(lambda: client.read(MIB), b""):
        received.update(more)
    sent()
    assert received.digest() == digest
    session = server.next_ended()
    assert (session.up, session.down, session.outcome) == (20 * MIB, 20 * MIB, "close")


@both_levels
def test_either_way_ends_by_itself(tunnel: Any, level: int) -> None:
    client, target, server = tunnel(level)
    client.send(b"question")
    client.end()
    assert until_the_end(target) == b"question"
    target.sendall(b"answer" * 10_000)
    target.close()
    assert client.exactly(60_000) == b"answer" * 10_000
    assert client.read(1) == b""
    assert server.next_ended().reason == "closed by client"


def test_a_target_that_ends_first_still_gets_all(tunnel: Any) -> None:
    client, target, server = tunnel()
    target.shutdown(socket.SHUT_WR)
    assert client.read(1) == b""
    octets = os.urandom(300_000)
    sent = in_thread(client.send, octets)
    client_end = in_thread(lambda: (sent(), client.end()))
    assert until_the_end(target) == octets
    client_end()
    assert server.next_ended().reason == "closed by target"


def test_many_small_frames_at_once_are_passed_on_in_order_and_others_have_their_turn(entered: Any, echo: Any) -> None:
    client, _server = entered()
    client.connect(echo)
    expected = b"".join(b"%d," % number for number in range(3000))
    client.socket.sendall(b"".join(client.protection.frame(b"%d," % number) for number in range(3000)))
    assert client.exactly(len(expected)) == expected


@pytest.mark.parametrize("mode", ["epoll", "selectors"])
def test_a_reader_that_stops_stops_the_writer_and_takes_little_memory(
    tunnel: Any, new_kerberos: Any, echo: Any, monkeypatch: pytest.MonkeyPatch, mode: str,
) -> None:
    if mode == "selectors":
        monkeypatch.setattr(relay, "EpollWaiter", relay.SelectorWaiter)
    client, target, server = tunnel()
    found = eventually(lambda: server.sessions[0].tunnel)
    flows = found.up, found.down
    client.socket.settimeout(0.5)
    sent = 0
    with suppress(socket.timeout):
        while True:
            client.send(bytes(60_000))
            sent += 60_000
    assert sum(len(flow.received) + len(flow.chunk or b"") for flow in flows) < 2 * 0xFFFF + 2 * relay.BULK
    other = new_kerberos(server)
    other.enter()
    other.connect(echo)
    other.exchange()
    while sent > 0:
        sent -= len(target.recv(MIB))


def test_a_wrapped_tunnel_that_runs_flat_out_does_not_hold_up_plain_ones(entered: Any, new_client: Any, echo: Any) -> None:
    client, server = entered(allow_from=["127.0.0.0/8"])
    client.connect(echo)
    plain = [new_client(server) for _ in range(16)]
    for each in plain:
        each.connect(echo)

    def worst() -> float:
        times = []
        for _ in range(40):
            for each in plain:
                began = time.perf_counter()
                exchange(each)
                times.append(time.perf_counter() - began)
        return sorted(times)[len(times) * 99 // 100]

    quiet, over = worst(), []

    def flood() -> None:
        octets = client.encoded(bytes(MIB))
        while not over:
            client.socket.sendall(octets)
            octets = client.encoded(bytes(MIB))
        client.end()

    flooding = in_thread(flood)
    reading = in_thread(lambda: sum(map(len, iter(lambda: client.socket.recv(MIB), b""))))
    eventually(lambda: client.socket and server.sessions[0].octets()[1] > 2 * MIB)
    # The client and the echo are in this process, too, and so more is in the way than in the field.
    beside = worst()
    over.append(True)
    flooding()
    reading()
    assert beside < max(within(0.1), 6 * quiet)


def test_a_silent_tunnel_is_idle_and_one_in_use_is_not(entered: Any, echo: Any) -> None:
    client, server = entered(idle_timeout=0.4)
    client.connect(echo)
    for _ in range(5):
        threading.Event().wait(0.15)
        client.exchange()
    assert broken_off(client, server) == "idle"


# --- frames that are no good ---

def changed(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def swapped(client: Any) -> bytes:
    first, second = client.protection.frame(b"first"), client.protection.frame(b"second")
    return bytes(second + first)


def of_another(server: Any) -> bytes:
    with KerberosClient(server.server_address) as other:
        other.enter()
        frame = other.protection.frame(b"octets")
    server.next_ended()
    return bytes(frame)


BAD: Dict[str, Callable[[Any, Any], bytes]] = {
    "another VER": lambda client, _: b"\x05" + client.protection.frame(b"x")[1:], "another MTYP": lambda _client, _: b"\x01\x02",
    "an abort": lambda _client, _: b"\x01\xff", "LEN 0": lambda _client, _: bytes(Encapsulated(b"")),
    "junk": lambda _client, _: bytes(Encapsulated(b"junk")), "zeros": lambda _client, _: bytes(Encapsulated(bytes(0xFFFF))),
    "one bit": lambda client, _: changed(client.protection.frame(b"octets")), "twice": lambda client, _: 2 * client.protection.frame(b""),
    "swapped": lambda client, _: swapped(client), "in clear": lambda client, _: bytes(Encapsulated(client.initiator.wrap(b"x", False))),
    "another's": lambda _client, server: of_another(server), "a level": lambda client, _: bytes(client.wrapped(2)),
    "a request": lambda _client, _: bytes(Request(Command.CONNECT, UNSPECIFIED)),
    "one that was left out": lambda client, _: client.protection.frame(b"x") and client.protection.frame(b"y"),
}


@pytest.mark.parametrize("bad", BAD)
def test_after_a_bad_frame_in_place_of_a_request_nothing_is_said(entered: Any, bad: str) -> None:
    client, server = entered()
    client.socket.sendall(BAD[bad](client, server))
    assert broken_off(client, server)


@pytest.mark.parametrize("bad", BAD)
def test_after_a_bad_frame_in_a_tunnel_both_ends_are_reset(tunnel: Any, bad: str) -> None:
    client, target, server = tunnel()
    client.send(b"good")
    assert target.recv(100) == b"good"
    client.socket.sendall(BAD[bad](client, server))
    with pytest.raises(ConnectionResetError):
        target.recv(100)
    reason = broken_off(client, server)
    assert reason.startswith("client: ")
    assert "internal" not in reason


@pytest.mark.parametrize("length", [1, 3, 4, 20])
def test_an_end_within_a_frame_is_a_failure(tunnel: Any, entered: Any, length: int) -> None:
    client, target, server = tunnel()
    client.socket.sendall(client.protection.frame(b"octets")[:length])
    client.end()
    with pytest.raises(ConnectionResetError):
        target.recv(1)
    assert broken_off(client, server) == "client: the connection ended within a frame"
    client, server = entered()
    client.socket.sendall(client.protection.frame(b"octets")[:length])
    client.end()
    assert broken_off(client, server) == "the client closed the connection within a frame"


def test_at_level_1_an_encrypted_frame_is_accepted(entered: Any, echo: Any) -> None:
    client, _server = entered(1)
    client.connect(echo)
    client.socket.sendall(bytes(Encapsulated(client.initiator.wrap(b"hello", True))))
    assert client.exactly(5) == b"hello"


def test_r59_what_the_server_sends_is_encrypted_at_level_2_only(entered: Any, echo: Any) -> None:
    for level in (1, 2):
        client, _server = entered(level)
        client.connect(echo)
        client.send(b"a secret that is long enough")
        octets = client.socket.recv(1000)
        assert (b"a secret that is long enough" in octets) == (level == 1)


# --- UDP ---

class WrappedUdp:
    """A client's UDP socket, whose datagrams are wrapped for the relay at `there`."""

    def __init__(self, client: KerberosClient, there: Address) -> None:
        self.client, self.there = client, (there.host, there.port)
        self.socket = udp_socket(there.host)

    def frame(self, target: Any, payload: bytes) -> bytes:
        return self.client.protection.frame(bytes(Datagram(address_of(target), payload)))

    def send(self, octets: bytes) -> None:
        self.socket.sendto(octets, self.there)

    def answer(self) -> Datagram:
        return Datagram.read(BytesIO(self.client.protection.decode_datagram(self.socket.recv(65535))))

    def exchange(self, target: socket.socket, payload: bytes = b"ping") -> None:
        self.send(self.frame(target.getsockname(), payload))
        octets, source = target.recvfrom(65535)
        assert octets == payload
        target.sendto(payload[::-1], source)
        answer = self.answer()
        assert (answer.address, answer.data) == (Address.of(target.getsockname()), payload[::-1])


@pytest.fixture
def wrapped_udp(new_server: Any, new_kerberos: Any) -> Iterator[Callable[..., Tuple[WrappedUdp, Any]]]:
    """A client's association, and the server: ``wrapped_udp(level, **settings)``."""
    made: List[WrappedUdp] = []

    def make(level: int = 2, **settings: Any) -> Tuple[WrappedUdp, Any]:
        server = new_server(**settings)
        client = new_kerberos(server, Initiator("localhost", sequence=False))
        client.enter(level)
        made.append(WrappedUdp(client, client.request(Command.UDP_ASSOCIATE, UNSPECIFIED).bound))
        return made[-1], server

    yield make
    for each in made:
        each.socket.close()


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with udp_socket() as sock:
        yield sock


@both_levels
@pytest.mark.parametrize("length", [0, 1, 1400, 60_000])
def test_a_datagram_is_one_frame_with_its_header_within(wrapped_udp: Any, target: socket.socket, level: int, length: int) -> None:
    udp, server = wrapped_udp(level)
    for _ in range(3):
        udp.exchange(target, os.urandom(length))
    udp.client.close()
    session = server.next_ended()
    assert (session.up, session.down, session.user) == (3 * length, 3 * length, f"alice@{REALM}")


def test_datagrams_that_are_no_good_are_dropped_and_end_nothing(wrapped_udp: Any, target: socket.socket, new_kerberos: Any) -> None:
    udp, server = wrapped_udp()
    udp.exchange(target)
    good = udp.frame(target.getsockname(), b"x")
    other = new_kerberos(server)
    other.enter()
    plain = bytes(Datagram(address_of(target.getsockname()), b"x"))
    for bad in (
        b"", b"\x01", good[:-1], good + b"\0", changed(good), b"\x05" + good[1:], b"\x01\x02" + good[2:], bytes(Encapsulated(b"")), bytes(60_000), plain,
        other.protection.frame(plain), bytes(Encapsulated(udp.client.initiator.wrap(plain, False))), udp.client.protection.frame(b"no header"),
    ):
        udp.send(bad)
    udp.send(good)
    udp.send(good)              # and once more
    udp.send(udp.frame(target.getsockname(), b"last"))
    assert [target.recv(100) for _ in range(2)] == [b"x", b"last"]


def test_datagrams_may_come_in_any_order_and_some_never(wrapped_udp: Any, target: socket.socket) -> None:
    udp, _server = wrapped_udp()
    udp.exchange(target)
    frames = [udp.frame(target.getsockname(), b"%d" % number) for number in range(6)]
    for number in (5, 1, 3, 0):
        udp.send(frames[number])
    assert [target.recv(100) for _ in range(4)] == [b"5", b"1", b"3", b"0"]


def test_an_answer_that_is_too_large_once_wrapped_is_dropped(wrapped_udp: Any, target: socket.socket) -> None:
    udp, _server = wrapped_udp()
    udp.exchange(target)
    udp.send(udp.frame(target.getsockname(), b"ping"))
    _octets, source = target.recvfrom(100)
    for length in (65_507, 65_480, 65_440):
        target.sendto(bytes(length), source)
    target.sendto(b"small", source)
    assert udp.answer().data == b"small"


def test_only_a_datagram_that_unwraps_settles_the_port_of_the_client(wrapped_udp: Any, target: socket.socket) -> None:
    udp, _server = wrapped_udp()
    with udp_socket() as neighbour:
        neighbour.sendto(bytes(Datagram(address_of(target.getsockname()), b"mine")), udp.there)
        udp.exchange(target)


def test_a_client_that_was_silent_may_go_on_from_another_port(wrapped_udp: Any, target: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socks5srv.datagrams.Association.idle_timeout", 0.2)
    udp, server = wrapped_udp()
    udp.exchange(target)
    client_socket = next(each for each in server.relays[0].watched.values() if type(each).__name__ == "ClientSocket")
    eventually(lambda: not client_socket.locked)
    udp.socket.close()
    udp.socket = udp_socket()
    udp.exchange(target)


def test_a_turn_of_the_relay_thread_is_for_few_of_them(
    wrapped_udp: Any, target: socket.socket, monkeypatch: pytest.MonkeyPatch,
) -> None:
    udp, server = wrapped_udp()
    udp.exchange(target)
    turns: List[List[int]] = []
    ready, contents = datagrams.ClientSocket.ready, Protection.contents
    monkeypatch.setattr(datagrams.ClientSocket, "ready", lambda *arguments: (turns.append([]), ready(*arguments)))
    monkeypatch.setattr(Protection, "contents", lambda *arguments: (turns[-1].append(1), contents(*arguments))[1])
    with busy(server.relays[0]):
        for _ in range(9):
            udp.send(udp.frame(target.getsockname(), b"x"))
    assert [target.recv(100) for _ in range(9)] == [b"x"] * 9
    assert max(map(len, turns)) <= 2


def test_observers_are_shown_datagrams_as_they_are_within_the_frames(wrapped_udp: Any, target: socket.socket) -> None:
    from socks5srv.observer import Observer

    class Watching(Observer):
        def __init__(self) -> None:
            self.seen: List[bytes] = []

        def datagram(self, _session: Any, _to_client: bool, octets: bytes, _outcome: str) -> None:
            self.seen.append(octets)

    watching = Watching()
    udp, _server = wrapped_udp(observers=(watching,))
    udp.exchange(target, b"there")
    assert eventually(lambda: watching.seen[1:] and watching.seen) == [bytes(Datagram(address_of(target.getsockname()), octets)) for octets in (b"there", b"ereht")]


# --- through an upstream ---

@pytest.mark.parametrize("level", [0, 1, 2])
def test_behind_it_there_may_be_an_upstream(new_server: Any, new_kerberos: Any, start_server: Any, echo: Any, target: socket.socket, level: int) -> None:
    far = start_server(handler_with())
    near = new_server(levels=(0, 1, 2), handler=GssapiUpstreamHandler, upstream="socks5h://%s:%d" % far.server_address)
    client = new_kerberos(near)
    client.enter(level)
    client.connect(echo)
    client.exchange()
    client.close()
    far.next_ended()
    assert (near.next_ended().user, LOCALHOST) == (f"alice@{REALM}", echo[0])
    client = new_kerberos(near, Initiator("localhost", sequence=False))
    client.enter(level)
    bound = client.request(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    if level:
        udp = WrappedUdp(client, bound)
        with udp.socket:
            udp.exchange(target)
    client = new_kerberos(near)
    client.enter(level)
    first = client.request(Command.BIND, UNSPECIFIED).bound
    with socket.create_connection((first.host, first.port), TIMEOUT) as peer:
        assert Reply.read(client).bound == Address.of(peer.getsockname())
        peer.sendall(b"hello")
        assert client.exactly(5) == b"hello"
