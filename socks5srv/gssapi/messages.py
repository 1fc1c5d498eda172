"""
The messages of RFC 1961: frames with a token in them.  No sockets here, and no cryptography.

    client -> server   ContextToken          until both sides know each other; then
    client <- server   ContextToken
    client -> server   LevelToken            the protection that I want
    client <- server   LevelToken            the protection that you get
    both ways          Encapsulated          what RFC 1928 has without a frame: request, replies, data, datagrams
    client <- server   Abort                 refused, for whatever reason; before a level is agreed only

The one idea: a frame says in its first two octets what it is, and is judged by them before more is waited for.  An
`Abort` has only these two.

What a token means is GSSAPI's business: see context.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, List, Optional, Sequence, Type, TypeVar

from ..protocol import BinaryStream, Field, Message, ProtocolError, octet, read_exactly

VER = 1                     # of every message here: the version of the sub-negotiation, not of SOCKS
HEADER = 4                  # octets in front of a token
TOKEN_MAX = 0xFFFF          # octets; what LEN can count

F = TypeVar("F", bound="Frame")


class MessageType(IntEnum):
    """What a frame is.  RFC 1961 sections 3.4, 4.3 and 5, and 3.8 for the last."""

    AUTHENTICATION = 0x01
    PROTECTION_LEVEL = 0x02
    ENCAPSULATED = 0x03
    ABORT = 0xFF


class Level(IntEnum):
    """The protection of what follows the log-in.  RFC 1961 section 4.3, which has no 0: clients have."""

    NONE = 0
    INTEGRITY = 1
    CONFIDENTIALITY = 2
    SELECTIVE = 3           # each message as its sender likes


class FrameError(ProtocolError):
    """What came is not the frame that belongs there, or cannot be unwrapped."""


class Aborted(FrameError):
    """The other side has sent an `Abort`."""


class Frame(Message):
    """A message of RFC 1961."""

    mtyp: ClassVar[MessageType]


@dataclass
class Abort(Frame):
    """
    Server to client: I refuse.  RFC 1961 section 3.8.

        +-----+------+
        | VER | MTYP |
        +-----+------+
        |  1  |  1   |
        +-----+------+
    """

    mtyp = MessageType.ABORT

    def fields(self) -> List[Field]:
        return beginning(self.mtyp)


@dataclass
class TokenFrame(Frame):
    """A frame with a token of GSSAPI's, which is LEN octets long."""

    token: bytes = field(repr=False)

    @classmethod
    def read(cls: Type[F], stream: BinaryStream) -> F:
        """FrameError for another message; Aborted if the other side has given up."""
        judge(cls.mtyp, read_exactly(stream, 2))
        return cls(read_exactly(stream, int.from_bytes(read_exactly(stream, 2), "big")))    # type: ignore[call-arg]

    def fields(self) -> List[Field]:
        length = len(self.token)
        return [*beginning(self.mtyp), Field("LEN", length.to_bytes(2, "big"), length), Field("TOKEN", self.token, f"{length} octets")]


class ContextToken(TokenFrame):
    """
    Both ways, in turns, until the security context is established.  RFC 1961 section 3.4.

        +-----+------+-----+--------------+
        | VER | MTYP | LEN |    TOKEN     |
        +-----+------+-----+--------------+
        |  1  |  1   |  2  | up to 65,535 |
        +-----+------+-----+--------------+
    """

    mtyp = MessageType.AUTHENTICATION


@dataclass
class LevelToken(TokenFrame):
    """
    Once each way: the protection level, one octet, wrapped.  RFC 1961 section 4.3.

        +-----+------+-----+--------------+
        | VER | MTYP | LEN |    TOKEN     |
        +-----+------+-----+--------------+
        |  1  |  1   |  2  | up to 65,535 |
        +-----+------+-----+--------------+

    `level`: which it is, for who cannot unwrap the token.
    """

    level: Optional[int] = field(default=None, compare=False)
    mtyp = MessageType.PROTECTION_LEVEL


class Encapsulated(TokenFrame):
    """
    Both ways: what RFC 1928 has, wrapped.  RFC 1961 section 5.

        +-----+------+-----+--------------+
        | VER | MTYP | LEN |    TOKEN     |
        +-----+------+-----+--------------+
        |  1  |  1   |  2  | up to 65,535 |
        +-----+------+-----+--------------+
    """

    mtyp = MessageType.ENCAPSULATED


def beginning(mtyp: MessageType) -> List[Field]:
    return [Field("VER", octet(VER), VER), Field("MTYP", octet(mtyp), mtyp)]


def judge(mtyp: MessageType, octets: Sequence[int]) -> None:
    """FrameError if these first two octets are not those of a frame of this type."""
    if octets[0] != VER:
        raise FrameError(f"VER of a GSSAPI message is {octets[0]:02x}, not 01")
    if octets[1] == MessageType.ABORT:
        raise Aborted("the other side has aborted GSSAPI")
    if octets[1] != mtyp:
        raise FrameError(f"MTYP of a GSSAPI message is {octets[1]:02x}, not {mtyp:02x}")
