"""Datagrams are noted in one thread and shown in another, a few a second."""

from __future__ import annotations

import threading
import time
from typing import List

import pytest

from socks5srv.explain import Explanation
from socks5srv.explain.datagrams import BackgroundPrinter, DatagramTrace, Note
from socks5srv.protocol import Address, Datagram
from socks5srv.rules import Verdict

from tests.conftest import TIMEOUT, eventually

PLACE = Address.numeric("192.0.2.1", 53)


class Printed(List[Explanation]):
    """What has been shown, and from which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: List[threading.Thread] = []

    def __call__(self, explanation: Explanation, number: str, _at: float) -> None:
        explanation.number = number
        self.append(explanation)
        self.threads.append(threading.current_thread())

    def titles(self) -> List[str]:
        return [explanation.title for explanation in self]


def note() -> Note:
    return Explanation("NOTE"), "", time.monotonic()


def test_notes_are_shown_in_another_thread_and_in_their_order() -> None:
    printed = Printed()
    trace = DatagramTrace(printed)
    for to_client in (False, True):
        trace.datagram(to_client, bytes(Datagram(PLACE, b"?")), "What became of it.")
    trace.datagram(False, b"\0\0", "Dropped.")
    trace.end()
    assert [(each.number, each.sender) for each in printed] == [("u1", "client"), ("u2", "proxy"), ("u3", "client")]
    in_words = ['"Send 1 octet to 192.0.2.1:53."', '"This is 1 octet from 192.0.2.1:53."']
    assert [each.remarks[-2] for each in printed[:2]] == in_words
    assert [each.remarks[-1] for each in printed] == ["What became of it.", "What became of it.", "Dropped."]
    assert threading.current_thread() not in printed.threads
    assert not printed.threads[0].is_alive()


def test_a_name_is_told_of_with_the_verdict_on_its_address() -> None:
    printed = Printed()
    trace = DatagramTrace(printed)
    trace.judged(Verdict(PLACE))
    trace.resolved("Lookup: found", found=True)
    trace.judged(Verdict(PLACE, "no"))
    trace.judged(Verdict(PLACE))
    trace.resolved("Lookup: failed", found=False)
    trace.end()
    assert [each.remarks for each in printed] == [["Lookup: found", "Rules: 192.0.2.1:53 refused (no)"], ["Lookup: failed"]]


def test_what_is_too_much_for_a_second_is_counted_when_it_is_over() -> None:
    printed = Printed()
    printer = BackgroundPrinter(printed)
    printer.max_per_second = 2
    for _ in range(5):
        printer.offer(note)
    assert eventually(lambda: printed.titles()[2:]) == ["DATAGRAMS"]
    assert printed[2].remarks == ["3 datagrams more within a second, not shown"]
    printer.offer(note)
    printer.end()
    assert printed.titles() == ["NOTE", "NOTE", "DATAGRAMS", "NOTE"]


def test_a_screen_that_is_stuck_has_so_many_notes_waiting_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackgroundPrinter, "max_per_second", 10**6)
    monkeypatch.setattr(BackgroundPrinter, "max_waiting", 5)
    stuck = threading.Event()
    printer = BackgroundPrinter(lambda *_note: stuck.wait(TIMEOUT) and None)
    for _ in range(100):
        printer.offer(note)
    assert printer.notes.qsize() <= 5 + 1       # and the line that counts
    stuck.set()
    printer.end()


def test_a_bug_in_a_sink_costs_one_note(caplog: pytest.LogCaptureFixture) -> None:
    printed = Printed()

    def show(explanation: Explanation, number: str, at: float) -> None:
        if not caplog.records:
            raise RuntimeError("a bug")
        printed(explanation, number, at)

    printer = BackgroundPrinter(show)
    printer.offer(note)
    printer.offer(note)
    printer.end()
    assert printed.titles() == ["NOTE"]
    assert "unhandled exception while explaining a datagram" in caplog.text
