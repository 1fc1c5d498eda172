"""
The PROXY protocol: what a load balancer says about a client before the client's own octets.

A balancer makes a connection of its own, and that is all that a server sees.  So it first sends a header with the address
of its client, in one of two forms (https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt):

    version 1       PROXY TCP4 192.0.2.7 198.51.100.1 51958 1080\\r\\n

    version 2       +-----------+---------+--------+-----+-----------+----------+
                    | SIGNATURE | VER_CMD | FAMILY | LEN | ADDRESSES |   TLVS   |
                    +-----------+---------+--------+-----+-----------+----------+
                    |    12     |    1    |   1    |  2  | 0 to 216  | Variable |
                    +-----------+---------+--------+-----+-----------+----------+

The one idea: a header is believed, so it is never guessed.  Who has to send one sends nothing else first; what
deviates from the specification is a `BadHeader`; and exactly the octets of the header are taken from the connection.

Not here: who has to send one, and what becomes of the client (server.py); what others get who do (foreign.py).
"""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple, Union

from .descriptors import CLIENT, USED_UP, descriptors
from .names import quoted
from .protocol import VER, Address, BinaryStream, ProtocolError, read_exactly

WORD = b"PROXY "                            # how version 1 begins
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"         # and version 2, with what no other protocol does
LINE_MAX = 107          # octets of version 1, with its line end
LENGTH_MAX = 4096       # octets of version 2 behind LEN; the specification expects 536 in all, a certificate may be among them

LINE = re.compile(rb"PROXY (?:UNKNOWN(?: .*)?|TCP([46]) ([\dA-Fa-f:.]+) ([\dA-Fa-f:.]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4}))\r\n", re.DOTALL)

LOCAL, PROXY = 0x20, 0x21                   # VER_CMD
UNSPEC, TCP4, TCP6, UNIX_STREAM = 0x00, 0x11, 0x21, 0x31
SIZES = {UNSPEC: 0, TCP4: 12, TCP6: 36, UNIX_STREAM: 216}       # octets of ADDRESSES by FAMILY; the others have datagrams, or are none
CRC32C, UNIQUE_ID = 0x03, 0x05              # TLVs: a type, a length of two octets, a value
UNIQUE_ID_MAX = 128


class BadHeader(ProtocolError):
    """What has come is no header, or a wrong one."""


class OnlyConnected(ProtocolError):
    """Nothing has come, or nothing behind the header: a balancer that looks whether somebody listens."""


ENDS_TOO_SOON = "a PROXY header that ends too soon"


# --- the header ---

class ProxyHeader(NamedTuple):
    """
    What a header says.  Without a `source` the balancer does not know its client's address, or has none.

    `local` means that the balancer speaks for itself, to check our health.  `destination` is what the client has called.
    """

    source: Optional[Address] = None
    destination: Optional[Address] = None
    local: bool = False

    @classmethod
    def read(cls, stream: BinaryStream) -> ProxyHeader:
        """Read one; BadHeader if it is none."""
        first = take(stream, 1)
        if first == WORD[:1]:
            return cls.read_line(stream, first)
        if first == SIGNATURE[:1]:
            return cls.read_binary(stream, first)
        if first[0] == VER:
            raise BadHeader("SOCKS5 without a PROXY header: have the balancer send one, or leave its address out of --proxy-protocol")
        raise BadHeader(f"no PROXY header: it begins with {first.hex()}")

    @classmethod
    def read_line(cls, stream: BinaryStream, line: bytes) -> ProxyHeader:
        """Version 1, which has begun with these octets."""
        line += take(stream, len(WORD) - len(line))
        if line != WORD:
            raise BadHeader(f"no PROXY header: it begins with {quoted(line)}")
        while not line.endswith(b"\n"):
            if len(line) == LINE_MAX:
                raise BadHeader(f"a PROXY header without a line end in {LINE_MAX} octets")
            octet = stream.read(1)
            if not octet:
                raise BadHeader(ENDS_TOO_SOON)
            line += octet
        found = LINE.fullmatch(line)
        if found is None:
            raise BadHeader(f"a PROXY header that cannot be read: {quoted(line)}")
        version, source, destination, source_port, destination_port = found.groups()
        if version is None:         # UNKNOWN: what follows means nothing
            return cls()
        return cls(address_in_text(int(version), source, source_port), address_in_text(int(version), destination, destination_port))

    @classmethod
    def read_binary(cls, stream: BinaryStream, start: bytes) -> ProxyHeader:
        """Version 2, which has begun with these octets."""
        start += take(stream, len(SIGNATURE) - len(start))
        if start != SIGNATURE:
            raise BadHeader(f"no PROXY header: it begins with {start.hex(' ')}")
        ver_cmd, family, *length = fixed = take(stream, 4)
        if ver_cmd not in (LOCAL, PROXY):
            raise BadHeader(f"a PROXY header of an unknown version or command, {ver_cmd:02x}")
        number = int.from_bytes(length, "big")
        if number > LENGTH_MAX:
            raise BadHeader(f"a PROXY header with {number} octets behind its length, and {LENGTH_MAX} are the most")
        octets = start + fixed + take(stream, number)
        if ver_cmd == PROXY:
            return cls(*addresses_in(family, octets))
        if family == UNSPEC:        # the addresses of any other are to be skipped, whatever they are
            check_tlvs(octets, len(start + fixed))
        return cls(local=True)


def take(stream: BinaryStream, n: int) -> bytes:
    """`n` octets; BadHeader if there are not as many."""
    try:
        return read_exactly(stream, n)
    except ProtocolError:
        raise BadHeader(ENDS_TOO_SOON) from None


def address_in_text(version: int, host: bytes, port: bytes) -> Address:
    """One of version 1, where numbers have no zeros in front (which not every ipaddress refuses)."""
    text = host.decode()
    with suppress(ValueError):
        ip = ip_address(text)
        if ip.version == version and (version == 6 or str(ip) == text) and int(port) < 65536:
            return address_of(ip, int(port))
    raise BadHeader(f"a PROXY header with an address that is none: {quoted(host)} port {int(port)} as TCP{version}")


def addresses_in(family: int, octets: bytes) -> Tuple[Optional[Address], Optional[Address]]:
    """Source and destination of version 2, of which these are all octets; what is behind them is checked."""
    start = len(SIGNATURE) + 4
    if family not in SIZES:
        raise BadHeader(f"a PROXY header of the address family {family:02x}, which cannot be that of a TCP connection")
    end = start + SIZES[family]
    if end > len(octets):
        raise BadHeader(f"a PROXY header that is too short for its addresses: {len(octets)} octets")
    check_tlvs(octets, end)
    if family in (UNSPEC, UNIX_STREAM):
        return None, None
    size = 4 if family == TCP4 else 16
    source, destination = (
        address_of(ip_address(octets[host:host + size]), int.from_bytes(octets[port:port + 2], "big"))
        for host, port in ((start, end - 4), (start + size, end - 2))
    )
    return source, destination


def address_of(ip: Union[IPv4Address, IPv6Address], port: int) -> Address:
    """BadHeader if no end of a connection can have it."""
    ip = getattr(ip, "ipv4_mapped", None) or ip
    address = Address.numeric(str(ip), port)
    if ip.is_unspecified or ip.is_multicast:
        raise BadHeader(f"a PROXY header with {address}, which no computer has")
    return address


def check_tlvs(octets: bytes, at: int) -> None:
    """BadHeader unless all that follows in this header are whole TLVs, and its checksum is right, if there is one."""
    while at < len(octets):
        kind, value = octets[at], at + 3
        at = value + int.from_bytes(octets[at + 1:value], "big")
        if at > len(octets):
            raise BadHeader("a PROXY header whose TLVs do not fit in its length")
        if kind == UNIQUE_ID and at - value > UNIQUE_ID_MAX:
            raise BadHeader(f"a PROXY header with a unique ID of {at - value} octets, and {UNIQUE_ID_MAX} are the most")
        if kind == CRC32C and crc32c(octets[:value] + bytes(at - value) + octets[at:]).to_bytes(4, "big") != octets[value:at]:
            raise BadHeader("a PROXY header whose checksum is wrong")


# --- its checksum: RFC 9260 appendix A ---

POLYNOMIAL = 0x82F63B78     # with the lowest bit first


def four_bits(value: int) -> int:
    for _ in range(4):
        value = value >> 1 ^ POLYNOMIAL * (value & 1)
    return value


FOUR_BITS = tuple(map(four_bits, range(16)))    # a header is short: a table of 256 would be made for nothing


def crc32c(octets: bytes) -> int:
    value = 0xFFFFFFFF
    for octet in octets:
        value ^= octet
        value = value >> 4 ^ FOUR_BITS[value & 15]
        value = value >> 4 ^ FOUR_BITS[value & 15]
    return value ^ 0xFFFFFFFF


# --- on a connection ---

class PeekingStream:
    """
    What comes on a connection until a deadline, which is by time.monotonic(); socket.timeout after that.

    What is read is looked at first, and taken from the connection only when it is known to be the reader's.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.ahead = b""            # what has been looked at, and not read
        self.untaken = 0            # octets that have been read, and are still in the connection
        self.begun = False          # something has come

    def read(self, n: int, /) -> bytes:
        """As many octets as are there, but `n` at most; none at the end."""
        if n and not self.ahead:
            self.take()
            self.ahead = self.peek()
        octets, self.ahead = self.ahead[:n], self.ahead[n:]
        self.untaken += len(octets)
        return octets

    def peek(self) -> bytes:
        """Wait for more."""
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        octets = self.connection.recv(LENGTH_MAX, socket.MSG_PEEK)
        self.begun = self.begun or bool(octets)
        return octets

    def take(self) -> None:
        """Take from the connection what has been read; if it breaks just now, the next who reads from it will find that out."""
        with suppress(OSError):
            while self.untaken:
                self.untaken -= len(self.connection.recv(self.untaken)) or self.untaken
        self.untaken = 0


class ForwardedAddress(Tuple[Any, ...]):
    """A client's address as accept() would have had it, the balancer that it has come `via`, and the header of that."""

    via: Address
    header: ProxyHeader

    @classmethod
    def of(cls, client: Address, via: Address, header: ProxyHeader) -> ForwardedAddress:
        found = cls(client.sockaddr)
        found.via, found.header = via, header
        return found


class HeaderReader:
    """
    Reads the headers of one server's connections, each in its own thread.

    Nothing is known of their clients yet, so they have places of their own: when there are too many, the oldest is evicted.
    """

    timeout = 5.0       # seconds until the whole header must have come; 3 at least, or the loss of one packet would be the end

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: Dict[socket.socket, None] = {}        # for their header; oldest first

    def read(self, connection: socket.socket, balancer: Address, most: int) -> ProxyHeader:
        """The header of this connection, which may wait for it among so many.  BadHeader, or OnlyConnected."""
        timeout, stream = connection.gettimeout(), PeekingStream(connection, time.monotonic() + self.timeout)
        with self.place(connection, most):
            try:
                header = ProxyHeader.read(stream)
                stream.take()
            except (ProtocolError, OSError) as error:
                raise self.reason(error, connection, stream) from None
            if header.source == balancer:       # version 1 has no other word for it
                header = header._replace(local=True)
            if header.local and not self.goes_on(stream):
                raise OnlyConnected
        connection.settimeout(timeout)
        return header

    def reason(self, error: Exception, connection: socket.socket, stream: PeekingStream) -> ProtocolError:
        """Why there is no header."""
        if connection not in self.waiting:
            return BadHeader("evicted: too many connections had not sent a PROXY header")
        if isinstance(error, socket.timeout):
            return BadHeader(f"no PROXY header within {self.timeout:g} s")
        if not stream.begun:
            return OnlyConnected()
        return error if isinstance(error, BadHeader) else BadHeader(ENDS_TOO_SOON)

    def goes_on(self, stream: PeekingStream) -> bool:
        """Whether a balancer that speaks for itself says anything behind its header.  If not, nothing has to be known of it."""
        try:
            return bool(stream.peek())
        except OSError:
            return False

    @contextmanager
    def place(self, connection: socket.socket, most: int) -> Iterator[None]:
        """It is one of those that wait."""
        if not descriptors.take_for_client():
            raise BadHeader(USED_UP)
        with self.lock:
            self.waiting[connection] = None
            evicted = next(iter(self.waiting)) if len(self.waiting) > most else None
            if evicted is not None:
                del self.waiting[evicted]
        if evicted is not None:
            hang_up(evicted)
        try:
            yield
        finally:
            descriptors.give_back(CLIENT)
            with self.lock:
                self.waiting.pop(connection, None)

    def close(self) -> None:
        """The server stops: wait for no header any more."""
        with self.lock:
            for connection in self.waiting:
                hang_up(connection)


def hang_up(connection: socket.socket) -> None:
    """Have the thread that reads it find its end."""
    with suppress(OSError):         # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)
