"""The messages as tables of octets, and the two promises of protocol.py: read exactly, and refuse by name."""

from __future__ import annotations

import re
from io import BytesIO
from ipaddress import IPv6Address
from typing import Any, Dict, List, Type

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from socks5srv import protocol
from socks5srv.protocol import (
    UNSPECIFIED, Address, AddressType, Command, Credentials, CredentialsReply, Datagram, Greeting, LoginFailed, Message, Method,
    MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed, Socks5Error, read_exactly,
)

from .conftest import name

IPV4 = Address("192.0.2.1", 8080, AddressType.IPV4)
IPV6 = Address("2001:db8::1", 443, AddressType.IPV6)
NAME = name("example.com", 80)
LONG = name("a" * 63 + "." + "b" * 191, 65535)

IPV4_OCTETS = b"\x01\xc0\x00\x02\x01\x1f\x90"
IPV6_OCTETS = b"\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01\x01\xbb"
NAME_OCTETS = b"\x03\x0bexample.com\x00\x50"
LONG_OCTETS = b"\x03\xff" + b"a" * 63 + b"." + b"b" * 191 + b"\xff\xff"

TABLE: List[Any] = [
    (b"\x05\x01\x00", Greeting(b"\x00")), (b"\x05\x02\x00\x02", Greeting(b"\x00\x02")),
    (b"\x05\x03\x00\x01\x02", Greeting(b"\x00\x01\x02")),       # curl
    (b"\x05\x03\x80\xff\x00", Greeting(b"\x80\xff\x00")),       # methods nobody has heard of
    (b"\x05\x00", Greeting(b"")),                               # E1
    (b"\x05\xff" + bytes(range(255)), Greeting(bytes(range(255)))),
    (b"\x05\x00", MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)),
    (b"\x05\x02", MethodSelection(Method.USERNAME_PASSWORD)), (b"\x05\x80", MethodSelection(0x80)),
    (b"\x05\xff", MethodSelection(Method.NO_ACCEPTABLE_METHODS)),
    (b"\x01\x05alice\x06secret", Credentials(b"alice", b"secret")),
    (b"\x01\xff" + b"u" * 255 + b"\xff" + b"p" * 255, Credentials(b"u" * 255, b"p" * 255)),    # E58
    (b"\x01\x01\xff\x02\x00\xfe", Credentials(b"\xff", b"\x00\xfe")),                          # no text at all
    (b"\x01\x05alice\x00", Credentials(b"alice", b"")),                                        # E57
    (b"\x01\x00\x00", Credentials(b"", b"")),
    (b"\x01\x00", CredentialsReply(CredentialsReply.SUCCESS)), (b"\x01\x01", CredentialsReply(CredentialsReply.FAILURE)),
    (b"\x01\xff", CredentialsReply(255)),
    (b"\x05\x01\x00" + IPV4_OCTETS, Request(Command.CONNECT, IPV4)),
    (b"\x05\x02\x00" + IPV6_OCTETS, Request(Command.BIND, IPV6)),
    (b"\x05\x03\x00" + NAME_OCTETS, Request(Command.UDP_ASSOCIATE, NAME)),
    (b"\x05\x01\x00" + LONG_OCTETS, Request(Command.CONNECT, LONG)),
    (b"\x05\x01\xa5" + IPV4_OCTETS, Request(Command.CONNECT, IPV4, rsv=0xA5)),                 # E8
    (b"\x05\x01\x00\x03\x03::1\x00\x50", Request(Command.CONNECT, name("::1", 80))),           # E12: Chromium
    (b"\x05\x03\x00\x03\x010\x12\x34", Request(Command.UDP_ASSOCIATE, name("0", 0x1234))),     # E42: PySocks
    (b"\x05\x00\x00" + IPV4_OCTETS, Reply(ReplyCode.SUCCEEDED, IPV4)),
    (b"\x05\x00\x00" + IPV6_OCTETS, Reply(ReplyCode.SUCCEEDED, IPV6)),
    (b"\x05\x00\x00" + NAME_OCTETS, Reply(ReplyCode.SUCCEEDED, NAME)),                         # not sent, but read
    (b"\x05\x05\x00\x01" + bytes(6), Reply(ReplyCode.CONNECTION_REFUSED)),                     # E23
    (b"\x05\x5b\x00\x01" + bytes(6), Reply(0x5B)),
]

DATAGRAMS: List[Any] = [
    (b"\x00\x00\x00" + IPV4_OCTETS, Datagram(IPV4, b"")),
    (b"\x00\x00\x00" + IPV6_OCTETS, Datagram(IPV6, b"\x00ping")),
    (b"\x00\x00\x00" + NAME_OCTETS, Datagram(NAME, b"ping")),
    (b"\x00\x00\x81" + IPV4_OCTETS, Datagram(IPV4, b"ping", frag=0x81)),
    (b"\x12\x34\x01" + IPV4_OCTETS, Datagram(IPV4, b"ping", frag=1, rsv=0x1234)),
]

CLASSES: List[Type[Any]] = [Greeting, MethodSelection, Credentials, CredentialsReply, Request, Reply, Datagram]


class OneByOne(BytesIO):
    """A stream that has one octet at a time, as TCP may have."""

    def read(self, n: Any = -1) -> bytes:
        return super().read(min(n, 1))


def in_words(value: Any) -> str:
    return value.hex()[:24] if isinstance(value, bytes) else type(value).__name__


messages = pytest.mark.parametrize(("octets", "message"), TABLE, ids=in_words)
classes = pytest.mark.parametrize("cls", CLASSES)


def request(octets: bytes) -> Any:
    return Request.read(BytesIO(octets))


# --- reading and writing ---

@messages
@pytest.mark.parametrize("following", [b"", b"\xbe\xef"], ids=["alone", "followed"])
@pytest.mark.parametrize("kind", [BytesIO, OneByOne], ids=["at once", "cut into single octets"])
def test_a_message_is_what_its_octets_say_and_what_follows_stays_unread(octets, message, kind, following):
    stream = kind(octets + following)
    assert type(message).read(stream) == message
    assert stream.getvalue()[stream.tell():] == following


@pytest.mark.parametrize(("octets", "message"), TABLE + DATAGRAMS, ids=in_words)      # of a datagram, its header
def test_a_message_that_ends_too_soon_is_refused_wherever_it_ends(octets, message):
    for length in range(len(octets)):
        with pytest.raises(ProtocolError):
            type(message).read(BytesIO(octets[:length]))


@messages
def test_a_message_writes_the_octets_that_it_was_read_from(octets, message):
    assert bytes(message) == octets


@pytest.mark.parametrize(("header", "datagram"), DATAGRAMS, ids=in_words)
def test_a_datagram_is_its_header_and_all_that_follows(header, datagram):
    octets = header + datagram.data
    assert Datagram.read(BytesIO(octets)) == datagram
    assert Datagram.read(BytesIO(header)) == Datagram(datagram.address, b"", datagram.frag, datagram.rsv)
    assert bytes(datagram) == octets


def test_reading_exactly_asks_only_for_what_is_missing():
    asked = []

    class Stream:
        def read(self, n=-1):
            asked.append(n)
            return b"abc"[:min(n, 2)]

    assert read_exactly(Stream(), 5) == b"ababa"
    assert asked == [5, 3, 1]


@pytest.mark.parametrize("message", [
    Credentials(b"u" * 256, b"p"), Credentials(b"u", b"p" * 256), Request(Command.CONNECT, name("a" * 256, 1)),
    Request(Command.CONNECT, name("ä" * 128, 1)), Greeting(bytes(256)),
], ids=["UNAME", "PASSWD", "DST.ADDR", "DST.ADDR in UTF-8", "METHODS"])
def test_what_is_too_long_to_be_counted_in_one_octet_is_not_written(message):
    with pytest.raises(ValueError, match="256" if isinstance(message, Greeting) else "and 255 are the most"):
        bytes(message)


# --- pictures and text ---

def picture(cls: Any) -> Dict[str, str]:
    """The boxes of the docstring's picture: names to widths."""
    rows = [line.strip().strip("|").split("|") for line in cls.__doc__.splitlines() if line.strip().startswith("|")]
    names, widths = ([box.strip() for box in row] for row in rows)
    return dict(zip(names, widths))


@classes
def test_the_picture_is_that_of_the_fields(cls):
    drawn = picture(cls)
    fields = next(message for _octets, message in TABLE + DATAGRAMS if type(message) is cls).fields()
    assert list(drawn) == [field.name for field in fields]
    for field, width in zip(fields, drawn.values()):
        if width.isdigit():
            assert len(field.octets) == int(width), field.name
        elif width.startswith("X'"):
            assert field.octets == bytes.fromhex(width[2:-1]), field.name
        else:
            assert width in ("Variable", "1 to 255"), field.name


def test_the_picture_of_an_address_is_that_of_its_fields():
    assert list(picture(Address)) == ["ATYP", "ADDR", "PORT"]
    assert [field.name for field in NAME.fields("DST")] == ["ATYP", "DST.ADDR", "DST.PORT"]


@pytest.mark.parametrize(("message", "text"), [
    (Greeting(b"\x00\x02\xfe"), "Greeting VER=5 NMETHODS=3 METHODS=NO_AUTHENTICATION_REQUIRED,USERNAME_PASSWORD,fe"),
    (MethodSelection(Method.NO_ACCEPTABLE_METHODS), "MethodSelection VER=5 METHOD=NO_ACCEPTABLE_METHODS"),
    (Credentials(b"al\nice", b"secret"), r"Credentials VER=1 ULEN=6 UNAME=al\nice PLEN=*** PASSWD=***"),
    (CredentialsReply(0), "CredentialsReply VER=1 STATUS=success"),
    (CredentialsReply(2), "CredentialsReply VER=1 STATUS=failure"),
    (Request(Command.CONNECT, NAME), "Request VER=5 CMD=CONNECT RSV=00 ATYP=DOMAINNAME DST.ADDR=example.com DST.PORT=80"),
    (Reply(ReplyCode.HOST_UNREACHABLE), "Reply VER=5 REP=HOST_UNREACHABLE RSV=00 ATYP=IPV4 BND.ADDR=0.0.0.0 BND.PORT=0"),
    (Reply(0x5B), "Reply VER=5 REP=5b RSV=00 ATYP=IPV4 BND.ADDR=0.0.0.0 BND.PORT=0"),
    (Datagram(IPV6, b"ping", frag=0x81), "Datagram RSV=0000 FRAG=129 ATYP=IPV6 DST.ADDR=2001:db8::1 DST.PORT=443 DATA=4 octets"),
], ids=in_words)
def test_the_text_of_a_message_says_what_its_octets_mean(message, text):
    assert str(message) == text


def test_a_login_that_ends_too_soon_does_not_tell_how_long_the_password_would_have_been():
    complaints = set()
    for password in (b"sesame", b"a much longer one"):
        with pytest.raises(ProtocolError) as caught:
            Credentials.read(BytesIO(bytes(Credentials(b"alice", password))[:-3]))
        complaints.add((str(caught.value), caught.value.__suppress_context__))
    assert complaints == {("the client closed the connection in mid-message, in its password", True)}


@pytest.mark.parametrize("password", [b"hunter2", b"!", b"\xff\x00"])
def test_no_password_is_shown_anywhere(password):
    credentials = Credentials(b"alice", password)
    shown = [str(credentials), repr(credentials), f"{credentials!s:>5}"]
    shown += [str(part) for field in credentials.fields() for part in (field, field.meaning)]
    assert not [text for text in shown if password.decode("latin-1") in text]
    # Nor how long it is: that is a hint as well.
    assert {field.name for field in credentials.fields() if field.secret} == {"PLEN", "PASSWD"}
    assert str(credentials) == "Credentials VER=1 ULEN=5 UNAME=alice PLEN=*** PASSWD=***"
    assert repr(credentials) == "Credentials(username=b'alice')"


# --- errors ---

@pytest.mark.parametrize(("error", "answer"), [
    (ProtocolError("?"), None), (Socks5Error("?"), None), (NoAcceptableMethod("?"), b"\x05\xff"), (LoginFailed("?"), b"\x01\x01"),
    *[(RequestFailed(code), bytes([5, code, 0, 1, 0, 0, 0, 0, 0, 0])) for code in ReplyCode],
], ids=lambda value: value.hex() if isinstance(value, bytes) else repr(value))
def test_errors_carry_the_answer_to_send(error, answer):
    """E6, R42, E23: a failure is ten octets, as the shortest readers expect."""
    assert (error.answer and bytes(error.answer)) == answer
    assert isinstance(error, Socks5Error)


def test_the_reply_codes_have_the_words_of_the_rfc():
    phrases = [(int(code), code.phrase) for code in ReplyCode]
    assert phrases[1:3] == [(1, "general SOCKS server failure"), (2, "connection not allowed by ruleset")]
    assert list(map(int, ReplyCode)) == list(range(9))
    assert str(RequestFailed(ReplyCode.TTL_EXPIRED)) == "TTL expired"
    assert str(RequestFailed(ReplyCode.TTL_EXPIRED, "too late")) == "too late"


OTHER_PROTOCOLS = [
    b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\x00\x00",
    b"\x06\x01\x00", b"\xff\xff",
]


@pytest.mark.parametrize(("cls", "octets", "error", "answer"), [
    *[(Greeting, octets, ProtocolError, None) for octets in OTHER_PROTOCOLS],                   # E2
    (MethodSelection, b"\x01\x00", ProtocolError, None),
    (Credentials, b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", LoginFailed, b"\x01\x01"),       # E59, E61
    (Credentials, b"\x00\x01a\x01b", LoginFailed, b"\x01\x01"),
    (CredentialsReply, b"\x05\x00", ProtocolError, None),
    (Request, b"\x04\x01\x00" + IPV4_OCTETS, RequestFailed, b"\x05\x01\x00\x01" + bytes(6)),    # E9
    (Request, b"\x01\x05alice", RequestFailed, b"\x05\x01\x00\x01" + bytes(6)),
    (Reply, b"\x04\x00\x00" + IPV4_OCTETS, ProtocolError, None),
])
def test_another_version_is_refused(cls, octets, error, answer):
    expected = "01" if cls in (Credentials, CredentialsReply) else "05"
    with pytest.raises(error, match=f"VER .* is {octets[0]:02x}, not {expected}") as caught:
        cls.read(BytesIO(octets))
    assert (caught.value.answer and bytes(caught.value.answer)) == answer


@pytest.mark.parametrize("atyp", [0, 2, 5, 0x7F, 0xFF])
@pytest.mark.parametrize("start", [b"\x05\x01\x00", b"\x05\x99\x00"])
def test_an_unknown_atyp_is_refused_at_once(start, atyp):
    """E11: nobody knows how long it is, so nothing after it may be waited for."""
    with pytest.raises(RequestFailed, match=f"{atyp:02x}") as caught:
        request(start + bytes([atyp]))
    assert caught.value.code is ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED


@pytest.mark.parametrize("cmd", [0, 4, 0xF0, 0xF1, 0xFF])
@pytest.mark.parametrize("address", [IPV4_OCTETS, IPV6_OCTETS, NAME_OCTETS])
def test_an_unknown_cmd_is_refused_when_the_request_has_been_read_to_its_end(cmd, address):
    """E10"""
    octets = bytes([5, cmd, 0]) + address
    stream = OneByOne(octets + b"\xbe\xef")
    with pytest.raises(RequestFailed, match=f"{cmd:02x}") as caught:
        Request.read(stream)
    assert caught.value.code is ReplyCode.COMMAND_NOT_SUPPORTED
    assert stream.tell() == len(octets)
    with pytest.raises(ProtocolError):
        request(octets[:-1])


# --- addresses ---

def name_request(host: bytes) -> bytes:
    return b"\x05\x01\x00\x03" + bytes([len(host)]) + host + b"\x00\x50"


@pytest.mark.parametrize("host", [
    b"", b"\x00", b"localhost\x00", b"localhost\x00.example", b"a b", b" localhost", b"localhost\n", b"\r\nfake line",
    b"\x1b[2Ja", b"\x7f", b"a%b", b"fe80::1%lo", b"::1%lo", b"100%", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc2\x85", b"\xc2\xa0",
    b"a/b", b"a:b", b"localhost:80", b"[::1", b"::1]", b"[[::1]]", b"[::1]:80", b"[fe80::1%lo]", b"[127.0.0.1]", b"[localhost]",
    b"[]", b"::g", b"1:2:3:4:5:6:7:8:9", b"user@host", b"\xff" * 255,
    "a\u2028b".encode(), "a\u202eb".encode(), "a\u00adb".encode(), "\u200b".encode(), "\ue000".encode(),
], ids=repr)
def test_a_name_that_cannot_exist_is_refused_when_all_of_it_is_read(host):
    """E13 to E16, E20"""
    stream = BytesIO(name_request(host) + b"\xbe\xef")
    with pytest.raises(RequestFailed) as caught:
        Request.read(stream)
    assert caught.value.code is ReplyCode.HOST_UNREACHABLE
    assert stream.read() == b"\xbe\xef"
    assert str(caught.value).isprintable(), "it goes to the log"


@pytest.mark.parametrize("host", [
    "localhost", "LocalHost", "a", "0", "a..b", ".", "example.com.", "xn--bcher-kva.example", "bücher.example", "日本.example",
    "_srv._tcp.example", "-", "127.0.0.1", "127.1", "0x7f.1", "2130706433", "::1", "2001:db8::", "::ffff:192.0.2.1", "[::1]",
    "[2001:DB8::]", "a" * 255, "x." * 127 + "y", "faß.test",
    "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.com", "\u0dc1\u0dca\u200d\u0dbb\u0dd3.com",
])
def test_a_name_that_may_exist_is_left_to_the_resolver(host):
    """E15 to E17: and what looks like an address is known to be one."""
    octets = name_request(host.encode())
    assert request(octets) == Request(Command.CONNECT, name(host, 80))
    assert bytes(request(octets)) == octets


@pytest.mark.parametrize(("host", "literal"), [
    ("127.0.0.1", Address("127.0.0.1", 80, AddressType.IPV4)),
    ("::1", Address("::1", 80, AddressType.IPV6)),
    ("2001:DB8:0:0::1", Address("2001:db8::1", 80, AddressType.IPV6)),
    ("[::1]", Address("::1", 80, AddressType.IPV6)),
    ("::FFFF:c000:201", Address("192.0.2.1", 80, AddressType.IPV4)),
    ("::ffff:192.0.2.1", Address("192.0.2.1", 80, AddressType.IPV4)),
    ("[::ffff:192.0.2.1]", Address("192.0.2.1", 80, AddressType.IPV4)),
    ("127.1", None), ("2130706433", None), ("0x7f000001", None), ("0177.0.0.1", None), ("localhost", None), ("0", None),
    ("1.2.3.4.", None), ("١٢٧.0.0.1", None),
])
def test_an_ip_address_sent_as_a_name_is_known_as_one(host, literal):
    """E12, E19; what only the C library takes for an address is judged when it has been resolved (E17)."""
    assert name(host, 80).literal == literal
    assert name(host, 80).address_type is AddressType.DOMAINNAME


@pytest.mark.parametrize(("address", "literal"), [
    (IPV4, IPV4), (IPV6, IPV6), (Address(str(IPv6Address("::ffff:192.0.2.1")), 8080, AddressType.IPV6), IPV4),
])
def test_an_ip_address_is_its_own_literal_but_for_a_mapped_one(address, literal):
    assert address.literal == literal


@pytest.mark.parametrize(("sockaddr", "address"), [
    (("192.0.2.1", 8080), IPV4), (("::ffff:192.0.2.1", 8080, 0, 0), IPV4),
    (("2001:db8::1", 443, 0, 0), IPV6), (("2001:db8::1", 443, 0, 2), IPV6),
    (("fe80::1%eth0", 1, 0, 2), Address("fe80::1", 1, AddressType.IPV6, 2)),
    (("fe80::1", 1, 7, 2), Address("fe80::1", 1, AddressType.IPV6, 2)),
    (("febf::1", 1, 0, 3), Address("febf::1", 1, AddressType.IPV6, 3)),
    (("::", 1080, 0, 0), Address("::", 1080, AddressType.IPV6)),
])
def test_the_address_of_a_socket_has_its_zone_and_no_ipv6_clothes(sockaddr, address):
    """E19, E24"""
    assert Address.of(sockaddr) == address


@pytest.mark.parametrize(("text", "address", "sockaddr"), [
    ("fe80::1%2", Address("fe80::1", 80, AddressType.IPV6, 2), ("fe80::1", 80, 0, 2)),
    ("FE80:0::1%02", Address("fe80::1", 80, AddressType.IPV6, 2), ("fe80::1", 80, 0, 2)),
    ("fe80::1", Address("fe80::1", 80, AddressType.IPV6), ("fe80::1", 80)),
    ("2001:db8::1%2", Address("2001:db8::1", 80, AddressType.IPV6), ("2001:db8::1", 80)),
    ("192.0.2.1", Address("192.0.2.1", 80, AddressType.IPV4), ("192.0.2.1", 80)),
])
def test_a_zone_is_a_number_and_of_link_local_addresses_only(text, address, sockaddr):
    assert Address.numeric(text, 80) == address
    assert address.sockaddr == sockaddr
    assert Address.numeric(address.zoned, 80) == address.literal == address.dialled == address


@pytest.mark.parametrize(("host", "complaint"), [
    *[(host, "does not appear to be") for host in ("", "localhost", "127.1", "1.2.3.4.5", "256.0.0.1", "::g", "%eth0", "[::1]")],
    *[("fe80::1%" + zone, "is no number of an interface") for zone in ("eth0", "-1", "\u0662", str(2 ** 32), "1_0", " 1")],
    ("fe80::1%" + "9" * 5000, "is no number of an interface"),
], ids=lambda text: repr(text[:20]))
def test_only_an_ip_address_is_numeric_and_the_name_of_a_zone_is_for_the_resolver(host, complaint):
    with pytest.raises(ValueError, match=complaint):
        Address.numeric(host, 80)
    assert Address.named(host, 80) == name(host, 80)


def test_a_zone_is_on_no_message_and_in_no_line_of_the_log():
    address = Address("fe80::1", 80, AddressType.IPV6, 2)
    for message in (Request(Command.CONNECT, address), Reply(ReplyCode.SUCCEEDED, address), Datagram(address, b"data")):
        plain = type(message).read(BytesIO(bytes(message)))
        assert bytes(plain) == bytes(message)
        assert "%" not in str(message)
        assert plain != message, "what comes back has none"
    assert str(address) == "[fe80::1]:80"


@pytest.mark.parametrize(("text", "other", "scope"), [
    ("fe80::1", "fe80::2%7", 7), ("fe80::1%3", "fe80::2%7", 3), ("fe80::1", "fe80::2", 0), ("fe80::1", "2001:db8::1", 0),
    ("2001:db8::1", "fe80::2%7", 0), ("192.0.2.1", "fe80::2%7", 0),
])
def test_an_address_without_its_zone_is_on_the_link_of_who_names_it(text, other, scope):
    address = Address.numeric(text, 80).on_the_link_of(Address.numeric(other, 1))
    assert address == Address.numeric(text, 80)._replace(scope=scope)
    assert name("fe80.example", 80).on_the_link_of(Address.numeric(other, 1)) == name("fe80.example", 80)


@pytest.mark.parametrize(("address", "unspecified"), [
    (UNSPECIFIED, True), (Address("0.0.0.0", 5, AddressType.IPV4), True), (Address("::", 5, AddressType.IPV6), True),
    (name("0", 5), True), (name("0.0.0.0", 5), True), (name("::", 0), True), (name("[::]", 0), True),
    (IPV4, False), (NAME, False), (Address("0.0.0.1", 0, AddressType.IPV4), False), (Address("::1", 0, AddressType.IPV6), False),
])
def test_zeros_of_every_kind_mean_that_the_client_cannot_tell(address, unspecified):
    """R27, E37, E42"""
    assert address.is_unspecified is unspecified


@pytest.mark.parametrize(("address", "text"), [
    (IPV4, "192.0.2.1:8080"), (IPV6, "[2001:db8::1]:443"), (NAME, "example.com:80"), (name("::1", 1), "[::1]:1"),
    (name("[::1]", 1), "[::1]:1"),
])
def test_an_address_is_written_as_people_write_it(address, text):
    assert str(address) == text


# --- any octets, any message ---

# So that not all of the examples end at the version.
STARTS = {Credentials: b"\x01", CredentialsReply: b"\x01", Datagram: b"\x00\x00\x00"}


@classes
@given(octets=st.binary(max_size=300), guided=st.booleans(), atyp=st.sampled_from([b"", b"\x01", b"\x03", b"\x04"]))
@example(octets=b"", guided=False, atyp=b"")
def test_any_octets_are_a_message_or_a_socks5_error(cls, octets, guided, atyp):
    """E68"""
    if guided:
        start = STARTS.get(cls, b"\x05")
        octets = start + (octets[:2] + atyp if cls in (Request, Reply) else atyp) + octets[2:]
    stream = BytesIO(octets)
    try:
        outcome = cls.read(stream)
    except Socks5Error as error:
        outcome = error
    assert str(outcome).isprintable(), "in a log it is one line, and no more"
    if isinstance(outcome, Message):
        read = bytearray(octets[:stream.tell()])
        if cls is Reply:
            read[2] = 0         # the one octet that is not kept
        assert bytes(outcome) == read
    else:
        assert outcome.answer is None or bytes(outcome.answer)


octet = st.integers(0, 255)
port = st.integers(0, 65535)
ipv4, ipv6 = (st.ip_addresses(v=version).map(str) for version in (4, 6))
letters = st.characters(min_codepoint=0xA1).filter(str.isprintable) | st.sampled_from("abcXYZ019._-")
names = st.text(letters, min_size=1).filter(lambda text: len(text.encode()) < 256) | st.sampled_from(["127.0.0.1", "::1", "0"])
addresses = st.one_of(
    st.builds(lambda host, port: Address(host, port, AddressType.IPV4), ipv4, port),
    st.builds(lambda host, port: Address(host, port, AddressType.IPV6), ipv6, port),
    st.builds(name, ipv6 | names, port),
)
generated = st.one_of(
    st.builds(Greeting, st.binary(max_size=255)),
    st.builds(MethodSelection, octet),
    st.builds(Credentials, st.binary(max_size=255), st.binary(max_size=255)),
    st.builds(CredentialsReply, octet),
    st.builds(Request, st.sampled_from(Command), addresses, octet),
    st.builds(Reply, octet, addresses),
    st.builds(Datagram, addresses, st.binary(max_size=300), octet, st.integers(0, 65535)),
)


@given(generated)
def test_a_message_written_and_read_is_the_same(message):
    octets = bytes(message)
    assert type(message).read(BytesIO(octets)) == message
    assert type(message).read(OneByOne(octets) if type(message) is not Datagram else BytesIO(octets)) == message
    assert octets == b"".join(field.octets for field in message.fields())
    assert str(message).isprintable()


def test_every_message_has_been_tested():
    found = {cls for cls in vars(protocol).values() if isinstance(cls, type) and issubclass(cls, Message)}
    assert found - {Message} == set(CLASSES)
    for cls in CLASSES:
        assert re.search(r"RFC 19\d\d section", cls.__doc__), cls
        assert re.search(r"Client to server|Server to client|Both ways", cls.__doc__), cls
