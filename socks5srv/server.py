"""
The server: listeners, the thread that reports sessions, start and stop.

A `socketserver` server, to be used and extended like any other:

    with Socks5Server(("127.0.0.1", 1080), users={"alice": "secret"}) as server:
        server.serve_forever()

The one idea: the clients have threads of their own (listener.py, handler.py), their tunnels the
relay thread (relay.py), and the thread that calls `serve_forever()` reports sessions that have
ended, so that no log line, metric or hook ever holds up a client.  (Those that are left when the
server is closed are reported by the thread that closes it.)

Not here: what is said to a client (handler.py), who is counted (registry.py), what is allowed (policy.py).
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import threading
import time
from collections import deque
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from ipaddress import ip_network
from sysconfig import get_config_var
from typing import Any, Callable, Deque, FrozenSet, Iterable, List, Optional, Sequence, Tuple, Type, Union, cast

from . import outbound
from .descriptors import descriptors, on_error
from .handler import Socks5Handler
from .listener import OUT_OF, RETRY, Listener
from .observer import HookTable, Observer
from .outbound import Route
from .policy import Policy, is_loopback
from .protocol import Address, Command
from .proxyprotocol import BadHeader, ForwardedAddress, HeaderReader, OnlyConnected
from .ratelimit import RateLimit, Resilient
from .registry import Refusal, Registry
from .relay import Relay, tune
from .rules import Network, Rule, Rules
from .session import Session
from .users import Users
from .waker import Bell

logger = logging.getLogger("socks5srv")

# One carries all that Python can carry at a time; where it runs free, on all cores, there is one for each.
RELAY_THREADS = os.cpu_count() or 1 if get_config_var("Py_GIL_DISABLED") else 1

MOST_ENDED = 10_000 # sessions to be reported, after which no more clients are accepted until that is done
BATCH = 0.05        # seconds between two looks at the sessions that have ended
LAST_WORDS = 0.3    # seconds that conversations have to end when the server does: a hash or an overridden method may take longer


class Defaults:
    """The settings of a Socks5Server, which tells what they mean."""

    users: Any = None                   # once it serves: a Users
    rules: Any = ()                     # Rules
    allow_from: Sequence[Network] = ()
    allow_open_proxy = False
    allow_local_targets = False
    proxy_protocol: Sequence[Network] = ()
    commands: FrozenSet[Command] = frozenset(Command)
    gssapi: Any = None
    upstream: Any = None
    route = Route()
    max_clients: Optional[int] = None
    max_per_client: Optional[int] = None
    max_handshakes = 512
    max_logins = 256
    handshake_timeout: float = 30
    connect_timeout: float = 10
    bind_timeout: float = 120
    idle_timeout: Optional[float] = None
    drain_grace: float = 0
    drain_timeout: Optional[float] = 3
    relay_threads = RELAY_THREADS
    reassemble = False


class Drain:
    """The two moments in the end of a server that drains, by time.monotonic()."""

    def __init__(self, grace: float, timeout: Optional[float]) -> None:
        self.closing = time.monotonic() + grace         # until then clients are accepted
        self.end = float("inf") if timeout is None else self.closing + timeout      # those that are left then are cut off
        self.accepting = True


class Socks5Server(Resilient, Defaults, socketserver.ThreadingTCPServer):
    """
    A SOCKS5 server: ``Socks5Server(("127.0.0.1", 1080)).serve_forever()``.

    The constructor binds and listens: with port 0, `server_address` has the port found.  Instead it adopts `sockets` that
    listen already, if there are any.  Settings are passed by name, or are attributes of a subclass, or of the server before
    it serves.  TypeError for a name that is none; ValueError, before anything is bound, where it would be an open proxy.

    For callers: serve_forever(), drain(), shutdown(), server_close(), add_listener(), call(); `sessions`, `observers`, and
    `server_address`.  For overriding: what socketserver documents, such as service_actions() and verify_request().
    For the other modules: relay_thread(), warn_once(), `draining`, `hooks`, `listeners`, `policy`, `rate_limit`, `registry`,
    `relays`, `serving_thread`, `stopped`, `stopping`.

    Attributes:
        users: passwords by name, or a UsersFile; None asks for no password, with an empty mapping none is right (None)
        rules: what may be reached, in lines like ``"deny *.ads.example"``: see rules.py (none: everything)
        allow_from: networks whose clients need no password; without users, the only ones that are served (none)
        allow_open_proxy: let whoever reaches it use it, beyond loopback and without a password (False)
        allow_local_targets: let other computers reach what only this one should: see rules.py (False)
        proxy_protocol: networks of load balancers, which have to send a PROXY header in front of what each client sends (none)
        commands: a set of Command; the others get reply 07 (all three)
        gssapi: who may log in by Kerberos, and how, if the handler is a GssapiHandler: see gssapi/handler.py (None)
        upstream: URL of the proxy to go out through, if the handler is an UpstreamHandler (None)
        route: address family, and own address, of outgoing connections (Route(): any)
        max_clients: connections at a time (None: as many as the descriptors allow)
        max_per_client: of those, from one address (None: no limit)
        max_handshakes: connections without a request yet; beyond them, the oldest of the address that has most is evicted (512)
        max_logins: connections whose password is being checked; beyond them, the newest of such an address (256: 8 s of work)
        handshake_timeout: seconds from accept() until the request is complete (30)
        connect_timeout: seconds for the DNS lookup and all addresses together (10)
        bind_timeout: seconds that BIND waits for its peer (120: FTP servers take a while)
        idle_timeout: seconds a tunnel may be silent (None: no limit, since ssh and chats are, for days)
        drain_grace: seconds that drain() goes on accepting, for a load balancer to notice (0: there may be none)
        drain_timeout: seconds that it then waits for the clients at most (3: a page has come by then, and nobody believes that it hangs; None: no limit)
        relay_threads: threads that carry tunnels, if there are as many; more where one is full (1; free-threaded: one a core)
        reassemble: put fragments of UDP datagrams together (False: hardly a client sends any)
        observers: told what happens to each client: see observer.py (none)
    """

    request_queue_size = 1024           # a page opens dozens at once, and a full backlog costs a second
    allow_reuse_address = os.name != "nt"   # there it would let others steal the port
    daemon_threads = True               # a script may end without us

    def __init__(self, server_address: Tuple[Any, ...] = ("127.0.0.1", 1080),
                 RequestHandlerClass: Type[Socks5Handler] = Socks5Handler, bind_and_activate: bool = True,
                 *, users: Union[Users, Mapping[str, str], None] = None, rules: Iterable[Union[str, Rule]] = (),
                 sockets: Sequence[socket.socket] = (), **settings: Any) -> None:
        refuse_unknown(settings, type(self), "Socks5Server", Socks5Server)
        self.observers = ()
        for name, value in settings.items():
            setattr(self, name, value)
        if self.gssapi is not None and not getattr(RequestHandlerClass, "asks_for_login", False):
            raise ValueError("gssapi= needs a GssapiHandler, which asks for it")
        self.users = self.users if users is None else users
        self.rules = rules or self.rules
        self._parse_settings()
        descriptors.measure()                               # the program may have changed its limit
        self.policy = Policy(self)
        self.registry: Registry[Socks5Handler] = Registry(self, self.policy.throttle)
        self.rate_limit = RateLimit()
        self._headers = HeaderReader()
        self._lock = threading.Lock()
        self.relays: List[Relay] = []
        self.listeners: List[Listener] = []
        self._calls: Deque[Callable[[], Any]] = deque()     # for the thread of serve_forever()
        self.stopping = False                               # serve_forever() has to end
        self.draining: Optional[Drain] = None               # it ends when the clients have gone
        self._wake_now = Bell()                             # wakes it from its pause, too
        self.stopped = threading.Event()                    # it has ended
        self.stopped.set()
        self.serving_thread: Optional[threading.Thread] = None      # in serve_forever()
        if sockets:
            socketserver.BaseServer.__init__(self, sockets[0].getsockname(), RequestHandlerClass)
            for sock in sockets:
                self._refuse_to_be_open(Address.of(sock.getsockname()).host)
            self.socket = sockets[0]
        else:
            if ":" in server_address[0]:
                self.address_family = socket.AF_INET6
            super().__init__(server_address, RequestHandlerClass, bind_and_activate)
        self.listeners += [Listener(sock, self._accept, self._talk) for sock in sockets or [self.socket]]

    def _parse_settings(self) -> None:
        """Those that a person may have written as text.  ValueError if it cannot be read."""
        if isinstance(self.users, Mapping):
            self.users = Users(self.users)
        if not isinstance(self.rules, Rules):
            self.rules = Rules.parse(self.rules)
        self.allow_from = tuple(map(ip_network, self.allow_from))
        self.proxy_protocol = tuple(map(ip_network, self.proxy_protocol))

    def _refuse_to_be_open(self, host: str) -> None:
        """ValueError if whoever can reach this host, as bind() takes it, could use the server, and nothing says that it is meant."""
        authenticates = getattr(self.RequestHandlerClass, "authenticate", None) is not Socks5Handler.authenticate
        if self.allow_open_proxy or self.allow_from or authenticates or self._asks_for_login:
            return
        if is_for_here(host) and not self.proxy_protocol:       # a balancer brings clients from everywhere
            return
        raise ValueError(
            f"on {host or 'all addresses'} this would be an open proxy: pass users=, or allow_from= with networks, or a handler that "
            "overrides authenticate(); or listen on 127.0.0.1; or pass allow_open_proxy=True, and everybody may use it"
        )

    @property
    def _asks_for_login(self) -> bool:
        """Whether who is in none of the networks of allow_from can get in all the same."""
        return self.users is not None or getattr(self.RequestHandlerClass, "asks_for_login", False)

    @property
    def observers(self) -> Sequence[Observer]:
        """They are told of the clients that come from now on: ``server.observers += (Counter(),)``."""
        return self._current_observers

    @observers.setter
    def observers(self, observers: Sequence[Observer]) -> None:
        self._current_observers = tuple(observers)
        self.hooks = HookTable(observers)

    def server_bind(self) -> None:
        """As the base does it, unless it would be an open proxy."""
        self._refuse_to_be_open(str(self.server_address[0]))
        prepare(self.socket, str(self.server_address[0]))
        self.server_address = outbound.with_scope(self.server_address)
        super().server_bind()

    def add_listener(self, server_address: Tuple[Any, ...]) -> Tuple[Any, ...]:
        """Listen on another address as well; returns it, with the port found for port 0.  OSError, or ValueError, if it may not."""
        self._refuse_to_be_open(server_address[0])
        sock = listening_socket(server_address, self.route.socket_factory)
        self.listeners.append(Listener(sock, self._accept, self._talk))
        return cast(Tuple[Any, ...], sock.getsockname())

    # --- serving ---

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown(), called in another thread or a signal handler.  In this thread the sessions that have ended are reported."""
        self._parse_settings()
        for listener in self.listeners if self.proxy_protocol else ():
            self._refuse_to_be_open(listener.address.host)      # it may be set only now
        try:
            with self._lock:
                if not self.stopping:
                    for listener in self.listeners:
                        listener.talk = self._talk_behind_balancer if self.proxy_protocol else self._talk
                        listener.start(self.request_queue_size)
                self.serving_thread = threading.current_thread()
                self.stopped.clear()
            while not self.stopping:
                self._attempt(self._report_ended, BATCH if self.draining else poll_interval)
                self._attempt(self.registry.hang_up_on_slow, self.handshake_timeout)
                self._attempt(self.service_actions)
                self._attempt(self._continue_drain)
                self._attempt(self._pause)
        finally:
            self.stopping, self.draining = False, None
            try:
                for listener in self.listeners:
                    listener.stop()
            finally:
                self.stopped.set()

    def _report_ended(self, timeout: float) -> None:
        """Report all sessions that have ended; wait so many seconds for the first."""
        self.registry.wake.wait(timeout)
        while self.registry.to_report:
            self._attempt(self._report, self.registry.to_report.popleft())

    def _pause(self) -> None:
        """So that a burst of clients, each gone in a millisecond, does not wake us for each."""
        self._wake_now.wait(BATCH)

    def _report(self, handler: Socks5Handler) -> None:
        for ended in handler.hooks.ended:
            ended(handler.session)
        try:
            handler.session_ended()
        except Exception:
            self.handle_error(None, handler.client_address)

    def service_actions(self) -> None:
        """Called at least every `poll_interval`: do what is to be done in this thread; reload the users if they changed."""
        for _ in range(len(self._calls)):        # one that has itself called again waits for the next turn
            self._attempt(self._calls.popleft())
        gone = self.users.refresh() if self.users is not None else set()
        if gone:
            for handler in self.registry.serving():
                if handler.session.user in gone:
                    handler.hang_up("the user has been removed")

    def call(self, function: Callable[[], Any]) -> None:
        """Have it called soon, in the thread of serve_forever(); signal handlers may call this."""
        self._calls.append(function)
        self.registry.wake.ring()

    def shutdown(self) -> None:
        """Make serve_forever() return; wait for that, unless called in its thread, where signal handlers may call it."""
        self.stopping = True            # no lock is taken: what a signal has interrupted could hold it
        self.registry.wake.ring()
        self._wake_now.ring()
        if threading.current_thread() is not self.serving_thread:
            self.stopped.wait()

    def drain(self) -> None:
        """
        Make serve_forever() return when the clients have gone; wait for that, as shutdown() does.

        For `drain_grace` seconds clients are still accepted.  Then those in the accept queue are, the listeners are closed,
        and the server waits for its clients, but only for `drain_timeout` seconds.  shutdown() makes an end of it at once.
        """
        self.draining = self.draining or Drain(self.drain_grace, self.drain_timeout)
        self.registry.wake.ring()
        self._wake_now.ring()
        if threading.current_thread() is not self.serving_thread:
            self.stopped.wait()

    def _continue_drain(self) -> None:
        """Whatever of it is due."""
        drain = self.draining
        if drain is None or time.monotonic() < drain.closing:
            return
        drain.accepting = False
        self._stop_accepting()
        if self._is_deserted() or time.monotonic() >= drain.end:
            self.stopping = True

    def _stop_accepting(self) -> None:
        """Once; but what has failed is tried again."""
        for listener in self.listeners:
            if listener.socket.fileno() >= 0:
                self._attempt(listener.drain)

    def _is_deserted(self) -> bool:
        """Nobody is served, and nobody has just been accepted, who is not counted yet."""
        return not any(listener.threads for listener in self.listeners) and not self.registry.clients

    def _accepts(self) -> bool:
        return not self.stopping and (self.draining is None or self.draining.accepting)

    def server_close(self) -> None:
        """Stop, close the listeners, end all conversations and tunnels, and wait for the threads."""
        with self._lock:
            self.stopping = True        # for a serve_forever() that is just about to begin
            serving = not self.stopped.is_set()
        if serving:
            self.shutdown()
            self.stopping = True
        for listener in self.listeners:
            listener.close()
        super().server_close()
        for handler in self.registry.everyone():
            handler.hang_up("server stopped", "stopped")
        self._headers.close()
        for listener in self.listeners:
            listener.join(timeout=LAST_WORDS)
        for relay in self.relays:
            relay.stop()
        self.relays.clear()
        self._report_ended(timeout=0)

    # --- one client ---

    def _accept(self, sock: socket.socket) -> Tuple[socket.socket, Any]:
        """Wait for a client.  OSError when there is none to be had, after a pause if we are out of something."""
        while len(self.registry.to_report) > MOST_ENDED and self._accepts():        # a log that is stuck; each of them takes memory
            time.sleep(RETRY)
        try:
            connection, client_address = sock.accept()
        except OSError as error:
            if self._accepts():
                for accept_failed in self.hooks.all.accept_failed:
                    accept_failed(error)
            if error.errno in OUT_OF:
                # The client stays in the backlog, so that the next try would fail as fast.
                self._tell_of(error)
                self.stopped.wait(RETRY)
            raise
        if os.name != "posix":
            tune(connection)
        return connection, client_address

    def _talk(self, connection: socket.socket, client_address: Any) -> None:
        """What socketserver does with a request, in the thread that has accepted it."""
        if self.verify_request(connection, client_address):
            self.process_request_thread(connection, client_address)
        else:
            self.shutdown_request(connection)

    def _talk_behind_balancer(self, connection: socket.socket, peer_address: Any) -> None:
        """_talk() to the client that a balancer has told of; to others as ever."""
        peer = Address.of(peer_address)
        if not self.policy.is_balancer(peer):
            self._talk(connection, peer_address)
            return
        try:
            header = self._headers.read(connection, peer, self.max_handshakes)
        except OnlyConnected:
            logger.debug("%s has connected, to check our health", peer)
        except BadHeader as error:
            self._turn_away(peer, Refusal(f"header {peer.host}", f"{peer} rejected: {error}"))
        else:
            client = self.policy.client_behind(peer, header.source)
            self._talk(connection, ForwardedAddress.of(client, peer, header))
            return
        self.shutdown_request(connection)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to talk to this client at all."""
        refusal = self._admit(client_address)
        if refusal is None:
            return True
        self._turn_away(Address.of(client_address), refusal)
        return False

    def _turn_away(self, client: Address, refusal: Refusal) -> None:
        """Tell of a client that is not let in."""
        self.warn_once(refusal.kind, "%s", refusal.reason)
        for turned_away in self.hooks.all.turned_away:
            turned_away(client, refusal.reason)

    def _admit(self, client_address: Any) -> Optional[Refusal]:
        """Count one more client, or say why not."""
        host = client_address[0]
        if ":" in host or self.allow_from:      # else it is an IPv4 address as it stands, and nothing need be asked about it
            client = Address.of(client_address)
            host = client.host
            if self.allow_from and not self._asks_for_login and not self.policy.trusts(client):
                return Refusal(f"rejected {host}", f"{host} rejected: not in --allow-from")
        return self.registry.admit(host)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base does it, but a handler of ours closes the socket itself, unless the relay thread has it by now."""
        try:
            handler = self.RequestHandlerClass(request, client_address, cast(Any, self))
        except Exception:
            self.handle_error(request, client_address)
            if all(handler.request is not request for handler in self.registry.everyone()):
                self.shutdown_request(request)
        else:
            if not isinstance(handler, Socks5Handler):
                self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not a protocol failure but a bug, here or in an overridden method."""
        logger.exception("unhandled exception while serving %s", client_address)

    # --- what the handlers ask ---

    @property
    def sessions(self) -> List[Session]:
        """The clients being served now, oldest first."""
        return [handler.session for handler in self.registry.serving()]

    def relay_thread(self) -> Relay:
        """The one that has the least to watch; a new one while there may be more, or where it is full."""
        with self._lock:
            relay = min(self.relays, key=lambda each: len(each.watched), default=None)
            if relay is None or len(self.relays) < self.relay_threads or len(relay.watched) + 4 > relay.waiter.room:
                relay = Relay(splices=self.route.socket_factory is socket.socket)     # the kernel moves only plain sockets
                self.relays.append(relay)
            return relay


def refuse_unknown(keywords: Iterable[str], server: Type[Socks5Server], called: str, function: Callable[..., Any]) -> None:
    """TypeError, with what may have been meant, for a keyword that is no setting of the server (nor a parameter of `function`)."""
    for keyword in keywords:
        if not is_setting(server, keyword):
            known = [name for name, parameter in signature(function).parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
            similar = get_close_matches(keyword, [*known, *(name for name in dir(server) if is_setting(server, name))], 1)
            hint = f"did you mean {similar[0]!r}?" if similar else "help(Socks5Server) lists the settings"
            raise TypeError(f"{called}() got an unexpected keyword {keyword!r}; {hint}")


def is_setting(server: Type[Socks5Server], name: str) -> bool:
    """Whether it can be set on such a server.  (What any socketserver has is none of ours.)"""
    if name.startswith("_") or not hasattr(server, name) or hasattr(socketserver.ThreadingTCPServer, name):
        return False
    default = getattr(server, name)
    return not callable(default) and not (isinstance(default, property) and default.fset is None)


def is_for_here(host: str) -> bool:
    """Whether only this computer reaches what listens there: an IP address, a name, or "" for all.  OSError if there is no such name."""
    try:
        return is_loopback(host)
    except ValueError:              # bind() looks it up just so
        return is_loopback(socket.gethostbyname(host))


def listening_socket(
    server_address: Tuple[Any, ...], factory: Callable[..., socket.socket] = socket.socket, reuse_port: bool = False,
) -> socket.socket:
    """A socket that listens there; its getsockname() has the port found for port 0."""
    sock = factory(socket.AF_INET6 if ":" in server_address[0] else socket.AF_INET, socket.SOCK_STREAM)
    with on_error(sock.close):
        if Socks5Server.allow_reuse_address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        prepare(sock, server_address[0])
        sock.bind(outbound.with_scope(server_address))
        sock.listen(Socks5Server.request_queue_size)
    return sock


def prepare(sock: socket.socket, host: str) -> None:
    """Set what has to be set before bind()."""
    if sock.family == socket.AF_INET6:
        # "::" is asked for to serve everybody, IPv4 too; a concrete address means itself.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
    if os.name == "posix":
        tune(sock)          # accepted sockets inherit it, which saves five calls for each
