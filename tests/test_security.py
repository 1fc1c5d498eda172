"""The promises of SECURITY.rst, one test for each, under the same name."""

from __future__ import annotations

import http.client
import os
import random
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, List, Optional

import pytest

from socks5srv import descriptors, resolver, users
from socks5srv.cli import options, startup
from socks5srv.gssapi.messages import Abort, ContextToken, Encapsulated
from socks5srv.handler import Socks5Handler
from socks5srv.locality import is_own_address
from socks5srv.observer import Observer
from socks5srv.protocol import (
    UNSPECIFIED, Address, Command, Credentials, Datagram, Greeting, Method, ProtocolError, ReplyCode, Request, RequestFailed, read_name,
)
from socks5srv.ratelimit import RateLimit
from socks5srv.rules import Rules
from socks5srv.server import Socks5Server
from socks5srv.session import Session
from socks5srv.workers.shared import ReplicatedUsers

from .conftest import LOCALHOST, Client, address_of, eventually, exchange, handler_with, name, needs_neighbour, udp_socket, within
from .kerberos import Realm
from .networks import LO, add_address, be_a_router, let_any_address_be_bound
from .program import Run, Start

ROOT = Path(__file__).parent.parent


def security(heading: str, next_heading: str) -> str:
    """What stands there between the two."""
    return (ROOT / "SECURITY.rst").read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition(f"\n{next_heading}\n")[0]


def promises() -> List[str]:
    listed = security("What is promised", "Where it holds")
    return [" ".join(item.split()) for item in re.findall(r"^- (.*?)\.$", listed, re.M | re.S)]


def test_every_promise_has_a_test_of_its_name() -> None:
    assert len(promises()) > 10
    for promise in promises():
        test = "test_" + re.sub(r"[^a-z0-9]+", "_", promise.lower().replace("'s", "s"))
        assert test in globals(), promise


@pytest.fixture
def users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with anna, whose hash is cheap."""
    monkeypatch.setattr(users, "SCRYPT", (2, 1, 1))
    path = tmp_path / "users"
    path.write_text(f"anna:{users.hash_password('sesame')}\n")
    path.chmod(0o600)
    return path


def test_for_every_promise_it_is_said_where_it_holds() -> None:
    assert re.findall(r"^   \* - (.*)$", security("Where it holds", "What is not"), re.M) == ["Promise", *promises()]


def test_by_default_it_serves_this_computer_only() -> None:
    assert startup.listen_addresses(options.parse([]).hosts) == [LOCALHOST]
    with Socks5Server((LOCALHOST, 0)) as server:
        assert server.server_address[0] == LOCALHOST
    assert Socks5Server.__init__.__defaults__[0] == (LOCALHOST, 1080)     # type: ignore[index]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_refuses_to_start_as_an_open_proxy(address: str, run_command: Run) -> None:
    complaint = run_command("-b", address, "-p", "0").error()
    assert all(way in complaint for way in ("-u NAME", "--allow-from", "--allow-open-proxy", "this computer only"))
    with pytest.raises(ValueError, match=r"users=.*allow_from=.*authenticate\(\).*127\.0\.0\.1.*allow_open_proxy=True"):
        Socks5Server((address, 0))


@pytest.mark.parametrize("host", [
    "127.0.0.1", "0.0.0.0", "169.254.169.254", "::1", "fe80::1", "fd00:ec2::254", "::ffff:127.0.0.1",
    "fd20:ce::254", "100.100.100.200", "168.63.129.16", "64:ff9b:1::127.0.0.1",
])
def test_other_computers_do_not_reach_this_computers_own_addresses(host: str, start_server: Any, new_client: Any) -> None:
    server = start_server(elsewhere=True)
    assert new_client(server).ask(Command.CONNECT, name(host, 80)).code is ReplyCode.NOT_ALLOWED


@contextmanager
def sent_by_udp(client: Client, *hosts: str) -> Iterator[None]:
    """A datagram to each of these, by an association of this client."""
    relay = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    with udp_socket() as sock:
        for host in hosts:
            sock.sendto(bytes(Datagram(Address.numeric(host, 9), b"x")), relay[:2])
        yield


@pytest.mark.usefixtures("own_network")
def test_nor_do_they_by_multicast_broadcast_or_anycast(start_server: Any, new_client: Any) -> None:
    refused: List[Any] = []

    class Refused(Observer):
        def judged(self, session: Session, verdict: Any) -> None:
            refused.append((session.command, verdict.address.host, verdict.reason.endswith("is for this computer only")))

    be_a_router()
    add_address(LO, "fd66::1", 64)
    hosts = ["ff01::1", "ff02::1", "ff0e::1", "fd66::", "224.0.0.1", "255.255.255.255", "127.255.255.255"]
    server = start_server(elsewhere=True, observers=(Refused(),))
    eventually(lambda: is_own_address("fd66::1"))
    for host in hosts:
        for command in (Command.CONNECT, Command.BIND):
            assert new_client(server).ask(command, (host, 9)).code is ReplyCode.NOT_ALLOWED
    with sent_by_udp(new_client(server), *hosts):
        eventually(lambda: len(refused) == 3 * len(hosts))
    assert refused[2 * len(hosts):] == [(Command.UDP_ASSOCIATE, host, True) for host in hosts]


@pytest.mark.usefixtures("own_network")
@pytest.mark.parametrize("client", ["198.51.100.7", "2001:db8::7"])
def test_a_client_on_another_computer_is_known_as_one_whatever_addresses_can_be_bound(
        client: str, start_server: Any, new_client: Any, echo: Any) -> None:
    class From(Socks5Handler):
        def setup(self) -> None:
            self.session.client = Address.numeric(client, 4711)
            super().setup()

    let_any_address_be_bound()
    server = start_server(handler=From)
    assert new_client(server).ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
    assert server.next_ended().reason.endswith("is for this computer only")


@pytest.mark.parametrize("host", [
    "127.0.0.1", "0.0.0.0", "localhost", "127.1", "64:ff9b::127.0.0.1", "64:ff9b:1::127.0.0.1", "2002:7f00:1::",
])
def test_it_never_connects_to_itself(host: str, start_server: Any, new_client: Any) -> None:
    server = start_server()
    code = new_client(server).ask(Command.CONNECT, name(host, server.server_address[1])).code
    assert code in (ReplyCode.NOT_ALLOWED, ReplyCode.CONNECTION_REFUSED)      # refused: by ::1, where nobody listens
    assert len(server.registry.live) <= 1


def test_nothing_is_dialled_without_a_login_where_one_is_required(start_server: Any, new_client: Any, listen: Any) -> None:
    target = listen()
    server = start_server(users={"anna": "sesame"})
    request = bytes(Request(Command.CONNECT, address_of(target.getsockname())))
    for octets in (b"\5\1\0" + request, b"\5\1\2" + request, b"\5\1\2\1\4anna\5wrong" + request, b"\5\1\2\1\0\0" + request, request):
        client = new_client(server)
        client.send(octets)
        client.rest()
        assert server.next_ended().peer is None
    target.setblocking(False)
    with pytest.raises(BlockingIOError):
        target.accept()


def test_right_and_wrong_logins_take_the_same_work(monkeypatch: pytest.MonkeyPatch, users_file: Path) -> None:
    costs: List[Any] = []
    verify = users.verify

    def watched(password: str, text: str) -> bool:
        costs.append((users.Hash.parse(text).cost, len(users.Hash.parse(text).digest)))
        return verify(password, text)

    monkeypatch.setattr(users, "verify", watched)
    file = users.UsersFile(str(users_file))
    assert [file.check("anna", "wrong"), file.check("nobody", "wrong"), file.check("anna", "sesame")] == [False, False, True]
    assert costs == [((2, 1, 1), 32)] * 3
    monkeypatch.setattr(users, "SCRYPT", (4, 1, 1))
    with open(users_file, "a", encoding="utf-8") as stream:
        stream.write(f"ben:{users.hash_password('dearer')}\n")
    for kind in (users.UsersFile(str(users_file)), ReplicatedUsers(users.read_users(str(users_file)), 2)):
        costs.clear()
        assert [kind.check("nobody", "wrong"), kind.check("ben", "dearer")] == [False, True]
        assert costs == [((4, 1, 1), 32)] * 2


def test_guessing_gets_slower_but_never_locks_out_the_right_login(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any) -> None:
    monkeypatch.setattr(users, "LONGEST_WAIT", 0.05)
    server = start_server(users={"anna": "sesame"})
    for _ in range(users.FREE_TRIES + 5):
        assert not new_client(server).log_in("anna", "guess")
    assert server.policy.throttle.delay(LOCALHOST) == 0.05
    assert new_client(server).log_in("anna", "sesame")
    assert server.policy.throttle.delay(LOCALHOST) == 0


class Checked(users.Users):
    """Each check of a password takes until its event is set; `judged` are those that were running when each of them began."""

    def __init__(self) -> None:
        super().__init__({"anna": "sesame"})
        self.right, self.wrong = threading.Event(), threading.Event()
        self.lock, self.running = threading.Lock(), 0
        self.judged: List[int] = []

    def check(self, username: str, password: str) -> bool:
        with self.lock:
            self.running += 1
            self.judged.append(self.running)
        assert (self.right if username == "anna" else self.wrong).wait(20)
        with self.lock:
            self.running -= 1
        return super().check(username, password)


def guesser(client: Client, username: str = "mallory") -> Client:
    """It has sent a wrong password, which is not answered yet."""
    client.send(Greeting(b"\2"), Credentials(username.encode(), b"wrong"))
    assert client.exactly(2) == b"\5\2"
    return client


def test_guesses_side_by_side_are_judged_no_faster_than_one_after_the_other(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any) -> None:
    """At first as many at a time as one after the other, too, would be judged without a wait."""
    monkeypatch.setattr(users, "LONGEST_WAIT", 0.001)
    known = Checked()
    server = start_server(users=known)
    clients = [guesser(new_client(server)) for _ in range(30)]
    throttle, late = server.policy.throttle, 30 - users.FREE_TRIES
    eventually(lambda: len(throttle.waiting.get(LOCALHOST, [])) == late and len(known.judged) == users.FREE_TRIES)
    assert known.judged == [*range(1, users.FREE_TRIES + 1)]
    known.wrong.set()
    assert [client.exactly(2) for client in clients] == [b"\1\1"] * 30
    # Those of the beginning may end one by one, but the first of them has failed then, and the next begins when all have ended.
    assert known.judged[users.FREE_TRIES:] == [1] * late
    eventually(lambda: not throttle.trying and not throttle.waiting)


def test_passwords_are_in_no_log(start_server: Any, new_client: Any, echo: Any, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    server = start_server(users={"anna": "sesame"})
    for password in ("sesame", "guess-4711"):
        with new_client(server) as client:
            if client.log_in("anna", password):
                client.request(Command.CONNECT, echo)
        server.next_ended()
    assert "UNAME=anna" in caplog.text
    assert "sesame" not in caplog.text
    assert "guess-4711" not in caplog.text


def kerberos_client(server: Any) -> Any:
    from .gssapi.harness import KerberosClient

    return KerberosClient(server.server_address)


def test_a_kerberos_login_that_was_recorded_does_not_work_again(kerberos: Realm, start: Start) -> None:
    service = start("--workers", "2", "--gssapi", "--keytab", str(kerberos.keytab))
    with kerberos_client(service) as client:
        client.greet(Method.GSSAPI)
        recorded = bytes(ContextToken(client.initiator.step()))
        client.send(recorded)
        ContextToken.read(client)
    for _ in range(10):
        again = service.client()
        again.greet(Method.GSSAPI)
        again.send(recorded)
        assert again.rest() == bytes(Abort())


@pytest.mark.parametrize("pattern", ["alice", "*@test.local", "Alice@*", "bob@TEST.LOCAL", "alice@TEST.LOCAL.EXAMPLE", ""])
def test_a_principal_that_no_pattern_fits_is_not_let_in(kerberos: Realm, start_server: Any, pattern: str) -> None:
    from socks5srv.gssapi.handler import Gssapi, GssapiHandler

    server = start_server(GssapiHandler, gssapi=Gssapi(str(kerberos.keytab), allow=[pattern]))
    with kerberos_client(server) as client:
        client.greet(Method.GSSAPI)
        client.send(ContextToken(client.initiator.step()))
        assert client.rest() == bytes(Abort())


@pytest.mark.parametrize("level", [1, 2])
def test_what_kerberos_finds_to_be_changed_repeated_or_out_of_place_is_not_relayed(
        kerberos: Realm, start_server: Any, listen: Any, level: int) -> None:
    from socks5srv.gssapi.handler import Gssapi, GssapiHandler

    server, listener = start_server(GssapiHandler, gssapi=Gssapi(str(kerberos.keytab))), listen()
    for spoil in (
        lambda _good, first, _second: first[:-1] + bytes([first[-1] ^ 1]), lambda _good, _first, second: second, lambda good, _first, _second: good,
        lambda _good, first, _second: b"\x01\x02" + first[2:], lambda _good, first, second: bytes(Encapsulated(first[4:] + second[4:])),
        lambda _good, first, _second: first[:-1], lambda _good, _first, _second: b"in clear",
    ):
        with kerberos_client(server) as client:
            client.enter(level)
            client.connect(listener.getsockname())
            frames = [client.protection.frame(each) for each in (b"good", b"first", b"second")]
            with closing(listener.accept()[0]) as target:
                client.socket.sendall(frames[0] + spoil(*frames))
                with suppress(OSError):         # it may have been reset by now
                    client.end()
                assert until_the_reset(target) in (b"", b"good")    # a reset may overtake what came before


def until_the_reset(sock: socket.socket) -> bytes:
    received = b""
    try:
        for more in iter(lambda: sock.recv(100), b""):
            received += more
    except ConnectionResetError:
        return received
    raise AssertionError("it ended as if all were well")


def test_what_is_judged_is_what_is_dialled(start_server: Any, new_client: Any, echo: Any) -> None:
    """A name that has another address each time it is asked for."""
    judged: List[str] = []
    answers = ["192.0.2.1", LOCALHOST]
    server = start_server(handler_with(
        resolve=lambda _self, _host: [answers.pop()], allow=lambda _self, _command, address: judged.append(address.host) or True,
    ))
    client = new_client(server)
    client.connect(name("rebinding.invalid", echo[1]))
    exchange(client)
    assert judged == ["rebinding.invalid", LOCALHOST]
    assert server.sessions[0].peer.host == judged[-1]


@pytest.mark.parametrize("host", [
    "localhost", "LOCALHOST.", "127.0.0.1", "127.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "other.invalid",
])
def test_a_rule_that_denies_localhost_denies_its_addresses(host: str, start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(handler_with(resolve=lambda _self, _host: [LOCALHOST]), rules=["deny localhost"])
    assert new_client(server).ask(Command.CONNECT, name(host, echo[1])).code is ReplyCode.NOT_ALLOWED
    assert server.next_ended().reason == "rule: deny localhost"


@pytest.mark.usefixtures("names")
def test_a_name_that_rules_judge_is_not_completed_by_the_system(start_server: Any, new_client: Any, echo: Any) -> None:
    """With ``search corp.example`` in resolv.conf."""
    server = start_server()
    good, denied, unknown = ReplyCode.SUCCEEDED, ReplyCode.NOT_ALLOWED, ReplyCode.HOST_UNREACHABLE
    hosts = [name(host, echo[1]) for host in ("secret", "secret.corp.example", "web.example")]
    for rules, codes in [
        ([], [good] * 3), (["deny 192.0.2.0/24"], [good] * 3),
        (["deny *.corp.example"], [unknown, denied, good]), (["allow *.example", "deny *"], [denied, good, good]),
    ]:
        server.rules = Rules.parse(rules)
        assert [new_client(server).ask(Command.CONNECT, host).code for host in hosts] == codes, rules


@needs_neighbour
def test_every_datagram_and_every_peer_of_bind_is_judged(start_server: Any, new_client: Any) -> None:
    judged: List[Any] = []

    class Judging(Socks5Handler):
        def allow(self, command: Command, address: Address) -> bool:
            judged.append((command, address.host))
            return address.host != "127.0.0.2"

    server = start_server(handler=Judging)
    bound = new_client(server).ask(Command.BIND, UNSPECIFIED).bound
    with socket.create_connection(bound[:2], 10, ("127.0.0.2", 0)) as caller:
        assert caller.recv(1) == b""
    with sent_by_udp(new_client(server), "127.0.0.2", "127.0.0.3"):
        eventually(lambda: (Command.UDP_ASSOCIATE, "127.0.0.3") in judged)
    assert (Command.BIND, "127.0.0.2") in judged
    assert (Command.UDP_ASSOCIATE, "127.0.0.2") in judged


@needs_neighbour
def test_a_stranger_cannot_use_or_answer_a_clients_udp_association(start_server: Any, new_client: Any) -> None:
    relay = new_client(start_server()).ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    with udp_socket() as client, udp_socket() as target, udp_socket("127.0.0.2") as stranger:
        datagram = Datagram(Address.of(target.getsockname()), b"hello")
        stranger.sendto(bytes(datagram), relay[:2])
        client.sendto(bytes(datagram), relay[:2])
        _octets, proxy = target.recvfrom(100)
        target.setblocking(False)
        with pytest.raises(BlockingIOError):
            target.recv(100)
        stranger.sendto(b"forged", proxy)
        target.sendto(b"answer", proxy)
        assert client.recv(100).endswith(b"answer")


def test_an_association_belongs_to_the_port_that_its_client_has_named(start_server: Any, new_client: Any) -> None:
    """With a login, another program of the same computer is a stranger as well."""
    control = new_client(start_server(users={"anna": "sesame"}))
    assert control.log_in("anna", "sesame")
    with udp_socket() as client, udp_socket() as target, udp_socket() as stranger:
        relay = control.request(Command.UDP_ASSOCIATE, client.getsockname()).bound
        stranger.sendto(bytes(Datagram(Address.of(target.getsockname()), b"stolen")), relay[:2])
        client.sendto(bytes(Datagram(Address.of(target.getsockname()), b"mine")), relay[:2])
        octets, proxy = target.recvfrom(100)
        assert octets == b"mine"
        target.sendto(b"answer", proxy)
        assert client.recv(100).endswith(b"answer")


def test_no_input_makes_a_thread_raise(names: Any, start_server: Any, new_client: Any) -> None:
    """A storm of garbage; the fixture fails on anything that handle_error() has been called for."""
    dice = random.Random(1928)
    names.dns["a"] = LOCALHOST      # else that name would be looked up in earnest, and waited for
    server = start_server()
    requests = [b"\5\1\0\1\x7f\0\0\1\0\1", b"\5\3\0\1\0\0\0\0\0\0", b"\5\2\0\3\1a\0\0"]
    pieces = [b"\5\1\0", b"\5\2\0\2", *requests, b"GET / HTTP/1.1\r\n", b"\4\1"]
    for _ in range(2000):
        with new_client(server) as client:
            garbage = [bytes(dice.randrange(256) for _ in range(dice.randrange(30))) for _ in range(4)]
            octets = b"".join(dice.choice([*pieces, noise]) for noise in garbage)
            try:
                client.send(octets)
                if dice.random() < 0.5:
                    client.end()
                else:
                    client.reset()
            except OSError:
                pass
    for _ in range(2000):
        server.next_ended()


def test_half_open_handshakes_do_not_keep_out_a_client_that_speaks(start_server: Any, new_client: Any, new_tunnel: Any) -> None:
    server = start_server(max_handshakes=20)
    for _ in range(60):
        new_client(server).send(b"\5")
    new_tunnel(server)


@needs_neighbour
def test_nor_do_those_of_one_address_a_slow_one_from_another(start_server: Any, new_client: Any, echo: Any) -> None:
    """Although it is the oldest of all."""
    server = start_server(max_handshakes=10)
    slow = new_client(server)
    eventually(lambda: server.registry.slow.total == 1)
    for _ in range(50):
        new_client(server, source="127.0.0.2")
    assert {server.next_ended().client.host for _ in range(41)} == {"127.0.0.2"}
    slow.drip(b"\5\1\0")
    assert slow.exactly(2) == b"\5\0"
    assert slow.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    exchange(slow)


@needs_neighbour
def test_wrong_logins_do_not_keep_out_a_right_one(start_server: Any, new_client: Any, echo: Any) -> None:
    """However many are being checked, and from however many addresses; each has failed before."""
    known = Checked()
    server = start_server(users=known, max_logins=8, max_handshakes=8)
    slow = new_client(server)
    slow.send(Greeting(b"\2"), Credentials(b"anna", b"sesame"))
    eventually(lambda: len(known.judged) == 1)
    guessers = []
    for number in range(2, 42):
        server.policy.throttle.failed(f"127.0.0.{number}")
        guessers.append(guesser(new_client(server, source=f"127.0.0.{number}")))
    eventually(lambda: len(known.judged) == 41)
    assert server.registry.logins.total == 8
    known.right.set()
    assert slow.exactly(4) == b"\5\2\1\0"
    assert slow.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    exchange(slow)
    known.wrong.set()
    assert [client.rest() for client in guessers].count(b"\1\1") == 7       # the others have been hung up on


def test_no_client_uses_up_the_descriptors_of_the_server(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, new_tunnel: Any) -> None:
    """With associations, which hold most; test_bounds.py has all there is to hold."""
    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: 100)
    server = start_server()
    first = new_tunnel(server)
    replies: List[Optional[ReplyCode]] = []
    for _ in range(40):
        client = new_client(server)
        try:
            replies.append(client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).code)
        except (ProtocolError, ConnectionError):
            replies.append(None)            # turned away
    assert ReplyCode.SUCCEEDED in replies
    assert replies[-1] is not ReplyCode.SUCCEEDED
    assert descriptors.descriptors.taken <= 100 - descriptors.RESERVED
    exchange(first)


@needs_neighbour
def test_names_that_the_resolver_does_not_answer_leave_other_clients_theirs(
        monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, echo: Any) -> None:
    monkeypatch.setattr(resolver.look_ups, "most", 8)
    monkeypatch.setattr(resolver.look_ups, "share", 2)
    release = threading.Event()
    server = start_server(handler_with(
        resolve=lambda _self, host: [LOCALHOST] if host == "known.invalid" else [release.wait(30)][1:],
    ))
    for number in range(20):
        request = Request(Command.CONNECT, name(f"{number}.dead.invalid", 80))
        new_client(server, source="127.0.0.2").send(Greeting(b"\0"), request)
    eventually(lambda: len(resolver.look_ups.queue) == 18)
    client = new_client(server)
    client.connect(name("known.invalid", echo[1]))
    exchange(client)
    release.set()


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[2Jb", "a\u2028b", "a\u202eb", "x login failed: "])
def test_names_from_the_wire_cannot_forge_a_log_line(text: str) -> None:
    session = Session(1, Address.numeric(LOCALHOST, 1))
    session.user, session.command, session.destination = text, Command.CONNECT, name(text, 80)
    with pytest.raises(RequestFailed) as refused:
        read_name(text.encode())
    session.end(str(refused.value))
    columns = str(session).split(" ")
    assert str(session).isprintable()
    assert columns[2:5:2] == ["user", "CONNECT"]
    assert columns[6:8] == ["failed:", "a"]
    assert columns[-1].startswith("'")
    assert " " not in str(Credentials(text.encode(), b"")).partition("UNAME=")[2].partition(" PLEN=")[0]


def test_a_stranger_cannot_fill_the_log_and_what_is_left_out_is_counted(
        start_server: Any, new_client: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "socks5srv")
    server = start_server()

    def come(times: int) -> None:
        for _ in range(times):
            with new_client(server) as client:
                client.send(b"\x16\x03\x01\x02\x00")
                client.end()
                assert client.rest() == b""
            server.next_ended()

    come(30)
    monkeypatch.setattr(RateLimit, "interval", 0.0)
    come(1)
    first, second = [record.getMessage() for record in caplog.records if "this is TLS" in record.getMessage()]
    assert second.endswith(" (and 29 more since the last line like this)")
    assert "since" not in first


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: pipes with a name")
def test_a_pipe_in_place_of_a_file_stops_nothing(users_file: Path, start_server: Any, new_client: Any, bugs: Any) -> None:
    """Of the users file; test_run.py has the others."""
    server = start_server(users=users.UsersFile(str(users_file)), handshake_timeout=0.2)
    users_file.unlink()
    os.mkfifo(str(users_file), 0o600)
    eventually(lambda: "is not a regular file" in " ".join(record.getMessage() for record in bugs))
    bugs.clear()
    assert new_client(server).rest() == b""         # the deadline is kept
    assert "took too long" in server.next_ended().reason
    assert new_client(server).log_in("anna", "sesame")


def test_a_users_file_in_the_middle_of_a_write_ends_no_tunnel(
        users_file: Path, start_server: Any, new_client: Any, echo: Any, caplog: Any) -> None:
    caplog.set_level("INFO", "socks5srv")
    line = users_file.read_text()
    server = start_server(users=users.UsersFile(str(users_file)))
    client = new_client(server)
    assert client.log_in("anna", "sesame")
    client.request(Command.CONNECT, echo)
    looked = threading.Event()
    with users_file.open("w") as stream:
        for part in ("# our users\n", line[:7], line[7:]):
            stream.write(part)
            stream.flush()
            looked.clear()
            server.service_actions = lambda: (Socks5Server.service_actions(server), looked.set())
            assert looked.wait(10)
    eventually(lambda: "1 users read" in caplog.text)
    assert caplog.text.count("users read") == 1
    exchange(client)


def test_no_hash_is_computed_once_the_server_stops(
        users_file: Path, start_server: Any, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: List[str] = []
    release = threading.Event()
    monkeypatch.setattr(users, "verify", lambda password, _hash: computed.append(password) or release.wait(10))
    server = start_server(users=users.UsersFile(str(users_file)))
    for number in range(20):
        guesser(new_client(server, source=f"127.0.{number}.1" if sys.platform != "darwin" else None), "anna")
    eventually(lambda: len(computed) == users.AT_ONCE)
    join = server.listeners[0].join
    server.listeners[0].join = lambda timeout: (release.set(), join(timeout))       # all have been hung up on
    began = time.monotonic()
    server.server_close()
    assert time.monotonic() - began < within(0.5)
    assert [server.next_ended().reason for _ in range(20)] == ["server stopped"] * 20
    assert len(computed) == users.AT_ONCE


@pytest.fixture
def status_page(start: Start) -> str:
    """The host and port of a running command's."""
    return re.findall(r"status=http://([^ /]+)/", start("--status", "0").wait_for("status="))[0]


def answered(url: str, path: str, method: str = "GET", host: Optional[str] = None) -> int:
    """The status of its answer."""
    with closing(http.client.HTTPConnection(url, timeout=10)) as page:
        page.request(method, path, headers={"Host": host or url})
        with page.getresponse() as answer:
            return answer.status


def test_the_status_page_can_only_be_looked_at_and_only_from_this_computer(run_command: Run, status_page: str) -> None:
    assert "--status-open" in run_command("--status", "0.0.0.0:0", "0").error()
    for method, host, status in [("GET", None, 200), ("POST", None, 405), ("DELETE", None, 405), ("GET", "rebound.example", 421)]:
        assert answered(status_page, "/status.json", method, host) == status, (method, host)


def test_to_connect_to_the_status_page_and_send_nothing_keeps_out_nobody(status_page: str) -> None:
    host, _, port = status_page.rpartition(":")
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection((host, int(port)), 10))
        for path in ("/healthz", "/", "/readyz", "/status.json"):
            assert answered(status_page, path) == 200


def test_a_program_that_is_run_gets_no_option_of_the_proxys(run_command: Run) -> None:
    """In which there may be the password of an upstream."""
    print_environment = "import os; print(*sorted(os.environ), sep=chr(10))"
    options = {"SOCKS5SRV_OPTIONS": "--upstream socks5h://anna:sesame@127.0.0.1:9", "SOCKS5SRV_PASSWORD": "sesame"}
    done = run_command("--run", sys.executable, "-c", print_environment, **options)
    assert done.code == 0
    assert "ALL_PROXY" in done.stdout.splitlines()
    assert "SOCKS5SRV_" not in done.stdout


@pytest.mark.parametrize("settings", [{}, {"proxy_protocol": ["192.0.2.0/24"]}], ids=["without any", "of another address"])
def test_a_proxy_header_is_believed_of_a_load_balancer_only(settings: Any, start_server: Any, new_client: Any) -> None:
    server = start_server(users={"anna": "sesame"}, allow_from=["203.0.113.0/24"], **settings)
    client = new_client(server)
    client.send(b"PROXY TCP4 203.0.113.9 192.0.2.1 9 1080\r\n", Greeting(b"\0"))
    assert client.rest() == b""
    assert (str(server.next_ended().client.host), server.policy.throttle.failures) == (LOCALHOST, {})


def test_the_loopback_address_of_a_load_balancer_is_not_this_computers(start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(proxy_protocol=[LOCALHOST], elsewhere=True)
    client = new_client(server)
    client.send(b"PROXY TCP4 127.0.0.1 192.0.2.1 9 1080\r\n")
    assert client.ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
