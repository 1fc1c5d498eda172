"""
A small blocking SOCKS5 client: CONNECT, BIND and UDP ASSOCIATE through any proxy.

    with connect("socks5h://anna:sesame@127.0.0.1:1080", "example.com", 80) as sock: ...
    with bind(url, "ftp.example.com") as waiting: tell(waiting.address); sock, peer = waiting.accept()
    with udp_associate(url) as relay: relay.sendto(b"?", ("ns.example.com", 53)); data, source = relay.recvfrom()

The URL says who looks names up, as it does for curl: with ``socks5h://`` the proxy, with
``socks5://`` this computer, before it asks the proxy for the addresses, one after the other.
In a login, whatever has a meaning in URLs is percent-encoded.

    with connect("socks5h+gssapi://proxy.example.com", "example.com", 80) as sock: ...

logs in by Kerberos instead, to the service ``rcmd`` on that host, or with ``socks@`` before it to the service ``socks``;
and nothing else will do.  What follows is encrypted as far as the proxy.  That needs the package ``gssapi``, and a ticket.

The one idea: a message is read with exactly as many octets as it has, so what the target says
behind it stays in the socket, and what a function returns is an ordinary socket.  One deadline,
`timeout`, covers connecting to the proxy and all that is said until the command has succeeded;
only this computer's resolver, and what fetches Kerberos tickets, cannot be stopped and take the time that they take.

What can go wrong, as exceptions: OSError (the proxy cannot be reached; `socket.timeout` at the
deadline), and of protocol.py `NoAcceptableMethod`, `LoginFailed`, `RequestFailed` with the reply's
code, and `ProtocolError` for an answer that is no SOCKS5.  No socket is left open then.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, TypeVar, Union
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from .descriptors import on_error
from .names import ascii_form
from .protocol import (
    UNSPECIFIED, Address, Command, Credentials, CredentialsReply, Datagram, Greeting, LoginFailed,
    Message, Method, MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed,
)
from .relay import RESET, Coded

if TYPE_CHECKING:
    from .gssapi.context import Protection

TIMEOUT = 30.0      # seconds; servers give a target 10 or more to answer
SERVICE = "rcmd"    # of a proxy, in RFC 1961 and for most programs
AT_ONCE = 65536     # octets to be read, of what is protected
BY_KERBEROS = "+gssapi"         # what the scheme of a URL has then

M = TypeVar("M", bound=Message)
Methods = Mapping[int, Callable[["Conversation"], None]]    # ways to authenticate, by METHOD
NO_OTHERS: Methods = {}


class Proxy(NamedTuple):
    """Where a proxy is, and who we are to it.  Its text never has the password in it."""

    host: str
    port: int = 1080
    username: bytes = b""           # empty: no login
    password: bytes = b""
    names_there: bool = True        # socks5h: the proxy looks names up
    gssapi: bool = False            # log in by Kerberos, and by nothing else
    service: str = SERVICE          # of the proxy there; with a slash in it, its whole principal

    @classmethod
    def parse(cls, url: Union[str, Proxy]) -> Proxy:
        """
        ``socks5h://[NAME:PASSWORD@]HOST[:PORT]`` or ``socks5://``, or with Kerberos ``socks5h+gssapi://[SERVICE@]HOST[:PORT]``.

        ValueError for anything else.
        """
        if isinstance(url, Proxy):
            return url
        try:
            parts = urlsplit(url)
            host, port = unquote(parts.hostname or ""), parts.port
        except ValueError:
            host, port, parts = "", None, urlsplit("")
        gssapi = parts.scheme.endswith(BY_KERBEROS)
        scheme = parts.scheme[:-len(BY_KERBEROS)] if gssapi else parts.scheme
        if scheme not in ("socks5", "socks5h") or (gssapi and parts.password is not None) or not host or port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
            # What was written is not shown: it may have a password in it.
            raise ValueError("invalid proxy URL: expected socks5h://[NAME:PASSWORD@]HOST:PORT, with %40 for @, %3A for : and %2F for / in NAME and PASSWORD")
        if gssapi:
            return cls(host, 1080 if port is None else port, names_there=scheme == "socks5h", gssapi=True, service=unquote(parts.username or SERVICE))
        username, password = (unquote_to_bytes(text or "") for text in (parts.username, parts.password))
        if max(len(username), len(password)) > 255:
            raise ValueError("invalid proxy URL: the name and the password have 255 bytes at most")
        return cls(host, 1080 if port is None else port, username, password, scheme == "socks5h")

    def __str__(self) -> str:
        login = f"{quote(self.username, safe='')}:***@" if self.username and not self.gssapi else ""
        if self.gssapi and self.service != SERVICE:
            login = f"{quote(self.service, safe='')}@"
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host      # RFC 6874
        return f"socks5{'h' * self.names_there}{BY_KERBEROS * self.gssapi}://{login}{host}:{self.port}"

    def __repr__(self) -> str:
        return f"<Proxy {self}>"


class Conversation:
    """
    What is said on one connection to a proxy, until its command has succeeded.

    It is a binary stream of what the proxy sends.  `socket` is the connection; an authentication
    method that encapsulates what follows puts another one in its place.  Kerberos does not: what follows goes through
    `protection`, and as_socket() is the other one.
    """

    protection: Optional[Protection] = None

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.socket = sock
        self.until = until          # the deadline, by time.monotonic()
        self.received = bytearray()     # of what is protected, and still to be decoded
        self.decoded = b""

    def read(self, n: int, /) -> bytes:
        """1 to `n` octets."""
        if n == 0:
            return b""
        if self.protection is None:
            return self.receive_octets(n)
        while not self.decoded:
            octets = self.protection.decode(self.received)
            if octets is None:
                self.received += self.receive_octets(AT_ONCE)
            self.decoded = octets or b""
        octets, self.decoded = self.decoded[:n], self.decoded[n:]
        return octets

    def receive_octets(self, n: int) -> bytes:
        """1 to `n` octets as they are on the wire."""
        self.socket.settimeout(seconds_until(self.until))
        octets = self.socket.recv(n)
        if not octets:
            raise ProtocolError("the proxy has closed the connection instead of answering")
        return octets

    def write(self, octets: bytes) -> None:
        self.socket.settimeout(seconds_until(self.until))
        self.socket.sendall(octets if self.protection is None else self.protection.encode(octets))

    def send(self, message: Message) -> None:
        self.write(bytes(message))

    def receive(self, message: Type[M]) -> M:
        try:
            return message.read(self)
        except RequestFailed as error:      # what it was raised for is a request of ours elsewhere
            raise ProtocolError(f"the proxy's answer cannot be read: {error}") from error

    def negotiate(self, proxy: Proxy, methods: Methods = NO_OTHERS, datagrams: bool = False) -> None:
        """Agree on a method and carry it out.  RFC 1928 section 3.  `datagrams`: it is for some."""
        ways: Dict[int, Callable[[Conversation], None]] = {Method.NO_AUTHENTICATION_REQUIRED: lambda _conversation: None}
        if proxy.gssapi:            # and not what would leave all that follows in clear
            ways = {Method.GSSAPI: lambda conversation: conversation.log_in_by_kerberos(proxy, datagrams)}
        ways.update(methods)
        if proxy.username and not proxy.gssapi:
            ways.setdefault(Method.USERNAME_PASSWORD, lambda conversation: conversation.log_in(proxy))
        self.send(Greeting(bytes(ways)))
        method = self.receive(MethodSelection).method
        if method == Method.NO_ACCEPTABLE_METHODS:
            raise NoAcceptableMethod(NOT_LIKE_THIS["Kerberos" if proxy.gssapi else "password" if proxy.username else "nothing"])
        if method not in ways:
            raise ProtocolError(f"the proxy has chosen method {method:02x}, which was not offered")
        ways[method](self)

    def log_in(self, proxy: Proxy) -> None:
        """RFC 1929."""
        self.send(Credentials(proxy.username, proxy.password))
        if self.receive(CredentialsReply).status != CredentialsReply.SUCCESS:
            raise LoginFailed("the proxy does not accept the name or the password", repr(proxy.username)[2:-1])

    def log_in_by_kerberos(self, proxy: Proxy, datagrams: bool) -> None:
        """RFC 1961.  ImportError, in words, where the package is missing."""
        from .gssapi import client

        self.protection = client.log_in(self, proxy.host, proxy.service, datagrams)

    @property
    def coded(self) -> Optional[Coded]:
        """How what follows is coded, if it is, and what of that has come already."""
        return None if self.protection is None else Coded(self.protection, bytes(self.received), self.decoded)

    def as_socket(self) -> socket.socket:
        """The connection, for what is to be said in clear, whatever it is on the wire."""
        if self.coded is None:
            return self.socket
        from .gssapi.client import ProtectedSocket

        return ProtectedSocket(self.socket, self.coded)

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


NOT_LIKE_THIS = {
    "Kerberos": "the proxy does not know Kerberos, or does not ask for it here",
    "password": "the proxy requires another kind of authentication",
    "nothing": "the proxy requires authentication, and its URL has no NAME:PASSWORD",
}


def connect(proxy: Union[str, Proxy], host: str, port: int, *, timeout: float = TIMEOUT, methods: Methods = NO_OTHERS) -> socket.socket:
    """
    A blocking socket, connected to `host` through the proxy.

    `methods` has further ways to authenticate, by their METHOD: functions that are called with
    the `Conversation` when the proxy has chosen them, and raise `LoginFailed`.
    """
    return asked_for_one(Proxy.parse(proxy), Command.CONNECT, host, port, time.monotonic() + timeout, methods)[0].as_socket()


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
        self._conversation.socket.settimeout(None)
        sock, self._conversation = self._conversation.as_socket(), None
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
        return DatagramRelay(proxy, conversation.socket, conversation.here(bound), conversation.protection)


class DatagramRelay(ContextManager["DatagramRelay"]):
    """
    A proxy's UDP relay.  `address` is where it is; it lives as long as `control`, the TCP connection.

    `socket` is a UDP socket connected to the relay, without a timeout: give it one, since UDP may lose datagrams.  With
    Kerberos, each is wrapped by sendto() and unwrapped by recvfrom(); what does not unwrap is dropped.
    """

    def __init__(self, proxy: Proxy, control: socket.socket, address: Address, protection: Optional[Protection] = None) -> None:
        self.proxy = proxy
        self.sending = threading.Lock()     # or two threads would have one number for their frames
        self.encode: Callable[[bytes], bytes] = bytes if protection is None else protection.frame
        self.decode: Callable[[bytes], bytes] = bytes if protection is None else protection.decode_datagram
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
        with self.sending:
            self.socket.send(self.encode(bytes(Datagram(address, data))))

    def recvfrom(self) -> Tuple[bytes, Tuple[str, int]]:
        """The next datagram, and the host and port that have sent it."""
        while True:
            with suppress(ProtocolError, RequestFailed):
                datagram = Datagram.read(BytesIO(self.decode(self.socket.recv(65535))))
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
        conversation.negotiate(proxy, methods, datagrams=command is Command.UDP_ASSOCIATE)
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
