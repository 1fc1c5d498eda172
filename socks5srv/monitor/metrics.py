"""
The numbers of one process: clients, sessions, octets, replies, failures, seconds, and what it has taken of the CPU.

`Metrics` is an observer that counts into `Counters`.

The one idea: a client costs a few entries, its octets none.  Those of a living session are read off it
when they are asked for, and join the sum when it has ended, under the same lock: a sum that went back
would look like a restart to a scraper.

Every key of a counter is of a closed set: there is no name from the wire among them.

Not here: snapshots and rates (stats.py), formats (prometheus.py, http.py).
"""

from __future__ import annotations

import errno
import threading
import time
from bisect import bisect_left
from typing import Counter as CounterType, Dict, List, Optional, Sequence, Tuple, Type

from ..foreign import ForeignProtocol
from ..observer import Observer
from ..protocol import Address, Command, Greeting, LoginFailed, Message, Method, ProtocolError, ReplyCode, Socks5Error
from ..rules import Verdict
from ..session import COMMAND_WORDS, Session

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)      # the upper bounds of a histogram
BOUNDS = (*map(str, SECONDS), "+Inf")           # the same as labels; the last one: longer than all

Octets = Tuple[int, int]        # up and down


class Counters(CounterType[Tuple[str, ...]]):
    """
    What has been counted since the start; update() adds those of another process.

    The keys are ``(name, label, ...)``: clients (taken, turned_away), sessions (outcome), requests (command, reply),
    handshake_failures (reason), auth_attempts (method, result), accept_errors (errno), octets, datagrams and drops (up,
    down), and worker_deaths.  Of connecting and resolving, which are timed, there is one for each of BOUNDS, and the
    ``microseconds`` of all; of the cpu there are only those.
    """

    def time(self, name: str, seconds: float) -> None:
        """One more that took so long."""
        self[name, BOUNDS[bisect_left(SECONDS, seconds)]] += 1
        self[name, "microseconds"] += round(seconds * 1e6)

    def add_traffic(self, session: Session, octets: Octets) -> None:
        """What a session has moved."""
        self["octets", "up"] += octets[0]
        self["octets", "down"] += octets[1]
        if session.command is Command.UDP_ASSOCIATE:
            self["datagrams", "up"] += session.datagrams_up
            self["datagrams", "down"] += session.datagrams_down
            self["drops", "up"] += session.dropped_up
            self["drops", "down"] += session.dropped_down

    def by(self, name: str) -> Dict[Tuple[str, ...], int]:
        """Those of this name, by their labels."""
        return {key[1:]: number for key, number in sorted(self.items()) if key[0] == name}


class Progress:
    """What there is to know of a session that its record does not say, until it has ended."""

    __slots__ = ("failure", "keys", "session", "since")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.failure = ""                           # what was wrong with its greeting, in a word
        self.since: Optional[float] = None          # when the addresses of the target were known, by time.monotonic()
        self.keys: List[Tuple[str, ...]] = []       # what it counts for already

    def endings(self) -> List[Tuple[str, ...]]:
        """What else is counted when the session is over."""
        outcome, reply = self.session.outcome, self.session.reply
        keys: List[Tuple[str, ...]] = [("sessions", outcome)]
        failure = outcome if outcome == "no_acceptable_method" else self.failure or self.session.hung_up or "closed"
        if outcome in ("no_acceptable_method", "bad_protocol") and failure != "pac":        # a PAC file is no failure
            keys.append(("handshake_failures", failure))
        if not any(key[0] == "requests" for key in self.keys) and (self.session.command is not None or reply is not None):
            word = "none" if reply is None or reply is ReplyCode.SUCCEEDED else reply.name.lower()
            keys.append(("requests", command_label(self.session), word))
        return keys


class Metrics(Observer):
    """What one process counts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counters = Counters()
        self.live: Dict[int, Progress] = {}     # until their octets have joined the sum
        self.changed = threading.Event()        # a session has begun or ended

    def read(self) -> Tuple[Counters, Dict[Session, Octets]]:
        """The counters as of now, octets of living sessions included, and these sessions with theirs."""
        with self.lock:
            counters, alive = self.counters.copy(), {}
            for progress in self.live.values():
                is_over, octets = progress.session.seconds is not None, progress.session.octets()
                counters.add_traffic(progress.session, octets)
                counters.update(progress.keys)
                if is_over:         # though ended() may be told a moment later
                    counters.update(progress.endings())
                else:
                    alive[progress.session] = octets
        counters["cpu", "microseconds"] = round(time.process_time() * 1e6)
        return counters, alive

    def count(self, *key: str) -> None:
        with self.lock:
            self.counters[key] += 1

    def progress(self, session: Session) -> Progress:
        return self.live.get(session.id) or Progress(session)

    # --- the hooks ---

    def started(self, session: Session) -> None:
        with self.lock:
            self.live[session.id] = Progress(session)
            self.counters["clients", "taken"] += 1
        if not self.changed.is_set():       # which is cheaper
            self.changed.set()

    def malformed(self, session: Session, kind: Type[Message], octets: bytes, error: Exception, ahead: int) -> None:
        if session.user is None and not session.reason:
            is_message = isinstance(error, ProtocolError) and (octets or kind is not Greeting)
            word = "bad_message" if is_message else "closed"
            self.progress(session).failure = error.kind if isinstance(error, ForeignProtocol) else word

    def authenticated(self, session: Session, method: Method, error: Optional[Socks5Error]) -> None:
        if error is None or isinstance(error, LoginFailed):
            word = "none" if method is Method.NO_AUTHENTICATION_REQUIRED else method.name.lower()
            self.progress(session).keys.append(("auth_attempts", word, "success" if error is None else "failure"))

    def resolved(self, session: Session, host: str, addresses: Sequence[str], seconds: float, error: Optional[Exception]) -> None:
        self.progress(session).since = time.monotonic()
        with self.lock:
            self.counters.time("resolving", seconds)

    def judged(self, session: Session, verdict: Verdict) -> None:
        self.progress(session).since = time.monotonic()

    def opened(self, session: Session, local: Optional[Address]) -> None:
        progress = self.progress(session)
        progress.keys.append(("requests", command_label(session), "succeeded"))
        if session.command is Command.CONNECT and progress.since is not None:
            with self.lock:
                self.counters.time("connecting", time.monotonic() - progress.since)

    def ended(self, session: Session) -> None:
        with self.lock:
            progress = self.live.pop(session.id, None) or Progress(session)
            self.counters.add_traffic(session, (session.up, session.down))
            for key in progress.keys + progress.endings():
                self.counters[key] += 1
        if not self.changed.is_set():       # which is cheaper
            self.changed.set()

    def turned_away(self, client: Address, reason: str) -> None:
        self.count("clients", "turned_away")

    def accept_failed(self, error: OSError) -> None:
        self.count("accept_errors", errno.errorcode.get(error.errno or 0, "other"))


def command_label(session: Session) -> str:
    return "none" if session.command is None else COMMAND_WORDS[session.command]
