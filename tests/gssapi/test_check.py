"""``socks5srv check --gssapi``: our own server has an answer to all its questions, and every fault that they ask for is found."""

from __future__ import annotations

import json
import re
from typing import Any, Callable, Dict, List, Type

import pytest

pytest.importorskip("gssapi")

from socks5srv.check import OF_KERBEROS, QUESTIONS, Answer, Examiner, main
from socks5srv.client import Proxy
from socks5srv.gssapi.context import Protection
from socks5srv.gssapi.handler import Gssapi, GssapiHandler
from socks5srv.gssapi.messages import FrameError, Level
from socks5srv.handler import Socks5Handler
from socks5srv.protocol import Method, ProtocolError

BY_NAME = {question.name: question for question in OF_KERBEROS}
NOT_HERE = {"octet_by_octet", "one_segment", "connect_ipv6", "udp_ipv6", "bind_stranger", "udp_stranger"}


def examiner(server: Any, **settings: Any) -> Examiner:
    return Examiner(Proxy("localhost", server.server_address[1], gssapi=True), **settings)


def found(answers: List[Answer], *verdicts: str) -> List[Answer]:
    return [answer for answer in answers if answer.verdict in verdicts]


def test_our_own_server_has_the_right_answer_to_every_question(new_server: Callable[..., Any]) -> None:
    answers = examiner(new_server()).examine()
    assert found(answers, "fail", "warn") == []
    assert {answer.name for answer in found(answers, "skip") if answer.section != "RFC 1929 section 2"} <= NOT_HERE
    assert len(answers) == len(QUESTIONS) + len(OF_KERBEROS)


# --- servers with a fault ---

def handler(**methods: Any) -> Type[Any]:
    return type("Faulty", (GssapiHandler,), methods)


def closing(_self: Any) -> str:
    raise ProtocolError("closed without a word")


def go_on_in_clear(self: Any) -> str:
    user = GssapiHandler.auth_GSSAPI(self)
    self.stream = self.stream.frames
    return user


class Forgiving(Protection):
    """It makes something of every frame."""

    made = b"octets"

    def contents(self, token: bytes) -> bytes:
        try:
            return super().contents(token)
        except ProtocolError:
            return self.made


class Ignoring(Forgiving):
    made = b""


def relaying_with(**attributes: Any) -> Type[Any]:
    """With a protection that has these."""
    def relay(self: Any, target: Any) -> None:
        for name, value in attributes.items():
            setattr(self.stream.protection, name, value)
        GssapiHandler.relay(self, target)

    return handler(relay=relay)


def perform_without_early_data(self: Any, request: Any) -> None:
    self.stream.take()
    GssapiHandler.perform(self, request)


def frame_by_frame(self: Any, message: Any) -> Any:
    """A request is what is in one frame."""
    received = GssapiHandler.receive(self, message)
    if self.session.user and self.stream.buffer:
        raise FrameError("more than a request")
    return received


FAULTS = [
    ("gssapi_alone", handler(select_method=lambda _self, _offered: Method.NO_ACCEPTABLE_METHODS), {}, "fail", "^ff$"),
    ("gssapi_alone", handler(select_method=lambda _self, _offered: Method.NO_AUTHENTICATION_REQUIRED), {}, "fail", "^00$"),
    ("ticket", GssapiHandler, {"allow": ["bob@*"]}, "fail", "aborted"),
    ("junk_for_a_token", handler(auth_GSSAPI=closing), {}, "warn", "without 01 ff"),
    ("junk_for_a_token", handler(auth_GSSAPI=lambda self: self.stream.write(b"\x01\x01") or ""), {}, "fail", "01 01"),
    ("request_instead_of_a_token", handler(auth_GSSAPI=lambda _self: ""), {}, "fail", "^carried out"),
    ("level_integrity", GssapiHandler, {"levels": [2]}, "warn", "^02$"),
    ("level_confidentiality", GssapiHandler, {"levels": [1]}, "warn", "^01$"),
    ("level_confidentiality", GssapiHandler, {"levels": [0]}, "fail", "no protection"),
    ("unknown_level", GssapiHandler, {"grant": lambda _wanted: Level.INTEGRITY}, "fail", "01 02"),
    ("request_in_clear", handler(auth_GSSAPI=go_on_in_clear), {}, "fail", "^carried out"),
    ("request_in_two_frames", handler(perform=perform_without_early_data), {}, "fail", "^nothing within"),
    ("request_in_two_frames", handler(receive=frame_by_frame), {}, "warn", "^not served"),
    ("altered_frame", relaying_with(__class__=Forgiving), {}, "fail", "reaches the target"),
    ("altered_frame", relaying_with(__class__=Ignoring), {}, "warn", "goes on"),
    ("repeated_frame", relaying_with(__class__=Forgiving), {}, "fail", "reaches the target"),
    ("frame_in_clear", relaying_with(encrypts=False), {}, "fail", "reaches the target"),
    ("datagram_in_clear", handler(_association=Socks5Handler._association), {}, "fail", "^relayed"),
]


@pytest.mark.parametrize(("name", "faulty", "settings", "verdict", "words"), FAULTS)
def test_a_fault_is_found(new_server: Callable[..., Any], name: str, faulty: Any, settings: Dict[str, Any], verdict: str, words: str,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(settings)
    if "grant" in settings:
        monkeypatch.setattr(Gssapi, "grant", staticmethod(settings.pop("grant")))
    answer = examiner(new_server(handler=faulty, **settings), timeout=0.5).answer(BY_NAME[name])
    assert answer.verdict == verdict, answer
    assert re.search(words, answer.observed), answer


def test_every_question_finds_some_fault() -> None:
    assert {name for name, *_fault in FAULTS} == set(BY_NAME)


# --- the program ---

def test_a_server_that_lets_nobody_in_is_asked_what_can_be_asked(new_server: Callable[..., Any]) -> None:
    answers = examiner(new_server(allow=["bob@*"])).examine()
    assert {answer.name for answer in found(answers, "fail")} == {"ticket", "level_integrity", "level_confidentiality", "unknown_level"} | {
        answer.name for answer in answers if answer.section == "RFC 1961 section 5" and answer.name != "datagram_in_clear"} | {"request_in_clear"}
    assert "the proxy does not accept this Kerberos login" in {answer.observed for answer in found(answers, "skip")}


def test_the_answers_come_with_the_others(new_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    place = "localhost:%d" % new_server(users={"anna": "sesame"}).server_address[1]
    assert main([place, "--gssapi", "--service", "socks", "--user", "anna:sesame", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["counts"]["fail"], told["counts"]["warn"]) == (0, 0)
    assert {answer["verdict"] for answer in told["answers"] if answer["section"].startswith(("RFC 1929", "RFC 1961"))} == {"pass"}


@pytest.mark.usefixtures("kerberos")
def test_who_has_no_ticket_is_told_before_anything_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["localhost:9", "--gssapi", "--service", "nobody"]) == 1
    assert "error: no ticket for nobody on localhost: Server nobody/localhost@" in capsys.readouterr().err


def test_without_the_option_nothing_of_it_is_asked(new_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["localhost:%d" % new_server().server_address[1]])
    told = capsys.readouterr().out
    assert "needs --user NAME:PASSWORD, or --gssapi" in told
    assert "RFC 1961" not in told
