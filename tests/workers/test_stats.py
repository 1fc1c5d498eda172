"""The status page of several processes, which is one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.clients.harness import need_module
from tests.conftest import Client, eventually, needs_proc
from tests.monitor.watched import Page

from .processes import Start, kill, needs_posix, workers_of

pytestmark = needs_posix


@pytest.fixture
def service(start: Start) -> Any:
    return start("--status", "0")


@pytest.fixture
def page(service: Any) -> Page:
    return Page.of(service)


@pytest.fixture
def number(service: Any, page: Page, tunnel: Any) -> int:
    """There are so many clients, and each worker has one; each has sent five octets."""
    for number in range(1, 61):
        tunnel(service)
        if {row["worker"] for row in page.status()["sessions"]} == {0, 1}:
            return number
    raise AssertionError("one worker gets them all")


def test_it_sums_up_what_the_workers_tell(page: Page, number: int) -> None:
    status = page.when(lambda status: status["counters"]["up"] == number * 5)
    assert (status["workers"], status["live"], status["counters"]["connections"]) == (2, number, number)
    assert [row["id"] for row in status["sessions"]] == sorted(row["id"] for row in status["sessions"])
    assert {row["id"] for row in status["recent"]} == {row["id"] for row in status["sessions"]}
    for row in (status["recent"][0], status["recent"][-1]):
        answer = page.ask(f"/conversations/{row['id']}.json")
        assert answer.status == 200
        assert json.loads(answer.body)["steps"][0]["exhibit"]["title"] == "GREETING"
    assert page.ask("/conversations/999999.json").status == 404


def test_the_metrics_are_those_of_all(page: Page, number: int) -> None:
    parser = need_module("prometheus_client.parser")
    found = {family.name: family for family in parser.text_string_to_metric_families(page.ask("/metrics").body.decode())}
    assert [sample.value for sample in found["socks5srv_connections"].samples if sample.labels["result"] == "taken"] == [number]
    assert [sample.value for sample in found["socks5srv_workers"].samples] == [2]


@needs_proc
def test_what_a_dead_worker_has_counted_stays(service: Any, page: Page, number: int) -> None:
    page.when(lambda status: status["counters"]["up"] == number * 5)
    kill(service, min(workers_of(service)))
    for _ in range(3):
        counters = page.status()["counters"]
        assert (counters["connections"], counters["up"]) == (number, number * 5)
    eventually(lambda: page.ask("/readyz").status == 200)
    page.when(lambda status: len(status["sessions"]) < number)


def test_it_is_ready_until_it_is_full(start: Start) -> None:
    service = start("--status", "0", "--max-clients", "1")
    page = Page.of(service)
    eventually(lambda: page.ask("/readyz")[:2] == (200, b"ok\n"))
    with Client(service.server_address) as client:
        client.greet()
        assert page.ask("/readyz")[:2] == (503, b"limit of 1 connections reached\n")
    eventually(lambda: page.ask("/readyz").status == 200)
    assert service.stop() == 0
