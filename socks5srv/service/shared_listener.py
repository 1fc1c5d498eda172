"""
A listener on a socket that other processes have as well: the other workers, systemd, a second server on the same port.

What ends accept() in this process must not be felt there.  To call from ourselves, as the base class does, could
reach another process; shutdown() ends the socket for all, and to close what a thread waits for does so on some systems.
The one idea: a signal interrupts accept(), and Python then begins it again, with the descriptor that the socket has
by then, which is none.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any, Callable, Tuple

from ..listener import LEAVE, Listener


class SharedListener(Listener):
    """To be made in the main thread, since it answers a signal; POSIX only.  After a stop() it cannot start again."""

    def __init__(self, sock: socket.socket, accept: Callable[[socket.socket], Tuple[socket.socket, Any]],
                 talk: Callable[[socket.socket, Any], None], takes_queue: bool = False) -> None:
        super().__init__(sock, accept, talk)
        self.takes_queue = takes_queue      # nobody else will accept who is in the accept queue when we drain
        signal.signal(signal.SIGURG, lambda _number, _frame: None)      # by default it is ignored, and interrupts nothing

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
        self.close()

    def drain(self) -> None:
        if self.takes_queue:
            super().drain()
            return
        with self.lock:
            self.stopping = self.draining = True
        self.close()

    def accept_rest(self) -> None:
        self.interrupt()            # an accept() that is begun again does not wait, now that the socket does not block
        self.accept_queue()
        self.close()

    def close(self) -> None:
        self.stopping = True
        descriptor, until = self.socket.detach(), time.monotonic() + LEAVE
        self.interrupt()
        while self.waiting and time.monotonic() < until:
            time.sleep(0.001)
            self.interrupt()        # one may have been on its way to accept()
        if descriptor >= 0:
            os.close(descriptor)

    def interrupt(self) -> None:
        """Whatever our threads wait for is begun again."""
        with self.lock:             # without which no thread ends, and its number may be another's
            for thread in self.threads:
                signal.pthread_kill(thread.ident or 0, signal.SIGURG)
