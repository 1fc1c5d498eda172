"""A listener whose socket others have as well: it leaves them the socket, and who is in the accept queue."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any, Callable, Iterator, List

import pytest

from tests.conftest import LOCALHOST, TIMEOUT, Client, eventually

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not on this platform: no two processes share a socket")

Make = Callable[..., Any]


@pytest.fixture
def listener() -> Iterator[Make]:
    """One in which so many threads wait: ``listener(socket, threads)``; each client gets one octet, by which it knows the listener."""
    from socks5srv.service.shared_listener import SharedListener

    made: List[Any] = []

    def make(sock: Any = None, threads: int = 1, says: bytes = b"1", takes_queue: bool = False) -> Any:
        def talk(connection: socket.socket, _address: object) -> None:
            connection.sendall(says)
            connection.close()

        sock = sock or socket.create_server((LOCALHOST, 0))
        listener = SharedListener(sock, socket.socket.accept, talk, takes_queue)
        made.append(listener)
        listener.start(16)
        for _ in range(threads - 1):
            listener.add_thread()
        eventually(lambda: listener.waiting == threads)
        return listener

    yield make
    for each in made:
        each.close()
        each.join(TIMEOUT)
        assert not each.threads


def served_by(address: Any) -> bytes:
    with Client(address) as client:
        return client.rest()


@pytest.mark.parametrize("ends", ["stop", "drain", "close"])
def test_its_threads_leave_accept_and_the_socket_goes_on_elsewhere(ends: str, listener: Make) -> None:
    one = listener(threads=10)
    other = listener(one.socket.dup(), says=b"2")
    getattr(one, ends)()
    eventually(lambda: not one.threads)
    assert [served_by(other.address.sockaddr) for _ in range(5)] == [b"2"] * 5
    assert other.socket.gettimeout() is None
    assert os.get_blocking(other.socket.fileno())


@pytest.mark.parametrize("ends", ["stop", "drain"])
def test_who_is_in_the_accept_queue_stays_there_for_the_others(ends: str, listener: Make) -> None:
    gate = threading.Event()
    one = listener()
    theirs = one.socket.dup()
    one.accept = lambda sock: (gate.wait(TIMEOUT), sock.accept())[1]
    assert served_by(one.address.sockaddr) == b"1"         # and then its thread does not accept any more
    with Client(one.address.sockaddr) as client:
        getattr(one, ends)()
        gate.set()
        listener(theirs, says=b"2")
        assert client.rest() == b"2"


def test_the_last_one_talks_to_them(listener: Make) -> None:
    gate = threading.Event()
    one = listener(takes_queue=True)
    real = one.accept
    one.accept = lambda sock: (gate.wait(TIMEOUT) if one.closing is None else None, real(sock))[1]
    assert served_by(one.address.sockaddr) == b"1"
    clients = [Client(one.address.sockaddr) for _ in range(5)]
    eventually(lambda: one.drain() or one.socket.fileno() < 0)
    gate.set()
    for client in clients:
        with client:
            assert client.rest() == b"1"
