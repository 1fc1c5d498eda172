"""
Keeps the threads of the server together on one core, while clients come and go quickly.

A conversation is short and made of many system calls.  Around each of them Python gives its
lock (the GIL) away and takes it back, and when another thread has got it meanwhile on another
core, that core has to be told, and ours has to wait.  With many clients a second these
hand-overs cost twice as much as the work itself; on one core nobody is there to hand over to.

The one idea: threads are tied to a core only while that helps.  A laptop at rest, a few
downloads and an evening of chat are left to the scheduler, which knows better.

Linux only: elsewhere no program can say where its threads run, and nothing happens.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Set

MANY, FEW = 300.0, 100.0    # clients a second: from the one on together, below the other free again
LOOK = 0.01                 # seconds between two looks, at least: for a rate that means something


class OneCore:
    """The core that all threads of this process share, for as long as `tied`."""

    def __init__(self) -> None:
        self.cores: Set[int] = set(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else set()
        self.tied = False
        self.clients = 0
        self.looked = time.monotonic()
        self.looking = threading.Lock()

    def follow(self, clients: int) -> bool:
        """
        Tie or untie, as the number of all `clients` so far has grown since the last look.

        Any thread may call it, and as often as it likes.  Whether something has changed.
        """
        if len(self.cores) < 2 or not self.looking.acquire(blocking=False):
            return False
        try:
            return self.look(clients)
        finally:
            self.looking.release()

    def look(self, clients: int) -> bool:
        now = time.monotonic()
        seconds, more = now - self.looked, clients - self.clients
        if seconds < LOOK:
            return False
        self.clients, self.looked = clients, now
        if self.tied == (more >= (FEW if self.tied else MANY) * seconds):
            return False
        try:
            place_threads(self.cores if self.tied else {current_core()})
        except OSError:         # no descriptor to look with: this is about speed only, and has time
            return False
        self.tied = not self.tied
        return True


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
