"""
A listening socket, and the threads that take turns at it.

A conversation needs a thread of its own, and a new thread costs more than the conversation
does.  So threads are kept, in the pattern called *leader and followers*: the thread that
accepts a client also talks to it, and before it starts talking makes sure that another thread
is waiting at accept().  No queue stands between accepting and talking, and no other thread
has to be woken: the kernel hands the next client to the next thread in accept().

A listener ends in one of two ways.  stop() lets go whoever is in the accept queue; drain() talks to them first, since
their TCP connections stand, and a client that has one cannot know that nobody was going to answer.

This file does not know what is talked about.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
import time
from array import array
from contextlib import suppress
from typing import Any, Callable, Optional, Set, Tuple

from .protocol import Address

logger = logging.getLogger("socks5srv")

# What we can be out of when a client comes: descriptors, memory, buffers.
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
RETRY = 0.1     # seconds until we try again to accept then
LEAVE = 0.5     # seconds that threads have to leave accept() once they have been called away
IN_FLIGHT = 0.2 # seconds that a TCP handshake which has begun may take to its end: a way around the world

# For Linux: a program of its packet filter that drops a SYN, by the flags in octet 13 of the TCP header, and passes the rest.
SO_ATTACH_FILTER = 26
NO_SYN = [(0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]     # load, test, drop, pass


def drop_new(sock: socket.socket) -> bool:
    """
    Have the system ignore those who want to connect from now on; False if it cannot.

    Between the last accept() and close() somebody could connect, and be reset.  One who gets no answer tries again a
    second later, and then is refused, or comes to another server.
    """
    if not hasattr(select, "epoll"):
        return False
    program = array("B", b"".join(struct.pack("HBBI", *step) for step in NO_SYN))
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(NO_SYN), program.buffer_info()[0]))
    except OSError:
        return False
    return True


class Listener:
    """
    Threads that wait in ``accept()``, and call ``talk(connection, client_address)``.

    `spare` threads at most stay waiting when a burst of clients is over.
    """

    spare = 128     # threads; some 20 KiB each once they have worked, and a new one costs half a conversation

    def __init__(self, sock: socket.socket, accept: Callable[[socket.socket], Tuple[socket.socket, Any]],
                 talk: Callable[[socket.socket, Any], None]) -> None:
        self.socket = sock
        self.address = Address.of(sock.getsockname())
        self.accept = accept
        self.talk = talk
        self.lock = threading.Lock()
        self.waiting = 0            # threads in accept(), or on their way there
        self.threads: Set[threading.Thread] = set()
        self.own_calls: Set[Tuple[Any, ...]] = set()    # where we have called from ourselves
        self.backlog = 0            # clients in the accept queue at most
        self.stopping = False       # no thread comes back to accept()
        self.draining = False       # and yet whoever has been accepted is a client
        self.closing: Optional[float] = None    # when drain() closes it, by time.monotonic()

    def start(self, backlog: int) -> None:
        """Begin to accept; may follow a stop()."""
        self.address = Address.of(self.socket.getsockname())
        self.socket.listen(backlog)
        self.backlog = backlog
        self.own_calls.clear()
        self.stopping = False
        self.add_thread()

    def add_thread(self) -> None:
        """One more in accept().  RuntimeError if the system has no more threads to give."""
        thread = threading.Thread(target=self.run, name="socks5srv-conversation", daemon=True)
        with self.lock:
            if self.stopping:
                return
            thread.start()
            self.waiting += 1
            self.threads.add(thread)

    def run(self) -> None:
        try:
            self.serve_one()
            while self.rejoin():
                self.serve_one()
        finally:
            with self.lock:
                self.threads.discard(threading.current_thread())

    def serve_one(self) -> None:
        """Accept a client, leave the lead to another thread, and talk."""
        try:
            connection, client_address = self.accept(self.socket)
        except OSError:             # the client has left again, or we are stopping
            self.leave()
            return
        nobody_waits = self.leave() == 0
        if self.stopping and not self.still_serves(connection, client_address):
            return
        if nobody_waits:
            try:
                self.add_thread()
            except RuntimeError as error:       # then the next client waits until this one is served
                logger.warning("serving fewer clients at a time: %s", error)
        self.talk(connection, client_address)

    def still_serves(self, connection: socket.socket, client_address: Any) -> bool:
        """Whether somebody who is accepted so late is to be talked to; else the connection is closed."""
        with self.lock:
            serves = self.draining and client_address[:2] not in self.own_calls
        if serves:
            connection.setblocking(True)        # BSD: it inherits what the listening socket has by now
        else:
            connection.close()
        return serves

    def leave(self) -> int:
        """Go away from accept(); how many threads are still there."""
        with self.lock:
            self.waiting -= 1
            return self.waiting

    def rejoin(self) -> bool:
        """Go back to accept(), unless enough are there already."""
        with self.lock:
            if self.stopping or self.waiting >= self.spare:
                return False
            self.waiting += 1
            return True

    def stop(self) -> None:
        """Accept no more.  Conversations go on; threads that have none end."""
        with self.lock:
            self.stopping = True
        self.call_away()

    def call_away(self) -> None:
        """
        Take all threads out of accept().

        No system call does that on every platform; a client does.
        """
        for _ in range(self.waiting):
            try:
                self.call()
            except OSError:         # then no thread is waiting any more
                return

    def call(self) -> None:
        """Be a client oneself, but one that serve_one() knows."""
        dialled = self.address.dialled
        with self.lock, socket.create_connection((dialled.zoned, dialled.port), timeout=0.2) as sock:
            self.own_calls.add(sock.getsockname()[:2])      # before who has accepted it can ask, which takes the lock

    def drain(self) -> None:
        """Talk to all who have connected by now, and close; conversations go on.  To be called again until it is closed."""
        if self.closing is None:
            self.closing = time.monotonic() + (IN_FLIGHT if drop_new(self.socket) else 0)
        if time.monotonic() >= self.closing:
            with self.lock:
                self.stopping = self.draining = True
            self.socket.setblocking(False)
            self.accept_rest()

    def accept_rest(self) -> None:
        """Without waiting; and have the threads leave accept()."""
        self.accept_queue()
        try:
            self.socket.shutdown(socket.SHUT_RDWR)      # on Linux this takes them out of it
        except OSError:
            self.call_away()
            until = time.monotonic() + LEAVE
            while self.waiting and time.monotonic() < until:
                time.sleep(0.001)
            self.accept_queue()
        self.socket.close()

    def accept_queue(self) -> None:
        """Talk in new threads to all who have come."""
        for _ in range(self.backlog + 1):       # or those who come meanwhile would keep us here
            try:
                connection, client_address = self.accept(self.socket)
            except OSError as error:
                if isinstance(error, BlockingIOError) or error.errno in OUT_OF:
                    return
                continue            # that one has left again
            if self.still_serves(connection, client_address):
                self.talk_in_thread(connection, client_address)

    def talk_in_thread(self, connection: socket.socket, client_address: Any) -> None:
        thread = threading.Thread(target=self.talk_once, args=(connection, client_address), name="socks5srv-conversation", daemon=True)
        with self.lock:
            try:
                thread.start()
            except RuntimeError:        # the system has no more threads to give
                connection.close()
                raise
            self.threads.add(thread)

    def talk_once(self, connection: socket.socket, client_address: Any) -> None:
        try:
            self.talk(connection, client_address)
        finally:
            with self.lock:
                self.threads.discard(threading.current_thread())

    def join(self, timeout: float) -> None:
        """Wait for the threads to end, so many seconds for all of them at most."""
        until = time.monotonic() + timeout
        with self.lock:
            threads = list(self.threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        self.stopping = True
        with suppress(OSError):     # on Linux this makes accept() fail, should stop() have had no descriptors to call with
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
