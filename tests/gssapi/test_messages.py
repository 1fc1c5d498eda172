"""The frames of RFC 1961 as octets, and that they are judged by the first two."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Type

import pytest

from socks5srv.gssapi.messages import Abort, Aborted, ContextToken, Encapsulated, Frame, FrameError, Level, LevelToken, TokenFrame
from socks5srv.protocol import ProtocolError

LONGEST = bytes(0xFFFF)

FRAMES = [
    (b"\x01\x01\x00\x02ab", ContextToken(b"ab")), (b"\x01\x01\x00\x00", ContextToken(b"")),
    (b"\x01\x02\x00\x01\x03", LevelToken(b"\x03")), (b"\x01\x03\xff\xff" + LONGEST, Encapsulated(LONGEST)),
]
READ: Any = pytest.mark.parametrize("kind", [ContextToken, LevelToken, Encapsulated])


class Counting(BytesIO):
    """A stream which ends the test if more is read of it than there is: a socket would wait then."""

    def read(self, n: Any = -1) -> bytes:
        octets = super().read(n)
        assert octets, "it waits for more"
        return octets


@pytest.mark.parametrize(("octets", "frame"), FRAMES, ids=lambda each: type(each).__name__)
def test_r50_r54_r57_a_frame_is_its_octets_and_back(octets: bytes, frame: TokenFrame) -> None:
    assert bytes(frame) == octets
    stream = BytesIO(octets + b"ahead")
    assert type(frame).read(stream) == frame
    assert stream.read() == b"ahead"


def test_r55_an_abort_has_two_octets() -> None:
    assert bytes(Abort()) == b"\x01\xff"
    assert str(Abort()) == "Abort VER=1 MTYP=ABORT"


def test_a_token_is_never_shown() -> None:
    assert str(ContextToken(b"secret")) == "ContextToken VER=1 MTYP=AUTHENTICATION LEN=6 TOKEN=6 octets"
    assert "secret" not in repr(ContextToken(b"secret"))


@READ
@pytest.mark.parametrize("octets", [b"\x05\x01", b"\x00\x01", b"\x01\x00", b"\x01\x04", b"\x01\xfe"])
def test_another_message_is_refused_by_its_first_two_octets(kind: Type[TokenFrame], octets: bytes) -> None:
    with pytest.raises(FrameError, match=r"is \w\w, not 0"):
        kind.read(Counting(octets))


@READ
def test_so_is_a_frame_at_the_wrong_place(kind: Type[TokenFrame]) -> None:
    for octets, frame in FRAMES:
        if not isinstance(frame, kind):
            with pytest.raises(FrameError, match="MTYP"):
                kind.read(Counting(octets[:2]))


@READ
def test_an_abort_is_told_apart_and_nothing_more_is_waited_for(kind: Type[TokenFrame]) -> None:
    with pytest.raises(Aborted):
        kind.read(Counting(bytes(Abort())))


@READ
@pytest.mark.parametrize("length", range(6))
def test_a_frame_that_ends_too_soon_is_an_error(kind: Type[TokenFrame], length: int) -> None:
    whole = bytes(kind(b"ab"))
    with pytest.raises(ProtocolError, match="mid-message"):
        kind.read(BytesIO(whole[:length]))


def test_levels_have_the_numbers_of_the_rfc() -> None:
    assert [(level.name, int(level)) for level in Level] == [("NONE", 0), ("INTEGRITY", 1), ("CONFIDENTIALITY", 2), ("SELECTIVE", 3)]


def test_every_frame_says_what_it_is() -> None:
    assert sorted(kind.mtyp for kind in (Abort, *TokenFrame.__subclasses__())) == [1, 2, 3, 255]
    assert issubclass(TokenFrame, Frame)
