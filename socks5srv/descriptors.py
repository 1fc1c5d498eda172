"""
The descriptors of this process: how many it may have open, and how many are spoken for.

Every socket, pipe and file takes one, and there are only so many (``ulimit -n``).  A process that has
used them up can neither accept a client nor read a file, and what fails then is chance.

The one idea: what a client may come to hold is reserved before it is opened, so that the answer "no more"
is given where a client can be told: at the door, or with a reply code.  What is only nice to have (a
pipe, a second attempt beside the first) leaves some for what is needed, and new clients leave more.

What is not counted: the few that every server has (listeners, log, users file, the relay's own), and what
the rest of the program has open.  `RESERVED` is for those.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import Callable, Iterator

from .protocol import Command

RESERVED = 32           # descriptors that are not counted one by one: see above
SPARE = 192             # descriptors that new clients leave for those who are here, or a quarter if that is less

CLIENT = 2              # for every client: its connection, and one to the target
COMMANDS = {            # by which each command exceeds that, at the most
    Command.BIND: 2,            # the listener, and a caller that is being judged
    Command.UDP_ASSOCIATE: 2,   # the socket for the client's datagrams, and one for each family of targets
}
PIPE_ENDS = 2
LOOK_UP = 2             # what the system's resolver may open: a file, or sockets to its servers
WAIT = 1                # by which waiting for a look-up exceeds CLIENT: a socket pair, while there is no target yet

USED_UP = "the descriptors of the proxy are used up (ulimit -n)"


class Descriptors:
    """
    A number of descriptors to share out.

    ``take(n)`` is False when fewer than `n` are left beyond what `leaving` says; what has been taken is to be
    given back.  Any thread may call both.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken = 0
        self.aside = 0
        self.measure()

    def measure(self) -> None:
        """Look again how many the system allows."""
        self.room = max(float(CLIENT), descriptor_limit() - RESERVED - self.aside)
        self.spare = min((self.room - CLIENT) / 4, SPARE)       # so that one client always fits in

    def set_aside(self, number: int) -> None:
        """So many more are for something that is no client's; a negative number ends that."""
        self.aside += number
        self.measure()

    @property
    def most_clients(self) -> float:
        """How many clients fit in, if none holds more than every client does."""
        most = (self.room - self.spare) / CLIENT
        return most if most == float("inf") else int(most)

    def take(self, number: int, leaving: float = 0) -> bool:
        with self.lock:
            if self.taken + number > self.room - leaving:
                return False
            self.taken += number
            return True

    def take_for_client(self) -> bool:
        """The same for a new client, with CLIENT for `n`."""
        return self.take(CLIENT, leaving=self.spare)

    def are_scarce(self) -> bool:
        """Whether there are none for a new client just now."""
        return self.taken + CLIENT > self.room - self.spare

    def take_if_plenty(self, number: int) -> bool:
        """The same for what can be done without."""
        return self.take(number, leaving=self.spare / 2)

    def give_back(self, number: int) -> None:
        with self.lock:
            self.taken -= number


def descriptor_limit() -> float:
    """How many descriptors the system lets this process have."""
    try:
        import resource
    except ImportError:             # Windows has no such limit
        return float("inf")
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


descriptors = Descriptors()     # one for the process, as the system counts them


def open_at_once(path: str, flags: int) -> int:
    """
    An `opener` for open(): a pipe in place of a file has nothing wait for its other end.  OSError as os.open() has it.

    To be written to, a pipe that no process reads is refused (ENXIO).  Reading and writing then wait as ever.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    try:
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def on_error(undo: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Call this, mostly a close(), if the block raises; what has been opened stays open if it does not."""
    try:
        yield
    except BaseException:
        undo(*arguments)
        raise
