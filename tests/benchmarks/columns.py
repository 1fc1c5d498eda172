"""
One function for each column: traffic in, numbers out.

Each runs in a process of its own, as `measure()`, so that nothing of one measurement is left
in the next.  Each gets a `Job` and returns what measures.py lists, under the same keys; what
cannot be known here, such as the processor time of a server elsewhere, is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from . import processes
from .loop import Loop, clock
from .measures import BUSY, COLUMNS, GROWTH, IDLE
from .traffic import (
    OPENERS, Associations, Drain, Failures, Juggler, Place, Service, Transfer, Tunnels, Way, datagram_echo, datagram_socket, echo,
    flood, header_to, listen, pinger, sending, source, visitor,
)

CONNECTION = b"c" * 100     # what a short connection has echoed
MESSAGE = b"m" * 64         # what goes to and fro on a tunnel
PAYLOAD = 200               # octets of a datagram
QUIC_PAYLOAD = 1200         # what any path that QUIC can use has room for.  RFC 9000 section 14
STREAMS = 8
VISITS = 200                # new connections while idle tunnels are open
GRACE = 2.0                 # seconds for the last answers
STARTING = 15.0             # seconds for a load to run
LOAD = 60.0                 # seconds after which a load ends even if nobody ends it
SPARE = 200                 # descriptors for everything but tunnels
SELECT = 512                # sockets that select() takes on Windows

Numbers = Dict[str, float]


class Job(NamedTuple):
    """What to measure, and how."""

    way: Way
    seconds: float          # for each number
    pid: Optional[int] = None
    portable: bool = False
    most: int = GROWTH[-1]  # tunnels
    fresh: bool = True      # a server that nothing has been measured of before


class Measurement:
    """The loop, the numbers and the failures of a column that is being measured."""

    def __init__(self, job: Job) -> None:
        self.job, self.loop = job, Loop(job.portable)
        self.pid = None if job.portable else job.pid
        self.numbers: Numbers = {}
        self.notes: List[str] = []
        self.all_failures = 0
        self.limit = processes.raise_descriptor_limit()

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Failures]:
        """Put down what fails inside, under this name."""
        failures = Failures()
        yield failures
        self.all_failures += failures.total()
        if failures.total():
            self.notes.append(f"{what}: {failures}")

    def target(self, service: Service = echo) -> List[Place]:
        return listen(self.loop, service)

    def tunnels(self, failures: Failures, count: int = 0, targets: Sequence[Place] = ()) -> Tunnels:
        """So many of them, to be closed."""
        tunnels = Tunnels(self.loop, self.job.way, failures)
        tunnels.open(count, targets)
        return tunnels

    def cost(self, situation: object, before: Optional[float], count: float, scale: float = 1e6) -> None:
        """The processor time since `before`, for each of so many."""
        now = processes.cpu(self.pid)
        if before is not None and now is not None and count:
            self.numbers[f"cpu_{situation}"] = (now - before) / count * scale

    def weigh(self, situation: int, base: Optional[float], count: int) -> None:
        """The memory beyond `base`, for each of so many."""
        self.rest()
        now = processes.memory(self.pid)
        if base is not None and now is not None and count:
            self.numbers[f"kib_{situation}"] = max(0.0, now - base) / count

    def rest(self) -> None:
        """Until the server no longer computes."""
        self.loop.run(0.05)
        processes.rest(self.pid)

    def rate(self, situation: object, times: List[float], rate: float) -> None:
        """How many there were per second, if any."""
        if times:
            self.numbers[f"rate_{situation}"] = rate

    def latencies(self, situation: object, times: List[float]) -> None:
        """p50 and p99, in microseconds."""
        times.sort()
        for percent in (50, 99) if times else ():
            self.numbers[f"p{percent}_{situation}"] = times[min(len(times) - 1, int(percent / 100 * len(times)))] * 1e6


def words(column: str, situation: object) -> str:
    return COLUMNS[column].situations[str(situation)]


# --- what several columns do ---

def visits(m: Measurement, clients: int, targets: List[Place], failures: Failures, most: float = float("inf")) -> Tuple[List[float], float]:
    """
    Short connections by so many clients; the seconds of each, and how many there were per second.

    Those that are under way at the end add their seconds later, so that the slowest are not forgotten.
    """
    times: List[float] = []
    turns = itertools.cycle(targets)
    began = clock()
    for _ in range(clients):
        m.loop.start(visitor(m.loop, m.job.way, turns, CONNECTION, began + m.job.seconds, times, failures))
    m.loop.run(m.job.seconds, lambda: len(times) >= most)
    m.loop.run(GRACE, lambda: times or not m.loop.deadlines)     # where the time was too short for a single one
    return times, len(times) / (clock() - began)


def ping_pong(m: Measurement, sockets: List[socket.socket], failures: Failures) -> Tuple[List[float], float]:
    """Messages to and fro on all these tunnels; the seconds of each, and how many there were per second."""
    times: List[float] = []
    busy = [len(sockets)]
    began = clock()
    for sock in sockets:
        m.loop.start(pinger(m.loop, sock, MESSAGE, began + m.job.seconds, times, busy, failures))
    m.loop.run(m.job.seconds, lambda: not busy[0])
    m.loop.run(GRACE, lambda: times or not busy[0])
    rate = len(times) / (clock() - began)
    m.loop.run(GRACE, lambda: not busy[0])
    if busy[0]:
        failures.kinds["without an answer"] += busy[0]
    return times, rate


# --- the columns ---

def bulk(m: Measurement) -> None:
    for situation, streams in (("download", 1), ("downloads", STREAMS), ("upload", 1)):
        with m.counting(words("bulk", situation)) as failures:
            stream(m, situation, streams, failures)


def stream(m: Measurement, situation: str, streams: int, failures: Failures) -> None:
    drain = Drain(m.loop.portable)
    with m.tunnels(failures, streams, m.target(drain.service if situation == "upload" else source)) as tunnels:
        if situation == "upload":
            for sock in tunnels.sockets:
                m.loop.start(sending(m.loop, sock))
        else:
            download(m.loop, tunnels, drain)
        m.loop.run(0.2 * m.job.seconds)     # until the windows have grown
        octets, before, began = drain.octets, processes.cpu(m.pid), clock()
        m.loop.run(m.job.seconds)
        m.loop.run(GRACE, lambda: drain.octets > octets or not tunnels.sockets)
        gib, took = (drain.octets - octets) / 2 ** 30, clock() - began
        m.cost(situation, before, gib, 1)
        if gib:
            m.numbers[f"rate_{situation}"] = gib / took
        elif tunnels.sockets:
            failures.kinds["nothing arrived"] += 1
    m.loop.run(0.05)                        # and the other ends


def download(loop: Loop, tunnels: Tunnels, drain: Drain) -> None:
    for sock in tunnels.sockets:
        sock.send(b"!")
        loop.start(drain.service(loop, sock))


def connections(m: Measurement) -> None:
    targets = m.target()
    for clients in (1, 16, 128):
        with m.counting(words("connections", clients)) as failures:
            before = processes.cpu(m.pid)
            times, rate = visits(m, clients, targets, failures)
            m.cost(clients, before, len(times))
            m.rate(clients, times, rate)
            m.loop.run(GRACE, lambda: not m.loop.deadlines)
            m.latencies(clients, times)


def messages(m: Measurement) -> None:
    targets = m.target()
    for count in (1, 64, 512):
        with m.counting(words("messages", count)) as failures, m.tunnels(failures, count, targets) as tunnels:
            before = processes.cpu(m.pid)
            times, rate = ping_pong(m, tunnels.sockets, failures)
            m.cost(count, before, len(times))
            m.rate(count, times, rate)
            m.latencies(count, times)


def datagrams(m: Measurement) -> None:
    target, way = datagram_socket(), m.job.way
    m.loop.start(datagram_echo(m.loop, target))
    for count, under_way in ((1, 32), (64, 4)):
        name = words("datagrams", count)
        with m.counting(name) as failures, relays_to(m.loop, way, target, count, failures) as (relays, header):
            jugglers = [Juggler(relay, header, str(i).encode().rjust(PAYLOAD), under_way) for i, relay in enumerate(relays)]
            juggle(m, count, jugglers, failures)


def quic(m: Measurement) -> None:
    payload = b"q" * QUIC_PAYLOAD
    for situation, count in (("download", 1), ("downloads", STREAMS), ("upload", 1)):
        with m.counting(words("quic", situation)) as failures, contextlib.ExitStack() as stack:
            transfers = []
            for _ in range(count):
                target = datagram_socket()
                stack.callback(target.close)
                relays, header = stack.enter_context(relays_to(m.loop, m.job.way, target, 1, failures))
                transfers += [Transfer(target, relay, header, payload, situation == "upload", m.job.portable) for relay in relays]
            juggle(m, situation, transfers, failures, QUIC_PAYLOAD / 2 ** 30, 1)


@contextlib.contextmanager
def relays_to(loop: Loop, way: Way, target: socket.socket, count: int, failures: Failures) -> Iterator[Tuple[List[Place], bytes]]:
    """Where to send datagrams to that are for the target, and what has to stand before their payload."""
    if way.proxy is None:
        yield [target.getsockname()] * count, b""
        return
    with Associations(loop, way, failures) as associations:
        associations.open(count, [target.getsockname()])
        yield associations.relays, header_to(target.getsockname())


def juggle(
    m: Measurement, situation: object, jugglers: Sequence[Union[Juggler, Transfer]], failures: Failures, each: float = 1, scale: float = 1e6,
) -> None:
    """Datagrams without a break, each of which counts for so much."""
    def received() -> int:
        return sum(juggler.received for juggler in jugglers)

    for juggler in jugglers:
        juggler.start(m.loop)
    before, began = processes.cpu(m.pid), clock()
    while clock() < began + m.job.seconds:
        for juggler in jugglers:
            juggler.look()
        m.loop.run(min(0.1, m.job.seconds / 2))
    m.loop.run(GRACE, lambda: received() or not jugglers)
    arrived, took = received(), clock() - began
    m.cost(situation, before, arrived * each, scale)
    for juggler in jugglers:
        juggler.sending = False
    sent = sum(juggler.sent for juggler in jugglers)
    m.loop.run(0.3, lambda: received() >= sent)
    if arrived:
        m.numbers[f"rate_{situation}"] = arrived * each / took
        m.numbers[f"loss_{situation}"] = 100 * max(0, sent - received()) / sent
    elif jugglers:
        failures.kinds["nothing arrived"] += 1
    wrong = sum(juggler.wrong for juggler in jugglers)
    if wrong:
        failures.kinds["changed on the way"] += wrong
    for juggler in jugglers:
        for sock in juggler.sockets:
            m.loop.shut(sock)


def idle(m: Measurement) -> None:
    targets = m.target()
    count = affordable(m, [IDLE])[-1:]
    with m.counting("idle tunnels") as failures:
        base = warm(m, targets, failures)
        with m.tunnels(failures) as tunnels:
            for wanted in count:
                tunnels.open(wanted, targets)
                m.numbers[f"opened_{IDLE}"] = len(tunnels.sockets)
                m.weigh(IDLE, base, len(tunnels.sockets))
                times, _rate = visits(m, 1, targets, failures, VISITS)
                m.latencies(IDLE, times)


def growth(m: Measurement) -> None:
    targets = m.target()
    sizes = affordable(m, [size for size in GROWTH if size <= m.job.most])
    with m.counting("growth") as failures:
        base = warm(m, targets, failures)
        with m.tunnels(failures) as tunnels:
            for size in sizes:
                had = len(tunnels.sockets)
                took = tunnels.open(size, targets)
                if len(tunnels.sockets) < size:
                    m.notes.append(f"{size:,} tunnels and more left out: {len(tunnels.sockets):,} could be opened")
                    break
                m.numbers[f"open_{size}"] = took / (size - had) * 1e6
                m.weigh(size, base, size)
                times, rate = ping_pong(m, tunnels.sockets[::size // BUSY][:BUSY], failures)
                m.rate(size, times, rate)
                m.latencies(size, times)


def affordable(m: Measurement, sizes: List[int]) -> List[int]:
    """Those for which there are descriptors here: both ends of every tunnel are ours."""
    limit = m.limit or (SELECT if os.name == "nt" else 2 * max(sizes) + SPARE)
    most = (limit - SPARE) // 2
    left_out = [f"{size:,}" for size in sizes if size > most]
    if left_out:
        m.notes.append(f"{', '.join(left_out)} tunnels left out: the generator may have {limit:,} descriptors only (ulimit -n)")
    return [size for size in sizes if size <= most]


def warm(m: Measurement, targets: List[Place], failures: Failures) -> Optional[float]:
    """
    A few connections, so that what a server makes only once is there; its memory then.

    None if it has been used before: a heap that was large once hides what it takes now.
    """
    m.tunnels(failures, OPENERS, targets).close()
    m.rest()
    return processes.memory(m.pid) if m.job.fresh else None


def fairness(m: Measurement) -> None:
    targets = m.target()
    with m.counting("alone") as failures:
        newcomer(m, "new", targets, failures)
        one_tunnel(m, "ping", targets, failures)
    with m.counting("beside 8 downloads") as failures, beside(bulk_load, m.job, failures) as loaded:
        if loaded:
            newcomer(m, "newbulk", targets, failures)
            one_tunnel(m, "pingbulk", targets, failures)
    with m.counting("beside a flood") as failures, beside(flood_load, m.job, failures) as loaded:
        if loaded:
            one_tunnel(m, "pingflood", targets, failures)


def newcomer(m: Measurement, situation: str, targets: List[Place], failures: Failures) -> None:
    times, _rate = visits(m, 1, targets, failures)
    m.loop.run(GRACE, lambda: not m.loop.deadlines)
    m.latencies(situation, times)


def one_tunnel(m: Measurement, situation: str, targets: List[Place], failures: Failures) -> None:
    with m.tunnels(failures, 1, targets) as tunnels:
        times, _rate = ping_pong(m, tunnels.sockets, failures)
        m.latencies(situation, times)


# --- loads that run beside a measurement ---

Load = Callable[[Job, Loop, Failures], "contextlib.AbstractContextManager[None]"]


@contextlib.contextmanager
def beside(load: Load, job: Job, failures: Failures) -> Iterator[bool]:
    """
    Have a load run in a process of its own, so that it does not keep this loop busy.

    Whether it runs as it should: a number beside half a load would be too good to be true.
    """
    with spawned(run_load, load, job, daemon=True) as (process, pipe):
        try:        # what has failed in it so far
            trouble = dict(pipe.recv()) if pipe.poll(STARTING) else {"load that did not come about": 1}
        except EOFError:
            trouble = {"load that broke down": 1}
        failures.kinds.update(trouble)
        yield not trouble
        if not process.is_alive():
            failures.kinds["load that ended early"] += 1


@contextlib.contextmanager
def spawned(function: Callable[..., None], *arguments: object, daemon: bool = False) -> Iterator[Tuple[BaseProcess, Connection]]:
    """Call it in a process that starts from nothing, with a pipe to us as the last argument; at the end it is ended."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, there), daemon=daemon)
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.terminate()
        process.join()
        here.close()


def run_load(load: Load, job: Job, ready: Connection) -> None:
    """For a while, but not a second longer than the process that has asked for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop, failures = Loop(job.portable), Failures()
    with load(job, loop, failures):
        loop.run(0.1)
        ready.send(dict(failures.kinds))
        parent, until = multiprocessing.parent_process(), clock() + LOAD
        while clock() < until and parent and parent.is_alive():
            loop.run(0.5)


@contextlib.contextmanager
def bulk_load(job: Job, loop: Loop, failures: Failures) -> Iterator[None]:
    """Eight downloads."""
    with Tunnels(loop, job.way, failures) as tunnels:
        tunnels.open(STREAMS, listen(loop, source))
        download(loop, tunnels, Drain(loop.portable))
        yield


@contextlib.contextmanager
def flood_load(job: Job, loop: Loop, failures: Failures) -> Iterator[None]:
    """Datagrams without end to somebody who does not read them."""
    nobody = datagram_socket()          # whose buffer is full from the first moment on
    with relays_to(loop, job.way, nobody, 1, failures) as (relays, header):
        for relay in relays:
            loop.start(flood(loop, datagram_socket(relay), header + bytes(PAYLOAD)))
        yield


# --- the process of a measurement ---

FUNCTIONS = {function.__name__: function for function in (bulk, connections, messages, datagrams, quic, idle, growth, fairness)}


def measure(column: str, job: Job, answer: Connection) -> None:
    """Measure a column and send (numbers, failures, notes); what multiprocessing runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the one who waits for us
    measurement = Measurement(job)
    try:
        FUNCTIONS[column](measurement)
    finally:
        measurement.loop.close()
    answer.send((measurement.numbers, measurement.all_failures, measurement.notes))
