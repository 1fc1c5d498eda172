"""
Places for clients that have not come far yet: so many, and the network that has most of them makes room.

A client that says nothing costs a thread and a descriptor, and so does one whose password is being checked.
Their number is bounded.  Were it always the oldest that has to go, a flood from one address would keep out
every client that needs longer than the flood to fill all places.

The one idea: who takes most, loses first.  An IPv6 client has a whole /64 to call from, so that counts as one.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Callable, Dict, Generic, Iterable, List, Optional, Protocol, TypeVar

from .session import Session


class Client(Protocol):
    """Who has a place."""

    session: Session


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
