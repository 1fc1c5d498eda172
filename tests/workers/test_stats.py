"""
The status page of several processes, which is one.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
from typing import Any

import pytest
from tests.clients.harness import need_module
from tests.conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange

from .processes import Start, needs_posix

pytestmark = needs_posix


class Page:
    def __init__(self, start: Start, *words: str) -> None:
        self.service = start("--status", "0", *words)
        self.port = int(self.service.wait_for("status=").rstrip("/").rpartition(":")[2])

    def ask(self, path: str) -> Any:
        connection = http.client.HTTPConnection(LOCALHOST, self.port, timeout=TIMEOUT)
        connection.request("GET", path)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read()
        finally:
            connection.close()

    def status(self) -> Any:
        return json.loads(self.ask("/status.json")[1])

    def from_both(self, new_client: Any, echo: Any) -> Any:
        """Clients until each worker has one."""
        clients = []
        for _ in range(60):
            clients.append(new_client(self.service))
            clients[-1].connect(echo)
            exchange(clients[-1], b"x" * 1000)
            if {row["worker"] for row in self.status()["sessions"]} == {0, 1}:
                return clients
        raise AssertionError("one worker gets them all")


def test_it_sums_up_what_the_workers_tell(start: Start, new_client: Any, echo: Any) -> None:
    page = Page(start)
    clients = page.from_both(new_client, echo)
    number = len(clients)
    status = eventually(lambda: [status for status in [page.status()] if status["counters"]["up"] == number * 1000])[0]
    assert (status["workers"], status["live"], status["counters"]["clients"]) == (2, number, number)
    assert [row["id"] for row in status["sessions"]] == sorted(row["id"] for row in status["sessions"])
    assert {row["id"] for row in status["recent"]} == {row["id"] for row in status["sessions"]}
    for row in (status["recent"][0], status["recent"][-1]):
        code, body = page.ask(f"/conversations/{row['id']}.json")
        assert code == 200
        assert json.loads(body)["steps"][0]["exhibit"]["title"] == "GREETING"
    assert page.ask("/conversations/999999.json")[0] == 404


def test_the_metrics_are_those_of_all(start: Start, new_client: Any, echo: Any) -> None:
    parser = need_module("prometheus_client.parser")
    page = Page(start)
    number = len(page.from_both(new_client, echo))
    found = {family.name: family for family in parser.text_string_to_metric_families(page.ask("/metrics")[1].decode())}
    assert [sample.value for sample in found["socks5srv_connections"].samples if sample.labels["result"] == "taken"] == [number]
    assert [sample.value for sample in found["socks5srv_workers"].samples] == [2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="not on this platform: no /proc to find a worker in")
def test_what_a_dead_worker_has_counted_stays(start: Start, new_client: Any, echo: Any) -> None:
    page = Page(start)
    number = len(page.from_both(new_client, echo))
    eventually(lambda: page.status()["counters"]["up"] == number * 1000)
    with open(f"/proc/{page.service.process.pid}/task/{page.service.process.pid}/children", encoding="ascii") as stream:
        worker = int(stream.read().split()[0])
    os.kill(worker, signal.SIGKILL)
    page.service.wait_for("has died")
    for _ in range(3):
        assert page.status()["counters"]["clients"] == number
        assert page.status()["counters"]["up"] == number * 1000
    eventually(lambda: page.ask("/readyz")[0] == 200)
    eventually(lambda: len(page.status()["sessions"]) < number)


def test_it_is_ready_until_it_is_full(start: Start) -> None:
    page = Page(start, "--max-clients", "1")
    eventually(lambda: page.ask("/readyz") == (200, b"ok\n"))
    with Client(page.service.server_address) as client:
        client.greet()
        assert page.ask("/readyz") == (503, b"limit of 1 clients reached\n")
    eventually(lambda: page.ask("/readyz")[0] == 200)
    assert page.service.stop() == 0
