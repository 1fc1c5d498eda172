"""
The resolver: a name becomes IP addresses, in a thread that can be given up.

The system's resolver (getaddrinfo) blocks, for as long as it likes, and can be neither timed nor
cancelled.  So each look-up has a thread of its own; the conversation waits for its answer with an
eye on its client, and on the clock.

Not here: how a name is spelled (names.py), and which of its addresses may be reached.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections import deque
from typing import Callable, Deque, List, Sequence

from .outbound import wait
from .protocol import ReplyCode, RequestFailed
from .relay import READ


def look_up(host: str, family: int = socket.AF_UNSPEC) -> List[str]:
    """
    The IP addresses of a host, as text, best first.  Blocks, for as long as the resolver likes.

    OSError or UnicodeError if there are none.
    """
    # As octets an ASCII name passes Python's IDNA codec by, which chokes on a..b and long labels.
    name = host.encode("ascii") if host.isascii() else host.encode("idna")
    rows = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)
    return [str(row[4][0]) for row in rows]


def start_look_up(look: Callable[[], None]) -> None:
    """
    Call `look` in a thread of its own.  OSError if too many are under way already.

    A resolver that does not answer keeps each of them for seconds, so they have to be bounded.
    """
    if not look_ups.acquire(blocking=False):
        raise OSError(errno.EAGAIN, f"{LOOK_UPS} look-ups are under way already")

    def run() -> None:
        try:
            look()
        finally:
            look_ups.release()

    try:
        threading.Thread(target=run, name="socks5srv-lookup", daemon=True).start()
    except RuntimeError as error:
        look_ups.release()
        raise OSError(errno.EAGAIN, "no thread left to look it up") from error


LOOK_UPS = 256      # under way at a time, in this process: threads, some 20 KiB each
look_ups = threading.BoundedSemaphore(LOOK_UPS)


def in_time(function: Callable[[str], Sequence[str]], host: str, client: socket.socket, until: float) -> Sequence[str]:
    """
    ``function(host)``, given up at the deadline or when the client goes.

    A look-up can be neither timed nor cancelled, so it has a thread of its own, which an
    answer that comes too late finds empty.
    """
    answers: Deque[Sequence[str]] = deque()
    errors: Deque[Exception] = deque()
    ours, theirs = socket.socketpair()

    def look() -> None:
        with theirs:            # closing it is what wakes us
            try:
                answers.append(function(host))
            except Exception as error:
                errors.append(error)

    with ours:
        try:
            start_look_up(look)
        except OSError:
            theirs.close()
            raise
        wait({ours.fileno(): READ}, client, until)
    if errors:
        raise errors[0]
    if not answers:
        raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{host}: the look-up took too long")
    return answers[0]
