"""
Keeps the threads of the server together on one core, while clients come and go quickly.

A conversation is short and made of many system calls.  Around each of them Python gives its lock
(the GIL) away and takes it back.  When a thread on another core has got it meanwhile, that core has
to be woken, and ours has to wait.  With many clients a second these hand-overs cost twice as much
as the work itself; on one core there are none.

The one idea: threads are tied to a core only while that helps.  A laptop at rest, a few downloads
and an evening of chat are left to the scheduler, which knows better.

Linux only: elsewhere a program cannot say where its threads run, and nothing happens.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Callable, Set

from ..observer import Observer
from ..session import Session


class CoreAffinity(Observer):
    """The core that all threads of this process share, for as long as `tied`."""

    many, few = 300.0, 100.0    # clients a second: tied from the one on, free again below the other
    min_interval = 0.01         # seconds between two looks, for a rate that means something
    watch_interval = 0.1        # the same for how few clients come

    def __init__(self, call: Callable[[Callable[[], None]], None]) -> None:
        self.call = call                    # that of the server: have something called soon, in its own thread
        self.cores: Set[int] = set(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else set()
        self.tied = False
        self.newest = 0                     # the number of clients so far
        self.clients = 0                    # the same at the last look
        self.looked = time.monotonic()
        self.lock = threading.Lock()

    def started(self, session: Session) -> None:
        self.newest = session.id            # session ids count the clients
        if self.newest % 32 == 0:
            self.look()

    def look(self) -> None:
        """Tie or untie, as the number of clients has grown since the last look.  Any thread may call it, at any time."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            now = time.monotonic()
            seconds, more = now - self.looked, self.newest - self.clients
            if seconds >= (self.watch_interval if self.tied else self.min_interval) and len(self.cores) > 1:
                self.clients, self.looked = self.newest, now
                if self.tied != (more >= (self.few if self.tied else self.many) * seconds):
                    self.change()
        except Exception:       # no descriptor to look with: this is about speed only, and tried again at the next look
            pass
        finally:
            self.lock.release()

    def change(self) -> None:
        """Tie the threads, or set them free."""
        if not self.tied:
            self.call(self.watch)
        place_threads(self.cores if self.tied else {current_core()})
        self.tied = not self.tied

    def watch(self) -> None:
        """While tied, at each turn of the serving thread: when no more clients come, nothing else would look."""
        self.look()
        with self.lock:
            if self.tied:
                self.call(self.watch)


def current_core() -> int:
    """The core on which this thread is running: the scheduler's own choice."""
    with open("/proc/thread-self/stat", "rb") as stream:
        fields = stream.read().rpartition(b")")[2].split()      # the name before may hold anything
    return int(fields[36])                                      # "processor" in proc(5)


def place_threads(cores: Set[int]) -> None:
    """Let all threads of this process run on these cores only; new ones inherit it."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except OSError:     # it has just ended; or the core has been taken from us, then it stays where it may be
            pass
