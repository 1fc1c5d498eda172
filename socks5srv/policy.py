"""
Whether this client may reach this address.

    verdict = policy.judge(client, command, address, name)

Asked once for each address that would be dialled, with the name that led to it, and before the look-up for
the name itself.  Beyond the rules (rules.py) three things are never reached: the server itself, and for
clients on other computers what only this computer should reach, and what an operator sees.

Policy holds no settings of its own: it reads those of its server, which may change at any time.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address
from typing import List, Optional, Protocol, Sequence, Set

from .listener import Listener
from .locality import is_heard_here, is_own_address
from .protocol import Address, AddressType, Command
from .rules import Network, Rule, Rules, Verdict, behind, is_local
from .users import LoginThrottle, Users


class Access(Protocol):
    """The settings of a server that say who may reach what."""

    users: Optional[Users]
    rules: Rules
    allow_from: Sequence[Network]
    allow_local_targets: bool
    proxy_protocol: Sequence[Network]
    listeners: List[Listener]


class Policy:
    """The decisions of one server.  Any thread may ask."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.throttle = LoginThrottle()         # of addresses that guess passwords
        self.relays: Set[Address] = set()       # where clients send their datagrams to: not from one to the other
        self.private: Set[Address] = set()      # of this computer, but for clients on it only: the admin page

    # --- about a client ---

    def trusts(self, client: Address) -> bool:
        """Whether this client is in a network that needs no login."""
        return is_in(client, self.access.allow_from)

    def is_balancer(self, peer: Address) -> bool:
        """Whether what connects from there has to tell of its client."""
        return is_in(peer, self.access.proxy_protocol)

    def client_behind(self, balancer: Address, source: Optional[Address]) -> Address:
        """Who the client is, if a balancer says that it is this one; the balancer itself if it does not know."""
        if source is None:
            return balancer
        # The balancer's loopback is not ours: whoever calls it there is on the balancer's computer.
        return balancer._replace(port=source.port) if is_loopback(source.host) and not self.is_here(balancer.zoned) else source

    def is_here(self, host: str) -> bool:
        """Whether this is an address of this computer, with its zone if it has one."""
        return is_loopback(host) or is_own_address(host)

    @property
    def serves_others(self) -> bool:
        """Whether clients on other computers can come."""
        return bool(self.access.proxy_protocol) or not all(is_loopback(listener.address.host) for listener in self.access.listeners)

    # --- about a target ---

    def judge(self, client: Address, command: Command, address: Address, name: Optional[str] = None, by_name: bool = False) -> Verdict:
        """
        Whether `client` may reach `address`, which `name` has led to; asked with a name as the address, too.

        With `by_name` the name will not be looked up here, so that no network will ever match.
        """
        if address.address_type is AddressType.DOMAINNAME:
            rules = self.access.rules
            return self.by_rule(address, (Rules(rule for rule in rules if rule.network is None) if by_name else rules).decide_by_name(address))
        if self.is_own(command, address):       # it would call itself until all descriptors are gone
            return Verdict(address, f"{address} is this server itself")
        if not self.is_here(client.zoned) and self.is_closed_to_others(address):
            return Verdict(address, f"{address} is for this computer only")
        return self.by_rule(address, self.access.rules.decide(address, name))

    def by_rule(self, address: Address, rule: Optional[Rule]) -> Verdict:
        return Verdict(address) if rule is None else Verdict(address, "" if rule.allows else f"rule: {rule.text}", rule)

    def is_own(self, command: Command, address: Address) -> bool:
        """Whether this leads to one of our own sockets, where the server would talk to itself."""
        is_ours = self.is_relay if command is Command.UDP_ASSOCIATE else self.is_listener
        return is_ours(address) or any(map(is_ours, behind(address)))

    def is_relay(self, address: Address) -> bool:
        if address in self.relays:
            return True
        everywhere = address._replace(host=address.wildcard, scope=0)
        return everywhere in self.relays and is_own_address(address.zoned)

    def is_listener(self, address: Address) -> bool:
        for listener in self.access.listeners:
            if listener.address.port == address.port and is_at(listener.address, address):
                return True
        return False

    def is_closed_to_others(self, address: Address) -> bool:
        """Whether clients on other computers may not reach this."""
        every = (address.dialled, *behind(address))
        if any(private.port == address.port and is_at(private.dialled, each) for private in self.private for each in every):
            return True
        return not self.access.allow_local_targets and (is_local(address) or any(is_heard_here(each.zoned) for each in every))


def is_in(address: Address, networks: Sequence[Network]) -> bool:
    return bool(networks) and any(ip_address(address.host) in network for network in networks)


def is_at(own: Address, address: Address) -> bool:
    """Whether what listens at `own` is reached by this address; of their ports the caller knows."""
    return own.host == address.host or (own.is_unspecified and is_own_address(address.zoned))


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether this is an IP address of that kind.  Asked for each client, and found out slowly."""
    return ip_address(host.partition("%")[0]).is_loopback
