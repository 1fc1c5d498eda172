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
from socks5srv.capture import pcap
from socks5srv.cli.child import Destinations
from socks5srv.explain.datagrams import BackgroundPrinter
from socks5srv.explain.tables import Explanation
from socks5srv.handler import EARLY, Socks5Handler
from socks5srv.monitor.history import STEPS, History
from socks5srv.names import canonical
from socks5srv.observer import Attempt, Observer
from socks5srv.policy import is_loopback
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, ReplyCode, Request
from socks5srv.ratelimit import RateLimit
from socks5srv.relay import PIPES, Pipes
from socks5srv.resolver import LookUp, LookUps
from socks5srv.service.summary import Summary
from socks5srv.session import Session
from socks5srv.users import REMEMBERED, LoginThrottle
from socks5srv.workers.channel import Channel, LoginFailed

from .conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange, handler_with, name, needs_ipv6
from .containers import PACKAGE, containers, openings
from .test_datagrams import UdpSocket, associate, new_socket

__all__ = ["associate", "new_socket"]       # fixtures

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not on this platform: the descriptors of another process")

# What bounds a container that no client can fill without end by itself.
FIXED = "it is made once, or by the settings, and no client adds to it"
CLIENTS = "an entry for each client that is being served, and as many are served as there may be"
REPORTED = "an entry for each client, until it has been reported: Registry.to_report bounds those that are not served any more"
ANSWER = "one answer of the resolver, or one message, and it goes with that"
CLOSED = "its keys are of closed sets"
LENGTH = "a deque with a length"
OPERATOR = "what is typed at the terminal, signals, and changes of the users file"
WORKERS = "an entry for each worker"
USERS = "an entry for each user"
FILLED = "see the test that fills it"

PLACES: Dict[str, str] = {
    "__init__.py:HOMES": FIXED, "__init__.py:__all__": FIXED,
    "capture/pcap.py:CaptureWriter.events": FILLED, "capture/pcap.py:own_host_towards": FILLED,
    "capture/sockets.py:RESETS": FIXED, "capture/sockets.py:SYN_SENT": FIXED,
    "cli/child.py:Destinations.destinations": FILLED,
    "cli/console.py:KEYS": FIXED, "cli/console.py:NUMBERS": FIXED, "cli/selftest.py:TESTS": FIXED,
    "datagrams.py:Association.contacted": FILLED, "datagrams.py:Association.headers": FILLED, "datagrams.py:Association.looking_up": FILLED,
    "datagrams.py:Association.nowhere": FILLED, "datagrams.py:Association.sockets": "the client's, one for each family, and control connections",
    "datagrams.py:Association.stale": "what Association.targets had before", "datagrams.py:Association.target_sockets": "one for each family",
    "datagrams.py:Association.targets": FILLED, "datagrams.py:Fragments.parts": FILLED,
    "descriptors.py:COMMANDS": FIXED,
    "explain/__init__.py:__all__": FIXED, "explain/datagrams.py:BackgroundPrinter.notes": FILLED,
    "explain/fields.py:COMMAND_WORDS": FIXED, "explain/fields.py:DEVIATIONS": FIXED, "explain/fields.py:LAYOUTS": FIXED,
    "explain/fields.py:NUMBERS": FIXED, "explain/fields.py:METHOD_WORDS": FIXED, "explain/fields.py:MessageLayout.sizes": FIXED,
    "explain/fields.py:REPLIES": FIXED, "explain/fields.py:SENTENCES": FIXED, "explain/fields.py:TYPE_WORDS": FIXED,
    "explain/tables.py:AFTER": FIXED, "explain/tables.py:Explanation.fields": ANSWER, "explain/tables.py:Explanation.remarks": ANSWER,
    "explain/tables.py:FieldRow.meanings": ANSWER, "explain/tables.py:HIDDEN": FIXED,
    "explain/tracer.py:Trace.attempts": LENGTH, "explain/tracer.py:Trace.findings": "one login, and one name that is looked up",
    "explain/tracer.py:Trace.verdicts": LENGTH, "explain/tracer.py:Tracer.traces": REPORTED,
    "handler.py:AUTH": FIXED, "handler.py:ClientStream.buffer": FILLED, "handler.py:DO": FIXED, "handler.py:Host.rules": FIXED, "handler.py:ClientStream.consumed": ANSWER,
    "listener.py:Listener.threads": CLIENTS, "listener.py:OUT_OF": FIXED,
    "locality.py:NOBODYS": FIXED, "locality.py:OWN": FIXED, "locality.py:kernel_answers": "it has no arguments",
    "monitor/history.py:History.timelines": FILLED, "monitor/history.py:Timeline.steps": FILLED,
    "monitor/http.py:FILES": FIXED, "monitor/http.py:HEADERS": FIXED, "monitor/http.py:PAGES": FIXED,
    "monitor/http.py:StatusPage.busy": "most_answers; monitor/test_http.py fills it", "monitor/http.py:StatusPage.silent": "most; monitor/test_http.py fills it",
    "monitor/metrics.py:HANG_UPS": FIXED, "monitor/metrics.py:Metrics.counters": CLOSED, "monitor/metrics.py:Metrics.live": REPORTED,
    "monitor/prometheus.py:COUNTERS": FIXED, "monitor/prometheus.py:HISTOGRAMS": FIXED,
    "monitor/stats.py:Publisher.facts": FIXED, "monitor/stats.py:Publisher.looks": LENGTH, "monitor/stats.py:Rates.found": CLIENTS,
    "monitor/stats.py:Rates.seen": CLIENTS, "monitor/stats.py:Snapshot.counters": CLOSED, "monitor/stats.py:Snapshot.live": CLOSED,
    "monitor/stats.py:Snapshot.sessions": "LocalStats.shown",
    "names.py:JOINERS": FIXED, "names.py:canonical": FILLED,

    "observer.py:HookTable.made": "one for each set of observers that may want the same clients", "observer.py:HookTable.selective": FIXED,
    "policy.py:Access.listeners": FIXED, "monitor/metrics.py:Progress.keys": ANSWER,
    "outbound.py:HappyEyeballs.failures": ANSWER, "outbound.py:HappyEyeballs.met_itself": ANSWER, "outbound.py:HappyEyeballs.running": ANSWER,
    "outbound.py:HappyEyeballs.waiting": ANSWER, "outbound.py:MOST_TELLING": FIXED, "outbound.py:NO_SUCH_FAMILY": FIXED,
    "outbound.py:REPLY_CODES": FIXED, "outbound.py:UNDER_WAY": FIXED,
    "registry.py:Places.networks": CLIENTS,
    "policy.py:Access.rules": FIXED, "policy.py:Policy.private": FIXED, "policy.py:Policy.relays": CLIENTS, "policy.py:is_loopback": FILLED,
    "protocol.py:CODES": FIXED, "protocol.py:COMMANDS": FIXED, "protocol.py:LOOPBACK": FIXED, "protocol.py:METHODS": FIXED,
    "protocol.py:REPLY_CODES": FIXED, "protocol.py:code_field": FILLED,
    "ratelimit.py:RateLimit.kinds": FILLED,
    "registry.py:Registry.handshakes": CLIENTS, "registry.py:Registry.hosts": CLIENTS, "registry.py:Registry.live": CLIENTS,
    "registry.py:Registry.to_report": FILLED,
    "relay.py:Pipes.all": FILLED, "relay.py:Pipes.free": "of Pipes.all", "relay.py:Relay.bulk_queue": CLIENTS,
    "relay.py:Relay.calls": "the relay thread, which never waits, empties it at each turn", "relay.py:Relay.idle_watch": CLIENTS,
    "relay.py:Relay.watched": CLIENTS, "relay.py:TUNING": FIXED, "relay.py:WORDS": FIXED,
    "resolver.py:LookUp.waiting": CLIENTS, "resolver.py:LookUps.named": FILLED, "resolver.py:LookUps.queue": CLIENTS,
    "resolver.py:LookUps.running": FILLED, "resolver.py:NO_SUCH_NAME": FIXED,
    "rules.py:METADATA": FIXED,
    "server.py:Socks5Server.calls": OPERATOR, "server.py:Socks5Server.listeners": FIXED, "server.py:Socks5Server.relays": FIXED,
    "service/affinity.py:CoreAffinity.cores": FIXED, "service/build.py:Service.observers": FIXED, "service/build.py:Single.addresses": FIXED,
    "service/explaining.py:__all__": FIXED, "service/log.py:COLORS": FIXED, "service/node.py:Node.private": FIXED, "service/settings.py:Settings.users": USERS,
    "service/summary.py:Summary.clients": FILLED, "service/summary.py:Summary.failures": FILLED, "service/summary.py:Summary.octets": FILLED,
    "service/summary.py:Summary.outcomes": CLOSED,
    "session.py:COMMAND_WORDS": FIXED,
    "upstream.py:loops": "one for each server of the program",
    "users.py:LoginThrottle.failures": FILLED, "users.py:LoginThrottle.trying": CLIENTS, "users.py:LoginThrottle.waiting": CLIENTS,
    "users.py:Users.passwords": USERS, "users.py:UsersFile.hashes": USERS, "users.py:UsersFile.verified": USERS,
    "workers/channel.py:Channel.incoming": "one message, and what one recv() brings", "workers/channel.py:Channel.outgoing": FILLED,
    "workers/channel.py:Requests.pending": CLIENTS,
    "workers/channel.py:WorkerConfig.listeners": FIXED, "workers/channel.py:WorkerConfig.state": "what LoginThrottle.failures and Replica.relays have",
    "workers/channel.py:WorkerConfig.users": USERS,
    "workers/shared.py:RelayAddresses.others": "Replica.relays",
    "workers/shared.py:Replica.relays": "of CLIENTS; should a RelayClosed be dropped, as many as there are UDP ports",
    "workers/shared.py:ReplicatedUsers.removed": OPERATOR, "workers/shared.py:ReplicatedUsers.verified": USERS,

    "workers/stats.py:WorkerStats.past": CLOSED, "workers/stats.py:WorkerStats.reports": WORKERS,
    "workers/supervisor.py:Supervisor.addresses": FIXED, "workers/supervisor.py:Supervisor.calls": OPERATOR,
    "workers/supervisor.py:Supervisor.private": FIXED, "workers/supervisor.py:Supervisor.slots": WORKERS, "workers/supervisor.py:Worker.hosts": CLIENTS,
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
        return next(w.association for w in server.relays[0].watched.values() if isinstance(w, datagrams.ClientSocket))


def session_of(number: int) -> Session:
    session = Session(number, Address.numeric(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 1))
    session.command, session.destination = Command.CONNECT, name(f"{number}.invalid", 80)
    session.end("for a test")
    return session


@fills("datagrams.py:Association.contacted", "datagrams.py:Association.headers", "datagrams.py:Association.targets", "datagrams.py:Association.nowhere")
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
        f"datagrams.py:Association.{table}": (len(getattr(found, table)), 20) for table in ("contacted", "headers", "targets", "nowhere")
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


@fills("policy.py:is_loopback")
def loopback_addresses(_filling: Filling) -> Filled:
    for number in range(3000):
        is_loopback(f"127.1.{number >> 8}.{number & 255}")
    return {"policy.py:is_loopback": (is_loopback.cache_info().currsize, 1024)}


@fills("names.py:canonical")
def names_that_are_compared(_filling: Filling) -> Filled:
    for number in range(1000):
        canonical(f"{number}.invalid")
    return {"names.py:canonical": (canonical.cache_info().currsize, 256)}


@fills("capture/pcap.py:own_host_towards")
def own_hosts(_filling: Filling) -> Filled:
    for number in range(5000):
        pcap.own_host_towards(f"127.2.{number >> 8}.{number & 255}")
    return {"capture/pcap.py:own_host_towards": (pcap.own_host_towards.cache_info().currsize, 4096)}


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


@fills("registry.py:Registry.to_report")
def sessions_to_be_reported(filling: Filling) -> Filled:
    filling.patch.setattr(server_module, "MOST_ENDED", 5)
    stuck = threading.Event()

    class Stuck(Observer):
        def ended(self, _session: Session) -> None:
            stuck.wait(TIMEOUT)

    server = filling.get("start_server")(observers=(Stuck(),))
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(Client(server.server_address)).close()
        eventually(lambda: len(server.registry.to_report) > 5)
        threading.Event().wait(0.2)         # in which a server without a bound takes all of them
        size = len(server.registry.to_report)
        stuck.set()
        for _ in range(40):
            server.next_ended()
    return {"registry.py:Registry.to_report": (size, 5 + 1 + 5)}        # and those that were at accept() by then


@fills("ratelimit.py:RateLimit.kinds")
def kinds_of_trouble(_filling: Filling) -> Filled:
    found = RateLimit()
    for number in range(3000):
        found.allows(f"kind {number}")
    return {"ratelimit.py:RateLimit.kinds": (len(found.kinds), found.kinds_kept)}


@fills("service/summary.py:Summary.clients", "service/summary.py:Summary.octets", "service/summary.py:Summary.failures")
def the_summary(filling: Filling) -> Filled:
    filling.patch.setattr(Summary, "max_entries", 100)
    summary, other = Summary(), Summary()
    for number in range(300):
        session = session_of(number)
        summary.ended(session)
        session.reply = ReplyCode.SUCCEEDED
        other.ended(session)
        other.ended(session_of(1000 + number))
    summary.merge(other)
    assert "from at least 100 clients" in summary.text()
    return {f"service/summary.py:Summary.{table}": (len(getattr(summary, table)), 100) for table in ("clients", "octets", "failures")}


@fills("cli/child.py:Destinations.destinations")
def destinations(_filling: Filling) -> Filled:
    found = Destinations()
    for number in range(3 * found.max_destinations):
        found.ended(session_of(number))
    return {"cli/child.py:Destinations.destinations": (len(found.destinations), found.max_destinations + 20)}


@fills("monitor/history.py:History.timelines", "monitor/history.py:Timeline.steps")
def sessions_and_steps(filling: Filling) -> Filled:
    filling.patch.setattr(History, "per_second", 10**6)
    found = History()
    for number in range(3 * found.kept):
        session = session_of(number)
        found.wants(session)
    for _ in range(3 * STEPS):
        found.tried(session, Attempt(UNSPECIFIED, 0.0, 1.0, OSError("x" * 9999)))
    return {
        "monitor/history.py:History.timelines": (len(found.timelines), found.kept),
        "monitor/history.py:Timeline.steps": (len(found.timelines[session.id].steps), STEPS),
    }


@fills("explain/datagrams.py:BackgroundPrinter.notes")
def datagrams_that_are_explained(filling: Filling) -> Filled:
    """A screen that is stuck."""
    filling.patch.setattr(BackgroundPrinter, "max_per_second", 10**6)
    stuck = threading.Event()
    printer = BackgroundPrinter(lambda *_note: stuck.wait(TIMEOUT) and None)
    for _ in range(1000):
        printer.offer(lambda: (Explanation("NOTE"), "", 0.0))
    size = printer.notes.qsize()
    stuck.set()
    printer.end()
    return {"explain/datagrams.py:BackgroundPrinter.notes": (size, printer.max_waiting + 1)}


@fills("capture/pcap.py:CaptureWriter.events")
def a_recording(filling: Filling) -> Filled:
    filling.patch.setattr(pcap.CaptureWriter, "max_buffered", 10_000)
    filling.patch.setattr(pcap.CaptureWriter, "timeout", 0.05)
    reader, writer = os.pipe()
    recording = pcap.CaptureWriter(FileIO(writer, "w"))
    held = 0
    for _ in range(200):
        recording.add(pcap.udp, Address.numeric(LOCALHOST, 1), Address.numeric(LOCALHOST, 2), bytes(5000))
        held = max(held, len(recording.events))
    os.close(reader)
    recording.close()
    filling.get("bugs").clear()         # it has told that nothing reads
    return {"capture/pcap.py:CaptureWriter.events": (held, 3)}


@fills("workers/channel.py:Channel.outgoing")
def a_channel(filling: Filling) -> Filled:
    filling.patch.setattr(Channel, "max_buffered", 1000)
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        for _ in range(20_000):
            channel.hint(LoginFailed("192.0.2.1"))
        size = len(channel.outgoing)
        channel.close()
    return {"workers/channel.py:Channel.outgoing": (size, 1200)}


@fills("users.py:LoginThrottle.failures")
def guessing(_filling: Filling) -> Filled:
    found = LoginThrottle()
    for number in range(REMEMBERED + 500):
        found.failed(f"host {number}")
    return {"users.py:LoginThrottle.failures": (len(found.failures), REMEMBERED)}


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
FOR_RACE = "a second attempt and each further one: HappyEyeballs.may_run_beside()"
FOR_PAGE = "StatusPage.descriptors, set aside"
FOR_A_MOMENT = "RESERVED: closed again in the same function; a thread has one of these at a time"
FOR_SERVER = "RESERVED: opened by the server for itself, and not by what a client does"
NOT_SERVING = "before or after serving, or in another program"

FOR_CALLER = "by those who call it"

OPENINGS: Dict[str, str] = {
    "capture/pcap.py:open_file": FOR_SERVER, "capture/sockets.py:CapturedStream.accept": FOR_CALLER,
    "cli/child.py:run_command": FOR_SERVER, "cli/main.py:main": NOT_SERVING, "cli/options.py:words_of": NOT_SERVING,
    "cli/selftest.py:test_bind": NOT_SERVING, "cli/selftest.py:test_connect": NOT_SERVING, "cli/selftest.py:test_udp_associate": NOT_SERVING,
    "cli/signals.py:has_terminal": NOT_SERVING, "cli/startup.py:port_file": NOT_SERVING, "cli/startup.py:write_whole": NOT_SERVING,
    "datagrams.py:Association.__init__": FOR_COMMAND, "datagrams.py:Association.socket_towards": FOR_COMMAND,
    "datagrams.py:Association.unlock": "none: it replaces one", "descriptors.py:open_at_once": FOR_CALLER,
    "explain/__main__.py:main": NOT_SERVING,
    "handler.py:Socks5Handler.await_peer": FOR_COMMAND, "handler.py:Socks5Handler.do_BIND": FOR_COMMAND,
    "listener.py:Listener.serve_one": FOR_CLIENT, "listener.py:Listener.stop": NOT_SERVING,
    "locality.py:ask_kernel": FOR_A_MOMENT, "locality.py:can_be_bound": FOR_A_MOMENT, "locality.py:guess": FOR_A_MOMENT,
    "monitor/http.py:StatusPage.__init__": FOR_PAGE,
    "outbound.py:HappyEyeballs.start_next": FOR_RACE, "outbound.py:Route.new": FOR_CALLER, "outbound.py:local_address_towards": FOR_A_MOMENT,
    "outbound.py:with_scope": "none: a number is not looked up",
    "relay.py:EpollWaiter.__init__": FOR_SERVER, "relay.py:Pipe.__init__": FOR_PIPE, "relay.py:Relay.__init__": FOR_SERVER,
    "relay.py:SelectorWaiter.__init__": FOR_SERVER,
    "resolver.py:in_time": FOR_LOOK_UP, "resolver.py:look_up": FOR_LOOK_UP, "resolver.py:look_up_as_it_is": FOR_LOOK_UP,
    "server.py:Socks5Server.accept": FOR_CLIENT, "server.py:Socks5Server.add_listener": NOT_SERVING, "server.py:Socks5Server.get_request": FOR_CLIENT,
    "server.py:listening_socket": FOR_CALLER,
    "service/affinity.py:current_core": FOR_A_MOMENT, "service/build.py:Single.capture": NOT_SERVING, "service/build.py:listening_sockets": NOT_SERVING,
    "service/log.py:File": FOR_SERVER, "service/log.py:File._open": FOR_SERVER,
    "upstream.py:udp_towards": FOR_COMMAND, "users.py:read_users": FOR_A_MOMENT, "waker.py:Waker.__init__": FOR_CALLER,
    "workers/shared.py:Scoreboard.new": FOR_SERVER, "workers/shared.py:SharedListener.connect_until_threads_left": NOT_SERVING,
    "workers/supervisor.py:Supervisor.__init__": FOR_SERVER, "workers/supervisor.py:Supervisor.spawn": FOR_SERVER,
    "workers/worker.py:WorkerServer.__init__": FOR_SERVER, "workers/worker.py:WorkerServer.control": FOR_SERVER, "workers/worker.py:main": FOR_SERVER,
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
    print(server.server_address[1], server.registry.most_clients, flush=True)
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
