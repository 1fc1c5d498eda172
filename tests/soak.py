"""
A soak: moderate load of every kind for a while, after which nothing may have grown.

    python -m tests.soak [SECONDS] [--program]          (default: 1200 seconds)

Tunnels that echo, clients that are refused, garbage, half-open handshakes, BINDs and associations
come and go.  Threads, descriptors and memory are looked at once the caches are warm, and again at
the end; it exits with 1 if any of them has grown, or a bug was logged.

The server is one in this process; with ``--program`` it is the command with two workers, a status page and 256
descriptors for each process, and there are names that the resolver does not answer, too (on Linux, and as root,
who alone can give it such a resolver).
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import socket
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Greeting, Reply, Request
from socks5srv.server import Socks5Server

from . import conftest
from .conftest import LOCALHOST, Client, exchange, name
from .program import COMMAND, Service

WORKERS = 8
WARM = 0.25                 # of the time, until the first look; after a minute at the latest
GROWTH = 4 * 1024           # KiB of memory that may be added by fragmentation
FEW = 20                    # threads and descriptors by which two looks at a running server may differ


class Echo(conftest.Echo):
    """Counts its connections, and does not keep them."""

    daemon_threads = True
    served = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        self.served += 1
        super(conftest.Echo, self).process_request(request, client_address)


Visit = Callable[[Client, Echo, random.Random], None]


def tunnel(client: Client, echo: Echo, dice: random.Random) -> None:
    client.connect(echo.server_address)
    for _ in range(dice.randrange(5)):
        exchange(client, bytes(dice.randrange(1, 50_000)))


def refusal(client: Client, *_others: object) -> None:
    client.ask(Command.CONNECT, (LOCALHOST, 1))


def garbage(client: Client, _echo: Echo, dice: random.Random) -> None:
    client.send(bytes(dice.randrange(256) for _ in range(dice.randrange(1, 60))))
    client.end()
    client.rest()


def half_open(client: Client, *_others: object) -> None:
    client.send(b"\5\3")
    client.reset()


def bind(client: Client, _echo: Echo, dice: random.Random) -> None:
    bound = client.ask(Command.BIND, UNSPECIFIED).bound
    if dice.random() < 0.5:
        with socket.create_connection(bound[:2], 10) as peer:
            Reply.read(client)
            peer.sendall(b"hello")
            client.exactly(5)


def associate(client: Client, *_others: object) -> None:
    relay = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
        for each in (sock, target):
            each.bind((LOCALHOST, 0))
            each.settimeout(10)
        datagram = bytes(Datagram(Address.of(target.getsockname()), b"hello"))
        sock.sendto(datagram, relay[:2])
        target.sendto(*target.recvfrom(100))
        assert sock.recv(100) == datagram


def gone_early(client: Client, echo: Echo, _dice: random.Random) -> None:
    client.send(Greeting(b"\0"), Request(Command.CONNECT, Address.of(echo.server_address)))
    client.reset()


def dead_name(client: Client, _echo: Echo, dice: random.Random) -> None:
    """A name that takes seconds to look up, for a client that does not wait as long."""
    client.greet()
    client.send(Request(Command.CONNECT, name(f"{dice.randrange(10**6)}.dead.example", 80)))
    threading.Event().wait(0.1 * dice.random())
    if dice.random() < 0.5:
        client.reset()


VISITS: List[Visit] = [tunnel, tunnel, tunnel, refusal, garbage, half_open, bind, associate, gone_early]


def work(address: Tuple[Any, ...], echo: Echo, seed: int, until: float, failures: List[str], crowded: bool) -> None:
    """Visit after visit; if it is `crowded`, to be turned away is no failure."""
    dice = random.Random(seed)
    while time.monotonic() < until and not failures:
        visit = dice.choice([*VISITS, dead_name] if crowded else VISITS)
        try:
            with Client(address) as client:
                visit(client, echo, dice)
        except Exception as error:
            if not (crowded and was_turned_away(error)):
                failures.append(f"{visit.__name__}: {error!r}")


def was_turned_away(error: Exception) -> bool:
    """Whether the server may have hung up at the door, which a client can notice at any moment."""
    return isinstance(error, ConnectionError) or getattr(error, "errno", 0) == errno.ENOTCONN or str(error).endswith("(0 of 2 octets)")


def look(pids: List[int]) -> Dict[str, int]:
    """Threads, descriptors, and memory in KiB, of these processes together."""
    sums = {"threads": 0, "descriptors": 0, "memory": 0}
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        facts = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
        sums["threads"] += int(facts["Threads"])
        sums["memory"] += int(facts["VmRSS"])
        sums["descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
    return sums


# --- what is soaked: its address, and the processes that it consists of ---

Soaked = Iterator[Tuple[Tuple[Any, ...], List[int]]]


@contextmanager
def in_this_process(failures: List[str]) -> Soaked:
    bugs = logging.Handler(logging.ERROR)
    bugs.emit = lambda record: failures.append(bugs.format(record))     # type: ignore[method-assign]
    logging.getLogger("socks5srv").addHandler(bugs)
    with Socks5Server((LOCALHOST, 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address, [os.getpid()]
        server.shutdown()


PROGRAM = [*COMMAND, "--workers", "2", "--status", "0", "--connect-timeout", "2", "-p", "0"]


@contextmanager
def as_a_program(failures: List[str]) -> Soaked:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *PROGRAM]
        if os.geteuid() == 0 and shutil.which("unshare"):
            command = with_a_dead_resolver(command, folder, stack)
        service = Service(folder, tuple(command), {})
        stack.callback(service.kill)
        service.wait_until_it_serves()
        stop = threading.Event()
        stack.callback(stop.set)
        page = service.wait_for("status=").partition("status=")[2].split()[0]
        threading.Thread(target=look_at_the_page, args=(page, stop), daemon=True).start()
        pid = service.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        yield service.server_address, [pid, *map(int, children.split())]
        service.process.terminate()
        code, lines = service.process.wait(20), (service.stdout + service.stderr).splitlines()
        failures += [line for line in lines if "Traceback" in line or "a bug" in line or "Too many" in line]
        failures += [f"exit code {code}"] * bool(code)


def with_a_dead_resolver(command: List[str], folder: Path, stack: ExitStack) -> List[str]:
    """The command, with its names asked of a server that says nothing."""
    (folder / "resolv.conf").write_text(f"nameserver {LOCALHOST}\noptions timeout:1 attempts:2\n", encoding="ascii")
    silent = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    silent.bind((LOCALHOST, 53))
    return ["unshare", "-m", "sh", "-c", f'mount --bind {folder}/resolv.conf /etc/resolv.conf && exec "$@"', "sh", *command]


def look_at_the_page(page: str, stop: threading.Event) -> None:
    """As monitors do."""
    while not stop.wait(1):
        for path in ("status.json", "readyz"):
            with suppress(OSError), urllib.request.urlopen(page + path, timeout=5) as answer:      # not ready is an answer, too
                answer.read()


def soak(seconds: float, program: bool = False) -> int:
    failures: List[str] = []
    with Echo(LOCALHOST, 0) as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        with (as_a_program if program else in_this_process)(failures) as (address, pids):
            until = time.monotonic() + seconds
            workers = [threading.Thread(target=work, args=(address, echo, seed, until, failures, program)) for seed in range(WORKERS)]
            for worker in workers:
                worker.start()
            threading.Event().wait(min(60, WARM * seconds))
            before = look(pids)
            for worker in workers:
                worker.join()
            threading.Event().wait(5)       # the resolver gives up, and the last sessions are told of
            after = look(pids)
        echo.shutdown()
    print(f"{echo.served} tunnels, {seconds:.0f} s; before {before}, after {after}")
    for what, room in {"threads": FEW, "descriptors": FEW, "memory": GROWTH * len(pids)}.items():
        if after[what] > before[what] + room:
            failures.append(f"{what} grew from {before[what]} to {after[what]}")
    print(*failures or ["nothing has grown"], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    numbers = [word for word in sys.argv[1:] if word != "--program"]
    sys.exit(soak(float(numbers[0]) if numbers else 1200, "--program" in sys.argv))
