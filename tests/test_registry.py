"""How many are served at a time, and who has to make room where places are few."""

from __future__ import annotations

from typing import Any, Callable, List

import pytest

from socks5srv import descriptors as module
from socks5srv.protocol import Address, Method, MethodSelection
from socks5srv.registry import Places, Registry, network_of
from socks5srv.session import Session

from .conftest import LOCALHOST, Client, eventually, needs_neighbour


class Caller:
    def __init__(self, number: int, host: str) -> None:
        self.session = Session(number, Address.numeric(host, 1))


def numbers(callers: List[Caller]) -> List[int]:
    return [caller.session.id for caller in callers]


@pytest.mark.parametrize(("one", "other", "same"), [
    ("192.0.2.1", "192.0.2.1", True), ("192.0.2.1", "192.0.2.2", False),
    ("2001:db8::1", "2001:db8::2", True), ("2001:db8::1", "2001:db8:0:0:ffff::", True), ("2001:db8::1", "2001:db8:0:1::1", False),
])
def test_an_ipv6_client_counts_as_its_network(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


def test_the_network_that_has_most_is_the_fullest() -> None:
    places: Places[Caller] = Places()
    callers = [Caller(number, host) for number, host in enumerate(["192.0.2.1", "192.0.2.2", "192.0.2.2", "2001:db8::1", "192.0.2.3"])]
    for caller in callers:
        places.add(caller)
    assert places.total == 5
    assert numbers(places.fullest()) == [1, 2]
    assert places.discard(callers[1])
    assert not places.discard(callers[1])
    assert numbers(places.fullest()) == [0], "of equals the one that came first"
    assert numbers(places.fullest(lambda host: host == "192.0.2.3")) == [4]
    assert numbers(places.fullest(lambda _host: False)) == [0]
    for caller in callers:
        places.discard(caller)
    assert (places.total, places.networks) == (0, {})


# --- in the server ---

@pytest.fixture
def let_in(new_client: Any) -> Callable[..., List[Client]]:
    """New clients that are let in, as many as this: ``let_in(server, 3, source)``."""
    def let_in(server: Any, number: int, *source: str) -> List[Client]:
        clients = [new_client(server, *source) for _ in range(number)]
        for client in clients:
            assert client.greet() == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)
        return clients

    return let_in


@pytest.mark.parametrize(("limit", "by_host"), [("max_clients", {}), ("max_per_client", {LOCALHOST: 3})])
def test_more_clients_than_fit_are_hung_up_on_until_one_leaves(
        limit: str, by_host: Any, start_server: Any, new_client: Any, let_in: Any, caplog: Any) -> None:
    server = start_server(**{limit: 3})
    clients = let_in(server, 3)
    for _ in range(5):
        assert new_client(server).rest() == b""
    assert caplog.text.count("limit of") == 1
    clients[0].close()
    eventually(lambda: server.registry.clients == 2)
    let_in(server, 1)
    assert new_client(server).rest() == b""
    assert (server.registry.clients, dict(server.registry.hosts)) == (3, by_host)


@needs_neighbour
def test_one_address_cannot_take_all_places(start_server: Any, new_client: Any, let_in: Any) -> None:
    server = start_server(max_per_client=2)
    let_in(server, 2)
    assert new_client(server).rest() == b""
    let_in(server, 1, "127.0.0.2")
    assert dict(server.registry.hosts) == {"127.0.0.1": 2, "127.0.0.2": 1}


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
        assert client.greet() == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)


def test_a_handshake_has_the_time_that_the_setting_says(start_server: Any, let_in: Any) -> None:
    server = start_server(handshake_timeout=100)
    [client] = let_in(server, 1)
    [handler] = server.registry.live.values()
    handler.session.clock -= 99
    server.registry.hang_up_on_slow(server.handshake_timeout)
    assert handler.session.reason == ""
    handler.session.clock -= 1
    server.registry.hang_up_on_slow(server.handshake_timeout)
    assert client.rest() == b""
    assert server.next_ended().reason == "the handshake took too long"


def test_clients_are_counted_by_one_thread_at_a_time(start_server: Any, new_tunnel: Any) -> None:
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
        new_tunnel(server).close()
        server.next_ended()
    assert locked == [True] * 6


def test_half_open_handshakes_make_room_for_those_who_speak(start_server: Any, new_client: Any, new_tunnel: Any) -> None:
    server = start_server(max_handshakes=10)
    silent = [new_client(server) for _ in range(30)]
    new_tunnel(server)
    assert silent[0].rest() == b""              # the oldest went first
    assert server.next_ended().reason == "evicted: too many clients had not sent a request"
    eventually(lambda: len(server.registry.handshakes) <= 10)


@pytest.mark.parametrize("max_clients", [None, 1000])
def test_as_many_are_served_as_descriptors_allow(
        max_clients: Any, monkeypatch: pytest.MonkeyPatch, start_server: Any, new_client: Any, let_in: Any, caplog: Any) -> None:
    monkeypatch.setattr(module, "descriptor_limit", lambda: 40)
    server = start_server(max_clients=max_clients)
    assert server.registry.most_clients == 3
    clients = let_in(server, 3)
    assert new_client(server).rest() == b""
    assert "see ulimit -n" in caplog.text
    clients[0].close()
    eventually(lambda: not module.descriptors.are_scarce())
    let_in(server, 1)
