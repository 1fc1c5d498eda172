"""
Starts, restarts and stops the processes that serve: ``--workers N``.

The supervisor has the listening sockets and serves no client itself.  The workers (worker.py) are new interpreters,
not copies of this one: a copy has the locks of threads that it has not.  Each has one end of a `Channel`.  When a
worker dies its end closes, and another takes its place; when the supervisor dies the workers' ends close, and they stop.

The one idea: to cli/ it is a `Node`, as a single process is one.

What the workers tell is passed on or counted here.  The users file is read here alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from typing import Any, Callable, Counter as CounterType, Deque, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from ..descriptors import descriptors
from ..monitor.stats import DRAINING, why_full
from ..protocol import Address
from ..ratelimit import RateLimit, Resilient
from ..rules import Rule
from ..server import Defaults, Drain
from ..service import log
from ..service.build import CannotStart
from ..service.settings import Settings
from ..service.summary import Summary
from ..users import LoginThrottle, UsersFile
from ..waker import Waker
from .channel import (
    UPDATES, Answer, Channel, HostCount, MayAdmit, Message, NotAccepting, Question, ReopenLog, Report, Requests, RulesChanged, Serving, SetExplain,
    StartFailed, Stop, StopAccepting, SummaryUpdate, UsersChanged, WorkerConfig, WorkerGone, dispatch,
)
from .shared import GENERATIONS, Replica, Scoreboard
from .stats import WorkerStats

logger = logging.getLogger("socks5srv")

# Finds the package where we have found it: in a folder, a zip file, or among what is installed.
PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; __import__(sys.argv[1], fromlist=['main']).main(int(sys.argv[2]))"


def worker_command(descriptor: int) -> List[str]:
    """How to start a worker that has its channel there."""
    return [sys.executable, "-c", PROGRAM, f"{__package__}.worker", str(descriptor), *(path or os.getcwd() for path in sys.path)]


class Worker:
    """One of the processes, as the supervisor sees it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.number, self.process, self.channel = number, process, channel
        self.started = time.monotonic()
        self.serving = False
        self.draining = False                   # it has been told to end when its clients have gone
        self.accepting = True
        self.trouble = ""                       # why it cannot go on, if that is known
        self.hosts: CounterType[str] = Counter()        # its clients, with --max-per-client


class Slot:
    """A slot for one worker: the running process, or when to start the next, and the one that is to replace it."""

    worker: Optional[Worker] = None
    successor: Optional[Worker] = None
    wants_successor = False
    due = 0.0                       # by time.monotonic()
    fast_failures = 0               # the last ones, in a row


class Supervisor(Resilient):
    """
    A Node of several processes, which accept from these listening sockets and close them at the end.

    `passed` ones are those of a service manager, which goes on with them, and so with who is in their accept queues.
    """

    min_uptime = 5.0            # seconds; a worker that dies earlier is a fast failure
    max_fast_failures = 5       # give up after this many in a row, in all slots
    restart_backoff = 0.1       # seconds before the second restart, and twice as long each time after
    max_backoff = 10.0          # seconds
    stop_timeout = 6.0          # seconds that the workers have to end; they end by themselves before
    leave_timeout = 1.0         # seconds that they have to leave accept(), after which the last one does not wait for the others

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket], command: Callable[[int], List[str]] = worker_command,
                 passed: bool = False) -> None:
        """BadUsersFile if there is a users file that cannot be read."""
        self.settings, self.sockets, self.command, self.passed = settings, sockets, command, passed
        self.addresses: Sequence[Address] = [Address.of(sock.getsockname()) for sock in sockets]
        path = settings.users_file
        self.users_file = None if path is None else UsersFile(path)
        self.hashes_told = self.hashes
        self.private: Set[Address] = set()
        self.summary = Summary()
        self.stats = WorkerStats(self.ask, self.not_ready, self.capacity)
        self.rate_limit = RateLimit()
        self.replica = Replica(LoginThrottle(), self.rate_limit, {})
        self.requests = Requests()
        self.scoreboard = Scoreboard.new(settings.workers)
        self.slots = [Slot() for _ in range(settings.workers)]
        self.running: Dict[int, Worker] = {}    # by number, of which a slot has GENERATIONS
        self.last_cause = ""                    # of death
        self.calls: Deque[Callable[[], None]] = deque()     # for the thread of serve_forever()
        self.waker = Waker()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.waker, selectors.EVENT_READ, self.waker.drain)      # with what to call then
        self.thread: Optional[threading.Thread] = None      # of start() and serve_forever()
        self.draining: Optional[Drain] = None
        self.last: Optional[Worker] = None      # to accept then
        self.stopping = self.closed = False
        self.stopped = threading.Event()        # serve_forever() has ended
        self.stopped.set()

    @property
    def users(self) -> Optional[int]:
        users = self.settings.users if self.hashes is None else self.hashes
        return None if users is None else len(users)

    @property
    def hashes(self) -> Optional[Dict[str, str]]:
        """Those of the users file; None if there is none."""
        return None if self.users_file is None else self.users_file.hashes

    @property
    def workers(self) -> List[Worker]:
        return list(self.running.values())

    # --- serving ---

    def start(self) -> bool:
        """Start all, and wait until they serve."""
        self.thread = threading.current_thread()
        while not (self.stopping or self.draining) and not all(slot.worker and slot.worker.serving for slot in self.slots):
            self.turn(0.5)
            self.give_up_if_hopeless(any)
        return not (self.stopping or self.draining)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.thread = threading.current_thread()
        self.stopped.clear()
        try:
            while not self.stopping:
                self._attempt(self.turn, poll_interval)
                while self.calls:
                    self._attempt(self.calls.popleft())
                self._attempt(self.refresh_users)
                self._attempt(self.continue_restart)
                self._attempt(self.continue_drain)
                if self.draining is None:
                    self.give_up_if_hopeless(all)
        finally:
            self.stopping = True
            self.stopped.set()

    def give_up_if_hopeless(self, enough: Callable[[Iterator[bool]], bool]) -> None:
        """At the start `any` worker that does not live is enough; later the others go on serving until `all` die."""
        if enough(slot.worker is None and slot.fast_failures >= self.max_fast_failures for slot in self.slots):
            raise CannotStart(f"the workers end as soon as they have started: {self.last_cause}", "without --workers one process serves")

    def turn(self, timeout: float) -> None:
        """Fill the slots, send what waits to be sent, and receive."""
        for slot in self.slots:
            if slot.worker is slot.successor is None and self.starts_workers and time.monotonic() >= slot.due:
                slot.worker = self.start_worker(slot)
        for key, _events in self.selector.select(self.shortened(timeout)):
            key.data()
        for worker in self.workers:
            worker.channel.flush()
            for octets in worker.channel.messages():
                self._attempt(self.receive, worker, octets)

    def shortened(self, timeout: float) -> float:
        """Not longer than until a slot is to be filled, or a worker may be able to take more."""
        due = [slot.due - time.monotonic() for slot in self.slots if slot.worker is slot.successor is None and self.starts_workers]
        return max(0.0, min([0.05 if self.draining else timeout, *due, *(0.05 for worker in self.workers if worker.channel.outgoing)]))

    @property
    def starts_workers(self) -> bool:
        return not self.stopping and (self.draining is None or self.draining.accepting)

    def refresh_users(self) -> None:
        """Read the users file again if it has changed, for all."""
        if self.users_file is not None:
            self.users_file.refresh()
            if self.users_file.hashes is not self.hashes_told:
                self.tell_all(UsersChanged(self.users_file.hashes))
                self.hashes_told = self.users_file.hashes

    def tell_all(self, message: Message, but: Optional[Worker] = None, hint: bool = False) -> None:
        for worker in self.workers:
            if worker is not but:
                (worker.channel.hint if hint else worker.channel.send)(message)

    def ask(self, question: Message, timeout: float) -> Dict[int, Any]:
        """The workers' answers, by their numbers.  Not in the thread of serve_forever(), which receives them."""
        asked = {worker.channel: worker.number for worker in self.workers if worker.serving and not worker.channel.congested and not self.stopping}
        return {asked[channel]: answer for channel, answer in self.requests.ask(question, asked, timeout).items()}

    def not_ready(self) -> str:
        if self.stopping:
            return "stopping"
        if self.draining:
            return DRAINING
        return why_full(*self.capacity()) if any(worker.serving for worker in self.workers) else "starting"

    def capacity(self) -> Tuple[int, float]:
        return self.scoreboard.total(), self.settings.max_clients or descriptors.most_clients * len(self.slots)

    # --- what cli/ asks for ---

    def call(self, function: Callable[[], None]) -> None:
        self.calls.append(function)
        self.waker.wake()

    def reload(self, rules: Optional[Sequence[Rule]]) -> None:
        log.reopen()
        self.tell_all(ReopenLog())
        if rules is not None:
            self.settings = replace(self.settings, rules=rules)     # of workers to come
            self.tell_all(RulesChanged(rules))
        if self.users_file is not None:
            self.users_file.read_again()

    def set_explain(self, on: bool) -> None:
        self.settings = replace(self.settings, explain=on)      # of workers to come
        self.tell_all(SetExplain(on))

    def restart_workers(self) -> None:
        """One after the other, by continue_restart()."""
        for slot in self.slots:
            slot.wants_successor = True

    def drain(self) -> None:
        """Waits for the end of serve_forever(), unless called in its thread."""
        grace = Defaults.drain_grace if self.settings.drain_grace is None else self.settings.drain_grace
        self.draining = self.draining or Drain(grace, self.drain_timeout)
        self.waker.wake()
        if threading.current_thread() is not self.thread:
            self.stopped.wait()

    @property
    def drain_timeout(self) -> Optional[float]:
        return Defaults.drain_timeout if self.settings.drain_timeout is None else self.settings.drain_timeout

    def shutdown(self) -> None:
        """Waits for the end of serve_forever(), unless called in its thread."""
        self.stopping = True
        self.waker.wake()
        if threading.current_thread() is not self.thread:
            self.stopped.wait()

    # --- the life of a worker ---

    def start_worker(self, slot: Slot) -> Optional[Worker]:
        """It serves when it says so.  None if it could not be started."""
        number = self.free_number(slot)
        if number is None:      # as soon as one has gone
            return None
        try:
            channel, process = self.spawn()
        except OSError as error:
            cause = error.strerror or str(error)
            if slot.worker is None:
                self.restart_later(slot, cause)
            else:
                self.give_up_restart(cause)
            return None
        worker = self.running[number] = Worker(number, process, channel)
        try:
            self.selector.register(channel.socket, selectors.EVENT_READ, lambda: self.fill(worker))
            channel.send(WorkerConfig(
                number, len(self.slots), self.settings, self.hashes, [sock.fileno() for sock in self.sockets],
                self.scoreboard.descriptor, frozenset(self.private),
                (self.replica.throttle.failures, self.replica.relays),
            ))
        except Exception as error:      # it would wait for its config for ever
            worker.trouble = str(error)
            self.bury(worker)
            return None
        return worker

    def spawn(self) -> Tuple[Channel, subprocess.Popen[bytes]]:
        """A process that has our sockets, and the other end of this channel.  OSError if there can be none."""
        ours, theirs = socket.socketpair()
        try:
            inherited = [theirs.fileno(), self.scoreboard.descriptor, *(sock.fileno() for sock in self.sockets)]
            # Without options and passwords: the workers are told what they need.
            env = {name: value for name, value in os.environ.items() if not name.startswith("SOCKS5SRV_")}
            with theirs, signals_blocked():
                return Channel(ours), subprocess.Popen(self.command(theirs.fileno()), pass_fds=inherited, env=env)
        except BaseException:
            ours.close()
            raise

    def fill(self, worker: Worker) -> None:
        try:
            worker.channel.fill()
        except EOFError:
            self.bury(worker)

    def receive(self, worker: Worker, octets: bytes) -> None:
        message = pickle.loads(octets)
        if isinstance(message, UPDATES):
            dispatch(self.replica, message)
            self.tell_all(message, but=worker, hint=True)
        else:
            dispatch(self, message, worker)

    def slot_of(self, worker: Worker) -> Slot:
        return self.slots[worker.number % len(self.slots)]

    def free_number(self, slot: Slot) -> Optional[int]:
        """For one more worker of this slot; None while those that it has replaced have all others."""
        first = self.slots.index(slot)
        return next((number for number in range(first, GENERATIONS * len(self.slots), len(self.slots)) if number not in self.running), None)

    def bury(self, worker: Worker) -> None:
        """It has ended, or is as good as dead: forget its clients, and have another one started if it was to go on."""
        slot = self.slot_of(worker)
        was_successor = slot.successor is worker
        if slot.worker is worker:
            slot.worker = None
        if was_successor:
            slot.successor = None
        self.running.pop(worker.number, None)
        self.scoreboard.clients[worker.number] = 0
        with contextlib.suppress(KeyError):     # it is not registered, if it has not come so far
            self.selector.unregister(worker.channel.socket)
        worker.channel.close()
        self.requests.closed(worker.channel)
        self.stats.worker_gone(worker.number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(2)
        worker.process.kill()                   # if it takes longer to end
        if worker.process.wait():               # its exit code, which is 0 if it was told to end
            self.stats.worker_died()
        if not self.stopping:
            dispatch(self.replica, WorkerGone(worker.number))
            self.tell_all(WorkerGone(worker.number))
            self.fill_gap(slot, worker, was_successor)

    def fill_gap(self, slot: Slot, worker: Worker, was_successor: bool) -> None:
        """What comes of its death, if it was one."""
        code = worker.process.returncode
        cause = worker.trouble or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        cause = f"process {worker.process.pid}, {cause}"
        if was_successor and slot.worker is not None:
            self.give_up_restart(cause)
        elif not worker.draining:
            self.restart_later(slot, cause, time.monotonic() - worker.started < self.min_uptime)
        elif code:
            logger.error("worker %d has died while it was draining (%s): its connections are cut off", self.name_of(slot), cause)

    def name_of(self, slot: Slot) -> int:
        """By which the log has it."""
        return self.slots.index(slot) + 1

    def restart_later(self, slot: Slot, cause: str, fast: bool = True) -> None:
        self.last_cause = cause
        slot.fast_failures = min(slot.fast_failures + 1, 100) if fast else 0        # more is no longer pause, but a power too large
        pause = min(self.max_backoff, self.restart_backoff * 2.0 ** (slot.fast_failures - 2)) if slot.fast_failures > 1 else 0
        slot.due = time.monotonic() + pause
        logger.error("worker %d has died (%s): its connections are cut off, and another is started", self.name_of(slot), cause)

    # --- a worker makes room for another ---

    def continue_restart(self) -> None:
        """Start the next successor, or hand over to it when it serves."""
        slot = next((slot for slot in self.slots if slot.wants_successor and (slot.successor or self.free_number(slot) is not None)), None)
        if slot is None or not self.starts_workers:
            return
        if slot.successor is not None:
            if slot.successor.serving:
                self.hand_over(slot)
        elif slot.worker is not None and slot.worker.serving:
            slot.successor = self.start_worker(slot)
        else:                       # the one that is being started is new
            slot.wants_successor = False

    def hand_over(self, slot: Slot) -> None:
        old, slot.worker, slot.successor, slot.wants_successor = slot.worker, slot.successor, None, False
        if old is not None:         # it has not died meanwhile
            logger.info("worker %d has a successor, and is draining", self.name_of(slot), extra={"event": "restart"})
            self.stop_accepting(old, self.settings.drain_timeout)

    def stop_accepting(self, worker: Worker, timeout: Optional[float], last: bool = False) -> None:
        worker.draining = True
        worker.channel.send(StopAccepting(timeout, last))

    def give_up_restart(self, cause: str) -> None:
        for slot in self.slots:
            slot.wants_successor = False
        logger.error("the restart is given up, and the workers go on as they are: the new one has ended (%s)", cause)

    # --- what the workers say: on_<Message> ---

    def on_Serving(self, worker: Worker, _message: Serving) -> None:
        worker.serving = True

    def on_NotAccepting(self, worker: Worker, _message: NotAccepting) -> None:
        worker.accepting = False

    def on_StartFailed(self, worker: Worker, message: StartFailed) -> None:
        worker.trouble = message.reason

    def on_SummaryUpdate(self, _worker: Worker, message: SummaryUpdate) -> None:
        self.summary.merge(message.summary)
        self.stats.changed.set()

    def on_Report(self, worker: Worker, message: Report) -> None:
        self.stats.learn(worker.number, message)

    def on_Answer(self, worker: Worker, message: Answer) -> None:
        if isinstance(message.answer, Report):
            self.on_Report(worker, message.answer)
        self.requests.answered(worker.channel, message)

    def on_Question(self, worker: Worker, message: Question) -> None:
        worker.channel.send(Answer(message.number, message.question, dispatch(self, message.question, worker)))

    def on_MayAdmit(self, worker: Worker, question: MayAdmit) -> bool:
        limit = self.settings.max_per_client
        may_come = limit is None or sum(other.hosts[question.host] for other in self.workers) < limit
        if may_come:
            worker.hosts[question.host] += 1
        return may_come

    def on_HostCount(self, worker: Worker, message: HostCount) -> None:
        """Below zero for a moment, if a client has left before the worker knew that it was one too many."""
        worker.hosts[message.host] += message.change
        if not worker.hosts[message.host]:
            del worker.hosts[message.host]

    # --- the end ---

    def continue_drain(self) -> None:
        """Whatever of it is due: all but one worker leave the sockets, then this one does, and has who is in the accept queues."""
        drain, now = self.draining, time.monotonic()
        if drain is None or now < drain.closing:
            return
        if drain.accepting:
            drain.accepting = False
            self.last = next((worker for worker in self.workers if worker.serving and not worker.draining), None)
            for worker in self.workers:
                if worker is not self.last:
                    self.stop_accepting(worker, self.drain_timeout)
        others_accept = any(worker.accepting for worker in self.workers if worker is not self.last)
        if self.sockets and (not others_accept or now >= drain.closing + self.leave_timeout):
            self.close_sockets()        # first, or more would come into the queues
            if self.last is not None:
                self.stop_accepting(self.last, self.drain_timeout, last=not self.passed)
        if not self.running or now >= drain.end + self.stop_timeout:
            self.stopping = True

    def close_sockets(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets = ()

    def close(self) -> None:
        """Have all stop, and wait for them."""
        self.shutdown()
        if self.closed:
            return
        self.closed = True
        self.tell_all(Stop())
        self.close_sockets()
        until = time.monotonic() + self.stop_timeout
        while self.workers and time.monotonic() < until:
            self.turn(0.1)
        for worker in self.workers:
            logger.error("worker %d does not stop, and is killed", self.name_of(self.slot_of(worker)))
            worker.process.kill()
            self.bury(worker)
        self.selector.close()
        self.waker.close()
        self.scoreboard.close()

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """They stay so in a process started now: Ctrl-C is for all at a terminal, and what comes of it is decided here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
