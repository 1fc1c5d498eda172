"""
What the status page and the metrics tell: sessions, octets, replies, failures, seconds.

A `Book` is kept by each process that serves, and only with ``--status``.  `Counting` is the handler
that writes into it, `watched()` makes the server that has it; both override what there is, and the
conversation knows nothing of it.

The one idea: a client costs a few entries, its octets none.  Those of a living tunnel are read off
it when somebody asks, and join the sum when it has ended, under the same lock: a sum that went back
would look like a restart to whoever draws it.

Every key of a counter is of a closed set: there is no name from the wire among them.
"""

from __future__ import annotations

import errno
import threading
import time
from bisect import bisect_left
from collections import Counter
from typing import Any, Counter as CounterType, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, cast

from ..outbound import is_own_address
from ..protocol import Address, Command, LoginFailed, NoAcceptableMethod, Request, RequestFailed, Socks5Error
from ..descriptors import descriptors
from ..handler import Socks5Handler
from ..rules import behind
from ..session import COMMAND_WORDS
from ..strangers import Stranger
from .conversations import Conversations, told
from .keys import octets_moved
from .run import ServiceServer

SHOWN = 500             # sessions in a report at most: those that move most
RATE_TIME = 0.9         # seconds between two looks that a rate is made of, at least
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)      # the upper bounds of a histogram

# Why a client never came to ask for anything; what is not here has simply gone.
HANG_UPS = {
    "the handshake took too long": "timeout",
    "too many clients were slower to ask than this one": "crowded_out",
    "too many logins are being checked": "crowded_out",
    "server stopped": "stopped",
}

Octets = Tuple[int, int]        # up and down


class Histogram:
    """How many took how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)      # the last one: longer than all bounds
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def merge(self, other: Histogram) -> None:
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts)]
        self.sum += other.sum


class Figures:
    """
    What has been counted since the start.

    `counts` has ``(name, label, ...)`` for keys: clients (taken, turned_away), sessions (event),
    requests (command, reply), handshake_failures (reason), auth_attempts (method, result),
    accept_errors (errno).
    """

    def __init__(self) -> None:
        self.counts: CounterType[Tuple[str, ...]] = Counter()
        self.up = self.down = 0
        self.connecting, self.resolving = Histogram(), Histogram()

    def merge(self, other: Figures) -> None:
        self.counts.update(other.counts)
        self.up += other.up
        self.down += other.down
        self.connecting.merge(other.connecting)
        self.resolving.merge(other.resolving)

    def copy(self) -> Figures:
        figures = Figures()
        figures.merge(self)
        return figures

    def by(self, name: str) -> Dict[Tuple[str, ...], int]:
        """The counts of this name, by their labels."""
        return {key[1:]: number for key, number in sorted(self.counts.items()) if key[0] == name}

    def sum_of(self, name: str, *labels: str) -> int:
        return sum(number for key, number in self.by(name).items() if key[:len(labels)] == labels)


class Report(NamedTuple):
    """What one process has to tell; it can be sent to another one."""

    figures: Figures                # with the octets of those that live
    live: CounterType[str]          # sessions, by command
    sessions: List[Dict[str, Any]]      # oldest first, at most SHOWN; only if they were asked for
    rates: Tuple[float, float]      # octets a second, up and down
    threads: int


class Book:
    """What one process counts.  Any thread may write into it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.figures = Figures()
        self.conversations = Conversations()
        self.live: Dict[int, Counting] = {}             # until their octets have joined the sum
        self.news = threading.Event()                   # a session has begun or ended
        self.looked_at = time.monotonic()
        self.seen: Octets = (0, 0)                      # octets of all, then
        self.seen_each: Dict[int, Octets] = {}          # and of each
        self.rates: Tuple[float, float] = (0.0, 0.0)
        self.rates_each: Dict[int, Tuple[float, float]] = {}

    def count(self, *key: str) -> None:
        with self.lock:
            self.figures.counts[key] += 1

    def took(self, histogram: Histogram, since: float) -> None:
        with self.lock:
            histogram.add(time.monotonic() - since)

    def begin(self, handler: Counting) -> None:
        with self.lock:
            self.live[handler.session.id] = handler
            self.figures.counts["clients", "taken"] += 1
        self.news.set()

    def end(self, handler: Counting) -> None:
        session = handler.session
        with self.lock:
            self.live.pop(session.id, None)
            self.figures.up += session.up
            self.figures.down += session.down
            self.figures.counts.update(handler.ending())
        self.news.set()

    def report(self, sessions: bool = True) -> Report:
        """
        As things are now.  A rate is that of the last second or so, however often somebody asks.

        A session that is over counts as that at once, though the log may tell of it a moment later: each is either
        alive or has ended.
        """
        with self.lock:
            handlers = list(self.live.values())
            alive = [handler for handler in handlers if handler.session.seconds is None]
            figures = self.figures.copy()
            for handler in set(handlers).difference(alive):
                figures.counts.update(handler.ending())
            each = {handler.session.id: octets_moved(handler) for handler in handlers}
            figures.up += sum(up for up, _down in each.values())
            figures.down += sum(down for _up, down in each.values())
            self.look(each, (figures.up, figures.down))
            rates, rates_each = self.rates, self.rates_each
        shown = select(alive, rates_each) if sessions else []
        rows = [row(handler, each[handler.session.id], rates_each.get(handler.session.id, (0.0, 0.0))) for handler in shown]
        return Report(figures, Counter(map(command_word, alive)), rows, rates, threading.active_count())

    def look(self, each: Dict[int, Octets], total: Octets) -> None:
        """Make rates of what has moved since the last look, unless that was just now."""
        now = time.monotonic()
        seconds = now - self.looked_at
        if seconds < RATE_TIME:
            return
        self.rates = rate(self.seen, total, seconds)
        self.rates_each = {id: rate(self.seen_each.get(id, (0, 0)), octets, seconds) for id, octets in each.items()}
        self.seen, self.seen_each, self.looked_at = total, each, now


def rate(before: Octets, now: Octets, seconds: float) -> Tuple[float, float]:
    return max(0, now[0] - before[0]) / seconds, max(0, now[1] - before[1]) / seconds


def select(handlers: List[Counting], rates: Dict[int, Tuple[float, float]]) -> List[Counting]:
    """All, or of too many those that move most, in their order."""
    if len(handlers) <= SHOWN:
        return handlers
    busiest = sorted(handlers, key=lambda handler: sum(rates.get(handler.session.id, (0, 0))), reverse=True)
    return sorted(busiest[:SHOWN], key=lambda handler: handler.session.id)


def row(handler: Socks5Handler, octets: Octets, rates: Tuple[float, float]) -> Dict[str, Any]:
    """A living session, as /status.json has it."""
    return {
        **told(handler.session), "up": octets[0], "down": octets[1], "up_rate": round(rates[0]), "down_rate": round(rates[1]),
        "seconds": round(time.monotonic() - handler.session.clock, 3),
    }


def command_word(handler: Socks5Handler) -> str:
    command = handler.session.command
    return COMMAND_WORDS[command] if command is not None else "none"


# --- the handler ---

class Counting(Socks5Handler):
    """Mixed in in front of a handler class."""

    server: WatchedServer
    failure = ""            # why it never came to a request

    def session_ended(self) -> None:
        self.server.book.end(self)
        super().session_ended()

    def ending(self) -> List[Tuple[str, ...]]:
        """What is counted when its session is over."""
        event = self.session.event
        if event not in ("bad_protocol", "no_acceptable_method") or self.failure == "pac":
            return [("sessions", event)]
        return [("sessions", event), ("handshake_failures", self.failure or HANG_UPS.get(self.session.reason, "closed"))]

    def auth_NO_AUTHENTICATION_REQUIRED(self) -> str:
        user = super().auth_NO_AUTHENTICATION_REQUIRED()
        self.server.book.count("auth_attempts", "none", "success")
        return user

    def auth_USERNAME_PASSWORD(self) -> str:
        try:
            user = super().auth_USERNAME_PASSWORD()
        except LoginFailed:
            self.server.book.count("auth_attempts", "username_password", "failure")
            raise
        self.server.book.count("auth_attempts", "username_password", "success")
        return user

    def perform(self, request: Request) -> None:
        """Returns, or raises, when the last reply is decided: a tunnel goes on without us."""
        reply = "none"
        try:
            super().perform(request)
            reply = "succeeded"
        except RequestFailed as error:
            reply = error.code.name.lower()
            raise
        finally:
            self.server.book.count("requests", COMMAND_WORDS[request.command], reply)

    def refuse(self, error: Socks5Error) -> None:
        if self.session.command is None and self.session.user is None and not self.session.reason:
            self.failure = failure_of(error)
        if isinstance(error, RequestFailed) and self.session.command is None:
            self.server.book.count("requests", "none", error.code.name.lower())
        super().refuse(error)

    def resolved(self, host: str, hosts: Sequence[str], began: float, error: Optional[Exception] = None) -> None:
        self.server.book.took(self.server.book.figures.resolving, began)
        super().resolved(host, hosts, began, error)

    def addresses(self, request: Request, until: float) -> List[Address]:
        found = super().addresses(request, until)
        self.dialling_since = time.monotonic()
        return found

    def connect(self, request: Request) -> Any:
        self.dialling_since = time.monotonic()      # where nothing is looked up first
        target = super().connect(request)
        self.server.book.took(self.server.book.figures.connecting, self.dialling_since)
        return target

    def refusal(self, command: Command, address: Address, name: Optional[str] = None) -> str:
        """The page is not for other computers that come through the proxy, whatever else they may reach here."""
        if self.server.is_status_page(address) and not self.is_here:
            return f"{address} is for this computer only"
        return super().refusal(command, address, name)


def failure_of(error: Socks5Error) -> str:
    """A word for what was wrong with the greeting."""
    if isinstance(error, NoAcceptableMethod):
        return "no_acceptable_method"
    if isinstance(error, Stranger):
        return error.kind       # of which "pac" is none
    return "bad_message" if "closed without a word" not in str(error) else "closed"


# --- the server ---

class WatchedServer(ServiceServer):
    """Mixed in in front of a server class; see watched()."""

    over = False            # it has served, and does so no more

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.book = Book()
        super().__init__(*arguments, **keywords)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        try:
            super().serve_forever(poll_interval)
        finally:
            self.over = True

    @property
    def RequestHandlerClass(self) -> Any:
        """The handler for the next client: one that is remembered, unless too many come."""
        handler = self.handler
        if self.book.conversations.welcome() or self.options.explain:
            return handler
        return getattr(handler, "forgetting", handler)

    @RequestHandlerClass.setter
    def RequestHandlerClass(self, handler_class: Any) -> None:
        self.handler = handler_class

    def begin(self, handler: Socks5Handler) -> None:
        self.book.begin(cast(Counting, handler))
        super().begin(handler)

    def accept(self, sock: Any) -> Tuple[Any, Any]:
        try:
            return super().accept(sock)
        except OSError as error:
            if not self.stopping:
                self.book.count("accept_errors", errno.errorcode.get(error.errno or 0, "other"))
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        welcome = super().verify_request(request, client_address)
        if not welcome:
            self.book.count("clients", "turned_away")
        return welcome

    def is_status_page(self, address: Address) -> bool:
        page: Optional[Address] = getattr(self.options, "status_address", None)
        if page is None or page.port != address.port or address.literal is None:
            return False
        there = address.literal.dialled
        return any(
            page.dialled.host == each.host or (page.is_unspecified and is_own_address(each.zoned)) for each in (there, *behind(there))
        )

    # --- what the page asks ---

    def reports(self, sessions: bool = True) -> Dict[int, Report]:
        """What each process that serves has to tell, by its number."""
        return {0: self.book.report(sessions)}

    def conversations(self) -> List[Dict[str, Any]]:
        """The last ones in short, the newest first."""
        return self.book.conversations.summaries()

    def conversation(self, id: int) -> Optional[Dict[str, Any]]:
        """That of this session, with its steps; None if it is not kept."""
        return self.book.conversations.find(id)

    def not_ready(self) -> str:
        """Why no more clients should be sent here; empty if they may come."""
        if self.over or self.stopping:
            return "stopping"
        if self.stopped.is_set():
            return "starting"
        clients, limit = self.fullness()
        full = clients >= limit or descriptors.are_scarce()
        return f"{clients} clients are being served, and more do not fit" if full else ""

    def fullness(self) -> Tuple[int, float]:
        """How many clients there are, and how many there may be."""
        return self.clients, self.most_clients


def watched(server_class: Type[ServiceServer]) -> Type[WatchedServer]:
    return type(f"Watched{server_class.__name__}", (WatchedServer, server_class), {})
