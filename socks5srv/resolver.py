"""
The resolver: a name becomes IP addresses, in a thread that can be given up.

The system's resolver (getaddrinfo) blocks, for as long as it likes, and can be neither timed nor
cancelled.  So each look-up has a thread of its own; the conversation waits for its answer with an
eye on its client, and on the clock.  Where the resolver does not answer, such threads remain, also
after their clients have left, so there are only so many places for them.

The one idea: no client takes the places of all.  One client's look-ups have a share; what is beyond
that waits in a queue, in the order in which it came, for as long as its conversation waits.  A name that
is being looked up already needs no second place, and a number needs none at all.

Not here: how a name is spelled (names.py), and which of its addresses may be reached.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Callable, Counter as CounterType, Dict, List, Optional, Sequence

from .descriptors import LOOK_UP, USED_UP, WAIT, descriptors
from .names import ascii_form, canonical
from .outbound import wait
from .protocol import Address, ReplyCode, RequestFailed
from .relay import READ
from .waker import Waker

# What a resolver says about a name that does not exist; all other errors may be gone the next moment.
NO_SUCH_NAME = {getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)}


def look_up(host: str, family: int = socket.AF_UNSPEC) -> List[str]:
    """The IP addresses of a host, best first, link-local ones with a zone.  OSError or UnicodeError if it has none."""
    # As octets a name passes Python's IDNA codec by, which chokes on a..b and long labels.
    rows = socket.getaddrinfo(ascii_form(host).encode("ascii"), None, family, socket.SOCK_STREAM)
    return [Address.of(row[4]).zoned for row in rows]


def look_up_as_it_is(host: str, family: int = socket.AF_UNSPEC) -> List[str]:
    """The same, but of no other name: systems complete names (``search`` in resolv.conf), nas to nas.corp.example."""
    # A dot at the end keeps them from it, but with one they find nothing in /etc/hosts.  So it is only put there where
    # the answer tells another name than was asked for: a completed one, or that of an alias (CNAME).
    name = ascii_form(host)
    if name.endswith(".") or is_number(name):
        return look_up(name, family)
    rows = socket.getaddrinfo(ascii_form(name).encode("ascii"), None, family, socket.SOCK_STREAM, 0, socket.AI_CANONNAME)
    found = rows[0][3]
    if canonical(found) == canonical(name):
        return [Address.of(row[4]).zoned for row in rows]
    try:
        return look_up(name + ".", family)
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"it is short for {found or 'another name'}, and rules judge names as they are asked for") from error


# --- look-ups in threads ---

@dataclass(eq=False)
class LookUp:
    """One question to the resolver, and all that wait for its answer: ``function(host)`` is called in a thread."""

    function: Callable[[str], Sequence[str]]
    host: str
    client: str = ""                    # in whose share it is counted
    name: Any = None                    # the same for questions that have the same answer; None: it is like no other
    hosts: Sequence[str] = ()           # the answer,
    error: Optional[Exception] = None   # or why there is none
    waiting: List[Callable[[LookUp], None]] = field(default_factory=list)   # called with it then, in that thread

    def ask(self) -> None:
        try:
            found = self.function(self.host)
            self.hosts = [found] if isinstance(found, str) else found       # an override may well return one address
        except Exception as error:
            self.error = error

    def result(self) -> Sequence[str]:
        if self.error is not None:
            raise self.error
        return self.hosts


class LookUps:
    """The look-ups of this process: those that run, each in a thread, and those that wait for a place."""

    most = 256          # that run at a time: threads, some 20 KiB each
    share = 64          # of those, for one client: a quarter, so that it takes four to keep out a fifth

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.total = 0                                  # that run
        self.running: CounterType[str] = Counter()      # of those, by client
        self.named: Dict[Any, LookUp] = {}              # those that run and can be joined, by name
        self.queue: Dict[LookUp, None] = {}             # those that wait, in their order

    def begin(self, look_up: LookUp, answer: Callable[[LookUp], None], patient: bool = True) -> LookUp:
        """
        Have `answer` called, in another thread; the look-up that will do it, perhaps one that runs already.

        OSError if there is no place and `patient` is false, or no thread; RequestFailed 01 if there are no descriptors.
        """
        if look_up.name is not None and is_number(look_up.host):       # the resolver answers that at once
            look_up.ask()
            answer(look_up)
            return look_up
        with self.lock:
            running = self.named.get(look_up.name)
            if running is not None:
                running.waiting.append(answer)
                return running
            look_up.waiting.append(answer)
            if self.has_place(look_up):
                self.start(look_up)
            elif patient:
                self.queue[look_up] = None
            else:
                raise OSError(errno.EAGAIN, "too many lookups are under way already")
            return look_up

    def leave(self, look_up: LookUp, answer: Callable[[LookUp], None]) -> bool:
        """`answer` is not wanted any more.  Nothing stops a look-up that runs; whether this one was still queued."""
        with self.lock:
            for asked in (look_up, self.named.get(look_up.name)):
                if asked is not None and answer in asked.waiting:
                    asked.waiting.remove(answer)
            queued = look_up in self.queue
            self.queue.pop(look_up, None)
            return queued

    # --- with the lock ---

    def has_place(self, look_up: LookUp) -> bool:
        return self.total < self.most and self.running[look_up.client] < self.share

    def start(self, look_up: LookUp) -> None:
        """OSError if there is no thread; RequestFailed 01 if there is no descriptor for what it opens."""
        if not descriptors.take(LOOK_UP):
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, USED_UP)
        try:
            threading.Thread(target=self.run, args=(look_up,), name="socks5srv-lookup", daemon=True).start()
        except RuntimeError as error:
            descriptors.give_back(LOOK_UP)
            raise OSError(errno.EAGAIN, "no thread left to look it up") from error
        self.total += 1
        self.running[look_up.client] += 1
        if look_up.name is not None:
            self.named[look_up.name] = look_up

    def start_waiting(self) -> None:
        """Give free places to those that have waited longest, as far as their clients may have more."""
        for look_up in list(self.queue):
            running = self.named.get(look_up.name)
            if running is not None:
                running.waiting += look_up.waiting
                del self.queue[look_up]
            elif self.has_place(look_up):
                del self.queue[look_up]
                try:
                    self.start(look_up)
                except (OSError, RequestFailed) as error:
                    look_up.error = error
                    self.tell(look_up)

    def tell(self, look_up: LookUp) -> None:
        for answer in look_up.waiting:
            answer(look_up)
        look_up.waiting.clear()

    # --- in the thread of a look-up ---

    def run(self, look_up: LookUp) -> None:
        look_up.ask()
        descriptors.give_back(LOOK_UP)
        with self.lock:
            self.named.pop(look_up.name, None)
            self.total -= 1
            self.running -= Counter([look_up.client])       # which keeps no zeros
            self.tell(look_up)
            self.start_waiting()


look_ups = LookUps()


def is_number(host: str) -> bool:
    """Whether resolvers take this for an IPv4 address: 127.1, 0x7f.1."""
    try:
        return host[:1].isdigit() and bool(socket.inet_aton(host))
    except (OSError, ValueError):
        return False


def in_time(look_up: LookUp, client: socket.socket, until: float) -> Sequence[str]:
    """
    The hosts that a look-up finds, for which `client` waits; given up at the deadline or when the client goes.

    RequestFailed 04 at the deadline, or 01 if there was no place for it until then; ClientGone; or what
    the look-up itself raises.
    """
    if not descriptors.take(WAIT):
        raise RequestFailed(ReplyCode.GENERAL_FAILURE, USED_UP)
    try:
        with closing(Waker()) as waker:
            return wait_for(look_up, waker, client, until).result()
    finally:
        descriptors.give_back(WAIT)


def wait_for(look_up: LookUp, waker: Waker, client: socket.socket, until: float) -> LookUp:
    """The look-up that has the answer."""
    answered: List[LookUp] = []

    def answer(found: LookUp) -> None:
        answered.append(found)
        waker.wake()

    look_ups.begin(look_up, answer)
    try:
        wait({waker.fileno(): READ}, client, until)
    finally:
        queued = look_ups.leave(look_up, answer)
    if answered:
        return answered[0]
    if queued:
        raise RequestFailed(ReplyCode.GENERAL_FAILURE, f"{look_up.host}: too many lookups were under way for this one to begin in time")
    raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{look_up.host}: the lookup took too long")
