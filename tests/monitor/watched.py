"""Status pages that are asked and watched; the fixtures for one of a server in this process are in conftest.py."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, Callable, Dict, NamedTuple, Tuple

from tests.clients.harness import need_module
from tests.conftest import LOCALHOST, TIMEOUT, Client, Place, eventually
from tests.program import Service

from socks5srv.explain.tracer import Tracer
from socks5srv.monitor.history import History
from socks5srv.monitor.http import StatusPage
from socks5srv.monitor.metrics import Metrics
from socks5srv.monitor.stats import LocalStats
from socks5srv.protocol import Address, Command
from socks5srv.server import Socks5Server

Start = Callable[..., "Watched"]


class Answer(NamedTuple):
    """What a page has answered; ``answer[:2]`` is what most want."""

    status: int
    body: bytes
    headers: http.client.HTTPMessage


class Page:
    """A status page, of whatever server."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @classmethod
    def at(cls, url: str) -> Page:
        return cls(LOCALHOST, int(url.rstrip("/").rpartition(":")[2]))

    @classmethod
    def of(cls, service: Service) -> Page:
        """Of a program that has been started with --status."""
        return cls.at(service.wait_for("status="))

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), answer.headers)
        finally:
            connection.close()

    def status(self) -> Any:
        answer = self.ask("/status.json")
        assert answer.status == 200
        return json.loads(answer.body)

    def metrics_by_type(self, *types: str) -> Dict[Tuple[str, ...], float]:
        """The series of these types (``counter``, ``gauge``, ``histogram``), each by its name and the values of its labels."""
        parser = need_module("prometheus_client.parser")
        families = parser.text_string_to_metric_families(self.ask("/metrics").body.decode())
        return {(each.name, *each.labels.values()): each.value for family in families if family.type in types for each in family.samples}

    def when(self, condition: Callable[[Any], object]) -> Any:
        """Its status, as soon as it is like that."""
        return eventually(lambda: [status for status in [self.status()] if condition(status)])[0]

    def raw(self, octets: bytes) -> bytes:
        """What is answered to this, up to the end."""
        with socket.create_connection((self.host, self.port), TIMEOUT) as sock:
            sock.sendall(octets)
            return b"".join(iter(lambda: sock.recv(65536), b""))


class Watched(Page):
    """A server in this process, what it counts and keeps, and its page."""

    def __init__(self, host: str = LOCALHOST, users: Any = None, others: bool = False, **attributes: Any) -> None:
        self.server: Any = Socks5Server((LOCALHOST, 0), users=users)
        for key, value in attributes.items():
            assert hasattr(self.server, key)
            setattr(self.server, key, value)
        self.server_address = self.server.server_address        # where `new_client` goes
        self.metrics, self.history = Metrics(), History()
        self.server.observers = (self.metrics, self.history, Tracer(self.server, [self.history]))
        self.stats = LocalStats(self.server, self.metrics, self.history)
        facts = {
            "listening": [f"socks5h://127.0.0.1:{self.server_address[1]}"], "auth": "none" if users is None else "password",
            "commands": ["connect", "bind", "udp"], "workers": 1,
        }
        self.page = StatusPage(self.stats, facts, Address.numeric(host, 0), others)
        self.server.policy.private.add(self.page.address)
        super().__init__(self.page.address.zoned, self.page.address.port)

    def sessions_ended(self) -> int:
        return sum(self.metrics.counters.by("sessions").values())


def one_of_each(page: Page, new_client: Callable[..., Client], refusing: Place, echo: Place) -> Client:
    """A login that fails, a connection that is refused, and one that stands: its client."""
    assert not new_client(page).log_in("anna", "wrong")
    refused, served = new_client(page), new_client(page)
    for client, place in ((refused, refusing), (served, ("localhost", echo[1]))):
        assert client.log_in("anna", "sesame")
        client.request(Command.CONNECT, place)
    return served


class Events:
    """A reader of /events."""

    def __init__(self, page: Page) -> None:
        self.connection = http.client.HTTPConnection(page.host, page.port, timeout=TIMEOUT)
        self.connection.request("GET", "/events")
        self.answer = self.connection.getresponse()

    def next(self) -> Dict[str, Any]:
        line = self.answer.readline()
        assert line.startswith(b"data: "), line
        assert self.answer.readline() == b"\n"
        return dict(json.loads(line[6:]))

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
