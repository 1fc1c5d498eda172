"""
Who is being served, and how many more may be.

Every client that is let in has a place here until its socket is closed.  It is one of three kinds: it has
still to send its request (and either is slow, or waits for us to check its password), it is being
served, or its session is over and is to be reported.

The one idea: a limit is enforced where the client is counted, under the one lock, or a burst would pass all at once.

A client that says nothing costs a thread and a descriptor, and so does one whose password is being checked, so there
are only so many places for them (`Places`).  Were it always the oldest that has to go, a flood from one address would
keep out every client that needs longer than the flood to fill all places.  So the network that takes most loses first;
an IPv6 client has a whole /64 to call from, which counts as one.

Not here: what the clients are told, and which of them may come at all (policy.py).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from ipaddress import IPv6Address
from typing import Any, Callable, Counter as CounterType, Deque, Dict, Generic, Iterable, List, NamedTuple, Optional, Protocol, TypeVar

from .descriptors import CLIENT, descriptors
from .session import Session
from .users import LoginThrottle
from .waker import Bell


class Limits(Protocol):
    """The settings of a server that are limits."""

    max_clients: Optional[int]
    max_per_client: Optional[int]
    max_handshakes: int
    max_logins: int


class Client(Protocol):
    """A handler, as far as it is counted."""

    session: Session
    request: Any
    reported: bool

    def hang_up(self, reason: str, code: str = "") -> None: ...


C = TypeVar("C", bound=Client)


class Places(Generic[C]):
    """Clients by the network they come from.  Not locked: to be used under a lock of its owner's."""

    def __init__(self) -> None:
        self.total = 0
        self.networks: Dict[str, Dict[int, C]] = {}     # by session id, oldest first

    def add(self, client: C) -> None:
        self.networks.setdefault(network_of(client.session.client.host), {})[client.session.id] = client
        self.total += 1

    def discard(self, client: C) -> bool:
        """Whether it had a place."""
        network = network_of(client.session.client.host)
        clients = self.networks.get(network, {})
        if clients.pop(client.session.id, None) is None:
            return False
        self.total -= 1
        if not clients:
            del self.networks[network]
        return True

    def fullest(self, suspect: Optional[Callable[[str], bool]] = None) -> List[C]:
        """The clients of the network that has most, oldest first; of those with a `suspect` host, if there are any."""
        networks: Iterable[Dict[int, C]] = self.networks.values()
        if suspect is not None:
            networks = [clients for clients in networks if any(suspect(each.session.client.host) for each in clients.values())] or networks
        return list(max(networks, key=len).values())


def network_of(host: str) -> str:
    """What an IP address is counted as: itself, or for IPv6 its /64."""
    return host if ":" not in host else IPv6Address(host).packed[:8].hex()


class Refusal(NamedTuple):
    """Why a client is turned away: a kind for the rate limit, and a sentence."""

    kind: str
    reason: str


class Registry(Generic[C]):
    """The clients of one server.  Any thread may call it."""

    def __init__(self, limits: Limits, throttle: LoginThrottle) -> None:
        self.limits = limits
        self.throttle = throttle
        self.lock = threading.Lock()
        self.ids = itertools.count(1)
        self.clients = 0                                    # let in, and not gone yet
        self.hosts: CounterType[str] = Counter()            # of those: how many from which host, if that is limited
        self.live: Dict[int, C] = {}                        # by session id, until the client is gone
        self.handshakes: Dict[int, C] = {}                  # of those, whose request is to come; oldest first
        self.slow: Places[C] = Places()                     # of those, whose turn it is to send something
        self.logins: Places[C] = Places()                   # and those whose password is being checked
        self.to_report: Deque[C] = deque()                  # whose session is over
        self.wake = Bell()                                  # rung when there is one more of these

    def next_id(self) -> int:
        return next(self.ids)

    # --- at the door ---

    def admit(self, host: str) -> Optional[Refusal]:
        """Count one more client of this host, or say why not."""
        with self.lock:
            return self.count(host)

    def count(self, host: str) -> Optional[Refusal]:
        """admit(), with the lock."""
        limits = self.limits
        if limits.max_clients is not None and self.clients >= limits.max_clients:
            return limit_reached(limits.max_clients)
        if limits.max_per_client is not None and self.hosts[host] >= limits.max_per_client:
            return host_limit_reached(host, limits.max_per_client)
        if not descriptors.take_for_client():
            return Refusal("full", f"no descriptors for more than {self.clients} connections: see ulimit -n")
        if limits.max_per_client is not None:
            self.hosts[host] += 1
        self.clients += 1
        return None

    def release(self, host: str) -> None:
        """Count one client of this host less; to be called with the lock."""
        self.clients -= 1
        descriptors.give_back(CLIENT)
        if self.limits.max_per_client is not None:
            self.hosts[host] -= 1
            if self.hosts[host] <= 0:
                del self.hosts[host]

    # --- the handshake ---

    def add(self, client: C) -> None:
        """It has a session now.  If there are too many handshakes, one of the network that has most makes room."""
        id = client.session.id
        with self.lock:
            self.live[id] = self.handshakes[id] = client
            self.slow.add(client)
            evicted = self.slow.fullest()[0] if self.slow.total > self.limits.max_handshakes else None
        if evicted is not None:
            self.request_complete(evicted)
            evicted.hang_up("evicted: too many clients had not sent a request", "crowded_out")

    def login_begins(self, client: C) -> None:
        """It has sent its login: from now on it waits for us, and is not slow."""
        with self.lock:
            self.slow.discard(client)
            self.logins.add(client)
            # The newest: it will be the last whose turn comes, and of those that have failed a guesser loses least.
            evicted = self.logins.fullest(self.throttle.has_failed)[-1] if self.logins.total > self.limits.max_logins else None
            if evicted is not None:
                self.logins.discard(evicted)
        if evicted is not None:
            evicted.hang_up("evicted: too many passwords are being checked", "crowded_out")

    def login_over(self, client: C) -> None:
        """Right or wrong, it is the client's turn again."""
        with self.lock:
            if self.logins.discard(client) and client.session.id in self.handshakes:
                self.slow.add(client)

    def request_complete(self, client: C) -> None:
        with self.lock:
            self.forget_handshake(client)

    def forget_handshake(self, client: C) -> None:
        """To be called with the lock."""
        if self.handshakes.pop(client.session.id, None) is not None and not self.slow.discard(client):
            self.logins.discard(client)

    def hang_up_on_slow(self, timeout: float) -> None:
        """All have the same timeout, so the oldest expire first."""
        with self.lock:
            for client in self.handshakes.values():
                if time.monotonic() - client.session.clock < timeout:
                    return
                client.hang_up("the handshake took too long", "timeout")

    # --- the end ---

    def session_over(self, client: C) -> None:
        """Its session is over: it is reported soon, and once.  Its place it has until remove()."""
        if not client.reported:
            client.reported = True
            self.to_report.append(client)
            self.wake.ring()

    def remove(self, client: C) -> None:
        """The client is gone, and there is room for another."""
        with self.lock:
            self.release(client.session.client.host)
            self.live.pop(client.session.id, None)
            if client.session.id in self.handshakes:
                self.forget_handshake(client)
        self.session_over(client)

    # --- who is there ---

    def serving(self) -> List[C]:
        """Of the clients that are there those whose session is not over; one that was refused may still linger."""
        return [client for client in self.everyone() if client.session.seconds is None]

    def everyone(self) -> List[C]:
        with self.lock:
            return list(self.live.values())

    @property
    def most_clients(self) -> float:
        """How many clients there may be: `max_clients`, or fewer if the descriptors do not allow as many."""
        return min(descriptors.most_clients, float("inf") if self.limits.max_clients is None else self.limits.max_clients)


def limit_reached(most: int) -> Refusal:
    return Refusal("full", f"limit of {most} connections reached: see --max-clients")


def host_limit_reached(host: str, most: int) -> Refusal:
    return Refusal(f"full {host}", f"{host} has reached its limit of {most} connections")
