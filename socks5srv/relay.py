"""
The relay thread: carries the bytes of all tunnels, both ways, until both ways have ended.

Once a tunnel stands nothing is decided any more, so it needs no thread of its own, only
somebody who looks when its sockets are ready.  One thread does that for all tunnels of a
server: it waits for all their sockets at once and moves what has come.  Nothing here blocks.

Teaching TCP, in three sentences.  A connection is two one-way streams that end separately: a
program that has sent its last octet says so with `shutdown(SHUT_WR)`, the other end reads
an end of file, *and may go on answering* ("half-close").  A program that dies breaks both
streams at once with a reset (RST), and what the other end has may then be a torso.  So a
proxy has to pass on each end by itself and each reset as a reset, or its clients lose the
end of an answer, or take half of one for the whole.

Hence the one idea: a tunnel is two `Flow`s, each with a source and a sink and *at most one
chunk in hand*.  While a flow holds a chunk that its sink will not take, it does not read.
Full duplex, back-pressure and half-close follow from that without another rule.

A flow that moves a lot stops copying, where the system lets it: on Linux `os.splice` moves
pages from socket to socket through a pipe, without a detour through this process.  And it
takes its turn after the others: whoever has but a few octets to move waits for one chunk of it.

This file knows no SOCKS.  The UDP association, in datagrams.py, is watched by the same thread.
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
from typing import Callable, Deque, Dict, Iterable, List, Optional, Protocol, Sequence, Set, Tuple

from .descriptors import PIPE_ENDS, descriptors
from .session import Session

logger = logging.getLogger("socks5srv")

READ, WRITE = 1, 4              # what to wait for; the values of EPOLLIN and EPOLLOUT

CHUNK = 256 * 1024              # octets per read: below, calls cost more than copying does
BULK = 64 * 1024                # octets in one read from which a flow counts as bulk
PIPE = 1024 * 1024              # octets; what unprivileged users may have (pipe-max-size)
PIPES = 32                      # per relay thread; half of what one user gets at that size
ROUND = 16                      # bulk flows of which one has its turn before all sockets are looked at again

RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)   # SO_LINGER on, 0 s: close() sends RST


def tune(sock: socket.socket) -> None:
    """
    Set what both sockets of a tunnel need; TCP sockets only.

    No Nagle: the ends decide when a segment is full, and delaying theirs costs 40 ms a turn.
    Keepalive after a minute: a peer that vanished would hold the tunnel forever, while a
    half-closed one that is merely thinking answers the probes and may think on.
    """
    for level, name, value in TUNING:
        sock.setsockopt(level, name, value)


TUNING: List[Tuple[int, int, int]] = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
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


def broken(side: str, error: OSError) -> str:
    """Whose connection has broken, and why: ``client: connection reset``."""
    text = error.strerror or str(error)
    return f"{side}: {WORDS.get(error.errno or 0) or text[:1].lower() + text[1:]}"


# --- waiting for many sockets ---

class EpollWaiter:
    """Linux: the kernel keeps the list, and takes changes from any thread at any time."""

    live = True                 # a change counts at once, also while wait() waits
    room = float("inf")         # sockets

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.wait: Callable[[float], Iterable[Tuple[int, int]]] = self.epoll.poll

    # Errors and hang-ups are always told.  With no other interest they are told once
    # (edge-triggered), or a half-dead socket that has to wait would keep us spinning.

    def add(self, fd: int, interest: int) -> None:
        self.epoll.register(fd, interest or select.EPOLLET)

    def change(self, fd: int, interest: int) -> None:
        self.epoll.modify(fd, interest or select.EPOLLET)

    def remove(self, fd: int) -> None:
        pass                    # close() does it, and saves a call

    def close(self) -> None:
        self.epoll.close()


class SelectorWaiter:
    """
    Elsewhere: kqueue, or select() on Windows, through the standard library's selectors.

    A selector must not change while it waits, so only the relay thread may change it.
    """

    live = False
    room = 512.0 if os.name == "nt" else float("inf")      # FD_SETSIZE

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def add(self, fd: int, interest: int) -> None:
        self.change(fd, interest)

    def change(self, fd: int, interest: int) -> None:
        if fd in self.selector.get_map():
            self.selector.unregister(fd)
        events = (interest & READ and selectors.EVENT_READ) | (interest & WRITE and selectors.EVENT_WRITE)
        if events:
            self.selector.register(fd, events)

    def remove(self, fd: int) -> None:
        self.change(fd, 0)

    def wait(self, timeout: float) -> Iterable[Tuple[int, int]]:
        for key, events in self.selector.select(None if timeout < 0 else timeout):
            yield key.fd, (events & selectors.EVENT_READ and READ) | (events & selectors.EVENT_WRITE and WRITE)

    def close(self) -> None:
        self.selector.close()


# --- the thread ---

class Watched(Protocol):
    """What the relay thread watches; it is called there, and must neither block nor raise."""

    def ready(self, events: int) -> None:
        """The socket can be read (READ), written (WRITE), or has failed (anything else)."""

    def abort(self, reason: str) -> None:
        """Give up now."""


class Impatient(Protocol):
    """What has to do something when nothing has moved for some time: `patience`, in seconds."""

    patience: float

    def look(self, now: float) -> None:
        """See whether it is time, and take itself off the list when it is over.  In the relay thread; `now` is time.monotonic()."""


class Relay:
    """
    The thread that waits for all sockets at once, and calls whoever watches one.

    Any thread may `watch()` and `call()`; everything else happens in the relay thread.
    """

    splices = hasattr(os, "splice")     # Linux, from Python 3.10 on; False: always copy

    def __init__(self, name: str = "socks5srv-relay") -> None:
        self.waiter = EpollWaiter() if hasattr(select, "epoll") else SelectorWaiter()
        self.watched: Dict[int, Watched] = {}
        self.bulky: Dict[Flow, None] = {}       # flows that have a lot to move: after the others, in this order
        self.adding = threading.Lock()          # held while some of these are known to the kernel only
        self.impatient: Set[Impatient] = set()
        self.next_look = float("inf")           # at them; by time.monotonic()
        self.calls: Deque[Callable[[], None]] = deque()
        self.chunk = memoryview(bytearray(CHUNK))       # one for all: whatever stays is copied out
        self.pipes = Pipes() if self.splices else None
        self.stopping = False
        self.wake_reader, self.wake_writer = socket.socketpair()
        self.wake_reader.setblocking(False)
        self.wake_writer.setblocking(False)
        self.watched[self.wake_reader.fileno()] = self
        self.add([(self.wake_reader, self, READ)])
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)
        self.thread.start()

    # Called in any thread.

    def load(self) -> int:
        """How many sockets it watches."""
        return len(self.watched)

    def has_room(self) -> bool:
        """Whether another tunnel fits into what the system can wait for at once."""
        return len(self.watched) + 4 <= self.waiter.room

    def watch(self, *newcomers: Tuple[socket.socket, Watched, int]) -> None:
        """
        Call ``ready(events)`` of each whenever its socket has something of interest:
        ``watch((socket, watched, interest), ...)``.  ValueError if one has been closed.

        All of them or none: an event that comes before the last is known has to wait.  So what
        belongs together is never met half registered.
        """
        if not self.waiter.live and any(sock.fileno() < 0 for sock, _watched, _interest in newcomers):
            raise ValueError("one of the sockets has been closed already")
        with self.adding:
            if self.waiter.live:
                for sock, _watched, interest in newcomers:
                    self.waiter.add(sock.fileno(), interest)
            for sock, watched, _interest in newcomers:
                self.watched[sock.fileno()] = watched
        if not self.waiter.live:
            self.call(lambda: self.add(newcomers))

    def add(self, newcomers: Sequence[Tuple[socket.socket, Watched, int]]) -> None:
        """Have the waiter look at them, in the relay thread; not at those that have been aborted meanwhile."""
        for sock, _watched, interest in newcomers:
            if sock.fileno() >= 0:
                self.waiter.add(sock.fileno(), interest)

    def call(self, function: Callable[[], None]) -> None:
        """Have the relay thread call this, soon."""
        self.calls.append(function)
        self.wake()

    def stop(self) -> None:
        """Abort all that is watched, and end the thread.  Returns when it has ended."""
        self.call(lambda: setattr(self, "stopping", True))
        self.thread.join()

    def wake(self) -> None:
        try:
            self.wake_writer.send(b"!")
        except BlockingIOError:
            pass                # full: it will wake all right
        except OSError:
            if not self.stopping:
                raise

    # Called in the relay thread.

    def run(self) -> None:
        while not self.stopping:
            timeout = self.end_the_idle()
            for fd, events in self.waiter.wait(0 if self.bulky else timeout):
                watched = self.watched.get(fd) or self.await_watched(fd)
                if watched is None:         # gone since the wait began
                    continue
                try:
                    watched.ready(events)
                except Exception:
                    self.give_up(watched)
            if self.bulky:
                self.move_bulk()
        self.close()

    def move_bulk(self) -> None:
        """A chunk takes up to half a millisecond, so look in between whether somebody has but a few octets to move."""
        for _ in range(0, len(self.bulky), ROUND):
            flow = next(iter(self.bulky))
            del self.bulky[flow]
            try:
                flow.take_turn()
            except Exception:
                self.give_up(flow)

    def give_up(self, watched: Watched) -> None:
        """A bug may cost this tunnel, but no other."""
        logger.exception("a bug, met in the relay thread")
        watched.abort("internal error")

    def await_watched(self, fd: int) -> Optional[Watched]:
        """Whoever is just being added.  (To look again at once would keep the adding thread from it.)"""
        with self.adding:
            return self.watched.get(fd)

    def ready(self, events: int) -> None:
        """Somebody woke the thread."""
        try:
            self.wake_reader.recv(4096)
        except BlockingIOError:
            pass
        while self.calls:
            self.attempt(self.calls.popleft())

    def abort(self, reason: str) -> None:
        """Nothing to give up."""

    def attempt(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            logger.exception("a bug, met in the relay thread")

    def unwatch(self, fd: int) -> None:
        """Forget it; to be called before it is closed, or its number could be somebody else's."""
        self.watched.pop(fd, None)
        self.waiter.remove(fd)

    def watch_idleness(self, impatient: Impatient) -> None:
        """Have it look whether anything has moved, four times in each of its `patience`, or more often."""
        self.impatient.add(impatient)
        self.next_look = min(self.next_look, time.monotonic() + impatient.patience / 4)

    def end_the_idle(self) -> float:
        """Do so if it is time; the seconds until the next look, or -1 for never."""
        if not self.impatient:
            self.next_look = float("inf")
            return -1
        now = time.monotonic()
        if now >= self.next_look:
            for impatient in list(self.impatient):
                self.attempt(partial(impatient.look, now))
            self.next_look = now + min((impatient.patience for impatient in self.impatient), default=0.0) / 4
        return max(0.0, self.next_look - now)

    def close(self) -> None:
        for watched in set(self.watched.values()):
            watched.abort("server stopped")
        self.unwatch(self.wake_reader.fileno())
        self.waiter.close()
        self.wake_reader.close()
        self.wake_writer.close()
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


F_SETPIPE_SZ = 1031             # in the module fcntl only since Python 3.10


class Pipes:
    """
    The pipes of one relay thread.

    A flow has one only while it holds octets, so a few do for any number of tunnels.
    Where there are no more, or only short ones, the flow copies: that is faster then.
    """

    def __init__(self) -> None:
        self.free: List[Pipe] = []
        self.all: Set[Pipe] = set()
        self.limit = PIPES

    def take(self) -> Optional[Pipe]:
        if self.free:
            return self.free.pop()
        return self.make() if len(self.all) < self.limit else None

    def make(self) -> Optional[Pipe]:
        if not descriptors.take_if_plenty(PIPE_ENDS):       # they are needed elsewhere
            return None
        try:
            pipe = Pipe()
        except OSError:             # or by the rest of the program
            descriptors.give_back(PIPE_ENDS)
            return None
        if not pipe.enlarge():
            self.throw_away(pipe)
            self.limit = len(self.all)
            return None
        self.all.add(pipe)
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """An empty one for the next to take, one with something in it for the dustbin."""
        if not pipe.held:
            self.free.append(pipe)
            return
        self.all.discard(pipe)
        self.throw_away(pipe)

    def throw_away(self, pipe: Pipe) -> None:
        pipe.close()
        descriptors.give_back(PIPE_ENDS)

    def close(self) -> None:
        for pipe in self.all:
            self.throw_away(pipe)


# --- tunnels ---

class SinkFailed(Exception):
    """The sink of this flow has failed, and not its source."""

    def __init__(self, flow: Flow, error: OSError) -> None:
        super().__init__(str(error))
        self.flow = flow
        self.error = error


class Flow:
    """
    One direction: what can be read from `source` goes to `sink`.

    `blocked` means that a chunk is in hand (`chunk`, or in `pipe`) and the sink will not
    take it; `reading` that the source is waited for; with neither, the flow has ended.
    """

    __slots__ = ("tunnel", "source", "sink", "opposite", "octets", "reading", "blocked", "bulk", "chunk", "pipe")

    opposite: Flow

    def __init__(self, tunnel: Tunnel, source: socket.socket, sink: socket.socket) -> None:
        self.tunnel = tunnel
        self.source = source
        self.sink = sink
        self.octets = 0             # that the sink has taken
        self.reading = True
        self.blocked = False
        self.bulk = False
        self.chunk: Optional[bytes] = None
        self.pipe: Optional[Pipe] = None

    def ready(self, events: int) -> None:
        """The source is ready: to be read by this flow, or to be written by the opposite one."""
        try:
            if events & WRITE:
                self.opposite.flush()
            if events & ~WRITE:
                if not self.reading:
                    self.check()
                elif self.bulk:
                    self.tunnel.relay.bulky[self] = None
                else:
                    self.copy()
        except BlockingIOError:     # it only looked ready
            pass
        except SinkFailed as failed:
            self.tunnel.reset(failed.flow.opposite, failed.error)
        except OSError as error:
            self.tunnel.reset(self, error)

    def abort(self, reason: str) -> None:
        self.tunnel.abort(reason)

    def take_turn(self) -> None:
        """A bulk flow's, after those that had less to move."""
        try:
            if self.reading and self.tunnel.ended is not None:      # which may have changed meanwhile
                self.splice()
        except BlockingIOError:     # it only looked ready
            pass
        except SinkFailed as failed:
            self.tunnel.reset(failed.flow.opposite, failed.error)
        except OSError as error:
            self.tunnel.reset(self, error)

    def copy(self) -> None:
        """Move one chunk.  One only, however much is there: the others want to live, too."""
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
            raise SinkFailed(self, error) from error
        self.octets += sent
        if sent < n:
            self.chunk = bytes(relay.chunk[sent:n])
            self.hold()
        self.bulk = n >= BULK

    def splice(self) -> None:
        """The same without copying, where there is a pipe to be had."""
        pipes = self.tunnel.relay.pipes
        pipe = pipes.take() if pipes else None
        if pipe is None:
            self.copy()
            return
        self.pipe = pipe
        try:
            pipe.held = n = os.splice(self.source.fileno(), pipe.writer, PIPE, flags=SPLICE_FLAGS)
            if n:
                self.drain(pipe)
        finally:
            self.return_pipe()
        if not n:
            self.finish()
        elif n < BULK // 2:
            self.bulk = False

    def drain(self, pipe: Pipe) -> None:
        """From the pipe to the sink, as much as it takes."""
        try:
            sent = os.splice(pipe.reader, self.sink.fileno(), pipe.held, flags=SPLICE_FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise SinkFailed(self, error) from error
        pipe.held -= sent
        self.octets += sent
        if pipe.held and not self.blocked:
            self.hold()

    def return_pipe(self) -> None:
        """An empty pipe is of more use to others; one with octets in it stays until they have left."""
        if self.pipe and not self.blocked and self.tunnel.relay.pipes:
            self.tunnel.relay.pipes.give_back(self.pipe)
            self.pipe = None

    def hold(self) -> None:
        """The sink is full: wait for it, and read no more until then."""
        self.blocked, self.reading = True, False
        self.refresh()
        self.opposite.refresh()

    def flush(self) -> None:
        """The sink has room again."""
        if self.pipe:
            self.drain(self.pipe)
            self.blocked = self.pipe.held > 0
            self.return_pipe()
        elif self.chunk:
            sent = self.sink.send(self.chunk)
            self.octets += sent
            self.chunk = self.chunk[sent:] or None
            self.blocked = self.chunk is not None
        if not self.blocked:
            self.reading = True
            self.refresh()
            self.opposite.refresh()

    @property
    def interest(self) -> int:
        """What the source is waited for: to be read here, to be written by the opposite flow."""
        return (READ if self.reading else 0) | (WRITE if self.opposite.blocked else 0)

    def refresh(self) -> None:
        self.tunnel.relay.waiter.change(self.source.fileno(), self.interest)

    def finish(self) -> None:
        """The source has ended; the sink hears of it, and the opposite flow goes on."""
        self.reading = False
        if self.opposite.ended:
            self.tunnel.close()
            return
        self.tunnel.first_end = self
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise SinkFailed(self, error) from error
        self.refresh()

    @property
    def ended(self) -> bool:
        return not self.reading and not self.blocked

    def check(self) -> None:
        """The source reports something although nobody reads it: raise it if it is an error."""
        code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))


SPLICE_FLAGS = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)


class Tunnel:
    """
    A client and its target, and the two flows between them.

    Both sockets belong to the tunnel from here on, and it closes them.  When both ways have
    ended, `ended()` is called in the relay thread: it must not block.
    `early` is what the client sent before the tunnel stood.  `idle_timeout`: seconds without
    an octet either way after which it is closed; None for never.
    """

    __slots__ = ("relay", "up", "down", "session", "ended", "patience", "first_end", "seen", "seen_at")

    def __init__(self, relay: Relay, client: socket.socket, target: socket.socket, session: Session,
                 ended: Callable[[], None], idle_timeout: Optional[float] = None, early: bytes = b"") -> None:
        self.relay = relay
        self.up = Flow(self, client, target)
        self.down = Flow(self, target, client)
        self.up.opposite, self.down.opposite = self.down, self.up
        self.session = session
        self.ended: Optional[Callable[[], None]] = ended
        self.patience = idle_timeout or 0.0     # seconds; 0 for without end
        self.first_end: Optional[Flow] = None
        self.seen, self.seen_at = -1, 0.0       # octets moved, and when: what the last look saw
        if early:
            self.up.chunk, self.up.blocked, self.up.reading = early, True, False

    def start(self) -> None:
        """Hand it to the relay thread; called in any thread, which must not touch it afterwards."""
        if self.patience:
            self.relay.call(lambda: self.relay.watch_idleness(self))
        try:
            up, down = self.up, self.down
            for sock in (up.source, down.source):
                if sock.gettimeout() != 0:      # to ask costs less than to set what is set
                    sock.setblocking(False)
            # The client last: more often than the target it has something to say at once.
            self.relay.watch((down.source, down, down.interest), (up.source, up, up.interest))
        except ValueError:          # it has been aborted already
            pass
        except OSError as error:    # so it is being, just now, or the system will not watch any more
            self.abort_soon(error.strerror or str(error))

    def look(self, now: float) -> None:
        """End it if nothing has moved for too long."""
        octets = self.up.octets + self.down.octets
        if self.ended is None:      # it had ended before anybody began to look
            self.relay.impatient.discard(self)
        elif octets != self.seen:
            self.seen, self.seen_at = octets, now
        elif now - self.seen_at >= self.patience:
            self.abort("idle")

    def abort_soon(self, reason: str) -> None:
        """abort(), called in any thread."""
        self.relay.call(lambda: self.abort(reason))

    def close(self) -> None:
        """Both ways have ended."""
        self.end("target closed" if self.first_end is self.down else "client closed")

    def reset(self, flow: Flow, error: OSError) -> None:
        """The source of this flow has failed, so the other end has to hear of a failure, not of an ordinary end."""
        self.abort(broken("client" if flow is self.up else "target", error))

    def abort(self, reason: str) -> None:
        """Break both connections off."""
        for flow in (self.up, self.down):
            try:
                flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            except OSError:         # it has been broken off already
                pass
        self.end(reason)

    def end(self, reason: str) -> None:
        ended, self.ended = self.ended, None
        if ended is None:           # both sockets can fail in one round
            return
        self.relay.impatient.discard(self)
        for flow in (self.up, self.down):
            self.relay.unwatch(flow.source.fileno())
            if flow.pipe:
                flow.blocked = False
                flow.return_pipe()
            flow.source.close()
        self.session.up += self.up.octets
        self.session.down += self.down.octets
        self.session.end(reason)
        ended()
