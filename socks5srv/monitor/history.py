"""
The last sessions, step by step, for the diagram of the status page.

`History` keeps a `Timeline` for each.  It is an observer of what goes on beyond the proxy (names looked
up, addresses tried), and a sink of the Tracer (explain/tracer.py), which shows it the messages.

The one idea: a step is a dict that can be drawn as one arrow, from whom to whom and with a label; a
message carries its explanation.  What is kept is bounded in every direction: so many sessions, so many
steps of each, so many octets of a step.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ..explain.tables import Explanation, FieldRow
from ..observer import Attempt, Observer
from ..outbound import failure
from ..protocol import Command, in_brackets
from ..relay import reason_of
from ..rules import Verdict
from ..session import Session, rfc3339, shown

STEPS = 40              # of each session; the last one says that there were more
LABEL = 120             # characters of a label at most
OCTETS = 300            # of one box, in what is kept of a message


def describe(session: Session) -> Dict[str, Any]:
    """What the log tells of it, but since when instead of its time, which would be another one before and after its end."""
    return {"started": rfc3339(session.started), **{name: value for name, value in session.as_dict().items() if name != "time"}}


class Timeline(NamedTuple):
    """One session; `steps` only grows."""

    session: Session
    steps: List[Dict[str, Any]]

    def add(self, sender: str, receiver: str, label: str, at: Optional[float] = None, **more: Any) -> None:
        """A step that has happened `at` so many seconds after the begin, or now."""
        if len(self.steps) >= STEPS:
            return
        if len(self.steps) == STEPS - 1:
            label, more = "... and more steps, which are not kept", {"kind": "note"}
        at = time.monotonic() - self.session.clock if at is None else at
        label = label if len(label) <= LABEL else label[:LABEL - 3] + "..."
        self.steps.append({"kind": "event", "from": sender, "to": receiver, "label": label, "at": round(at, 6), **more})

    def summary(self) -> Dict[str, Any]:
        """A row of `recent` in /status.json."""
        seconds = self.session.seconds
        return {**describe(self.session), "steps": len(self.steps), "seconds": None if seconds is None else round(seconds, 6)}

    def as_dict(self) -> Dict[str, Any]:
        return {**self.summary(), "steps": list(self.steps)}


class History(Observer):
    """The last sessions, by their ids; the Tracer asks once for each whether it is to be kept."""

    kept = 50           # sessions
    per_second = 20     # of those that begin; recording is slow, so the rest are only counted

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.timelines: Dict[int, Timeline] = {}
        self.second, self.begun = 0.0, 0        # how many have begun since then

    def summaries(self) -> List[Dict[str, Any]]:
        """The newest first."""
        with self.lock:
            timelines = sorted(self.timelines.items(), reverse=True)
        return [timeline.summary() for _id, timeline in timelines]

    def find(self, id: int) -> Optional[Dict[str, Any]]:
        timeline = self.timelines.get(id)
        return timeline and timeline.as_dict()

    # --- an observer, and a sink of the Tracer ---

    def wants(self, session: Session) -> bool:
        """Whether this session, which has just begun, is kept."""
        if session.probe:           # health checks would push out all others
            return False
        now = time.monotonic()
        with self.lock:
            if now - self.second >= 1:
                self.second, self.begun = now, 0
            self.begun += 1
            if self.begun > self.per_second:
                return False
            self.timelines[session.id] = Timeline(session, [])
            if len(self.timelines) > self.kept:
                del self.timelines[min(self.timelines)]
            return True

    def takes(self, session: Session) -> bool:
        return session.id in self.timelines

    def show(self, session: Session, explanation: Explanation) -> None:
        timeline = self.timelines.get(session.id)
        if timeline and explanation.fields:
            facts = {"kind": "message", "exhibit": cut(explanation.as_dict())}
            timeline.add(explanation.sender, explanation.receiver, label_of(explanation), explanation.at, **facts)
        elif timeline:
            label = " ".join([explanation.title, *explanation.remarks])
            timeline.add("proxy", "proxy", label, explanation.at, kind="note", title=explanation.title)

    def resolved(self, session: Session, host: str, addresses: Sequence[str], seconds: float, error: Optional[Exception]) -> None:
        self.add(session, "proxy", "resolver", f"look up {shown(host)}", at=time.monotonic() - seconds - session.clock)
        answer = f"{shown(host)} is {', '.join(addresses)}" if error is None else f"no address: {reason_of(error)}"
        self.add(session, "resolver", "proxy", answer, failed=error is not None)

    def tried(self, session: Session, attempt: Attempt) -> None:
        label = f"{'connected to' if attempt.connected else 'no answer yet from'} {attempt.address}"
        if attempt.error is not None:
            label = f"not connected: {failure(attempt.error, attempt.address)}"
        self.add(session, "proxy", "target", label, failed=attempt.error is not None)

    def judged(self, session: Session, verdict: Verdict) -> None:
        if session.command is Command.BIND and session.bound is not None:       # the first reply is sent, so this is the peer
            self.add(session, "target", "proxy", f"{verdict.address} connects", failed=not verdict.allowed)

    def add(self, session: Session, sender: str, receiver: str, label: str, at: Optional[float] = None, failed: bool = False) -> None:
        if timeline := self.timelines.get(session.id):
            timeline.add(sender, receiver, label, at, failed=failed)


# --- words ---

def cut(facts: Dict[str, Any]) -> Dict[str, Any]:
    """An explanation as data, without the rest of boxes that are too long."""
    for field in facts["fields"]:
        field["octets"] = field["octets"] and field["octets"][:2 * OCTETS]      # a secret has none
    facts["octets"] = facts["octets"][:4 * OCTETS]
    return facts


def label_of(found: Explanation) -> str:
    """What it is, and what it says in a few words."""
    rows = {row.name: row for row in found.fields}
    first = {name: row.meanings[0][1].partition(" (")[0] for name, row in rows.items()}
    words = [first[name] for name in ("METHOD", "STATUS", "REP", "CMD") if name in rows]
    if "METHODS" in rows:
        words = [", ".join(text for _octets, text in rows["METHODS"].meanings)]
    if "UNAME" in rows:
        words = [rows["UNAME"].meanings[-1][1]]
    words += place(rows, "BND") + place(rows, "DST")
    if "DATA" in rows:
        words.append(first["DATA"].partition(" of ")[0])
    return " ".join([found.title, *words])


def place(rows: Dict[str, FieldRow], prefix: str) -> List[str]:
    """HOST:PORT, as far as it is there."""
    host, port = rows.get(f"{prefix}.ADDR"), rows.get(f"{prefix}.PORT")
    if host is None or port is None or len(port.octets or b"") != 2:
        return []
    name = host.meanings[-1][1].partition(" (")[0].partition(", ")[0]
    return [f"{in_brackets(name)}:{int.from_bytes(port.octets or b'', 'big')}"]
