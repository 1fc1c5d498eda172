"""What has happened since the start, in the few lines that a program shows at its end."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from typing import Any, Callable, Counter as CounterType, Dict, Set

from ..observer import Observer
from ..session import Session, amount, plural, shown

COUNTERS = ("outcomes", "clients", "octets", "failures", "up", "down")


class Summary(Observer):
    """Counts sessions when they end.  `at_once` tells how many clients there are now, for the peak."""

    max_entries = 10_000        # clients and targets that are told apart, or a server that runs for months would grow without end

    def __init__(self, at_once: Callable[[], int] = int) -> None:
        self.at_once = at_once
        self.since = time.monotonic()
        self.peak = 0                                   # clients at a time
        self.outcomes: CounterType[str] = Counter()
        self.clients: Set[str] = set()                  # addresses
        self.octets: CounterType[str] = Counter()       # by target
        self.failures: CounterType[str] = Counter()     # by target and reason
        self.up = self.down = 0

    def started(self, session: Session) -> None:
        self.peak = max(self.peak, self.at_once())

    def ended(self, session: Session) -> None:
        outcome = session.outcome
        if outcome == "probe":          # twice a second, for months
            return
        self.outcomes[outcome] += 1
        if len(self.clients) < self.max_entries:
            self.clients.add(session.client.host)
        self.up += session.up
        self.down += session.down
        if outcome == "close":
            self.add(self.octets, {str(session.destination): session.up + session.down})
        else:
            self.add(self.failures, {f"{session.destination or ''} {session.outcome_words}".lstrip(): 1})

    def add(self, counter: CounterType[str], numbers: Dict[str, int]) -> None:
        """Of too many entries forget those that count least."""
        counter.update(numbers)
        if len(counter) > self.max_entries:
            for key, _number in counter.most_common()[self.max_entries // 2:]:
                del counter[key]

    def take(self) -> Summary:
        """What has been counted since the last call, to be merged elsewhere.  For the thread that calls ended()."""
        taken = Summary()
        taken.peak = self.peak
        for name in COUNTERS:
            fresh = getattr(taken, name)
            setattr(taken, name, getattr(self, name))
            setattr(self, name, fresh)
        return taken

    def merge(self, other: Summary) -> None:
        """Add what another one has counted.  The peak is no sum: each is of all processes."""
        self.outcomes += other.outcomes
        self.clients |= set(islice(other.clients - self.clients, self.max_entries - len(self.clients)))
        self.up += other.up
        self.down += other.down
        self.peak = max(self.peak, other.peak)
        self.add(self.octets, other.octets)
        self.add(self.failures, other.failures)

    def facts(self) -> Dict[str, Any]:
        """The same for programs: what the log line "stop" has.  Its names are stable."""
        return {
            "seconds": round(time.monotonic() - self.since, 3), "sessions": sum(self.outcomes.values()),
            "events": dict(self.outcomes), "client_addresses": len(self.clients), "targets": len(self.octets),
            "up": self.up, "down": self.down, "most_at_once": self.peak,
        }

    def text(self, beginning: str = "stopped after") -> str:
        """Two lines of numbers, and the three largest of each counter."""
        total, ok = sum(self.outcomes.values()), self.outcomes["close"]
        addresses = "1 client address" if len(self.clients) == 1 else f"{len(self.clients)} client addresses"
        minutes, seconds = divmod(int(time.monotonic() - self.since), 60)
        lines = [
            f"{beginning} {f'{minutes} min {seconds} s' if minutes else f'{seconds} s'}: {plural(total, 'connection')} "
            f"({ok} succeeded, {total - ok} failed) from {'at least ' * (len(self.clients) >= self.max_entries)}{addresses},",
            f"{amount(self.up)} up, {amount(self.down)} down, peak {self.peak}",
        ]
        for title, counter in (("most traffic", self.octets), ("failed", self.failures)):
            for target, number in counter.most_common(3):
                number_of = amount(number) if counter is self.octets else plural(number, "connection")
                lines.append(f"  {title:<12}  {shown(target)}: {number_of}")
                title = ""
        return "\n".join(lines)
