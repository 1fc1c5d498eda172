"""
What can go wrong, on demand: objects to give to ``start(faults=[...])`` or to ``proxy.inject()``.

    proxy.inject(ReplyWith(ReplyCode.CONNECTION_REFUSED, host="api.example.com", times=2))
    proxy.inject(Truncate(Reply, 3))

A fault names the message that it is about by its class in protocol.py, which is its name in the RFCs:
`Greeting`, `Credentials` and `Request` come from the client, `MethodSelection`, `CredentialsReply` and
`Reply` go to it, and `SecondReply` is BIND's second one alone.  All take two selectors: `times`, how often
it strikes (None: always), and `host`, for which destination, as the client wrote it.  Faults strike in the
order in which they were injected.

A fault that never strikes is a mistake of the test's, such as a misspelt `host`: its proxy's stop() says so, unless
the fault is made with ``optional=True``.

The one idea: a fault stands at the handler's two choke points, where messages are received and sent.  The
conversation knows nothing of it, so all that the client sees before it, and after, is the real server.
Datagrams pass no choke point; for them a lossy link (link.py) is laid between the client and its relay.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from io import BytesIO
from typing import Dict, Iterator, List, Optional, Protocol, Set, Tuple, Type

from ..names import canonical
from ..protocol import (
    REPLY_CODES, Address, Credentials, CredentialsReply, Datagram, Field, Greeting, Message, MethodSelection, ProtocolError,
    Reply, ReplyCode, Request, RequestFailed,
)
from ..relay import RESET
from ..session import Session

__all__ = [
    "BoundTo", "CloseAfter", "Credentials", "CredentialsReply", "Delay", "Drip", "DropDatagrams", "DuplicateDatagrams",
    "Fault", "FragmentDatagrams", "Greeting", "LoginStatus", "MethodSelection", "Raw", "ReorderDatagrams", "Reply",
    "ReplyCode", "ReplyWith", "Request", "ResetAfter", "SecondReply", "SelectMethod", "Truncate",
]

PAUSE = 0.001       # seconds between octets that are not to arrive together
HOSTS_TOLD = 5      # of those that a fault was not for


class SecondReply(Reply):
    """A name for the reply that tells BIND's client who has called; what is about every `Reply` is about this one, too."""


MessageClass = Type[Message]
FROM_CLIENT: Tuple[MessageClass, ...] = (Greeting, Credentials, Request)
TO_CLIENT: Tuple[MessageClass, ...] = (MethodSelection, CredentialsReply, Reply, SecondReply)
WITH_HOST: Tuple[MessageClass, ...] = (Request, Reply, SecondReply, Datagram)    # before them it is not known


class Broken(OSError):
    """The conversation ends here, because a fault wants it."""


class Octets(Message):
    """What is sent in place of a message: these octets, as they are."""

    def __init__(self, message: Message, octets: bytes) -> None:
        self.field = Field(f"instead of {type(message).__name__}", octets, octets.hex(" ") or "nothing")

    def fields(self) -> List[Field]:
        return [self.field]


class FaultyHandler(Protocol):
    """What a fault asks of the handler that it strikes."""

    session: Session
    connection: socket.socket

    def linger(self) -> None: ...
    def pause(self, seconds: float) -> None: ...


class Fault:
    """
    One thing that goes wrong, with certain messages.

    The same object may serve any number of proxies, each of which counts for itself.  To make one, say in `about`
    which messages it strikes, and override what shall be different then.
    """

    about: Tuple[MessageClass, ...] = ()
    every = 1       # of how many such messages it strikes one
    optional = False
    armed: Optional[Armed] = None       # in the latest proxy

    def __init__(self, *words: object, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times={times} would be never")
        if host is not None and not set(self.about) <= set(WITH_HOST):
            raise ValueError(f"host= cannot select a {self.about[0].__name__}: the host is known from the Request on")
        self.words = words          # as it was made; for repr()
        self.times = times
        self.host = host
        self.optional = optional

    @property
    def struck(self) -> int:
        """How often it has struck, in the proxy into which it was injected last."""
        return self.armed.struck if self.armed else 0

    def received(self, handler: FaultyHandler) -> None:
        """The client's message has come."""

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        """The message is about to be sent; returns what will be sent instead."""
        return message

    def sent(self, handler: FaultyHandler, message: Message) -> None:
        """It has been sent, and was to be this one."""

    def hang_up(self, handler: FaultyHandler) -> None:
        """End the conversation, with a FIN behind all that was sent."""
        handler.session.reason = handler.session.reason or str(self)
        handler.linger()
        raise Broken(str(self))

    def __repr__(self) -> str:
        given = {"every": self.every if self.every > 1 else None, "times": self.times, "host": self.host, "optional": self.optional or None}
        selectors = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*map(spelled, self.words), *selectors])})"

    def __str__(self) -> str:
        return f"fault: {self!r}"


def spelled(word: object) -> str:
    """As it was typed, or might have been."""
    if isinstance(word, Enum):
        return f"{type(word).__name__}.{word.name}"
    return word.__name__ if isinstance(word, type) else repr(word)


def octet(fault: Fault, what: str, number: int) -> None:
    """ValueError if it does not fit into one."""
    if not 0 <= number <= 255:
        raise ValueError(f"{type(fault).__name__}({number}): a {what} is one octet, 0 to 255")


def not_below_zero(fault: Fault, number: float) -> None:
    if number < 0:
        raise ValueError(f"{fault!r}: {number} is below 0")


# --- other answers ---

class ReplyWith(Fault):
    """The request gets this reply, and nothing is tried.  `code` may be any octet; after `SUCCEEDED` comes the end, too."""

    about = (Request,)

    def __init__(self, code: int, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        octet(self, "reply code", code)
        self.code: int = REPLY_CODES.get(code, code)
        super().__init__(self.code, times=times, host=host, optional=optional)

    def received(self, handler: FaultyHandler) -> None:
        raise RequestFailed(self.code, str(self))       # type: ignore[arg-type]    # it may be a bare number


class SelectMethod(Fault):
    """The method is this octet, offered or not.  If it is not the one that the server has chosen, the connection then ends."""

    about: Tuple[MessageClass, ...] = (MethodSelection,)
    octet_is = "method"

    def __init__(self, method: int, *, times: Optional[int] = None, optional: bool = False) -> None:
        octet(self, self.octet_is, method)
        super().__init__(method, times=times, optional=optional)
        self.octet = method

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        octets = bytes(message)
        changed = octets[:1] + bytes((self.octet,)) + octets[2:]
        return message if changed == octets else Octets(message, changed)

    def sent(self, handler: FaultyHandler, message: Message) -> None:
        if bytes(message)[1] != self.octet:
            self.hang_up(handler)


class LoginStatus(SelectMethod):
    """The login gets this STATUS, right or wrong; if it is not what the server thinks of it, the connection then ends."""

    about = (CredentialsReply,)
    octet_is = "status"


class Raw(Fault):
    """These octets are sent instead of the message, and the conversation goes on as if nothing had happened."""

    def __init__(self, message: MessageClass, octets: bytes, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        self.about = one_of(TO_CLIENT, message)
        super().__init__(message, octets, times=times, host=host, optional=optional)
        self.octets = octets

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        return Octets(message, self.octets)


class BoundTo(Fault):
    """BND of the reply is this host and port: a name (ATYP 03), an IPv6 or an IPv4 address."""

    about = (Reply,)

    def __init__(self, host_bound: str, port: int = 0, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        super().__init__(host_bound, port, times=times, host=host, optional=optional)
        self.bound = Address.named(host_bound, port)

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        return Reply(message.code, self.bound) if isinstance(message, Reply) else message


# --- the end, too early ---

class CloseAfter(Fault):
    """The connection is closed once this message has been received, or sent."""

    def __init__(self, message: MessageClass, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        self.about = one_of(FROM_CLIENT + TO_CLIENT, message)
        super().__init__(message, times=times, host=host, optional=optional)

    def received(self, handler: FaultyHandler) -> None:
        self.hang_up(handler)

    def sent(self, handler: FaultyHandler, message: Message) -> None:
        self.hang_up(handler)


class ResetAfter(CloseAfter):
    """The same with an RST, as of a server that has crashed."""

    def hang_up(self, handler: FaultyHandler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        handler.connection.close()
        raise Broken(str(self))


class Truncate(Fault):
    """The first octets of the message are sent, this many, and then the end."""

    def __init__(self, message: MessageClass, octets: int, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        self.about = one_of(TO_CLIENT, message)
        super().__init__(message, octets, times=times, host=host, optional=optional)
        not_below_zero(self, octets)
        self.octets = octets

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        return Octets(message, bytes(message)[:self.octets])

    def sent(self, handler: FaultyHandler, message: Message) -> None:
        self.hang_up(handler)


# --- nothing wrong, but not as usual ---

class Delay(Fault):
    """So many seconds pass before the message is sent, or after it has been received.  `stop()` does not wait for them."""

    def __init__(self, message: MessageClass, seconds: float, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        self.about = one_of(FROM_CLIENT + TO_CLIENT, message)
        super().__init__(message, seconds, times=times, host=host, optional=optional)
        not_below_zero(self, seconds)
        self.seconds = seconds

    def received(self, handler: FaultyHandler) -> None:
        handler.pause(self.seconds)

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        handler.pause(self.seconds)
        return message


class Drip(Fault):
    """Each octet comes in a segment of its own.  Without a message named, it strikes all that are sent."""

    def __init__(self, message: Optional[MessageClass] = None, *, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        self.about = TO_CLIENT if message is None else one_of(TO_CLIENT, message)
        super().__init__(*[] if message is None else [message], times=times, host=host, optional=optional)

    def sending(self, handler: FaultyHandler, message: Message) -> Message:
        octets = bytes(message)
        for i in range(len(octets) - 1):
            handler.connection.sendall(octets[i:i + 1])
            handler.pause(PAUSE)
        return Octets(message, octets[-1:])


def one_of(messages: Tuple[MessageClass, ...], message: MessageClass) -> Tuple[MessageClass]:
    """This message, if it is one of those; else ValueError."""
    if message not in messages:
        names = ", ".join(one.__name__ for one in messages)
        raise ValueError(f"{getattr(message, '__name__', message)!r} is none of the messages that can be named here: {names}")
    return (message,)


# --- datagrams ---

class DropDatagrams(Fault):
    """
    Datagrams are lost.

    `way` is ``"up"``, client to target, ``"down"``, or None for both; `every` third, for instance, of those that
    the other selectors leave.  Here `host` is the one in the datagram's header.
    """

    about = (Datagram,)

    def __init__(self, way: Optional[str] = None, *, every: int = 1, times: Optional[int] = None, host: Optional[str] = None, optional: bool = False) -> None:
        if way not in ("up", "down", None) or every < 1:
            raise ValueError('way is "up", "down" or None, and every at least 1')
        super().__init__(*[] if way is None else [way], times=times, host=host, optional=optional)
        self.way = way
        self.every = every

    def pass_on(self, octets: bytes) -> List[bytes]:
        """What becomes of a datagram that is struck."""
        return []


class DuplicateDatagrams(DropDatagrams):
    """Datagrams arrive twice."""

    def pass_on(self, octets: bytes) -> List[bytes]:
        return [octets, octets]


class ReorderDatagrams(DropDatagrams):
    """Datagrams arrive after the next one: 2 1 4 3.  The last one waits for a next one for good."""


class FragmentDatagrams(DropDatagrams):
    """Datagrams are cut in two, with FRAG 01 and 82.  RFC 1928 section 7."""

    def pass_on(self, octets: bytes) -> List[bytes]:
        whole = Datagram.read(BytesIO(octets))
        half = len(whole.data) // 2
        last = 2 | Datagram.LAST_FRAGMENT
        return [bytes(Datagram(whole.address, whole.data[:half], 1)), bytes(Datagram(whole.address, whole.data[half:], last))]


# --- the faults of one proxy ---

@dataclass(eq=False)
class Armed:
    """A fault in one proxy: how often it may still strike (None: always), what it has met, and what it has just missed."""

    fault: Fault
    left: Optional[int]
    met: int = 0
    struck: int = 0
    missed: Set[str] = field(default_factory=set)       # hosts of messages that only the host kept it from
    reported: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it should have struck and has not, which nobody has been told of."""
        return not (self.struck or self.fault.optional or self.reported)

    def strikes(self, message: MessageClass, host: str) -> bool:
        """Whether it strikes this message; if so, that was one of its times."""
        fault = self.fault
        if not issubclass(message, fault.about) or self.left == 0:
            return False
        if fault.host is not None and canonical(fault.host) != canonical(host):
            if len(self.missed) < HOSTS_TOLD:
                self.missed.add(host)
            return False
        self.met += 1
        if self.met % fault.every:
            return False
        if self.left is not None:
            self.left -= 1
        self.struck += 1
        return True

    def __str__(self) -> str:
        """That it has never struck, and why."""
        return f"{self.fault!r} never struck: {self.near_miss()}"

    def near_miss(self) -> str:
        names = " or ".join(message.__name__ for message in self.fault.about)
        if self.met:
            return f"it strikes one {names} in {self.fault.every}, and met {self.met}"
        if not self.missed:
            return f"no {names} reached it"
        hosts = sorted(self.missed)
        similar = get_close_matches(str(self.fault.host), hosts, 1)
        return f"the host was {' or '.join(hosts)}" + (f"; did you mean host={similar[0]!r}?" if similar else "")


class Faults:
    """Those of one proxy, in their order.  All threads may ask."""

    def __init__(self) -> None:
        self.armed: List[Armed] = []
        self.taken_away: List[Armed] = []       # without having struck
        self.lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        if not isinstance(fault, Fault):
            raise TypeError(f"{fault!r} is not a fault: ReplyWith(...) is one, and socks5srv.testing.faults has more")
        with self.lock:
            fault.armed = Armed(fault, fault.times)
            self.armed.append(fault.armed)

    def clear(self) -> None:
        with self.lock:
            self.taken_away += [armed for armed in self.armed if armed.is_idle]
            self.armed.clear()

    def idle(self) -> List[Armed]:
        """Those that should have struck and have not, those that were taken away among them."""
        with self.lock:
            return [armed for armed in self.taken_away + self.armed if armed.is_idle]

    def striking(self, message: MessageClass, host: str = "") -> Iterator[Fault]:
        """Which of them strike a message that is for this host; each is asked only when its turn has come."""
        for armed in list(self.armed):
            with self.lock:
                strikes = armed.strikes(message, host)
            if strikes:
                yield armed.fault

    def pass_on(self, way: str, octets: bytes, held: Dict[Armed, bytes]) -> List[bytes]:
        """What becomes of a datagram; `held` has those that the link keeps back for now, by fault."""
        try:
            host = Datagram.read(BytesIO(octets)).address.host
        except (ProtocolError, RequestFailed):
            return [octets]             # the relay will know what to think of it
        now = [octets]
        with self.lock:
            for armed in self.armed:
                fault = armed.fault
                if isinstance(fault, DropDatagrams) and fault.way in (way, None):
                    now = [out for one in now for out in self.strike(armed, fault, one, host, held)]
        return now

    def strike(self, armed: Armed, fault: DropDatagrams, octets: bytes, host: str, held: Dict[Armed, bytes]) -> List[bytes]:
        if armed in held:
            return [octets, held.pop(armed)]
        if not armed.strikes(Datagram, host):
            return [octets]
        if isinstance(fault, ReorderDatagrams):
            held[armed] = octets
        return fault.pass_on(octets)
