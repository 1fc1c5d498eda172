"""
Going out: a destination becomes a connected socket, or a reply code.

A name may have many addresses, in two families, and any of them may be dead.  So all are
tried, in the way of RFC 8305 ("Happy Eyeballs"): families take turns, an address has 250 ms
before the next one starts beside it, the first to answer wins, and the others are closed.
One deadline covers all of it, the look-up (resolver.py) included.

The one idea: whatever this thread waits for (an answer of the resolver, a connection to
come about, a peer to call back), it waits for *in `wait()`, with an eye on the client*.
When the client has gone, or the server stops, the waiting ends at once.

Nothing is decided here.  Which of the addresses are allowed, the handler has asked before:
what is judged and what is dialled are the same list of addresses, never a name twice.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from itertools import zip_longest
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from .advertise import Advertised, host_told_to, shuffled
from .descriptors import descriptors, on_error
from .names import ascii_form
from .observer import Attempt
from .protocol import Address, AddressType, ReplyCode, RequestFailed
from .relay import READ, RESET, WRITE, tune

BUFFER = 1024 * 1024    # octets of datagrams that the kernel may queue for us; its default loses bursts
STAGGER = 0.25      # seconds that an address has before the next one starts; RFC 8305 section 8


class ClientGone(OSError):
    """The client has left, or the server is stopping: a reply would reach no process."""


class Route(NamedTuple):
    """How to go out: to which family, from where, and by what kind of socket: it makes every one of ours."""

    family: int = socket.AF_UNSPEC                      # or AF_INET, or AF_INET6, for that one only
    source: Union[str, Tuple[str, ...], None] = None    # an address of this computer, or one of each family
    socket_factory: Callable[..., socket.socket] = socket.socket    # called like it: family, type, proto, fileno
    advertise: Tuple[Advertised, ...] = ()              # what BND.ADDR says, if not where the client has come: advertise.parse()
    udp_ports: Optional[range] = None                   # for clients' datagrams, and for BIND; None: whichever the system chooses

    def reached_by(self, peer: Address, here: str) -> Tuple[str, str]:
        """Which of our addresses to bind for this peer, which otherwise comes to `here`, and the one that it is to be told."""
        told = host_told_to(peer, self.advertise)
        return (here, here) if told is None else (Address.numeric(told, 0).wildcard, told)

    def udp(self, sockaddr: Tuple[Any, ...], share: bool = False) -> socket.socket:
        """A non-blocking UDP socket at this address of ours, with room to queue bursts; `share` it with one that has SO_REUSEADDR."""
        def bind(sock: socket.socket) -> None:
            if share:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(with_scope(sockaddr))
            if share:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)

        return self._udp(sockaddr[0], bind)

    def udp_relay(self, host: str) -> socket.socket:
        """A socket like that on a port for a client to send to."""
        return self._udp(host, lambda sock: self._on_free_port(lambda port: sock.bind(with_scope((host, port)))))

    def _udp(self, host: str, bind: Callable[[socket.socket], None]) -> socket.socket:
        sock = self._new(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        with on_error(sock.close):
            keep_to_its_family(sock)
            bind(sock)
            enlarge(sock)
        return sock

    def listener(self, host: str) -> socket.socket:
        """A non-blocking socket that listens for a peer, at this address of ours, which has its zone with it if it has one."""
        while True:
            try:
                return self._listener(host)
            except OSError as error:
                if self.udp_ports is None or error.errno != errno.EADDRINUSE:
                    raise           # else two had bound the same port, and the other one was first to listen

    def _listener(self, host: str) -> socket.socket:
        listener = self._new(socket.AF_INET6 if ":" in host else socket.AF_INET)
        with on_error(listener.close):
            keep_to_its_family(listener)
            if self.udp_ports is not None and os.name == "posix":       # or a port would be taken until a minute after its connection
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._on_free_port(lambda port: listener.bind(with_scope((host, port))))
            listener.listen(16)     # other peers may queue before the expected one
        return listener

    def _on_free_port(self, bind: Callable[[int], None]) -> None:
        """Bind to a port that is free; RequestFailed 01 if none of `udp_ports` is."""
        if self.udp_ports is None:
            return bind(0)
        for port in shuffled(self.udp_ports):
            try:
                return bind(port)       # of all processes that try it the system lets one have it
            except OSError as error:
                if error.errno not in NOT_FREE:
                    raise
        ports = f"{self.udp_ports[0]}-{self.udp_ports[-1]}"
        raise RequestFailed(ReplyCode.GENERAL_FAILURE, f"all ports of --udp-ports {ports} are in use")

    def _new(self, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A non-blocking socket; `kind` may reach the factory with SOCK_NONBLOCK in it."""
        if hasattr(socket, "SOCK_NONBLOCK"):        # Linux: born so, which saves a call
            return self.socket_factory(family, kind | socket.SOCK_NONBLOCK)
        sock = self.socket_factory(family, kind)
        sock.setblocking(False)
        return sock

    def socket(self, address: Address, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A non-blocking socket that can reach `address`; RequestFailed 08, or 01 and 03, if none can."""
        family, source = family_of(address), self.source_towards(address)
        if self.family not in (socket.AF_UNSPEC, family):
            raise RequestFailed(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, f"{address} is not of the family in use")
        sock = self._new(family, kind)
        try:
            if kind == socket.SOCK_STREAM:
                tune(sock)          # before it is connected, or each option would set its timer anew
            if source is not None:
                bind_source(sock, source)
        except BaseException:
            sock.close()
            raise
        return sock

    def source_towards(self, address: Address) -> Optional[str]:
        """
        Which of our addresses to go out from; None for whichever the system chooses.

        RequestFailed 08 if all that are given are of the other family: who names a source wants to be seen as that.
        """
        if self.source is None:
            return None
        is_ipv6 = address.address_type is AddressType.IPV6
        for source in self.sources:
            if (":" in source) == is_ipv6:
                return source
        own, other = ("IPv6", "IPv4") if is_ipv6 else ("IPv4", "IPv6")
        raise RequestFailed(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, f"{address} is {own}, and --source has only an {other} address")

    @property
    def sources(self) -> Tuple[str, ...]:
        """Our addresses to go out from, as far as they are given."""
        return () if self.source is None else (self.source,) if isinstance(self.source, str) else self.source


PORT_CAN_BE_SHARED = hasattr(select, "epoll")   # by UDP sockets that both have SO_REUSEADDR, and by no others: on Linux
NOT_FREE = (errno.EADDRINUSE, errno.EACCES)     # the second where the system keeps a port for itself


def keep_to_its_family(sock: socket.socket) -> None:
    """At ``::`` hear IPv6 only, or it would have the port for IPv4 as well."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


# Linux only, and the module socket has the name since Python 3.11.
BIND_ADDRESS_NO_PORT: Optional[int] = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24 if hasattr(select, "epoll") else None)


def bind_source(sock: socket.socket, host: str) -> None:
    """
    Have a socket go out from this address of ours.

    A port that bind() chooses is taken on the whole computer, so that 28,000 connections would be all there
    are.  Where connect() may choose it, for IPv6 by the same option, they are as many to every target.
    """
    if BIND_ADDRESS_NO_PORT is not None and sock.type == socket.SOCK_STREAM:
        try:
            sock.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
        except OSError:             # Linux before 4.2
            pass
    sock.bind((host, 0))


def enlarge(sock: socket.socket) -> None:
    """Ask for room to queue bursts; the system gives what it likes."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)


def family_of(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if address.address_type is AddressType.IPV6 else socket.AF_INET


# --- errors and reply codes ---

REPLY_CODES = {
    getattr(errno, name): code
    for code, names in {
        ReplyCode.CONNECTION_REFUSED: "ECONNREFUSED ECONNRESET ECONNABORTED EPIPE",
        ReplyCode.NETWORK_UNREACHABLE: "ENETUNREACH ENETDOWN ENONET",
        ReplyCode.HOST_UNREACHABLE: "EHOSTUNREACH EHOSTDOWN",
        ReplyCode.TTL_EXPIRED: "ETIMEDOUT",
        ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED: "EAFNOSUPPORT EPROTONOSUPPORT",
        ReplyCode.NOT_ALLOWED: "EACCES EPERM",
    }.items()
    for name in names.split()
    if hasattr(errno, name)
}

NO_SUCH_FAMILY = {      # of getaddrinfo; every other complaint of it is about the name
    getattr(socket, name) for name in ("EAI_ADDRFAMILY", "EAI_FAMILY") if hasattr(socket, name)
}

# Several addresses, several failures: a refused one says more than an unreachable one.
MOST_TELLING = [
    ReplyCode.CONNECTION_REFUSED, ReplyCode.HOST_UNREACHABLE, ReplyCode.NETWORK_UNREACHABLE,
    ReplyCode.TTL_EXPIRED, ReplyCode.NOT_ALLOWED, ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED,
    ReplyCode.GENERAL_FAILURE,
]


def failure(error: Exception, about: object) -> RequestFailed:
    """What to tell the client about an error of the operating system or of the resolver."""
    if isinstance(error, RequestFailed):
        return error
    if isinstance(error, socket.gaierror):
        code = ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED if error.errno in NO_SUCH_FAMILY else ReplyCode.HOST_UNREACHABLE
    elif isinstance(error, socket.timeout):
        code = ReplyCode.TTL_EXPIRED
    elif isinstance(error, OSError):
        code = REPLY_CODES.get(error.errno or 0, ReplyCode.GENERAL_FAILURE)
    elif isinstance(error, ValueError):     # UnicodeError among them: no name can be spelled so
        code = ReplyCode.HOST_UNREACHABLE
    else:
        raise error
    return RequestFailed(code, f"{about}: {getattr(error, 'strerror', None) or error}")


class errors_as_replies:
    """Turn errors of the operating system and the resolver into RequestFailed: ``with errors_as_replies(address)``."""

    def __init__(self, about: object) -> None:
        self.about = about

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: Optional[BaseException], _traceback: object) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, ClientGone):
            raise failure(error, self.about) from error


def most_telling(failures: Sequence[RequestFailed]) -> RequestFailed:
    """The one failure to report, of at least one."""
    return min(failures, key=lambda failure: MOST_TELLING.index(failure.code))


# --- waiting ---

def wait(interests: Dict[int, int], client: socket.socket, until: float) -> Dict[int, int]:
    """
    Wait until a descriptor is READ- or WRITE-ready as `interests` asks; none are at the deadline.

    ClientGone when the client's connection is dead.  A client that has only finished
    sending, or has sent ahead, is not dead: its octets are not looked at.
    """
    timeout = max(0.0, until - time.monotonic())
    if hasattr(select, "poll"):
        return wait_by_poll(interests, client, timeout)
    return wait_by_select(interests, client, timeout)


def wait_by_poll(interests: Dict[int, int], client: socket.socket, timeout: float) -> Dict[int, int]:
    poll = select.poll()
    for fd, interest in interests.items():
        poll.register(fd, (interest & READ and select.POLLIN) | (interest & WRITE and select.POLLOUT))
    if client.fileno() not in interests:
        poll.register(client.fileno(), 0)       # which still tells of a hang-up
    ready = {}
    for fd, events in poll.poll(timeout * 1000):
        if fd in interests:
            ready[fd] = events
        elif events:
            raise ClientGone("the client has left")
    return ready


def wait_by_select(interests: Dict[int, int], client: socket.socket, timeout: float) -> Dict[int, int]:
    """Windows has no poll(), and select() tells no hang-up: look now and then if we are stopped."""
    readers = [fd for fd, interest in interests.items() if interest & READ]
    writers = [fd for fd, interest in interests.items() if interest & WRITE]
    until = time.monotonic() + timeout
    while True:
        if interests:
            # Windows reports a failed connect as an exception, not as writable.
            found = select.select(readers, writers, writers, min(timeout, 0.1))
            ready = {fd: interests[fd] for fds in found for fd in fds}
        else:                       # which its select() refuses
            time.sleep(min(timeout, 0.1))
            ready = {}
        if client.fileno() < 0:
            raise ClientGone("the server is stopping")
        timeout = until - time.monotonic()
        if ready or timeout <= 0:
            return ready


# --- connecting ---

def interleave(addresses: Iterable[Address]) -> List[Address]:
    """The families by turns, beginning with that of the first, each address once.  RFC 8305 section 4."""
    unique = list(dict.fromkeys(addresses))
    first = [a for a in unique if a.address_type is unique[0].address_type]
    other = [a for a in unique if a.address_type is not unique[0].address_type]
    return [a for pair in zip_longest(first, other) for a in pair if a is not None]


def connect(addresses: Sequence[Address], route: Route, client: socket.socket, until: float,
            tried: Optional[Callable[[Attempt], None]] = None) -> Tuple[socket.socket, Address]:
    """
    A connection to one of the addresses (numeric, at least one), and which one it is.

    RequestFailed with the most telling code if none can be had by `until`, a time of
    `time.monotonic()`.  The socket is non-blocking.  `tried` is called with each attempt when it is over.
    """
    race = HappyEyeballs(addresses, route, tried)
    try:
        while True:
            won = race.start_next()
            if won is None and race.running:
                won = race.finish(wait(dict.fromkeys(race.running, WRITE), client, min(until, race.next_start)))
            if won is not None:
                return won
            if not race.running and not race.waiting:
                raise most_telling(race.failures)
            if time.monotonic() >= until:
                race.failures.append(RequestFailed(ReplyCode.TTL_EXPIRED, "the target did not answer in time"))
                raise most_telling(race.failures)
    finally:
        race.close()


class HappyEyeballs:
    """The attempts of one connect(): those that wait for their start, run, and failed."""

    def __init__(self, addresses: Sequence[Address], route: Route, tried: Optional[Callable[[Attempt], None]] = None) -> None:
        self.waiting = deque(addresses)
        self.running: Dict[int, Tuple[socket.socket, Address, float]] = {}     # with when each was started
        self.failures: List[RequestFailed] = []
        self.met_itself: Set[Address] = set()       # where a socket has connected with itself
        self.route = route
        self.tried = tried
        self.next_start = 0.0
        self.beside = 0             # descriptors for attempts beside the first

    def start_next(self) -> Optional[Tuple[socket.socket, Address]]:
        """Begin with the next address if its time has come; the winner, if it connects at once."""
        while self.waiting and (not self.running or time.monotonic() >= self.next_start):
            now = time.monotonic()
            self.next_start = now + STAGGER
            if self.running and not self.may_run_beside():
                break
            address = self.waiting.popleft()
            try:
                sock = self.route.socket(address)
            except (OSError, RequestFailed) as error:
                self.lost(address, now, None, error)
                continue
            code = begin_connecting(sock, address.sockaddr)
            if code in UNDER_WAY:
                self.running[sock.fileno()] = sock, address, now
            elif self.won(sock, address, now, code):
                return sock, address
        if not self.waiting:
            self.next_start = float("inf")
        return None

    def may_run_beside(self) -> bool:
        """Whether there is a descriptor for another attempt beside those that run; if not, it starts later."""
        taken = descriptors.take_if_plenty(1)
        self.beside += taken
        return taken

    def finish(self, ready: Iterable[int]) -> Optional[Tuple[socket.socket, Address]]:
        """See how those that have finished did; the winner, if there is one."""
        for fd in ready:
            sock, address, started = self.running.pop(fd)
            if self.won(sock, address, started, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                return sock, address
        return None

    def won(self, sock: socket.socket, address: Address, started: float, code: int) -> bool:
        """Whether an attempt that has ended with this errno, 0 for none, has its connection; else it is closed."""
        if code == 0 and is_its_own_peer(sock, address):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)     # or the port could not be used for a minute
            code = errno.ECONNREFUSED       # no program listens there
            if address not in self.met_itself:
                self.met_itself.add(address)
                self.waiting.appendleft(address)
                self.next_start = 0.0
                sock.close()
                return False
        if code:
            sock.close()
            self.lost(address, started, time.monotonic() - started, OSError(code, os.strerror(code)))
        elif self.tried is not None:
            self.tried(Attempt(address, started, time.monotonic() - started, connected=True))
        return code == 0

    def lost(self, address: Address, started: float, seconds: Optional[float], error: Exception) -> None:
        self.failures.append(failure(error, address))
        if self.tried is not None:
            self.tried(Attempt(address, started, seconds, error))

    def close(self) -> None:
        for sock, address, started in self.running.values():
            sock.close()
            if self.tried is not None:      # another was first, or none in time
                self.tried(Attempt(address, started, time.monotonic() - started))
        if self.beside:
            descriptors.give_back(self.beside)


def is_its_own_peer(sock: socket.socket, address: Address) -> bool:
    """
    Whether a socket that is connected to `address` is so with itself: it talks, and hears what it has said.

    The system may have chosen the very port that is dialled to go out from.  Where no program listens on it the
    SYN then meets its own sender, which TCP takes for two ends that call each other (RFC 9293 section 3.5).
    """
    own = sock.getsockname()
    return bool(own[1] == address.port) and Address.of(own) == address


def begin_connecting(sock: socket.socket, sockaddr: Tuple[Any, ...]) -> int:
    """The errno of a non-blocking connect(); 0 if it stands already."""
    code = sock.connect_ex(sockaddr)
    if code == errno.EINPROGRESS and hasattr(select, "epoll"):
        # Linux always says so first.  On the same computer the connection stands by now, or has been
        # refused, and asking again saves two calls to wait for that.
        code = sock.connect_ex(sockaddr)
    return code


UNDER_WAY = {
    getattr(errno, name) for name in ("EINPROGRESS", "EALREADY", "EWOULDBLOCK", "WSAEWOULDBLOCK") if hasattr(errno, name)
}


# --- being connected to: BIND ---

def local_address_towards(address: Address, route: Route) -> str:
    """Our own address as `address` sees it: the one that packets to it would leave from, with its zone."""
    with route.socket(address, socket.SOCK_DGRAM) as sock:
        sock.connect(address._replace(port=address.port or 9).sockaddr)     # for UDP this sends nothing
        return Address.of(sock.getsockname()).zoned


def with_scope(sockaddr: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """
    ``("fe80::1%eth0", 1080)`` or ``("fe80::1%2", 1080)`` as bind() needs it; any other as it is.

    OSError if there is no such interface.  (bind() itself looks the zone up, and then takes another number.)
    """
    host, port = sockaddr[:2]
    if "%" not in host:
        return sockaddr
    try:
        return Address.numeric(host, port).sockaddr     # as our own addresses have it while we serve
    except ValueError:              # a name, for which the resolver opens a socket
        pass
    rows = socket.getaddrinfo(ascii_form(host), port, socket.AF_INET6, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    return rows[0][4]
