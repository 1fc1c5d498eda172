"""
Trains: several datagrams in one system call, where the system has that (Linux).

QUIC, WireGuard and uTP send bursts of datagrams of one size to one place.  To hand them to the kernel one by one costs
more than to carry them.  Linux takes such a burst in one call (``UDP_SEGMENT``; the last datagram may be shorter), carries
it through most of its layers as one packet, and gives it in one call to a program that asks for that (``UDP_GRO``).  On
the wire, and for the other end, they are the same datagrams as ever.

The one idea: to send a train is never slower than to send its datagrams, so whatever is there for one place is gathered.
To receive, a train costs less and a single datagram more, so it is asked for while trains come, and only then.

A path may take no train, since its MTU is smaller than the datagrams, or for the sake of its interface: then they leave
one by one.  So they do without Linux, and where the socket is not a plain one (capture records each datagram).

Not here: SOCKS, and who may send what to whom (datagrams.py).
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any, Callable, Iterator, List, Sequence, Tuple, Union

from .protocol import DATAGRAM_MAX

Octets = Union[bytes, memoryview]

UDP_SEGMENT, UDP_GRO = 103, 104     # of linux/udp.h; the module socket does not have them
MANY = 8                            # datagrams of one size that come together before trains are asked for
LONGEST = 64                        # datagrams in a train; more are refused by some versions (UDP_MAX_SEGMENTS)
DATAGRAM_ROOM = 65_535              # octets, for a datagram or a train of any length
CONTROL_ROOM = 64                   # octets, for the control message that tells the size of its datagrams
PATH_ERRORS = {errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP}   # the path takes no train: this datagram size, no checksum offload


def takes_trains(sock: socket.socket) -> bool:
    """
    Whether this socket can be handed trains: on Linux from 4.18 on.

    An older one would take a train for one long datagram, so it is asked.  A socket of a subclass wants to see each datagram.
    """
    if type(sock) is socket.socket and hasattr(sock, "sendmsg"):
        with suppress(OSError):
            sock.getsockopt(socket.IPPROTO_UDP, UDP_SEGMENT)
            return True
    return False


# --- sending ---

def runs(datagrams: Sequence[Octets]) -> Sequence[Sequence[Octets]]:
    """Those of them, all for one place, that can leave together: of one size, but for a shorter last one.  Their order stays."""
    sizes = list(map(len, datagrams))
    if sizes and sizes.count(sizes[0]) == len(sizes) <= longest_train(sizes[0]):     # as it usually is
        return (datagrams,)
    gathered, start = [], 0
    while start < len(sizes):
        size, end = sizes[start], start + 1
        last = min(len(sizes), start + longest_train(size))
        while end < last and sizes[end] == size:
            end += 1
        if end < last and 0 < sizes[end] < size:
            end += 1
        gathered.append(datagrams[start:end])
        start = end
    return gathered


def longest_train(size: int) -> int:
    """How many datagrams of this size can leave together.  An empty one would not be seen in a train."""
    return max(1, min(LONGEST, DATAGRAM_MAX // size)) if size else 1


class Path:
    """
    A way for datagrams: `send` takes one, and returns how many octets have left.

    Trains leave by `sock`, to `address` unless it is connected; not if `singly` is true, as where `send` changes what it sends.
    """

    __slots__ = ("send", "sock", "address", "no_train_until", "lost")

    refusal = 10.0          # seconds that a path which has taken no train is sent none: routes change

    def __init__(self, send: Callable[[Octets], int], sock: socket.socket, address: Tuple[Any, ...] = (), singly: bool = False) -> None:
        self.send, self.sock, self.address = send, sock, address
        self.lost = 0           # datagrams; see take_lost()
        self.no_train_until = float("inf") if singly or not takes_trains(sock) else 0.0     # by time.monotonic()

    def send_run(self, run: Sequence[Octets], envelope: int = 0) -> int:
        """Send what runs() has gathered; how many octets have left, without the `envelope` of each.  UDP may lose the rest."""
        if len(run) > 1 and (not self.no_train_until or self.no_train_until <= time.monotonic()):
            try:
                return self.send_train(run) - envelope * len(run)
            except OSError as error:        # others are told of an earlier datagram, or of a full socket
                if error.errno in PATH_ERRORS:
                    self.no_train_until = time.monotonic() + self.refusal
        sent = 0
        for datagram in run:
            try:
                sent += self.send(datagram) - envelope
            except OSError:                 # too long, unroutable, no room; or an ICMP error of an earlier one
                self.lost += 1
        return sent

    def take_lost(self) -> int:
        """How many datagrams send_run() could not send since this was last asked."""
        lost, self.lost = self.lost, 0
        return lost

    def send_train(self, run: Sequence[Octets]) -> int:
        """All at once, or OSError and none."""
        control = segments_of(len(run[0]))
        return self.sock.sendmsg(run, control, 0, self.address) if self.address else self.sock.sendmsg(run, control)


@lru_cache(maxsize=64)
def segments_of(size: int) -> Tuple[Tuple[int, int, bytes]]:
    """The control message that says where to cut."""
    return ((socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size)),)


# --- receiving ---

def cut(train: memoryview, size: int) -> List[memoryview]:
    """The datagrams of this size, but for a shorter last one.  One datagram may be empty."""
    return [train[start:start + size] for start in range(0, len(train) or 1, size or 1)]


class Arrivals:
    """
    Whether trains are asked for on a socket, and how they are read.

    Many datagrams of one size in a row may come from trains: so it is tried.  If they do not, it is left again, and tried
    again after a pause, which grows.
    """

    window = 16             # calls after which it is looked how many have brought a train
    shortest_pause, longest_pause = 0.5, 60.0       # seconds; at worst one turn of `window` calls is slow in each

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.coalescing = False         # trains come as trains
        self.pause = self.shortest_pause
        self.try_at = 0.0 if takes_trains(sock) else float("inf")       # by time.monotonic()
        self.calls = self.trains = 0    # in this window
        self.stale = False              # there may be datagrams from before

    def consider(self, came: Sequence[Octets]) -> None:
        """These have come together, one by one: ask for trains if they look like some."""
        if len(came) >= MANY and len(came[0]) == len(came[MANY // 2]) and time.monotonic() >= self.try_at:
            try:
                self.ask(True)
            except OSError:             # Linux before 5.0
                self.try_at = float("inf")

    def ask(self, coalescing: bool) -> None:
        self.sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, coalescing)
        self.coalescing = self.stale = coalescing
        self.calls = self.trains = 0

    def read(self, room: memoryview, calls: int) -> Iterator[Tuple[memoryview, int, Any]]:
        """What so many calls bring, as far as there is room: datagrams one after the other, the size of each (but the last), and their source."""
        at = 0
        for _ in range(calls):
            if at + DATAGRAM_ROOM > len(room):
                return
            try:
                n, control, _flags, source = self.sock.recvmsg_into([room[at:]], CONTROL_ROOM)
            except BlockingIOError:
                self.look()
                return
            except OSError:             # an ICMP error of what was sent before
                continue
            self.calls += 1
            size = n
            if control:
                [size] = struct.unpack("=i", control[0][2])
                self.trains += size < n
            yield room[at:at + n], size, source
            at += n

    def look(self) -> None:
        """Nothing is there any more, which is the time to go back to single datagrams if trains have become rare."""
        if self.stale:                  # what had come before trains were asked for
            self.stale, self.calls, self.trains = False, 0, 0
        elif self.calls >= self.window:
            if 2 * self.trains < self.calls:
                self.stop()
            else:
                self.pause = self.shortest_pause
            self.calls = self.trains = 0

    def stop(self) -> None:
        """Ask for trains no more, unless one has come in between: its datagrams could not be told apart any more."""
        self.ask(False)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            self.try_at, self.pause = time.monotonic() + self.pause, min(2 * self.pause, self.longest_pause)
        except OSError:
            self.ask(True)
        else:
            self.ask(True)
