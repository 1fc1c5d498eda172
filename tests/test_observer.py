"""What observers are told, when, and that they are in no client's way."""

from __future__ import annotations

import errno
import logging
import queue
import select
import socket
from typing import Any, Callable, List, Tuple, Type

import pytest

from socks5srv.observer import HOOKS, Attempt, Hooks, Observer
from socks5srv.protocol import Command, Credentials, Greeting, Method, ReplyCode, Request

from .conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange, handler_with, name

Told = Tuple[str, Tuple[Any, ...]]
RARE = ("malformed", "throttled", "resolved", "datagram", "turned_away", "accept_failed")       # not of every tunnel


def telling(hook: str) -> Callable[..., None]:
    def tell(self: Any, *details: Any) -> None:
        self.told.put((hook, details))

    return tell


class Listener(Observer):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[Told] = queue.SimpleQueue()

    (started, received, malformed, sending, throttled, authenticated, resolved, judged, tried, opened, datagram, ended,
     turned_away, accept_failed) = map(telling, HOOKS)

    def until(self, hook: str) -> List[Told]:
        """All up to the next one of this name."""
        found = [self.told.get(timeout=TIMEOUT)]
        while found[-1][0] != hook:
            found.append(self.told.get(timeout=TIMEOUT))
        return found

    def details_until(self, last: str, hook: str) -> List[Tuple[Any, ...]]:
        """The details of those of one name among them."""
        return [details for found, details in self.until(last) if found == hook]


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def observed(start_server: Any, listener: Listener) -> Any:
    """Start a server that tells the listener."""
    return lambda *handler, **settings: start_server(*handler, observers=(listener,), **settings)


def names(told: List[Told]) -> List[str]:
    return [hook for hook, _details in told]


def test_every_hook_has_its_place_in_the_table_of_those_that_are_called() -> None:
    assert {hook for hook in vars(Hooks) if not hook.startswith("_")} == set(HOOKS)
    assert all(getattr(Hooks(), hook) == () for hook in HOOKS), "an observer is called only for what it overrides"
    assert all(len(getattr(Hooks([Listener(), Observer()]), hook)) == 1 for hook in HOOKS)


def test_a_connection_is_told_in_the_order_in_which_it_comes_about(
        observed: Any, new_client: Any, echo: Any, listener: Listener) -> None:
    with new_client(observed(handler_with(resolve=lambda _self, _host: [LOCALHOST]))) as client:
        client.connect(name("echo.example", echo[1]))
        exchange(client)
    told = listener.until("ended")
    assert names(told) == [
        "started", "received", "sending", "authenticated", "received", "judged", "resolved", "judged", "tried", "sending", "opened", "ended",
    ]
    details = [details for _hook, details in told]
    session = details[0][0]
    assert all(each[0] is session for each in details)
    assert (type(details[1][1]), details[1][2], details[1][3]) == (Greeting, b"\5\1\0", 0)
    assert details[3][1:] == (Method.NO_AUTHENTICATION_REQUIRED, None)
    assert [verdict.address.host for verdict in (details[5][1], details[7][1])] == ["echo.example", LOCALHOST]
    assert details[6][1:3] == ("echo.example", [LOCALHOST])
    assert (details[8][1].connected, details[8][1].error, str(details[8][1].address)) == (True, None, f"{LOCALHOST}:{echo[1]}")
    assert (details[9][1].code, details[9][2]) == (ReplyCode.SUCCEEDED, None)
    assert details[10][1] == session.bound
    assert (session.outcome, session.up, session.down) == ("close", 5, 5), "it is complete"


@pytest.mark.parametrize(("octets", "hooks"), [
    ([b""], "malformed"), ([b"\4\1\0\x50"], "malformed sending"), ([b"\5\1\xff"], "received sending"),
    ([b"\5\1\0", b"\5\1\0\7"], "received sending authenticated malformed sending"),
    ([b"\5\1\0", b"\5\1"], "received sending authenticated malformed"),
], ids=["nothing", "SOCKS4", "no method", "no address type", "half a request"])
def test_each_client_that_has_started_ends_once(
        observed: Any, new_client: Any, listener: Listener, octets: List[bytes], hooks: str) -> None:
    client = new_client(observed())
    client.send(*octets)
    client.end()
    client.rest()
    told = listener.until("ended")
    assert names(told) == ["started", *hooks.split(), "ended"]
    for hook, details in told:
        if hook == "malformed":
            assert details[2] == octets[-1]
    assert listener.told.empty()


def test_a_message_is_told_with_the_octets_that_it_was_and_how_many_lie_behind_it(
        observed: Any, new_client: Any, listener: Listener, closed_port: Any) -> None:
    request = bytes(Request(Command.CONNECT, name(*closed_port()), rsv=0x42))
    new_client(observed()).send(b"\5\1\0" + request)
    assert [details[2:] for details in listener.details_until("ended", "received")] == [(b"\5\1\0", len(request)), (request, 0)]


def test_a_message_is_told_before_it_leaves(start_server: Any, new_client: Any) -> None:
    early: queue.SimpleQueue[bool] = queue.SimpleQueue()

    class Looking(Observer):
        def sending(self, *_details: Any) -> None:
            early.put(bool(select.select([client.socket], [], [], 0)[0]))

    client: Client = new_client(start_server(observers=(Looking(),)))
    client.greet()
    assert early.get(timeout=TIMEOUT) is False


def test_what_a_failure_reply_answers_is_told_with_it(
        observed: Any, new_client: Any, listener: Listener, closed_port: Any) -> None:
    reply = new_client(observed()).ask(Command.CONNECT, closed_port())
    told = dict(listener.until("ended"))        # of each hook the last
    (_session, message, error), (_session, attempt) = told["sending"], told["tried"]
    assert (message, error.code) == (reply, ReplyCode.CONNECTION_REFUSED)
    assert attempt.error.errno == errno.ECONNREFUSED
    assert not attempt.connected


def test_of_the_addresses_of_a_name_those_that_failed_are_told_and_the_one_that_was_first(
        observed: Any, new_client: Any, listener: Listener, echo: Any) -> None:
    server = observed(handler_with(resolve=lambda _self, _host: ["127.0.0.2", LOCALHOST]))
    new_client(server).ask(Command.CONNECT, name("two.example", echo[1]))
    attempts: List[Attempt] = [details[1] for details in listener.details_until("opened", "tried")]
    assert [(each.address.host, each.error is None, each.connected) for each in attempts] == [("127.0.0.2", False, False), (LOCALHOST, True, True)]


def test_logins_are_told_right_wrong_and_late(observed: Any, new_client: Any, listener: Listener) -> None:
    server = observed(users={"anna": "sesame"})
    for _ in range(5):
        server.policy.throttle.failed(LOCALHOST)
    client = new_client(server)
    client.greet(2)
    client.send(Credentials(b"anna", b"wrong"))
    told = listener.until("ended")
    assert "throttled" in names(told)
    [(_session, method, error)] = [details for hook, details in told if hook == "authenticated"]
    assert (method, str(error)) == (Method.USERNAME_PASSWORD, "wrong name or password")


def test_a_client_that_is_turned_away_is_told_and_has_no_session(observed: Any, new_client: Any, listener: Listener) -> None:
    server = observed(max_clients=1)
    new_client(server).greet()
    listener.until("authenticated")
    assert new_client(server).rest() == b""
    [(_hook, (client, reason))] = listener.until("turned_away")
    assert (client.host, reason) == (LOCALHOST, "limit of 1 connections reached: see --max-clients")


def test_a_failed_accept_is_told(observed: Any, new_client: Any, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.ECONNABORTED, "gone")]

    def fail_once(sock: socket.socket) -> Any:
        if failures:
            accept(sock)[0].close()
            raise failures.pop()
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", fail_once)
    assert new_client(observed()).rest() == b""
    [(_hook, (error,))] = listener.until("accept_failed")
    assert error.errno == errno.ECONNABORTED


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in RARE])
def test_a_hook_that_raises_is_a_bug_in_the_log_and_costs_the_client_nothing(
        start_server: Any, new_tunnel: Any, bugs: List[logging.LogRecord], hook: str) -> None:
    def fail(*_details: Any) -> None:
        raise ZeroDivisionError(hook)

    broken: Type[Observer] = type("Broken", (Observer,), {hook: fail})
    server = start_server(observers=(broken(), Listener()))
    new_tunnel(server).close()
    assert server.next_ended().outcome == "close"
    eventually(lambda: bugs)
    assert {record.getMessage() for record in bugs} == {"unhandled exception in an observer"}
    bugs.clear()


def test_an_observer_that_cannot_say_what_it_wants_costs_the_client_nothing(
        start_server: Any, new_tunnel: Any, bugs: List[logging.LogRecord]) -> None:
    class Broken(Listener):
        def wants(self, session: Any) -> bool:
            raise ZeroDivisionError(session.id)

    broken = Broken()
    new_tunnel(start_server(observers=(broken,)))
    assert [record.getMessage() for record in bugs] == ["unhandled exception in an observer"]
    bugs.clear()
    assert broken.told.empty()


def test_an_observer_is_told_of_the_clients_that_come_after_it(start_server: Any, new_client: Any, listener: Listener) -> None:
    server = start_server()
    before = new_client(server)
    before.greet()
    server.observers += (listener,)
    before.close()
    after = new_client(server)
    after.greet()
    after.close()
    assert {details[0].id for _hook, details in listener.until("ended")} == {2}
    server.next_ended(), server.next_ended()
    assert listener.told.empty()
