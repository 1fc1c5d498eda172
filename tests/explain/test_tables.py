"""A message as the RFC draws it: every table is read back, and none has a password in it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socks5srv.explain import Explanation, broken, explanation, explanations, readings, table
from socks5srv.explain.__main__ import main, report
from socks5srv.explain.fields import LAYOUTS, cut, ends_too_soon
from socks5srv.explain.tables import BEGINNING, KEPT
from socks5srv.protocol import (
    Address, AddressType, Command, Credentials, Datagram, Field, Greeting, Message, Reply, ReplyCode, Request,
)

from tests import tables
from tests.conftest import name
from tests.test_protocol import generated as messages

PLACE = name("example.com", 80)
LOGIN = bytes(Credentials(b"anna", b"sesame"))
ASK = bytes(Request(Command.CONNECT, PLACE))


def shown(message: Message) -> bytes:
    """The octets of a message that may be shown, and are kept."""
    return b"".join(box.octets[:KEPT] if box.name == "DATA" else box.octets for box in message.fields() if not box.secret)


# --- every table ---

@given(messages)
def test_every_table_has_the_octets_of_its_message(message: Message) -> None:
    found = explanation(message)
    assert found.octets == shown(message)
    tables.check(found)
    assert table(message) == str(found)


@given(messages)
def test_what_has_come_is_shown_as_it_has_come(message: Message) -> None:
    octets = bytes(message)
    if isinstance(message, Reply):
        octets = octets[:2] + b"\x07" + octets[3:]      # which the message itself forgets
        assert "! RSV is 07" in str(explanation(message, octets))
    found = explanation(message, octets)
    assert found.octets[:3] == octets[:3] or isinstance(message, Credentials)
    tables.check(found)


@given(messages)
def test_octets_are_cut_into_the_same_boxes_as_the_message_has(message: Message) -> None:
    parts = cut(type(message), bytes(message))
    boxes = [(box.name, box.octets) for box in message.fields() if box.octets]
    assert [(part.name, part.octets) for part in parts if part.octets] == boxes
    assert all(part.whole for part in parts)
    assert not ends_too_soon(type(message), parts)


@given(messages, st.data())
def test_the_beginning_of_a_message_is_shown_as_far_as_it_goes(message: Message, data: Any) -> None:
    octets = bytes(message)
    beginning = octets[:data.draw(st.integers(1, len(octets)))]
    found = broken(type(message), beginning)
    tables.check(found)
    if isinstance(message, Credentials):
        assert found.octets == beginning[:2]
    elif len(beginning) < len(octets):
        payload = isinstance(message, Datagram) and len(beginning) >= len(octets) - len(message.data)
        assert found.deviates or payload
        assert beginning.startswith(found.octets)
        assert len(found.octets) == min(len(beginning), len(octets) - max(0, len(getattr(message, "data", b"")) - KEPT))


def test_a_datagram_without_payload_that_ends_in_its_port_ends_too_soon() -> None:
    found = broken(Datagram, bytes(Datagram(Address.numeric("0.0.0.0", 0), b""))[:-1])
    assert [row.name for row in found.fields] == ["RSV", "FRAG", "ATYP", "DST.ADDR", "DST.PORT"]
    assert found.deviates


@given(st.sampled_from(list(LAYOUTS)), st.binary(min_size=1, max_size=600))
def test_nonsense_can_be_shown(kind: Any, octets: bytes) -> None:
    tables.check(broken(kind, octets))


@given(st.binary(min_size=1, max_size=600))
def test_there_is_a_table_for_whatever_comes(octets: bytes) -> None:
    for reading in readings(octets):
        for found in reading:
            tables.check(found)


def test_the_pictures_are_those_of_the_messages() -> None:
    for kind, about in LAYOUTS.items():
        if not kind.__doc__ or "+--" not in kind.__doc__:
            pytest.skip("this Python runs without docstrings")
        rows = [line.strip(" |") for line in kind.__doc__.split("\n") if line.strip().startswith("|")]
        drawn = [[cell.strip() for cell in row.split("|")] for row in rows]
        assert drawn == [list(about.sizes), list(about.sizes.values())]
        assert about.section in kind.__doc__.replace("\n", " ")


# --- passwords ---

passwords = st.binary(min_size=1, max_size=255)


greetings = st.sampled_from([b"", b"\x05\x01\x02", b"\x05\x02\x00\x02", b"\x05\x03\x00\x01\x02"])
requests = st.sampled_from([b"", ASK, b"nonsense", b"\x05\x01"])


def everything(found: List[Explanation]) -> str:
    return "\n".join(map(str, found)) + json.dumps([part.as_dict() for part in found])


@given(greetings, st.binary(max_size=20), passwords, passwords, requests)
def test_a_table_is_the_same_whatever_the_password_is_even_if_only_octets_are_known(
    greeting: bytes, username: bytes, one: bytes, other: bytes, request: bytes,
) -> None:
    login, same_but_for_the_password = (Credentials(username, password) for password in (one, other))
    assert everything([explanation(login)]) == everything([explanation(same_but_for_the_password)])
    assert report(greeting + bytes(login) + request) == report(greeting + bytes(same_but_for_the_password) + request)


@given(greetings, st.binary(max_size=20), passwords, passwords, st.data())
def test_a_login_that_ends_too_soon_shows_nothing_but_its_first_octets(
    greeting: bytes, username: bytes, one: bytes, other: bytes, data: Any,
) -> None:
    until = [data.draw(st.integers(3, len(username) + 3 + len(password) - 1)) for password in (one, other)]
    logins = [bytes(Credentials(username, password))[:end] for password, end in zip((one, other), until)]
    first, second = (everything(explanations(greeting + login)) for login in logins)
    assert first == second
    assert everything([broken(Credentials, logins[0])]) == everything([broken(Credentials, logins[1])])


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_login_with_another_version_shows_nothing_else(one: bytes, other: bytes) -> None:
    assert everything([broken(Credentials, b"\x05" + one)]) == everything([broken(Credentials, b"\x05" + other)])


def test_a_password_is_in_no_form_in_what_is_printed() -> None:
    password = b"Xy1Zw2Qv3Ku4Jf5Gh6Bn7Mr8Tp9Ls"
    conversation = b"\x05\x01\x02" + bytes(Credentials(b"anna", password)) + ASK
    for end in range(3, len(conversation) + 1):
        text = everything(explanations(conversation[:end]))
        for beginning in range(len(password) - 3):
            piece = password[beginning:beginning + 4]
            assert not [form for form in (piece.decode(), piece.hex(), piece.hex(" ")) if form in text]
        assert "1d" not in text, "how long it is"


def test_the_length_of_a_login_would_tell_that_of_its_password() -> None:
    assert explanation(Credentials(b"anna", b"sesame")).length is None
    assert explanation(Greeting(b"\x00")).length == 3
    assert "client -> proxy\n" in table(Credentials(b"anna", b"sesame"))


# --- what is told ---

def test_a_greeting_is_drawn_so() -> None:
    assert table(Greeting(b"\x00\x01\x02")) == """\
GREETING                                                     RFC 1928 section 3
client -> proxy, 5 octets
     +-----+----------+----------+
     | VER | NMETHODS | METHODS  |
     +-----+----------+----------+
size |  1  |    1     | 1 to 255 |
here |  05 |    03    | 00 01 02 |
     +-----+----------+----------+
     VER       05  SOCKS version 5
     NMETHODS  03  3 methods follow
     METHODS   00  no authentication required
               01  GSSAPI
               02  username/password
  = "I speak SOCKS5. Here are the 3 ways I can log in."
""".rstrip()


def test_a_long_name_is_shortened_where_there_is_no_room_for_it() -> None:
    text = table(Request(Command.CONNECT, name("a-name-of-32-octets.example.com.", 443)))
    assert "| 20 61 2d .. 2e |" in text
    assert "     DST.ADDR  20              32 octets of name, without a zero at its end\n" in text
    assert "               61 2d 6e .. 2e  a-name-of-32-octets.example.com.\n" in text


def test_of_many_methods_some_are_named() -> None:
    found = explanation(Greeting(bytes(range(255))))
    tables.check(found)
    assert "and 243 more" in str(found)


def test_what_is_not_kept_of_a_datagram_is_counted() -> None:
    datagram = Datagram(PLACE, bytes(1000))
    found = explanation(datagram)
    assert found.length == len(bytes(datagram))
    assert (len(found.fields[-1].octets or b""), found.fields[-1].left_out) == (KEPT, 1000 - KEPT)
    assert "1000 octets of payload" in str(found)


@pytest.mark.parametrize(("kind", "octets", "deviation"), [
    (Greeting, "0500", "NMETHODS is 00, RFC 1928 section 3 says 1 to 255 methods (refused: there is none to choose)"),
    (Greeting, "0503000200", "METHODS has 00 more than once (accepted)"),
    (Greeting, "0501ff", "METHODS has ff, which is the answer that there is none (ignored)"),
    (Greeting, "040100", "VER is 04, RFC 1928 section 3 says 05 (refused)"),
    (Greeting, "05", "truncated: NMETHODS, METHODS missing"), (Greeting, "050300", "truncated: METHODS incomplete"),
    (Credentials, "0504", "VER is 05, RFC 1929 section 2 says 01 (refused)"),
    (Credentials, "0104616e", "truncated"),
    (Request, "040100", "VER is 04, RFC 1928 section 4 says 05 (refused with reply 01)"),
    (Request, "05090001010203040050", "CMD is 09, RFC 1928 section 4 knows 01, 02 and 03 (refused with reply 07)"),
    (Request, "05010701010203040050", "RSV is 07, RFC 1928 section 4 says 00 (accepted)"),
    (Request, "05010002", "ATYP is 02, RFC 1928 section 5 knows 01, 03 and 04 (refused with reply 08)"),
    (Request, "05010003093132372e302e302e310050", "127.0.0.1 is an IP address, and is sent as a name (accepted as the address)"),
    (Request, "05010003000050", "the name is empty (refused with reply 04)"),
    (Request, "0501000303612e000050", "the name has a zero octet at its end, where RFC 1928 section 5 has none (refused with reply 04)"),
    (Request, "05010003020a610050", "no host can have this name (refused with reply 04)"),
    (Request, "0501000303", "truncated: DST.ADDR incomplete, DST.PORT missing"),
    (Request, "050100010102", "truncated: DST.ADDR incomplete, DST.PORT missing"),
    (Reply, "05090001010203040050", "REP is 09, RFC 1928 section 6 knows 00 to 08"),
    (Reply, "05000701010203040050", "RSV is 07, RFC 1928 section 6 says 00"),
    (Datagram, "00070001010203040050", "RSV is 00 07, RFC 1928 section 7 says 00 00 (accepted)"),
    (Datagram, "00008101010203040050", "FRAG is 81: a fragment, which RFC 1928 section 7 has a proxy drop that does not put them together"),
    (Datagram, "00000005", "ATYP is 05, RFC 1928 section 5 knows 01, 03 and 04 (dropped)"),
])
def test_deviations_are_marked(kind: Any, octets: str, deviation: str) -> None:
    assert f"! {deviation}" in broken(kind, bytes.fromhex(octets)).remarks


def test_of_another_version_nothing_else_is_marked() -> None:
    assert broken(Request, b"\x04\x09\x07").remarks == ["! VER is 04, RFC 1928 section 4 says 05 (refused with reply 01)"]


def test_empty_names_and_passwords_are_marked() -> None:
    remarks = explanation(Credentials(b"", b"")).remarks
    assert "! the user name is empty, RFC 1929 section 2 says 1 to 255 octets" in remarks
    assert "! the password is empty, RFC 1929 section 2 says 1 to 255 octets" in remarks


@given(messages)
def test_what_is_as_the_rfc_has_it_is_not_marked(message: Message) -> None:
    address = next((getattr(message, key) for key in ("destination", "bound", "address") if hasattr(message, key)), None)
    proper = {
        Greeting: lambda m: len(m.methods) == len(set(m.methods)) > 0 and 0xFF not in m.methods,
        Credentials: lambda m: m.username and m.password,
        Request: lambda m: m.rsv == 0,
        Reply: lambda m: m.code in list(ReplyCode),
        Datagram: lambda m: m.rsv == 0 and m.frag == 0,
    }.get(type(message), bool)
    in_disguise = address is not None and address.address_type is AddressType.DOMAINNAME and address.literal is not None
    assert explanation(message).deviates == (in_disguise or not proper(message))


def test_a_hostile_name_cannot_forge_anything() -> None:
    found = broken(Request, b"\x05\x01\x00\x03\x0a\r\n\x1b[31m#1 \x00\x50")
    tables.check(found)
    assert r"\r\n\x1b[31m#1\x20" in str(found)
    assert "m\\xfcnchen.example" in table(Request(Command.CONNECT, name("m\u00fcnchen.example", 80)))


class Token(Message):
    def fields(self) -> List[Field]:
        return [Field("MTYP", b"\x01", 1), Field("TOKEN", bytes(40), "40 octets"), Field("KEY", b"sesame", "sesame", secret=True)]


def test_a_message_that_nobody_knows_speaks_for_itself_and_keeps_its_secrets() -> None:
    found = explanation(Token())
    tables.check(found)
    assert found.title == "TOKEN"
    assert found.octets == b"\x01" + bytes(BEGINNING)
    assert "sesame" not in everything([found])


# --- octets, and nothing is known of them ---

@pytest.mark.parametrize(("octets", "expected"), [
    (b"\x05\x01\x00", [["GREETING"]]), (b"\x05\x03\x01", [["GREETING"]]),
    (b"\x05\x02", [["METHOD SELECTION"]]), (b"\x05\x00", [["METHOD SELECTION"]]),
    (LOGIN, [["USERNAME/PASSWORD"]]), (LOGIN[:-1], [["USERNAME/PASSWORD"]]),
    (b"\x01\x00", [["LOGIN STATUS"]]),
    (b"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", [["REQUEST"], ["REPLY"]]),
    (b"\x05\x01\x00\x02", [["REQUEST"]]), (b"\x05\x09\x00", [["REQUEST"]]),
    (bytes(Reply(ReplyCode.SUCCEEDED)), [["REPLY"]]), (b"\x05\x09\x00\x01\x7f\x00\x00\x01\x00\x50", [["REPLY"]]),
    (b"\x00\x00\x00\x01", [["DATAGRAM"]]),
    (bytes(Datagram(PLACE, b"hello")), [["DATAGRAM"]]),
    (b"\x05\x01\x02" + LOGIN, [["GREETING", "USERNAME/PASSWORD"]]),
    (b"\x05\x01\x02" + LOGIN + ASK, [["GREETING", "USERNAME/PASSWORD", "REQUEST"]]),
    (b"\x05\x01\x00" + ASK, [["GREETING", "REQUEST"]]),
    (b"\x05\x02\x01\x00" + bytes(Reply(ReplyCode.SUCCEEDED)), [["METHOD SELECTION", "LOGIN STATUS", "REPLY"]]),
    (b"\x05\x00" + bytes(Reply(ReplyCode.SUCCEEDED)) * 2, [["METHOD SELECTION", "REPLY", "REPLY"]]),
    (b"\x05\x01\x02" + LOGIN[:-1], [["GREETING", "USERNAME/PASSWORD"]]),
    (b"\x05\x01\x02" + LOGIN + b"junk", [["GREETING", "USERNAME/PASSWORD"]]),
    *[(octets, [["NOT SOCKS5"]]) for octets in (b"GET / HTTP/1.1\r\n", b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"\x16\x03\x01")],
])
def test_octets_are_recognised(octets: bytes, expected: List[List[str]]) -> None:
    assert [[found.title for found in reading] for reading in readings(octets)] == expected


def test_of_what_is_no_socks_only_the_beginning_is_shown() -> None:
    (found,) = explanations(b"GET http://anna:sesame@example.com/ HTTP/1.1\r\nProxy-Authorization: Basic YW5uYTpzZXNhbWU=\r\n")
    assert found.octets == b"GET http"
    assert "this is HTTP" in str(found)


# --- the program ---

def run(*words: str, stdin: bytes = b"", stdout: int = subprocess.PIPE) -> Any:
    command = [sys.executable, "-m", "socks5srv.explain", *words]
    return subprocess.run(command, input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=30, check=False)


@pytest.mark.parametrize("words", [
    ["050100"], ["05", "01", "00"], ["05:01:00"], ["0x05", "0x01", "0x00"], ["0x050100"], [r"\x05\x01\x00"],
])
def test_hexadecimal_may_be_written_in_many_ways(words: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == table(Greeting(b"\x00")) + "\n"


@pytest.mark.parametrize("words", [["sesame"], ["0501zz"], ["050"], ["\u0665\u0661"], [""], ["0x"]])
def test_what_is_no_hexadecimal_is_told_in_a_line_and_not_repeated(words: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("python -m socks5srv.explain: error: ")
    assert words[0] in "050 0x" or words[0] not in err


def test_it_reads_from_standard_input() -> None:
    for mark in (b"", b"\xef\xbb\xbf"):         # which PowerShell may put in front
        done = run("-", stdin=mark + b"05 01\n00\n")
        assert (done.returncode, done.stdout.decode().replace(os.linesep, "\n")) == (0, table(Greeting(b"\x00")) + "\n")
    done = run("-", stdin=b"\xff\xfe\x00")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


def test_it_says_how_to_use_it() -> None:
    assert run("--help").stdout == run().stderr
    assert (run("--help").returncode, run().returncode) == (0, 2)


def test_several_ways_to_read_it_are_all_shown() -> None:
    text = report(bytes.fromhex("05030001000000000000"))
    assert text.startswith("These 10 octets can be read in 2 ways.\n\n--- 1 of 2 ---\n\nREQUEST")
    assert "\n\n--- 2 of 2 ---\n\nREPLY" in text


@pytest.mark.skipif(os.name != "posix", reason="a pipe that nobody reads is broken elsewhere")
def test_a_reader_that_has_gone_is_no_reason_for_a_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("-", stdin=b"050100", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@given(st.text(max_size=40).filter(lambda text: text != "-"))       # which reads what is typed afterwards
def test_whatever_is_typed_there_is_no_traceback(text: str) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main([text]) in (0, 2)


def test_thousands_of_replies_are_thousands_of_tables_and_if_cut_off_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    reply = "05000001" + "7f000001" + "0438"
    assert main([reply * 3000]) == 0
    shown = capsys.readouterr().out
    assert shown.count("REPLY") == 3000
    assert shown.count("succeeded") >= 3000
    assert main([reply + "0438" * 2999]) == main([reply * 3000 + "05"]) == 0
    assert "Traceback" not in capsys.readouterr().err
