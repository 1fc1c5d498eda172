"""
A network of its own for a test: what the kernel calls a network namespace.

There the test may do what would be in the way of others on this computer: leave it a handful of ports, or
give it addresses.  The calling thread moves in, and all threads and processes that it starts meanwhile.

`Networks` has several of them, with cables between them: computers, as far as a socket can see.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

import pytest

from .clients.harness import need

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, SIOCSIFADDR = 0x8914, 0x8916      # ioctl(): set the flags of an interface, give it an address
IFF_UP = 1
LO = "lo"


@contextmanager
def network_of_its_own() -> Iterator[None]:
    """With the loopback interface and its addresses, and nothing else.  Skips the test where there is none to be had."""
    try:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    except OSError:
        pytest.skip("not on this platform: network namespaces")
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"not on this platform: a network namespace for this user ({os.strerror(ctypes.get_errno())})")
        try:
            ioctl(socket.AF_INET, SIOCSIFFLAGS, struct.pack("16sh22x", LO.encode(), IFF_UP))
            yield
        finally:
            move_to(before)
    finally:
        os.close(before)


def move_to(network: int) -> None:
    """The calling thread goes to this network, which a descriptor stands for."""
    if ctypes.CDLL(None, use_errno=True).setns(network, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot go to that network")


class Host:
    """A computer: what is opened and started ``with host.inside()`` is there, and stays there."""

    def __init__(self, name: str) -> None:
        self.name = name
        with network_of_its_own():
            self.network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    @contextmanager
    def inside(self) -> Iterator[None]:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            move_to(self.network)
            try:
                yield
            finally:
                move_to(before)
        finally:
            os.close(before)

    def ip(self, words: str) -> None:
        """Have ip(8) do this there."""
        self.run(need("ip"), *words.split())

    def nft(self, rules: str) -> None:
        """Have nft(8) read these rules there."""
        self.run(need("nft"), "-f", "-", text=rules)

    def run(self, *command: str, text: str = "") -> None:
        with self.inside():
            done = subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}: {done.stdout}"

    def forward(self) -> None:
        """Be a router: pass on what is for others."""
        with self.inside():
            set_up("ipv4/ip_forward")
            set_up("ipv6/conf/all/forwarding")


class Networks:
    """Hosts, and cables between them, until the end of a test: ``networks.host("client")``."""

    def __init__(self) -> None:
        need("ip")
        self.hosts: List[Host] = []

    def host(self, name: str) -> Host:
        self.hosts.append(Host(name))
        return self.hosts[-1]

    def cable(self, one: Host, addresses: str, other: Host, others: str, mtu: int = 1500) -> None:
        """Between an interface ``to-OTHER`` of the one host and ``to-ONE`` of the other, each with these addresses (ADDRESS/BITS)."""
        ends = (one, f"to-{other.name}", addresses), (other, f"to-{one.name}", others)
        one.ip(f"link add {ends[0][1]} mtu {mtu} type veth peer name {ends[1][1]} mtu {mtu} netns /proc/{os.getpid()}/fd/{other.network}")
        for host, interface, own in ends:
            for address in own.split():
                host.ip(f"address add {address} dev {interface} {'nodad' if ':' in address else ''}")
            host.ip(f"link set {interface} up")

    def close(self) -> None:
        for host in self.hosts:
            os.close(host.network)


def ioctl(family: int, code: int, request: bytes) -> None:
    import fcntl

    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, code, request)


def add_address(interface: str, host: str, bits: int) -> None:
    """One more IPv6 address for it."""
    octets = socket.inet_pton(socket.AF_INET6, host)
    ioctl(socket.AF_INET6, SIOCSIFADDR, struct.pack("16sIi", octets, bits, socket.if_nametoindex(interface)))


class LinkLocal(NamedTuple):
    """An address of this computer that only its own link knows."""

    host: str
    interface: str

    @property
    def scope(self) -> int:
        return socket.if_nametoindex(self.interface)

    @property
    def named(self) -> str:
        """As people write it."""
        return f"{self.host}%{self.interface}"

    @property
    def zoned(self) -> str:
        return f"{self.host}%{self.scope}"

    def can_be_bound(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_INET6) as sock:
            sock.bind((self.host, 0, 0, self.scope))
            return True
        return False


@contextmanager
def link_local_address() -> Iterator[LinkLocal]:
    """Made in a network of its own, or where that cannot be had one that this computer has.  Skips the test where there is neither."""
    with ExitStack() as stack:
        try:
            stack.enter_context(network_of_its_own())
        except pytest.skip.Exception:
            found = own_link_local_address()
            if found is None:
                raise
        else:
            found = LinkLocal("fe80::1", LO)
            add_address(LO, found.host, 64)
        yield found


def own_link_local_address() -> Optional[LinkLocal]:
    """The first that this computer has."""
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for octets, _index, _bits, scope, flags, interface in map(str.split, lines):
        if scope == "20" and not int(flags, 16) & 0x48:     # link-local; neither tentative nor another computer's
            return LinkLocal(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(octets)), interface)
    return None


def set_up(setting: str, value: str = "1") -> None:
    Path("/proc/sys/net", setting).write_text(f"{value}\n", encoding="ascii")


def leave_ports(first: int, last: int) -> None:
    """Connections go out from these ports only."""
    set_up("ipv4/ip_local_port_range", f"{first} {last}")


def let_any_address_be_bound() -> None:
    """As it is beside keepalived and HAProxy."""
    set_up("ipv4/ip_nonlocal_bind")
    set_up("ipv6/ip_nonlocal_bind")


def be_a_router() -> None:
    """Which answers to the anycast address of each IPv6 network that it gets an address in from now on: RFC 4291 section 2.6.1."""
    set_up("ipv6/conf/all/forwarding")
