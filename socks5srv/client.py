"""
A small blocking SOCKS5 client: CONNECT, BIND and UDP ASSOCIATE through any proxy.

    with connect("socks5h://anna:sesame@127.0.0.1:1080", "example.com", 80) as sock: ...
    with bind(url, "ftp.example.com") as waiting: tell(waiting.address); sock, peer = waiting.accept()
    with udp_associate(url) as relay: relay.sendto(b"?", ("ns.example.com", 53)); data, source = relay.recvfrom()

The URL says who looks names up, as it does for curl: with ``socks5h://`` the proxy, with
``socks5://`` this computer, before it asks the proxy for the addresses, one after the other.
In a login, whatever has a meaning in URLs is percent-encoded.

The one idea: a message is read with exactly as many octets as it has, so what the target says
behind it stays in the socket, and what a function returns is an ordinary socket.  One deadline,
`timeout`, covers connecting to the proxy and all that is said until the command has succeeded;
only this computer's resolver, which cannot be stopped, takes the time that it takes.

What can go wrong, as exceptions: OSError (the proxy cannot be reached; `socket.timeout` at the
deadline), and of protocol.py `NoAcceptableMethod`, `LoginFailed`, `RequestFailed` with the reply's
code, and `ProtocolError` for an answer that is no SOCKS5.  No socket is left open then.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress
from io import BytesIO
from typing import Any, Callable, ContextManager, List, Mapping, NamedTuple, Optional, Tuple, Type, TypeVar, Union
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from .descriptors import on_error
from .names import ascii_form
from .protocol import (
    UNSPECIFIED, Address, Command, Credentials, CredentialsReply, Datagram, Greeting, LoginFailed,
    Message, Method, MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed,
)
from .relay import RESET

TIMEOUT = 30.0      # seconds; servers give a target 10 or more to answer

M = TypeVar("M", MethodSelection, CredentialsReply, Reply)
Methods = Mapping[int, Callable[["Conversation"], None]]    # ways to authenticate, by METHOD
NO_OTHERS: Methods = {}


class Proxy(NamedTuple):
    """Where a proxy is, and who we are to it.  Its text never has the password in it."""

    host: str
    port: int = 1080
    username: bytes = b""           # empty: no login
    password: bytes = b""
    names_there: bool = True        # socks5h: the proxy looks names up

    @classmethod
    def parse(cls, url: Union[str, Proxy]) -> Proxy:
        """``socks5h://[NAME:PASSWORD@]HOST[:PORT]`` or ``socks5://``; ValueError for anything else."""
        if isinstance(url, Proxy):
            return url
        try:
            parts = urlsplit(url)
            host, port = unquote(parts.hostname or ""), parts.port
        except ValueError:
            host, port, parts = "", None, urlsplit("")
        if parts.scheme not in ("socks5", "socks5h") or not host or port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
            # What was written is not shown: it may have a password in it.
            raise ValueError("invalid proxy URL: expected socks5h://[NAME:PASSWORD@]HOST:PORT, with %40 for @, %3A for : and %2F for / in NAME and PASSWORD")
        username, password = (unquote_to_bytes(text or "") for text in (parts.username, parts.password))
        if max(len(username), len(password)) > 255:
            raise ValueError("invalid proxy URL: the name and the password have 255 bytes at most")
        return cls(host, 1080 if port is None else port, username, password, parts.scheme == "socks5h")

    def __str__(self) -> str:
        login = f"{quote(self.username, safe='')}:***@" if self.username else ""
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host      # RFC 6874
        return f"socks5{'h' * self.names_there}://{login}{host}:{self.port}"

    def __repr__(self) -> str:
        return f"<Proxy {self}>"


class Conversation:
    """
    What is said on one connection to a proxy, until its command has succeeded.

    It is a binary stream of what the proxy sends.  `socket` is the connection; an authentication
    method that encapsulates what follows puts another one in its place.
    """

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.socket = sock
        self.until = until          # the deadline, by time.monotonic()

    def read(self, n: int, /) -> bytes:
        """1 to `n` octets."""
        if n == 0:
            return b""
        self.socket.settimeout(seconds_until(self.until))
        octets = self.socket.recv(n)
        if not octets:
            raise ProtocolError("the proxy has closed the connection instead of answering")
        return octets

    def write(self, octets: bytes) -> None:
        self.socket.settimeout(seconds_until(self.until))
        self.socket.sendall(octets)

    def send(self, message: Message) -> None:
        self.write(bytes(message))

    def receive(self, message: Type[M]) -> M:
        try:
            return message.read(self)
        except RequestFailed as error:      # what it was raised for is a request of ours elsewhere
            raise ProtocolError(f"the proxy's answer cannot be read: {error}") from error

    def negotiate(self, proxy: Proxy, methods: Methods = NO_OTHERS) -> None:
        """Agree on a method and carry it out.  RFC 1928 section 3."""
        ways = {Method.NO_AUTHENTICATION_REQUIRED: lambda _conversation: None, **methods}
        if proxy.username:
            ways.setdefault(Method.USERNAME_PASSWORD, lambda conversation: conversation.log_in(proxy))
        self.send(Greeting(bytes(ways)))
        method = self.receive(MethodSelection).method
        if method == Method.NO_ACCEPTABLE_METHODS:
            raise NoAcceptableMethod("the proxy requires " + ("another kind of authentication" if proxy.username else "authentication, and its URL has no NAME:PASSWORD"))
        if method not in ways:
            raise ProtocolError(f"the proxy has chosen method {method:02x}, which was not offered")
        ways[method](self)

    def log_in(self, proxy: Proxy) -> None:
        """RFC 1929."""
        self.send(Credentials(proxy.username, proxy.password))
        if self.receive(CredentialsReply).status != CredentialsReply.SUCCESS:
            raise LoginFailed("the proxy does not accept the name or the password", repr(proxy.username)[2:-1])

    def ask(self, command: Command, destination: Address) -> Address:
        """Send the request; BND.ADDR and BND.PORT of the reply.  RFC 1928 sections 4 to 6."""
        self.send(Request(command, destination))
        return self.success()

    def success(self) -> Address:
        """The address in a reply, which has to be one of success."""
        reply = self.receive(Reply)
        if reply.code == ReplyCode.SUCCEEDED:
            return reply.bound
        if isinstance(reply.code, ReplyCode):
            raise RequestFailed(reply.code, f"the proxy says: {reply.code.phrase}")
        raise RequestFailed(ReplyCode.GENERAL_FAILURE, f"the proxy says {reply.code:02x}, which means nothing")

    def here(self, bound: Address) -> Address:
        """
        The address in a reply as one that can be reached: a link-local one is on the link on which we reach the proxy,
        and zeros stand for its own host (not by the RFC, but servers that listen on a wildcard answer with them).
        """
        peer = Address.of(self.socket.getpeername())
        return peer._replace(port=bound.port) if bound.is_unspecified else bound.on_the_link_of(peer)


def connect(proxy: Union[str, Proxy], host: str, port: int, *, timeout: float = TIMEOUT, methods: Methods = NO_OTHERS) -> socket.socket:
    """
    A blocking socket, connected to `host` through the proxy.

    `methods` has further ways to authenticate, by their METHOD: functions that are called with
    the `Conversation` when the proxy has chosen them, and raise `LoginFailed`.
    """
    return asked_for_one(Proxy.parse(proxy), Command.CONNECT, host, port, time.monotonic() + timeout, methods)[0].socket


def bind(proxy: Union[str, Proxy], host: str = "0.0.0.0", port: int = 0, *, timeout: float = TIMEOUT, methods: Methods = NO_OTHERS) -> Waiting:
    """Have the proxy listen for one connection from `host`, or from anyone.  `timeout` is that of accept(), too."""
    return Waiting(*asked_for_one(Proxy.parse(proxy), Command.BIND, host, port, time.monotonic() + timeout, methods), timeout)


class Waiting(ContextManager["Waiting"]):
    """A proxy that listens for us: at `address`, which the peer has to be told."""

    def __init__(self, conversation: Conversation, bound: Address, timeout: float) -> None:
        self._conversation: Optional[Conversation] = conversation
        self._timeout = timeout
        self.address = conversation.here(bound)

    def accept(self) -> Tuple[socket.socket, Address]:
        """Wait for the peer: a blocking socket, which is the caller's from now on, and where it calls from."""
        if self._conversation is None:
            raise ValueError("BIND is for one connection, and it has been taken, or closed")
        self._conversation.until = time.monotonic() + self._timeout
        with on_error(self.close):
            peer = self._conversation.success()
        sock, self._conversation = self._conversation.socket, None
        sock.settimeout(None)
        return sock, peer

    def close(self) -> None:
        """Wait no more; the proxy closes its port."""
        if self._conversation is not None:
            self._conversation.socket.close()
            self._conversation = None

    def __exit__(self, *_exception: object) -> None:
        self.close()


def udp_associate(proxy: Union[str, Proxy], *, timeout: float = TIMEOUT, methods: Methods = NO_OTHERS) -> DatagramRelay:
    """Send and receive datagrams through the proxy."""
    proxy = Proxy.parse(proxy)
    # All zeros: we cannot know the address that the proxy will see.
    conversation, bound = asked(proxy, Command.UDP_ASSOCIATE, UNSPECIFIED, time.monotonic() + timeout, methods)
    with on_error(conversation.socket.close):
        return DatagramRelay(proxy, conversation.socket, conversation.here(bound))


class DatagramRelay(ContextManager["DatagramRelay"]):
    """
    A proxy's UDP relay.  `address` is where it is; it lives as long as `control`, the TCP connection.

    `socket` is a UDP socket connected to the relay, without a timeout: give it one, since UDP may lose datagrams.
    """

    def __init__(self, proxy: Proxy, control: socket.socket, address: Address) -> None:
        self.proxy = proxy
        self.control = control
        self.address = address
        place = address.literal or address
        family, kind, number, _name, there = socket.getaddrinfo(ascii_form(place.zoned), place.port, type=socket.SOCK_DGRAM)[0]
        self.socket = socket.socket(family, kind, number)
        with on_error(self.socket.close):
            if family == control.family:        # the proxy hears only the host that it has been asked by
                here: Tuple[Any, ...] = control.getsockname()
                self.socket.bind((here[0], 0, *here[2:]))
            self.socket.connect(there)

    def sendto(self, data: bytes, destination: Tuple[str, int]) -> None:
        """Send a datagram to a host and port.  As UDP is, it may get lost."""
        address = destinations(self.proxy, *destination)[0]
        self.socket.send(bytes(Datagram(address, data)))

    def recvfrom(self) -> Tuple[bytes, Tuple[str, int]]:
        """The next datagram, and the host and port that have sent it."""
        while True:
            with suppress(ProtocolError, RequestFailed):
                datagram = Datagram.read(BytesIO(self.socket.recv(65535)))
                if not datagram.frag:       # without reassembly, the RFC has fragments dropped
                    return datagram.data, (datagram.address.host, datagram.address.port)

    def close(self) -> None:
        """End the association."""
        self.socket.close()
        self.control.close()

    def __exit__(self, *_exception: object) -> None:
        self.close()


# --- the steps ---

def asked_for_one(proxy: Proxy, command: Command, host: str, port: int, until: float, methods: Methods) -> Tuple[Conversation, Address]:
    """asked(), for the first of the host's addresses for which the proxy says yes."""
    *others, last = destinations(proxy, host, port)
    for destination in others:
        with suppress(RequestFailed):       # a name may have a dead address first
            return asked(proxy, command, destination, until, methods)
    return asked(proxy, command, last, until, methods)


def asked(proxy: Proxy, command: Command, destination: Address, until: float, methods: Methods) -> Tuple[Conversation, Address]:
    """A conversation in which `command` has succeeded, its socket blocking again, and the reply's address."""
    conversation = Conversation(dial(proxy, until), until)
    with on_error(lambda: conversation.socket.close()):     # a method may put another one in its place
        conversation.negotiate(proxy, methods)
        bound = conversation.ask(command, destination)
        conversation.socket.settimeout(None)
    return conversation, bound


def dial(proxy: Proxy, until: float) -> socket.socket:
    """A connection to the proxy itself, to the first of its addresses that answers."""
    *others, last = socket.getaddrinfo(ascii_form(proxy.host), proxy.port, type=socket.SOCK_STREAM)
    for row in others:
        with suppress(OSError):
            return dial_address(row, until)
    return dial_address(last, until)


def dial_address(row: Tuple[Any, ...], until: float) -> socket.socket:
    """A connection to this address, a row of getaddrinfo()."""
    family, kind, number, _name, there = row
    for _ in range(2):
        sock = socket.socket(family, kind, number)
        with on_error(sock.close):
            sock.settimeout(seconds_until(until))
            sock.connect(there)
            if sock.getsockname()[1] != there[1] or sock.getsockname() != sock.getpeername():
                return sock
        # The system had chosen the very port that was dialled to go out from, and where nobody listens TCP lets
        # a socket call itself.  The next time it chooses another.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)     # or the port could not be used for a minute
        sock.close()
    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def destinations(proxy: Proxy, host: str, port: int) -> List[Address]:
    """What to write for a host, at least one: it as it is, or the addresses that it has here."""
    if not 0 <= port < 65536:
        raise ValueError(f"invalid port {port}: expected 0-65535")
    if ":" in host:
        host = host.partition("%")[0]       # the zone is one of this computer's, and means nothing to the proxy
    address = Address.named(ascii_form(host), port)
    if address.literal is not None:
        return [address.literal]
    if proxy.names_there:
        return [address]
    rows = socket.getaddrinfo(ascii_form(host), None, type=socket.SOCK_STREAM)
    return [Address.numeric(str(row[4][0]), port) for row in rows]


def seconds_until(until: float) -> float:
    """How long a socket may still take; `socket.timeout` if the time has come."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise socket.timeout("the proxy did not answer in time")
    return seconds
