"""
Datagrams explained, a few a second of each client.

The one idea: they pass in the relay thread, which may not wait for a screen.  So it only notes what it has seen;
a `BackgroundPrinter` makes the tables and shows them in a thread of its own, and counts what is too much.

Not here: what became of a datagram, which the association says itself (..datagrams).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from io import BytesIO
from typing import Callable, Optional, Tuple

from ..protocol import Datagram, Socks5Error
from ..rules import Verdict
from ..session import plural
from . import reasons
from .fields import brief, plain_sentence
from .tables import Explanation, broken, explanation

logger = logging.getLogger("socks5srv")

Note = Tuple[Explanation, str, float]       # with its number, and its time by time.monotonic()
Show = Callable[[Explanation, str, float], None]


class BackgroundPrinter:
    """Shows what was noted in another thread, in a thread of its own, which starts with the first note."""

    max_per_second = 10
    max_waiting = 100               # notes: the screen may be slow

    def __init__(self, show: Show) -> None:
        self.show = show
        self.notes: queue.SimpleQueue[Optional[Callable[[], Note]]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.second_ends = 0.0
        self.shown = 0              # in that second
        self.left_out = 0
        self.over = threading.Event()
        self.thread: Optional[threading.Thread] = None

    def offer(self, make: Callable[[], Note]) -> None:
        """Have made and shown what this makes; if it is too much, only count it."""
        with self.lock:
            now = time.monotonic()
            if now >= self.second_ends:
                self.second_ends, self.shown = now + 1, 0
            if self.shown < self.max_per_second and self.notes.qsize() < self.max_waiting:
                self.shown += 1
            else:
                self.left_out += 1
                if self.left_out > 1:       # the first one has had it told how many there are
                    return
                make = self.summary
        self.notes.put(make)
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="socks5srv-explain", daemon=True)
            try:
                self.thread.start()
            except RuntimeError:    # no more threads: then this is not shown
                self.thread = None

    def run(self) -> None:
        for make in iter(self.notes.get, None):
            try:
                self.show(*make())
            except Exception:
                logger.exception("unhandled exception while explaining a datagram")

    def summary(self) -> Note:
        """How many were left out, once the second is over."""
        self.over.wait(max(0.0, self.second_ends - time.monotonic()))
        with self.lock:
            number, self.left_out = self.left_out, 0
        remark = f"{plural(number, 'datagram')} more within a second, not shown"
        return Explanation("DATAGRAMS", remarks=[remark]), "", time.monotonic()

    def end(self) -> None:
        """Show what is left; returns when that is done, or takes longer than a second."""
        self.over.set()
        self.notes.put(None)
        if self.thread is not None:
            self.thread.join(timeout=1)


class DatagramTrace(BackgroundPrinter):
    """What happens to one client's datagrams.  All but end() is called in the relay thread."""

    def __init__(self, show: Show) -> None:
        super().__init__(show)
        self.number = 0
        self.looked_up = ""             # a name whose addresses are about to be judged

    def datagram(self, to_client: bool, octets: bytes, outcome: str) -> None:
        self.number += 1
        number, at = f"u{self.number}", time.monotonic()
        self.offer(lambda: (about_datagram(octets, to_client, outcome), number, at))

    def resolved(self, words: str, found: bool) -> None:
        if found:
            self.looked_up = words
        else:
            self.note_lookup(words)

    def judged(self, verdict: Verdict) -> None:
        if self.looked_up:
            words, self.looked_up = self.looked_up, ""
            self.note_lookup(words, *reasons.about_rules([verdict]))

    def note_lookup(self, *remarks: str) -> None:
        at = time.monotonic()
        self.offer(lambda: (Explanation("NAME LOOKED UP", remarks=list(remarks)), "", at))


def about_datagram(octets: bytes, to_client: bool, outcome: str) -> Explanation:
    try:
        message = Datagram.read(BytesIO(octets))
        found = explanation(message, octets)
    except Socks5Error:
        found = broken(Datagram, octets)
    else:
        place, amount = brief(message.address), plural(len(message.data), "octet")
        found.remarks[-1] = f'"This is {amount} from {place}."' if to_client else f'"Send {amount} to {place}."'
    if to_client:
        found.sender = "proxy"
    if outcome:
        found.remarks.append(plain_sentence(outcome))
    return found
