"""Which processes there are, and which of them has a client: read in /proc."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import pytest

from socks5srv.users import Hash
from tests.conftest import Client, eventually

Place = Tuple[Any, ...]
Start = Callable[..., Any]

needs_posix = pytest.mark.skipif(os.name != "posix", reason="not on this platform: workers share a socket only on POSIX")
ON_LINUX, NOT_HERE = sys.platform.startswith("linux"), "not on this platform: who has which socket is read in /proc"
needs_linux = pytest.mark.skipif(not ON_LINUX, reason=NOT_HERE)


def parent_of(pid: str) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
        state, parent = stream.read().rpartition(")")[2].split()[:2]
    return 0 if state == "Z" else int(parent)


def workers_of(service: Any) -> Set[int]:
    """The process ids of the workers that live: of a program, or of a Supervisor in this process.  On Linux only."""
    if not ON_LINUX:
        pytest.skip(NOT_HERE)
    parent, found = service.process.pid if hasattr(service, "process") else os.getpid(), set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            # A child that runs another program is none: the tests have a KDC.
            if parent_of(pid) == parent and os.readlink(f"/proc/{pid}/exe") == os.readlink(f"/proc/{parent}/exe"):
                found.add(int(pid))
        except OSError:         # it has ended meanwhile
            pass
    return found


def alive(pid: int) -> bool:
    try:
        return parent_of(str(pid)) != 0
    except OSError:
        return False


def connections() -> List[List[str]]:
    """All of IPv4, in the fields of proc(5)."""
    return [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]


def owner(service: Any, client: Client) -> int:
    """The process id of the worker that has this client, as soon as one has accepted it."""
    ours, theirs = (f":{place[1]:04X}" for place in (client.socket.getsockname(), client.socket.getpeername()))

    def look() -> Optional[int]:
        inodes = {row[9] for row in connections() if row[1].endswith(theirs) and row[2].endswith(ours)} - {"0"}
        names = {f"socket:[{inode}]" for inode in inodes}
        for pid in workers_of(service):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                try:
                    if os.readlink(f"/proc/{pid}/fd/{fd}") in names:
                        return pid
                except OSError:
                    pass
        return None

    return eventually(look)


def door(service: Any) -> Place:
    """Where clients come to."""
    return service.server_address if hasattr(service, "server_address") else service.addresses[0]


def kill(service: Any, pid: int) -> None:
    """Kill a worker; returns when its parent has told that it has died."""
    told = service.stderr.count("has died")
    os.kill(pid, signal.SIGKILL)
    service.wait_until(lambda: service.stderr.count("has died") > told, "the news of its death")


def settled(service: Any) -> Optional[List[int]]:
    """The numbers of descriptors of all workers; None while one has a client."""
    if not os.path.isdir("/proc/self/fd"):
        return [0]
    if any(row[1].endswith(f":{service.port:04X}") and row[3] == "01" for row in connections()):
        return None
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in sorted(workers_of(service))]


def objects(service: Any) -> List[Dict[str, Any]]:
    """Its log, as --log-format json has it."""
    return [json.loads(line) for line in service.stderr.splitlines()]


# --- what clients do ---

def hash_of(password: str) -> str:
    blank = Hash("pbkdf2_sha256", (1000,), b"salt", bytes(32))
    return str(blank._replace(digest=blank.of(password)))


def greet(client: Client) -> None:
    """What may come too late for one that is turned away."""
    try:
        client.send(b"\5\1\0")
    except ConnectionError:
        pass


def is_welcome(client: Client) -> bool:
    """Whether its greeting is answered."""
    try:
        return client.read(2) == b"\5\0"
    except ConnectionError:
        return False


def comes_in(client: Client) -> bool:
    greet(client)
    return is_welcome(client)


def may_come(address: Place) -> bool:
    """Whether there is room for one more client."""
    with Client(address) as client:
        return comes_in(client)
