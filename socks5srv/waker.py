"""How one thread wakes another: `Waker`, if that waits for sockets, and `Bell`, if it waits for nothing else."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Waker:
    """A socket that any thread, and any signal handler, may make readable until drain().  (The "self-pipe trick".)"""

    def __init__(self) -> None:
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)

    def fileno(self) -> int:
        return self.reader.fileno()

    def wake(self) -> None:
        with suppress(OSError):     # full: it is readable already; or closed: no thread waits any more
            self.writer.send(b"!")

    def drain(self) -> None:
        """To be called before looking for what there is to do, or a wake() in between would be lost."""
        with suppress(OSError):
            self.reader.recv(65536)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class Bell:
    """An event that any thread may set, and even a signal handler of the thread that waits for it."""

    # Setting a threading.Event that the same thread waits for can deadlock, and the timed get() of a SimpleQueue can
    # forget its timeout when signals come fast.
    def __init__(self) -> None:
        self.silence = threading.Lock()
        self.silence.acquire()

    def ring(self) -> None:
        if self.silence.locked():
            try:
                self.silence.release()
            except RuntimeError:    # another thread has just done it
                pass

    def wait(self, timeout: float) -> None:
        self.silence.acquire(timeout=timeout)
