"""
The client's side of RFC 1961: who logs in to a proxy by Kerberos, and what it then has for a socket.

The ticket is the library's business: it takes the one of ``kinit``, or with KRB5_CLIENT_KTNAME=FILE fetches one by itself.
Which server it is for is said by a `service` and the proxy's host, as in ``rcmd@proxy.example.com``.

The one idea: nothing goes on in clear because somebody in between has said so.  We ask for the strongest level, take
either of the two that protect, and go away from a proxy that grants none.

Not here: what is in the tokens (context.py), and who asks for all this (../client.py).
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Any, NoReturn, Protocol, Type, TypeVar

from ..protocol import BinaryStream, LoginFailed, Message, ProtocolError, octet
from ..relay import RESET, Coded
from .context import Context, GssapiError, Initiator, Protection
from .messages import Aborted, ContextToken, FrameError, Level, LevelToken, TokenFrame

READ = 65536        # octets at a time; a frame has hardly more

M = TypeVar("M", bound=TokenFrame)


class Speaker(BinaryStream, Protocol):
    """What is said to the proxy, and what it says."""

    def send(self, message: Message, /) -> None: ...
    def receive(self, message: Type[M], /) -> M: ...


def log_in(proxy: Speaker, host: str, service: str, datagrams: bool = False) -> Protection:
    """
    Log in to the proxy, which has chosen method 01, and agree on protection.

    `datagrams`: some may be lost, or overtake each other.  LoginFailed if there is no ticket, the proxy refuses it, or
    would protect nothing; ProtocolError for an answer that is none.
    """
    try:
        context = Initiator(host, service, sequence=not datagrams)
        establish(proxy, context)
        level = agree(proxy, context)
    except Aborted as error:
        raise LoginFailed("the proxy does not accept this Kerberos login") from error
    except GssapiError as error:
        raise LoginFailed(f"no Kerberos login: {error}") from error
    if level is Level.NONE:
        raise LoginFailed("the proxy grants no protection (level 0), so all that follows would be in clear")
    return Protection(context, level)


def establish(proxy: Speaker, context: Context) -> None:
    """Take turns until both sides know each other.  RFC 1961 section 3."""
    token = context.step()
    while token:
        proxy.send(ContextToken(token))
        answer = proxy.receive(ContextToken).token      # from servers that have no more to say an empty one
        token = b"" if context.complete else context.step(answer)


def agree(proxy: Speaker, context: Context, wanted: Level = Level.CONFIDENTIALITY) -> Level:
    """Ask for a level of protection; the one that is granted.  RFC 1961 section 4."""
    proxy.send(LevelToken(context.wrap(octet(wanted), False), wanted))
    granted = context.unwrap(proxy.receive(LevelToken).token)[0]
    if len(granted) != 1 or granted[0] not in list(Level):
        raise FrameError(f"the proxy grants a protection level that is none: {granted.hex(' ')}")
    return Level.CONFIDENTIALITY if granted[0] == Level.SELECTIVE else Level(granted[0])


class ProtectedSocket(socket.socket):
    """
    A connection whose octets are wrapped: a socket like any other for who reads and writes by its methods.

    It is for blocking calls, with a timeout or without; one thread may send while another receives.  Whatever takes the
    descriptor instead, as TLS on top of it does, would pass by the frames, and is refused.
    """

    def __init__(self, sock: socket.socket, coded: Coded) -> None:
        timeout = sock.gettimeout()
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.settimeout(timeout)
        self.coding = coded.coding
        self.received, self.decoded = bytearray(coded.received), coded.decoded
        self.sending = threading.Lock()     # what is wrapped first has to be sent first

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Up to so many octets; OSError, EBADMSG, and a reset for the proxy, if a frame is no good."""
        refuse_flags(flags)
        try:
            while not self.decoded and size and self.fill():
                pass
        except ProtocolError as error:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.close()
            raise OSError(errno.EBADMSG, str(error)) from error
        octets, self.decoded = self.decoded[:size], self.decoded[size:]
        return octets

    def fill(self) -> bool:
        """Decode a frame; False if there are no more to come."""
        octets = self.coding.decode(self.received)
        if octets is None:
            more = super().recv(READ)
            self.received += more
            if not more and self.received:
                raise FrameError("the connection ended within a frame")
            return bool(more)
        self.decoded = octets
        return True

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer).cast("B")
        octets = self.recv(size or len(view), flags)
        view[:len(octets)] = octets
        return len(octets)

    def send(self, octets: Any, flags: int = 0, /) -> int:
        """As many as fit in a frame."""
        view = memoryview(octets).cast("B")[:self.coding.block]
        self.sendall(view, flags)
        return len(view)

    def sendall(self, octets: Any, flags: int = 0, /) -> None:
        refuse_flags(flags)
        if self.gettimeout() == 0:
            raise ValueError("a socket whose octets are wrapped has to be a blocking one, or have a timeout, to send")
        view = memoryview(octets).cast("B")
        for start in range(0, len(view), self.coding.block):
            with self.sending:
                try:
                    frame = self.coding.encode(view[start:start + self.coding.block])
                except ProtocolError as error:
                    raise OSError(errno.EBADMSG, str(error)) from error
                super().sendall(frame)

    def getsockopt(self, level: int, name: int, *length: int) -> Any:
        if (level, name) == (socket.SOL_SOCKET, socket.SO_TYPE):        # as ssl asks just before it takes the descriptor
            self.by_the_descriptor()
        return super().getsockopt(level, name, *length)

    def by_the_descriptor(self, *_arguments: Any, **_keywords: Any) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, f"{os.strerror(errno.EOPNOTSUPP)}: the octets of this socket are wrapped; for TLS use ssl.MemoryBIO")

    detach = dup = recvfrom = recvfrom_into = recvmsg = recvmsg_into = sendto = sendmsg = sendfile = by_the_descriptor


def refuse_flags(flags: int) -> None:
    if flags:
        raise ValueError("a socket whose octets are wrapped knows no flags")
