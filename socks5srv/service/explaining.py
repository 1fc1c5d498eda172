"""
``--explain``: every message of every client as the RFC draws it, and why the server decided as it did.

`explained(handler_class)` is that class, explaining itself.  The messages are overheard where they are
received and sent, and the reasons where they come up: a name looked up, a rule asked, an address tried.
All of it is done by overriding, and the conversation knows nothing of it.

The one idea: an exhibit is shown when its message has been received, or just before it is sent, and so
before whatever comes of it: the table of a reply stands in front of the line of its tunnel.  Whoever
wants to do something else with it than to log it overrides `show()`.

Not here: how a message is drawn and put into words (explain.py), what the decisions are put into words by
(reasons.py), and datagrams, which pass in the relay thread (explaining_udp.py).

This is for looking, not for speed.
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
from typing import Any, Dict, List, Optional, Sequence, Type, TypeVar, cast

from ..datagrams import Association
from ..explain import Exhibit, broken, exhibit, stranger
from ..handler import ClientStream, Socks5Handler
from ..meanings import KINDS, brief, counted, plain_sentence
from ..outbound import UNDER_WAY, Route
from ..protocol import (
    Address, AddressType, Command, CredentialsReply, Message, Method, MethodSelection, ProtocolError,
    Reply, ReplyCode, Request, RequestFailed, Socks5Error,
)
from ..server import Socks5Server
from ..strangers import Note, Stranger
from . import reasons
from .explaining_udp import overhear, turned_into

logger = logging.getLogger("socks5srv.explain")     # every exhibit, at INFO


class Overheard(ClientStream):
    """What the client sends; what has been read of it is kept until it has been shown."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.heard = b""

    def read(self, n: int = -1, /) -> bytes:
        octets = super().read(n)
        self.heard += octets
        return octets

    def take_heard(self) -> bytes:
        octets, self.heard = self.heard, b""
        return octets


class Explaining(Socks5Handler):
    """Mixed in in front of a handler class; see explained()."""

    trouble: Optional[Socks5Error] = None       # what refuse() is about to answer
    stands = False                              # a tunnel, or a relay for datagrams
    relayed: Optional[Association] = None

    def setup(self) -> None:
        self.numbers = itertools.count(1)
        self.findings: List[str] = []           # why the next reply will be what it is
        self.judgements: List[reasons.Judgement] = []
        self.tries: List[Try] = []
        self.looked_up = ""                     # what has just been found for a datagram
        super().setup()
        self.stream = Overheard(self.connection)

    def show(self, exhibit: Exhibit) -> None:
        """
        Called for each message in its order on the wire, in the conversation's own thread; for datagrams in
        another, but never in the relay thread.  For the end of a tunnel it is the one of session_ended().
        """
        logger.info("%s\n", exhibit, extra={"exhibit": exhibit})

    def show_now(self, exhibit: Exhibit, number: str = "", at: Optional[float] = None) -> None:
        """Show it as the next message of this session, or with a `number` and a time of its own."""
        exhibit.session = self.session.id
        exhibit.at = (time.monotonic() if at is None else at) - self.session.clock
        if exhibit.fields or number:
            exhibit.number = number or str(next(self.numbers))
        self.show(exhibit)

    # --- the two choke points ---

    def receive(self, message: Any) -> Any:
        try:
            received = super().receive(message)
        except (Socks5Error, OSError) as error:
            self.show_broken(message, error)
            raise
        found = exhibit(received, self.take_heard() or None)
        found.remarks += self.about_received(received)
        self.show_now(found)
        return received

    def send(self, message: Message) -> None:
        if not isinstance(message, Note):       # that answer is told of with its question
            found = exhibit(message)
            found.sender, found.receiver = "proxy", "client"
            self.explain_sent(message, found)
            self.show_now(found)
        super().send(message)

    def take_heard(self) -> bytes:
        return self.stream.take_heard() if isinstance(self.stream, Overheard) else b""

    def turn_strangers_away(self) -> None:
        try:
            super().turn_strangers_away()
        except Stranger as error:
            found = stranger(self.stream.buffer, str(error))
            found.remarks.append("It is told so in its own language." if error.answer is not None else "There is no answer that it would understand.")
            self.show_now(found)
            raise

    def show_broken(self, message: Type[Message], error: Exception) -> None:
        octets = self.take_heard()
        if not octets or message not in KINDS:
            return
        found = broken(message, octets)
        if self.session.reason:                 # hang_up() has been called
            found.remarks.append(f"! {plain_sentence(self.session.reason)}")
        if isinstance(error, (ProtocolError, OSError)):
            found.remarks.append("There is nothing to answer.")
        if self.stream.buffer:
            found.remarks.append("What has come behind it is not read.")
        self.show_now(found)

    def about_received(self, message: Message) -> List[str]:
        """What else there is to say about a message of the client's."""
        found = reasons.about_request(message, self.goes_on_by_name) if isinstance(message, Request) else []
        if self.stream.buffer:
            # Not how much it is: behind a greeting that may be a login, and tell how long the password is.
            much = counted(len(self.stream.buffer), "octet") if isinstance(message, Request) else "more"
            found.insert(0, f"! {much} came ahead of the answer, which RFC 1928 has the client wait for (accepted: kept for later)")
        return found

    @property
    def goes_on_by_name(self) -> bool:
        """Whether names are left to an upstream."""
        return hasattr(self, "upstream")

    def explain_sent(self, message: Message, found: Exhibit) -> None:
        """Add why it is sent."""
        if isinstance(message, MethodSelection):
            found.remarks += self.why_method(message.method)
        elif isinstance(message, CredentialsReply):
            found.remarks += self.take_findings()
            found.remarks += reasons.about_login(self.session.user if message.status == CredentialsReply.SUCCESS else None, self.trouble)
        elif isinstance(message, Reply):
            self.explain_reply(message, found)

    # --- why: the method ---

    def why_method(self, method: int) -> List[str]:
        if method not in (self.wanted_method(), Method.NO_ACCEPTABLE_METHODS):
            return []                           # select_method() has its own reasons
        return reasons.about_method(method, self.wanted_method(), self.server.trusts(self.session.client), self.trouble)

    def authenticate_unhurried(self, username: str, password: str) -> bool:
        seconds = self.server.guessing.wait(self.session.client.host)
        if seconds:
            self.findings.append(f"It had to wait {seconds:.2g} s for the answer: from its address too many logins have failed.")
        return super().authenticate_unhurried(username, password)

    def refuse(self, error: Socks5Error) -> None:
        self.trouble = error
        super().refuse(error)

    # --- why: the reply ---

    def perform(self, request: Request) -> None:
        # The route is asked for each socket; only the server has it, so the handler sees the server with another.
        server = self.server
        self.server = cast(Socks5Server, Behind(server, WatchedRoute.of(server.route, self.tries)))
        try:
            super().perform(request)
        finally:
            self.server = server

    def resolved(self, host: str, hosts: Sequence[str], began: float, error: Optional[Exception] = None) -> None:
        words = reasons.about_look_up(host, hosts, time.monotonic() - began, error)
        if self.session.command is Command.UDP_ASSOCIATE:
            self.looked_up = words              # which the association fetches at once
        else:
            self.findings.append(words)
        super().resolved(host, hosts, began, error)

    def refusal(self, command: Command, address: Address, name: Optional[str] = None) -> str:
        try:
            reason = super().refusal(command, address, name)
        except RequestFailed as error:          # of an allow() that has its own words
            self.judgements.append(reasons.Judgement(address, str(error)))
            raise
        self.judgements.append(reasons.Judgement(address, reason, "" if reason else self.rule_for(address, name)))
        return reason

    def rule_for(self, address: Address, name: Optional[str]) -> str:
        """The rule that has allowed it; empty if there is none."""
        by_name = address.address_type is AddressType.DOMAINNAME
        rule = self.rule_for_name(address) if by_name else self.server.rules.decide(address, name)
        return rule.text if rule is not None else ""

    def take_findings(self) -> List[str]:
        """All that has been found out since this was asked last."""
        found, self.findings = self.findings, []
        found += reasons.about_rules(self.judgements) + reasons.about_tries([attempt.told() for attempt in self.tries])
        self.judgements, self.tries[:] = [], []
        return found

    def explain_reply(self, message: Reply, found: Exhibit) -> None:
        bind = self.session.command is Command.BIND
        first = self.session.bound is None or message.bound == self.session.bound
        if bind and (message.code == ReplyCode.SUCCEEDED or self.session.bound is not None):
            found.title = f"REPLY {1 if first and message.code == ReplyCode.SUCCEEDED else 2} of 2"
        if message.code == ReplyCode.SUCCEEDED:
            found.remarks[-1:] = reasons.about_success(self.session.command, message.bound, first, self.server.bind_timeout)
        else:
            found.remarks.append(f"Why: {plain_sentence(str(self.trouble))}." if self.trouble is not None else "Why: a bug, which the log tells of.")
        found.remarks += self.take_findings()
        if message.code != ReplyCode.SUCCEEDED:
            found.remarks.append("BND.ADDR and BND.PORT say nothing then, but clients wait for them.")
            found.remarks += reasons.what_clients_print(message.code)

    # --- the tunnel ---

    def relay(self, target: socket.socket) -> None:
        ends = [brief(end) for end in (self.session.client, end_of(target), self.session.peer) if end is not None]
        self.note("TUNNEL OPEN", " == proxy == ".join([ends[0], " -> ".join(ends[1:])]))
        super().relay(target)

    def association(self) -> Association:
        self.relayed = overhear(super().association(), self)
        return self.relayed

    def note(self, title: str, text: str, at: Optional[float] = None) -> None:
        self.stands = True
        self.show_now(Exhibit(title, remarks=[text]), at=at)

    def session_ended(self) -> None:
        if self.stands:
            self.show_end()
        super().session_ended()

    def show_end(self) -> None:
        session = self.session
        if self.relayed is not None:
            self.relayed.told()     # type: ignore[attr-defined]
        seconds = session.seconds or 0.0
        self.note(
            "RELAY SHUT" if self.relayed is not None else "TUNNEL SHUT",
            f"{counted(session.up, 'octet')} to the target, {session.down} back, {seconds * 1000:.1f} ms, {plain_sentence(session.reason)}",
            at=session.clock + seconds,
        )


def end_of(target: socket.socket) -> Optional[Address]:
    """Our end of the connection to the target, which may be over already."""
    try:
        return Address.of(target.getsockname())
    except OSError:
        return None


# --- the addresses that are tried ---

class Try:
    """One address, and what became of it."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.began = time.monotonic()
        self.seconds: Optional[float] = None
        self.code: Optional[int] = None         # an errno, 0 for success; None if it has not been waited for
        self.reason = ""                        # if there was not even a socket

    def end(self, code: int) -> None:
        if code not in UNDER_WAY and self.code is None:
            self.code, self.seconds = code, time.monotonic() - self.began

    def told(self) -> reasons.Attempt:
        return reasons.Attempt(self.place, self.code, self.seconds, self.reason)


class WatchedSocket(socket.socket):
    """One that tells how connecting it went."""

    attempt: Try

    def connect_ex(self, address: Any, /) -> int:
        code = super().connect_ex(address)
        self.attempt.end(code)
        return code

    def getsockopt(self, *option: Any) -> Any:
        value = super().getsockopt(*option)
        if option == (socket.SOL_SOCKET, socket.SO_ERROR):
            self.attempt.end(value)
        return value


class WatchedRoute(Route):
    """A route whose sockets for TCP are watched."""

    route: Route
    tries: List[Try]

    @classmethod
    def of(cls, route: Route, tries: List[Try]) -> WatchedRoute:
        watched = cls(*route)
        watched.route, watched.tries = route, tries
        return watched

    def udp(self, sockaddr: Any) -> socket.socket:
        return self.route.udp(sockaddr)

    def socket(self, address: Address, kind: int = socket.SOCK_STREAM) -> socket.socket:
        if kind != socket.SOCK_STREAM:
            return self.route.socket(address, kind)
        attempt = Try(brief(address))
        self.tries.append(attempt)
        try:
            sock = self.route.socket(address, kind)
        except (OSError, RequestFailed) as error:
            attempt.reason = getattr(error, "strerror", None) or str(error)
            raise
        watched = turned_into(WatchedSocket, sock)
        watched.attempt = attempt
        return watched


class Behind:
    """The server as one handler sees it: with another route."""

    def __init__(self, server: Socks5Server, route: Route) -> None:
        vars(self).update(_server=server, route=route)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_server"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_server"], name, value)


# --- the seam ---

H = TypeVar("H", bound=Socks5Handler)

CLASSES: Dict[type, type] = {}      # what explained() has made


def explained(handler_class: Type[H]) -> Type[H]:
    """
    The handler class, with `Explaining` mixed in in front; always the same one for the same class.

    ``server.RequestHandlerClass = explained(server.RequestHandlerClass)`` explains all clients that come from now on.
    """
    if issubclass(handler_class, Explaining):
        return handler_class
    if handler_class not in CLASSES:
        CLASSES[handler_class] = type(f"Explained{handler_class.__name__}", (Explaining, handler_class), {})
    return CLASSES[handler_class]
