"""
The messages of SOCKS5: octets to objects and back.  No sockets here.

RFC 1928 and RFC 1929 draw every message as a row of named boxes.  Here a message is a class
under that same picture, and the one idea of this file is that *a message is a table of
fields*: it reads itself from a binary stream (a `BytesIO` will do), and lists its fields as
`(RFC name, octets, meaning)`.  Its octets, ``bytes(message)``, and its text,
``str(message)``, both follow from that list, so they cannot disagree.

    client -> server   Greeting              the methods I can log in with
    client <- server   MethodSelection       use this one
    client -> server   Credentials           (RFC 1929, if that was the method)
    client <- server   CredentialsReply
    client -> server   Request               CONNECT, BIND or UDP ASSOCIATE, and where
    client <- server   Reply                 one of nine codes (BIND: two replies)
    both ways          Datagram              the header in front of every UDP payload

Two rules keep the readers safe.  They read exactly the octets of their message, so whatever
the client sent ahead stays in the stream.  And they read a message to its end before they
judge it, as far as its end is known, because an answer to a half-read message may get lost.

Errors carry the answer: every `Socks5Error` has the message to send before hanging up.

This file decides nothing: who may log in and what may be reached is asked in handler.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from operator import attrgetter
from typing import Any, ClassVar, Dict, List, Mapping, NamedTuple, Optional, Protocol, Tuple, Type, TypeVar

from .names import JOINERS, quoted

M = TypeVar("M", bound="Message")

VER = 5                     # of every message but the two of RFC 1929
CREDENTIALS_VER = 1         # of those two: the version of the sub-negotiation, not of SOCKS
RSV = 0
DATAGRAM_MAX = 65507        # octets; the largest payload that UDP over IPv4 has room for


class BinaryStream(Protocol):
    """Anything with `read(n)`: at most `n` octets, or all that are left; none at the end."""

    def read(self, n: int, /) -> bytes: ...


# --- the codes, under the names that the RFCs give them ---

class Method(IntEnum):
    """How a client proves who it is.  RFC 1928 section 3."""

    NO_AUTHENTICATION_REQUIRED = 0x00
    GSSAPI = 0x01
    USERNAME_PASSWORD = 0x02
    NO_ACCEPTABLE_METHODS = 0xFF


class Command(IntEnum):
    """What a client asks for.  RFC 1928 section 4."""

    CONNECT = 0x01
    BIND = 0x02
    UDP_ASSOCIATE = 0x03


class AddressType(IntEnum):
    """The kind of address that follows.  RFC 1928 section 5 (there is no 2)."""

    IPV4 = 0x01
    DOMAINNAME = 0x03
    IPV6 = 0x04


class ReplyCode(IntEnum):
    """How a request went, with the phrase that RFC 1928 section 6 has for it."""

    phrase: str

    def __new__(cls, code: int, phrase: str) -> ReplyCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.phrase = phrase
        return member

    SUCCEEDED = 0x00, "succeeded"
    GENERAL_FAILURE = 0x01, "general SOCKS server failure"
    NOT_ALLOWED = 0x02, "connection not allowed by ruleset"
    NETWORK_UNREACHABLE = 0x03, "network unreachable"
    HOST_UNREACHABLE = 0x04, "host unreachable"
    CONNECTION_REFUSED = 0x05, "connection refused"
    TTL_EXPIRED = 0x06, "TTL expired"
    COMMAND_NOT_SUPPORTED = 0x07, "command not supported"
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08, "address type not supported"


# A dict is four times as fast as asking the enum, and knows what is in it.
METHODS: Dict[int, Method] = {method: method for method in Method}
COMMANDS: Dict[int, Command] = {command: command for command in Command}
REPLY_CODES: Dict[int, ReplyCode] = {code: code for code in ReplyCode}
CODES: Dict[str, Mapping[int, Enum]] = {
    "METHOD": METHODS, "CMD": COMMANDS, "REP": REPLY_CODES, "ATYP": {kind: kind for kind in AddressType},
}


# --- the errors, each with its answer ---

class Socks5Error(Exception):
    """A conversation that cannot go on; its text is for the person who reads the log."""

    answer: Optional[Message] = None        # to send before hanging up


class ProtocolError(Socks5Error):
    """These octets are no SOCKS5, or end too soon: there is nothing sensible to answer."""


class NoAcceptableMethod(Socks5Error):
    """The client offers no method that this server would take; `wanted` is the one that it asks for."""

    def __init__(self, reason: str, wanted: Optional[Method] = None) -> None:
        super().__init__(reason)
        self.wanted = wanted
        self.answer = MethodSelection(Method.NO_ACCEPTABLE_METHODS)


class LoginFailed(Socks5Error):
    """Wrong name or password, or a login that cannot be read.  `username` is for the log."""

    def __init__(self, reason: str, username: str = "") -> None:
        super().__init__(reason)
        self.username = username
        self.answer = CredentialsReply(CredentialsReply.FAILURE)


class RequestFailed(Socks5Error):
    """A request that gets a reply other than `SUCCEEDED`."""

    def __init__(self, code: ReplyCode, reason: str = "") -> None:
        super().__init__(reason or code.phrase)
        self.code = code
        self.answer = Reply(code)


class UnknownCommand(RequestFailed):
    """A CMD that the RFC has not.  Its octet and the `destination` are for the log."""

    def __init__(self, octet: int, destination: Address) -> None:
        super().__init__(ReplyCode.COMMAND_NOT_SUPPORTED, f"unknown CMD {octet:02x}")
        self.octet = octet
        self.destination = destination


# --- fields ---

class Field(NamedTuple):
    """One box of the RFC's picture: its name, its octets, and what they say (a code, a number or text)."""

    name: str
    octets: bytes
    meaning: object
    secret: bool = False    # neither octets nor meaning may be shown

    def __str__(self) -> str:
        return f"{self.name}={'***' if self.secret else in_words(self.meaning)}"


def in_words(meaning: object) -> str:
    return meaning.name if isinstance(meaning, Enum) else str(meaning)


def octet(value: int) -> bytes:
    """The number as one octet."""
    return bytes((value,))


@lru_cache(maxsize=None)
def code_field(name: str, code: int) -> Field:
    """The box of a code; there are so few that each is made once.  Without a name in the RFC it is hexadecimal."""
    return Field(name, octet(code), CODES[name].get(code, f"{code:02x}"))


VERSION = Field("VER", octet(VER), VER)         # the boxes that are the same in every message
CREDENTIALS_VERSION = Field("VER", octet(CREDENTIALS_VER), CREDENTIALS_VER)
RESERVED = Field("RSV", octet(RSV), f"{RSV:02x}")


def counted(octets: bytes, what: str) -> bytes:
    """The octets behind one that counts them; ValueError where one cannot count that far."""
    if len(octets) > 255:
        raise ValueError(f"{what} has {len(octets)} octets, and 255 are the most")
    return octet(len(octets)) + octets


def read_exactly(stream: BinaryStream, n: int) -> bytes:
    """Read `n` octets, however the stream cuts them; ProtocolError if it ends before."""
    octets = stream.read(n)
    while len(octets) < n:
        more = stream.read(n - len(octets))
        if not more:
            raise ProtocolError(f"the client closed the connection in mid-message ({len(octets)} of {n} octets)")
        octets += more
    return octets


def read_versioned(stream: BinaryStream, n: int, what: str, version: int = VER) -> bytes:
    """Read `n` octets that begin with VER; ProtocolError if it is another one."""
    octets = read_exactly(stream, n)
    if octets[0] != version:
        raise ProtocolError(f"VER of the {what} is {octets[0]:02x}, not {version:02x}")
    return octets


class Message:
    """What all messages share: octets and text, both from the fields."""

    @classmethod
    def read(cls: Type[M], stream: BinaryStream) -> M:
        """Read one, and not an octet more; a Socks5Error if it cannot be read."""
        raise NotImplementedError

    def fields(self) -> List[Field]:
        """The boxes of the RFC's picture, in its order."""
        raise NotImplementedError

    def __bytes__(self) -> bytes:
        return b"".join(map(attrgetter("octets"), self.fields()))

    def __str__(self) -> str:
        return f"{type(self).__name__} {' '.join(map(str, self.fields()))}"


# --- addresses: the part that Request, Reply and Datagram have in common ---

# Host names as they are used: letters, digits, hyphen, underscore, dots; beyond ASCII whatever can be printed, and
# the joiners, for names.py to spell.  Not a NUL, where C libraries would cut the name in two; not a control
# character, which would forge log lines; not %, which in fe80::1%eth0 picks an interface of this computer.
NAME = re.compile(r"[A-Za-z0-9._\-\u00a1-\U0010ffff]+")

LINK_LOCAL = ("fe8", "fe9", "fea", "feb")       # how the text of an address in fe80::/10 begins

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}     # what the system takes all zeros for


class Address(NamedTuple):
    """
    A host and a port.  RFC 1928 section 5.

        +------+----------+------+
        | ATYP |   ADDR   | PORT |
        +------+----------+------+
        |  1   | Variable |  2   |
        +------+----------+------+

    `host` is an IP address in its usual spelling, or a name; `address_type` is how it stands on the wire.  Browsers
    send ``127.0.0.1`` as a name, others ``[::1]`` as it stands in a URL: ask for its `literal`, not for the type.

    Every link has a fe80::1 of its own, so a link-local address needs to be told which: its zone (RFC 4007).
    `scope` is the interface of this computer by which that link is reached, as a number.  It means
    nothing elsewhere, so it is never on the wire, and neither in the log nor in what rules are asked about.
    """

    host: str
    port: int
    address_type: AddressType
    scope: int = 0                  # of a link-local IPv6 address only; 0: not known

    @classmethod
    def read(cls, stream: BinaryStream) -> Address:
        """Read one; RequestFailed 08 for an unknown type, 04 for a name that cannot exist."""
        atyp = read_exactly(stream, 1)[0]
        if atyp == AddressType.IPV4:
            octets = read_exactly(stream, 4 + 2)
            return cls("%d.%d.%d.%d" % tuple(octets[:4]), octets[4] << 8 | octets[5], AddressType.IPV4)
        if atyp == AddressType.IPV6:
            octets = read_exactly(stream, 16 + 2)
            return cls(str(IPv6Address(octets[:16])), int.from_bytes(octets[16:], "big"), AddressType.IPV6)
        if atyp == AddressType.DOMAINNAME:
            length = read_exactly(stream, 1)[0]
            octets = read_exactly(stream, length + 2)
            return cls(read_name(octets[:length]), int.from_bytes(octets[length:], "big"), AddressType.DOMAINNAME)
        # Its length is unknown, so nothing after it can be parsed.
        raise RequestFailed(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, f"unknown ATYP {atyp:02x}")

    @classmethod
    def of(cls, sockaddr: Tuple[Any, ...]) -> Address:
        """The address of a socket, from ``(host, port, ...)`` as getsockname() and accept() give it."""
        host, port = sockaddr[:2]
        if ":" not in host:
            return cls(host, port, AddressType.IPV4)
        return cls.numeric(host.partition("%")[0], port, *sockaddr[3:])

    @classmethod
    def numeric(cls, host: str, port: int, scope: int = 0) -> Address:
        """
        An IP address as text, and a port; ValueError if it is none.

        An IPv4 address in IPv6 clothes (``::ffff:192.0.2.1``, what a socket that serves both
        families reports) becomes the IPv4 address that it is.  A zone is a number here, as in
        ``fe80::1%2``: which one ``%eth0`` is, the resolver knows.  Of other addresses it is left out.
        """
        text, _, zone = host.partition("%")
        ip = ip_address(text)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        text = str(ip)
        if isinstance(ip, IPv4Address):
            return cls(text, port, AddressType.IPV4)
        if not text.startswith(LINK_LOCAL):
            return cls(text, port, AddressType.IPV6)
        return cls(text, port, AddressType.IPV6, scope_of(zone) if zone else scope)

    @classmethod
    def named(cls, host: str, port: int) -> Address:
        """A name, or an IP address as text: whichever it is."""
        try:
            return cls.numeric(host, port)
        except ValueError:
            return cls(host, port, AddressType.DOMAINNAME)

    @property
    def literal(self) -> Optional[Address]:
        """The same as an IP address, if that is what the host says; None for a name."""
        if self.address_type is AddressType.IPV4:
            return self
        try:
            return self.numeric(without_brackets(self.host), self.port, self.scope)
        except ValueError:
            return None

    @property
    def is_unspecified(self) -> bool:
        """All zeros, or the name ``0`` (as PySocks writes it): the client cannot tell yet."""
        return self.host in ("0.0.0.0", "::", "[::]", "0")

    @property
    def wildcard(self) -> str:
        """All addresses of its family, as bind() takes it."""
        return "::" if self.address_type is AddressType.IPV6 else "0.0.0.0"

    @property
    def dialled(self) -> Address:
        """Where the system goes if asked for this: all zeros stand for the computer itself."""
        return self.numeric(LOOPBACK[self.host], self.port) if self.host in LOOPBACK else self

    @property
    def zoned(self) -> str:
        """The host as text for this computer, with its zone: ``fe80::1%2``; numeric() reads it."""
        return f"{self.host}%{self.scope}" if self.scope else self.host

    @property
    def sockaddr(self) -> Tuple[Any, ...]:
        """As bind() and connect() take it."""
        return (self.host, self.port, 0, self.scope) if self.scope else (self.host, self.port)

    def on_the_link_of(self, other: Address) -> Address:
        """The same, and if it is link-local and does not say on which link, on the one where `other` is."""
        if self.scope or not other.scope or self.address_type is not AddressType.IPV6 or not self.host.startswith(LINK_LOCAL):
            return self
        return self._replace(scope=other.scope)

    def octets(self) -> bytes:
        """The host as DST.ADDR or BND.ADDR has it."""
        if self.address_type is AddressType.IPV4:
            return bytes(map(int, self.host.split(".")))
        if self.address_type is AddressType.IPV6:
            return IPv6Address(self.host).packed
        return counted(self.host.encode(), "a name")

    def fields(self, prefix: str) -> List[Field]:
        """ATYP, `prefix`.ADDR and `prefix`.PORT."""
        return [
            code_field("ATYP", self.address_type),
            Field(prefix + ".ADDR", self.octets(), self.host),
            Field(prefix + ".PORT", self.port.to_bytes(2, "big"), self.port),
        ]

    def __str__(self) -> str:
        return f"{in_brackets(self.host)}:{self.port}"


def in_brackets(host: str) -> str:
    """A host as it stands in front of a port: an IPv6 address, which has colons of its own, in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def without_brackets(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


UNSPECIFIED = Address("0.0.0.0", 0, AddressType.IPV4)   # "no address", and the shortest way to say so


def scope_of(zone: str) -> int:
    """The number of an interface, from its text; ValueError if it is none."""
    if not (zone.isascii() and zone.isdigit() and len(zone) < 11 and int(zone) < 1 << 32):      # as in a sockaddr_in6
        raise ValueError(f"{zone!r} is no number of an interface")
    return int(zone)


def read_name(octets: bytes) -> str:
    """The host name in these octets; RequestFailed 04 if there can be no such host."""
    try:
        name = octets.decode()
    except UnicodeDecodeError as error:
        raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"a name that is no text: {quoted(octets)}") from error
    if NAME.fullmatch(name) and (name.isprintable() or name.translate(JOINERS).isprintable()):
        return name
    if ":" in name and "%" not in name and Address.named(name, 0).literal:      # an IPv6 address without a zone
        return name
    raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"a name that cannot exist: {quoted(name)}")


# --- method negotiation ---

@dataclass
class Greeting(Message):
    """
    Client to server: the methods I can use.  RFC 1928 section 3.

        +-----+----------+----------+
        | VER | NMETHODS | METHODS  |
        +-----+----------+----------+
        |  1  |    1     | 1 to 255 |
        +-----+----------+----------+

    `methods` are octets, not `Method`s: a client may offer any number.
    """

    methods: bytes

    @classmethod
    def read(cls, stream: BinaryStream) -> Greeting:
        _ver, nmethods = read_versioned(stream, 2, "greeting")
        return cls(read_exactly(stream, nmethods))

    def fields(self) -> List[Field]:
        return [
            VERSION,
            Field("NMETHODS", octet(len(self.methods)), len(self.methods)),
            Field("METHODS", self.methods, ",".join(in_words(METHODS.get(code, f"{code:02x}")) for code in self.methods)),
        ]


@dataclass
class MethodSelection(Message):
    """
    Server to client: use this method.  RFC 1928 section 3.

        +-----+--------+
        | VER | METHOD |
        +-----+--------+
        |  1  |   1    |
        +-----+--------+
    """

    method: int

    @classmethod
    def read(cls, stream: BinaryStream) -> MethodSelection:
        return cls(read_versioned(stream, 2, "method selection")[1])

    def fields(self) -> List[Field]:
        return [VERSION, code_field("METHOD", self.method)]


# --- username and password ---

@dataclass
class Credentials(Message):
    """
    Client to server: who I am.  RFC 1929 section 2.

        +-----+------+----------+------+----------+
        | VER | ULEN |  UNAME   | PLEN |  PASSWD  |
        +-----+------+----------+------+----------+
        |  1  |  1   | 1 to 255 |  1   | 1 to 255 |
        +-----+------+----------+------+----------+

    Both are octets; the RFC names no encoding.  Empty ones are read, since clients send
    them, but the RFC's 1 to 255 makes them no login unless one is configured so.
    """

    username: bytes
    password: bytes = field(repr=False)

    @classmethod
    def read(cls, stream: BinaryStream) -> Credentials:
        ver, ulen = read_exactly(stream, 2)
        if ver != CREDENTIALS_VER:
            raise LoginFailed(f"VER of the credentials is {ver:02x}, not 01")
        username = read_exactly(stream, ulen)
        plen = read_exactly(stream, 1)[0]
        try:
            return cls(username, read_exactly(stream, plen))
        except ProtocolError:       # which tells how long the password would be
            raise ProtocolError("the client closed the connection in mid-message, in its password") from None

    def fields(self) -> List[Field]:
        uname, passwd = counted(self.username, "a username"), counted(self.password, "a password")
        return [
            CREDENTIALS_VERSION,
            Field("ULEN", uname[:1], uname[0]),
            Field("UNAME", self.username, quoted(self.username)[2:-1]),
            Field("PLEN", passwd[:1], passwd[0], secret=True),
            Field("PASSWD", self.password, "", secret=True),
        ]


@dataclass
class CredentialsReply(Message):
    """
    Server to client: welcome, or not (any STATUS but 00).  RFC 1929 section 2.

        +-----+--------+
        | VER | STATUS |
        +-----+--------+
        |  1  |   1    |
        +-----+--------+
    """

    SUCCESS: ClassVar[int] = 0
    FAILURE: ClassVar[int] = 1

    status: int

    @classmethod
    def read(cls, stream: BinaryStream) -> CredentialsReply:
        return cls(read_versioned(stream, 2, "reply to the credentials", CREDENTIALS_VER)[1])

    def fields(self) -> List[Field]:
        return [CREDENTIALS_VERSION, Field("STATUS", octet(self.status), "failure" if self.status else "success")]


# --- request and reply ---

@dataclass
class Request(Message):
    """
    Client to server: what I want, and where.  RFC 1928 section 4.

        +-----+-----+-------+------+----------+----------+
        | VER | CMD |  RSV  | ATYP | DST.ADDR | DST.PORT |
        +-----+-----+-------+------+----------+----------+
        |  1  |  1  | X'00' |  1   | Variable |    2     |
        +-----+-----+-------+------+----------+----------+

    RSV should be 00; another value does no harm and is kept as it came.
    """

    command: Command
    destination: Address
    rsv: int = RSV

    @classmethod
    def read(cls, stream: BinaryStream) -> Request:
        ver, cmd, rsv = read_exactly(stream, 3)
        if ver != VER:      # some other protocol's layout: there is no telling where it ends
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, f"VER of the request is {ver:02x}, not 05")
        destination = Address.read(stream)
        if cmd not in COMMANDS:
            raise UnknownCommand(cmd, destination)
        return cls(COMMANDS[cmd], destination, rsv)

    def fields(self) -> List[Field]:
        return [
            VERSION,
            code_field("CMD", self.command),
            Field("RSV", octet(self.rsv), f"{self.rsv:02x}"),
            *self.destination.fields("DST"),
        ]


@dataclass
class Reply(Message):
    """
    Server to client: how it went, and this end of the connection.  RFC 1928 section 6.

        +-----+-----+-------+------+----------+----------+
        | VER | REP |  RSV  | ATYP | BND.ADDR | BND.PORT |
        +-----+-----+-------+------+----------+----------+
        |  1  |  1  | X'00' |  1   | Variable |    2     |
        +-----+-----+-------+------+----------+----------+

    A failure has no address to report, yet the fields must be there: clients wait for them.
    `code` is a `ReplyCode`, or a bare number where a server sent one that the RFC has not.
    """

    code: int
    bound: Address = UNSPECIFIED

    @classmethod
    def read(cls, stream: BinaryStream) -> Reply:
        _ver, rep, _rsv = read_versioned(stream, 3, "reply")
        bound = Address.read(stream)
        return cls(REPLY_CODES.get(rep, rep), bound)

    def fields(self) -> List[Field]:
        return [VERSION, code_field("REP", self.code), RESERVED, *self.bound.fields("BND")]


# --- UDP ---

@dataclass
class Datagram(Message):
    """
    Both ways, one UDP datagram: for whom, or from whom, and its payload.  RFC 1928 section 7.

        +-----+------+------+----------+----------+----------+
        | RSV | FRAG | ATYP | DST.ADDR | DST.PORT |   DATA   |
        +-----+------+------+----------+----------+----------+
        |  2  |  1   |  1   | Variable |    2     | Variable |
        +-----+------+------+----------+----------+----------+

    FRAG 00 is a whole datagram; 01 to 7f its place among fragments, the high bit the last.
    The stream is the datagram: DATA is all that is left, and may be empty.
    """

    LAST_FRAGMENT: ClassVar[int] = 0x80

    address: Address
    data: bytes
    frag: int = 0
    rsv: int = RSV

    @classmethod
    def read(cls, stream: BinaryStream) -> Datagram:
        rsv_high, rsv_low, frag = read_exactly(stream, 3)
        address = Address.read(stream)
        return cls(address, stream.read(DATAGRAM_MAX), frag, rsv_high << 8 | rsv_low)

    def fields(self) -> List[Field]:
        return [
            Field("RSV", self.rsv.to_bytes(2, "big"), f"{self.rsv:04x}"),
            Field("FRAG", octet(self.frag), self.frag),
            *self.address.fields("DST"),
            Field("DATA", self.data, f"{len(self.data)} octets"),
        ]
