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
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import processes
from .loop import Loop, clock
from .measures import BUSY, COLUMNS, GROWTH, IDLE
from .traffic import (
    LOCALHOST, OPENERS, Associations, Drain, Failures, Juggler, Place, Service, Tunnels, Way, datagram_echo, datagram_socket,
    datagram_target, echo, flood, header_to, listen, pinger, sending, source, visitor,
)

CONNECTION = b"c" * 100     # what a short connection has echoed
MESSAGE = b"m" * 64         # what goes to and fro on a tunnel
PAYLOAD = 200               # octets of a datagram
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

    def cost(self, key: str, before: Optional[float], count: float, scale: float) -> None:
        """The processor time since `before`, for each of so many."""
        now = processes.cpu(self.pid)
        if before is not None and now is not None and count:
            self.numbers[key] = (now - before) / count * scale

    def latencies(self, situation: str, times: List[float], *quantities: str) -> None:
        """Some of p50 and p99, in microseconds."""
        times.sort()
        for quantity in quantities if times else ():
            share = int(quantity[1:]) / 100
            self.numbers[f"{quantity}_{situation}"] = times[min(len(times) - 1, int(share * len(times)))] * 1e6


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


def opening_time(count: int) -> float:
    """Seconds that opening so many tunnels may take."""
    return 5 + count / 300


# --- the columns ---

def bulk(m: Measurement) -> None:
    for situation, streams in (("download", 1), ("downloads", STREAMS), ("upload", 1)):
        with m.counting(words("bulk", situation)) as failures:
            stream(m, situation, streams, failures)


def stream(m: Measurement, situation: str, streams: int, failures: Failures) -> None:
    drain = Drain(m.loop.portable)
    tunnels = Tunnels(m.loop, m.job.way, failures)
    tunnels.open(streams, m.target(drain.service if situation == "upload" else source), opening_time(streams))
    for sock in tunnels.sockets:
        if situation == "upload":
            m.loop.start(sending(m.loop, sock))
        else:
            sock.send(b"!")
            m.loop.start(drain.service(m.loop, sock))
    m.loop.run(0.2 * m.job.seconds)         # until the windows have grown
    octets, before, began = drain.octets, processes.cpu(m.pid), clock()
    m.loop.run(m.job.seconds)
    m.loop.run(GRACE, lambda: drain.octets > octets or not tunnels.sockets)
    gib, took = (drain.octets - octets) / 2 ** 30, clock() - began
    m.cost(f"cpu_{situation}", before, gib, 1)
    if gib:
        m.numbers[f"rate_{situation}"] = gib / took
    elif tunnels.sockets:
        failures.kinds["nothing arrived"] += 1
    tunnels.close()
    m.loop.run(0.05)                        # and the other ends


def connections(m: Measurement) -> None:
    targets = m.target()
    for clients in (1, 16, 128):
        with m.counting(words("connections", clients)) as failures:
            before = processes.cpu(m.pid)
            times, rate = visits(m, clients, targets, failures)
            m.cost(f"cpu_{clients}", before, len(times), 1e6)
            if times:
                m.numbers[f"rate_{clients}"] = rate
            m.loop.run(GRACE, lambda: not m.loop.deadlines)
            m.latencies(str(clients), times, "p50", "p99")


def messages(m: Measurement) -> None:
    targets = m.target()
    for count in (1, 64, 512):
        with m.counting(words("messages", count)) as failures:
            tunnels = Tunnels(m.loop, m.job.way, failures)
            tunnels.open(count, targets, opening_time(count))
            before = processes.cpu(m.pid)
            times, rate = ping_pong(m, tunnels.sockets, failures)
            m.cost(f"cpu_{count}", before, len(times), 1e6)
            if times:
                m.numbers[f"rate_{count}"] = rate
            m.latencies(str(count), times, "p50", "p99")
            tunnels.close()


def datagrams(m: Measurement) -> None:
    target = datagram_target()
    m.loop.start(datagram_echo(m.loop, target))
    for count, under_way in ((1, 32), (64, 4)):
        with m.counting(words("datagrams", count)) as failures:
            juggle(m, target.getsockname(), count, under_way, failures)


def juggle(m: Measurement, target: Place, count: int, under_way: int, failures: Failures) -> None:
    associations = associate(m, count, failures) if m.job.way.proxy else None
    relays = associations.relays if associations else [target] * count
    header = header_to(target) if associations else b""
    jugglers = [Juggler(relay, header, str(i).encode().rjust(PAYLOAD), under_way) for i, relay in enumerate(relays)]
    for juggler in jugglers:
        m.loop.start(juggler.catch(m.loop))
    before, began = processes.cpu(m.pid), clock()
    while clock() < began + m.job.seconds:
        for juggler in jugglers:
            juggler.look()
        m.loop.run(min(0.1, m.job.seconds / 2))
    m.loop.run(GRACE, lambda: not jugglers or any(juggler.received for juggler in jugglers))
    echoed, took = sum(juggler.received for juggler in jugglers), clock() - began
    m.cost(f"cpu_{count}", before, echoed, 1e6)
    for juggler in jugglers:
        juggler.throwing = False
    sent = sum(juggler.sent for juggler in jugglers)
    m.loop.run(0.3, lambda: sum(juggler.received for juggler in jugglers) >= sent)
    if echoed:
        m.numbers[f"rate_{count}"] = echoed / took
        m.numbers[f"loss_{count}"] = 100 * max(0, sent - sum(juggler.received for juggler in jugglers)) / sent
    elif jugglers:
        failures.kinds["nothing came back"] += 1
    wrong = sum(juggler.wrong for juggler in jugglers)
    if wrong:
        failures.kinds["changed on the way"] += wrong
    for juggler in jugglers:
        m.loop.shut(juggler.sock)
    if associations:
        associations.close()


def associate(m: Measurement, count: int, failures: Failures) -> Associations:
    associations = Associations(m.loop, m.job.way, failures)
    associations.open(count, [(LOCALHOST, 0)], opening_time(count))
    return associations


def idle(m: Measurement) -> None:
    targets = m.target()
    count = affordable(m, [IDLE])[-1:]
    with m.counting("idle tunnels") as failures:
        base = warm(m, targets, failures)
        tunnels = Tunnels(m.loop, m.job.way, failures)
        for wanted in count:
            tunnels.open(wanted, targets, opening_time(wanted))
            m.numbers[f"opened_{IDLE}"] = len(tunnels.sockets)
            weigh(m, f"kib_{IDLE}", base, len(tunnels.sockets))
            times, _rate = visits(m, 1, targets, failures, VISITS)
            m.latencies(str(IDLE), times, "p50", "p99")
        tunnels.close()


def growth(m: Measurement) -> None:
    targets = m.target()
    sizes = affordable(m, [size for size in GROWTH if size <= m.job.most])
    with m.counting("growth") as failures:
        base = warm(m, targets, failures)
        tunnels = Tunnels(m.loop, m.job.way, failures)
        for size in sizes:
            had = len(tunnels.sockets)
            took = tunnels.open(size, targets, opening_time(size))
            if len(tunnels.sockets) < size:
                m.notes.append(f"{size:,} tunnels and more left out: {len(tunnels.sockets):,} could be opened")
                break
            m.numbers[f"open_{size}"] = took / (size - had) * 1e6
            weigh(m, f"kib_{size}", base, size)
            times, rate = ping_pong(m, tunnels.sockets[::size // BUSY][:BUSY], failures)
            if times:
                m.numbers[f"rate_{size}"] = rate
            m.latencies(str(size), times, "p50", "p99")
        tunnels.close()


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
    tunnels = Tunnels(m.loop, m.job.way, failures)
    tunnels.open(OPENERS, targets, opening_time(OPENERS))
    tunnels.close()
    m.loop.run(0.05)
    processes.rest(m.pid)
    return processes.memory(m.pid) if m.job.fresh else None


def weigh(m: Measurement, key: str, base: Optional[float], count: int) -> None:
    m.loop.run(0.05)
    processes.rest(m.pid)
    now = processes.memory(m.pid)
    if base is not None and now is not None and count:
        m.numbers[key] = max(0.0, now - base) / count


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
    m.latencies(situation, times, "p50", "p99")


def one_tunnel(m: Measurement, situation: str, targets: List[Place], failures: Failures) -> None:
    tunnels = Tunnels(m.loop, m.job.way, failures)
    tunnels.open(1, targets, opening_time(1))
    times, _rate = ping_pong(m, tunnels.sockets, failures)
    m.latencies(situation, times, "p50", "p99")
    tunnels.close()


# --- loads that run beside a measurement ---

Load = Callable[[Job, Connection], None]


@contextlib.contextmanager
def beside(load: Load, job: Job, failures: Failures) -> Iterator[bool]:
    """
    Have a load run in a process of its own, so that it does not keep this loop busy.

    Whether it runs as it should: a number beside half a load would be too good to be true.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=load, args=(job, there), daemon=True)
    process.start()
    there.close()
    try:
        trouble = begin(here)
        failures.kinds.update(trouble)
        yield not trouble
        if not process.is_alive():
            failures.kinds["load that ended early"] += 1
    finally:
        process.terminate()
        process.join()
        here.close()


def begin(load: Connection) -> Dict[str, int]:
    """Wait until a load runs; what has failed in it so far."""
    try:
        return dict(load.recv()) if load.poll(STARTING) else {"load that did not come about": 1}
    except EOFError:
        return {"load that broke down": 1}


def bulk_load(job: Job, ready: Connection) -> None:
    """Eight downloads, until the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop, failures = Loop(job.portable), Failures()
    drain, tunnels = Drain(loop.portable), Tunnels(loop, job.way, failures)
    tunnels.open(STREAMS, listen(loop, source), opening_time(STREAMS))
    for sock in tunnels.sockets:
        sock.send(b"!")
        loop.start(drain.service(loop, sock))
    loop.run(0.1)
    ready.send(dict(failures.kinds))
    run_with_parent(loop)


def run_with_parent(loop: Loop) -> None:
    """For a while, but not a second longer than the process that has asked for it."""
    parent, until = multiprocessing.parent_process(), clock() + LOAD
    while clock() < until and parent and parent.is_alive():
        loop.run(0.5)


def flood_load(job: Job, ready: Connection) -> None:
    """Datagrams without end to somebody who does not read them, until the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop, failures = Loop(job.portable), Failures()
    nobody = datagram_target()          # whose buffer is full from the first moment on
    place = nobody.getsockname()
    relays, header = [place], b""
    if job.way.proxy:
        associations = Associations(loop, job.way, failures)
        associations.open(1, [place], opening_time(1))
        relays, header = associations.relays, header_to(place)
    for relay in relays:
        sock = datagram_socket()
        sock.connect(relay)
        loop.start(flood(loop, sock, header + bytes(PAYLOAD)))
    loop.run(0.1)
    ready.send(dict(failures.kinds))
    run_with_parent(loop)


# --- the process of a measurement ---

FUNCTIONS: Dict[str, Callable[[Measurement], None]] = {
    "bulk": bulk, "connections": connections, "messages": messages, "datagrams": datagrams, "idle": idle, "growth": growth,
    "fairness": fairness,
}


def measure(column: str, job: Job, answer: Connection) -> None:
    """Measure a column and send (numbers, failures, notes); what multiprocessing runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the one who waits for us
    measurement = Measurement(job)
    try:
        FUNCTIONS[column](measurement)
    finally:
        measurement.loop.close()
    answer.send((measurement.numbers, measurement.all_failures, measurement.notes))
