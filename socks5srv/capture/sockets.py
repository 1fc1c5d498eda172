"""
The sockets of a server that is recorded (``--pcap``): they do what sockets do, and tell what has passed.

The one idea: `Route` makes every socket, and ``Route(socket_factory=Capture(writer).socket)`` makes these.  So what is
in the recording has been sent or received, on either side, and what the server never read is not in it.  The kernel
would move octets past them (splice), so a relay splices plain sockets only.

Not here: packets, and the file (pcap.py).
"""

from __future__ import annotations

import contextlib
import errno
import socket
from functools import cached_property
from typing import Any, Callable, NamedTuple, Optional, Tuple, TypeVar

from ..outbound import UNDER_WAY
from ..protocol import Address
from ..relay import RESET
from .pcap import CLIENT, SERVER, CaptureWriter, Packets, TcpStream, udp

T = TypeVar("T")

SYN_SENT = {*UNDER_WAY, 0, errno.ECONNREFUSED}      # errno of a connect() that has sent something
RESETS = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}


class Capture(NamedTuple):
    """Makes sockets whose traffic goes to `writer`."""

    writer: CaptureWriter

    def socket(self, family: int = socket.AF_INET, type: int = socket.SOCK_STREAM, proto: int = 0, fileno: Optional[int] = None) -> socket.socket:
        """Called like ``socket.socket()``: for TCP, also to listen, and for UDP."""
        kind = CapturedDatagrams if type & socket.SOCK_DGRAM else CapturedStream      # there may be flags in it
        return kind(self.writer, family, type, proto, fileno)


class CapturedStream(socket.socket):
    """A TCP socket that records its connection; one that listens makes such sockets of those it accepts."""

    stream: Optional[TcpStream] = None      # none before connect(), and while listening
    side = CLIENT                           # which end of the stream this is
    begun = False                           # the handshake is recorded
    reading = True                          # until our own shutdown() says otherwise
    resets = False                          # when it is closed

    def __init__(self, writer: CaptureWriter, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.writer = writer

    # --- what is recorded ---

    def note(self, event: Callable[..., Packets], *details: Any) -> None:
        if self.stream is not None:
            self.writer.add(event, self.stream, *details)

    def begin(self) -> None:
        """Record the handshake, at the first use: what only connects to wake a thread (Listener.stop()) is closed unused."""
        if self.stream is not None and not self.begun:
            self.begun = True
            self.note(TcpStream.syn)
            if self.side == SERVER:
                self.note(TcpStream.establish)

    def outcome(self, code: Optional[int]) -> None:
        """Record what the errno of a call says: of connect() that it has been accepted, of any that there was a reset."""
        if code in (0, errno.EISCONN):
            self.note(TcpStream.establish)
        elif code in RESETS and self.reading:      # (Writing after our own shutdown() fails locally; that is no reset.)
            self.note(TcpStream.reset, 1 - self.side)

    def transfer(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of this system call; an error may tell of a reset."""
        self.begin()
        try:
            return call(*arguments)
        except OSError as error:
            self.outcome(error.errno)
            raise

    def received(self, octets: bytes) -> None:
        if octets:
            self.note(TcpStream.data, 1 - self.side, octets)
        elif self.reading:
            self.note(TcpStream.fin, 1 - self.side)

    def note_close(self) -> None:
        """close() sends FIN; or a reset, if anything has been left unread."""
        unread = None
        with contextlib.suppress(OSError):
            self.getpeername()
            self.outcome(0)         # established, perhaps since we asked last
        try:
            self.setblocking(False)
            unread = super().recv(1, socket.MSG_PEEK)
        except OSError as error:    # BlockingIOError: nothing is there
            self.outcome(error.errno)
        if unread == b"":
            self.received(unread)
        self.note(TcpStream.reset if self.resets or unread else TcpStream.fin, self.side)

    # --- the calls that the server makes ---

    def accept(self) -> Tuple[socket.socket, Any]:
        sock, address = super().accept()
        accepted = CapturedStream(self.writer, sock.family, sock.type, sock.proto, sock.detach())
        accepted.stream, accepted.side = TcpStream(Address.of(address), Address.of(accepted.getsockname())), SERVER
        if self.gettimeout() == 0:      # BIND's listener, which has no threads to be woken
            accepted.begin()
        return accepted, address

    def connect_ex(self, address: Any, /) -> int:
        code = super().connect_ex(address)
        if self.stream is None and code in SYN_SENT:
            self.stream = TcpStream(Address.of(self.getsockname()), Address.of(address))
            self.begin()
        self.outcome(code)
        return code

    def getsockopt(self, level: int, name: int, *length: int) -> Any:
        value = super().getsockopt(level, name, *length)
        if (level, name) == (socket.SOL_SOCKET, socket.SO_ERROR):
            self.outcome(value)
        return value

    def setsockopt(self, level: int, name: int, *value: Any) -> None:
        super().setsockopt(level, name, *value)
        if (level, name) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.resets = value == (RESET,)

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        octets = self.transfer(super().recv, size, flags)
        if not flags & socket.MSG_PEEK:     # it will be read
            self.received(octets)
        return octets

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        n = self.transfer(super().recv_into, buffer, size, flags)
        self.received(bytes(memoryview(buffer)[:n]))
        return n

    def send(self, octets: Any, flags: int = 0, /) -> int:
        n = self.transfer(super().send, octets, flags)
        self.note(TcpStream.data, self.side, bytes(memoryview(octets)[:n]))
        return n

    def sendall(self, octets: Any, flags: int = 0, /) -> None:
        self.transfer(super().sendall, octets, flags)      # if it fails, it is not known how much has been sent
        self.note(TcpStream.data, self.side, bytes(octets))

    def shutdown(self, how: int, /) -> None:
        self.begin()
        super().shutdown(how)
        self.reading = self.reading and how == socket.SHUT_WR
        if how != socket.SHUT_RD:
            self.note(TcpStream.fin, self.side)

    def close(self) -> None:
        if self.begun and self.fileno() >= 0:
            self.note_close()
        super().close()


class CapturedDatagrams(socket.socket):
    """A UDP socket that records what it sends and receives."""

    peer: Optional[Address] = None          # after connect()

    def __init__(self, writer: CaptureWriter, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.writer = writer

    @cached_property
    def own(self) -> Address:
        """Asked for at the first datagram: it is bound by then."""
        return Address.of(self.getsockname())

    def connect(self, address: Any, /) -> None:
        super().connect(address)
        self.own, self.peer = Address.of(self.getsockname()), Address.of(address)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        return CapturedDatagrams.recvfrom_into(self, buffer, size, flags)[0]

    def recvfrom_into(self, buffer: Any, size: int = 0, flags: int = 0) -> Tuple[int, Any]:
        n, sender = super().recvfrom_into(buffer, size, flags)
        self.writer.add(udp, Address.of(sender), self.own, bytes(memoryview(buffer)[:n]))
        return n, sender

    def send(self, octets: Any, flags: int = 0, /) -> int:
        n = super().send(octets, flags)
        self.writer.add(udp, self.own, self.peer, bytes(octets))
        return n

    def sendto(self, octets: Any, /, *receiver: Any) -> int:
        n = super().sendto(octets, *receiver)
        self.writer.add(udp, self.own, Address.of(receiver[-1]), bytes(octets))
        return n
