"""Our client, and a server that goes out through another one, by Kerberos: against our own server, and a KDC."""

from __future__ import annotations

import ssl
import socket
from typing import Any, Callable

import pytest

from socks5srv.client import Proxy, bind, connect, udp_associate
from socks5srv.protocol import LoginFailed, NoAcceptableMethod, ProtocolError

from ..conftest import LOCALHOST, TIMEOUT, exchange, fails_with, udp_socket
from ..kerberos import Realm

pytest.importorskip("gssapi")


def url_of(server: Any, service: str = "", host: str = "localhost") -> str:
    return f"socks5h+gssapi://{service}{host}:{server.server_address[1]}"


MUCH = bytes(range(256)) * 4096


@pytest.mark.parametrize("level", [1, 2])
def test_connect(new_server: Callable[..., Any], echo: Any, level: int) -> None:
    server = new_server(levels=[level])
    with connect(url_of(server), *echo) as sock:
        exchange(sock)
        with sock.makefile("rwb") as file:
            file.write(b"line\n")
            file.flush()
            assert file.readline() == b"line\n"
        sock.sendall(b"x" * 300000)
        got = b""
        while len(got) < 300000:
            got += sock.recv(4096)
        assert got == b"x" * 300000
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


def test_udp(new_server: Callable[..., Any], echo: Any) -> None:
    server = new_server()
    with udp_socket() as target, udp_associate(url_of(server)) as relay:
        relay.socket.settimeout(TIMEOUT)
        for size in (0, 5, 60000):
            relay.sendto(b"x" * size, target.getsockname())
            octets, source = target.recvfrom(65535)
            assert octets == b"x" * size
            target.sendto(octets, source)
            assert relay.recvfrom() == (octets, target.getsockname())
