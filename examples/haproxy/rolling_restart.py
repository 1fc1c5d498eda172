"""
Three nodes of socks5srv behind HAProxy: each is restarted under load, one is killed, and every session that is lost is told.

Goal: to see that a restart costs nobody anything where the node drains and the balancer looks whether it is ready, and what
a node that is killed takes with it.  It runs haproxy.cfg and node.conf, which are beside it, on the loopback network of this
computer (Linux): 10.0.0.0/24 is another one there, and the balancer looks ten times a second.

Run it, with HAProxy installed (apt install haproxy), for one round or for as many as you like:

    python examples/haproxy/rolling_restart.py --rounds 1

You should see (but for the numbers):

    HAProxy has three nodes, and 16 clients come and go, whose every octet is compared
    round 1: node1 is restarted: 271 sessions so far, 0 lost
    round 1: node2 is restarted: 540 sessions so far, 0 lost
    round 1: node3 is restarted: 804 sessions so far, 0 lost
    node2 is killed: it had 5 sessions, 5 are lost: node1 0, node2 5, node3 0
    node2 is there again: 41 sessions since then, 0 lost
    all 1001 sessions: node1 322, node2 339, node3 340

With --by-haproxy the nodes are not told: HAProxy sends nobody more (its runtime API), and they are stopped when the last one has
gone.  With --log FILE the log of HAProxy is kept.  The exit code is 1 if a restart has cost a session, or the kill one of another node.

Questions (answers in examples/README.rst): Why does a node that is to go accept clients for some time?  Why is a session of
the killed node not moved to another one?
"""

import argparse
import asyncio
import contextlib
import csv
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NODES = ("node1", "node2", "node3")
SHORT, LONG = 7, 9          # clients whose sessions have one message, and clients whose sessions have twenty, one every 50 ms
GRACE = 0.5                 # seconds of --drain-grace; HAProxy notices after 2 checks, ten a second
PATIENCE = 60.0             # seconds for what takes one


class Failed(Exception):
    """There is nothing to be seen, and its text is why."""


class Network:
    """10.0.0.0/24 of the two files, as a network of loopback that nobody else has; and a folder for what is written."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.prefix = f"127.{random.randrange(1, 255)}.{random.randrange(256)}."

    def address(self, number):
        return f"{self.prefix}{number}"

    def copy(self, name, **changes):
        """The path of a copy of a file of the example for this network, with these changes as well."""
        text = (HERE / name).read_text(encoding="utf-8").replace("10.0.0.", self.prefix)
        for before, after in changes.items():
            text = text.replace(before.replace("_", " "), after)
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)


class Node:
    """A server in a process of its own."""

    def __init__(self, name, network):
        self.name = name
        address = network.address(10 + int(name[-1]))
        self.port_file = network.folder / f"{name}.port"
        self.command = [
            sys.executable, "-m", "socks5srv", f"@{network.folder / 'node.conf'}", "-b", address, "--status", f"{address}:9180", "--drain-grace", str(GRACE),
            # The load and its target are on this computer.
            "--allow-from", "127.0.0.1", "--allow-local-targets", "--port-file", str(self.port_file), "-q",
        ]
        self.process = None

    async def start(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(self.command, env=environment, stdin=subprocess.DEVNULL)
        await until(f"{self.name} serves", lambda: self.port_file.exists() or self.process.poll() is not None)
        if self.process.poll() is not None:
            raise Failed(f"{self.name} does not start")

    async def stop(self, number=signal.SIGTERM):
        """By SIGTERM, as systemd and Kubernetes do it, it drains."""
        self.process.send_signal(number)
        await until(f"{self.name} has drained", lambda: self.process.poll() is not None)
        if self.process.returncode:
            raise Failed(f"{self.name} has exit code {self.process.returncode}")

    def kill(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            self.port_file.unlink()


class Balancer:
    """HAProxy."""

    def __init__(self, path, network):
        self.admin, self.log = network.folder / "admin.sock", network.folder / "haproxy.log"
        self.address = network.address(2), 1080
        config = network.copy("haproxy.cfg", **{"/run/haproxy": str(network.folder), "inter_1s": "inter 100ms", "slowstart_10s": "slowstart 1s"})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([path, "-db", "-f", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ask(self, command):
        """Its runtime API."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.admin))
            sock.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()

    def stats(self):
        """What it has to say of each node."""
        try:
            text = self.ask("show stat")
        except OSError as error:            # it is not there yet
            if self.process.poll() is not None:
                raise Failed(f"HAProxy does not start:\n{self.log.read_text()}") from error
            return {}
        return {row["svname"]: row for row in csv.DictReader(text.lstrip("# ").splitlines()) if row["svname"] in NODES}

    async def wait_for(self, status, *names):
        """Until it says that these nodes are UP, or DOWN."""
        def is_so():
            stats = self.stats()
            return stats and all(stats[name]["status"].startswith(status) for name in names)

        await until(f"HAProxy finds {', '.join(names)} {status}", is_so)

    def node_of(self, port):
        """To which node the last session went whose client had this port; its line in the log comes with its end."""
        found = re.findall(rf":{port} \[\S+\] socks nodes/(\S+) ", self.log.read_text())
        return found[-1] if found else ""

    def sessions(self):
        """How many sessions each node has had; show stat counts also attempts to connect to a node that is not there."""
        found = re.findall(r" socks nodes/(\S+) ", self.log.read_text())
        return {name: found.count(name) for name in NODES}


class Load:
    """Clients that come and go all the time; every octet is compared."""

    def __init__(self, proxy, target):
        self.proxy = proxy
        self.request = b"\5\1\0\1" + socket.inet_aton(target[0]) + struct.pack("!H", target[1])
        self.done, self.lost = 0, []            # the lost ones as the port of the client, and why
        self.over = False
        self.tasks = [asyncio.ensure_future(self.come(turns)) for turns in [1] * SHORT + [20] * LONG]

    async def come(self, turns):
        while not self.over:
            own = []
            try:
                await asyncio.wait_for(self.session(turns, own), PATIENCE)
                self.done += 1
            except (OSError, EOFError, AssertionError, asyncio.TimeoutError) as error:
                self.lost.append((own[0] if own else 0, repr(error)))
            await asyncio.sleep(0.05)

    async def session(self, turns, own):
        reader, writer = await asyncio.open_connection(*self.proxy)
        own.append(writer.get_extra_info("sockname")[1])
        try:
            writer.write(b"\5\1\0")
            assert await reader.readexactly(2) == b"\5\0"
            writer.write(self.request)
            assert (await reader.readexactly(10))[:2] == b"\5\0"
            for turn in range(turns):
                await asyncio.sleep(0.05 if turn else 0)
                octets = os.urandom(10_000)
                writer.write(octets)
                assert await reader.readexactly(len(octets)) == octets, "it has been changed on the way"
            writer.write_eof()
            assert not await reader.read(), "there is more than was sent"
        finally:
            writer.close()

    async def wait_for(self, more):
        """So many sessions from now on."""
        wanted = self.done + more
        await until(f"{more} more sessions have succeeded", lambda: self.done >= wanted)

    async def end(self):
        self.over = True
        await asyncio.gather(*self.tasks)


async def echo(reader, writer):
    with contextlib.suppress(OSError):          # of the client of a node that is killed
        while True:
            octets = await reader.read(65536)
            if not octets:
                break
            writer.write(octets)
            await writer.drain()
    writer.close()


async def until(what, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"after {PATIENCE:g} s still waiting until {what}")
        await asyncio.sleep(0.02)


def words(numbers):
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


# --- what is done to them ---

async def restart(node, _balancer):
    await node.stop()
    await node.start()


async def restart_by_haproxy(node, balancer):
    """The node hears of nothing: when it has no sessions any more, it is stopped at once."""
    balancer.ask(f"set server nodes/{node.name} state drain")
    await until(f"{node.name} has no sessions", lambda: balancer.stats()[node.name]["scur"] == "0")
    await node.stop(signal.SIGINT)
    await node.start()
    balancer.ask(f"set server nodes/{node.name} state ready")


async def restart_each(rounds, way, nodes, balancer, load):
    """One node after the other, so often."""
    for number in range(1, rounds + 1):
        for node in nodes:
            await way(node, balancer)
            await balancer.wait_for("UP", node.name)
            await load.wait_for(SHORT)
            print(f"round {number}: {node.name} is restarted: {load.done} sessions so far, {len(load.lost)} lost", flush=True)


async def kill_one(node, balancer, load):
    """How many sessions of its own it takes with it."""
    before = len(load.lost)
    await until(f"{node.name} has some sessions", lambda: int(balancer.stats()[node.name]["scur"]) >= 3)
    had = balancer.stats()[node.name]["scur"]
    node.kill()
    await balancer.wait_for("DOWN", node.name)
    await load.wait_for(SHORT)
    ports = [port for port, _why in load.lost[before:]]
    await until("HAProxy has logged those that are lost", lambda: all(map(balancer.node_of, filter(None, ports))))
    lost = [balancer.node_of(port) for port in ports]
    of_each = {name: lost.count(name) for name in NODES}
    print(f"{node.name} is killed: it had {had} sessions, {len(lost)} are lost: {words(of_each)}", flush=True)
    before, done = len(load.lost), load.done
    await node.start()
    await balancer.wait_for("UP", node.name)
    await load.wait_for(SHORT)
    print(f"{node.name} is there again: {load.done - done} sessions since then, {len(load.lost) - before} lost")
    return of_each[node.name]


async def run(path, rounds, way, folder):
    """How many sessions were lost that should not have been."""
    network = Network(folder)
    network.copy("node.conf")
    nodes, balancer = [Node(name, network) for name in NODES], Balancer(path, network)
    target = await asyncio.start_server(echo, "127.0.0.1")
    try:
        await asyncio.gather(*(node.start() for node in nodes))
        await balancer.wait_for("UP", *NODES)
        load = Load(balancer.address, target.sockets[0].getsockname())
        print(f"HAProxy has three nodes, and {SHORT + LONG} clients come and go, whose every octet is compared", flush=True)
        await restart_each(rounds, way, nodes, balancer, load)
        its_own = await kill_one(nodes[1], balancer, load)
        await load.end()
        wrong = len(load.lost) - its_own
        print(f"all {load.done + len(load.lost)} sessions: {words(balancer.sessions())}")
        for port, why in load.lost if wrong else ():
            print(f"lost on {balancer.node_of(port) or 'no node'}: {why}")
        await asyncio.gather(*(node.stop() for node in nodes))
    finally:
        for process in [balancer.process, *(node.process for node in nodes)]:
            if process:
                process.kill()
                process.wait()
        target.close()
    return wrong


def main():
    parser = argparse.ArgumentParser(description="Restart three nodes behind HAProxy under load, and kill one.")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="restart each node so often (default: 1)")
    parser.add_argument("--by-haproxy", action="store_true", help="have HAProxy drain the nodes, which are told nothing")
    parser.add_argument("--log", metavar="FILE", help="keep the log of HAProxy in FILE")
    options = parser.parse_args()
    path = shutil.which("haproxy", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    if path is None or sys.platform != "linux":
        sys.exit("this needs Linux, and HAProxy: apt install haproxy")
    with tempfile.TemporaryDirectory() as folder:
        try:
            wrong = asyncio.run(run(path, options.rounds, restart_by_haproxy if options.by_haproxy else restart, folder))
        except Failed as failed:
            sys.exit(str(failed))
        if options.log:
            shutil.copy(Path(folder) / "haproxy.log", options.log)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
