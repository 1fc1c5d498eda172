"""
What the supervisor and its workers tell each other: the messages, and how they get there.

A message is one of the tuples below.  It travels pickled, with its length in front, through a socket pair, and is
dispatched by its type: its receiver has a method ``on_<Message>`` for each that it can get.

Not here: what becomes of a message (supervisor.py, worker.py, stats.py; for an `Update` shared.py).
"""

# ruff: noqa: UP014     (a table of messages, one on a line)
from __future__ import annotations

import errno
import itertools
import pickle
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

from ..listener import OUT_OF
from ..protocol import Address
from ..rules import Rule
from ..service.settings import Settings
from ..service.summary import Summary

if TYPE_CHECKING:
    from ..monitor.stats import Snapshot

# --- to a worker ---

class WorkerConfig(NamedTuple):
    """The first message."""

    number: int                         # its place on the scoreboard, from 0
    workers: int                        # so many serve at a time
    settings: Settings
    users: Optional[Mapping[str, str]]  # hashes by name, if they are those of a file
    listeners: List[int]                # descriptors
    scoreboard: int                     # another
    private: FrozenSet[Address]         # see policy.Policy
    state: Tuple[Mapping[str, Tuple[int, float]], Dict[int, Set[Address]]]      # failures and relays of a Replica


Stop = NamedTuple("Stop", [])                                               # end all sessions, and the process
# Accept no more, and end the process when the clients have gone, or after so many seconds.  The `last` one empties the accept queue.
StopAccepting = NamedTuple("StopAccepting", [("timeout", Optional[float]), ("last", bool)])
UsersChanged = NamedTuple("UsersChanged", [("hashes", Dict[str, str])])     # the users file has been read again
RulesChanged = NamedTuple("RulesChanged", [("rules", Sequence[Rule])])      # so have the rules
ReopenLog = NamedTuple("ReopenLog", [])                                     # the log file may have been renamed
SetExplain = NamedTuple("SetExplain", [("on", bool)])                       # explain every message of new clients, or no longer

# --- to the supervisor ---

Serving = NamedTuple("Serving", [])                                         # the worker accepts clients from now on
StartFailed = NamedTuple("StartFailed", [("reason", str)])                  # it cannot, and ends
NotAccepting = NamedTuple("NotAccepting", [])                               # the worker has done what StopAccepting says
SummaryUpdate = NamedTuple("SummaryUpdate", [("summary", Summary)])         # what has been counted since the last one
HostCount = NamedTuple("HostCount", [("host", str), ("change", int)])       # with --max-per-client: as many more than have been counted

# --- questions, and their answers: see Requests ---

Question = NamedTuple("Question", [("number", int), ("question", Any)])
Answer = NamedTuple("Answer", [("number", int), ("question", Any), ("answer", Any)])    # also if it comes too late

MayAdmit = NamedTuple("MayAdmit", [("host", str)])                          # to the supervisor: one more of this host?  True has counted it
SessionWanted = NamedTuple("SessionWanted", [("id", int)])                  # to a worker: all that is known of it, a dict or None
ReportWanted = NamedTuple("ReportWanted", [("sessions", bool)])             # to a worker: a Report, with its sessions or without
# As monitor.stats.Stats has it; `recent` is None if no sessions were wanted.  Without a question it is the last one of a worker that ends.
Report = NamedTuple("Report", [("snapshot", "Snapshot"), ("recent", Optional[List[Dict[str, Any]]])])

# --- updates: a worker tells the supervisor, which tells the other workers ---

LoginFailed = NamedTuple("LoginFailed", [("host", str)])                    # a wrong password from there
LoginSucceeded = NamedTuple("LoginSucceeded", [("host", str)])              # the right one, after wrong ones
Warned = NamedTuple("Warned", [("kind", str)])                              # the log has a line about it: see ratelimit.py
RelayOpened = NamedTuple("RelayOpened", [("worker", int), ("address", Address)])    # where one of its clients sends datagrams to
RelayClosed = NamedTuple("RelayClosed", [("worker", int), ("address", Address)])
WorkerGone = NamedTuple("WorkerGone", [("worker", int)])                    # it has died, and its clients are cut off

UPDATES = (LoginFailed, LoginSucceeded, Warned, RelayOpened, RelayClosed, WorkerGone)
Update = Union[LoginFailed, LoginSucceeded, Warned, RelayOpened, RelayClosed, WorkerGone]
Message = Tuple[Any, ...]               # any of all these


# --- how they get there ---

def dispatch(receiver: object, message: Message, *context: Any) -> Any:
    """Call its method for this message."""
    return getattr(receiver, f"on_{type(message).__name__}")(*context, message)


TRY_AGAIN = OUT_OF | {errno.EAGAIN, errno.EWOULDBLOCK}


class Channel:
    """One end of a socket pair.  Any thread may send(), which never blocks: what has no room waits for flush()."""

    header = struct.Struct("!I")        # in front of each message: its length
    max_buffered = 1024 * 1024          # octets that wait, after which hints are dropped

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.lock = threading.Lock()
        self.incoming, self.outgoing = bytearray(), bytearray()

    @property
    def congested(self) -> bool:
        return len(self.outgoing) >= self.max_buffered

    def send(self, message: Message) -> None:
        octets = pickle.dumps(message)
        with self.lock:
            self.outgoing += self.header.pack(len(octets)) + octets
        self.flush()

    def hint(self, message: Message) -> None:
        """The same for what may be dropped if the other end does not read."""
        if not self.congested:
            self.send(message)

    def flush(self) -> None:
        with self.lock:
            try:
                while self.outgoing:
                    del self.outgoing[:self.socket.send(self.outgoing)]
            except OSError as error:
                if error.errno not in TRY_AGAIN:        # the other end is closed, as fill() will tell
                    self.outgoing.clear()

    def fill(self) -> None:
        """Read what has come; EOFError when the other end is closed."""
        try:
            octets = self.socket.recv(65536)
        except OSError as error:
            if error.errno in TRY_AGAIN:
                return
            raise EOFError from error
        if not octets:
            raise EOFError
        self.incoming += octets

    def messages(self) -> Iterator[bytes]:
        """Those that have come as a whole, still pickled; each is taken away."""
        while len(self.incoming) >= self.header.size:
            end = self.header.size + self.header.unpack_from(self.incoming)[0]
            if len(self.incoming) < end:
                return
            octets = bytes(self.incoming[self.header.size:end])
            del self.incoming[:end]
            yield octets

    def close(self, timeout: Optional[float] = None) -> None:
        """Close it; with a timeout in seconds send first what waits."""
        if timeout is not None:
            self.socket.settimeout(timeout)
            self.flush()
        with self.lock:
            self.outgoing.clear()
            self.socket.close()


class Requests:
    """The questions that are still to be answered.  Any thread may ask(), but the one that hands in the answers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.pending: Dict[int, Tuple[Set[Channel], Dict[Channel, Any], threading.Event]] = {}     # missing, come, all have come

    def ask(self, question: Message, channels: Iterable[Channel], timeout: float) -> Dict[Channel, Any]:
        """The answers that come from these channels within so many seconds."""
        number, asked, done = next(self.numbers), set(channels), threading.Event()
        answers: Dict[Channel, Any] = {}
        with self.lock:
            self.pending[number] = set(asked), answers, done
        try:
            for channel in asked:
                channel.send(Question(number, question))
            if asked:
                done.wait(timeout)
        finally:
            with self.lock:
                del self.pending[number]
        return answers

    def answered(self, channel: Channel, answer: Answer) -> bool:
        """Hand it in; False if it is too late."""
        with self.lock:
            is_awaited = answer.number in self.pending and channel in self.pending[answer.number][0]
            if is_awaited:
                self.pending[answer.number][1][channel] = answer.answer
                self.settle(channel, answer.number)
            return is_awaited

    def closed(self, channel: Channel) -> None:
        """No more answers will come from there."""
        with self.lock:
            self.settle(channel, *self.pending)

    def settle(self, channel: Channel, *numbers: int) -> None:
        """These questions wait for this channel no longer; to be called with the lock."""
        for missing, _answers, done in map(self.pending.__getitem__, numbers):
            missing.discard(channel)
            if not missing:
                done.set()
