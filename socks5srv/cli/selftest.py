"""``--self-test``: CONNECT, BIND and UDP ASSOCIATE through a server of one's own, on loopback only."""

from __future__ import annotations

import socket
import threading
import time
from typing import Callable

from ..client import bind, connect, udp_associate
from ..locality import can_be_bound
from ..outbound import Route
from ..protocol import Address, in_brackets
from ..server import Socks5Server, listening_socket

TIMEOUT = 5.0       # seconds for each step; on loopback it takes milliseconds


def self_test() -> int:
    """Print a line for each command; 0 if all work, 1 if not."""
    host = "127.0.0.1" if can_be_bound(Address.numeric("127.0.0.1", 0)) else "::1"      # there are computers without IPv4
    with Socks5Server((host, 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"socks5://{in_brackets(host)}:{server.server_address[1]}"
        results = [report(name, test, url, host) for name, test in TESTS.items()]
    return 0 if all(results) else 1


def report(name: str, test: Callable[[str, str], None], url: str, host: str) -> bool:
    started = time.monotonic()
    try:
        test(url, host)
    except Exception as error:      # whatever it is, this is the place that was made to tell it
        print(f"{name:<14} failed: {type(error).__name__}: {error}")
        return False
    print(f"{name:<14} ok, {1000 * (time.monotonic() - started):.1f} ms")
    return True


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise RuntimeError(f"{found!r} came instead of {wanted!r}")


def echo(one: socket.socket, other: socket.socket) -> None:
    """What one end sends comes out at the other, both ways, and so does the end."""
    for sock in (one, other):
        sock.settimeout(TIMEOUT)
    one.sendall(b"there")
    expect(other.recv(100), b"there")
    one.shutdown(socket.SHUT_WR)
    expect(other.recv(100), b"")
    other.sendall(b"and back")
    expect(one.recv(100), b"and back")


def test_connect(url: str, host: str) -> None:
    with listening_socket((host, 0)) as target:
        target.settimeout(TIMEOUT)
        with connect(url, *target.getsockname()[:2], timeout=TIMEOUT) as client, target.accept()[0] as accepted:
            echo(client, accepted)


def test_bind(url: str, host: str) -> None:
    with bind(url, host, timeout=TIMEOUT) as waiting, socket.create_connection(waiting.address[:2], TIMEOUT) as peer:
        client, address = waiting.accept()
        with client:
            expect(address, Address.of(peer.getsockname()))
            echo(client, peer)


def test_udp_associate(url: str, host: str) -> None:
    with Route().udp((host, 0)) as target, udp_associate(url, timeout=TIMEOUT) as relay:
        for sock in (target, relay.socket):
            sock.settimeout(TIMEOUT)
        relay.sendto(b"there", target.getsockname()[:2])
        data, source = target.recvfrom(100)
        expect(data, b"there")
        target.sendto(b"and back", source)
        expect(relay.recvfrom(), (b"and back", target.getsockname()[:2]))


TESTS = {"CONNECT": test_connect, "BIND": test_bind, "UDP ASSOCIATE": test_udp_associate}
