"""
What the tests share: servers, clients and targets, all of them real, and all on this computer.

Fixtures with a verb for a name are factories: call them as often as needed, and what they
made is closed at the end.  Whatever waits has a timeout, so a test that hangs is a test that
fails.  At the end of every test no thread of a server, no descriptor and no logged bug may be left.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import select
import signal
import socket
import socketserver
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Callable, Iterator, List, Optional, Tuple, Type, TypeVar, Union

import pytest
from hypothesis import HealthCheck, settings

from socks5srv.descriptors import descriptors as descriptors_of_servers
from socks5srv.protocol import (
    Address, AddressType, Command, Credentials, CredentialsReply, Greeting, Message, Method, MethodSelection, Reply,
    ReplyCode, Request, RequestFailed, read_exactly,
)
from socks5srv.handler import Socks5Handler
from socks5srv.outbound import Route
from socks5srv.server import Socks5Server
from socks5srv.session import Session
from socks5srv.users import Hash

from .networks import LinkLocal, link_local_address, network_of_its_own

pytest_plugins = ["socks5srv.testing.pytest_plugin", "tests.program", "tests.kerberos"]      # the first if it is not installed, too

TIMEOUT = 10.0              # seconds after which something that was waited for does not come
LOCALHOST = "127.0.0.1"
IGNORED = "SOCKS5SRV_TESTS_IGNORE"      # an environment variable with the numbers of signals

# No database: its files have no place in the checkout.
settings.register_profile("socks5srv", deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("socks5srv")

T = TypeVar("T")
Place = Union[Address, Tuple[Any, ...]]


def pytest_configure(config: pytest.Config) -> None:
    # A socket left to the garbage collector, or a thread that died of an exception, is a failure.
    config.addinivalue_line("filterwarnings", "error")
    hear_signals_that_are_ignored()
    if getattr(config.option, "dist", None) == "load":      # pytest-xdist: long tests at the end would be waited for
        config.option.dist = "worksteal"


def hear_signals_that_are_ignored() -> None:
    """
    Programs that the tests start can be interrupted, even where a shell's & or nohup has us ignore that.

    A child inherits that a signal is ignored, but no handler; and one that does nothing ignores it as well.  The workers of
    pytest-xdist, our children, are told to go on ignoring it.
    """
    for number in [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]:
        if signal.getsignal(number) is signal.SIG_IGN or str(int(number)) in os.environ.get(IGNORED, "").split():
            signal.signal(number, lambda _number, _frame: None)
            os.environ[IGNORED] = f"{os.environ.get(IGNORED, '')} {int(number)}"


def socket_for(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def can_bind(host: str) -> bool:
    with suppress(OSError), socket_for(host) as sock:
        sock.bind((host, 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not can_bind("::1"), reason="no IPv6 on this computer")
needs_neighbour = pytest.mark.skipif(not can_bind("127.0.0.2"), reason="127.0.0.1 is the only loopback address here")
HAS_PROC = os.path.isdir("/proc/self/fd")
needs_proc = pytest.mark.skipif(not HAS_PROC, reason="no /proc here to count descriptors in")


def address_of(place: Place) -> Address:
    """An `Address` of one, or of what getsockname() says; a host that is no IP address is a name."""
    return place if isinstance(place, Address) else Address.named(*place[:2])


def name(host: str, port: int) -> Address:
    """The address with ATYP 03, even if the host is an IP address."""
    return Address(host, port, AddressType.DOMAINNAME)


def on_one_port(*makers: Callable[[int], Any]) -> List[Any]:
    """What they make on one and the same port of different addresses; each is called with a port."""
    for _ in range(100):        # at one of the addresses somebody else may have the port
        made = [makers[0](0)]
        place = getattr(made[0], "server_address", None) or (made[0] if isinstance(made[0], tuple) else made[0].getsockname())
        try:
            return made + [make(place[1]) for make in makers[1:]]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("no port that is free at all of the addresses")


def eventually(condition: Callable[[], T], timeout: float = TIMEOUT, pause: float = 0.002) -> T:
    """Wait for what nothing tells of; the first true value, or an AssertionError.  `pause`: seconds between two looks."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        threading.Event().wait(pause)
    raise AssertionError("it did not come about in time")


def soon(seconds: float = 0.3) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def within(seconds: float) -> float:
    """The most seconds that something may take here: more, if other tests run beside this one."""
    return seconds * (5 if "PYTEST_XDIST_WORKER" in os.environ else 1)


@contextmanager
def fails_with(code: ReplyCode, match: Optional[str] = None) -> Iterator[Any]:
    """What is done within raises a `RequestFailed` of this code."""
    with pytest.raises(RequestFailed, match=match) as caught:
        yield caught
    assert caught.value.code is code


def in_thread(function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
    """Call it in a thread; the result waits for what it returns, and raises what it raises."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(function(*arguments))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name=f"test-{function.__name__}", daemon=True).start()
    return lambda: answer.result(TIMEOUT)


# --- the end of every test ---

def descriptors() -> List[str]:
    """What the descriptors of this process lead to, but for the one that reads the list; nothing where that cannot be told."""
    found = []
    for fd in os.listdir("/proc/self/fd") if HAS_PROC else []:
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(found)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    """Autouse, so set up before and torn down after all the others."""
    before = len(descriptors())
    yield
    eventually(lambda: len(descriptors()) <= before)    # a look-up's thread may still be ending


@pytest.fixture
def bugs() -> Iterator[List[logging.LogRecord]]:
    """What the servers have logged as bugs.  A test that expects one clears the list."""
    records: List[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append       # type: ignore[method-assign]
    logger = logging.getLogger("socks5srv")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def own_network() -> Iterator[None]:
    """For the rest of the test, a network with nothing in it but loopback.  To be asked for before what has sockets."""
    with network_of_its_own():
        yield


@pytest.fixture
def link_local() -> Iterator[LinkLocal]:
    """A link-local IPv6 address to listen on and to be called at.  To be asked for before what has sockets."""
    with link_local_address() as address:
        eventually(address.can_be_bound)        # the system may look first whether another computer has it
        yield address


# --- servers ---

def cheap_hash(password: str, rounds: int = 1000) -> str:
    """A hash as --hash-password makes it, but quick to compute."""
    blank = Hash("pbkdf2_sha256", (rounds,), os.urandom(16), bytes(32))
    return str(blank._replace(digest=blank.of(password)))


class Names:
    """
    A system's resolver that knows these names only, and completes others with ``corp.example``.
    `hosts` is its own list, which it reads for names without a dot at the end; `dns` has addresses, or an alias's other name.
    """

    hosts = {"nas": ("nas", "127.0.0.1"), "printer": ("printer.corp.example", "127.0.0.1")}      # noqa: RUF012
    dns = {                                                                                         # noqa: RUF012
        "secret.corp.example": "127.0.0.1", "moved.corp.example": "elsewhere.example", "web.example": "127.0.0.1",
        "www.example": "web.example", "elsewhere.example": "127.0.0.1", "twice": "127.0.0.1", "twice.corp.example": "127.0.0.2",
    }

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real = real
        self.asked: List[str] = []

    def getaddrinfo(self, host: Any, port: Any, *arguments: Any) -> Any:
        if not isinstance(host, bytes):         # a client's, and no look-up of the server's
            return self.real(host, port, *arguments)
        self.asked.append(host.decode())
        name, found = self.find(host.decode().lower())
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, name if arguments[3:] else "", (found, 0))]

    def find(self, asked: str) -> Tuple[str, str]:
        """The canonical name, and its address."""
        if asked in self.hosts:
            return self.hosts[asked]
        completed = [asked + ".corp.example", asked] if "." not in asked else [asked, asked + ".corp.example"]
        for name in [asked[:-1]] if asked.endswith(".") else completed:
            while name in self.dns:
                if self.dns[name][0].isdigit():
                    return name, self.dns[name]
                name = self.dns[name]
        raise socket.gaierror(socket.EAI_NONAME, "no such name")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The system completes names."""
    found = Names(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    return found


class FromItsTarget(Route):
    """
    Its sockets go out from the very port that they dial.
    If nobody listens there, TCP's simultaneous open connects each with itself.  `sockets` are those made up to now;
    from number `honest` on they go out from a port of their own, and `before_those` is called.
    """

    sockets = honest = 0
    before_those: Callable[[Address], None] = staticmethod(lambda _address: None)

    def socket(self, address: Address, kind: int = socket.SOCK_STREAM) -> socket.socket:
        self.sockets += 1
        honest = 0 < self.honest <= self.sockets
        if honest:
            self.before_those(address)
        sock = super().socket(address, kind)
        if not honest:
            sock.bind((address.host, address.port))
        return sock


def server_threads() -> List[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("socks5srv")]


class Served:
    """Mixed into the servers: `told` gets the sessions that session_ended() has been called for."""

    server_address: Tuple[Any, ...]
    addresses: List[Tuple[Any, ...]]
    told: queue.SimpleQueue[Session]
    thread: threading.Thread

    def next_ended(self) -> Session:
        return self.told.get(timeout=TIMEOUT)


@pytest.fixture
def start_server(bugs: List[logging.LogRecord]) -> Iterator[Callable[..., Any]]:
    """
    Start a server in a thread: ``start_server(handler, address, more, users=, rules=, **settings)``.
    With `more` addresses it has more listeners; `addresses` are those of all of them.  With `elsewhere` each client is taken
    for one on another computer.  It may be an open proxy.  At the end it is closed, and none of its threads may be left, nor
    a bug have been logged.
    """
    servers: List[Served] = []
    before = server_threads()       # of another test, which has failed for that

    def start(
        handler: Type[Socks5Handler] = Socks5Handler, address: Tuple[Any, ...] = (LOCALHOST, 0),
        *more: Tuple[Any, ...], server_class: Type[Socks5Server] = Socks5Server, users: Any = None, rules: Any = (),
        poll_interval: float = 0.05, elsewhere: bool = False, **settings: Any,
    ) -> Any:
        class Telling(handler):         # type: ignore[misc, valid-type]
            def session_ended(self) -> None:
                try:
                    super().session_ended()
                finally:
                    self.server.told.put(self.session)

        server: Any = type("Serving", (Served, server_class), {})(address, Telling, users=users, rules=rules, allow_open_proxy=True, **settings)
        server.told = queue.SimpleQueue()
        servers.append(server)
        if elsewhere:
            server.policy.is_here = lambda _host: False
        server.addresses = [server.server_address, *map(server.add_listener, more)]
        serve(server, poll_interval)
        return server

    yield start
    for server in servers:
        server.server_close()
        server.thread.join(TIMEOUT)
        assert not server.thread.is_alive()
    for thread in server_threads():
        if thread.name in ("socks5srv-lookup", "socks5srv-conversation"):       # those are not waited for, or not long, but have to end
            thread.join(TIMEOUT)
    assert [thread for thread in server_threads() if thread not in before] == []
    assert descriptors_of_servers.taken == 0
    assert [record.getMessage() for record in bugs] == []


def serve(server: Any, poll_interval: float = 0.05) -> None:
    """Have it serve in a thread; returns when it does."""
    server.thread = threading.Thread(target=server.serve_forever, args=(poll_interval,), name="test-serve", daemon=True)
    server.thread.start()
    # Till then there may be nobody to connect to, and nothing for server_close() to shut down.
    eventually(lambda: not server.stopped.is_set())
    eventually(lambda: all(listener.waiting and not listener.stopping for listener in server.listeners))


def handler_with(**methods: Any) -> Type[Socks5Handler]:
    """A handler class with these methods overridden, or with these attributes."""
    return type("Handler", (Socks5Handler,), methods)


# --- clients ---

class Client:
    """The client's end of a conversation, which messages can be read from.  It sends what it is told to, right or wrong."""

    def __init__(self, address: Tuple[Any, ...], source: Optional[str] = None) -> None:
        self.socket = socket.create_connection(address[:2], TIMEOUT, (source, 0) if source else None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close it with an RST."""
        reset(self.socket)

    def send(self, *messages: Union[bytes, Message]) -> None:
        """All in one segment, if they fit."""
        self.socket.sendall(b"".join(map(bytes, messages)))

    def drip(self, octets: bytes) -> None:
        """Every octet in a segment of its own."""
        for i in range(len(octets)):
            self.socket.sendall(octets[i:i + 1])

    def end(self) -> None:
        """Nothing more will be sent."""
        self.socket.shutdown(socket.SHUT_WR)

    def read(self, n: int) -> bytes:
        return self.socket.recv(n)

    def exactly(self, n: int) -> bytes:
        return read_exactly(self, n)

    def rest(self) -> bytes:
        """All that comes until the end, be it clean or a reset."""
        octets = b""
        with suppress(ConnectionError):
            for more in iter(lambda: self.socket.recv(65536), b""):
                octets += more
        return octets

    def greet(self, *methods: int) -> MethodSelection:
        self.send(Greeting(bytes(methods or (Method.NO_AUTHENTICATION_REQUIRED,))))
        return MethodSelection.read(self)

    def login(self, username: Union[str, bytes], password: Union[str, bytes]) -> CredentialsReply:
        self.send(Credentials(*(t if isinstance(t, bytes) else t.encode() for t in (username, password))))
        return CredentialsReply.read(self)

    def log_in(self, username: Union[str, bytes], password: Union[str, bytes]) -> bool:
        """greet() and login(); whether it is let in."""
        assert self.greet(Method.USERNAME_PASSWORD) == MethodSelection(Method.USERNAME_PASSWORD)
        return self.login(username, password).status == CredentialsReply.SUCCESS

    def request(self, command: Command, place: Place) -> Reply:
        self.send(Request(command, address_of(place)))
        return Reply.read(self)

    def ask(self, command: Command, place: Place) -> Reply:
        """greet() and request()."""
        assert self.greet() == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)
        return self.request(command, place)

    def connect(self, place: Place) -> Reply:
        """CONNECT, which has to succeed."""
        reply = self.ask(Command.CONNECT, place)
        assert reply.code is ReplyCode.SUCCEEDED
        return reply


def set_reset(sock: socket.socket) -> None:
    """close() will send an RST instead of a FIN."""
    from socks5srv.relay import RESET

    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def reset(sock: socket.socket) -> None:
    """Close it with an RST."""
    set_reset(sock)
    sock.close()


def exchange(sock: Any, octets: bytes = b"hello") -> None:
    """Whether the other end is an echo; `sock` is a socket or a `Client`."""
    sock = getattr(sock, "socket", sock)
    sock.sendall(octets)
    received = b""
    while len(received) < len(octets):
        more = sock.recv(65536)
        assert more, f"the connection ended after {received!r}"
        received += more
    assert received == octets


def udp_socket(host: str = LOCALHOST) -> socket.socket:
    """A UDP socket at a port of its own, with a timeout."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT)
    sock.bind((host, 0))
    return sock


@pytest.fixture
def new_client() -> Iterator[Callable[..., Client]]:
    """A `Client` that is connected: ``new_client(server)``, or ``new_client(address, source=host)``."""
    with ExitStack() as stack:
        yield lambda to, source=None: stack.enter_context(Client(getattr(to, "server_address", to), source))


# --- targets ---

@pytest.fixture
def listen() -> Iterator[Callable[..., socket.socket]]:
    """A socket that listens, with a timeout: ``listen(host)``.  Its backlog accepts by itself."""
    with ExitStack() as stack:
        def make(host: str = LOCALHOST, port: int = 0, backlog: int = 16) -> socket.socket:
            sock = stack.enter_context(socket_for(host))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.settimeout(TIMEOUT)
            sock.bind((host, port))
            sock.listen(backlog)
            return sock

        yield make


@pytest.fixture
def refusing() -> Iterator[Callable[..., Tuple[str, int]]]:
    """A host and port that refuse connections, and stay so: ``refusing(host)``."""
    with ExitStack() as stack:
        def make(host: str = LOCALHOST, port: int = 0) -> Tuple[str, int]:
            sock = stack.enter_context(socket_for(host))
            sock.bind((host, port))     # and no listen()
            return sock.getsockname()[:2]

        yield make


@pytest.fixture
def closed_port() -> Callable[..., Tuple[str, int]]:
    """A host and port where nobody listens, and anybody may: ``closed_port(host)``."""
    def make(host: str = LOCALHOST) -> Tuple[str, int]:
        with socket_for(host) as sock:
            sock.bind((host, 0))
            return sock.getsockname()[:2]

    return make


@pytest.fixture
def silent() -> Iterator[Callable[..., Tuple[str, int]]]:
    """A host and port where connections neither come about nor fail: ``silent(host)``."""
    with ExitStack() as stack:
        def make(host: str = LOCALHOST, port: int = 0) -> Tuple[str, int]:
            listener = stack.enter_context(socket_for(host))
            listener.bind((host, port))
            listener.listen(0)
            # Nobody accepts, so the backlog is soon full, and then a SYN gets no answer.
            for _ in range(4):
                sock = stack.enter_context(socket_for(host))
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            return listener.getsockname()[:2]

        yield make


@pytest.fixture(params=["poll", "select"])
def poll_or_select(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a conversation waits: the second is that of Windows."""
    if request.param == "select":
        monkeypatch.delattr(select, "poll")
    return str(request.param)


@pytest.fixture
def pair(listen: Callable[..., socket.socket]) -> Iterator[Tuple[socket.socket, socket.socket]]:
    """A client, and the server's end of its connection."""
    listener = listen()
    with socket.create_connection(listener.getsockname(), TIMEOUT) as client:
        connection, _ = listener.accept()
        with connection:
            yield client, connection


@pytest.fixture
def connection(pair: Tuple[socket.socket, socket.socket]) -> socket.socket:
    """The server's end of a client's connection that stays as it is."""
    return pair[1]


class Echo(socketserver.ThreadingTCPServer):
    """Sends back what it receives, connection by connection, and ends when the other end does."""

    request_queue_size = 1024

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(TIMEOUT)
            with suppress(OSError):
                for octets in iter(lambda: self.request.recv(65536), b""):
                    self.request.sendall(octets)

    def __init__(self, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), self.Handler)
        self.connections: List[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        for connection in self.connections:     # or their threads would wait for what never comes
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


@pytest.fixture
def start_echo() -> Iterator[Callable[..., Echo]]:
    """An echo server in a thread: ``start_echo(host).server_address``; `connections` are those it has had."""
    with ExitStack() as stack:
        def start(host: str = LOCALHOST, port: int = 0) -> Echo:
            echo = stack.enter_context(Echo(host, port))
            threading.Thread(target=echo.serve_forever, args=(0.02,), name="test-echo", daemon=True).start()
            stack.callback(echo.shutdown)
            return echo

        yield start


@pytest.fixture
def echo(start_echo: Callable[..., Echo]) -> Tuple[str, int]:
    """The address of an echo server on 127.0.0.1."""
    return start_echo().server_address


@pytest.fixture
def new_tunnel(new_client: Callable[..., Client], echo: Tuple[str, int]) -> Callable[..., Client]:
    """A `Client` that is connected to that echo, which answers: ``new_tunnel(server)``."""
    def tunnel(server: Any) -> Client:
        client = new_client(server)
        client.connect(echo)
        exchange(client)
        return client

    return tunnel
