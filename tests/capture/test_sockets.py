"""What the sockets of a server with ``--pcap`` record."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from socks5srv.capture.pcap import SEGMENT, CaptureWriter, open_file
from socks5srv.capture.sockets import Capture
from socks5srv.outbound import Route
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Method, Reply, ReplyCode, Request
from socks5srv.server import Socks5Server, listening_socket
from tests.clients.harness import need, run
from tests.conftest import LOCALHOST, TIMEOUT, Client, address_of, exchange, needs_ipv6, serve, set_reset, udp_socket

from .recorded import Packet, Place, Record, Recorded, assert_sound, packets_in, parse, said, story, tshark

Listen = Callable[..., socket.socket]
MEGABYTES = 5


class Tunnel(NamedTuple):
    """A client, the target's end of its connection through a server, and who is where on both sides of that."""

    client: Client
    connection: socket.socket
    inside: Tuple[Place, Place]         # the client, the server
    outside: Tuple[Place, Place]        # the server, the target

    def ask_and_answer(self) -> None:
        """Eight octets there and six back."""
        self.client.send(b"question")
        assert self.connection.recv(99) == b"question"
        self.connection.sendall(b"answer")
        assert self.client.exactly(6) == b"answer"


@contextlib.contextmanager
def tunnel(server: Recorded, target: socket.socket) -> Iterator[Tunnel]:
    """A CONNECT to this listening socket."""
    there = target.getsockname()[:2]
    with Client((there[0], server.service.port)) as client:
        ours = client.socket.getsockname()[:2]
        client.connect(there)
        connection, source = target.accept()
        with connection:
            connection.settimeout(TIMEOUT)
            yield Tunnel(client, connection, (ours, (there[0], server.service.port)), (source[:2], there))


@pytest.fixture
def new_udp() -> Iterator[Callable[..., socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield lambda host=LOCALHOST: stack.enter_context(udp_socket(host))


def over_udp(client: Client, ours: socket.socket, target: socket.socket, *all_octets: bytes) -> Place:
    """Have the target receive each of these and send it back; where the client's relay is."""
    bound = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    for octets in all_octets:
        datagram = bytes(Datagram(address_of(target.getsockname()), octets))
        ours.sendto(datagram, (bound.host, bound.port))
        received, proxy = target.recvfrom(65536)
        assert received == octets
        target.sendto(octets, proxy)
        assert ours.recv(65536) == datagram
    return bound.host, bound.port


# --- TCP ---

def test_socks_and_http_are_read_by_tshark(recorded: Record, listen: Listen) -> None:
    server, website = recorded("-u", "anna:sesame"), listen()
    port, web_port, socks = str(server.service.port), str(website.getsockname()[1]), "5"
    with Client(server.place) as client:
        assert client.greet(Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
        client.login("anna", "sesame")
        bound = client.request(Command.CONNECT, Address.named("localhost", int(web_port))).bound
        with website.accept()[0] as connection:
            client.send(b"GET /page HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert connection.recv(999).endswith(b"\r\n\r\n")
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 26\r\n\r\nHello ")
            assert client.read(999)
            connection.sendall(b"from the other side.")
        assert client.rest() == b"from the other side."
    server.packets("ok")

    rows = server.tshark(
        "socks", "tcp.dstport", "socks.version", "socks.auth_accepted_method", "socks.username", "socks.password",
        "socks.command", "socks.remote_name", "socks.results", "socks.dst", "socks.port",
    )
    ours = rows[1][0]
    assert rows[:6] == [
        [port, socks, "", "", "", "", "", "", "", ""],
        [ours, socks, "2", "", "", "", "", "", "", ""],
        [port, socks, "", "anna", "sesame", "", "", "", "", ""],
        [ours, socks, "", "", "", "", "", "", "", ""],
        [port, socks, "", "", "", "1", "localhost", "", "", web_port],
        [ours, socks, "", "", "", "", "", "0", LOCALHOST, str(bound.port)],
    ]

    places = [part for place, name in ((port, "socks"), (web_port, "http")) for part in ("-d", f"tcp.port=={place},{name}")]
    rows = tshark(server.path, "http", "http.request.uri", "http.response.code", "http.file_data", *places)
    body = rows[2][2]
    assert body in ("Hello from the other side.", b"Hello from the other side.".hex())
    assert rows == [["/page", "", ""]] * 2 + [["", "200", body]] * 2, "once on each side, each time in one piece"
    assert server.tshark("_ws.malformed", "frame.number") == []
    assert_sound(server.path)


@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_both_sides_have_their_true_addresses(recorded: Record, listen: Listen, host: str) -> None:
    server, target = recorded("-b", host), listen(host)
    with tunnel(server, target) as through:
        through.ask_and_answer()
    packets = server.packets("ok")
    source, there = map(address_of, through.outside)
    assert said(packets) == {
        through.inside: b"\x05\x01\x00" + bytes(Request(Command.CONNECT, there)) + b"question",
        through.inside[::-1]: b"\x05\x00" + bytes(Reply(ReplyCode.SUCCEEDED, source)) + b"answer",
        through.outside: b"question",
        through.outside[::-1]: b"answer",
    }, "and nobody else is in it, such as the server that wakes its own threads"
    assert story(packets, *through.outside)[:4] == [">S", "<SA", ">8", "<6"]
    assert_sound(server.path)


@needs_ipv6
def test_a_client_of_a_listener_for_both_families_is_recorded_by_ipv4(recorded: Record, listen: Listen) -> None:
    server = recorded("-b", "::", "--allow-open-proxy")
    with tunnel(server, listen()) as through:
        pass
    assert said(server.packets("ok"))[through.inside[::-1]].startswith(b"\x05\x00")


def test_a_half_close_is_a_fin_that_is_passed_on(recorded: Record, listen: Listen) -> None:
    server = recorded()
    with tunnel(server, listen()) as through:
        through.client.send(b"all of it")
        through.client.end()
        assert b"".join(iter(lambda: through.connection.recv(65536), b"")) == b"all of it"
        through.connection.sendall(b"the answer")
        through.connection.close()
        assert through.client.rest() == b"the answer"
    packets = server.packets("ok")
    assert story(packets, *through.outside) == [">S", "<SA", ">9", ">FA", "<10", "<FA"]
    assert story(packets, *through.inside)[-4:] == [">9", ">FA", "<10", "<FA"]
    assert_sound(server.path)


def test_a_reset_is_a_reset_that_is_passed_on(recorded: Record, listen: Listen) -> None:
    server = recorded()
    with tunnel(server, listen()) as through:
        through.ask_and_answer()
        through.client.reset()
        with pytest.raises(ConnectionError):
            through.connection.recv(1)
    packets = server.packets("ok")
    for ends in (through.inside, through.outside):
        assert story(packets, *ends)[-3:] == [">8", "<6", ">RA"]
    assert_sound(server.path)


def test_a_target_that_resets_does_so_in_the_recording(recorded: Record, listen: Listen) -> None:
    server = recorded()
    with tunnel(server, listen()) as through:
        through.ask_and_answer()
        set_reset(through.connection)
        through.connection.close()
        assert through.client.rest() == b""
    packets = server.packets("ok")
    for ends in (through.inside, through.outside):
        assert story(packets, *ends)[-1] == "<RA"
    assert_sound(server.path)


def test_what_the_server_breaks_off_at_its_end_is_reset(recorded: Record, listen: Listen) -> None:
    server = recorded()
    with tunnel(server, listen()) as through:
        through.ask_and_answer()        # so the relay thread has them by now
        packets = server.packets()
    assert story(packets, *through.outside) == [">S", "<SA", ">8", "<6", ">RA"]
    assert story(packets, *through.inside)[-1] == "<RA"
    assert_sound(server.path)


def test_a_call_that_is_refused_is_one(recorded: Record, refusing: Callable[..., Place]) -> None:
    server, nobody = recorded(), refusing()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        assert client.ask(Command.CONNECT, nobody).code is ReplyCode.CONNECTION_REFUSED
        assert client.rest() == b""
    packets = server.packets("failed (reply 05)")
    (knock,) = [packet for packet in packets if packet.destination == nobody]
    assert (knock.flags, knock.source[0]) == ("S", LOCALHOST)
    assert knock.source[1] > 0
    assert story(packets, knock.source, nobody) == [">S", "<RA"]
    assert story(packets, ours, server.place)[-3:] == ["<10", "<FA", ">FA"], "the reply, and then its end"
    assert_sound(server.path)


def test_a_call_that_nobody_answers_stays_one(recorded: Record, silent: Callable[..., Place]) -> None:
    server, nobody = recorded("--connect-timeout", "0.3"), silent()
    with Client(server.place) as client:
        assert client.ask(Command.CONNECT, nobody).code is ReplyCode.TTL_EXPIRED
    packets = server.packets("failed (reply 06)")
    (knock,) = [packet for packet in packets if packet.destination == nobody]
    assert story(packets, knock.source, nobody) == [">S"]


def test_early_data_are_where_they_were(recorded: Record, listen: Listen) -> None:
    server, target = recorded(), listen()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        client.send(b"\x05\x01\x00", Request(Command.CONNECT, address_of(target.getsockname())), b"early")
        connection, source = target.accept()
        with connection:
            assert connection.recv(99) == b"early"
    packets = server.packets("ok")
    assert story(packets, ours, server.place)[:3] == [">S", "<SA", ">18"], "all in one segment, before any answer"
    assert said(packets)[source[:2], target.getsockname()] == b"early"
    assert_sound(server.path)


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "octet by octet"])
def test_the_header_of_a_balancer_is_in_front_and_once(recorded: Record, listen: Listen, cut: bool) -> None:
    """The connection is the balancer's, as it was; tshark finds the client in the header."""
    server, target = recorded("-v", "--proxy-protocol", LOCALHOST, "--allow-open-proxy", "--allow-local-targets"), listen()
    header = b"PROXY TCP4 192.0.2.7 198.51.100.1 51958 1080\r\n"
    with Client(server.place) as client:
        octets = header + b"\x05\x01\x00" + bytes(Request(Command.CONNECT, address_of(target.getsockname()))) + b"early"
        (client.drip if cut else client.send)(octets)
        inside = client.socket.getsockname()
        connection, _address = target.accept()
        assert client.exactly(12)
        early = b""
        while early != b"early":        # or it is gone before all of it has come
            early += connection.recv(99)
        connection.close()
    with Client(server.place) as health_check:
        checking = health_check.socket.getsockname()
        health_check.reset()
    server.service.wait_for("to check our health")
    packets = server.packets(after=" ok, ")
    assert said(packets)[inside, server.place] == octets
    assert story(packets, checking, server.place)[:2] == [">S", "<SA"]
    assert_sound(server.path)
    assert cut or tshark(server.path, "proxy", "proxy.src.ipv4", "ip.src") == [["192.0.2.7", LOCALHOST]]


def test_five_megabytes_each_way_are_all_in_it(recorded: Record, listen: Listen) -> None:
    server = recorded()
    up, down = os.urandom(MEGABYTES << 20), os.urandom(MEGABYTES << 20)
    with tunnel(server, listen()) as through:
        ours, theirs = through.client.socket, through.connection
        for octets, sender, receiver in ((up, ours, theirs), (down, theirs, ours)):
            writer = threading.Thread(target=sender.sendall, args=(octets,))
            writer.start()
            with receiver.makefile("rb") as stream:
                assert stream.read(len(octets)) == octets
            writer.join()
    packets = server.packets("ok")
    assert said(packets)[through.outside] == up
    assert said(packets)[through.outside[::-1]] == down
    assert max(len(packet.payload) for packet in packets) <= SEGMENT
    assert_sound(server.path)
    for stream in {row[0] for row in tshark(server.path, "tcp", "tcp.stream")}:
        there, back = followed(server.path, stream)
        assert (there[-len(up):] == up, back[-len(down):] == down) == (True, True)      # and no diff of megabytes


def followed(path: Path, stream: str) -> List[bytes]:
    """What "Follow TCP stream" shows: from the one who called, and back."""
    output = run(need("tshark"), "-n", "-r", path, "-q", "-z", f"follow,tcp,raw,{stream}").decode().replace("\r", "")
    return [bytes.fromhex("".join(re.findall(line, output, re.MULTILINE))) for line in ("^([0-9a-f]+)$", "^\t([0-9a-f]+)$")]


def test_two_clients_at_a_time_are_kept_apart(recorded: Record, echo: Place) -> None:
    server = recorded()
    with Client(server.place) as one, Client(server.place) as other:
        one.connect(echo)
        other.connect(echo)
        for number in range(20):
            exchange(one, b"one %d;" % number)
            exchange(other, b"other %d;" % number)
        names = {client.socket.getsockname(): text for client, text in ((one, b"one"), (other, b"other"))}
    server.service.wait_until(lambda: server.service.stderr.count(" ok, ") == 2, "both")
    octets = said(server.packets())
    for name, text in names.items():
        assert octets[server.place, name].endswith(b"".join(b"%s %d;" % (text, number) for number in range(20)))
    assert_sound(server.path)


def test_bind_is_a_call_to_the_server(recorded: Record) -> None:
    server = recorded()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        first = client.ask(Command.BIND, UNSPECIFIED)
        place = first.bound.host, first.bound.port
        with socket.create_connection(place, TIMEOUT) as peer:
            theirs = peer.getsockname()
            assert Reply.read(client).bound.port == theirs[1]
            peer.sendall(b"150 data from ftp")
            assert client.exactly(17) == b"150 data from ftp"
    packets = server.packets("ok")
    assert story(packets, theirs, place)[:3] == [">S", "<SA", ">17"]
    assert said(packets)[server.place, ours][2:].startswith(bytes(first))
    assert_sound(server.path)


def test_a_chain_of_two_is_recorded_by_the_first(recorded: Record, start_server: Any, echo: Place, new_udp: Listen) -> None:
    second, udp_target = start_server(), new_udp()
    server = recorded("--upstream", "socks5h://127.0.0.1:%d" % second.server_address[1])
    with Client(server.place) as client:
        client.connect(echo)
        exchange(client)
    server.service.wait_for("ok")
    with Client(server.place) as client:
        over_udp(client, new_udp(), udp_target, b"hello")
    packets = server.packets("udp")
    (octets,) = [octets for (_, place), octets in said(packets).items() if place == second.server_address and b"hello" in octets]
    assert octets == b"\x05\x01\x00" + bytes(Request(Command.CONNECT, address_of(echo))) + b"hello"
    datagram = bytes(Datagram(address_of(udp_target.getsockname()), b"hello"))
    sent = [packet.payload for packet in packets if not packet.flags]
    assert sent == [datagram] * 4, "to us, on to the upstream, and both ways back"
    assert_sound(server.path)


# --- UDP ---

@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_datagrams_are_recorded_on_both_sides(recorded: Record, host: str, new_udp: Listen) -> None:
    server, target, ours = recorded("-b", host), new_udp(host), new_udp(host)
    texts = b"one", b"", b"three", b"x" * 60000
    with Client((host, server.service.port)) as client:
        place = over_udp(client, ours, target, *texts)
    packets = [packet for packet in server.packets("udp") if not packet.flags]
    name, there = ours.getsockname()[:2], target.getsockname()[:2]
    outside = next(packet.source for packet in packets if packet.destination == there)
    assert outside[0] == host, "no wildcard"
    header = bytes(Datagram(address_of(there), b""))
    expected: List[Tuple[Place, Place, bytes]] = []
    for text in texts:
        expected += [(name, place, header + text), (outside, there, text), (there, outside, text), (place, name, header + text)]
    assert [(packet.source, packet.destination, packet.payload) for packet in packets] == expected
    assert_sound(server.path)


@pytest.mark.parametrize("words", [["--explain"], ["--status", "0"], ["--explain", "--status", "0"]])
def test_who_explains_or_watches_takes_nothing_away(recorded: Record, words: List[str], listen: Listen, new_udp: Listen) -> None:
    server, target = recorded(*words), new_udp()
    with tunnel(server, listen()) as through:
        through.ask_and_answer()
    with Client(server.place) as client:
        over_udp(client, new_udp(), target, b"hello")
    packets = server.packets(" UDP ASSOCIATE ")
    assert (said(packets)[through.outside], said(packets)[through.outside[::-1]]) == (b"question", b"answer")
    assert story(packets, *through.outside)[:4] == [">S", "<SA", ">8", "<6"]
    datagram = bytes(Datagram(address_of(target.getsockname()), b"hello"))
    assert [packet.payload for packet in packets if not packet.flags] == [datagram, b"hello", b"hello", datagram]


# --- the factory ---

def test_a_server_of_ones_own_can_be_recorded(tmp_path: Path, echo: Place, new_udp: Listen) -> None:
    path = tmp_path / "own.pcap"
    writer = CaptureWriter(open_file(str(path)))
    factory = Capture(writer).socket
    with Socks5Server(sockets=[listening_socket((LOCALHOST, 0), factory)]) as server:
        server.route = Route(socket_factory=factory)
        serve(server)
        place = server.server_address
        with Client(place) as client, Client(place) as other, Client(place) as third:
            client.connect(echo)
            exchange(client, b"by connect")
            bound = other.ask(Command.BIND, UNSPECIFIED).bound
            with socket.create_connection((bound.host, bound.port), TIMEOUT) as peer:
                assert Reply.read(other).bound.port == peer.getsockname()[1]
                peer.sendall(b"by bind")
                assert other.exactly(7) == b"by bind"
            over_udp(third, new_udp(), new_udp(), b"by datagram")
    writer.close()
    packets = packets_in(path.read_bytes())
    payloads = [packet.payload for packet in packets]
    assert (payloads.count(b"by connect"), payloads.count(b"by bind")) == (4, 2)
    assert sum(payload.endswith(b"by datagram") for payload in payloads) == 4
    assert len(said(packets)) == 2 * 5, "three clients, a target and a peer, and no connection that wakes a thread"


class Packets(List[Packet]):
    """In place of a writer: the packets of all that has been added."""

    def add(self, packets: Callable[..., Any], *details: Any) -> None:
        self.extend(parse(0, packet) for packet in packets(*details))

    def flags(self) -> List[str]:
        return [packet.flags for packet in self]


@pytest.fixture
def packets() -> Packets:
    return Packets()


@pytest.fixture
def capture(packets: Packets) -> Any:
    return Capture(packets)         # type: ignore[arg-type]


def test_it_is_called_like_the_class_socket(capture: Any) -> None:
    non_blocking = getattr(socket, "SOCK_NONBLOCK", 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        made = [
            capture.socket(), capture.socket(socket.AF_INET, socket.SOCK_STREAM | non_blocking, 0),
            capture.socket(socket.AF_INET, socket.SOCK_DGRAM | non_blocking),
            capture.socket(plain.family, plain.type, plain.proto, plain.detach()),
        ]
    for sock in made:
        sock.close()
    assert [type(sock).__name__ for sock in made] == ["CapturedStream"] * 2 + ["CapturedDatagrams"] * 2


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
    assert packets.flags() == story


def test_octets_that_are_left_unread_make_close_a_reset(capture: Any, packets: Packets, listen: Listen) -> None:
    target = listen()
    with capture.socket() as sock:
        assert sock.connect_ex(target.getsockname()) == 0
        with target.accept()[0] as connection:
            connection.sendall(b"unread")
            select.select([sock], [], [], TIMEOUT)
            sock.close()
    assert packets.flags() == ["S", "SA", "A", "RA"]


def test_a_connection_closed_before_it_is_known_to_be_one_is_complete(capture: Any, packets: Packets, listen: Listen) -> None:
    """As when another address has won the race."""
    target = listen()
    with Route(socket_factory=capture.socket).socket(address_of(target.getsockname())) as sock:
        assert sock.connect_ex(target.getsockname()) == errno.EINPROGRESS
        select.select([], [sock], [], TIMEOUT)
    assert packets.flags() == ["S", "SA", "A", "FA", "A"]


def test_a_refusal_is_recorded_even_if_nobody_asks_for_it(capture: Any, packets: Packets, refusing: Callable[..., Place]) -> None:
    nobody = refusing()
    with Route(socket_factory=capture.socket).socket(address_of(nobody)) as sock:
        assert sock.connect_ex(nobody) == errno.EINPROGRESS
        select.select([], [sock], [], TIMEOUT)
    assert packets.flags() == ["S", "RA"]


def test_a_failing_call_after_our_own_shutdown_is_no_reset(capture: Any, packets: Packets, listen: Listen) -> None:
    target = listen()
    with capture.socket() as sock:
        assert sock.connect_ex(target.getsockname()) == 0
        sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(BrokenPipeError):
            sock.send(b"x")
    assert "RA" not in packets.flags()
