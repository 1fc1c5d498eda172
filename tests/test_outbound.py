"""Going out: errors and their codes, waiting, and the race of the addresses."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

from socks5srv import outbound
from socks5srv.outbound import STAGGER, ClientGone, HappyEyeballs, Route, failure, interleave, most_telling
from socks5srv.protocol import Address, AddressType, Command, Reply, ReplyCode, RequestFailed
from socks5srv.relay import READ, WRITE

from .conftest import (
    LOCALHOST, TIMEOUT, FromItsTarget, address_of, exchange, fails_with, in_thread, name, needs_ipv6, needs_neighbour,
    on_one_port, reset, soon, within,
)
from .networks import leave_ports

# In 127.0.0.0/8, so it does not leave this computer, and as a broadcast address no TCP for Linux.
UNREACHABLE = "127.255.255.255"


# --- M: errors to codes ---

TABLE_M = {
    ReplyCode.CONNECTION_REFUSED: "ECONNREFUSED ECONNRESET EPIPE ECONNABORTED",
    ReplyCode.NETWORK_UNREACHABLE: "ENETUNREACH ENETDOWN ENONET",
    ReplyCode.HOST_UNREACHABLE: "EHOSTUNREACH EHOSTDOWN EAI_NONAME EAI_NODATA EAI_AGAIN EAI_FAIL",
    ReplyCode.TTL_EXPIRED: "ETIMEDOUT",
    ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED: "EAFNOSUPPORT EPROTONOSUPPORT EAI_ADDRFAMILY EAI_FAMILY",
    ReplyCode.NOT_ALLOWED: "EACCES EPERM",
    ReplyCode.GENERAL_FAILURE: "EADDRNOTAVAIL EINVAL EMFILE ENFILE ENOBUFS ENOMEM EAGAIN",
}


@pytest.mark.parametrize(("error", "code"), [(error, code) for code, names in TABLE_M.items() for error in names.split()])
def test_errors_of_the_system_and_the_resolver_have_their_codes(error, code):
    """Table M"""
    module, cls = (socket, socket.gaierror) if error.startswith("EAI") else (errno, OSError)
    if not hasattr(module, error):
        pytest.skip(f"no {error} here")
    failed = failure(cls(getattr(module, error), "as it says"), "example.com:80")
    assert failed.code is code
    assert str(failed) == "example.com:80: as it says"


@pytest.mark.parametrize(("error", "code"), [
    (socket.timeout("timed out"), ReplyCode.TTL_EXPIRED),
    (UnicodeError("label too long"), ReplyCode.HOST_UNREACHABLE),
    (UnicodeEncodeError("idna", "\xff", 0, 1, "bad"), ReplyCode.HOST_UNREACHABLE),
    (ValueError("embedded null byte"), ReplyCode.HOST_UNREACHABLE),
    (OSError("no number at all"), ReplyCode.GENERAL_FAILURE),
    (RequestFailed(ReplyCode.NOT_ALLOWED, "so it is"), ReplyCode.NOT_ALLOWED),
], ids=repr)
def test_errors_without_a_number_have_codes_too(error, code):
    """Table M, E15"""
    failed = failure(error, "it")
    assert failed.code is code
    assert str(error).partition(":")[0] in str(failed)


def test_a_bug_is_no_failure_of_the_target():
    with pytest.raises(KeyError):
        failure(KeyError("bug"), "it")
    with pytest.raises(KeyError), outbound.errors_as_replies("it"):
        raise KeyError("bug")


@pytest.mark.parametrize("error", [ClientGone("gone"), RequestFailed(ReplyCode.TTL_EXPIRED)], ids=repr)
def test_what_is_an_answer_already_or_needs_none_is_not_reported_again(error):
    with pytest.raises(type(error)) as caught, outbound.errors_as_replies("it"):
        raise error
    assert caught.value is error


def test_errors_are_reported_with_their_cause():
    cause = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(RequestFailed, match=r"it: refused") as caught, outbound.errors_as_replies("it"):
        raise cause
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize(("codes", "telling"), [
    ([1], 1), ([6, 1], 6), ([1, 6, 3], 3), ([3, 4, 6], 4), ([4, 5, 3], 5), ([5, 8, 2], 5), ([1, 8], 8), ([2, 8, 1], 2),
    ([5, 5], 5),
])
def test_of_several_failures_the_most_telling_is_reported(codes, telling):
    """And the first of two that are alike."""
    failures = [RequestFailed(ReplyCode(code), f"{code}") for code in codes]
    assert most_telling(failures) is failures[codes.index(telling)]


# --- waiting ---

@pytest.fixture
def target_pair():
    """Our end of a connection to a target, and the target's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.fileno(), theirs


@pytest.mark.usefixtures("poll_or_select")
def test_waiting_tells_what_is_ready(target_pair, connection):
    fd, theirs = target_pair
    assert outbound.wait({fd: READ}, connection, soon(0.05)) == {}
    assert list(outbound.wait({fd: WRITE}, connection, soon(TIMEOUT))) == [fd]
    theirs.send(b"!")
    assert list(outbound.wait({fd: READ}, connection, soon(TIMEOUT))) == [fd]
    assert list(outbound.wait({fd: READ}, connection, time.monotonic() - 1)) == [fd], "a deadline passed is a look"


@pytest.mark.usefixtures("poll_or_select")
def test_waiting_ends_at_the_deadline(target_pair, connection):
    began = time.monotonic()
    assert outbound.wait({target_pair[0]: READ}, connection, soon(0.25)) == {}
    assert 0.24 < time.monotonic() - began < within(1)


@pytest.mark.usefixtures("poll_or_select")
def test_a_client_that_has_sent_ahead_or_ended_its_half_is_waited_with(target_pair, pair):
    client, connection = pair
    client.sendall(b"early data")
    client.shutdown(socket.SHUT_WR)
    assert outbound.wait({target_pair[0]: READ}, connection, soon(0.1)) == {}
    assert connection.recv(100) == b"early data"


@pytest.mark.usefixtures("poll_or_select")
def test_the_client_itself_can_be_waited_for(pair):
    client, connection = pair
    assert outbound.wait({connection.fileno(): READ}, connection, soon(0.05)) == {}
    client.shutdown(socket.SHUT_WR)
    assert list(outbound.wait({connection.fileno(): READ}, connection, soon(TIMEOUT))) == [connection.fileno()]


@pytest.mark.skipif(not hasattr(select, "poll"), reason="select() does not tell of a reset, nor of a hang-up")
@pytest.mark.parametrize("ends", [
    pytest.param(lambda client, _connection: reset(client), id="the client resets its connection"),
    pytest.param(lambda _client, connection: connection.shutdown(socket.SHUT_RDWR), id="the server hangs up, as when it stops"),
])
def test_the_end_of_the_clients_connection_ends_the_waiting(target_pair, pair, ends):
    waiting = in_thread(outbound.wait, {target_pair[0]: READ}, pair[1], soon(TIMEOUT))
    ends(*pair)
    with pytest.raises(ClientGone):
        waiting()


def test_where_there_is_only_select_closing_the_connection_ends_the_waiting(target_pair, connection, monkeypatch):
    monkeypatch.delattr(select, "poll")
    waiting = in_thread(outbound.wait, {target_pair[0]: READ}, connection, soon(TIMEOUT))
    connection.close()
    with pytest.raises(ClientGone):
        waiting()


# --- names ---

V4 = [Address(f"127.0.0.{n}", 80, AddressType.IPV4) for n in range(4)]
V6 = [Address(f"2001:db8::{n}", 80, AddressType.IPV6) for n in range(1, 4)]


@pytest.mark.parametrize(("addresses", "order"), [
    ([], []), (V4, V4), (V6[:2] + V4[:2], [V6[0], V4[0], V6[1], V4[1]]), (V4[:1] + V6, [V4[0], *V6]),
    (V4[:3] + V6[:1], [V4[0], V6[0], V4[1], V4[2]]), ([V4[0], V4[0], V6[0], V4[0], V6[0]], [V4[0], V6[0]]),
])
def test_the_families_take_turns_beginning_with_the_first(addresses, order):
    """RFC 8305 section 4"""
    assert interleave(iter(addresses)) == order


# --- connecting ---

def connect(addresses, connection, until=None, route=None):
    return outbound.connect([address_of(place) for place in addresses], route or Route(), connection, until or soon(TIMEOUT))


@contextmanager
def connected(addresses, connection, route=None):
    """The socket, and the address to which it is connected, for as long as it is needed."""
    sock, address = connect(addresses, connection, route=route)
    with sock:
        yield sock, address


@pytest.mark.usefixtures("poll_or_select")
@pytest.mark.parametrize("begin", [outbound.begin_connecting, socket.socket.connect_ex], ids=["told at once", "found out later"])
def test_the_connection_is_one_to_an_address_that_answers(monkeypatch, listen, refusing, connection, begin):
    """On Linux a connection on the same computer stands, or does not, when it has been asked for twice."""
    monkeypatch.setattr(outbound, "begin_connecting", begin)
    target = listen().getsockname()
    for places in ([target], [refusing(), target]):
        with connected(places, connection) as (sock, address):
            assert address == address_of(target)
            assert sock.getpeername() == target
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)      # E31
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)      # E34
    for places in ([refusing()], [refusing(), refusing()]):
        with fails_with(ReplyCode.CONNECTION_REFUSED):
            connect(places, connection)


@pytest.mark.usefixtures("poll_or_select")
def test_waiting_for_the_last_of_the_addresses_is_waiting_and_no_spinning(monkeypatch, silent, connection):
    waits, wait = [], outbound.wait
    monkeypatch.setattr(outbound, "wait", lambda *arguments: waits.append(arguments) or wait(*arguments))
    with pytest.raises(RequestFailed):
        connect([silent()], connection, soon(2 * STAGGER))
    assert len(waits) <= 3


@needs_neighbour
@pytest.mark.usefixtures("poll_or_select")
def test_an_address_that_refuses_costs_the_next_one_no_time(listen, refusing, connection):
    target, dead = on_one_port(partial(listen, LOCALHOST), partial(refusing, "127.0.0.2"))
    began = time.monotonic()
    with connected([dead, target.getsockname()], connection) as (_sock, address):
        assert address.host == LOCALHOST
        assert time.monotonic() - began < STAGGER / 2


@needs_neighbour
@pytest.mark.usefixtures("poll_or_select")
@pytest.mark.parametrize("dead", ["127.0.0.2", pytest.param("::1", marks=needs_ipv6)])
def test_an_address_that_is_dead_costs_the_next_one_less_than_half_a_second(listen, silent, connection, dead):
    """RFC 8305: it goes on beside it after 250 ms."""
    target, dead_place = on_one_port(partial(listen, LOCALHOST), partial(silent, dead))
    began = time.monotonic()
    with connected([dead_place, target.getsockname()], connection) as (_sock, address):
        assert address.host == LOCALHOST
        assert STAGGER <= time.monotonic() - began < within(2) * STAGGER


@needs_neighbour
def test_an_address_has_its_time_before_the_next_one_starts(monkeypatch, silent, refusing, listen):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(outbound, "time", clock)
    slow = [address_of(silent(host)) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")]
    race = HappyEyeballs([*slow, address_of(refusing()), address_of(listen().getsockname())], Route())
    try:
        running = []
        for now in (100, 100 + STAGGER - 0.01, 100 + STAGGER, 100 + 2 * STAGGER - 0.01, 100 + 2 * STAGGER):
            clock.now = now
            assert race.start_next() is None
            running.append([address for _sock, address, _started in race.running.values()])
        assert running == [slow[:1], slow[:1], slow[:2], slow[:2], slow]
        assert race.next_start == 100 + 3 * STAGGER
        assert len(race.waiting) == 2
    finally:
        race.close()
    assert all(sock.fileno() == -1 for sock, _address, _started in race.running.values())


@needs_neighbour
@pytest.mark.usefixtures("poll_or_select")
@pytest.mark.parametrize(("places", "code"), [
    (["silent"], ReplyCode.TTL_EXPIRED), (["silent", "silent"], ReplyCode.TTL_EXPIRED),
    (["refusing", "silent"], ReplyCode.CONNECTION_REFUSED), (["silent", "refusing"], ReplyCode.CONNECTION_REFUSED),
    (["unreachable"], ReplyCode.NETWORK_UNREACHABLE), (["unreachable", "silent"], ReplyCode.NETWORK_UNREACHABLE),
    (["unreachable", "refusing", "unreachable"], ReplyCode.CONNECTION_REFUSED), (["port 0"], ReplyCode.CONNECTION_REFUSED),
])
def test_when_all_addresses_fail_the_most_telling_failure_is_reported(silent, refusing, connection, places, code):
    makers = {"silent": silent, "refusing": refusing, "unreachable": lambda: (UNREACHABLE, 80), "port 0": lambda: (LOCALHOST, 0)}
    began = time.monotonic()
    with fails_with(code):
        connect([makers[place]() for place in places], connection, soon(0.6))
    assert time.monotonic() - began < within(0.9 if "silent" in places else 0.2)


def test_a_deadline_before_the_second_address_has_started_is_kept(silent, listen, connection):
    with fails_with(ReplyCode.TTL_EXPIRED):
        connect([silent(), listen().getsockname()], connection, soon(0.05))


def test_connecting_ends_when_the_client_resets(pair, silent):
    client, connection = pair
    connecting = in_thread(connect, [silent()], connection)
    reset(client)
    with pytest.raises(ClientGone):
        connecting()


# --- connections of a socket with itself ---

@pytest.fixture(params=["at once", "later"])
def stands(request, monkeypatch):
    """When it is seen that a connection on this computer stands: as on Linux, and as elsewhere."""
    if request.param == "later":
        monkeypatch.delattr(select, "epoll", raising=False)
    return request.param


@pytest.mark.usefixtures("stands")
@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_a_connection_of_a_socket_with_itself_is_none(closed_port, connection, host):
    route = FromItsTarget()
    with fails_with(ReplyCode.CONNECTION_REFUSED, "refused"):
        connect([closed_port(host)], connection, route=route)
    assert route.sockets == 2, "it is tried once more"


@pytest.mark.usefixtures("stands")
def test_a_target_that_has_connected_with_itself_is_tried_once_more(closed_port, connection, listen):
    """And its port is free at once, for the server that is expected there."""
    route = FromItsTarget()
    route.honest, listeners = 2, []
    route.before_those = lambda address: listeners.append(listen(address.host, address.port))
    place = closed_port()
    with connected([place], connection, route) as (sock, address):
        assert sock.getpeername() == listeners[0].getsockname() == (address.host, address.port) == place
        assert sock.getsockname() != place


@pytest.mark.usefixtures("stands")
@needs_neighbour
def test_a_connection_with_itself_does_not_keep_from_the_next_address(closed_port, connection, listen):
    route = FromItsTarget()
    route.honest, target = 3, listen("127.0.0.2")
    began = time.monotonic()
    with connected([closed_port(), target.getsockname()], connection, route) as (_sock, address):
        assert address == address_of(target.getsockname())
        assert time.monotonic() - began < STAGGER / 2


def test_a_client_never_gets_its_own_octets_from_a_port_where_nobody_listens(closed_port, start_server, new_client):
    client = new_client(start_server(route=FromItsTarget()))
    assert client.ask(Command.CONNECT, closed_port()) == Reply(ReplyCode.CONNECTION_REFUSED)
    assert client.rest() == b""


@pytest.mark.usefixtures("own_network")
@pytest.mark.parametrize("host", [LOCALHOST, "::1"])
def test_where_there_are_few_ports_all_that_are_closed_refuse(connection, host):
    leave_ports(50_000, 50_015)
    codes = Counter()
    for place in [(host, 50_000 + number) for number in range(16)] * 4:
        try:
            connect([place], connection)[0].close()
            codes["connected"] += 1
        except RequestFailed as error:
            codes[error.code] += 1
    assert codes == {ReplyCode.CONNECTION_REFUSED: 64}


# --- routes ---

@needs_ipv6
@pytest.mark.parametrize(("route", "host", "other", "reason"), [
    (Route(socket.AF_INET), LOCALHOST, "::1", "not of the family in use"),
    (Route(socket.AF_INET6), "::1", LOCALHOST, "not of the family in use"),
    (Route(source=LOCALHOST), LOCALHOST, "::1", "IPv6, and --source has only an IPv4 address"),
    (Route(source=("::1",)), "::1", LOCALHOST, "IPv4, and --source has only an IPv6 address"),
], ids=["IPv4", "IPv6", "a source of IPv4", "a source of IPv6"])
def test_a_route_of_one_family_leads_to_no_other(listen, connection, route, host, other, reason):
    """Who names a source does not want to be seen as another."""
    target, elsewhere = (sock.getsockname() for sock in on_one_port(partial(listen, host), partial(listen, other)))
    with connected([elsewhere, target], connection, route) as (_sock, address):
        assert address.host == host
    with fails_with(ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED) as caught:
        connect([elsewhere], connection, route=route)
    assert str(caught.value) == f"{address_of(elsewhere)} is {reason}"


@needs_neighbour
def test_a_route_goes_out_from_its_source(listen, connection):
    target = listen()
    with connected([target.getsockname()], connection, Route(source="127.0.0.2")) as (sock, _address):
        assert sock.getsockname()[0] == "127.0.0.2"
        peer, sockaddr = target.accept()
        with peer:
            assert sockaddr[0] == "127.0.0.2"


@needs_ipv6
@needs_neighbour
@pytest.mark.parametrize("source", [("127.0.0.2", "::1"), ("::1", "127.0.0.2")])
def test_a_source_of_each_family_is_for_the_targets_of_that(listen, connection, source):
    for host, own in ((LOCALHOST, "127.0.0.2"), ("::1", "::1")):
        with connected([listen(host).getsockname()], connection, Route(source=source)) as (sock, _address):
            assert sock.getsockname()[0] == own


def test_a_source_that_is_not_of_this_computer_is_a_failure_of_ours(listen, connection):
    """M: EADDRNOTAVAIL is local trouble."""
    with fails_with(ReplyCode.GENERAL_FAILURE):
        connect([listen().getsockname()], connection, route=Route(source="192.0.2.1"))


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="not on this platform: an address without a port can be reserved on Linux only")
@pytest.mark.parametrize("source", [pytest.param("127.0.0.2", marks=needs_neighbour), pytest.param("::1", marks=needs_ipv6)])
def test_a_socket_with_a_source_has_no_port_before_it_is_connected(listen, source):
    target = listen(source)
    with Route(source=source).socket(address_of(target.getsockname())) as sock:
        assert sock.getsockname()[:2] == (source, 0)
        sock.setblocking(True)
        sock.connect(target.getsockname())
        assert sock.getsockname()[0] == source
        assert sock.getsockname()[1] != 0


@pytest.mark.parametrize("option", [None, 12345], ids=["elsewhere", "an old kernel"])
def test_where_an_address_cannot_be_had_without_a_port_the_source_is_kept(listen, connection, monkeypatch, option):
    monkeypatch.setattr(outbound, "BIND_ADDRESS_NO_PORT", option)
    with connected([listen().getsockname()], connection, Route(source=LOCALHOST)) as (sock, _address):
        assert sock.getsockname()[0] == LOCALHOST


@pytest.mark.usefixtures("own_network")
@pytest.mark.parametrize("source", [LOCALHOST, "::1"])
def test_a_source_has_as_many_connections_as_there_are_ports_to_every_target(listen, connection, source):
    """Not so many in all: a port may be used to several targets at a time."""
    targets = [listen(source).getsockname() for _ in range(3)]
    leave_ports(50_000, 50_015)
    socks = [connect([target], connection, route=Route(source=source))[0] for target in targets for _ in range(10)]
    assert {sock.getsockname()[0] for sock in socks} == {source}
    assert {sock.getsockname()[1] for sock in socks} <= set(range(50_000, 50_016))
    for sock in socks:
        sock.close()


# --- being connected to ---

@pytest.mark.parametrize(("place", "route", "own"), [
    ((LOCALHOST, 0), Route(), LOCALHOST),
    pytest.param(("::1", 80), Route(), "::1", marks=needs_ipv6),
    pytest.param((LOCALHOST, 80), Route(source="127.0.0.2"), "127.0.0.2", marks=needs_neighbour),
    pytest.param(("::1", 80), Route(source=("127.0.0.2", "::1")), "::1", marks=needs_ipv6),
])
def test_the_local_address_is_the_one_that_packets_leave_from(place, route, own):
    assert outbound.local_address_towards(address_of(place), route) == own


@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_listening_is_on_a_free_port_of_this_address_and_never_blocks(host):
    with Route().listener(host) as listener, Route().listener(host) as other:
        assert listener.getsockname()[0] == host
        assert listener.getsockname()[1] != other.getsockname()[1]
        with pytest.raises(BlockingIOError):
            listener.accept()
    with pytest.raises(OSError, match=str(errno.EADDRNOTAVAIL)):
        Route().listener("192.0.2.1")


# --- without poll(), from end to end ---

@pytest.mark.usefixtures("poll_or_select")
def test_connect_and_bind_work_with_either_way_of_waiting(start_server, new_client, echo, refusing, silent):
    server = start_server(connect_timeout=1, bind_timeout=TIMEOUT)
    client = new_client(server)
    client.connect(name("localhost", echo[1]))      # a look-up, and a race of two families
    exchange(client)
    assert new_client(server).ask(Command.CONNECT, refusing()).code is ReplyCode.CONNECTION_REFUSED
    assert new_client(server).ask(Command.CONNECT, silent()).code is ReplyCode.TTL_EXPIRED

    client = new_client(server)
    first = client.ask(Command.BIND, ("0.0.0.0", 0))
    client.send(b"early")
    with socket.create_connection((first.bound.host, first.bound.port), TIMEOUT) as peer:
        assert Reply.read(client).bound == address_of(peer.getsockname())
        assert peer.recv(100) == b"early"
        peer.sendall(b"answer")
        assert client.exactly(6) == b"answer"
