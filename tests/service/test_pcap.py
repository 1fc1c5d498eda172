"""
``--pcap FILE``: what the recording has in it, as tshark and a reader of our own see it.

tshark is asked for what it knows better: whether the packets are right, and what SOCKS and HTTP make of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Method, Reply, ReplyCode, Request
from socks5srv.service import pcap
from socks5srv.service.pcap import CALLED, CALLER, Connection, Recording
from tests.clients.harness import environment, need, run
from tests.conftest import LOCALHOST, TIMEOUT, Client, address_of, eventually, exchange, needs_ipv6
from tests.networks import LinkLocal

COMMAND = (sys.executable, "-m", "socks5srv")
Place = Tuple[str, int]

MEGABYTES = 5


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

    def packets(self) -> List[Packet]:
        """All, once it has stopped."""
        if not self.service.ended_within(0):
            assert self.service.stop() == 0
        return packets_in(self.path.read_bytes())

    def await_line(self, text: str) -> str:
        return str(self.service.wait_for(text))

    def tshark(self, wanted: str, *fields: str, socks: bool = True) -> List[List[str]]:
        """These fields of each packet that matches."""
        self.packets()
        return tshark(self.path, wanted, *fields, *(("-d", f"tcp.port=={self.service.port},socks") if socks else ()))


def tshark(path: Path, wanted: str, *words: str) -> List[List[str]]:
    fields = [word for word in words if "." in word and "=" not in word]
    options = [word for word in words if word not in fields]
    output = run(
        need("tshark"), "-n", "-r", path, *CHECKS, *options, "-Y", wanted, "-T", "fields", *(part for field in fields for part in ("-e", field)),
    )
    return [line.split("\t") for line in output.decode().splitlines()]


CHECKS = [part for name in ("ip", "tcp", "udp") for part in ("-o", f"{name}.check_checksum:TRUE")]
WRONG = "tcp.analysis.flags || _ws.malformed || ip.checksum.status != 1 || tcp.checksum.status != 1 || udp.checksum.status != 1"


def assert_sound(path: Path) -> None:
    """tshark has nothing to complain of."""
    assert tshark(path, WRONG, "frame.number", "tcp.analysis.flags", "_ws.expert.message") == []
    assert tshark(path, "tcp.checksum.status == 1", "frame.number") != []


@pytest.fixture
def recorded(start: Callable[..., Any], tmp_path: Path) -> Callable[..., Recorded]:
    def started(*words: str, **keywords: Any) -> Recorded:
        path = tmp_path / "recording.pcap"
        return Recorded(start("--pcap", str(path), "--workers", "1", *words, **keywords), path)

    return started


@contextlib.contextmanager
def tunnel(client: Client, target: Any) -> Iterator[Tuple[socket.socket, Place]]:
    """A CONNECT to this listening socket: the target's end, and where it comes from."""
    client.connect(target.getsockname())
    connection, source = target.accept()
    with connection:
        connection.settimeout(TIMEOUT)
        yield connection, source[:2]


def rest_of(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


# --- TCP ---

def test_socks_and_http_are_read_by_tshark(recorded: Callable[..., Recorded], website: Place) -> None:
    server = recorded("-u", "anna:sesame")
    with Client(server.place) as client:
        assert client.greet(Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
        client.login("anna", "sesame")
        bound = client.request(Command.CONNECT, Address.named("localhost", website[1])).bound
        client.send(b"GET /page HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert client.rest().endswith(b"Hello from the other side.")
    server.await_line("ok")

    port, socks = str(server.service.port), "5"
    rows = server.tshark(
        "socks", "tcp.dstport", "socks.version", "socks.auth_accepted_method", "socks.username", "socks.password", "socks.command",
        "socks.remote_name", "socks.results", "socks.dst", "socks.port",
    )
    ours = rows[1][0]
    assert rows[:6] == [
        [port, socks, "", "", "", "", "", "", "", ""],
        [ours, socks, "2", "", "", "", "", "", "", ""],
        [port, socks, "", "anna", "sesame", "", "", "", "", ""],
        [ours, socks, "", "", "", "", "", "", "", ""],
        [port, socks, "", "", "", "1", "localhost", "", "", str(website[1])],
        [ours, socks, "", "", "", "", "", "0", LOCALHOST, str(bound.port)],
    ]

    places = [part for place, name in ((port, "socks"), (website[1], "http")) for part in ("-d", f"tcp.port=={place},{name}")]
    rows = tshark(server.path, "http", "http.request.uri", "http.response.code", "http.file_data", *places)
    body = rows[2][2]
    assert body in ("Hello from the other side.", b"Hello from the other side.".hex())
    assert rows == [["/page", "", ""]] * 2 + [["", "200", body]] * 2, "once on each side, each time in one piece"
    assert server.tshark("_ws.malformed", "frame.number") == []
    assert_sound(server.path)


def test_both_sides_have_their_true_addresses(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        with tunnel(client, target) as (connection, source):
            client.send(b"question")
            assert connection.recv(99) == b"question"
            connection.sendall(b"answer")
            client.exactly(6)
    server.await_line("ok")
    packets = server.packets()
    octets = said(packets)
    assert octets[ours, server.place] == b"\x05\x01\x00" + bytes(Request(Command.CONNECT, address_of(target.getsockname()))) + b"question"
    assert octets[server.place, ours] == b"\x05\x00" + bytes(Reply(ReplyCode.SUCCEEDED, address_of(source))) + b"answer"
    assert octets[source, target.getsockname()] == b"question"
    assert octets[target.getsockname(), source] == b"answer"
    assert len(octets) == 4, "and nobody else is in it, such as the server that wakes its own threads"
    assert story(packets, source, target.getsockname())[:4] == [">S", "<SA", ">8", "<6"]
    assert_sound(server.path)


@needs_ipv6
def test_ipv6_on_both_sides(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded("-b", "::1"), listen("::1")
    with Client(("::1", server.service.port)) as client:
        ours = client.socket.getsockname()[:2]
        with tunnel(client, target) as (connection, source):
            client.send(b"question")
            assert connection.recv(99) == b"question"
    server.await_line("ok")
    octets = said(server.packets())
    assert octets[ours, ("::1", server.service.port)].endswith(b"question")
    assert octets[source, target.getsockname()[:2]] == b"question"
    assert_sound(server.path)


@needs_ipv6
def test_a_client_of_a_listener_for_both_families_is_recorded_by_ipv4(recorded: Callable[..., Recorded], echo: Place) -> None:
    server = recorded("-b", "::", "--allow-open-proxy")
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        client.connect(echo)
    server.await_line("ok")
    assert said(server.packets())[server.place, ours].startswith(b"\x05\x00")


def test_a_half_close_is_a_fin_that_is_passed_on(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        with tunnel(client, target) as (connection, source):
            client.send(b"all of it")
            client.end()
            assert rest_of(connection) == b"all of it"
            connection.sendall(b"the answer")
        assert client.rest() == b"the answer"
    server.await_line("ok")
    packets = server.packets()
    assert story(packets, source, target.getsockname()) == [">S", "<SA", ">9", ">FA", "<10", "<FA"]
    assert story(packets, ours, server.place)[-4:] == [">9", ">FA", "<10", "<FA"]
    assert_sound(server.path)


def test_a_reset_is_a_reset_that_is_passed_on(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        with tunnel(client, target) as (connection, source):
            exchange_with(client, connection)
            client.reset()
            with pytest.raises(ConnectionError):
                connection.recv(1)
    server.await_line("ok")
    packets = server.packets()
    assert story(packets, ours, server.place)[-3:] == [">4", "<4", ">RA"]
    assert story(packets, source, target.getsockname())[-3:] == [">4", "<4", ">RA"]
    assert_sound(server.path)


def test_a_target_that_resets_does_so_in_the_recording(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        with tunnel(client, target) as (connection, source):
            exchange_with(client, connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert client.rest() == b""
    server.await_line("ok")
    packets = server.packets()
    assert story(packets, source, target.getsockname())[-1] == "<RA"
    assert story(packets, ours, server.place)[-1] == "<RA"
    assert_sound(server.path)


def test_what_the_server_breaks_off_at_its_end_is_reset(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        with tunnel(client, target) as (connection, source):
            exchange_with(client, connection)       # so the relay thread has them by now
            packets = server.packets()
    assert story(packets, source, target.getsockname()) == [">S", "<SA", ">4", "<4", ">RA"]
    assert story(packets, ours, server.place)[-1] == "<RA"
    assert_sound(server.path)


def exchange_with(client: Client, connection: socket.socket) -> None:
    client.send(b"ping")
    assert connection.recv(99) == b"ping"
    connection.sendall(b"pong")
    assert client.exactly(4) == b"pong"


def test_a_call_that_is_refused_is_one(recorded: Callable[..., Recorded], refusing: Callable[..., Place]) -> None:
    server, nobody = recorded(), refusing()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        assert client.ask(Command.CONNECT, nobody).code is ReplyCode.CONNECTION_REFUSED
        assert client.rest() == b""
    server.await_line("failed(05)")
    packets = server.packets()
    (knock,) = [packet for packet in packets if packet.destination == nobody]
    assert knock.flags == "S"
    assert knock.source[0] == LOCALHOST
    assert knock.source[1] > 0
    assert story(packets, knock.source, nobody) == [">S", "<RA"]
    assert story(packets, ours, server.place)[-3:] == ["<10", "<FA", ">FA"], "the reply, and then its end"
    assert_sound(server.path)


def test_a_call_that_nobody_answers_stays_one(recorded: Callable[..., Recorded], silent: Callable[..., Place]) -> None:
    server, nobody = recorded("--connect-timeout", "0.3"), silent()
    with Client(server.place) as client:
        assert client.ask(Command.CONNECT, nobody).code is ReplyCode.TTL_EXPIRED
    server.await_line("failed(06)")
    packets = server.packets()
    (knock,) = [packet for packet in packets if packet.destination == nobody]
    assert story(packets, knock.source, nobody) == [">S"]


@pytest.mark.parametrize("zone", [True, False])
def test_a_packet_has_no_zone_but_the_address_on_that_link(link_local: LinkLocal, zone: bool) -> None:
    """And where there is no way, the zeros stay."""
    there = Address.numeric(link_local.zoned if zone else link_local.host, 9)
    (packet,) = pcap.udp(Address.numeric("::", 7), there, b"data")
    own, other = ip_address(link_local.host).packed, ip_address(link_local.host).packed
    assert packet[8:40] == (own if zone else bytes(16)) + other


def test_early_data_are_where_they_were(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        client.send(b"\x05\x01\x00", Request(Command.CONNECT, address_of(target.getsockname())), b"early")
        connection, source = target.accept()
        with connection:
            assert connection.recv(99) == b"early"
    server.await_line("ok")
    packets = server.packets()
    assert story(packets, ours, server.place)[:3] == [">S", "<SA", ">18"], "all in one segment, before any answer"
    assert said(packets)[source[:2], target.getsockname()] == b"early"
    assert_sound(server.path)


def test_five_megabytes_each_way_are_all_in_it(recorded: Callable[..., Recorded], listen: Callable[..., socket.socket]) -> None:
    server, target = recorded(), listen()
    up, down = os.urandom(MEGABYTES << 20), os.urandom(MEGABYTES << 20)
    with Client(server.place) as client, tunnel(client, target) as (connection, source):
        for octets, sender, receiver in ((up, client.socket, connection), (down, connection, client.socket)):
            writer = threading.Thread(target=sender.sendall, args=(octets,))
            writer.start()
            assert received(receiver, len(octets)) == octets
            writer.join()
    server.await_line("ok")
    packets = server.packets()
    assert said(packets)[source, target.getsockname()] == up
    assert said(packets)[target.getsockname(), source] == down
    assert max(len(packet.payload) for packet in packets) <= pcap.SEGMENT
    assert_sound(server.path)
    for stream in {row[0] for row in tshark(server.path, "tcp", "tcp.stream")}:
        there, back = followed(server.path, stream)
        assert digest(there[-len(up):]) == digest(up)
        assert digest(back[-len(down):]) == digest(down)


def received(sock: socket.socket, n: int) -> bytes:
    octets = bytearray()
    while len(octets) < n:
        more = sock.recv(1 << 20)
        assert more
        octets += more
    return bytes(octets)


def digest(octets: bytes) -> str:
    return hashlib.sha256(octets).hexdigest()


def followed(path: Path, stream: str) -> Tuple[bytes, bytes]:
    """What "Follow TCP stream" shows: from the one who called, and back."""
    lines = run(need("tshark"), "-n", "-r", path, "-q", "-z", f"follow,tcp,raw,{stream}").decode().splitlines()
    octets = [line for line in lines if re.fullmatch(r"\t?[0-9a-f]+", line)]
    return (
        bytes.fromhex("".join(line for line in octets if line[0] != "\t")), bytes.fromhex("".join(line[1:] for line in octets if line[0] == "\t")),
    )


def test_two_clients_at_a_time_are_kept_apart(recorded: Callable[..., Recorded], echo: Place) -> None:
    server = recorded()
    with Client(server.place) as one, Client(server.place) as other:
        one.connect(echo)
        other.connect(echo)
        for number in range(20):
            exchange(one, b"one %d;" % number)
            exchange(other, b"other %d;" % number)
        names = {client.socket.getsockname(): text for client, text in ((one, b"one"), (other, b"other"))}
    server.service.wait_until(lambda: server.service.stderr.count(" ok ") == 2, "both")
    octets = said(server.packets())
    for name, text in names.items():
        assert octets[server.place, name].endswith(b"".join(b"%s %d;" % (text, number) for number in range(20)))
    assert_sound(server.path)


def test_bind_is_a_call_to_the_server(recorded: Callable[..., Recorded]) -> None:
    server = recorded()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        first = client.ask(Command.BIND, UNSPECIFIED)
        with socket.create_connection((first.bound.host, first.bound.port), TIMEOUT) as peer:
            theirs = peer.getsockname()
            assert Reply.read(client).bound.port == theirs[1]
            peer.sendall(b"150 data from ftp")
            assert client.exactly(17) == b"150 data from ftp"
    server.await_line("ok")
    packets, place = server.packets(), (first.bound.host, first.bound.port)
    assert story(packets, theirs, place)[:3] == [">S", "<SA", ">17"]
    assert said(packets)[server.place, ours][2:].startswith(bytes(first))
    assert_sound(server.path)


def test_a_chain_of_two_is_recorded_by_the_first(
    recorded: Callable[..., Recorded], start_server: Callable[..., Any], echo: Place, new_udp: Callable[..., socket.socket], udp_echo: Place,
) -> None:
    second = start_server()
    server = recorded("--upstream", "socks5h://127.0.0.1:%d" % second.server_address[1])
    with Client(server.place) as client:
        client.connect(echo)
        exchange(client)
    server.await_line("ok")
    with Client(server.place) as client:
        relay = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
        ours = new_udp()
        assert over_udp(ours, relay, udp_echo, b"hello") == b"hello"
    server.await_line("udp")
    packets = server.packets()
    (octets,) = [octets for (_source, place), octets in said(packets).items() if place == second.server_address and b"hello" in octets]
    assert octets == b"\x05\x01\x00" + bytes(Request(Command.CONNECT, address_of(echo))) + b"hello"
    header = bytes(Datagram(address_of(udp_echo), b"hello"))
    assert [packet.payload for packet in packets if not packet.flags] == [header] * 4, "to us, on to the upstream, and both ways back"
    assert_sound(server.path)


# --- UDP ---

class UdpEcho(threading.Thread):
    def __init__(self, host: str) -> None:
        super().__init__(name="test-udp-echo", daemon=True)
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.place = self.socket.getsockname()[:2]

    def run(self) -> None:
        with self.socket:
            while True:
                octets, source = self.socket.recvfrom(65536)
                if octets == b"stop":
                    return
                self.socket.sendto(octets, source)

    def stop(self) -> None:
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"stop", self.place)
        self.join(TIMEOUT)


@pytest.fixture
def udp_echoes() -> Iterator[Callable[[str], Place]]:
    echoes: List[UdpEcho] = []

    def make(host: str) -> Place:
        echoes.append(UdpEcho(host))
        echoes[-1].start()
        return echoes[-1].place

    yield make
    for echo in echoes:
        echo.stop()


@pytest.fixture
def udp_echo(udp_echoes: Callable[[str], Place]) -> Place:
    return udp_echoes(LOCALHOST)


@pytest.fixture
def new_udp() -> Iterator[Callable[..., socket.socket]]:
    made: List[socket.socket] = []

    def make(host: str = LOCALHOST) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        made.append(sock)
        sock.settimeout(TIMEOUT)
        sock.bind((host, 0))
        return sock

    yield make
    for sock in made:
        sock.close()


def over_udp(sock: socket.socket, relay: Address, place: Place, octets: bytes) -> bytes:
    sock.sendto(bytes(Datagram(address_of(place), octets)), (relay.host, relay.port))
    answer = sock.recv(65536)
    header = bytes(Datagram(address_of(place), b""))
    assert answer.startswith(header)
    return answer[len(header):]


@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_datagrams_are_recorded_on_both_sides(
    recorded: Callable[..., Recorded], host: str, udp_echoes: Callable[[str], Place], new_udp: Callable[..., socket.socket],
) -> None:
    server, target, ours = recorded("-b", host), udp_echoes(host), new_udp(host)
    with Client((host, server.service.port)) as client:
        relay = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
        for octets in (b"one", b"", b"three", b"x" * 60000):
            assert over_udp(ours, relay, target, octets) == octets
    server.await_line("udp")
    packets = [packet for packet in server.packets() if not packet.flags]
    name, place = ours.getsockname()[:2], (relay.host, relay.port)
    outside = next(packet.source for packet in packets if packet.destination == target)
    assert outside[0] == host, "no wildcard"
    header = bytes(Datagram(address_of(target), b""))
    expected: List[Tuple[Place, Place, bytes]] = []
    for octets in (b"one", b"", b"three", b"x" * 60000):
        expected += [(name, place, header + octets), (outside, target, octets), (target, outside, octets), (place, name, header + octets)]
    assert [(packet.source, packet.destination, packet.payload) for packet in packets] == expected
    assert_sound(server.path)


@pytest.mark.parametrize("words", [["--explain"], ["--status", "0"], ["--explain", "--status", "0"]])
def test_who_explains_or_watches_takes_nothing_out_of_it(
    recorded: Callable[..., Recorded], words: List[str], listen: Callable[..., socket.socket], udp_echo: Place, new_udp: Callable[..., socket.socket],
) -> None:
    server, target, ours = recorded(*words), listen(), new_udp()
    with Client(server.place) as client, tunnel(client, target) as (connection, source):
        client.send(b"question")
        assert connection.recv(99) == b"question"
        connection.sendall(b"answer")
        client.exactly(6)
    with Client(server.place) as client:
        relay = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
        assert over_udp(ours, relay, udp_echo, b"hello") == b"hello"
    server.await_line(" udp ")
    packets = server.packets()
    octets = said(packets)
    assert octets[source, target.getsockname()] == b"question"
    assert octets[target.getsockname(), source] == b"answer"
    assert story(packets, source, target.getsockname())[:4] == [">S", "<SA", ">8", "<6"]
    header = bytes(Datagram(address_of(udp_echo), b""))
    assert [packet.payload for packet in packets if not packet.flags] == [header + b"hello", b"hello", b"hello", header + b"hello"]


# --- the file ---

@pytest.fixture
def website() -> Iterator[Place]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", "26")
            self.end_headers()
            self.wfile.write(b"Hello ")
            self.wfile.write(b"from the other side.")

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer((LOCALHOST, 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="test-web", daemon=True)
        thread.start()
        yield LOCALHOST, server.server_address[1]
        server.shutdown()
        thread.join(TIMEOUT)


def test_it_can_be_read_while_the_server_serves(recorded: Callable[..., Recorded], echo: Place) -> None:
    server = recorded()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        client.connect(echo)
        exchange(client, b"seen already")
        eventually(lambda: b"seen already" in server.path.read_bytes())
        eventually(lambda: said(packets_in(server.path.read_bytes())).get((server.place, ours), b"").endswith(b"seen already"))
        assert_sound(server.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_the_end_it_is_complete(recorded: Callable[..., Recorded], echo: Place, number: int) -> None:
    server = recorded()
    with Client(server.place) as client:
        client.connect(echo)
        exchange(client, b"x" * 100_000)
        assert server.service.stop(number) == 0
    octets = said(server.packets())
    assert sorted(len(text) for text in octets.values()) == [100_000, 100_000, 100_012, 100_013]
    assert "Traceback" not in server.service.stderr


@pytest.mark.skipif(os.name == "nt", reason="not on this platform: modes of files")
@pytest.mark.parametrize("there_already", [False, True])
def test_only_its_owner_may_read_it(recorded: Callable[..., Recorded], tmp_path: Path, there_already: bool) -> None:
    path = tmp_path / "recording.pcap"
    if there_already:
        path.write_bytes(b"of an earlier run" * 100)
        path.chmod(0o644)
    server = recorded()
    assert server.path.stat().st_mode & 0o777 == 0o600
    assert server.packets() == []


def test_a_file_that_cannot_be_written_is_told_in_one_sentence(run_command: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "recording.pcap"
    outcome = run_command("0", "--workers", "1", "--pcap", str(path))
    assert outcome.code == 1
    assert outcome.stderr == f"socks5srv: error: cannot write the recording {path}: No such file or directory\n  choose another file with --pcap\n"


@pytest.mark.parametrize(("words", "complaint"), [
    (("--workers", "2", "--pcap", "x.pcap"), "--pcap records one process: leave --workers out"),
    (("--pcap", "-", "--run", "true"), "--pcap - and the COMMAND of --run would write to the same output: give a FILE"),
])
def test_what_does_not_go_together_is_refused(run_command: Callable[..., Any], words: Tuple[str, ...], complaint: str) -> None:
    outcome = run_command(*words)
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"socks5srv: error: {complaint}\n")


def test_a_terminal_is_spared(at_terminal: Callable[..., Any]) -> None:
    code, text = at_terminal("--pcap", "-").end()
    assert code == 2
    assert "--pcap - is nothing to be read at a terminal: give a FILE, or add  | wireshark -k -i -" in text


def test_to_standard_output_it_goes_packet_by_packet(echo: Place, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    process = subprocess.Popen(
        [*COMMAND, "0", "-q", "--pcap", "-", "--port-file", str(port_file)], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )
    with process:
        try:
            eventually(port_file.exists)
            assert process.stdout is not None
            with Client((LOCALHOST, int(port_file.read_text()))) as client:
                client.connect(echo)
                exchange(client, b"seen")
                octets = b""
                while octets.count(b"seen") < 4:            # in and out, there and back
                    octets += os.read(process.stdout.fileno(), 65536)
            process.terminate()
            octets += process.stdout.read()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()
    assert sum(packet.payload == b"seen" for packet in packets_in(octets)) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: named pipes")
def test_a_named_pipe_is_read_by_tshark_as_it_comes(start: Callable[..., Any], echo: Place, tmp_path: Path) -> None:
    program, fifo = need("tshark"), tmp_path / "pipe"
    os.mkfifo(fifo)
    with subprocess.Popen([program, "-n", "-l", "-r", str(fifo)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        try:
            service = start("--pcap", str(fifo), "--workers", "1")
            with Client((LOCALHOST, service.port)) as client:
                client.connect(echo)
                exchange(client)
            service.stop()
            assert reader.stdout is not None
            assert b"[SYN]" in reader.stdout.read()
        finally:
            reader.kill()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: named pipes")
def test_a_named_pipe_that_nobody_reads_can_be_given_up(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with subprocess.Popen([*COMMAND, "0", "--pcap", str(fifo)], env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            assert process.stderr is not None
            assert f"waiting until somebody reads {fifo}" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == f"socks5srv: error: nobody has begun to read {fifo}\n"
            assert process.wait(TIMEOUT) == 130
        finally:
            process.kill()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this platform: /dev/full")
def test_when_the_disk_is_full_it_is_told_once_and_serving_goes_on(start: Callable[..., Any], echo: Place) -> None:
    service = start("--pcap", "/dev/full", "--workers", "1")
    for _ in range(3):
        with Client((LOCALHOST, service.port)) as client:
            client.connect(echo)
            exchange(client, b"x" * 1000)
    assert service.stop() == 0
    assert service.stderr.count(f"nothing more is recorded: {os.strerror(errno.ENOSPC)}; serving goes on") == 1
    assert "Traceback" not in service.stderr


def test_a_reader_that_goes_is_no_reason_to_stop(echo: Place, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    process = subprocess.Popen(
        [*COMMAND, "0", "-q", "--pcap", "-", "--port-file", str(port_file)], env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )
    with process:
        try:
            eventually(port_file.exists)
            assert process.stdout is not None
            process.stdout.close()
            for _ in range(2):
                with Client((LOCALHOST, int(port_file.read_text()))) as client:
                    client.connect(echo)
                    exchange(client)
            process.terminate()
            assert process.wait(TIMEOUT) == 0
            assert process.stderr is not None
            lines = process.stderr.read().splitlines()
            assert len(lines) == 1
            assert "nothing more is recorded: " in lines[0]
        finally:
            process.kill()


def test_a_program_can_be_recorded(run_command: Callable[..., Any], tmp_path: Path, echo: Place) -> None:
    path = tmp_path / "recording.pcap"
    program = (
        "import os; from socks5srv import client\n"
        f"with client.connect(os.environ['ALL_PROXY'], {LOCALHOST!r}, {echo[1]}) as sock: sock.sendall(b'hello'); sock.recv(5)"
    )
    outcome = run_command("--pcap", str(path), "--run", sys.executable, "-c", program)
    assert outcome.code == 0, outcome.stderr
    assert [packet.payload for packet in packets_in(path.read_bytes())].count(b"hello") == 4


def test_without_the_option_nothing_of_it_is_imported() -> None:
    code = "import sys; from socks5srv.service import run; print(*[name for name in sys.modules if 'pcap' in name or 'wiretap' in name])"
    assert run(sys.executable, "-c", code).split() == []


# --- the recording by itself ---

def test_a_reader_that_does_not_read_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pcap, "MOST", 100_000)
    monkeypatch.setattr(pcap, "PATIENCE", 0.1)
    reader, writer = os.pipe()
    recording = Recording(open(writer, "wb", buffering=0))      # noqa: SIM115
    with caplog.at_level(logging.ERROR, "socks5srv"):
        for _ in range(1000):
            recording.note(lambda: [b"x" * 10_000], octets=10_000)
    assert [record.getMessage() for record in caplog.records] == ["nothing more is recorded: whoever reads it does not keep up; serving goes on"]
    recording.close()               # and does not wait
    os.close(reader)
    recording.thread.join(TIMEOUT)
    assert not recording.thread.is_alive()


def test_nothing_is_noted_after_the_end(tmp_path: Path) -> None:
    recording = Recording(pcap.open_file(str(tmp_path / "file")))
    recording.close()
    recording.note(lambda: [b"x"])
    recording.close()
    assert recording.notes == []
    assert (tmp_path / "file").read_bytes() == pcap.FILE_HEADER


def test_a_reader_that_does_not_read_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(pcap.open_file(str(tmp_path / "file")))
    waits: List[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(recording.thread, "join", waits.append)
        recording.close()       # by who serves,
        recording.close()       # and when the server is left
    recording.thread.join()
    assert waits == [pcap.PATIENCE, 0]


def test_a_bug_ends_the_recording_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recording = Recording(pcap.open_file(str(tmp_path / "file")))
    recording.note(lambda: [bytes(1 // 0)])
    recording.thread.join(TIMEOUT)
    assert recording.over
    assert [record.getMessage() for record in caplog.records] == [
        "a bug, met while recording", "nothing more is recorded: integer division or modulo by zero; serving goes on",
    ]
    recording.close()


@given(st.lists(st.binary(max_size=40).filter(lambda octets: len(octets) % 2 == 0), max_size=3), st.binary(max_size=41))
def test_the_checksum_is_that_of_the_rfc(parts: List[bytes], last: bytes) -> None:
    octets = b"".join(parts) + last
    found = pcap.checksum(*parts, last)
    assert found != b"\xff\xff"
    assert sum_of_words(found + octets) == (0xFFFF if any(octets) else 0)


@pytest.mark.parametrize(("protocol", "checksum"), [(pcap.TCP, b"\0\0"), (pcap.UDP, b"\xff\xff")])
def test_a_checksum_of_zero_is_another_number_for_udp_alone(protocol: int, checksum: bytes) -> None:
    """RFC 768; for TCP tshark complains of that (RFC 1624)."""
    ends = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
    some = pcap.datagram(*ends, protocol, bytes(30), checksum_at=6)[26:28]
    assert pcap.datagram(*ends, protocol, bytes(28) + some, checksum_at=6)[26:28] == checksum


@pytest.mark.parametrize("length", [pcap.PIECE - 1, pcap.PIECE, pcap.PIECE + 1, pcap.PIECE + 2, 3 * pcap.PIECE + 1, pcap.SEGMENT])
def test_the_checksum_of_much_is_that_of_the_rfc(length: int) -> None:
    octets = os.urandom(length)
    assert sum_of_words(pcap.checksum(octets) + octets) == 0xFFFF


ENDS = Address.numeric("192.0.2.1", 40000), Address.numeric("192.0.2.2", 1080)


def of_connection(*steps: Tuple[Any, ...]) -> List[str]:
    connection = Connection(*ENDS)
    packets = [parse(0, packet) for name, *details in (("call",), ("stand",), *steps) for packet in getattr(connection, name)(*details)]
    said(packets)                       # which checks the numbers
    return [(">" if packet.source == ENDS[0][:2] else "<") + packet.flags + str(len(packet.payload) or "") for packet in packets][3:]


@pytest.mark.parametrize(("steps", "packets"), [
    ([("end", CALLER), ("data", CALLER, b"late")], [">FA", "<A"]),
    ([("end", CALLER), ("end", CALLER)], [">FA", "<A"]),
    ([("end", CALLER), ("data", CALLED, b"answer"), ("end", CALLED)], [">FA", "<A", "<PA6", "<FA", ">A"]),
    ([("reset", CALLED), ("data", CALLER, b"late"), ("end", CALLER), ("reset", CALLER)], ["<RA"]),
    ([("end", CALLER), ("end", CALLED), ("reset", CALLED)], [">FA", "<A", "<FA", ">A"]),
    ([("data", CALLER, b"x" * 70_000)], [">PA65495", ">PA4505"]),
    ([("data", CALLER, b"x")] * 17, [">PA1"] * 16 + ["<A", ">PA1"]),
])
def test_the_rules_of_tcp_are_kept(steps: List[Tuple[Any, ...]], packets: List[str]) -> None:
    assert of_connection(*steps) == packets


def test_sequence_numbers_begin_again_behind_the_largest() -> None:
    connection = Connection(*ENDS)
    connection.ends[CALLER].next = 2 ** 32 - 3
    packets = [*connection.call(), *connection.stand(), *connection.data(CALLER, b"hello"), *connection.data(CALLER, b"again"), *connection.end(CALLER)]
    assert said([parse(0, packet) for packet in packets])[ENDS[0][:2], ENDS[1][:2]] == b"helloagain"


def test_tshark_would_see_a_fault(recorded: Callable[..., Recorded], echo: Place, tmp_path: Path) -> None:
    """Of the tests: what they ask for can be missed."""
    server = recorded()
    with Client(server.place) as client:
        client.connect(echo)
        exchange(client, b"hello")
    server.await_line("ok")
    server.packets()
    octets = server.path.read_bytes()
    damaged, cut = tmp_path / "damaged", tmp_path / "cut"
    damaged.write_bytes(octets.replace(b"hello", b"hullo", 1))
    cut.write_bytes(without_first(octets, b"hello"))
    for path in (damaged, cut):
        with pytest.raises(AssertionError):
            assert_sound(path)


def without_first(octets: bytes, payload: bytes) -> bytes:
    """The file without the first packet that ends so."""
    place: Optional[int] = 24
    while place is not None:
        length = int.from_bytes(octets[place + 8:place + 12], "little")
        if octets[place + 16:place + 16 + length].endswith(payload):
            return octets[:place] + octets[place + 16 + length:]
        place += 16 + length
    raise AssertionError("there is none")
