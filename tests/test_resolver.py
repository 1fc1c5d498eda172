"""Names become addresses, in time."""

from __future__ import annotations

import queue
import socket
import threading
import time

import pytest

from socks5srv import resolver
from socks5srv.outbound import ClientGone, failure
from socks5srv.protocol import ReplyCode
from socks5srv.resolver import LookUp, LookUps, in_time

from .conftest import LOCALHOST, TIMEOUT, eventually, fails_with, in_thread, reset, soon, within


@pytest.mark.parametrize(("host", "asked"), [
    ("localhost", b"localhost"), ("a..b", b"a..b"), ("a" * 64, b"a" * 64), ("127.1", b"127.1"), ("bücher.example", b"xn--bcher-kva.example"),
    ("日本.example", b"xn--wgv71a.example"), ("::1", b"::1"), ("faß.test", b"xn--fa-hia.test"), ("faß.test.", b"xn--fa-hia.test."),
])
def test_the_resolver_is_asked_with_octets(monkeypatch, host, asked):
    """E15: a str would go through Python's IDNA codec, which takes offence at a..b and long labels, and makes faß fass."""
    def getaddrinfo(*arguments):
        assert arguments == (asked, None, socket.AF_INET6, socket.SOCK_STREAM)
        return [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert resolver.look_up(host, socket.AF_INET6) == ["::1", "127.0.0.1"]


@pytest.mark.parametrize("host", ["ä..b", "ä" * 64, "ä." + "b" * 64, "\u2028", "\uff1a\uff1a1", "fe80\uff1a\uff1a1\uff05lo"], ids=ascii)
def test_a_name_that_idna_cannot_spell_is_a_unicode_error(host):
    with pytest.raises(UnicodeError):
        resolver.look_up(host)


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433"])
def test_the_resolver_reads_numbers_as_the_c_library_does(host):
    """E17: which is why rules have to see its answer."""
    assert resolver.look_up(host, socket.AF_INET) == [LOCALHOST]


@pytest.mark.parametrize(("host", "found", "asked"), [
    ("web.example", LOCALHOST, ["web.example"]), ("WEB.Example", LOCALHOST, ["WEB.Example"]), ("web.example.", LOCALHOST, ["web.example."]),
    ("www.example\u3002", LOCALHOST, ["www.example."]),
    ("www.example", LOCALHOST, ["www.example", "www.example."]),        # an alias
    ("nas", LOCALHOST, ["nas"]), ("twice", LOCALHOST, ["twice", "twice."]),
    ("printer", None, ["printer", "printer."]), ("secret", None, ["secret", "secret."]), ("moved", None, ["moved", "moved."]),
    ("secret.", None, ["secret."]), ("nothing", None, ["nothing"]),
])
def test_a_name_is_looked_up_as_it_is_or_not_at_all(names, host, found, asked):
    if found is None:
        with pytest.raises(socket.gaierror) as error:
            resolver.look_up_as_it_is(host)
        assert error.value.errno in resolver.NO_SUCH_NAME
    else:
        assert resolver.look_up_as_it_is(host) == [found]
    assert names.asked == asked


@pytest.mark.usefixtures("names")
def test_the_reason_tells_what_the_system_would_have_made_of_it():
    with pytest.raises(socket.gaierror, match=r"it is short for secret\.corp\.example, and rules judge names as they are asked for"):
        resolver.look_up_as_it_is("secret")


@pytest.mark.parametrize("host", ["localhost", "127.1"])
def test_names_of_this_computer_and_numbers_are_as_they_are(host):
    assert resolver.look_up_as_it_is(host, socket.AF_INET) == [LOCALHOST]


@pytest.mark.usefixtures("poll_or_select")
def test_a_look_up_in_time_has_its_answer_or_its_error(connection):
    assert in_time(LookUp(lambda host: [host], "127.0.0.1"), connection, soon(TIMEOUT)) == ["127.0.0.1"]

    def fail(host):
        raise socket.gaierror(socket.EAI_NONAME, host)

    with pytest.raises(socket.gaierror, match=r"x\.invalid"):
        in_time(LookUp(fail, "x.invalid"), connection, soon(TIMEOUT))


@pytest.fixture
def hanging():
    """A look-up that hangs until the test is over; `asked` is set once it does."""
    def look_up(host):
        look_up.hosts.append(host)
        look_up.asked.set()
        look_up.release.wait(TIMEOUT)
        return ["127.0.0.1"]

    look_up.asked, look_up.release, look_up.hosts = threading.Event(), threading.Event(), []
    yield look_up
    look_up.release.set()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "socks5srv-lookup"])


@pytest.mark.usefixtures("poll_or_select")
def test_a_look_up_that_takes_too_long_is_given_up(connection, hanging):
    """E5, and the deadline of CONNECT: nothing can cancel getaddrinfo()."""
    began = time.monotonic()
    with fails_with(ReplyCode.HOST_UNREACHABLE, "took too long"):
        in_time(LookUp(hanging, "x.invalid"), connection, soon(0.1))
    assert time.monotonic() - began < within(1)


def test_a_look_up_is_given_up_when_the_client_goes(pair, hanging):
    client, connection = pair
    waiting = in_thread(in_time, LookUp(hanging, "x.invalid"), connection, soon(TIMEOUT))
    assert hanging.asked.wait(TIMEOUT)
    reset(client)
    with pytest.raises(ClientGone):
        waiting()


def test_without_a_thread_to_be_had_a_look_up_is_a_failure(monkeypatch, connection):
    """M: the thread limit."""
    def start(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="thread") as caught:
        in_time(LookUp(resolver.look_up, "localhost"), connection, soon(TIMEOUT))
    assert failure(caught.value, "it").code is ReplyCode.GENERAL_FAILURE


# --- places ---

CLIENT = "192.0.2.1"


@pytest.fixture
def look_ups(monkeypatch):
    """Places for four look-ups, of which one client may have two."""
    found = LookUps()
    found.most, found.share = 4, 2
    monkeypatch.setattr(resolver, "look_ups", found)
    return found


@pytest.fixture
def answers():
    return queue.SimpleQueue()


@pytest.fixture
def used_up(look_ups, hanging, answers):
    """The same, and `CLIENT` has its share: its two places are taken."""
    for number in range(2):
        look_ups.begin(LookUp(hanging, f"{number}.invalid", CLIENT), answers.put)
    return look_ups


def test_one_client_has_its_share_and_leaves_the_rest_to_the_others(look_ups, hanging, answers):
    for number in range(5):
        look_ups.begin(LookUp(hanging, f"{number}.invalid", CLIENT), answers.put)
    assert (look_ups.total, len(look_ups.queue)) == (2, 3)
    look_ups.begin(LookUp(lambda host: [host], "here.invalid", "192.0.2.2"), answers.put)
    assert answers.get(timeout=TIMEOUT).hosts == ["here.invalid"]


def test_the_places_of_all_are_bounded(look_ups, hanging, answers):
    for client in range(9):
        look_ups.begin(LookUp(hanging, "x.invalid", f"192.0.2.{client}"), answers.put)
    eventually(lambda: len(hanging.hosts) == 4)
    assert (look_ups.total, len(look_ups.queue)) == (4, 5)
    hanging.release.set()
    assert [answers.get(timeout=TIMEOUT).host for _ in range(9)] == ["x.invalid"] * 9
    eventually(lambda: look_ups.total == 0)
    assert not look_ups.running
    assert not look_ups.queue


def test_who_waits_longest_has_the_next_place_unless_the_clients_share_is_used_up(used_up, hanging, answers):
    asked, release = [], threading.Event()

    def second(host):
        asked.append(host)
        release.wait(TIMEOUT)
        return []

    for number, client in enumerate("2345"):
        used_up.begin(LookUp(second, f"{number}.invalid", f"192.0.2.{client}"), answers.put)
    used_up.begin(LookUp(second, "late.invalid", CLIENT), answers.put)
    used_up.begin(LookUp(second, "last.invalid", "192.0.2.6"), answers.put)
    eventually(lambda: len(asked) == 2)
    release.set()
    for _ in range(5):
        answers.get(timeout=TIMEOUT)
    assert sorted(asked) == ["0.invalid", "1.invalid", "2.invalid", "3.invalid", "last.invalid"]
    hanging.release.set()
    for _ in range(3):
        answers.get(timeout=TIMEOUT)
    assert asked[-1] == "late.invalid"


def test_a_name_that_is_being_looked_up_needs_no_second_place(look_ups, hanging, answers):
    for client in range(20):
        look_ups.begin(LookUp(hanging, "x.invalid", f"192.0.2.{client}", name="x"), answers.put)
    assert (look_ups.total, len(look_ups.queue)) == (1, 0)
    hanging.release.set()
    assert [answers.get(timeout=TIMEOUT).hosts for _ in range(20)] == [["127.0.0.1"]] * 20
    assert hanging.hosts == ["x.invalid"]
    assert not look_ups.named


def test_those_that_wait_for_a_place_with_the_same_name_are_answered_together(used_up, hanging, answers):
    asked = []

    def look_up(host):
        asked.append(host)
        return []

    for _ in range(5):
        used_up.begin(LookUp(look_up, "x.invalid", CLIENT, name="x"), answers.put)
    assert len(used_up.queue) == 5
    hanging.release.set()
    for _ in range(7):
        answers.get(timeout=TIMEOUT)
    assert 1 <= len(asked) <= 2         # two places have become free


@pytest.mark.usefixtures("used_up")
@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "127.0.0.1"])
def test_a_number_needs_no_place(host, connection):
    look_up = LookUp(lambda host: resolver.look_up(host, socket.AF_INET), host, CLIENT, name=host)
    assert in_time(look_up, connection, soon(TIMEOUT)) == [LOCALHOST]


def test_an_impatient_look_up_without_a_place_is_an_error(used_up, hanging, answers):
    with pytest.raises(OSError, match="too many"):
        used_up.begin(LookUp(hanging, "x.invalid", CLIENT), answers.put, patient=False)
    assert not used_up.queue


@pytest.mark.usefixtures("poll_or_select")
def test_waiting_for_a_place_ends_at_the_deadline_and_leaves_the_queue(used_up, hanging, connection):
    with fails_with(ReplyCode.GENERAL_FAILURE, "too many"):
        in_time(LookUp(hanging, "x.invalid", CLIENT), connection, soon(0.05))
    assert not used_up.queue


def test_a_client_that_goes_leaves_the_queue(used_up, hanging, pair):
    client, connection = pair
    waiting = in_thread(in_time, LookUp(hanging, "x.invalid", CLIENT), connection, soon(TIMEOUT))
    eventually(lambda: used_up.queue)
    reset(client)
    with pytest.raises(ClientGone):
        waiting()
    assert not used_up.queue


def test_a_look_up_that_cannot_start_when_its_turn_comes_is_a_failure(used_up, hanging, connection, monkeypatch):
    waiting = in_thread(in_time, LookUp(hanging, "x.invalid", CLIENT), connection, soon(TIMEOUT))
    eventually(lambda: used_up.queue)
    monkeypatch.setattr(resolver.descriptors, "room", 0)
    hanging.release.set()
    with fails_with(ReplyCode.GENERAL_FAILURE, "used up"):
        waiting()


def test_without_descriptors_to_be_had_a_look_up_is_a_failure(monkeypatch, connection):
    monkeypatch.setattr(resolver.descriptors, "room", 0)
    with fails_with(ReplyCode.GENERAL_FAILURE, "used up"):
        in_time(LookUp(resolver.look_up, "localhost"), connection, soon(TIMEOUT))
