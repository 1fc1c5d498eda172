"""
``--explain``: every message of every client as the RFC draws it, and why the server decided as it did.

    server.observers += (Tracer(server),)       explains all clients that come from now on

The one idea: an explanation is shown when its message has been received, or just before it is sent, and so
before whatever comes of it: the table of a reply stands in front of the line of its tunnel.  Where it is
shown is up to the sinks: the log, unless others are given.  This is for looking, not for speed.

Not here: how a message is drawn (tables.py), what the decisions are put into words by (reasons.py), and
datagrams, which pass in the relay thread (datagrams.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Deque, Dict, List, Optional, Protocol, Sequence, Type, TypeVar

from ..foreign import ForeignProtocol, Note
from ..gssapi.messages import Abort, LevelToken
from ..observer import Attempt, Observer
from ..protocol import (
    Address, Command, CredentialsReply, Message, MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request,
    Socks5Error,
)
from ..rules import Verdict
from ..session import Session, plural
from . import reasons
from .datagrams import DatagramTrace
from .fields import LAYOUTS, brief, plain_sentence
from .tables import Explanation, broken, explanation, not_socks

if TYPE_CHECKING:
    from ..handler import Socks5Handler
    from ..server import Socks5Server

logger = logging.getLogger("socks5srv.explain")     # every explanation, at INFO


class Sink(Protocol):
    """Where explanations go."""

    def takes(self, session: Session) -> bool: """Whether it is to be explained; asked when it has started."""

    def show(self, session: Session, explanation: Explanation) -> None:
        """
        Called for each message in its order on the wire, in the conversation's thread; for datagrams in another, but
        never in the relay thread; for the end of a tunnel in the one of serve_forever().
        """


class LogSink:
    """The log; a record has its `explanation`."""

    def takes(self, session: Session) -> bool:
        return logger.isEnabledFor(logging.INFO)

    def show(self, session: Session, explanation: Explanation) -> None:
        logger.info("%s\n", explanation, extra={"explanation": explanation})


class Trace:
    """What has been seen of one session, and not shown yet."""

    max_remembered = 100            # verdicts and attempts: callers that BIND does not expect have no end

    def __init__(self, session: Session, sinks: Sequence[Sink]) -> None:
        self.session = session
        self.sinks = sinks
        self.number = 0             # of messages shown
        self.findings: List[str] = []
        self.verdicts: Deque[Verdict] = deque(maxlen=self.max_remembered)
        self.attempts: Deque[Attempt] = deque(maxlen=self.max_remembered)
        self.datagrams: Optional[DatagramTrace] = None      # of a UDP ASSOCIATE
        self.is_open = False
        self.level: Optional[int] = None        # of protection, once it is agreed upon

    def show(self, found: Explanation, number: str = "", at: Optional[float] = None) -> None:
        """Show it as the next message of this session, or with a `number` and a time of its own."""
        if found.fields and not number:
            self.number += 1
            number = str(self.number)
        found.session, found.number = self.session.id, number
        found.at = (time.monotonic() if at is None else at) - self.session.clock
        for sink in self.sinks:
            sink.show(self.session, found)

    def take_findings(self) -> List[str]:
        """All that has been found out since this was asked last: why the reply is what it is."""
        found = [*self.findings, *reasons.about_rules(list(self.verdicts)), *reasons.about_attempts(list(self.attempts))]
        self.findings.clear()
        self.verdicts.clear()
        self.attempts.clear()
        return found

    def note(self, what: str, remark: str, at: Optional[float] = None) -> None:
        self.show(Explanation(f"{'TUNNEL' if self.datagrams is None else 'RELAY'} {what}", remarks=[remark]), at=at)


class Tracer(Observer):
    """Follows sessions, and hands what it has to say about them to its sinks; new ones are for new clients."""

    def __init__(self, server: Socks5Server, sinks: Optional[Sequence[Sink]] = None) -> None:
        self.server = server
        self.sinks: Sequence[Sink] = (LogSink(),) if sinks is None else sinks
        self.traces: Dict[int, Trace] = {}      # by session, while it lasts

    def wants(self, session: Session) -> bool:
        sinks = [sink for sink in self.sinks if sink.takes(session)]
        if sinks:
            self.traces[session.id] = Trace(session, sinks)
        return bool(sinks)

    def opened(self, session: Session, local: Optional[Address]) -> None:
        if not (trace := self.traces.get(session.id)):
            return
        trace.is_open = True
        if trace.datagrams is not None:
            trace.note("OPEN", f"for datagrams from {session.client.host}, at {session.bound}")
        else:
            far = " -> ".join(brief(end) for end in (local, session.peer) if end is not None)
            trace.note("OPEN", f"{brief(session.client)} == proxy == {far}")

    def ended(self, session: Session) -> None:
        trace = self.traces.pop(session.id, None)
        if trace and trace.datagrams is not None:
            trace.datagrams.end()
        if trace and trace.is_open:
            seconds = session.seconds or 0.0
            moved = f"{plural(session.up, 'octet')} to the target, {session.down} back, {seconds * 1000:.1f} ms"
            trace.note("SHUT", f"{moved}, {plain_sentence(session.reason)}", session.clock + seconds)

    # --- messages ---

    def received(self, session: Session, message: Message, octets: bytes, ahead: int) -> None:
        if not (trace := self.traces.get(session.id)):
            return
        found = explanation(message, octets)
        if ahead:
            found.remarks.append(reasons.about_ahead(ahead, isinstance(message, Request)))
        if isinstance(message, Request):
            found.remarks += reasons.about_request(message, by_upstream=session.upstream is not None)
            if message.command is Command.UDP_ASSOCIATE:
                trace.datagrams = DatagramTrace(trace.show)
        found.remarks += reasons.about_level(trace.level)
        trace.show(found)

    def malformed(self, session: Session, kind: Type[Message], octets: bytes, error: Exception, ahead: int) -> None:
        trace = self.traces.get(session.id)
        if trace and octets and kind in LAYOUTS:
            trace.show(about_malformed(session, kind, octets, error, ahead))

    def sending(self, session: Session, message: Message, error: Optional[Socks5Error]) -> None:
        trace = self.traces.get(session.id)
        if trace is None or isinstance(message, Note):      # which is told of with its question
            return
        found = explanation(message)
        found.sender = "proxy"
        if isinstance(message, MethodSelection):
            trusted, has_users = self.server.policy.trusts(session.client), self.server.users is not None
            wanted = error.wanted if isinstance(error, NoAcceptableMethod) else None
            found.remarks += reasons.about_method(message.method, trusted, has_users, wanted, error)
        elif isinstance(message, CredentialsReply):
            user = session.user if message.status == CredentialsReply.SUCCESS else None
            found.remarks += [*trace.take_findings(), *reasons.about_login(user, error)]
        elif isinstance(message, Reply):
            self.explain_reply(trace, message, found, error)
        elif isinstance(message, Abort):
            found.remarks += reasons.about_abort(error)
        found.remarks += reasons.about_level(trace.level)
        trace.show(found)
        if isinstance(message, LevelToken):
            trace.level = message.level

    def explain_reply(self, trace: Trace, message: Reply, found: Explanation, error: Optional[Socks5Error]) -> None:
        session, succeeded = trace.session, message.code == ReplyCode.SUCCEEDED
        first = session.bound is None or message.bound == session.bound
        if session.command is Command.BIND and (succeeded or session.bound is not None):
            found.title = f"REPLY {1 if first and succeeded else 2} of 2"
        if succeeded:
            found.remarks[-1:] = reasons.about_success(session.command, message.bound, first, self.server.bind_timeout)
            found.remarks += trace.take_findings()
        else:
            found.remarks += reasons.about_failure(error, trace.take_findings())

    # --- decisions ---

    def throttled(self, session: Session, seconds: float) -> None:
        if trace := self.traces.get(session.id):
            why = "from its address too many logins have failed"
            trace.findings.append(f"It had to wait {seconds:.2g} s for the answer: {why}.")

    def resolved(self, session: Session, host: str, addresses: Sequence[str], seconds: float, error: Optional[Exception]) -> None:
        if trace := self.traces.get(session.id):
            words = reasons.about_look_up(host, addresses, seconds, error)
            if trace.datagrams is not None:
                trace.datagrams.resolved(words, found=bool(addresses))
            else:
                trace.findings.append(words)

    def judged(self, session: Session, verdict: Verdict) -> None:
        if trace := self.traces.get(session.id):
            if trace.datagrams is not None:
                trace.datagrams.judged(verdict)
            else:
                trace.verdicts.append(verdict)

    def tried(self, session: Session, attempt: Attempt) -> None:
        if trace := self.traces.get(session.id):
            trace.attempts.append(attempt)

    def datagram(self, session: Session, to_client: bool, octets: bytes, outcome: str) -> None:
        trace = self.traces.get(session.id)
        if trace and trace.datagrams is not None:
            trace.datagrams.datagram(to_client, octets, outcome)


def about_malformed(session: Session, kind: Type[Message], octets: bytes, error: Exception, ahead: int) -> Explanation:
    if isinstance(error, ForeignProtocol):
        found = not_socks(octets, str(error))
        told = "It is told so in its own language."
        found.remarks.append("There is no answer that it would understand." if error.answer is None else told)
        return found
    found = broken(kind, octets)
    if session.reason:              # another thread has hung up
        found.remarks.append(f"! {plain_sentence(session.reason)}")
    if isinstance(error, (ProtocolError, OSError)):
        found.remarks.append("There is nothing to answer.")
    if ahead:
        found.remarks.append("What has come behind it is not read.")
    return found


# --- the former seam ---

H = TypeVar("H", bound="Socks5Handler")
ADDING = threading.Lock()


def explained(handler_class: Type[H]) -> Type[H]:
    """A handler class whose first client has its server explain all clients, as ``server.observers += (Tracer(server),)`` does."""
    class Explained(handler_class):     # type: ignore[valid-type, misc]
        def setup(self) -> None:
            with ADDING:
                if not any(isinstance(each, Tracer) for each in self.server.observers):
                    self.server.observers = (*self.server.observers, Tracer(self.server))
            super().setup()

    return Explained
