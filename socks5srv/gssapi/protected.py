"""
A client's connection and its datagrams once a level of protection is agreed upon: octets outside, frames on the wire.

The one idea: what is wrong with a frame never reaches anything that reads octets.  On the connection it is a ProtocolError,
and the end; of datagrams it is an OSError, as of one that got lost, and the next may be good.
"""

from __future__ import annotations

import errno
import socket
from typing import Any, Tuple, Union, cast

from ..handler import ClientStream, ObservedStream
from ..outbound import ClientGone
from ..protocol import ProtocolError
from ..relay import Coded
from .context import Protection
from .messages import FrameError

DATAGRAMS = 2       # moved in one turn of the relay thread: the largest take half a millisecond each


class ProtectedStream(ObservedStream):
    """What a client sends in frames.  Where a message ends and where a frame does have nothing to do with each other."""

    def __init__(self, frames: ClientStream, protection: Protection) -> None:
        super().__init__(frames.connection)
        self.frames, self.protection = frames, protection
        self.received = bytearray()     # what is still to be decoded

    def fill(self) -> bool:
        """Decode what is there, or wait for more of it.  ProtocolError if it is no good."""
        self.received += self.frames.take()
        if self.decode():
            return True
        if not self.frames.fill():
            if self.received:
                raise FrameError("the client closed the connection within a frame")
            return False
        self.received += self.frames.take()
        self.decode()
        return True

    def decode(self) -> bool:
        """All frames that are whole; whether there was one."""
        before = len(self.received)
        for octets in iter(lambda: self.protection.decode(self.received), None):
            self.buffer += octets
        return len(self.received) < before

    def write(self, octets: bytes) -> None:
        try:
            frames = self.protection.encode(octets)
        except ProtocolError as error:      # to say so is as impossible
            raise ClientGone(str(error)) from error
        self.frames.write(frames)

    @property
    def rest(self) -> Coded:
        """For the relay, who goes on from here."""
        return Coded(self.protection, bytes(self.received))


class ProtectedDatagrams:
    """A UDP socket towards a client: of a socket's methods those that a `ClientSocket` uses, each for what is in the frames."""

    def __init__(self, sock: socket.socket, protection: Protection) -> None:
        self.socket, self.protection = sock, protection
        self.fileno, self.close, self.connect, self.getsockname = sock.fileno, sock.close, sock.connect, sock.getsockname

    def recv_into(self, chunk: memoryview) -> int:
        return self.decode(chunk, self.socket.recv_into(chunk))

    def recvfrom_into(self, chunk: memoryview) -> Tuple[int, Any]:
        n, sockaddr = self.socket.recvfrom_into(chunk)
        return self.decode(chunk, n), sockaddr

    def send(self, octets: Union[bytes, memoryview]) -> int:
        self.socket.send(self.encode(octets))
        return len(octets)

    def sendto(self, octets: Union[bytes, memoryview], sockaddr: Any) -> int:
        self.socket.sendto(self.encode(octets), sockaddr)
        return len(octets)

    def decode(self, chunk: memoryview, n: int) -> int:
        """Replace the frame in it by what is in the frame; how long that is.  OSError if it is no good."""
        try:
            octets = self.protection.decode_datagram(bytes(chunk[:n]))
        except ProtocolError as error:
            raise OSError(errno.EBADMSG, str(error)) from error
        chunk[:len(octets)] = octets
        return len(octets)

    def encode(self, octets: Union[bytes, memoryview]) -> bytes:
        try:
            return self.protection.frame(bytes(octets))
        except ProtocolError as error:
            raise OSError(errno.EBADMSG, str(error)) from error


def protected(sock: socket.socket, protection: Protection) -> socket.socket:
    return cast(socket.socket, ProtectedDatagrams(sock, protection))
