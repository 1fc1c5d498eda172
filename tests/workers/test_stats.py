"""The status page of several processes, which is one."""

from __future__ import annotations

import json
import signal
import threading
from contextlib import suppress
from typing import Any, Callable, Dict, Iterator, List

import pytest

from socks5srv.protocol import ProtocolError
from tests.conftest import Client, eventually, in_thread, needs_proc
from tests.monitor.watched import Page

from .processes import Place, Start, door, kill, needs_linux, needs_posix, workers_of

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
    found = page.metrics_by_type("counter", "gauge")
    assert (found["socks5srv_connections_total", "taken"], found["socks5srv_workers",]) == (number, 2)


@pytest.fixture
def load(echo: Place) -> Iterator[Callable[[Any], Callable[[], None]]]:
    """Have four clients come to the service, one after the other and each with octets, until `over()` is called, or the test ends."""
    over = threading.Event()
    threads: List[Callable[[], None]] = []

    def come(service: Any) -> None:
        while not over.is_set():
            with suppress(OSError, ProtocolError), Client(door(service)) as client:     # which may be cut off
                client.connect(echo)
                client.send(b"x" * 50_000)
                client.exactly(50_000)

    def begin(service: Any) -> Callable[[], None]:
        threads.extend(in_thread(come, service) for _ in range(4))
        return end

    def end() -> None:
        over.set()
        while threads:
            threads.pop()()

    yield begin
    end()


class Watch:
    """Looks at the counters of a page; none may ever be less than at the last look."""

    def __init__(self, page: Page) -> None:
        self.page, self.last = page, page.metrics_by_type("counter", "histogram")

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            now = self.page.metrics_by_type("counter", "histogram")
            assert {name: (number, now.get(name)) for name, number in self.last.items() if now.get(name, -1) < number} == {}
            self.last = now

    def sums(self) -> Dict[str, float]:
        """When no session is left: what has become of all of them, and how many there were."""
        self.page.when(lambda status: status["live"] == 0)
        self.look()
        ended = {name[1]: number for name, number in self.last.items() if name[0] == "socks5srv_sessions_ended_total" and number}
        assert sum(ended.values()) == self.last["socks5srv_connections_total", "taken"]
        return ended


@needs_proc
def test_no_counter_ever_goes_back_while_workers_die_under_load(service: Any, page: Page, load: Any) -> None:
    over, watch = load(service), Watch(page)
    for _ in range(3):
        kill(service, min(workers_of(service)))
        watch.look(20)
        eventually(lambda: page.metrics_by_type("gauge")["socks5srv_workers",] == 2)
    over()
    assert watch.sums().get("close", 0) > 0
    assert watch.last["socks5srv_worker_deaths_total",] == 3
    assert watch.last["socks5srv_relay_bytes_total", "up"] > 50_000


@needs_linux
def test_no_counter_goes_back_and_none_is_wrong_while_the_workers_are_replaced_under_load(service: Any, page: Page, load: Any) -> None:
    over, watch = load(service), Watch(page)
    for _ in range(2):
        before = workers_of(service)
        service.process.send_signal(signal.SIGUSR2)
        while before & workers_of(service) or len(workers_of(service)) != 2:
            watch.look()
    over()
    ended = watch.sums()
    assert set(ended) == {"close"}
    assert watch.last["socks5srv_worker_deaths_total",] == 0
    assert watch.last["socks5srv_relay_bytes_total", "up"] == watch.last["socks5srv_relay_bytes_total", "down"] == ended["close"] * 50_000


def test_what_a_worker_has_counted_is_complete_when_it_ends_in_order(supervise: Any, tunnel: Any, new_client: Any, load: Any) -> None:
    supervisor = supervise("--status", "0")
    assert supervisor.start()
    done, over = in_thread(supervisor.serve_forever), load(supervisor)
    tunnels = [tunnel(supervisor, new_client(door(supervisor))) for _ in range(8)]
    over()
    for client in tunnels[4:]:
        client.close()
    supervisor.close()
    done()
    counters, outcomes = supervisor.stats.past, supervisor.stats.past.by("sessions")
    assert outcomes["close",] >= 8
    assert sum(outcomes.values()) == counters["clients", "taken"]
    assert (counters["sessions", "lost"], counters["worker_deaths",]) == (0, 0)
    assert counters["octets", "up"] == counters["octets", "down"] == 8 * 5 + (outcomes["close",] - 8) * 50_000


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
