"""``--explain`` with Kerberos: each frame of the login, with lengths and levels, and of its tokens the beginning only."""

from __future__ import annotations

from typing import Any, Callable, List

import pytest

from socks5srv.explain import Explanation, broken, explanation, readings
from socks5srv.explain.tables import BEGINNING
from socks5srv.explain.tracer import Tracer
from socks5srv.gssapi.messages import Abort, ContextToken, Encapsulated, Level, LevelToken
from socks5srv.session import Session

from .. import tables

TOKEN = bytes(range(0x60, 0xC0))


class Kept:
    """A sink that keeps what it is shown."""

    def __init__(self) -> None:
        self.explanations: List[Explanation] = []

    def takes(self, _session: Session) -> bool:
        return True

    def show(self, _session: Session, found: Explanation) -> None:
        self.explanations.append(found)

    def titled(self, title: str) -> List[str]:
        return [" ".join(str(found).split()) for found in self.explanations if found.title == title]


@pytest.fixture
def shown(new_server: Callable[..., Any]) -> Callable[..., Any]:
    """A server that explains itself, and what it shows: ``shown(**settings)``."""
    def make(**settings: Any) -> Any:
        server, kept = new_server(**settings), Kept()
        server.observers += (Tracer(server, [kept]),)
        return server, kept

    return make


@pytest.mark.parametrize("kind", [ContextToken, LevelToken, Encapsulated])
def test_of_a_token_the_beginning_is_shown_and_its_length(kind: Any) -> None:
    found = explanation(kind(TOKEN))
    tables.check(found)
    assert found.octets == bytes(kind(TOKEN))[:4 + BEGINNING]
    assert found.length == 4 + len(TOKEN)
    assert "96 octets of token" in str(found)


def test_nothing_is_shown_of_a_token_that_is_not_complete_as_it_may_be_a_password() -> None:
    found = broken(ContextToken, b"\x01\x01x\x06sesame")
    tables.check(found)
    assert found.octets == b"\x01\x01x\x06"
    assert "sesame" not in str(found)


def test_octets_of_which_nothing_is_known_are_not_taken_for_a_frame() -> None:
    octets = bytes(ContextToken(TOKEN))
    assert [found.title for reading in readings(octets) for found in reading] == ["USERNAME/PASSWORD"]


def test_what_is_no_frame_is_told() -> None:
    assert "! MTYP is ff, where RFC 1961 section 3.4 has 01 (the client gives up)" in " ".join(str(broken(ContextToken, bytes(Abort()))).split())
    assert "! VER is 05, RFC 1961 section 4.3 says 01" in " ".join(str(broken(LevelToken, b"\x05\x02")).split())


def test_a_level_in_clear_is_one_that_can_be_read() -> None:
    assert '"I want level 2."' in str(explanation(LevelToken(b"\x02")))


@pytest.mark.parametrize("level", [Level.INTEGRITY, Level.CONFIDENTIALITY])
def test_a_login_frame_by_frame(shown: Callable[..., Any], new_kerberos: Any, echo: Any, level: Level) -> None:
    server, kept = shown()
    client = new_kerberos(server)
    client.enter(level)
    client.connect(echo)
    client.exchange(b"this is a secret")
    client.close()
    server.next_ended()
    assert [found.title for found in kept.explanations] == [
        "GREETING", "METHOD SELECTION", "CONTEXT TOKEN", "CONTEXT TOKEN", "PROTECTION LEVEL", "PROTECTION LEVEL", "REQUEST", "REPLY",
        "TUNNEL OPEN", "TUNNEL SHUT"]
    for found in kept.explanations:
        tables.check(found)
    assert "asks for Kerberos" in kept.titled("METHOD SELECTION")[0]
    wanted, granted = kept.titled("PROTECTION LEVEL")
    assert '"I want this level of protection; it is in the token."' in wanted
    assert f'"You get level {level}: ' in granted
    for text in (*kept.titled("REQUEST"), *kept.titled("REPLY")):
        assert f"It is wrapped, at level {level}:" in text
    assert "secret" not in "".join(map(str, kept.explanations))


def test_a_refusal_says_why(shown: Callable[..., Any], new_kerberos: Any) -> None:
    server, kept = shown(allow=["bob@*"])
    with pytest.raises(Exception, match="aborted"):
        new_kerberos(server).enter()
    server.next_ended()
    (abort,) = kept.titled("ABORT")
    assert "client <- proxy, 2 octets" in abort
    assert "Why: GSSAPI: no pattern of --gssapi-allow is 'alice@TEST.LOCAL'." in abort
