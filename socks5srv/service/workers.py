"""
Several processes that serve, and the one that looks after them: ``--workers N``.

The parent opens the listening sockets and says whatever is to be said at the start and at
the end, as a single process does; it serves nobody.  The workers (worker.py) are fresh
interpreters that it has started, not copies of itself: a copy has the locks of threads that
it has not.  Each has one end of a socket pair, its `Line`.  When a worker dies its end closes,
and another one takes its place; when the parent dies the workers' ends do, and they stop.

The one idea: `Workers` is a server to run.py, which does not know that there are others.

What the workers tell is passed on or counted here: failed logins, the clients of each host
(with --max-per-client), the figures for the summary.  The users file is read here alone.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from typing import Any, Counter as CounterType, Iterator, List, Optional, Set, Tuple

from ..protocol import Address
from ..server import Bell
from ..users import UsersFile
from .banner import Tally
from .run import CannotStart, ServiceServer
from .worker import STOP_TIME, Board, Line, Orders

logger = logging.getLogger("socks5srv")

YOUNG = 5.0             # seconds; a worker that dies younger has not been unlucky, but has no chance
TRIES = 5               # so many of those in a row, at all places, and it is no use
PAUSE = 0.1             # seconds before the second try, and twice as long each time after
LONGEST_PAUSE = 10.0    # seconds

# Finds the package where we have found it: in a folder, a zip file, or among what is installed.
PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; __import__(sys.argv[1], fromlist=['main']).main(int(sys.argv[2]))"


class Wakeup(Bell):
    """A bell that a selector can wait for."""

    def __init__(self) -> None:
        self.ear, self.rope = socket.socketpair()
        self.ear.setblocking(False)
        self.rope.setblocking(False)

    def ring(self) -> None:
        with contextlib.suppress(OSError):      # it rings already, or nobody hears it any more
            self.rope.send(b"!")

    def wait(self, timeout: float = 0) -> None:
        """Silence it; whoever waits uses a selector."""
        with contextlib.suppress(OSError):
            self.ear.recv(4096)

    def close(self) -> None:
        self.ear.close()
        self.rope.close()


class Worker:
    """One of the processes, as the parent sees it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], line: Line) -> None:
        self.number = number
        self.process = process
        self.line = line
        self.started = time.monotonic()
        self.serving = False
        self.trouble = ""                       # what it has told of its death
        self.hosts: CounterType[str] = Counter()        # its clients, if there is a limit
        self.relays: Set[Address] = set()

    @property
    def cause_of_death(self) -> str:
        code = self.process.returncode
        if self.trouble:
            return self.trouble
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class Place:
    """Where a worker works: it, or when there will be one."""

    def __init__(self) -> None:
        self.worker: Optional[Worker] = None
        self.vacant_until = 0.0         # by time.monotonic()
        self.died_young = 0             # the last ones here

    @property
    def is_hopeless(self) -> bool:
        return self.worker is None and self.died_young >= TRIES


class Workers(ServiceServer):
    """A server that has others serve.  Its methods ``hear_...`` are what a worker can say."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.places: List[Place] = []
        self.board: Optional[Board] = None
        self.last_cause = ""                    # of death
        self.selector = selectors.DefaultSelector()
        super().__init__(*arguments, **keywords)
        self.bell = Wakeup()
        self.selector.register(self.bell.ear, selectors.EVENT_READ)
        self.hashes_handed = self.users.hashes if isinstance(self.users, UsersFile) else None

    # --- serving ---

    def get_ready(self) -> bool:
        """Start all, and wait until they serve.  CannotStart if they do not live."""
        self.bookkeeper = threading.current_thread()
        number = self.options.workers
        self.board = Board(shared_memory(8 * number), number)
        self.places = [Place() for _ in range(number)]
        while not self.stopping and not all(place.worker and place.worker.serving for place in self.places):
            self.look_after_all(0.5)
            self.give_up_if_hopeless(any(place.is_hopeless for place in self.places))
        return not self.stopping

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.stopped.clear()
        try:
            while not self.stopping:
                self.attempt(self.look_after_all, poll_interval)
                self.attempt(self.service_actions)
                self.give_up_if_hopeless(all(place.is_hopeless for place in self.places))
        finally:
            self.stopped.set()

    def give_up_if_hopeless(self, hopeless: bool) -> None:
        """At the start one worker that does not live is enough, later the others go on serving."""
        if hopeless:
            raise CannotStart(f"the workers end as soon as they have started: {self.last_cause}", "without --workers one process serves")

    def look_after_all(self, timeout: float) -> None:
        """One turn: fill the places, send what is to be sent, and hear who says something or dies."""
        for number, place in enumerate(self.places):
            if place.worker is None and not self.stopping and time.monotonic() >= place.vacant_until:
                self.start(number)
        slow = False
        for worker in self.workers:
            worker.line.flush()
            slow = slow or bool(worker.line.outgoing)
        for key, _events in self.selector.select(self.shortened(timeout, slow)):
            if isinstance(key.data, Worker):
                self.hear(key.data)
            else:
                self.bell.wait(0)

    def shortened(self, timeout: float, slow: bool) -> float:
        """Not longer than until a place is to be filled, or somebody may be able to take more."""
        vacant = [place.vacant_until - time.monotonic() for place in self.places if place.worker is None and not self.stopping]
        return max(0.0, min([timeout, *vacant, *[0.05] * slow]))

    def service_actions(self) -> None:
        """Read the users file again if it has changed, for all."""
        super().service_actions()
        if isinstance(self.users, UsersFile) and self.users.hashes is not self.hashes_handed:
            self.hashes_handed = self.users.hashes
            self.tell_all("users", self.hashes_handed)

    def follow_log(self) -> None:
        super().follow_log()
        self.tell_all("follow_log")

    def explain(self, on: bool) -> None:
        super().explain(on)
        self.tell_all("explain", on)

    @property
    def workers(self) -> List[Worker]:
        return [place.worker for place in self.places if place.worker is not None]

    def tell_all(self, *message: Any, but: Optional[Worker] = None, hint: bool = False) -> None:
        for worker in self.workers:
            if worker is not but:
                (worker.line.hint if hint else worker.line.send)(*message)

    # --- the life of a worker ---

    def start(self, number: int) -> None:
        assert self.board is not None
        try:
            ours, process = self.spawn([self.board.descriptor, *(listener.socket.fileno() for listener in self.listeners)])
        except OSError as error:
            self.try_again(number, error.strerror or str(error))
            return
        worker = self.places[number].worker = Worker(number, process, Line(ours))
        try:
            self.selector.register(ours, selectors.EVENT_READ, worker)
            worker.line.send(self.orders(number))
        except Exception as error:      # it would wait for its orders for ever
            worker.trouble = str(error)
            self.bury(worker)

    def spawn(self, descriptors: List[int]) -> Tuple[socket.socket, subprocess.Popen[bytes]]:
        """A process that has these descriptors, and our end of its line.  OSError if there can be none."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, signals_blocked():
                return ours, subprocess.Popen(command(theirs.fileno()), pass_fds=[theirs.fileno(), *descriptors], env=environment())
        except BaseException:
            ours.close()
            raise

    def orders(self, number: int) -> Orders:
        assert self.board is not None
        options = argparse.Namespace(**vars(self.options))
        users = self.hashes_handed if self.hashes_handed is not None else options.users
        options.parser = options.users = options.user = None       # two that cannot travel, and one that need not
        return Orders(
            number, len(self.places), options, users, [listener.socket.fileno() for listener in self.listeners],
            self.board.descriptor, failures=self.guessing.failures, relays={worker.number: worker.relays for worker in self.workers},
        )

    def hear(self, worker: Worker) -> None:
        try:
            worker.line.fill()
        except EOFError:
            self.bury(worker)
            return
        for message in worker.line.messages():
            self.attempt(self.hear_message, worker, message)

    def hear_message(self, worker: Worker, message: bytes) -> None:
        word, *details = pickle.loads(message)
        getattr(self, f"hear_{word}")(worker, *details)

    def bury(self, worker: Worker) -> None:
        """It is dead, or as good as that: forget its clients, and have another one started."""
        assert self.board is not None
        self.places[worker.number].worker = None
        self.board.clients[worker.number] = 0
        with contextlib.suppress(KeyError):     # it is not registered, if it has not come so far
            self.selector.unregister(worker.line.socket)
        worker.line.close()
        end(worker.process)
        if not self.stopping:
            self.tell_all("gone", worker.number)
            self.try_again(worker.number, f"process {worker.process.pid}, {worker.cause_of_death}", time.monotonic() - worker.started < YOUNG)

    def try_again(self, number: int, cause: str, young: bool = True) -> None:
        place, self.last_cause = self.places[number], cause
        place.died_young = place.died_young + 1 if young else 0
        pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** (place.died_young - 2)) if place.died_young > 1 else 0
        place.vacant_until = time.monotonic() + pause
        logger.error("worker %d has died (%s): its clients are cut off, and another takes its place", number + 1, cause)

    # --- what the workers say ---

    def hear_serving(self, worker: Worker) -> None:
        worker.serving = True

    def hear_trouble(self, worker: Worker, text: str) -> None:
        worker.trouble = text

    def hear_stopped(self, worker: Worker) -> None:
        """It has ended as it should."""

    def hear_tally(self, _worker: Worker, tally: Tally) -> None:
        self.tally.merge(tally)

    def hear_failed(self, worker: Worker, host: str) -> None:
        self.guessing.failed(host)
        self.tell_all("failed", host, but=worker, hint=True)

    def hear_succeeded(self, worker: Worker, host: str) -> None:
        self.guessing.succeeded(host)
        self.tell_all("succeeded", host, but=worker, hint=True)

    def hear_news(self, worker: Worker, kind: str) -> None:
        self.tell_all("news", kind, but=worker, hint=True)

    def hear_opened(self, worker: Worker, address: Address) -> None:
        worker.relays.add(address)
        self.tell_all("opened", worker.number, address, but=worker, hint=True)

    def hear_closed(self, worker: Worker, address: Address) -> None:
        worker.relays.discard(address)
        self.tell_all("closed", worker.number, address, but=worker, hint=True)

    def hear_came(self, worker: Worker, question: int, host: str) -> None:
        """Whether one more client may come from this host."""
        assert self.max_per_client is not None
        yes = sum(other.hosts[host] for other in self.workers) < self.max_per_client
        if yes:
            worker.hosts[host] += 1
        worker.line.send("answer", question, host, yes)

    def hear_stays(self, worker: Worker, host: str) -> None:
        """Our no came too late."""
        self.count(worker, host, 1)

    def hear_left(self, worker: Worker, host: str) -> None:
        self.count(worker, host, -1)

    def count(self, worker: Worker, host: str, change: int) -> None:
        """It may be below zero for a moment, when one that "stays" has left by then."""
        worker.hosts[host] += change
        if not worker.hosts[host]:
            del worker.hosts[host]

    # --- the end ---

    def server_close(self) -> None:
        """Have all stop, and wait for them."""
        self.stopping = True
        self.tell_all("stop")
        super().server_close()          # which takes all of them out of accept()
        until = time.monotonic() + STOP_TIME + 1
        while self.workers and time.monotonic() < until:
            self.look_after_all(0.1)
        for worker in self.workers:
            logger.error("worker %d does not stop, and is killed", worker.number + 1)
            worker.process.kill()
            self.bury(worker)
        self.let_go()

    def let_go(self) -> None:
        self.selector.close()
        if isinstance(self.bell, Wakeup):
            self.bell.close()
        if self.board is not None:
            self.board.close()
            self.board = None

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()


def command(descriptor: int) -> List[str]:
    """How to start a worker that has its line there."""
    return [sys.executable, "-c", PROGRAM, f"{__package__}.worker", str(descriptor), *(path or os.getcwd() for path in sys.path)]


def environment() -> Any:
    """Ours, without options and passwords: the workers are told what they need."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SOCKS5SRV_")}


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """
    For whoever is started now the signals that are meant for us stay blocked for ever.

    Ctrl-C at a terminal goes to all processes there, and it is for us to say what comes of it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shared_memory(size: int) -> int:
    """A descriptor of memory that has no name; zeros at first."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("socks5srv")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait until it is gone, but not long."""
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
