"""A small client of RFC 1961 for the tests, which does what it is told to, right or wrong."""

from __future__ import annotations

from typing import Any, Optional, Sequence, Union

import gssapi

from socks5srv.gssapi.context import KRB5, Context, Initiator, Protection
from socks5srv.gssapi.messages import ContextToken, Level, LevelToken
from socks5srv.protocol import Command, Message, Method, MethodSelection, ProtocolError, Reply, ReplyCode

from ..conftest import Client, Place

Flag = gssapi.RequirementFlag


class AnyInitiator(Initiator):
    """One with flags of its own."""

    def __init__(self, flags: Sequence[Any], mech: Any = KRB5) -> None:
        name = gssapi.Name("rcmd@localhost", gssapi.NameType.hostbased_service)
        Context.__init__(self, gssapi.SecurityContext(name=name, usage="initiate", mech=mech, flags=flags))


class KerberosClient(Client):
    """Once `protection` is agreed upon, what is sent and read goes through frames."""

    protection: Optional[Protection] = None

    def __init__(self, address: Any, initiator: Optional[Initiator] = None) -> None:
        super().__init__(address)
        self.initiator = initiator or Initiator("localhost")
        self.received = bytearray()
        self.plain = b""

    # --- the log-in ---

    def establish(self) -> None:
        assert self.greet(Method.GSSAPI) == MethodSelection(Method.GSSAPI)
        token = self.initiator.step()
        while True:
            self.send(ContextToken(token))
            answer = ContextToken.read(self).token
            if self.initiator.complete:
                assert not answer
                return
            token = self.initiator.step(answer)
            if self.initiator.complete and not token:
                return

    def wrapped(self, level: int) -> LevelToken:
        return LevelToken(self.initiator.wrap(bytes([level]), False))

    def agree(self, level: int, nec: bool = False) -> Level:
        """Ask for a level; what is granted."""
        self.send(LevelToken(bytes([level])) if nec else self.wrapped(level))
        token = LevelToken.read(self).token
        (found,) = token if nec else self.initiator.unwrap(token)[0]
        if found:
            self.protection = Protection(self.initiator, Level(found))
        return Level(found)

    def enter(self, level: int = 2, nec: bool = False) -> Level:
        self.establish()
        return self.agree(level, nec)

    # --- what follows ---

    def encoded(self, *messages: Union[bytes, Message]) -> bytes:
        octets = b"".join(map(bytes, messages))
        return octets if self.protection is None else self.protection.encode(octets)

    def send(self, *messages: Union[bytes, Message]) -> None:
        self.socket.sendall(self.encoded(*messages))

    def frame(self) -> bytes:
        """What is in the next frame; empty at the end."""
        assert self.protection is not None
        while True:
            octets = self.protection.decode(self.received)
            if octets is not None:
                return octets
            more = self.socket.recv(65536)
            if not more:
                if self.received:
                    raise ProtocolError("the end came within a frame")
                return b""
            self.received += more

    def read(self, n: int) -> bytes:
        if self.protection is None:
            return super().read(n)
        if not self.plain:
            self.plain = self.frame()
        octets, self.plain = self.plain[:n], self.plain[n:]
        return octets

    def connect(self, place: Place) -> Reply:
        """CONNECT, which has to succeed, by who has logged in already."""
        reply = self.request(Command.CONNECT, place)
        assert reply.code is ReplyCode.SUCCEEDED
        return reply

    def exchange(self, octets: bytes = b"hello") -> None:
        self.send(octets)
        assert self.exactly(len(octets)) == octets
