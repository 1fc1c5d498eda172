"""What all workers have or know together, in one process."""

from __future__ import annotations

from typing import Dict, List, Set

import pytest

from socks5srv.protocol import Address
from socks5srv.ratelimit import RateLimit
from socks5srv.users import LoginThrottle
from socks5srv.workers.channel import LoginFailed, LoginSucceeded, RelayClosed, RelayOpened, Update, Warned, WorkerGone, dispatch
from socks5srv.workers.shared import RelayAddresses, Replica, ReplicatedUsers, Scoreboard, SharedRateLimit, SharedThrottle
from tests.conftest import eventually

from .processes import hash_of, needs_posix

pytestmark = needs_posix

HOST, HERE, THERE = "192.0.2.1", Address.numeric("127.0.0.1", 1), Address.numeric("127.0.0.1", 2)


class Member:
    """What a worker has; what it tells reaches all others at once."""

    def __init__(self, number: int, members: List[Member]) -> None:
        self.told: List[Update] = []
        self.members = members
        relays: Dict[int, Set[Address]] = {}
        self.throttle, self.rate_limit = SharedThrottle(self.tell), SharedRateLimit(self.tell)
        self.rate_limit.interval = 0.05
        self.relays = RelayAddresses(self.tell, number, relays)
        self.replica = Replica(self.throttle, self.rate_limit, relays)
        members.append(self)

    def tell(self, update: Update) -> None:
        self.told.append(update)
        for member in self.members:
            if member is not self:
                dispatch(member.replica, update)


@pytest.fixture
def two() -> List[Member]:
    members: List[Member] = []
    return [Member(0, members), Member(1, members)]


def test_a_host_that_fails_at_one_worker_waits_at_the_other_until_it_has_succeeded(two: List[Member]) -> None:
    one, other = two
    for _ in range(7):
        one.throttle.failed(HOST)
    assert one.throttle.delay(HOST) == other.throttle.delay(HOST) > 0
    other.throttle.succeeded(HOST)
    assert one.throttle.delay(HOST) == 0
    assert (one.told, other.told) == ([LoginFailed(HOST)] * 7, [LoginSucceeded(HOST)]), "nothing is told again"


def test_an_ordinary_login_tells_nothing(two: List[Member]) -> None:
    two[0].throttle.succeeded(HOST)
    assert two[0].told == []


def test_one_worker_warns_and_each_tells_how_many_lines_it_has_left_out_itself(two: List[Member]) -> None:
    one, other = two
    assert one.rate_limit.allows("trouble") == 0
    assert [other.rate_limit.allows("trouble"), one.rate_limit.allows("trouble"), one.rate_limit.allows("trouble")] == [None] * 3
    assert one.told == [Warned("trouble")]
    assert eventually(lambda: other.rate_limit.allows("trouble")) >= 1
    assert one.rate_limit.allows("trouble") is None, "which has just been told by the other"
    assert eventually(lambda: one.rate_limit.allows("trouble")) >= 3


def test_the_relays_of_all_workers_are_known_until_they_are_closed_or_their_worker_has_died(two: List[Member]) -> None:
    one, other = two
    one.relays.add(HERE)
    one.relays.add(THERE)
    assert (HERE in one.relays, HERE in other.relays) == (True, True)
    one.relays.discard(HERE)
    one.relays.discard(HERE)
    assert one.told == [RelayOpened(0, HERE), RelayOpened(0, THERE), RelayClosed(0, HERE)]
    assert (HERE in other.relays, THERE in other.relays) == (False, True)
    dispatch(other.replica, WorkerGone(0))
    assert THERE not in other.relays


def test_a_new_worker_is_told_what_has_happened() -> None:
    replica = Replica(LoginThrottle(), RateLimit(), {})
    for update in (LoginFailed(HOST), RelayOpened(0, HERE), Warned("trouble")):
        dispatch(replica, update)
    assert replica.throttle.failures[HOST][0] == 1
    assert replica.relays == {0: {HERE}}


def test_users_that_are_replaced_are_told_once() -> None:
    users = ReplicatedUsers({"anna": hash_of("sesame"), "ben": hash_of("4711")}, 2)
    assert users.refresh() == set()
    assert users.check("anna", "sesame")
    users.update({"anna": hash_of("parsley")})
    users.update({"anna": hash_of("parsley"), "carl": hash_of("1928")})
    assert not users.check("anna", "sesame")
    assert users.check("carl", "1928")
    assert (users.refresh(), users.refresh()) == ({"anna", "ben"}, set())


def test_a_scoreboard_counts_over_all_who_have_its_descriptor() -> None:
    board = Scoreboard.new(3)
    board.clients[0], board.clients[2] = 4, 5
    assert [board.next_id(), board.next_id(), board.total()] == [1, 2, 9]
    board.close()
    assert board.total() == 0, "there may be a question, still"
