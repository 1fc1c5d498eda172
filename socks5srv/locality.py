"""
Whose an IP address is: this computer's own, one that its programs hear as well, or another computer's.

Linux is asked for the route to it, which cannot be wrong.  Elsewhere connect() and bind() tell it as well
as they can.
"""

from __future__ import annotations

import errno
import socket
import struct
from functools import lru_cache

from .outbound import family_of, with_scope
from .protocol import LINK_LOCAL, Address, AddressType

# What becomes of a packet to an address, in the numbers that Linux has for it: rtnetlink(7).
NO_ROUTE, LOCAL, BROADCAST, ANYCAST, MULTICAST = 0, 2, 3, 4, 5
OWN = {LOCAL, ANYCAST}
HEARD_HERE = OWN | {BROADCAST, MULTICAST}

ROUTE, GET_ROUTE, REQUEST, TO, BY_INTERFACE = 24, 26, 1, 1, 4        # RTM_NEWROUTE, RTM_GETROUTE, NLM_F_REQUEST, RTA_DST, RTA_OIF
NOBODYS = {socket.AF_INET: "240.0.0.1", socket.AF_INET6: "100::1"}      # no computer has these: RFC 1112 section 4, RFC 6666


def is_own_address(host: str) -> bool:
    """Whether this IP address, with its zone if it has one, is one of this computer's; those of IPv6 anycast are, too."""
    return kind_of_route(host) in OWN


def is_heard_here(host: str) -> bool:
    """Whether programs of this computer may hear what is sent there: an own address, or one of broadcast or multicast."""
    return kind_of_route(host) in HEARD_HERE


def kind_of_route(host: str) -> int:
    """
    What becomes of a packet to this IP address, with its zone if it has one.  OSError if the system cannot be asked now.

    Linux is asked for its route.  Its bind() takes any address where ip_nonlocal_bind is set, as it is beside keepalived
    or HAProxy, and every client would seem to be on this computer.  Its connect() goes out from the first of the
    addresses in a network, whichever of them is called.
    """
    try:
        address = Address.of(with_scope((host, 0))).dialled
    except OSError:                 # there is no such zone
        return NO_ROUTE
    return ask_kernel(address) if kernel_answers() else guess(address)


@lru_cache(maxsize=None)
def kernel_answers() -> bool:
    """Whether there are routes to ask for: on Linux, unless a sandbox keeps that from us (AF_NETLINK) or answers nonsense."""
    if not hasattr(socket, "AF_NETLINK"):
        return False
    try:
        return ask_kernel(Address("127.0.0.1", 0, AddressType.IPV4)) == LOCAL
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise                   # they may be there the next moment
        return False


def ask_kernel(address: Address) -> int:
    """The kind of the route to this address.  RTM_GETROUTE of rtnetlink(7): a header, a struct rtmsg, and attributes."""
    octets = address.octets()
    question = struct.pack("=BB10x", family_of(address), 8 * len(octets)) + struct.pack("=HH", 4 + len(octets), TO) + octets
    if address.address_type is AddressType.IPV6 and address.host.startswith(LINK_LOCAL):
        if not address.scope:       # without its zone it is no address of any computer
            return NO_ROUTE
        question += struct.pack("=HHI", 8, BY_INTERFACE, address.scope)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(question), GET_ROUTE, REQUEST, 0, 0) + question)
        answer = sock.recv(4096, socket.MSG_DONTWAIT)       # the kernel has answered within send()
    return answer[16 + 7] if answer[4] == ROUTE else NO_ROUTE


def guess(address: Address) -> int:
    """The same where there is nothing to ask: to call an own address is to go out from it, and as a rule no other can be bound.  Broadcast is refused."""
    family = family_of(address)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address._replace(port=9).sockaddr)         # for UDP this sends nothing
            if Address.of(sock.getsockname()).host == address.host:
                return LOCAL
    except PermissionError:         # which a socket has to ask for first (SO_BROADCAST)
        return BROADCAST
    except OSError:                 # there is no way to it
        pass
    return LOCAL if can_be_bound(address) and not can_be_bound(Address.numeric(NOBODYS[family], 0)) else NO_ROUTE


def can_be_bound(address: Address) -> bool:
    try:
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
            sock.bind(address.sockaddr)
    except OSError:
        return False
    return True


# --- an address as a person writes it ---

def host_with_zone(address: Address) -> str:
    """``fe80::1%eth0``: without its zone a link-local host cannot be reached."""
    if not address.scope:
        return address.host
    try:
        return f"{address.host}%{socket.if_indextoname(address.scope)}"
    except OSError:                 # it is gone by now
        return address.zoned


def with_zone(address: Address) -> str:
    return str(address._replace(host=host_with_zone(address)))


def in_url(address: Address) -> str:
    """The same with the percent sign as URLs have it: RFC 6874."""
    return with_zone(address).replace("%", "%25")
