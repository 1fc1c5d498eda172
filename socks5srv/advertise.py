"""
What BND.ADDR says, where that is not the address by which the client has come.

Behind NAT or a load balancer, in a container and on a cloud machine a client, or the peer of a BIND, reaches this
server by an address that the computer may not have, and that only the operator knows.

The one idea: nothing is bound to what is told.  The socket hears on all addresses of this computer, since NAT may choose
any of them, and a datagram is answered from the one at which it has arrived.

Not here: which sockets these are (outbound.py), and who may send to them (datagrams.py).
"""

from __future__ import annotations

import secrets
import select
import socket
import struct
from ipaddress import ip_address, ip_network
from math import gcd
from typing import Any, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple

from .protocol import Address
from .rules import Network

AUTO = "auto"


class Advertised(NamedTuple):
    """What those in this network are told as our address; AUTO: the one by which they come anyway."""

    network: Network
    host: str

    @classmethod
    def parse(cls, text: str) -> Advertised:
        """``10.0.0.0/8=10.0.0.5``, ``10.0.0.0/8=auto``, or ``203.0.113.7`` for all others of its family.  ValueError if it is none."""
        network, equals, host = text.rpartition("=")
        if host != AUTO:
            host = told_host(host)
        found = told_network(network if equals else "::/0" if ":" in host else "0.0.0.0/0")
        if host != AUTO and ip_address(host).version != found.version:
            raise ValueError(f"invalid address {text!r}: nobody reaches {host} from an IPv{found.version} network")
        return cls(found, host)

    def concerns(self, peer: Address) -> bool:
        """Whether it is for this peer.  One on this computer or this link is told another address only if its network is named."""
        ip = ip_address(peer.host)
        return ip in self.network and not (self.network.prefixlen == 0 and (ip.is_loopback or ip.is_link_local))


def parse(*texts: str) -> Tuple[Advertised, ...]:
    """Several of them: ``Route(advertise=parse("203.0.113.7", "10.0.0.0/8=auto"))``.  ValueError if one cannot be read, or two contradict."""
    found = [Advertised.parse(text) for text in texts if text != AUTO]      # which alone says nothing new
    for number, (network, host) in enumerate(found):
        for other in found[:number]:
            if other.network == network and other.host != host:
                raise ValueError(f"{other.host} and {host} are for the same clients: name the network that one of them is for, as in 10.0.0.0/8={host}")
    return tuple(found)


def told_host(text: str) -> str:
    try:
        ip = ip_address(text)
    except ValueError:
        raise ValueError(f"invalid address {text!r}: expected an IP address, or one with its network, as in 10.0.0.0/8=10.0.0.5") from None
    if ip.is_multicast or (ip.version == 6 and ip.is_link_local):
        raise ValueError(f"invalid address {text!r}: expected one that is neither link-local nor multicast")
    return str(ip)


def told_network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError(f"invalid network {text!r}: expected NETWORK/BITS without host bits, such as 10.0.0.0/8") from None


def host_told_to(peer: Address, advertised: Iterable[Advertised]) -> Optional[str]:
    """Our address for this peer, by the smallest network that it is in; None if it is the one by which it comes."""
    fitting = [each for each in advertised if each.concerns(peer)]
    host = max(fitting, key=lambda each: each.network.prefixlen).host if fitting else AUTO
    return None if host == AUTO else host


def shuffled(ports: range) -> Iterator[int]:
    """All of them, in an order that cannot be guessed and of which nothing is kept.  (Why not one by one: RFC 6056 section 3.1.)"""
    number = len(ports)
    step = next(step for step in iter(lambda: secrets.randbelow(number) + 1, 0) if gcd(step, number) == 1)
    first = secrets.randbelow(number)
    return (ports[(first + step * i) % number] for i in range(number))


# --- datagrams for a socket that is bound to all addresses ---

# The module socket has the name since Python 3.12; Windows has no recvmsg().
IP_PKTINFO: int = getattr(socket, "IP_PKTINFO", 8 if hasattr(select, "epoll") else 0)
IN_PKTINFO = struct.Struct("=I4s4s")    # the interface, our address, and the one in the header
IN6_PKTINFO = struct.Struct("=16sI")    # our address, the interface

Ancillary = Sequence[Tuple[int, int, bytes]]        # as sendmsg() takes it


def tells_arrival() -> bool:
    """Whether the system tells at which address a datagram has arrived."""
    return IP_PKTINFO > 0 and hasattr(socket.socket, "recvmsg_into") and hasattr(socket, "IPV6_RECVPKTINFO")


def ask_for_arrival(sock: socket.socket) -> None:
    """Have the system tell it to receive_at()."""
    if tells_arrival():
        is_ipv6 = sock.family == socket.AF_INET6
        sock.setsockopt(*((socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) if is_ipv6 else (socket.IPPROTO_IP, IP_PKTINFO)), 1)


def receive_at(sock: socket.socket, chunk: memoryview) -> Tuple[int, Tuple[Any, ...], str]:
    """What recvfrom_into() returns, and the address of ours at which the datagram has arrived; empty if the system does not tell."""
    if not tells_arrival():
        n, source = sock.recvfrom_into(chunk)
        return n, source, ""
    n, ancillary, _flags, source = sock.recvmsg_into([chunk], 128)
    return n, source, next((own_host(level, octets) for level, kind, octets in ancillary), "")


def own_host(level: int, octets: bytes) -> str:
    """What a structure of these says."""
    if level == socket.IPPROTO_IPV6:
        return socket.inet_ntop(socket.AF_INET6, IN6_PKTINFO.unpack(octets)[0])
    return socket.inet_ntoa(IN_PKTINFO.unpack(octets)[1])


def answering_from(host: str) -> Ancillary:
    """What has sendmsg() send from this address of ours, whatever the route would choose."""
    if ":" in host:
        octets = IN6_PKTINFO.pack(socket.inet_pton(socket.AF_INET6, host), 0)
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, octets)]
    return [(socket.IPPROTO_IP, IP_PKTINFO, IN_PKTINFO.pack(0, socket.inet_aton(host), bytes(4)))]
