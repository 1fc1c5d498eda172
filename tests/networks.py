"""
A network of its own for a test: what the kernel calls a network namespace.

There the test may do what would be in the way of others on this computer: leave it a handful of ports, or
give it addresses.  The calling thread moves in, and all threads and processes that it starts meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

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
            switch_on(LO)
            yield
        finally:
            if libc.setns(before, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot go back to the network of all others")
    finally:
        os.close(before)


def switch_on(interface: str) -> None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh22x", interface.encode(), IFF_UP))


def add_address(interface: str, host: str, bits: int) -> None:
    """One more IPv6 address for it."""
    import fcntl

    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sIi", socket.inet_pton(socket.AF_INET6, host), bits, socket.if_nametoindex(interface))
        fcntl.ioctl(sock, SIOCSIFADDR, request)


def leave_ports(first: int, last: int) -> None:
    """Connections go out from these ports only."""
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{first} {last}\n", encoding="ascii")
