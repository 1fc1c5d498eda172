"""What is counted: by hooks that are called as the core calls them, and by a real server."""

from __future__ import annotations

import errno
import pickle
from typing import Any, Dict, Optional, Type

import pytest
from tests.conftest import LOCALHOST, eventually, exchange
from tests.monitor.watched import Start, Watched

from socks5srv.foreign import ForeignProtocol
from socks5srv.monitor.metrics import BOUNDS, Counters, Metrics
from socks5srv.protocol import (
    Address, Command, Credentials, Greeting, LoginFailed, Message, Method, ProtocolError, ReplyCode, Request, RequestFailed,
)
from socks5srv.rules import Verdict
from socks5srv.session import Session


# --- by its hooks ---

@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def session(metrics: Metrics) -> Session:
    """One that has begun."""
    session = Session(1, Address.numeric(LOCALHOST, 1024))
    metrics.started(session)
    return session


def ask(metrics: Metrics, session: Session, command: Command = Command.CONNECT) -> None:
    session.user, session.command = "", command
    metrics.judged(session, Verdict(Address.named("example.com", 80)))


def fail(session: Session, error: RequestFailed) -> None:
    """As refuse() does."""
    session.reply = error.code
    session.end(str(error))


def counted(metrics: Metrics, what: str = "requests") -> Dict[Any, int]:
    return metrics.read()[0].by(what)


def test_a_request_is_counted_when_its_tunnel_stands(metrics: Metrics, session: Session) -> None:
    ask(metrics, session)
    session.reply = ReplyCode.SUCCEEDED
    assert counted(metrics) == {}
    metrics.opened(session, None)
    assert counted(metrics) == {("connect", "succeeded"): 1}
    session.end()
    metrics.ended(session)
    assert counted(metrics) == {("connect", "succeeded"): 1}


def test_a_request_is_counted_when_its_refusal_is_sent(metrics: Metrics, session: Session) -> None:
    ask(metrics, session, Command.BIND)
    fail(session, RequestFailed(ReplyCode.TTL_EXPIRED, "late"))
    assert counted(metrics) == {("bind", "ttl_expired"): 1}
    metrics.ended(session)
    assert counted(metrics) == {("bind", "ttl_expired"): 1}


def test_a_request_that_gets_no_reply_is_counted_at_the_end(metrics: Metrics, session: Session) -> None:
    ask(metrics, session)
    session.end("the client has left")
    metrics.ended(session)
    assert counted(metrics) == {("connect", "none"): 1}


def test_an_unknown_command_has_no_name(metrics: Metrics, session: Session) -> None:
    session.unknown_command = 9
    fail(session, RequestFailed(ReplyCode.COMMAND_NOT_SUPPORTED, "unknown"))
    metrics.ended(session)
    assert counted(metrics) == {("none", "command_not_supported"): 1}


SHORT = ProtocolError("it ends too soon")


@pytest.mark.parametrize(("kind", "octets", "error", "user", "hung_up", "expected"), [
    (Greeting, b"", ProtocolError("the client closed the connection before sending anything"), None, "", "closed"),
    (Greeting, b"\x05", SHORT, None, "", "bad_message"), (Credentials, b"", SHORT, None, "", "bad_message"),
    (Request, b"\x05", SHORT, "", "", "closed"), (Greeting, b"\x05", OSError("reset"), None, "", "closed"),
    (Greeting, b"\x05", SHORT, None, "timeout", "timeout"),
    (Greeting, b"\x05", SHORT, None, "crowded_out", "crowded_out"),
    (Greeting, b"\x05", SHORT, None, "stopped", "stopped"),
    (Greeting, b"GET ", ForeignProtocol("this is HTTP", kind="http"), None, "", "http"),
    (Greeting, b"GET ", ForeignProtocol("the PAC file", kind="pac"), None, "", None),
])
def test_a_handshake_fails_for_a_reason(
    metrics: Metrics, session: Session, kind: Type[Message], octets: bytes, error: Exception, user: Optional[str], hung_up: str, expected: Optional[str],
) -> None:
    session.user, session.reason, session.hung_up = user, hung_up and "in a sentence", hung_up      # of a thread that has hung up on it
    metrics.malformed(session, kind, octets, error, 0)
    session.end(str(error))
    failures = counted(metrics, "handshake_failures")       # as soon as it is over
    metrics.ended(session)
    assert failures == counted(metrics, "handshake_failures") == ({(expected,): 1} if expected else {})
    assert counted(metrics, "sessions") == {("bad_protocol",): 1}


def test_no_acceptable_method_is_a_reason_of_its_own(metrics: Metrics, session: Session) -> None:
    session.no_acceptable_method = True
    session.end("no method")
    metrics.ended(session)
    assert counted(metrics, "handshake_failures") == {("no_acceptable_method",): 1}


def test_logins_are_counted_by_method_and_result(metrics: Metrics, session: Session) -> None:
    metrics.authenticated(session, Method.NO_AUTHENTICATION_REQUIRED, None)
    for error in (None, LoginFailed("wrong"), ProtocolError("that was no login")):
        metrics.authenticated(session, Method.USERNAME_PASSWORD, error)
    assert counted(metrics, "auth_attempts") == {("none", "success"): 1, ("username_password", "failure"): 1, ("username_password", "success"): 1}


def test_connecting_is_timed_from_when_the_addresses_are_known(metrics: Metrics, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("socks5srv.monitor.metrics.time.monotonic", lambda: now[0])
    ask(metrics, session)
    now[0] += 3
    metrics.resolved(session, "example.com", ["192.0.2.1"], 3.0, None)
    now[0] += 0.25
    metrics.opened(session, None)
    assert counted(metrics, "resolving") == {("5.0",): 1, ("microseconds",): 3_000_000}
    assert counted(metrics, "connecting") == {("0.25",): 1, ("microseconds",): 250_000}


@pytest.mark.parametrize("command", [Command.BIND, Command.UDP_ASSOCIATE])
def test_only_connect_connects(metrics: Metrics, session: Session, command: Command) -> None:
    ask(metrics, session, command)
    metrics.opened(session, None)
    assert counted(metrics, "connecting") == {}


def test_clients_at_the_door_are_counted(metrics: Metrics) -> None:
    metrics.turned_away(Address.numeric(LOCALHOST, 1), "limit reached")
    metrics.accept_failed(OSError(errno.EMFILE, "too many open files"))
    metrics.accept_failed(OSError("it has no number"))
    assert counted(metrics, "clients") == {("turned_away",): 1}
    assert counted(metrics, "accept_errors") == {("EMFILE",): 1, ("other",): 1}


def test_what_is_timed_has_a_counter_for_each_bound_and_one_beyond() -> None:
    counters, both = Counters(), Counters()
    for seconds in (0.001, 0.005, 0.3, 99.0):
        counters.time("resolving", seconds)
    assert [counters["resolving", bound] for bound in BOUNDS] == [2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    both.update(counters)
    both.update(pickle.loads(pickle.dumps(counters)))
    assert both.by("resolving") == {("+Inf",): 2, ("0.005",): 4, ("0.5",): 2, ("microseconds",): 198_612_000}


# --- of a real server ---

def test_the_sum_of_octets_never_goes_back(page: Watched, echo: Any, new_client: Any) -> None:
    def octets() -> int:
        return page.metrics.read()[0]["octets", "up"]

    seen = []
    for _ in range(40):
        with new_client(page) as client:
            client.connect(echo)
            exchange(client, b"x" * 10000)
        seen += [octets() for _ in range(20)]
    assert seen == sorted(seen)
    assert eventually(lambda: octets() == 400000)


def test_what_goes_wrong_is_counted(watch: Start, new_client: Any, refusing: Any) -> None:
    page = watch(users={"anna": "sesame"})
    assert not new_client(page).log_in("anna", "wrong")
    client = new_client(page)
    assert client.log_in("anna", "sesame")
    assert client.request(Command.CONNECT, refusing()).code is ReplyCode.CONNECTION_REFUSED
    for octets in (b"\x04\x01\0\0\0\0\0\0\0", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01", b"xyz", b"P\xff", b"\x05\x00", b"\x05\x01\x00", b""):
        client = new_client(page)
        client.send(octets)
        client.end()
        client.rest()
    counters = page.when(lambda status: sum(status["counters"]["sessions"].values()) == 10)["counters"]
    assert (counters["failed_logins"], counters["replies"]["connection_refused"]) == (1, 1)
    failures = {"closed": 1, "http": 1, "no_acceptable_method": 2, "not_socks": 2, "socks4": 1, "tls": 1}
    assert (counters["handshake_failures"], counters["sessions"]["no_acceptable_method"]) == (failures, 2)


def test_the_pac_file_is_no_failure_unless_it_is_refused(page: Watched, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, here in ((1, True), (2, False)):
        monkeypatch.setattr(page.server.policy, "is_here", lambda _host, here=here: here)
        with new_client(page) as client:
            client.send(b"GET /proxy.pac HTTP/1.1\r\n\r\n")
            assert client.rest().startswith(b"HTTP/1.1 200 " if here else b"HTTP/1.1 501 ")
        eventually(lambda number=number: page.sessions_ended() == number)
    assert page.status()["counters"]["handshake_failures"] == {"http": 1}


def test_a_client_that_is_too_slow_or_crowded_out_is_counted_as_that(watch: Start, new_client: Any) -> None:
    page = watch(handshake_timeout=0.2)
    new_client(page).rest()
    page.server.handshake_timeout, page.server.max_handshakes = 30, 1
    first = new_client(page)
    port = first.socket.getsockname()[1]
    eventually(lambda: [handler.session.client.port for handler in page.server.registry.handshakes.values()] == [port])
    with new_client(page):
        first.rest()
    page.when(lambda status: status["counters"]["handshake_failures"] == {"timeout": 1, "crowded_out": 1, "closed": 1})
