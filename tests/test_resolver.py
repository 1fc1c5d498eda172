"""Names become addresses, in time."""

from __future__ import annotations

import select
import socket
import threading
import time

import pytest

from socks5srv import resolver
from socks5srv.outbound import ClientGone, failure
from socks5srv.protocol import ReplyCode, RequestFailed
from socks5srv.resolver import in_time

from .conftest import LOCALHOST, TIMEOUT, eventually, in_thread, set_reset, within


def soon(seconds=0.3):
    return time.monotonic() + seconds


@pytest.fixture(params=["poll", "select"])
def waiter(request, monkeypatch):
    """Both ways of waiting: the second is that of Windows."""
    if request.param == "select":
        monkeypatch.delattr(select, "poll")
    return request.param


@pytest.mark.parametrize(("host", "asked"), [
    ("localhost", b"localhost"), ("a..b", b"a..b"), ("a" * 64, b"a" * 64), ("127.1", b"127.1"), ("bücher.example", b"xn--bcher-kva.example"),
    ("日本.example", b"xn--wgv71a.example"), ("::1", b"::1"),
])
def test_the_resolver_is_asked_with_octets(monkeypatch, host, asked):
    """E15: a str would go through Python's IDNA codec, which takes offence at a..b and long labels."""
    def getaddrinfo(*arguments):
        assert arguments == (asked, None, socket.AF_INET6, socket.SOCK_STREAM)
        return [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert resolver.look_up(host, socket.AF_INET6) == ["::1", "127.0.0.1"]


@pytest.mark.parametrize("host", ["ä..b", "ä" * 64, "ä." + "b" * 64, "\u2028"], ids=ascii)
def test_a_name_that_idna_cannot_spell_is_a_unicode_error(host):
    with pytest.raises(UnicodeError):
        resolver.look_up(host)


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433"])
def test_the_resolver_reads_numbers_as_the_c_library_does(host):
    """E17: which is why rules have to see its answer."""
    assert resolver.look_up(host, socket.AF_INET) == [LOCALHOST]


@pytest.mark.usefixtures("waiter")
def test_a_look_up_in_time_has_its_answer_or_its_error(connection):
    assert in_time(lambda host: [host], "127.0.0.1", connection, soon(TIMEOUT)) == ["127.0.0.1"]

    def fail(host):
        raise socket.gaierror(socket.EAI_NONAME, host)

    with pytest.raises(socket.gaierror, match=r"x\.invalid"):
        in_time(fail, "x.invalid", connection, soon(TIMEOUT))


@pytest.fixture
def hanging():
    """A look-up that hangs until the test is over; `asked` is set once it does."""
    release = threading.Event()

    def look_up(_host):
        look_up.asked.set()
        release.wait(TIMEOUT)
        return ["127.0.0.1"]

    look_up.asked = threading.Event()
    yield look_up
    release.set()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "socks5srv-lookup"])


@pytest.mark.usefixtures("waiter")
def test_a_look_up_that_takes_too_long_is_given_up(connection, hanging):
    """E5, and the deadline of CONNECT: nothing can cancel getaddrinfo()."""
    began = time.monotonic()
    with pytest.raises(RequestFailed, match="took too long") as caught:
        in_time(hanging, "x.invalid", connection, soon(0.1))
    assert caught.value.code is ReplyCode.HOST_UNREACHABLE
    assert time.monotonic() - began < within(1)


def test_a_look_up_is_given_up_when_the_client_goes(pair, hanging):
    client, connection = pair
    waiting = in_thread(in_time, hanging, "x.invalid", connection, soon(TIMEOUT))
    assert hanging.asked.wait(TIMEOUT)
    set_reset(client)
    client.close()
    with pytest.raises(ClientGone):
        waiting()


def test_without_a_thread_to_be_had_a_look_up_is_a_failure(monkeypatch, connection):
    """M: the thread limit."""
    def start(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="thread") as caught:
        in_time(resolver.look_up, "localhost", connection, soon(TIMEOUT))
    assert failure(caught.value, "it").code is ReplyCode.GENERAL_FAILURE
