"""
A server in this process with its status page, and somebody who watches it; the fixture is `watch`.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, eventually, serve

from socks5srv.protocol import Address
from socks5srv.service import status as module
from socks5srv.service.figures import watched
from socks5srv.service.options import build_parser
from socks5srv.service.remembering import remembering
from socks5srv.service.run import ServiceHandler, ServiceServer
from socks5srv.service.status import StatusPage


class Watched:
    """A server in this process, and its page."""

    def __init__(self, server: Any, page: StatusPage) -> None:
        self.server = server
        self.page = page
        self.port: int = page.address.port

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> Tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.page.address.zoned, self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def status(self) -> Any:
        answer, body = self.ask("/status.json")
        assert answer.status == 200
        return json.loads(body)

    def raw(self, octets: bytes) -> bytes:
        """What is answered to this, up to the end."""
        with socket.create_connection((self.page.address.zoned, self.port), TIMEOUT) as sock:
            sock.sendall(octets)
            return b"".join(iter(lambda: sock.recv(65536), b""))


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    """Start a server with a page: ``watch(users=, others=, **attributes)``."""
    before = set(threading.enumerate())
    monkeypatch.setattr(module, "LOOK", 0.02)
    with ExitStack() as stack:
        def start(host: str = LOCALHOST, users: Any = None, others: bool = False, **attributes: Any) -> Watched:
            server: Any = watched(ServiceServer)((LOCALHOST, 0), remembering(ServiceHandler), users=users)
            stack.callback(server.server_close)
            server.options = build_parser().parse_args([])
            server.options.status_address = None
            for key, value in attributes.items():
                assert hasattr(server, key)
                setattr(server, key, value)
            page = StatusPage(server, Address.numeric(host, 0), others)
            server.options.status_address = page.address
            stack.enter_context(page)
            serve(server)
            stack.callback(server.shutdown)
            return Watched(server, page)

        yield start
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("socks5srv") and thread not in before])


class Events:
    """Somebody who watches."""

    def __init__(self, page: Watched) -> None:
        self.connection = http.client.HTTPConnection(page.page.address.zoned, page.port, timeout=TIMEOUT)
        self.connection.request("GET", "/events")
        self.answer = self.connection.getresponse()

    def next(self) -> Dict[str, Any]:
        line = self.answer.readline()
        assert line.startswith(b"data: "), line
        assert self.answer.readline() == b"\n"
        found: Dict[str, Any] = json.loads(line[6:])
        return found

    def until(self, condition: Callable[[Dict[str, Any]], Any]) -> Dict[str, Any]:
        for _ in range(500):
            event = self.next()
            if condition(event):
                return event
        raise AssertionError(f"it did not come about: {event}")

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.connection.close()
        self.answer.close()
