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
one place, `refuse()`.  After a success reply nothing is answered any more: it would land in the
middle of somebody's data.

Not here: the octets (protocol.py), how to reach a target (resolver.py, outbound.py), who may log in (users.py),
what may be reached (rules.py), and who is let in at all (server.py).
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple, Type, TypeVar, Union

from . import outbound, resolver, strangers
from .datagrams import Association
from .descriptors import COMMANDS, USED_UP, descriptors
from .listener import OUT_OF, RETRY
from .outbound import ClientGone
from .protocol import (
    UNSPECIFIED, VER, Address, AddressType, Command, Credentials, CredentialsReply, Greeting, LoginFailed, Message, Method,
    MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed, Socks5Error, UnknownCommand,
)
from .relay import READ, Tunnel, broken, tune
from .session import Session

if TYPE_CHECKING:
    from .rules import Rule
    from .server import Socks5Server

logger = logging.getLogger("socks5srv")         # a session at its end: INFO; at its success reply: DEBUG
wire = logging.getLogger("socks5srv.wire")      # every message, at DEBUG

M = TypeVar("M", Greeting, Credentials, Request)

AUTH = {method: f"auth_{method.name}" for method in Method}
DO = {command: f"do_{command.name}" for command in Command}

LOOK = 1.0          # seconds between two looks whether a client still waits for its turn to log in
LINGER = 1.0        # seconds that a refused client has to take its reply and hang up
EARLY = 64 * 1024   # octets that a client may send ahead while BIND waits for its peer


class ClientStream:
    """
    What the client sends, as a binary stream.

    One recv() usually brings a whole message, and may bring more; what it brings beyond the
    message at hand stays in `buffer`, for the next message or for the target.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""

    def read(self, n: int = -1, /) -> bytes:
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


class Socks5Handler(socketserver.StreamRequestHandler):
    """
    The conversation with one client.

    May be overridden, each called in the conversation's own thread unless it says otherwise:

    - authenticate(username, password)
    - allow(command, address)
    - resolve(host)
    - connect(request)
    - relay(target)
    - session_ended()

    A command is a method ``do_<COMMAND>``; ``do_BIND = None`` in a subclass switches it off.
    A login method is ``auth_<METHOD>`` and `select_method()`.

    Attributes to read: `session`, `server`, `client_address`, `connection`.
    """

    server: Socks5Server
    connection: socket.socket
    in_tunnel = False               # the last reply is sent: nothing is answered any more
    handed_over = False             # the sockets are the relay thread's, in what is
    carried: Union[Tunnel, Association, None] = None
    turn: Optional[threading.Event] = None      # to try a login, which it waits for; set by hang_up(), too
    reserved = 0                    # descriptors beyond those of every client
    reported = False                # session_ended() has been called, or will soon be

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """As the base has it, but finish() follows a setup() that has failed, too: the client has a place to give back."""
        self.request, self.client_address, self.server = request, client_address, server
        self.session = Session(server.next_id(), Address.of(client_address))
        try:
            self.setup()
            self.handle()
        finally:
            self.finish()

    def setup(self) -> None:
        # Not the base's rfile and wfile: a buffered file would swallow early data, and
        # after one timeout never be readable again.
        self.connection = self.request
        self.stream = ClientStream(self.connection)
        self.server.begin(self)

    def handle(self) -> None:
        try:
            self.session.user = self.negotiate()
            request = self.receive(Request)
            self.server.handshake_done(self)
            self.perform(request)
        except Socks5Error as error:
            self.refuse(error)
        except OSError as error:
            self.session.end(error.strerror or str(error))
        except Exception:           # a bug, of an overridden method for instance: handle_error() will tell
            if self.session.command is not None:
                self.refuse(RequestFailed(ReplyCode.GENERAL_FAILURE, "internal error"))
            raise

    def finish(self) -> None:
        if not self.handed_over:
            self.session.end()
            self.server.shutdown_request(self.request)      # before its place is given to another
            self.finished()

    # --- method negotiation: RFC 1928 section 3 ---

    def negotiate(self) -> str:
        """Agree on a method and carry it out.  The user's name; empty for nobody in particular."""
        self.turn_strangers_away()
        greeting = self.receive(Greeting)
        method = self.select_method(greeting.methods)
        if method is Method.NO_ACCEPTABLE_METHODS:
            raise NoAcceptableMethod(self.why_no_method(greeting.methods))
        self.send(MethodSelection(method))
        authenticate: Callable[[], str] = getattr(self, AUTH[method])
        return authenticate()

    def select_method(self, offered: Sequence[int]) -> Method:
        """Choose among the methods that the client offers, or NO_ACCEPTABLE_METHODS."""
        wanted = self.wanted_method()
        return wanted if wanted in offered else Method.NO_ACCEPTABLE_METHODS

    def wanted_method(self) -> Method:
        """With a password if there are users, or a subclass that knows some; not for trusted networks."""
        if self.server.trusts(self.session.client):
            return Method.NO_AUTHENTICATION_REQUIRED
        if self.server.users is not None or type(self).authenticate is not Socks5Handler.authenticate:
            return Method.USERNAME_PASSWORD
        return Method.NO_AUTHENTICATION_REQUIRED

    def why_no_method(self, offered: Sequence[int]) -> str:
        """Why none of these methods will do, and what to change."""
        wanted = self.wanted_method()
        if wanted in offered:       # select_method() has reasons of its own
            return "none of the methods that the client offers will do"
        if wanted is Method.USERNAME_PASSWORD:
            return "the client offers no password: have it log in (browsers cannot; --allow-from serves them without)"
        if Method.USERNAME_PASSWORD not in offered:
            return "the client offers no method that is known here: let it offer to need no login"
        if self.server.users is not None:
            return "the client offers only a login, and its network (--allow-from) needs none: let it offer to need no login"
        return "the client offers only a login, and there are no users: start with -u NAME, or let it offer to need no login"

    def turn_strangers_away(self) -> None:
        """Tell a client that does not speak SOCKS5 what it has found."""
        if not self.stream.buffer and not self.stream.fill():
            raise ProtocolError("the client closed without a word")
        if self.stream.buffer[0] == VER:
            return
        while strangers.unsettled(self.stream.buffer) and self.stream.fill():
            pass
        here = Address.of(self.connection.getsockname())
        raise strangers.recognise(self.stream.buffer, here, pac=self.server.beyond_loopback or self.is_here)

    def auth_NO_AUTHENTICATION_REQUIRED(self) -> str:
        return ""

    def auth_USERNAME_PASSWORD(self) -> str:
        """RFC 1929.  Returns the user's name or raises: no request is read without one."""
        credentials = self.receive(Credentials)
        try:
            username, password = credentials.username.decode(), credentials.password.decode()
        except UnicodeDecodeError as error:
            raise LoginFailed("a login that is no UTF-8", repr(credentials.username)) from error
        self.session.user = username    # before it is looked at: the user may be removed meanwhile
        self.server.login_begins(self)
        try:
            if not self.authenticate_unhurried(username, password):
                raise LoginFailed("wrong name or password", username)
        finally:
            self.server.login_over(self)
        self.send(CredentialsReply(CredentialsReply.SUCCESS))
        return username

    def authenticate(self, username: str, password: str) -> bool:
        """Whether this is a user.  The default asks the server's `users`."""
        return self.server.users is not None and self.server.users.check_for(self.still_there, username, password)

    def still_there(self) -> None:
        """ClientGone if another thread has hung up on the client: nothing more is to be done for it."""
        if self.session.reason:
            raise ClientGone(self.session.reason)

    def authenticate_unhurried(self, username: str, password: str) -> bool:
        """authenticate(), for which a client that has failed too often has to wait; its tries take turns."""
        guessing, host = self.server.guessing, self.session.client.host
        self.turn = guessing.begin(host)
        try:
            self.await_turn()
            seconds = guessing.wait(host)
            if seconds:
                outbound.wait({}, self.connection, time.monotonic() + seconds)
            right = self.authenticate(username, password)
            (guessing.succeeded if right else guessing.failed)(host)
            return right
        finally:
            guessing.end(host, self.turn)

    def await_turn(self) -> None:
        """ClientGone if the client has left, or hang_up() has been called, meanwhile."""
        while self.turn is not None:
            over = self.turn.wait(LOOK)
            outbound.wait({}, self.connection, time.monotonic())
            if over:
                return

    # --- commands: RFC 1928 sections 4 and 6 ---

    def perform(self, request: Request) -> None:
        """Carry out the request, by the method that is named like its command."""
        self.session.command, self.session.destination = request.command, request.destination
        do = getattr(self, DO[request.command], None)
        if do is None or request.command not in self.server.commands:
            raise RequestFailed(ReplyCode.COMMAND_NOT_SUPPORTED, f"{request.command.name} is switched off")
        if request.command in COMMANDS:
            self.reserve(COMMANDS[request.command])
        do(request)

    def reserve(self, number: int) -> None:
        """Have so many more descriptors until the session ends; RequestFailed 01 if they are used up."""
        if not descriptors.take(number):
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, USED_UP)
        self.reserved += number

    def do_CONNECT(self, request: Request) -> None:
        with outbound.reporting(request.destination):
            target = self.connect(request)
        self.open_tunnel(target, Address.of(target.getsockname()))

    def do_BIND(self, request: Request) -> None:
        """Listen for one connection from the destination: two replies, then a tunnel."""
        until = time.monotonic() + self.server.bind_timeout
        expected = self.expected_peers(request, until)
        with outbound.reporting(request.destination):
            listener = outbound.listen(self.bind_host(expected))
        with listener:
            self.succeed(Address.of(listener.getsockname()))    # and it listens already
            target, peer = self.await_peer(listener, expected, until)
        self.session.peer = peer
        self.open_tunnel(target, peer)

    def do_UDP_ASSOCIATE(self, request: Request) -> None:
        """A relay for datagrams, which lives as long as this connection.  RFC 1928 section 7."""
        # DST, where the client will send from, is taken at its word if it names the client's own host and a port.
        # Behind NAT it is wrong, and many write zeros or nonsense: the connection's own peer is the better witness then.
        with outbound.reporting("UDP relay"):
            association = self.association()
        with association:       # closes it, unless it has been handed over
            self.server.udp_relays.add(association.bound)
            self.succeed(association.bound)
            self.in_tunnel = self.handed_over = True
            self.carried = association
            association.start(self.connection)

    def association(self) -> Association:
        """The relay for do_UDP_ASSOCIATE, not started yet."""
        here = Address.of(self.connection.getsockname()).zoned
        return Association(self, self.server.relay_thread(), here, self.server.route, self.server.reassemble)

    # --- decisions ---

    def allow(self, command: Command, address: Address) -> bool:
        """
        Whether `command` may reach `address`; refused with reply 02.

        Asked for the destination as the client wrote it, then for each IP address that its
        name has, and for whoever calls back to BIND.  For UDP ASSOCIATE it is asked for each
        new destination of a datagram, in the relay thread: it must not block then.
        """
        return True

    def resolve(self, host: str) -> Sequence[str]:
        """
        The IP addresses of a host as text, best first (a zone as a number: ``fe80::1%2``); OSError if it has none.

        Called in a thread of its own and may block: when time is up, the client gets its reply without it.
        """
        look_up = resolver.look_up_as_it_is if self.server.rules.speak_of_names else resolver.look_up
        return look_up(host, self.server.route.family)

    def connect(self, request: Request) -> socket.socket:
        """A TCP socket connected to the request's destination; RequestFailed if there is none."""
        until = time.monotonic() + self.server.connect_timeout
        addresses = self.addresses(request, until)
        target, self.session.peer = outbound.connect(addresses, self.server.route, self.connection, until)
        return target

    def addresses(self, request: Request, until: float) -> List[Address]:
        """Where the destination can be reached, as far as it is allowed; never empty."""
        literal = request.destination.literal
        if literal is not None:
            address = literal.dialled.on_the_link_of(self.session.client)
            self.check(request.command, address)
            return [address]
        found, name = self.look_up(request, until), request.destination.host
        refusals = {address: self.refusal(request.command, address, name) for address in found}
        allowed = [address for address in found if not refusals[address]]
        if not allowed:
            raise RequestFailed(ReplyCode.NOT_ALLOWED, refusals[found[0]])
        return allowed

    def look_up(self, request: Request, until: float) -> List[Address]:
        """The addresses of a name; RequestFailed if it has none, or may not be asked for."""
        destination = request.destination
        self.check(request.command, destination)
        with outbound.reporting(destination):
            hosts = self.ask_resolver(destination.host, until)
        found = outbound.interleave(Address.numeric(host, destination.port).dialled for host in hosts)
        if not found:
            raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{destination.host} has no address")
        return found

    def ask_resolver(self, host: str, until: float) -> Sequence[str]:
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
        """
        Told when a name has been looked up, or could not be, and how long ago that `began` (`time.monotonic()`).

        For watching.  For UDP ASSOCIATE it is called in the relay thread: it must not block then.
        """

    def check(self, command: Command, address: Address) -> None:
        reason = self.refusal(command, address)
        if reason:
            raise RequestFailed(ReplyCode.NOT_ALLOWED, reason)

    def may_reach(self, command: Command, address: Address, name: Optional[str] = None) -> bool:
        return not self.refusal(command, address, name)

    def refusal(self, command: Command, address: Address, name: Optional[str] = None) -> str:
        """
        Why `address`, which `name` has led to, may not be reached; empty if it may.

        Asked with a name as the address before that is looked up, too.
        """
        if address.address_type is AddressType.DOMAINNAME:
            rule = self.rule_for_name(address)
        elif self.server.is_own(command, address):      # it would call itself until all descriptors are gone
            return f"{address} is this server itself"
        else:
            rule = self.server.rules.decide(address, name)
            if not (self.is_here or self.server.allow_local_targets) and self.server.is_local(address):
                return f"{address} is for this computer only"
        if rule is not None and not rule.allows:
            return f"rule: {rule.text}"
        return "" if self.allow(command, address) else f"{address} is not allowed"

    def rule_for_name(self, address: Address) -> Optional[Rule]:
        """The rule that decides before this name is looked up; None if its addresses have to be known."""
        return self.server.rules.decide_by_name(address)

    @property
    def is_here(self) -> bool:
        """Whether the client is a program on this computer."""
        return self.server.is_here(self.session.client.zoned)

    # --- BIND ---

    def expected_peers(self, request: Request, until: float) -> List[Address]:
        """Who may call back; empty for anyone."""
        if request.destination.is_unspecified:
            self.check_anyone(request.command)
            return []
        return self.addresses(request, until)

    def check_anyone(self, command: Command) -> None:
        """Zeros are no place that could be reached, so neither rules nor networks are asked; whoever calls is judged then."""
        if not self.allow(command, UNSPECIFIED):
            raise RequestFailed(ReplyCode.NOT_ALLOWED, f"{UNSPECIFIED} is not allowed")

    def bind_host(self, expected: List[Address]) -> str:
        """Where to listen: on the address that the peer, by the first of its addresses to which there is a way, would reach us by."""
        failures: List[RequestFailed] = []
        for address in expected:
            try:
                return outbound.local_address_towards(address, self.server.route)
            except (OSError, RequestFailed) as error:
                failures.append(outbound.failure(error, address))
        if failures:
            raise outbound.most_telling(failures)
        here = Address.of(self.connection.getsockname()).zoned
        sources = sorted(self.server.route.sources, key=lambda source: (":" in source) != (":" in here))
        return sources[0] if sources else here      # of the family by which the client has come, if there is one

    def await_peer(self, listener: socket.socket, expected: List[Address], until: float) -> Tuple[socket.socket, Address]:
        """The first connection from an expected host.  Only the host is compared: the RFC's clients cannot know the port."""
        hosts, name = {address.host for address in expected}, self.name_of(expected)
        while True:
            self.wait_for_peer(listener, until)
            try:
                target, sockaddr = listener.accept()
            except OSError as error:    # gone again before we could accept, or
                if error.errno in OUT_OF:
                    outbound.wait({}, self.connection, time.monotonic() + RETRY)
                continue
            peer = Address.of(sockaddr)
            welcome = False
            try:
                welcome = (not hosts or peer.host in hosts) and self.may_reach(Command.BIND, peer, name)
            finally:
                if not welcome:         # a stranger; the one we wait for may still come
                    target.close()
            if welcome:
                tune(target)
                return target, peer

    def name_of(self, expected: List[Address]) -> Optional[str]:
        """The name by which the client has asked for those whom it expects, or a rule that allows it would not know them."""
        destination = self.session.destination
        return destination.host if expected and destination is not None and destination.literal is None else None

    def wait_for_peer(self, listener: socket.socket, until: float) -> None:
        """Wait until somebody calls, while the client may send ahead, or leave."""
        client = self.connection.fileno()
        while True:
            interests = {listener.fileno(): READ}
            if len(self.stream.buffer) < EARLY:
                interests[client] = READ
            ready = outbound.wait(interests, self.connection, until)
            if client in ready and not self.stream.fill():
                raise ClientGone("the client has gone")
            if listener.fileno() in ready:
                return
            if not ready:
                raise RequestFailed(ReplyCode.TTL_EXPIRED, "nobody connected in time")

    # --- the tunnel ---

    def open_tunnel(self, target: socket.socket, bound: Address) -> None:
        """Send the last reply, and let the bytes flow."""
        try:
            self.succeed(bound)
            self.in_tunnel = True
            self.relay(target)
        finally:
            if not self.handed_over:
                target.close()

    def relay(self, target: socket.socket) -> None:
        """
        Carry bytes between the client and `target`, until both ways have ended.

        The default hands both to the relay thread and returns at once.  To see or to change
        the bytes, override it and move them in this thread: `self.connection` is blocking,
        `target` is not (as connect() made it), and ``self.stream.take()`` has what the client
        sent ahead.  Count them in ``self.session.up`` and ``.down``, and return when it is over.
        """
        relay, early = self.server.relay_thread(), self.stream.take()
        self.handed_over = True
        self.carried = Tunnel(relay, self.connection, target, self.session, self.finished, self.server.idle_timeout, early)
        self.carried.start()

    def finished(self) -> None:
        """The client is gone, its sockets are closed; called by whoever had it last."""
        self.server.finished(self)

    def session_ended(self) -> None:
        """
        The client has been served, or has not: `self.session` is complete.

        The default logs its line; a stranger's only once a minute, and the next one says how many were left out.  Called
        once for every client, in the thread that runs serve_forever(): no tunnel waits for it, but the other sessions'
        log lines do.
        """
        if self.session.event == "bad_protocol":
            self.server.tell_of_stranger(self.session)
        else:
            logger.info("%s", self.session, extra={"session": self.session})

    # --- plumbing: the two choke points, and the end ---

    def receive(self, message: Type[M]) -> M:
        """Read one message.  The deadline of the handshake is kept by the server, which hangs up."""
        received = message.read(self.stream)
        wire.debug("#%d < %s", self.session.id, received)
        return received

    def send(self, message: Message) -> None:
        wire.debug("#%d > %s", self.session.id, message)
        try:
            self.connection.sendall(bytes(message))
        except OSError as error:
            raise ClientGone(broken("client", error)) from error

    def succeed(self, bound: Address) -> None:
        self.session.reply = ReplyCode.SUCCEEDED
        self.session.bound = self.session.bound or bound    # BIND's second reply has the peer instead
        self.send(Reply(ReplyCode.SUCCEEDED, bound))
        logger.debug("%s", self.session, extra={"session": self.session})

    def refuse(self, error: Socks5Error) -> None:
        """
        Answer what went wrong, unless it is too late for that, and hang up so that the answer arrives.

        The session is over then, and told of; the client may linger, and keeps its place until its socket is closed.
        """
        if self.in_tunnel:
            self.session.end(str(error))
            return
        if isinstance(error, RequestFailed):
            self.session.reply = error.code
        if isinstance(error, LoginFailed):
            self.session.login_failed, self.session.user = True, error.username
        if isinstance(error, NoAcceptableMethod):
            self.session.no_acceptable_method = True
        if isinstance(error, UnknownCommand):
            self.session.unknown_command, self.session.destination = error.octet, error.destination
        self.session.end(str(error))
        try:
            if error.answer is not None:
                self.send(error.answer)
                self.server.session_over(self)
                self.linger()
        except OSError:             # the client has not waited for it
            pass

    def linger(self) -> None:
        """
        Finish sending, and read on for a moment what the client still sends.

        Closing a socket that has unread octets sends a reset, and a reset makes the other end
        forget what it has not read yet: our answer.
        """
        self.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + LINGER
        while time.monotonic() < until:
            self.connection.settimeout(LINGER)
            if not self.connection.recv(4096):
                return

    def hang_up(self, reason: str) -> None:
        """Called in another thread: end the tunnel, or make whatever this conversation waits for fail now."""
        if self.carried is not None:
            self.carried.abort_soon(reason)
            return
        if self.session.seconds is None:
            self.session.reason = self.session.reason or reason
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
            if os.name == "nt":     # where it takes this to wake a recv()
                self.connection.close()
        except OSError:             # it has ended by itself
            pass
        if self.turn is not None:
            self.turn.set()
