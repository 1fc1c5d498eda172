"""
The server: who is let in, what is known of them all, and how it ends.

A `socketserver` server, to be used and extended like any other:

    with Socks5Server(("127.0.0.1", 1080), users={"alice": "secret"}) as server:
        server.serve_forever()

The one idea: the clients have threads of their own (listener.py, handler.py), their tunnels the
relay thread (relay.py), and the thread that calls `serve_forever()` keeps the books.  It alone
tells of sessions that have ended, so that no log line, metric or hook ever holds up a client.

Not here: what is said to a client (handler.py).
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import socketserver
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from ipaddress import ip_address
from sysconfig import get_config_var
from typing import Any, Callable, Deque, Dict, FrozenSet, Iterable, List, Optional, Sequence, Set, Tuple, Type, Union, cast

from . import outbound
from .datagrams import Association
from .descriptors import CLIENT, descriptors
from .handler import Socks5Handler
from .listener import OUT_OF, RETRY, Listener
from .outbound import Route
from .places import Places
from .protocol import Address, Command
from .relay import Relay, tune
from .rules import Network, Rule, Rules, behind, is_local
from .session import Session
from .users import Guessing, Users, UsersFile

logger = logging.getLogger("socks5srv")

# One carries all that Python can carry at a time; where it runs free, on all cores, there is one for each.
RELAY_THREADS = os.cpu_count() or 1 if get_config_var("Py_GIL_DISABLED") else 1

MOST_ENDED = 10_000 # sessions to be told of, after which no more clients are accepted until that is done
BATCH = 0.05        # seconds between two looks at the sessions that have ended
LAST_WORDS = 0.3    # seconds that conversations have to end when the server does: a hash or an overridden method may take longer
TELL_AGAIN = 60.0   # seconds until the same trouble is told again
KINDS = 1000        # of trouble that are remembered; who makes up new ones gets each told once


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


class News:
    """
    Which kinds of trouble have been told of lately: each once a minute, so that nobody fills the log with one.

    What is left out is counted, and told with the next line of its kind.  Any thread may call it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # When each was told last, and how many have been left out since; the one told longest ago comes first.
        self.kinds: OrderedDict[str, Tuple[float, int]] = OrderedDict()

    def left_out(self, kind: str) -> Optional[int]:
        """One more of this kind is to be told: how many have been left out before it; None if it is left out, too."""
        now = time.monotonic()
        with self.lock:
            told, count = self.kinds.get(kind, (float("-inf"), 0))
            if now - told < TELL_AGAIN:
                self.kinds[kind] = told, count + 1
                return None
            self.note(kind, now, 0)
            return count

    def told(self, kind: str) -> None:
        """Another process has told of this kind; what is left out here is still told here."""
        with self.lock:
            _told, count = self.kinds.get(kind, (0.0, 0))
            self.note(kind, time.monotonic(), count)

    def note(self, kind: str, told: float, count: int) -> None:
        self.kinds[kind] = told, count
        self.kinds.move_to_end(kind)
        if len(self.kinds) > KINDS:
            self.kinds.popitem(last=False)


def and_more(left_out: int) -> str:
    """The end of a line before which so many of its kind have been left out."""
    return f" (and {left_out} more since the last line like this)" if left_out else ""


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
    max_handshakes = 512                # clients that have not asked for anything yet; one of the address that has most makes room
    max_logins = 256                    # beyond those, clients whose password is being checked: some eight seconds of work
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
        descriptors.measure()                               # the program may have changed its limit
        self.news = News()
        self.ids = itertools.count(1)
        self.lock = threading.Lock()
        self.live: Dict[int, Socks5Handler] = {}            # by session id, until the client is gone
        self.handshakes: Dict[int, Socks5Handler] = {}      # of those, whose request is to come; oldest first
        self.slow: Places[Socks5Handler] = Places()         # of those, that have the word
        self.logins: Places[Socks5Handler] = Places()       # and those whose password is being checked
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
        self.server_address = outbound.with_scope(self.server_address)
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
            sock.bind(outbound.with_scope(server_address))
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
                self.attempt(self.keep_books, poll_interval)
                self.attempt(self.end_slow_handshakes)
                self.attempt(self.service_actions)
                self.attempt(self.pause)
        finally:
            self.stopping = False
            try:
                for listener in self.listeners:
                    listener.stop()
            finally:
                self.stopped.set()

    def attempt(self, duty: Callable[..., Any], *arguments: Any) -> None:
        """
        Call it, and go on whatever comes of it: a users file that cannot be opened must not end every tunnel.

        For all that the thread of serve_forever() does by itself.
        """
        try:
            duty(*arguments)
        except Exception as error:
            with suppress(Exception):       # a log that fails is no place to tell of it
                self.tell_of(error)

    def tell_of(self, error: Exception) -> None:
        """Log an error that no client can be told of, once a minute.  To be out of something is no bug."""
        if isinstance(error, OSError) and error.errno in OUT_OF:
            self.warn("short", "%s: new clients have to wait; fewer at a time (--max-clients) or ulimit -n help", error.strerror)
        else:
            self.tell(logging.ERROR, f"bug {error!r}", "a bug, met while keeping the books", error=error)

    def keep_books(self, timeout: float) -> None:
        """Tell of all sessions that have ended; wait so many seconds for the first."""
        self.bell.wait(timeout)
        while self.ended:
            self.attempt(self.report, self.ended.popleft())

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
            for handler in self.being_served():
                if handler.session.user in gone:
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
            listener.join(timeout=LAST_WORDS)
        for relay in self.relays:
            relay.stop()
        self.relays.clear()
        self.keep_books(timeout=0)

    # --- one client ---

    def get_request(self) -> Tuple[socket.socket, Any]:
        return self.accept(self.socket)

    def accept(self, sock: socket.socket) -> Tuple[socket.socket, Any]:
        """Wait for a client.  OSError when there is none to be had, after a pause if we are out of something."""
        while len(self.ended) > MOST_ENDED and not self.stopping:      # a log that is stuck; each of them takes memory
            time.sleep(RETRY)
        try:
            connection, client_address = sock.accept()
        except OSError as error:
            if error.errno in OUT_OF:
                # The client stays in the backlog, so that the next try would fail as fast.
                self.tell_of(error)
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
            refusal = self.one_more(client_address)
        if refusal:
            self.warn(*refusal)
        return not refusal

    def one_more(self, client_address: Any) -> Tuple[Any, ...]:
        """Count one more client, or say why not, in the words of warn(); to be called with the lock."""
        if self.max_clients is not None and self.clients >= self.max_clients:
            return "full", "%d clients are being served, and more do not fit: see --max-clients", self.clients
        if self.max_per_client is not None:
            host = Address.of(client_address).host
            if self.hosts[host] >= self.max_per_client:
                return "full " + host, "%s has %d connections, and may have no more", host, self.max_per_client
        if not descriptors.take_for_client():
            return "full", "%d clients are being served, and the descriptors allow no more: see ulimit -n", self.clients
        if self.max_per_client is not None:
            self.hosts[host] += 1
        self.clients += 1
        return ()

    def one_less(self, host: str) -> None:
        """Count one client of this host less; to be called with the lock."""
        self.clients -= 1
        descriptors.give_back(CLIENT)
        if self.max_per_client is not None:
            self.hosts[host] -= 1
            if self.hosts[host] <= 0:
                del self.hosts[host]

    @property
    def most_clients(self) -> float:
        """How many clients there may be: `max_clients`, or fewer if the descriptors do not allow as many."""
        return min(descriptors.most_clients, float("inf") if self.max_clients is None else self.max_clients)

    def warn(self, kind: str, message: str, *details: object) -> None:
        """Log it, once a minute for each kind of trouble."""
        self.tell(logging.WARNING, kind, message, *details)

    def tell(self, level: int, kind: str, message: str, *details: object, error: Optional[Exception] = None) -> None:
        """The same on any level, with a traceback if there is an `error`."""
        left_out = self.left_out(kind)
        if left_out is not None:
            extra = {"facts": {"left_out": left_out}} if left_out else None
            logger.log(level, message + "%s", *details, and_more(left_out), exc_info=error, extra=extra)

    def left_out(self, kind: str) -> Optional[int]:
        """Of this kind of trouble, how many have been left out before the line that is due; None if none is due."""
        return self.news.left_out(kind)

    def tell_of_stranger(self, session: Session) -> None:
        """Log a client that did not speak SOCKS5: the same mistake of the same host once a minute."""
        left_out = self.left_out(f"{session.client.host} {session.reason}")
        if left_out is not None:
            logger.info("%s%s", session, and_more(left_out), extra={"session": session, "left_out": left_out})

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base does it, but a handler of ours closes the socket itself, unless the relay thread has it by now."""
        try:
            handler = self.RequestHandlerClass(request, client_address, cast(Any, self))
        except Exception:
            self.handle_error(request, client_address)
            if not self.is_live(request):
                self.shutdown_request(request)
        else:
            if not isinstance(handler, Socks5Handler):
                self.shutdown_request(request)

    def is_live(self, request: Any) -> bool:
        """Whether there is a handler that has not finished with this connection."""
        with self.lock:
            return any(handler.request is request for handler in self.live.values())

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
            self.slow.add(handler)
            crowded_out = self.slow.fullest()[0] if self.slow.total > self.max_handshakes else None
        if crowded_out is not None:
            self.handshake_done(crowded_out)
            crowded_out.hang_up("too many clients were slower to ask than this one")

    def login_begins(self, handler: Socks5Handler) -> None:
        """It has sent its login: from now on it waits for us, and is not slow."""
        with self.lock:
            self.slow.discard(handler)
            self.logins.add(handler)
            # The newest: it will be the last whose turn comes, and of those that have failed a guesser loses least.
            crowded_out = self.logins.fullest(self.guessing.has_failed)[-1] if self.logins.total > self.max_logins else None
            if crowded_out is not None:
                self.logins.discard(crowded_out)
        if crowded_out is not None:
            crowded_out.hang_up("too many logins are being checked")

    def login_over(self, handler: Socks5Handler) -> None:
        """Right or wrong, the client has the word again."""
        with self.lock:
            if self.logins.discard(handler) and handler.session.id in self.handshakes:
                self.slow.add(handler)

    def handshake_done(self, handler: Socks5Handler) -> None:
        with self.lock:
            self.forget_handshake(handler)

    def forget_handshake(self, handler: Socks5Handler) -> None:
        """To be called with the lock."""
        if self.handshakes.pop(handler.session.id, None) is not None and not self.slow.discard(handler):
            self.logins.discard(handler)

    def session_over(self, handler: Socks5Handler) -> None:
        """Its session is over: tell of it soon, and once.  Its place it has until finished()."""
        if not handler.reported:
            handler.reported = True
            self.ended.append(handler)
            self.bell.ring()

    def finished(self, handler: Socks5Handler) -> None:
        """The client is gone, and there is room for another."""
        with self.lock:
            self.one_less(handler.session.client.host)
            self.live.pop(handler.session.id, None)
            if handler.session.id in self.handshakes:
                self.forget_handshake(handler)
            if isinstance(handler.carried, Association):
                self.udp_relays.discard(handler.carried.bound)
        if handler.reserved:
            descriptors.give_back(handler.reserved)
        self.session_over(handler)

    @property
    def sessions(self) -> List[Session]:
        """The clients being served now, oldest first."""
        return [handler.session for handler in self.being_served()]

    def being_served(self) -> List[Socks5Handler]:
        """Of the clients that are there those whose session is not over; who has been refused may still linger."""
        with self.lock:
            return [handler for handler in self.live.values() if handler.session.seconds is None]

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
        """Whether this is an address of this computer, with its zone if it has one."""
        return is_loopback(host) or outbound.is_own_address(host)

    def is_local(self, address: Address) -> bool:
        """Whether only this computer should reach this: its own addresses, and those by which its programs hear what is for many."""
        return is_local(address) or any(outbound.is_heard_here(each.zoned) for each in (address.dialled, *behind(address)))

    @cached_property
    def beyond_loopback(self) -> bool:
        return not all(is_loopback(listener.address.host) for listener in self.listeners)

    def is_own(self, command: Command, address: Address) -> bool:
        """Whether this leads to one of our own sockets, where the server would talk to itself."""
        is_ours = self.is_udp_relay if command is Command.UDP_ASSOCIATE else self.is_listener
        return is_ours(address) or any(map(is_ours, behind(address)))

    def is_udp_relay(self, address: Address) -> bool:
        return address in self.udp_relays

    def is_listener(self, address: Address) -> bool:
        for listener in self.listeners:
            own = listener.address
            if own.port == address.port and (own.host == address.host or (own.is_unspecified and outbound.is_own_address(address.zoned))):
                return True
        return False


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether this is an IP address of that kind.  Asked for each client, and found out slowly."""
    return ip_address(host.partition("%")[0]).is_loopback
