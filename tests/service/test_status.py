"""
``--status``: what it answers, to whom, and what it survives.

The page itself is looked at by a browser, in test_status_page.py.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any, Callable, List, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, Client, can_bind, eventually, exchange, in_thread, needs_ipv6, within
from tests.networks import LinkLocal
from tests.service.conftest import Outcome, Service
from tests.service.watched import Events, Watched

from socks5srv import handler as handler_module
from socks5srv.explain import exhibit
from socks5srv.protocol import Address, AddressType, Command, Credentials, Datagram, Greeting, Method, ReplyCode, Request
from socks5srv.handler import Socks5Handler
from socks5srv.service import conversations
from socks5srv.service import status as module
from socks5srv.service.conversations import KEPT, STEPS, label_of
from socks5srv.service.options import build_parser
from socks5srv.service.run import ServiceHandler, ServiceServer, status_address
from socks5srv.service.status import HEADERS, split_host

Start = Callable[..., Watched]


# --- what is answered ---

@pytest.mark.parametrize(("path", "kind"), [
    ("/", "text/html; charset=utf-8"), ("/status.css", "text/css; charset=utf-8"), ("/status.js", "text/javascript; charset=utf-8"),
    ("/status.svg", "image/svg+xml"), ("/status.json", "application/json"), ("/healthz", "text/plain; charset=utf-8"),
])
def test_every_page_is_there_with_all_headers_and_in_full(watch: Start, path: str, kind: str) -> None:
    answer, body = watch().ask(path)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == kind
    assert int(answer.headers["Content-Length"]) == len(body) > 0
    for name, value in HEADERS.items():
        assert answer.headers.get_all(name) == [value]


@pytest.mark.parametrize("path", ["/nothing", "/status.py", "/../run.py", "/conversations/1.json", "/conversations/x.json", "/conversations/%31"])
def test_what_is_not_there_is_not_found_and_has_the_headers_as_well(watch: Start, path: str) -> None:
    answer, _body = watch().ask(path)
    assert answer.status == 404
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


def test_the_page_asks_for_nothing_from_elsewhere(watch: Start) -> None:
    page = watch()
    for path in ("/", "/status.css", "/status.js"):
        text = page.ask(path)[1].decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text
        assert "innerHTML" not in text
        assert "style=" not in text     # which the policy forbids


def test_nothing_may_come_from_elsewhere_be_framed_or_sent() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert {value for name, value in policy.items() if value != "'none'"} == {"'self'"}
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_head_is_get_without_the_body(watch: Start) -> None:
    page = watch()
    for path in ("/", "/healthz", "/status.json"):
        answer, body = page.ask(path, "HEAD")
        assert (answer.status, body) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 0
    answer, body = page.ask("/events", "HEAD")
    assert (answer.status, body) == (200, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(watch: Start, method: str) -> None:
    answer, _body = watch().ask("/status.json", method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"
    assert answer.headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize(("request_line", "status"), [
    (b"BREW / HTTP/1.1", 501), (b"GET / HTTP/9.9", 505), (b"nonsense", 400), (b"GET /" + 20000 * b"x" + b" HTTP/1.1", 431), (b"GET /", 400)
])
def test_nonsense_is_answered_without_its_own_words(watch: Start, request_line: bytes, status: int) -> None:
    answer = watch().raw(request_line + b"\r\nX: <b>\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"nosniff" in answer
    assert b"BREW" not in answer
    assert b"<" not in answer


def test_too_many_headers_are_not_read(watch: Start) -> None:
    answer = watch().raw(b"GET / HTTP/1.1\r\n" + 50 * (b"X: " + 1000 * b"x" + b"\r\n") + b"Host: evil.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_an_old_monitor_without_a_host_is_answered(watch: Start) -> None:
    assert watch().raw(b"GET /readyz HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\nok\n")


# --- who is answered ---

@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost", "127.0.0.1", "127.0.0.1:1", "localhost:1", "127.0.0.2:{port}", "", ":", "[::1]:{port}", "0x7f.1:{port}", "localhost.:{port}"])
@pytest.mark.parametrize("path", ["/", "/status.json", "/events", "/metrics", "/healthz"])
def test_a_name_that_has_been_pointed_here_is_found_out(watch: Start, host: str, path: str) -> None:
    page = watch()
    answer, body = page.ask(path, Host=host.format(port=page.port))
    assert answer.status == 421
    assert body.decode() == f"this page is at {page.page.url}\n"


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}"])
def test_its_own_names_are_right(watch: Start, host: str) -> None:
    page = watch()
    assert page.ask("/healthz", Host=host.format(port=page.port))[0].status == 200


def test_two_hosts_are_one_too_many(watch: Start) -> None:
    page = watch()
    hosts = f"Host: localhost:{page.port}\r\nHost: evil.example\r\n".encode()
    assert page.raw(b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(("site", "mode", "status"), [
    ("cross-site", "no-cors", 403), ("same-site", "cors", 403), ("cross-site", "navigate", 200), ("same-origin", "cors", 200), ("none", "navigate", 200),
])
def test_other_web_pages_get_nothing_but_may_link_to_it(watch: Start, site: str, mode: str, status: int) -> None:
    assert watch().ask("/status.json", Sec_Fetch_Site=site, Sec_Fetch_Mode=mode)[0].status == status


@pytest.mark.parametrize(("host", "path", "status"), [
    ("192.0.2.7:8080", "/", 200), ("[2001:db8::1]", "/", 200), ("localhost:1", "/", 200), (socket.gethostname(), "/", 200),
    ("evil.example", "/", 421), ("evil.example", "/status.json", 421), ("evil.example", "/events", 421), ("proxy", "/conversations/1.json", 421),
    ("proxy:9180", "/healthz", 200), ("proxy", "/readyz", 200),
])
def test_where_others_may_come_addresses_do_and_names_only_for_monitors(watch: Start, host: str, path: str, status: int) -> None:
    assert watch(others=True).ask(path, Host=host)[0].status == status


@needs_ipv6
def test_it_can_be_on_ipv6(watch: Start) -> None:
    page = watch(host="::1")
    assert page.page.url == f"http://[::1]:{page.port}/"
    assert page.ask("/healthz")[1] == b"ok\n"
    assert page.ask("/healthz", Host=f"127.0.0.1:{page.port}")[0].status == 421


def test_it_can_be_on_a_link_local_address(link_local: LinkLocal, watch: Start, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs leave the zone away in Host, or keep it."""
    page = watch(host=link_local.zoned)
    assert page.page.url == f"http://[{link_local.host}%25{link_local.interface}]:{page.port}/"
    for host in (link_local.host, link_local.named, link_local.zoned):
        assert page.ask("/healthz", Host=f"[{host}]:{page.port}")[1] == b"ok\n"
    assert page.ask("/healthz", Host=f"[fe80::dead]:{page.port}")[0].status == 421
    monkeypatch.setattr(type(page.server), "is_here", lambda *_: False)
    page.server.allow_local_targets = True
    assert new_client(page.server).ask(Command.CONNECT, (link_local.host, page.port)).code is ReplyCode.NOT_ALLOWED


@pytest.mark.parametrize(("text", "parts"), [
    ("a:1", ("a", 1)), ("a", ("a", 80)), ("[::1]", ("::1", 80)), ("[::1]:9", ("::1", 9)), ("a:", ("a", -1)), ("a:x", ("a", -1)), ("a:999999", ("a", -1)),
])
def test_a_host_has_two_parts(text: str, parts: Tuple[str, int]) -> None:
    assert split_host(text) == parts


# --- what it says ---

def test_the_figures_of_a_server_that_has_done_nothing(watch: Start) -> None:
    page = watch(users={"anna": "sesame"})
    status = page.status()
    assert status["listening"] == [f"socks5h://127.0.0.1:{page.server.server_address[1]}"]
    assert (status["auth"], status["commands"], status["workers"]) == ("password", ["connect", "bind", "udp"], 1)
    assert (status["ready"], status["reason"], status["live"], status["sessions"], status["recent"]) == (True, "", 0, [], [])
    assert status["counters"]["clients"] == status["counters"]["up"] == 0
    assert set(status["counters"]["replies"].values()) == {0}


def test_a_session_is_there_while_it_is_open_with_its_octets(watch: Start, echo: Any, new_client: Any) -> None:
    page = watch()
    client = new_client(page.server)
    client.connect(echo)
    exchange(client, b"x" * 1000)
    (session,) = eventually(lambda: [row for row in page.status()["sessions"] if row["up"] == row["down"] == 1000])
    assert session["client"] == "{}:{}".format(*client.socket.getsockname())
    assert (session["command"], session["host"], session["port"], session["peer"]) == ("connect", echo[0], echo[1], "{}:{}".format(*echo))
    assert (session["event"], session["reply"], session["worker"], session["user"]) == ("open", 0, 0, "")
    client.close()
    status = eventually(lambda: [status for status in [page.status()] if not status["sessions"] and status["counters"]["sessions"]])[0]
    assert status["counters"]["sessions"] == {"close": 1}
    assert (status["counters"]["up"], status["counters"]["down"]) == (1000, 1000)
    assert [(row["id"], row["event"], row["up"]) for row in status["recent"]] == [(1, "close", 1000)]


def test_the_sum_of_octets_never_goes_back(watch: Start, echo: Any, new_client: Any) -> None:
    page = watch()
    seen = [0]
    for _ in range(40):
        client = new_client(page.server)
        client.connect(echo)
        exchange(client, b"x" * 10000)
        client.close()
        for _ in range(20):
            report = page.server.book.report()
            assert report.figures.up >= seen[-1]
            seen.append(report.figures.up)
    assert eventually(lambda: page.server.book.report().figures.up == 400000)


def test_a_rate_is_of_the_last_second(watch: Start, echo: Any, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from socks5srv.service import figures

    page = watch()
    client = new_client(page.server)
    client.connect(echo)
    monkeypatch.setattr(figures, "RATE_TIME", 0.0)
    page.server.book.report()
    exchange(client, b"x" * 50000)
    rates = eventually(lambda: [row for row in page.server.book.report().sessions if row["up_rate"]] or None)
    assert rates[0]["up_rate"] > 1000
    assert eventually(lambda: page.server.book.report().rates == (0.0, 0.0))


def test_of_too_many_sessions_the_busiest_are_told(watch: Start, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from socks5srv.service import figures

    page = watch()
    for _ in range(4):
        new_client(page.server).greet()
    eventually(lambda: page.status()["live"] == 4)
    monkeypatch.setattr(figures, "SHOWN", 2)
    page.server.book.rates_each = {2: (0.0, 5.0), 4: (9.0, 0.0)}
    page.server.book.look = lambda *_: None
    assert [row["id"] for row in page.server.book.report().sessions] == [2, 4]
    assert page.status()["live"] == 4


def test_what_goes_wrong_is_counted(watch: Start, new_client: Any, refusing: Any) -> None:
    page = watch(users={"anna": "sesame"})
    client = new_client(page.server)
    client.greet(Method.USERNAME_PASSWORD)
    assert client.login("anna", "wrong").status != 0
    client = new_client(page.server)
    client.greet(Method.USERNAME_PASSWORD)
    client.login("anna", "sesame")
    assert client.request(Command.CONNECT, refusing()).code is ReplyCode.CONNECTION_REFUSED
    for octets in (b"\x04\x01\0\0\0\0\0\0\0", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01", b"xyz", b"P\xff", b"\x05\x00", b"\x05\x01\x00", b""):
        client = new_client(page.server)
        client.send(octets)
        client.end()
        client.rest()
    status = eventually(lambda: [status for status in [page.status()] if sum(status["counters"]["sessions"].values()) == 10])[0]
    assert status["counters"]["failed_logins"] == 1
    assert status["counters"]["replies"]["connection_refused"] == 1
    assert status["counters"]["handshake_failures"] == {
        "closed": 1, "http": 1, "no_acceptable_method": 2, "not_socks": 2, "socks4": 1, "tls": 1,
    }
    assert status["counters"]["sessions"]["no_acceptable_method"] == 2


def test_the_pac_file_is_no_failure_unless_it_is_refused(watch: Start, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = watch()
    for number, here in ((1, True), (2, False)):
        monkeypatch.setattr(Socks5Handler, "is_here", here)
        with new_client(page.server) as client:
            client.send(b"GET /proxy.pac HTTP/1.1\r\n\r\n")
            assert client.rest().startswith(b"HTTP/1.1 200 " if here else b"HTTP/1.1 501 ")
        eventually(lambda number=number: page.server.book.figures.sum_of("sessions") == number)
    assert page.status()["counters"]["handshake_failures"] == {"http": 1}


def test_who_is_too_slow_or_crowded_out_is_counted_as_that(watch: Start, new_client: Any) -> None:
    page = watch(handshake_timeout=0.2)
    new_client(page.server).rest()
    page.server.handshake_timeout, page.server.max_handshakes = 30, 1
    first = new_client(page.server)
    eventually(lambda: page.server.handshakes)
    second = new_client(page.server)
    first.rest()
    second.close()
    eventually(lambda: page.status()["counters"]["handshake_failures"] == {"timeout": 1, "crowded_out": 1, "closed": 1})


def test_a_client_that_has_been_refused_has_ended_at_once_although_it_lingers(
    watch: Start, new_client: Any, refusing: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handler_module, "LINGER", TIMEOUT)
    page = watch()
    client = new_client(page.server)
    assert client.ask(Command.CONNECT, refusing()).code is ReplyCode.CONNECTION_REFUSED
    status = page.status()
    assert (status["live"], status["sessions"], status["counters"]["sessions"]) == (0, [], {"failed": 1})
    seconds = status["recent"][0]["seconds"]
    client.close()
    eventually(lambda: page.server.clients == 0)
    assert page.status()["recent"][0]["seconds"] == seconds


def test_each_session_is_either_alive_or_has_ended_whether_it_has_been_told_of_or_not(
    watch: Start, new_client: Any, refusing: Any, echo: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()
    report = ServiceServer.report

    def report_later(server: ServiceServer, handler: Any) -> None:
        assert go_on.wait(TIMEOUT)
        report(server, handler)

    monkeypatch.setattr(ServiceServer, "report", report_later)
    page = watch()
    for place in (refusing(), echo):
        with new_client(page.server) as client:
            client.ask(Command.CONNECT, place)
    with new_client(page.server) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.rest()
    new_client(page.server).connect(echo)

    def figures() -> Tuple[int, Any, Any]:
        counters = page.status()["counters"]
        return page.status()["live"], counters["sessions"], counters["handshake_failures"]

    assert eventually(lambda: figures()[0] == 1 and figures()) == (1, {"bad_protocol": 1, "close": 1, "failed": 1}, {"http": 1})
    go_on.set()
    eventually(lambda: len(page.server.book.live) == 1)
    assert figures() == (1, {"bad_protocol": 1, "close": 1, "failed": 1}, {"http": 1})


# --- events ---

def test_events_tell_of_a_session_that_opens_and_goes(watch: Start, echo: Any, new_client: Any) -> None:
    page = watch()
    with Events(page) as events:
        assert events.answer.headers["Content-Type"] == "text/event-stream"
        assert events.next()["live"] == 0
        client = new_client(page.server)
        client.connect(echo)
        assert events.until(lambda status: status["live"])["sessions"][0]["host"] == echo[0]
        client.close()
        assert events.until(lambda status: not status["live"])["sessions"] == []


def test_only_so_many_may_watch_and_others_are_still_answered(watch: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCHERS", 3)
    page = watch()
    with ExitStack() as stack:
        watchers = [stack.enter_context(Events(page)) for _ in range(3)]
        assert [watcher.next()["live"] for watcher in watchers] == [0, 0, 0]
        answer, _body = page.ask("/events")
        assert answer.status == 503
        assert answer.headers["Retry-After"]
        assert page.ask("/healthz")[1] == b"ok\n"
    eventually(lambda: page.page.pulse.watchers == 0)
    with Events(page) as events:
        assert events.next()["live"] == 0


def test_connections_that_say_nothing_keep_out_no_request(watch: Start) -> None:
    """However many: the one that has been silent longest makes room."""
    page = watch()
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((LOCALHOST, page.port), TIMEOUT)) for _ in range(60)]
        for _ in range(3):
            began = time.monotonic()
            for path in ("/", "/status.json", "/healthz", "/readyz"):
                assert page.ask(path)[0].status == 200
            assert time.monotonic() - began < within(1)
        assert silent[0].recv(1) == b""
        most = module.WATCHERS + module.REQUESTS + module.PROBES
        eventually(lambda: len(page.page.http.connections) <= most)
    eventually(lambda: not page.page.http.connections)


def test_when_all_are_busy_others_are_told_so_and_probes_are_answered(watch: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCHERS", 1)
    monkeypatch.setattr(module, "REQUESTS", 1)
    monkeypatch.setattr(module, "PROBES", 8)        # among which are those that are just ending
    page, release = watch(), threading.Event()
    now = page.page.pulse.now

    def slow() -> Any:
        assert release.wait(TIMEOUT)
        return now()

    monkeypatch.setattr(page.page.pulse, "now", slow)
    waiting = [in_thread(page.ask, "/status.json") for _ in range(2)]
    eventually(lambda: len(page.page.http.busy) == 2)
    for _ in range(3):
        answer, _body = page.ask("/")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert page.ask("/healthz")[0].status == 200
    release.set()
    assert [result()[0].status for result in waiting] == [200, 200]
    eventually(lambda: not page.page.http.connections)
    assert page.ask("/")[0].status == 200


def test_who_drips_a_request_is_hung_up_on(watch: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASKING_TIME", 0.1)
    page = watch()
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


def test_who_does_not_read_is_dropped(watch: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Handler, "timeout", 0.2)
    page = watch()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((LOCALHOST, page.port))
        sock.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        eventually(lambda: page.page.pulse.watchers == 1)
        monkeypatch.setattr(module.json, "dumps", lambda _facts: 30_000_000 * "x")
        eventually(lambda: page.page.pulse.watchers == 0)


def test_a_bug_while_looking_ends_nothing(watch: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    page = watch()
    with monkeypatch.context() as patch:
        patch.setattr(page.page.pulse, "beat", lambda: 1 / 0)
        eventually(lambda: "a bug, met while looking" in caplog.text)
    assert page.ask("/healthz")[1] == b"ok\n"


# --- ready or not ---

def test_it_is_ready_until_it_is_full_or_stops(watch: Start, new_client: Any) -> None:
    page = watch(max_clients=1)
    assert page.ask("/readyz")[1] == b"ok\n"
    client = new_client(page.server)
    client.greet()
    answer, body = page.ask("/readyz")
    assert (answer.status, body) == (503, b"1 clients are being served, and more do not fit\n")
    assert page.ask("/healthz")[1] == b"ok\n"
    assert page.status()["ready"] is False
    client.close()
    eventually(lambda: page.ask("/readyz")[0].status == 200)
    page.server.shutdown()
    answer, body = page.ask("/readyz")
    assert (answer.status, body) == (503, b"stopping\n")
    assert page.ask("/healthz")[0].status == 200


def test_there_is_room_for_who_looks_when_the_proxy_is_full(watch: Start) -> None:
    with ServiceServer((LOCALHOST, 0), ServiceHandler) as other:
        most = other.most_clients
        watch()
        assert most - other.most_clients >= (module.WATCHERS + module.REQUESTS) / 2 or most == float("inf")
    assert watch(max_clients=7).server.most_clients == 7


# --- what is kept of conversations ---

def conversation(page: Watched, id: int, steps: int = 1) -> Any:
    def look() -> Any:
        answer, body = page.ask(f"/conversations/{id}.json")
        found = json.loads(body)
        return found if answer.status == 200 and len(found["steps"]) >= steps else None

    return eventually(look)


def arrows(found: Any) -> List[Tuple[str, str, str]]:
    return [(step["from"], step["to"], step["label"]) for step in found["steps"] if step["kind"] != "note"]


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_has_one_pair_of_brackets(host: str) -> None:
    label = label_of(exhibit(Request(Command.CONNECT, Address(host, 80, AddressType.DOMAINNAME))))
    assert label.endswith(" [::1]:80")


def test_a_conversation_is_told_arrow_by_arrow(watch: Start, echo: Any, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    client = new_client(page.server)
    client.greet(Method.USERNAME_PASSWORD)
    client.login("anna", "sesame")
    client.request(Command.CONNECT, Address.named("localhost", echo[1]))
    found = conversation(page, 1, 9)
    shown = arrows(found)
    assert [label.split("127.0.0.1")[0].split("::1")[0] for _from, _to, label in shown[:8]] == [
        "GREETING username/password", "METHOD SELECTION username/password", "USERNAME/PASSWORD anna", "LOGIN STATUS success",
        f"REQUEST CONNECT localhost:{echo[1]}", "look up localhost", "localhost is ", "connected to ",
    ]
    assert [(sender, receiver) for sender, receiver, _label in shown[5:9]] == [("proxy", "target"), ("target", "proxy"), ("proxy", "target"), ("proxy", "client")]
    assert shown[8][2].startswith("REPLY succeeded 127.0.0.1:")
    assert "sesame" not in json.dumps(found)
    assert b"sesame".hex() not in json.dumps(found)
    greeting = found["steps"][0]["exhibit"]
    assert [(field["name"], field["octets"]) for field in greeting["fields"]] == [("VER", "05"), ("NMETHODS", "01"), ("METHODS", "02")]


def test_the_caller_of_bind_is_an_arrow_that_comes_in(watch: Start, new_client: Any) -> None:
    page = watch()
    client = new_client(page.server)
    reply = client.ask(Command.BIND, (LOCALHOST, 21))
    with socket.create_connection((reply.bound.host, reply.bound.port), TIMEOUT) as caller:
        place = "{}:{}".format(*caller.getsockname())
        found = conversation(page, 1, 6)
        assert ("target", "proxy", f"{place} calls") in arrows(found)


def test_a_target_that_refuses_is_told(watch: Start, new_client: Any, refusing: Any) -> None:
    page = watch()
    host, port = refusing()
    new_client(page.server).ask(Command.CONNECT, (host, port))
    found = conversation(page, 1, 5)
    assert ("proxy", "target", f"not connected: {host}:{port}: Connection refused") in arrows(found)
    assert found["event"] == "failed"


def test_of_many_that_come_at_once_some_are_only_counted(watch: Start, new_client: Any, echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = watch()
    monkeypatch.setattr(conversations, "A_SECOND", 2)
    page.server.book.conversations.second = time.monotonic() + 1000
    for _ in range(5):
        new_client(page.server).connect(echo)
    status = page.status()
    assert [row["id"] for row in status["recent"]] == [2, 1]
    assert [row["id"] for row in status["sessions"]] == [1, 2, 3, 4, 5]
    eventually(lambda: page.status()["counters"]["replies"]["succeeded"] == 5)      # counted once it has been sent


def test_only_the_last_conversations_are_kept_and_of_each_the_first_steps(watch: Start, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "A_SECOND", 1000)
    page = watch()
    for _ in range(KEPT + 3):
        new_client(page.server).close()
    recent = eventually(lambda: [status["recent"] for status in [page.status()] if status["counters"]["clients"] == KEPT + 3])[0]
    assert [row["id"] for row in recent] == list(range(KEPT + 3, 3, -1))
    assert page.ask("/conversations/3.json")[0].status == 404
    kept = page.server.book.conversations.kept[KEPT + 3]
    for number in range(2 * STEPS):
        kept.add("client", "proxy", 1000 * "x" + str(number))
    assert len(kept.steps) == STEPS
    assert kept.steps[-1]["label"] == "... and more, which is not kept"
    assert max(len(step["label"]) for step in kept.steps) <= 120


def test_names_from_the_wire_are_data_and_nothing_else(watch: Start, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    client = new_client(page.server)
    client.greet(Method.USERNAME_PASSWORD)
    client.login('<img src=x onerror="alert(1)">\x1b[2J\u202e', "sesame")
    answer, body = page.ask("/status.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    (row,) = json.loads(body)["recent"]
    assert row["user"].startswith("<img src=x")
    assert b"\x1b" not in body
    assert b"\n" not in body[:-1]           # or a name could forge an event
    assert json.loads(page.ask("/conversations/1.json")[1])["steps"]


def test_an_exhibit_is_kept_in_bounded_size(watch: Start, new_client: Any) -> None:
    page = watch()
    client = new_client(page.server)
    client.send(Greeting(bytes(range(255))), Request(Command.CONNECT, Address.named("x" * 63 + "." + "y" * 63, 1)))
    assert len(json.dumps(conversation(page, 1, 3))) < 100_000


# --- through the proxy ---

def test_clients_on_this_computer_may_look_at_it_through_the_proxy(watch: Start, new_client: Any) -> None:
    page = watch()
    client = new_client(page.server)
    client.connect((LOCALHOST, page.port))
    client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert client.rest().endswith(b"ok\n")


@pytest.mark.parametrize("place", ["127.0.0.1", "localhost", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1"])
def test_clients_on_other_computers_may_not_whatever_else_they_may(watch: Start, new_client: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = watch(allow_local_targets=True)
    monkeypatch.setattr(type(page.server), "is_here", lambda *_: False)
    reply = new_client(page.server).ask(Command.CONNECT, Address.named(place, page.port))
    assert reply.code is ReplyCode.NOT_ALLOWED


def test_nor_where_the_page_is_on_all_addresses(watch: Start, new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = watch(host="0.0.0.0", others=True, allow_local_targets=True)
    monkeypatch.setattr(type(page.server), "is_here", lambda *_: False)
    assert new_client(page.server).ask(Command.CONNECT, (LOCALHOST, page.port)).code is ReplyCode.NOT_ALLOWED


# --- what the README says of it ---

def test_the_readme_has_every_name_of_the_json(watch: Start) -> None:
    from tests.test_readme import literals, section, table

    status = watch().status()
    text = section("Status page")
    rows = table("Name", text)
    told = {name for row in rows for cell in row for name in literals(cell)}
    assert {literals(name)[0] for name, _meaning in rows} <= set(status)
    assert set(status) | set(status["counters"]) | set(status["rates"]) <= told


def test_the_readme_has_every_path(watch: Start) -> None:
    from tests.test_readme import literals, section, table

    page = watch()
    paths = [literals(path)[0] for path, _what in table("Path", section("Status page"))]
    assert len(paths) == 7
    for path in paths:
        if path not in ("/events", "/conversations/ID.json"):
            assert page.ask(path)[0].status == 200


# --- the option ---

def options(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(words)


@pytest.mark.parametrize(("text", "place"), [
    ("9180", ("127.0.0.1", 9180)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("localhost:1", ("127.0.0.1", 1)),
])
def test_a_port_alone_is_on_this_computer(text: str, place: Tuple[str, int]) -> None:
    assert status_address(options("--status", text))[:2] == place


def test_other_computers_see_it_only_when_that_is_said_in_so_many_words(run_command: Callable[..., Outcome]) -> None:
    done = run_command("0", "--status", "0.0.0.0:9180")
    assert done.code == 2
    assert done.stderr.splitlines() == [
        "socks5srv: error: --status 0.0.0.0:9180 would show other computers who uses this proxy, and for what",
        "  for this computer only:  --status 9180",
        "  for everybody who can reach it, on purpose:  --status-open",
    ]


def test_a_port_that_is_taken_is_told_like_any_other(run_command: Callable[..., Outcome], listen: Any) -> None:
    port = listen().getsockname()[1]
    done = run_command("0", "--status", str(port))
    assert done.code == 1
    assert f"port {port} on 127.0.0.1 is already in use" in done.stderr


def test_the_first_line_says_where_the_page_is_and_it_is_there_until_the_end(start: Callable[..., Service]) -> None:
    service = start("--status", "0", "--log-format", "json")
    url = json.loads(service.wait_for("listening"))["status"]
    port = int(url.rstrip("/").rpartition(":")[2])

    def ready() -> bool:
        connection = http.client.HTTPConnection(LOCALHOST, port, timeout=TIMEOUT)
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        connection.close()
        return answer.status == 200

    eventually(ready)
    with Client(service.server_address) as client:
        client.greet()
        assert service.stop() == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((LOCALHOST, port), TIMEOUT)


def test_somebody_who_watches_does_not_keep_it_from_stopping(start: Callable[..., Service]) -> None:
    service = start("--status", "0")
    port = int(service.wait_for("listening").rstrip("/").rpartition(":")[2])
    with socket.create_connection((LOCALHOST, port), TIMEOUT) as watcher, socket.create_connection((LOCALHOST, port), TIMEOUT):
        watcher.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        assert watcher.recv(100)
        assert service.stop() == 0


def test_without_the_option_nothing_of_it_is_imported() -> None:
    program = (
        "import sys; from socks5srv.service import run; options = run.parse(['0']); server = run.listen(options, ['127.0.0.1']);"
        "server.server_close(); print([name for name in sys.modules if name.startswith(('http', 'prometheus'))"
        " or name.endswith(('status', 'figures', 'metrics', 'conversations', 'remembering', 'explain'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.skipif(not can_bind("0.0.0.0"), reason="no IPv4 here")
def test_in_a_container_it_can_be_open(start: Callable[..., Service]) -> None:
    service = start("--status", "0.0.0.0:0", "--status-open")
    port = int(service.wait_for("listening").rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection(LOCALHOST, port, timeout=TIMEOUT)
    connection.request("GET", "/healthz", headers={"Host": "proxy:8080"})
    assert connection.getresponse().status == 200
    connection.close()


def test_datagrams_are_counted_while_they_flow(watch: Start, new_client: Any) -> None:
    page = watch()
    client = new_client(page.server)
    reply = client.ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        for sock in (target, ours):
            sock.settimeout(TIMEOUT)
            sock.bind((LOCALHOST, 0))
        ours.sendto(bytes(Datagram(Address.of(target.getsockname()), b"hello")), (reply.bound.host, reply.bound.port))
        assert target.recv(100) == b"hello"
        eventually(lambda: [row["up"] for row in page.status()["sessions"]] == [5])


def test_the_password_is_nowhere(watch: Start, new_client: Any) -> None:
    page = watch(users={"anna": "sesame"})
    for password in ("sesame", "wr0ng-w0rd"):
        client = new_client(page.server)
        client.greet(Method.USERNAME_PASSWORD)
        client.send(Credentials(b"anna", password.encode()))
        client.exactly(2)
    everything = b"".join(page.ask(path)[1] for path in ("/status.json", "/metrics", "/conversations/1.json", "/conversations/2.json"))
    for password in ("sesame", "wr0ng-w0rd"):
        assert password.encode() not in everything
        assert password.encode().hex().encode() not in everything
