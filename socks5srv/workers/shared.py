"""
What all workers have or know together.

A `Scoreboard` is memory that all of them have mapped.  A `Replica` is what each of them, and the supervisor, knows for
itself: what happens at one worker is told as an `Update`, and applied by all others.

The one idea: nothing is asked on the way of a client.  A worker writes only its own numbers and tells what it does;
to know a sum is to add up.  (With --max-per-client the supervisor is asked: see worker.py.)
"""

from __future__ import annotations

import mmap
import os
import queue
import tempfile
import threading
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Set, cast

from ..protocol import Address
from ..ratelimit import RateLimit
from ..users import AT_ONCE, LoginThrottle, UsersFile
from .channel import LoginFailed, LoginSucceeded, RelayClosed, RelayOpened, Update, Warned, WorkerGone

Tell = Callable[[Update], None]

GENERATIONS = 2     # of workers at a time: those that serve, and those that have been replaced and still have clients


class Scoreboard:
    """
    What the workers count together, in a file that has no name and is open in all of them.

    Its content is one number for each: the `clients` that it has let in.  Each writes only its own, and all may
    read: there is nothing to lock.  Its position is the last session id, which the kernel moves for one process at a time.
    """

    def __init__(self, descriptor: int, workers: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, GENERATIONS * workers * 8)
        self.clients = memoryview(self.memory).cast("Q")        # 8 octets, which are written at once

    @classmethod
    def new(cls, workers: int) -> Scoreboard:
        """One that is all zeros."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("socks5srv")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, GENERATIONS * workers * 8)
        return cls(descriptor, workers)

    def next_id(self) -> int:
        return os.lseek(self.descriptor, 1, os.SEEK_CUR)

    def total(self) -> int:
        """The clients of all workers."""
        try:
            return sum(self.clients)
        except ValueError:      # closed
            return 0

    def close(self) -> None:
        self.clients.release()
        self.memory.close()
        os.close(self.descriptor)


class Replica(NamedTuple):
    """What this process knows of what happens at the (other) workers; to be told by dispatch()."""

    throttle: LoginThrottle
    rate_limit: RateLimit
    relays: Dict[int, Set[Address]]     # by worker

    # By the methods of LoginThrottle: those of SharedThrottle would tell it again.

    def on_LoginFailed(self, update: LoginFailed) -> None:
        LoginThrottle.failed(self.throttle, update.host)

    def on_LoginSucceeded(self, update: LoginSucceeded) -> None:
        LoginThrottle.succeeded(self.throttle, update.host)

    def on_Warned(self, update: Warned) -> None:
        self.rate_limit.logged(update.kind)

    def on_RelayOpened(self, update: RelayOpened) -> None:
        self.relays.setdefault(update.worker, set()).add(update.address)

    def on_RelayClosed(self, update: RelayClosed) -> None:
        self.relays.get(update.worker, set()).discard(update.address)

    def on_WorkerGone(self, update: WorkerGone) -> None:
        self.relays.pop(update.worker, None)


# --- what a worker has in place of what a single process has ---

class ReplicatedUsers(UsersFile):
    """The users of a file that the supervisor reads."""

    def __init__(self, hashes: Mapping[str, str], workers: int) -> None:
        self.lock = threading.Lock()
        self.computing = threading.BoundedSemaphore(max(1, AT_ONCE // workers))
        self.key = os.urandom(32)
        self._have(dict(hashes))
        self.verified = {}
        self.removed: queue.SimpleQueue[Set[str]] = queue.SimpleQueue()

    def update(self, hashes: Dict[str, str]) -> None:
        """These are the users from now on; the next refresh() returns which of the others are not."""
        self.removed.put(self._replace(hashes))

    def refresh(self) -> Set[str]:
        return {name for _ in range(self.removed.qsize()) for name in self.removed.get()}


class Telling:
    """Mixed into what tells the other workers what happens here."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell


class SharedThrottle(Telling, LoginThrottle):
    """A host that guesses at one worker has to wait at the others, too."""

    def failed(self, host: str) -> None:
        super().failed(host)
        self.tell(LoginFailed(host))

    def succeeded(self, host: str) -> None:
        if host in self.failures:       # rarely true: an ordinary login sends no message
            super().succeeded(host)
            self.tell(LoginSucceeded(host))


class SharedRateLimit(Telling, RateLimit):
    """A line once a minute over all workers; it tells how many this one has left out."""

    def allows(self, kind: str) -> Optional[int]:
        left_out = super().allows(kind)
        if left_out is not None:
            self.tell(Warned(kind))
        return left_out


class RelayAddresses(Telling, Set[Address]):
    """Where clients of this worker send their datagrams to; it also contains those of the others."""

    def __init__(self, tell: Tell, number: int, others: Dict[int, Set[Address]]) -> None:
        super().__init__(tell)
        self.number, self.others = number, others       # by worker; the Replica changes them

    def add(self, address: Address) -> None:
        super().add(address)
        self.tell(RelayOpened(self.number, address))

    def discard(self, address: object) -> None:
        if super().__contains__(address):
            super().discard(address)
            self.tell(RelayClosed(self.number, cast(Address, address)))

    def __contains__(self, address: object) -> bool:
        return super().__contains__(address) or any(address in relays for relays in list(self.others.values()))
