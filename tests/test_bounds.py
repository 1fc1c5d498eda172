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
from contextlib import ExitStack, suppress
from io import FileIO
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple

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
from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, ReplyCode, Request, code_field
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

# What bounds the containers that no client can fill without end by itself.
BOUNDED = {
    "it is made once, or by the settings, and no client adds to it": """
        __init__.py:HOMES,__all__ capture/sockets.py:RESETS,SYN_SENT cli/console.py:KEYS,NUMBERS cli/selftest.py:TESTS cli/unknown.py:HABITS
        descriptors.py:COMMANDS explain/__init__.py:__all__
        explain/fields.py:COMMAND_WORDS,DEVIATIONS,LAYOUTS,METHOD_WORDS,MessageLayout.sizes,NUMBERS,REPLIES,SENTENCES,TYPE_WORDS
        explain/fields.py:FRAME_WORDS,LEVEL_WORDS explain/tables.py:AFTER,HIDDEN,TOKENS gssapi/context.py:OF_THE_MECHANISM handler.py:AUTH,DO,Host.rules listener.py:NO_SYN,OUT_OF locality.py:NOBODYS,OWN
        monitor/http.py:FILES,HEADERS,PAGES monitor/prometheus.py:COUNTERS,HISTOGRAMS
        monitor/stats.py:Publisher.facts names.py:JOINERS observer.py:HookTable.selective
        outbound.py:MOST_TELLING,NO_SUCH_FAMILY,REPLY_CODES,UNDER_WAY proxyprotocol.py:SIZES policy.py:Access.listeners,Access.rules,Policy.private
        protocol.py:CODES,COMMANDS,LOOPBACK,METHODS,REPLY_CODES relay.py:TUNING,WORDS resolver.py:NO_SUCH_NAME
        rules.py:METADATA server.py:Socks5Server.listeners,Socks5Server.relays service/affinity.py:CoreAffinity.cores
        service/build.py:Service.observers,Single.addresses service/explaining.py:__all__ service/log.py:COLORS
        service/node.py:Node.private session.py:COMMAND_NAMES,COMMAND_WORDS trains.py:PATH_ERRORS workers/channel.py:WorkerConfig.listeners
        workers/supervisor.py:Supervisor.addresses,Supervisor.private workers/worker.py:WorkerServer.rules
    """,
    "one answer of the resolver, or one message, and it goes with that": """
        explain/tables.py:Explanation.fields,Explanation.remarks,FieldRow.meanings handler.py:ClientStream.consumed
        monitor/metrics.py:Progress.keys
        outbound.py:HappyEyeballs.failures,HappyEyeballs.met_itself,HappyEyeballs.running,HappyEyeballs.waiting
    """,
    "a frame, which has 64 KiB at most, or a part of one, and what is read at a time; gssapi/test_protected.py fills it":
        "gssapi/protected.py:ProtectedStream.received relay.py:Coded.decoded,Coded.received,CodedFlow.received",
    "a deque with a length": "explain/tracer.py:Trace.attempts,Trace.verdicts monitor/stats.py:Publisher.looks",
    "an entry for each client, until it has been reported: Registry.to_report bounds those that are not served any more":
        "explain/tracer.py:Tracer.traces monitor/metrics.py:Metrics.live",
    "an entry for each client that is being served, and as many are served as there may be": """
        listener.py:Listener.threads monitor/stats.py:Rates.found,Rates.seen policy.py:Policy.relays
        registry.py:Places.networks,Registry.handshakes,Registry.hosts,Registry.live
        relay.py:Relay.bulk_queue,Relay.idle_watch,Relay.watched resolver.py:LookUp.waiting,LookUps.queue
        users.py:LoginThrottle.trying,LoginThrottle.waiting workers/channel.py:Requests.pending
        workers/supervisor.py:Worker.hosts
    """,
    "its keys are of closed sets": """
        monitor/metrics.py:Metrics.counters monitor/stats.py:Snapshot.counters,Snapshot.live
        service/summary.py:Summary.outcomes workers/stats.py:WorkerStats.past
    """,
    "what is typed at the terminal, signals, and changes of the users file":
        "server.py:Socks5Server._calls workers/shared.py:ReplicatedUsers.removed workers/supervisor.py:Supervisor.calls",
    "an entry for each user": """
        service/settings.py:Settings.users users.py:Users.passwords,UsersFile.hashes,UsersFile.verified
        workers/channel.py:WorkerConfig.users workers/shared.py:ReplicatedUsers.verified
    """,
    "an entry for each worker": "workers/stats.py:WorkerStats.reports workers/supervisor.py:Supervisor.running,Supervisor.slots",
    "an entry for each thread that waits in accept() when it is stopped": "listener.py:Listener.own_calls",
    "the client's, one for each family, and control connections": "datagrams.py:Association.sockets",
    "what Association.targets had before": "datagrams.py:Association.stale",
    "one for each family": "datagrams.py:Association.target_sockets",
    "one login, and one name that is looked up": "explain/tracer.py:Trace.findings",
    "it has no arguments": "locality.py:kernel_answers",
    "its maxsize": "trains.py:segments_of",
    "most_answers; monitor/test_http.py fills it": "monitor/http.py:StatusPage.busy",
    "most; monitor/test_http.py fills it": "monitor/http.py:StatusPage.silent",
    "LocalStats.shown": "monitor/stats.py:Snapshot.sessions",
    "one for each set of observers that may want the same clients": "observer.py:HookTable.made",
    "of Pipes.all": "relay.py:Pipes.free",
    "the relay thread, which never waits, empties it at each turn": "relay.py:Relay.calls",
    "one for each server of the program": "upstream.py:loops",
    "one message, and what one recv() brings": "proxyprotocol.py:PeekingStream.ahead workers/channel.py:Channel.incoming",
    "what LoginThrottle.failures and Replica.relays have": "workers/channel.py:WorkerConfig.state",
    "Replica.relays": "workers/shared.py:RelayAddresses.others",
    "as many as clients have; if a RelayClosed is dropped, as many as there are UDP ports": "workers/shared.py:Replica.relays",
}
NOT_A_SERVER = ("testing/", "check.py", "client.py", "gssapi/client.py")        # what tests and clients use


def places_of(table: Dict[str, str]) -> Iterator[str]:
    for entry in " ".join(table.values()).split():
        file, names = entry.split(":")
        yield from (f"{file}:{name}" for name in names.split(","))


def compare(source: Iterable[str], entered: Iterable[str], question: str) -> None:
    found, known = sorted(place for place in source if not place.startswith(NOT_A_SERVER)), sorted(entered)
    assert set(found) - set(known) == set(), question
    assert set(known) - set(found) == set(), "these are no more"
    assert len(known) == len(set(known)), "some are entered twice"


def test_whatever_can_hold_more_than_one_thing_is_known_to_be_bounded() -> None:
    filled = [*ONE_BY_ONE, *(place for places in FILLS.values() for place in places)]
    compare(containers(), [*places_of(BOUNDED), *filled], "what bounds it? Enter that above, or fill it in a test")


Sizes = List[Tuple[int, int]]       # how full each of the places has become, and its bound
Fill = Callable[["Filling"], Sizes]
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


def association_at(server: Any) -> datagrams.Association:
    return next(w.association for w in server.relays[0].watched.values() if isinstance(w, datagrams.ClientSocket))


def session_of(number: int) -> Session:
    session = Session(number, Address.numeric(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 1))
    session.command, session.destination = Command.CONNECT, name(f"{number}.invalid", 80)
    session.end("for a test")
    return session


@fills(*(f"datagrams.py:Association.{table}" for table in ("contacted", "headers", "targets", "nowhere")))
def hosts_and_headers(filling: Filling) -> Sizes:
    filling.patch.setattr(datagrams, "REMEMBERED", 20)
    server = filling.get("start_server")(handler=handler_with(allow=lambda _self, _command, address: address.port != 9))
    client, last = filling.get("associate")(server), filling.get("new_socket")()
    with ExitStack() as stack:
        for number in range(2, 60):
            host = stack.enter_context(UdpSocket(f"127.0.0.{number}" if sys.platform != "darwin" else LOCALHOST).socket)
            target = Address.of(host.getsockname())
            client.send_to(target, b"?")
            host.sendto(b"!", host.recvfrom(9)[1])
            assert client.answer().address == target
            client.send_to(Address.numeric(f"127.0.1.{number}", 9), b"refused")
    client.echo(last)
    found = association_at(server)
    return [(len(each), 20) for each in (found.contacted, found.headers, found.targets, found.nowhere)]


@fills("datagrams.py:Association.looking_up")
def names_for_datagrams(filling: Filling) -> Sizes:
    release = threading.Event()
    server = filling.get("start_server")(handler=handler_with(resolve=lambda _self, _host: release.wait(TIMEOUT) and []))
    client, last = filling.get("associate")(server), filling.get("new_socket")()
    for number in range(200):
        client.send_to(name(f"{number % 40}.invalid", 7), b"x")
        if number % 20 == 0:
            client.echo(last)
    client.echo(last)
    found = association_at(server)
    assert sum(map(len, found.looking_up.values())) <= datagrams.QUEUED
    size = len(found.looking_up)
    release.set()
    return [(size, datagrams.LOOK_UPS)]


@fills("datagrams.py:Fragments.parts")
def fragments(_filling: Filling) -> Sizes:
    found = datagrams.Fragments()
    sizes = []
    for frag in range(1, 128):
        found.add(Datagram(UNSPECIFIED, b"", frag), bytes(2000))
        sizes.append(sum(len(part.data) for part in found.parts))
    return [(max(sizes), protocol.DATAGRAM_MAX + 2000)]


@fills("handler.py:ClientStream.buffer")
def what_a_client_sends_ahead(filling: Filling) -> Sizes:
    handlers: List[Socks5Handler] = []

    class Kept(Socks5Handler):
        def setup(self) -> None:
            super().setup()
            handlers.append(self)

    server = filling.get("start_server")(handler=Kept)
    client = filling.get("new_client")(server)
    client.ask(Command.BIND, UNSPECIFIED)
    client.socket.setblocking(False)
    with suppress(BlockingIOError):
        for _ in range(64):
            client.socket.send(bytes(EARLY))
    eventually(lambda: len(handlers[0].stream.buffer) >= EARLY)
    return [(len(handlers[0].stream.buffer), EARLY + 4096)]


@fills("relay.py:Pipes.all")
def pipes(_filling: Filling) -> Sizes:
    if not hasattr(os, "splice"):
        return [(0, 0)]
    found = Pipes()
    for _ in range(3 * PIPES):
        found.take()
    size = len(found.all)
    found.close()
    return [(size, PIPES)]


@fills("resolver.py:LookUps.named", "resolver.py:LookUps.running")
def places_for_look_ups(_filling: Filling) -> Sizes:
    found, release = LookUps(), threading.Event()
    answered: deque[LookUp] = deque()
    found.most, found.share = 8, 8
    for number in range(50):
        found.begin(LookUp(lambda _host: release.wait(TIMEOUT) and [], "x", f"{number}", number), answered.append)
    sizes = len(found.named), len(found.running)
    release.set()
    eventually(lambda: len(answered) == 50 and not found.total)
    return [(size, 8) for size in sizes]


@fills("registry.py:Registry.to_report")
def sessions_to_be_reported(filling: Filling) -> Sizes:
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
    return [(size, 5 + 1 + 5)]        # and those that were at accept() by then


@fills("proxyprotocol.py:HeaderReader.waiting")
def connections_that_wait_for_their_header(filling: Filling) -> Sizes:
    server = filling.get("start_server")(proxy_protocol=[LOCALHOST], max_handshakes=5)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(Client(server.server_address))
        eventually(lambda: len(server._headers.waiting) == 5)
        threading.Event().wait(0.1)
        return [(len(server._headers.waiting), 5)]


@fills("service/summary.py:Summary.clients", "service/summary.py:Summary.octets", "service/summary.py:Summary.failures")
def the_summary(filling: Filling) -> Sizes:
    filling.patch.setattr(Summary, "max_entries", 100)
    summary, other = Summary(), Summary()
    for number in range(300):
        session = session_of(number)
        summary.ended(session)
        session.reply = ReplyCode.SUCCEEDED
        other.ended(session)
        other.ended(session_of(1000 + number))
    summary.merge(other)
    assert "from at least 100 client addresses" in summary.text()
    return [(len(each), 100) for each in (summary.clients, summary.octets, summary.failures)]


@fills("monitor/history.py:History.timelines", "monitor/history.py:Timeline.steps")
def sessions_and_steps(filling: Filling) -> Sizes:
    filling.patch.setattr(History, "per_second", 10**6)
    found = History()
    for session in map(session_of, range(3 * found.kept)):
        found.wants(session)
    for _ in range(3 * STEPS):
        found.tried(session, Attempt(UNSPECIFIED, 0.0, 1.0, OSError("x" * 9999)))
    return [(len(found.timelines), found.kept), (len(found.timelines[session.id].steps), STEPS)]


@fills("explain/datagrams.py:BackgroundPrinter.notes")
def datagrams_that_are_explained(filling: Filling) -> Sizes:
    """A screen that is stuck."""
    filling.patch.setattr(BackgroundPrinter, "max_per_second", 10**6)
    stuck = threading.Event()
    printer = BackgroundPrinter(lambda *_note: stuck.wait(TIMEOUT) and None)
    for _ in range(1000):
        printer.offer(lambda: (Explanation("NOTE"), "", 0.0))
    size = printer.notes.qsize()
    stuck.set()
    printer.end()
    return [(size, printer.max_waiting + 1)]


@fills("capture/pcap.py:CaptureWriter.events")
def a_recording(filling: Filling) -> Sizes:
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
    return [(held, 3)]


@fills("workers/channel.py:Channel.outgoing")
def a_channel(filling: Filling) -> Sizes:
    filling.patch.setattr(Channel, "max_buffered", 1000)
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        for _ in range(20_000):
            channel.hint(LoginFailed("192.0.2.1"))
        size = len(channel.outgoing)
        channel.close()
    return [(size, 1200)]


def remembered(function: Any) -> int:
    return int(function.cache_info().currsize)


@pytest.mark.parametrize("fill", FILLS, ids=lambda function: function.__name__)
def test_a_client_can_fill_it_to_its_bound_and_no_further(fill: Fill, request: pytest.FixtureRequest) -> None:
    filled = fill(Filling(request))
    assert len(filled) == len(FILLS[fill])
    for place, (size, bound) in zip(FILLS[fill], filled):
        assert bound / 2 <= size <= bound, f"{place} has {size}, and its bound is {bound}"


# What is filled, what fills it the nth time, how full it is, and its bound.
ONE_BY_ONE: Dict[str, Tuple[Callable[[], Any], Callable[[Any, int], Any], Callable[[Any], int], int]] = {
    "ratelimit.py:RateLimit.kinds":
        (RateLimit, lambda it, n: it.allows(f"kind {n}"), lambda it: len(it.kinds), RateLimit.kinds_kept),
    "users.py:LoginThrottle.failures":
        (LoginThrottle, lambda it, n: it.failed(f"host {n}"), lambda it: len(it.failures), REMEMBERED),
    "cli/child.py:Destinations.destinations":
        (Destinations, lambda it, n: it.ended(session_of(n)), lambda it: len(it.destinations), 20 + Destinations.max_destinations),
    "protocol.py:code_field":
        (lambda: code_field, lambda it, n: it(["METHOD", "CMD", "REP", "ATYP"][n % 4], n // 4 % 256), remembered, 4 * 256),
    "policy.py:is_loopback": (lambda: is_loopback, lambda it, n: it(f"127.1.{n >> 8}.{n & 255}"), remembered, 1024),
    "names.py:canonical": (lambda: canonical, lambda it, n: it(f"{n}.invalid"), remembered, 256),
    "capture/pcap.py:own_host_towards":
        (lambda: pcap.own_host_towards, lambda it, n: it(f"127.2.{n >> 8}.{n & 255}"), remembered, 4096),
}


@pytest.mark.parametrize(("make", "fill", "size", "bound"), ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_what_is_filled_one_by_one_has_a_bound(make: Any, fill: Any, size: Any, bound: int) -> None:
    it = make()
    for number in range(max(5000, bound + 500)):
        fill(it, number)
    assert bound / 2 <= size(it) <= bound


# --- what a client can hold ---

# As what the descriptors are counted that are opened there: see descriptors.py.
COUNTED = {
    "RESERVED: opened by the server for itself, and not by what a client does": """
        capture/pcap.py:open_file cli/child.py:run_command
        relay.py:EpollWaiter.__init__,Relay.__init__,SelectorWaiter.__init__ service/log.py:File,File._open
        service/systemd.py:adopted workers/shared.py:Scoreboard.new workers/supervisor.py:Supervisor.__init__,Supervisor.spawn
        workers/worker.py:WorkerServer.__init__,WorkerServer.control,main
    """,
    "by those who call it": """
        capture/sockets.py:CapturedStream.accept descriptors.py:open_at_once outbound.py:Route._new
        server.py:listening_socket waker.py:Waker.__init__
    """,
    "before or after serving, or in another program": """
        cli/main.py:main cli/options.py:words_of cli/selftest.py:test_bind,test_connect,test_udp_associate
        cli/signals.py:has_terminal cli/startup.py:port_file explain/__main__.py:main listener.py:Listener.call
        server.py:Socks5Server.add_listener service/build.py:Single.capture,listening_sockets
    """,
    "COMMANDS: what BIND or UDP ASSOCIATE holds beyond that": """
        datagrams.py:Association.__init__,Association.socket_towards
        handler.py:Socks5Handler._await_peer,Socks5Handler.do_BIND upstream.py:udp_towards
    """,
    "CLIENT: its connection and its target's":
        "listener.py:Listener.accept_queue,Listener.serve_one server.py:Socks5Server._accept",
    "RESERVED: closed again in the same function; a thread has one of these at a time": """
        locality.py:ask_kernel,can_be_bound,guess outbound.py:local_address_towards service/affinity.py:current_core
        service/systemd.py:notify users.py:read_users
    """,
    "LOOK_UP, or WAIT": "resolver.py:in_time,look_up,look_up_as_it_is",
    "none: it replaces one": "datagrams.py:Association.unlock",
    "StatusPage.descriptors, set aside": "monitor/http.py:StatusPage.__init__",
    "a second attempt and each further one: HappyEyeballs.may_run_beside()": "outbound.py:HappyEyeballs.start_next",
    "none: a number is not looked up": "outbound.py:with_scope",
    "PIPE_ENDS": "relay.py:Pipe.__init__",
}


def test_whatever_opens_a_descriptor_is_counted() -> None:
    compare(openings(), places_of(COUNTED), "as what is it counted? See descriptors.py")


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


class Crowded(NamedTuple):
    """That server in a process of its own, and where its clients can go."""

    process: subprocess.Popen[str]
    port: int
    most_clients: int
    echo: Any
    silent: Any
    targets: List[UdpSocket]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


# Each makes a client hold as much as it can; False if it was told that there is no room.

def hold_tunnel(client: Client, crowded: Crowded) -> bool:
    if client.request(Command.CONNECT, crowded.echo).code is not ReplyCode.SUCCEEDED:
        return False
    exchange(client)
    return True


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
def crowded(new_socket: Any, echo: Any, silent: Any) -> Iterator[Crowded]:
    command, pipe = [sys.executable, "-c", SERVER, str(LIMIT)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, encoding="utf-8", cwd=PACKAGE.parent) as process:
        try:
            assert process.stdout is not None
            port, most_clients = map(int, process.stdout.readline().split())
            yield Crowded(process, port, most_clients, echo, silent("0.0.0.0"), [new_socket(), new_socket("::1")])
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
            room = can_hold(hold or HOLDS[number % len(HOLDS)], crowded, stack)
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


def can_hold(hold: Any, crowded: Crowded, stack: ExitStack) -> bool:
    """Whether one more client can, which stays until the end of the stack."""
    client = stack.enter_context(Client((LOCALHOST, crowded.port)))
    try:
        client.greet()
        return bool(hold(client, crowded))
    except (OSError, protocol.ProtocolError):       # turned away at the door
        return False


def all_are_served(crowded: Crowded) -> bool:
    """Whether as many as fit in are, with a tunnel each."""
    with ExitStack() as stack:
        return all(can_hold(hold_tunnel, crowded, stack) for _ in range(crowded.most_clients))
