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

Not here: the octets (protocol.py), and how to reach a target (outbound.py).
"""

from __future__ import annotations

import errno
import hmac
import itertools
import logging
import os
import queue
import socket
import socketserver
import threading
import time
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple, Type, TypeVar, cast

from . import outbound
from .datagrams import Association
from .listener import Listener
from .outbound import ClientGone, Route
from .protocol import (
    UNSPECIFIED, Address, Command, Credentials, CredentialsReply, Greeting, LoginFailed, Message, Method,
    MethodSelection, NoAcceptableMethod, Reply, ReplyCode, Request, RequestFailed, Socks5Error,
)
from .relay import READ, Relay, Tunnel, tune
from .session import Session

logger = logging.getLogger("socks5srv")         # a session at its end: INFO; at its success reply: DEBUG
wire = logging.getLogger("socks5srv.wire")      # every message, at DEBUG

M = TypeVar("M", Greeting, Credentials, Request)

BATCH = 0.05        # seconds between two looks at the sessions that have ended
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

    def setup(self) -> None:
        # Not the base's rfile and wfile: a buffered file would swallow early data, and
        # after one timeout never be readable again.
        self.connection = self.request
        self.stream = ClientStream(self.connection)
        self.session = Session(self.server.next_id(), Address.of(self.client_address))
        self.in_tunnel = False          # the last reply is sent: nothing is answered any more
        self.handed_over = False        # the sockets are the relay thread's
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
        greeting = self.receive(Greeting)
        method = self.select_method(greeting.methods)
        if method is Method.NO_ACCEPTABLE_METHODS:
            offered = ", ".join(f"{code:02x}" for code in greeting.methods) or "none"
            raise NoAcceptableMethod(f"no usable login method among those offered ({offered})")
        self.send(MethodSelection(method))
        authenticate: Callable[[], str] = getattr(self, f"auth_{method.name}")
        return authenticate()

    def select_method(self, offered: Sequence[int]) -> Method:
        """Choose among the methods that the client offers, or NO_ACCEPTABLE_METHODS."""
        wanted = Method.USERNAME_PASSWORD if self.login_required() else Method.NO_AUTHENTICATION_REQUIRED
        return wanted if wanted in offered else Method.NO_ACCEPTABLE_METHODS

    def login_required(self) -> bool:
        """Whether to ask for a password: there are users, or a subclass that knows some."""
        return self.server.users is not None or type(self).authenticate is not Socks5Handler.authenticate

    def auth_NO_AUTHENTICATION_REQUIRED(self) -> str:
        return ""

    def auth_USERNAME_PASSWORD(self) -> str:
        """RFC 1929.  Returns the user's name or raises: no request is read without one."""
        credentials = self.receive(Credentials)
        try:
            username, password = credentials.username.decode(), credentials.password.decode()
        except UnicodeDecodeError as error:
            raise LoginFailed("a login that is no UTF-8", repr(credentials.username)) from error
        if not self.authenticate(username, password):
            raise LoginFailed("wrong name or password", username)
        self.send(CredentialsReply(CredentialsReply.SUCCESS))
        return username

    def authenticate(self, username: str, password: str) -> bool:
        """Whether this is a user.  The default asks the server's `users`."""
        users = self.server.users or {}
        known = users.get(username, "")
        # In constant time, and the same for unknown names: else the time taken tells how much
        # of a guess was right.
        right = hmac.compare_digest(known.encode(), password.encode())
        return right and username in users

    # --- commands: RFC 1928 sections 4 and 6 ---

    def perform(self, request: Request) -> None:
        """Carry out the request, by the method that is named like its command."""
        self.session.command, self.session.destination = request.command, request.destination
        do = getattr(self, f"do_{request.command.name}", None)
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
            here = Address.of(self.connection.getsockname()).host
            association = Association(self, here, self.server.route, self.server.reassemble)
        with association:       # closes it, unless it has been handed over
            relay = self.server.relay_thread()
            self.server.udp_relays.add(association.bound)
            self.succeed(association.bound)
            self.in_tunnel = self.handed_over = True
            association.start(relay, self.connection)

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
        destination = request.destination
        literal = destination.literal
        if literal is not None:
            found = [literal.dialled]
        else:
            self.check(self.allow(request.command, destination), destination)
            with outbound.reporting(destination):
                hosts = outbound.in_time(self.resolve, destination.host, self.connection, until)
            found = outbound.interleave(Address.numeric(host, destination.port).dialled for host in hosts)
            if not found:
                raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{destination.host} has no address")
        allowed = [address for address in found if self.may_reach(request.command, address)]
        self.check(bool(allowed), destination)
        return allowed

    def may_reach(self, command: Command, address: Address) -> bool:
        """`allow()`, and never this server itself: it would call itself until all descriptors are gone."""
        return self.allow(command, address) and not self.server.is_own(command, address)

    def check(self, allowed: bool, address: Address) -> None:
        if not allowed:
            raise RequestFailed(ReplyCode.NOT_ALLOWED, f"{address} is not allowed")

    # --- BIND ---

    def expected_peers(self, request: Request, until: float) -> List[Address]:
        """Who may call back; empty for anyone."""
        if request.destination.is_unspecified:
            self.check(self.allow(request.command, UNSPECIFIED), request.destination)
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
                welcome = (not hosts or peer.host in hosts) and self.allow(Command.BIND, peer)
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
        tunnel = Tunnel(self.connection, target, self.session, self.finished, self.server.idle_timeout, early)
        tunnel.start(relay)

    def finished(self) -> None:
        """The session is over; called by whoever had the client last."""
        self.server.finished(self)

    def session_ended(self) -> None:
        """
        The client has been served, or has not: `self.session` is complete.

        The default logs its line.  Called once for every client, in the thread that runs
        serve_forever(): no tunnel waits for it, but the other sessions' log lines do.
        """
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
        """Called in another thread: make whatever this conversation waits for fail now."""
        self.session.reason = self.session.reason or reason
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
            if os.name == "nt":     # where it takes this to wake a recv()
                self.connection.close()
        except OSError:             # it has ended by itself
            pass


class Socks5Server(socketserver.ThreadingTCPServer):
    """
    A SOCKS5 server: ``Socks5Server(("127.0.0.1", 1080)).serve_forever()``.

    `users` maps names to passwords; None asks nobody, and an empty mapping lets nobody in.
    The constructor binds and listens: with port 0, `server_address` has the port found.

    For the caller: serve_forever(), shutdown(), server_close(), add_listener(), `sessions`.
    shutdown() accepts no more clients, server_close() also ends the tunnels that live.

    Settings: the class attributes below, to be changed in a subclass or on the server
    before it serves.
    """

    commands: FrozenSet[Command] = frozenset(Command)   # the others get reply 07
    handshake_timeout: float = 30       # seconds from accept() until the request is complete
    connect_timeout: float = 10         # seconds for the look-up and all addresses together
    bind_timeout: float = 120           # seconds that BIND waits for its peer; FTP servers take a while
    idle_timeout: Optional[float] = None    # seconds a tunnel may be silent: ssh and chats are, for days
    route = Route()                     # which family, and which of our addresses, to go out by
    reassemble = False                  # put fragments of UDP datagrams together (hardly a client sends any)

    request_queue_size = 1024           # a page opens dozens at once, and a full backlog costs a second
    allow_reuse_address = os.name != "nt"   # there it would let others steal the port
    daemon_threads = True               # a script may end without us
    block_on_close = False              # socketserver's list of threads; ours are in listener.py
    address_family = socket.AF_INET

    def __init__(self, server_address: Tuple[Any, ...] = ("127.0.0.1", 1080),
                 RequestHandlerClass: Type[Socks5Handler] = Socks5Handler, bind_and_activate: bool = True,
                 *, users: Optional[Mapping[str, str]] = None) -> None:
        self.users = users
        self.ids = itertools.count(1)
        self.lock = threading.Lock()
        self.live: Dict[int, Socks5Handler] = {}            # by session id, until the session ends
        self.handshakes: Dict[int, Socks5Handler] = {}      # of those, whose request is to come; oldest first
        self.ended: queue.SimpleQueue[Optional[Socks5Handler]] = queue.SimpleQueue()
        self.relays: List[Relay] = []
        self.udp_relays: Set[Address] = set()               # where clients send their datagrams to
        self.listeners: List[Listener] = []
        self.stopping = False                               # serve_forever() has to end
        self.hurry: queue.SimpleQueue[None] = queue.SimpleQueue()   # wakes it from its pause
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
        try:
            handler = self.ended.get(timeout=timeout)
            while True:
                if handler is not None:
                    self.report(handler)
                handler = self.ended.get_nowait()
        except queue.Empty:
            pass

    def pause(self) -> None:
        """So that a burst of clients, each gone in a millisecond, does not wake us for each."""
        try:
            self.hurry.get(timeout=BATCH)
        except queue.Empty:
            pass

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

    def shutdown(self) -> None:
        """
        Make serve_forever() return; wait for that, unless called in its thread.

        Signal handlers of that thread may call it: no lock is taken that it could hold.
        """
        self.stopping = True
        self.ended.put(None)
        self.hurry.put(None)
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

    def handshake_done(self, handler: Socks5Handler) -> None:
        with self.lock:
            self.handshakes.pop(handler.session.id, None)

    def finished(self, handler: Socks5Handler) -> None:
        with self.lock:
            self.live.pop(handler.session.id, None)
            self.handshakes.pop(handler.session.id, None)
            if handler.session.bound is not None:
                self.udp_relays.discard(handler.session.bound)
        self.ended.put(handler)

    @property
    def sessions(self) -> List[Session]:
        """The clients being served now, oldest first."""
        with self.lock:
            return [handler.session for handler in self.live.values()]

    # --- what the handlers ask ---

    def relay_thread(self) -> Relay:
        """One that has room for another tunnel."""
        with self.lock:
            for relay in self.relays:
                if relay.has_room():
                    return relay
            relay = Relay()
            self.relays.append(relay)
            return relay

    def is_own(self, command: Command, address: Address) -> bool:
        """Whether this is one of our own sockets, where the server would talk to itself."""
        if command is Command.UDP_ASSOCIATE:
            return address in self.udp_relays
        return any(
            own.port == address.port
            and (own.host == address.host or (own.is_unspecified and outbound.is_own_address(address.host)))
            for own in (listener.address for listener in self.listeners)
        )


# What a server can be out of when a client comes: descriptors, memory, buffers.
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
