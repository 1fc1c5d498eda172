"""Threads that are kept together on one core while clients come and go quickly, and are free otherwise."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Callable, Iterator, List, Set
from unittest.mock import Mock

import pytest

from socks5srv.protocol import Address
from socks5srv.service import affinity as module
from socks5srv.service.affinity import CoreAffinity
from socks5srv.session import Session

from tests.conftest import TIMEOUT, eventually
from tests.program import Start

linux = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="not on this platform: threads cannot be tied to a core, or there is only one",
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> List[float]:
    """The time by time.monotonic(), to be set."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def thread() -> Iterator[int]:
    """Another thread, by its number in the system."""
    done, begun = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (begun.set(), done.wait(TIMEOUT)), daemon=True)
    other.start()
    begun.wait(TIMEOUT)
    yield other.native_id or 0
    done.set()
    other.join()


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    place = getattr(os, "sched_setaffinity", None)      # which a test may have taken away
    before = os.sched_getaffinity(0) if place else set()
    yield
    for thread in os.listdir("/proc/self/task") if place else ():
        with contextlib.suppress(ProcessLookupError):
            place(int(thread), before)


def placed(thread: int) -> Set[int]:
    return os.sched_getaffinity(thread)


def never(_function: Callable[[], None]) -> None:
    """The next turn of a server that has none."""


def come(affinity: CoreAffinity, clients: int, clock: List[float], seconds: float = 1.0) -> None:
    """So many clients in all have come by the time that these seconds have passed."""
    clock[0] += seconds
    affinity.newest = clients
    affinity.look()


@linux
def test_many_clients_a_second_bring_all_threads_to_one_core_and_few_set_them_free(clock: List[float], thread: int) -> None:
    everywhere, core = placed(0), CoreAffinity(never)
    clients = 0

    def pass_a_second_with(more: float) -> None:
        nonlocal clients
        clients += int(more)
        come(core, clients, clock)

    pass_a_second_with(core.many - 1)
    assert placed(thread) == everywhere
    assert not core.tied
    pass_a_second_with(core.many)
    assert core.tied
    assert placed(thread) == placed(0)
    assert len(placed(0)) == 1
    assert placed(0) < everywhere
    pass_a_second_with(core.few)             # in between: it stays as it is
    assert core.tied
    assert len(placed(thread)) == 1
    pass_a_second_with(core.few - 1)
    assert not core.tied
    assert placed(thread) == placed(0) == everywhere


@linux
def test_two_looks_in_quick_succession_are_one(clock: List[float]) -> None:
    core = CoreAffinity(never)
    come(core, 1000, clock, core.min_interval / 2)
    assert not core.tied
    come(core, 1000, clock, core.min_interval)
    assert core.tied


@linux
def test_when_clients_have_stopped_coming_the_threads_are_free_soon() -> None:
    turns: List[Callable[[], None]] = []
    everywhere, core = placed(0), CoreAffinity(turns.append)
    core.looked -= 1
    for id in (639, 640):
        assert not core.tied
        core.started(Session(id, Address.numeric("192.0.2.1", 9)))
    assert core.tied
    eventually(lambda: turns.pop()() or not core.tied)
    assert placed(0) == everywhere
    assert turns == []


@linux
def test_without_a_descriptor_none_is_tied_until_there_is_one(clock: List[float], monkeypatch: pytest.MonkeyPatch) -> None:
    core = CoreAffinity(never)
    with monkeypatch.context() as patch:
        patch.setattr(module, "current_core", Mock(side_effect=OSError("too many open files")))
        come(core, 1000, clock)
    assert not core.tied
    come(core, 2000, clock)
    assert core.tied


@linux
def test_the_core_is_one_that_this_thread_may_use() -> None:
    assert module.current_core() in os.sched_getaffinity(0)


@linux
def test_a_thread_that_ends_meanwhile_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "listdir", lambda _path: [str(2 ** 22 - 1), str(os.getpid())])
    module.place_threads({min(os.sched_getaffinity(0))})
    assert len(placed(os.getpid())) == 1


@linux
def test_a_program_that_was_given_one_core_is_left_there(clock: List[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _thread: {0})
    core = CoreAffinity(never)
    come(core, 10_000, clock)
    assert not core.tied


def test_where_no_thread_can_be_tied_nothing_happens(clock: List[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.os, "sched_setaffinity", raising=False)
    core = CoreAffinity(never)
    come(core, 10_000, clock)
    assert not core.tied


@linux
def test_a_server_with_many_short_connections_is_on_one_core_and_free_afterwards(start: Start) -> None:
    service = start("-q", "--workers", "1")     # several are tied from their start on

    def cores_of_all_threads() -> Set[int]:
        threads = os.listdir(f"/proc/{service.process.pid}/task")
        return set().union(*map(os.sched_getaffinity, map(int, threads)))

    everywhere = cores_of_all_threads()

    def together() -> bool:
        for _ in range(20):
            socket.create_connection(service.server_address, timeout=TIMEOUT).close()
        return len(cores_of_all_threads()) == 1

    eventually(together)
    eventually(lambda: cores_of_all_threads() == everywhere)
