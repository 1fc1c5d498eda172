"""
A server that is recorded by ``--pcap``, and what the recording has in it, as a reader of our own and tshark see it.

tshark is asked for what it knows better: whether the packets are right, and what SOCKS and HTTP make of them.
The fixture `recorded` (conftest.py) starts one.
"""

from __future__ import annotations

import io
import struct
import sys
from collections import defaultdict
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from tests.clients.harness import need, run
from tests.conftest import LOCALHOST, Client, exchange

COMMAND = (sys.executable, "-m", "socks5srv")
Place = Tuple[str, int]


# --- a reader ---

class Packet(NamedTuple):
    at: float
    source: Place
    destination: Place
    flags: str              # of TCP: letters of FSRPA; empty for UDP
    sequence: int
    acknowledged: int
    payload: bytes


def sum_of_words(octets: bytes) -> int:
    """RFC 1071, word by word."""
    total = 0
    for (word,) in struct.iter_unpack("!H", octets + b"\0" * (len(octets) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packets_in(octets: bytes) -> List[Packet]:
    """All packets of a file, each checked; a file that ends in the middle of one fails."""
    stream = io.BytesIO(octets)
    magic, major, minor, zone, accuracy, _most, link = struct.unpack("<IHHiIII", stream.read(24))
    assert (magic, major, minor, zone, accuracy, link) == (0xA1B2C3D4, 2, 4, 0, 0, 101)
    found = []
    for header in iter(lambda: stream.read(16), b""):
        seconds, microseconds, length, original = struct.unpack("<IIII", header)
        packet = stream.read(length)
        assert len(packet) == length == original
        found.append(parse(seconds + microseconds / 1e6, packet))
    assert [packet.at for packet in found] == sorted(packet.at for packet in found)
    return found


def parse(at: float, packet: bytes) -> Packet:
    if packet[0] >> 4 == 4:
        assert packet[0] == 0x45
        assert sum_of_words(packet[:20]) == 0xFFFF
        assert int.from_bytes(packet[2:4], "big") == len(packet)
        protocol, addresses, content = packet[9], packet[12:20], packet[20:]
    else:
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
        protocol, addresses, content = packet[6], packet[8:40], packet[40:]
    assert sum_of_words(addresses + struct.pack("!II", len(content), protocol) + content) == 0xFFFF
    half = len(addresses) // 2
    hosts = [str(ip_address(addresses[:half])), str(ip_address(addresses[half:]))]
    source, destination = ((host, port) for host, port in zip(hosts, struct.unpack("!HH", content[:4])))
    if protocol == 17:
        assert int.from_bytes(content[4:6], "big") == len(content)
        return Packet(at, source, destination, "", 0, 0, content[8:])
    assert protocol == 6
    sequence, acknowledged, size, bits = struct.unpack("!IIBB", content[4:14])
    flags = "".join(letter for place, letter in enumerate("FSRPA") if bits & 1 << place)
    return Packet(at, source, destination, flags, sequence, acknowledged, content[size >> 4 << 2:])


def said(packets: List[Packet]) -> Dict[Tuple[Place, Place], bytes]:
    """What each end has said to the other, by TCP; every sequence number and acknowledgement is checked."""
    next_one: Dict[Tuple[Place, Place], int] = {}
    octets: Dict[Tuple[Place, Place], bytearray] = defaultdict(bytearray)
    for packet in packets:
        if not packet.flags:
            continue
        way, back = (packet.source, packet.destination), (packet.destination, packet.source)
        if "S" in packet.flags:
            assert way not in next_one
            next_one[way] = packet.sequence
        elif packet.flags == "RA" and way not in next_one:
            continue                                            # refused
        assert packet.sequence == next_one[way]
        assert "A" not in packet.flags or packet.acknowledged == next_one[back]
        next_one[way] = (packet.sequence + len(packet.payload) + ("S" in packet.flags) + ("F" in packet.flags)) % 2 ** 32
        octets[way] += packet.payload
    return {way: bytes(text) for way, text in octets.items()}


def story(packets: List[Packet], *ends: Place) -> List[str]:
    """What has happened between two ends, without bare acknowledgements: ``>S <SA >F``, for data how much it was."""
    return [
        (">" if packet.source == ends[0] else "<") + (str(len(packet.payload)) if packet.payload else packet.flags)
        for packet in packets if {packet.source, packet.destination} == set(ends) and (packet.payload or packet.flags != "A")
    ]


# --- a server that is recorded ---

class Recorded:
    """A server with ``--pcap``, and what it has recorded."""

    def __init__(self, service: Any, path: Path) -> None:
        self.service = service
        self.path = path
        self.place: Place = (LOCALHOST, service.port)

    def packets(self, after: str = "") -> List[Packet]:
        """All of them.  It is stopped for that, as soon as a line of its log has this in it."""
        if after:
            self.service.wait_for(after)
        if not self.service.ended_within(0):
            assert self.service.stop() == 0
        return packets_in(self.path.read_bytes())

    def tshark(self, wanted: str, *fields: str) -> List[List[str]]:
        """These fields of each packet that matches, of a server that has stopped."""
        return tshark(self.path, wanted, *fields, "-d", f"tcp.port=={self.service.port},socks")


Record = Callable[..., Recorded]        # the fixture


def visit(port: int, echo: Place, octets: bytes = b"hello") -> None:
    """One client goes to this echo, by the server at this port."""
    with Client((LOCALHOST, port)) as client:
        client.connect(echo)
        exchange(client, octets)


def tshark(path: Path, wanted: str, *words: str) -> List[List[str]]:
    fields = [word for word in words if "." in word and "=" not in word]
    options = [word for word in words if word not in fields]
    asked = [part for field in fields for part in ("-e", field)]
    output = run(need("tshark"), "-n", "-r", path, *CHECKS, *options, "-Y", wanted, "-T", "fields", *asked)
    return [line.split("\t") for line in output.decode().splitlines()]


CHECKS = [part for name in ("ip", "tcp", "udp") for part in ("-o", f"{name}.check_checksum:TRUE")]
WRONG = "tcp.analysis.flags || _ws.malformed || ip.checksum.status != 1 || tcp.checksum.status != 1 || udp.checksum.status != 1"


def assert_sound(path: Path) -> None:
    """tshark has nothing to complain of."""
    assert tshark(path, WRONG, "frame.number", "tcp.analysis.flags", "_ws.expert.message") == []
    assert tshark(path, "tcp.checksum.status == 1", "frame.number") != []
