"""
The admin page: what it answers, to which requests, and what it survives.

The page itself is looked at by a browser, in test_page.py.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from typing import Any, Dict, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, eventually, in_thread, needs_ipv6, within
from tests.monitor.watched import Events, Start, Watched
from tests.networks import LinkLocal

from socks5srv.monitor.http import HEADERS, Handler, RequestStream, StatusPage, split_host
from socks5srv.monitor.stats import Publisher
from socks5srv.policy import Policy
from socks5srv.protocol import Address, Command, ReplyCode
from socks5srv.server import Socks5Server


# --- what is answered ---

@pytest.mark.parametrize(("path", "kind"), [
    ("/", "text/html; charset=utf-8"), ("/status.css", "text/css; charset=utf-8"), ("/status.js", "text/javascript; charset=utf-8"),
    ("/status.svg", "image/svg+xml"), ("/status.json", "application/json"), ("/healthz", "text/plain; charset=utf-8"),
])
def test_every_page_is_there_with_all_headers_and_in_full(page: Watched, path: str, kind: str) -> None:
    answer = page.ask(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
    assert int(answer.headers["Content-Length"]) == len(answer.body) > 0
    assert {name: answer.headers.get_all(name) for name in HEADERS} == {name: [value] for name, value in HEADERS.items()}


@pytest.mark.parametrize("path", ["/nothing", "/status.py", "/../run.py", "/conversations/1.json", "/conversations/x.json", "/conversations/%31"])
def test_what_is_not_there_is_not_found_and_has_the_headers_as_well(page: Watched, path: str) -> None:
    answer = page.ask(path)
    assert answer.status == 404
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


def test_the_page_asks_for_nothing_from_elsewhere(page: Watched) -> None:
    for path in ("/", "/status.css", "/status.js"):
        text = page.ask(path).body.decode().replace("http://www.w3.org/2000/svg", "")
        assert [found for found in ("://", "innerHTML", "style=") if found in text] == []       # the last the policy forbids


def test_nothing_may_come_from_elsewhere_be_framed_or_sent() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert {value for name, value in policy.items() if value != "'none'"} == {"'self'"}
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_head_is_get_without_the_body(page: Watched) -> None:
    for path in ("/", "/healthz", "/status.json", "/events"):
        answer = page.ask(path, "HEAD")
        assert answer[:2] == (200, b"")
        assert path == "/events" or int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(page: Watched, method: str) -> None:
    answer = page.ask("/status.json", method)
    assert (answer.status, answer.headers["Allow"], answer.headers["Access-Control-Allow-Origin"]) == (405, "GET, HEAD", None)


@pytest.mark.parametrize(("request_line", "status"), [
    (b"BREW / HTTP/1.1", 501), (b"GET / HTTP/9.9", 505), (b"nonsense", 400), (b"GET /", 400),
    (b"GET /" + 20000 * b"x" + b" HTTP/1.1", 431),
    pytest.param(b"GET / HTTP/1.1" + 50 * (b"\r\nX: " + 1000 * b"x"), 431, id="too many headers"),
])
def test_nonsense_is_answered_without_its_own_words(page: Watched, request_line: bytes, status: int) -> None:
    answer = page.raw(request_line + b"\r\nX: <b>\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert [word in answer for word in (b"nosniff", b"BREW", b"<")] == [True, False, False]


def test_an_old_monitor_without_a_host_is_answered(page: Watched) -> None:
    assert page.raw(b"GET /readyz HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\nok\n")


# --- who is answered ---

@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost", "127.0.0.1", "127.0.0.1:1", "localhost:1", "127.0.0.2:{port}", "", ":", "[::1]:{port}", "0x7f.1:{port}", "localhost.:{port}"])
@pytest.mark.parametrize("path", ["/", "/status.json", "/events", "/metrics", "/healthz"])
def test_a_name_that_has_been_pointed_here_is_found_out(page: Watched, host: str, path: str) -> None:
    assert page.ask(path, Host=host.format(port=page.port))[:2] == (421, f"this page is at {page.page.url}\n".encode())


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}"])
def test_its_own_names_are_right(page: Watched, host: str) -> None:
    assert page.ask("/healthz", Host=host.format(port=page.port)).status == 200


def test_two_hosts_are_one_too_many(page: Watched) -> None:
    hosts = f"Host: localhost:{page.port}\r\nHost: evil.example\r\n".encode()
    assert page.raw(b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(("site", "mode", "status"), [
    ("cross-site", "no-cors", 403), ("same-site", "cors", 403), ("cross-site", "navigate", 200), ("same-origin", "cors", 200), ("none", "navigate", 200),
])
def test_other_web_pages_get_nothing_but_may_link_to_it(page: Watched, site: str, mode: str, status: int) -> None:
    assert page.ask("/status.json", Sec_Fetch_Site=site, Sec_Fetch_Mode=mode).status == status


@pytest.mark.parametrize(("host", "path", "status"), [
    ("192.0.2.7:8080", "/", 200), ("[2001:db8::1]", "/", 200), ("[fe80::1%eth0]", "/", 200), ("127.1", "/", 421), ("localhost:1", "/", 200), (socket.gethostname(), "/", 200),
    ("evil.example", "/", 421), ("evil.example", "/status.json", 421), ("evil.example", "/events", 421), ("proxy", "/conversations/1.json", 421),
    ("proxy:9180", "/healthz", 200), ("proxy", "/readyz", 200),
])
def test_where_others_may_come_addresses_do_and_names_only_for_monitors(watch: Start, host: str, path: str, status: int) -> None:
    assert watch(others=True).ask(path, Host=host).status == status


@needs_ipv6
def test_it_can_be_on_ipv6(watch: Start) -> None:
    page = watch(host="::1")
    assert page.page.url == f"http://[::1]:{page.port}/"
    assert page.ask("/healthz").body == b"ok\n"
    assert page.ask("/healthz", Host=f"127.0.0.1:{page.port}").status == 421


def test_it_can_be_on_a_link_local_address(link_local: LinkLocal, watch: Start, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs leave the zone away in Host, or keep it."""
    page = watch(host=link_local.zoned, allow_local_targets=True)
    assert page.page.url == f"http://[{link_local.host}%25{link_local.interface}]:{page.port}/"
    for host in (link_local.host, link_local.named, link_local.zoned):
        assert page.ask("/healthz", Host=f"[{host}]:{page.port}").body == b"ok\n"
    assert page.ask("/healthz", Host=f"[fe80::dead]:{page.port}").status == 421
    monkeypatch.setattr(Policy, "is_here", lambda *_: False)
    assert new_client(page).ask(Command.CONNECT, (link_local.host, page.port)).code is ReplyCode.NOT_ALLOWED


@pytest.mark.parametrize(("text", "parts"), [
    ("a:1", ("a", 1)), ("a", ("a", 80)), ("[::1]", ("::1", 80)), ("[::1]:9", ("::1", 9)), ("a:", ("a", -1)), ("a:x", ("a", -1)), ("a:999999", ("a", -1)),
])
def test_a_host_has_two_parts(text: str, parts: Tuple[str, int]) -> None:
    assert split_host(text) == parts


# --- how many are answered, and how long ---

def test_only_so_many_may_watch_and_others_are_still_answered(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Publisher, "most_watchers", 3)
    with ExitStack() as stack:
        watchers = [stack.enter_context(Events(page)) for _ in range(3)]
        assert [watcher.next()["live"] for watcher in watchers] == [0, 0, 0]
        answer = page.ask("/events")
        assert answer.status == 503
        assert answer.headers["Retry-After"]
        assert page.ask("/healthz").body == b"ok\n"
    eventually(lambda: page.page.publisher.watchers == 0)
    with Events(page) as events:
        assert events.next()["live"] == 0


def test_connections_that_say_nothing_keep_out_no_request(page: Watched) -> None:
    """However many: the one that has been silent longest makes room."""
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((LOCALHOST, page.port), TIMEOUT)) for _ in range(60)]
        for _ in range(3):
            began = time.monotonic()
            assert {page.ask(path).status for path in ("/", "/status.json", "/healthz", "/readyz")} == {200}
            assert time.monotonic() - began < within(1)
        assert silent[0].recv(1) == b""
        assert len(page.page.silent) + len(page.page.busy) <= StatusPage.most
    eventually(lambda: not page.page.silent and not page.page.busy)


def test_when_all_are_busy_others_are_told_so_and_probes_are_answered(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatusPage, "most_answers", 2)
    monkeypatch.setattr(StatusPage, "most", 10)
    release, now = threading.Event(), page.page.publisher.now
    monkeypatch.setattr(page.page.publisher, "now", lambda: release.wait(TIMEOUT) and now())
    waiting = [in_thread(page.ask, "/status.json") for _ in range(2)]
    eventually(lambda: len(page.page.busy) == 2)
    for _ in range(3):
        answer = page.ask("/")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert page.ask("/healthz").status == 200
    release.set()
    assert [result().status for result in waiting] == [200, 200]
    eventually(lambda: not page.page.silent and not page.page.busy)
    assert page.ask("/").status == 200


def test_a_client_that_drips_its_request_is_hung_up_on(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestStream, "seconds", 0.1)
    with socket.create_connection((LOCALHOST, page.port), TIMEOUT) as sock:
        sock.settimeout(0.05)

        def is_hung_up_on() -> bool:
            try:
                sock.sendall(b"x")      # never silent for long
                return sock.recv(1) == b""
            except socket.timeout:
                return False
            except ConnectionError:
                return True

        eventually(is_hung_up_on)


def test_a_client_that_does_not_read_is_dropped(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "timeout", 0.2)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((LOCALHOST, page.port))
        sock.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        eventually(lambda: page.page.publisher.watchers == 1)
        monkeypatch.setattr(page.page.publisher, "next_text", lambda number: (30_000_000 * "x", number))
        eventually(lambda: page.page.publisher.watchers == 0)


def test_there_is_room_for_visitors_when_the_proxy_is_full(watch: Start) -> None:
    with Socks5Server((LOCALHOST, 0)) as other:
        most = other.registry.most_clients
        watch()
        assert most - other.registry.most_clients >= StatusPage.most_answers / 2 or most == float("inf")
    assert watch(max_clients=7).server.registry.most_clients == 7


# --- through the proxy ---

def test_clients_on_this_computer_may_look_at_it_through_the_proxy(page: Watched, new_client: Any) -> None:
    client = new_client(page)
    client.connect((LOCALHOST, page.port))
    client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert client.rest().endswith(b"ok\n")


@pytest.mark.parametrize(("place", "more"), [
    *((place, {}) for place in ("127.0.0.1", "localhost", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1")),
    pytest.param("127.0.0.1", {"host": "0.0.0.0", "others": True}, id="a page on all addresses"),
])
def test_clients_on_other_computers_may_not_whatever_else_they_may(
    watch: Start, new_client: Any, place: str, more: Dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = watch(allow_local_targets=True, **more)
    monkeypatch.setattr(Policy, "is_here", lambda *_: False)
    assert new_client(page).ask(Command.CONNECT, Address.named(place, page.port)).code is ReplyCode.NOT_ALLOWED


# --- what it shows ---

def test_the_password_is_nowhere(watch: Start, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    assert [new_client(page).log_in("anna", password) for password in (b"sesame", b"wr0ng-w0rd")] == [True, False]
    everything = b"".join(page.ask(path).body for path in ("/status.json", "/metrics", "/conversations/1.json", "/conversations/2.json"))
    for password in (b"sesame", b"wr0ng-w0rd"):
        assert password not in everything
        assert password.hex().encode() not in everything


def test_the_manual_has_every_path(page: Watched) -> None:
    from tests.docs.pages import literals, table

    paths = [literals(path)[0] for path, _what in table("observing", "Path")]
    assert len(paths) == 7
    assert {page.ask(path).status for path in set(paths) - {"/events", "/conversations/ID.json"}} == {200}
