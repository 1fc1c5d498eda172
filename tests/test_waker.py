"""How one thread wakes another."""

from __future__ import annotations

import select
import threading

from socks5srv.waker import Bell, Waker

from .conftest import TIMEOUT


def is_readable(waker: Waker) -> bool:
    return bool(select.select([waker], [], [], 0)[0])


def test_a_waker_is_readable_from_the_first_wake_to_the_drain() -> None:
    waker = Waker()
    assert not is_readable(waker)
    waker.drain()                       # which does not wait
    for _ in range(20_000):             # more than its socket has room for
        waker.wake()
    assert is_readable(waker)
    while is_readable(waker):
        waker.drain()
    waker.wake()
    assert is_readable(waker)
    waker.close()


def test_a_closed_waker_may_be_woken() -> None:
    waker = Waker()
    waker.close()
    waker.wake()
    assert waker.fileno() == -1


def test_a_bell_wakes_the_thread_that_waits_and_rings_once() -> None:
    bell, woken = Bell(), threading.Event()
    thread = threading.Thread(target=lambda: (bell.wait(TIMEOUT), woken.set()), daemon=True)
    thread.start()
    assert not woken.wait(0.05)
    bell.ring()
    bell.ring()
    assert woken.wait(TIMEOUT)
    bell.wait(0.01)                     # perhaps the second one
    assert not bell.silence.acquire(timeout=0.01)
