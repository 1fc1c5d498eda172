"""
The questions to a server: our own has an answer to all of them, and every fault that they ask for is found.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from select import select
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple, Type

import pytest

from socks5srv import check
from socks5srv.check import QUESTIONS, Answer, Examiner, main
from socks5srv.client import Proxy
from socks5srv.protocol import (
    UNSPECIFIED, VER, Address, AddressType, Credentials, CredentialsReply, Datagram, Message, Method, MethodSelection,
    ProtocolError, Reply, ReplyCode, Request, RequestFailed,
)
from socks5srv.handler import Socks5Handler
from socks5srv.upstream import UpstreamHandler

from .clients.harness import need
from .conftest import LOCALHOST, TIMEOUT, eventually, handler_with, in_thread, needs_ipv6, needs_neighbour, udp_socket
from .program import ROOT

USERS = {"anna": "sesame"}
BY_NAME = {question.name: question for question in QUESTIONS}


def proxy_of(server: Any, login: bool = False) -> Proxy:
    """`server` may be an address, too."""
    host, port = getattr(server, "server_address", server)[:2]
    return Proxy(host, port, b"anna", b"sesame") if login else Proxy(host, port)


def examine(server: Any, login: bool = False, **settings: Any) -> List[Answer]:
    return Examiner(proxy_of(server, login), **settings).examine()


def verdicts(answers: Sequence[Answer], *kinds: str) -> Dict[str, str]:
    return {answer.name: answer.verdict for answer in answers if answer.verdict in kinds}


def complaints(answers: Sequence[Answer]) -> Dict[str, str]:
    return verdicts(answers, "fail", "warn")


# --- our own server ---

@needs_ipv6
@needs_neighbour
@pytest.mark.parametrize(("users", "skipped"), [(None, {"RFC 1929 section 2"}), (USERS, set())], ids=["open", "login"])
def test_our_own_server_has_the_right_answer_to_every_question(start_server: Any, users: Any, skipped: Any) -> None:
    answers = examine(start_server(users=users), login=bool(users))
    assert [answer for answer in answers if answer.verdict in ("fail", "warn")] == []
    assert {answer.section for answer in answers if answer.verdict == "skip"} == skipped


@needs_ipv6
def test_our_own_server_on_the_other_family_and_with_reassembly(start_server: Any) -> None:
    answers = examine(start_server(address=("::1", 0), reassemble=True))
    assert complaints(answers) == {}
    assert [answer.observed for answer in answers if answer.name == "udp_fragments"] == ["reassembled"]


def test_without_a_login_most_cannot_be_asked(start_server: Any) -> None:
    answers = examine(start_server(users=USERS))
    assert complaints(answers) == {}
    assert len(verdicts(answers, "pass")) == 8
    assert verdicts(answers, "skip")["connect_ipv4"] == "skip"


# --- servers with a fault ---

def sends(kind: Type[Message], change: Callable[[bytes], bytes]) -> Type[Socks5Handler]:
    """A handler whose messages of this kind go out changed."""
    def send(self: Any, message: Message) -> None:
        self.connection.sendall(change(bytes(message)) if isinstance(message, kind) else bytes(message))

    return handler_with(send=send)


def with_octet(place: int, octet: int) -> Callable[[bytes], bytes]:
    return lambda octets: octets[:place] + bytes([octet]) + octets[place + 1:]


def hears(kind: type, change: Callable[[bytes], bytes]) -> Type[Socks5Handler]:
    """A handler that takes what has come for a message of this kind for something else."""
    def receive(self: Any, message: Any) -> Any:
        if message is kind:
            while not self.stream.buffer and self.stream.fill():
                pass
            self.stream.buffer = change(self.stream.buffer)
        return Socks5Handler.receive(self, message)

    return handler_with(receive=receive)


def until_the_client_leaves(self: Any) -> None:
    with contextlib.suppress(OSError):
        while self.connection.recv(4096):
            pass


def refuse_and_stay(self: Any, error: Any) -> None:
    self.session.end(str(error))
    self.connection.sendall(bytes(error.answer))
    until_the_client_leaves(self)


def wait_if_nothing_is_offered(self: Any, offered: Sequence[int]) -> Method:
    if not offered:
        until_the_client_leaves(self)
    return Socks5Handler.select_method(self, offered)


def take_any_version(self: Any) -> None:
    self.stream.fill()
    self.stream.buffer = bytes([VER]) + self.stream.buffer[1:]


def take_a_segment_for_a_message(self: Any) -> None:
    self.stream.fill()
    if len(self.stream.buffer) < 3:
        raise ProtocolError("a short greeting")


def forget_what_came_ahead(self: Any, message: Message) -> None:
    if isinstance(message, MethodSelection):
        self.stream.take()
    Socks5Handler.send(self, message)


def authenticate_as_c_does(_self: Any, username: str, password: str) -> bool:
    return USERS.get(username.partition("\0")[0]) == password.partition("\0")[0]


def go_on_after_a_wrong_login(self: Any) -> str:
    self.receive(Credentials)
    self.send(CredentialsReply(CredentialsReply.FAILURE))
    return ""


def let_the_login_be_left_out(self: Any) -> str:
    if not self.stream.buffer:
        self.stream.fill()
    return "" if self.stream.buffer[:1] == bytes([VER]) else Socks5Handler.auth_USERNAME_PASSWORD(self)


def only(*kinds: AddressType) -> Callable[..., Any]:
    """connect(), but to nothing else than such addresses."""
    def connect(self: Any, request: Request) -> socket.socket:
        if request.destination.address_type not in kinds:
            raise RequestFailed(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED)
        return Socks5Handler.connect(self, request)

    return connect


def no_rsv(self: Any, request: Request) -> None:
    if request.rsv:
        raise ProtocolError("RSV")
    Socks5Handler.perform(self, request)


def no_resolver(_self: Any, _host: str) -> List[str]:
    raise RequestFailed(ReplyCode.GENERAL_FAILURE)


def slow_resolver(self: Any, _host: str) -> List[str]:
    until_the_client_leaves(self)
    return []


def target_first(self: Any, target: socket.socket, bound: Address) -> None:
    target.settimeout(0.2)
    with contextlib.suppress(socket.timeout):
        self.connection.sendall(target.recv(100))
    target.setblocking(False)
    Socks5Handler.open_tunnel(self, target, bound)


def lose_what_came_early(self: Any, target: socket.socket) -> None:
    self.stream.take()
    Socks5Handler.relay(self, target)


def one_way_after_the_other(self: Any, target: socket.socket) -> None:
    """Reads from the client until its end, and only then from the target."""
    target.setblocking(True)
    with contextlib.suppress(OSError):
        for one, other in ((self.connection, target), (target, self.connection)):
            for octets in iter(lambda one=one: one.recv(65536), b""):       # type: ignore[misc]
                other.sendall(octets)
            other.shutdown(socket.SHUT_WR)


def end_both_ways_at_once(self: Any, target: socket.socket) -> None:
    target.setblocking(True)
    with contextlib.suppress(OSError):
        while True:
            for one in select([self.connection, target], [], [])[0]:
                octets = one.recv(65536)
                if not octets:
                    return
                (target if one is self.connection else self.connection).sendall(octets)


def end_cleanly(self: Any, target: socket.socket) -> None:
    end_both_ways_at_once(self, target)
    self.connection.shutdown(socket.SHUT_WR)


def listen_for_ever(self: Any, _listener: socket.socket, _expected: Any, _until: float) -> Any:
    while not self.server.stopping:
        select([], [], [], 0.05)
    raise RequestFailed(ReplyCode.TTL_EXPIRED)


def associate(**faults: Any) -> Type[Socks5Handler]:
    """A UDP relay in a few lines, with these faults."""
    def do(self: Any, _request: Request) -> None:
        with udp_socket() as inner, udp_socket() as outer:
            self.succeed(Address.of(inner.getsockname()))
            client, deaf_until = None, time.monotonic() + 2
            while True:
                watched = [inner, outer] + [self.connection] * (not faults.get("immortal"))
                ready = select(watched, [], [], 0.1)[0]
                if self.connection in ready or self.server.stopping or (faults.get("immortal") and time.monotonic() > deaf_until):
                    return
                if inner in ready:
                    octets, source = inner.recvfrom(faults.get("buffer", 65535))
                    if source[0] != LOCALHOST and not faults.get("strangers"):
                        continue
                    try:
                        datagram = Datagram.read(BytesIO(octets))
                    except (ProtocolError, RequestFailed):
                        if faults.get("fragile"):
                            return
                        continue
                    if (datagram.frag and not faults.get("fragments")) or (not datagram.data and faults.get("no_empty")):
                        continue
                    if ":" in datagram.address.host or (datagram.address.literal is None and faults.get("no_names")):
                        continue
                    client = source
                    outer.sendto(datagram.data, (LOCALHOST, datagram.address.port))
                if outer in ready and client:
                    octets, source = outer.recvfrom(65535)
                    there = UNSPECIFIED if faults.get("no_source") else Address.of(source)
                    inner.sendto(bytes(Datagram(there, octets, rsv=faults.get("rsv", 0))), client)

    return handler_with(do_UDP_ASSOCIATE=do)


ANY_REPLY_SUCCEEDS = sends(Reply, with_octet(1, 0))
ANY_FAILURE_IS_01 = sends(Reply, lambda octets: octets[:1] + bytes([bool(octets[1])]) + octets[2:])
NO_SUCH_CODE = sends(Reply, lambda octets: octets[:1] + bytes([octets[1] and 0x42]) + octets[2:])
GENEROUS = handler_with(authenticate=lambda _self, _username, _password: True)
SILENT = handler_with(_refuse=lambda self, error: self.session.end(str(error)))
STAYING = handler_with(_refuse=refuse_and_stay)
NOWHERE = handler_with(succeed=lambda self, _bound: Socks5Handler.succeed(self, UNSPECIFIED))
NOBODY = handler_with(open_tunnel=lambda self, target, _bound: Socks5Handler.open_tunnel(self, target, UNSPECIFIED))
ANYBODY = handler_with(_await_peer=lambda self, listener, _expected, until: Socks5Handler._await_peer(self, listener, [], until))
OF_TEN = handler_with(select_method=lambda self, offered: Socks5Handler.select_method(self, offered[:10]))
ALWAYS_00 = handler_with(select_method=lambda _self, _offered: Method.NO_AUTHENTICATION_REQUIRED)

FAULTS = [
    # the question, the handler that has a fault, and what is found
    ("no_login", sends(MethodSelection, with_octet(1, 0x80)), "fail", "80"),
    ("no_login", sends(MethodSelection, with_octet(0, 4)), "fail", "VER of the method selection is 04"),
    ("no_login", handler_with(_negotiate=until_the_client_leaves), "fail", "nothing within"),
    ("both_methods", sends(MethodSelection, with_octet(1, 0x03)), "fail", "03"),
    ("unknown_methods", ALWAYS_00, "fail", "00"),
    ("offer_of_ff", ALWAYS_00, "fail", "00"),
    ("no_methods", ALWAYS_00, "fail", "00"),
    ("no_methods", handler_with(select_method=wait_if_nothing_is_offered), "warn", "waits"),
    ("end_after_ff", STAYING, "warn", "still open"),
    ("many_methods", OF_TEN, "fail", "ff"),
    ("other_version", handler_with(_reject_foreign=take_any_version), "fail", "0500"),
    ("octet_by_octet", handler_with(_reject_foreign=take_a_segment_for_a_message), "fail", "closed|breaks"),
    ("one_segment", handler_with(send=forget_what_came_ahead), "warn", "not served: "),
    ("connect_ipv4", handler_with(connect=only()), "fail", "08 address type"),
    ("connect_ipv4", sends(Reply, lambda octets: octets[:7]), "fail", "nothing within"),
    ("connect_ipv4", handler_with(do_CONNECT=lambda self, _request: self.succeed(UNSPECIFIED)), "fail", "no connection reaches"),
    ("connect_name", handler_with(resolve=no_resolver), "fail", "01 general"),
    pytest.param("connect_ipv6", handler_with(connect=only(AddressType.IPV4)), "warn", "08 address type", marks=needs_ipv6),
    ("connect_literal_name", handler_with(connect=only(AddressType.IPV4)), "warn", "08 address type"),
    ("unknown_command", SILENT, "fail", "without a reply"),
    ("unknown_command", ANY_FAILURE_IS_01, "warn", "01 general"),
    ("unknown_address_type", SILENT, "fail", "without a reply"),
    ("unknown_address_type", ANY_FAILURE_IS_01, "warn", "01 general"),
    ("request_version", hears(Request, with_octet(0, VER)), "fail", "^carried out"),
    ("request_rsv", handler_with(perform=no_rsv), "warn", "without a reply"),
    ("empty_name", ANY_REPLY_SUCCEEDS, "fail", "00 succeeded"),
    ("name_with_nul", ANY_REPLY_SUCCEEDS, "fail", "00 succeeded"),
    ("name_with_nul", hears(Request, lambda octets: octets[:4] + b"\x09" + octets[5:14] + octets[-2:]), "fail", "00 succeeded"),
    ("refused", ANY_REPLY_SUCCEEDS, "fail", "00 succeeded"),
    ("refused", ANY_FAILURE_IS_01, "warn", "01 general"),
    ("refused", NO_SUCH_CODE, "fail", "42, which means nothing"),
    ("unknown_name", ANY_FAILURE_IS_01, "warn", "01 general"),
    ("unknown_name", handler_with(resolve=slow_resolver), "warn", "nothing within"),
    ("end_after_failure", STAYING, "fail", "still open"),
    ("reply_rsv", sends(Reply, with_octet(2, 1)), "fail", "01"),
    ("bound_address", NOWHERE, "warn", "0.0.0.0:0, and the target sees 127.0.0.1"),
    ("reply_first", handler_with(open_tunnel=target_first), "fail", "VER of the reply is 32"),
    ("early_data", handler_with(relay=lose_what_came_early), "fail", "b'late' arrives"),
    ("much_both_ways", handler_with(relay=one_way_after_the_other), "fail", "nothing within|breaks"),
    ("half_close_up", handler_with(relay=end_both_ways_at_once), "fail", "lost|breaks"),
    ("half_close_down", handler_with(relay=end_both_ways_at_once), "fail", "lost|breaks"),
    ("reset", handler_with(relay=end_cleanly), "warn", "clean end"),
    ("bind_there", handler_with(do_BIND=None), "warn", "07 command"),
    ("bind_there", handler_with(do_BIND=lambda *_request: None), "fail", "without a reply"),
    ("bind_there", NOWHERE, "warn", "0.0.0.0:0, which tells clients nothing"),
    ("bind_second_reply", NOBODY, "fail", "0.0.0.0:0, and the peer is"),
    pytest.param("bind_stranger", ANYBODY, "fail", "^accepted", marks=needs_neighbour),
    ("bind_client_gone", handler_with(_await_peer=listen_for_ever), "warn", "still listening"),
    ("udp_there", handler_with(do_UDP_ASSOCIATE=None), "warn", "07 command"),
    ("udp_there", handler_with(do_UDP_ASSOCIATE=lambda *_request: None), "fail", "without a reply"),
    ("udp_lifetime", associate(immortal=True), "fail", "lives on for"),
    ("udp_ipv4", associate(no_source=True), "fail", "names 0.0.0.0:0"),
    ("udp_ipv4", associate(rsv=1), "fail", "RSV 0001"),
    pytest.param("udp_ipv6", associate(), "warn", "nothing arrives", marks=needs_ipv6),
    ("udp_name", associate(no_names=True), "fail", "nothing arrives"),
    ("udp_fragments", associate(fragments=True), "fail", "b'one ' arrives"),
    pytest.param("udp_stranger", associate(strangers=True), "fail", "relayed", marks=needs_neighbour),
    ("udp_nonsense", associate(fragile=True), "fail", "nothing arrives"),
    ("udp_empty", associate(no_empty=True), "warn", "dropped"),
    ("udp_large", associate(buffer=1500), "warn", "^1472 bytes"),
]

LOGIN_FAULTS = [
    ("no_login", ALWAYS_00, "warn", "no password is asked for"),
    ("right_login", sends(CredentialsReply, with_octet(0, VER)), "fail", "VER of the reply to the credentials is 05"),
    ("right_login", sends(CredentialsReply, with_octet(1, 1)), "fail", "status 01"),
    ("wrong_password", GENEROUS, "fail", "accepted"),
    ("wrong_password", SILENT, "warn", "without a status"),
    ("wrong_name", GENEROUS, "fail", "accepted"),
    ("password_with_nul", handler_with(authenticate=authenticate_as_c_does), "fail", "accepted"),
    ("empty_login", GENEROUS, "fail", "accepted"),
    ("long_login", GENEROUS, "fail", "accepted"),
    ("end_after_wrong_login", GENEROUS, "fail", "accepted"),
    ("end_after_wrong_login", STAYING, "fail", "still open"),
    ("request_after_wrong_login", handler_with(auth_USERNAME_PASSWORD=go_on_after_a_wrong_login), "fail", "^carried out"),
    ("request_instead_of_login", handler_with(auth_USERNAME_PASSWORD=let_the_login_be_left_out), "fail", "^carried out"),
]


@pytest.fixture
def find(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(check, "CLOSING", 0.5)

    def found(name: str, handler: Any, verdict: str, words: str, users: Any = None) -> None:
        examiner = Examiner(proxy_of(start_server(handler, users=users), login=bool(users)), timeout=0.5)
        examiner.wants_a_login = bool(users)
        answer = examiner.answer(BY_NAME[name])
        assert answer.verdict == verdict, answer
        assert re.search(words, answer.observed), answer

    return found


@pytest.mark.parametrize(("name", "handler", "verdict", "words"), FAULTS)
def test_a_fault_is_found(find: Any, name: str, handler: Any, verdict: str, words: str) -> None:
    find(name, handler, verdict, words)


@pytest.mark.parametrize(("name", "handler", "verdict", "words"), LOGIN_FAULTS)
def test_a_fault_of_logins_is_found(find: Any, name: str, handler: Any, verdict: str, words: str) -> None:
    find(name, handler, verdict, words, USERS)


def test_every_question_finds_some_fault() -> None:
    """A question that nobody can fail is none."""
    asked = {getattr(row, "values", row)[0] for row in [*FAULTS, *LOGIN_FAULTS]}
    assert asked == set(BY_NAME)
    assert len(BY_NAME) == len(QUESTIONS)


# --- other people's servers: where they differ, and nothing else ---

MICROSOCKS = {
    "octet_by_octet": "fail", "one_segment": "warn", "early_data": "fail", "half_close_up": "fail", "half_close_down": "fail",
    "name_with_nul": "fail", "unknown_name": "warn", "bound_address": "warn", "reset": "warn", "bind_there": "warn", "udp_there": "warn",
}
DANTE = {
    "unknown_command": "fail", "unknown_address_type": "fail", "name_with_nul": "fail", "udp_stranger": "fail", "reset": "warn",
    "connect_ipv6": "warn", "udp_ipv6": "warn",      # it is told to go out by IPv4
}


@contextlib.contextmanager
def program(address: Tuple[str, int], *argv: object) -> Iterator[Tuple[str, int]]:
    """Run it until it listens there, and further; at the end, end it and what it has started."""
    process = subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        eventually(lambda: listens(address))
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(TIMEOUT)


def differing(server: Any, expected: Dict[str, str], login: bool = False) -> Dict[str, str]:
    """Where the server differs; if that is not where it is expected to, it is given more time, since the computer may be busy."""
    found = complaints(examine(server, login, timeout=0.5))
    return found if found == expected else complaints(examine(server, login, timeout=3))


def listens(address: Tuple[str, int]) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0


@needs_ipv6
@needs_neighbour
@pytest.mark.parametrize(("login", "differences"), [(False, MICROSOCKS), (True, {**MICROSOCKS, "password_with_nul": "fail"})])
def test_microsocks_differs_where_we_know_it(closed_port: Any, login: bool, differences: Dict[str, str]) -> None:
    host, port = closed_port()
    with program((host, port), need("microsocks"), "-i", host, "-p", port, *["-u", "anna", "-P", "sesame"] * login) as server:
        assert differing(server, differences, login) == differences


@pytest.fixture
def dante(tmp_path: Path, closed_port: Any) -> Iterator[Tuple[str, int]]:
    """The address of Dante, a server."""
    danted, (host, port) = need("danted", "sockd"), closed_port()
    (tmp_path / "conf").write_text(f"""
        errorlog: /dev/null
        internal: {host} port = {port}
        external: {host}
        socksmethod: none
        clientmethod: none
        user.unprivileged: {getpass.getuser()}
        client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
        socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: bind connect udpassociate bindreply udpreply }}
    """)
    with program((host, port), danted, "-f", tmp_path / "conf") as server:
        yield server


@needs_ipv6
@needs_neighbour
def test_dante_differs_where_we_know_it(dante: Any) -> None:
    assert differing(dante, DANTE) == DANTE


def in_front_of(server: Any) -> Type[UpstreamHandler]:
    return type("Near", (UpstreamHandler,), {"upstream": proxy_of(server)})


@needs_ipv6
@needs_neighbour
def test_a_server_behind_ours_makes_no_difference_if_it_is_ours(start_server: Any) -> None:
    assert complaints(examine(start_server(in_front_of(start_server())))) == {}


@needs_ipv6
@needs_neighbour
def test_dante_behind_our_server(start_server: Any, dante: Any) -> None:
    differences = {"connect_ipv6": "warn", "udp_ipv6": "warn", "reset": "warn"}
    assert differing(start_server(in_front_of(dante)), differences) == differences


# --- the program ---

def run(*words: object) -> Any:
    argv = [sys.executable, "-m", "socks5srv.check", *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, timeout=TIMEOUT * 3, capture_output=True, text=True, check=False)


def test_the_table_and_the_exit_code_of_a_good_server(start_server: Any) -> None:
    done = run("{}:{}".format(*start_server().server_address))
    assert (done.returncode, done.stderr) == (0, "")
    head, first, *_others = lines = done.stdout.splitlines()
    assert head == "RFC 1928 section 3"
    assert first == "  pass  Method 00 alone is selected, or refused for want of a password  00, or FF                00"
    assert re.fullmatch(r"\d+ pass, 0 fail, 0 warn, \d+ skip", lines[-1])
    assert len([line for line in lines if line.startswith("  ")]) == len(QUESTIONS)


def test_the_answers_for_programs(start_server: Any) -> None:
    place = "{}:{}".format(*start_server(ANY_FAILURE_IS_01, users=USERS).server_address)
    done = run(place, "--user", "anna:sesame", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["server"] == place
    assert told["counts"]["fail"] == 0 < told["counts"]["warn"]
    assert sum(told["counts"].values()) == len(QUESTIONS)
    assert {"name": "refused", "section": "RFC 1928 section 6", "question": "A target that refuses is reported as such", "expected": "05",
            "observed": "01 general SOCKS server failure", "verdict": "warn"} in told["answers"]
    assert "sesame" not in done.stdout


def test_the_exit_code_of_a_bad_server(start_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["{}:{}".format(*start_server(SILENT).server_address), "--timeout", "0.5"]) == 1
    assert "  fail  A request with an unknown CMD is refused  " in capsys.readouterr().out


SAYS_NOTHING = handler_with(perform=lambda self, _request: until_the_client_leaves(self))


@pytest.mark.parametrize("go_on", [False, True])
def test_five_timeouts_in_a_row_are_enough_unless_all_is_to_be_asked(
        start_server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, go_on: bool) -> None:
    monkeypatch.setattr(check, "CLOSING", 0.02)
    assert main(["{}:{}".format(*start_server(SAYS_NOTHING).server_address), "--timeout", "0.1", *["--all"] * go_on]) == 1
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    silent = [line.endswith("nothing within 0.1 s") for line in rows if not line.startswith("  skip")]
    if go_on:
        assert (len(rows), err) == (len(QUESTIONS), "")
    else:
        assert silent[-6:] == [False] + [True] * 5
        assert err == "python -m socks5srv.check: stopped after 5 timeouts in a row; --all goes on\n"


@pytest.mark.parametrize(("answer", "message"), [
    (b"<!DOCTYPE html>", r"it answers 3c 21 \(HTTP\?\)"), (b"HTTP/1.0 400 ", r"it answers 48 54 \(HTTP\?\)"),
    (b"SSH-2.0-x", r"it answers 53 53 \(SSH\?\)"), (b"\x04\x5b", "it answers 04 5b"), (b"\5", "it answers 05"), (b"", "it closes the connection.*"),
    (None, "it is silent for 0.2 s"),
])
@pytest.mark.parametrize("json_too", [False, True])
def test_what_does_not_speak_socks5_is_asked_only_once(
        listen: Any, capsys: pytest.CaptureFixture[str], answer: Any, message: str, json_too: bool) -> None:
    listener = listen()
    place = "{}:{}".format(*listener.getsockname())

    def serve() -> None:
        with listener.accept()[0] as sock:
            while sock.recv(100) and answer != b"":     # it answers when the other side has ended, as a web server may
                pass
            sock.sendall(answer or b"")

    done = in_thread(serve) if answer is not None else lambda: None
    assert main([place, "--timeout", "0.2", *["--json"] * json_too]) == 2
    done()
    out, err = capsys.readouterr()
    error = f"{place} does not speak SOCKS5: {message}"
    assert re.fullmatch(f"python -m socks5srv.check: error: {error}\n", err)
    assert re.fullmatch(error, json.loads(out)["error"]) if json_too else not out


def test_a_server_that_is_not_there_is_told(refusing: Any) -> None:
    done = run("%s:%d" % refusing())
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"python -m socks5srv.check: error: cannot connect to 127.0.0.1:\d+: Connection refused\n", done.stderr)


@pytest.mark.parametrize(("words", "message"), [
    ("", "required: HOST:PORT"),
    *((place, "expected HOST:PORT") for place in ("1080", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "::1:1080")),
    ("no-such-host.invalid:1080", "invalid host"),
    ("192.0.2.1:1080", "--target has to say how it can reach this one"),
    ("192.0.2.1:1080 --target 2001:db8::1", "is not an address of this computer"),
    ("127.0.0.1:1080 --target no-such-host.invalid", "invalid --target"),
    ("127.0.0.1:1080 --user anna", "NAME:PASSWORD"), ("127.0.0.1:1080 --user :sesame", "NAME:PASSWORD"),
    (f"127.0.0.1:1080 --user anna:{'x' * 256}", "255 bytes at most"),
    ("127.0.0.1:1080 --timeout 0", "seconds above 0"),
])
def test_wrong_usage_is_told(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "sesame" not in told


@pytest.mark.parametrize(("host", "target", "other"), [
    pytest.param(LOCALHOST, "127.0.0.2", "ipv6", marks=needs_neighbour), pytest.param("::1", "::1", "ipv4", marks=needs_ipv6),
])
def test_the_target_can_be_another_address_of_this_computer(start_server: Any, host: str, target: str, other: str) -> None:
    answers = examine(start_server(address=(host, 0)), target=target)
    assert complaints(answers) == {}
    assert {f"connect_{other}", f"udp_{other}"} <= set(verdicts(answers, "skip"))


def test_a_session_is_over_before_the_next_begins(start_server: Any) -> None:
    """So that servers for one client at a time can be examined."""
    server = start_server(max_clients=1)
    examiner = Examiner(proxy_of(server))
    for question in QUESTIONS:
        eventually(lambda: server.registry.clients == 0)
        assert examiner.answer(question).verdict in ("pass", "skip"), question.name
