"""
What the sockets of a server with ``--pcap`` record.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import select
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest

from socks5srv.capture.pcap import SEGMENT, CaptureWriter, open_file
from socks5srv.capture.sockets import Capture
from socks5srv.outbound import Route
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Method, Reply, ReplyCode, Request
from socks5srv.server import Socks5Server, listening_socket
from tests.clients.harness import need, run
from tests.conftest import LOCALHOST, TIMEOUT, Client, address_of, exchange, needs_ipv6, serve

from .recorded import Packet, Place, Recorded, assert_sound, packets_in, parse, said, story, tshark

MEGABYTES = 5


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
    assert max(len(packet.payload) for packet in packets) <= SEGMENT
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


# --- the factory ---

def test_a_server_of_ones_own_can_be_recorded(tmp_path: Path, echo: Place, udp_echo: Place, new_udp: Callable[..., socket.socket]) -> None:
    path = tmp_path / "own.pcap"
    writer = CaptureWriter(open_file(str(path)))
    factory = Capture(writer).socket
    with Socks5Server(sockets=[listening_socket((LOCALHOST, 0), factory)]) as server:
        server.route = Route(socket_factory=factory)
        serve(server)
        with Client(server.server_address) as client, Client(server.server_address) as other, Client(server.server_address) as third:
            client.connect(echo)
            exchange(client, b"by connect")
            bound = other.ask(Command.BIND, UNSPECIFIED).bound
            with socket.create_connection((bound.host, bound.port), TIMEOUT) as peer:
                assert Reply.read(other).bound.port == peer.getsockname()[1]
                peer.sendall(b"by bind")
                assert other.exactly(7) == b"by bind"
            relay = third.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
            assert over_udp(new_udp(), relay, udp_echo, b"by datagram") == b"by datagram"
    writer.close()
    packets = packets_in(path.read_bytes())
    assert [packet.payload for packet in packets].count(b"by connect") == 4
    assert [packet.payload for packet in packets].count(b"by bind") == 2
    assert sum(packet.payload.endswith(b"by datagram") for packet in packets) == 4
    assert len(said(packets)) == 2 * 5, "three clients, a target and a peer, and no connection that wakes a thread"


class Packets(List[Packet]):
    """In place of a writer: the packets of all that has been added."""

    def add(self, packets: Callable[..., Any], *details: Any) -> None:
        self.extend(parse(0, packet) for packet in packets(*details))


@pytest.fixture
def packets() -> Packets:
    return Packets()


@pytest.fixture
def capture(packets: Packets) -> Any:
    return Capture(packets)         # type: ignore[arg-type]


def test_it_is_called_like_the_class_socket(capture: Any) -> None:
    non_blocking = getattr(socket, "SOCK_NONBLOCK", 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        made = [capture.socket(), capture.socket(socket.AF_INET, socket.SOCK_STREAM | non_blocking, 0), capture.socket(socket.AF_INET, socket.SOCK_DGRAM | non_blocking),
                capture.socket(plain.family, plain.type, plain.proto, plain.detach())]
    for sock in made:
        sock.close()
    assert [type(sock).__name__ for sock in made] == ["CapturedStream", "CapturedStream", "CapturedDatagrams", "CapturedDatagrams"]


def test_route_makes_all_its_sockets_by_the_factory(capture: Any) -> None:
    route = Route(socket_factory=capture.socket)
    kinds = []
    for sock in (route.socket(Address.numeric(LOCALHOST, 9)), route.listener(LOCALHOST), route.udp((LOCALHOST, 0))):
        with sock:
            kinds.append((type(sock).__name__, sock.gettimeout()))
    assert kinds == [("CapturedStream", 0), ("CapturedStream", 0), ("CapturedDatagrams", 0)]


@pytest.mark.parametrize(("timeout", "story"), [(None, []), (0, ["S", "SA", "A", "FA", "A", "FA", "A"])])
def test_a_connection_that_only_wakes_a_thread_is_left_out_but_not_a_stranger_at_bind(
    capture: Any, packets: Packets, timeout: Optional[float], story: List[str],
) -> None:
    with capture.socket() as listener:
        listener.bind((LOCALHOST, 0))
        listener.listen()
        socket.create_connection(listener.getsockname(), TIMEOUT).close()
        listener.settimeout(TIMEOUT)
        select.select([listener], [], [], TIMEOUT)
        listener.settimeout(timeout)
        connection, _address = listener.accept()
        select.select([connection], [], [], TIMEOUT)
        connection.close()
    assert [packet.flags for packet in packets] == story


def test_octets_that_are_left_unread_make_close_a_reset(capture: Any, packets: Packets, listen: Callable[..., socket.socket]) -> None:
    target = listen()
    with capture.socket() as sock:
        assert sock.connect_ex(target.getsockname()) == 0
        with target.accept()[0] as connection:
            connection.sendall(b"unread")
            select.select([sock], [], [], TIMEOUT)
            sock.close()
    assert [packet.flags for packet in packets] == ["S", "SA", "A", "RA"]


def test_a_connection_that_is_closed_before_it_is_known_to_be_one_is_complete(capture: Any, packets: Packets, listen: Callable[..., socket.socket]) -> None:
    """As when another address has won the race."""
    target = listen()
    with Route(socket_factory=capture.socket).socket(address_of(target.getsockname())) as sock:
        assert sock.connect_ex(target.getsockname()) == errno.EINPROGRESS
        select.select([], [sock], [], TIMEOUT)
    assert [packet.flags for packet in packets] == ["S", "SA", "A", "FA", "A"]


def test_a_refusal_is_recorded_even_if_it_is_not_asked_for(capture: Any, packets: Packets, refusing: Callable[..., Place]) -> None:
    nobody = refusing()
    with Route(socket_factory=capture.socket).socket(address_of(nobody)) as sock:
        assert sock.connect_ex(nobody) == errno.EINPROGRESS
        select.select([], [sock], [], TIMEOUT)
    assert [packet.flags for packet in packets] == ["S", "RA"]


def test_a_failing_call_after_our_own_shutdown_is_no_reset(capture: Any, packets: Packets, listen: Callable[..., socket.socket]) -> None:
    target = listen()
    with capture.socket() as sock:
        assert sock.connect_ex(target.getsockname()) == 0
        sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(BrokenPipeError):
            sock.send(b"x")
    assert "RA" not in [packet.flags for packet in packets]
