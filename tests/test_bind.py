"""BIND: two replies, one connection, and nobody but the one who is expected.  R21 to R25, E37 to E41."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
import time

import pytest

from socks5srv.outbound import Route
from socks5srv.protocol import UNSPECIFIED, Address, AddressType, Command, Greeting, MethodSelection, Reply, ReplyCode, Request
from socks5srv.handler import EARLY
from socks5srv.rules import Rules

from .conftest import (
    LOCALHOST, TIMEOUT, Client, address_of, eventually, handler_with, in_thread, name, needs_ipv6, needs_neighbour, within,
)

ANYONE = ("0.0.0.0", 0)
NEIGHBOUR = "127.0.0.2"


@pytest.fixture
def server(start_server):
    return start_server()


@pytest.fixture
def client(server, new_client):
    return new_client(server)


@pytest.fixture
def call(new_client):
    """Call back to where a first reply says: ``call(reply, source)``."""
    return lambda reply, source=None: new_client((reply.bound.host, reply.bound.port), source)


@pytest.fixture
def meet(call):
    """Call back, and be the one whom the second reply names: ``meet(client, first, source)``."""
    def meeting(client, first, source=None):
        peer = call(first, source)
        assert Reply.read(client) == Reply(ReplyCode.SUCCEEDED, own_address(peer))
        return peer

    return meeting


def bind(client, place=ANYONE):
    """The first reply, which has to be a success."""
    reply = client.ask(Command.BIND, place)
    assert reply.code is ReplyCode.SUCCEEDED
    return reply


def own_address(client):
    return address_of(client.socket.getsockname())


def assert_closed(bound):
    """Nobody listens there any more."""
    with pytest.raises(ConnectionRefusedError):
        Client((bound.host, bound.port))


def waits_on(client):
    """Whether no second reply has come, nor an end."""
    return not select.select([client.socket], [], [], 0.05)[0]


def exchange_both(client, peer):
    for one, other in ((client, peer), (peer, client)):
        one.send(b"hello")
        assert other.exactly(5) == b"hello"


# --- the two replies ---

@pytest.mark.parametrize(("listening", "host"), [
    (LOCALHOST, LOCALHOST), ("0.0.0.0", LOCALHOST), pytest.param("0.0.0.0", NEIGHBOUR, marks=needs_neighbour),
    pytest.param("::", LOCALHOST, marks=needs_ipv6), pytest.param("::1", "::1", marks=needs_ipv6), pytest.param("::", "::1", marks=needs_ipv6),
])
def test_the_first_reply_says_where_to_call_and_the_second_who_has_called(start_server, new_client, listening, host):
    """R21 to R25, E24, E40: both are concrete, and of the family of the client's own connection."""
    server = start_server(address=(listening, 0))
    client = new_client((host, server.server_address[1]))
    client.greet()
    client.send(Request(Command.BIND, UNSPECIFIED))
    length = 22 if ":" in host else 10
    first = client.exactly(length)
    assert first[3] == (4 if ":" in host else 1)
    host_port = client.socket.getpeername()[0], int.from_bytes(first[-2:], "big")
    assert first == bytes(Reply(ReplyCode.SUCCEEDED, address_of(host_port)))
    assert host_port[1] not in (0, server.server_address[1])
    assert waits_on(client)
    peer = new_client(host_port)
    assert client.exactly(length) == bytes(Reply(ReplyCode.SUCCEEDED, own_address(peer)))
    peer.send(b"to the client")
    assert client.exactly(13) == b"to the client"
    client.send(b"to the peer")
    assert peer.exactly(11) == b"to the peer"


def test_the_port_listens_when_the_first_reply_names_it(server, new_client, meet):
    """R22: a fast peer would be refused otherwise."""
    for _ in range(50):
        with new_client(server) as client, meet(client, bind(client)):
            pass


def test_the_bytes_of_the_peer_come_after_the_second_reply(server, new_client, call):
    """E33"""
    for _ in range(20):
        client = new_client(server)
        with call(bind(client)) as peer:
            peer.send(b"220 ready")
            second = bytes(Reply(ReplyCode.SUCCEEDED, own_address(peer)))
        assert client.rest() == second + b"220 ready"


def test_the_session_knows_both_ends(server, new_client, meet):
    with new_client(server) as client:
        first = bind(client, name(LOCALHOST, 4242))
        [session] = server.sessions
        assert (session.outcome, session.bound, session.peer) == ("open", first.bound, None)
        with meet(client, first) as peer:
            peer_address = own_address(peer)
            client.send(b"123")
            assert peer.exactly(3) == b"123"
            peer.send(b"12345")
            assert client.exactly(5) == b"12345"
    session = server.next_ended()
    assert (session.outcome, session.command, str(session.destination)) == ("close", Command.BIND, "127.0.0.1:4242")
    assert (session.up, session.down, session.peer) == (3, 5, peer_address)
    assert session.bound == first.bound, "the proxy's end is still the same"


def test_the_connection_of_the_peer_has_no_nagle_and_is_kept_alive(server, client, meet):
    with meet(client, bind(client)):
        [handler] = server.registry.live.values()
        target = eventually(lambda: handler._tunnel).up.sink
        assert target.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert target.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# --- who may call ---

@pytest.mark.parametrize("place", [
    ANYONE, Address("0.0.0.0", 4242, AddressType.IPV4), Address("::", 0, AddressType.IPV6), name("0", 0), name("0.0.0.0", 4242), name("::", 0), name("[::]", 0),
], ids=str)
@pytest.mark.parametrize("source", [LOCALHOST, pytest.param(NEIGHBOUR, marks=needs_neighbour)])
def test_zeros_of_every_kind_mean_anyone(client, meet, place, source):
    """R27, E37"""
    meet(client, bind(client, place), source)


@pytest.mark.parametrize("place", [
    Address(LOCALHOST, 1, AddressType.IPV4), name(LOCALHOST, 0), name("::ffff:127.0.0.1", 21), name("ftp.invalid", 21),
], ids=str)
def test_the_host_that_was_named_may_call_from_any_port(start_server, new_client, meet, place):
    """E37: the RFC's clients cannot know the port."""
    client = new_client(start_server(handler_with(resolve=lambda _self, _host: [LOCALHOST, "192.0.2.1"])))
    meet(client, bind(client, place))


@pytest.mark.parametrize("place", [ANYONE, Address("::", 0, AddressType.IPV6), name("0", 21)], ids=str)
def test_zeros_from_another_computer_mean_anyone_too(start_server, new_client, call, place):
    """They are no address that it wants to reach, and the caller is judged when it comes."""
    client = new_client(start_server(elsewhere=True))
    first = bind(client, place)
    assert call(first).rest() == b"", "only this computer's own programs should reach this computer"
    assert waits_on(client)


@pytest.mark.parametrize(("rules", "granted"), [
    (["allow ftp.invalid", "deny *"], True), (["allow *.invalid", "deny 127.0.0.0/8"], True), (["deny ftp.invalid:1-1023", "allow *"], True),
    (["deny 127.0.0.0/8", "allow ftp.invalid"], False),
])
def test_a_caller_is_judged_by_the_name_that_the_client_has_asked_for(start_server, new_client, meet, rules, granted):
    client = new_client(start_server(handler_with(resolve=lambda _self, _host: [LOCALHOST]), rules=Rules.parse(rules)))
    if not granted:
        assert client.ask(Command.BIND, name("FTP.invalid.", 4021)).code is ReplyCode.NOT_ALLOWED
        return
    meet(client, bind(client, name("FTP.invalid.", 4021)))


@needs_neighbour
def test_a_stranger_is_turned_away_and_the_waiting_goes_on(client, call, meet):
    """E38: or anyone could end it, or be taken for the one who is expected."""
    first = bind(client, (LOCALHOST, 0))
    for _ in range(5):
        stranger = call(first, NEIGHBOUR)
        stranger.send(b"let me in")
        assert stranger.rest() == b""
        assert waits_on(client)
    client.send(b"for the one I expect")
    peer = meet(client, first)
    assert peer.exactly(20) == b"for the one I expect"
    exchange_both(client, peer)


@needs_neighbour
def test_a_crowd_of_strangers_does_not_keep_the_expected_one_out(client, call, meet):
    first = bind(client, (LOCALHOST, 0))
    strangers = [call(first, NEIGHBOUR) for _ in range(10)]
    meet(client, first)
    assert {stranger.rest() for stranger in strangers} == {b""}


def test_one_connection_is_all_there_is(client, meet):
    """E39"""
    first = bind(client)
    peer = meet(client, first)
    assert_closed(first.bound)
    exchange_both(client, peer)


def test_a_second_caller_in_the_queue_is_hung_up_on(start_server, new_client, call):
    """E39"""
    all_here = threading.Event()
    patient = handler_with(allow=lambda _self, _command, address: address == UNSPECIFIED or all_here.wait(TIMEOUT))
    client = new_client(start_server(patient))
    first = bind(client)
    callers = [call(first) for _ in range(5)]
    all_here.set()
    bound = Reply.read(client).bound
    [peer] = [caller for caller in callers if own_address(caller) == bound]
    callers.remove(peer)
    assert {caller.rest() for caller in callers} == {b""}
    exchange_both(client, peer)


@pytest.mark.parametrize(("place", "questions"), [
    (ANYONE, [UNSPECIFIED]), (name("0", 9), [UNSPECIFIED]),
    ((LOCALHOST, 21), [Address(LOCALHOST, 21, AddressType.IPV4)]),
    (name("ftp.invalid", 21), [name("ftp.invalid", 21), Address(LOCALHOST, 21, AddressType.IPV4)]),
], ids=str)
def test_allow_is_asked_about_the_destination_and_then_about_the_caller(start_server, new_client, meet, place, questions):
    """R16, R21"""
    asked = []
    client = new_client(start_server(handler_with(
        allow=lambda _self, command, address: asked.append((command, address)) or True, resolve=lambda _self, _host: [LOCALHOST],
    )))
    peer = meet(client, bind(client, place))
    assert asked == [(Command.BIND, address) for address in [*questions, own_address(peer)]]


@needs_neighbour
@pytest.mark.parametrize(("settings", "stranger", "expected"), [
    ({"handler": handler_with(allow=lambda _self, _command, address: address.host != NEIGHBOUR)}, NEIGHBOUR, LOCALHOST),
    ({"rules": Rules.parse([f"allow {NEIGHBOUR}", "deny *"])}, LOCALHOST, NEIGHBOUR),
], ids=["allow()", "rules, none of which could name zeros"])
def test_a_caller_who_is_not_allowed_is_a_stranger(start_server, new_client, call, meet, settings, stranger, expected):
    client = new_client(start_server(**settings))
    first = bind(client)
    assert call(first, stranger).rest() == b""
    meet(client, first, expected)


NOTHING_IS_ALLOWED = {"handler": handler_with(allow=lambda _self, _command, _address: False)}


@pytest.mark.parametrize(("settings", "place", "code"), [
    (NOTHING_IS_ALLOWED, ANYONE, ReplyCode.NOT_ALLOWED),
    (NOTHING_IS_ALLOWED, (LOCALHOST, 21), ReplyCode.NOT_ALLOWED),
    (NOTHING_IS_ALLOWED, name("ftp.invalid", 21), ReplyCode.NOT_ALLOWED),
    ({"route": Route(source="192.0.2.1")}, ANYONE, ReplyCode.GENERAL_FAILURE),
    ({"route": Route(socket.AF_INET)}, ("::1", 0), ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED),
    ({"route": Route(source=LOCALHOST)}, ("::1", 0), ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED),
], ids=["anyone", "an address", "a name", "no address of ours", "another family", "a source of another family"])
def test_where_it_may_or_can_not_listen_it_says_why_and_only_once(start_server, new_client, settings, place, code):
    client = new_client(start_server(**settings))
    assert client.ask(Command.BIND, place) == Reply(code)
    assert client.rest() == b""


# --- where it listens ---

NEEDS_BOTH = [needs_neighbour, needs_ipv6]
ONE_OF_EACH = Route(source=("::1", NEIGHBOUR))


@pytest.mark.parametrize(("route", "place", "host"), [
    pytest.param(Route(source=NEIGHBOUR), ANYONE, NEIGHBOUR, marks=needs_neighbour),
    # Of several sources on that of the expected one's family, or of the client's own, where anyone may call.
    pytest.param(ONE_OF_EACH, (LOCALHOST, 0), NEIGHBOUR, marks=NEEDS_BOTH),
    pytest.param(ONE_OF_EACH, ("::1", 0), "::1", marks=NEEDS_BOTH),
    pytest.param(ONE_OF_EACH, ANYONE, NEIGHBOUR, marks=NEEDS_BOTH),
    # For anyone on a source of the other family, if there is no other.
    pytest.param(Route(source="::1"), ANYONE, "::1", marks=needs_ipv6),
    # E40: of the destination's family, whichever the client came by.
    pytest.param(Route(), ("::1", 0), "::1", marks=needs_ipv6),
])
def test_it_listens_where_the_route_says_and_the_expected_one_can_reach_it(start_server, new_client, meet, route, place, host):
    client = new_client(start_server(route=route))
    first = bind(client, place)
    assert first.bound.host == host
    meet(client, first)


@needs_ipv6
@pytest.mark.parametrize("unreachable", ["::1", "fe80::1"])
@pytest.mark.parametrize("order", [1, -1])
def test_it_listens_where_one_of_the_expected_ones_addresses_can_reach_it(start_server, new_client, meet, unreachable, order):
    """The first to which there is a way; it need not be the first of all."""
    handler = handler_with(resolve=lambda _self, _host: [LOCALHOST, unreachable][::order])
    client = new_client(start_server(handler, route=Route(socket.AF_INET)))
    first = bind(client, name("ftp.invalid", 21))
    assert first.bound.host == LOCALHOST
    meet(client, first)


def test_every_client_has_a_port_of_its_own(server, new_client, meet):
    clients = [new_client(server) for _ in range(5)]
    replies = [bind(client) for client in clients]
    assert len({reply.bound.port for reply in replies}) == 5
    for client, reply in reversed(list(zip(clients, replies))):
        exchange_both(client, meet(client, reply))


# --- how it ends ---

@pytest.mark.parametrize("ahead", [b"", b"never to be delivered"])
@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_client_that_leaves_takes_the_port_with_it(server, client, how, ahead):
    """E39"""
    first = bind(client)
    client.send(ahead)
    getattr(client, how)()
    session = server.next_ended()
    assert session.seconds < within(1)
    assert (session.outcome, session.peer) == ("close", None)
    assert_closed(first.bound)
    if how == "end":
        assert client.rest() == b""


def test_when_nobody_calls_in_time_the_second_reply_says_so(start_server, new_client):
    """E39: 06, and the end."""
    server = start_server(bind_timeout=0.2)
    client = new_client(server)
    began = time.monotonic()
    first = bind(client)
    assert client.rest() == bytes(Reply(ReplyCode.TTL_EXPIRED))
    assert 0.15 < time.monotonic() - began < within(1)
    assert_closed(first.bound)
    client.close()
    session = server.next_ended()
    assert (session.outcome, session.reply) == ("failed", ReplyCode.TTL_EXPIRED)


@needs_neighbour
def test_strangers_do_not_prolong_the_waiting(start_server, new_client, call):
    client = new_client(start_server(bind_timeout=0.3))
    began = time.monotonic()
    first = bind(client, (LOCALHOST, 0))
    while waits_on(client):
        try:
            with call(first, NEIGHBOUR) as stranger:
                stranger.rest()
        except OSError:         # it has just ended
            break
        assert time.monotonic() - began < TIMEOUT
    assert client.rest() == bytes(Reply(ReplyCode.TTL_EXPIRED))
    assert time.monotonic() - began < within(1)


# --- what is sent early ---

@pytest.mark.parametrize("size", [1, 5000, 65536, 300_000])
def test_what_the_client_sends_before_the_second_reply_reaches_the_peer_in_order(client, meet, size):
    """E41: with the request, after the first reply, and after the second."""
    data = random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
    client.send(Greeting(b"\x00"), Request(Command.BIND, UNSPECIFIED), b"first,")
    MethodSelection.read(client)
    first = Reply.read(client)
    sending = in_thread(client.send, data)
    assert waits_on(client)
    peer = meet(client, first)
    sending()
    client.send(b",last")
    assert peer.exactly(size + 11) == b"first," + data + b",last"
    exchange_both(client, peer)


def test_a_client_that_sends_more_than_can_wait_is_made_to_wait(server, client, meet):
    """E41, E30: nothing is lost, and no client can fill the memory."""
    first = bind(client)
    sent = 0
    client.socket.setblocking(False)
    while select.select([], [client.socket], [], 0.1)[1]:
        sent += client.socket.send(bytes(65536))
        assert sent < 100_000_000
    client.socket.settimeout(TIMEOUT)
    [handler] = server.registry.live.values()
    assert len(handler.stream.buffer) <= EARLY + 4096
    peer = meet(client, first)
    client.end()
    assert len(peer.rest()) == sent


def test_a_bug_in_a_rule_about_the_caller_leaves_nothing_open(start_server, new_client, call, bugs):
    def allow(_self, _command, address):
        return address == UNSPECIFIED or {}["a bug"]

    client = new_client(start_server(handler_with(allow=allow)))
    first = bind(client)
    peer = call(first)
    assert client.rest() == bytes(Reply(ReplyCode.GENERAL_FAILURE))
    assert peer.rest() == b""
    assert_closed(first.bound)
    client.close()
    eventually(lambda: len(bugs) == 1)
    bugs.clear()


@pytest.mark.skipif(os.name != "posix", reason="no limit of descriptors to set")
def test_out_of_descriptors_the_waiting_goes_on_without_spinning(client):
    """Table M: the caller stays in the queue until there is one for it."""
    import resource

    first = bind(client)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as peer:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (peer.fileno() + 1, limits[1]))
            peer.settimeout(TIMEOUT)
            peer.connect((first.bound.host, first.bound.port))
            busy = time.process_time()
            assert not select.select([client.socket], [], [], 0.4)[0], "a descriptor was to be had"
            assert time.process_time() - busy < 0.2
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert Reply.read(client).bound == address_of(peer.getsockname())


def test_a_bind_that_waits_is_among_the_sessions(server, client):
    bind(client)
    assert [session.command for session in server.sessions] == [Command.BIND]
    client.close()
    eventually(lambda: server.sessions == [])
