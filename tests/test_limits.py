"""
Who is served at all, how many at a time, and what clients of other protocols are told.
"""

from __future__ import annotations

import logging
import random
import re
import socket
import sys
from io import BytesIO
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from socks5srv import foreign
from socks5srv.names import ascii_form
from socks5srv.protocol import Address, Command, Credentials, Method, MethodSelection, ReplyCode, Request, Socks5Error, read_name
from socks5srv.handler import Socks5Handler
from socks5srv.registry import Registry
from socks5srv.service import log
from socks5srv.session import Session

from .conftest import LOCALHOST, eventually, exchange, handler_with, name, needs_neighbour, within

NONE, PASSWORD = MethodSelection(Method.NO_AUTHENTICATION_REQUIRED), MethodSelection(Method.USERNAME_PASSWORD)
LOOPBACK = [ip_network("127.0.0.1/32")]


# --- trusted networks ---

@needs_neighbour
def test_clients_in_a_trusted_network_need_no_login_and_all_others_do(start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(users={"anna": "sesame"}, allow_from=LOOPBACK)
    client = new_client(server)
    client.connect(echo)
    exchange(client)
    other = new_client(server, source="127.0.0.2")
    assert other.greet(0, 2) == PASSWORD
    assert new_client(server, source="127.0.0.2").greet(0) == MethodSelection(Method.NO_ACCEPTABLE_METHODS)


@needs_neighbour
def test_without_users_everybody_else_is_hung_up_on(start_server: Any, new_client: Any) -> None:
    server = start_server(allow_from=LOOPBACK)
    assert new_client(server).greet() == NONE
    assert new_client(server, source="127.0.0.2").rest() == b""


# --- how many ---

def test_more_clients_than_fit_are_hung_up_on_until_one_leaves(start_server: Any, new_client: Any, caplog: Any) -> None:
    server = start_server(max_clients=3)
    clients = [new_client(server) for _ in range(3)]
    for client in clients:
        assert client.greet() == NONE
    for _ in range(5):
        assert new_client(server).rest() == b""
    assert caplog.text.count("limit of") == 1
    clients[0].close()
    eventually(lambda: server.registry.clients == 2)
    assert new_client(server).greet() == NONE


@needs_neighbour
def test_one_address_cannot_take_all_places(start_server: Any, new_client: Any) -> None:
    server = start_server(max_per_client=2)
    for _ in range(2):
        assert new_client(server).greet() == NONE
    assert new_client(server).rest() == b""
    assert new_client(server, source="127.0.0.2").greet() == NONE
    assert dict(server.registry.hosts) == {"127.0.0.1": 2, "127.0.0.2": 1}


def test_each_client_that_leaves_makes_room_for_one(start_server: Any, new_client: Any) -> None:
    server = start_server(max_per_client=3)
    clients = [new_client(server) for _ in range(3)]
    for client in clients:
        assert client.greet() == NONE
    clients[0].close()
    eventually(lambda: server.registry.hosts[LOCALHOST] == 2)
    assert new_client(server).greet() == NONE
    assert new_client(server).rest() == b""
    assert dict(server.registry.hosts) == {LOCALHOST: 3}


def test_nobody_is_counted_who_has_left(start_server: Any, new_client: Any) -> None:
    server = start_server(max_per_client=2)
    for _ in range(5):
        new_client(server).close()
        server.next_ended()
    eventually(lambda: not server.registry.hosts)


def test_as_many_may_be_slow_to_ask_as_the_setting_says(start_server: Any, new_client: Any) -> None:
    server = start_server(max_handshakes=2)
    slow = [new_client(server) for _ in range(2)]
    eventually(lambda: len(server.registry.handshakes) == 2)
    for client in slow:
        assert client.greet() == NONE


def test_a_handshake_has_the_time_that_the_setting_says(start_server: Any, new_client: Any) -> None:
    server = start_server(handshake_timeout=100)
    client = new_client(server)
    assert client.greet() == NONE
    [handler] = server.registry.live.values()
    handler.session.clock -= 99
    server.registry.hang_up_on_slow(server.handshake_timeout)
    assert handler.session.reason == ""
    handler.session.clock -= 1
    server.registry.hang_up_on_slow(server.handshake_timeout)
    assert client.rest() == b""
    assert server.next_ended().reason == "the handshake took too long"


def test_clients_are_counted_by_one_thread_at_a_time(start_server: Any, new_client: Any, echo: Any) -> None:
    locked: List[bool] = []

    class Watching(Registry):       # type: ignore[type-arg]
        def count(self, host: str) -> Any:
            locked.append(self.lock.locked())
            return super().count(host)

        def release(self, host: str) -> None:
            locked.append(self.lock.locked())
            super().release(host)

    server = start_server()
    server.registry = Watching(server, server.policy.throttle)
    for _ in range(3):
        with new_client(server) as client:
            client.connect(echo)
        server.next_ended()
    assert locked == [True] * 6


def test_half_open_handshakes_make_room_for_those_who_speak(start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(max_handshakes=10)
    silent = [new_client(server) for _ in range(30)]
    speaking = new_client(server)
    speaking.connect(echo)
    exchange(speaking)
    assert silent[0].rest() == b""              # the oldest went first
    assert server.next_ended().reason == "too many clients were slower to ask than this one"
    eventually(lambda: len(server.registry.handshakes) <= 10)


@pytest.mark.parametrize("max_clients", [None, 1000])
def test_as_many_are_served_as_descriptors_allow(
        max_clients: Any, monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, caplog: Any) -> None:
    from socks5srv import descriptors as module

    monkeypatch.setattr(module, "descriptor_limit", lambda: 40)
    server = start_server(max_clients=max_clients)
    assert server.registry.most_clients == 3
    clients = [new_client(server) for _ in range(3)]
    for client in clients:
        assert client.greet() == NONE
    assert new_client(server).rest() == b""
    assert "see ulimit -n" in caplog.text
    clients[0].close()
    eventually(lambda: not module.descriptors.are_scarce())
    assert new_client(server).greet() == NONE


def test_threads_that_cannot_be_had_cost_clients_a_wait_and_nothing_else(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, echo: Any) -> None:
    from socks5srv.listener import Listener

    server = start_server()

    def none_left(_listener: Listener) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Listener, "add_thread", none_left)
    for _ in range(5):
        client = new_client(server)
        client.connect(echo)
        exchange(client)


# --- other protocols ---

def ask(client: Any, octets: bytes) -> bytes:
    client.send(octets)
    return bytes(client.rest())


@pytest.mark.parametrize("request_line", [
    b"GET / HTTP/1.1", b"GET http://example.com/ HTTP/1.1", b"CONNECT example.com:443 HTTP/1.1", b"POST / HTTP/1.0", b"HEAD / HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"DELETE / HTTP/1.1", b"PUT / HTTP/1.1", b"PATCH / HTTP/1.1", b"TRACE / HTTP/1.1",
])
def test_http_gets_a_page_that_says_what_to_set(request_line: bytes, start_server: Any, new_client: Any) -> None:
    server = start_server()
    answer = ask(new_client(server), request_line + b"\r\nHost: example.com\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 501 ")
    assert b"Content-Length: %d" % len(body) in head
    assert b"socks5h://127.0.0.1:%d" % server.server_address[1] in body
    session = server.next_ended()
    assert session.outcome == "bad_protocol"
    assert session.reason == f"this is HTTP: use socks5h://127.0.0.1:{server.server_address[1]}"


def test_http_may_come_octet_by_octet(start_server: Any, new_client: Any) -> None:
    server = start_server()
    client = new_client(server)
    client.drip(b"CONNECT example.com:443 HTTP/1.1\r\n")
    assert client.rest().startswith(b"HTTP/1.1 501 ")
    assert server.next_ended().reason.startswith("this is HTTP")


@pytest.mark.parametrize("octets", [b"P\x00", b"P\xff" * 3000, b"GE\n", b"GET/", b"GETS ", b"get ", b"POSTER ", b"CONNECTED ", b"Dear proxy", b"GET\t/ HTTP/1.1\r\n\r\n"])
def test_a_letter_does_not_make_http_of_noise(octets: bytes, start_server: Any, new_client: Any) -> None:
    """It is hung up on at once: nothing that might come could make a method of it."""
    server = start_server()
    client = new_client(server)
    client.send(octets)
    assert client.rest() == b""
    session = server.next_ended()
    assert session.reason == f"this is not SOCKS: it begins with {octets[:3].hex(' ')}"


@pytest.mark.parametrize("path", [b"/proxy.pac", b"/proxy.pac?now"])
def test_a_browser_gets_the_pac_file(path: bytes, start_server: Any, new_client: Any) -> None:
    server = start_server()
    answer = ask(new_client(server), b"GET " + path + b" HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ns-proxy-autoconfig\r\n")
    assert b'return "SOCKS5 127.0.0.1:%d; SOCKS 127.0.0.1:%d";' % (server.server_address[1], server.server_address[1]) in answer


def test_other_computers_get_no_pac_file_from_a_server_for_this_one(start_server: Any, new_client: Any) -> None:
    assert ask(new_client(start_server(elsewhere=True)), b"GET /proxy.pac HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 501 ")


@pytest.mark.parametrize("more", [[], [("0.0.0.0", 0)]], ids=["the only address", "one of two"])
def test_other_computers_get_the_pac_file_from_a_server_for_them(more: List[Any], start_server: Any, new_client: Any) -> None:
    server = start_server(Socks5Handler, (LOCALHOST if more else "0.0.0.0", 0), *more, elsewhere=True)
    client = new_client((LOCALHOST, server.addresses[-1][1]))
    assert ask(client, b"GET /proxy.pac HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")


def test_an_http_request_that_never_ends_its_line_is_answered_all_the_same(start_server: Any, new_client: Any) -> None:
    client = new_client(start_server())
    client.send(b"GET /" + b"x" * 100_000)
    client.end()
    assert client.rest().startswith(b"HTTP/1.1 501 ")


def test_of_an_http_request_only_so_much_is_waited_for(start_server: Any, new_client: Any) -> None:
    client = new_client(start_server())
    client.send(b"GET /" + b"x" * foreign.MOST)
    assert client.exactly(12) == b"HTTP/1.1 501"


def test_socks4_gets_its_own_refusal(start_server: Any, new_client: Any) -> None:
    server = start_server()
    assert ask(new_client(server), b"\x04\x01\x00\x50\x7f\x00\x00\x01me\x00") == bytes((0, 91, 0, 0, 0, 0, 0, 0))
    assert server.next_ended().reason == "this is SOCKS4: set the client to SOCKS5"


@pytest.mark.parametrize(("octets", "reason"), [
    (b"\x16\x03\x01\x02\x00\x01", "this is TLS: the proxy's address begins with socks5h://, not https://"),
    (b"SSH-2.0-x\r\n", "this is not SOCKS: it begins with 53 53 48"), (b"\x00", "this is not SOCKS: it begins with 00"),
    (b"GET", "this is not SOCKS: it begins with 47 45 54"), (b"P", "this is not SOCKS: it begins with 50"),
    (b"", "the client closed without a word"),
])
def test_others_are_hung_up_on_without_an_answer(octets: bytes, reason: str, start_server: Any, new_client: Any) -> None:
    server = start_server()
    client = new_client(server)
    client.send(octets)
    client.end()
    assert client.rest() == b""
    assert server.next_ended().reason == reason


def test_the_same_mistake_of_the_same_client_is_logged_once(start_server: Any, new_client: Any, caplog: Any) -> None:
    caplog.set_level("INFO", "socks5srv")
    server = start_server()
    for _ in range(5):
        ask(new_client(server), b"GET / HTTP/1.1\r\n\r\n")
        server.next_ended()
    assert caplog.text.count("this is HTTP") == 1


def test_the_next_line_of_a_mistake_says_how_many_were_left_out(
        start_server: Any, new_client: Any, caplog: Any) -> None:
    caplog.set_level("INFO", "socks5srv")
    server = start_server()

    def come() -> None:
        ask(new_client(server), b"GET / HTTP/1.1\r\n\r\n")
        server.next_ended()

    for _ in range(5):
        come()
    server.rate_limit.interval = 0.0
    come()
    come()
    first, second, third = [record for record in caplog.records if "this is HTTP" in record.getMessage()]
    assert second.getMessage().endswith(" (and 4 more since the last line like this)")
    assert [record.left_out for record in (first, second, third)] == [0, 4, 0]
    for record in (first, third):
        assert "more" not in record.getMessage()


def test_trouble_with_clients_that_are_turned_away_is_counted_as_well(
        start_server: Any, new_client: Any, caplog: Any) -> None:
    server = start_server(max_clients=1)
    assert new_client(server).greet() == NONE
    for _ in range(4):
        assert new_client(server).rest() == b""
    server.rate_limit.interval = 0.0
    assert new_client(server).rest() == b""
    first, second = eventually(lambda: [record for record in caplog.records if "limit of" in record.getMessage()][1:] and caplog.records[-2:])
    assert "since" not in first.getMessage()
    assert second.getMessage().endswith(" (and 3 more since the last line like this)")
    assert second.facts == {"left_out": 3}


TRUSTED = {"users": {"anna": "sesame"}, "allow_from": LOOPBACK}


@pytest.mark.parametrize(("settings", "methods", "says"), [
    ({"users": {"anna": "sesame"}}, [0], "offers no password: have it log in (browsers cannot; --allow-from serves them without)"),
    ({"users": {"anna": "sesame"}}, [1, 0x80], "offers no password: have it log in"),
    ({}, [2], "only a login, and there are no users: start with -u NAME, or let it offer to need no login"),
    ({}, [1, 2, 3], "only a login, and there are no users"),
    ({}, [1], "no method that is known here: let it offer to need no login"),
    (TRUSTED, [2], "its network (--allow-from) needs none: let it offer to need no login"),
])
def test_a_client_without_a_usable_method_is_told_of_each_time_with_what_would_help(
    start_server: Any, new_client: Any, caplog: Any, settings: Any, methods: List[int], says: str,
) -> None:
    caplog.set_level("INFO", "socks5srv")
    server = start_server(**settings)
    for number in (1, 2):
        assert new_client(server).greet(*methods) == MethodSelection(Method.NO_ACCEPTABLE_METHODS)
        session = server.next_ended()
        assert session.outcome == "no_acceptable_method"
        assert says in session.reason
        assert caplog.text.count("no-acceptable-method the client offers ") == number


def test_a_subclass_that_takes_no_method_has_reasons_of_its_own(start_server: Any, new_client: Any) -> None:
    server = start_server(handler_with(select_method=lambda _self, _offered: Method.NO_ACCEPTABLE_METHODS))
    assert new_client(server).greet(0) == MethodSelection(Method.NO_ACCEPTABLE_METHODS)
    session = server.next_ended()
    assert (session.outcome, session.reason) == ("no_acceptable_method", "none of the methods that the client offers will do")


@given(st.binary(min_size=1, max_size=12) | st.sampled_from([b"GET", b"POST", b"OPTIONS", b"CONNECT"]).flatmap(
    lambda word: st.integers(1, len(word)).map(lambda length: word[:length]) | st.binary(max_size=3).map(lambda rest: word + rest)))
@example(b"GET ")
@example(b"P")
def test_only_what_can_still_become_a_method_is_waited_for(octets: bytes) -> None:
    words = [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE "]
    http = any(octets.startswith(word) for word in words)
    assert foreign.unsettled(octets) == ((http and b"\n" not in octets) or any(word.startswith(octets) for word in words))
    assert (foreign.identify(octets, Address.numeric(LOCALHOST, 1080), pac=False).kind == "http") is http


# --- what a log watcher sees ---

# As README.rst gives it to fail2ban, which puts a pattern for addresses in place of <HOST>.
FAIL2BAN = r"^\s*(?:\S+ \S+\[\d+\]: )?[-:\d ]*#\d+ \[?<HOST>\]?:\d+ \S+ - - login-failed "
HOST = r"(?P<host>[\w.:^-]*\w)"      # as fail2ban has it, or wider
PLACES = ("2026-01-02 03:04:05 ", " ", "", "03:04:05 ", "host socks5srv[17]: 03:04:05 ")      # a file, and without its date; a terminal; the journal


def test_the_documented_fail2ban_filter_finds_the_address_of_a_failed_login(start_server: Any, new_client: Any) -> None:
    server = start_server(users={"anna": "sesame"})
    lines: List[str] = []
    for username in ("anna", "an na", "x - - login-failed", "#9 192.0.2.1:5 y - - login-failed z"):
        client = new_client(server)
        client.greet(Method.USERNAME_PASSWORD)
        client.login(username, "guess")
        client.close()
        lines.append(str(server.next_ended()))
    for line in (place + line for line in lines for place in PLACES):
        assert banned(line) == [LOCALHOST], line


def test_the_fail2ban_filter_is_the_one_that_the_manual_gives() -> None:
    assert f"failregex = {FAIL2BAN}\n" in (Path(__file__).parent.parent / "README.rst").read_text(encoding="utf-8")


def banned(lines: str, pattern: str = FAIL2BAN) -> List[str]:
    """Whom the filter takes for somebody whose login has failed."""
    found = (re.search(pattern.replace("<HOST>", HOST), line) for line in lines.split("\n"))
    return [match["host"] for match in found if match]


FORGED = ["x #9 198.51.100.7:5 root - - login-failed x", "\n#9 198.51.100.7:5 root - - login-failed x", "#9 198.51.100.7:5 root - - login-failed ",
          "198.51.100.7:5", "root - - login-failed ", "- - login-failed ", "h s[1]: #9 [198.51.100.7]:5 a - - login-failed "]
PIECES = [*FORGED, " ", "\n", "\r", "\u2028", "\u3000", "\xa0", "#9", "x", "\x1b[2J", "\ufdfa", "'", '"', "\\x20", ".", ":", "\u202e", "\t", "\xff", "\uff03", "a" * 70]


def hostile_name(dice: random.Random) -> str:
    """Some of the pieces; not more than a message has room for."""
    text = "".join(dice.choice(PIECES) for _ in range(dice.randrange(1, 6)))
    return text.encode()[:255].decode(errors="ignore") or "x"


def error_of(function: Callable[[Any], Any], argument: Any) -> Any:
    """What is raised; or what is returned."""
    try:
        return function(argument)
    except (Socks5Error, UnicodeError) as error:
        return error


def sessions_of(text: str) -> Iterator[Session]:
    """One whose name, reason or destination comes from the wire, for all that can quote one."""
    address = bytes((len(text.encode()),)) + text.encode() + b"\0\7"
    request = b"\5\1\0\3" + address, b"\5\x99\0\3" + address
    for reason in (
        *(error_of(Request.read, BytesIO(octets)) for octets in request), error_of(read_name, text.encode()), error_of(read_name, text.encode() + b"\xff"),
        error_of(ascii_form, text), error_of(lambda octets: foreign.identify(octets, Address.numeric(LOCALHOST, 1080), pac=True), text.encode()),
    ):
        made = Session(1, Address.numeric("192.0.2.1", 1))
        made.command, made.destination = Command.CONNECT, name(text, 1)
        if isinstance(reason, Exception):
            made.end(str(reason))
        yield made
    made = Session(1, Address.numeric("192.0.2.1", 1))
    made.user, made.command, made.destination, made.peer = text, Command.BIND, name(text, 1), name(text, 2)
    made.end()
    yield made


def lines_of(text: str) -> Iterator[str]:
    """All that the log can have of a client that sends this instead of a name, but for a failed login."""
    formatter = log.TextFormatter(color=False)
    request = error_of(Request.read, BytesIO(b"\5\1\0\3" + bytes((len(text.encode()),)) + text.encode() + b"\0\7"))
    for message in (*sessions_of(text), f"#1 < {Credentials(text.encode(), b'')}", f"#1 < {request}"):
        yield formatter.format(logging.LogRecord("socks5srv", logging.INFO, "", 0, "%s", (message,), None))
    try:
        raise ValueError(f"no user {text}")             # of an overridden method
    except ValueError:
        yield formatter.format(logging.LogRecord("socks5srv", logging.ERROR, "", 0, "a bug", (), sys.exc_info()))


def test_ten_thousand_hostile_names_ban_nobody_but_the_client_that_has_failed_to_log_in() -> None:
    dice = random.Random(1929)
    for text in (*FORGED, *(hostile_name(dice) for _ in range(10_000))):
        for lines in lines_of(text):
            assert banned(lines) == [], lines
            assert not lines.startswith("|")
            # Nor with a filter that looks anywhere in a line, except in the text of somebody else's error.
            assert "\n| " in lines or banned(lines, FAIL2BAN.replace("^", "", 1)) == [], lines
        session = Session(1, Address.numeric("192.0.2.1", 1))
        session.user, session.login_failed = text, True
        session.end("wrong name or password")
        assert banned(f"03:04:05 {session}") == ["192.0.2.1"]


# --- one peer never costs another ---

def test_a_flood_of_datagrams_leaves_room_for_a_tunnel(start_server: Any, new_client: Any, echo: Any) -> None:
    import threading
    import time

    from socks5srv.protocol import UNSPECIFIED, Address, Datagram

    server = start_server()
    relay = new_client(server).ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    client = new_client(server)
    client.connect(echo)
    stop = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            datagram = bytes(Datagram(Address.numeric(LOCALHOST, 9), b"x" * 100))
            while not stop.is_set():
                sock.sendto(datagram, relay[:2])

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        began = time.monotonic()
        for _ in range(20):
            exchange(client)
        assert (time.monotonic() - began) / 20 < within(0.1)
    finally:
        stop.set()
        thread.join()


def test_a_target_that_does_not_answer_holds_up_nobody_else(start_server: Any, new_client: Any, silent: Any, echo: Any) -> None:
    from socks5srv.protocol import Greeting, Request

    from .conftest import address_of

    server = start_server(connect_timeout=0.5)
    waiting = [new_client(server) for _ in range(30)]
    for client in waiting:
        client.send(Greeting(b"\0"), Request(Command.CONNECT, address_of(silent())))
    quick = new_client(server)
    quick.connect(echo)
    exchange(quick)
    for client in waiting:
        client.exactly(2)
        from socks5srv.protocol import Reply

        assert Reply.read(client).code is ReplyCode.TTL_EXPIRED




def test_look_ups_that_hang_are_bounded_and_cost_other_names_only(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, echo: Any) -> None:
    import threading

    from socks5srv import resolver
    from socks5srv.protocol import Greeting, Reply, Request

    from .conftest import name

    monkeypatch.setattr(resolver.look_ups, "share", 3)
    release = threading.Event()

    class Hanging(Socks5Handler):
        def resolve(self, host: str) -> List[str]:
            assert release.wait(10)
            return []

    server = start_server(handler=Hanging, connect_timeout=0.5)
    clients = [new_client(server) for _ in range(8)]
    for client in clients:
        client.send(Greeting(b"\0"), Request(Command.CONNECT, name("slow.invalid", 80)))
        client.exactly(2)
    quick = new_client(server)
    quick.connect(echo)
    exchange(quick)
    assert sorted(Reply.read(client).code for client in clients) == [1] * 5 + [4] * 3
    release.set()


def test_a_clock_that_jumps_changes_no_deadline(monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, echo: Any) -> None:
    import time

    now = time.time()
    server = start_server(idle_timeout=100)
    monkeypatch.setattr(time, "time", lambda: now)
    client = new_client(server)
    client.connect(echo)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        exchange(client)
    client.close()
    assert 0 <= server.next_ended().seconds < within(10)
