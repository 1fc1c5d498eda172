"""
A listening socket, and the threads that take turns at it.

A conversation needs a thread of its own, and a new thread costs more than the conversation
does.  So threads are kept, in the pattern called *leader and followers*: the thread that
accepts a client also talks to it, and before it starts talking makes sure that another thread
is waiting at accept().  No queue stands between accepting and talking, and no other thread
has to be woken: the kernel hands the next client to the next thread in accept().

This file does not know what is talked about.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from contextlib import suppress
from typing import Any, Callable, Set, Tuple

from .protocol import Address

logger = logging.getLogger("socks5srv")

# What we can be out of when a client comes: descriptors, memory, buffers.
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
RETRY = 0.1     # seconds until we try again to accept then


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
        self.stopping = False

    def start(self, backlog: int) -> None:
        """Begin to accept; may follow a stop()."""
        self.address = Address.of(self.socket.getsockname())
        self.socket.listen(backlog)
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
        if self.stopping:           # this was no client, but stop()
            connection.close()
            return
        if nobody_waits:
            try:
                self.add_thread()
            except RuntimeError as error:       # then the next client waits until this one is served
                logger.warning("serving fewer clients at a time: %s", error)
        self.talk(connection, client_address)

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
        """
        Accept no more.  Conversations go on; threads that have none end.

        No system call takes a thread out of accept() on every platform; a client does.
        """
        with self.lock:
            self.stopping = True
            waiting = self.waiting
        dialled = self.address.dialled
        for _ in range(waiting):
            try:
                socket.create_connection((dialled.zoned, dialled.port), timeout=0.2).close()
            except OSError:         # then no thread is waiting any more
                return

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
