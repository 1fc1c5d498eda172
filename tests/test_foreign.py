"""What clients of other protocols are told."""

from __future__ import annotations

from typing import Any, Callable, List, Tuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from socks5srv import foreign
from socks5srv.handler import Socks5Handler
from socks5srv.protocol import Address
from socks5srv.session import Session

from .conftest import LOCALHOST

Answered = Tuple[bytes, Session, str]


@pytest.fixture
def say(start_server: Any, new_client: Any) -> Callable[..., Answered]:
    """Say this to a server, with `end` as all that there will be: the answer, the session, and the address it was said to."""
    def say(octets: bytes, *hosts: str, end: bool = False, **settings: Any) -> Answered:
        server = start_server(Socks5Handler, *((host, 0) for host in hosts or [LOCALHOST]), **settings)
        address = LOCALHOST, server.addresses[-1][1]
        client = new_client(address)
        client.send(octets)
        if end:
            client.end()
        return client.rest(), server.next_ended(), f"{address[0]}:{address[1]}"

    return say


@pytest.mark.parametrize("request_line", [
    b"GET / HTTP/1.1", b"GET http://example.com/ HTTP/1.1", b"CONNECT example.com:443 HTTP/1.1", b"POST / HTTP/1.0", b"HEAD / HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"DELETE / HTTP/1.1", b"PUT / HTTP/1.1", b"PATCH / HTTP/1.1", b"TRACE / HTTP/1.1",
])
def test_http_gets_a_page_that_says_what_to_set(request_line: bytes, say: Callable[..., Answered]) -> None:
    answer, session, address = say(request_line + b"\r\nHost: example.com\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 501 ")
    assert b"Content-Length: %d" % len(body) in head
    assert f"socks5h://{address}".encode() in body
    assert (session.outcome, session.reason) == ("bad_protocol", f"this is HTTP: use socks5h://{address}")


def test_http_may_come_octet_by_octet(start_server: Any, new_client: Any) -> None:
    server = start_server()
    client = new_client(server)
    client.drip(b"CONNECT example.com:443 HTTP/1.1\r\n")
    assert client.rest().startswith(b"HTTP/1.1 501 ")
    assert server.next_ended().reason.startswith("this is HTTP")


def test_an_http_request_that_never_ends_its_line_is_answered_all_the_same(say: Callable[..., Answered]) -> None:
    assert say(b"GET /" + b"x" * 100_000, end=True)[0].startswith(b"HTTP/1.1 501 ")


def test_of_an_http_request_only_so_much_is_waited_for(start_server: Any, new_client: Any) -> None:
    client = new_client(start_server())
    client.send(b"GET /" + b"x" * foreign.MOST)
    assert client.exactly(12) == b"HTTP/1.1 501"


@pytest.mark.parametrize("path", [b"/proxy.pac", b"/proxy.pac?now"])
def test_a_browser_gets_the_pac_file(path: bytes, say: Callable[..., Answered]) -> None:
    answer, _session, address = say(b"GET " + path + b" HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ns-proxy-autoconfig\r\n")
    assert f'return "SOCKS5 {address}; SOCKS {address}";'.encode() in answer


@pytest.mark.parametrize(("hosts", "status"), [
    ([LOCALHOST], b"501 "), (["0.0.0.0"], b"200 OK\r\n"), ([LOCALHOST, "0.0.0.0"], b"200 OK\r\n"),
], ids=["not from a server for this one", "from a server for them", "from one of whose addresses one is for them"])
def test_other_computers_get_the_pac_file_from_a_server_for_them(
        hosts: List[str], status: bytes, say: Callable[..., Answered]) -> None:
    assert say(b"GET /proxy.pac HTTP/1.1\r\n\r\n", *hosts, elsewhere=True)[0].startswith(b"HTTP/1.1 " + status)


def test_socks4_gets_its_own_refusal(say: Callable[..., Answered]) -> None:
    answer, session, _address = say(b"\x04\x01\x00\x50\x7f\x00\x00\x01me\x00")
    assert answer == bytes((0, 91, 0, 0, 0, 0, 0, 0))
    assert session.reason == "this is SOCKS4: set the client to SOCKS5"


@pytest.mark.parametrize("octets", [
    b"P\x00", b"P\xff" * 3000, b"GE\n", b"GET/", b"GETS ", b"get ", b"POSTER ", b"CONNECTED ", b"Dear proxy",
    b"GET\t/ HTTP/1.1\r\n\r\n",
])
def test_a_letter_does_not_make_http_of_noise(octets: bytes, say: Callable[..., Answered]) -> None:
    """It is hung up on at once: nothing that might come could make a method of it."""
    answer, session, _address = say(octets)
    assert (answer, session.reason) == (b"", f"this is not SOCKS: it begins with {octets[:3].hex(' ')}")


@pytest.mark.parametrize(("octets", "reason"), [
    (b"\x16\x03\x01\x02\x00\x01", "this is TLS: the proxy's address begins with socks5h://, not https://"),
    (b"SSH-2.0-x\r\n", "this is not SOCKS: it begins with 53 53 48"), (b"\x00", "this is not SOCKS: it begins with 00"),
    (b"GET", "this is not SOCKS: it begins with 47 45 54"), (b"P", "this is not SOCKS: it begins with 50"),
    (b"", "the client closed the connection before sending anything"),
])
def test_others_are_hung_up_on_without_an_answer(octets: bytes, reason: str, say: Callable[..., Answered]) -> None:
    answer, session, _address = say(octets, end=True)
    assert (answer, session.reason) == (b"", reason)


@given(st.binary(min_size=1, max_size=12) | st.sampled_from([b"GET", b"POST", b"OPTIONS", b"CONNECT"]).flatmap(
    lambda word: st.integers(1, len(word)).map(lambda length: word[:length]) | st.binary(max_size=3).map(lambda rest: word + rest)))
@example(b"GET ")
@example(b"P")
def test_only_what_can_still_become_a_method_is_waited_for(octets: bytes) -> None:
    words = [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE "]
    http = any(octets.startswith(word) for word in words)
    becoming = [*words, b"PROXY", b"\r\n\r\n\x00\r\nQUIT"]
    assert foreign.unsettled(octets) == ((http and b"\n" not in octets) or any(word.startswith(octets) for word in becoming))
    assert (foreign.identify(octets, Address.numeric(LOCALHOST, 1080), pac=False).kind == "http") is http
