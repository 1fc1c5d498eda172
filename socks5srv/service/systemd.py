"""
What a service manager and a service tell each other, by systemd's two protocols: sockets that are passed, and notifications.

Both are variables of the environment, and both are absent elsewhere: then there are no sockets, and nobody is told.
See sd_listen_fds(3) and sd_notify(3).
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Dict, List, Optional

from ..relay import tune
from .build import CannotStart

FIRST = 3           # the number of the first descriptor that is passed
TIMEOUT = 1.0       # seconds that the manager has to take a notification; one that is late is of no use


def passed_sockets() -> Dict[str, List[socket.socket]]:
    """
    The listening sockets that were passed to this process, by their names; once more there are none.

    CannotStart if one of them is something else.
    """
    number, pid, names = (os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not number.isdigit():     # they are for another process, whose environment is ours
        return {}
    found: Dict[str, List[socket.socket]] = {}
    for position, name in zip(range(int(number)), [*names.split(":"), *[""] * int(number)]):
        found.setdefault(name, []).append(adopted(FIRST + position))
    return found


def adopted(descriptor: int) -> socket.socket:
    """Ours from now on, and not the children's."""
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setblocking(True)
            tune(sock)
            return sock
        why = "not a TCP socket that listens"
    except OSError as error:
        why = error.strerror or str(error)
    raise CannotStart(f"descriptor {descriptor} of LISTEN_FDS: {why}", "the .socket unit needs ListenStream= with a port, and Accept=no")


def is_told() -> bool:
    """Whether there is a service manager that wants to be told."""
    return "NOTIFY_SOCKET" in os.environ


def notify(*assignments: str) -> None:
    """Tell it, as in ``notify("READY=1", "STATUS=serving")``; signal handlers may call this."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or not hasattr(socket, "AF_UNIX"):
        return
    if address[0] == "@":       # not in the file system
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.sendto("\n".join(assignments).encode(), address)


def now() -> str:
    """What goes with RELOADING=1, or the manager cannot tell which READY=1 follows it."""
    return f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"


def watchdog_interval() -> Optional[float]:
    """Seconds between two WATCHDOG=1: half of what the manager waits for one; None if it does not wait."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or not int(microseconds) or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 2e6
