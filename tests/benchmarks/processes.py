"""
What a server costs: the processor time and the memory of its process and all its descendants.

Linux says so in /proc.  Elsewhere, or about a process of somebody else, there is nothing to
be known, and these functions return None.
"""

from __future__ import annotations

import os
import time
from typing import Dict, List, NamedTuple, Optional

PROC = "/proc"
STEP = 0.05                 # seconds between two looks at a server that should come to rest


class Stat(NamedTuple):
    """Of /proc/PID/stat, what is needed here.  proc(5)."""

    parent: int
    seconds: float          # in user and kernel mode, with those of children that have ended


def stats() -> Dict[int, Stat]:
    """Of all processes, by their id."""
    ticks, found = os.sysconf("SC_CLK_TCK"), {}
    for name in os.listdir(PROC):
        if name.isdigit():
            try:
                with open(f"{PROC}/{name}/stat", encoding="ascii", errors="replace") as stream:
                    # The second field is the name, in parentheses, and may have anything in it.
                    fields = stream.read().rpartition(")")[2].split()
            except OSError:         # it has ended meanwhile
                continue
            found[int(name)] = Stat(int(fields[1]), sum(map(int, fields[11:15])) / ticks)
    return found


def tree(pid: int, known: Dict[int, Stat]) -> List[int]:
    """The process and its descendants."""
    found = [pid] if pid in known else []
    for parent in found:            # grows while it is walked along
        found += [child for child, stat in known.items() if stat.parent == parent]
    return found


def can_look(pid: Optional[int]) -> bool:
    """Whether there is anything to be known about this process."""
    return pid is not None and os.path.exists(f"{PROC}/{pid}/stat")


def cpu(pid: Optional[int]) -> Optional[float]:
    """Seconds of processor time so far."""
    if pid is None or not can_look(pid):
        return None
    known = stats()
    return sum(known[each].seconds for each in tree(pid, known))


def memory(pid: Optional[int]) -> Optional[float]:
    """KiB, each shared page divided by the number of its users (PSS)."""
    if pid is None or not can_look(pid):
        return None
    try:
        return float(sum(map(pss, tree(pid, stats()))))
    except OSError:                 # another user's
        return None


def pss(pid: int) -> int:
    with open(f"{PROC}/{pid}/smaps_rollup", encoding="ascii") as stream:
        return sum(int(line.split()[1]) for line in stream if line.startswith("Pss:"))


def rest(pid: Optional[int], seconds: float = 1.0) -> None:
    """Wait until it no longer computes, but not for ever."""
    until, before = time.monotonic() + seconds, cpu(pid)
    while before is not None and time.monotonic() < until:
        time.sleep(STEP)
        now = cpu(pid)
        if now is None or now - before < 0.2 * STEP:
            return
        before = now


def raise_descriptor_limit() -> Optional[int]:
    """Raise the limit of descriptors as far as the system lets us; what it is now, None for none."""
    try:
        import resource
    except ImportError:             # Windows has none
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):   # macOS calls it unlimited, and means less
        return soft
    return None if hard == resource.RLIM_INFINITY else hard
