"""Trains of datagrams: what is gathered, how it leaves, and how it is read.  Linux, and what others get instead."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from contextlib import ExitStack
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socks5srv import trains
from socks5srv.protocol import DATAGRAM_MAX
from socks5srv.trains import LONGEST, UDP_GRO, UDP_SEGMENT, Arrivals, Path, cut, runs

from .conftest import LOCALHOST, TIMEOUT
from .networks import LO, ioctl, network_of_its_own

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    HERE = trains.takes_trains(any_socket)
needs_trains = pytest.mark.skipif(not HERE, reason="not on this platform: trains of datagrams")
SIOCSIFMTU = 0x8922     # ioctl(): set the MTU of an interface
ROOM = memoryview(bytearray(256 * 1024))


def send_train(sock: socket.socket, datagrams: Sequence[bytes], to: Any) -> None:
    """As a client that knows trains does it; all but the last are of one size."""
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", len(datagrams[0])))] if len(datagrams) > 1 else []
    assert sock.sendmsg(datagrams, control, 0, to) == sum(map(len, datagrams))


@pytest.fixture
def new_socket() -> Iterator[Callable[..., socket.socket]]:
    with ExitStack() as stack:
        def make(host: str = LOCALHOST) -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            sock.settimeout(TIMEOUT)
            sock.bind((host, 0))
            return sock

        yield make


@pytest.fixture
def sender(new_socket: Any) -> socket.socket:
    return new_socket()


@pytest.fixture
def receiver(new_socket: Any) -> socket.socket:
    return new_socket()


def of_one_size(number: int) -> List[bytes]:
    """What has come one by one, and may come from trains."""
    return [b"12"] * number


def path_between(sender: socket.socket, receiver: socket.socket) -> Path:
    there = receiver.getsockname()
    return Path(lambda datagram: sender.sendto(datagram, there), sender, there)


def received(sock: socket.socket, number: int) -> List[bytes]:
    return [sock.recv(65535) for _ in range(number)]


# --- gathering ---

sizes = st.one_of(st.integers(0, 40), st.sampled_from([1200, 1472, 9000, 40000, DATAGRAM_MAX, DATAGRAM_MAX + 10]))
bursts = st.lists(st.tuples(sizes, st.integers(1, 130)), max_size=8)


@given(bursts)
def test_what_leaves_is_what_came_in_its_order_and_can_leave_together(bursts: List[Tuple[int, int]]) -> None:
    came = [memoryview(bytes(size)) for size, number in bursts for _ in range(number)]
    gathered = list(runs(came))
    assert [id(datagram) for run in gathered for datagram in run] == list(map(id, came))
    for run in gathered:
        lengths = list(map(len, run))
        assert len(set(lengths[:-1])) <= 1
        assert lengths[-1] <= lengths[0]
        assert len(run) == 1 or (all(lengths) and len(run) <= LONGEST and sum(lengths) <= DATAGRAM_MAX)


@pytest.mark.parametrize(("came", "together"), [
    ([2, 2, 2, 1, 2, 2, 3, 0, 0], [4, 2, 1, 1, 1]), ([1200] * 130, [54, 54, 22]), ([1] * 130, [64, 64, 2]), ([1200] * 54 + [1], [54, 1]),
    ([1200] * 53 + [1], [54]), ([2] * 64 + [1], [64, 1]), ([], []),
])
def test_as_many_as_can_leave_together_do(came: List[int], together: List[int]) -> None:
    assert [len(run) for run in runs([bytes(size) for size in came])] == together


# --- sending ---

def test_a_run_arrives_as_the_datagrams_that_it_is_of(sender: socket.socket, receiver: socket.socket) -> None:
    run = [os.urandom(1000) for _ in range(20)] + [b"last"]
    assert path_between(sender, receiver).send_run(run) == 20 * 1000 + 4
    assert received(receiver, 21) == run


@needs_trains
def test_a_run_is_one_call(monkeypatch: pytest.MonkeyPatch, sender: socket.socket, receiver: socket.socket) -> None:
    path = path_between(sender, receiver)
    monkeypatch.setattr(path, "send", None)
    path.send_run([bytes(65507 // 64)] * 64)
    assert len(received(receiver, 64)) == 64


def test_octets_in_front_of_each_are_not_counted(sender: socket.socket, receiver: socket.socket) -> None:
    path = path_between(sender, receiver)
    assert path.send_run([b"head1", b"head2", b"hea"], 3) == path.send_run([b"1234567"], 3) == 4


@pytest.mark.parametrize("code", sorted(trains.PATH_ERRORS), ids=errno.errorcode.get)
def test_on_a_path_that_takes_no_train_they_leave_one_by_one_and_so_do_those_of_the_next_seconds(
        code: int, monkeypatch: pytest.MonkeyPatch, sender: socket.socket, receiver: socket.socket) -> None:
    tried = []

    def refuse(_path: Path, run: Sequence[bytes]) -> int:
        tried.append(len(run))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "send_train", refuse)
    path, run = path_between(sender, receiver), [b"one", b"two", b"3"]
    for _ in range(3):
        assert path.send_run(run) == 7
        assert received(receiver, 3) == run
    assert tried == ([3] if HERE else [])
    monkeypatch.setattr(Path, "refusal", 0.0)
    path.no_train_until = 0.0
    path.send_run(run)
    path.send_run(run)
    assert len(tried) == (3 if HERE else 0)


@needs_trains
def test_datagrams_longer_than_the_mtu_leave_one_by_one_and_arrive() -> None:
    with network_of_its_own(), ExitStack() as stack:
        ioctl(socket.AF_INET, SIOCSIFMTU, struct.pack("16si20x", LO.encode(), 1280))
        sender, receiver = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        receiver.settimeout(TIMEOUT)
        receiver.bind((LOCALHOST, 0))
        path = path_between(sender, receiver)
        for size, refused in [(1200, False), (1400, True), (1200, True)]:
            run = [os.urandom(size) for _ in range(20)]
            assert path.send_run(run) == 20 * size
            assert received(receiver, 20) == run
            assert (path.no_train_until > 0) == refused


@needs_trains
def test_an_icmp_error_of_an_earlier_datagram_costs_none_of_a_train(new_socket: Any) -> None:
    sender, receiver = new_socket(), new_socket()
    here, there = sender.getsockname(), receiver.getsockname()
    sender.connect(there)
    receiver.close()
    sender.send(b"nobody listens")
    assert select.select([sender], [], [], TIMEOUT)[0]      # the error is there
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(TIMEOUT)
        receiver.bind(there)
        receiver.connect(here)
        path = Path(sender.send, sender)
        assert path.send_run([b"one", b"two"]) == 6
        assert received(receiver, 2) == [b"one", b"two"]
        assert path.no_train_until == 0.0


def test_a_datagram_that_cannot_be_sent_costs_none_of_the_others(sender: socket.socket) -> None:
    def send(datagram: Any) -> int:
        if datagram == b"two":
            raise OSError(errno.EMSGSIZE, "too long")
        return len(datagram)

    assert Path(send, sender, singly=True).send_run([b"one", b"two", b"3"]) == 4


class OfASubclass(socket.socket):
    """As the recorded ones are."""


@pytest.mark.parametrize("kind", ["where the system has none", "on a socket that is not a plain one", "where they are not wanted"])
def test_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch, receiver: socket.socket) -> None:
    if kind == "where the system has none":
        monkeypatch.setattr(trains, "UDP_SEGMENT", 999)
    monkeypatch.setattr(Path, "send_train", None)
    with (OfASubclass if "subclass" in kind or "plain" in kind else socket.socket)(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        path = Path(lambda datagram: sock.sendto(datagram, receiver.getsockname()), sock, receiver.getsockname(), singly="wanted" in kind)
        path.send_run([b"one", b"two"])
        assert received(receiver, 2) == [b"one", b"two"]
        if "wanted" not in kind:
            arrivals = Arrivals(sock)
            arrivals.consider(of_one_size(32))
            assert not arrivals.coalescing


# --- receiving ---

def read(arrivals: Arrivals) -> Iterator[Tuple[bytes, Any]]:
    for octets, size, source in arrivals.read(ROOM, 32):
        yield from ((bytes(datagram), source) for datagram in cut(octets, size))


def read_all(arrivals: Arrivals, number: int) -> List[bytes]:
    """So many datagrams, and then all that is there."""
    datagrams: List[bytes] = []
    while len(datagrams) < number:
        assert select.select([arrivals.sock], [], [], TIMEOUT)[0]
        datagrams += [datagram for datagram, _source in read(arrivals)]
    return datagrams


@pytest.fixture
def arrivals(receiver: socket.socket) -> Arrivals:
    receiver.setblocking(False)
    arrivals = Arrivals(receiver)
    arrivals.consider(of_one_size(32))
    assert arrivals.coalescing
    return arrivals


@needs_trains
def test_a_train_is_read_as_the_datagrams_that_it_is_of_with_their_source(sender: socket.socket, arrivals: Arrivals) -> None:
    train = [os.urandom(1000) for _ in range(20)] + [b"last"]
    send_train(sender, train, arrivals.sock.getsockname())
    came = list(read(arrivals))
    assert came == [(datagram, sender.getsockname()) for datagram in train]


@needs_trains
def test_single_and_empty_datagrams_are_read_between_trains(sender: socket.socket, arrivals: Arrivals) -> None:
    there = arrivals.sock.getsockname()
    for datagrams in [[b"one"], [b""], [b"12"] * 5, [b""], [bytes(65507)], [b"123"] * 2 + [b"1"]]:
        send_train(sender, datagrams, there)
    assert read_all(arrivals, 12) == [b"one", b"", *[b"12"] * 5, b"", bytes(65507), b"123", b"123", b"1"]


@needs_trains
def test_no_more_calls_than_asked_for_and_no_more_than_there_is_room_for(sender: socket.socket, arrivals: Arrivals) -> None:
    for _ in range(10):
        sender.sendto(bytes(60000), arrivals.sock.getsockname())
    assert len(list(arrivals.read(ROOM, 2))) == 2
    assert len(list(arrivals.read(ROOM, 32))) == 4      # each needs room for the longest that could come


@pytest.mark.parametrize("came", [[b"one"] * 7, [b"one"] * 4 + [b"2"] * 28], ids=["few", "of several sizes"])
def test_what_does_not_look_like_trains_is_read_one_by_one(came: List[bytes], receiver: socket.socket) -> None:
    arrivals = Arrivals(receiver)
    arrivals.consider(came)
    assert not arrivals.coalescing


def alone(sender: socket.socket, arrivals: Arrivals, times: int) -> None:
    """Single datagrams, each read before the next comes."""
    for _ in range(times):
        sender.sendto(b"alone", arrivals.sock.getsockname())
        assert read_all(arrivals, 1) == [b"alone"]


@needs_trains
def test_trains_are_asked_for_while_they_come_and_no_longer(sender: socket.socket, arrivals: Arrivals) -> None:
    for _ in range(3 * Arrivals.window):
        send_train(sender, [b"together"] * 4, arrivals.sock.getsockname())
        assert len(read_all(arrivals, 4)) == 4
    assert arrivals.coalescing
    alone(sender, arrivals, 2 * Arrivals.window)
    assert not arrivals.coalescing
    assert not arrivals.sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO)


@needs_trains
def test_what_had_come_before_trains_were_asked_for_does_not_count(sender: socket.socket, receiver: socket.socket) -> None:
    arrivals, train = Arrivals(receiver), [b"together"] * 4
    receiver.setblocking(False)
    for _ in range(20):
        send_train(sender, train, receiver.getsockname())
    arrivals.consider(of_one_size(32))
    assert len(read_all(arrivals, 80)) == 80                # 80 calls, each with one
    for _ in range(Arrivals.window):
        send_train(sender, train, receiver.getsockname())
        assert len(read_all(arrivals, 4)) == 4
    assert arrivals.coalescing


@needs_trains
def test_they_are_tried_again_after_a_pause_that_grows_until_they_come(
        monkeypatch: pytest.MonkeyPatch, sender: socket.socket, arrivals: Arrivals) -> None:
    now = 1000.0
    monkeypatch.setattr(trains.time, "monotonic", lambda: now)
    pauses = []
    for _ in range(9):
        alone(sender, arrivals, 2 * Arrivals.window)
        assert not arrivals.coalescing
        pauses.append(arrivals.try_at - now)
        now = arrivals.try_at - 0.001
        arrivals.consider(of_one_size(32))
        assert not arrivals.coalescing
        now = arrivals.try_at
        arrivals.consider(of_one_size(32))
        assert arrivals.coalescing
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    for _ in range(2 * Arrivals.window):
        send_train(sender, [b"together"] * 4, arrivals.sock.getsockname())
        read_all(arrivals, 4)
    alone(sender, arrivals, 2 * Arrivals.window)
    assert arrivals.try_at - now == 0.5


@needs_trains
def test_a_train_that_comes_while_they_are_given_up_is_still_cut_where_it_was(
        monkeypatch: pytest.MonkeyPatch, sender: socket.socket, arrivals: Arrivals) -> None:
    """Once they are not asked for any more the system does not say where."""
    ask, given_up = Arrivals.ask, []

    def ask_late(self: Arrivals, coalescing: bool) -> None:
        if not coalescing:
            given_up.append(self)
            send_train(sender, [b"one", b"two", b"3"], self.sock.getsockname())
        ask(self, coalescing)

    monkeypatch.setattr(Arrivals, "ask", ask_late)
    while not given_up:
        alone(sender, arrivals, 1)
    assert arrivals.coalescing
    assert read_all(arrivals, 3) == [b"one", b"two", b"3"]


def test_where_trains_can_be_sent_but_not_asked_for_they_are_not_tried_again(receiver: socket.socket) -> None:
    """Linux 4.18 and 4.19."""
    class Old(Arrivals):
        tried = 0

        def ask(self, coalescing: bool) -> None:
            self.tried += 1
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    arrivals = Old(receiver)
    for _ in range(3):
        arrivals.consider(of_one_size(32))
    assert arrivals.tried <= 1
    assert not arrivals.coalescing
