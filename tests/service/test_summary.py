"""What has happened since the start: counted from the sessions that have ended, and told in a few lines."""

from __future__ import annotations

import pickle
from typing import Optional

import pytest

from socks5srv.protocol import Address, Command, ReplyCode
from socks5srv.service.summary import Summary
from socks5srv.session import Session


def session(
    id: int, client: str = "192.0.2.1", host: Optional[str] = "example.com", reply: Optional[ReplyCode] = ReplyCode.SUCCEEDED,
    up: int = 0, down: int = 0, login_failed: bool = False,
) -> Session:
    session = Session(id, Address.numeric(client, 40000 + id))
    if host is not None:
        session.command, session.destination = Command.CONNECT, Address.named(host, 80)
    session.reply, session.login_failed, session.up, session.down = reply, login_failed, up, down
    session.end()
    return session


def summary_of(*sessions: Session) -> Summary:
    summary = Summary()
    for ended in sessions:
        summary.ended(ended)
    return summary


@pytest.fixture
def summary() -> Summary:
    summary = summary_of(
        session(1, host="a.example", up=1_000, down=20_000),
        session(2, host="a.example", down=4_000),
        session(3, host="b.example", client="192.0.2.2", down=7_000_000),
        session(4, host="c.example", down=3),
        session(5, host="d.example", down=4),
        session(6, host="nosuch.example", reply=ReplyCode.HOST_UNREACHABLE),
        session(7, host="nosuch.example", reply=ReplyCode.HOST_UNREACHABLE),
        session(8, host="mail.example", reply=ReplyCode.NOT_ALLOWED),
        session(9, host=None, reply=None, login_failed=True),
        session(10, host=None, reply=None),
    )
    summary.peak = 3
    return summary


def test_the_summary_counts_connections_clients_and_octets(summary: Summary) -> None:
    first, second = summary.text().split("\n")[:2]
    assert first == "stopped after 0 s: 10 connections (5 succeeded, 5 failed) from 2 client addresses,"
    assert second == "1.0 kB up, 7.0 MB down, peak 3"


def test_the_summary_lists_the_three_busiest_targets_and_the_three_most_frequent_failures(summary: Summary) -> None:
    assert summary.text().split("\n")[2:] == [
        "  most traffic  b.example:80: 7.0 MB",
        "                a.example:80: 25.0 kB",
        "                d.example:80: 4 B",
        "  failed        nosuch.example:80 failed (reply 04): 2 connections",
        "                mail.example:80 denied (reply 02): 1 connection",
        "                login failed: 1 connection",
    ]


def test_the_summary_of_nothing_is_short() -> None:
    assert Summary().text() == "stopped after 0 s: 0 connections (0 succeeded, 0 failed) from 0 client addresses,\n0 B up, 0 B down, peak 0"


def test_the_summary_of_one_is_in_the_singular() -> None:
    assert "1 connection (1 succeeded, 0 failed) from 1 client address," in summary_of(session(1)).text()


@pytest.mark.parametrize(("seconds", "text"), [(59, "59 s"), (60, "1 min 0 s"), (12 * 60 + 4, "12 min 4 s")])
def test_the_summary_says_how_long_it_was(seconds: int, text: str, summary: Summary) -> None:
    summary.since -= seconds
    assert summary.text().startswith(f"stopped after {text}: ")


def test_the_summary_for_programs_has_the_same_numbers(summary: Summary) -> None:
    facts = summary.facts()
    assert facts.pop("seconds") >= 0
    assert facts == {
        "sessions": 10, "events": {"close": 5, "failed": 2, "denied": 1, "login_failed": 1, "bad_protocol": 1},
        "client_addresses": 2, "targets": 4, "up": 1_000, "down": 7_024_007, "most_at_once": 3,
    }


def test_a_hostile_name_is_escaped_in_the_summary() -> None:
    summary = summary_of(session(1, host="a\x1b[2J\nb"), session(2, host="c\x1b[2J\nd", reply=ReplyCode.NOT_ALLOWED))
    assert all(line.isprintable() for line in summary.text().split("\n"))
    assert r"a\x1b[2J\nb:80" in summary.text()


def test_what_is_remembered_for_the_summary_does_not_grow_without_end() -> None:
    summary = summary_of(session(1, host="busy.example", down=1_000_000))
    summary.max_entries = 100
    for id in range(2, 120):
        summary.ended(session(id, host=f"host{id}.example", down=1))
    assert len(summary.octets) <= 100
    assert "busy.example:80: 1.0 MB" in summary.text()
    assert summary.facts()["sessions"] == 119


def test_the_summaries_of_several_processes_are_one(summary: Summary) -> None:
    twice = Summary()
    twice.merge(summary)
    assert {**twice.facts(), "seconds": 0} == {**summary.facts(), "seconds": 0}
    assert twice.text().split("\n")[1:] == summary.text().split("\n")[1:]
    twice.merge(summary)
    assert twice.facts()["sessions"] == 2 * summary.facts()["sessions"]
    assert twice.facts()["client_addresses"] == summary.facts()["client_addresses"], "the same ones"
    assert twice.facts()["most_at_once"] == 3, "each has counted over all"
    assert "a.example:80: 50.0 kB" in twice.text()


def test_what_is_remembered_of_other_summaries_does_not_grow_without_end() -> None:
    sum = Summary()
    sum.max_entries = 100
    for some in range(0, 120, 30):
        ids = range(some, some + 30)
        sum.merge(summary_of(*[session(id, client=f"192.0.2.{id}", host=f"host{id}.example", down=1) for id in ids]))
    assert len(sum.octets) <= len(sum.clients) == 100
    assert sum.facts()["sessions"] == 120
    assert "from at least 100 client addresses" in sum.text()


def test_the_peak_is_what_is_told_when_a_client_comes() -> None:
    clients = iter([1, 3, 2])
    summary = Summary(lambda: next(clients))
    for id in range(3):
        summary.started(session(id))
    assert summary.peak == 3


def test_a_summary_can_be_sent_elsewhere_in_parts(summary: Summary) -> None:
    summary.at_once = lambda: 1
    whole, sum = summary.text(), Summary()
    for _ in range(2):
        sum.merge(pickle.loads(pickle.dumps(summary.take())))
        summary.ended(session(11, host="late.example", down=1))
    sum.merge(summary.take())
    assert sum.facts()["sessions"] == 12
    assert sum.text().split("\n")[2:] == whole.split("\n")[2:]
    assert summary.facts()["sessions"] == 0
    assert sum.peak == summary.peak == 3
