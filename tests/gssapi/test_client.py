"""Our client by Kerberos, and a server of ours that goes out through another one by it: against our own server, and a KDC."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any, Callable, Iterator

import pytest

from socks5srv.client import connect, bind, udp_associate
from socks5srv.protocol import Command, Greeting, LoginFailed, Method, MethodSelection, NoAcceptableMethod, ProtocolError, Reply, ReplyCode
from socks5srv.upstream import UpstreamHandler

from ..conftest import LOCALHOST, TIMEOUT, address_of, exchange, fails_with, handler_with, in_thread, udp_socket
from ..kerberos import REALM, Realm

pytest.importorskip("gssapi")

from socks5srv.gssapi.client import ProtectedSocket
from socks5srv.gssapi.handler import GssapiHandler
from socks5srv.gssapi.messages import Level
from socks5srv.relay import Coded

ALICE = f"alice@{REALM}"
MUCH = bytes(range(256)) * 4096
LEVELS = pytest.mark.parametrize("level", [Level.INTEGRITY, Level.CONFIDENTIALITY])


def url_of(server: Any, service: str = "", host: str = "localhost") -> str:
    return f"socks5h+gssapi://{service}{host}:{server.server_address[1]}"


def received(sock: socket.socket, n: int) -> bytes:
    octets = b""
    while len(octets) < n:
        more = sock.recv(65536)
        assert more, "it ended too soon"
        octets += more
    return octets


class Chatty(GssapiHandler):
    """A proxy that has the reply, and what the target says first, in one frame."""

    def do_CONNECT(self, request: Any) -> None:
        self.stream.write(bytes(Reply(ReplyCode.SUCCEEDED, request.destination)) + b"220 hello\r\n")
        self.stream.write(self.stream.read(5))


@pytest.fixture(params=["directly", "through a server without Kerberos", "through one with it"])
def way_to(request: Any, start_server: Any, new_server: Callable[..., Any]) -> Callable[[Any], str]:
    """The URL by which a proxy with Kerberos is reached: its own, or that of a server for which it is the upstream."""
    def url(far: Any) -> str:
        if request.param == "directly":
            return url_of(far)
        methods = {"upstream": url_of(far)}
        if request.param == "through one with it":
            return url_of(new_server(handler=type("Both", (GssapiHandler, UpstreamHandler), methods)))
        return "socks5h://%s:%d" % start_server(type("Through", (UpstreamHandler,), methods)).server_address

    return url


# --- what it can do ---

@LEVELS
def test_connect(new_server: Callable[..., Any], way_to: Callable[[Any], str], echo: Any, level: Level) -> None:
    far = new_server(levels=[level])
    with connect(way_to(far), *echo) as sock:
        exchange(sock)
        sock.settimeout(TIMEOUT)
        sending = in_thread(sock.sendall, MUCH)
        assert received(sock, len(MUCH)) == MUCH
        sending()
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    session = far.next_ended()
    assert (session.user, session.up) == (ALICE, 5 + len(MUCH))


def test_what_the_target_says_in_the_frame_of_the_reply_is_kept(new_server: Callable[..., Any], way_to: Callable[[Any], str]) -> None:
    with connect(way_to(new_server(handler=Chatty)), "example.com", 25) as sock:
        sock.settimeout(TIMEOUT)
        assert received(sock, 11) == b"220 hello\r\n"
        sock.sendall(b"helo\n")
        assert received(sock, 5) == b"helo\n"


def test_bind(new_server: Callable[..., Any], way_to: Callable[[Any], str]) -> None:
    with bind(way_to(new_server()), LOCALHOST) as waiting, socket.create_connection(waiting.address[:2], TIMEOUT) as peer:
        sock, address = waiting.accept()
        with sock:
            assert address == address_of(peer.getsockname())
            peer.sendall(b"hello")
            assert received(sock, 5) == b"hello"
            sock.sendall(b"and back")
            assert received(peer, 8) == b"and back"


@LEVELS
def test_udp(new_server: Callable[..., Any], way_to: Callable[[Any], str], level: Level) -> None:
    with udp_socket() as target, udp_associate(way_to(new_server(levels=[level]))) as relay:
        relay.socket.settimeout(TIMEOUT)
        for size in (0, 5, 60000):
            relay.sendto(b"x" * size, target.getsockname())
            octets, source = target.recvfrom(65535)
            assert octets == b"x" * size
            target.sendto(octets, source)
            assert relay.recvfrom() == (octets, target.getsockname())


def test_a_datagram_that_does_not_unwrap_is_dropped(new_server: Callable[..., Any]) -> None:
    with udp_socket() as target, udp_associate(url_of(new_server())) as relay:
        relay.socket.settimeout(TIMEOUT)
        relay.sendto(b"first", target.getsockname())
        source = target.recvfrom(100)[1]
        relay.socket.send(b"\x01\x03\x00\x01!")     # by us, which the proxy drops
        for octets in (b"broken on the way", b"next"):
            target.sendto(octets, source)
        decode, broken = relay.decode, iter([b"no frame"])
        relay.decode = lambda octets: decode(next(broken, octets))
        assert relay.recvfrom()[0] == b"next"


@pytest.mark.parametrize(("service", "host"), [("socks@", "localhost"), ("rcmd%2Flocalhost@", LOCALHOST)])
def test_the_service_may_have_another_name(new_server: Callable[..., Any], echo: Any, service: str, host: str) -> None:
    with connect(url_of(new_server(), service, host), *echo) as sock:
        exchange(sock)


def test_a_request_that_fails_says_so_as_ever(new_server: Callable[..., Any], way_to: Callable[[Any], str], listen: Any) -> None:
    taken = listen()
    port = taken.getsockname()[1]
    taken.close()
    with fails_with(ReplyCode.CONNECTION_REFUSED):
        connect(way_to(new_server()), LOCALHOST, port)


# --- what it refuses ---

def test_nothing_else_is_offered_so_that_nobody_in_between_can_choose_it(start_server: Any, listen: Any) -> None:
    with pytest.raises(NoAcceptableMethod, match="does not know Kerberos"):
        connect(url_of(start_server(handler_with())), LOCALHOST, 80)
    listener = listen()
    url = "socks5h+gssapi://localhost:%d" % listener.getsockname()[1]
    for chosen in (Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD):
        said = in_thread(connect, url, LOCALHOST, 80)
        with listener.accept()[0] as sock:
            assert sock.recv(100) == bytes(Greeting(bytes([Method.GSSAPI])))
            sock.sendall(bytes(MethodSelection(chosen)))
            with pytest.raises(ProtocolError, match="which was not offered"):
                said()


@pytest.mark.parametrize(("settings", "service", "reason"), [
    ({"levels": [0]}, "", "grants no protection"),
    ({"allow": ["bob@*"]}, "", "the proxy does not accept this Kerberos login"),
    ({}, "nobody@", "no Kerberos login: .*nobody/localhost"),
], ids=["no protection", "somebody else", "no such service"])
def test_a_login_that_fails_says_why(new_server: Callable[..., Any], settings: Any, service: str, reason: str) -> None:
    with pytest.raises(LoginFailed, match=reason):
        connect(url_of(new_server(**settings), service), LOCALHOST, 80)


def test_who_has_no_ticket_is_told(new_server: Callable[..., Any], kerberos: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    server = new_server()
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{kerberos.folder / 'there-is-none.cache'}")
    monkeypatch.setenv("KRB5_CLIENT_KTNAME", f"FILE:{kerberos.folder / 'there-is-none.keytab'}")
    with pytest.raises(LoginFailed, match="no Kerberos login: "):
        connect(url_of(server), LOCALHOST, 80)


def test_what_goes_wrong_with_the_upstream_is_reply_01_and_in_the_log(new_server: Callable[..., Any], start_server: Any, new_client: Any) -> None:
    far = new_server(allow=["bob@*"])
    near = start_server(type("Through", (UpstreamHandler,), {"upstream": url_of(far)}))
    assert new_client(near).ask(Command.CONNECT, (LOCALHOST, 80)).code is ReplyCode.GENERAL_FAILURE
    session = near.next_ended()
    assert session.reason.endswith("the proxy does not accept this Kerberos login")


# --- the socket ---

class Marked:
    """A coding that is easy to break: each frame begins with an exclamation mark, and has four octets."""

    block = 4

    def encode(self, octets: Any) -> bytes:
        return b"!" + bytes(octets).ljust(4)

    def decode(self, frames: bytearray) -> Any:
        if frames[:1] not in (b"!", b""):
            raise ProtocolError("no mark")
        if len(frames) < 5:
            return None
        octets = bytes(frames[1:5])
        del frames[:5]
        return octets


@pytest.fixture
def ends() -> Iterator[Any]:
    """A protected socket, and the other end of its connection."""
    with socket.create_server((LOCALHOST, 0)) as listener:
        near = socket.create_connection(listener.getsockname(), TIMEOUT)
        far = listener.accept()[0]
    far.settimeout(TIMEOUT)
    with far, ProtectedSocket(near, Coded(Marked(), b"!more", b"some")) as protected:
        yield protected, far


def test_what_had_come_before_comes_first(ends: Any) -> None:
    protected, far = ends
    far.sendall(b"!then!")
    assert [protected.recv(3), protected.recv(100), protected.recv(100), protected.recv(100)] == [b"som", b"e", b"more", b"then"]
    far.sendall(b"last")
    far.shutdown(socket.SHUT_WR)
    buffer = bytearray(10)
    assert (protected.recv_into(buffer, 2), protected.recv_into(buffer), bytes(buffer[:2])) == (2, 2, b"st")
    assert (protected.recv(100), protected.recv(100)) == (b"", b"")


@pytest.mark.parametrize(("octets", "reason"), [(b"?", "no mark"), (b"!hal", "within a frame")])
def test_a_frame_that_is_no_good_is_an_error_and_a_reset_for_the_other_side(ends: Any, octets: bytes, reason: str) -> None:
    protected, far = ends
    received(protected, 8)
    far.sendall(octets)
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError, match=reason) as caught:
        protected.recv(100)
    assert caught.value.errno == errno.EBADMSG
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        protected.recv(100)


def test_a_file_of_it_is_one_of_plain_text(ends: Any) -> None:
    protected, far = ends
    with protected.makefile("rwb") as file:
        assert file.read(8) == b"somemore"
        file.write(b"aaaabb")
        file.flush()
    assert received(far, 10) == b"!aaaa!bb  "
    assert protected.send(b"ccccdd") == 4


def test_whatever_would_pass_by_the_frames_is_refused(ends: Any) -> None:
    protected, far = ends
    with pytest.raises(OSError, match=r"ssl\.MemoryBIO"):
        ssl.create_default_context().wrap_socket(protected, server_hostname="localhost")
    for call in (protected.detach, protected.dup, protected.recvmsg, protected.sendmsg, protected.sendto, protected.sendfile):
        with pytest.raises(OSError, match="wrapped"):
            call()
    for call, argument in ((protected.recv, 1), (protected.send, b"x"), (protected.sendall, b"x")):
        with pytest.raises(ValueError, match="flags"):
            call(argument, socket.MSG_OOB)
    protected.setblocking(False)
    with pytest.raises(ValueError, match="blocking"):
        protected.send(b"x")
    protected.close()
    assert far.recv(1) == b"", "nothing has been sent"
