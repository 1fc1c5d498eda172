"""
Tunnels, over real sockets: every byte, every end and every reset, both ways.

Most tests run once for each way in which the relay can work: with splice, copying, with pipes
that cannot grow, and on the plain selectors of other systems.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import selectors
import socket
import stat
import threading
import time
from dataclasses import dataclass
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple
from unittest.mock import Mock

import pytest

from socks5srv import relay
from socks5srv.protocol import Address, ProtocolError, ReplyCode
from socks5srv.session import Session

from .conftest import TIMEOUT, Client, eventually, exchange, in_thread, reset, within

MIB = 1024 * 1024

either_side = pytest.mark.parametrize("side", ["client", "target"])
needs_splice = pytest.mark.skipif(not relay.Relay.can_splice, reason="not on this platform: no os.splice")


@pytest.fixture(params=["splice", "copy", "short pipes", "selectors", "select"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force a way of relaying for the servers that are started afterwards."""
    if request.param == "splice" and not relay.Relay.can_splice:
        pytest.skip("not on this platform: no os.splice")
    if request.param == "copy":
        monkeypatch.setattr(relay.Relay, "can_splice", False)
    if request.param == "short pipes":
        monkeypatch.setattr(relay.Pipe, "enlarge", lambda _pipe: False)
    if request.param in ("selectors", "select"):
        monkeypatch.setattr(relay, "EpollWaiter", relay.SelectorWaiter)
    if request.param == "select":
        monkeypatch.setattr(selectors, "DefaultSelector", selectors.SelectSelector)
    return str(request.param)


@pytest.fixture
def tunnel_through(new_client: Any, listen: Any) -> Iterator[Callable[[Any], Tuple[Client, socket.socket]]]:
    """Both ends of a new tunnel: ``client, target = tunnel_through(server)``."""
    with contextlib.ExitStack() as stack:
        def make(server: Any) -> Tuple[Client, socket.socket]:
            listener, client = listen(), new_client(server)
            client.connect(listener.getsockname())
            target = stack.enter_context(listener.accept()[0])
            target.settimeout(TIMEOUT)
            return client, target

        yield make


@pytest.fixture
def tunnel(start_server: Any, tunnel_through: Any) -> Callable[..., Tuple[Client, socket.socket, Any]]:
    """The same of a new server, and the server: ``client, target, server = tunnel(**settings)``."""
    def make(**settings: Any) -> Tuple[Client, socket.socket, Any]:
        server = start_server(**settings)
        return (*tunnel_through(server), server)

    return make


@pytest.fixture
def used_tunnel(tunnel: Any) -> Callable[..., Tuple[Client, socket.socket, Any]]:
    """The same, with 5 octets gone up and 8 down."""
    def make(**settings: Any) -> Tuple[Client, socket.socket, Any]:
        client, target, server = tunnel(**settings)
        exchange_both_ways(client, target)
        return client, target, server

    return make


@contextlib.contextmanager
def busy(carrier: relay.Relay) -> Iterator[None]:
    """Meanwhile its thread does nothing else."""
    waits, go_on = threading.Event(), threading.Event()
    carrier.call(lambda: (waits.set(), go_on.wait(TIMEOUT)))
    assert waits.wait(TIMEOUT)
    try:
        yield
    finally:
        go_on.set()


def exchange_both_ways(client: Client, target: socket.socket) -> None:
    client.send(b"there")
    assert target.recv(100) == b"there"
    target.sendall(b"and back")
    assert client.exactly(8) == b"and back"


def send_pattern(sock: socket.socket, octets: int, seed: int) -> str:
    """Send so many octets and end; the hash of what was sent."""
    block = bytes((i * i + seed) % 251 for i in range(251 * 1021))
    digest = hashlib.sha256()
    while octets > 0:
        piece = block[:octets]
        sock.sendall(piece)
        digest.update(piece)
        octets -= len(piece)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive_all(sock: socket.socket) -> str:
    """The hash of all that comes until the end."""
    digest = hashlib.sha256()
    for octets in iter(lambda: sock.recv(MIB), b""):
        digest.update(octets)
    return digest.hexdigest()


@either_side
@pytest.mark.usefixtures("mode")
def test_who_has_ended_still_gets_all_that_the_other_sends(tunnel: Any, side: str) -> None:
    client, target, server = tunnel()
    ended, other = (client.socket, target) if side == "client" else (target, client.socket)
    ended.sendall(b"question")
    ended.shutdown(socket.SHUT_WR)
    assert other.recv(100) == b"question"
    assert other.recv(100) == b""
    sent = in_thread(send_pattern, other, 3 * MIB, 1)
    assert receive_all(ended) == sent()
    session = server.next_ended()
    assert (session.up, session.down) == ((8, 3 * MIB) if side == "client" else (3 * MIB, 8))
    assert session.reason == f"closed by {side}"


@pytest.mark.usefixtures("mode")
def test_its_session_knows_the_octets_of_a_tunnel_while_it_lives(used_tunnel: Any) -> None:
    client, target, server = used_tunnel()
    [session] = server.sessions
    eventually(lambda: session.octets() == (5, 8))
    assert (session.up, session.down, session.tunnel.over) == (0, 0, False)
    client.end()
    target.close()
    assert server.next_ended() is session
    assert (session.octets(), session.up, session.down, session.tunnel) == ((5, 8), 5, 8, None)


@pytest.mark.timeout(120)
def test_a_hundred_mebibytes_go_each_way_at_once_unchanged(mode: str, tunnel: Any) -> None:
    client, target, server = tunnel()
    octets = 100 * MIB if mode in ("splice", "copy") else 20 * MIB
    up, down = in_thread(send_pattern, client.socket, octets, 3), in_thread(send_pattern, target, octets, 4)
    arrived_down, arrived_up = in_thread(receive_all, client.socket), in_thread(receive_all, target)
    assert (arrived_up(), arrived_down()) == (up(), down())
    session = server.next_ended()
    assert (session.up, session.down) == (octets, octets)


def fill(sock: socket.socket) -> int:
    """Send until nothing more goes; how many octets that was."""
    sock.setblocking(False)
    sent = quiet = 0
    while quiet < 20:       # the relay needs a moment to take what it can
        try:
            sent += sock.send(b"x" * 65536)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            threading.Event().wait(0.01)
    sock.settimeout(TIMEOUT)
    return sent


def drain(sock: socket.socket, octets: int) -> None:
    while octets:
        more = sock.recv(MIB)
        assert more
        octets -= len(more)


@pytest.mark.usefixtures("mode")
def test_two_ends_that_only_write_do_not_lock_each_other_up(tunnel: Any) -> None:
    client, target, _server = tunnel()
    sent = [fill(client.socket), fill(target)]
    drain(target, sent[0])
    drain(client.socket, sent[1])
    exchange_both_ways(client, target)


@pytest.mark.usefixtures("mode")
def test_a_reader_that_stops_stops_the_writer_and_nobody_else(tunnel: Any, tunnel_through: Any) -> None:
    client, target, server = tunnel()
    stalled = fill(target)
    assert stalled < 64 * MIB           # socket buffers, and one chunk
    exchange_both_ways(*tunnel_through(server))
    client.send(b"the other way")       # is not stopped
    assert target.recv(100) == b"the other way"
    drain(client.socket, stalled)


def ends_with_reset(sock: socket.socket) -> bool:
    try:
        while sock.recv(MIB):
            pass
    except ConnectionResetError:
        return True
    return False


@either_side
@pytest.mark.usefixtures("mode")
def test_a_reset_by_one_side_reaches_the_other_as_a_reset(used_tunnel: Any, side: str) -> None:
    client, target, server = used_tunnel()
    one, other = (client.socket, target) if side == "client" else (target, client.socket)
    one.sendall(b"half of an ans")
    assert other.recv(100) == b"half of an ans"
    reset(one)
    assert ends_with_reset(other)
    assert server.next_ended().reason == f"{side}: connection reset"


@pytest.mark.parametrize("mode", ["splice", "copy"], indirect=True)
@pytest.mark.usefixtures("mode")
def test_a_reset_is_noticed_while_the_other_end_takes_nothing(tunnel: Any) -> None:
    client, target, server = tunnel()
    fill(target)                        # so that the relay waits for the client, and not for the target
    reset(target)
    assert server.next_ended().reason == "target: connection reset"
    assert ends_with_reset(client.socket)


@pytest.mark.usefixtures("mode")
def test_a_half_closed_end_that_is_reset_ends_the_tunnel(tunnel: Any) -> None:
    client, target, server = tunnel()
    client.end()
    assert target.recv(100) == b""
    client.reset()
    # Having read the end, the target can meet the reset only by writing.
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        eventually(lambda: target.send(b"into the void") == 0)
    assert server.next_ended().seconds is not None


@pytest.mark.usefixtures("mode")
def test_an_end_that_meets_a_reset_is_the_others_connection_reset(used_tunnel: Any) -> None:
    """shutdown() of a socket that has been reset meanwhile says only that it is not connected."""
    client, target, server = used_tunnel()
    (carrier,) = server.relays
    with busy(carrier):
        target.shutdown(socket.SHUT_WR)
        client.reset()
    assert server.next_ended().reason == "client: connection reset"
    assert ends_with_reset(target)


class Replaceable(socket.socket):
    """A socket of which a call can be replaced."""


class Toy:
    """A coding for tests: a length, and the octets with all bits turned round."""

    block = 10_000

    def encode(self, octets: Any) -> bytes:
        pieces = [bytes(octets[start:start + self.block]) for start in range(0, len(octets), self.block)]
        return b"".join(len(piece).to_bytes(2, "big") + bytes(each ^ 0xFF for each in piece) for piece in pieces)

    def decode(self, received: bytearray) -> Any:
        end = 2 + int.from_bytes(received[:2], "big")
        if len(received) < max(end, 2):
            return None
        if end > 2 + self.block:
            raise ProtocolError("too long")
        octets = bytes(each ^ 0xFF for each in received[2:end])
        del received[:end]
        return octets


def broken_tunnel(side: str, call: str, code: int, held: bool = False, coding: Any = None) -> str:
    """
    The reason for which a tunnel ends when this call on the socket of this side fails, the first time or, if `held`, the second;
    the octets come from the other one.
    """
    pairs = {name: socket.socketpair() for name in ("client", "target")}
    ends = {name: Replaceable(fileno=ours.detach()) for name, (ours, _theirs) in pairs.items()}
    setattr(ends[side], call, Mock(side_effect=chain([BlockingIOError()] * held, repeat(OSError(code, os.strerror(code))))))
    for end in ends.values():
        end.setblocking(False)
    carrier, over = relay.Relay(), threading.Event()
    session = Session(1, Address.numeric("127.0.0.1", 1))
    try:
        if coding is None:
            relay.Tunnel(carrier, ends["client"], ends["target"], session, over.set).start()
        else:
            coded = relay.Coded(coding), relay.Coded(coding)
            relay.CodedTunnel(carrier, ends["client"], ends["target"], session, over.set, None, b"", *coded).start()
        other = {"client": "target", "target": "client"}[side]
        sender = pairs[side if call == "recv_into" else other][1]
        sender.send(b"x" if coding is None else coding.encode(b"x"))
        if call == "shutdown":
            sender.shutdown(socket.SHUT_WR)
        assert over.wait(TIMEOUT)
        assert carrier.pipes is None or carrier.pipes.all == set(carrier.pipes.free), "a pipe has not come back"
        return session.reason
    finally:
        carrier.stop()
        for _ours, theirs in pairs.values():
            theirs.close()


def test_what_has_come_early_goes_first_and_nothing_is_read_before_it_has_gone() -> None:
    carrier, over = relay.Relay(), threading.Event()
    (client, ours), (target, theirs) = socket.socketpair(), socket.socketpair()
    tunnel = relay.Tunnel(carrier, ours, theirs, Session(1, Address.numeric("127.0.0.1", 1)), over.set, early=b"early, ")
    assert (tunnel.up.interest, tunnel.down.interest) == (0, relay.READ | relay.WRITE)
    with client, target:
        client.send(b"late")
        tunnel.start()
        target.settimeout(TIMEOUT)
        assert target.recv(7) + target.recv(7) == b"early, late"
        carrier.stop()
    assert over.is_set()


@pytest.mark.parametrize(("code", "says"), [
    (errno.ECONNRESET, "connection reset"), (errno.EPIPE, "broken pipe"), (errno.ETIMEDOUT, "timed out"), (errno.ENOTCONN, "connection reset"),
    (errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)[0].lower() + os.strerror(errno.EHOSTUNREACH)[1:]),
])
@pytest.mark.parametrize(("call", "held"), [("recv_into", False), ("send", False), ("send", True), ("shutdown", False)])
@pytest.mark.parametrize("coding", [None, Toy()], ids=["plain", "coded"])
@either_side
def test_the_reason_says_whose_socket_has_failed(side: str, coding: Any, call: str, held: bool, code: int, says: str) -> None:
    assert broken_tunnel(side, call, code, held, coding) == f"{side}: {says}"


@needs_splice
@either_side
@pytest.mark.parametrize(("reads", "held"), [(True, False), (False, False), (False, True)])
def test_so_it_does_while_pages_are_spliced(monkeypatch: pytest.MonkeyPatch, side: str, reads: bool, held: bool) -> None:
    splice, copy, holds = os.splice, relay.Flow.copy, [held]

    def spliced(source: int, sink: int, count: int, **keywords: Any) -> int:
        from_pipe = stat.S_ISFIFO(os.fstat(source).st_mode)
        if from_pipe and holds.pop() if holds else False:
            raise BlockingIOError
        if from_pipe is not reads:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return splice(source, sink, count, **keywords)

    def bulky(flow: relay.Flow) -> None:
        copy(flow) if flow.bulk else flow.splice()

    monkeypatch.setattr(os, "splice", spliced)
    monkeypatch.setattr(relay.Flow, "copy", bulky)
    assert broken_tunnel(side, "recv_into" if reads else "send", errno.EIO) == f"{side}: connection reset"


@pytest.mark.usefixtures("mode")
def test_many_small_messages_are_echoed_in_order(start_server: Any, new_tunnel: Any) -> None:
    client = new_tunnel(start_server())
    for number in range(300):
        exchange(client, b"message %d" % number)


def test_bulk_and_small_messages_alternate_in_one_tunnel(mode: str, start_server: Any, new_tunnel: Any) -> None:
    client = new_tunnel(start_server())
    for size in (10, 2 * MIB, 10, 300_000, 1, 4 * MIB, 10):
        octets = os.urandom(size)
        sending = in_thread(client.socket.sendall, octets)
        assert client.exactly(size) == octets, mode
        sending()


def test_sockets_of_a_tunnel_have_no_nagle_and_keep_alive(used_tunnel: Any) -> None:
    _client, _target, server = used_tunnel()
    flow = next(watched for watched in server.relays[0].watched.values() if isinstance(watched, relay.Flow))
    for sock in (flow.source, flow.sink):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_a_silent_tunnel_is_closed_after_the_idle_timeout(used_tunnel: Any) -> None:
    client, _target, server = used_tunnel(idle_timeout=0.2)
    assert ends_with_reset(client.socket)
    session = server.next_ended()
    assert session.reason == "idle"
    assert 0.2 <= session.seconds < within(2)


def test_the_idle_timeout_is_as_long_as_it_says(used_tunnel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _client, _target, server = used_tunnel(idle_timeout=100)
    eventually(lambda: server.relays[0].next_check - time.monotonic() <= 25)     # it is looked at four times in that time
    reasons: List[str] = []
    monkeypatch.setattr(relay.Tunnel, "abort", lambda _tunnel, reason: reasons.append(reason))
    [check_idle] = server.relays[0].idle_watch
    for now in (1000.0, 1099.9):
        check_idle(now)
    assert reasons == []
    check_idle(1100.0)
    assert reasons == ["idle"]
    monkeypatch.undo()


def test_every_idle_tunnel_is_looked_at_each_time() -> None:
    looked_at: List[int] = []
    checks = {lambda _now, number=number: looked_at.append(number): 4.0 for number in range(3)}
    thread: Any = SimpleNamespace(idle_watch=checks, next_check=0.0, attempt=lambda look: look())
    assert relay.Relay.expire_idle(thread) == pytest.approx(1)
    assert looked_at == [0, 1, 2]


def test_tunnels_that_have_ended_are_not_kept_for_their_idle_timeout(used_tunnel: Any) -> None:
    client, _target, server = used_tunnel(idle_timeout=3600)
    assert len(server.relays[0].idle_watch) == 1
    client.reset()
    server.next_ended()
    assert not server.relays[0].idle_watch


def test_a_tunnel_in_use_outlives_the_idle_timeout(tunnel: Any) -> None:
    client, target, server = tunnel(idle_timeout=0.8)
    for _ in range(12):
        exchange_both_ways(client, target)
        threading.Event().wait(0.1)     # the passing of time is what is tested
    client.end()
    target.close()
    session = server.next_ended()
    assert session.reason == "closed by client"
    assert session.seconds > 0.9


@contextlib.contextmanager
def descriptor_limit(least: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < least:
        pytest.skip(f"not on this platform: at most {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, least), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_six_hundred_tunnels_live_side_by_side_beyond_descriptor_1023(start_server: Any, new_client: Any, echo: Any) -> None:
    with descriptor_limit(4096):
        server = start_server()
        clients = [new_client(server) for _ in range(600)]
        for client in clients:
            client.connect(echo)
        for number, client in enumerate(clients):
            client.send(b"%5d" % number)
        assert [int(client.exactly(5)) for client in clients] == list(range(600))
        assert max(server.relays[0].watched) > 1023
        assert len(server.sessions) == 600
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("socks5srv")]
        assert len(threads) < 300       # not one a tunnel
        for client in clients:
            client.close()
        for _ in clients:
            assert server.next_ended().reply is ReplyCode.SUCCEEDED
        eventually(lambda: len(server.relays[0].watched) == 1)      # what wakes it up


def test_where_a_selector_holds_few_sockets_more_relay_threads_start(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_tunnel: Any) -> None:
    monkeypatch.setattr(relay, "EpollWaiter", relay.SelectorWaiter)
    monkeypatch.setattr(relay.SelectorWaiter, "room", 8.0)
    server = start_server()
    for client in [new_tunnel(server) for _ in range(10)]:
        exchange(client)
    assert len(server.relays) >= 4


@pytest.mark.skipif(not hasattr(relay.select, "epoll"), reason="not on this platform: elsewhere nothing is added while the thread waits")
def test_an_event_that_comes_before_its_watcher_is_known_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = relay.Relay()
    rounds: List[float] = []
    heard = threading.Event()
    watcher: Any = SimpleNamespace(ready=lambda _events: (ours.recv(1), heard.set()), abort=lambda _reason: None)
    waits = carrier.waiter.wait
    monkeypatch.setattr(carrier.waiter, "wait", lambda timeout: rounds.append(timeout) or waits(timeout))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"!")
        with carrier.adding:
            carrier.waiter.add(ours.fileno(), relay.READ)
            assert not heard.wait(0.05)     # time enough for some ten thousand rounds, if it looked again and again
            carrier.watched[ours.fileno()] = watcher
        assert heard.wait(TIMEOUT)
        carrier.discard(ours)
        carrier.stop()
    assert len(rounds) < 10


@pytest.mark.usefixtures("mode")
def test_what_is_closed_cannot_be_watched_and_leaves_nothing() -> None:
    carrier = relay.Relay()
    before = dict(carrier.watched)
    closed = socket.socket()
    closed.close()
    with pytest.raises(ValueError, match=r"negative|closed"):
        carrier.watch((closed, carrier, relay.READ))
    assert carrier.watched == before
    carrier.stop()


def test_tunnels_spread_over_several_relay_threads(start_server: Any, new_tunnel: Any) -> None:
    server = start_server(relay_threads=3)
    for _ in range(7):
        new_tunnel(server)
    assert sorted(len(carrier.watched) for carrier in server.relays) == [5, 5, 7]     # two sockets each, and the one that wakes it


def test_a_bug_costs_one_tunnel_and_no_other(
        monkeypatch: pytest.MonkeyPatch, used_tunnel: Any, tunnel_through: Any, bugs: List[Any]) -> None:
    client, _target, server = used_tunnel()
    other = tunnel_through(server)
    broken = next(watched.tunnel.up for watched in server.relays[0].watched.values() if isinstance(watched, relay.Flow))
    original = relay.Flow.copy

    def copy(flow: relay.Flow) -> None:
        if flow is broken:
            raise ZeroDivisionError("a bug")
        original(flow)

    monkeypatch.setattr(relay.Flow, "copy", copy)
    client.send(b"x")
    assert ends_with_reset(client.socket)
    exchange_both_ways(*other)
    assert server.next_ended().reason == "internal error"
    assert [record.getMessage() for record in bugs] == ["unhandled exception in the relay thread"]
    bugs.clear()


def test_a_bug_in_a_call_does_not_end_the_thread(used_tunnel: Any, bugs: List[Any]) -> None:
    client, target, server = used_tunnel()
    thread = server.relays[0]
    called = threading.Event()
    thread.call(lambda: 1 // 0)
    thread.call(called.set)
    assert called.wait(TIMEOUT)
    exchange_both_ways(client, target)
    assert len(bugs) == 1
    bugs.clear()


@needs_splice
def test_there_are_only_so_many_pipes_and_whoever_gets_none_copies() -> None:
    pipes = relay.Pipes()
    try:
        pipes.limit = 2
        one, other = pipes.take(), pipes.take()
        assert one is not None
        assert other is not None
        assert pipes.take() is None
        pipes.give_back(one)
        assert pipes.take() is one
    finally:
        pipes.close()


@needs_splice
def test_a_system_that_has_no_long_pipes_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[relay.Pipe] = []
    monkeypatch.setattr(relay.Pipe, "enlarge", lambda pipe: asked.append(pipe) is not None)
    pipes = relay.Pipes()
    assert [pipes.take() for _ in range(3)] == [None] * 3
    assert len(asked) == 1
    assert not pipes.all


@pytest.mark.usefixtures("mode")
def test_a_flow_that_was_bulk_is_none_when_it_has_but_few_octets_to_move(tunnel: Any) -> None:
    client, target, server = tunnel()
    [handler] = server.registry.serving()
    receiving = in_thread(client.exactly, 8 * MIB)
    target.sendall(bytes(8 * MIB))
    receiving()

    def is_small_again() -> bool:
        target.sendall(b"x")
        assert client.exactly(1) == b"x"
        return not handler._tunnel.down.bulk

    eventually(is_small_again)


@needs_splice
def test_pipes_go_back_to_the_pool_when_they_are_empty(tunnel: Any) -> None:
    client, target, server = tunnel()
    sent = in_thread(send_pattern, target, 30 * MIB, 5)
    assert receive_all(client.socket) == sent()
    pipes = server.relays[0].pipes
    assert 1 <= len(pipes.all) <= 2     # it did splice
    eventually(lambda: len(pipes.free) == len(pipes.all))


@needs_splice
def test_a_tunnel_that_breaks_off_leaves_no_octets_in_the_pipes(tunnel: Any, tunnel_through: Any) -> None:
    client, target, server = tunnel()
    fill(target)                        # a pipe is full now
    client.reset()
    server.next_ended()
    pipes = server.relays[0].pipes
    assert len(pipes.all) == len(pipes.free), "a pipe has not come back"
    again, target = tunnel_through(server)
    sent = in_thread(send_pattern, target, 5 * MIB, 6)
    assert receive_all(again.socket) == sent()


def test_whoever_wakes_the_thread_again_and_again_does_not_fail(used_tunnel: Any) -> None:
    client, target, server = used_tunnel()
    with busy(server.relays[0]):
        for _ in range(20_000):
            server.relays[0].waker.wake()
    exchange_both_ways(client, target)


@pytest.mark.usefixtures("mode")
def test_a_few_octets_overtake_all_bulk_that_is_waiting(
        start_server: Any, tunnel_through: Any, new_tunnel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    bulky = [tunnel_through(server)[0] for _ in range(5)]
    few = new_tunnel(server)
    order: List[str] = []
    splice, copy = relay.Flow.splice, relay.Flow.copy
    monkeypatch.setattr(relay.Flow, "splice", lambda flow: (order.append("bulk"), splice(flow)))
    monkeypatch.setattr(relay.Flow, "copy", lambda flow: (order.append("few"), copy(flow)) if flow.tunnel is small else copy(flow))
    (carrier,) = server.relays
    eventually(lambda: len(carrier.watched) == 2 * 6 + 1)       # a client hears of its tunnel before the relay thread does
    flows = {flow.source.getpeername(): flow for flow in carrier.watched.values() if isinstance(flow, relay.Flow)}
    small = flows[few.socket.getsockname()].tunnel
    with busy(carrier):
        for client in bulky:
            flows[client.socket.getsockname()].bulk = True
            client.socket.send(bytes(1000))
        few.socket.send(b"x")
    assert few.socket.recv(1) == b"x"
    assert order[0] == "few"


def test_many_bulk_flows_have_their_turns_in_order(tunnel: Any) -> None:
    _client, _target, server = tunnel()
    eventually(lambda: server.relays)
    (carrier,) = server.relays
    turns: List[int] = []

    @dataclass(frozen=True)
    class Flow:
        number: int

        def run_bulk(self) -> None:
            turns.append(self.number)

    carrier.bulk_queue.update((Flow(number), None) for number in range(2 * relay.BULK_BATCH))
    carrier.call(lambda: None)
    eventually(lambda: not carrier.bulk_queue)
    assert turns == list(range(2 * relay.BULK_BATCH))


# --- coded tunnels; what Kerberos makes of them is in gssapi/test_protected.py ---

class End(NamedTuple):
    """One end of a tunnel, coded or not."""

    socket: socket.socket
    coding: Any

    def send(self, octets: bytes) -> None:
        self.socket.sendall(self.coding.encode(octets) if self.coding else octets)

    def rest(self) -> bytes:
        """What comes until the end, decoded."""
        received, found = bytearray(), b""
        for octets in iter(lambda: self.socket.recv(65536), b""):
            received += octets
        if not self.coding:
            return bytes(received)
        for octets in iter(lambda: self.coding.decode(received), None):
            found += octets
        assert not received
        return found


@pytest.fixture
def coded_tunnel() -> Iterator[Callable[..., Any]]:
    """Both ends of a new tunnel, and it: ``client, target, tunnel = coded_tunnel(sides, early, received)``, coded at these sides."""
    with contextlib.ExitStack() as stack:
        def make(sides: str, early: bytes = b"", received: bytes = b"") -> Any:
            carrier = relay.Relay()
            stack.callback(carrier.stop)
            ends, ours, coded = [], [], []
            for side in ("client", "target"):
                end, other = socket.socketpair()
                end.settimeout(TIMEOUT)
                ends.append(End(stack.enter_context(end), Toy() if side in sides else None))
                ours.append(other)
                coded.append(relay.Coded(Toy(), received) if side in sides else None)
            session = Session(1, Address.numeric("127.0.0.1", 1))
            tunnel = relay.CodedTunnel(carrier, *ours, session, lambda: None, None, early, *coded)
            tunnel.start()
            return (*ends, tunnel)

        yield make


either_side_or_both = pytest.mark.parametrize("sides", ["client", "target", "client and target"])


@either_side_or_both
@pytest.mark.usefixtures("mode")
def test_coded_octets_arrive_as_they_were_both_ways(coded_tunnel: Any, sides: str) -> None:
    client, target, tunnel = coded_tunnel(sides, early=b"early, ")
    octets = bytes(range(251)) * 4000
    sent = []
    for end in (client, target):
        sent.append(in_thread(lambda end=end: (end.send(octets), end.socket.shutdown(socket.SHUT_WR))))
    arrived = in_thread(target.rest), in_thread(client.rest)
    assert (arrived[0](), arrived[1]()) == (b"early, " + octets, octets)
    for waiting in sent:
        waiting()
    eventually(lambda: tunnel.over)
    assert (tunnel.session.up, tunnel.session.down) == (len(octets) + 7, len(octets))
    assert tunnel.session.reason.startswith("closed by ")


@pytest.mark.parametrize("sides", ["client", "target"])
def test_frames_that_had_been_received_before_come_first(coded_tunnel: Any, sides: str) -> None:
    frames = Toy().encode(b"before, ") + Toy().encode(b"and after")
    client, target, _tunnel = coded_tunnel(sides, received=frames[:-3])
    coded, other = (client, target) if sides == "client" else (target, client)
    assert other.socket.recv(100) == b"before, "
    coded.socket.sendall(frames[-3:])
    assert other.socket.recv(100) == b"and after"


class LoneFlow(NamedTuple):
    """A coded flow whose relay is the test: what it has come from, where it goes, and those whose turn comes."""

    flow: relay.CodedFlow
    source: socket.socket
    sink: socket.socket
    bulk_queue: Dict[Any, None]


@pytest.fixture
def lone_flow() -> Iterator[LoneFlow]:
    carrier = Mock(bulk_queue={}, chunk=memoryview(bytearray(relay.CHUNK)))
    (source, theirs), (sink, its) = socket.socketpair(), socket.socketpair()
    with source, theirs, sink, its:
        flow = relay.CodedFlow(Mock(relay=carrier), theirs, its, "client", relay.Coded(Toy()), None)
        flow.opposite = Mock(chunk=None, pipe=None)
        yield LoneFlow(flow, source, sink, carrier.bulk_queue)


def test_however_many_frames_there_are_one_turn_is_for_a_few(lone_flow: LoneFlow) -> None:
    flow, source, sink, bulk_queue = lone_flow
    source.sendall(Toy().encode(b"x") * (relay.FRAMES + 1))
    flow.copy()
    assert sink.recv(100) == b"x" * relay.FRAMES
    assert list(bulk_queue) == [flow]
    flow.copy()
    assert sink.recv(100) == b"x"


def test_those_that_a_full_sink_has_left_over_have_their_turn_when_it_has_room(lone_flow: LoneFlow) -> None:
    flow, source, sink, bulk_queue = lone_flow
    source.sendall(Toy().encode(b"x") * (relay.FRAMES + 1))
    real, flow.sink = flow.sink, Mock(**{"send.side_effect": BlockingIOError})
    flow.copy()
    bulk_queue.clear()          # its turn has come while the sink was full
    assert not flow.reading
    flow.sink = real
    flow.flush()
    assert sink.recv(100) == b"x" * relay.FRAMES
    assert (flow.reading, list(bulk_queue)) == (True, [flow])


def test_a_coded_flow_with_much_to_move_goes_after_the_others(lone_flow: LoneFlow) -> None:
    flow, source, _sink, _bulk_queue = lone_flow
    for octets, bulk in ((relay.BULK // 3, True), (100, False)):
        source.sendall(Toy().encode(bytes(octets)))
        flow.copy()
        assert flow.bulk is bulk


@pytest.mark.parametrize(("octets", "says"), [(b"\xff\xff" + bytes(0xFFFF), "too long"), (b"\x00", "the connection ended within a frame")])
@either_side
def test_what_cannot_be_decoded_ends_a_tunnel_as_a_failure_of_that_side(coded_tunnel: Any, side: str, octets: bytes, says: str) -> None:
    client, target, tunnel = coded_tunnel(side)
    coded = client if side == "client" else target
    with contextlib.suppress(OSError):
        coded.socket.sendall(octets)
        coded.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: tunnel.over)
    assert tunnel.session.reason == f"{side}: {says}"


def test_what_cannot_be_encoded_does_so_as_well(coded_tunnel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, target, tunnel = coded_tunnel("client")
    monkeypatch.setattr(Toy, "encode", Mock(side_effect=ProtocolError("no key")))
    target.socket.sendall(b"octets")
    eventually(lambda: tunnel.over)
    assert tunnel.session.reason == "client: no key"
    client.socket.close()
