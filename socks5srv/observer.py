"""
The hooks by which a session is watched: by the log, metrics, explanations, tests.

    class Counter(Observer):
        def ended(self, session):
            self.octets += session.up + session.down

    server.observers += (Counter(),)

The one idea: an observer decides nothing.  It is told what happens where it happens, and each hook is
optional: those that are not overridden cost nothing.  A hook that raises is logged as a bug, and costs
the client nothing.

Not here: what may be decided, which is done by overriding a method of the handler.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple, Type

from .protocol import Address, Message, Method, Socks5Error
from .rules import Verdict
from .session import Session

logger = logging.getLogger("socks5srv")         # a session at its success reply, at DEBUG
wire = logging.getLogger("socks5srv.wire")      # every message, at DEBUG


class Attempt(NamedTuple):
    """
    One address to which a connection was tried.

    `error` is None if it was made, or if another was made first: then `connected` tells them apart.
    """

    address: Address
    started: float                      # by time.monotonic()
    seconds: Optional[float] = None     # that it took; None if not even a socket could be made for it
    error: Optional[Exception] = None
    connected: bool = False


class Observer:
    """
    What can be told of a session.  `session` is the client's record, already up to date.

    Called in the conversation's thread, unless it says otherwise.
    """

    def wants(self, session: Session) -> bool:
        """Whether it wants to be told of this client, which has just come."""
        return True

    def started(self, session: Session) -> None:
        """The client has been accepted and counted."""

    def received(self, session: Session, message: Message, octets: bytes, ahead: int) -> None:
        """A whole message, which was these octets; `ahead` further octets lie behind it."""

    def malformed(self, session: Session, kind: Type[Message], octets: bytes, error: Exception, ahead: int) -> None:
        """These octets came in place of such a message, and then its end, or what cannot be in one."""

    def sending(self, session: Session, message: Message, error: Optional[Socks5Error]) -> None:
        """This is about to be sent; `error` is what it answers."""

    def throttled(self, session: Session, seconds: float) -> None:
        """A login has to wait: too many have failed from this address."""

    def authenticated(self, session: Session, method: Method, error: Optional[Socks5Error]) -> None:
        """A method has been carried out: the client is in, or there is an error."""

    def resolved(self, session: Session, host: str, addresses: Sequence[str], seconds: float, error: Optional[Exception]) -> None:
        """A name has been looked up.  For UDP in the relay thread: it must not block."""

    def judged(self, session: Session, verdict: Verdict) -> None:
        """An address may be reached, or may not.  For UDP in the relay thread: it must not block."""

    def tried(self, session: Session, attempt: Attempt) -> None:
        """An address has been tried."""

    def opened(self, session: Session, local: Optional[Address]) -> None:
        """The last success reply is sent: a tunnel or a UDP relay stands; `local` is our end of the target's connection."""

    def datagram(self, session: Session, to_client: bool, octets: bytes, outcome: str) -> None:
        """
        A datagram has come from the client's side, or goes to it, header included; `outcome` is what became of it, in a sentence.

        In the relay thread: it must not block.  To be told of datagrams makes them slower.
        """

    def ended(self, session: Session) -> None:
        """The session is over and complete: once for each one that has started, in the thread of serve_forever()."""

    def turned_away(self, client: Address, reason: str) -> None:
        """A client has not been let in; it has no session."""

    def accept_failed(self, error: OSError) -> None:
        """accept() has failed."""


HOOKS = tuple(name for name in vars(Observer) if not name.startswith("_") and name != "wants")

Hook = Tuple[Callable[..., None], ...]
NONE: Hook = ()


class Hooks:
    """For each hook the methods to call."""

    started = received = malformed = sending = throttled = authenticated = resolved = judged = NONE
    tried = opened = datagram = ended = turned_away = accept_failed = NONE

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        observers = tuple(observers)
        for name in HOOKS:
            base = getattr(Observer, name)
            methods = tuple(guarded(getattr(each, name)) for each in observers if getattr(type(each), name) is not base)
            if methods:
                setattr(self, name, methods)

def guarded(method: Callable[..., None]) -> Callable[..., None]:
    """The same, but its exceptions are logged."""
    def call(*arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:
            logger.exception("unhandled exception in an observer")

    return call


def wanted(observer: Observer, session: Session) -> bool:
    """Whether an observer wants a client; one that raises does not."""
    try:
        return observer.wants(session)
    except Exception:
        logger.exception("unhandled exception in an observer")
        return False


# --- the documented loggers ---

class SessionLog(Observer):
    """A line for each session at its success reply."""

    def opened(self, session: Session, local: Optional[Address]) -> None:
        logger.debug("%s", session, extra={"session": session})


class WireLog(Observer):
    """A line for each message."""

    def received(self, session: Session, message: Message, octets: bytes, ahead: int) -> None:
        wire.debug("#%d < %s", session.id, message)

    def sending(self, session: Session, message: Message, error: Optional[Socks5Error]) -> None:
        wire.debug("#%d > %s", session.id, message)


class HookTable:
    """The hooks for the clients of a server: made once for those observers that want the same clients, and not for each client."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers = tuple(observers)
        self.selective = [each for each in self.observers if type(each).wants is not Observer.wants]
        self.made: Dict[Tuple[Any, ...], Hooks] = {}
        self.all = Hooks(self.observers)        # for what is told of no session

    def of(self, session: Session) -> Hooks:
        """Those of the observers that want this session, and of the loggers as far as they listen now."""
        sessions, messages = logger.isEnabledFor(logging.DEBUG), wire.isEnabledFor(logging.DEBUG)
        if not (self.selective or sessions or messages):
            return self.all
        unwanted = tuple(each for each in self.selective if not wanted(each, session))
        key = (unwanted, sessions, messages)
        if key not in self.made:
            logs = [SessionLog()] * (sessions or messages) + [WireLog()] * messages
            self.made[key] = Hooks([*(each for each in self.observers if each not in unwanted), *logs])
        return self.made[key]
