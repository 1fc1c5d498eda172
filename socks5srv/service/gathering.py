"""
The figures of several processes: the parent asks its workers over their lines, and adds up.

The one idea: whoever asks waits for the answers, but not for ever.  A worker that is too busy to answer
counts with what it has told last, and one that has died leaves what it has counted, so that no sum goes back.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Dict, List, Optional, Set, Tuple

from .conversations import KEPT
from .figures import Figures, Report, WatchedServer
from .worker import WorkerServer
from .workers import Worker, Workers

ANSWER_TIME = 1.0       # seconds that we wait for all answers
DEAD = -1               # the number under which those that have died are summed up


class WatchedWorker(WatchedServer, WorkerServer):
    """A worker that can be asked."""

    def on_report(self, question: int, in_full: bool) -> None:
        summaries = self.book.conversations.summaries() if in_full else None
        self.line.hint("report", question, self.book.report(in_full), summaries)

    def on_conversation(self, question: int, id: int) -> None:
        self.line.hint("conversation", question, self.book.conversations.find(id))


class WatchedWorkers(WatchedServer, Workers):
    """The parent, which asks.  Its main loop hears the answers; the threads of the page wait for them."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.asking = threading.Lock()              # one question at a time
        self.answered = threading.Condition()       # to be held for all that follows
        self.question = 0
        self.awaited: Set[int] = set()              # workers whose answer is to come
        self.told: Dict[int, Report] = {}           # what each has told last
        self.recent: Dict[int, List[Dict[str, Any]]] = {}
        self.found: Optional[Dict[str, Any]] = None
        self.past = Figures()
        super().__init__(*arguments, **keywords)

    # --- what the page asks, in its threads ---

    def reports(self, sessions: bool = True) -> Dict[int, Report]:
        with self.asking:
            self.ask("report", sessions)
            with self.answered:
                past = {DEAD: Report(self.past.copy(), Counter(), [], (0.0, 0.0), 0)} if self.past.counts else {}
                return {**past, **self.told}

    def ask(self, *words: Any) -> None:
        """Ask all, and wait until they have answered, or will not."""
        with self.answered:
            self.question += 1
            self.awaited = {worker.number for worker in self.workers if worker.serving and not self.over}
        self.tell_all(words[0], self.question, *words[1:], hint=True)      # a worker that is stuck has been asked often enough
        with self.answered:
            self.answered.wait_for(lambda: not self.awaited or self.over, ANSWER_TIME)

    def conversations(self) -> List[Dict[str, Any]]:
        with self.answered:
            rows = [{**row, "worker": number} for number, rows in self.recent.items() for row in rows]
        return sorted(rows, key=lambda row: int(row["id"]), reverse=True)[:KEPT]

    def conversation(self, id: int) -> Optional[Dict[str, Any]]:
        with self.asking:
            self.found = None
            self.ask("conversation", id)
            return self.found

    def fullness(self) -> Tuple[int, float]:
        board = self.board
        clients = sum(board.clients) if board is not None else 0
        return clients, self.max_clients or self.most_clients * self.options.workers

    def not_ready(self) -> str:
        if not (self.over or self.stopping) and any(worker.serving for worker in self.workers):
            clients, limit = self.fullness()
            return f"{clients} clients are being served, and more do not fit" if clients >= limit else ""
        return super().not_ready() or "starting"

    # --- what the workers say, in the main loop ---

    def hear_report(self, worker: Worker, question: int, report: Report, summaries: Optional[List[Dict[str, Any]]]) -> None:
        with self.answered:
            self.told[worker.number] = report
            if summaries is not None:
                self.recent[worker.number] = summaries
            self.hear_answer(worker, question)

    def hear_conversation(self, worker: Worker, question: int, found: Optional[Dict[str, Any]]) -> None:
        with self.answered:
            if question == self.question and found is not None:
                self.found = {**found, "worker": worker.number}
            self.hear_answer(worker, question)

    def hear_answer(self, worker: Worker, question: int) -> None:
        if question == self.question:
            self.awaited.discard(worker.number)
            self.answered.notify_all()

    def bury(self, worker: Worker) -> None:
        with self.answered:
            report = self.told.pop(worker.number, None)
            if report is not None:
                self.past.merge(report.figures)
            self.recent.pop(worker.number, None)
            self.awaited.discard(worker.number)
            self.answered.notify_all()
        super().bury(worker)
