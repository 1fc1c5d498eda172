"""``--explain``: what is shown is what was sent, octet by octet, and why is told; passwords are not."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import Any, Callable, Iterator, List, Tuple, Type

import pytest

from socks5srv.client import udp_associate
from socks5srv.explain import Explanation
from socks5srv.protocol import (
    UNSPECIFIED, Address, Command, Credentials, CredentialsReply, Datagram, Greeting, MethodSelection, Reply, ReplyCode, Request,
)
from socks5srv.explain.datagrams import BackgroundPrinter
from socks5srv.explain.tracer import Tracer, explained
from socks5srv.service import explaining
from socks5srv.session import Session

from tests import tables
from tests.conftest import (
    LOCALHOST, TIMEOUT, Client, eventually, exchange, handler_with, in_thread, name, needs_ipv6, needs_neighbour, udp_socket,
)
from tests.program import environment

PASSWORD = "Xy1Zw2Qv3Ku4Jf5Gh6Bn7Mr8Tp9Ls"      # its length is 1d
GREETED, LOGGED_IN, ASKED = ["GREETING", "METHOD SELECTION"], ["USERNAME/PASSWORD", "LOGIN STATUS"], ["REQUEST", "REPLY"]


class Heard(Client):
    """A client that knows what it has sent, and what has come, in its messages."""

    sent = came = b""
    dripping = False

    def send(self, *messages: Any) -> None:
        octets = b"".join(map(bytes, messages))
        self.sent += octets
        (self.drip if self.dripping else super().send)(octets)

    def read(self, n: int) -> bytes:
        octets = super().read(n)
        self.came += octets
        return octets


class Shown:
    """A server with a tracer: what it shows, as a sink."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.explanations: List[Explanation] = []
        self.clients = ExitStack()

    def takes(self, _session: Session) -> bool:
        return True

    def show(self, session: Session, explanation: Explanation) -> None:
        assert explanation.session == session.id
        self.explanations.append(explanation)

    def client(self) -> Heard:
        return self.clients.enter_context(Heard(self.server.server_address))

    def end(self, client: Client) -> Session:
        client.close()
        return self.server.next_ended()

    def hear_out(self, client: Heard, octets: bytes) -> Session:
        """It sends this and no more, and hears what comes until the end."""
        client.send(octets)
        client.end()
        client.came += client.rest()
        return self.server.next_ended()

    def connect(self, place: Any) -> Reply:
        """One client's request and the reply to it."""
        client = self.client()
        reply = client.ask(Command.CONNECT, place)
        self.end(client)
        return reply

    def messages(self, session: int = 1) -> List[Explanation]:
        """All but notes and datagrams; each has been read back."""
        found = [each for each in self.of(session) if each.number.isdigit()]
        assert [each.number for each in found] == [str(number) for number in range(1, len(found) + 1)]
        return found

    def of(self, session: int = 1) -> List[Explanation]:
        found = [each for each in self.explanations if each.session == session]
        for each in found:
            tables.check(each)
        times = [each.at for each in found if each.title != "DATAGRAMS"]       # which comes when its second is over
        assert times == sorted(times)
        return found

    def octets(self, sender: str, session: int = 1) -> bytes:
        return b"".join(each.octets for each in self.messages(session) if each.sender == sender)

    def titles(self) -> List[str]:
        return [each.title for each in self.of()]

    def all(self, title: str) -> List[Explanation]:
        return [each for each in self.of() if each.title == title]

    def __getitem__(self, title: str) -> Explanation:
        return next(each for each in self.explanations if each.title == title)

    def wait_for(self, title: str, times: int = 1) -> Explanation:
        found = eventually(lambda: [each for each in list(self.explanations) if each.title == title][times - 1:])
        return found[0]

    def text(self) -> str:
        return "\n".join(map(str, self.explanations)) + json.dumps([each.as_dict() for each in self.explanations])


@pytest.fixture
def explain(start_server: Callable[..., Any]) -> Iterator[Callable[..., Shown]]:
    with ExitStack() as stack:
        def start(*arguments: Any, rules: Any = (), kind: Type[Shown] = Shown, **keywords: Any) -> Shown:
            shown = kind(start_server(*arguments, **keywords))
            shown.server.rules.extend(type(shown.server.rules).parse(rules))
            shown.server.observers += (Tracer(shown.server, sinks=[shown]),)
            stack.enter_context(shown.clients)
            return shown

        yield start


def in_one_line(text: object) -> str:
    return " ".join(str(text).replace("  = ", "").split())


def visit(server: Any, place: Any, login: bool = False, dripping: bool = False) -> Heard:
    """A client that connects to an echo and has been there; it knows what it has sent and received before."""
    with Heard(server.server_address) as client:
        client.dripping = dripping
        assert client.greet(2 if login else 0).method == (2 if login else 0)
        assert not login or client.login("anna", PASSWORD).status == 0
        assert client.request(Command.CONNECT, place).code is ReplyCode.SUCCEEDED
        exchange(client)
    return client


def without_password(octets: bytes) -> bytes:
    secret = bytes((len(PASSWORD),)) + PASSWORD.encode()
    assert secret in octets
    return octets.replace(secret, b"")


# --- octet by octet ---

def check_all(shown: Shown, client: Heard, early: bytes = b"", login: bool = False) -> None:
    """What is shown of the handshake is what the client has sent and received; the early data that were echoed are not of it."""
    sent, came = (octets[:len(octets) - len(early)] for octets in (client.sent, client.came))
    assert shown.octets("client") == (without_password(sent) if login else sent)
    assert shown.octets("proxy") == came


@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("drip", [False, True])
def test_a_connect_is_shown_octet_by_octet(
    explain: Any, start_echo: Any, host: str, by_name: bool, login: bool, drip: bool,
) -> None:
    port = start_echo(host).server_address[1]
    shown = explain(handler_with(resolve=lambda *_: [host]), users={"anna": PASSWORD} if login else None)
    client = visit(shown.server, name("target.example", port) if by_name else Address.numeric(host, port), login, drip)
    shown.server.next_ended()
    check_all(shown, client, login=login)
    assert shown.titles() == [*GREETED, *LOGGED_IN * login, *ASKED, "TUNNEL OPEN", "TUNNEL SHUT"]
    assert not any(each.deviates for each in shown.of())


def test_a_message_is_shown_before_it_is_sent(explain: Any, echo: Any) -> None:
    shown = explain()
    client = shown.client()
    client.greet()
    assert shown.titles() == GREETED
    client.request(Command.CONNECT, echo)
    assert shown.titles()[2:4] == ASKED


def test_a_conversation_in_one_segment_is_cut_where_its_messages_end(explain: Any, echo: Any) -> None:
    shown = explain(users={"anna": PASSWORD})
    client = shown.client()
    request = Request(Command.CONNECT, Address.of(echo))
    client.send(Greeting(b"\x02"), Credentials(b"anna", PASSWORD.encode()), request, b"early data")
    for message in (MethodSelection, CredentialsReply, Reply):
        message.read(client)
    assert client.exactly(10) == b"early data"
    shown.end(client)
    check_all(shown, client, early=b"early data", login=True)
    ahead = "came ahead of the answer, which RFC 1928 has the client wait for (accepted: kept for later)"
    assert f"! 10 octets {ahead}" in shown["REQUEST"].remarks
    assert f"! more {ahead}" in shown["GREETING"].remarks


@pytest.mark.parametrize(("octets", "deviation"), [
    *[(octets, "") for octets in (
        "05020002 0501000500000000000000", "050100 04", "050100 05010003000050", "050100 0501000303610d0a0050",
        "050100 05010701000000000000", "0501ff", "050100 0501", "05",
    )],
    ("050100 05090001010203040050", "CMD is 09, RFC 1928 section 4 knows 01, 02 and 03 (refused with reply 07)"),
    ("050100 04010001010203040050", "VER is 04, RFC 1928 section 4 says 05 (refused with reply 01)"),
    ("050100 05010002", "ATYP is 02, RFC 1928 section 5 knows 01, 03 and 04 (refused with reply 08)"),
    ("050100 0501000303612e000050", "the name has a zero octet at its end, where RFC 1928 section 5 has none (refused with reply 04)"),
    ("050100 05010003030d0a610050", "no host can have this name (refused with reply 04)"),
    ("050100 050100", "truncated: ATYP, DST.ADDR, DST.PORT missing"),
    ("0500", "NMETHODS is 00, RFC 1928 section 3 says 1 to 255 methods (refused: there is none to choose)"),
])
def test_what_cannot_be_served_is_shown_as_far_as_it_was_read_and_why(explain: Any, octets: str, deviation: str) -> None:
    shown = explain()
    client = shown.client()
    shown.hear_out(client, bytes.fromhex(octets))
    assert client.sent.startswith(shown.octets("client"))
    assert shown.octets("proxy") == client.came
    assert shown.octets("client")
    assert any(each.deviates for each in shown.of())
    if deviation:
        assert f"! {deviation}" in [remark for each in shown.of() for remark in each.remarks]
    if "with reply" in deviation:
        assert f"(refused with reply {client.came[3]:02x})" in deviation


def test_bind_has_two_replies_and_then_a_tunnel(explain: Any) -> None:
    shown = explain(bind_timeout=7)
    client = shown.client()
    listening = client.ask(Command.BIND, Address.numeric(LOCALHOST, 0)).bound
    with socket.create_connection((listening.host, listening.port)) as peer:
        caller = Reply.read(client).bound
        assert caller == Address.of(peer.getsockname())
        client.close()
    shown.server.next_ended()
    check_all(shown, client)
    assert shown.titles()[2:] == ["REQUEST", "REPLY 1 of 2", "REPLY 2 of 2", "TUNNEL OPEN", "TUNNEL SHUT"]
    text = str(shown["REPLY 1 of 2"])
    assert f'"I listen on {listening}. Tell them." In FTP: PORT 127,0,0,1,{listening.port >> 8},{listening.port & 255}' in text
    assert "Waiting up to 7 s for one connection" in text
    assert f"They have called: it is {caller}." in str(shown["REPLY 2 of 2"])


def test_bind_that_nobody_calls_has_two_replies_as_well(explain: Any) -> None:
    shown = explain(bind_timeout=0.05)
    client = shown.client()
    assert client.ask(Command.BIND, UNSPECIFIED).code is ReplyCode.SUCCEEDED
    assert Reply.read(client).code is ReplyCode.TTL_EXPIRED
    shown.end(client)
    check_all(shown, client)
    assert shown.titles()[2:] == ["REQUEST", "REPLY 1 of 2", "REPLY 2 of 2"]
    assert "Why: no peer connected in time." in shown["REPLY 2 of 2"].remarks


def test_what_is_no_socks_is_one_short_table(explain: Any) -> None:
    shown = explain()
    client = shown.client()
    client.send(b"GET http://anna:sesame@example.com/ HTTP/1.1\r\n\r\n")
    assert client.rest().startswith(b"HTTP/1.1 501")
    shown.server.next_ended()
    assert shown.titles() == ["NOT SOCKS5"]
    assert shown.explanations[0].octets == b"GET http"
    assert "! this is HTTP: use socks5h://" in str(shown.explanations[0])
    assert "sesame" not in shown.text()


def test_a_client_that_says_nothing_has_no_explanation(explain: Any) -> None:
    shown = explain()
    shown.end(shown.client())
    assert shown.explanations == []


def test_who_takes_too_long_is_told_so(explain: Any) -> None:
    shown = explain(handshake_timeout=0.5)
    client = shown.client()
    client.send(Greeting(b"\x00"), b"\x05\x01")
    client.rest()
    shown.server.next_ended()
    assert shown["REQUEST"].octets == b"\x05\x01"
    assert "! the handshake took too long" in shown["REQUEST"].remarks


# --- passwords ---

@pytest.mark.parametrize("ending", ["right", "wrong", "cut off", "other version", "not UTF-8", "no request"])
def test_no_password_is_in_what_is_shown(explain: Any, ending: str) -> None:
    shown = explain(users={"anna": PASSWORD if ending != "wrong" else "another"})
    client = shown.client()
    client.greet(0, 2)
    login = bytes(Credentials(b"anna" if ending != "not UTF-8" else b"\xff", PASSWORD.encode()))
    shown.hear_out(client, {"cut off": login[:-1], "other version": b"\x05" + login[1:]}.get(ending, login))
    text, table = shown.text(), shown["USERNAME/PASSWORD"]
    for start in range(len(PASSWORD) - 2):
        piece = PASSWORD[start:start + 3].encode()
        assert not [form for form in (piece.decode(), piece.hex(), piece.hex(" ")) if form in text]
    assert [row["octets"] for row in table.as_dict()["fields"] if row["name"] in ("PLEN", "PASSWD")] == [None, None]
    assert table.as_dict()["length"] is None
    assert not re.search(r"\b(29|38)\b", str(table) + str(shown["GREETING"]))
    assert "1d" not in str(table).split()


@pytest.mark.parametrize("greeting", [b"", b"\x05\x01\x00"])
@pytest.mark.parametrize("name", [b"", b"a", b"anna"])
@pytest.mark.parametrize("cut_off", [False, True])
def test_no_password_of_a_login_that_nobody_asked_for_is_shown(explain: Any, greeting: bytes, name: bytes, cut_off: bool) -> None:
    shown = explain()
    login = bytes(Credentials(name, PASSWORD.encode()))
    session = shown.hear_out(shown.client(), greeting + (login[:-20] if cut_off else login))
    client_said = [each for each in shown.of() if each.sender == "client" and each.title != "GREETING"]
    assert [each.as_dict()["length"] for each in client_said] == [None]
    assert {row["octets"] for row in client_said[0].as_dict()["fields"]} <= {None, "01", f"{len(name):02x}"}
    everything = shown.text() + str(session)
    assert "1d" not in re.findall(r"[0-9a-z]+", everything)
    assert PASSWORD[:3] not in everything
    assert PASSWORD[:4].encode().hex() not in everything


# --- why ---

def test_why_a_method_is_chosen(explain: Any) -> None:
    shown = explain(users={"anna": "sesame"})
    for methods in ((0, 2), (0, 1)):
        client = shown.client()
        client.greet(*methods)
        shown.end(client)
    chosen, none = [str(each) for each in shown.explanations if each.title == "METHOD SELECTION"]
    assert "Why: this proxy has users, so it never picks 00." in chosen
    assert '"None of these will do. Goodbye."' in none
    assert "Why: this proxy wanted 02, which METHODS has not got" in none

    shown = explain()
    shown.client().greet(0, 2)
    assert "Why: this proxy has no users, so it requires no authentication." in str(shown["METHOD SELECTION"])


def test_why_a_login_fails(explain: Any) -> None:
    shown = explain(users={"anna": "sesame"})
    client = shown.client()
    client.greet(2)
    assert client.login("anna", "wrong").status == 1
    shown.end(client)
    assert "Why: wrong name or password. Both get the same answer" in str(shown["LOGIN STATUS"])


def test_why_a_connection_came_about(explain: Any, echo: Any, refusing: Any) -> None:
    # An address of its own: at the one that other tests go out from, the port may be taken.
    _host, port = refusing("127.0.0.77", echo[1])
    shown = explain(handler_with(resolve=lambda *_: ["127.0.0.77", LOCALHOST]))
    assert shown.connect(name("target.example", port)).code is ReplyCode.SUCCEEDED
    text = in_one_line(shown["REPLY"])
    assert "Lookup: target.example -> 127.0.0.77, 127.0.0.1 (" in text
    assert "Rules: allowed, as no rule forbids it." in text
    assert f"Tried: 127.0.0.77:{port} ECONNREFUSED (" in text
    assert f", 127.0.0.1:{port} connected after " in text
    assert "so the proxy looks it up (that is socks5h://)" in str(shown["REQUEST"])


def test_why_it_did_not(explain: Any, refusing: Any) -> None:
    shown, place = explain(), refusing()
    assert shown.connect(place).code is ReplyCode.CONNECTION_REFUSED
    text = str(shown["REPLY"])
    assert f"Tried: 127.0.0.1:{place[1]} {errno.errorcode[errno.ECONNREFUSED]} (" in text
    assert "What clients print for it: docs/client-messages.rst" in text


def test_who_does_not_answer_is_told_so(explain: Any, silent: Any) -> None:
    shown, place = explain(connect_timeout=0.1), silent()
    assert shown.connect(place).code is ReplyCode.TTL_EXPIRED
    assert f"Tried: 127.0.0.1:{place[1]} did not answer before this was decided" in in_one_line(shown["REPLY"])


def test_which_rule_has_decided(explain: Any, echo: Any) -> None:
    rules = ["deny 127.0.0.9", "allow 127.0.0.0/8", "deny *"]
    shown = explain(handler_with(resolve=lambda *_: ["127.0.0.9", LOCALHOST]), rules=rules)
    assert shown.connect(name("target.example", echo[1])).code is ReplyCode.SUCCEEDED
    text = in_one_line(shown["REPLY"])
    assert f"127.0.0.9:{echo[1]} refused (rule: deny 127.0.0.9)" in text
    assert f"127.0.0.1:{echo[1]} allowed (rule: allow 127.0.0.0/8)" in text
    assert shown.connect(("192.0.2.1", 80)).code is ReplyCode.NOT_ALLOWED
    assert "Rules: 192.0.2.1:80 refused (rule: deny *)" in str(shown.messages(2)[-1])


def test_a_name_that_is_not_found(explain: Any) -> None:
    def nothing(_handler: Any, _host: str) -> List[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    shown = explain(handler_with(resolve=nothing))
    assert shown.connect(("nobody.example", 80)).code is ReplyCode.HOST_UNREACHABLE
    assert "Lookup: nobody.example -> failed: Name or service not known" in str(shown["REPLY"])


# --- tunnels ---

def test_the_ends_of_a_tunnel_and_how_it_ended(explain: Any, echo: Any) -> None:
    shown = explain()
    client = shown.client()
    bound = client.ask(Command.CONNECT, echo).bound
    exchange(client, b"x" * 79)
    here = Address.of(client.socket.getsockname())
    shown.end(client)
    assert str(shown["TUNNEL OPEN"]) == f"#1 TUNNEL OPEN  {here} == proxy == {bound} -> 127.0.0.1:{echo[1]}"
    assert str(shown["TUNNEL SHUT"]).startswith("#1 TUNNEL SHUT  79 octets to the target, 79 back, ")
    assert shown.explanations.index(shown["REPLY"]) < shown.explanations.index(shown["TUNNEL OPEN"])


# --- datagrams ---

@pytest.fixture
def target() -> Iterator[socket.socket]:
    with udp_socket() as sock:
        yield sock


class Udp:
    """A UDP client of the server's, by hand."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.control = shown.client()
        bound = self.control.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
        self.relay = (bound.host, bound.port)
        self.socket = shown.clients.enter_context(udp_socket())
        self.sent: List[bytes] = []
        self.came: List[bytes] = []

    def send(self, octets: Any) -> None:
        self.sent.append(bytes(octets))
        self.socket.sendto(bytes(octets), self.relay)

    def send_to(self, target: socket.socket, data: bytes) -> None:
        self.send(Datagram(Address.of(target.getsockname()), data))

    def hear_from(self, target: socket.socket, data: bytes) -> None:
        """It answers what has come there with this."""
        target.sendto(data, target.recvfrom(99)[1])
        self.came.append(self.socket.recv(65536))

    def end(self) -> Session:
        return self.shown.end(self.control)

    def check_all(self) -> None:
        """What is shown of the datagrams is what the client has sent and received."""
        shown = {sender: [each.octets for each in self.shown.of() if each.number.startswith("u") and each.sender == sender]
                 for sender in ("client", "proxy")}
        assert shown == {"client": self.sent, "proxy": self.came}


def test_datagrams_are_shown_octet_by_octet_both_ways(explain: Any, target: socket.socket) -> None:
    shown = explain(handler_with(resolve=lambda *_: [LOCALHOST]))
    client, port = Udp(shown), target.getsockname()[1]
    client.send_to(target, b"to an address")
    client.hear_from(target, b"back")
    client.send(Datagram(name("target.example", port), b"to a name"))
    client.hear_from(target, b"")
    client.send(Datagram(name("target.example", port), b"to a name that is known"))
    target.recvfrom(99)
    session = client.end()
    client.check_all()
    found = [*["DATAGRAM"] * 3, "NAME LOOKED UP", *["DATAGRAM"] * 2]
    assert shown.titles() == [*GREETED, *ASKED, "RELAY OPEN", *found, "RELAY SHUT"]
    texts = [in_one_line(each) for each in shown.all("DATAGRAM")]
    assert f"It goes to 127.0.0.1:{port} without the header" in texts[0]
    assert f'"This is 4 octets from 127.0.0.1:{port}."' in texts[1]
    assert "It waits until the name has been looked up." in texts[2]
    assert "Lookup: target.example -> 127.0.0.1 (" in str(shown["NAME LOOKED UP"])
    assert f"It goes to 127.0.0.1:{port} without the header" in texts[4]
    assert [each.number for each in shown.all("DATAGRAM")] == ["u1", "u2", "u3", "u4", "u5"]
    assert str(shown["RELAY SHUT"]).startswith(f"#1 RELAY SHUT  {session.up} octets to the target, {session.down} back")


@needs_ipv6
def test_datagrams_of_the_other_family_are_shown_as_well(explain: Any) -> None:
    client = Udp(explain())
    with udp_socket("::1") as target:
        client.send_to(target, b"?")
        client.hear_from(target, b"!")
    client.end()
    client.check_all()


def test_why_a_datagram_is_dropped(explain: Any, target: socket.socket) -> None:
    shown = explain(handler_with(resolve=lambda *_: [LOCALHOST]), rules=["deny *.bad.example", "deny 127.0.0.3"])
    client = Udp(shown)
    client.send_to(target, b"good")
    target.recvfrom(99)
    fates = {
        bytes(Datagram(Address.of(target.getsockname()), b"a fragment", frag=0x81)): "this proxy puts no fragments together.",
        b"\x00\x00\x00\x09what is that": "its header cannot be read.",
        b"\x00\x00": "its header cannot be read.",
        bytes(Datagram(Address.numeric("127.0.0.3", 9), b"denied")): "rule: deny 127.0.0.3.",
        bytes(Datagram(Address.numeric("127.0.0.3", 9), b"denied again")): "rule: deny 127.0.0.3.",
        bytes(Datagram(name("very.bad.example", 9), b"denied by name")): "rule: deny *.bad.example.",
        b"\x00\x00\x00\x03\x02\r\n\x00\x09hostile": r"a name that cannot exist: '\r\n'.",
    }
    for octets in fates:
        client.send(octets)
    shown.wait_for("DATAGRAM", times=8)
    client.end()
    found = shown.all("DATAGRAM")
    assert [each.octets[:4] for each in found] == [octets[:4] for octets in client.sent]
    assert {each.sender for each in found} == {"client"}
    assert [in_one_line(each).partition("Dropped: ")[2] for each in found] == ["", *fates.values()]
    assert "! FRAG is 81" in str(found[1])


@needs_neighbour
def test_datagrams_of_strangers_are_told_of(explain: Any, target: socket.socket) -> None:
    shown = explain()
    client = Udp(shown)
    with udp_socket("127.0.0.2") as stranger:
        stranger.sendto(bytes(Datagram(Address.of(target.getsockname()), b"?")), client.relay)
        assert "Dropped: it comes from 127.0.0.2, and the client is 127.0.0.1." in str(shown.wait_for("DATAGRAM"))


def test_of_a_flood_a_few_are_shown_and_the_others_counted(explain: Any, target: socket.socket) -> None:
    shown = explain()
    client = Udp(shown)
    for number in range(200):
        client.send_to(target, b"%d" % number)
        target.recvfrom(99)
    client.end()
    tables_shown = shown.all("DATAGRAM")
    left_out = sum(int(each.remarks[0].split()[0]) for each in shown.all("DATAGRAMS"))
    assert len(tables_shown) + left_out == 200
    assert len(tables_shown) <= BackgroundPrinter.max_per_second * 5
    assert [each.octets for each in tables_shown] == [client.sent[int(each.number[1:]) - 1] for each in tables_shown]


def test_the_line_that_counts_comes_when_the_flood_is_over(explain: Any, target: socket.socket) -> None:
    shown = explain()
    client = Udp(shown)
    for number in range(BackgroundPrinter.max_per_second + 5):
        client.send_to(target, b"%d" % number)
    shown.wait_for("DATAGRAMS")


def test_a_screen_that_is_stuck_does_not_stop_the_datagrams(explain: Any, target: socket.socket) -> None:
    stuck = threading.Event()

    class Stuck(Shown):
        def show(self, session: Session, explanation: Explanation) -> None:
            if explanation.number.startswith("u"):
                stuck.wait(TIMEOUT)

    client = Udp(explain(kind=Stuck))
    for _ in range(3):
        client.send_to(target, b"?")
        client.hear_from(target, b"!")
    stuck.set()


# --- on and off ---

def greet(server: Any) -> None:
    with Client(server.server_address) as client:
        client.greet()
    server.next_ended()


def explained_messages(caplog: pytest.LogCaptureFixture) -> List[Tuple[int, str]]:
    records = [record for record in caplog.records if record.name == "socks5srv.explain"]
    return [(record.explanation.session, record.explanation.title) for record in records]


def test_it_can_be_turned_on_and_off_for_new_clients(start_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = start_server()
    tracer = Tracer(server)
    caplog.set_level("INFO", "socks5srv.explain")
    greet(server)
    server.observers += (tracer,)
    greet(server)
    server.observers = ()
    greet(server)
    assert explained_messages(caplog) == [(2, title) for title in GREETED]
    assert tracer.traces == {}


def test_each_sink_has_the_sessions_that_it_wants(start_server: Any) -> None:
    class Second(Shown):
        def takes(self, session: Session) -> bool:
            return session.id == 2

    server = start_server()
    both, second = Shown(server), Second(server)
    tracer = Tracer(server, sinks=[second])
    server.observers += (tracer,)
    greet(server)
    tracer.sinks = [both, second]
    greet(server)
    greet(server)
    assert [each.session for each in both.explanations] == [2, 2, 3, 3]
    assert second.explanations == both.explanations[:2]
    assert tracer.traces == {}


def test_the_former_seam_works(start_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "socks5srv.explain")
    server = start_server(explained(handler_with(mark="kept")))
    assert explained is explaining.explained
    assert server.RequestHandlerClass.mark == "kept"
    greet(server)
    greet(server)
    assert explained_messages(caplog) == [(number, title) for number in (1, 2) for title in GREETED]


def test_several_clients_have_their_tables_one_after_the_other(explain: Any, echo: Any) -> None:
    shown = explain()
    clients = [shown.client() for _ in range(10)]
    for result in [in_thread(client.connect, echo) for client in clients]:
        result()
    shown.wait_for("TUNNEL OPEN", times=len(clients))
    by_port = {each.remarks[0].split()[0]: each.session for each in shown.explanations if each.title == "TUNNEL OPEN"}
    for client in clients:
        session = by_port[str(Address.of(client.socket.getsockname()))]
        assert shown.octets("client", session) == client.sent
        assert shown.octets("proxy", session) == client.came


# --- the option ---

BEGINNING = re.compile(r"^#(\d+)\.(\d+) ([A-Z/ ]+\S) +RFC \d+ section \d$", re.MULTILINE)


def test_with_the_option_the_tables_are_printed(start: Any, echo: Any) -> None:
    service = start("--explain", "-u", "anna", SOCKS5SRV_PASSWORD=PASSWORD)
    visit(service, echo, login=True)
    service.wait_for(" ok, 5 B up, 5 B down, ")
    text = service.stderr
    assert BEGINNING.findall(text) == [("1", str(number), title) for number, title in enumerate(GREETED + LOGGED_IN + ASKED, 1)]
    assert "\n#1 TUNNEL OPEN  127.0.0.1:" in text
    places = [text.index(part) for part in ("#1.6 REPLY", "#1 TUNNEL OPEN", "#1 TUNNEL SHUT  5 octets", " ok, 5 B up")]
    assert places == sorted(places)
    assert all(len(line) <= 79 for line in text.split("\n") if not re.match(r"\d\d:", line))
    assert PASSWORD not in text
    assert service.stop() == 0


@pytest.mark.parametrize("quiet", [False, True])
def test_as_json_each_message_is_an_object(start: Any, echo: Any, quiet: bool) -> None:
    service = start("--explain", "--log-format", "json", *["-q"] * quiet, "-u", "anna", SOCKS5SRV_PASSWORD=PASSWORD)
    client = visit(service, echo, login=True)
    service.wait_for('"TUNNEL SHUT"')
    lines = [json.loads(line) for line in service.stderr.splitlines()]
    messages = [line for line in lines if line["event"] == "message"]
    assert [line["title"] for line in messages][-3:] == ["REPLY", "TUNNEL OPEN", "TUNNEL SHUT"]
    assert {line["id"] for line in messages} == {1}
    for sender, octets in (("client", without_password(client.sent)), ("proxy", client.came)):
        assert bytes.fromhex("".join(line["octets"] for line in messages if line["sender"] == sender)) == octets
    assert PASSWORD not in service.stderr
    assert any(line["event"] != "message" for line in lines) != quiet


def test_quiet_or_not_it_is_shown(start: Any, echo: Any) -> None:
    service = start("--explain", "-q")
    visit(service, echo)
    service.wait_for("TUNNEL SHUT")
    assert service.stderr.startswith("#1.1 GREETING")


def test_it_goes_to_the_log_file(start: Any, echo: Any, tmp_path: Any) -> None:
    service = start("--explain", "--log-file", str(tmp_path / "log"))
    visit(service, echo)
    eventually(lambda: "TUNNEL SHUT" in (tmp_path / "log").read_text())
    assert "GREETING" not in service.stderr


@pytest.mark.skipif(os.name != "posix", reason="several processes need a socket that they can share")
def test_workers_print_whole_tables(start: Any, echo: Any) -> None:
    service = start("--explain", "--workers", "2")
    for result in [in_thread(visit, service, echo) for _ in range(20)]:
        result()
    service.wait_until(lambda: service.stderr.count(" ok, 5 B up, 5 B down, ") == 20, "all of them")
    parts = re.split(r"\n\n|^\d\d:.*\n", service.stderr, flags=re.MULTILINE)
    tables_printed = [part for part in parts if BEGINNING.match(part)]
    assert len(tables_printed) == 20 * 4
    for part in tables_printed:
        assert len(BEGINNING.findall(part)) == 1
        assert part.count("\nhere |") == 1
        assert tables.here(part)


def test_it_explains_what_a_program_asks_for(run_command: Any, echo: Any) -> None:
    program = f"import os; from socks5srv.client import connect; connect(os.environ['ALL_PROXY'], '127.0.0.1', {echo[1]}).close()"
    done = run_command("--explain", "--run", sys.executable, "-c", program)
    assert done.code == 0
    assert [title for _session, _number, title in BEGINNING.findall(done.stderr)] == GREETED + ASKED
    assert "has contacted 1 destination" in done.stderr


def test_a_chain_of_two_explains_both_ends_and_its_datagrams_as_well(start: Any, echo: Any, target: socket.socket) -> None:
    first = start()
    service = start("--explain", "--upstream", f"socks5h://127.0.0.1:{first.port}")
    visit(service, name("localhost", echo[1]))
    service.wait_for("TUNNEL SHUT")
    text = in_one_line(service.stderr)
    assert "so the upstream looks it up" in text
    assert f"Tried: 127.0.0.1:{first.port} connected after" in text
    with udp_associate(f"socks5h://127.0.0.1:{service.port}") as relay:
        relay.sendto(b"?", ("localhost", target.getsockname()[1]))
        target.sendto(b"!", target.recvfrom(99)[1])
        assert relay.recvfrom()[0] == b"!"
    service.wait_for("RELAY SHUT")
    assert "It goes to the upstream's relay as it is." in service.stderr
    assert '"This is 1 octet from 127.0.0.1:' in service.stderr


def test_without_the_option_nothing_of_it_is_imported() -> None:
    code = (
        "import sys; from socks5srv.cli import main, options; from socks5srv.server import listening_socket; "
        "from socks5srv.service import build; build.Single(options.parse(['0']), [listening_socket(('127.0.0.1', 0))]).close(); "
        "print([name for name in sys.modules if 'expla' in name])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], env=environment(), timeout=TIMEOUT, text=True) == "[]\n"
