"""
A server in this process with its status page, and a client that watches it; the fixture is `watch`.
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

from socks5srv.explain.tracer import Tracer
from socks5srv.monitor.history import History
from socks5srv.monitor.http import StatusPage
from socks5srv.monitor.metrics import Metrics
from socks5srv.monitor.stats import LocalStats
from socks5srv.protocol import Address
from socks5srv.server import Socks5Server


class Watched:
    """A server in this process, what it counts and keeps, and its page."""

    def __init__(self, host: str = LOCALHOST, users: Any = None, others: bool = False, **attributes: Any) -> None:
        self.server: Any = Socks5Server((LOCALHOST, 0), users=users)
        for key, value in attributes.items():
            assert hasattr(self.server, key)
            setattr(self.server, key, value)
        self.metrics, self.history = Metrics(), History()
        self.server.observers = (self.metrics, self.history, Tracer(self.server, [self.history]))
        self.stats = LocalStats(self.server, self.metrics, self.history)
        facts = {
            "listening": [f"socks5h://127.0.0.1:{self.server.server_address[1]}"], "auth": "none" if users is None else "password",
            "commands": ["connect", "bind", "udp"], "workers": 1,
        }
        self.page = StatusPage(self.stats, facts, Address.numeric(host, 0), others)
        self.server.policy.private.add(self.page.address)
        self.port: int = self.page.address.port

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
    """Start a server with a page: ``watch(host, users, others, **attributes of the server)``."""
    before = set(threading.enumerate())
    monkeypatch.setattr(StatusPage, "poll_interval", 0.02)
    with ExitStack() as stack:
        def start(*arguments: Any, **keywords: Any) -> Watched:
            watched = Watched(*arguments, **keywords)
            stack.callback(watched.server.server_close)
            stack.enter_context(watched.page)
            serve(watched.server)
            stack.callback(watched.server.shutdown)
            return watched

        yield start
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("socks5srv") and thread not in before])


class Events:
    """A reader of /events."""

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
