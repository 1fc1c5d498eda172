"""A server behind which there is another one: all commands go through it, and what it says comes back."""

from __future__ import annotations

import contextlib
import select
import socket
from itertools import product
from typing import Any, Callable, Iterator, List, Optional, Type

import pytest

from socks5srv import upstream
from socks5srv.client import Proxy, bind, connect, udp_associate
from socks5srv.outbound import Route
from socks5srv.protocol import (
    UNSPECIFIED, Address, AddressType, Command, Datagram, Greeting, Method, MethodSelection, Reply, ReplyCode, Request,
    RequestFailed,
)
from socks5srv.rules import Rules
from socks5srv.handler import Socks5Handler
from socks5srv.upstream import LoopDetector, UpstreamHandler, spelled_out

from .conftest import (
    LOCALHOST, TIMEOUT, Client, FromItsTarget, address_of, eventually, exchange, fails_with, handler_with, in_thread, name,
    needs_ipv6, set_reset, udp_socket,
)

SOON = 0.3          # seconds, for deadlines that have to pass
THERE = "only.there.example"


def url_of(server: Any, login: str = "") -> str:
    host, port = getattr(server, "server_address", server)[:2]
    return f"socks5h://{login}{f'[{host}]' if ':' in host else host}:{port}"


def through(server: Any, login: str = "", **methods: Any) -> Type[UpstreamHandler]:
    """A handler that goes through this server."""
    return type("Through", (UpstreamHandler,), {"upstream": url_of(server, login), **methods})


@pytest.fixture
def far(start_server: Any) -> Any:
    """The upstream: it knows a name that nobody else does, and finds it here."""
    return start_server(handler_with(resolve=lambda _self, host: {THERE: [LOCALHOST]}[host]))


@pytest.fixture
def near(start_server: Any, far: Any) -> Any:
    """The server in front of it."""
    return start_server(through(far))


@pytest.fixture
def asked(start_server: Any, listen: Any, new_client: Any) -> Callable[..., Any]:
    """
    A server that a client asks for something, while its upstream is ours: ``with asked(answers, command, place, **attributes)``
    gives the server, the connection that it has made, on which these answers have been sent, and what will be said to the client.
    """
    @contextlib.contextmanager
    def ask(answers: bytes, command: Command = Command.CONNECT, place: Any = (LOCALHOST, 80), **attributes: Any) -> Iterator[Any]:
        odd = listen()
        near = start_server(through(odd.getsockname()), **attributes)
        said = in_thread(new_client(near).ask, command, place)
        with odd.accept()[0] as accepted:
            accepted.settimeout(TIMEOUT)
            accepted.sendall(answers)
            yield near, accepted, said

    return ask


def with_relay_at(bound: Address) -> bytes:
    """What an upstream answers that has an association's relay there."""
    return bytes(MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)) + bytes(Reply(ReplyCode.SUCCEEDED, bound))


# --- CONNECT ---

@pytest.mark.parametrize("host", [LOCALHOST, THERE, pytest.param("::1", marks=needs_ipv6)])
def test_a_client_reaches_what_the_upstream_can_reach(near: Any, far: Any, start_echo: Any, new_client: Any, host: str) -> None:
    place = address_of((host, start_echo("::1" if host == "::1" else LOCALHOST).server_address[1]))
    with new_client(near) as client:
        client.connect(place)
        exchange(client)
    here, there = near.next_ended(), far.next_ended()
    assert here.destination == there.destination == place
    assert str(here.peer) == f"{LOCALHOST}:{far.server_address[1]}"
    assert (here.up, here.down) == (there.up, there.down) == (5, 5)


def test_the_reply_has_the_upstreams_end_of_the_connection(near: Any, start_echo: Any, new_client: Any) -> None:
    echo = start_echo()
    reply = new_client(near).connect(echo.server_address)
    (accepted,) = eventually(lambda: echo.connections)
    assert reply.bound == Address.of(accepted.getpeername())


def test_what_is_sent_ahead_arrives_and_either_way_ends_by_itself(near: Any, echo: Any, new_client: Any) -> None:
    client = new_client(near)
    client.send(Greeting(b"\0"), Request(Command.CONNECT, address_of(echo)), b"hello")
    client.end()
    assert client.rest().endswith(b"hello")


def test_a_chain_may_have_three_links(near: Any, start_server: Any, echo: Any) -> None:
    with connect(url_of(start_server(through(near))), THERE, echo[1]) as sock:
        exchange(sock)


@pytest.mark.parametrize("code", [code for code in ReplyCode if code is not ReplyCode.SUCCEEDED])
def test_the_reply_codes_of_the_upstream_are_passed_on(start_server: Any, code: ReplyCode) -> None:
    def refuse(_self: Any, _request: Request) -> Any:
        raise RequestFailed(code)

    near = start_server(through(start_server(handler_with(connect=refuse))))
    assert answer(near, Command.CONNECT, name("example.com", 80)) == Reply(code, UNSPECIFIED)
    assert near.next_ended().reason.endswith(code.phrase)


# --- the upstream has troubles ---

def answer(server: Any, command: Command, place: Any) -> Reply:
    """What is said to a client, which leaves then."""
    with Client(server.server_address) as client:
        return client.ask(command, place)


def refused(server: Any) -> Any:
    """The session of a CONNECT that has to fail with reply 01."""
    assert answer(server, Command.CONNECT, (LOCALHOST, 80)).code is ReplyCode.GENERAL_FAILURE
    return server.next_ended()


def test_an_upstream_that_is_down_is_no_fault_of_the_target(start_server: Any, refusing: Any) -> None:
    place = refusing()
    session = refused(start_server(through(place)))
    assert session.reason == "upstream %s port %d: %s:%d: Connection refused" % (place * 2)


def test_an_upstream_that_is_down_is_not_mistaken_for_the_socket_that_calls_it(start_server: Any, closed_port: Any) -> None:
    session = refused(start_server(through(closed_port()), route=FromItsTarget()))
    assert session.reason.endswith("Connection refused")


@pytest.mark.parametrize("login", ["", "anna:guessed@", "ben:sesame@"])
def test_an_upstream_that_wants_another_login_says_so_in_the_log(start_server: Any, login: str) -> None:
    far = start_server(users={"anna": "sesame"})
    reason = refused(start_server(through(far, login))).reason
    assert ("does not accept the name or the password" if login else "requires authentication") in reason
    assert "guessed" not in reason


def test_the_login_for_the_upstream_is_ours_and_not_the_clients(start_server: Any, echo: Any) -> None:
    far = start_server(users={"anna": "sesame"})
    near = start_server(through(far, "anna:sesame@"), users={"ben": "4711"})
    with connect(url_of(near, "ben:4711@"), *echo) as sock:
        exchange(sock)
    assert (near.next_ended().user, far.next_ended().user) == ("ben", "anna")


@pytest.mark.parametrize(("answers", "code"), [
    (b"", ReplyCode.GENERAL_FAILURE), (b"\x05\x00", ReplyCode.TTL_EXPIRED), (b"\x05\x00\x05\x00\x00", ReplyCode.TTL_EXPIRED),
])
def test_an_upstream_that_falls_silent_is_waited_for_until_the_deadline(asked: Any, answers: bytes, code: ReplyCode) -> None:
    with asked(answers, connect_timeout=SOON) as (near, _accepted, said):
        assert said().code is code
    assert "did not answer in time" in near.next_ended().reason


@pytest.mark.parametrize("answers", [b"\x05", b"\x05\x00", b"\x05\x00\x05\x00", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_upstream_that_hangs_up_or_is_none_is_a_general_failure(asked: Any, answers: bytes) -> None:
    with asked(answers) as (near, accepted, said):
        with contextlib.suppress(OSError):      # we may have had enough already
            accepted.shutdown(socket.SHUT_WR)
        assert said().code is ReplyCode.GENERAL_FAILURE
    near.next_ended()


@pytest.mark.parametrize("answers", [b"", b"\x05\x00"])
def test_nobody_waits_for_the_upstream_when_the_client_has_left(start_server: Any, listen: Any, new_client: Any, answers: bytes) -> None:
    silent = listen()
    near = start_server(through(silent.getsockname()))
    client = new_client(near)
    client.greet()
    client.send(Request(Command.CONNECT, address_of((LOCALHOST, 80))))
    with silent.accept()[0] as accepted:
        accepted.settimeout(TIMEOUT)
        accepted.sendall(answers)
        accepted.recv(3)
        client.reset()
        assert near.next_ended().reason == "the client has left"
        with contextlib.suppress(ConnectionError):
            while accepted.recv(100):
                pass


def test_an_upstream_with_a_name_is_looked_up(start_server: Any, far: Any, echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.resolver, "look_up", lambda host, _family: {"far.example": [LOCALHOST]}[host])
    near = start_server(through(("far.example", far.server_address[1])))
    with connect(url_of(near), *echo) as sock:
        exchange(sock)


# --- what may be reached ---

@pytest.mark.parametrize(("rules", "host", "reached"), [
    (["deny *.example"], THERE, False), (["deny other.example"], THERE, True),
    (["deny 127.0.0.0/8"], LOCALHOST, False), (["deny 127.0.0.0/8"], "127.1", False),
    (["deny 127.0.0.0/8"], THERE, True),          # what it is over there, nobody here can know
    (["deny 0.0.0.0/0", "deny ::/0"], LOCALHOST, False), (["deny 0.0.0.0/0", "deny ::/0"], THERE, True),
    (["allow 127.0.0.0/8", "deny *"], LOCALHOST, True), (["allow 127.0.0.0/8", "deny *"], THERE, False),
    (["allow only.there.example", "deny *"], THERE, True), (["deny 10.0.0.0/8", "allow *.example", "deny *"], THERE, True),
])
@pytest.mark.parametrize("command", [Command.CONNECT, Command.UDP_ASSOCIATE])
def test_the_rules_judge_names_and_addresses_as_they_are_written(
        near: Any, echo: Any, rules: List[str], host: str, reached: bool, command: Command) -> None:
    near.rules = Rules.parse(rules)
    if command is Command.CONNECT:
        with contextlib.nullcontext() if reached else fails_with(ReplyCode.NOT_ALLOWED):
            connect(url_of(near), host, echo[1]).close()
        return
    with udp_socket() as target, udp_socket() as allowed, udp_associate(url_of(near)) as relay:
        near.rules = Rules.parse([f"allow :{allowed.getsockname()[1]}", *rules])
        relay.sendto(b"judged", (host, target.getsockname()[1]))
        relay.sendto(b"allowed", allowed.getsockname())
        assert allowed.recv(100) == b"allowed"
        assert heard(target) == (b"judged" if reached else None)


SPELLINGS = ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "::ffff:127.0.0.1", "[::ffff:127.0.0.1]"]
OTHER_DIGITS = ["\uff11\uff12\uff17.0.0.1", "127\uff0e1", "0\uff587f.1"]


@pytest.mark.parametrize(("command", "host"), [
    *product([Command.CONNECT, Command.BIND], [*SPELLINGS, *OTHER_DIGITS]),
    (Command.CONNECT, "0.0.0.0"), (Command.CONNECT, "0"),       # in BIND they are anyone
], ids=ascii)
def test_an_address_is_judged_as_one_however_it_is_spelled(near: Any, far: Any, host: str, command: Command) -> None:
    near.rules = Rules.parse(["deny 127.0.0.0/8"])
    assert answer(near, command, name(host, 80)).code is ReplyCode.NOT_ALLOWED
    assert near.next_ended().event == "denied"
    assert far.sessions == []


def test_a_name_beyond_ascii_is_judged_and_sent_on_in_one_spelling(start_server: Any, echo: Any) -> None:
    far = start_server(handler_with(resolve=lambda _self, host: {"xn--fa-hia.test": [LOCALHOST]}[host]))
    near = start_server(through(far))
    with Client(near.server_address) as client:
        client.connect(name("fa\u00df.test", echo[1]))
        exchange(client)
    assert far.next_ended().destination == name("xn--fa-hia.test", echo[1])
    assert near.next_ended().destination == name("fa\u00df.test", echo[1]), "the log has it as it came"
    near.rules = Rules.parse(["deny xn--fa-hia.test"])
    assert answer(near, Command.CONNECT, name("fa\u00df.test", 80)).code is ReplyCode.NOT_ALLOWED


UNSPELLABLE = ["\u00e4..b", "\uff1a\uff1a1", "\u00e9." * 80 + "x"]


@pytest.mark.parametrize("host", UNSPELLABLE, ids=ascii)
@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND])
def test_a_name_that_cannot_be_spelled_is_not_sent_on(near: Any, far: Any, host: str, command: Command) -> None:
    assert answer(near, command, name(host, 80)).code is ReplyCode.HOST_UNREACHABLE
    assert far.sessions == []


def test_a_datagram_to_such_a_name_costs_nothing_but_itself(near: Any) -> None:
    with udp_socket() as target, udp_associate(url_of(near)) as relay:
        for host in UNSPELLABLE:
            relay.socket.send(bytes(Datagram(name(host, 80), b"lost")))
        relay.sendto(b"there", target.getsockname())
        assert target.recv(100) == b"there"


@pytest.mark.parametrize("host", ["example.com", "1.example", "0x7g", "-1", "1.2.3.4.5"])
def test_names_stay_names(host: str) -> None:
    assert spelled_out(name(host, 80)) == name(host, 80)


def test_a_hook_is_asked_for_what_will_be_sent_on(start_server: Any, far: Any) -> None:
    judged: List[Address] = []
    near = start_server(through(far, allow=lambda _self, _command, address: bool(judged.append(address))))
    for host in (THERE, "127.1"):
        assert answer(near, Command.CONNECT, name(host, 80)).code is ReplyCode.NOT_ALLOWED
    assert judged == [name(THERE, 80), Address.numeric(LOCALHOST, 80)]


# --- BIND ---

@pytest.mark.parametrize("host", [LOCALHOST, "0.0.0.0", THERE])
def test_bind_listens_at_the_upstream(near: Any, far: Any, host: str) -> None:
    with bind(url_of(near), host) as waiting, socket.create_connection(waiting.address[:2], TIMEOUT) as peer:
        sock, address = waiting.accept()
        with sock:
            assert address == Address.of(peer.getsockname())
            sock.settimeout(TIMEOUT)
            for one, other, octets in ((sock, peer, b"there"), (peer, sock, b"and back")):
                one.sendall(octets)
                assert other.recv(100) == octets
    assert far.next_ended().bound == waiting.address
    assert near.next_ended().bound == waiting.address


def test_what_is_sent_before_the_peer_calls_is_kept_for_it(near: Any, new_client: Any) -> None:
    client = new_client(near)
    first = client.ask(Command.BIND, UNSPECIFIED)
    client.send(b"early")
    with socket.create_connection(first.bound[:2], TIMEOUT) as peer:
        assert peer.recv(100) == b"early"
        assert Reply.read(client).code is ReplyCode.SUCCEEDED


def test_a_caller_that_the_rules_deny_is_not_let_through(near: Any) -> None:
    with bind(url_of(near)) as waiting:
        near.rules = Rules.parse(["deny 127.0.0.1"])
        with socket.create_connection(waiting.address[:2], TIMEOUT), fails_with(ReplyCode.NOT_ALLOWED):
            waiting.accept()


def test_a_destination_that_the_rules_deny_is_not_asked_for(near: Any, far: Any) -> None:
    near.rules = Rules.parse(["deny *"])
    for host in (LOCALHOST, THERE):
        with fails_with(ReplyCode.NOT_ALLOWED):
            bind(url_of(near), host)
    assert far.sessions == []


def test_zeros_are_no_destination_and_whoever_calls_is_judged(start_server: Any, far: Any) -> None:
    near = start_server(through(far), elsewhere=True, rules=["allow 192.0.2.1", "deny *"])
    with bind(url_of(near)) as waiting, socket.create_connection(waiting.address[:2], TIMEOUT), fails_with(ReplyCode.NOT_ALLOWED):
        waiting.accept()
    assert near.next_ended().reason.endswith("is for this computer only")


def test_a_hook_is_asked_for_zeros_as_well(start_server: Any, far: Any) -> None:
    near = start_server(through(far, allow=lambda _self, _command, address: address != UNSPECIFIED))
    with fails_with(ReplyCode.NOT_ALLOWED):
        bind(url_of(near))
    assert far.sessions == []


def test_the_upstream_waits_no_more_when_the_client_has_left(near: Any, far: Any) -> None:
    with bind(url_of(near)):
        pass
    assert near.next_ended().reason == "the client has left"
    assert far.next_ended().command is Command.BIND


def test_nobody_calls_in_time(start_server: Any, far: Any) -> None:
    near = start_server(through(far), bind_timeout=SOON)
    with bind(url_of(near)) as waiting, fails_with(ReplyCode.TTL_EXPIRED):
        waiting.accept()
    far.next_ended()


def test_the_upstreams_second_reply_is_passed_on(start_server: Any) -> None:
    near = start_server(through(start_server(bind_timeout=SOON)))
    with bind(url_of(near)) as waiting, fails_with(ReplyCode.TTL_EXPIRED):
        waiting.accept()


# --- UDP ---

def heard(sock: socket.socket) -> Optional[bytes]:
    """What has come already, if anything has."""
    sock.settimeout(0.2)
    try:
        return sock.recv(100)
    except socket.timeout:
        return None


@pytest.mark.parametrize("host", [LOCALHOST, THERE, pytest.param("::1", marks=needs_ipv6)])
def test_datagrams_go_through_both_relays(near: Any, far: Any, host: str) -> None:
    with udp_socket("::1" if host == "::1" else LOCALHOST) as target, udp_associate(url_of(near)) as relay:
        relay.socket.settimeout(TIMEOUT)
        for data in (b"there", b"", b"again"):
            relay.sendto(data, (host, target.getsockname()[1]))
            received, source = target.recvfrom(100)
            assert received == data
            target.sendto(data[::-1], source)
            assert relay.recvfrom() == (data[::-1], target.getsockname()[:2])
    here, there = near.next_ended(), far.next_ended()
    assert (here.up, here.down) == (there.up, there.down) == (10, 10)
    assert str(here.peer) == f"{LOCALHOST}:{far.server_address[1]}"


def test_the_largest_datagrams_go_through(near: Any) -> None:
    with udp_socket() as target, udp_associate(url_of(near)) as relay:
        relay.socket.settimeout(TIMEOUT)
        relay.sendto(b"x" * 65497, target.getsockname())
        data, source = target.recvfrom(65535)
        assert len(data) == 65497
        target.sendto(data, source)
        assert len(relay.recvfrom()[0]) == 65497


def test_the_end_of_the_upstreams_connection_is_the_end(near: Any, far: Any) -> None:
    with udp_associate(url_of(near)) as relay:
        (live,) = far.registry.live.values()
        live.hang_up("enough")
        assert near.next_ended().reason == "closed by upstream"
        relay.control.settimeout(TIMEOUT)
        assert relay.control.recv(1) == b""


def test_a_reset_by_the_upstream_is_called_one(near: Any, far: Any) -> None:
    with udp_associate(url_of(near)):
        (live,) = far.registry.live.values()
        eventually(lambda: live._tunnel is not None and len(far.relays[0].watched) == 3)
        far.relays[0].call(lambda: (set_reset(live.connection), live._tunnel.abort("reset")))
        assert near.next_ended().reason == "upstream: connection reset"


def test_the_end_of_the_clients_connection_is_the_end_of_the_upstreams(near: Any, far: Any) -> None:
    udp_associate(url_of(near)).close()
    assert near.next_ended().reason == far.next_ended().reason == "closed by client"


def test_the_server_can_be_stopped_with_associations(near: Any, far: Any) -> None:
    with udp_associate(url_of(near)):
        near.server_close()
        assert near.next_ended().reason == "server stopped"
        assert far.next_ended().reason == "closed by client"


@pytest.mark.parametrize("reassemble", [False, True])
def test_fragments_are_dropped_or_put_together_here(start_server: Any, far: Any, reassemble: bool) -> None:
    near = start_server(through(far), reassemble=reassemble)
    with udp_socket() as target, udp_associate(url_of(near)) as relay:
        there = Address.of(target.getsockname())
        for frag, data in ((1, b"one "), (0x82, b"two"), (0, b"whole")):
            relay.socket.send(bytes(Datagram(there, data, frag)))
        received = [target.recv(100) for _ in range(1 + reassemble)]
    assert received == [b"one two", b"whole"] if reassemble else [b"whole"]


def test_what_the_upstream_sends_too_early_or_wrong_does_no_harm(start_server: Any, listen: Any) -> None:
    odd = listen()
    near = start_server(through(odd.getsockname()))
    with udp_socket() as relay_there:
        def serve() -> socket.socket:
            accepted = odd.accept()[0]
            accepted.sendall(with_relay_at(Address.numeric("0.0.0.0", relay_there.getsockname()[1])))      # on its own host
            return accepted

        accepted = in_thread(serve)
        with udp_associate(url_of(near)) as relay, accepted() as control:
            relay.socket.settimeout(TIMEOUT)
            (handler,) = near.registry.live.values()
            answers = eventually(lambda: handler._tunnel).answers.socket
            outer, there = answers.getsockname(), Address.numeric("192.0.2.1", 53)
            relay_there.sendto(bytes(Datagram(there, b"too early")), outer)
            eventually(lambda: not select.select([answers], [], [], 0)[0])      # it has been read
            relay.sendto(b"?", there[:2])
            assert relay_there.recv(100) == bytes(Datagram(there, b"?"))
            for octets in (b"", b"\0\0\0", b"\0\0\0\x09" + bytes(20), bytes(Datagram(there, b"part", 1)), bytes(Datagram(there, b"!"))):
                relay_there.sendto(octets, outer)
            assert relay.socket.recv(100) == bytes(Datagram(there, b"!"))
            control.close()
    near.next_ended()


@pytest.mark.parametrize("bound", [name("relay.example", 1), Address("240.0.0.1", 0, AddressType.IPV4)])
def test_a_relay_that_cannot_be_reached_is_a_general_failure(asked: Any, bound: Address) -> None:
    with asked(with_relay_at(bound), Command.UDP_ASSOCIATE, UNSPECIFIED) as (near, accepted, said):
        assert said().code is not ReplyCode.SUCCEEDED
        while accepted.recv(100):       # closed
            pass
    near.next_ended()


@needs_ipv6
def test_a_relay_that_the_source_cannot_reach_is_not_used(asked: Any) -> None:
    there, route = with_relay_at(Address.numeric("::1", 9)), Route(source=LOCALHOST)
    with asked(there, Command.UDP_ASSOCIATE, UNSPECIFIED, route=route) as (near, _accepted, said):
        assert said().code is ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED
    assert near.next_ended().reason == "[::1]:9 is IPv6, and --source has only an IPv4 address"


# --- loops ---

def test_an_upstream_that_is_the_server_itself_is_not_called(start_server: Any) -> None:
    near = start_server(type("Mirror", (UpstreamHandler,), {}))
    near.RequestHandlerClass.upstream = url_of(near)
    assert "this server itself" in refused(near).reason
    assert near.told.empty()


@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND, Command.UDP_ASSOCIATE])
def test_a_chain_that_leads_back_ends_before_anything_runs_out(start_server: Any, command: Command) -> None:
    one = start_server(type("One", (UpstreamHandler,), {}))
    other = start_server(through(one))
    one.RequestHandlerClass.upstream = url_of(other)
    assert answer(one, command, name("example.com", 80)).code is ReplyCode.GENERAL_FAILURE
    sessions = one.registry.next_id()
    assert sessions <= 2 * upstream.SUSPICIOUS
    # One of the two knows it now, and lets nobody in until it looks again.
    assert upstream.loops[one].is_there or upstream.loops[other].is_there
    refused(one)
    assert one.registry.next_id() - sessions <= 3
    eventually(lambda: not one.sessions and not other.sessions)


def test_a_busy_server_is_no_loop(start_server: Any, echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "SUSPICIOUS", 2)
    looked_up: List[str] = []

    def resolve(_self: Any, host: str) -> List[str]:
        looked_up.append(host)
        if host != THERE:
            raise OSError("no such name")
        eventually(lambda: len(looked_up) >= 4)     # so that all of them wait at a time
        return [LOCALHOST]

    near = start_server(through(start_server(handler_with(resolve=resolve))))
    results: List[Callable[[], socket.socket]] = [in_thread(connect, url_of(near), THERE, echo[1]) for _ in range(3)]
    for result in results:
        with result() as sock:
            exchange(sock)
    assert [host for host in looked_up if host != THERE] == [upstream.loops[near].name]


def test_a_loop_is_looked_for_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopDetector()
    monkeypatch.setattr(upstream, "SUSPICIOUS", 2)
    with loop.one_more_waits() as first, loop.one_more_waits() as second, loop.one_more_waits() as third:
        assert [first, second, third] == [False, True, False]
        loop.next_look = 0.0
        with loop.one_more_waits() as fourth:
            assert fourth
    assert loop.waiting == 0
    assert not loop.is_there
    loop.found()
    assert loop.is_there


# --- as a class ---

def test_the_upstream_may_be_a_proxy_or_its_url(far: Any, start_server: Any, echo: Any) -> None:
    near = start_server(through(far, upstream=Proxy.parse(url_of(far))))
    with connect(url_of(near), *echo) as sock:
        exchange(sock)


def test_nothing_but_the_upstream_is_ever_called(near: Any, echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a resolver."""
    def complain(*_arguments: Any) -> Any:
        raise AssertionError("looked up")

    monkeypatch.setattr(Socks5Handler, "resolve", complain)
    with connect(url_of(near), THERE, echo[1]) as sock, udp_socket() as target, udp_associate(url_of(near)) as relay:
        exchange(sock)
        relay.sendto(b"there", (THERE, target.getsockname()[1]))
        assert target.recv(100) == b"there"
