"""Who has to make room where places are few."""

from __future__ import annotations

from typing import List

import pytest

from socks5srv.registry import Places, network_of
from socks5srv.protocol import Address
from socks5srv.session import Session


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
