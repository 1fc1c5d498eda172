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
from typing import Any, Callable

import pytest

import socks5srv
from socks5srv.protocol import Address, Command, Datagram, ProtocolError, Reply, ReplyCode
from tests.conftest import LOCALHOST, TIMEOUT, Client, Echo, eventually, exchange, in_thread, needs_neighbour, within
from tests.networks import LinkLocal
from tests.soak import VISITS

from .processes import (
    Place, Start, comes_in, first_octets, hash_of, needs_linux, needs_posix, objects, settled, try_to_log_in, tunnels, workers_of,
)

pytestmark = needs_posix


# --- they serve ---

@needs_linux
def test_without_the_option_there_is_one_process(start: Start) -> None:
    assert workers_of(start(workers="1")) == set()


@needs_linux
@pytest.mark.parametrize("number", [2, 3])
def test_each_worker_has_clients(number: int, start: Start, on_each: Any, echo: Place) -> None:
    service = start(workers=str(number))
    clients = on_each(service)
    assert len(clients) == number
    tunnels(clients, echo)


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
def test_no_password_is_in_the_arguments_or_the_environment_of_a_worker(
    start: Start, on_each: Any,
) -> None:
    service = start("-u", "anna", SOCKS5SRV_PASSWORD="sesame", SOCKS5SRV_OPTIONS="-u ben:4711")
    for pid in workers_of(service):
        for file in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{file}").read_bytes()
            assert b"sesame" not in text
            assert b"4711" not in text
    for client in on_each(service).values():
        assert try_to_log_in(client, "sesame")


@pytest.mark.parametrize("where", ["a folder in another tree", "a zip file"])
def test_workers_find_the_package_where_it_is(
    where: str, start: Start, new_client: Callable[..., Client], echo: Place, tmp_path: Path,
) -> None:
    package = Path(socks5srv.__file__).parent
    shutil.copytree(str(package), str(tmp_path / "tree" / "vendor" / "socks5srv"), ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "empty"
    folder.mkdir()
    path = tmp_path / "tree"
    if where == "a zip file":
        path = Path(shutil.make_archive(str(tmp_path / "archive"), "zip", str(path)))
        shutil.rmtree(str(tmp_path / "tree"))
    service = start(
        command=("sh", "-c", 'cd "$0" && exec "$@"', str(folder), sys.executable, "-m", "vendor.socks5srv"), PYTHONPATH=str(path),
    )
    client = new_client(service)
    client.connect(echo)
    exchange(client)
    assert service.stop() == 0


def test_they_serve_without_a_stdin_too(start: Start, new_client: Callable[..., Client], echo: Place) -> None:
    service = start(command=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "socks5srv"))
    new_client(service).connect(echo)
    assert service.stop() == 0


def test_every_kind_of_visit_leaves_nothing_behind(start: Start) -> None:
    """Tunnels, BINDs, associations, refusals and garbage; then threads and descriptors are as before."""
    service, dice = start("--log-format", "json"), random.Random(1928)
    with Echo(LOCALHOST, 0) as echo:
        serve = in_thread(echo.serve_forever, 0.02)

        def visits(number: int) -> None:
            for visit in (VISITS * number)[:number * len(VISITS)]:
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


def test_session_numbers_are_unique_and_lines_whole_in_one_log_file(
    start: Start, echo: Place, tmp_path: Path,
) -> None:
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
    assert [line["event"] for line in (lines[0], lines[-1])] == ["listening", "stop"]
    assert lines[-1]["sessions"] == 160
    assert [line["event"] for line in lines].count("listening") == 1
    assert service.stderr == ""


def test_workers_answer_every_question_about_conformance(start: Start) -> None:
    host, port = start("--workers", "2").server_address
    done = subprocess.run(
        [sys.executable, "-m", "socks5srv.check", f"{host}:{port}"], cwd=Path(socks5srv.__file__).parent.parent, capture_output=True, timeout=50,
        check=False, encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout


# --- limits of all together ---

@needs_linux
@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_a_limit_is_of_all_workers(
    option: str, start: Start, new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start(option, "4")
    clients = [new_client(service) for _ in range(4)]
    for client in clients:
        client.connect(echo)
    for _ in range(6):
        assert new_client(service).rest() == b""
    clients[0].close()
    eventually(lambda: comes_in(service.server_address))
    for client in clients[1:]:
        exchange(client)
    assert service.stderr.count("WARNING") in (1, 2), "told once a minute, or twice in the same instant"


@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_not_even_a_burst_exceeds_a_limit(option: str, start: Start) -> None:
    service = start(option, "5", workers="3")

    def come() -> Client:
        client = Client(service.server_address)
        try:
            client.send(b"\5\1\0")
        except ConnectionError:
            pass
        return client

    welcome = []
    for _ in range(5):
        clients = [done() for done in [in_thread(come) for _ in range(40)]]
        welcome.append(len([client for client in clients if first_octets(client) == b"\5\0"]))
        for client in clients:
            client.close()
        eventually(lambda: comes_in(service.server_address))
    assert max(welcome) <= 5
    assert sum(welcome) > 0         # not in each round: places of the one before may not be free again yet


def test_a_parent_that_does_not_answer_keeps_no_client_out(start: Start, new_client: Callable[..., Client], echo: Place) -> None:
    """The limit is then that of the last count: what the worker itself knows."""
    service = start("--workers", "2", "--max-per-client", "10")
    os.kill(service.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        client = new_client(service)
        client.connect(echo)
        exchange(client)
        assert 0.5 < time.monotonic() - began < within(2.0)
        came = [new_client(service) for _ in range(30)]
        for other in came:
            with contextlib.suppress(ConnectionError):
                other.send(b"\x05\x01\x00")
        assert [first_octets(other) for other in came].count(b"\x05\x00") <= 2 * 10 - 1
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
def test_another_address_has_places_of_its_own(start: Start, new_client: Callable[..., Client], echo: Place) -> None:
    service = start("--max-per-client", "2")
    for source in (LOCALHOST, "127.0.0.2"):
        for _ in range(2):
            new_client(service, source=source).connect(echo)
        assert new_client(service, source=source).rest() == b""


@needs_linux
def test_who_guesses_at_one_worker_waits_at_all_others_and_at_their_successors(
    start: Start, client_at: Callable[..., Client],
) -> None:
    service = start("-u", "anna:sesame")
    first, second = workers_of(service)
    for _ in range(7):
        assert not try_to_log_in(client_at(service, first), "guess")
    began = time.monotonic()
    assert not try_to_log_in(client_at(service, second), "guess")
    assert time.monotonic() - began >= 1
    os.kill(second, signal.SIGKILL)
    service.wait_for("has died")
    (third,) = eventually(lambda: workers_of(service) - {first, second})
    began = time.monotonic()
    assert try_to_log_in(client_at(service, third), "sesame")
    assert time.monotonic() - began >= 2
    began = time.monotonic()
    assert try_to_log_in(client_at(service, first), "sesame")
    assert time.monotonic() - began < 1, "who has succeeded is not made to wait, anywhere"


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
        assert try_to_log_in(client, "sesame")
        assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    logins.write_text(f"anna:{hash_of('parsley')}\n")
    service.process.send_signal(signal.SIGHUP)
    for client in clients.values():
        assert client.rest() == b""
    for client in on_each(service).values():
        assert try_to_log_in(client, "parsley")


@needs_linux
def test_a_successor_knows_the_users_although_their_file_is_damaged_by_now(
    start: Start, on_each: Any, logins: Path,
) -> None:
    service = start("--users-file", str(logins))
    logins.write_text("anna\n")
    service.wait_for("expected NAME:HASH")
    os.kill(min(workers_of(service)), signal.SIGKILL)
    service.wait_for("has died")
    for client in eventually(lambda: len(workers_of(service)) == 2 and on_each(service)).values():
        assert try_to_log_in(client, "sesame")


# --- the other workers' sockets ---

@needs_linux
def test_the_relay_of_another_workers_client_is_no_target(
    start: Start, client_at: Callable[..., Client],
) -> None:
    service = start()
    one, other = workers_of(service)
    with udp() as sender, udp() as target:
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


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((LOCALHOST, 0))
    sock.settimeout(TIMEOUT)
    return sock


@pytest.mark.parametrize("host", [LOCALHOST, "localhost"])
def test_no_worker_connects_to_the_server_itself(host: str, start: Start, new_client: Callable[..., Client]) -> None:
    service = start()
    for _ in range(4):
        assert new_client(service).ask(Command.CONNECT, (host, service.port)).code is ReplyCode.NOT_ALLOWED


def test_they_serve_a_link_together_and_stop(
    link_local: LinkLocal, start: Start, new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("-b", link_local.named, "--allow-open-proxy")
    for _ in range(8):
        client = new_client((link_local.named, service.port))
        client.connect(echo)
        exchange(client)
    client = new_client((link_local.named, service.port))
    assert client.ask(Command.UDP_ASSOCIATE, Address.numeric("::", 0)).bound.host == link_local.host
    assert service.stop() == 0


def test_bind_works_at_any_worker(start: Start, new_client: Callable[..., Client]) -> None:
    service = start()
    for _ in range(6):
        client = new_client(service)
        bound = client.ask(Command.BIND, ("0.0.0.0", 0)).bound
        with socket.create_connection((bound.host, bound.port), TIMEOUT) as peer:
            assert Reply.read(client).bound == Address.of(peer.getsockname())
            peer.sendall(b"hello")
            assert client.exactly(5) == b"hello"
