"""What a load balancer says in front of its clients: read strictly, believed of balancers only, and counted for the client."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from io import BytesIO
from ipaddress import ip_address
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from socks5srv.explain.tracer import Tracer
from socks5srv.monitor.history import History
from socks5srv.monitor.metrics import Metrics
from socks5srv.observer import Observer
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Greeting, Method, MethodSelection, ReplyCode, Request
from socks5srv.proxyprotocol import LENGTH_MAX, LOCAL, PROXY, SIGNATURE, TCP4, TCP6, UNIX_STREAM, BadHeader, ProxyHeader, crc32c
from socks5srv.server import Socks5Server
from socks5srv.service.summary import Summary
from socks5srv.session import Session

from .conftest import LOCALHOST, Client, address_of, eventually, exchange, needs_ipv6, needs_neighbour, udp_socket

CLIENT, CALLED = Address.numeric("192.0.2.7", 51958), Address.numeric("198.51.100.1", 1080)
CLIENT6, CALLED6 = Address.numeric("2001:db8::7", 51958), Address.numeric("2001:db8::1", 1080)
GREETING, SELECTION = b"\x05\x01\x00", b"\x05\x00"


# --- headers, written another way than they are read ---

def line(client: Address = CLIENT, called: Address = CALLED) -> bytes:
    """Version 1."""
    return f"PROXY TCP{6 if ':' in client.host else 4} {client.host} {called.host} {client.port} {called.port}\r\n".encode()


def block(*ends: Address) -> bytes:
    """The addresses of version 2."""
    return b"".join(ip_address(end.host).packed for end in ends) + b"".join(end.port.to_bytes(2, "big") for end in ends)


def tlv(kind: int, value: bytes = b"") -> bytes:
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


def binary(family: int = TCP4, addresses: bytes = block(CLIENT, CALLED), tlvs: bytes = b"", ver_cmd: int = PROXY, length: Optional[int] = None) -> bytes:
    """Version 2."""
    rest = addresses + tlvs
    return SIGNATURE + bytes((ver_cmd, family)) + (len(rest) if length is None else length).to_bytes(2, "big") + rest


def with_checksum(family: int = TCP4, addresses: bytes = block(CLIENT, CALLED), before: bytes = b"", behind: bytes = b"", ver_cmd: int = PROXY) -> bytes:
    blank = binary(family, addresses, before + tlv(3, bytes(4)) + behind, ver_cmd)
    return binary(family, addresses, before + tlv(3, crc32c(blank).to_bytes(4, "big")) + behind, ver_cmd)


KNOWN, KNOWN6, UNKNOWN, CHECK = ProxyHeader(CLIENT, CALLED), ProxyHeader(CLIENT6, CALLED6), ProxyHeader(), ProxyHeader(local=True)
UNIX = block().ljust(216, b"/")

GOOD: List[Tuple[bytes, ProxyHeader]] = [
    (line(), KNOWN), (line(CLIENT6, CALLED6), KNOWN6), (b"PROXY UNKNOWN\r\n", UNKNOWN),
    (b"PROXY UNKNOWN ffff::1 some \r \x00 where 0 70000\r\n", UNKNOWN), (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", UNKNOWN),
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 0 65535\r\n", ProxyHeader(CLIENT._replace(port=0), CALLED._replace(port=65535))),
    (b"PROXY TCP6 ::ffff:192.0.2.7 ::FFFF:c633:6401 51958 1080\r\n", KNOWN),
    (binary(), KNOWN), (binary(TCP6, block(CLIENT6, CALLED6)), KNOWN6), (binary(UNIX_STREAM, UNIX), UNKNOWN), (binary(0, b""), UNKNOWN),
    (binary(tlvs=tlv(1, b"socks") + tlv(4, bytes(9)) + tlv(5, b"u" * 128) + tlv(0x20, bytes(2000)) + tlv(0xEA, b"vpce") + tlv(0xFF)), KNOWN),
    (binary(addresses=block(CLIENT, CALLED), tlvs=tlv(4, bytes(LENGTH_MAX - 15))), KNOWN),
    (with_checksum(), KNOWN), (with_checksum(TCP6, block(CLIENT6, CALLED6), tlv(5, b"id"), tlv(4, b"...")), KNOWN6), (with_checksum(0, b""), UNKNOWN),
    (binary(0, b"", ver_cmd=LOCAL), CHECK), (with_checksum(0, b"", ver_cmd=LOCAL), CHECK),
    # Of LOCAL all that the family stands for is to be skipped, whatever it is.
    (binary(ver_cmd=LOCAL), CHECK), (binary(0x77, b"whatever", ver_cmd=LOCAL), CHECK), (binary(TCP4, b"short", ver_cmd=LOCAL), CHECK),
    # As HAProxy 2.6 has sent them: of a client, with an ID and a checksum, and to check.
    (b"PROXY TCP4 127.0.0.1 127.0.0.1 40001 10800\r\n", ProxyHeader(Address.numeric(LOCALHOST, 40001), Address.numeric(LOCALHOST, 10800))),
    (bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 0016 7f000001 7f000001 9c43 2a31 030004216551f9 050000"),
     ProxyHeader(Address.numeric(LOCALHOST, 40003), Address.numeric(LOCALHOST, 10801))),
    (bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0007 030004a9b87e8f"), CHECK),
]

NO_HEADER, NOT_READ, TOO_SHORT = "no PROXY header: it begins with ", "a PROXY header that cannot be read: ", "a PROXY header that is too short for its addresses"
NO_ADDRESS, FAMILY, TLVS = "a PROXY header with an address that is none: ", "a PROXY header of the address family ", "a PROXY header whose TLVs do not fit in its length"
ENDS, CHECKSUM, COMMAND = "a PROXY header that ends too soon", "a PROXY header whose checksum is wrong", "a PROXY header of an unknown version or command, "

BAD: List[Tuple[bytes, str]] = [
    # not one at all
    (GREETING, "SOCKS5 without a PROXY header: have the balancer send one, or leave its address out of --proxy-protocol"),
    (b"\x04\x01\x00\x50\x7f\x00\x00\x01me\x00", NO_HEADER + "04"), (b"\x16\x03\x01\x02\x00\x01", NO_HEADER + "16"),
    (b"GET / HTTP/1.1\r\n\r\n", NO_HEADER + "47"), (b"POST / HTTP/1.1\r\n\r\n", NO_HEADER + "b'POST\\x20/'"), (b"proxy TCP4 ", NO_HEADER + "70"),
    (b"PROXY\tUNKNOWN\r\n", NO_HEADER + r"b'PROXY\t'"), (b"\r\n\r\n\x00\r\nQUIX\n" + bytes(4), NO_HEADER + "0d 0a 0d 0a 00 0d 0a 51 55 49 58 0a"),
    (b" " + line(), NO_HEADER + "20"), (b"\x00", NO_HEADER + "00"),
    # version 1
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 51958 1080\n", NOT_READ), (b"PROXY UNKNOWN\n", NOT_READ), (b"PROXY UNKNOWNS\r\n", NOT_READ), (b"PROXY \r\n", NOT_READ),
    (b"PROXY TCP4\r\n", NOT_READ), (b"PROXY TCP5 192.0.2.7 198.51.100.1 51958 1080\r\n", NOT_READ), (b"PROXY UDP4 192.0.2.7 198.51.100.1 51958 1080\r\n", NOT_READ),
    (b"PROXY  TCP4 192.0.2.7 198.51.100.1 51958 1080\r\n", NOT_READ), (b"PROXY TCP4 192.0.2.7  198.51.100.1 51958 1080\r\n", NOT_READ),
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 51958 1080 \r\n", NOT_READ), (b"PROXY TCP4 192.0.2.7 198.51.100.1 51958\r\n", NOT_READ),
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 051958 1080\r\n", NOT_READ), (b"PROXY TCP4 192.0.2.7 198.51.100.1 +1 1080\r\n", NOT_READ),
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 519580 1080\r\n", NOT_READ), (b"PROXY TCP4 example.com 198.51.100.1 51958 1080\r\n", NOT_READ),
    (b"PROXY TCP6 fe80::1%eth0 2001:db8::1 51958 1080\r\n", NOT_READ), (b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\r\r\n", NOT_READ),
    ("PROXY TCP4 192.0.2.7 198.51.100.1 ٣ 1080\r\n".encode(), NOT_READ), (b"PROXY TCP4 192.0.2.7\x00 198.51.100.1 1 2\r\n", NOT_READ),
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 1080\r\n", NO_ADDRESS), (b"PROXY TCP4 192.0.2.7 198.51.100.1 51958 99999\r\n", NO_ADDRESS),
    (b"PROXY TCP4 192.0.2.256 198.51.100.1 51958 1080\r\n", NO_ADDRESS), (b"PROXY TCP4 192.0.2.07 198.51.100.1 51958 1080\r\n", NO_ADDRESS),
    (b"PROXY TCP4 192.0.2 198.51.100.1 51958 1080\r\n", NO_ADDRESS), (b"PROXY TCP4 2001:db8::7 2001:db8::1 51958 1080\r\n", NO_ADDRESS),
    (b"PROXY TCP6 192.0.2.7 198.51.100.1 51958 1080\r\n", NO_ADDRESS), (b"PROXY TCP6 2001:db8::7 1:2:3:4:5:6:7:8:9 51958 1080\r\n", NO_ADDRESS),
    (b"PROXY TCP4 0.0.0.0 198.51.100.1 51958 1080\r\n", "a PROXY header with 0.0.0.0:51958, which no computer has"),
    (b"PROXY TCP6 ff02::1 2001:db8::1 51958 1080\r\n", "a PROXY header with [ff02::1]:51958, which no computer has"),
    (b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", "a PROXY header without a line end in 107 octets"), (b"PROXY " + b"x" * 500, "a PROXY header without a line end in 107 octets"),
    # version 2
    (binary(ver_cmd=0x11), COMMAND + "11"), (binary(ver_cmd=0x31), COMMAND + "31"), (binary(ver_cmd=0x22), COMMAND + "22"), (binary(ver_cmd=0x2F), COMMAND + "2f"),
    (binary(0x12), FAMILY + "12"), (binary(0x22, block(CLIENT6, CALLED6)), FAMILY + "22"), (binary(0x32, UNIX), FAMILY + "32"), (binary(0x10), FAMILY + "10"),
    (binary(0x01), FAMILY + "01"), (binary(0x41), FAMILY + "41"), (binary(0xFF), FAMILY + "ff"),
    (binary(addresses=b""), TOO_SHORT), (binary(addresses=block(CLIENT, CALLED)[:-1]), TOO_SHORT), (binary(TCP6), TOO_SHORT), (binary(UNIX_STREAM), TOO_SHORT),
    (binary(addresses=block(UNSPECIFIED, CALLED)), "a PROXY header with 0.0.0.0:0, which no computer has"),
    (binary(addresses=block(CLIENT, Address.numeric("224.0.0.1", 1))), "a PROXY header with 224.0.0.1:1, which no computer has"),
    (binary(tlvs=b"\x04"), TLVS), (binary(tlvs=b"\x04\x00"), TLVS), (binary(tlvs=b"\x04\x00\x01"), TLVS), (binary(tlvs=tlv(4) + b"\x05\xff\xff..."), TLVS),
    (binary(0, b"", tlvs=b"\x04\x00\x02.", ver_cmd=LOCAL), TLVS), (binary(tlvs=tlv(5, b"u" * 129)), "a PROXY header with a unique ID of 129 octets, and 128 are the most"),
    (binary(tlvs=tlv(3, bytes(4))), CHECKSUM), (binary(tlvs=tlv(3)), CHECKSUM), (binary(tlvs=tlv(3, bytes(3))), CHECKSUM), (binary(tlvs=tlv(3, bytes(5))), CHECKSUM),
    (with_checksum()[:-1] + b"?", CHECKSUM), (with_checksum(behind=tlv(4, b"x"))[:-1] + b"y", CHECKSUM), (with_checksum(before=tlv(3, bytes(4))), CHECKSUM),
    (binary(0, b"", tlv(3, bytes(4)), ver_cmd=LOCAL), CHECKSUM),
    (binary(length=LENGTH_MAX + 1), "a PROXY header with 4097 octets behind its length, and 4096 are the most"), (binary(length=65535), "a PROXY header with 65535 octets"),
]

CUT: List[bytes] = [line()[:1], line()[:5], line()[:6], line()[:30], line()[:-1], SIGNATURE[:1], SIGNATURE, binary()[:15], binary()[:16], binary()[:-1], binary(length=4096)]


# --- the header ---

@pytest.mark.parametrize(("octets", "expected"), GOOD)
def test_a_header_is_read_to_its_last_octet_and_no_further(octets: bytes, expected: ProxyHeader) -> None:
    stream = BytesIO(octets + GREETING)
    assert ProxyHeader.read(stream) == expected
    assert stream.read() == GREETING


@pytest.mark.parametrize(("octets", "reason"), [*BAD, *((octets, ENDS) for octets in CUT)])
def test_what_is_none_is_refused_in_a_sentence(octets: bytes, reason: str) -> None:
    with pytest.raises(BadHeader) as caught:
        ProxyHeader.read(BytesIO(octets))
    assert str(caught.value).startswith(reason)
    assert str(caught.value).isprintable()


def test_every_header_that_is_cut_anywhere_ends_too_soon() -> None:
    for octets, _header in GOOD:
        for length in range(len(octets)):
            with pytest.raises(BadHeader, match=ENDS):
                ProxyHeader.read(BytesIO(octets[:length]))


def test_the_checksum_is_that_of_the_specification() -> None:
    """The value that is given for these digits wherever CRC32C is described, and RFC 3720 B.4's."""
    assert (crc32c(b"123456789"), crc32c(b""), crc32c(bytes(32)), crc32c(b"\xff" * 32)) == (0xE3069283, 0, 0x8A9136AA, 0x62A8AB43)


def test_no_octet_of_an_address_or_a_value_can_be_another_where_there_is_a_checksum() -> None:
    octets, start = with_checksum(behind=tlv(5, b"an id")), len(SIGNATURE) + 4
    for at in [*range(start, start + 12), *range(start + 15, len(octets))]:
        with pytest.raises(BadHeader):
            ProxyHeader.read(BytesIO(octets[:at] + bytes((octets[at] ^ 1,)) + octets[at + 1:]))


ADDRESSES4 = st.builds(Address.numeric, st.ip_addresses(v=4).map(str), st.integers(0, 65535))
ADDRESSES6 = st.builds(Address.numeric, st.ip_addresses(v=6).map(str), st.integers(0, 65535))
TLV_LISTS = st.lists(st.builds(tlv, st.integers(6, 255), st.binary(max_size=40)), max_size=5).map(b"".join)


def nobody(address: Address) -> bool:
    return address.is_unspecified or ip_address(address.host).is_multicast


@given(st.one_of(st.tuples(ADDRESSES4, ADDRESSES4), st.tuples(ADDRESSES6, ADDRESSES6)), TLV_LISTS, st.booleans(), st.binary(max_size=20))
def test_whatever_is_written_is_read_back(ends: Tuple[Address, Address], tlvs: bytes, text: bool, behind: bytes) -> None:
    if any(map(nobody, ends)) or (":" in ends[0].host) != (":" in ends[1].host):    # (::ffff:192.0.2.1 is no IPv6 address)
        return
    family = TCP6 if ":" in ends[0].host else TCP4
    stream = BytesIO((line(*ends) if text else with_checksum(family, block(*ends), tlvs)) + behind)
    assert ProxyHeader.read(stream) == ProxyHeader(*ends)
    assert stream.read() == behind


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A header with some octets changed, left out or put in."""
    octets = draw(st.sampled_from([octets for octets, _header in GOOD]))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(octets)))
        octets = octets[:at] + draw(st.binary(max_size=3)) + octets[at + draw(st.integers(0, 3)):]
    return octets


@given(st.one_of(st.binary(max_size=300), spoiled(), st.binary(max_size=300).map(SIGNATURE.__add__), st.binary(max_size=110).map(b"PROXY ".__add__)))
@example(b"")
def test_whatever_comes_it_is_a_header_or_a_bad_one(octets: bytes) -> None:
    stream = BytesIO(octets)
    try:
        header = ProxyHeader.read(stream)
    except BadHeader:
        return
    assert not header.local or header.source is None
    assert header.source is None or not nobody(header.source)
    length = 16 + int.from_bytes(octets[14:16], "big") if octets[:12] == SIGNATURE else octets.index(b"\r\n") + 2
    assert stream.tell() == length


# --- a server behind a balancer ---

Behind = Callable[..., Any]


class TurnedAway(Observer):
    """Those who were."""

    def __init__(self) -> None:
        self.reasons: List[Tuple[str, str]] = []

    def turned_away(self, client: Address, reason: str) -> None:
        self.reasons.append((client.host, reason))


@pytest.fixture
def behind(start_server: Any, caplog: pytest.LogCaptureFixture) -> Behind:
    """A server whose balancers are at 127.0.0.1, and its targets, too; ``server.watch`` has who was turned away."""
    def start(**settings: Any) -> Any:
        caplog.set_level(logging.DEBUG, "socks5srv")
        watch = TurnedAway()
        server = start_server(**{"proxy_protocol": ["127.0.0.1", "::1"], "observers": [watch, *settings.pop("observers", ())], "allow_local_targets": True, **settings})
        server.watch = watch
        return server

    return start


def spoken(caplog: pytest.LogCaptureFixture, least: int = logging.INFO) -> List[str]:
    return [record.getMessage() for record in caplog.records if record.name == "socks5srv" and record.levelno >= least]


def forwarded(server: Any, new_client: Any, client: Address = CLIENT) -> Client:
    """A client of that address, which comes by a balancer."""
    found: Client = new_client(server)
    found.send(line(client))
    return found


@pytest.fixture
def is_served(new_client: Any, echo: Any) -> Callable[[Any], None]:
    """Have somebody else be served by it."""
    def check(server: Any) -> None:
        client = forwarded(server, new_client, Address.numeric("203.0.113.9", 9))
        client.connect(echo)
        exchange(client)
        client.close()
        assert server.next_ended().client.host == "203.0.113.9"

    return check


@pytest.mark.parametrize(("octets", "client"), [(line(), CLIENT), (line(CLIENT6, CALLED6), CLIENT6), (binary(), CLIENT), (with_checksum(), CLIENT)])
@pytest.mark.parametrize("way", ["at once", "octet by octet", "header first"])
def test_the_client_is_the_headers_and_the_balancer_is_kept(
        way: str, octets: bytes, client: Address, behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind()
    connection = new_client(server)
    request = octets + bytes(Greeting(b"\0")) + bytes(Request(Command.CONNECT, address_of(echo)))
    if way == "octet by octet":
        connection.drip(request)
    elif way == "at once":
        connection.send(request)
    else:
        connection.send(octets)
        connection.send(request[len(octets):])
    assert connection.exactly(2 + 10)[:4] == SELECTION + b"\x05\x00"
    exchange(connection)
    via = Address.of(connection.socket.getsockname())
    connection.close()
    session = server.next_ended()
    assert (session.client, session.via, session.probe, session.outcome) == (client, via, False, "close")
    assert session.as_dict()["via"] == str(via)
    assert str(session).startswith(f"#1 {client} via 127.0.0.1 CONNECT ")


@pytest.mark.parametrize("octets", [b"PROXY UNKNOWN\r\n", binary(0, b""), binary(UNIX_STREAM, UNIX)])
def test_where_the_balancer_does_not_know_its_client_it_is_the_client(octets: bytes, behind: Behind, new_client: Any, echo: Any) -> None:
    server, client = behind(), new_client
    connection = client(server)
    connection.send(octets)
    connection.connect(echo)
    own = Address.of(connection.socket.getsockname())
    connection.close()
    session = server.next_ended()
    assert (session.client, session.via, session.probe) == (own, own, False)


@needs_ipv6
def test_a_balancer_may_come_by_ipv6_with_a_client_of_ipv4(behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind(address=("::1", 0))
    client = forwarded(server, new_client)
    client.connect(echo)
    client.close()
    session = server.next_ended()
    assert (session.client, f"{session}".split()[3]) == (CLIENT, "[::1]")


@pytest.mark.parametrize(("octets", "reason"), BAD)
def test_a_bad_header_is_hung_up_on_and_told_and_costs_nobody_else_anything(
        octets: bytes, reason: str, behind: Behind, new_client: Any, is_served: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = behind(max_per_client=1, max_clients=2)
    bad = new_client(server)
    bad.send(octets)
    assert bad.rest() == b""        # although it says nothing more, and has not ended
    [(host, told)] = eventually(lambda: server.watch.reasons)
    own = Address.of(bad.socket.getsockname())
    assert (host, told.startswith(f"{own} rejected: {reason}")) == (LOCALHOST, True)
    assert spoken(caplog) == [told]
    assert server.registry.clients == 0
    is_served(server)
    assert server.registry.next_id() == 2, "the other one was the first session"


@pytest.mark.parametrize("octets", CUT)
@pytest.mark.parametrize("end", ["end", "reset"])
def test_so_is_one_that_ends_too_soon(end: str, octets: bytes, behind: Behind, new_client: Any, is_served: Any) -> None:
    server = behind()
    bad = new_client(server)
    bad.drip(octets)
    eventually(lambda: not octets or server._headers.waiting)
    getattr(bad, end)()
    [(_host, told)] = eventually(lambda: server.watch.reasons)
    assert told.endswith(f"rejected: {ENDS}")
    is_served(server)


@pytest.mark.parametrize("octets", [b"", *CUT])
def test_one_that_comes_too_slowly_meets_its_own_deadline(
        octets: bytes, behind: Behind, new_client: Any, is_served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = behind(handshake_timeout=60)
    monkeypatch.setattr(server._headers, "timeout", 0.2)
    slow = new_client(server)
    slow.send(octets)
    is_served(server)
    assert slow.rest() == b""
    assert server.watch.reasons[0][1].endswith("rejected: no PROXY header within 0.2 s")


def test_a_drop_now_and_then_does_not_put_off_the_deadline(behind: Behind, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = behind()
    monkeypatch.setattr(server._headers, "timeout", 0.3)
    slow = new_client(server)
    slow.socket.settimeout(0.02)
    sent = 0
    for octet in binary(length=LENGTH_MAX) + bytes(LENGTH_MAX):
        slow.socket.sendall(bytes((octet,)))
        sent += 1
        try:
            assert slow.socket.recv(1) == b""
            break
        except socket.timeout:
            continue
        except ConnectionError:
            break
    assert sent < 40


def test_the_deadline_is_long_enough_for_a_packet_that_is_sent_again() -> None:
    with Socks5Server((LOCALHOST, 0)) as server:
        assert 3 < server._headers.timeout < server.handshake_timeout


def test_behind_the_header_the_socket_waits_as_long_as_ever(behind: Behind, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = behind()
    monkeypatch.setattr(server._headers, "timeout", 0.2)
    client = forwarded(server, new_client)
    [handler] = eventually(server.registry.serving)
    assert handler.connection.gettimeout() is None
    assert client.greet() == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)


# --- health checks ---

@pytest.mark.parametrize("octets", [b"", binary(0, b"", ver_cmd=LOCAL), with_checksum(0, b"", ver_cmd=LOCAL), binary(ver_cmd=LOCAL), None])
@pytest.mark.parametrize("end", ["end", "reset"])
def test_a_check_that_only_connects_is_no_client(
        end: str, octets: Optional[bytes], behind: Behind, new_client: Any, is_served: Any, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    server = behind(observers=[metrics], allow_from=["203.0.113.0/24"])
    check = new_client(server)
    own = Address.of(check.socket.getsockname())
    if octets != b"":
        check.send(line(own) if octets is None else octets)      # as version 1 has it: no client but the balancer has that port
    getattr(check, end)()
    eventually(lambda: f"{own} has connected, to check our health" in spoken(caplog, logging.DEBUG))
    assert (server.watch.reasons, spoken(caplog), server.registry.clients) == ([], [], 0)
    assert metrics.read()[0].by("clients") == metrics.read()[0].by("handshake_failures") == {}
    is_served(server)


@pytest.mark.parametrize("users", [None, {"anna": "sesame"}], ids=["no users", "users"])
@pytest.mark.parametrize("own_line", [False, True], ids=["LOCAL", "of its own address"])
def test_a_check_of_the_greeting_is_answered_and_is_no_failure(
        own_line: bool, users: Any, behind: Behind, new_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    metrics, summary, history = Metrics(), Summary(), History()
    server = behind(users=users, observers=[metrics, summary, history])
    server.observers += (Tracer(server, [history]),)
    check, method = new_client(server), 0 if users is None else 2
    check.send(line(Address.of(check.socket.getsockname())) if own_line else binary(0, b"", ver_cmd=LOCAL))
    assert check.greet(method).method == method
    check.reset()
    session = server.next_ended()
    assert (session.probe, session.outcome, session.client.host, session.via) == (True, "probe", LOCALHOST, session.client)
    assert (spoken(caplog), summary.outcomes, history.summaries()) == ([], {}, [])
    assert "probe" in spoken(caplog, logging.DEBUG)[-1]
    counters = metrics.read()[0]
    assert (counters.by("sessions"), counters.by("handshake_failures")) == ({("probe",): 1}, {})


def test_a_check_that_cannot_log_in_is_told_once_and_is_no_guess(behind: Behind, new_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = behind(users={"anna": "sesame"})
    for _ in range(12):
        check = new_client(server)
        check.send(binary(0, b"", ver_cmd=LOCAL))
        assert not check.log_in("anna", "wrong")
        check.close()
        assert server.next_ended().outcome == "login_failed"
    assert server.policy.throttle.failures == {}
    assert len(spoken(caplog)) == 1
    check = new_client(server)
    check.send(binary(0, b"", ver_cmd=LOCAL))
    assert check.log_in("anna", "sesame")


def test_a_check_may_go_all_the_way_and_is_told_once(behind: Behind, new_client: Any, echo: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = behind()
    for _ in range(3):
        check = new_client(server)
        check.send(binary(0, b"", ver_cmd=LOCAL))
        check.connect(echo)
        exchange(check)
        check.close()
        assert server.next_ended().outcome == "close"
    assert len(spoken(caplog)) == 1


def test_a_check_in_another_protocol_is_told_of(behind: Behind, new_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = behind()
    check = new_client(server)
    check.send(binary(0, b"", ver_cmd=LOCAL) + b"OPTIONS / HTTP/1.0\r\n\r\n")
    assert check.rest().startswith(b"HTTP/1.1 501 ")
    assert server.next_ended().outcome == "bad_protocol"
    assert "this is HTTP" in spoken(caplog)[-1]


def test_a_browser_is_told_the_address_that_it_has_called(behind: Behind, new_client: Any) -> None:
    server = behind()
    browser = forwarded(server, new_client)
    browser.send(b"GET /proxy.pac HTTP/1.1\r\n\r\n")
    assert f'return "SOCKS5 {CALLED}; SOCKS {CALLED}";'.encode() in browser.rest()


# --- who is no balancer ---

@pytest.mark.parametrize("octets", [line(), binary(), binary(0, b"", ver_cmd=LOCAL), b"PROXY UNKNOWN\r\n"])
@pytest.mark.parametrize("settings", [{}, {"proxy_protocol": ["192.0.2.0/24"]}], ids=["no balancers", "another balancer"])
@pytest.mark.parametrize("cut", [False, True])
def test_the_header_of_anybody_else_is_a_strangers(
        cut: bool, settings: Any, octets: bytes, start_server: Any, new_client: Any) -> None:
    metrics = Metrics()
    server = start_server(observers=[metrics], **settings)
    stranger = new_client(server)
    with suppress(ConnectionError):     # it is hung up on before the last octet
        (stranger.drip if cut else stranger.send)(octets + GREETING)
    assert stranger.rest() == b""
    session = server.next_ended()
    assert (session.client.host, session.via, session.outcome) == (LOCALHOST, None, "bad_protocol")
    assert session.reason == "this is a PROXY header, and --proxy-protocol does not have its sender's address"
    assert metrics.read()[0].by("handshake_failures") == {("proxy_protocol",): 1}


def test_anybody_else_is_served_as_ever(start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server(proxy_protocol=["192.0.2.0/24"])
    client = new_client(server)
    client.connect(echo)
    exchange(client)
    client.close()
    assert server.next_ended().via is None


@needs_neighbour
def test_a_balancer_and_others_come_to_one_listener(behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind()
    forwarded(server, new_client).connect(echo)
    other = new_client(server, source="127.0.0.2")
    other.connect(echo)
    assert [session.client.host for session in server.sessions] == [CLIENT.host, "127.0.0.2"]


def test_without_balancers_no_listener_has_anything_to_do_with_headers(start_server: Any, behind: Behind) -> None:
    assert [listener.talk for listener in behind().listeners] != [listener.talk for listener in start_server().listeners]
    server = start_server()
    [listener] = server.listeners
    assert listener.talk == server._talk


# --- what counts for the client ---

def test_networks_that_need_no_login_are_the_clients(behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind(users={"anna": "sesame"}, allow_from=["192.0.2.0/24"])
    forwarded(server, new_client).connect(echo)
    assert forwarded(server, new_client, CALLED).greet(0, 2).method == Method.USERNAME_PASSWORD


def test_without_users_only_those_are_served(behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind(allow_from=["192.0.2.0/24"])
    forwarded(server, new_client).connect(echo)
    assert forwarded(server, new_client, CALLED).rest() == b""
    assert server.watch.reasons == [(CALLED.host, f"{CALLED.host} rejected: not in --allow-from")]


def test_the_limit_of_connections_is_of_each_client(behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind(max_per_client=1)
    forwarded(server, new_client).connect(echo)
    forwarded(server, new_client, CALLED).connect(echo)
    assert forwarded(server, new_client, CLIENT._replace(port=1)).rest() == b""
    assert server.watch.reasons == [(CLIENT.host, f"{CLIENT.host} has reached its limit of 1 connections")]


def test_wrong_logins_slow_down_their_client_and_no_other(behind: Behind, new_client: Any) -> None:
    server = behind(users={"anna": "sesame"})
    for _ in range(3):
        assert not forwarded(server, new_client).log_in("anna", "wrong")
    assert list(server.policy.throttle.failures) == [CLIENT.host]
    assert server.policy.throttle.delay(CALLED.host) == server.policy.throttle.delay(LOCALHOST) == 0


def test_clients_that_say_nothing_compete_by_their_own_networks(behind: Behind, new_client: Any) -> None:
    server = behind(max_handshakes=3)
    patient = forwarded(server, new_client, CALLED)
    eventually(lambda: server.registry.slow.total == 1)
    for port in range(1, 5):
        forwarded(server, new_client, CLIENT._replace(port=port))
        eventually(lambda port=port: port < 3 or server.registry.slow.total == 3)
    assert patient.greet() == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)
    reasons = {server.next_ended().client for _ in range(2)}
    assert reasons == {CLIENT._replace(port=1), CLIENT._replace(port=2)}


def test_rules_and_own_addresses_are_judged_for_the_client(behind: Behind, new_client: Any, echo: Any) -> None:
    """It is on another computer, though its balancer is on this one."""
    server = behind(allow_local_targets=False)
    server.policy.is_here = lambda host: host == LOCALHOST
    assert forwarded(server, new_client, Address.numeric(LOCALHOST, 9)).ask(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    assert forwarded(server, new_client).ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED


def test_the_loopback_of_another_computer_is_not_this_ones(behind: Behind, new_client: Any, echo: Any) -> None:
    server = behind(elsewhere=True, allow_local_targets=False)
    client = forwarded(server, new_client, Address.numeric("127.0.0.9", 999))
    assert client.ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
    client.close()
    session = server.next_ended()
    assert session.client == Address.numeric(LOCALHOST, 999), "the balancer's own address, by which it reaches us"


@needs_neighbour
def test_datagrams_are_expected_from_the_client_and_not_from_the_balancer(behind: Behind, new_client: Any, new_udp: Any) -> None:
    server, echo = behind(), new_udp()
    client = forwarded(server, new_client, Address.numeric("127.0.0.2", 999))
    bound = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    target = Address.of(echo.getsockname())
    balancers, clients = new_udp(), new_udp("127.0.0.2")
    balancers.sendto(bytes(Datagram(target, b"not mine")), bound.sockaddr)
    clients.sendto(bytes(Datagram(target, b"mine")), bound.sockaddr)
    octets, relay = echo.recvfrom(100)
    assert octets == b"mine"
    echo.sendto(b"answer", relay)
    assert Datagram.read(BytesIO(clients.recv(100))).data == b"answer"


@pytest.fixture
def new_udp() -> Iterator[Callable[..., socket.socket]]:
    made: List[socket.socket] = []

    def make(host: str = LOCALHOST) -> socket.socket:
        made.append(udp_socket(host))
        return made[-1]

    yield make
    for sock in made:
        sock.close()


# --- what is seen of it ---

def test_the_first_words_of_an_explanation_are_who_told_of_the_client(behind: Behind, new_client: Any, echo: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "socks5srv.explain")
    history = History()
    server = behind(observers=[history])
    server.observers += (Tracer(server), Tracer(server, [history]))
    client = forwarded(server, new_client)
    client.connect(echo)
    via = Address.of(client.socket.getsockname())
    client.close()
    server.next_ended()
    shown = [record.getMessage() for record in caplog.records if record.name == "socks5srv.explain"]
    assert shown[0] == f"#1 CLIENT  {CLIENT}, says the PROXY header of {via}\n"
    assert any(f"{CLIENT} == proxy ==" in each for each in shown)
    [summary] = history.summaries()
    assert (summary["client"], summary["via"]) == (str(CLIENT), str(via))
    found = history.find(1)
    assert found is not None
    assert found["steps"][0]["label"] == f"CLIENT {CLIENT}, says the PROXY header of {via}"


def test_a_session_without_a_balancer_says_nothing_of_one() -> None:
    session = Session(1, CLIENT)
    session.end("x")
    assert session.as_dict()["via"] is None
    assert "via" not in str(session)


# --- the settings ---

@pytest.mark.parametrize("late", [False, True])
def test_behind_a_balancer_loopback_is_not_for_this_computer_only(late: bool) -> None:
    if not late:
        with pytest.raises(ValueError, match="open proxy"):
            Socks5Server((LOCALHOST, 0), proxy_protocol=["127.0.0.1"])
        Socks5Server((LOCALHOST, 0), proxy_protocol=["127.0.0.1"], allow_from=["192.0.2.0/24"]).server_close()
        return
    with Socks5Server((LOCALHOST, 0)) as server:
        server.proxy_protocol = ["127.0.0.1"]
        with pytest.raises(ValueError, match="open proxy"):
            server.serve_forever()


def test_a_network_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="host bits"):
        Socks5Server((LOCALHOST, 0), proxy_protocol=["10.0.0.1/8"], users={})


def test_it_may_be_set_until_it_serves_and_is_of_all_listeners(behind: Behind, new_client: Any) -> None:
    class Late(Socks5Server):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self.proxy_protocol = ["127.0.0.1"]
            super().serve_forever(poll_interval)

    server = behind(server_class=Late, proxy_protocol=())
    client = forwarded(server, new_client)
    assert client.greet() == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)


def test_behind_a_balancer_other_computers_are_served() -> None:
    with Socks5Server((LOCALHOST, 0), proxy_protocol=["127.0.0.1"], users={}) as server:
        assert server.policy.serves_others


# --- how many may wait ---

def test_of_too_many_that_wait_for_their_headers_the_oldest_is_evicted(behind: Behind, new_client: Any, is_served: Any) -> None:
    server = behind(max_handshakes=3)
    oldest = new_client(server)
    eventually(lambda: len(server._headers.waiting) == 1)
    others = [new_client(server) for _ in range(2)]
    eventually(lambda: len(server._headers.waiting) == 3)
    is_served(server)
    assert oldest.rest() == b""
    assert server.watch.reasons[0][1].endswith("rejected: evicted: too many connections had not sent a PROXY header")
    for other in others:
        other.send(line() + GREETING)
        assert other.exactly(2) == SELECTION


def test_without_descriptors_a_balancer_is_turned_away(behind: Behind, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = behind()
    monkeypatch.setattr("socks5srv.descriptors.Descriptors.take_for_client", lambda _self: False)
    assert new_client(server).rest() == b""
    assert server.watch.reasons[0][1].endswith("the descriptors of the proxy are used up (ulimit -n)")


def test_what_waits_for_a_header_ends_with_the_server(new_client: Any, start_server: Any) -> None:
    server = start_server(proxy_protocol=["127.0.0.1"])
    server._headers.timeout = 60
    waiting = [new_client(server) for _ in range(5)]
    waiting[0].send(b"PROXY ")
    eventually(lambda: len(server._headers.waiting) == 5)
    server.server_close()
    assert [each.rest() for each in waiting] == [b""] * 5
    eventually(lambda: not server._headers.waiting)
