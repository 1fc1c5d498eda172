"""
The toys behind the proxy: that they do what a client needs, keep what they saw, and end.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import struct
import time
from ftplib import FTP, error_perm
from typing import Any, List, Tuple

import pytest

from socks5srv.protocol import Command, Reply, ReplyCode
from socks5srv.testing import targets
from socks5srv.testing.proxy import Proxy
from socks5srv.testing.targets import DnsServer, EchoServer, FtpServer, UdpServer, WebServer

from ..conftest import LOCALHOST, TIMEOUT, Client, exchange, needs_ipv6, udp_socket, within

HOSTS = pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
KINDS = pytest.mark.parametrize("kind", [EchoServer, WebServer, FtpServer, DnsServer])


# --- all of them ---

@KINDS
def test_it_has_a_port_as_soon_as_it_is_made_and_none_when_it_is_closed(kind: Any) -> None:
    target = kind()
    assert target.address == (LOCALHOST, target.port)
    assert repr(target) == f"<{kind.__name__} {LOCALHOST}:{target.port}>"
    target.close()
    target.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(target.address)
    assert target.clients == []


@KINDS
def test_to_close_it_takes_no_time(kind: Any) -> None:
    took: List[float] = []
    for _ in range(20):
        target = kind()
        began = time.perf_counter()
        target.close()
        took.append(time.perf_counter() - began)
    assert statistics.median(took) < within(0.005)


def test_to_close_it_ends_its_connections() -> None:
    with EchoServer() as echo, socket.create_connection(echo.address, TIMEOUT) as sock:
        exchange(sock)
        began = time.monotonic()
        echo.close()
        assert time.monotonic() - began < within(1)
        assert sock.recv(1) == b""


# --- echo ---

@HOSTS
def test_the_echo_says_what_it_hears_over_tcp(host: str) -> None:
    with EchoServer(host) as echo, socket.create_connection(echo.address, TIMEOUT) as sock:
        exchange(sock, b"x" * 100_000)
        assert echo.received == b"x" * 100_000
        assert echo.clients == [sock.getsockname()[:2]]


@HOSTS
def test_the_echo_says_what_it_hears_over_udp_on_the_same_port(host: str) -> None:
    with EchoServer(host) as echo, udp_socket(host) as sock:
        for octets in (b"hello", b"", b"y" * 20_000):
            sock.sendto(octets, echo.address)
            assert sock.recv(65535) == octets
        assert echo.datagrams == [b"hello", b"", b"y" * 20_000]


def test_the_echo_looks_for_a_port_that_is_free_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: List[int] = []

    def in_use(*arguments: Any) -> Any:
        tried.append(arguments[-1])
        if len(tried) < 3:
            raise OSError("in use")
        return UdpServer(*arguments)

    monkeypatch.setattr(targets, "UdpServer", in_use)
    with EchoServer() as echo:
        assert echo.port == tried[2]


# --- HTTP ---

def fetch(web: WebServer, *request: Any) -> Tuple[int, bytes]:
    connection = http.client.HTTPConnection(web.host, web.port, timeout=TIMEOUT)
    connection.request(*request)
    with connection.getresponse() as answer:
        body = answer.read()
    connection.close()
    return answer.status, body


def test_the_web_server_has_the_pages_that_it_is_given() -> None:
    with WebServer({"/": "<p>gr\u00fcn", "/octets": b"\0\1"}) as web:
        assert fetch(web, "GET", "/") == (200, "<p>gr\u00fcn".encode())
        assert fetch(web, "GET", "/octets") == (200, b"\0\1")
        assert fetch(web, "HEAD", "/octets") == (200, b"")


def test_elsewhere_it_tells_what_it_was_asked_and_keeps_it() -> None:
    with WebServer() as web:
        status, body = fetch(web, "POST", "/form?a=1", b"octets", {"Host": "api.example.com:80", "X-Test": "yes"})
        assert (status, json.loads(body)) == (200, {"method": "POST", "path": "/form?a=1", "host": "api.example.com"})
        (seen,) = web.requests
        assert (seen.method, seen.path, seen.body, seen.headers["X-Test"]) == ("POST", "/form?a=1", b"octets", "yes")


@HOSTS
def test_the_url_of_the_web_server(host: str) -> None:
    with WebServer(host=host) as web:
        shown = f"[{host}]" if ":" in host else host
        assert web.url == f"http://{shown}:{web.port}"


# --- FTP ---

@HOSTS
def test_the_ftp_server_calls_its_client(host: str) -> None:
    with FtpServer({"notes.txt": b"BIND\n"}, host=host) as server:
        with FTP(timeout=TIMEOUT) as ftp:
            ftp.connect(server.host, server.port)
            ftp.login()
            ftp.set_pasv(False)
            parts: List[bytes] = []
            ftp.retrbinary("RETR notes.txt", parts.append)
            assert b"".join(parts) == b"BIND\n"
            assert ftp.pwd() == "/"
            with pytest.raises(error_perm, match="550"):
                ftp.retrbinary("RETR nothing.txt", parts.append)
            with pytest.raises(error_perm, match="502"):
                ftp.sendcmd("NOOP")
        assert server.commands[0] == "USER anonymous"
        assert server.calls[0][0] == host


def test_the_ftp_server_says_if_it_cannot_call() -> None:
    with FtpServer() as server, Client(server.address) as client, socket.socket() as nobody:
        nobody.bind((LOCALHOST, 0))
        port = nobody.getsockname()[1]
        with client.socket.makefile("rb") as answers:
            for line, answer in [("", b"220"), ("RETR hello.txt", b"425"), (f"PORT 127,0,0,1,{port >> 8},{port & 255}", b"200")]:
                if line:
                    client.send(line.encode() + b"\r\n")
                assert answers.readline().startswith(answer)
            client.send(b"RETR hello.txt\r\n")
            assert [answers.readline()[:3] for _ in range(2)] == [b"150", b"425"]
            client.send(b"QUIT\r\n")
            assert answers.read() == b"221 bye\r\n"


def test_nonsense_ends_only_its_own_connection() -> None:
    with FtpServer() as server:
        with Client(server.address) as client:
            client.send(b"PORT 1,2\r\n")
            assert client.rest() == b"220 ready\r\n"
        with Client(server.address) as client:
            assert client.exactly(3) == b"220"


def test_the_ftp_server_is_proof_of_bind(proxy: Proxy, client: Client) -> None:
    with FtpServer() as server, Client(proxy.address) as control:
        control.connect(server.address)
        first = client.ask(Command.BIND, server.address)
        assert first.code is ReplyCode.SUCCEEDED
        host, port = first.bound.host.replace(".", ","), first.bound.port
        control.send(f"PORT {host},{port >> 8},{port & 255}\r\nRETR hello.txt\r\n".encode())
        second = Reply.read(client)
        assert (second.code, second.bound.host) == (ReplyCode.SUCCEEDED, server.host)
        assert client.exactly(6) == b"hello\n"
        assert server.calls == [(first.bound.host, port)]
        proxy.assert_used(command=Command.BIND, times=1)


# --- DNS ---

def query(name: str, kind: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)


@pytest.mark.parametrize(("name", "kind", "code", "record"), [
    *((name, 1, 0, b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\7") for name in ("api.example.com", "API.Example.com")),
    ("six.example.com", 28, 0, b"\xc0\x0c\0\x1c\0\1\0\0\0\x3c\0\x10" + bytes(15) + b"\1"),
    ("api.example.com", 28, 0, b""), ("elsewhere.example.com", 1, 3, b""),
])
def test_the_dns_server_answers(name: str, kind: int, code: int, record: bytes) -> None:
    with DnsServer({"api.example.com": "192.0.2.7", "six.example.com": "::1"}) as dns, udp_socket() as sock:
        asked = query(name, kind)
        sock.sendto(asked, dns.address)
        answer = sock.recv(512)
        assert answer[:2] == asked[:2]
        assert answer[3] & 15 == code
        assert answer[12:] == asked[12:] + record
        assert struct.unpack("!H", answer[6:8]) == (bool(record),)
        assert dns.questions == [name.lower()]


def test_the_dns_server_survives_nonsense() -> None:
    with DnsServer({"api.example.com": "192.0.2.7"}) as dns, udp_socket() as sock:
        for octets in (b"", b"short", b"\xff" * 40):
            sock.sendto(octets, dns.address)
        sock.sendto(query("api.example.com", 1), dns.address)
        assert sock.recv(512)[12:].endswith(b"\xc0\0\2\7")
        assert dns.clients == [(LOCALHOST, sock.getsockname()[1])]
