"""
The lossy link by itself: what it does with strangers, and with a relay that is not there.
"""

from __future__ import annotations

import socket
from typing import Any, Dict, Iterator, List

import pytest

from socks5srv.protocol import Address
from socks5srv.testing.link import LossyLink

from ..conftest import LOCALHOST, eventually, needs_neighbour, udp_socket


@pytest.fixture
def relay() -> Iterator[socket.socket]:
    with udp_socket() as sock:
        yield sock


@pytest.fixture
def seen() -> List[bytes]:
    return []


@pytest.fixture
def link(relay: socket.socket, seen: List[bytes]) -> Iterator[LossyLink]:
    def pass_on(_way: str, octets: bytes, _held: Dict[Any, bytes]) -> List[bytes]:
        seen.append(octets)
        return [octets]

    link = LossyLink(Address.of(relay.getsockname()), LOCALHOST, pass_on)
    yield link
    link.close()
    link.thread.join()


def test_datagrams_pass_both_ways(link: LossyLink, relay: socket.socket) -> None:
    with udp_socket() as client:
        client.sendto(b"up", link.bound[:2])
        octets, source = relay.recvfrom(100)
        assert octets == b"up"
        relay.sendto(b"down", source)
        assert client.recvfrom(100) == (b"down", link.bound[:2])


def test_nobody_hears_what_comes_before_there_is_a_client(link: LossyLink, relay: socket.socket, seen: List[bytes]) -> None:
    relay.sendto(b"down", link.inside.getsockname())
    eventually(lambda: seen == [b"down"])


@needs_neighbour
def test_a_stranger_is_not_heard(link: LossyLink, relay: socket.socket) -> None:
    with udp_socket("127.0.0.2") as stranger, udp_socket() as client:
        stranger.sendto(b"strange", link.bound[:2])
        client.sendto(b"up", link.bound[:2])
        assert relay.recv(100) == b"up"


def test_it_survives_a_relay_that_is_not_there(link: LossyLink, relay: socket.socket, seen: List[bytes]) -> None:
    relay.close()
    with udp_socket() as client:
        for number in range(1, 4):
            client.sendto(b"up", link.bound[:2])
            eventually(lambda number=number: len(seen) == number)   # type: ignore[misc]
    assert link.thread.is_alive()


def test_what_cannot_be_bound_leaves_nothing_open() -> None:
    with pytest.raises(OSError, match="assign"):
        LossyLink(Address.numeric(LOCALHOST, 9), "192.0.2.1", lambda *_arguments: [])
