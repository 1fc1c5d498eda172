"""
What the recording of ``--pcap`` overhears: every socket of the server, on both sides of it.

The one idea: the server does not know.  Its sockets come from three places (the listener, the route and BIND's
listener); there each is replaced by one that does the same and notes what has passed through it.  So
whatever is in the recording has been sent or received, and what the server has not looked at is not in it.

Octets that the kernel moves by itself (splice) could not be overheard, so a server that is recorded copies
them.  What becomes of the notes is not known here: see pcap.py.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from io import FileIO
from typing import Any, Iterator, List, Optional, Tuple, Type, TypeVar

from ..outbound import UNDER_WAY, Route
from ..protocol import Address
from ..relay import RESET, Relay
from ..handler import Socks5Handler
from ..server import Socks5Server
from .pcap import CALLED, CALLER, Connection, Recording, udp


class Stream(socket.socket):
    """A TCP socket that notes what it says and hears."""

    connection: Optional[Connection] = None     # none before it has called
    side = CALLER
    stands = False
    deaf = False                                # it hears nothing any more, by its own will
    resets = False                              # when it is closed

    def __init__(self, recording: Recording, sock: socket.socket) -> None:
        take_over(self, sock)
        self.recording = recording

    def accepted(self, caller: Address) -> Stream:
        """What has just been accepted from there."""
        self.side = CALLED
        self.begin(caller, Address.of(self.getsockname()))
        self.answered(0)
        return self

    # --- what a connection goes through ---

    def begin(self, caller: Address, called: Address) -> None:
        self.connection = Connection(caller, called)
        self.recording.note(self.connection.call)

    def answered(self, code: int) -> None:
        """The call has been, with this errno; or not yet."""
        if self.connection is None or self.stands:
            return
        if code in (0, errno.EISCONN):
            self.stands = True
            self.recording.note(self.connection.stand)
        elif code == errno.ECONNREFUSED:
            self.recording.note(self.connection.reset, 1 - self.side)

    def said(self, octets: bytes) -> None:
        if self.connection is not None:
            self.recording.note(self.connection.data, self.side, octets, octets=len(octets))

    def heard(self, octets: bytes) -> None:
        if self.connection is None:
            return
        if octets:
            self.recording.note(self.connection.data, 1 - self.side, octets, octets=len(octets))
        elif not self.deaf:
            self.recording.note(self.connection.end, 1 - self.side)

    def failed(self, error: OSError) -> None:
        """A reset is heard as an error.  (Who has closed his mouth himself has an error of his own when he speaks.)"""
        if self.connection is not None and isinstance(error, ConnectionError) and not self.deaf:
            self.recording.note(self.connection.reset, 1 - self.side)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Note what goes wrong, and let it go wrong."""
        try:
            yield
        except OSError as error:
            self.failed(error)
            raise

    # --- what can be done with a socket, as far as the server does it ---

    def connect_ex(self, address: Any, /) -> int:
        code = super().connect_ex(address)
        if self.connection is None and (code in (0, errno.ECONNREFUSED) or code in UNDER_WAY):
            self.begin(Address.of(self.getsockname()), Address.of(address))
        self.answered(code)
        return code

    def getsockopt(self, level: int, name: int, *length: int) -> Any:
        value = super().getsockopt(level, name, *length)
        if (level, name) == (socket.SOL_SOCKET, socket.SO_ERROR):
            self.answered(value)
            if self.stands and value in (errno.ECONNRESET, errno.EPIPE):
                self.failed(ConnectionResetError())
        return value

    def setsockopt(self, level: int, name: int, *value: Any) -> None:
        super().setsockopt(level, name, *value)
        if (level, name) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.resets = value == (RESET,)

    def recv(self, most: int, flags: int = 0, /) -> bytes:
        with self.failing():
            octets = super().recv(most, flags)
        self.heard(octets)
        return octets

    def recv_into(self, buffer: Any, most: int = 0, flags: int = 0) -> int:
        with self.failing():
            n = super().recv_into(buffer, most, flags)
        self.heard(bytes(memoryview(buffer)[:n]))
        return n

    def send(self, octets: Any, flags: int = 0, /) -> int:
        with self.failing():
            n = super().send(octets, flags)
        self.said(bytes(memoryview(octets)[:n]))
        return n

    def sendall(self, octets: Any, flags: int = 0, /) -> None:
        with self.failing():            # how much of it has gone then, nobody knows
            super().sendall(octets, flags)
        self.said(bytes(octets))

    def shutdown(self, how: int, /) -> None:
        super().shutdown(how)
        self.deaf = self.deaf or how != socket.SHUT_WR
        if self.connection is not None and how != socket.SHUT_RD:
            self.recording.note(self.connection.end, self.side)

    def close(self) -> None:
        if self.fileno() >= 0 and self.connection is not None and (self.stands or self.has_come_about()):
            self.note_closing(self.connection)
        super().close()

    def has_come_about(self) -> bool:
        """Whether the call has been answered while nobody looked."""
        try:
            self.getpeername()
        except OSError:
            return False
        self.answered(0)
        return True

    def note_closing(self, connection: Connection) -> None:
        """close() says goodbye, unless something has not been read: then it sends a reset."""
        unread = self.what_is_left()
        if unread == b"":
            self.heard(b"")
        goodbye = connection.reset if self.resets or unread else connection.end
        self.recording.note(goodbye, self.side)

    def what_is_left(self) -> Optional[bytes]:
        """An octet if there is one to be read; empty at the other end's goodbye, None if it is silent."""
        try:
            self.setblocking(False)
            return super().recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as error:
            self.failed(error)
            return None


class Caught(socket.socket):
    """A TCP socket that listens, and notes who calls."""

    def __init__(self, recording: Recording, sock: socket.socket) -> None:
        take_over(self, sock)
        self.recording = recording

    def accept(self) -> Tuple[socket.socket, Any]:
        sock, address = super().accept()
        return Stream(self.recording, sock).accepted(Address.of(address)), address


class Datagrams(socket.socket):
    """A UDP socket that notes what it sends and gets."""

    here: Optional[Address] = None              # known once it is bound
    there: Optional[Address] = None             # where it is connected to

    def __init__(self, recording: Recording, sock: socket.socket) -> None:
        take_over(self, sock)
        self.recording = recording
        try:
            self.there = Address.of(self.getpeername())
        except OSError:                         # nowhere
            pass

    def address(self) -> Address:
        if self.here is None or not self.here.port:
            self.here = Address.of(self.getsockname())
        return self.here

    def said(self, receiver: Optional[Address], octets: bytes) -> None:
        if receiver is not None:
            self.recording.note(udp, self.address(), receiver, octets, octets=len(octets))

    def heard(self, sender: Optional[Address], octets: bytes) -> None:
        if sender is not None:
            self.recording.note(udp, sender, self.address(), octets, octets=len(octets))

    def connect(self, address: Any, /) -> None:
        super().connect(address)
        self.here, self.there = None, Address.of(address)

    def recv_into(self, buffer: Any, most: int = 0, flags: int = 0) -> int:
        n = super().recv_into(buffer, most, flags)
        self.heard(self.there, bytes(memoryview(buffer)[:n]))
        return n

    def recvfrom_into(self, buffer: Any, most: int = 0, flags: int = 0) -> Tuple[int, Any]:
        n, sender = super().recvfrom_into(buffer, most, flags)
        self.heard(Address.of(sender), bytes(memoryview(buffer)[:n]))
        return n, sender

    def send(self, octets: Any, flags: int = 0, /) -> int:
        n = super().send(octets, flags)
        self.said(self.there, bytes(octets))
        return n

    def sendto(self, octets: Any, /, *receiver: Any) -> int:
        n = super().sendto(octets, *receiver)
        self.said(Address.of(receiver[-1]), bytes(octets))
        return n


def take_over(self: socket.socket, sock: socket.socket) -> None:
    """Become this socket, which is one no more."""
    timeout = sock.gettimeout()
    socket.socket.__init__(self, sock.family, sock.type, sock.proto, sock.detach())
    self.settimeout(timeout)


# --- where the sockets come from ---

class OverheardRoute(Route):
    """The same way out, by sockets that are overheard."""

    recording: Recording

    def udp(self, sockaddr: Tuple[Any, ...]) -> socket.socket:
        return Datagrams(self.recording, super().udp(sockaddr))

    def socket(self, address: Address, kind: int = socket.SOCK_STREAM) -> socket.socket:
        sock = super().socket(address, kind)
        return (Stream if kind == socket.SOCK_STREAM else Datagrams)(self.recording, sock)


class OverheardServer(Socks5Server):
    """Mixed into a server: it can be recorded, from before it serves to its end."""

    recording: Optional[Recording] = None

    def record(self, file: FileIO) -> None:
        self.recording = Recording(file)
        self.route = OverheardRoute(*self.route)
        self.route.recording = self.recording

    def talk(self, connection: socket.socket, client_address: Any) -> None:
        if self.recording is not None:
            connection = Stream(self.recording, connection).accepted(Address.of(client_address))
        super().talk(connection, client_address)

    def relay_thread(self) -> Relay:
        relay = super().relay_thread()
        relay.pipes = None          # so that it copies
        return relay

    def server_close(self) -> None:
        super().server_close()
        if self.recording is not None:
            self.recording.close()


class OverheardHandler(Socks5Handler):
    """Mixed into a handler, for the socket that it makes itself: BIND's listener."""

    server: OverheardServer

    def await_peer(self, listener: socket.socket, expected: List[Address], until: float) -> Tuple[socket.socket, Address]:
        if self.server.recording is None:
            return super().await_peer(listener, expected, until)
        with Caught(self.server.recording, listener) as caught:
            return super().await_peer(caught, expected, until)


H = TypeVar("H", bound=Socks5Handler)


def overheard(handler: Type[H]) -> Type[H]:
    """The handler class, with `OverheardHandler` mixed in in front."""
    return type(f"Overheard{handler.__name__}", (OverheardHandler, handler), {})
