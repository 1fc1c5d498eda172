"""
One client, from its greeting to the hand-over: `Socks5Server` and `Socks5Handler`.

They are a `socketserver` pair, to be used and extended like any other:

    with Socks5Server(("127.0.0.1", 1080), users={"alice": "secret"}) as server:
        server.serve_forever()

    class Office(Socks5Handler):
        def allow(self, command, address):
            return address.port != 25

`Socks5Handler.handle()` is the table of contents of RFC 1928; its methods follow in the order
in which they are called.  It talks in a thread of its own and may block as it likes.  Once
a tunnel stands it hands both sockets to the relay thread (relay.py) and is free for the next
client (listener.py).

The one idea: a failure is raised where it is noticed, carries its answer, and is answered in
one place, `refuse()`.  After a success reply nothing is answered any more: it would land in the
middle of somebody's data.

Not here: the octets (protocol.py), how to reach a target (outbound.py), who may log in (users.py)
and what may be reached (rules.py).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import socketserver
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from functools import cached_property, lru_cache
from ipaddress import ip_address
from sysconfig import get_config_var
from typing import (
    Any, Callable, Deque, Dict, FrozenSet, Iterable, List, Optional, Sequence, Set, Tuple, Type, TypeVar, Union, cast,
)

from . import outbound, strangers
from .datagrams import Association
from .listener import Listener
from .outbound import ClientGone, Route
from .protocol import (
    UNSPECIFIED, VER, Address, AddressType, Command, Credentials, CredentialsReply, Greeting, LoginFailed, Message, Method,
    MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed, Socks5Error,
)
from .relay import READ, Relay, Tunnel, tune
from .rules import Network, Rule, Rules, is_local
from .session import Session
from .users import Guessing, Users, UsersFile

logger = logging.getLogger("socks5srv")         # a session at its end: INFO; at its success reply: DEBUG
wire = logging.getLogger("socks5srv.wire")      # every message, at DEBUG

M = TypeVar("M", Greeting, Credentials, Request)

AUTH = {method: f"auth_{method.name}" for method in Method}
DO = {command: f"do_{command.name}" for command in Command}

# One carries all that Python can carry at a time; where it runs free, on all cores, there is one for each.
RELAY_THREADS = os.cpu_count() or 1 if get_config_var("Py_GIL_DISABLED") else 1

BATCH = 0.05        # seconds between two looks at the sessions that have ended
TELL_AGAIN = 60.0   # seconds until the same trouble is told again
RETRY = 0.1         # seconds until we try again to accept, being out of something
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
        """Wait for more; False if there is none to come."""
        octets = self.connection.recv(4096)
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

    def setup(self) -> None:
        # Not the base's rfile and wfile: a buffered file would swallow early data, and
        # after one timeout never be readable again.
        self.connection = self.request
        self.stream = ClientStream(self.connection)
        self.session = Session(self.server.next_id(), Address.of(self.client_address))
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
            self.finished()

    # --- method negotiation: RFC 1928 section 3 ---

    def negotiate(self) -> str:
        """Agree on a method and carry it out.  The user's name; empty for nobody in particular."""
        self.turn_strangers_away()
        greeting = self.receive(Greeting)
        method = self.select_method(greeting.methods)
        if method is Method.NO_ACCEPTABLE_METHODS:
            raise NoAcceptableMethod(
                "the client insists on a login, and there are no users"
                if self.wanted_method() is Method.NO_AUTHENTICATION_REQUIRED
                else "the client offers no password (browsers cannot; --allow-from serves them without)"
            )
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

    def turn_strangers_away(self) -> None:
        """Tell a client that does not speak SOCKS5 what it has found."""
        if not self.stream.buffer and not self.stream.fill():
            raise ProtocolError("the client closed without a word")
        if self.stream.buffer[0] == VER:
            return
        if self.stream.buffer[0] in strangers.HTTP:
            while b"\n" not in self.stream.buffer and len(self.stream.buffer) < strangers.MOST and self.stream.fill():
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
        if not self.authenticate_unhurried(username, password):
            raise LoginFailed("wrong name or password", username)
        self.send(CredentialsReply(CredentialsReply.SUCCESS))
        return username

    def authenticate(self, username: str, password: str) -> bool:
        """Whether this is a user.  The default asks the server's `users`."""
        return self.server.users is not None and self.server.users.check(username, password)

    def authenticate_unhurried(self, username: str, password: str) -> bool:
        """authenticate(), for which a client that has failed too often has to wait."""
        guessing, host = self.server.guessing, self.session.client.host
        seconds = guessing.wait(host)
        if seconds:
            outbound.wait({}, self.connection, time.monotonic() + seconds)
        right = self.authenticate(username, password)
        (guessing.succeeded if right else guessing.failed)(host)
        return right

    # --- commands: RFC 1928 sections 4 and 6 ---

    def perform(self, request: Request) -> None:
        """Carry out the request, by the method that is named like its command."""
        self.session.command, self.session.destination = request.command, request.destination
        do = getattr(self, DO[request.command], None)
        if do is None or request.command not in self.server.commands:
            raise RequestFailed(ReplyCode.COMMAND_NOT_SUPPORTED, f"{request.command.name} is switched off")
        do(request)

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
        # DST.ADDR, where the client will send from, is not looked at: behind NAT it is wrong,
        # and many write zeros or nonsense.  The connection's own peer is the better witness.
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
        here = Address.of(self.connection.getsockname()).host
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
        The IP addresses of a host as text, best first; OSError if it has none.

        Called in a thread of its own and may block: when time is up, nobody waits for it.
        """
        return outbound.look_up(host, self.server.route.family)

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
            self.check(request.command, literal.dialled)
            return [literal.dialled]
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
            hosts = outbound.in_time(self.resolve, destination.host, self.connection, until)
        found = outbound.interleave(Address.numeric(host, destination.port).dialled for host in hosts)
        if not found:
            raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{destination.host} has no address")
        return found

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
        rules = self.server.rules
        if address.address_type is AddressType.DOMAINNAME:
            rule = rules.decide_by_name(address)
        elif self.server.is_own(command, address):      # it would call itself until all descriptors are gone
            return f"{address} is this server itself"
        else:
            rule = rules.decide(address, name)
            if not (self.is_here or self.server.allow_local_targets) and self.server.is_local(address):
                return f"{address} is for this computer only"
        if rule is not None and not rule.allows:
            return f"rule: {rule.text}"
        return "" if self.allow(command, address) else f"{address} is not allowed"

    @property
    def is_here(self) -> bool:
        """Whether the client is a program on this computer."""
        return self.server.is_here(self.session.client.host)

    # --- BIND ---

    def expected_peers(self, request: Request, until: float) -> List[Address]:
        """Who may call back; empty for anyone."""
        if request.destination.is_unspecified:
            self.check(request.command, UNSPECIFIED)
            return []
        return self.addresses(request, until)

    def bind_host(self, expected: List[Address]) -> str:
        """Where to listen: on the address that the peer would reach us by."""
        if self.server.route.source is not None:
            return self.server.route.source
        if expected:
            return outbound.local_address_towards(expected[0], self.server.route)
        return Address.of(self.connection.getsockname()).host

    def await_peer(self, listener: socket.socket, expected: List[Address], until: float) -> Tuple[socket.socket, Address]:
        """The first connection from an expected host.  Only the host is compared: the RFC's clients cannot know the port."""
        hosts = {address.host for address in expected}
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
                welcome = (not hosts or peer.host in hosts) and self.may_reach(Command.BIND, peer)
            finally:
                if not welcome:         # a stranger; the one we wait for may still come
                    target.close()
            if welcome:
                tune(target)
                return target, peer

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
        """The session is over; called by whoever had the client last."""
        self.server.finished(self)

    def session_ended(self) -> None:
        """
        The client has been served, or has not: `self.session` is complete.

        The default logs its line, but a stranger's only once a minute.  Called once for every client, in the thread that runs
        serve_forever(): no tunnel waits for it, but the other sessions' log lines do.
        """
        if self.session.event != "bad_protocol" or self.server.is_news(f"{self.session.client.host} {self.session.reason}"):
            logger.info("%s", self.session, extra={"session": self.session})

    # --- plumbing: the two choke points, and the end ---

    def receive(self, message: Type[M]) -> M:
        """Read one message.  The deadline of the handshake is kept by the server, which hangs up."""
        received = message.read(self.stream)
        wire.debug("#%d < %s", self.session.id, received)
        return received

    def send(self, message: Message) -> None:
        wire.debug("#%d > %s", self.session.id, message)
        self.connection.sendall(bytes(message))

    def succeed(self, bound: Address) -> None:
        self.session.reply = ReplyCode.SUCCEEDED
        self.session.bound = self.session.bound or bound    # BIND's second reply has the peer instead
        self.send(Reply(ReplyCode.SUCCEEDED, bound))
        logger.debug("%s", self.session, extra={"session": self.session})

    def refuse(self, error: Socks5Error) -> None:
        """Answer what went wrong, unless it is too late for that, and hang up so that the answer arrives."""
        if self.in_tunnel:
            self.session.end(str(error))
            return
        if isinstance(error, RequestFailed):
            self.session.reply = error.code
        if isinstance(error, LoginFailed):
            self.session.login_failed, self.session.user = True, error.username
        self.session.end(str(error))
        try:
            if error.answer is not None:
                self.send(error.answer)
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
        self.session.reason = self.session.reason or reason
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
            if os.name == "nt":     # where it takes this to wake a recv()
                self.connection.close()
        except OSError:             # it has ended by itself
            pass


class Bell:
    """
    What a thread waits for, and any other can ring; also a signal handler of the waiting thread.

    (Setting an Event that the same thread waits for can deadlock, and the timed get() of a
    SimpleQueue can forget its timeout when signals come fast.)
    """

    def __init__(self) -> None:
        self.silence = threading.Lock()
        self.silence.acquire()

    def ring(self) -> None:
        if self.silence.locked():
            try:
                self.silence.release()
            except RuntimeError:    # another thread has just done it
                pass

    def wait(self, timeout: float) -> None:
        self.silence.acquire(timeout=timeout)


class Socks5Server(socketserver.ThreadingTCPServer):
    """
    A SOCKS5 server: ``Socks5Server(("127.0.0.1", 1080)).serve_forever()``.

    `users` maps names to passwords, or is a `UsersFile`; None asks nobody, and an empty
    mapping lets nobody in.  `rules` are lines like ``"deny *.ads.example"``: see rules.py.
    The constructor binds and listens: with port 0, `server_address` has the port found.

    For the caller: serve_forever(), shutdown(), server_close(), add_listener(), `sessions`.
    shutdown() accepts no more clients, server_close() also ends the tunnels that live.

    Settings: the class attributes below, to be changed in a subclass or on the server
    before it serves.
    """

    commands: FrozenSet[Command] = frozenset(Command)   # the others get reply 07
    allow_from: Sequence[Network] = ()  # clients that need no login; without users, the only ones
    allow_local_targets = False         # let other computers reach what only this one should: see rules.py
    max_clients: Optional[int] = None   # None: as many as the descriptors allow
    max_per_client: Optional[int] = None    # of those, from one address
    max_handshakes = 512                # clients that have not asked for anything yet; the oldest makes room
    handshake_timeout: float = 30       # seconds from accept() until the request is complete
    connect_timeout: float = 10         # seconds for the look-up and all addresses together
    bind_timeout: float = 120           # seconds that BIND waits for its peer; FTP servers take a while
    idle_timeout: Optional[float] = None    # seconds a tunnel may be silent: ssh and chats are, for days
    route = Route()                     # which family, and which of our addresses, to go out by
    relay_threads = RELAY_THREADS       # at least, if there are as many tunnels; more only where one is full
    reassemble = False                  # put fragments of UDP datagrams together (hardly a client sends any)

    request_queue_size = 1024           # a page opens dozens at once, and a full backlog costs a second
    allow_reuse_address = os.name != "nt"   # there it would let others steal the port
    daemon_threads = True               # a script may end without us
    block_on_close = False              # socketserver's list of threads; ours are in listener.py
    address_family = socket.AF_INET

    def __init__(self, server_address: Tuple[Any, ...] = ("127.0.0.1", 1080),
                 RequestHandlerClass: Type[Socks5Handler] = Socks5Handler, bind_and_activate: bool = True,
                 *, users: Union[Users, Mapping[str, str], None] = None, rules: Iterable[Union[str, Rule]] = ()) -> None:
        self.users = Users(users) if isinstance(users, Mapping) else users
        self.rules = Rules.parse(rules)
        self.guessing = Guessing()
        self.news: Dict[str, float] = {}                    # when what kind of trouble was told last
        self.ids = itertools.count(1)
        self.lock = threading.Lock()
        self.live: Dict[int, Socks5Handler] = {}            # by session id, until the session ends
        self.handshakes: Dict[int, Socks5Handler] = {}      # of those, whose request is to come; oldest first
        self.clients = 0                                    # let in, and not gone yet
        self.hosts: Counter[str] = Counter()                # of those: how many from which host, if that is limited
        self.ended: Deque[Socks5Handler] = deque()          # to be told of
        self.bell = Bell()                                  # one more has ended, or there is other news
        self.relays: List[Relay] = []
        self.udp_relays: Set[Address] = set()               # where clients send their datagrams to
        self.listeners: List[Listener] = []
        self.stopping = False                               # serve_forever() has to end
        self.hurry = Bell()                                 # wakes it from its pause, too
        self.stopped = threading.Event()                    # it has ended
        self.stopped.set()
        self.bookkeeper: Optional[threading.Thread] = None  # in serve_forever()
        if ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)
        self.listeners.append(Listener(self.socket, self.accept, self.talk))

    def server_bind(self) -> None:
        self.prepare(self.socket, str(self.server_address[0]))
        super().server_bind()

    def prepare(self, sock: socket.socket, host: str) -> None:
        """Set what has to be set before bind()."""
        if sock.family == socket.AF_INET6:
            # "::" is asked for to serve everybody, IPv4 too; a concrete address means itself.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        if os.name == "posix":
            tune(sock)          # accepted sockets inherit it, which saves five calls for each

    def add_listener(self, server_address: Tuple[Any, ...]) -> Tuple[Any, ...]:
        """Listen on another address as well; returns it, with the port found for port 0."""
        family = socket.AF_INET6 if ":" in server_address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if self.allow_reuse_address:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.prepare(sock, server_address[0])
            sock.bind(server_address)
            sock.listen(self.request_queue_size)
        except BaseException:
            sock.close()
            raise
        self.listeners.append(Listener(sock, self.accept, self.talk))
        return cast(Tuple[Any, ...], sock.getsockname())

    # --- serving ---

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """
        Serve until shutdown(), called in another thread or a signal handler.

        The clients have threads of their own; this one keeps the books: it tells of sessions
        that have ended, and hangs up on handshakes that take too long.
        """
        self.bookkeeper = threading.current_thread()
        try:
            with self.lock:
                if not self.stopping:
                    for listener in self.listeners:
                        listener.start(self.request_queue_size)
                self.stopped.clear()
            while not self.stopping:
                self.keep_books(poll_interval)
                self.end_slow_handshakes()
                self.service_actions()
                self.pause()
        finally:
            self.stopping = False
            try:
                for listener in self.listeners:
                    listener.stop()
            finally:
                self.stopped.set()

    def keep_books(self, timeout: float) -> None:
        """Tell of all sessions that have ended; wait so many seconds for the first."""
        self.bell.wait(timeout)
        while self.ended:
            self.report(self.ended.popleft())

    def pause(self) -> None:
        """So that a burst of clients, each gone in a millisecond, does not wake us for each."""
        self.hurry.wait(BATCH)

    def report(self, handler: Socks5Handler) -> None:
        try:
            handler.session_ended()
        except Exception:
            self.handle_error(None, handler.client_address)

    def end_slow_handshakes(self) -> None:
        """All have the same time, so the oldest are the first to have used it up."""
        with self.lock:
            for handler in self.handshakes.values():
                if time.monotonic() - handler.session.clock < self.handshake_timeout:
                    return
                handler.hang_up("the handshake took too long")

    def service_actions(self) -> None:
        """Called twice a second: look whether the users have changed, and end the sessions of those that are gone."""
        gone = self.users.refresh() if self.users is not None else set()
        if gone:
            with self.lock:
                live = [handler for handler in self.live.values() if handler.session.user in gone]
            for handler in live:
                handler.hang_up("the user has been removed")

    def read_users_again(self) -> None:
        """Have the users file read soon; signal handlers may call it."""
        if isinstance(self.users, UsersFile):
            self.users.seen = None
            self.bell.ring()

    def shutdown(self) -> None:
        """
        Make serve_forever() return; wait for that, unless called in its thread.

        Signal handlers of that thread may call it: no lock is taken that it could hold.
        """
        self.stopping = True
        self.bell.ring()
        self.hurry.ring()
        if threading.current_thread() is not self.bookkeeper:
            self.stopped.wait()

    def server_close(self) -> None:
        """Stop, close the listeners, end all conversations and tunnels, and wait for the threads."""
        with self.lock:
            self.stopping = True        # for a serve_forever() that is just about to begin
            serving = not self.stopped.is_set()
        if serving:
            self.shutdown()
            self.stopping = True
        for listener in self.listeners:
            listener.close()
        super().server_close()
        with self.lock:
            live = list(self.live.values())
        for handler in live:
            handler.hang_up("server stopped")
        for listener in self.listeners:
            listener.join(timeout=1)    # an overridden method may be busy with who knows what
        for relay in self.relays:
            relay.stop()
        self.relays.clear()
        self.keep_books(timeout=0)

    # --- one client ---

    def get_request(self) -> Tuple[socket.socket, Any]:
        return self.accept(self.socket)

    def accept(self, sock: socket.socket) -> Tuple[socket.socket, Any]:
        """Wait for a client.  OSError when there is none to be had, after a pause if we are out of something."""
        try:
            connection, client_address = sock.accept()
        except OSError as error:
            if error.errno in OUT_OF:
                # The client stays in the backlog, so that the next try would fail as fast.
                self.warn("short", "%s: new clients have to wait; fewer at a time (--max-clients) or ulimit -n help", error.strerror)
                self.stopped.wait(RETRY)
            raise
        if os.name != "posix":
            tune(connection)
        return connection, client_address

    def talk(self, connection: socket.socket, client_address: Any) -> None:
        """What socketserver does with a request, in the thread that has accepted it."""
        if self.verify_request(connection, client_address):
            self.process_request_thread(connection, client_address)
        else:
            self.shutdown_request(connection)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to talk to this client at all."""
        if self.allow_from and self.users is None and not self.trusts(Address.of(client_address)):
            host = Address.of(client_address).host
            self.warn("strange " + host, "%s is not in a network that is allowed to come", host)
            return False
        with self.lock:         # counted here, or a burst would pass all at once
            full = self.clients >= self.most_clients
            if not full and self.one_more(client_address):
                return True
        if full:
            self.warn("full", "%d clients are being served, and more do not fit: see --max-clients", self.clients)
        else:
            host = Address.of(client_address).host
            self.warn("full " + host, "%s has %d connections, and may have no more", host, self.max_per_client)
        return False

    def one_more(self, client_address: Any) -> bool:
        """Count one more client, unless its host has enough of them; to be called with the lock."""
        if self.max_per_client is not None:
            host = Address.of(client_address).host
            if self.hosts[host] >= self.max_per_client:
                return False
            self.hosts[host] += 1
        self.clients += 1
        return True

    def one_less(self, host: str) -> None:
        """Count one client of this host less; to be called with the lock."""
        self.clients -= 1
        if self.max_per_client is not None:
            self.hosts[host] -= 1
            if self.hosts[host] <= 0:
                del self.hosts[host]

    @cached_property
    def most_clients(self) -> float:
        """`max_clients`, or as many as the descriptors allow: two for each, and some for pipes, logs and listeners."""
        if self.max_clients is not None:
            return self.max_clients
        limit = descriptor_limit()
        return max(1, (limit - 32 - min(64, limit / 4)) / 2)

    def warn(self, kind: str, message: str, *details: object) -> None:
        """Log it, once a minute for each kind of trouble."""
        if self.is_news(kind):
            logger.warning(message, *details)

    def is_news(self, kind: str) -> bool:
        """Whether this has not been asked in the last minute."""
        now = time.monotonic()
        with self.lock:
            if now - self.news.get(kind, -TELL_AGAIN) < TELL_AGAIN:
                return False
            if len(self.news) > 1000:
                self.news.clear()
            self.news[kind] = now
            return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base does it, but a socket that the relay thread has by now is not closed."""
        handler = None
        try:
            handler = self.RequestHandlerClass(request, client_address, cast(Any, self))
        except Exception:
            self.handle_error(request, client_address)
        finally:
            if not (isinstance(handler, Socks5Handler) and handler.handed_over):
                self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An exception that is nobody's answer is a bug: ours, or of an overridden method."""
        logger.exception("a bug, met while serving %s", client_address)

    # --- what the handlers tell ---

    def next_id(self) -> int:
        return next(self.ids)

    def begin(self, handler: Socks5Handler) -> None:
        with self.lock:
            self.live[handler.session.id] = handler
            self.handshakes[handler.session.id] = handler
            oldest = next(iter(self.handshakes.values())) if len(self.handshakes) > self.max_handshakes else None
        if oldest is not None:
            self.handshake_done(oldest)
            oldest.hang_up("too many clients were slower to ask than this one")

    def handshake_done(self, handler: Socks5Handler) -> None:
        with self.lock:
            self.handshakes.pop(handler.session.id, None)

    def finished(self, handler: Socks5Handler) -> None:
        with self.lock:
            self.one_less(handler.session.client.host)
            self.live.pop(handler.session.id, None)
            self.handshakes.pop(handler.session.id, None)
            if isinstance(handler.carried, Association):
                self.udp_relays.discard(handler.carried.bound)
        self.ended.append(handler)
        self.bell.ring()

    @property
    def sessions(self) -> List[Session]:
        """The clients being served now, oldest first."""
        with self.lock:
            return [handler.session for handler in self.live.values()]

    # --- what the handlers ask ---

    def relay_thread(self) -> Relay:
        """The one that has the least to watch; a new one while there may be more, or where it is full."""
        with self.lock:
            relay = min(self.relays, key=Relay.load, default=None)
            if relay is None or len(self.relays) < self.relay_threads or not relay.has_room():
                relay = Relay()
                self.relays.append(relay)
            return relay

    def trusts(self, client: Address) -> bool:
        """Whether this client is in a network that needs no login."""
        return bool(self.allow_from) and any(ip_address(client.host) in network for network in self.allow_from)

    def is_here(self, host: str) -> bool:
        """Whether this is an address of this computer."""
        return is_loopback(host) or outbound.is_own_address(host)

    def is_local(self, address: Address) -> bool:
        """Whether only this computer should reach this: its own addresses among them."""
        return is_local(address) or self.is_here(address.dialled.host)

    @cached_property
    def beyond_loopback(self) -> bool:
        return not all(is_loopback(listener.address.host) for listener in self.listeners)

    def is_own(self, command: Command, address: Address) -> bool:
        """Whether this is one of our own sockets, where the server would talk to itself."""
        if command is Command.UDP_ASSOCIATE:
            return address in self.udp_relays
        for listener in self.listeners:
            own = listener.address
            if own.port == address.port and (own.host == address.host or (own.is_unspecified and outbound.is_own_address(address.host))):
                return True
        return False


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether this is an IP address of that kind.  Asked for each client, and found out slowly."""
    return ip_address(host).is_loopback


# What a server can be out of when a client comes: descriptors, memory, buffers.
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


def descriptor_limit() -> float:
    """How many descriptors this process may have."""
    try:
        import resource
    except ImportError:             # Windows has no such limit
        return float("inf")
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft
