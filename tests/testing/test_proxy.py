"""
A proxy in the background, as test suites use it: start(), and what it tells.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from typing import Any, List

import pytest

import socks5srv.testing
from socks5srv import resolver
from socks5srv.observer import Observer
from socks5srv.protocol import Address, AddressType, Command, MethodSelection, ReplyCode, Request, RequestFailed
from socks5srv.handler import Socks5Handler
from socks5srv.testing.proxy import Proxy, start
from socks5srv.testing.targets import EchoServer

from ..conftest import (
    LOCALHOST, Client, eventually, exchange, handler_with, in_thread, name, needs_ipv6, server_threads, udp_socket, within,
)


# --- starting and stopping ---

def test_it_serves_when_start_returns(client: Client, echo: EchoServer) -> None:
    client.connect(echo.address)
    exchange(client)


def test_to_stop_takes_less_than_five_milliseconds() -> None:
    """With a client in a tunnel, and one in a handshake; the median, since the computer may be busy."""
    took: List[float] = []
    with EchoServer() as echo:
        for _ in range(20):
            proxy = start()
            with Client(proxy.address) as client, Client(proxy.address) as other:
                client.connect(echo.address)
                other.greet()
                began = time.perf_counter()
                proxy.stop()
                took.append(time.perf_counter() - began)
    assert statistics.median(took) < within(0.005)


def test_to_stop_at_once_leaves_nothing_behind() -> None:
    for _ in range(100):
        start().stop()
    assert server_threads() == []


def test_to_stop_ends_what_is_under_way(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    client.connect(echo.address)
    exchange(client)
    proxy.stop()
    assert client.rest() == b""
    assert proxy.last().reason == "server stopped"


def test_nobody_is_there_when_it_has_stopped_and_to_stop_twice_is_to_stop(proxy: Proxy) -> None:
    proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        Client(proxy.address)
    assert "stopped" in repr(proxy)
    proxy.stop()


def test_it_can_come_back_at_the_same_port(proxy: Proxy, echo: EchoServer) -> None:
    address = proxy.address
    with Client(address) as client:
        client.connect(echo.address)
        proxy.stop()
    proxy.restart()
    assert proxy.address == address
    with Client(address) as client:
        client.connect(echo.address)
    assert len(proxy.sessions) == 2


def test_to_restart_it_while_it_serves_stops_it_first(proxy: Proxy, client: Client) -> None:
    client.greet()
    proxy.restart()
    assert client.rest() == b""
    with Client(proxy.address) as another:
        another.greet()


@needs_ipv6
def test_it_listens_where_it_is_told_to() -> None:
    with start(host="::1") as proxy, Client(proxy.address) as client:
        assert proxy.url == f"socks5h://[::1]:{proxy.port}"
        client.greet()
    with start(host="::1", port=proxy.port) as again:
        assert again.port == proxy.port


def test_a_port_in_use_is_an_error_of_the_caller(proxy: Proxy) -> None:
    with pytest.raises(OSError, match="in use"):
        start(port=proxy.port)


def test_keywords_are_settings_of_the_server() -> None:
    with start(commands=frozenset({Command.BIND}), observers=[Observer()]) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, (LOCALHOST, 1)).code is ReplyCode.COMMAND_NOT_SUPPORTED
        assert len(proxy.sessions) == 1


def test_for_other_computers_a_proxy_asks_for_a_password_or_says_that_it_is_open() -> None:
    with pytest.raises(ValueError, match="allow_open_proxy=True"):
        start(host="0.0.0.0")
    start(host="0.0.0.0", allow_open_proxy=True).stop()
    start(host="0.0.0.0", users={"anna": "sesame"}).stop()


@pytest.mark.parametrize(("keyword", "suggestion"), [
    ("interent", "did you mean 'internet'?"), ("idel_timeout", "did you mean 'idle_timeout'?"), ("setings", ""), ("shutdown", ""), ("_private", ""),
])
def test_a_setting_that_there_is_not_is_an_error(keyword: str, suggestion: str) -> None:
    with pytest.raises(TypeError, match=rf"start\(\) got an unexpected keyword '{keyword}'") as raised:
        start(**{keyword: 1})
    assert str(raised.value).endswith(suggestion or "help(Socks5Server) lists the settings")


def test_two_of_them_know_nothing_of_each_other(echo: EchoServer) -> None:
    with start() as one, start() as other, Client(one.address) as client:
        client.connect(echo.address)
        one.assert_used()
        other.assert_not_used()


# --- its address ---

def test_its_address_in_all_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://elsewhere")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("KEPT", "yes")
    with start() as proxy:
        url = f"socks5h://127.0.0.1:{proxy.port}"
        assert proxy.url == url
        assert proxy.proxies == {"http": url, "https": url}
        assert {key: value for key, value in proxy.env.items() if key.lower().endswith("_proxy")} == {"ALL_PROXY": url, "all_proxy": url}
        assert proxy.env["KEPT"] == "yes"
        assert proxy.user is None
        assert proxy.password is None


def test_the_url_has_the_login() -> None:
    with start(users={"anna": "se:s@me/"}) as proxy:
        assert proxy.url == f"socks5h://anna:se%3As%40me%2F@127.0.0.1:{proxy.port}"
        assert (proxy.user, proxy.password) == ("anna", "se:s@me/")
        with Client(proxy.address) as client:
            assert client.greet(2) == MethodSelection(2)
            assert client.login("anna", "se:s@me/").status == 0
        assert proxy.wait_for(closed=True)[0].user == "anna"
        assert "se:s@me/" not in repr(proxy) + proxy.report()


# --- where it leads ---

def test_a_name_has_the_address_that_the_test_gives_it(echo: EchoServer) -> None:
    with start(hosts={"api.example.com": LOCALHOST}) as proxy, Client(proxy.address) as client:
        client.connect(name("API.example.com.", echo.port))
        exchange(client)
        session = proxy.last()
        assert session.destination is not None
        assert session.destination.host == "API.example.com."
        assert session.destination.address_type is AddressType.DOMAINNAME
        proxy.assert_used("api.example.com", echo.port, times=1)


def test_a_name_may_lead_to_another_port_too(echo: EchoServer) -> None:
    with start(hosts={"api.example.com": echo.address, "192.0.2.1": echo.address}) as proxy:
        for host in ("api.example.com", "192.0.2.1"):
            with Client(proxy.address) as client:
                client.connect((host, 443))
                exchange(client)
        assert [str(session.destination) for session in proxy.sessions] == ["api.example.com:443", "192.0.2.1:443"]
        assert proxy.last().peer == Address.numeric(*echo.address)


@pytest.mark.parametrize("place", ["localhost", "", ("localhost", 80), ("127.0.0.1", "http"), ()])
def test_what_is_no_place_is_an_error_at_once(place: Any) -> None:
    with pytest.raises(ValueError, match=r"'a.example' has to be an IP address"):
        start(hosts={"a.example": place})


def test_rules_go_for_names_that_lead_to_another_port(echo: EchoServer) -> None:
    with start(hosts={"api.example.com": echo.address}, rules=["deny api.example.com"]) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, ("api.example.com", 443)).code is ReplyCode.NOT_ALLOWED


def test_a_name_that_the_test_does_not_know_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "look_up", lambda *_arguments: pytest.fail("it was"))
    with start(hosts={"api.example.com": LOCALHOST}) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, ("www.example.com", 80)).code is ReplyCode.HOST_UNREACHABLE
        assert "internet=True" in proxy.last().reason


@pytest.mark.parametrize(("command", "host"), [
    (Command.CONNECT, "192.0.2.1"), (Command.CONNECT, "2001:db8::1"), (Command.BIND, "192.0.2.1"),
])
def test_an_address_beyond_loopback_is_refused(proxy: Proxy, client: Client, command: Command, host: str) -> None:
    assert client.ask(command, (host, 80)).code is ReplyCode.NOT_ALLOWED
    assert "internet=True" in proxy.last().reason


def test_so_is_one_that_a_handler_of_the_test_gives_a_name() -> None:
    with start(handler_with(resolve=lambda _self, _host: ["192.0.2.1"])) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, ("www.example.com", 80)).code is ReplyCode.NOT_ALLOWED


def test_localhost_is_always_there(client: Client, echo: EchoServer) -> None:
    client.connect(name("localhost", echo.port))
    exchange(client)


def test_with_internet_it_leads_anywhere() -> None:
    asked: Any = []

    def connect(handler: Socks5Handler, request: Request) -> socket.socket:
        asked.append(handler._addresses(request, time.monotonic() + 5))
        raise RequestFailed(ReplyCode.TTL_EXPIRED)

    far = handler_with(connect=connect, resolve=lambda _self, host: asked.append(host) or ["192.0.2.1"])
    with start(far, internet=True) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, ("www.example.com", 80)).code is ReplyCode.TTL_EXPIRED
    assert asked == ["www.example.com", [Address.numeric("192.0.2.1", 80)]]


def test_an_address_that_the_test_gives_may_be_beyond_loopback() -> None:
    with start(hosts={"db.example.com": "192.0.2.1"}) as proxy:
        assert proxy._may_be_reached(Address.numeric("192.0.2.1", 80))
        assert not proxy._may_be_reached(Address.numeric("192.0.2.2", 80))


# --- through another one ---

def test_two_proxies_in_a_row_and_a_name_that_only_the_second_one_knows(echo: EchoServer) -> None:
    with start(hosts={"db.internal": LOCALHOST}, users={"anna": "sesame"}) as inner, start(upstream=inner.url) as outer, Client(outer.address) as client:
        client.connect(("db.internal", echo.port))
        exchange(client)
        for proxy in (inner, outer):
            proxy.assert_used("db.internal", echo.port, times=1)
        assert inner.last().user == "anna"


def test_a_handler_of_the_test_s_goes_through_another_one_too(echo: EchoServer) -> None:
    no_mail = handler_with(allow=lambda _self, _command, address: address.port != 25)
    with start() as inner, start(no_mail, upstream=inner.url) as outer:
        with Client(outer.address) as client:
            assert client.ask(Command.CONNECT, ("localhost", 25)).code is ReplyCode.NOT_ALLOWED
        with Client(outer.address) as client:
            client.connect(("localhost", echo.port))
        inner.assert_used(times=1)


@pytest.mark.parametrize("port", [80, None])
def test_the_first_one_may_have_names_of_its_own(echo: EchoServer, port: Any) -> None:
    place: Any = LOCALHOST if port is None else echo.address
    with start() as inner, start(hosts={"db.internal": place}, upstream=inner.url) as outer, Client(outer.address) as client:
        client.connect(("db.internal", port or echo.port))
        exchange(client)
        inner.assert_used(LOCALHOST, echo.port)
        outer.assert_used("db.internal", port or echo.port)


def test_a_fault_of_the_second_one_comes_to_the_client_of_the_first(echo: EchoServer) -> None:
    fault = socks5srv.testing.faults.ReplyWith(6)
    with start(faults=[fault]) as inner, start(upstream=inner.url) as outer, Client(outer.address) as client:
        assert client.ask(Command.CONNECT, echo.address).code is ReplyCode.TTL_EXPIRED


# --- what it tells ---

@pytest.mark.parametrize(("host", "code"), [(LOCALHOST, ReplyCode.SUCCEEDED), ("nowhere.example", ReplyCode.HOST_UNREACHABLE)])
def test_a_session_is_there_before_its_answer(proxy: Proxy, echo: EchoServer, host: str, code: ReplyCode) -> None:
    for number in range(1, 30):
        with Client(proxy.address) as client:
            assert client.ask(Command.CONNECT, (host, echo.port)).code is code
            proxy.assert_used(host, echo.port, times=number)
            assert proxy.last().reply is code
            assert proxy.last().peer == (Address.numeric(*echo.address) if code is ReplyCode.SUCCEEDED else None)


def test_the_octets_are_complete_when_it_is_closed(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    client.connect(echo.address)
    exchange(client, b"x" * 100_000)
    client.close()
    (session,) = proxy.wait_for(closed=True)
    assert (session.up, session.down) == (100_000, 100_000)
    assert session.seconds is not None


def test_to_wait_is_to_be_woken_by_the_answer(proxy: Proxy, echo: EchoServer) -> None:
    waited = in_thread(lambda: proxy.wait_for(2))
    for _ in range(2):
        with Client(proxy.address) as client:
            client.connect(echo.address)
    assert waited() == proxy.sessions


def test_to_wait_for_the_end_does_not_take_the_log_s_time(proxy: Proxy, echo: EchoServer) -> None:
    """The line of a session may be written 50 ms after its end; a test does not wait for that."""
    took: List[float] = []
    for _ in range(20):
        with Client(proxy.address) as client:
            client.connect(echo.address)
        began = time.perf_counter()
        proxy.wait_for(closed=True)
        took.append(time.perf_counter() - began)
        proxy.clear()
    assert statistics.median(took) < within(0.02)


def test_to_wait_in_vain_shows_the_sessions_that_there_were(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    client.connect(echo.address)
    with pytest.raises(AssertionError, match=rf"(?s)0 of 1 sessions for port {echo.port} closed within 0.01 s.*CONNECT 127.0.0.1:{echo.port}"):
        proxy.wait_for(1, 0.01, closed=True, port=echo.port)


def test_to_wait_looks_for_what_is_asked_for(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    client.ask(Command.CONNECT, ("nowhere.example", 80))
    with Client(proxy.address) as another:
        another.connect(echo.address)
        assert proxy.wait_for(port=echo.port) == [proxy.last()]


def test_a_coroutine_waits_while_others_go_on(proxy: Proxy, echo: EchoServer) -> None:
    async def talk() -> Any:
        waiting = asyncio.ensure_future(proxy.wait_for_async(2, port=echo.port))
        for _ in range(2):
            await asyncio.sleep(0)
            assert not waiting.done()
            with Client(proxy.address) as client:
                client.connect(echo.address)
        return await waiting

    began = time.monotonic()
    assert asyncio.run(talk()) == proxy.sessions
    assert time.monotonic() - began < within(0.5)       # and not when its seconds are over
    assert proxy.wakers == []


def test_a_coroutine_that_waits_in_vain_has_its_time_or_is_cancelled(proxy: Proxy) -> None:
    async def wait_in_vain() -> None:
        with pytest.raises(AssertionError, match=r"0 of 1 sessions for host a.example closed within 0.02 s\n.*0 sessions"):
            await proxy.wait_for_async(timeout=0.02, closed=True, host="a.example")
        waiting = asyncio.ensure_future(proxy.wait_for_async(timeout=60))
        await asyncio.sleep(0)
        assert len(proxy.wakers) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    began, busy = time.monotonic(), time.process_time()
    asyncio.run(wait_in_vain())
    assert 0.02 <= time.monotonic() - began < within(1)
    assert time.process_time() - busy < within(0.1)
    assert proxy.wakers == []


def test_a_loop_that_has_ended_in_the_middle_of_it_harms_nobody(proxy: Proxy, echo: EchoServer, bugs: Any) -> None:
    loop = asyncio.new_event_loop()
    waiting = proxy.wait_for_async()
    task = loop.create_task(waiting)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    with Client(proxy.address) as client:
        client.connect(echo.address)
    assert proxy.wait_for(closed=True)
    assert not bugs
    waiting.close()
    task._log_destroy_pending = False       # type: ignore[attr-defined]    # else asyncio complains of it


def test_sessions_can_be_found(echo: EchoServer) -> None:
    with start(users={"anna": "a", "ben": "b"}) as proxy:
        for user, command in [("anna", Command.CONNECT), ("ben", Command.UDP_ASSOCIATE)]:
            with Client(proxy.address) as client:
                client.greet(2)
                client.login(user, user[0])
                client.request(command, echo.address)
        one, other = proxy.sessions
        assert proxy.find(user="anna") == [one]
        assert proxy.find(command=Command.UDP_ASSOCIATE) == [other]
        assert proxy.find(host=LOCALHOST, port=echo.port) == [one, other]
        assert proxy.find(host="nowhere.example") == []
        proxy.assert_used(user="ben", command=Command.UDP_ASSOCIATE, times=1)


def test_a_wrong_assertion_shows_the_sessions_that_there_were(proxy: Proxy, echo: EchoServer) -> None:
    with pytest.raises(AssertionError, match="no client has connected"):
        proxy.last()
    with pytest.raises(AssertionError, match=r"never asked for host nowhere.example\n.* 0 sessions"):
        proxy.assert_used("nowhere.example")
    with Client(proxy.address) as client:
        client.connect(echo.address)
        with pytest.raises(AssertionError, match=rf"(?s)asked 1 times, not 2, for port {echo.port}.*1 session\n  #1 .* CONNECT"):
            proxy.assert_used(port=echo.port, times=2)
        with pytest.raises(AssertionError, match="was used"):
            proxy.assert_not_used()
        proxy.assert_not_used("nowhere.example")


def test_a_client_that_asks_for_nothing_has_come_but_has_not_used_it(proxy: Proxy, client: Client) -> None:
    client.greet()
    with pytest.raises(AssertionError):
        proxy.assert_used()
    with pytest.raises(AssertionError):
        proxy.assert_not_used()


def test_to_clear_is_to_forget(proxy: Proxy, client: Client, echo: EchoServer) -> None:
    proxy.inject(socks5srv.testing.faults.ReplyWith(5))
    assert client.ask(Command.CONNECT, echo.address).code == 5
    client.close()
    proxy.clear()
    proxy.assert_not_used()
    with Client(proxy.address) as another:
        another.connect(echo.address)


# --- what methods of the test's raise ---

class Mistake(Exception):
    pass


def raising(*_arguments: Any) -> Any:
    raise Mistake("in a method of the test's")


@pytest.mark.parametrize("method", ["allow", "resolve", "connect", "relay", "session_ended", "select_method", "perform"])
def test_what_a_method_raises_is_raised_by_stop(method: str, echo: EchoServer) -> None:
    proxy = start(handler_with(**{method: raising}))
    with Client(proxy.address) as client:
        client.send(b"\5\1\0", Request(Command.CONNECT, name("localhost", echo.port)))
        client.end()
        client.rest()
    proxy.close()
    assert len(proxy.errors) == 1
    with pytest.raises(Mistake) as raised:
        proxy.stop()
    assert raised.traceback[-1].name == "raising"
    proxy.stop()        # it has been told


def test_so_is_what_an_assertion_or_pytest_itself_raises(echo: EchoServer) -> None:
    proxy = start(handler_with(allow=lambda *_arguments: pytest.fail("not this one")))
    with Client(proxy.address) as client:
        client.send(b"\5\1\0", Request(Command.CONNECT, Address.numeric(*echo.address)))
        client.rest()
    with pytest.raises(pytest.fail.Exception, match="not this one"):
        proxy.stop()


def test_so_is_what_is_raised_for_a_datagram() -> None:
    def allow(_self: Any, command: Command, _address: Address) -> bool:
        return raising() if command is Command.UDP_ASSOCIATE else True

    proxy = start(handler_with(allow=allow))
    with Client(proxy.address) as client, udp_socket() as udp:
        bound = client.ask(Command.UDP_ASSOCIATE, (LOCALHOST, 0)).bound
        udp.sendto(b"\0\0\0\1\x7f\0\0\1\0\x50hello", bound[:2])
        eventually(lambda: proxy.errors)
    with pytest.raises(Mistake):
        proxy.stop()


def test_an_answer_is_no_mistake(echo: EchoServer) -> None:
    def refuse(*_arguments: Any) -> Any:
        raise RequestFailed(ReplyCode.TTL_EXPIRED, "too late")

    with start(handler_with(connect=refuse)) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, echo.address).code is ReplyCode.TTL_EXPIRED


def test_the_end_of_a_block_raises_it_too_even_if_the_block_has_failed_from_it(echo: EchoServer) -> None:
    with pytest.raises(Mistake) as raised, start(handler_with(connect=raising)) as proxy, Client(proxy.address) as client:
        assert client.ask(Command.CONNECT, echo.address).code is ReplyCode.SUCCEEDED
    assert isinstance(raised.value.__context__, AssertionError)


def test_but_not_over_ctrl_c(echo: EchoServer) -> None:
    def interrupted() -> None:
        with start(handler_with(connect=raising)) as proxy, Client(proxy.address) as client:
            client.ask(Command.CONNECT, echo.address)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_handler_of_the_test_s_keeps_its_name_and_its_methods(echo: EchoServer) -> None:
    ended: List[Any] = []

    class Telling(Socks5Handler):
        def session_ended(self) -> None:
            ended.append(self.session)

    proxy = start(Telling)
    with Client(proxy.address) as client:
        client.connect(echo.address)
    proxy.stop()
    assert ended == proxy.sessions
    assert Telling.__mro__[1] is Socks5Handler


def test_the_front_of_the_room_is_light_and_whole() -> None:
    assert socks5srv.testing.start is start
    assert socks5srv.testing.Proxy is Proxy
    assert socks5srv.testing.targets.EchoServer is EchoServer
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = socks5srv.testing.no_such_name
