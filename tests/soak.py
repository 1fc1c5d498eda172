"""
A soak: moderate load of every kind for a while, after which nothing may have grown.

    python -m tests.soak [SECONDS]          (default 1200)

Tunnels that echo, clients that are refused, garbage, half-open handshakes, BINDs and
associations come and go.  Threads, descriptors and memory are looked at once the caches are
warm, and again at the end; it exits with 1 if any of them has grown, or a bug was logged.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import socketserver
import sys
import threading
import time
from typing import Callable, Dict, List

from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, Greeting, Message, Reply, Request
from socks5srv.server import Socks5Server

from .conftest import LOCALHOST, Client, exchange

WORKERS = 8
WARM = 0.25                 # of the time, until the first look
GROWTH = 4 * 1024           # KiB of memory that may be added by fragmentation
FEW = 20                    # threads and descriptors by which two looks at a running server may differ


class Echo(socketserver.ThreadingTCPServer):
    """Sends back what it receives."""

    daemon_threads = True
    request_queue_size = 128

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                while True:
                    octets = self.request.recv(65536)
                    if not octets:
                        return
                    self.request.sendall(octets)
            except OSError:         # a client that has gone early
                pass


Visit = Callable[[Client, Echo, random.Random], None]


def tunnel(client: Client, echo: Echo, dice: random.Random) -> None:
    client.connect(echo.server_address)
    for _ in range(dice.randrange(5)):
        exchange(client, bytes(dice.randrange(1, 50_000)))


def refusal(client: Client, _echo: Echo, _dice: random.Random) -> None:
    client.ask(Command.CONNECT, (LOCALHOST, 1))


def garbage(client: Client, _echo: Echo, dice: random.Random) -> None:
    client.send(bytes(dice.randrange(256) for _ in range(dice.randrange(1, 60))))
    client.end()
    client.rest()


def half_open(client: Client, _echo: Echo, _dice: random.Random) -> None:
    client.send(b"\5\3")
    client.reset()


def bind(client: Client, _echo: Echo, dice: random.Random) -> None:
    bound = client.ask(Command.BIND, UNSPECIFIED).bound
    if dice.random() < 0.5:
        with socket.create_connection(bound[:2], 10) as peer:
            Reply.read(client)
            peer.sendall(b"hello")
            client.exactly(5)


def associate(client: Client, _echo: Echo, _dice: random.Random) -> None:
    relay = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
        for each in (sock, target):
            each.bind((LOCALHOST, 0))
            each.settimeout(10)
        datagram: Message = Datagram(Address.of(target.getsockname()), b"hello")
        sock.sendto(bytes(datagram), relay[:2])
        octets, proxy = target.recvfrom(100)
        target.sendto(octets, proxy)
        assert sock.recv(100) == bytes(datagram)


def gone_early(client: Client, echo: Echo, _dice: random.Random) -> None:
    client.send(Greeting(b"\0"), Request(Command.CONNECT, Address.of(echo.server_address)))
    client.reset()


VISITS: List[Visit] = [tunnel, tunnel, tunnel, refusal, garbage, half_open, bind, associate, gone_early]


def work(server: Socks5Server, echo: Echo, seed: int, until: float, failures: List[str]) -> None:
    dice = random.Random(seed)
    while time.monotonic() < until and not failures:
        visit = dice.choice(VISITS)
        try:
            with Client(server.server_address) as client:
                visit(client, echo, dice)
        except Exception as error:
            failures.append(f"{visit.__name__}: {error!r}")


def look() -> Dict[str, int]:
    """Threads, descriptors, and memory in KiB."""
    with open("/proc/self/status", encoding="ascii") as stream:
        memory = next(int(line.split()[1]) for line in stream if line.startswith("VmRSS:"))
    return {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd")), "memory": memory}


class Bugs(logging.Handler):
    def __init__(self, failures: List[str]) -> None:
        super().__init__(logging.ERROR)
        self.failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        self.failures.append(self.format(record))


def soak(seconds: float) -> int:
    failures: List[str] = []
    logging.getLogger("socks5srv").addHandler(Bugs(failures))
    until = time.monotonic() + seconds
    with Socks5Server((LOCALHOST, 0)) as server, Echo((LOCALHOST, 0), Echo.Handler) as echo:
        for serving in (server, echo):
            threading.Thread(target=serving.serve_forever, daemon=True).start()
        workers = [threading.Thread(target=work, args=(server, echo, seed, until, failures)) for seed in range(WORKERS)]
        for worker in workers:
            worker.start()
        threading.Event().wait(WARM * seconds)
        before = look()
        for worker in workers:
            worker.join()
        after, served = look(), server.next_id()
        echo.shutdown()
    print(f"{served} clients in {seconds:.0f} s; before {before}, after {after}")
    failures += [f"{what} grew from {before[what]} to {after[what]}" for what, room in
                 (("threads", FEW), ("descriptors", FEW), ("memory", GROWTH)) if after[what] > before[what] + room]
    print(*failures or ["nothing has grown"], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(soak(float(sys.argv[1]) if len(sys.argv) > 1 else 1200))
