"""
Several processes that serve as one: ``--workers``.

What one process promises, several promise as well: with ``SOCKS5SRV_TEST_WORKERS=2`` in the environment the other
tests of programs run with two.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import socks5srv
from socks5srv.protocol import Address, Command, Datagram, ProtocolError, Reply, ReplyCode
from tests.conftest import LOCALHOST, TIMEOUT, Client, Echo, eventually, exchange, in_thread, needs_neighbour, udp_socket, within
from tests.networks import LinkLocal
from tests.soak import VISITS

from .processes import (
    Place, Start, greet, hash_of, is_welcome, kill, may_come, needs_linux, needs_posix, objects, settled, workers_of,
)

pytestmark = needs_posix

PACKAGE = Path(socks5srv.__file__).parent

# --- they serve ---

def test_without_the_option_there_is_one_process(start: Start) -> None:
    assert workers_of(start(workers="1")) == set()


@needs_linux
@pytest.mark.parametrize("number", [2, 3])
def test_each_worker_has_clients(number: int, start: Start, tunnels: Any) -> None:
    assert len(tunnels(start(workers=str(number)))) == number


@needs_linux
def test_auto_is_a_worker_for_each_cpu_that_it_may_use(start: Start) -> None:
    cpus = len(os.sched_getaffinity(0))
    assert len(workers_of(start(workers="auto"))) == (cpus if cpus > 1 else 0)


@needs_linux
def test_each_worker_has_a_cpu_of_its_own_if_there_are_enough(start: Start) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:
        service = start(workers=str(len(cpus)))
        assert sorted(min(os.sched_getaffinity(pid)) for pid in workers_of(service)) == cpus
        assert {len(os.sched_getaffinity(pid)) for pid in workers_of(service)} == {1}
    crowded = start(workers=str(len(cpus) + 1))
    assert {len(os.sched_getaffinity(pid)) for pid in workers_of(crowded)} == {len(cpus)}


@needs_linux
def test_no_password_is_in_the_arguments_or_the_environment_of_a_worker(start: Start, on_each: Any) -> None:
    service = start("-u", "anna", SOCKS5SRV_PASSWORD="sesame", SOCKS5SRV_OPTIONS="-u ben:4711")
    for pid in workers_of(service):
        for file in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{file}").read_bytes()
            assert not [word for word in (b"sesame", b"4711") if word in text]
    for client in on_each(service).values():
        assert client.log_in("anna", "sesame")


@pytest.mark.parametrize("where", ["a folder in another tree", "a zip file"])
def test_workers_find_the_package_where_it_is(where: str, start: Start, tunnel: Any, tmp_path: Path) -> None:
    path, folder = str(tmp_path / "tree"), tmp_path / "empty"
    shutil.copytree(str(PACKAGE), f"{path}/vendor/socks5srv", ignore=shutil.ignore_patterns("__pycache__"))
    folder.mkdir()
    if where == "a zip file":
        tree, path = path, shutil.make_archive(str(tmp_path / "archive"), "zip", path)
        shutil.rmtree(tree)
    command = ("sh", "-c", 'cd "$0" && exec "$@"', str(folder), sys.executable, "-m", "vendor.socks5srv")
    service = start(command=command, PYTHONPATH=path)
    tunnel(service)
    assert service.stop() == 0


def test_they_serve_without_a_stdin_too(start: Start, tunnel: Any) -> None:
    service = start(command=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "socks5srv"))
    tunnel(service)
    assert service.stop() == 0


def test_every_kind_of_visit_leaves_nothing_behind(start: Start) -> None:
    """Tunnels, BINDs, associations, refusals and garbage; then threads and descriptors are as before."""
    service, dice = start("--log-format", "json"), random.Random(1928)
    with Echo(LOCALHOST, 0) as echo:
        serve = in_thread(echo.serve_forever, 0.02)

        def visits(number: int) -> None:
            for visit in VISITS * number:
                with Client(service.server_address) as client:
                    visit(client, echo, dice)

        visits(2)
        before = eventually(lambda: settled(service))
        for done in [in_thread(visits, 3) for _ in range(8)]:
            done()
        eventually(lambda: all(now <= was + 16 for was, now in zip(before, settled(service) or [10**6] * len(before))))
        echo.shutdown()
        serve()
    assert service.stop() == 0
    told = objects(service)
    sessions = [line for line in told if "client" in line]
    assert told[-1]["sessions"] == 26 * len(VISITS)
    assert len({line["id"] for line in sessions}) == len(sessions)
    assert max(line["id"] for line in sessions) <= 26 * len(VISITS), "of the same mistake only the first is told"
    assert {line["command"] for line in sessions} == {None, "connect", "bind", "udp"}
    assert not any("bug" in line.get("message", "") for line in told)


def test_session_numbers_are_unique_and_lines_whole_in_one_log_file(start: Start, echo: Place, tmp_path: Path) -> None:
    log = tmp_path / "log"
    service = start("--log-file", str(log), "--log-format", "json", "-vv", workers="3")

    def visits() -> None:
        for _ in range(20):
            with Client(service.server_address) as client:
                client.connect(echo)

    for done in [in_thread(visits) for _ in range(8)]:
        done()
    assert service.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["id"] for line in lines if line["event"] == "close") == list(range(1, 161))
    events = [line["event"] for line in lines]
    assert (events[0], events[-1], events.count("listening")) == ("listening", "stop", 1)
    assert lines[-1]["sessions"] == 160
    assert service.stderr == ""


def test_workers_answer_every_question_about_conformance(start: Start) -> None:
    command = [sys.executable, "-m", "socks5srv.check", "{}:{}".format(*start().server_address)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, timeout=50, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stdout


# --- limits of all together ---

@needs_linux
@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_a_limit_is_of_all_workers(option: str, start: Start, new_client: Any, tunnel: Any) -> None:
    service = start(option, "4")
    first, *others = [tunnel(service) for _ in range(4)]
    for _ in range(6):
        assert new_client(service).rest() == b""
    first.close()
    eventually(lambda: may_come(service.server_address))
    for client in others:
        exchange(client)
    assert service.stderr.count("WARNING") in (1, 2), "told once a minute, or twice in the same instant"


@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_not_even_a_burst_exceeds_a_limit(option: str, start: Start) -> None:
    service = start(option, "5", workers="3")

    def come() -> Client:
        client = Client(service.server_address)
        greet(client)
        return client

    welcome = []
    for _ in range(5):
        clients = [done() for done in [in_thread(come) for _ in range(40)]]
        welcome.append(sum(map(is_welcome, clients)))
        for client in clients:
            client.close()
        eventually(lambda: may_come(service.server_address))
    assert max(welcome) <= 5
    assert sum(welcome) > 0         # not in each round: places of the one before may not be free again yet


def test_a_parent_that_does_not_answer_keeps_no_client_out(start: Start, tunnel: Any, new_client: Any, echo: Place) -> None:
    """The limit is then that of the last count: what the worker itself knows."""
    service = start("--max-per-client", "10")
    os.kill(service.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        client = tunnel(service)
        assert 0.5 < time.monotonic() - began < within(2.0)
        came = [new_client(service) for _ in range(30)]
        for other in came:
            greet(other)
        assert sum(map(is_welcome, came)) <= 2 * 10 - 1
    finally:
        os.kill(service.process.pid, signal.SIGCONT)
    for other in (client, *came):
        other.close()
    eventually(lambda: serves_again(service, echo))


def serves_again(service: Any, echo: Place) -> bool:
    """Whether as many as may be served are, and no place is lost."""
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(Client(service.server_address))
            try:
                client.connect(echo)
            except (ConnectionError, ProtocolError, AssertionError):
                return False
    return True


@needs_neighbour
def test_another_address_has_places_of_its_own(start: Start, new_client: Any, echo: Place) -> None:
    service = start("--max-per-client", "2")
    for source in (LOCALHOST, "127.0.0.2"):
        for _ in range(2):
            new_client(service, source=source).connect(echo)
        assert new_client(service, source=source).rest() == b""


@needs_linux
def test_who_guesses_at_one_worker_waits_at_all_others_and_at_their_successors(start: Start, client_at: Any) -> None:
    service = start("-u", "anna:sesame")
    first, second = workers_of(service)

    def seconds(pid: int, password: str) -> float:
        began = time.monotonic()
        assert client_at(service, pid).log_in("anna", password) == (password == "sesame")
        return time.monotonic() - began

    for _ in range(7):
        seconds(first, "guess")
    assert seconds(second, "guess") >= 1
    kill(service, second)
    (third,) = eventually(lambda: workers_of(service) - {first, second})
    assert seconds(third, "sesame") >= 2
    assert seconds(first, "sesame") < 1, "who has succeeded is not made to wait, anywhere"


# --- users ---

@needs_linux
def test_sighup_reads_the_users_file_once_for_all_workers(start: Start, logins: Path) -> None:
    service = start("--users-file", str(logins))
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("users read")
    service.stop()
    assert service.stderr.count("users read") == 1


@needs_linux
def test_a_removed_user_is_cut_off_at_every_worker_and_a_new_one_comes_in(
    start: Start, on_each: Any, logins: Path, echo: Place,
) -> None:
    service = start("--users-file", str(logins))
    clients = on_each(service)
    for client in clients.values():
        assert client.log_in("anna", "sesame")
        assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    logins.write_text(f"anna:{hash_of('parsley')}\n")
    service.process.send_signal(signal.SIGHUP)
    for client in clients.values():
        assert client.rest() == b""
    for client in on_each(service).values():
        assert client.log_in("anna", "parsley")


@needs_linux
def test_a_successor_knows_the_users_although_their_file_is_damaged_by_now(start: Start, on_each: Any, logins: Path) -> None:
    service = start("--users-file", str(logins))
    logins.write_text("anna\n")
    service.wait_for("expected NAME:HASH")
    kill(service, min(workers_of(service)))
    for client in eventually(lambda: len(workers_of(service)) == 2 and on_each(service)).values():
        assert client.log_in("anna", "sesame")


# --- the other workers' sockets ---

@needs_linux
def test_the_relay_of_another_workers_client_is_no_target(start: Start, client_at: Any) -> None:
    service = start()
    one, other = workers_of(service)
    with udp_socket() as sender, udp_socket() as target:
        def says(text: bytes) -> bytes:
            return bytes(Datagram(Address.of(target.getsockname()), text))

        def is_dropped() -> bool:
            drain(target)
            here, there = (client_at(service, pid).ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0)).bound for pid in (one, other))
            sender.sendto(bytes(Datagram(there, says(b"through both"))), here[:2])
            sender.sendto(says(b"straight"), here[:2])
            if target.recv(100) != b"straight":     # that went through, before the news was there
                return False
            sender.sendto(says(b"through the other"), there[:2])      # who takes only what its first sender sends
            return target.recv(100) == b"through the other"

        eventually(is_dropped)          # the news of a relay takes a moment


def drain(sock: socket.socket) -> None:
    """Take away what is left of the try before."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(100)
    sock.settimeout(TIMEOUT)


@pytest.mark.parametrize("host", [LOCALHOST, "localhost"])
def test_no_worker_connects_to_the_server_itself(host: str, start: Start, new_client: Any) -> None:
    service = start()
    for _ in range(4):
        assert new_client(service).ask(Command.CONNECT, (host, service.port)).code is ReplyCode.NOT_ALLOWED


def test_they_serve_a_link_together_and_stop(link_local: LinkLocal, start: Start, new_client: Any, tunnel: Any) -> None:
    service = start("-b", link_local.named, "--allow-open-proxy")
    place = (link_local.named, service.port)
    for _ in range(8):
        tunnel(place)
    client = new_client(place)
    assert client.ask(Command.UDP_ASSOCIATE, Address.numeric("::", 0)).bound.host == link_local.host
    assert service.stop() == 0


def test_bind_works_at_any_worker(start: Start, new_client: Any) -> None:
    service = start()
    for _ in range(6):
        client = new_client(service)
        bound = client.ask(Command.BIND, ("0.0.0.0", 0)).bound
        with socket.create_connection(bound[:2], TIMEOUT) as peer:
            assert Reply.read(client).bound == Address.of(peer.getsockname())
            peer.sendall(b"hello")
            assert client.exactly(5) == b"hello"
