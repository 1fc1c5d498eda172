"""
``--self-test``: CONNECT, BIND and UDP ASSOCIATE through a server of one's own.

It asks as a client would, with the messages of protocol.py, on loopback only.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import BinaryIO, Callable, Tuple, cast

from ..protocol import Address, Command, Datagram, Greeting, Method, MethodSelection, Reply, ReplyCode, Request
from ..server import Socks5Server

TIMEOUT = 5.0       # seconds for each step; on loopback it takes milliseconds


def self_test() -> int:
    """Print a line for each command; 0 if all work, 1 if not."""
    with Socks5Server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = cast(Tuple[str, int], server.server_address)
        results = [report(name, test, proxy) for name, test in TESTS.items()]
    return 0 if all(results) else 1


def report(name: str, test: Callable[[Tuple[str, int]], None], proxy: Tuple[str, int]) -> bool:
    started = time.monotonic()
    try:
        test(proxy)
    except Exception as error:      # whatever it is, this is the place that was made to tell it
        print(f"{name:<14} failed: {type(error).__name__}: {error}")
        return False
    print(f"{name:<14} ok, {1000 * (time.monotonic() - started):.1f} ms")
    return True


def ask(proxy: Tuple[str, int], command: Command, destination: Address) -> Tuple[socket.socket, BinaryIO, Address]:
    """A connection on which `command` has succeeded, its stream, and the reply's address."""
    client = socket.create_connection(proxy, TIMEOUT)
    stream = cast(BinaryIO, client.makefile("rb", buffering=0))
    try:
        client.sendall(bytes(Greeting(bytes([Method.NO_AUTHENTICATION_REQUIRED]))))
        expect(MethodSelection.read(stream).method, Method.NO_AUTHENTICATION_REQUIRED)
        client.sendall(bytes(Request(command, destination)))
        return client, stream, read_reply(stream)
    except BaseException:
        stream.close()
        client.close()
        raise


def read_reply(stream: BinaryIO) -> Address:
    reply = Reply.read(stream)
    expect(reply.code, ReplyCode.SUCCEEDED)
    return reply.bound


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise RuntimeError(f"{found!r} came instead of {wanted!r}")


def echo(one: socket.socket, other: socket.socket) -> None:
    """What one end sends comes out at the other, both ways, and so does the end."""
    one.sendall(b"there")
    expect(other.recv(100), b"there")
    one.shutdown(socket.SHUT_WR)
    expect(other.recv(100), b"")
    other.sendall(b"and back")
    expect(one.recv(100), b"and back")


def test_connect(proxy: Tuple[str, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(TIMEOUT)
        client, stream, _bound = ask(proxy, Command.CONNECT, Address.of(target.getsockname()))
        with client, stream, target.accept()[0] as accepted:
            accepted.settimeout(TIMEOUT)
            echo(client, accepted)


def test_bind(proxy: Tuple[str, int]) -> None:
    client, stream, bound = ask(proxy, Command.BIND, Address.numeric("127.0.0.1", 0))
    with client, stream, socket.create_connection((bound.host, bound.port), TIMEOUT) as peer:
        expect(read_reply(stream), Address.of(peer.getsockname()))
        echo(client, peer)


def test_udp_associate(proxy: Tuple[str, int]) -> None:
    with udp() as target, udp() as client:
        control, stream, relay = ask(proxy, Command.UDP_ASSOCIATE, Address.numeric("0.0.0.0", 0))
        with control, stream:
            there = Datagram(Address.of(target.getsockname()), b"there")
            client.sendto(bytes(there), (relay.host, relay.port))
            data, source = target.recvfrom(100)
            expect(data, b"there")
            target.sendto(b"and back", source)
            expect(client.recv(100), bytes(Datagram(there.address, b"and back")))


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(TIMEOUT)
    return sock


TESTS = {"CONNECT": test_connect, "BIND": test_bind, "UDP ASSOCIATE": test_udp_associate}
