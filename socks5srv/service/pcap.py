"""
A recording as packets: the file that ``--pcap`` writes, for Wireshark and its kin.

A proxy sees octets come and go, not packets; those belong to the kernel, and only root may look
at them.  But who spoke to whom, what was said and in which order is all that a packet tells, too.
So here are packets *as they could have been*: IP, TCP and UDP headers with the true addresses around
the true octets.  Sequence numbers, acknowledgements and checksums are right, sizes of segments and
windows are made up, and what the server has handed to its system counts as sent.

The one idea: whoever takes part only notes what happened, `Recording.note()`.  One thread turns that into
packets and writes them, so a slow disk holds up nobody until there is much to be written, and
then for `PATIENCE` seconds at most.

The file format is that of https://datatracker.ietf.org/doc/draft-ietf-opsawg-pcap/, with LINKTYPE_RAW.
Who notes what is not known here: see wiretap.py.
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
from ipaddress import ip_address
from typing import Any, Callable, Iterable, Iterator, List, Tuple, Union

from ..outbound import Route, local_address_towards
from ..protocol import Address

logger = logging.getLogger("socks5srv")

MOST = 16 * 1024 * 1024     # octets that may wait to be written; then whoever has more waits, too
PATIENCE = 2.0              # seconds for that, and at the end for the rest to be written
BATCH = 1024 * 1024         # octets for one write, or a little more
NOTE = 200                  # octets that a note takes without what it quotes

Packets = Iterable[bytes]

# --- the file ---

SNAPLEN, LINKTYPE_RAW = 262144, 101
FILE_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, SNAPLEN, LINKTYPE_RAW)


def record(nanoseconds: int, packet: bytes) -> bytes:
    """A packet as it stands in the file, with its time since 1970."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return struct.pack("<IIII", seconds, rest // 1000, len(packet), len(packet)) + packet


def open_file(path: str) -> FileIO:
    """The file to write to, for its owner's eyes only; ``-`` is standard output.  OSError if there is none."""
    if path == "-":
        if sys.stdout is None:
            raise OSError("standard output is closed")
        if hasattr(os, "set_blocking"):         # its other end may be used to something else
            os.set_blocking(sys.stdout.fileno(), True)
        return open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
    if is_pipe(path):
        logger.info("waiting until somebody reads %s", path)
    file = open(path, "wb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600))     # noqa: SIM115
    if hasattr(os, "fchmod") and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fchmod(file.fileno(), 0o600)         # it may have been there before
    return file


def is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:                 # it is still to be made
        return False


class Recording:
    """Notes become packets in a file, in a thread of its own, until close() or until it cannot be written."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.changed = threading.Condition()
        self.notes: List[Tuple[int, Callable[..., Packets], Tuple[Any, ...]]] = []
        self.held = 0               # octets in notes that are not written yet
        self.over = False           # nothing more is recorded
        self.patience = PATIENCE    # seconds that close() has
        self.thread = threading.Thread(target=self.run, name="socks5srv-recording", daemon=True)
        self.thread.start()

    def note(self, packets: Callable[..., Packets], *details: Any, octets: int = 0) -> None:
        """It is now that ``packets(*details)`` were seen, which quote so many octets.  Called in any thread."""
        with self.changed:
            if self.held > MOST and not self.changed.wait_for(lambda: self.over or self.held <= MOST, PATIENCE):
                self.give_up("whoever reads it does not keep up")
            if not self.over:
                self.notes.append((time.time_ns(), packets, details))
                self.held += octets + NOTE
                self.changed.notify_all()

    def give_up(self, reason: object) -> None:
        """Serving matters more.  To be called with the lock."""
        if not self.over:
            self.over = True
            self.changed.notify_all()
            logger.error("nothing more is recorded: %s; serving goes on", reason)

    def close(self) -> None:
        """Write the rest, if that is possible in PATIENCE seconds, of which there are no more when it is called again."""
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
                while self.write_notes():
                    pass
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("a bug, met while recording")
            with self.changed:
                self.give_up(getattr(error, "strerror", None) or error)

    def write_notes(self) -> bool:
        """Write all that has been noted by now, or is next; False if nothing will be."""
        with self.changed:
            self.changed.wait_for(lambda: self.notes or self.over)
            notes, self.notes, octets = self.notes, [], self.held
        batch = bytearray()
        for nanoseconds, packets, details in notes:
            for packet in packets(*details):
                batch += record(nanoseconds, packet)
            if len(batch) >= BATCH:
                self.write(batch)
                batch = bytearray()
        self.write(batch)
        with self.changed:
            self.held -= octets
            self.changed.notify_all()
        return bool(notes)

    def write(self, octets: Union[bytes, bytearray]) -> None:
        rest = memoryview(octets)
        while rest:
            rest = rest[self.file.write(rest):]


# --- IP ---

TCP, UDP = 6, 17            # the protocol's number in IP's header


def datagram(source: bytes, destination: bytes, protocol: int, content: bytes, checksum_at: int) -> bytes:
    """
    `content` in an IP header of its addresses' family (RFC 791, RFC 8200).

    Its own checksum, still zero, is filled in; it covers the addresses as well.
    """
    pseudo_header = source + destination + struct.pack("!II", len(content), protocol)
    total = checksum(pseudo_header, content)
    if protocol == UDP and total == ZERO:       # which stands for none there, and there only
        total = MINUS_ZERO
    content = content[:checksum_at] + total + content[checksum_at + 2:]
    if len(source) == 16:
        return struct.pack("!IHBB", 6 << 28, len(content), protocol, HOP_LIMIT) + source + destination + content
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(content), 0, DONT_FRAGMENT, HOP_LIMIT, protocol, 0) + source + destination
    return header[:10] + checksum(header) + header[12:] + content


HOP_LIMIT, DONT_FRAGMENT = 64, 0x4000
ZERO, MINUS_ZERO = b"\0\0", b"\xff\xff"      # of a checksum; the same number in ones' complement

PIECE = 4096                # octets; larger numbers take longer than as many small ones


def checksum(*parts: bytes) -> bytes:
    """
    The Internet checksum (RFC 1071) of all the parts; only the last may be odd.

    It adds 16-bit words, with the carry back in at the low end: arithmetic modulo 65535, where 65536 is 1, so
    that the sum of the words is the remainder of the whole as one number, or of pieces of it.
    """
    pieces = (part[start:start + PIECE] for part in parts for start in range(0, len(part), PIECE))
    numbers = (int.from_bytes(piece, "big") << 8 * (len(piece) % 2) for piece in pieces)
    return (-sum(numbers) % 0xFFFF).to_bytes(2, "big")


# --- UDP: RFC 768 ---

def udp(source: Address, destination: Address, payload: bytes) -> Iterator[bytes]:
    """The packet of a datagram; a wildcard becomes the address that this computer has on that way."""
    source, destination = concrete(source, destination), concrete(destination, source)
    header = struct.pack("!HHHH", source.port, destination.port, 8 + len(payload), 0)
    yield datagram(packed(source), packed(destination), UDP, header + payload, checksum_at=6)


def concrete(address: Address, other_end: Address) -> Address:
    return address._replace(host=way_to(other_end.zoned) or address.host) if address.is_unspecified else address


def packed(address: Address) -> bytes:
    return ip_address(address.host).packed


@lru_cache(maxsize=4096)
def way_to(host: str) -> str:
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
UNANSWERED = 16             # segments without an acknowledgement; then there is one

CALLER, CALLED = 0, 1       # the ends


class End:
    """One of the two: what it has sent."""

    def __init__(self, address: Address) -> None:
        self.address = packed(address)
        self.port = address.port
        self.next = random.getrandbits(32)      # the sequence number of its next octet
        self.unanswered = 0                     # segments of its octets since the other end has sent anything
        self.ended = False


class Connection:
    """One TCP connection.  Each method gives the packets for what has happened."""

    def __init__(self, caller: Address, called: Address) -> None:
        self.ends = End(caller), End(called)
        self.broken = False

    def call(self) -> Packets:
        yield self.segment(CALLER, SYN)

    def stand(self) -> Packets:
        """The called end has accepted."""
        yield self.segment(CALLED, SYN | ACK)
        yield self.segment(CALLER, ACK)

    def data(self, sender: int, octets: bytes) -> Packets:
        end = self.ends[sender]
        for start in range(0, 0 if self.broken or end.ended else len(octets), SEGMENT):
            yield self.segment(sender, PSH | ACK, octets[start:start + SEGMENT])
            end.unanswered += 1
            if end.unanswered >= UNANSWERED:
                yield self.segment(1 - sender, ACK)

    def end(self, sender: int) -> Packets:
        """It has nothing more to say."""
        if not self.broken and not self.ends[sender].ended:
            yield self.segment(sender, FIN | ACK)
            yield self.segment(1 - sender, ACK)
            self.ends[sender].ended = True

    def reset(self, sender: int) -> Packets:
        if not self.broken and not all(end.ended for end in self.ends):
            yield self.segment(sender, RST | ACK)
            self.broken = True

    def segment(self, sender: int, flags: int, octets: bytes = b"") -> bytes:
        here, there = self.ends[sender], self.ends[1 - sender]
        options = SYN_OPTIONS if flags & SYN else b""
        header = struct.pack(
            "!HHIIBBHHH", here.port, there.port, here.next, there.next if flags & ACK else 0, (20 + len(options)) // 4 << 4, flags, WINDOW, 0, 0,
        )
        here.next = (here.next + len(octets) + bool(flags & (SYN | FIN))) % 2 ** 32
        there.unanswered = 0
        return datagram(here.address, there.address, TCP, header + options + octets, checksum_at=16)
