"""The last sessions step by step, as far as they are kept."""

from __future__ import annotations

import json
import socket
import time
from typing import Any, List, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, eventually, name
from tests.monitor.watched import Start, Watched

from socks5srv.explain import explanation
from socks5srv.monitor.history import STEPS, History, label_of
from socks5srv.observer import Attempt
from socks5srv.protocol import Address, Command, Greeting, RequestFailed, ReplyCode, Request
from socks5srv.rules import Verdict
from socks5srv.session import Session


def kept(page: Watched, steps: int) -> Any:
    """The first conversation, once it has so many steps."""
    def look() -> Any:
        answer = page.ask("/conversations/1.json")
        found = json.loads(answer.body)
        return found if answer.status == 200 and len(found["steps"]) >= steps else None

    return eventually(look)


def arrows(found: Any) -> List[Tuple[str, str, str]]:
    return [(step["from"], step["to"], step["label"]) for step in found["steps"] if step["kind"] != "note"]


# --- by its hooks ---

@pytest.fixture
def history() -> History:
    return History()


@pytest.fixture
def session(history: History) -> Session:
    """One that is kept."""
    session = Session(1, Address.numeric("192.0.2.1", 1024))
    assert history.wants(session)
    return session


def steps(history: History) -> List[Tuple[str, str, str, bool]]:
    found = history.find(1)
    assert found is not None
    return [(step["from"], step["to"], step["label"], step["failed"]) for step in found["steps"]]


def test_a_look_up_is_asked_and_answered_by_the_resolver(history: History, session: Session) -> None:
    history.resolved(session, "example.com", ["192.0.2.7", "2001:db8::7"], 0.5, None)
    history.resolved(session, "no.example", [], 0.0, OSError(1, "no such name"))
    assert steps(history) == [
        ("proxy", "resolver", "look up example.com", False), ("resolver", "proxy", "example.com is 192.0.2.7, 2001:db8::7", False),
        ("proxy", "resolver", "look up no.example", False), ("resolver", "proxy", "no address: no such name", True),
    ]
    asked, answered = history.timelines[1].steps[:2]
    assert answered["at"] - asked["at"] == pytest.approx(0.5, abs=0.1)


def test_each_address_that_is_tried_is_an_arrow(history: History, session: Session) -> None:
    places = [Address.numeric(f"192.0.2.{number}", 80) for number in range(4)]
    history.tried(session, Attempt(places[0], 0.0, 0.1, OSError(111, "Connection refused")))
    history.tried(session, Attempt(places[1], 0.0, None, RequestFailed(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, "no such family")))
    history.tried(session, Attempt(places[2], 0.0, 0.1, connected=True))
    history.tried(session, Attempt(places[3], 0.0, 0.1))
    assert steps(history) == [
        ("proxy", "target", "not connected: 192.0.2.0:80: Connection refused", True), ("proxy", "target", "not connected: no such family", True),
        ("proxy", "target", "connected to 192.0.2.2:80", False), ("proxy", "target", "no answer yet from 192.0.2.3:80", False),
    ]


def test_a_peer_of_bind_is_an_arrow_but_not_an_address_that_was_judged_before(history: History, session: Session) -> None:
    session.command = Command.BIND
    caller = Address.numeric("192.0.2.7", 20)
    history.judged(session, Verdict(caller))
    session.bound = Address.numeric("192.0.2.1", 1025)
    history.judged(session, Verdict(caller._replace(port=21), "rule: deny :21"))
    history.judged(session, Verdict(caller))
    assert steps(history) == [("target", "proxy", "192.0.2.7:21 connects", True), ("target", "proxy", "192.0.2.7:20 connects", False)]


def test_of_a_session_that_is_not_kept_nothing_is_recorded(history: History) -> None:
    session = Session(1, Address.numeric("192.0.2.1", 1024))
    history.resolved(session, "example.com", [], 0.0, None)
    history.show(session, explanation(Greeting(b"\0")))
    assert (history.summaries(), history.find(1)) == ([], None)


def test_a_burst_is_recorded_in_part_and_the_next_second_again(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("socks5srv.monitor.history.time.monotonic", lambda: now[0])
    sessions = [Session(id, Address.numeric("192.0.2.1", id)) for id in range(1, 2 * History.per_second)]
    assert [history.wants(session) for session in sessions] == [session.id <= History.per_second for session in sessions]
    now[0] += 1
    assert history.wants(Session(100, Address.numeric("192.0.2.1", 1)))


# --- of real sessions ---

@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_has_one_pair_of_brackets(host: str) -> None:
    assert label_of(explanation(Request(Command.CONNECT, name(host, 80)))).endswith(" [::1]:80")


def test_a_conversation_is_told_arrow_by_arrow(watch: Start, echo: Any, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    client = new_client(page)
    assert client.log_in("anna", "sesame")
    client.request(Command.CONNECT, Address.named("localhost", echo[1]))
    found = kept(page, 9)
    shown = arrows(found)
    assert [label.split("127.0.0.1")[0].split("::1")[0] for _from, _to, label in shown[:8]] == [
        "GREETING username/password", "METHOD SELECTION username/password", "USERNAME/PASSWORD anna", "LOGIN STATUS success",
        f"REQUEST CONNECT localhost:{echo[1]}", "look up localhost", "localhost is ", "connected to ",
    ]
    assert [(sender, receiver) for sender, receiver, _label in shown[5:9]] == [("proxy", "resolver"), ("resolver", "proxy"), ("proxy", "target"), ("proxy", "client")]
    assert shown[8][2].startswith("REPLY succeeded 127.0.0.1:")
    assert not [word for word in ("sesame", b"sesame".hex()) if word in json.dumps(found)]
    greeting = found["steps"][0]["exhibit"]
    assert [(field["name"], field["octets"]) for field in greeting["fields"]] == [("VER", "05"), ("NMETHODS", "01"), ("METHODS", "02")]


def test_the_peer_of_bind_is_an_arrow_that_comes_in(page: Watched, new_client: Any) -> None:
    bound = new_client(page).ask(Command.BIND, (LOCALHOST, 21)).bound
    with socket.create_connection(bound[:2], TIMEOUT) as caller:
        assert ("target", "proxy", "{}:{} connects".format(*caller.getsockname())) in arrows(kept(page, 6))


def test_a_target_that_refuses_is_told(page: Watched, new_client: Any, refusing: Any) -> None:
    place = refusing()
    new_client(page).ask(Command.CONNECT, place)
    found = kept(page, 5)
    assert ("proxy", "target", "not connected: {}:{}: Connection refused".format(*place)) in arrows(found)
    assert found["event"] == "failed"


def test_of_many_that_come_at_once_some_are_only_counted(page: Watched, new_client: Any, echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "per_second", 2)
    page.history.second = time.monotonic() + 1000
    for _ in range(5):
        new_client(page).connect(echo)
    status = page.when(lambda status: status["counters"]["replies"]["succeeded"] == 5)      # counted once it has been sent
    assert [row["id"] for row in status["recent"]] == [2, 1]
    assert [row["id"] for row in status["sessions"]] == [1, 2, 3, 4, 5]


def test_only_the_last_conversations_are_kept_and_of_each_the_first_steps(page: Watched, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "per_second", 1000)
    most = History.kept
    for _ in range(most + 3):
        new_client(page).close()
    recent = page.when(lambda status: status["counters"]["connections"] == most + 3)["recent"]
    assert [row["id"] for row in recent] == list(range(most + 3, 3, -1))
    assert page.ask("/conversations/3.json").status == 404
    timeline = page.history.timelines[most + 3]
    for number in range(2 * STEPS):
        timeline.add("client", "proxy", 1000 * "x" + str(number))
    assert (len(timeline.steps), timeline.steps[-1]["label"]) == (STEPS, "... and more steps, which are not kept")
    assert max(len(step["label"]) for step in timeline.steps) <= 120


def test_names_from_the_wire_are_data_and_nothing_else(watch: Start, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    assert not new_client(page).log_in('<img src=x onerror="alert(1)">\x1b[2J\u202e', "sesame")
    answer = page.ask("/status.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    (row,) = json.loads(answer.body)["recent"]
    assert row["user"].startswith("<img src=x")
    assert b"\x1b" not in answer.body
    assert b"\n" not in answer.body[:-1]           # or a name could forge an event
    assert json.loads(page.ask("/conversations/1.json").body)["steps"]


def test_an_explanation_is_kept_in_bounded_size(page: Watched, new_client: Any) -> None:
    new_client(page).send(Greeting(bytes(range(255))), Request(Command.CONNECT, Address.named("x" * 63 + "." + "y" * 63, 1)))
    assert len(json.dumps(kept(page, 3))) < 100_000
