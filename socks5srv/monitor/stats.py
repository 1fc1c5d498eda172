"""
What the status page, the metrics and the console may ask, and what they are told.

`Stats` is that interface, for one process or many; `LocalStats` asks this process.  `Publisher` looks
once a second, and all who watch are told the same text.

Not here: what is counted (metrics.py), the last sessions (history.py), several processes (workers/stats.py).
"""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from typing import Any, Counter as CounterType, Deque, Dict, Iterator, List, Mapping, NamedTuple, Optional, Protocol, Tuple

from .. import __version__
from ..descriptors import USED_UP, descriptors
from ..protocol import ReplyCode
from ..server import Socks5Server
from ..session import Session, rfc3339
from .history import History, describe
from .metrics import Counters, Metrics, Octets, command_label

logger = logging.getLogger("socks5srv")

SECOND = 1.0            # between two looks
SOON = 0.2              # seconds until a session that has just begun or ended is told of
LOOKS = 120             # looks that the plot shows
DRAINING = "draining"   # why no more clients should be sent here, although they are still accepted for a while

Rate = Tuple[float, float]      # octets a second, up and down


class Snapshot(NamedTuple):
    """What one process has to tell; it can be sent to another one."""

    counters: Counters              # with the octets of living sessions
    live: CounterType[str]          # sessions, by command
    sessions: List[Dict[str, Any]]  # those, oldest first; of too many the busiest, and none unless they were asked for
    rates: Rate
    threads: int


class Stats(Protocol):
    """What may be asked, by any thread."""

    changed: threading.Event        # a session has begun or ended; the Publisher clears it

    def snapshots(self, sessions: bool = True) -> Dict[int, Snapshot]:
        """As things are now, by the number of the process; those of dead ones are summed up under a negative one."""

    def recent(self) -> List[Dict[str, Any]]: """The sessions that are kept, in short, the newest first."""

    def session(self, id: int) -> Optional[Dict[str, Any]]: """One of these with its steps; None if it is not kept."""

    def not_ready(self) -> str: """Why no more clients should be sent here; empty if they may come."""

    def capacity(self) -> Tuple[int, float]: """How many connections of clients are open, and how many may be."""


class LocalStats:
    """Of this process.  Without metrics nothing is counted, and without a history no session is kept."""

    shown = 500         # sessions in a snapshot at most

    def __init__(self, server: Socks5Server, metrics: Optional[Metrics] = None, history: Optional[History] = None) -> None:
        self.server, self.metrics = server, metrics
        history = history or History()
        self.recent, self.session = history.summaries, history.find
        self.changed = threading.Event() if metrics is None else metrics.changed
        self.lock = threading.Lock()        # the order in which the rates see the sums
        self.rates = Rates()

    def snapshots(self, sessions: bool = True) -> Dict[int, Snapshot]:
        with self.lock:
            if self.metrics is None:
                counters, live = Counters(), {session: session.octets() for session in self.server.sessions}
            else:
                counters, live = self.metrics.read()
            moved = {session.id: octets for session, octets in live.items()}
            rates = self.rates.of({0: (counters["octets", "up"], counters["octets", "down"]), **moved})
        shown = busiest(live, rates, self.shown) if sessions else []
        rows = [row(session, live[session], rates.get(session.id, (0.0, 0.0))) for session in shown]
        by_command = Counter(map(command_label, live))
        return {0: Snapshot(counters, by_command, rows, rates.get(0, (0.0, 0.0)), threading.active_count())}

    def not_ready(self) -> str:
        if self.server.stopping:
            return "stopping"
        if self.server.stopped.is_set():
            return "starting" if self.server.serving_thread is None else "stopping"
        return why_full(*self.capacity()) or (USED_UP if descriptors.are_scarce() else "")

    def capacity(self) -> Tuple[int, float]:
        return self.server.registry.clients, self.server.registry.most_clients


class Rates:
    """Octets a second of the last second or so, however often they are asked for.  Not safe for threads."""

    interval = 0.9      # seconds between two looks that a rate is made of, at least

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.seen: Dict[int, Octets] = {}       # at that time, by the id of the session; 0: of all, also those that have ended
        self.found: Dict[int, Rate] = {}

    def of(self, octets: Dict[int, Octets]) -> Dict[int, Rate]:
        """Rates, likewise, of what has moved since the last look, unless that was just now: then those found at it."""
        seconds = time.monotonic() - self.at
        if seconds >= self.interval:
            self.found = {id: rate(self.seen.get(id, (0, 0)), now, seconds) for id, now in octets.items()}
            self.seen, self.at = octets, self.at + seconds
        return self.found


def rate(before: Octets, now: Octets, seconds: float) -> Rate:
    return max(0, now[0] - before[0]) / seconds, max(0, now[1] - before[1]) / seconds


def busiest(live: Mapping[Session, Octets], rates: Mapping[int, Rate], most: int) -> List[Session]:
    """All, or of too many those that move most, in their order."""
    by_rate = sorted(live, key=lambda session: sum(rates.get(session.id, (0, 0))), reverse=True)
    return sorted(by_rate[:most], key=lambda session: session.id)


def row(session: Session, octets: Octets, rates: Rate) -> Dict[str, Any]:
    """A living session, as /status.json has it."""
    return {
        **describe(session), "up": octets[0], "down": octets[1], "up_rate": round(rates[0]), "down_rate": round(rates[1]),
        "seconds": round(time.monotonic() - session.clock, 3),
    }


def why_full(clients: int, limit: float) -> str:
    """In a sentence; empty if more fit."""
    return f"limit of {limit:g} connections reached" if clients >= limit else ""


# --- sums ---

def sum_of_counters(snapshots: Mapping[int, Snapshot]) -> Counters:
    counters = Counters()
    for snapshot in snapshots.values():
        counters.update(snapshot.counters)
    return counters


def sum_of_rates(snapshots: Mapping[int, Snapshot]) -> Rate:
    return sum(snapshot.rates[0] for snapshot in snapshots.values()), sum(snapshot.rates[1] for snapshot in snapshots.values())


def summary_of(counters: Counters) -> Dict[str, Any]:
    """The counters that a person looks at."""
    replies: Dict[str, int] = {code.name.lower(): 0 for code in ReplyCode}
    for (_command, reply), number in counters.by("requests").items():
        replies[reply] = replies.get(reply, 0) + number
    return {
        "connections": counters["clients", "taken"], "turned_away": counters["clients", "turned_away"],
        "sessions": {outcome: number for (outcome,), number in counters.by("sessions").items()},
        "replies": replies, "up": counters["octets", "up"], "down": counters["octets", "down"],
        "failed_logins": counters["auth_attempts", "username_password", "failure"],
        "handshake_failures": {reason: number for (reason,), number in counters.by("handshake_failures").items()},
    }


# --- once a second ---

class Publisher:
    """What there is to tell, looked up once a second.  `facts` are those of /status.json that stay the same."""

    most_watchers = 16      # at a time

    def __init__(self, stats: Stats, facts: Mapping[str, Any]) -> None:
        self.stats, self.facts = stats, facts
        self.started, self.clock = time.time(), time.monotonic()
        self.published = threading.Condition()
        self.number = 0                 # of the text
        self.text = ""                  # what is told now
        self.watchers = 0
        self.looks: Deque[Rate] = deque(maxlen=LOOKS)
        self.next_look = 0.0            # by time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, name="socks5srv-publisher", daemon=True)

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                self.look()
            except Exception:
                logger.exception("unhandled exception while collecting the status")
            self.pause()

    def look(self) -> None:
        """One more point of the plot, if a second has gone by; and what there is to tell, if there are watchers."""
        is_due = time.monotonic() >= self.next_look
        if is_due:
            self.next_look = time.monotonic() + SECOND
        snapshots = self.stats.snapshots(sessions=self.watchers > 0)
        if is_due:
            self.looks.append(sum_of_rates(snapshots))
        if self.watchers:
            text = json.dumps(self.status(snapshots))
            with self.published:
                self.text, self.number = text, self.number + 1
                self.published.notify_all()

    def pause(self) -> None:
        """Until the next look is due, or a session has begun or ended and there are watchers."""
        while not self.stopped.wait(min(SOON, max(0.02, self.next_look - time.monotonic()))):
            if time.monotonic() >= self.next_look or (self.watchers and self.stats.changed.is_set()):
                break
        self.stats.changed.clear()

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Count one more watcher; whether it may be one."""
        with self.published:
            may = self.watchers < self.most_watchers
            self.watchers += may
        try:
            yield may
        finally:
            with self.published:
                self.watchers -= may

    def texts(self) -> Iterator[str]:
        """What is published, from now on until the end; now and then the same again, so that the loss of a reader is noticed."""
        text, number = json.dumps(self.now()), self.number
        while not self.stopped.is_set():
            yield text
            text, number = self.next_text(number)

    def next_text(self, number: int) -> Tuple[str, int]:
        with self.published:
            self.published.wait_for(lambda: self.stopped.is_set() or self.number != number, 5 * SECOND)
            return self.text, self.number

    def now(self) -> Dict[str, Any]:
        return self.status(self.stats.snapshots())

    def status(self, snapshots: Mapping[int, Snapshot]) -> Dict[str, Any]:
        """What /status.json says; its names are documented in docs/observing.rst, and stable."""
        reason = self.stats.not_ready()
        up, down = sum_of_rates(snapshots)
        sessions = [{**row, "worker": number} for number, snapshot in snapshots.items() for row in snapshot.sessions]
        return {
            "version": __version__, "python": platform.python_version(), "started": rfc3339(self.started),
            "uptime": round(time.monotonic() - self.clock, 3), **self.facts, "ready": not reason, "reason": reason,
            "live": sum(sum(snapshot.live.values()) for snapshot in snapshots.values()),
            "sessions": sorted(sessions, key=lambda row: int(row["id"])),
            "recent": self.stats.recent(), "counters": summary_of(sum_of_counters(snapshots)),
            "rates": {
                "up": round(up), "down": round(down),
                "history": {"seconds": SECOND, "up": [round(up) for up, _down in self.looks], "down": [round(down) for _up, down in self.looks]},
            },
        }

    def stop(self) -> None:
        self.stopped.set()
        with self.published:
            self.published.notify_all()
        self.thread.join()
