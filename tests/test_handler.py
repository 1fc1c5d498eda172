"""
The conversation with one client, over real connections.

R and E are the numbers of requirements and edge cases in the project's notes on conformance;
those without a test here belong to the relay, to BIND or to UDP, which have files of their own.
"""

from __future__ import annotations

import itertools
import logging
import queue
import random
import select
import socket
import sys
import threading
import time
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any, List, Optional

import pytest

from socks5srv import outbound, users
from socks5srv.outbound import Route
from socks5srv.protocol import (
    UNSPECIFIED, Address, AddressType, Command, Credentials, CredentialsReply, Greeting, Method, MethodSelection, Reply,
    ReplyCode, Request, RequestFailed,
)
from socks5srv.handler import Socks5Handler
from socks5srv.server import Socks5Server

from .conftest import (
    LOCALHOST, TIMEOUT, address_of, eventually, exchange, handler_with, in_thread, name, needs_ipv6,
    needs_neighbour, on_one_port, within,
)

HELLO = Greeting(bytes([Method.NO_AUTHENTICATION_REQUIRED]))
HELLO_LOGIN = Greeting(bytes([Method.USERNAME_PASSWORD]))
NO_LOGIN = MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)
WITH_LOGIN = MethodSelection(Method.USERNAME_PASSWORD)
NO_METHOD = MethodSelection(Method.NO_ACCEPTABLE_METHODS)
WELCOME = CredentialsReply(CredentialsReply.SUCCESS)
GO_AWAY = CredentialsReply(CredentialsReply.FAILURE)
USERS = {"alice": "secret", "bücher": "pässword", "u" * 255: "p" * 255}
LOOPBACK = [ip_network("127.0.0.1/32")]


def to(place, command=Command.CONNECT):
    return Request(command, address_of(place))


def ip(host, port=0):
    """The address as it is written: IPv4 in IPv6 clothes keeps them on."""
    return Address(host, port, AddressType.IPV6 if ":" in host else AddressType.IPV4)


def nobody_called(listener):
    """Whether nothing has connected to it, nor tried to."""
    return not select.select([listener], [], [], 0)[0]


def quiet(client, seconds=0.1):
    """Whether nothing comes for a while, not even an end."""
    return not select.select([client.socket], [], [], seconds)[0]


def assert_refused(client, code, *messages):
    """E23, R30: ten octets, all of them, and then the end.  The `messages` are what follows the greeting."""
    if messages:
        client.send(HELLO, *messages)
        assert MethodSelection.read(client) == NO_LOGIN
    assert client.rest() == bytes(Reply(code, UNSPECIFIED))
    client.close()      # or the server would linger for a second


def failing(error):
    """A hook that raises this."""
    def hook(*_arguments):
        raise error

    return hook


def resolving(*addresses):
    """A handler for which every name has these."""
    return handler_with(resolve=lambda _self, _host: list(addresses))


# --- method negotiation ---

@pytest.mark.parametrize(("users", "offered", "method"), [
    (None, [0], 0), (None, [0, 1, 2], 0), (None, [2, 1, 0], 0), (None, [0x80, 0xFE, 0], 0), (None, range(255), 0),
    (None, [1], 0xFF), (None, [2], 0xFF), (None, [], 0xFF), (None, [0xFF], 0xFF), (None, [0x03, 0x80], 0xFF),
    (USERS, [2], 2), (USERS, [0, 1, 2], 2), (USERS, [2, 0], 2), (USERS, range(255), 2),
    (USERS, [0], 0xFF), (USERS, [1], 0xFF), (USERS, [], 0xFF), (USERS, [0, 1, 0xFF], 0xFF),
    ({}, [0], 0xFF), ({}, [2], 2),
])
def test_the_method_is_one_that_the_client_offers_and_the_server_takes(start_server, new_client, users, offered, method):
    """R2 to R7, E1, E6, E7"""
    client = new_client(start_server(users=users))
    client.send(b"\x05", bytes([len(offered)]), bytes(offered))
    assert MethodSelection.read(client).method == method
    if method == Method.NO_ACCEPTABLE_METHODS:
        assert client.rest() == b""
    else:
        assert quiet(client), "it is the client's turn"


def test_no_method_is_chosen_before_the_list_is_complete(start_server, new_client):
    """R2"""
    client = new_client(start_server())
    client.send(b"\x05\x03\x00\x01")
    assert quiet(client)
    client.send(b"\x02")
    assert MethodSelection.read(client) == NO_LOGIN


@needs_neighbour
@pytest.mark.parametrize(("users", "offered", "method"), [(USERS, [0, 2], 2), (USERS, [0], 0xFF), (None, [0], None)])
def test_clients_in_a_trusted_network_need_no_login_and_all_others_do(
        start_server: Any, new_client: Any, new_tunnel: Any, users: Any, offered: List[int], method: Optional[int]) -> None:
    """Without users all others are hung up on."""
    server = start_server(users=users, allow_from=LOOPBACK)
    new_tunnel(server)
    other = new_client(server, source="127.0.0.2")
    if method is None:
        assert other.rest() == b""
    else:
        assert other.greet(*offered).method == method


@pytest.mark.parametrize(("settings", "methods", "says"), [
    ({"users": USERS}, [0], "offers no password: set one in it (browsers cannot; --allow-from serves them without)"),
    ({"users": USERS}, [1, 0x80], "offers no password: set one in it"),
    ({}, [2], "only a password, and there are no users: start with -u NAME, or have it offer no authentication"),
    ({}, [1, 2, 3], "only a password, and there are no users"),
    ({}, [1], "no method that is known here: have it offer no authentication"),
    ({"users": USERS, "allow_from": LOOPBACK}, [2], "its network (--allow-from) needs none: have it offer no authentication"),
])
def test_a_client_without_a_usable_method_is_told_of_each_time_with_what_would_help(
        start_server: Any, new_client: Any, caplog: Any, settings: Any, methods: List[int], says: str) -> None:
    caplog.set_level("INFO", "socks5srv")
    server = start_server(**settings)
    for number in (1, 2):
        assert new_client(server).greet(*methods) == NO_METHOD
        session = server.next_ended()
        assert session.outcome == "no_acceptable_method"
        assert says in session.reason
        assert caplog.text.count("no acceptable method: the client offers ") == number


def test_a_subclass_that_takes_no_method_has_reasons_of_its_own(start_server: Any, new_client: Any) -> None:
    server = start_server(handler_with(select_method=lambda _self, _offered: Method.NO_ACCEPTABLE_METHODS))
    assert new_client(server).greet() == NO_METHOD
    session = server.next_ended()
    assert (session.outcome, session.reason) == ("no_acceptable_method", "none of the methods that the client offers will do")


# --- messages in any number of pieces ---

@pytest.mark.parametrize("where", ["127.0.0.1", "name", pytest.param("::1", marks=needs_ipv6)])
@pytest.mark.parametrize("dripping", [True, False], ids=["in single octets", "in one segment"])
def test_a_whole_conversation_may_come_in_any_pieces(start_server, new_client, start_echo, where, dripping):
    """R8, R12 to R15, E3, E4, E25"""
    echo = start_echo("::1" if ":" in where else LOCALHOST)
    destination = name(LOCALHOST, echo.server_address[1]) if where == "name" else address_of(echo.server_address)
    client = new_client(start_server(users=USERS))
    octets = b"".join(map(bytes, [HELLO_LOGIN, Credentials(b"alice", b"secret"), to(destination), b"and my data"]))
    (client.drip if dripping else client.send)(octets)
    assert MethodSelection.read(client) == WITH_LOGIN
    assert CredentialsReply.read(client) == WELCOME
    assert Reply.read(client).code is ReplyCode.SUCCEEDED
    assert client.exactly(11) == b"and my data"
    exchange(client, b"and more")


@pytest.mark.parametrize("size", [1, 5000, 300_000])
def test_early_data_reach_the_target_whole_and_in_order(start_server, new_client, echo, size):
    """E25, R31: behind what came with the request comes what came after it."""
    data = random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
    client = new_client(start_server())
    sending = in_thread(client.send, HELLO, to(echo), data)
    assert MethodSelection.read(client) == NO_LOGIN
    assert Reply.read(client).code is ReplyCode.SUCCEEDED
    assert client.exactly(size) == data
    sending()
    exchange(client, b"after it")


def test_a_client_may_send_everything_and_its_end_before_it_reads(start_server, new_client, echo):
    """E27: the request, the data and the FIN are there before anything is dialled."""
    server = start_server()
    client = new_client(server)
    client.send(HELLO, to(echo), b"all of it")
    client.end()
    answer = client.rest()
    assert answer.startswith(bytes(NO_LOGIN))
    assert answer.endswith(b"all of it")
    session = server.next_ended()
    assert (session.outcome, session.up, session.down) == ("close", 9, 9)


@pytest.mark.parametrize("size", [10, 5000, 200_000])
def test_early_data_do_not_destroy_the_reply_of_a_connect_that_fails(start_server, new_client, refusing, size):
    """E26: unread octets would turn the close into a reset."""
    client = new_client(start_server())
    sending = in_thread(client.send, HELLO, to(refusing()), bytes(size))
    assert client.rest() == bytes(NO_LOGIN) + bytes(Reply(ReplyCode.CONNECTION_REFUSED))
    client.end()
    sending()


def test_the_reply_comes_before_any_octet_of_the_target(start_server, new_client, listen):
    """E33"""
    banner = listen()
    server = start_server()

    def greet_first():
        connection, _ = banner.accept()
        with connection:
            connection.sendall(b"220 ready")

    for _ in range(20):
        greeting = in_thread(greet_first)
        client = new_client(server)
        client.connect(banner.getsockname())
        assert client.rest() == b"220 ready"
        greeting()


# --- logins ---

@pytest.mark.parametrize(("username", "password"), list(USERS.items()), ids=lambda text: text[:10])
def test_who_knows_a_password_may_go_on(start_server, new_client, echo, username, password):
    """R42 to R44, E58"""
    server = start_server(users=USERS)
    with new_client(server) as client:
        assert client.greet(Method.USERNAME_PASSWORD) == WITH_LOGIN
        assert client.login(username, password) == WELCOME
        assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
        exchange(client)
    assert server.next_ended().user == username


WRONG = [
    (b"alice", b"wrong"), (b"alice", b""), (b"alice", b"Secret"), (b"alice", b"secret "), (b"alice", b"secre"), (b"alice", b"secret\n"),
    (b"alice", b"secret\x00"), (b"alice", b"secret\x00junk"), (b"alice\x00", b"secret"), (b"alice\x00bob", b"secret"),
    (b"Alice", b"secret"), (b"bob", b"secret"), (b"bob", b""), (b"", b""), (b"", b"secret"), (b"secret", b"alice"),
    (b"u" * 255, b"p" * 254), (b"u" * 255, b"q" * 255), (b"alice", b"x" * 255),
]
NO_TEXT = [(b"\xff", b"secret"), (b"alice", b"\xff"), (b"\xff\xfe", b"\xff\xfe"), ("bücher".encode("latin-1"), b"x")]


@pytest.mark.parametrize(("username", "password"), WRONG + NO_TEXT, ids=lambda octets: repr(octets[:12]))
def test_who_does_not_may_not_whatever_follows(start_server, new_client, listen, username, password):
    """R45, E57, E60, E61: and the request that is there already is not carried out."""
    target = listen()
    server = start_server(users=USERS)
    with new_client(server) as client:
        client.send(HELLO_LOGIN, Credentials(username, password), to(target.getsockname()), b"data")
        assert client.rest() == bytes(WITH_LOGIN) + bytes(GO_AWAY)
    session = server.next_ended()
    assert session.outcome == "login_failed"
    assert session.user == (repr(username) if (username, password) in NO_TEXT else username.decode())
    assert nobody_called(target)


@pytest.mark.parametrize("octets", [
    b"\x05\x05alice\x06secret", b"\x00\x05alice\x06secret", b"\x02\x05alice\x06secret", bytes(to((LOCALHOST, 80))), b"\x05\x02\x00\x02",
], ids=lambda octets: octets[:4].hex())
def test_what_is_no_login_is_a_failed_one(start_server, new_client, octets):
    """E59, E61"""
    client = new_client(start_server(users=USERS))
    client.send(HELLO_LOGIN, octets)
    assert client.rest() == bytes(WITH_LOGIN) + bytes(GO_AWAY)


@pytest.mark.parametrize(("users", "username", "password", "answer"), [
    ({"alice": ""}, "alice", "", WELCOME), ({"alice": ""}, "bob", "", GO_AWAY), ({"": "secret"}, "", "secret", WELCOME), ({}, "", "", GO_AWAY),
    ({"": ""}, "", "", WELCOME), ({"alice": "secret"}, "alice", "", GO_AWAY),
])
def test_an_empty_name_or_password_is_a_way_in_only_where_one_is_configured(start_server, new_client, users, username, password, answer):
    """E57"""
    client = new_client(start_server(users=users))
    assert client.greet(Method.USERNAME_PASSWORD) == WITH_LOGIN
    assert client.login(username, password) == answer


def test_wrong_logins_do_not_lock_out_the_right_one(start_server, new_client, monkeypatch):
    """E62"""
    monkeypatch.setattr(users, "LONGEST_WAIT", 0.01)
    server = start_server(users=USERS)
    for password in ["wrong"] * 20 + ["secret"]:
        with new_client(server) as client:
            client.greet(Method.USERNAME_PASSWORD)
            assert client.login("alice", password) == (WELCOME if password == "secret" else GO_AWAY)


def test_a_login_is_not_asked_for_twice_nor_read_where_none_is_needed(start_server, new_client):
    """E64: optional, and not offered."""
    assert_refused(new_client(start_server()), ReplyCode.GENERAL_FAILURE, Credentials(b"alice", b"secret"))


def test_no_password_reaches_the_log(start_server, new_client, caplog):
    caplog.set_level(logging.DEBUG, "socks5srv")
    server = start_server(users=USERS)
    for username, password in (("alice", "secret"), ("alice", "5ecret"), ("secret1", "5ecret")):
        with new_client(server) as client:
            client.greet(Method.USERNAME_PASSWORD)
            client.login(username, password)
        server.next_ended()
    assert "#1 < Credentials VER=1 ULEN=5 UNAME=alice PLEN=*** PASSWD=***" in caplog.text
    assert "5ecret" not in caplog.text
    assert "secret" not in caplog.text.replace("secret1", "")


# --- requests that get a failure ---

@pytest.mark.parametrize("cmd", [0, 4, 0xF0, 0xFF])
@pytest.mark.parametrize("address", [ip("192.0.2.1", 80), ip("::1", 80), name("a.invalid", 80)])
def test_an_unknown_command_is_refused_once_its_address_has_been_read(start_server, new_client, cmd, address):
    """R9, E10"""
    octets = bytearray(bytes(to(address)))
    octets[1] = cmd
    server = start_server()
    client = new_client(server)
    assert client.greet() == NO_LOGIN
    client.send(octets[:-1])
    assert quiet(client, 0.05)
    client.send(octets[-1:])
    assert_refused(client, ReplyCode.COMMAND_NOT_SUPPORTED)
    told = server.next_ended().as_dict()
    assert [told[key] for key in ("event", "reply", "command", "host", "port")] == ["failed", 7, f"0x{cmd:02x}", address.host, 80]


@pytest.mark.parametrize("atyp", [0, 2, 5, 0xFF])
def test_an_unknown_address_type_is_refused_at_once(start_server, new_client, atyp):
    """R11, E11"""
    assert_refused(new_client(start_server()), ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, bytes([5, 1, 0, atyp]))


@pytest.mark.parametrize("ver", [0, 1, 4, 6, 0xFF])
def test_a_request_of_another_version_is_never_granted(start_server, new_client, listen, ver):
    """E9"""
    target = listen()
    assert_refused(new_client(start_server()), ReplyCode.GENERAL_FAILURE, bytes([ver]), bytes(to(target.getsockname()))[1:])
    assert nobody_called(target)


def test_the_reserved_octet_is_not_looked_at(start_server, new_client, echo):
    """R10, E8"""
    client = new_client(start_server())
    client.greet()
    client.send(Request(Command.CONNECT, address_of(echo), rsv=0xA5))
    assert Reply.read(client).code is ReplyCode.SUCCEEDED
    exchange(client)


@pytest.mark.parametrize("host", [
    b"", b"\x00", b"localhost\x00", b"localhost\x00.example", b"local host", b"localhost\n", b"::1%lo", b"fe80::1%eth0", b"[::1%lo]", b"[::1", b"\xff",
    b"a/b", b"a..b", b".", b"a" * 64, b"a" * 255, "ä..b".encode(), ("ä" * 64).encode(), b"\xe2\x80\xa8",
], ids=lambda host: repr(host[:12]))
def test_a_name_that_cannot_exist_gets_a_reply_whatever_its_octets(start_server, new_client, monkeypatch, host):
    """E13 to E16, E20"""
    def getaddrinfo(host, *_arguments):
        assert b"\x00" not in host
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    client = new_client(start_server())
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)     # so that no resolver is asked in earnest
    assert_refused(client, ReplyCode.HOST_UNREACHABLE, b"\x05\x01\x00\x03", bytes([len(host)]) + host + b"\x00\x50")


@pytest.mark.parametrize(("error", "code"), [
    (socket.gaierror(socket.EAI_NONAME, "not known"), ReplyCode.HOST_UNREACHABLE),
    (socket.gaierror(socket.EAI_AGAIN, "try again"), ReplyCode.HOST_UNREACHABLE),
    (socket.gaierror(socket.EAI_FAMILY, "no such family"), ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED),
    (UnicodeError("label too long"), ReplyCode.HOST_UNREACHABLE),
    (RequestFailed(ReplyCode.NETWORK_UNREACHABLE, "no network"), ReplyCode.NETWORK_UNREACHABLE),
    (OSError("what now"), ReplyCode.GENERAL_FAILURE), (None, ReplyCode.HOST_UNREACHABLE),
], ids=["NONAME", "AGAIN", "FAMILY", "UnicodeError", "RequestFailed", "OSError", "none"])
def test_a_name_that_cannot_be_looked_up_gets_the_code_that_says_why(start_server, new_client, error, code):
    """Table M"""
    server = start_server(handler_with(resolve=failing(error)) if error else resolving())
    assert_refused(new_client(server), code, to(name("a.invalid", 80)))
    session = server.next_ended()
    assert (session.outcome, session.reply, str(session.destination)) == ("failed", code, "a.invalid:80")
    assert session.reason


@pytest.mark.parametrize("command", [Command.BIND, Command.UDP_ASSOCIATE])
@pytest.mark.parametrize("how", ["a handler without the method", "a server without the command"])
def test_commands_may_be_switched_off(start_server, new_client, echo, command, how):
    """R9"""
    if how.startswith("a handler"):
        server = start_server(handler_with(**{f"do_{command.name}": None}))
    else:
        server = start_server(commands=frozenset({Command.CONNECT}))
    assert_refused(new_client(server), ReplyCode.COMMAND_NOT_SUPPORTED, to(("0.0.0.0", 0), command))
    new_client(server).connect(echo)


def test_a_port_that_refuses_gets_the_code_for_it(start_server, new_client, refusing):
    """Table M; E18: port 0 fails as well."""
    server = start_server()
    for place in (refusing(), (LOCALHOST, 0), name(LOCALHOST, refusing()[1])):
        assert_refused(new_client(server), ReplyCode.CONNECTION_REFUSED, to(place))


@needs_ipv6
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it may leave this computer")
def test_a_link_local_address_without_its_link_gets_a_reply(start_server, new_client):
    """E20, table M: connect() says EINVAL."""
    assert_refused(new_client(start_server()), ReplyCode.GENERAL_FAILURE, to(("fe80::1", 80)))


def test_a_target_that_does_not_answer_in_time_has_expired(start_server, new_client, silent):
    """Table M"""
    client = new_client(start_server(connect_timeout=0.2))
    began = time.monotonic()
    assert_refused(client, ReplyCode.TTL_EXPIRED, to(silent()))
    assert time.monotonic() - began < within(1)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "::1"), (socket.AF_INET6, LOCALHOST)])
def test_a_server_for_one_family_says_so_to_the_other(start_server, new_client, family, host):
    assert_refused(new_client(start_server(route=Route(family))), ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED, to((host, 80)))


def test_only_names_that_are_asked_for_in_one_spelling_share_a_look_up(start_server, new_client):
    """Python's lower() makes a final sigma of a capital at the end, and that is another name."""
    found = []

    class Asking(Socks5Handler):
        def look_up_of(self, host):
            found.append(super().look_up_of(host))
            raise RequestFailed(ReplyCode.HOST_UNREACHABLE)

    server = start_server(Asking)
    for host in ("\u03b1\u03a3", "\u03b1\u03c2", "a.invalid", "A.invalid"):
        assert_refused(new_client(server), ReplyCode.HOST_UNREACHABLE, to(name(host, 80)))
    capital, final, *alike = [look_up.name for look_up in found]
    assert capital != final
    assert alike[0] == alike[1]


@needs_ipv6
def test_names_are_looked_up_in_the_family_of_the_route(start_server, new_client, monkeypatch, echo):
    asked = []
    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: asked.append(arguments[2]) or getaddrinfo(*arguments))
    client = new_client(start_server(route=Route(socket.AF_INET)))
    asked.clear()       # of what the client itself wanted to know
    client.connect(name("localhost", echo[1]))
    assert asked == [socket.AF_INET]


# --- replies that say yes ---

@pytest.mark.parametrize(("target", "asked"), [
    (LOCALHOST, ip(LOCALHOST)), (LOCALHOST, name(LOCALHOST, 0)), (LOCALHOST, name("localhost", 0)), (LOCALHOST, name("127.1", 0)),
    *(pytest.param(target, asked, marks=needs_ipv6) for target, asked in [
        (LOCALHOST, ip("::ffff:127.0.0.1")), (LOCALHOST, name("::ffff:127.0.0.1", 0)),
        ("::1", ip("::1")), ("::1", name("::1", 0)), ("::1", name("[::1]", 0)), ("::1", name("[::]", 0)),
    ]),
], ids=str)
@pytest.mark.parametrize("listening", [LOCALHOST, pytest.param("::", marks=needs_ipv6)])
def test_the_reply_names_our_end_of_the_connection_as_an_ip_address(start_server, new_client, listen, listening, target, asked):
    """R17 to R20, E12, E19, E24: of the target's own family, never a name, never IPv4 in IPv6 clothes."""
    listener = listen(target)
    server = start_server(address=(listening, 0))
    client = new_client((LOCALHOST, server.server_address[1]))
    client.greet()
    client.send(to(asked._replace(port=listener.getsockname()[1])))
    octets = client.exactly(10 if target == LOCALHOST else 22)
    connection, sockaddr = listener.accept()
    with connection:
        ours = address_of(sockaddr)
        assert octets == bytes(Reply(ReplyCode.SUCCEEDED, ours))
        assert octets[3] == (1 if target == LOCALHOST else 4)
        connection.sendall(b"!")
        assert client.exactly(1) == b"!"
    [session] = server.sessions
    assert session.peer == address_of(listener.getsockname())
    assert session.bound == ours
    assert session.client == address_of(client.socket.getsockname())


@needs_neighbour
def test_the_route_decides_where_connections_come_from(start_server, new_client, listen):
    listener = listen()
    reply = new_client(start_server(route=Route(source="127.0.0.2"))).connect(listener.getsockname())
    connection, sockaddr = listener.accept()
    connection.close()
    assert sockaddr == ("127.0.0.2", reply.bound.port) == reply.bound[:2]


# --- the server itself ---

@pytest.mark.parametrize(("listening", "asked"), [
    (LOCALHOST, ip(LOCALHOST)), (LOCALHOST, ip("0.0.0.0")), (LOCALHOST, name(LOCALHOST, 0)), (LOCALHOST, name("localhost", 0)),
    (LOCALHOST, name("127.1", 0)), (LOCALHOST, name("0", 0)), ("0.0.0.0", ip(LOCALHOST)), ("0.0.0.0", ip("0.0.0.0")),
    pytest.param("0.0.0.0", ip("127.0.0.2"), marks=needs_neighbour),
    *(pytest.param(listening, asked, marks=needs_ipv6) for listening, asked in [
        (LOCALHOST, ip("::ffff:127.0.0.1")), (LOCALHOST, ip("::ffff:0.0.0.0")), ("::", ip("::1")), ("::", ip(LOCALHOST)),
        ("::1", ip("::1")), ("::1", ip("::")), ("::1", name("[::1]", 0)),
    ]),
], ids=str)
def test_nobody_is_connected_to_the_server_itself(start_server, new_client, listening, asked):
    """E22"""
    server = start_server(resolving("0.0.0.0" if asked.host == "0" else LOCALHOST), (listening, 0))
    port = server.server_address[1]
    assert_refused(new_client(("::1" if listening == "::1" else LOCALHOST, port)), ReplyCode.NOT_ALLOWED, to(asked._replace(port=port)))
    assert server.next_ended().event == "denied"
    assert len(server.sessions) == 0


def test_nor_to_any_other_of_its_listeners(start_server, new_client):
    """E22"""
    server = start_server(Socks5Handler, (LOCALHOST, 0), (LOCALHOST, 0))
    for ask, target in (server.addresses, reversed(server.addresses)):
        assert_refused(new_client(ask), ReplyCode.NOT_ALLOWED, to(target))


@needs_neighbour
def test_the_same_port_of_another_address_is_not_the_server(start_server, new_client, listen):
    server, listener = on_one_port(lambda port: start_server(address=(LOCALHOST, port)), partial(listen, "127.0.0.2"))
    new_client(server).connect(listener.getsockname())


def test_a_resolver_may_return_its_one_address_as_a_str(start_server, new_client, echo):
    client = new_client(start_server(handler_with(resolve=lambda _self, _host: LOCALHOST)))
    client.connect(name("one.invalid", echo[1]))
    exchange(client)


# --- several addresses ---

@needs_neighbour
@pytest.mark.parametrize("dead", ["silent", "refusing"])
def test_a_name_with_a_dead_address_is_reached_by_the_next(start_server, new_client, start_echo, dead, silent, refusing):
    """RFC 8305"""
    echo, _ = on_one_port(partial(start_echo, LOCALHOST), partial({"silent": silent, "refusing": refusing}[dead], "127.0.0.2"))
    port = echo.server_address[1]
    server = start_server(resolving("127.0.0.2", LOCALHOST))
    client = new_client(server)
    began = time.monotonic()
    client.connect(name("two.invalid", port))
    assert time.monotonic() - began < within(0.5)
    exchange(client)
    assert str(server.sessions[0].peer) == f"{LOCALHOST}:{port}"


@needs_neighbour
def test_when_no_address_of_a_name_works_the_most_telling_code_is_sent(start_server, new_client, silent, refusing):
    """Table M: several addresses."""
    (_, port), _ = on_one_port(partial(refusing, LOCALHOST), partial(silent, "127.0.0.2"))
    server = start_server(resolving("127.0.0.2", "127.255.255.255", LOCALHOST), connect_timeout=1.2)
    assert_refused(new_client(server), ReplyCode.CONNECTION_REFUSED, to(name("two.invalid", port)))


# --- time ---

CONVERSATION = b"".join(map(bytes, [HELLO_LOGIN, Credentials(b"alice", b"secret"), to((LOCALHOST, 1))]))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10, 16, 17, 26])
def test_the_handshake_has_one_deadline(start_server, new_client, length):
    """E5: however much of it has come."""
    server = start_server(users=USERS, handshake_timeout=0.2)
    began = time.monotonic()
    client = new_client(server)
    client.send(CONVERSATION[:length])
    client.rest()
    assert 0.15 < time.monotonic() - began < within(0.8)
    session = server.next_ended()
    assert (session.outcome, session.reason) == ("bad_protocol", "the handshake took too long")


def test_a_trickle_does_not_prolong_the_handshake(start_server, new_client):
    """E5: the limit is one for all of it, not one for each read."""
    server = start_server(handshake_timeout=0.3)
    began = time.monotonic()
    client = new_client(server)
    for octet in itertools.chain(b"\x05\xff", itertools.repeat(0)):
        if select.select([client.socket], [], [], 0.02)[0]:
            break
        client.send(bytes([octet]))
        assert time.monotonic() - began < TIMEOUT
    assert client.rest() == b""
    assert 0.2 < time.monotonic() - began < within(1)


def test_a_tunnel_outlives_the_deadline_of_the_handshake(start_server, new_client, new_tunnel, silent):
    server = start_server(handshake_timeout=0.5, connect_timeout=1)
    tunnel = new_tunnel(server)
    assert_refused(new_client(server), ReplyCode.TTL_EXPIRED, to(silent()))
    exchange(tunnel)


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_client_that_leaves_in_mid_message_is_done_with_at_once(start_server, new_client, how):
    """E5: wherever that is."""
    server = start_server(users=USERS)
    for length in range(len(CONVERSATION)):
        client = new_client(server)
        client.send(CONVERSATION[:length])
        getattr(client, how)()
    for _ in CONVERSATION:
        session = server.next_ended()
        assert session.outcome == "bad_protocol"
        assert session.seconds < within(1)
    assert server.sessions == []


# --- hooks ---

def test_authenticate_is_asked_instead_of_the_users(start_server, new_client, echo):
    asked = []
    handler = handler_with(authenticate=lambda _self, username, password: asked.append((username, password)) or password == "sesame")
    server = start_server(handler)
    assert new_client(server).greet() == MethodSelection(Method.NO_ACCEPTABLE_METHODS)
    for password, answer in (("ali", GO_AWAY), ("sesame", WELCOME)):
        client = new_client(server)
        assert client.greet(Method.USERNAME_PASSWORD) == WITH_LOGIN
        assert client.login("bücher", password) == answer
    assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    assert asked == [("bücher", "ali"), ("bücher", "sesame")]


def test_an_authenticate_that_cannot_know_closes_the_connection_without_an_answer_and_bars_nobody(start_server, new_client, caplog):
    def authenticate(_self, _username, _password):
        raise OSError("the accounts cannot be read")

    server = start_server(handler_with(authenticate=authenticate))
    for _ in range(10):         # more than may fail before the next one has to wait
        client = new_client(server)
        assert client.greet(Method.USERNAME_PASSWORD) == WITH_LOGIN
        client.send(Credentials(b"anna", b"sesame"))
        assert client.rest() == b""
        session = server.next_ended()
        assert (session.outcome, session.reason, session.seconds < within(1)) == ("bad_protocol", "the accounts cannot be read", True)
    assert "login failed" not in caplog.text
    assert server.policy.throttle.failures == {}


def test_a_login_method_of_ones_own_takes_two_methods(start_server, new_client, echo):
    def auth_gssapi(self):
        if self.stream.read(2) != b"hi":
            raise RequestFailed(ReplyCode.GENERAL_FAILURE)
        return "friend"

    server = start_server(handler_with(select_method=lambda _self, _offered: Method.GSSAPI, auth_GSSAPI=auth_gssapi))
    client = new_client(server)
    client.send(Greeting(bytes([Method.GSSAPI])), b"hi", to(echo), b"data")
    assert MethodSelection.read(client).method == Method.GSSAPI
    assert Reply.read(client).code is ReplyCode.SUCCEEDED
    assert client.exactly(4) == b"data"
    assert server.sessions[0].user == "friend"


@needs_neighbour
@needs_ipv6
@pytest.mark.parametrize(("denied", "reached"), [
    ([], "127.0.0.2"), (["127.0.0.2"], "::1"), (["127.0.0.2", "::1"], LOCALHOST), (["127.0.0.2", "::1", LOCALHOST], None), (["a.invalid"], None),
])
def test_allow_is_asked_about_the_name_and_then_about_each_address(start_server, new_client, listen, denied, reached):
    """R16, E17: what is judged and what is dialled are the same addresses."""
    asked = []

    def allow(_self, command, address):
        asked.append((command, str(address), address.address_type))
        return address.host not in denied

    def resolve(_self, host):
        asked.append(host)
        return ["127.0.0.2", "::1", LOCALHOST]

    listeners = on_one_port(*(partial(listen, host) for host in (LOCALHOST, "127.0.0.2", "::1")))
    port = listeners[0].getsockname()[1]
    server = start_server(handler_with(allow=allow, resolve=resolve))
    client = new_client(server)
    if reached is None:
        assert_refused(client, ReplyCode.NOT_ALLOWED, to(name("a.invalid", port)))
        assert server.next_ended().event == "denied"
        assert all(map(nobody_called, listeners))
    else:
        client.connect(name("a.invalid", port))
        assert server.sessions[0].peer.host == reached
    connect = Command.CONNECT
    questions = [
        (connect, f"a.invalid:{port}", AddressType.DOMAINNAME), "a.invalid", (connect, f"127.0.0.2:{port}", AddressType.IPV4),
        (connect, f"[::1]:{port}", AddressType.IPV6), (connect, f"127.0.0.1:{port}", AddressType.IPV4),
    ]
    assert asked == (questions[:1] if "a.invalid" in denied else questions)


@pytest.mark.parametrize(("asked", "judged"), [
    (name(LOCALHOST, 80), LOCALHOST), (name("::1", 80), "::1"), (name("[::1]", 80), "::1"), (ip(LOCALHOST, 80), LOCALHOST),
    (ip("::ffff:7f00:1", 80), LOCALHOST), (name("::ffff:7f00:1", 80), LOCALHOST), (name("[::ffff:7f00:1]", 80), LOCALHOST),
], ids=str)
def test_an_ip_address_is_judged_as_one_however_it_is_written(start_server, new_client, asked, judged):
    """E12, E19: a rule for 127.0.0.1 holds for all of its spellings."""
    seen = []
    server = start_server(handler_with(allow=lambda _self, _command, address: seen.append(address)))
    assert_refused(new_client(server), ReplyCode.NOT_ALLOWED, to(asked))
    assert seen == [ip(judged, 80)]


@pytest.mark.parametrize("asked", [
    ip("0.0.0.0"), name("0.0.0.0", 0), name("0", 0),
    *(pytest.param(asked, marks=needs_ipv6) for asked in [ip("::"), name("::", 0), ip("::ffff:0.0.0.0")]),
], ids=str)
def test_all_zeros_are_judged_as_the_loopback_that_they_lead_to(start_server, new_client, listen, asked):
    """E21: or a rule against loopback would be none."""
    def allow(_self, _command, address):
        return address.literal is None or not ip_address(address.host).is_loopback

    target = listen("::1" if asked.host == "::" else LOCALHOST)
    server = start_server(handler_with(allow=allow, resolve=lambda *_: ["0.0.0.0"]))
    assert_refused(new_client(server), ReplyCode.NOT_ALLOWED, to(asked._replace(port=target.getsockname()[1])))
    assert nobody_called(target)


@pytest.mark.parametrize("asked", [ip("0.0.0.0"), name("0", 0), name("0.0.0.0", 0)], ids=str)
def test_all_zeros_are_dialled_as_the_loopback_that_they_are_judged_as(start_server, new_client, echo, asked):
    server = start_server(resolving("0.0.0.0"))
    new_client(server).connect(asked._replace(port=echo[1]))
    assert str(server.sessions[0].peer) == f"{LOCALHOST}:{echo[1]}"


@pytest.mark.parametrize(("command", "setting"), [(Command.CONNECT, "connect_timeout"), (Command.BIND, "bind_timeout")])
def test_the_time_that_a_look_up_takes_is_not_given_again(start_server, new_client, monkeypatch, command, setting):
    """One deadline covers it all."""
    release, deadlines = threading.Event(), queue.SimpleQueue()

    def note(*arguments):
        deadlines.put(arguments[3])     # of connect() and, being a method, of await_peer()
        raise RequestFailed(ReplyCode.TTL_EXPIRED)

    monkeypatch.setattr(outbound, "connect", note)
    handler = handler_with(resolve=lambda _self, _host: release.wait(TIMEOUT) and [LOCALHOST], _await_peer=note)
    server = start_server(handler, **{setting: 20})
    new_client(server).send(HELLO, to(name("slow.invalid", 80), command))
    eventually(lambda: server.sessions and server.sessions[0].command)
    before = time.monotonic()
    release.set()
    assert deadlines.get(timeout=TIMEOUT) <= before + 20


def test_connect_may_lead_elsewhere(start_server, new_client, echo):
    client = new_client(start_server(handler_with(connect=lambda _self, _request: socket.create_connection(echo, TIMEOUT))))
    assert client.connect(name("nowhere.invalid", 80)).bound.host == LOCALHOST
    exchange(client, bytes(100_000))


@pytest.mark.parametrize(("error", "code"), [
    (RequestFailed(ReplyCode.NETWORK_UNREACHABLE, "the upstream proxy says so"), ReplyCode.NETWORK_UNREACHABLE),
    (ConnectionRefusedError(111, "Connection refused"), ReplyCode.CONNECTION_REFUSED),
    (socket.timeout("timed out"), ReplyCode.TTL_EXPIRED),
    (socket.gaierror(socket.EAI_NONAME, "not known"), ReplyCode.HOST_UNREACHABLE),
], ids=lambda value: type(value).__name__)
def test_a_connect_that_fails_in_a_way_of_its_own_gets_a_reply(start_server, new_client, error, code):
    """An override that calls socket.create_connection() raises what that raises."""
    assert_refused(new_client(start_server(handler_with(connect=failing(error)))), code, to((LOCALHOST, 80)))


@pytest.mark.parametrize("early", [True, False])
def test_relay_may_see_the_bytes(start_server, new_client, echo, early):
    """And change them."""
    def shout(self, target):
        up = self.stream.take() or self.connection.recv(100)
        self.session.up += target.send(up.upper())
        target.settimeout(TIMEOUT)
        down = target.recv(100)
        self.connection.sendall(down + b"!")
        self.session.down += len(down)

    server = start_server(handler_with(relay=shout))
    client = new_client(server)
    client.send(HELLO, to(echo), b"hello" if early else b"")
    MethodSelection.read(client)
    assert Reply.read(client).code is ReplyCode.SUCCEEDED
    if not early:
        client.send(b"hello")
    assert client.rest() == b"HELLO!"
    session = server.next_ended()
    assert (session.outcome, session.up, session.down) == ("close", 5, 5)


@pytest.mark.parametrize("error", [RequestFailed(ReplyCode.GENERAL_FAILURE), OSError("broken")], ids=repr)
def test_after_the_last_reply_there_is_no_other(start_server, new_client, echo, error):
    """It would land in the middle of somebody's data."""
    server = start_server(handler_with(relay=failing(error)))
    client = new_client(server)
    client.connect(echo)
    assert client.rest() == b""
    session = server.next_ended()
    assert (session.outcome, session.reply, session.reason) == ("close", ReplyCode.SUCCEEDED, str(error))


def test_verify_request_turns_clients_away_unheard(start_server, new_client):
    picky = type("Picky", (Socks5Server,), {"verify_request": lambda *_: False})
    assert new_client(start_server(server_class=picky)).rest() == b""


@pytest.mark.parametrize("hook", ["authenticate", "allow", "resolve", "connect", "relay", "session_ended"])
def test_a_bug_in_a_hook_is_logged_and_costs_one_client(start_server, new_client, echo, bugs, hook):
    once = iter([True])

    def buggy(self, *arguments):
        if next(once, False):
            raise KeyError("a bug")
        return True if hook == "authenticate" else getattr(Socks5Handler, hook)(self, *arguments)

    server = start_server(handler_with(**{hook: buggy}))
    for attempt in ("buggy", "good"):
        with new_client(server) as client:
            greeting = [HELLO_LOGIN, Credentials(b"a", b"b")] if hook == "authenticate" else [HELLO]
            client.send(*greeting, to(name("localhost", echo[1])), b"data")
            client.end()
            answer = client.rest()
        session = server.next_ended()
        assert session.seconds is not None
        if attempt == "buggy" and hook in ("allow", "resolve", "connect"):
            assert answer == bytes(NO_LOGIN) + bytes(Reply(ReplyCode.GENERAL_FAILURE))
        if attempt == "buggy" and hook == "relay":
            assert len(answer) == 2 + 10, "no other reply, which would be among somebody's data"
        if attempt == "good":
            assert answer.endswith(b"data")
            assert session.outcome == "close"
    eventually(lambda: bugs)        # it is logged when everything else has been done
    assert len(bugs) == 1
    assert "KeyError: 'a bug'" in logging.Formatter().format(bugs[0])
    bugs.clear()
    assert server.sessions == []
