"""
What has passed the sockets, as packets in a file: ``--pcap``, to be read by Wireshark and tshark.

A proxy sees octets, not packets; those belong to the kernel, and only root may read them.  But who talked to whom,
what was sent and in which order is all that packets tell.  So these are packets *as they could have been*: IP, TCP and
UDP headers with the true addresses around the true octets.  Sequence numbers, acknowledgements and checksums are
right; sizes of segments and windows are made up, and what has been handed to the system counts as sent.

The one idea: a thread that serves only says what happened, by `CaptureWriter.add()`.  One thread turns that into
packets and writes them.  A slow disk delays serving only when much is to be written, and then once, for `timeout`.

The file format is that of https://datatracker.ietf.org/doc/draft-ietf-opsawg-pcap/, with LINKTYPE_RAW.
Not here: which sockets are recorded (sockets.py).
"""

from __future__ import annotations

import logging
import os
import random
import stat
import struct
import sys
import threading
import time
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple, Union

from ..outbound import Route, local_address_towards
from ..protocol import Address
from ..relay import reason_of

logger = logging.getLogger("socks5srv")

Packets = Iterable[bytes]

# --- the file ---

SNAPLEN, LINKTYPE_RAW = 262144, 101
FILE_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, SNAPLEN, LINKTYPE_RAW)


def record(nanoseconds: int, packet: bytes) -> bytes:
    """A packet as it stands in the file, with its time since 1970."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return struct.pack("<IIII", seconds, rest // 1000, len(packet), len(packet)) + packet


def open_file(path: str) -> FileIO:
    """The file to write to, which only its owner can read; ``-`` is standard output.  OSError if there is none."""
    if path == "-":
        if sys.stdout is None:
            raise OSError("standard output is closed")
        if hasattr(os, "set_blocking"):         # the program that has started us may have made it non-blocking
            os.set_blocking(sys.stdout.fileno(), True)
        return open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
    if Path(path).is_fifo():
        logger.info("waiting for a program that reads %s", path)
    file = open(path, "wb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600))     # noqa: SIM115
    if hasattr(os, "fchmod") and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fchmod(file.fileno(), 0o600)         # it may have been there before
    return file


class CaptureWriter:
    """Writes packets to a file, in a thread of its own, until close() or until that fails."""

    max_buffered = 16 * 1024 * 1024     # octets that may wait to be written; then the threads that serve wait, too
    timeout = 2.0                       # seconds for that, and for the rest at the end
    batch = 1024 * 1024                 # octets for one write, or a little more
    overhead = 200                      # octets that an event takes without its payload

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.changed = threading.Condition()
        self.events: List[Tuple[int, Callable[..., Packets], Tuple[Any, ...]]] = []
        self.buffered = 0           # octets in events that are not written yet
        self.over = False           # nothing is added any more
        self.failed = False         # the file lacks something
        self.patience = self.timeout        # seconds that close() has
        self.thread = threading.Thread(target=self.run, name="socks5srv-capture", daemon=True)
        self.thread.start()

    def add(self, packets: Callable[..., Packets], *details: Any) -> None:
        """The packets that ``packets(*details)`` will give have passed now.  Any thread may call it."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.over or self.buffered <= self.max_buffered, self.timeout):
                self.give_up("it cannot be written as fast as it comes")
            if not self.over:
                self.events.append((time.time_ns(), packets, details))
                self.buffered += self.overhead + sum(len(detail) for detail in details if isinstance(detail, bytes))
                self.changed.notify_all()

    def give_up(self, reason: object) -> None:
        """Serving matters more.  To be called with the lock."""
        if not self.failed:
            logger.error("recording stopped: %s%s", reason, "" if self.over else "; serving goes on")
            self.failed = self.over = True
            self.changed.notify_all()

    def close(self) -> None:
        """Write the rest, if `timeout` is enough for it.  May be called again, and does not wait again."""
        with self.changed:
            self.over = True
            self.changed.notify_all()
            patience, self.patience = self.patience, 0.0
        self.thread.join(patience)

    # --- in the thread ---

    def run(self) -> None:
        try:
            with self.file:
                self.write(FILE_HEADER)
                while self.write_events():
                    pass
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("unhandled exception while recording")
            with self.changed:
                self.give_up(reason_of(error))

    def write_events(self) -> bool:
        """Wait for events, and write all there are; False when there will be no more."""
        with self.changed:
            self.changed.wait_for(lambda: self.events or self.over)
            events, self.events, octets = self.events, [], self.buffered
        batch = bytearray()
        for nanoseconds, packets, details in events:
            for packet in packets(*details):
                batch += record(nanoseconds, packet)
            if len(batch) >= self.batch:
                self.write(batch)
                batch = bytearray()
        self.write(batch)
        with self.changed:
            self.buffered -= octets
            self.changed.notify_all()
        return bool(events)

    def write(self, octets: Union[bytes, bytearray]) -> None:
        rest = memoryview(octets)
        while rest:
            rest = rest[self.file.write(rest):]


# --- IP: RFC 791, RFC 8200 ---

TCP, UDP = 6, 17            # protocol numbers
HOP_LIMIT, DONT_FRAGMENT = 64, 0x4000


def ip_packet(source: bytes, destination: bytes, protocol: int, content: bytes, checksum_at: int) -> bytes:
    """`content` in an IP header for these addresses; its own checksum, which covers them, is filled in."""
    total = checksum(source + destination + struct.pack("!II", len(content), protocol), content)
    if protocol == UDP and total == b"\0\0":    # which means "none" there; 0xFFFF is the same number in ones' complement
        total = b"\xff\xff"
    content = content[:checksum_at] + total + content[checksum_at + 2:]
    if len(source) == 16:
        return struct.pack("!IHBB", 6 << 28, len(content), protocol, HOP_LIMIT) + source + destination + content
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(content), 0, DONT_FRAGMENT, HOP_LIMIT, protocol, 0) + source + destination
    return header[:10] + checksum(header) + header[12:] + content


PIECE = 4096                # octets; one large number takes longer than many small ones


def checksum(*parts: bytes) -> bytes:
    """The Internet checksum (RFC 1071) of all the parts; only the last may be odd."""
    # Ones'-complement addition is addition modulo 65535; since 2**16 = 1 (mod 65535), a whole buffer can be reduced as
    # one integer.
    pieces = (part[start:start + PIECE] for part in parts for start in range(0, len(part), PIECE))
    numbers = (int.from_bytes(piece, "big") << 8 * (len(piece) % 2) for piece in pieces)
    return (-sum(numbers) % 0xFFFF).to_bytes(2, "big")


# --- UDP: RFC 768 ---

def udp(source: Address, destination: Address, payload: bytes) -> Iterator[bytes]:
    """The packet of a datagram; a wildcard becomes the address that this computer has on that way."""
    source, destination = concrete(source, destination), concrete(destination, source)
    header = struct.pack("!HHHH", source.port, destination.port, 8 + len(payload), 0)
    yield ip_packet(source.octets(), destination.octets(), UDP, header + payload, checksum_at=6)


def concrete(address: Address, peer: Address) -> Address:
    own = own_host_towards(peer.zoned) if address.is_unspecified else ""
    return Address.numeric(own, address.port) if own else address


@lru_cache(maxsize=4096)
def own_host_towards(host: str) -> str:
    """This computer's own address on the way to that one; empty if there is no way."""
    try:
        return local_address_towards(Address.numeric(host, 9), Route()).partition("%")[0]
    except OSError:
        return ""


# --- TCP: RFC 9293 ---

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10

SEGMENT = 65495             # octets in one: what an IP packet holds
# The maximum segment size as above, and a factor for the window: 2 ** 14, the largest.
SYN_OPTIONS = struct.pack("!BBHBBBB", 2, 4, SEGMENT, 1, 3, 3, 14)
WINDOW = 0xFFFF
MAX_UNACKNOWLEDGED = 16     # segments

CLIENT, SERVER = 0, 1       # the ends of a connection: the one that has called, and the other


class Endpoint:
    """One of the two: what it has sent."""

    def __init__(self, address: Address) -> None:
        self.address = address.octets()
        self.port = address.port
        self.next = random.getrandbits(32)      # the sequence number of its next octet
        self.unacknowledged = 0                 # segments of its octets since the other end has sent anything
        self.open = False                       # it may send


class TcpStream:
    """One TCP connection.  Each method gives the packets for what has happened: none if it is over by then, or known."""

    def __init__(self, client: Address, server: Address) -> None:
        self.ends = Endpoint(client), Endpoint(server)
        self.connecting: Optional[bool] = None      # True from syn() until the server has accepted or refused

    def syn(self) -> Packets:
        if self.connecting is None:
            self.connecting = True
            yield self.segment(CLIENT, SYN)

    def establish(self) -> Packets:
        """The server has accepted."""
        if self.connecting:
            yield self.segment(SERVER, SYN | ACK)
            yield self.segment(CLIENT, ACK)
            self.set_open(True)

    def data(self, sender: int, octets: bytes) -> Packets:
        end = self.ends[sender]
        for start in range(0, len(octets) if end.open else 0, SEGMENT):
            yield self.segment(sender, PSH | ACK, octets[start:start + SEGMENT])
            end.unacknowledged += 1
            if end.unacknowledged >= MAX_UNACKNOWLEDGED:
                yield self.segment(1 - sender, ACK)

    def fin(self, sender: int) -> Packets:
        """It sends nothing more."""
        if self.ends[sender].open:
            yield self.segment(sender, FIN | ACK)
            yield self.segment(1 - sender, ACK)
            self.ends[sender].open = False

    def reset(self, sender: int) -> Packets:
        if self.connecting or any(end.open for end in self.ends):
            yield self.segment(sender, RST | ACK)
            self.set_open(False)

    def set_open(self, both: bool) -> None:
        self.connecting = False
        for end in self.ends:
            end.open = both

    def segment(self, sender: int, flags: int, octets: bytes = b"") -> bytes:
        here, there = self.ends[sender], self.ends[1 - sender]
        options = SYN_OPTIONS if flags & SYN else b""
        header = struct.pack(
            "!HHIIBBHHH", here.port, there.port, here.next, there.next if flags & ACK else 0, (20 + len(options)) // 4 << 4, flags, WINDOW, 0, 0,
        )
        here.next = (here.next + len(octets) + bool(flags & (SYN | FIN))) % 2 ** 32
        there.unacknowledged = 0
        return ip_packet(here.address, there.address, TCP, header + options + octets, checksum_at=16)
