"""
Servers side by side: A B C A B C, never A A B B.

What else the computer does comes and goes, and hits all servers alike if they take turns.
Of the rounds the median counts.  Only memory is different: a heap that has been large once hides
what the next measurement takes.  So it is the memory of servers that are fresh: our own is
started anew for each column and round, and of the others the first measurement counts.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import processes
from .columns import Job, Numbers, measure, spawned
from .measures import FAILURES, GROWTH, IDLE, NOTE
from .results import Results
from .traffic import LOCALHOST, Login, Place, Way

ROOT = Path(__file__).resolve().parent.parent.parent
DIRECT = "direct"           # the straight connection
OURS = "socks5srv"
STARTING = 15.0             # seconds for our own server to be ready
ENDING = 10.0               # and to be gone


class Trouble(Exception):
    """Why it cannot go on, for the one who has started it."""


class Server(NamedTuple):
    """One that somebody else has started; `pid` is the process to watch, if any."""

    name: str
    place: Place
    pid: Optional[int]


class Plan(NamedTuple):
    """What the options ask for."""

    servers: List[Server]
    columns: List[str]
    rounds: int
    seconds: float
    login: Optional[Login] = None
    workers: Optional[int] = None
    portable: bool = False
    most: int = GROWTH[-1]


MEMORY = ("growth", "idle")         # the columns that are measured first

Contender = Callable[[], "contextlib.AbstractContextManager[Tuple[Way, Optional[int]]]"]


def started_by_us(plan: Plan, name: str) -> bool:
    """Our own server, unless somebody has given another one its name."""
    return name == OURS and OURS not in [server.name for server in plan.servers]


def contenders(plan: Plan) -> Dict[str, Contender]:
    """Who takes part, by name, each with a context in which it is ready."""
    found: Dict[str, Contender] = {DIRECT: lambda: contextlib.nullcontext((Way(), None))}
    if started_by_us(plan, OURS):
        found[OURS] = lambda: our_server(plan)
    for server in plan.servers:
        ready = Way(server.place, plan.login), server.pid
        found[server.name] = lambda ready=ready: contextlib.nullcontext(ready)     # type: ignore[misc]
    return found


def run(plan: Plan, tell: Callable[[str], None]) -> Results:
    """All columns of all servers; `tell` is told how far it is."""
    began = time.monotonic()
    taking_part = contenders(plan)
    results: Results = {name: {} for name in taking_part}
    for column in sorted(plan.columns, key=lambda name: MEMORY.index(name) if name in MEMORY else len(MEMORY)):
        rounds: Dict[str, List[Tuple[Numbers, int, List[str]]]] = {name: [] for name in taking_part}
        for number in range(plan.rounds):
            for name, ready in taking_part.items():
                with ready() as (way, pid):
                    processes.rest(pid)
                    fresh = started_by_us(plan, name) or not (number or results[name])
                    job = Job(way, plan.seconds, pid, plan.portable, plan.most, fresh)
                    rounds[name].append(in_a_process(column, job))
                tell(f"{time.monotonic() - began:5.0f} s  {column}, round {number + 1} of {plan.rounds}: {name}")
        for name in taking_part:
            results[name][column] = summary(rounds[name])
        copy_memory(results)
    return results


def copy_memory(results: Results) -> None:
    """Growth knows what an idle tunnel takes, too, where only the first measurement tells."""
    for columns in results.values():
        for key, value in columns.get("growth", {}).items():
            if key == f"kib_{IDLE}" and "idle" in columns:
                columns["idle"].setdefault(key, value)


def summary(rounds: List[Tuple[Numbers, int, List[str]]]) -> Dict[str, Any]:
    """One column of one server, from all its rounds: medians, the failures of all, and what was said."""
    keys = dict.fromkeys(key for numbers, _failures, _notes in rounds for key in numbers)
    found: Dict[str, Any] = {}
    for key in keys:
        found[key] = statistics.median(numbers[key] for numbers, _failures, _notes in rounds if key in numbers)
    found[FAILURES] = sum(failures for _numbers, failures, _notes in rounds)
    notes = dict.fromkeys(note for _numbers, _failures, notes in rounds for note in notes)
    if notes:
        found[NOTE] = "; ".join(notes)
    return found


def in_a_process(column: str, job: Job) -> Tuple[Numbers, int, List[str]]:
    """Measure in a process that starts from nothing, and does not outlive its time."""
    patience = 60 + 20 * job.seconds + (60 if column == "growth" else 0)
    with spawned(measure, column, job) as (process, pipe):
        try:
            nothing = {}, 1, [f"nothing came of it in {patience:.0f} s"]
            numbers, failures, notes = pipe.recv() if pipe.poll(patience) else nothing
        except EOFError:
            return {}, 1, ["the generator broke down"]
        finally:
            process.join(0.5)
        return numbers, failures, notes


# --- our own server ---

@contextlib.contextmanager
def our_server(plan: Plan) -> Iterator[Tuple[Way, Optional[int]]]:
    """As a user starts it; a new one each time, for memory that has been used says nothing."""
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "errors"), "w+", encoding="utf-8") as errors:
        file = os.path.join(folder, "port")
        command = [sys.executable, "-m", "socks5srv", "-q", "0", "--port-file", file]
        command += ["--workers", str(plan.workers)] if plan.workers is not None else []
        command += ["--user", plan.login[0]] if plan.login else []
        process = subprocess.Popen(command, cwd=str(ROOT), env=our_environment(plan), stdin=subprocess.DEVNULL, stderr=errors)
        try:
            yield Way((LOCALHOST, port_in(file, process, Path(errors.name))), plan.login), process.pid
        finally:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def our_environment(plan: Plan) -> Dict[str, str]:
    """The password is nothing for a command line."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SOCKS5SRV_")}
    return {**environment, "SOCKS5SRV_PASSWORD": plan.login[1]} if plan.login else environment


def port_in(file: str, process: subprocess.Popen[bytes], errors: Path) -> int:
    """The port, as soon as the file is there; Trouble with the server's own words if it ends before."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        if os.path.exists(file):
            return int(Path(file).read_text(encoding="ascii"))
        if process.poll() is not None:
            said = errors.read_text(encoding="utf-8").strip().splitlines() or ["not a word"]
            raise Trouble(f"{OURS} did not start, and said: {said[0]}")
        time.sleep(0.01)
    raise Trouble(f"{OURS} was not ready after {STARTING:.0f} s")


def unknown_here(plan: Plan) -> List[str]:
    """What this system does not tell, in sentences."""
    if plan.portable or not os.path.isdir(f"{processes.PROC}/self"):
        return ["CPU and memory are left out: they are measured on Linux only."]
    silent = [server.name for server in plan.servers if not processes.can_look(server.pid)]
    return [f"CPU and memory of {name} are left out: give its process, --server {name}=HOST:PORT:PID." for name in silent]


