"""
What a client can fill has a bound, and what it can hold is counted.

Two questions, each asked of all places: the containers that the source has (containers.py finds them), and the calls
in it that open a descriptor.  A new one has to be entered here, with what bounds it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import ExitStack
from io import FileIO
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from socks5srv import datagrams, protocol
from socks5srv import server as server_module
from socks5srv.handler import EARLY, Socks5Handler
from socks5srv.names import normal
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, ReplyCode, Request
from socks5srv.relay import PIPES, Pipes
from socks5srv.resolver import LookUp, LookUps
from socks5srv.service import banner, conversations, explaining_udp, pcap, program, worker
from socks5srv.service.conversations import Conversations
from socks5srv.service.explaining import explained
from socks5srv.session import Session
from socks5srv.users import REMEMBERED, Guessing

from .conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange, handler_with, name, needs_ipv6
from .containers import PACKAGE, containers, openings
from .test_datagrams import UdpSocket, associate, new_socket

__all__ = ["associate", "new_socket"]       # fixtures

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not on this platform: the descriptors of another process")

# What bounds a container that no client can fill without end by itself.
FIXED = "it is made once, or by the options, and no client adds to it"
CLIENTS = "an entry for each client that is being served, and as many are served as there may be"
ANSWER = "one answer of the resolver, or one message, and it goes with that"
WORKERS = "an entry for each worker"
USERS = "an entry for each user"
FILLED = "see the test that fills it"

PLACES: Dict[str, str] = {
    "__init__.py:HOMES": FIXED, "__init__.py:__all__": FIXED,
    "datagrams.py:Association.contacted": FILLED, "datagrams.py:Association.dead": FILLED, "datagrams.py:Association.headers": FILLED,
    "datagrams.py:Association.looking_up": FILLED, "datagrams.py:Association.outer": "one for each family",
    "datagrams.py:Association.stale": "what Association.targets had before", "datagrams.py:Association.targets": FILLED,
    "datagrams.py:Fragments.parts": FILLED,
    "descriptors.py:COMMANDS": FIXED,
    "explain.py:AFTER": FIXED, "explain.py:Exhibit.fields": ANSWER, "explain.py:Exhibit.remarks": ANSWER, "explain.py:HIDDEN": FIXED,
    "explain.py:Row.meanings": ANSWER,
    "handler.py:AUTH": FIXED, "handler.py:ClientStream.buffer": FILLED, "handler.py:DO": FIXED,
    "listener.py:Listener.threads": CLIENTS, "listener.py:OUT_OF": FIXED,
    "meanings.py:COMMAND_WORDS": FIXED, "meanings.py:DEVIATIONS": FIXED, "meanings.py:KINDS": FIXED, "meanings.py:Kind.sizes": FIXED,
    "meanings.py:MEANINGS": FIXED, "meanings.py:METHOD_WORDS": FIXED, "meanings.py:REPLIES": FIXED, "meanings.py:SENTENCES": FIXED,
    "meanings.py:TYPE_WORDS": FIXED,
    "names.py:JOINERS": FIXED, "names.py:normal": FILLED,
    "outbound.py:MOST_TELLING": FIXED, "outbound.py:NOBODYS": FIXED, "outbound.py:NO_SUCH_FAMILY": FIXED, "outbound.py:OWN": FIXED,
    "outbound.py:REPLY_CODES": FIXED, "outbound.py:kernel_answers": "it has no arguments",
    "outbound.py:Race.failures": ANSWER, "outbound.py:Race.met_itself": ANSWER,
    "outbound.py:Race.running": ANSWER, "outbound.py:Race.waiting": ANSWER, "outbound.py:UNDER_WAY": FIXED,
    "places.py:Places.networks": CLIENTS,
    "protocol.py:CODES": FIXED, "protocol.py:COMMANDS": FIXED, "protocol.py:LOOPBACK": FIXED, "protocol.py:METHODS": FIXED,
    "protocol.py:REPLY_CODES": FIXED, "protocol.py:code_field": FILLED,
    "relay.py:Pipes.all": FILLED, "relay.py:Pipes.free": "of Pipes.all", "relay.py:Relay.bulky": CLIENTS,
    "relay.py:Relay.calls": "the relay thread, which never waits, empties it at each turn", "relay.py:Relay.impatient": CLIENTS,
    "relay.py:Relay.watched": CLIENTS, "relay.py:TUNING": FIXED, "relay.py:WORDS": FIXED,
    "resolver.py:LookUp.waiting": CLIENTS, "resolver.py:LookUps.named": FILLED, "resolver.py:LookUps.queue": CLIENTS,
    "resolver.py:LookUps.running": FILLED, "resolver.py:NO_SUCH_NAME": FIXED,
    "rules.py:METADATA": FIXED,
    "server.py:Socks5Server.ended": FILLED, "server.py:Socks5Server.handshakes": CLIENTS, "server.py:Socks5Server.hosts": CLIENTS,
    "server.py:Socks5Server.listeners": FIXED, "server.py:Socks5Server.live": CLIENTS, "server.py:News.kinds": FILLED,
    "server.py:Socks5Server.relays": FIXED, "server.py:Socks5Server.udp_relays": CLIENTS, "server.py:is_loopback": FILLED,
    "service/banner.py:Tally.clients": FILLED, "service/banner.py:Tally.events": FIXED, "service/banner.py:Tally.failures": FILLED,
    "service/banner.py:Tally.octets": FILLED, "service/banner.py:WITH_A_LOGIN": FIXED,
    "service/conversations.py:Conversation.steps": FILLED, "service/conversations.py:Conversations.kept": FILLED,
    "service/cores.py:OneCore.cores": FIXED,
    "service/explaining.py:CLASSES": FIXED, "service/explaining.py:Explaining.findings": ANSWER,
    "service/explaining.py:Explaining.judgements": FILLED, "service/explaining.py:Explaining.tries": ANSWER,
    "service/explaining.py:Overheard.heard": ANSWER, "service/explaining.py:WatchedRoute.tries": ANSWER,
    "service/explaining_udp.py:CLASSES": FIXED, "service/explaining_udp.py:OverheardAssociation.refused": FILLED,
    "service/explaining_udp.py:SOCKETS": FIXED, "service/explaining_udp.py:Teller.noted": FILLED,
    "service/figures.py:Book.live": CLIENTS, "service/figures.py:Book.rates_each": CLIENTS, "service/figures.py:Book.seen_each": CLIENTS,
    "service/figures.py:Figures.counts": "its keys are of closed sets", "service/figures.py:HANG_UPS": FIXED,
    "service/figures.py:Histogram.counts": FIXED, "service/figures.py:Report.live": FIXED, "service/figures.py:Report.sessions": CLIENTS,
    "service/gathering.py:WatchedWorkers.awaited": WORKERS, "service/gathering.py:WatchedWorkers.found": ANSWER,
    "service/gathering.py:WatchedWorkers.recent": WORKERS, "service/gathering.py:WatchedWorkers.told": WORKERS,
    "service/keys.py:KEYS": FIXED, "service/keys.py:NUMBERS": FIXED, "service/log.py:COLORS": FIXED, "service/metrics.py:COUNTERS": FIXED,
    "service/pcap.py:Recording.notes": FILLED, "service/pcap.py:way_to": FILLED,
    "service/program.py:Contacts.places": FILLED, "service/reasons.py:CLIENTS": FIXED,
    "service/run.py:ServiceServer.calls": "what is typed at the terminal", "service/selftest.py:TESTS": FIXED,
    "service/status.py:FILES": FIXED, "service/status.py:HEADERS": FIXED,
    "service/status.py:HttpServer.connections": "WATCHERS and REQUESTS; test_status.py fills it", "service/status.py:HttpServer.threads":
    "of HttpServer.connections", "service/status.py:HttpServer.silent": "of HttpServer.connections", "service/status.py:HttpServer.busy": "of HttpServer.connections", "service/status.py:Pulse.history": "a deque with a length",
    "service/worker.py:HandedUsers.gone": USERS, "service/worker.py:HandedUsers.verified": USERS,
    "service/worker.py:Line.incoming": "one message, and what one recv() brings", "service/worker.py:Line.outgoing": FILLED,
    "service/worker.py:Orders.failures": "what Guessing.failures has", "service/worker.py:Orders.listeners": FIXED,
    "service/worker.py:Orders.relays": CLIENTS, "service/worker.py:WorkerServer.answers": CLIENTS,
    "service/worker.py:WorkerServer.sockets": FIXED, "service/workers.py:Worker.hosts": CLIENTS, "service/workers.py:Worker.relays": CLIENTS,
    "service/workers.py:Workers.places": WORKERS,
    "session.py:COMMAND_WORDS": FIXED, "upstream.py:ChainedAssociation.outer": "one towards the upstream, and its control connection",
    "users.py:Guessing.failures": FILLED, "users.py:Guessing.trying": CLIENTS, "users.py:Guessing.waiting": CLIENTS, "users.py:UsersFile.verified": USERS,
}
NOT_A_SERVER = ("testing/", "check.py", "client.py")        # what tests and clients use


def test_whatever_can_hold_more_than_one_thing_is_known_to_be_bounded() -> None:
    found = {place for place in containers() if not place.startswith(NOT_A_SERVER)}
    assert found - set(PLACES) == set(), "what bounds it? Enter that above, and fill it in a test if a client can"
    assert set(PLACES) - found == set(), "these are no more"


Filled = Dict[str, Tuple[int, int]]         # how full a place has become, and its bound
Fill = Callable[["Filling"], Filled]
FILLS: Dict[Fill, Tuple[str, ...]] = {}


def fills(*places: str) -> Callable[[Fill], Fill]:
    """Enter a function that fills these places."""
    def enter(function: Fill) -> Fill:
        FILLS[function] = places
        return function

    return enter


class Filling:
    """What those that fill have at hand."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.get = request.getfixturevalue
        self.patch: pytest.MonkeyPatch = self.get("monkeypatch")

    def association(self, server: Any) -> datagrams.Association:
        return next(w.association for w in server.relays[0].watched.values() if isinstance(w, datagrams.Inner))


def session_of(number: int) -> Session:
    session = Session(number, Address.numeric(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 1))
    session.command, session.destination = Command.CONNECT, name(f"{number}.invalid", 80)
    session.end("for a test")
    return session


@fills("datagrams.py:Association.contacted", "datagrams.py:Association.headers", "datagrams.py:Association.targets", "datagrams.py:Association.dead")
def hosts_and_headers(filling: Filling) -> Filled:
    filling.patch.setattr(datagrams, "REMEMBERED", 20)
    allowed = handler_with(allow=lambda _self, _command, address: address.port != 9)
    server = filling.get("start_server")(handler=allowed)
    client, last = filling.get("associate")(server), filling.get("new_socket")()
    with ExitStack() as stack:
        for number in range(2, 60):
            host = stack.enter_context(UdpSocket(f"127.0.0.{number}").socket) if os.name != "darwin" else filling.get("new_socket")().socket
            target = Address.of(host.getsockname())
            client.send_to(target, b"?")
            host.sendto(b"!", host.recvfrom(9)[1])
            assert client.answer().address == target
            client.send_to(Address.numeric(f"127.0.1.{number}", 9), b"refused")
    client.echo(last)
    found = filling.association(server)
    return {
        f"datagrams.py:Association.{table}": (len(getattr(found, table)), 20) for table in ("contacted", "headers", "targets", "dead")
    }


@fills("datagrams.py:Association.looking_up")
def names_for_datagrams(filling: Filling) -> Filled:
    release = threading.Event()

    def slow(_self: Any, _host: str) -> List[str]:
        release.wait(TIMEOUT)
        return []

    server = filling.get("start_server")(handler=handler_with(resolve=slow))
    client, last = filling.get("associate")(server), filling.get("new_socket")()
    for number in range(200):
        client.send_to(name(f"{number % 40}.invalid", 7), b"x")
        if number % 20 == 0:
            client.echo(last)
    client.echo(last)
    found = filling.association(server)
    assert sum(map(len, found.looking_up.values())) <= datagrams.QUEUED
    size = len(found.looking_up)
    release.set()
    return {"datagrams.py:Association.looking_up": (size, datagrams.LOOK_UPS)}


@fills("datagrams.py:Fragments.parts")
def fragments(_filling: Filling) -> Filled:
    found = datagrams.Fragments()
    most = 0
    for frag in range(1, 128):
        found.add(Datagram(UNSPECIFIED, b"", frag), bytes(2000))
        most = max(most, sum(len(part.data) for part in found.parts))
    return {"datagrams.py:Fragments.parts": (most, protocol.DATAGRAM_MAX + 2000)}


@fills("handler.py:ClientStream.buffer")
def what_a_client_sends_ahead(filling: Filling) -> Filled:
    handlers: List[Socks5Handler] = []

    class Kept(Socks5Handler):
        def setup(self) -> None:
            super().setup()
            handlers.append(self)

    server = filling.get("start_server")(handler=Kept)
    client = filling.get("new_client")(server)
    client.ask(Command.BIND, UNSPECIFIED)
    client.socket.setblocking(False)
    sent = 0
    try:
        while sent < 64 * EARLY:
            sent += client.socket.send(bytes(EARLY))
    except BlockingIOError:
        pass
    eventually(lambda: len(handlers[0].stream.buffer) >= EARLY)
    return {"handler.py:ClientStream.buffer": (len(handlers[0].stream.buffer), EARLY + 4096)}


@fills("protocol.py:code_field")
def codes(_filling: Filling) -> Filled:
    for code in range(256):
        for kind in ("METHOD", "CMD", "REP", "ATYP"):
            protocol.code_field(kind, code)
    return {"protocol.py:code_field": (protocol.code_field.cache_info().currsize, 4 * 256)}


@fills("server.py:is_loopback")
def loopback_addresses(_filling: Filling) -> Filled:
    for number in range(3000):
        server_module.is_loopback(f"127.1.{number >> 8}.{number & 255}")
    return {"server.py:is_loopback": (server_module.is_loopback.cache_info().currsize, 1024)}


@fills("names.py:normal")
def names_that_are_compared(_filling: Filling) -> Filled:
    for number in range(1000):
        normal(f"{number}.invalid")
    return {"names.py:normal": (normal.cache_info().currsize, 256)}


@fills("service/pcap.py:way_to")
def ways(_filling: Filling) -> Filled:
    for number in range(5000):
        pcap.way_to(f"127.2.{number >> 8}.{number & 255}")
    return {"service/pcap.py:way_to": (pcap.way_to.cache_info().currsize, 4096)}


@fills("relay.py:Pipes.all")
def pipes(_filling: Filling) -> Filled:
    if not hasattr(os, "splice"):
        return {"relay.py:Pipes.all": (0, 0)}
    found = Pipes()
    for _ in range(3 * PIPES):
        found.take()
    size = len(found.all)
    found.close()
    return {"relay.py:Pipes.all": (size, PIPES)}


@fills("resolver.py:LookUps.named", "resolver.py:LookUps.running")
def places_for_look_ups(_filling: Filling) -> Filled:
    found, release = LookUps(), threading.Event()
    answered: deque[LookUp] = deque()
    found.most, found.share = 8, 8
    for number in range(50):
        found.begin(LookUp(lambda _host: release.wait(TIMEOUT) and [], "x", f"{number}", number), answered.append)
    sizes = len(found.named), len(found.running)
    release.set()
    eventually(lambda: len(answered) == 50 and not found.total)
    return {"resolver.py:LookUps.named": (sizes[0], 8), "resolver.py:LookUps.running": (sizes[1], 8)}


@fills("server.py:Socks5Server.ended")
def sessions_to_be_told_of(filling: Filling) -> Filled:
    filling.patch.setattr(server_module, "MOST_ENDED", 5)
    stuck = threading.Event()

    class Stuck(Socks5Handler):
        def session_ended(self) -> None:
            stuck.wait(TIMEOUT)
            super().session_ended()

    server = filling.get("start_server")(handler=Stuck)
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(Client(server.server_address)).close()
        eventually(lambda: len(server.ended) > 5)
        threading.Event().wait(0.2)         # in which a server without a bound takes all of them
        size = len(server.ended)
        stuck.set()
        for _ in range(40):
            server.next_ended()
    return {"server.py:Socks5Server.ended": (size, 5 + 1 + 5)}      # and those that were at accept() by then


@fills("server.py:News.kinds")
def kinds_of_trouble(filling: Filling) -> Filled:
    server = filling.get("start_server")()
    for number in range(3000):
        server.left_out(f"kind {number}")
    return {"server.py:News.kinds": (len(server.news.kinds), server_module.KINDS)}


@fills("service/banner.py:Tally.clients", "service/banner.py:Tally.octets", "service/banner.py:Tally.failures")
def the_summary(filling: Filling) -> Filled:
    filling.patch.setattr(banner, "MOST", 100)
    tally, other = banner.Tally(), banner.Tally()
    for number in range(300):
        session = session_of(number)
        tally.add(session)
        session.reply = ReplyCode.SUCCEEDED
        other.add(session)
        other.add(session_of(1000 + number))
    tally.merge(other)
    assert "from at least 100 clients" in str(tally)
    return {f"service/banner.py:Tally.{table}": (len(getattr(tally, table)), 100) for table in ("clients", "octets", "failures")}


@fills("service/program.py:Contacts.places")
def contacts(_filling: Filling) -> Filled:
    found = program.Contacts()
    for number in range(3 * program.PLACES):
        found.add(session_of(number))
    return {"service/program.py:Contacts.places": (len(found.places), program.PLACES + 20)}


@fills("service/conversations.py:Conversations.kept", "service/conversations.py:Conversation.steps")
def conversations_and_steps(_filling: Filling) -> Filled:
    found = Conversations()
    for number in range(3 * conversations.KEPT):
        conversation = found.open(session_of(number))
    for _ in range(3 * conversations.STEPS):
        conversation.add("client", "proxy", "x" * 9999)
    return {
        "service/conversations.py:Conversations.kept": (len(found.kept), conversations.KEPT),
        "service/conversations.py:Conversation.steps": (len(conversation.steps), conversations.STEPS),
    }


@fills("service/explaining_udp.py:OverheardAssociation.refused", "service/explaining_udp.py:Teller.noted", "service/explaining.py:Explaining.judgements")
def datagrams_that_are_explained(filling: Filling) -> Filled:
    filling.patch.setattr(explaining_udp, "REMEMBERED", 20)
    shown = threading.Event()

    class Slow(explained(handler_with(allow=lambda _self, _command, address: address.host != "127.0.1.1"))):      # type: ignore[misc]
        def show(self, _exhibit: Any) -> None:
            if threading.current_thread().name == "socks5srv-explain":
                shown.wait(TIMEOUT)

    server = filling.get("start_server")(handler=Slow)
    client, last = filling.get("associate")(server), filling.get("new_socket")()
    filling.patch.setattr(explaining_udp, "MOST", 10**6)
    for number in range(600):
        client.send_to(Address.numeric("127.0.1.1", 2000 + number), b"x")
        if number == 300:
            filling.patch.setattr(explaining_udp, "MOST", 0)        # from now on none is shown
        if number % 50 == 0:
            client.send_to(last.address, b"x")
            last.receive()
    found: Any = filling.association(server)
    sizes = len(found.refused), found.teller.noted.qsize(), len(found.handler.judgements)
    shown.set()
    return {
        "service/explaining_udp.py:OverheardAssociation.refused": (sizes[0], 21),
        "service/explaining_udp.py:Teller.noted": (sizes[1], explaining_udp.BACKLOG + 1),
        "service/explaining.py:Explaining.judgements": (sizes[2], 2),
    }


@fills("service/pcap.py:Recording.notes")
def a_recording(filling: Filling) -> Filled:
    filling.patch.setattr(pcap, "MOST", 10_000)
    filling.patch.setattr(pcap, "PATIENCE", 0.05)
    reader, writer = os.pipe()
    recording = pcap.Recording(FileIO(writer, "w"))
    held = 0
    for _ in range(200):
        recording.note(pcap.udp, Address.numeric(LOCALHOST, 1), Address.numeric(LOCALHOST, 2), bytes(5000), octets=5000)
        held = max(held, len(recording.notes))
    os.close(reader)
    recording.close()
    filling.get("bugs").clear()         # it has told that nobody reads
    return {"service/pcap.py:Recording.notes": (held, 3)}


@fills("service/worker.py:Line.outgoing")
def a_line(filling: Filling) -> Filled:
    filling.patch.setattr(worker, "ENOUGH", 1000)
    ours, theirs = socket.socketpair()
    line = worker.Line(ours)
    with theirs:
        for _ in range(20_000):
            line.hint("failed", "192.0.2.1")
        size = len(line.outgoing)
        line.close()
    return {"service/worker.py:Line.outgoing": (size, 1100)}


@fills("users.py:Guessing.failures")
def guessing(_filling: Filling) -> Filled:
    found = Guessing()
    for number in range(REMEMBERED + 500):
        found.failed(f"host {number}")
    return {"users.py:Guessing.failures": (len(found.failures), REMEMBERED)}


@pytest.mark.parametrize("fill", FILLS, ids=lambda function: function.__name__)
def test_a_client_can_fill_it_to_its_bound_and_no_further(fill: Fill, request: pytest.FixtureRequest) -> None:
    filled = fill(Filling(request))
    assert set(filled) == set(FILLS[fill])
    for place, (size, bound) in filled.items():
        assert bound / 2 <= size <= bound, f"{place} has {size}, and its bound is {bound}"


def test_whatever_can_be_filled_is_filled_in_a_test() -> None:
    assert {place for places in FILLS.values() for place in places} == {place for place, bound in PLACES.items() if bound is FILLED}


# --- what a client can hold ---

# As what a descriptor is counted that is opened there: see descriptors.py.
FOR_CLIENT = "CLIENT: its connection and its target's"
FOR_COMMAND = "COMMANDS: what BIND or UDP ASSOCIATE holds beyond that"
FOR_PIPE = "PIPE_ENDS"
FOR_LOOK_UP = "LOOK_UP, or WAIT"
FOR_RACE = "a second attempt and each further one: Race.may_run_beside()"
FOR_PAGE = "DESCRIPTORS of status.py, set aside"
FOR_A_MOMENT = "RESERVED: closed again in the same function; a thread has one of these at a time"
FOR_SERVER = "RESERVED: opened by the server for itself, and not by what a client does"
NOT_SERVING = "before or after serving, or in another program"

OPENINGS: Dict[str, str] = {
    "datagrams.py:Association.outer_socket": FOR_COMMAND, "descriptors.py:open_at_once": "by those who open() with it", "explain.py:main": NOT_SERVING,
    "handler.py:Socks5Handler.await_peer": FOR_COMMAND, "listener.py:Listener.serve_one": FOR_CLIENT, "listener.py:Listener.stop": NOT_SERVING,
    "outbound.py:Race.start_next": FOR_RACE, "outbound.py:ask_kernel": FOR_A_MOMENT, "outbound.py:can_be_bound": FOR_A_MOMENT,
    "outbound.py:guess": FOR_A_MOMENT, "outbound.py:local_address_towards": FOR_A_MOMENT,
    "outbound.py:non_blocking_socket": "by those who call it: Route.socket, BIND's listener, the UDP sockets",
    "outbound.py:with_scope": "none: a number is not looked up",
    "relay.py:EpollWaiter.__init__": FOR_SERVER, "relay.py:Pipe.__init__": FOR_PIPE, "relay.py:Relay.__init__": FOR_SERVER,
    "relay.py:SelectorWaiter.__init__": FOR_SERVER,
    "resolver.py:in_time": FOR_LOOK_UP, "resolver.py:look_up": FOR_LOOK_UP, "resolver.py:look_up_as_it_is": FOR_LOOK_UP,
    "server.py:Socks5Server.accept": FOR_CLIENT, "server.py:Socks5Server.add_listener": NOT_SERVING, "server.py:Socks5Server.get_request": FOR_CLIENT,
    "service/cores.py:current_core": FOR_A_MOMENT, "service/explaining.py:WatchedRoute.socket": "the socket of another Route",
    "service/figures.py:WatchedServer.accept": FOR_CLIENT, "service/log.py:File": FOR_SERVER, "service/log.py:File._open": FOR_SERVER,
    "service/options.py:words_of": NOT_SERVING,
    "service/pcap.py:open_file": FOR_SERVER, "service/program.py:run_program": FOR_SERVER,
    "service/remembering.py:Remembering.setup": "no descriptor: a conversation", "service/run.py:main": NOT_SERVING,
    "service/run.py:port_file": NOT_SERVING, "service/run.py:write_whole": NOT_SERVING,
    "service/selftest.py:test_bind": NOT_SERVING, "service/selftest.py:test_connect": NOT_SERVING, "service/selftest.py:test_udp_associate": NOT_SERVING,
    "service/signals.py:has_terminal": NOT_SERVING,
    "service/wiretap.py:Caught.accept": FOR_COMMAND, "service/wiretap.py:OverheardRoute.socket": "the socket of another Route",
    "service/worker.py:SharedListener.call_until_all_have_gone": NOT_SERVING, "service/worker.py:WorkerServer.__init__": FOR_SERVER,
    "service/worker.py:WorkerServer.obey": FOR_SERVER, "service/worker.py:main": FOR_SERVER,
    "service/workers.py:Wakeup.__init__": FOR_SERVER, "service/workers.py:Workers.__init__": FOR_SERVER, "service/workers.py:Workers.spawn": FOR_SERVER,
    "service/workers.py:shared_memory": FOR_SERVER, "users.py:read_users": FOR_A_MOMENT,
}


def test_whatever_opens_a_descriptor_is_counted() -> None:
    found = {place for place in openings() if not place.startswith(NOT_A_SERVER)}
    assert found - set(OPENINGS) == set(), "as what is it counted? See descriptors.py"
    assert set(OPENINGS) - found == set(), "these are no more"


# A server with few descriptors, which knows some odd names; it prints its port, and logs to stderr.
SERVER = """
import logging, resource, sys, threading
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
from socks5srv import outbound
from socks5srv.handler import Socks5Handler
from socks5srv.server import Socks5Server

logging.basicConfig(level=logging.INFO)
outbound.STAGGER = 0.01

class Handler(Socks5Handler):
    def resolve(self, host):
        if host == "silent.invalid":
            threading.Event().wait(60)
        return [f"127.0.0.{number}" for number in range(2, 30)]

with Socks5Server(("127.0.0.1", 0), Handler) as server:
    server.connect_timeout = 3
    print(server.server_address[1], server.most_clients, flush=True)
    server.serve_forever(0.05)
"""
LIMIT = 100         # descriptors


class Crowded:
    """That server in a process of its own, and where its clients can go."""

    def __init__(self, process: subprocess.Popen[str], echo: Any, silent: Any, targets: List[UdpSocket]) -> None:
        assert process.stdout is not None
        self.process = process
        self.port, self.most_clients = map(int, process.stdout.readline().split())
        self.echo = echo
        self.silent = silent
        self.targets = targets

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


# Each makes a client hold as much as it can; False if it was told that there is no room.

def hold_tunnel(client: Client, crowded: Crowded) -> bool:
    return client.request(Command.CONNECT, crowded.echo).code is ReplyCode.SUCCEEDED


def hold_bind(client: Client, _crowded: Crowded) -> bool:
    return client.request(Command.BIND, UNSPECIFIED).code is ReplyCode.SUCCEEDED


def hold_association(client: Client, crowded: Crowded) -> bool:
    reply = client.request(Command.UDP_ASSOCIATE, UNSPECIFIED)
    if reply.code is not ReplyCode.SUCCEEDED:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((LOCALHOST, 0))
        for target in crowded.targets:
            sock.sendto(bytes(Datagram(target.address, b"x")), reply.bound[:2])
            target.receive()            # so the socket for this family is there
    return True


def hold_look_up(client: Client, _crowded: Crowded) -> bool:
    client.send(Request(Command.CONNECT, name("silent.invalid", 80)))
    return True


def hold_race(client: Client, crowded: Crowded) -> bool:
    client.send(Request(Command.CONNECT, name("many.invalid", crowded.silent[1])))
    return True


HOLDS = [hold_tunnel, hold_bind, hold_association, hold_look_up, hold_race]


@pytest.fixture
def silent_port() -> Iterator[Tuple[str, int]]:
    """A port that answers no call, at any address of 127.0.0.0/8."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("0.0.0.0", 0))
        listener.listen(0)
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex((LOCALHOST, listener.getsockname()[1]))
        yield listener.getsockname()


@pytest.fixture
def crowded(new_socket: Any, echo: Any, silent_port: Any) -> Iterator[Crowded]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(LIMIT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=str(PACKAGE.parent),
    )
    with process:
        try:
            yield Crowded(process, echo, silent_port, [new_socket(), new_socket("::1")])
        finally:
            process.kill()


@needs_linux
@needs_ipv6
@pytest.mark.parametrize("hold", [*HOLDS, None], ids=lambda hold: hold.__name__ if hold else "all_of_it")
def test_no_clients_can_use_up_the_descriptors(hold: Any, crowded: Crowded) -> None:
    """Whatever they hold, it is so much at most, others are told that there is no room, and afterwards all of it is free."""
    held = refused = 0
    with ExitStack() as stack:
        for number in range(LIMIT):
            client = stack.enter_context(Client((LOCALHOST, crowded.port)))
            try:
                client.greet()
                room = (hold or HOLDS[number % len(HOLDS)])(client, crowded)
            except (OSError, protocol.ProtocolError):       # turned away at the door
                room = False
            held += room
            refused += not room
        assert held >= 8
        assert refused >= LIMIT - crowded.most_clients
        for _ in range(100):            # races are still growing
            assert crowded.descriptors() <= LIMIT - 10
            threading.Event().wait(0.005)
    if hold is not hold_look_up and hold is not None:       # those that the resolver does not answer go on
        eventually(lambda: all_are_served(crowded))
    crowded.process.kill()
    assert crowded.process.stderr is not None
    log = crowded.process.stderr.read()
    assert "Too many open files" not in log
    assert "a bug" not in log


def all_are_served(crowded: Crowded) -> bool:
    """Whether as many as fit in are, with a tunnel each."""
    with ExitStack() as stack:
        for _ in range(crowded.most_clients):
            client = stack.enter_context(Client((LOCALHOST, crowded.port)))
            try:
                client.greet()
                if not hold_tunnel(client, crowded):
                    return False
                exchange(client)
            except (OSError, protocol.ProtocolError):
                return False
        return True
