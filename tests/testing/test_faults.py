"""
What goes wrong on demand, octet by octet.  (What real clients make of it is in test_faults_and_clients.py.)
"""

from __future__ import annotations

import re
import socket
import time
from io import BytesIO
from typing import Any, Dict, Iterator, List, Optional

import pytest

from socks5srv.protocol import Address, Command, Datagram, LoginFailed, Method
from socks5srv.testing import faults
from socks5srv.testing.faults import (
    BoundTo, CloseAfter, Credentials, CredentialsReply, Delay, Drip, DropDatagrams, DuplicateDatagrams, Fault, FragmentDatagrams,
    Greeting, LoginStatus, MethodSelection, Raw, ReorderDatagrams, Reply, ReplyCode, ReplyWith, Request, ResetAfter, SecondReply,
    SelectMethod, Truncate,
)
from socks5srv.testing.proxy import Proxy, start
from socks5srv.testing.targets import EchoServer

from ..conftest import LOCALHOST, Client, eventually, exchange, in_thread, name, udp_socket, within

LOGIN = {"anna": "sesame"}


@pytest.fixture
def guarded() -> Iterator[Proxy]:
    with start(users=LOGIN) as proxy:
        yield proxy


def works(client: Client, echo: EchoServer) -> None:
    client.connect(echo.address)
    exchange(client)


def say_all(client: Client, echo: EchoServer) -> None:
    """A whole conversation, up to the request, at once."""
    client.send(Greeting(b"\x02"), Credentials(b"anna", b"sesame"), Request(Command.CONNECT, name("localhost", echo.port)))


def conversation(proxy: Proxy, echo: EchoServer) -> bytes:
    """All that the proxy says to a whole conversation, up to its end."""
    with Client(proxy.address) as client:
        say_all(client, echo)
        client.end()
        return client.rest()


SUCCESS = b"\x05\x02" b"\x01\x00" b"\x05\x00\x00\x01\x7f\x00\x00\x01"      # and a port


# --- other answers ---

@pytest.mark.parametrize("code", [*ReplyCode, 0x09, 0xFF])
def test_a_request_gets_any_reply_and_nothing_is_tried(proxy: Proxy, echo: EchoServer, code: int) -> None:
    proxy.inject(ReplyWith(code))
    with Client(proxy.address) as client:
        reply = client.ask(Command.CONNECT, echo.address)
        assert (reply.code, reply.bound) == (code, Address.numeric("0.0.0.0", 0))
        assert client.rest() == b""
    (session,) = proxy.wait_for(closed=True)
    assert session.reply == code
    assert session.reason == f"fault: {ReplyWith(code)!r}"
    assert session.destination == Address.numeric(*echo.address)
    assert not echo.clients


@pytest.mark.parametrize("command", [Command.BIND, Command.UDP_ASSOCIATE])
def test_so_do_the_other_commands(proxy: Proxy, client: Client, echo: EchoServer, command: Command) -> None:
    proxy.inject(ReplyWith(ReplyCode.TTL_EXPIRED))
    assert client.ask(command, echo.address).code is ReplyCode.TTL_EXPIRED


def bind_and_call(client: Client) -> socket.socket:
    """The first reply of BIND has come as it should; whoever has called back then."""
    first = client.ask(Command.BIND, ("0.0.0.0", 0))
    assert first.code is ReplyCode.SUCCEEDED
    return socket.create_connection((first.bound.host, first.bound.port), 5)


@pytest.mark.parametrize(("fault", "octets"), [
    (Truncate(SecondReply, 3), b"\x05\x00\x00"), (CloseAfter(SecondReply), None), (Raw(SecondReply, b"\x05\x01\x00"), b"\x05\x01\x00"),
], ids=repr)
def test_the_second_reply_of_bind_can_be_struck_alone(proxy: Proxy, client: Client, fault: Any, octets: Any) -> None:
    proxy.inject(fault)
    with bind_and_call(client) as peer:
        if octets is None:
            assert Reply.read(client).bound == Address.of(peer.getsockname())
            assert client.rest() == b""
        else:
            assert client.exactly(len(octets)) == octets


def test_what_is_about_every_reply_strikes_both_of_bind(proxy: Proxy, client: Client) -> None:
    proxy.inject(BoundTo("bound.example", 7))
    assert client.ask(Command.BIND, ("0.0.0.0", 0)).bound == Address.named("bound.example", 7)
    [session] = proxy.sessions
    with socket.create_connection((session.bound.host, session.bound.port), 5):
        assert Reply.read(client).bound == Address.named("bound.example", 7)


@pytest.mark.parametrize("method", [0x01, 0x02, 0x80, 0xFF])
def test_the_method_is_any_octet(proxy: Proxy, method: int) -> None:
    proxy.inject(SelectMethod(method))
    with Client(proxy.address) as client:
        assert client.greet(0) == MethodSelection(method)
        assert client.rest() == b""
    assert proxy.wait_for(closed=True)[0].reason == f"fault: SelectMethod({method})"


def test_the_method_that_was_chosen_anyway_changes_nothing(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    proxy.inject(SelectMethod(Method.NO_AUTHENTICATION_REQUIRED))
    works(client, echo)


def test_a_method_can_be_given_where_none_would_be(guarded: Proxy) -> None:
    guarded.inject(SelectMethod(0))
    with Client(guarded.address) as client:
        assert client.greet(0) == MethodSelection(0)
        assert client.rest() == b""


@pytest.mark.parametrize(("status", "password"), [(1, "sesame"), (0xFF, "sesame"), (2, "wrong"), (0, "wrong")])
def test_a_login_has_any_status(guarded: Proxy, status: int, password: str) -> None:
    guarded.inject(LoginStatus(status))
    with Client(guarded.address) as client:
        client.greet(2)
        assert client.login("anna", password) == CredentialsReply(status)
        assert client.rest() == b""


def test_the_status_that_it_would_have_had_changes_nothing(guarded: Proxy, echo: EchoServer) -> None:
    guarded.inject(LoginStatus(0))
    assert conversation(guarded, echo).startswith(SUCCESS)


def test_octets_stand_in_for_a_message_and_the_conversation_goes_on(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    proxy.inject(Raw(Reply, b"HTTP/1.1 200"))
    client.greet(0)
    client.send(Request(Command.CONNECT, Address.numeric(*echo.address)), b"hello")
    assert client.exactly(17) == b"HTTP/1.1 200" b"hello"


@pytest.mark.parametrize(("host", "port"), [("proxy.example.com", 1080), ("2001:db8::1", 1), ("192.0.2.1", 0)])
def test_the_reply_has_any_address(proxy: Proxy, client: Client, echo: EchoServer, host: str, port: int) -> None:
    proxy.inject(BoundTo(host, port))
    assert client.connect(echo.address).bound == Address.named(host, port)
    exchange(client)


def test_an_address_is_put_into_failures_as_well(proxy: Proxy, client: Client) -> None:
    proxy.inject(BoundTo("proxy.example.com"))
    proxy.inject(ReplyWith(5))
    assert client.ask(Command.CONNECT, ("192.0.2.1", 1)) == Reply(ReplyCode.CONNECTION_REFUSED, name("proxy.example.com", 0))


# --- the end, too early ---

# How many octets of SUCCESS have come until the end.
AFTER = {Greeting: 0, MethodSelection: 2, Credentials: 2, CredentialsReply: 4, Request: 4, Reply: 14}


@pytest.mark.parametrize("message", AFTER)
def test_the_connection_is_closed_after_any_message(guarded: Proxy, echo: EchoServer, message: Any) -> None:
    guarded.inject(CloseAfter(message))
    said = conversation(guarded, echo)
    assert said[:12] == SUCCESS[:AFTER[message]]
    assert len(said) == AFTER[message]
    assert guarded.wait_for(closed=True)[0].reason == f"fault: CloseAfter({message.__name__})"


def test_what_was_sent_ahead_makes_no_reset_of_the_end(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    proxy.inject(CloseAfter(Request))
    client.send(Greeting(b"\0"), Request(Command.CONNECT, Address.numeric(*echo.address)), b"early" * 20_000)
    assert [received(client), received(client)] == [b"\5\0", b""]


def received(client: Client) -> Optional[bytes]:
    """What comes next; None for an RST."""
    try:
        return client.socket.recv(100)
    except ConnectionResetError:
        return None


@pytest.mark.parametrize("message", AFTER)
def test_the_connection_is_reset_after_any_message(guarded: Proxy, message: Any, echo: EchoServer) -> None:
    guarded.inject(ResetAfter(message))
    with Client(guarded.address) as client:
        say_all(client, echo)
        assert b"" not in iter(lambda: received(client), None)
    guarded.wait_for(closed=True)


@pytest.mark.parametrize(("message", "octets", "total"), [(MethodSelection, 1, 1), (CredentialsReply, 0, 2), (Reply, 3, 7)])
def test_a_message_ends_in_the_middle(guarded: Proxy, echo: EchoServer, message: Any, octets: int, total: int) -> None:
    guarded.inject(Truncate(message, octets))
    assert conversation(guarded, echo) == SUCCESS[:total]


# --- nothing wrong, but not as usual ---

@pytest.mark.parametrize("message", AFTER)
def test_a_message_takes_its_time(guarded: Proxy, echo: EchoServer, message: Any) -> None:
    guarded.inject(Delay(message, 0.1))
    began = time.monotonic()
    assert conversation(guarded, echo).startswith(SUCCESS)
    assert 0.09 < time.monotonic() - began < within(2)


def test_to_stop_does_not_wait_for_a_delay(proxy: Proxy, client: Client) -> None:
    proxy.inject(Delay(Request, 60))
    answer = in_thread(lambda: client.ask(Command.CONNECT, (LOCALHOST, 1)))
    eventually(lambda: proxy.find(host=LOCALHOST))
    began = time.monotonic()
    proxy.stop()
    assert time.monotonic() - began < within(1)
    with pytest.raises((OSError, faults.ProtocolError)):
        answer()


def test_a_message_comes_octet_by_octet(guarded: Proxy, echo: EchoServer) -> None:
    guarded.inject(Drip())
    with Client(guarded.address) as client:
        say_all(client, echo)
        segments = [client.socket.recv(100) for _ in range(8)]
        assert b"".join(segments) + client.exactly(14 - len(b"".join(segments))) != b""
        exchange(client)
    assert sum(len(segment) == 1 for segment in segments) >= 6        # a slow reader may find two at once


def test_only_the_message_that_is_named_drips(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    proxy.inject(Drip(Reply))
    works(client, echo)


# --- which ones strike ---

def codes(proxy: Proxy, echo: EchoServer, *hosts: str) -> List[int]:
    """The replies that requests for these hosts get, one after the other."""
    found = []
    for host in hosts:
        with Client(proxy.address) as client:
            found.append(int(client.ask(Command.CONNECT, (host, echo.port)).code))
    return found


def test_it_strikes_as_many_times_as_it_is_told_to(proxy: Proxy, echo: EchoServer) -> None:
    proxy.inject(ReplyWith(5, times=2))
    assert codes(proxy, echo, *["localhost"] * 4) == [5, 5, 0, 0]


def test_it_strikes_the_host_that_it_is_told_to(echo: EchoServer) -> None:
    with start(hosts={"a.example": LOCALHOST, "b.example": LOCALHOST}, faults=[ReplyWith(5, host="A.example", times=2)]) as proxy:
        assert codes(proxy, echo, "b.example", "a.example", "b.example", "a.example", "a.example") == [0, 5, 0, 5, 0]


def test_the_first_of_them_strikes_first_and_then_the_next(proxy: Proxy, echo: EchoServer) -> None:
    proxy.inject(ReplyWith(5, times=1))
    proxy.inject(ReplyWith(4, times=2))
    assert codes(proxy, echo, *["localhost"] * 4) == [5, 4, 4, 0]


def test_several_strike_one_message(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    for fault in (BoundTo("proxy.example.com", 80), Drip(Reply), CloseAfter(Reply)):
        proxy.inject(fault)
    assert client.connect(echo.address).bound == name("proxy.example.com", 80)
    assert client.rest() == b""


def test_the_same_object_serves_several_proxies_and_counts_in_the_latest(echo: EchoServer) -> None:
    fault = ReplyWith(5, times=1)
    with start(faults=[fault]) as one, start(faults=[fault]) as other:
        assert codes(one, echo, "localhost", "localhost") == [5, 0]
        assert fault.struck == 0
        assert codes(other, echo, "localhost", "localhost") == [5, 0]
        assert fault.struck == 1


def test_it_counts_how_often_it_has_struck(proxy: Proxy, echo: EchoServer) -> None:
    refused, lost = proxy.inject(ReplyWith(5, host="localhost")), proxy.inject(Drip(Reply, times=2))
    codes(proxy, echo, "localhost", LOCALHOST, "localhost")
    assert (proxy.faults, refused.struck, lost.struck) == ([refused, lost], 2, 2)
    proxy.clear()
    assert (proxy.faults, refused.struck) == ([], 2)


# --- those that never strike ---

def complaint_of(fault: Fault, echo: EchoServer, *hosts: str) -> str:
    """What stop() says of it, when requests for these hosts have come."""
    proxy = start(faults=[fault])
    codes(proxy, echo, *hosts)
    with pytest.raises(AssertionError) as raised:
        proxy.stop()
    proxy.stop()        # once is enough
    return str(raised.value)


@pytest.mark.parametrize(("fault", "near_miss"), [
    (CloseAfter(Request, host="localhots", times=1), "the host was 127.0.0.1 or localhost; did you mean host='localhost'?"),
    (Truncate(Reply, 3, host="api.example.com"), "the host was 127.0.0.1 or localhost"),
    (LoginStatus(1), "no CredentialsReply reached it"),
    (Drip(SecondReply), "no SecondReply reached it"),
    (DropDatagrams(every=2), "no Datagram reached it"),
], ids=repr)
def test_one_that_never_strikes_is_an_error_that_says_what_came_near(fault: Fault, near_miss: str, echo: EchoServer) -> None:
    first, second, *sessions = complaint_of(fault, echo, "localhost", LOCALHOST).splitlines()
    assert (first, second) == (f"{fault!r} never struck: {near_miss}", "A fault that need not strike takes optional=True.")
    assert re.match(r"<Proxy .*> has had 2 sessions", sessions[0])
    assert len(sessions) == 3


def test_so_is_one_of_every_few_that_met_too_few(echo: EchoServer) -> None:
    proxy = start(faults=[DropDatagrams("up", every=3)])
    with Talker(proxy, echo) as talker:
        talker.say(b"1")
        talker.hear()
    with pytest.raises(AssertionError, match="it strikes one Datagram in 3, and met 1"):
        proxy.stop()


def test_many_hosts_that_a_fault_was_not_for_are_not_kept(echo: EchoServer) -> None:
    said = complaint_of(ReplyWith(5, host="elsewhere.invalid"), echo, *(f"{number}.example" for number in range(9)))
    assert said.splitlines()[0].endswith("the host was 0.example or 1.example or 2.example or 3.example or 4.example")


def test_one_that_was_taken_away_or_shadowed_is_told_as_well(echo: EchoServer) -> None:
    with start(faults=[Drip(CredentialsReply)]) as proxy:
        proxy.clear()
        proxy.inject(ReplyWith(5))
        proxy.inject(ReplyWith(4))
        assert codes(proxy, echo, "localhost") == [5]
        for _ in range(2):
            assert [line.partition("(")[0] for line in proxy.report().splitlines()[-2:]] == ["  Drip", "  ReplyWith"]
        with pytest.raises(AssertionError, match=r"(?s)^Drip\(CredentialsReply\) never.*\nReplyWith\(.*HOST_UNREACHABLE\) never.*no Request reached it"):
            proxy.assert_faults_struck()
        proxy.assert_faults_struck()


def test_one_that_is_optional_need_not_strike(echo: EchoServer) -> None:
    with start(faults=[ReplyWith(5, host="elsewhere.example", optional=True)]) as proxy:
        assert codes(proxy, echo, "localhost") == [0]


def test_an_exception_that_is_under_way_is_not_hidden_by_it() -> None:
    with pytest.raises(LookupError) as raised, start(faults=[ReplyWith(5)]):
        raise LookupError
    assert raised.value.__context__ is None


def test_one_of_the_tests_own(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    class Unlucky(Fault):
        about = (Credentials, Request)

        def received(self, conversation: Any) -> None:
            raise LoginFailed("not today")

    proxy.inject(Unlucky())
    client.greet(0)
    client.send(Request(Command.CONNECT, Address.numeric(*echo.address)))
    assert client.rest() == b"\x01\x01"


@pytest.mark.parametrize(("make", "complaint"), [
    (lambda: ReplyWith(300), r"^ReplyWith\(300\): a reply code is one octet, 0 to 255$"), (lambda: ReplyWith(-1), r"^ReplyWith\(-1\): "),
    (lambda: SelectMethod(256), r"^SelectMethod\(256\): a method is one octet"),
    (lambda: LoginStatus(256), r"^LoginStatus\(256\): a status is one octet"),
    (lambda: Truncate(Reply, -1), r"^Truncate\(Reply, -1\): "), (lambda: Delay(Reply, -1), r"^Delay\(Reply, -1\): "),
    (lambda: Truncate(Request, 3), "Request.*MethodSelection, CredentialsReply, Reply"),
    (lambda: Raw(Greeting, b""), "Greeting"),
    (lambda: CloseAfter(Datagram), "Datagram"),
    (lambda: CloseAfter("reply"), "reply"),         # type: ignore[arg-type]
    (lambda: Delay(Greeting, 1, host="a.example"), "known from the Request on"),
    (lambda: Drip(host="a.example"), "known from the Request on"),
    (lambda: ReplyWith(5, times=0), "never"),
    (lambda: DropDatagrams("sideways"), "up"), (lambda: DropDatagrams(every=0), "at least 1"),
])
def test_what_makes_no_sense_is_an_error_at_once(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_what_is_no_fault_is_an_error_at_once(proxy: Proxy) -> None:
    with pytest.raises(TypeError, match="ReplyWith"):
        proxy.inject(ReplyWith)         # type: ignore[arg-type]


@pytest.mark.parametrize(("fault", "text"), [
    (ReplyWith(ReplyCode.CONNECTION_REFUSED, times=2), "ReplyWith(ReplyCode.CONNECTION_REFUSED, times=2)"),
    (ReplyWith(5), "ReplyWith(ReplyCode.CONNECTION_REFUSED)"), (ReplyWith(9), "ReplyWith(9)"),
    (SelectMethod(Method.GSSAPI), "SelectMethod(Method.GSSAPI)"),
    (Truncate(Reply, 3, host="a.example"), "Truncate(Reply, 3, host='a.example')"),
    (Delay(Greeting, 0.5), "Delay(Greeting, 0.5)"),
    (Raw(MethodSelection, b"\0"), "Raw(MethodSelection, b'\\x00')"),
    (Drip(), "Drip()"), (BoundTo("::1", 80), "BoundTo('::1', 80)"),
    (DropDatagrams("up", every=3), "DropDatagrams('up', every=3)"), (Drip(optional=True), "Drip(optional=True)"),
])
def test_it_says_what_it_is(fault: Fault, text: str) -> None:
    assert repr(fault) == text


# --- datagrams ---

class Talker:
    """A UDP client with an association."""

    def __init__(self, proxy: Proxy, echo: EchoServer) -> None:
        self.control = Client(proxy.address)
        self.echo = echo
        self.socket = udp_socket()
        self.relay = self.control.ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0)).bound

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.control.close()
        self.socket.close()

    def say(self, *payloads: bytes, host: str = LOCALHOST) -> None:
        for payload in payloads:
            self.socket.sendto(bytes(Datagram(Address.named(host, self.echo.port), payload)), self.relay[:2])

    def hear(self, seconds: float = 5) -> Datagram:
        self.socket.settimeout(seconds)
        return Datagram.read(BytesIO(self.socket.recv(65535)))

    def answers(self, count: int) -> List[bytes]:
        """So many, and that there is not another one."""
        found = [self.hear().data for _ in range(count)]
        with pytest.raises(socket.timeout):
            self.hear(0.05)
        return found


@pytest.mark.parametrize(("fault", "sent", "heard"), [      # of 1, 2, 3 and 4
    (DropDatagrams("up"), "", ""), (DropDatagrams("up", every=2), "13", "13"),
    (DropDatagrams("down", every=3), "1234", "124"), (DropDatagrams(times=1), "234", "234"),
    (DuplicateDatagrams("up", times=1), "11234", "11234"), (DuplicateDatagrams("down", every=4), "1234", "12344"),
    (ReorderDatagrams("up"), "2143", "2143"), (ReorderDatagrams("down", times=1), "1234", "2134"),
    (ReorderDatagrams("up", host="elsewhere.example", optional=True), "1234", "1234"),
], ids=repr)
def test_datagrams_go_astray(fault: Fault, sent: str, heard: str, echo: EchoServer) -> None:
    with start(faults=[fault]) as proxy, Talker(proxy, echo) as talker:
        talker.say(b"1", b"2", b"3", b"4")
        assert talker.answers(len(heard)) == [octet.encode() for octet in heard]
        assert echo.datagrams == [octet.encode() for octet in sent]


def test_a_fragment_comes_to_the_client(echo: EchoServer) -> None:
    with start(faults=[FragmentDatagrams("down")]) as proxy, Talker(proxy, echo) as talker:
        talker.say(b"hello")
        one, other = talker.hear(), talker.hear()
        assert (one.frag, one.data, other.frag, other.data) == (1, b"he", 0x82, b"llo")


@pytest.mark.parametrize(("settings", "heard"), [({}, []), ({"reassemble": True}, [b"hello"])], ids=["dropped", "reassembled"])
def test_a_fragment_comes_to_the_server(echo: EchoServer, settings: Dict[str, Any], heard: List[bytes]) -> None:
    with start(faults=[FragmentDatagrams("up")], **settings) as proxy, Talker(proxy, echo) as talker:
        talker.say(b"hello")
        assert talker.answers(len(heard)) == heard


def test_datagrams_of_one_host_go_astray(echo: EchoServer) -> None:
    with start(hosts={"a.example": LOCALHOST}, faults=[DropDatagrams("up", host="a.example")]) as proxy, Talker(proxy, echo) as talker:
        talker.say(b"1", host="a.example")
        talker.say(b"2")
        assert talker.answers(1) == [b"2"]


def test_the_lossy_link_ends_with_its_session(echo: EchoServer) -> None:
    with start(faults=[DropDatagrams(times=1)]) as proxy:
        for _ in range(3):
            with Talker(proxy, echo) as talker:
                talker.say(b"", b"once more")
                while talker.hear().data != b"once more":
                    pass
        assert [session.up > 0 for session in proxy.wait_for(3, closed=True)] == [True] * 3
        for link in proxy.server.links:         # type: ignore[union-attr]
            link.thread.join()


def test_what_is_no_datagram_passes(echo: EchoServer) -> None:
    with start(faults=[DropDatagrams("up", times=1)]) as proxy, Talker(proxy, echo) as talker:
        talker.socket.sendto(b"nonsense", talker.relay[:2])
        talker.say(b"1", b"2")
        assert talker.answers(1) == [b"2"]


def test_without_such_a_fault_there_is_no_lossy_link(echo: EchoServer) -> None:
    with start(faults=[ReplyWith(5, host="elsewhere.example", optional=True)]) as proxy, Talker(proxy, echo) as talker:
        talker.say(b"1")
        talker.hear()
        assert talker.relay == proxy.last().bound
