"""
The relay thread: carries the bytes of all tunnels, both ways, until both ways have ended.

Once a tunnel stands nothing is decided any more, so it needs no thread of its own.  One thread serves all tunnels
of a server: it waits for all their sockets at once and moves what has come.  Nothing here blocks.

Teaching TCP, in three sentences.  A connection is two one-way streams that end separately: a program that has sent
its last octet says so with `shutdown(SHUT_WR)`, the other end reads an end of file, *and may go on answering*
("half-close").  A program that dies breaks both streams at once with a reset (RST), and what the other end has may
then be a torso.  So a proxy has to pass on each end by itself and each reset as a reset, or its clients lose the
end of an answer, or take half of one for the whole.

Hence the one idea: a tunnel is two `Flow`s, each with a source and a sink and *at most one chunk in hand*.  While a
flow holds a chunk that its sink will not take, it does not read.  Full duplex, back-pressure and half-close follow
from that without another rule.

A flow that moves a lot stops copying, where the system lets it: on Linux `os.splice` moves pages from socket to
socket through a pipe, without a detour through this process.  And it takes its turn after the others: a few octets
never wait for more than one chunk of it.

Where a connection's octets are coded, in frames that have to be decrypted for instance, its tunnel is one of `CodedFlow`s.

Not here: SOCKS, how octets are coded (gssapi/), and the UDP association (datagrams.py), which the same thread serves.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from functools import partial
from typing import Callable, Deque, Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Set, Tuple, Union

from .descriptors import PIPE_ENDS, descriptors
from .protocol import ProtocolError
from .session import Session
from .waker import Waker

logger = logging.getLogger("socks5srv")

READ, WRITE = 1, 4              # what to wait for; the values of EPOLLIN and EPOLLOUT

CHUNK = 256 * 1024              # octets per read: below, calls cost more than copying does
BULK = 64 * 1024                # octets in one read from which a flow counts as bulk
PIPE = 1024 * 1024              # octets; what unprivileged users may have (pipe-max-size)
PIPES = 32                      # per relay thread; half of what one user gets at that size
BULK_BATCH = 16                 # bulk flows of which one has its turn before all sockets are looked at again

RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)   # SO_LINGER on, 0 s: close() sends RST


def tune(sock: socket.socket) -> None:
    """Set what both sockets of a tunnel need; TCP sockets only."""
    for level, name, value in TUNING:
        sock.setsockopt(level, name, value)


TUNING: List[Tuple[int, int, int]] = [
    # No Nagle: the ends decide when a segment is full, and delaying theirs costs 40 ms a turn.
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # Keepalive after a minute: a peer that vanished would hold the tunnel forever, while a half-closed one that is
    # merely thinking answers the probes and may think on.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)      # macOS calls the first TCP_KEEPALIVE, since Python 3.10
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 8))
        if hasattr(socket, name)
    ),
]


WORDS = {
    errno.ECONNRESET: "connection reset", errno.EPIPE: "broken pipe", errno.ETIMEDOUT: "timed out",
    errno.ENOTCONN: "connection reset",     # what shutdown() says of a socket that has been reset meanwhile
}


def reason_of(error: object) -> str:
    """An error in words, without its number."""
    return str(getattr(error, "strerror", None) or error)


def broken(side: str, error: OSError) -> str:
    """Whose connection has broken, and why: ``client: connection reset``."""
    text = reason_of(error)
    return f"{side}: {WORDS.get(error.errno or 0) or text[:1].lower() + text[1:]}"


# --- waiting for many sockets ---

class EpollWaiter:
    """Linux: the kernel keeps the list, and takes changes from any thread at any time."""

    live = True                 # a change counts at once, also while wait() waits
    room = float("inf")         # sockets

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.wait: Callable[[float], Iterable[Tuple[int, int]]] = self.epoll.poll
        self.close = self.epoll.close

    # Errors and hang-ups are always told.  With no other interest they are told once (edge-triggered), or a
    # half-dead socket that has to wait would keep us spinning.

    def add(self, fd: int, interest: int) -> None:
        self.epoll.register(fd, interest or select.EPOLLET)

    def change(self, fd: int, interest: int) -> None:
        self.epoll.modify(fd, interest or select.EPOLLET)


class SelectorWaiter:
    """Elsewhere: kqueue, or select() on Windows.  A selector must not change while it waits, so only the relay thread may change it."""

    live = False
    room = 512.0 if os.name == "nt" else float("inf")      # FD_SETSIZE

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.close = self.selector.close
        self.add = self.change

    def change(self, fd: int, interest: int) -> None:
        if fd in self.selector.get_map():
            self.selector.unregister(fd)
        events = (interest & READ and selectors.EVENT_READ) | (interest & WRITE and selectors.EVENT_WRITE)
        if events:
            self.selector.register(fd, events)

    def wait(self, timeout: float) -> Iterable[Tuple[int, int]]:
        for key, events in self.selector.select(None if timeout < 0 else timeout):
            yield key.fd, (events & selectors.EVENT_READ and READ) | (events & selectors.EVENT_WRITE and WRITE)


# --- the thread ---

class Pollable(Protocol):
    """What the relay thread calls when its socket is ready.  There, so it must not block."""

    side: str       # whose the socket is ("client"), and so an OSError that ready() raises; if empty that is a bug

    def ready(self, events: int) -> None: """It can be read (READ), written (WRITE), or has failed (anything else)."""

    def abort(self, reason: str) -> None: """Give up now."""


class Relay:
    """The thread that waits for all sockets at once, and calls each `Pollable` whose socket is ready."""

    can_splice = hasattr(os, "splice")      # Linux, from Python 3.10 on
    side = ""

    def __init__(self, splices: bool = True) -> None:
        self.waiter = EpollWaiter() if hasattr(select, "epoll") else SelectorWaiter()
        self.watched: Dict[int, Pollable] = {}
        self.bulk_queue: Dict[Flow, None] = {}  # flows that have a lot to move: after the others, in this order
        self.adding = threading.Lock()          # held while some of these are known to the kernel only
        self.idle_watch: Dict[Callable[[float], None], float] = {}      # see watch_idle()
        self.next_check = float("inf")          # of those; by time.monotonic()
        self.calls: Deque[Callable[[], None]] = deque()
        self.chunk = memoryview(bytearray(CHUNK))       # one for all: whatever stays is copied out
        self.pipes = Pipes() if splices and self.can_splice else None   # none if sockets see what passes (capture)
        self.stopping = False
        self.waker = Waker()
        self.watched[self.waker.fileno()] = self
        self.waiter.add(self.waker.fileno(), READ)
        self.thread = threading.Thread(target=self.run, name="socks5srv-relay", daemon=True)
        self.thread.start()

    # Any thread may call these.

    def watch(self, *newcomers: Tuple[socket.socket, Pollable, int]) -> None:
        """Call ready() of each when its socket is: (socket, pollable, interest).  ValueError if one is closed."""
        if not self.waiter.live and any(sock.fileno() < 0 for sock, _pollable, _interest in newcomers):
            raise ValueError("one of the sockets has been closed already")
        with self.adding:       # no event is delivered meanwhile, so that none meets the others half registered
            if self.waiter.live:
                for sock, _pollable, interest in newcomers:
                    self.waiter.add(sock.fileno(), interest)
            for sock, pollable, _interest in newcomers:
                self.watched[sock.fileno()] = pollable
        if not self.waiter.live:
            self.call(lambda: self.add(newcomers))

    def add(self, newcomers: Sequence[Tuple[socket.socket, Pollable, int]]) -> None:
        """Have the waiter look at them, in the relay thread; not at those that have been aborted meanwhile."""
        for sock, _pollable, interest in newcomers:
            if sock.fileno() >= 0:
                self.waiter.add(sock.fileno(), interest)

    def call(self, function: Callable[[], None]) -> None:
        """Have the relay thread call this, soon."""
        self.calls.append(function)
        self.waker.wake()

    def stop(self) -> None:
        """Abort all that is watched, and end the thread.  Returns when it has ended."""
        self.call(lambda: setattr(self, "stopping", True))
        self.thread.join()

    # Only the relay thread calls these.

    def run(self) -> None:
        while not self.stopping:
            timeout = self.expire_idle()
            for fd, events in self.waiter.wait(0 if self.bulk_queue else timeout):
                pollable = self.watched.get(fd) or self.await_registration(fd)
                if pollable is None:        # closed earlier in this round
                    continue
                try:
                    pollable.ready(events)
                except Exception as error:
                    self.give_up(pollable, error)
            if self.bulk_queue:
                self.run_bulk()
        self.close()

    def run_bulk(self) -> None:
        """Move chunks of those that have many.  One takes up to half a millisecond, so look at the other sockets in between."""
        for _ in range(0, len(self.bulk_queue), BULK_BATCH):
            flow = next(iter(self.bulk_queue))
            del self.bulk_queue[flow]
            try:
                flow.run_bulk()
            except Exception as error:
                self.give_up(flow, error)

    def give_up(self, pollable: Pollable, error: Exception) -> None:
        """Abort what has failed.  A bug may cost this tunnel, but no other."""
        if isinstance(error, OSError) and pollable.side:
            if not isinstance(error, BlockingIOError):      # it only looked ready
                self.attempt(partial(pollable.abort, broken(pollable.side, error)))
        else:
            logger.error("unhandled exception in the relay thread", exc_info=error)
            self.attempt(partial(pollable.abort, "internal error"))

    def await_registration(self, fd: int) -> Optional[Pollable]:
        """What is just being added.  (To look again at once would keep the adding thread from it.)"""
        with self.adding:
            return self.watched.get(fd)

    def ready(self, events: int) -> None:
        """Another thread has something to call."""
        self.waker.drain()
        while self.calls:
            self.attempt(self.calls.popleft())

    def abort(self, reason: str) -> None:
        """Nothing to give up."""

    def attempt(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            logger.exception("unhandled exception in the relay thread")

    def discard(self, sock: socket.socket) -> None:
        """Close it; but forget it before, or its number could be another socket's."""
        fd = sock.fileno()
        if fd >= 0:                 # it is open
            self.watched.pop(fd, None)
            if not self.waiter.live:        # else close() does it, and saves a call
                self.waiter.change(fd, 0)
            sock.close()

    def watch_idle(self, check: Callable[[float], None], timeout: float) -> None:
        """Call ``check(time.monotonic())`` four times in `timeout` seconds, or more, until it leaves `idle_watch`."""
        self.idle_watch[check] = timeout
        self.next_check = min(self.next_check, time.monotonic() + timeout / 4)

    def expire_idle(self) -> float:
        """Check them if it is time; the seconds until the next check, or -1 for never."""
        if not self.idle_watch:
            self.next_check = float("inf")
            return -1
        now = time.monotonic()
        if now >= self.next_check:
            for check in list(self.idle_watch):
                self.attempt(partial(check, now))
            self.next_check = now + min(self.idle_watch.values(), default=0.0) / 4
        return max(0.0, self.next_check - now)

    def close(self) -> None:
        for pollable in set(self.watched.values()):
            pollable.abort("server stopped")
        self.waiter.close()
        self.waker.close()
        if self.pipes:
            self.pipes.close()


# --- pipes, for splice ---

class Pipe:
    """Where pages wait between two sockets; `held` octets of them just now."""

    __slots__ = ("reader", "writer", "held")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.held = 0

    def enlarge(self) -> bool:
        """Grow to PIPE octets; False if the system will not (unprivileged, and many there already)."""
        import fcntl

        try:
            return fcntl.fcntl(self.writer, F_SETPIPE_SZ, PIPE) >= PIPE
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)
        descriptors.give_back(PIPE_ENDS)


F_SETPIPE_SZ = 1031             # in the module fcntl only since Python 3.10


class Pipes:
    """The pipes of one relay thread.  A flow has one only while it holds octets, so a few do for all tunnels."""

    def __init__(self) -> None:
        self.free: List[Pipe] = []
        self.all: Set[Pipe] = set()
        self.limit = PIPES

    def take(self) -> Optional[Pipe]:
        """None if there are no more, or only short ones: to copy is faster then."""
        if self.free:
            return self.free.pop()
        if len(self.all) >= self.limit or not descriptors.take_if_plenty(PIPE_ENDS):    # they are needed elsewhere
            return None
        try:
            pipe = Pipe()
        except OSError:             # or by the rest of the program
            descriptors.give_back(PIPE_ENDS)
            return None
        if not pipe.enlarge():
            pipe.close()
            self.limit = len(self.all)
            return None
        self.all.add(pipe)
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Keep it for the next flow if it is empty; one with octets in it is thrown away."""
        if pipe.held:
            self.all.discard(pipe)
            pipe.close()
        else:
            self.free.append(pipe)

    def close(self) -> None:
        for pipe in self.all:
            pipe.close()


# --- tunnels ---

class Flow:
    """
    One direction: what can be read from `source` goes to `sink`.

    Either it is `reading`, and the source is waited for; or it `holds` octets that the sink did not take,
    in `chunk` or in `pipe`, and the sink is waited for; or it has `finished`.
    """

    __slots__ = ("tunnel", "source", "sink", "side", "opposite", "octets", "reading", "bulk", "chunk", "pipe")

    opposite: Flow

    def __init__(self, tunnel: Tunnel, source: socket.socket, sink: socket.socket, side: str) -> None:
        self.tunnel, self.source, self.sink = tunnel, source, sink
        self.side = side            # whose the source is: "client" or "target"
        self.octets = 0             # that the sink has taken
        self.reading = True
        self.bulk = False
        self.chunk: Optional[bytes] = None
        self.pipe: Optional[Pipe] = None

    def ready(self, events: int) -> None:
        """The source is ready: to be read by this flow, or to be written by the opposite one."""
        if events & WRITE:
            self.opposite.flush()
        if events & ~WRITE:
            if not self.reading:
                self.check()
            elif self.bulk:
                self.tunnel.relay.bulk_queue[self] = None
            else:
                self.copy()

    def abort(self, reason: str) -> None:
        self.tunnel.abort(reason)

    def run_bulk(self) -> None:
        """Move one chunk of many, after the flows that had less to move."""
        if self.reading and not self.tunnel.over:       # which may have changed meanwhile
            self.splice()

    # An OSError of these is the source's; for one of the sink's they abort the tunnel themselves.

    def copy(self) -> None:
        """Move one chunk.  One only, however much is there: the other flows have their turn."""
        relay = self.tunnel.relay
        n = self.source.recv_into(relay.chunk)
        if not n:
            self.finish()
            return
        try:
            sent = self.sink.send(relay.chunk[:n])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.tunnel.abort(broken(self.opposite.side, error))
            return
        self.octets += sent
        if sent < n:
            self.chunk = bytes(relay.chunk[sent:n])
            self.read_on(False)
        self.bulk = n >= BULK

    def splice(self) -> None:
        """The same without copying, where there is a pipe to be had."""
        pipes = self.tunnel.relay.pipes
        pipe = pipes.take() if pipes else None
        if pipe is None or pipes is None:
            self.copy()
            return
        try:
            pipe.held = n = os.splice(self.source.fileno(), pipe.writer, PIPE, flags=SPLICE_FLAGS)
            if n:
                self.drain(pipe)
        except OSError as error:
            pipes.give_back(pipe)
            if not pipe.held:
                raise
            self.tunnel.abort(broken(self.opposite.side, error))
            return
        if pipe.held:
            self.pipe = pipe
            self.read_on(False)
        else:
            pipes.give_back(pipe)   # it is of more use to others
        if not n:
            self.finish()
        elif n < BULK // 2:
            self.bulk = False

    def finish(self) -> None:
        """The source has ended: pass that on to the sink; the opposite flow goes on."""
        self.reading = False
        if not self.opposite.reading and not self.opposite.holds:       # it has finished, too
            self.tunnel.end(self.tunnel.reason)
            return
        self.tunnel.reason = f"closed by {self.side}"
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.tunnel.abort(broken(self.opposite.side, error))
        else:
            self.refresh()

    # An OSError of these is the sink's.

    def flush(self) -> None:
        """The sink has room again."""
        if self.pipe:
            self.drain(self.pipe)
            if not self.pipe.held:
                self.release_pipe()
        elif self.chunk:
            sent = self.sink.send(self.chunk)
            self.octets += sent
            self.chunk = self.chunk[sent:] or None
        if not self.holds:
            self.read_on(True)

    def drain(self, pipe: Pipe) -> None:
        """From the pipe to the sink, as much as it takes."""
        try:
            sent = os.splice(pipe.reader, self.sink.fileno(), pipe.held, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        pipe.held -= sent
        self.octets += sent

    @property
    def holds(self) -> bool:
        return bool(self.chunk or self.pipe)

    def read_on(self, reading: bool) -> None:
        """Wait for the source, or else, as the sink is full, for the sink."""
        self.reading = reading
        self.refresh()
        self.opposite.refresh()

    def release_pipe(self) -> None:
        if self.pipe and self.tunnel.relay.pipes:
            self.tunnel.relay.pipes.give_back(self.pipe)
        self.pipe = None

    @property
    def interest(self) -> int:
        """What the source is waited for: to be read here, to be written by the opposite flow."""
        return (READ if self.reading else 0) | (WRITE if self.opposite.chunk or self.opposite.pipe else 0)

    def refresh(self) -> None:
        self.tunnel.relay.waiter.change(self.source.fileno(), self.interest)

    def check(self) -> None:
        """The source reports something although it is not read: raise it if it is an error."""
        code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))


SPLICE_FLAGS = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)


class Tunnel:
    """
    A client and its target, and the two flows between them.

    Both sockets belong to the tunnel from here on, and it closes them.  When it has ended, it calls `on_end()` in the
    relay thread: that must not block.  `early` is what the client sent before the tunnel stood.  `idle_timeout`:
    seconds without an octet either way after which it is closed; None for never.
    """

    __slots__ = ("relay", "up", "down", "session", "on_end", "over", "reason", "idle_timeout", "seen", "seen_at")

    def __init__(self, relay: Relay, client: socket.socket, target: socket.socket, session: Session,
                 on_end: Callable[[], None], idle_timeout: Optional[float] = None, early: bytes = b"") -> None:
        self.relay, self.session, self.on_end = relay, session, on_end
        self.up = Flow(self, client, target, "client")
        self.down = Flow(self, target, client, "target")
        self.up.opposite, self.down.opposite = self.down, self.up
        self.over = False
        self.reason = ""            # which side has closed first
        self.idle_timeout = idle_timeout or 0.0     # seconds; 0 for never
        self.seen, self.seen_at = -1, 0.0       # octets moved, and when: what the last check saw
        if early:
            self.up.chunk, self.up.reading = early, False
        session.tunnel = self

    def start(self) -> None:
        """Hand it to the relay thread; called in any thread, which must not touch it afterwards."""
        if self.idle_timeout:
            self.relay.call(lambda: self.relay.watch_idle(self.check_idle, self.idle_timeout))
        try:
            up, down = self.up, self.down
            for sock in (up.source, down.source):
                if sock.gettimeout() != 0:      # a getter is cheaper than a redundant ioctl
                    sock.setblocking(False)
            # The client last: more often than the target it sends something at once.
            self.relay.watch((down.source, down, down.interest), (up.source, up, up.interest))
        except (OSError, ValueError) as error:      # it has been aborted already, or the system will not watch any more
            self.abort_soon(reason_of(error))

    def abort_soon(self, reason: str) -> None:
        """abort(), called in any thread."""
        self.relay.call(lambda: self.abort(reason))

    def check_idle(self, now: float) -> None:
        """End it if nothing has moved for too long."""
        octets = self.up.octets + self.down.octets
        if self.over:               # before the watch began
            self.relay.idle_watch.pop(self.check_idle, None)
        elif octets != self.seen:
            self.seen, self.seen_at = octets, now
        elif now - self.seen_at >= self.idle_timeout:
            self.abort("idle")

    def abort(self, reason: str) -> None:
        """Break both connections off: the ends must see a failure, not an ordinary end."""
        for flow in (self.up, self.down):
            try:
                flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            except OSError:         # it has been broken off already
                pass
        self.end(reason)

    def end(self, reason: str) -> None:
        if self.over:               # both sockets can fail in one round
            return
        self.over = True
        self.relay.idle_watch.pop(self.check_idle, None)
        for flow in (self.up, self.down):
            self.relay.discard(flow.source)
            flow.release_pipe()
        self.session.up += self.up.octets
        self.session.down += self.down.octets
        self.session.tunnel = None
        self.session.end(reason)
        self.on_end()
        del self.on_end             # which has us: so neither waits for the garbage collector


# --- coded tunnels ---

FRAMES = 16                 # decoded in one turn at most: small ones cost as much time as one of BULK octets


class Coding(Protocol):
    """How the octets of a connection are coded, either way.  What is coded first has to be sent first."""

    block: int              # octets of plain text that one frame has room for

    def encode(self, octets: Union[bytes, memoryview], /) -> bytes: """As frames."""

    def decode(self, received: bytearray, /) -> Optional[bytes]:
        """Take the first frame off, and decode it; None if there is more of it to come.  ProtocolError if it is wrong."""


class Coded(NamedTuple):
    """One end of a tunnel: its coding, and what has been received from there and is still to be decoded; or has been."""

    coding: Coding
    received: bytes = b""
    decoded: bytes = b""       # of a target only: a client's goes with what it has sent early


class CodedFlow(Flow):
    """
    One direction whose source, or sink, or both, are coded: it moves one chunk in a turn, too, and never without copying.

    `received` are frames that are not whole yet, or wait for the next turn: two of them at most, as no more is read then.
    """

    __slots__ = ("decoding", "encoding", "received", "plain")

    def __init__(self, tunnel: Tunnel, source: socket.socket, sink: socket.socket, side: str, coded: Optional[Coded], coding: Optional[Coding]) -> None:
        super().__init__(tunnel, source, sink, side)
        self.decoding = coded.coding if coded else None
        self.encoding = coding
        self.received = bytearray(coded.received if coded else b"")
        self.plain = 0              # octets of plain text in `chunk`

    def copy(self) -> None:
        try:
            octets = self.next() or self.receive()
        except ProtocolError as error:
            self.tunnel.abort(f"{self.side}: {error}")
            return
        if octets:
            self.pass_on(octets)

    splice = copy

    def next(self) -> bytes:
        """What is in the frames at hand, or in some of them: then it is this flow's turn again soon."""
        found: List[bytes] = []
        if self.decoding and self.received:
            while len(found) < FRAMES and sum(map(len, found)) < BULK // 2:
                octets = self.decoding.decode(self.received)
                if octets is None:
                    break
                found.append(octets)
            else:
                self.tunnel.relay.bulk_queue[self] = None
        return b"".join(found)

    def receive(self) -> bytes:
        """Read, and decode; what there is to pass on."""
        room = self.tunnel.relay.chunk[:self.encoding.block if self.encoding else BULK]
        n = self.source.recv_into(room)
        self.bulk = n >= BULK // 4
        if not n:
            self.finish()
            return b""
        if not self.decoding:
            return bytes(room[:n])
        self.received += room[:n]
        return self.next()

    def finish(self) -> None:
        if self.received:
            raise ProtocolError("the connection ended within a frame")
        super().finish()

    def pass_on(self, octets: bytes) -> None:
        """Send them, or as much as the sink takes, and hold the rest."""
        try:
            self.hold(octets)
            self.send()
        except BlockingIOError:
            pass
        except (OSError, ProtocolError) as error:
            self.tunnel.abort(broken(self.opposite.side, error) if isinstance(error, OSError) else f"{self.opposite.side}: {error}")
            return
        if self.chunk:
            self.read_on(False)

    def hold(self, octets: bytes) -> None:
        self.plain = len(octets)
        self.chunk = self.encoding.encode(octets) if self.encoding else octets

    def send(self) -> None:
        """As much of the chunk as the sink takes."""
        if self.chunk:
            sent = self.sink.send(self.chunk)
            self.chunk = self.chunk[sent:] or None
            plain = min(sent, self.plain)       # what the frames take beyond their content is not counted
            self.plain -= plain
            self.octets += plain

    def flush(self) -> None:
        self.send()
        if not self.chunk:
            self.read_on(True)

    def read_on(self, reading: bool) -> None:
        super().read_on(reading)
        self.go_on()

    def go_on(self) -> None:
        """There may be whole frames at hand, of which the source will tell nothing any more."""
        if self.received:
            self.tunnel.relay.bulk_queue[self] = None


class CodedTunnel(Tunnel):
    """A tunnel with a client, or a target, or both, whose octets are coded.  `early` is plain text."""

    __slots__ = ()

    def __init__(self, relay: Relay, client: socket.socket, target: socket.socket, session: Session, on_end: Callable[[], None],
                 idle_timeout: Optional[float], early: bytes, at_client: Optional[Coded], at_target: Optional[Coded]) -> None:
        super().__init__(relay, client, target, session, on_end, idle_timeout)
        up = CodedFlow(self, client, target, "client", at_client, at_target.coding if at_target else None)
        down = CodedFlow(self, target, client, "target", at_target, at_client.coding if at_client else None)
        self.up, self.down = up, down
        up.opposite, down.opposite = down, up
        for flow, octets in ((up, early), (down, at_target.decoded if at_target else b"")):
            if octets:
                flow.hold(octets)
                flow.reading = False

    def start(self) -> None:
        super().start()
        for flow in (self.up, self.down):
            if isinstance(flow, CodedFlow) and flow.received:
                self.relay.call(flow.go_on)
