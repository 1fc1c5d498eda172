"""The server's side of RFC 1961: who gets in, at what level, and what is said to whoever does not."""

from __future__ import annotations

import gc
import os
import time
from typing import Any, List

import pytest

pytest.importorskip("gssapi")

from socks5srv.client import Proxy, connect
from socks5srv.gssapi.context import KRB5, SPNEGO, Acceptor, Initiator, Protection
from socks5srv.gssapi.handler import Gssapi, GssapiHandler
from socks5srv.gssapi.messages import Abort, ContextToken, Level, LevelToken
from socks5srv.protocol import Command, Method, MethodSelection, ReplyCode, Request
from socks5srv.server import Socks5Server

from ..conftest import LOCALHOST, address_of, descriptors, eventually, exchange, handler_with, in_thread, needs_ipv6, needs_proc
from ..kerberos import CLIENTS, REALM, Realm, credentials_of
from .harness import AnyInitiator, Flag, KerberosClient

ALICE = f"alice@{REALM}"
NONE, GSSAPI, PASSWORD, REFUSED = Method
ONE_WAY = (Flag.replay_detection, Flag.confidentiality, Flag.integrity)     # the client does not ask who the server is
BOTH_WAYS = (*ONE_WAY, Flag.mutual_authentication)


def refused(client: Any, server: Any) -> str:
    """Whether it has been told 01 FF soon, and nothing else; why, in the log."""
    began = time.monotonic()
    assert client.exactly(2) == bytes(Abort())
    assert time.monotonic() - began < 1
    client.end()
    assert client.rest() == b""
    session = server.next_ended()
    assert session.outcome == "login_failed"
    return str(session.reason)


def broken_off(client: Any, server: Any) -> str:
    """Whether it has been broken off without a word; why, in the log."""
    with pytest.raises(ConnectionResetError):
        assert client.socket.recv(100) == b"nothing at all"
    return str(server.next_ended().reason)


# --- which method ---

METHODS: List[Any] = [
    # users, networks that need no login, methods that are offered, the one that is selected
    (None, (), [GSSAPI], GSSAPI), (None, (), [NONE, GSSAPI], GSSAPI), (None, (), [GSSAPI, PASSWORD], GSSAPI),
    (None, (), [NONE], REFUSED), (None, (), [PASSWORD], REFUSED), (None, (), [NONE, PASSWORD], REFUSED),
    ({"ben": "4711"}, (), [GSSAPI], GSSAPI), ({"ben": "4711"}, (), [NONE, GSSAPI], GSSAPI), ({"ben": "4711"}, (), [PASSWORD], PASSWORD),
    ({"ben": "4711"}, (), [NONE], REFUSED),
    ({"ben": "4711"}, (), [NONE, GSSAPI, PASSWORD], PASSWORD),     # curl with a password, and perhaps no ticket
    (None, ["127.0.0.0/8"], [NONE], NONE), (None, ["127.0.0.0/8"], [NONE, GSSAPI], NONE), (None, ["127.0.0.0/8"], [GSSAPI], GSSAPI),
    (None, ["192.0.2.0/24"], [GSSAPI], GSSAPI), (None, ["192.0.2.0/24"], [NONE, GSSAPI], GSSAPI), (None, ["192.0.2.0/24"], [NONE], REFUSED),
    ({"ben": "4711"}, ["127.0.0.0/8"], [GSSAPI, PASSWORD], GSSAPI),
]


@pytest.mark.parametrize(("users", "allow_from", "offered", "selected"), METHODS)
def test_no_method_is_selected_but_kerberos_unless_the_server_says_so(
    new_server: Any, new_client: Any, users: Any, allow_from: Any, offered: List[Method], selected: Method,
) -> None:
    server = new_server(users=users, allow_from=allow_from)
    client = new_client(server)
    assert client.greet(*offered) == MethodSelection(selected)
    client.close()
    if selected is REFUSED and not users:
        assert "GSSAPI" in server.next_ended().reason


@pytest.mark.parametrize(("offered", "selected"), [([NONE, GSSAPI], NONE), ([GSSAPI, PASSWORD, NONE], NONE), ([GSSAPI], REFUSED)])
def test_a_server_without_kerberos_ignores_that_it_is_offered(start_server: Any, new_client: Any, offered: Any, selected: Method) -> None:
    assert new_client(start_server()).greet(*offered) == MethodSelection(selected)


def test_with_users_a_password_does_as_well(new_server: Any, echo: Any) -> None:
    server = new_server(users={"ben": "4711"})
    with connect(Proxy(*server.server_address, username=b"ben", password=b"4711"), *echo) as sock:
        exchange(sock)
    assert server.next_ended().user == "ben"


def test_who_has_not_logged_in_asks_for_nothing(new_server: Any, new_client: Any, echo: Any) -> None:
    for ahead in (b"", bytes(ContextToken(b"junk"))):
        client = new_client(new_server())
        assert client.greet(NONE, GSSAPI) == MethodSelection(GSSAPI)
        client.send(ahead, Request(Command.CONNECT, address_of(echo)))
        assert client.rest() == bytes(Abort())


def test_only_a_handler_that_asks_for_it_gets_the_setting(kerberos: Realm) -> None:
    gssapi = Gssapi(str(kerberos.keytab))
    with pytest.raises(ValueError, match="GssapiHandler"):
        Socks5Server((LOCALHOST, 0), gssapi=gssapi)
    with Socks5Server(("0.0.0.0", 0), GssapiHandler, gssapi=gssapi) as server:
        server.add_listener(("0.0.0.0", 0))     # it is no open proxy
    with Socks5Server(("0.0.0.0", 0), type("Own", (GssapiHandler,), {"gssapi": gssapi})), pytest.raises(ValueError, match="open proxy"):
        Socks5Server(("0.0.0.0", 0), handler_with())


@pytest.mark.usefixtures("kerberos")
def test_a_handler_that_nobody_has_told_a_keytab_lets_nobody_in(start_server: Any, new_client: Any, bugs: List[Any]) -> None:
    client = new_client(start_server(GssapiHandler))
    client.greet(GSSAPI)
    client.send(ContextToken(b"junk"))
    assert client.rest() == b""
    eventually(lambda: bugs)
    assert "gssapi=Gssapi" in str(bugs.pop().exc_info)


@pytest.mark.parametrize("levels", [(), (3,), (1, 4), (-1,)])
def test_levels_that_there_are_not_are_refused(kerberos: Realm, levels: Any) -> None:
    with pytest.raises(ValueError, match="levels"):
        Gssapi(str(kerberos.keytab), levels=levels)


# --- the context ---

@pytest.mark.parametrize("level", [1, 2])
def test_r52_who_has_a_ticket_gets_in_and_is_known(new_server: Any, new_kerberos: Any, echo: Any, level: int) -> None:
    server = new_server()
    client = new_kerberos(server)
    assert client.enter(level) == level
    client.connect(echo)
    client.exchange()
    client.close()
    session = server.next_ended()
    assert (session.user, session.outcome, session.up, session.down) == (ALICE, "close", 5, 5)


@pytest.mark.parametrize("arguments", [(ONE_WAY,), (ONE_WAY, SPNEGO), (BOTH_WAYS, SPNEGO)], ids=["one way", "one way by SPNEGO", "SPNEGO"])
def test_r49_a_client_need_not_ask_who_the_server_is_nor_for_kerberos_itself(new_server: Any, new_kerberos: Any, echo: Any, arguments: Any) -> None:
    server = new_server()
    client = new_kerberos(server, AnyInitiator(*arguments))
    assert client.enter() == Level.CONFIDENTIALITY
    client.connect(echo)
    client.exchange()
    client.close()
    assert server.next_ended().user == ALICE


@pytest.mark.parametrize("mech", [KRB5, SPNEGO], ids=["krb5", "SPNEGO"])
def test_r52_the_server_goes_on_while_there_are_tokens(new_server: Any, new_kerberos: Any, mech: Any) -> None:
    """Three of them (DCE style), which is as many as this library can be brought to."""
    client = new_kerberos(new_server(), AnyInitiator((*BOTH_WAYS, Flag.dce_style), mech))
    client.greet(GSSAPI)
    client.send(ContextToken(client.initiator.step()))
    token = client.initiator.step(ContextToken.read(client).token)
    assert token
    client.send(ContextToken(token))
    assert ContextToken.read(client).token == b"" or mech is SPNEGO


def test_r53_a_context_that_is_complete_without_a_token_is_said_to_be_by_an_empty_one(new_server: Any, new_kerberos: Any) -> None:
    client = new_kerberos(new_server(), AnyInitiator(ONE_WAY))
    client.greet(GSSAPI)
    client.send(ContextToken(client.initiator.step()))
    assert client.exactly(4) == b"\x01\x01\x00\x00"


@pytest.mark.parametrize("flags", [BOTH_WAYS, ONE_WAY], ids=["both ways", "one way"])
def test_r50_every_message_may_come_octet_by_octet(new_server: Any, new_kerberos: Any, echo: Any, flags: Any) -> None:
    client = new_kerberos(new_server(), AnyInitiator(flags))
    client.send = lambda *messages: client.drip(client.encoded(*messages))
    client.enter()
    client.connect(echo)
    client.exchange()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_e3_all_may_come_at_once(new_server: Any, new_kerberos: Any, echo: Any, level: int) -> None:
    """A client that does not ask who the server is knows all that it will say."""
    client = new_kerberos(new_server(levels=(0, 1, 2)), AnyInitiator(ONE_WAY))
    first, wrapped = ContextToken(client.initiator.step()), client.wrapped(level)
    messages = [Request(Command.CONNECT, address_of(echo)), b"hello"]
    protection = Protection(client.initiator, Level(level)) if level else None
    client.socket.sendall(b"".join([
        b"\x05\x01\x01", bytes(first), bytes(wrapped), *(protection.encode(bytes(each)) if protection else bytes(each) for each in messages),
    ]))
    assert client.exactly(6) == b"\x05\x01\x01\x01\x00\x00"
    assert client.initiator.unwrap(LevelToken.read(client).token)[0] == bytes([level])
    client.protection = protection
    assert client.exactly(10)[:2] == b"\x05\x00"
    assert client.exactly(5) == b"hello"


def der(tag: int, content: bytes) -> bytes:
    """One value of DER, whatever its length."""
    octets = len(content).to_bytes(3, "big")
    return bytes([tag, 0x83]) + octets + content


def padded(token: bytes) -> bytes:
    """A token of SPNEGO with this one of Kerberos in it, and as many other mechanisms to choose from as fit."""
    krb5, others = bytes.fromhex("06092a864886f712010202"), bytes.fromhex("060a2a864886f71201020263") * 5300
    offer = der(0x30, der(0xA0, der(0x30, krb5 + others)) + der(0xA2, der(0x04, token)))
    return der(0x60, bytes.fromhex("06062b0601050502") + der(0xA0, offer))


def test_a_token_may_have_nearly_64_kib(new_server: Any, new_kerberos: Any) -> None:
    client = new_kerberos(new_server(), AnyInitiator(ONE_WAY))
    client.greet(GSSAPI)
    token = padded(client.initiator.step())
    assert 64_000 < len(token) < 0xFFFF
    client.send(ContextToken(token))
    assert ContextToken.read(client).token
    assert client.agree(2) == Level.CONFIDENTIALITY


def test_a_token_may_be_as_large_as_the_groups_of_a_client_make_it(new_server: Any, new_kerberos: Any, kerberos: Realm, echo: Any) -> None:
    """Here it is the name, of which there are two in a token."""
    name = "g" * 1900
    kerberos.add(name, keytab="large.keytab")
    server = new_server()
    client = new_kerberos(server, Initiator("localhost", credentials=credentials_of(kerberos, "large")))
    client.enter()
    client.connect(echo)
    client.exchange()
    client.close()
    assert server.next_ended().user == f"{name}@{REALM}"


@needs_ipv6
def test_over_ipv6_it_is_the_same(new_server: Any, new_kerberos: Any, start_echo: Any) -> None:
    client = new_kerberos(new_server(address=("::1", 0)))
    client.enter()
    client.connect(start_echo("::1").server_address)
    client.exchange()


# --- refusals ---

GARBAGE = {
    "another VER": b"\x05\x01\x00\x01", "a level": b"\x01\x02", "a frame": b"\x01\x03", "no MTYP": b"\x01\x00", "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "an empty token": bytes(ContextToken(b"")), "a token of junk": bytes(ContextToken(b"junk")), "zeros": bytes(ContextToken(bytes(0xFFFF))),
    "random octets": bytes(ContextToken(os.urandom(700))), "a password": b"\x01\x05alice\x06secret",
}
at_every_step = pytest.mark.parametrize("step", ["token", "level"])


def at(client: Any, step: str) -> Any:
    """It has come so far."""
    if step == "token":
        client.greet(GSSAPI)
    else:
        client.establish()
    return client


@pytest.mark.parametrize("garbage", GARBAGE)
def test_r55_garbage_is_refused_where_a_token_belongs(new_server: Any, new_client: Any, garbage: str) -> None:
    server = new_server()
    client = at(new_client(server), "token")
    client.send(GARBAGE[garbage])
    assert refused(client, server).startswith("GSSAPI: ")


@pytest.mark.parametrize("garbage", [
    b"\x05\x01\x00\x01", b"\x01\x01", b"\x01\x03", b"\x01\x00", b"GET / HTTP/1.1\r\n\r\n", bytes(LevelToken(b"")), bytes(LevelToken(b"junk")),
    bytes(LevelToken(bytes(0xFFFF))), bytes(LevelToken(b"\x02")),
], ids=str)
def test_r55_so_it_is_where_a_level_belongs(new_server: Any, new_kerberos: Any, garbage: bytes) -> None:
    server = new_server()
    client = at(new_kerberos(server), "level")
    client.socket.sendall(garbage)
    assert refused(client, server).startswith("GSSAPI: ")


@pytest.mark.parametrize("octets", [b"", b"\x02\x02", bytes(1000)], ids=len)
def test_r58_a_level_is_one_octet(new_server: Any, new_kerberos: Any, octets: bytes) -> None:
    server = new_server()
    client = at(new_kerberos(server), "level")
    client.send(LevelToken(client.initiator.wrap(octets, False)))
    assert f"{len(octets)} octets" in refused(client, server)


def test_a_token_that_is_seen_again_is_refused(new_server: Any, new_client: Any) -> None:
    server, token = new_server(), ContextToken(Initiator("localhost").step())
    client = at(new_client(server), "token")
    client.send(token)
    ContextToken.read(client)
    client.close()
    server.next_ended()
    again = at(new_client(server), "token")
    again.send(token)
    assert "replay" in refused(again, server)


def test_so_is_a_level_of_another_session(new_server: Any, new_kerberos: Any) -> None:
    server = new_server()
    client, other = at(new_kerberos(server), "level"), at(new_kerberos(server), "level")
    client.send(other.wrapped(2))
    refused(client, server)


def test_so_is_a_ticket_for_a_server_that_the_keytab_does_not_know(new_server: Any, new_client: Any, kerberos: Realm) -> None:
    kerberos.add("rcmd/other.example", keytab="other.keytab")
    server = new_server()
    client = at(new_client(server), "token")
    client.send(ContextToken(Initiator("other.example").step()))
    assert "not found in keytab" in refused(client, server)


@at_every_step
def test_a_client_that_aborts_is_left_alone(new_server: Any, new_kerberos: Any, step: str) -> None:
    server = new_server()
    client = at(new_kerberos(server), step)
    client.send(Abort())
    assert client.rest() == b""
    session = server.next_ended()
    assert (session.outcome, session.reason) == ("login_failed", "the client has aborted GSSAPI")
    assert (session.user or "") == (ALICE if step == "level" else "")


@at_every_step
@pytest.mark.parametrize("beginning", [b"", b"\x01", b"\x01\x01\x00", b"\x01\x02\x00\x05abc"])
def test_so_is_one_that_leaves(new_server: Any, new_kerberos: Any, step: str, beginning: bytes) -> None:
    server = new_server()
    client = at(new_kerberos(server), step)
    client.socket.sendall(beginning.replace(b"\x01\x02", b"\x01\x01") if step == "token" else beginning.replace(b"\x01\x01", b"\x01\x02"))
    client.end()
    assert client.rest() == b""
    assert "closed the connection in mid-message" in server.next_ended().reason


@at_every_step
def test_whoever_says_nothing_more_is_hung_up_on(new_server: Any, new_kerberos: Any, step: str) -> None:
    server = new_server(handshake_timeout=0.3)
    client = at(new_kerberos(server), step)
    client.socket.sendall(b"\x01\x01\xff\xff" if step == "token" else b"\x01\x02\xff\xff")
    assert client.rest() == b""
    assert server.next_ended().reason == "the handshake took too long"


# --- who ---

@pytest.mark.parametrize(("patterns", "lets_in"), [
    ((f"*@{REALM}",), True), ((ALICE,), True), (("bob@*", "ali*"), True), ((f"[a-c]lice@{REALM}",), True),
    (("alice",), False), (("*@test.local",), False), ((f"Alice@{REALM}",), False), ((f"bob@{REALM}",), False), (("*@OTHER.REALM", ""), False),
])
def test_only_principals_of_a_pattern_get_in(new_server: Any, new_kerberos: Any, echo: Any, patterns: Any, lets_in: bool) -> None:
    server = new_server(allow=patterns)
    client = new_kerberos(server)
    if lets_in:
        client.enter()
        client.connect(echo)
        return
    client.greet(GSSAPI)
    client.send(ContextToken(client.initiator.step()))
    assert refused(client, server) == f"GSSAPI: no pattern of --gssapi-allow is '{ALICE}'"


def test_a_pattern_sees_the_escapes_of_a_principal(new_server: Any, new_kerberos: Any, kerberos: Realm) -> None:
    odd = rf"o\@dd@{REALM}"
    for patterns, lets_in in (((odd,), True), ((f"o@dd@{REALM}",), False), ((f"dd@{REALM}",), False)):
        client = new_kerberos(new_server(allow=patterns), Initiator("localhost", credentials=credentials_of(kerberos, CLIENTS[2])))
        client.greet(GSSAPI)
        client.send(ContextToken(client.initiator.step()))
        assert client.exactly(2) == (b"\x01\x01" if lets_in else b"\x01\xff")


def test_who_is_refused_is_named_in_the_log(new_server: Any, new_kerberos: Any) -> None:
    server = new_server(allow=["nobody"])
    client = new_kerberos(server)
    client.greet(GSSAPI)
    client.send(ContextToken(client.initiator.step()))
    refused(client, server)
    server = new_server(levels=(2,))
    client = at(new_kerberos(server), "level")
    client.send(client.wrapped(0))
    assert client.exactly(2) == bytes(Abort())
    client.close()
    assert server.next_ended().user == ALICE


def test_twenty_clients_at_once_are_never_taken_for_each_other(new_server: Any, new_kerberos: Any, kerberos: Realm, echo: Any) -> None:
    class Telling(GssapiHandler):
        def allow(self, _command: Command, address: Any) -> bool:
            return address.port == echo[1] or self.session.user == rf"{CLIENTS[address.port]}@{REALM}"

    server = new_server(handler=Telling)
    names = [CLIENTS[number % 3] for number in range(20)]
    clients = [new_kerberos(server, Initiator("localhost", credentials=credentials_of(kerberos, name, cache=f"{number}"))) for number, name in enumerate(names)]
    for waiting in [in_thread(client.enter, 2 - number % 2) for number, client in enumerate(clients)]:
        waiting()
    for waiting in [in_thread(client.connect, echo) for client in clients]:
        waiting()
    users = {session.client.port: session.user for session in server.sessions}
    for client, name in zip(clients, names):
        assert users[client.socket.getsockname()[1]] == f"{name}@{REALM}"
    for waiting in [in_thread(client.exchange, name.encode() * 1000) for client, name in zip(clients, names)]:
        waiting()


# --- levels ---

GRANTS: List[Any] = [
    # allowed, asked for, granted (None: refused)
    ((1, 2), 0, None), ((1, 2), 1, 1), ((1, 2), 2, 2), ((1, 2), 3, 2), ((1, 2), 4, None), ((1, 2), 0xFF, None),
    ((1,), 0, None), ((1,), 1, 1), ((1,), 2, 1), ((1,), 3, 1), ((2,), 0, None), ((2,), 1, 2), ((2,), 2, 2), ((2,), 3, 2),
    ((0, 1, 2), 0, 0), ((0, 1, 2), 1, 1), ((0, 1, 2), 2, 2), ((0, 1, 2), 3, 2), ((0, 1), 2, 1),
    ((0,), 0, 0), ((0,), 1, 0), ((0,), 2, 0), ((0,), 3, 0), ((0,), 4, None), ((0,), 0x7F, None),
]


@pytest.mark.parametrize("nec", [False, True], ids=["wrapped", "in clear"])
def test_r56_the_server_chooses_the_level(new_server: Any, new_kerberos: Any, echo: Any, nec: bool) -> None:
    servers = {levels: new_server(levels=levels, nec=nec) for levels, _asked, _granted in GRANTS}
    for levels, asked, granted in GRANTS:
        client = at(new_kerberos(servers[levels]), "level")
        if granted is None:
            client.send(LevelToken(bytes([asked])) if nec else client.wrapped(asked))
            assert refused(client, servers[levels]).startswith("GSSAPI: ")
        else:
            assert client.agree(asked, nec) == granted
            client.connect(echo)
            client.exchange()


def test_r57_r58_the_level_comes_back_as_it_went_and_never_encrypted(new_server: Any, new_kerberos: Any) -> None:
    server = new_server(nec=True)
    client = at(new_kerberos(server), "level")
    client.send(client.wrapped(3))
    assert client.initiator.unwrap(LevelToken.read(client).token) == (b"\x02", False)
    client = at(new_kerberos(server), "level")
    client.send(LevelToken(b"\x03"))
    assert LevelToken.read(client).token == b"\x02"


def test_a_level_may_be_asked_for_encrypted(new_server: Any, new_kerberos: Any) -> None:
    client = at(new_kerberos(new_server()), "level")
    client.send(LevelToken(client.initiator.wrap(b"\x02", True)))
    assert client.initiator.unwrap(LevelToken.read(client).token)[0] == b"\x02"


def test_after_level_0_everything_is_as_without_kerberos(new_server: Any, new_kerberos: Any, echo: Any) -> None:
    client = new_kerberos(new_server(levels=(0,)))
    assert client.enter(2) == Level.NONE
    assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    exchange(client.socket)


# --- nothing is left ---

@needs_proc
def test_a_thousand_refused_logins_leave_nothing(new_server: Any, new_client: Any) -> None:
    server = new_server(allow=["nobody"])
    initiator = Initiator("localhost")
    token = ContextToken(initiator.step())

    def refuse(number: int) -> None:
        with KerberosClient(server.server_address, initiator) as client:
            client.greet(GSSAPI)
            client.send([token, ContextToken(b"junk"), b"\x05\x05", Abort()][number % 4])
            client.end()
            client.rest()

    def load(numbers: range) -> None:
        for number in numbers:
            refuse(number)
        for _ in numbers:
            server.next_ended()
        gc.collect()

    load(range(200))
    before, resident = len(descriptors()), memory()
    load(range(1000))
    eventually(lambda: not server.sessions)
    eventually(lambda: len(descriptors()) <= before)
    assert memory() - resident < 4_000_000
    client = new_client(server)
    assert client.greet(GSSAPI) == MethodSelection(GSSAPI)


def memory() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("command", [Command.CONNECT, Command.UDP_ASSOCIATE])
def test_r62_a_session_that_has_ended_has_no_context_any_more(new_server: Any, new_kerberos: Any, echo: Any, command: Command) -> None:
    server = new_server()

    def contexts() -> int:
        gc.collect()
        return sum(isinstance(each, Acceptor) for each in gc.get_objects())

    for _ in range(8):
        client = new_kerberos(server)
        client.enter()
        client.request(command, echo)
        eventually(lambda: command is Command.CONNECT or server.relays[0].idle_watch)
        client.close()
        server.next_ended()
    eventually(lambda: contexts() <= 1)         # the last one until the relay thread has something to do again
