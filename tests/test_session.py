"""What is told of a client: the event, the line for people, the record for programs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from socks5srv.protocol import Address, AddressType, Command, ReplyCode
from socks5srv.session import Session, amount, rfc3339, shown

from .conftest import name

CLIENT = Address("127.0.0.1", 50123, AddressType.IPV4)
PEER = Address("192.0.2.1", 443, AddressType.IPV4)
CONNECTED = {"command": Command.CONNECT, "destination": name("example.com", 443), "peer": PEER}
OK, UNSUPPORTED = ReplyCode.SUCCEEDED, ReplyCode.COMMAND_NOT_SUPPORTED


def session(reason: str = "", seconds: Any = 2.5, **known: Any) -> Session:
    """A session of which this is known; it lives if it has no `seconds`."""
    made = Session(7, CLIENT)
    for key, value in known.items():
        setattr(made, key, value)
    if seconds is not None:
        made.end(reason)
        made.seconds = seconds
    return made


@pytest.mark.parametrize(("known", "event"), [
    ({"seconds": None}, "open"), ({"seconds": None, "command": Command.CONNECT}, "open"),
    ({"seconds": None, "reply": ReplyCode.SUCCEEDED}, "open"), ({"seconds": None, "reply": ReplyCode.TTL_EXPIRED}, "open"),
    ({"reply": ReplyCode.SUCCEEDED}, "close"), ({"reply": ReplyCode.NOT_ALLOWED}, "denied"),
    *[({"reply": code}, "failed") for code in ReplyCode if code not in (ReplyCode.SUCCEEDED, ReplyCode.NOT_ALLOWED)],
    ({"command": Command.CONNECT}, "failed"),       # the client left before there was a reply
    ({"login_failed": True}, "login_failed"), ({"no_acceptable_method": True}, "no_acceptable_method"), ({}, "bad_protocol"),
])
def test_the_event_says_how_far_the_client_got(known, event):
    assert session(**known).event == event


@pytest.mark.parametrize(("known", "line"), [
    ({"seconds": None}, "open"),
    ({"seconds": None, "user": "alice", "reply": OK, **CONNECTED}, "user alice CONNECT example.com:443 (192.0.2.1:443) open"),
    ({"reply": OK, "up": 79, "down": 1234, "reason": "closed by client", **CONNECTED},
     "CONNECT example.com:443 (192.0.2.1:443) ok, 79 B up, 1.2 kB down, 2.5 s, closed by client"),
    ({"reply": OK, **CONNECTED, "destination": PEER}, "CONNECT 192.0.2.1:443 ok, 0 B up, 0 B down, 2.5 s"),
    ({"reply": ReplyCode.NOT_ALLOWED, **CONNECTED, "peer": None, "command": Command.BIND}, "BIND example.com:443 denied (reply 02)"),
    ({"reply": UNSUPPORTED, "reason": "unknown CMD 99"}, "failed (reply 07): unknown CMD 99"),
    ({"reply": UNSUPPORTED, "reason": "unknown CMD 09", "unknown_command": 9, "destination": name("example.com", 443)},
     "CMD 0x09 example.com:443 failed (reply 07): unknown CMD 09"),
    ({"reply": UNSUPPORTED, "unknown_command": 0, "destination": PEER}, "CMD 0x00 192.0.2.1:443 failed (reply 07)"),
    ({"command": Command.CONNECT, "destination": PEER, "reason": "the client has left"}, "CONNECT 192.0.2.1:443 failed: the client has left"),
    ({"login_failed": True, "user": "alice", "reason": "wrong name or password"}, "user alice login failed: wrong name or password"),
    ({"no_acceptable_method": True, "reason": "start with -u NAME"}, "no acceptable method: start with -u NAME"),
    ({"reason": "this is HTTP"}, "bad protocol: this is HTTP"),
    *(({"seconds": None, "command": Command.UDP_ASSOCIATE, "destination": name(host, 0)}, "UDP ASSOCIATE [::1]:0 open") for host in ("::1", "[::1]")),
])
def test_the_line_for_people_names_its_parts_in_order(known, line):
    assert str(session(**known)) == f"#7 127.0.0.1:50123 {line}"


def test_nothing_that_a_client_sends_can_forge_a_line_or_a_column():
    """E16"""
    forger = session(user="al ice\n#8 10.0.0.1:1 bob", reason="a\r\x1b[2Jb\u2028c", **{**CONNECTED, "destination": name("a\u202eb", 1)})
    line = str(forger)
    assert line.isprintable()
    assert line.split(" ")[2:5:2] == ["user", "CONNECT"]


def test_the_record_for_programs_is_json():
    made = session(reply=ReplyCode.CONNECTION_REFUSED, user="alice", up=1, down=2, seconds=1.23456, reason="refused", **CONNECTED)
    record = json.loads(json.dumps(made.as_dict()))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "event": "failed", "id": 7, "client": "127.0.0.1:50123", "via": None, "user": "alice", "command": "connect",
        "host": "example.com", "port": 443, "peer": "192.0.2.1:443", "reply": 5, "reason": "refused",
        "up": 1, "down": 2, "seconds": 1.235,
    }


def test_the_record_of_a_client_of_whom_nothing_is_known_has_the_same_keys():
    empty, full = session(seconds=None).as_dict(), session(reply=ReplyCode.SUCCEEDED, user="alice", **CONNECTED).as_dict()
    assert list(empty) == list(full)
    assert {key for key, value in empty.items() if value is None} == {"via", "user", "command", "host", "port", "peer", "reply", "seconds"}
    json.dumps(empty)


def test_the_first_reason_is_the_one_that_counts():
    made = session(seconds=None)
    made.end("first")
    made.end("second")
    assert made.reason == "first"
    assert made.seconds is not None
    assert made.seconds >= 0


def test_a_session_that_is_over_does_not_change_when_it_is_ended_again():
    made = session(seconds=2.5)
    before = made.as_dict()
    made.end("another reason")
    assert made.as_dict() == before


@pytest.mark.parametrize(("octets", "text"), [
    (0, "0 B"), (79, "79 B"), (999, "999 B"), (1000, "1.0 kB"), (1234, "1.2 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
    (34_500_000, "34.5 MB"), (5_000_000_000, "5.0 GB"), (1_500_000_000_000, "1.5 TB"), (10**16, "10000.0 TB"),
])
def test_amounts_have_the_fewest_digits_that_say_enough(octets, text):
    assert amount(octets) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "1970-01-01T00:00:00.000Z"), (1_600_000_000.25, "2020-09-13T12:26:40.250Z"), (1_600_000_000.9999, "2020-09-13T12:26:40.999Z"),
])
def test_times_are_utc_as_rfc_3339_writes_them(seconds, text):
    assert rfc3339(seconds) == text


@pytest.mark.parametrize(("text", "escaped"), [
    ("example.com", "example.com"), ("bücher", "bücher"), ("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("\u202e", r"\u202e"),
    ("\x00", r"\x00"), ("\ud800", r"\ud800"),
])
def test_what_could_hide_in_a_line_is_escaped(text, escaped):
    assert shown(text) == escaped
