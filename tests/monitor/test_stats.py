"""What the status page is told: snapshots, rates, readiness, and all of it once a second."""

from __future__ import annotations

import threading
from typing import Any, Dict, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, eventually, exchange, udp_socket
from tests.monitor.watched import Events, Start, Watched

from socks5srv import handler as handler_module
from socks5srv.monitor.stats import LocalStats, Rates, busiest, rate
from socks5srv.protocol import Address, Command, Datagram, ReplyCode
from socks5srv.server import Socks5Server
from socks5srv.session import Session


# --- snapshots ---

def test_the_figures_of_a_server_that_has_done_nothing(watch: Start) -> None:
    page = watch(users={"anna": "sesame"})
    status = page.status()
    assert status["listening"] == [f"socks5h://127.0.0.1:{page.server_address[1]}"]
    assert (status["auth"], status["commands"], status["workers"]) == ("password", ["connect", "bind", "udp"], 1)
    assert (status["ready"], status["reason"], status["live"], status["sessions"], status["recent"]) == (True, "", 0, [], [])
    assert status["counters"]["connections"] == status["counters"]["up"] == 0
    assert set(status["counters"]["replies"].values()) == {0}


def test_a_session_is_there_while_it_is_open_with_its_octets(page: Watched, echo: Any, new_client: Any) -> None:
    client = new_client(page)
    client.connect(echo)
    exchange(client, b"x" * 1000)
    (session,) = page.when(lambda status: [(row["up"], row["down"]) for row in status["sessions"]] == [(1000, 1000)])["sessions"]
    assert session["client"] == "{}:{}".format(*client.socket.getsockname())
    assert (session["command"], session["host"], session["port"], session["peer"]) == ("connect", echo[0], echo[1], "{}:{}".format(*echo))
    assert (session["event"], session["reply"], session["worker"], session["user"]) == ("open", 0, 0, "")
    client.close()
    status = page.when(lambda status: not status["sessions"] and status["counters"]["sessions"])
    assert [status["counters"][name] for name in ("sessions", "up", "down")] == [{"close": 1}, 1000, 1000]
    assert [(row["id"], row["event"], row["up"]) for row in status["recent"]] == [(1, "close", 1000)]


def test_datagrams_are_counted_while_they_flow(page: Watched, new_client: Any) -> None:
    client = new_client(page)
    bound = client.ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0)).bound
    with udp_socket() as target, udp_socket() as ours:
        ours.sendto(bytes(Datagram(Address.of(target.getsockname()), b"hello")), bound[:2])
        assert target.recv(100) == b"hello"
        page.when(lambda status: [row["up"] for row in status["sessions"]] == [5])
        ours.sendto(b"nonsense", bound[:2])
        eventually(lambda: traffic(page) == {("octets", "up"): 5, ("datagrams", "up"): 2, ("drops", "up"): 1})
        client.close()
        eventually(lambda: page.sessions_ended() == 1)
    assert traffic(page) == {("octets", "up"): 5, ("datagrams", "up"): 2, ("drops", "up"): 1}


def traffic(page: Watched) -> Dict[Any, int]:
    return {name: number for name, number in page.metrics.read()[0].items() if name[0] in ("octets", "datagrams", "drops") and number}


def test_a_client_that_has_been_refused_has_ended_at_once_although_it_lingers(
    page: Watched, new_client: Any, refusing: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handler_module, "LINGER", TIMEOUT)
    client = new_client(page)
    assert client.ask(Command.CONNECT, refusing()).code is ReplyCode.CONNECTION_REFUSED
    status = page.status()
    assert (status["live"], status["sessions"], status["counters"]["sessions"]) == (0, [], {"failed": 1})
    seconds = status["recent"][0]["seconds"]
    client.close()
    eventually(lambda: page.server.registry.clients == 0)
    assert page.status()["recent"][0]["seconds"] == seconds


def test_each_session_is_either_alive_or_has_ended_whether_it_has_been_told_of_or_not(
    page: Watched, new_client: Any, refusing: Any, echo: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()
    report = Socks5Server._report

    def report_later(server: Socks5Server, handler: Any) -> None:
        assert go_on.wait(TIMEOUT)
        report(server, handler)

    monkeypatch.setattr(Socks5Server, "_report", report_later)
    for place in (refusing(), echo):
        with new_client(page) as client:
            client.ask(Command.CONNECT, place)
    with new_client(page) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.rest()
    new_client(page).connect(echo)

    def figures(status: Any) -> Tuple[int, Any, Any]:
        return status["live"], status["counters"]["sessions"], status["counters"]["handshake_failures"]

    expected = (1, {"bad_protocol": 1, "close": 1, "failed": 1}, {"http": 1})
    assert figures(page.when(lambda status: status["live"] == 1)) == expected
    go_on.set()
    eventually(lambda: len(page.metrics.live) == 1)
    assert figures(page.status()) == expected


def test_of_too_many_sessions_the_busiest_are_told() -> None:
    live = {Session(id, Address.numeric(LOCALHOST, id)): (0, 0) for id in (1, 2, 3, 4)}
    rates = {2: (0.0, 5.0), 4: (9.0, 0.0)}
    assert [session.id for session in busiest(live, rates, 2)] == [2, 4]
    assert [session.id for session in busiest(live, rates, 9)] == [1, 2, 3, 4]


def test_all_sessions_count_though_not_all_are_told(page: Watched, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStats, "shown", 2)
    for _ in range(4):
        new_client(page).greet()
    assert len(page.when(lambda status: status["live"] == 4)["sessions"]) == 2


def test_without_metrics_and_history_there_are_the_living_sessions(start_server: Any, new_client: Any, echo: Any) -> None:
    server: Any = start_server()
    client = new_client(server)
    client.connect(echo)
    exchange(client, b"x" * 1000)
    stats = LocalStats(server)
    (session,) = eventually(lambda: [row for row in stats.snapshots()[0].sessions if row["up"] == row["down"] == 1000])
    snapshot = stats.snapshots()[0]
    assert (session["command"], session["port"]) == ("connect", echo[1])
    assert (snapshot.live, snapshot.counters) == ({"connect": 1}, {})
    assert (stats.recent(), stats.session(1), stats.capacity()[0]) == ([], None, 1)


# --- rates ---

def test_a_rate_is_that_of_the_time_between_two_looks() -> None:
    assert rate((100, 0), (300, 50), 2.0) == (100.0, 25.0)
    assert rate((100, 0), (0, 0), 2.0) == (0, 0)


def test_a_rate_is_of_the_last_second(page: Watched, echo: Any, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new_client(page)
    client.connect(echo)
    monkeypatch.setattr(Rates, "interval", 0.0)
    page.stats.snapshots()
    exchange(client, b"x" * 50000)
    (session,) = eventually(lambda: [row for row in page.stats.snapshots()[0].sessions if row["up_rate"]])
    assert session["up_rate"] > 1000
    assert eventually(lambda: page.stats.snapshots()[0].rates == (0.0, 0.0))


# --- ready or not ---

def test_it_is_ready_until_it_is_full_or_stops(watch: Start, new_client: Any) -> None:
    page = watch(max_clients=1)
    assert page.ask("/readyz").body == b"ok\n"
    with new_client(page) as client:
        client.greet()
        assert page.ask("/readyz")[:2] == (503, b"limit of 1 connections reached\n")
        assert page.ask("/healthz").body == b"ok\n"
        assert page.status()["ready"] is False
    eventually(lambda: page.ask("/readyz").status == 200)
    page.server.shutdown()
    assert page.ask("/readyz")[:2] == (503, b"stopping\n")
    assert page.ask("/healthz").status == 200


# --- once a second ---

def test_events_tell_of_a_session_that_opens_and_goes(page: Watched, echo: Any, new_client: Any) -> None:
    with Events(page) as events:
        assert events.answer.headers["Content-Type"] == "text/event-stream"
        assert events.next()["live"] == 0
        with new_client(page) as client:
            client.connect(echo)
            assert events.until(lambda status: status["live"])["sessions"][0]["host"] == echo[0]
        assert events.until(lambda status: not status["live"])["sessions"] == []


def test_a_bug_while_looking_ends_nothing(page: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(page.page.publisher, "look", lambda: 1 / 0)
        eventually(lambda: "unhandled exception while collecting" in caplog.text)
    assert page.ask("/healthz").body == b"ok\n"


def test_the_manual_has_every_name_of_the_json(page: Watched) -> None:
    from tests.docs.pages import literals, table

    status = page.status()
    rows = table("observing", "Name")
    told = {name for row in rows for cell in row for name in literals(cell)}
    assert {literals(name)[0] for name, _meaning in rows} <= set(status)
    assert set(status) | set(status["counters"]) | set(status["rates"]) <= told
