"""
One client, from its greeting to the hand-over: `Socks5Handler`.

It is a `socketserver` handler, to be used and extended like any other:

    class Office(Socks5Handler):
        def allow(self, command, address):
            return address.port != 25

`handle()` is the table of contents of RFC 1928; the methods follow in the order in which they
are called.  A handler talks in a thread of its own and may block as it likes.  Once a tunnel
stands it hands both sockets to the relay thread (relay.py) and is free for the next client.

The one idea: a failure is raised where it is noticed, carries its answer, and is answered in
one place, `_refuse()`.  After a success reply nothing is answered any more: it would land in the
middle of the target's data.

Not here: the octets (protocol.py), how to reach a target (resolver.py, outbound.py), who may log in (users.py),
what may be reached (policy.py), and how many clients are served (registry.py).
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import threading
import time
from contextlib import suppress
from enum import Enum
from typing import Any, Callable, FrozenSet, List, Optional, Protocol, Sequence, Tuple, Type, TypeVar, Union

from . import foreign, outbound, resolver
from .datagrams import Association
from .descriptors import COMMANDS, USED_UP, descriptors, on_error
from .listener import OUT_OF, RETRY
from .observer import Attempt, Hooks, HookTable
from .outbound import ClientGone, Route
from .policy import Policy
from .protocol import (
    UNSPECIFIED, VER, Address, Command, Credentials, CredentialsReply, Greeting, LoginFailed, Message, Method,
    MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed, Socks5Error, UnknownCommand,
)
from .ratelimit import RateLimit, and_more
from .proxyprotocol import ForwardedAddress
from .registry import Registry
from .relay import READ, Coded, CodedTunnel, Relay, Tunnel, broken, tune
from .rules import Rules, Verdict
from .session import Session
from .users import Users

logger = logging.getLogger("socks5srv")         # a session at its end: INFO

M = TypeVar("M", bound=Message)

AUTH = {method: f"auth_{method.name}" for method in Method}
DO = {command: f"do_{command.name}" for command in Command}

LOOK = 1.0          # seconds between two looks whether a client still waits for its turn to log in
LINGER = 1.0        # seconds that a refused client has to take its reply and hang up
EARLY = 64 * 1024   # octets that a client may send ahead while BIND waits for its peer


class Host(Protocol):
    """What a handler asks of its server; server.py is one."""

    policy: Policy
    rate_limit: RateLimit
    registry: Registry[Socks5Handler]
    route: Route
    users: Optional[Users]
    rules: Rules
    commands: FrozenSet[Command]
    connect_timeout: float
    bind_timeout: float
    idle_timeout: Optional[float]
    reassemble: bool
    upstream: Any
    gssapi: Any
    hooks: HookTable

    def relay_thread(self) -> Relay: ...
    def warn_once(self, kind: str, message: str, *details: object) -> None: ...
    def shutdown_request(self, request: Any, /) -> None: ...


class Stage(Enum):
    """How far a conversation is, as for what may still be answered."""

    NEGOTIATING = 1     # a failure gets its reply
    REPLIED = 2         # the last reply is sent: nothing is answered any more
    HANDED_OVER = 3     # the sockets are the relay thread's


class ClientStream:
    """
    What the client sends, as a binary stream; and where it is answered.

    One recv() usually brings a whole message, and may bring more; what it brings beyond the
    message at hand stays in `buffer`, for the next message or for the target.
    """

    consumed = b""      # of the message at hand, if there are observers to be shown it

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""

    def read(self, n: int, /) -> bytes:
        """`n` octets, or fewer if the client has ended."""
        while len(self.buffer) < n and self.fill():
            pass
        octets, self.buffer = self.buffer[:n], self.buffer[n:]
        return octets

    def fill(self) -> bool:
        """Wait for more; False if there is none to come.  ClientGone if the connection has broken."""
        try:
            octets = self.connection.recv(4096)
        except OSError as error:
            raise ClientGone(broken("client", error)) from error
        self.buffer += octets
        return bool(octets)

    def take(self) -> bytes:
        """All that has come too early."""
        octets, self.buffer = self.buffer, b""
        return octets

    def write(self, octets: bytes) -> None:
        """Send them.  ClientGone if the connection has broken."""
        try:
            self.connection.sendall(octets)
        except OSError as error:
            raise ClientGone(broken("client", error)) from error


class ObservedStream(ClientStream):
    """The same, which keeps the octets of the message at hand for the observers."""

    def read(self, n: int, /) -> bytes:
        octets = super().read(n)
        self.consumed += octets
        return octets


class Socks5Handler(socketserver.StreamRequestHandler):
    """
    The conversation with one client.

    May be overridden, each called in the conversation's own thread unless it says otherwise (as in socketserver, a
    misspelt method is never called):

    - authenticate(username, password) -> bool
    - allow(command, address) -> bool
    - resolve(host) -> list of str, or a str
    - connect(request) -> socket
    - relay(target)
    - session_ended()
    - select_method(offered) -> Method, with a method ``auth_<METHOD>() -> str`` (the user's name) for each that is its own
    - perform(request), which calls ``do_<COMMAND>(request)``; ``do_BIND = None`` in a subclass switches BIND off

    These call receive(kind) -> message, send(message), succeed(bound) and open_tunnel(target, bound).  They raise
    RequestFailed or LoginFailed, which become replies.  What socketserver documents (setup(), handle(), finish()) is
    overridden as there.

    For the other modules: close(), hang_up(), here(), judge(), linger(), look_up_of(), resolved(), `asks_for_login`, `hooks`, `reported`.

    Attributes:
        session: the record of this client, a Session
        server: the Socks5Server
        client_address: as accept() has it; of a client that has come by a balancer, what that has said
        connection: the client's socket
        stream: what the client sends; ``stream.take()`` is what it has sent ahead
    """

    asks_for_login = False          # whether no client gets in without one, users or not, but from trusted networks
    server: Host                    # type: ignore[assignment]  # that is all it asks of it
    connection: socket.socket
    hooks = Hooks()                 # those of the server when the client came; none before setup()
    _stage = Stage.NEGOTIATING
    _answered: Optional[Socks5Error] = None     # what the message that is sent is the answer to
    _tunnel: Union[Tunnel, Association, None] = None    # what the relay thread has, once it is handed over
    _turn: Optional[threading.Event] = None     # to try a login, which it waits for; set by hang_up(), too
    _reserved = 0                   # descriptors beyond those of every client
    _client_coded: Optional[Coded] = None       # how what follows the last reply is coded, if it is: by the client,
    _target_coded: Optional[Coded] = None       # and by the target
    reported = False                # session_ended() has been called, or will soon be

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """As the base has it, but finish() follows a setup() that has failed, too: the client has a place to give back."""
        self.request, self.client_address, self.server = request, client_address, server
        self.session = Session(server.registry.next_id(), Address.of(client_address))
        if isinstance(client_address, ForwardedAddress):
            self.session.via, self.session.probe = client_address.via, client_address.header.local
        try:
            self.setup()
            self.handle()
        finally:
            self.finish()

    def setup(self) -> None:
        # Not the base's rfile and wfile: a buffered file would swallow early data, and
        # after one timeout never be readable again.
        self.connection = self.request
        self.hooks = self.server.hooks.of(self.session)     # it keeps those it has begun with
        self.stream = (ObservedStream if self.hooks.received or self.hooks.malformed else ClientStream)(self.connection)
        for started in self.hooks.started:      # before its place may be given to another
            started(self.session)
        self.server.registry.add(self)

    def handle(self) -> None:
        try:
            self.session.user = self._negotiate()
            request = self.receive(Request)
            self.server.registry.request_complete(self)
            self.perform(request)
        except Socks5Error as error:
            self._refuse(error)
        except OSError as error:
            self.session.end(error.strerror or str(error))
        except Exception:           # a bug, of an overridden method for instance: handle_error() will tell
            if self.session.command is not None:
                self._refuse(RequestFailed(ReplyCode.GENERAL_FAILURE, "internal error"))
            raise

    def finish(self) -> None:
        if self._stage is not Stage.HANDED_OVER:
            self.session.end()
            self.server.shutdown_request(self.request)      # before its place is given to another
            self.close()

    # --- method negotiation: RFC 1928 section 3 ---

    def _negotiate(self) -> str:
        """Agree on a method and carry it out.  The user's name; empty if none was asked for."""
        self._reject_foreign()
        greeting = self.receive(Greeting)
        method = self.select_method(greeting.methods)
        if method is Method.NO_ACCEPTABLE_METHODS:
            raise NoAcceptableMethod(self._why_no_method(greeting.methods), self._wanted_method())
        self.send(MethodSelection(method))
        return self._carry_out(method)

    def _carry_out(self, method: Method) -> str:
        """The user's name that auth_<METHOD>() finds."""
        authenticate: Callable[[], str] = getattr(self, AUTH[method])
        if not self.hooks.authenticated:
            return authenticate()
        error: Optional[LoginFailed] = None
        try:
            user = authenticate()
        except LoginFailed as failed:
            error = failed
        for authenticated in self.hooks.authenticated:
            authenticated(self.session, method, error)
        if error is not None:
            raise error
        return user

    def select_method(self, offered: Sequence[int]) -> Method:
        """Choose among the methods that the client offers, or NO_ACCEPTABLE_METHODS."""
        wanted = self._wanted_method()
        return wanted if wanted in offered else Method.NO_ACCEPTABLE_METHODS

    def _wanted_method(self) -> Method:
        """With a password if there are users, or a subclass that knows some; not for trusted networks."""
        if self.server.policy.trusts(self.session.client):
            return Method.NO_AUTHENTICATION_REQUIRED
        if self.server.users is not None or type(self).authenticate is not Socks5Handler.authenticate:
            return Method.USERNAME_PASSWORD
        return Method.NO_AUTHENTICATION_REQUIRED

    def _why_no_method(self, offered: Sequence[int]) -> str:
        """Why none of these methods will do, and what to change."""
        wanted = self._wanted_method()
        if wanted in offered:       # select_method() has reasons of its own
            return "none of the methods that the client offers will do"
        if wanted is Method.USERNAME_PASSWORD:
            return "the client offers no password: set one in it (browsers cannot; --allow-from serves them without)"
        if Method.USERNAME_PASSWORD not in offered:
            return "the client offers no method that is known here: have it offer no authentication"
        if self.server.users is not None:
            return "the client offers only a password, and its network (--allow-from) needs none: have it offer no authentication"
        return "the client offers only a password, and there are no users: start with -u NAME, or have it offer no authentication"

    def _reject_foreign(self) -> None:
        """Tell a client that does not speak SOCKS5 what it has found."""
        if (self.stream.buffer or self.stream.fill()) and self.stream.buffer[0] == VER:
            return
        error = self._identify()
        for malformed in self.hooks.malformed:
            malformed(self.session, Greeting, self.stream.buffer, error, 0)
        raise error

    def _identify(self) -> ProtocolError:
        """What client has begun like this."""
        if not self.stream.buffer:
            return ProtocolError("the client closed the connection before sending anything")
        while foreign.unsettled(self.stream.buffer) and self.stream.fill():
            pass
        here, policy = Address.of(self.connection.getsockname()), self.server.policy
        if isinstance(self.client_address, ForwardedAddress):       # which knows the balancer, and not us
            here = self.client_address.header.destination or here
        return foreign.identify(self.stream.buffer, here, pac=policy.serves_others or policy.is_here(self.session.client.zoned))

    def auth_NO_AUTHENTICATION_REQUIRED(self) -> str:
        """Nothing is asked, so the user has no name."""
        return ""

    def auth_USERNAME_PASSWORD(self) -> str:
        """RFC 1929.  Returns the user's name or raises: no request is read without one."""
        credentials = self.receive(Credentials)
        try:
            username, password = credentials.username.decode(), credentials.password.decode()
        except UnicodeDecodeError as error:
            raise LoginFailed("credentials that are not UTF-8", repr(credentials.username)) from error
        self.session.user = username    # before it is looked at: the user may be removed meanwhile
        self.server.registry.login_begins(self)
        try:
            if not self._authenticate_throttled(username, password):
                raise LoginFailed("wrong name or password", username)
        finally:
            self.server.registry.login_over(self)
        self.send(CredentialsReply(CredentialsReply.SUCCESS))
        return username

    def authenticate(self, username: str, password: str) -> bool:
        """Whether this is a user; OSError if that cannot be known now.  The default asks the server's `users`."""
        users = self.server.users
        return users is not None and users.check_for(self._still_there, username, password)

    def _still_there(self) -> None:
        """ClientGone if another thread has hung up on the client: nothing more is to be done for it."""
        if self.session.reason:
            raise ClientGone(self.session.reason)

    def _authenticate_throttled(self, username: str, password: str) -> bool:
        """authenticate(), for which a client that has failed too often has to wait; its tries take turns."""
        if self.session.probe:          # a check that is set up wrong: nobody guesses, and to wait would make it fail for another reason
            return self.authenticate(username, password)
        throttle, host = self.server.policy.throttle, self.session.client.host
        self._turn = throttle.begin(host)
        try:
            self._await_turn()
            self._await_delay(throttle.delay(host))
            right = self.authenticate(username, password)
            (throttle.succeeded if right else throttle.failed)(host)
            return right
        finally:
            throttle.end(host, self._turn)

    def _await_turn(self) -> None:
        """ClientGone if the client has left, or hang_up() has been called, meanwhile."""
        while self._turn is not None:
            over = self._turn.wait(LOOK)
            outbound.wait({}, self.connection, time.monotonic())
            if over:
                return

    def _await_delay(self, seconds: float) -> None:
        if seconds:
            for throttled in self.hooks.throttled:
                throttled(self.session, seconds)
            outbound.wait({}, self.connection, time.monotonic() + seconds)

    # --- commands: RFC 1928 sections 4 and 6 ---

    def perform(self, request: Request) -> None:
        """Carry out the request, by the method that is named like its command."""
        self.session.command, self.session.destination = request.command, request.destination
        do = getattr(self, DO[request.command], None)
        if do is None or request.command not in self.server.commands:
            raise RequestFailed(ReplyCode.COMMAND_NOT_SUPPORTED, f"{request.command.name} is switched off")
        number = COMMANDS.get(request.command, 0)       # of descriptors beyond those of every client
        if number and not descriptors.take(number):
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, USED_UP)
        self._reserved = number
        do(request)

    def do_CONNECT(self, request: Request) -> None:
        """A tunnel to the destination."""
        with outbound.errors_as_replies(request.destination):
            target = self.connect(request)
        self.open_tunnel(target, self.session.bound or Address.of(target.getsockname()))

    def do_BIND(self, request: Request) -> None:
        """Listen for one connection from the destination: two replies, then a tunnel."""
        until = time.monotonic() + self.server.bind_timeout
        expected = self._expected_peers(request, until)
        with outbound.errors_as_replies(request.destination):
            host, told = self._bind_host(expected)
            listener = self.server.route.listener(host)
        with listener:
            self.succeed(Address.numeric(told, listener.getsockname()[1]))      # and it listens already
            target, peer = self._await_peer(listener, expected, until)
        self.session.peer = peer
        self.open_tunnel(target, peer)

    def do_UDP_ASSOCIATE(self, request: Request) -> None:
        """A relay for datagrams, which lives as long as this connection.  RFC 1928 section 7."""
        # DST, where the client will send from, is taken at its word if it names the client's own host and a port.
        # Behind NAT it is wrong, and many write zeros or nonsense: the connection's own peer is the better witness then.
        with outbound.errors_as_replies("UDP relay"):
            association = self._association()
        with on_error(association.close):
            for address in association.addresses:
                self.server.policy.relays.add(address)
            self.succeed(association.bound)
            self._opened(None)
        self._tunnel, self._stage = association, Stage.HANDED_OVER
        association.start(self.connection)

    def _association(self) -> Association:
        """The relay for do_UDP_ASSOCIATE, not started yet."""
        return Association(self, self.server.relay_thread(), self.here(), self.server.route, self.server.reassemble)

    def here(self) -> str:
        """Our address for the client, with its zone: where it has come, or, if a balancer has, where packets to the client leave from."""
        if Address.of(self.connection.getpeername()).host == self.session.client.host:
            return Address.of(self.connection.getsockname()).zoned
        return outbound.local_address_towards(self.session.client, Route(socket_factory=self.server.route.socket_factory))

    # --- decisions ---

    def allow(self, command: Command, address: Address) -> bool:
        """
        Whether `command` may reach `address`; refused with reply 02.

        Asked for the destination as the client wrote it, then for each IP address that its
        name has, and for the peer that calls back to BIND.  For UDP ASSOCIATE it is asked for each
        new destination of a datagram, in the relay thread: it must not block then.
        """
        return True

    def resolve(self, host: str) -> Sequence[str]:
        """
        The IP addresses of a host as text, best first (a zone as a number: ``fe80::1%2``), or one as a str; OSError if it has none.

        Called in a thread of its own and may block: when time is up, the client gets its reply without it.
        """
        look_up = resolver.look_up_as_it_is if self.server.rules.speak_of_names else resolver.look_up
        return look_up(host, self.server.route.family)

    def connect(self, request: Request) -> socket.socket:
        """
        A TCP socket connected to the request's destination; RequestFailed if there is none.

        Where the client is to be told another address than the socket's own, it is set as `self.session.bound`.
        """
        until = time.monotonic() + self.server.connect_timeout
        target, self.session.peer = self._dial(self._addresses(request, until), until)
        return target

    def _dial(self, addresses: List[Address], until: float) -> Tuple[socket.socket, Address]:
        """A connection to one of these, and to which; of each that is tried the observers are told."""
        return outbound.connect(addresses, self.server.route, self.connection, until, self._tell_tried if self.hooks.tried else None)

    def _tell_tried(self, attempt: Attempt) -> None:
        for tried in self.hooks.tried:
            tried(self.session, attempt)

    def _addresses(self, request: Request, until: float) -> List[Address]:
        """Where the destination can be reached, as far as it is allowed; never empty."""
        literal = request.destination.literal
        if literal is not None:
            address = literal.dialled.on_the_link_of(self.session.client)
            self._check(request.command, address)
            return [address]
        found, name = self._look_up(request, until), request.destination.host
        verdicts = [self.judge(request.command, address, name) for address in found]
        allowed = [verdict.address for verdict in verdicts if verdict.allowed]
        if not allowed:
            raise RequestFailed(ReplyCode.NOT_ALLOWED, verdicts[0].reason)
        return allowed

    def _look_up(self, request: Request, until: float) -> List[Address]:
        """The addresses of a name; RequestFailed if it has none, or may not be asked for."""
        destination = request.destination
        self._check(request.command, destination)
        with outbound.errors_as_replies(destination):
            hosts = self._ask_resolver(destination.host, until)
        found = outbound.interleave(Address.numeric(host, destination.port).dialled for host in hosts)
        if not found:
            raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{destination.host} has no address")
        return found

    def _ask_resolver(self, host: str, until: float) -> Sequence[str]:
        """resolve(), in time."""
        began = time.monotonic()
        try:
            hosts = resolver.in_time(self.look_up_of(host), self.connection, until)
        except Exception as error:
            self.resolved(host, (), began, error)
            raise
        self.resolved(host, hosts, began)
        return hosts

    def look_up_of(self, host: str) -> resolver.LookUp:
        """What to ask the resolver; clients share it only if no override makes an answer of its own."""
        ordinary = type(self).resolve is Socks5Handler.resolve
        name = host.lower() if host.isascii() else host     # lower() makes a final sigma, which is a letter of its own
        question = name, self.server.route.family, self.server.rules.speak_of_names
        return resolver.LookUp(self.resolve, host, self.session.client.host, question if ordinary else None)

    def resolved(self, host: str, hosts: Sequence[str], began: float, error: Optional[Exception] = None) -> None:
        """Tell the observers that a name has been looked up, or could not be; it `began` at this `time.monotonic()`."""
        for resolved in self.hooks.resolved:
            resolved(self.session, host, hosts, time.monotonic() - began, error)

    def _check(self, command: Command, address: Address) -> None:
        """RequestFailed 02 if it may not be reached."""
        reason = self.judge(command, address).reason
        if reason:
            raise RequestFailed(ReplyCode.NOT_ALLOWED, reason)

    def judge(self, command: Command, address: Address, name: Optional[str] = None) -> Verdict:
        """Whether `address`, which `name` has led to, or a name itself may be reached.  RequestFailed of an allow() that has its own words."""
        verdict, failed = self.server.policy.judge(self.session.client, command, address, name, self.session.upstream is not None), None
        if not verdict.reason:
            try:
                if not self.allow(command, address):
                    verdict = Verdict(address, f"{address} is not allowed")
            except RequestFailed as error:
                verdict, failed = Verdict(address, str(error)), error
        for judged in self.hooks.judged:
            judged(self.session, verdict)
        if failed is not None:
            raise failed
        return verdict

    # --- BIND ---

    def _expected_peers(self, request: Request, until: float) -> List[Address]:
        """Who may call back; empty for anyone."""
        if request.destination.is_unspecified:
            self._check_anyone(request.command)
            return []
        return self._addresses(request, until)

    def _check_anyone(self, command: Command) -> None:
        """Zeros are no place that could be reached, so neither rules nor networks are asked; the peer that connects is judged then."""
        if not self.allow(command, UNSPECIFIED):
            raise RequestFailed(ReplyCode.NOT_ALLOWED, f"{UNSPECIFIED} is not allowed")

    def _bind_host(self, expected: List[Address]) -> Tuple[str, str]:
        """
        Where to listen, and what to tell: the address that the peer, by the first of its addresses to which there is a way, would reach us by.

        A peer that is not known is taken to be where the client is.
        """
        route = self.server.route
        failures: List[RequestFailed] = []
        for address in expected:
            try:
                return route.reached_by(address, outbound.local_address_towards(address, route))
            except (OSError, RequestFailed) as error:
                failures.append(outbound.failure(error, address))
        if failures:
            raise outbound.most_telling(failures)
        here = self.here()
        sources = sorted(route.sources, key=lambda source: (":" in source) != (":" in here))
        return route.reached_by(self.session.client, sources[0] if sources else here)       # of the family by which the client has come, if there is one

    def _await_peer(self, listener: socket.socket, expected: List[Address], until: float) -> Tuple[socket.socket, Address]:
        """The first connection from an expected host.  Only the host is compared: the RFC's clients cannot know the port."""
        hosts, name = {address.host for address in expected}, self._name_of(expected)
        while True:
            self._wait_for_peer(listener, until)
            try:
                target, sockaddr = listener.accept()
            except OSError as error:    # gone again before we could accept, or
                if error.errno in OUT_OF:
                    outbound.wait({}, self.connection, time.monotonic() + RETRY)
                continue
            peer = Address.of(sockaddr)
            welcome = False
            try:
                welcome = (not hosts or peer.host in hosts) and self.judge(Command.BIND, peer, name).allowed
            finally:
                if not welcome:         # another peer; the expected one may still come
                    target.close()
            if welcome:
                tune(target)
                return target, peer

    def _name_of(self, expected: List[Address]) -> Optional[str]:
        """The name by which the client has asked for those whom it expects, or a rule that allows it would not know them."""
        destination = self.session.destination
        return destination.host if expected and destination is not None and destination.literal is None else None

    def _wait_for_peer(self, listener: socket.socket, until: float) -> None:
        """Wait until a peer connects, while the client may send ahead, or leave."""
        client = self.connection.fileno()
        while True:
            interests = {listener.fileno(): READ}
            if len(self.stream.buffer) < EARLY:
                interests[client] = READ
            ready = outbound.wait(interests, self.connection, until)
            if client in ready and not self.stream.fill():
                raise ClientGone("the client has left")
            if listener.fileno() in ready:
                return
            if not ready:
                raise RequestFailed(ReplyCode.TTL_EXPIRED, "no peer connected in time")

    # --- the tunnel ---

    def open_tunnel(self, target: socket.socket, bound: Address) -> None:
        """Send the last reply, and let the octets flow."""
        try:
            self.succeed(bound)
            self._stage = Stage.REPLIED
            self._opened(target)
            self.relay(target)
        finally:
            if self._stage is not Stage.HANDED_OVER:
                target.close()

    def _opened(self, target: Optional[socket.socket]) -> None:
        """Tell the observers that a tunnel, or a relay for datagrams, stands."""
        if self.hooks.opened:
            local = self.session.bound if target is not None else None
            if target is not None and self.session.upstream is not None:        # whose end that is
                with suppress(OSError):     # the connection may be over
                    local = Address.of(target.getsockname())
            for opened in self.hooks.opened:
                opened(self.session, local)

    def relay(self, target: socket.socket) -> None:
        """
        Carry bytes between the client and `target`, until both ways have ended.

        The default hands both to the relay thread and returns at once.  To see or to change
        the bytes, override it and move them in this thread: `self.connection` is blocking,
        `target` is not (as connect() made it), and ``self.stream.take()`` has what the client
        sent ahead.  Count them in ``self.session.up`` and ``.down``, and return when it is over.
        """
        relay, early = self.server.relay_thread(), self.stream.take()
        self._stage = Stage.HANDED_OVER
        ends = relay, self.connection, target, self.session, self.close, self.server.idle_timeout, early
        if self._client_coded or self._target_coded:
            self._tunnel = CodedTunnel(*ends, self._client_coded, self._target_coded)
        else:
            self._tunnel = Tunnel(*ends)
        self._tunnel.start()

    def close(self) -> None:
        """The client is gone, its sockets are closed; called by the thread that had them last."""
        if isinstance(self._tunnel, Association):
            for address in self._tunnel.addresses:
                self.server.policy.relays.discard(address)
        if self._reserved:
            descriptors.give_back(self._reserved)
        self.server.registry.remove(self)

    def session_ended(self) -> None:
        """
        The client has been served, or has not: `self.session` is complete.

        The default logs its line.  Called once for every client, in the thread that runs serve_forever(): no tunnel waits
        for it, but the other sessions' log lines do.
        """
        if self.session.outcome == "probe":
            logger.debug("%s", self.session, extra={"session": self.session})
        elif self.session.probe or self.session.outcome == "bad_protocol":
            self._log_seldom()
        else:
            logger.info("%s", self.session, extra={"session": self.session})

    def _log_seldom(self) -> None:
        """The same mistake of the same host, or end of a health check, once a minute; the next line says how many were left out."""
        left_out = self.server.rate_limit.allows(f"{self.session.client.host} {self.session.reason}")
        if left_out is not None:
            logger.info("%s%s", self.session, and_more(left_out), extra={"session": self.session, "left_out": left_out})

    # --- plumbing: the two choke points, and the end ---

    def receive(self, message: Type[M]) -> M:
        """Read one message.  The deadline of the handshake is kept by the server, which hangs up."""
        self.stream.consumed = b""
        try:
            received = message.read(self.stream)
        except (Socks5Error, OSError) as error:
            for malformed in self.hooks.malformed:
                malformed(self.session, message, self.stream.consumed, error, len(self.stream.buffer))
            raise
        for hook in self.hooks.received:
            hook(self.session, received, self.stream.consumed, len(self.stream.buffer))
        return received

    def send(self, message: Message) -> None:
        """Send one message.  ClientGone if the connection has broken."""
        for sending in self.hooks.sending:
            sending(self.session, message, self._answered)
        self.stream.write(bytes(message))

    def succeed(self, bound: Address) -> None:
        """Send a success reply with this address."""
        self.session.reply = ReplyCode.SUCCEEDED
        self.session.bound = self.session.bound or bound    # BIND's second reply has the peer instead
        self.send(Reply(ReplyCode.SUCCEEDED, bound))

    def _refuse(self, error: Socks5Error) -> None:
        """
        Answer what went wrong, unless it is too late for that, and hang up so that the answer arrives.

        The session is over then, and told of; the client may linger, and keeps its place until its socket is closed.
        """
        if self._stage is not Stage.NEGOTIATING:
            self.session.end(str(error))
            return
        if isinstance(error, RequestFailed):
            self.session.reply = error.code
        if isinstance(error, LoginFailed):
            self.session.login_failed, self.session.user = True, error.username
        if isinstance(error, NoAcceptableMethod):
            self.session.no_acceptable_method = True
        if isinstance(error, foreign.ForeignProtocol):
            self.session.probe = False      # whatever checks a SOCKS5 server like this has to be told of
        if isinstance(error, UnknownCommand):
            self.session.unknown_command, self.session.destination = error.octet, error.destination
        self.session.end(str(error))
        self._answered = error
        try:
            if error.answer is not None:
                self.send(error.answer)
                self.server.registry.session_over(self)
                self.linger()
        except OSError:             # the client has not waited for it
            pass

    def linger(self) -> None:
        """Finish sending, and read on for a moment what the client still sends."""
        # To close a socket that has unread octets sends a reset, and a reset makes the other end forget what it has
        # not read yet: our answer.
        self.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + LINGER
        while time.monotonic() < until:
            self.connection.settimeout(LINGER)
            if not self.connection.recv(4096):
                return

    def hang_up(self, reason: str, code: str = "") -> None:
        """Called in another thread: end the tunnel, or make whatever this conversation waits for fail now.  `code` is a word for `reason`."""
        if self._tunnel is not None:
            self._tunnel.abort_soon(reason)
            return
        if self.session.seconds is None and not self.session.reason:
            self.session.reason, self.session.hung_up = reason, code
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
            if os.name == "nt":     # where it takes this to wake a recv()
                self.connection.close()
        except OSError:             # it has ended by itself
            pass
        if self._turn is not None:
            self._turn.set()
