"""
The numbers of all workers: each is asked, and the supervisor adds up.

The one idea: to ask is to wait for the answers, but not for long.  A worker that is too busy to answer counts with
its last report, and one that has gone leaves what it has counted, so that no sum goes back.  The last report of a
worker that ends in order is complete.  That of one that has died may be a second old, and the sessions that it had
open then are lost: they are counted as that, or the sessions begun would never again be those ended and those open.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..monitor.history import History
from ..monitor.metrics import Counters
from ..monitor.stats import Snapshot
from .channel import Message, Report, ReportWanted, SessionWanted


class WorkerStats:
    """`Stats` of several processes: ``ask(question, seconds)`` returns their answers by then, by their numbers."""

    answer_timeout = 1.0    # seconds, for all answers
    dead = -1               # the number under which workers that have died are summed up

    def __init__(self, ask: Callable[[Message, float], Dict[int, Any]],
                 not_ready: Callable[[], str], capacity: Callable[[], Tuple[int, float]]) -> None:
        self.ask, self.not_ready, self.capacity = ask, not_ready, capacity
        self.changed = threading.Event()
        self.lock = threading.Lock()
        self.reports: Dict[int, Report] = {}    # the last one of each worker
        self.past = Counters()

    # --- what may be asked ---

    def snapshots(self, sessions: bool = True) -> Dict[int, Snapshot]:
        self.ask(ReportWanted(sessions), self.answer_timeout)
        with self.lock:
            past = {self.dead: Snapshot(self.past.copy(), Counter(), [], (0.0, 0.0), 0)} if self.past else {}
            return {**past, **{number: report.snapshot for number, report in self.reports.items()}}

    def recent(self) -> List[Dict[str, Any]]:
        with self.lock:
            rows = [{**row, "worker": number} for number, report in self.reports.items() for row in report.recent or ()]
        return sorted(rows, key=lambda row: int(row["id"]), reverse=True)[:History.kept]

    def session(self, id: int) -> Optional[Dict[str, Any]]:
        answers = self.ask(SessionWanted(id), self.answer_timeout)
        return next(({**found, "worker": number} for number, found in answers.items() if found is not None), None)

    # --- what the supervisor hears ---

    def learn(self, number: int, report: Report) -> None:
        with self.lock:
            before = self.reports.get(number)
            self.reports[number] = report if report.recent is not None or before is None else report._replace(recent=before.recent)

    def worker_gone(self, number: int) -> None:
        with self.lock:
            report = self.reports.pop(number, None)
            if report is not None:
                self.past.update(report.snapshot.counters)
                self.past["sessions", "lost"] += sum(report.snapshot.live.values())

    def worker_died(self) -> None:
        with self.lock:
            self.past["worker_deaths",] += 1
