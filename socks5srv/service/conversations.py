"""
The last conversations, step by step, for the diagram of the status page.

The one idea: a step is a dict that can be drawn as one arrow, from whom to whom and with a label; a
message carries its exhibit (explain.py).  What is kept is bounded in every direction: so many
conversations, so many steps of each, so many octets of a step.

Here it is only kept; remembering.py overhears it.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Dict, List, Optional

from ..explain import Exhibit, Row
from ..protocol import in_brackets
from ..session import Session

KEPT = 50               # conversations
A_SECOND = 20           # of those that begin; what comes beyond is served without being overheard, which costs
STEPS = 40              # of each; the last one says that there were more
LABEL = 120             # characters of a label at most
OCTETS = 300            # of one box, in what is kept of a message


def told(session: Session) -> Dict[str, Any]:
    """What the log tells of it, but for the time, which would be another one before and after its end."""
    return {name: value for name, value in session.as_dict().items() if name != "time"}


class Conversation:
    """One client's; `steps` only grows."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.steps: List[Dict[str, Any]] = []

    def add(self, sender: str, receiver: str, label: str, at: Optional[float] = None, **more: Any) -> None:
        """A step that has happened `at` so many seconds after the begin, or now."""
        if len(self.steps) >= STEPS:
            return
        if len(self.steps) == STEPS - 1:
            label, more = "... and more, which is not kept", {"kind": "note"}
        at = time.monotonic() - self.session.clock if at is None else at
        label = label if len(label) <= LABEL else label[:LABEL - 3] + "..."
        self.steps.append({"kind": "event", "from": sender, "to": receiver, "label": label, "at": round(at, 6), **more})

    def add_exhibit(self, exhibit: Exhibit) -> None:
        if exhibit.fields:
            self.add(exhibit.sender, exhibit.receiver, label_of(exhibit), exhibit.at, kind="message", exhibit=cut(exhibit.as_dict()))
        else:
            self.add("proxy", "proxy", " ".join([exhibit.title, *exhibit.remarks]), exhibit.at, kind="note", title=exhibit.title)

    def summary(self) -> Dict[str, Any]:
        """A row of `recent` in /status.json."""
        seconds = self.session.seconds
        return {**told(self.session), "steps": len(self.steps), "seconds": None if seconds is None else round(seconds, 6)}

    def as_dict(self) -> Dict[str, Any]:
        return {**self.summary(), "steps": list(self.steps)}


class Conversations:
    """The last ones, by the id of their session."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: Dict[int, Conversation] = {}
        self.second, self.begun = 0.0, 0        # how many have begun since then

    def welcome(self) -> bool:
        """Whether one more, that is about to begin, is to be overheard."""
        now = time.monotonic()
        with self.lock:
            if now - self.second >= 1:
                self.second, self.begun = now, 0
            self.begun += 1
            return self.begun <= A_SECOND

    def open(self, session: Session) -> Conversation:
        conversation = Conversation(session)
        with self.lock:
            self.kept[session.id] = conversation
            if len(self.kept) > KEPT:
                del self.kept[min(self.kept)]
        return conversation

    def summaries(self) -> List[Dict[str, Any]]:
        """The newest first."""
        with self.lock:
            kept = sorted(self.kept.items(), reverse=True)
        return [conversation.summary() for _id, conversation in kept]

    def find(self, id: int) -> Optional[Dict[str, Any]]:
        with self.lock:
            conversation = self.kept.get(id)
        return conversation.as_dict() if conversation is not None else None


# --- words ---

def cut(facts: Dict[str, Any]) -> Dict[str, Any]:
    """An exhibit as data, without the rest of boxes that are too long."""
    for field in facts.get("fields", []):
        octets = field.get("octets")
        if isinstance(octets, str) and len(octets) > 2 * OCTETS:
            field["octets"] = octets[:2 * OCTETS]
    if len(facts.get("octets", "")) > 4 * OCTETS:
        facts["octets"] = facts["octets"][:4 * OCTETS]
    return facts


def label_of(exhibit: Exhibit) -> str:
    """What it is, and what it says in a few words."""
    said = {row.name: row for row in exhibit.fields}
    words: List[str] = []
    if "METHODS" in said:
        words = [", ".join(text for _octets, text in said["METHODS"].meanings)]
    elif "METHOD" in said:
        words = [first_of(said["METHOD"])]
    elif "UNAME" in said:
        words = [last_of(said["UNAME"])]
    elif "STATUS" in said:
        words = [first_of(said["STATUS"])]
    elif "REP" in said:
        words = [first_of(said["REP"]), *place(said, "BND")]
    elif "CMD" in said:
        words = [first_of(said["CMD"]), *place(said, "DST")]
    elif "DATA" in said:
        words = [*place(said, "DST"), first_of(said["DATA"]).partition(" of ")[0]]
    return " ".join([exhibit.title, *words])


def first_of(row: Row) -> str:
    """The first meaning, without what it says in parentheses."""
    return str(row.meanings[0][1]).partition(" (")[0] if row.meanings else ""


def last_of(row: Row) -> str:
    return str(row.meanings[-1][1]) if row.meanings else ""


def place(said: Dict[str, Row], prefix: str) -> List[str]:
    """HOST:PORT, as far as it is there."""
    host, port = said.get(f"{prefix}.ADDR"), said.get(f"{prefix}.PORT")
    if host is None or port is None or len(port.octets or b"") != 2:
        return []
    number = int.from_bytes(port.octets or b"", "big")
    name = last_of(host).partition(" (")[0].partition(", ")[0]
    return [f"{in_brackets(name)}:{number}"]
