"""
The client, against our own server, and against proxies that say what a test tells them to.
"""

from __future__ import annotations

import contextlib
import socket
import time
from functools import partial
from typing import Any, Callable, Iterator, List

import pytest

from socks5srv import client
from socks5srv.client import Conversation, DatagramRelay, Proxy, bind, connect, udp_associate
from socks5srv.protocol import (
    UNSPECIFIED, Address, AddressType, Command, Credentials, CredentialsReply, Datagram, Greeting, LoginFailed, Method,
    MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, RequestFailed,
)
from socks5srv.rules import Rules

from .conftest import LOCALHOST, TIMEOUT, exchange, handler_with, in_thread, name, needs_ipv6, udp_socket

CHOSEN = bytes(MethodSelection(Method.NO_AUTHENTICATION_REQUIRED))
SUCCESS = bytes(Reply(ReplyCode.SUCCEEDED))
HOSTS = pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
SOON = 0.3          # seconds, for deadlines that have to pass


def url_of(server: Any, scheme: str = "socks5h", login: str = "") -> str:
    host, port = server.server_address[:2]
    return f"{scheme}://{login}{f'[{host}]' if ':' in host else host}:{port}"


class Connection:
    """The proxy's end of a connection, as a stream for messages."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def read(self, n: int = -1, /) -> bytes:
        return self.socket.recv(n)

    def send(self, *messages: Any) -> None:
        self.socket.sendall(b"".join(map(bytes, messages)))


@pytest.fixture
def proxy_that(listen: Callable[..., socket.socket]) -> Iterator[Callable[..., str]]:
    """The URL of a proxy for one client, with which it does what the function says, and closes; the test ends when it has."""
    done: List[Callable[[], None]] = []

    def make(script: Callable[[Connection], object], login: str = "") -> str:
        listener = listen()

        def serve() -> None:
            sock, _address = listener.accept()
            with sock:
                sock.settimeout(TIMEOUT)
                script(Connection(sock))

        done.append(in_thread(serve))
        return f"socks5h://{login}{LOCALHOST}:{listener.getsockname()[1]}"

    yield make
    for each in done:
        each()


def until_the_client_leaves(connection: Connection) -> None:
    try:
        while connection.read(4096):
            pass
    except ConnectionError:     # it has left something unread
        pass


def says(*messages: Any) -> Callable[[Connection], None]:
    """All in one segment, before it is asked; and then it waits for the client to leave."""
    def script(connection: Connection) -> None:
        connection.send(*messages)
        until_the_client_leaves(connection)

    return script


# --- the URL ---

@pytest.mark.parametrize(("url", "proxy"), [
    ("socks5h://127.0.0.1:1081", Proxy("127.0.0.1", 1081)), ("socks5h://[::1]:1081/", Proxy("::1", 1081)),
    ("socks5h://proxy.example", Proxy("proxy.example", 1080)),
    ("SOCKS5://proxy.example:1", Proxy("proxy.example", 1, names_there=False)),
    ("socks5h://anna:sesame@h:1", Proxy("h", 1, b"anna", b"sesame")),
    ("socks5h://anna@h:1", Proxy("h", 1, b"anna")), ("socks5h://anna:@h:1", Proxy("h", 1, b"anna")),
    ("socks5h://an%3ana:s%40%2f%25%00@h:1", Proxy("h", 1, b"an:na", b"s@/%\0")),
    ("socks5h://j\u00fcrgen:%c3%bc@h:1", Proxy("h", 1, "j\u00fcrgen".encode(), "\u00fc".encode())),
    ("socks5h://[fe80::1%25eth0]:1", Proxy("fe80::1%eth0", 1)), ("socks5h://[fe80::1%eth0]:1", Proxy("fe80::1%eth0", 1)),
    ("socks5h://[fe80::1%252]:1", Proxy("fe80::1%2", 1)),
    ("socks5h+gssapi://proxy.example", Proxy("proxy.example", gssapi=True)),
    ("socks5+gssapi://socks@h:1", Proxy("h", 1, names_there=False, gssapi=True, service="socks")),
    ("socks5h+gssapi://rcmd%2Fother@h:1", Proxy("h", 1, gssapi=True, service="rcmd/other")),
])
def test_a_url_says_where_the_proxy_is_who_we_are_and_who_looks_names_up(url: str, proxy: Proxy) -> None:
    assert Proxy.parse(url) == proxy
    assert Proxy.parse(proxy) is proxy


@pytest.mark.parametrize("url", [
    "", "127.0.0.1:1080", "http://h:1", "socks4://h:1", "socks5h://", "socks5h://:1", "socks5h://h:0", "socks5h://h:65536",
    "socks5h://h:x", "socks5h://h:1/path", "socks5h://h:1?q", "socks5h://h:1#f", "socks5h://anna:se/sesame@h:1", "socks5h://[::1:1",
    "socks5h+gssapi://anna:sesame@h:1", "socks5h+ntlm://h:1", "socks5h+gssapi://", "socks5h://anna:se#sesame@h:1", f"socks5h://anna:{'x' * 256}@h:1", f"socks5h://{'x' * 256}@h:1",
])
def test_what_is_no_url_of_a_proxy_is_told_without_the_password(url: str) -> None:
    with pytest.raises(ValueError, match="255 bytes at most" if "xxx" in url else "HOST:PORT") as raised:
        Proxy.parse(url)
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize("url", [
    "socks5h://h:1", "socks5://[::1]:1", "socks5h://a%3ab:***@h:1", "socks5h://[fe80::1%25eth0]:1", "socks5h+gssapi://h:1", "socks5+gssapi://rcmd%2Fh@h:1",
])
def test_the_text_of_a_proxy_is_its_url_without_the_password(url: str) -> None:
    proxy = Proxy.parse(url.replace("***", "sesame"))
    assert str(proxy) == url.replace("%3a", "%3A")
    assert "sesame" not in repr(proxy)


# --- CONNECT ---

@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """This computer's resolver finds these addresses for the name: ``resolves(name, address, address)``; the name."""
    def make(name: str, *addresses: str) -> str:
        ours = socket.getaddrinfo

        def resolver(host: Any, *arguments: Any, **keywords: Any) -> List[Any]:
            return [row for there in (addresses if host == name else [host]) for row in ours(there, *arguments, **keywords)]

        monkeypatch.setattr(client.socket, "getaddrinfo", resolver)
        return name

    return make


@HOSTS
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_connect_returns_a_blocking_socket_to_the_target(start_server: Any, start_echo: Any, host: str, scheme: str) -> None:
    server = start_server(address=(host, 0))
    with connect(url_of(server, scheme), *start_echo(host).server_address[:2]) as sock:
        assert sock.gettimeout() is None
        exchange(sock)
    assert server.next_ended().destination.address_type is (AddressType.IPV6 if ":" in host else AddressType.IPV4)


@needs_ipv6
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_an_address_in_the_brackets_of_a_url_is_sent_as_one(start_server: Any, start_echo: Any, scheme: str) -> None:
    server = start_server()
    with connect(url_of(server, scheme), "[::1]", start_echo("::1").server_address[1]) as sock:
        exchange(sock)
    assert server.next_ended().destination.address_type is AddressType.IPV6


@needs_ipv6
def test_a_relay_whose_address_is_in_brackets_can_be_written_to() -> None:
    with DatagramRelay(Proxy("h"), socket.socket(), name("[::1]", 9)) as relay:
        assert relay.socket.getpeername()[:2] == ("::1", 9)


def test_socks5h_leaves_the_name_to_the_proxy(start_server: Any, echo: Any) -> None:
    server = start_server(handler_with(resolve=lambda _self, _host: [LOCALHOST]))
    with connect(url_of(server), "only.there.example", echo[1]) as sock:
        exchange(sock)
    assert server.next_ended().destination == name("only.there.example", echo[1])


@pytest.fixture
def only_here(resolves: Callable[..., str]) -> str:
    """A name that only this computer knows, with two addresses."""
    return resolves("only.here.example", "127.0.0.9", LOCALHOST)


def test_socks5_looks_the_name_up_here_and_tries_one_address_after_the_other(start_server: Any, echo: Any, only_here: str) -> None:
    server = start_server(rules=Rules.parse(["deny 127.0.0.9"]))
    with connect(url_of(server, "socks5"), only_here, echo[1]) as sock:
        exchange(sock)
    assert [str(server.next_ended().destination.host) for _ in range(2)] == ["127.0.0.9", LOCALHOST]


@pytest.mark.parametrize(("host", "sent"), [
    ("m\u00fcnchen.example", "xn--mnchen-3ya.example"), ("fa\u00df.example", "xn--fa-hia.example"),
])
def test_a_name_beyond_ascii_goes_as_the_dns_has_it(proxy_that: Any, host: str, sent: str) -> None:
    def script(connection: Connection) -> None:
        connection.send(CHOSEN)
        Greeting.read(connection)
        assert Request.read(connection).destination.host == sent
        connection.send(SUCCESS)

    connect(proxy_that(script), host, 80).close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_told_before_anything_is_sent(port: int) -> None:
    with pytest.raises(ValueError, match="expected 0-65535"):
        connect("socks5h://127.0.0.1:1", "h", port)


def test_what_the_target_says_first_stays_in_the_socket(proxy_that: Any) -> None:
    with connect(proxy_that(says(CHOSEN, SUCCESS, b"220 hello")), "h", 80) as sock:
        assert sock.recv(100) == b"220 hello"


def test_answers_may_come_octet_by_octet(proxy_that: Any) -> None:
    def script(connection: Connection) -> None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in CHOSEN + bytes(Reply(ReplyCode.SUCCEEDED, name("a.name.example", 80))) + b"hello":
            connection.send(bytes([octet]))
        connection.socket.shutdown(socket.SHUT_WR)
        until_the_client_leaves(connection)

    with connect(proxy_that(script), "h", 80) as sock:
        assert b"".join(iter(lambda: sock.recv(100), b"")) == b"hello"


# --- what goes wrong ---

@pytest.mark.parametrize("code", [code for code in ReplyCode if code is not ReplyCode.SUCCEEDED])
def test_every_failure_has_its_code(start_server: Any, code: ReplyCode) -> None:
    def refuse(_self: Any, _request: Request) -> Any:
        raise RequestFailed(code)

    server = start_server(handler_with(connect=refuse))
    with pytest.raises(RequestFailed, match=code.phrase) as raised:
        connect(url_of(server), LOCALHOST, 80)
    assert raised.value.code is code


@pytest.mark.parametrize(("answer", "error", "words"), [
    (b"", ProtocolError, "closed the connection"),
    (b"HTTP/1.1 400 Bad Request\r\n", ProtocolError, "VER of the method selection"),
    (b"\x05", ProtocolError, "closed"),
    (b"\x05\x02", ProtocolError, "02, which was not offered"),
    (b"\x05\xff", NoAcceptableMethod, "its URL has no NAME:PASSWORD"),
    (CHOSEN, ProtocolError, "closed"),
    (CHOSEN + SUCCESS[:7], ProtocolError, "closed"),
    (CHOSEN + b"\x04" + SUCCESS[1:], ProtocolError, "VER of the reply"),
    (CHOSEN + b"\x05\x00\x00\x02" + bytes(6), ProtocolError, "cannot be read"),
    (CHOSEN + b"\x05\x42" + SUCCESS[2:], RequestFailed, "42, which means nothing"),
])
def test_what_is_no_answer_is_told(proxy_that: Any, answer: bytes, error: Any, words: str) -> None:
    def script(connection: Connection) -> None:
        connection.send(answer)
        with contextlib.suppress(OSError):      # it may have had enough already
            connection.socket.shutdown(socket.SHUT_WR)
        until_the_client_leaves(connection)

    with pytest.raises(error, match=words):
        connect(proxy_that(script), "h", 80)


@pytest.mark.parametrize("answer", [b"", CHOSEN, CHOSEN + SUCCESS[:9]])
@pytest.mark.parametrize("ask", [partial(connect, host="h", port=80), bind, udp_associate], ids=["connect", "bind", "udp"])
def test_a_silent_proxy_is_left_at_the_deadline(proxy_that: Any, answer: bytes, ask: Any) -> None:
    with pytest.raises(socket.timeout):
        ask(proxy_that(says(answer)), timeout=SOON)


def test_the_deadline_is_one_for_all_octets(proxy_that: Any) -> None:
    def script(connection: Connection) -> None:
        connection.socket.settimeout(SOON / 4)
        with contextlib.suppress(ConnectionError):      # the client leaves, perhaps with an octet unread
            for octet in CHOSEN + bytes(Reply(ReplyCode.SUCCEEDED, name("a" * 255, 80))):
                connection.send(bytes([octet]))
                with contextlib.suppress(socket.timeout):       # in time for a deadline of each octet's own
                    if not connection.read(100):
                        return

    began = time.monotonic()
    with pytest.raises(socket.timeout):
        connect(proxy_that(script), "h", 80, timeout=SOON)
    assert time.monotonic() - began < SOON * 5


def test_a_proxy_that_is_not_there_is_an_os_error(refusing: Any) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect("socks5h://%s:%d" % refusing(), "h", 80)


def test_a_connection_of_the_client_with_itself_is_no_proxy(
    start_server: Any, closed_port: Any, echo: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody listens, the system may choose the very port that is dialled to go out from; then it is tried once more."""
    dialled: List[socket.socket] = []
    really_connect = socket.socket.connect

    def connect_from_there(sock: socket.socket, there: Any) -> None:
        dialled.append(sock)
        if len(dialled) < 4:
            sock.bind(there)
        else:
            monkeypatch.undo()
            start_server(address=there)
        really_connect(sock, there)

    url = "socks5h://%s:%d" % closed_port()
    monkeypatch.setattr(socket.socket, "connect", connect_from_there)
    with pytest.raises(ConnectionRefusedError):
        connect(url, *echo)
    with connect(url, *echo) as sock:
        exchange(sock)
    assert [sock.fileno() for sock in dialled[:3]] == [-1] * 3


def test_a_proxy_that_does_not_answer_is_given_up(silent: Any) -> None:
    with pytest.raises(socket.timeout):
        connect("socks5h://%s:%d" % silent(), "h", 80, timeout=SOON)


@needs_ipv6
def test_every_address_of_the_proxy_is_tried(start_server: Any, echo: Any, resolves: Any) -> None:
    host = resolves("proxy.example", "::1", LOCALHOST)
    with connect(f"socks5h://{host}:{start_server().server_address[1]}", *echo) as sock:
        exchange(sock)


# --- logins ---

@pytest.mark.parametrize(("username", "password"), [("anna", "sesame"), ("a:b@c", "/?#%"), ("j\u00fcrgen", "\u00fc" * 127)])
def test_the_login_is_in_the_url(start_server: Any, echo: Any, username: str, password: str) -> None:
    server = start_server(users={username: password})
    with connect(Proxy(*server.server_address, username.encode(), password.encode()), *echo) as sock:
        exchange(sock)
    assert server.next_ended().user == username


def test_a_wrong_login_is_told_without_the_password(start_server: Any, echo: Any) -> None:
    server = start_server(users={"anna": "sesame"})
    with pytest.raises(LoginFailed) as raised:
        connect(url_of(server, login="anna:guessed@"), *echo)
    assert raised.value.username == "anna"
    assert "guessed" not in str(raised.value)


def test_a_login_that_is_wanted_and_not_there_is_told(start_server: Any, echo: Any) -> None:
    with pytest.raises(NoAcceptableMethod, match="its URL has no NAME:PASSWORD"):
        connect(url_of(start_server(users={"anna": "sesame"})), *echo)


def test_a_login_that_nobody_wants_does_no_harm(start_server: Any, echo: Any) -> None:
    with connect(url_of(start_server(), login="anna:sesame@"), *echo) as sock:
        exchange(sock)


def test_the_version_of_the_logins_reply_is_looked_at(proxy_that: Any) -> None:
    with pytest.raises(ProtocolError, match="VER of the reply to the credentials"):
        connect(proxy_that(says(MethodSelection(Method.USERNAME_PASSWORD), b"\x05\x00"), "anna:sesame@"), "h", 80)


def test_another_method_is_a_function_that_authenticates_the_conversation(proxy_that: Any) -> None:
    def script(connection: Connection) -> None:
        assert 0x80 in Greeting.read(connection).methods
        connection.send(MethodSelection(0x80))
        assert connection.read(100) == b"knock knock"
        connection.send(b"who's there?", SUCCESS)
        until_the_client_leaves(connection)

    def knock(conversation: Conversation) -> None:
        conversation.write(b"knock knock")
        assert conversation.read(12) == b"who's there?"

    connect(proxy_that(script), "h", 80, methods={0x80: knock}).close()


def test_what_another_method_raises_closes_the_connection(proxy_that: Any) -> None:
    def fail(_conversation: Conversation) -> None:
        raise LoginFailed("no ticket")

    with pytest.raises(LoginFailed, match="no ticket"):
        connect(proxy_that(says(MethodSelection(0x80))), "h", 80, methods={0x80: fail})


# --- BIND ---

@HOSTS
def test_bind_gives_the_address_at_once_and_the_peer_later(start_server: Any, host: str) -> None:
    with bind(url_of(start_server(address=(host, 0))), host) as waiting:
        with socket.create_connection(waiting.address[:2], TIMEOUT) as peer:
            sock, address = waiting.accept()
            with sock:
                assert address == Address.of(peer.getsockname())
                assert sock.gettimeout() is None
                sock.sendall(b"there")
                assert peer.recv(100) == b"there"
                with pytest.raises(ValueError, match="for one connection"):
                    waiting.accept()
        waiting.close()     # does not concern the socket any more


def test_bind_is_asked_for_one_address_of_a_name_after_the_other(start_server: Any, only_here: str) -> None:
    server = start_server(rules=Rules.parse(["deny 127.0.0.9"]))
    with bind(url_of(server, "socks5"), only_here) as waiting, socket.create_connection(waiting.address[:2], TIMEOUT):
        waiting.accept()[0].close()
    assert [str(server.next_ended().destination.host) for _ in range(2)] == ["127.0.0.9", LOCALHOST]


def test_to_leave_the_block_is_to_wait_no_more(start_server: Any) -> None:
    server = start_server()
    with bind(url_of(server)):
        pass
    assert server.next_ended().command is Command.BIND


def test_a_peer_that_does_not_come_is_given_up(start_server: Any) -> None:
    server = start_server()
    with bind(url_of(server), timeout=SOON) as waiting:
        with pytest.raises(socket.timeout):
            waiting.accept()
        assert server.next_ended()
        with pytest.raises(ValueError, match="closed"):
            waiting.accept()


def test_the_second_reply_may_be_a_failure(start_server: Any) -> None:
    with bind(url_of(start_server(bind_timeout=SOON))) as waiting, pytest.raises(RequestFailed) as raised:
        waiting.accept()
    assert raised.value.code is ReplyCode.TTL_EXPIRED


def test_zeros_in_a_reply_stand_for_the_proxys_host(proxy_that: Any) -> None:
    script = says(CHOSEN, Reply(ReplyCode.SUCCEEDED, Address.numeric("0.0.0.0", 4711)))
    with bind(proxy_that(script)) as waiting, udp_associate(proxy_that(script)) as relay:
        assert waiting.address == relay.address == Address.numeric(LOCALHOST, 4711)


# --- UDP ---

@pytest.mark.parametrize(("proxy_host", "target_host"), [
    (LOCALHOST, LOCALHOST), pytest.param("::1", "::1", marks=needs_ipv6), pytest.param(LOCALHOST, "::1", marks=needs_ipv6),
])
def test_datagrams_go_both_ways(start_server: Any, proxy_host: str, target_host: str) -> None:
    server = start_server(address=(proxy_host, 0))
    with udp_socket(target_host) as target, udp_associate(url_of(server)) as relay:
        relay.socket.settimeout(TIMEOUT)
        for data in (b"there", b"", b"x" * 1000):
            relay.sendto(data, target.getsockname()[:2])
            received, source = target.recvfrom(2000)
            assert received == data
            target.sendto(received[::-1], source)
            assert relay.recvfrom() == (data[::-1], target.getsockname()[:2])


@pytest.mark.parametrize(("scheme", "there"), [("socks5h", ["localhost"]), ("socks5", [])])
def test_names_of_datagrams_are_looked_up_where_the_url_says(
    start_server: Any, resolves: Any, scheme: str, there: List[str],
) -> None:
    looked_up: List[str] = []

    def resolve(_self: Any, host: str) -> List[str]:
        looked_up.append(host)
        return [LOCALHOST]

    resolves("localhost", LOCALHOST)
    server = start_server(handler_with(resolve=resolve))
    with udp_socket() as target, udp_associate(url_of(server, scheme)) as relay:
        relay.sendto(b"there", ("localhost", target.getsockname()[1]))
        assert target.recv(100) == b"there"
    assert looked_up == there


def test_the_control_connection_is_kept_until_close(start_server: Any) -> None:
    server = start_server()
    relay = udp_associate(url_of(server))
    assert relay.control.gettimeout() is None
    assert len(server.sessions) == 1
    relay.close()
    assert server.next_ended().reason == "closed by client"


def test_fragments_and_nonsense_are_not_handed_out(proxy_that: Any) -> None:
    there = Address.numeric(LOCALHOST, 53)
    messages: List[Any] = [b"", b"\0\0\0", b"\0\0\0\2", Datagram(there, b"part", frag=1), Datagram(there, b"whole")]
    with udp_socket() as their_end:
        url = proxy_that(says(CHOSEN, Reply(ReplyCode.SUCCEEDED, Address.of(their_end.getsockname()))))
        with udp_associate(url) as relay:
            relay.socket.settimeout(TIMEOUT)
            relay.sendto(b"?", there[:2])
            octets, source = their_end.recvfrom(100)
            assert octets == bytes(Datagram(there, b"?"))
            for message in messages:
                their_end.sendto(bytes(message), source)
            assert relay.recvfrom() == (b"whole", there[:2])


def test_only_the_relay_is_heard(start_server: Any) -> None:
    server = start_server()
    with udp_socket() as target, udp_socket() as stranger, udp_associate(url_of(server)) as relay:
        relay.socket.settimeout(TIMEOUT)
        stranger.sendto(bytes(Datagram(Address.of(target.getsockname()), b"forged")), relay.socket.getsockname())
        relay.sendto(b"there", target.getsockname())
        target.sendto(b"true", target.recvfrom(100)[1])
        assert relay.recvfrom() == (b"true", target.getsockname())


def test_a_relay_that_cannot_be_reached_leaves_nothing_open(proxy_that: Any) -> None:
    with pytest.raises(OSError):        # noqa: PT011
        udp_associate(proxy_that(says(CHOSEN, Reply(ReplyCode.SUCCEEDED, name("no-such-host.invalid", 1)))))


def test_every_message_is_one_of_the_protocols(proxy_that: Any) -> None:
    """What is sent is what protocol.py has, octet for octet."""
    def script(connection: Connection) -> None:
        connection.send(MethodSelection(Method.USERNAME_PASSWORD), CredentialsReply(CredentialsReply.SUCCESS), SUCCESS)
        assert Greeting.read(connection) == Greeting(bytes([0, 2]))
        assert Credentials.read(connection) == Credentials(b"anna", b"sesame")
        assert Request.read(connection) == Request(Command.CONNECT, name("example.com", 80))
        assert connection.read(1) == b""

    connect(proxy_that(script, "anna:sesame@"), "example.com", 80).close()


def test_an_association_is_asked_for_with_zeros(proxy_that: Any) -> None:
    def script(connection: Connection) -> None:
        connection.send(CHOSEN, Reply(ReplyCode.SUCCEEDED, Address.numeric(LOCALHOST, 4711)))
        Greeting.read(connection)
        assert Request.read(connection) == Request(Command.UDP_ASSOCIATE, UNSPECIFIED)
        until_the_client_leaves(connection)

    udp_associate(proxy_that(script)).close()
