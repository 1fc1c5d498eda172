"""
What may be reached: an ordered list of allow and deny, of which the first match decides.

A rule is an action and a TARGET, spelled the same on the command line, in a file and in
Python:

    deny *.ads.example              a domain, and all below it
    allow example.com:443           a host, on one port
    deny 10.0.0.0/8                 a network
    deny :25                        whatever it is, on one port
    allow [2001:db8::]/32:80-90     IPv6 takes brackets where a port follows

The one idea: the list is asked once for each address that would be dialled, with that address
*and* the name that led to it.  So rules on names and rules on networks meet in the order in
which they stand, and nothing can hide behind a name, or behind another spelling of an address
(127.1, ::ffff:127.0.0.1): what is judged is what will be dialled.

A rule on a name knows no address: who may dial the address of a denied name gets there.  But to deny localhost
is to deny loopback.

This file opens nothing and resolves nothing.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from typing import Iterable, List, NamedTuple, Optional, Set, Tuple, Union

from .names import ascii_form, canonical
from .protocol import Address, AddressType

IPAddress = Union[IPv4Address, IPv6Address]
Network = Union[IPv4Network, IPv6Network]

ALL_PORTS = range(65536)
NUMERIC = re.compile(r"[0-9.]+|0[xX][0-9a-fA-F]+")      # what resolvers take for an address, too: 127.1
METADATA = {ip_address(host) for host in (              # where clouds tell a computer about itself; most are link-local: these are not
    "fd00:ec2::254",        # Amazon
    "fd20:ce::254",         # Google
    "168.63.129.16",        # Azure
    "100.100.100.200",      # Alibaba
    "192.0.0.192",          # Oracle
    "fd00:42::42",          # Scaleway
    "fd00:a9fe:a9fe::1",    # Linode
)}
LIMITED_BROADCAST = IPv4Address("255.255.255.255")
NAT64 = ip_network("64:ff9b::/96")
LOCAL_NAT64 = ip_network("64:ff9b:1::/48")              # RFC 8215


class BadRule(ValueError):
    """A rule that cannot be read; the text says what was expected."""


class Rule(NamedTuple):
    """One line of the list.  At most one of `name` and `network` is given."""

    allows: bool
    name: Optional[str]             # in lower case; with "*." in front all below it, too
    network: Optional[Network]
    ports: range
    text: str                       # as it was written

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``allow TARGET`` or ``deny TARGET``; BadRule if it is neither."""
        action, _, target = text.strip().partition(" ")
        if action not in ("allow", "deny") or not target.strip():
            raise BadRule(f"invalid rule {text!r}: expected allow TARGET or deny TARGET")
        host, ports = split_target(target.strip())
        name, network = (None, None) if host in ("", "*") else parse_host(host)
        return cls(action == "allow", name, network, ports, text.strip())

    def matches(self, address: Address, name: Optional[str]) -> bool:
        """Whether it speaks of this IP address, which `name` has led to, or of this name."""
        if address.port not in self.ports:
            return False
        if self.network is not None:
            return any(ip in self.network for ip in addresses_within(address, every=not self.allows))
        if self.denies_loopback and any(ip.is_loopback for ip in addresses_within(address, every=True)):
            return True
        return self.name is None or (name is not None and self.names(canonical(name)))

    @property
    def denies_loopback(self) -> bool:
        """Whether it denies localhost.  Alone among names this one has the same addresses everywhere: RFC 6761 section 6.3."""
        return self.name in ("localhost", "*.localhost") and not self.allows

    def names(self, name: str) -> bool:
        assert self.name is not None
        if self.name.startswith("*."):
            return name == self.name[2:] or name.endswith(self.name[1:])
        return name == self.name


class Verdict(NamedTuple):
    """Whether an address may be reached: `reason` is why not, `rule` the one that has decided, if one has."""

    address: Address
    reason: str = ""
    rule: Optional[Rule] = None

    @property
    def allowed(self) -> bool:
        return not self.reason


class Rules(List[Rule]):
    """The list."""

    @classmethod
    def parse(cls, lines: Iterable[Union[str, Rule]]) -> Rules:
        return cls(line if isinstance(line, Rule) else Rule.parse(line) for line in lines)

    @property
    def speak_of_names(self) -> bool:
        return any(rule.name is not None for rule in self)

    def decide(self, address: Address, name: Optional[str] = None) -> Optional[Rule]:
        """The first rule that matches an IP address and the name that led to it; None if none does."""
        return next((rule for rule in self if rule.matches(address, name)), None) if self else None

    def decide_by_name(self, address: Address) -> Optional[Rule]:
        """
        A rule whose answer holds for all addresses that this name can have; None if that depends on them.

        It is the first that matches by name (or by all networks that there are).  Networks before
        it, and localhost, may match as well, which changes nothing as long as they have the same answer.
        """
        name = canonical(address.host)
        answers: Set[bool] = set()      # of the networks: each may match or not
        families: Set[int] = set()      # of those that are all of their family
        for rule in self:
            if address.port not in rule.ports:
                continue
            if rule.network is None:
                decides = rule.name is None or rule.names(name)
                if rule.denies_loopback and not decides:
                    answers.add(False)
            else:
                answers.add(rule.allows)
                if rule.network.prefixlen == 0:
                    families.add(rule.network.version)
                decides = len(families) == 2
            if decides:
                return rule if answers <= {rule.allows} else None
        return None


# --- reading a target ---

def split_target(text: str) -> Tuple[str, range]:
    """The host (empty for any) and the ports of a target."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise BadRule(f"invalid target {text!r}: its closing bracket is missing")
        bits, colon, ports = rest.partition(":")
        host += bits
    elif text.count(":") > 1:       # IPv6 without brackets has no port
        return text, ALL_PORTS
    else:
        host, colon, ports = text.partition(":")
    return host, parse_ports(text, ports) if colon else ALL_PORTS


def parse_ports(text: str, ports: str) -> range:
    first, dash, last = ports.partition("-")
    numbers = (first, last) if dash else (first, first)
    if not all(number.isascii() and number.isdigit() and int(number) < 65536 for number in numbers):
        raise BadRule(f"invalid port in {text!r}: expected PORT or PORT-PORT, 0-65535")
    found = range(int(numbers[0]), int(numbers[1]) + 1)
    if not found:
        raise BadRule(f"invalid ports in {text!r}: the lower one comes first")
    return found


def parse_host(host: str) -> Tuple[Optional[str], Optional[Network]]:
    """A name or a network, and None for the other."""
    if "%" in host:
        raise BadRule(f"invalid address {host!r}: leave out the zone, which is the % and what follows")
    try:
        network = ip_network(host, strict=False)
    except ValueError:
        star = "*." if host.startswith("*.") else ""
        return star + parse_name(host, host[len(star):]), None
    if ip_interface(host).ip != network.network_address:
        raise BadRule(f"invalid network {host!r}: host bits set; did you mean {network}?")
    return None, network


def parse_name(host: str, bare: str) -> str:
    """A name as it will be compared; `bare` is what the target `host` has behind its asterisk."""
    try:
        name = ascii_form(bare)
    except UnicodeError:            # it would never match
        name = ""
    if NUMERIC.fullmatch(name) or "/" in bare or ":" in bare:
        raise BadRule(f"invalid address {host!r}: write it out, as in 127.0.0.1 or 10.0.0.0/8")
    if not name or "*" in name or not name.isprintable() or " " in name:
        raise BadRule(f"invalid host {host!r}: expected NAME, *.DOMAIN, an IP address or NETWORK/BITS")
    return canonical(name)


# --- what an address means ---

def addresses_within(address: Address, every: bool) -> List[IPAddress]:
    """
    The address itself, and with `every` also the IPv4 addresses within it.

    6to4 and NAT64 carry one to a gateway: what is denied is denied on that way, too, but what
    is allowed is not.
    """
    ip = ip_address(address.dialled.host)
    return [ip, *embedded(ip)] if every else [ip]


def behind(address: Address) -> List[Address]:
    """Where a gateway would take what is sent to this IP address."""
    if address.address_type is AddressType.IPV4:
        return []
    return [Address(str(ip), address.port, AddressType.IPV4) for ip in embedded(ip_address(address.host))]


def embedded(ip: IPAddress) -> List[IPv4Address]:
    """
    The IPv4 addresses that this address may carry to a gateway.

    How long the prefix of a gateway in 64:ff9b:1::/48 is, only its operator knows.  Where the address stands follows
    from that (RFC 6052 section 2.2: 48, 56, 64 or 96 bits), so that each of the four places counts.
    """
    if not isinstance(ip, IPv6Address):
        return []
    octets = ip.packed
    if ip in NAT64:
        return [IPv4Address(octets[12:])]
    if ip in LOCAL_NAT64:
        places = octets[6:8] + octets[9:11], octets[7:8] + octets[9:12], octets[9:13], octets[12:]
        return [IPv4Address(place) for place in places if place[0]]     # 0.0.0.0/8 is what other places leave empty
    return [] if ip.sixtofour is None else [ip.sixtofour]


def is_local(address: Address) -> bool:
    """
    What only this computer should reach: loopback, link-local and the metadata of clouds.

    Multicast and broadcast are heard by its own programs, too; broadcast to one network only outbound.py can tell.
    """
    return any(
        ip.is_loopback or ip.is_link_local or ip.is_multicast or ip in METADATA or ip == LIMITED_BROADCAST
        for ip in addresses_within(address, every=True)
    )
