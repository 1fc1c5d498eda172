"""
Several processes that serve as one: ``--workers``.

What one process promises, several promise as well: with ``SOCKS5SRV_TEST_WORKERS=2`` in the
environment the other tests of this folder run with two.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple
from types import SimpleNamespace

import pytest
import socks5srv
from tests.conftest import LOCALHOST, TIMEOUT, Client, Echo, eventually, exchange, in_thread, needs_neighbour, within
from tests.networks import LinkLocal
from tests.soak import VISITS

from socks5srv.protocol import Address, Command, CredentialsReply, Datagram, Method, ProtocolError, Reply, ReplyCode
from socks5srv.service import options
from socks5srv.service.worker import Line
from socks5srv.users import Hash

Place = Tuple[Any, ...]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not on this platform: one process is all there is")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not on this platform: who has which socket is read in /proc")

# Runs a server after some change to workers.py.
CHANGED = """
import sys
from socks5srv.service import run, worker, workers
{change}
sys.exit(run.main())
"""

SLOW_SECOND = """
started, command = [], workers.command
def slowly(descriptor):
    words = command(descriptor)
    words[2] = f"import time; time.sleep({len(started)}); " + words[2]
    started.append(descriptor)
    return words
workers.command = slowly
"""


@pytest.fixture
def start(start: Callable[..., Any]) -> Callable[..., Any]:
    """As ever, but with two workers."""
    def started(*words: str, workers: str = "2", **more: Any) -> Any:
        return start("--workers", workers, *words, **more)

    return started


def changed(change: str) -> Tuple[str, ...]:
    return (sys.executable, "-c", CHANGED.format(change=change))


# --- who is who ---

def parent_of(pid: str) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
        state, parent = stream.read().rpartition(")")[2].split()[:2]
    return 0 if state == "Z" else int(parent)


def workers_of(service: Any) -> Set[int]:
    """The process ids of the workers that live."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if parent_of(pid) == service.process.pid:
                found.add(int(pid))
        except OSError:         # it has ended meanwhile
            pass
    return found


def alive(pid: int) -> bool:
    try:
        return parent_of(str(pid)) != 0
    except OSError:
        return False


def inodes(client: Client) -> Set[str]:
    """What the system calls the other end of a connection on loopback, once it has been accepted."""
    ours, theirs = client.socket.getsockname()[1], client.socket.getpeername()[1]
    with open("/proc/net/tcp", encoding="ascii") as stream:
        rows = [line.split() for line in stream][1:]
    return {row[9] for row in rows if row[1].endswith(f":{theirs:04X}") and row[2].endswith(f":{ours:04X}")} - {"0"}


def owner(service: Any, client: Client) -> Optional[int]:
    """The process id of the worker that has this client."""
    names = {f"socket:[{inode}]" for inode in inodes(client)}
    for pid in workers_of(service):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") in names:
                    return pid
            except OSError:
                pass
    return None


@pytest.fixture
def on_each(new_client: Callable[..., Client]) -> Callable[..., Dict[int, Client]]:
    """A client at each worker, on which nothing has been said: by process id."""
    def visit(service: Any) -> Dict[int, Client]:
        found: Dict[int, Client] = {}
        until = time.monotonic() + TIMEOUT
        while set(found) < workers_of(service):
            assert time.monotonic() < until, "some worker gets no clients"
            client = new_client(service)
            found.setdefault(eventually(lambda client=client: owner(service, client)), client)
        return found

    return visit


@pytest.fixture
def client_at(new_client: Callable[..., Client]) -> Callable[..., Client]:
    """A client of one worker: ``client_at(service, pid)``."""
    def visit(service: Any, pid: int) -> Client:
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            client = new_client(service)
            if eventually(lambda client=client: owner(service, client)) == pid:
                return client
            client.close()
        raise AssertionError("that worker gets no clients")

    return visit


@pytest.fixture
def logins(tmp_path: Path) -> Path:
    """A users file: anna, whose password is sesame."""
    path = tmp_path / "logins"
    path.touch(0o600)
    path.write_text(f"anna:{hash_of('sesame')}\n")
    return path


def tunnels(clients: Dict[int, Client], place: Place) -> None:
    for client in clients.values():
        client.connect(place)
        exchange(client)


def try_to_log_in(client: Client, password: str) -> bool:
    client.greet(Method.USERNAME_PASSWORD)
    return client.login("anna", password).status == CredentialsReply.SUCCESS


def hash_of(password: str) -> str:
    blank = Hash("pbkdf2_sha256", (1000,), b"salt", bytes(32))
    return str(blank._replace(digest=blank.of(password)))


def objects(service: Any) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in service.stderr.splitlines()]


# --- they serve ---

@needs_linux
def test_without_the_option_there_is_one_process(start: Callable[..., Any]) -> None:
    assert workers_of(start(workers="1")) == set()


@needs_linux
@pytest.mark.parametrize("number", [2, 3])
def test_each_worker_has_clients(number: int, start: Callable[..., Any], on_each: Callable[..., Any], echo: Place) -> None:
    service = start(workers=str(number))
    clients = on_each(service)
    assert len(clients) == number
    tunnels(clients, echo)


@needs_linux
def test_auto_is_a_worker_for_each_cpu_that_it_may_use(start: Callable[..., Any]) -> None:
    cpus = len(os.sched_getaffinity(0))
    assert len(workers_of(start(workers="auto"))) == (cpus if cpus > 1 else 0)


@needs_linux
def test_each_worker_has_a_cpu_of_its_own_if_there_are_enough(start: Callable[..., Any]) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:
        service = start(workers=str(len(cpus)))
        assert sorted(min(os.sched_getaffinity(pid)) for pid in workers_of(service)) == cpus
        assert {len(os.sched_getaffinity(pid)) for pid in workers_of(service)} == {1}
    crowded = start(workers=str(len(cpus) + 1))
    assert {len(os.sched_getaffinity(pid)) for pid in workers_of(crowded)} == {len(cpus)}


@needs_linux
def test_no_password_is_in_the_arguments_or_the_environment_of_a_worker(
    start: Callable[..., Any], on_each: Callable[..., Any],
) -> None:
    service = start("-u", "anna", SOCKS5SRV_PASSWORD="sesame", SOCKS5SRV_OPTIONS="-u ben:4711")
    for pid in workers_of(service):
        for file in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{file}").read_bytes()
            assert b"sesame" not in text
            assert b"4711" not in text
    for client in on_each(service).values():
        assert try_to_log_in(client, "sesame")


def test_the_port_file_and_the_first_line_come_when_all_serve(start: Callable[..., Any]) -> None:
    began = time.monotonic()
    service = start(command=changed(SLOW_SECOND))
    assert time.monotonic() - began > 1
    service.wait_for(" listening ")        # which comes after the file
    assert service.stderr.count(" listening ") == 1


@pytest.mark.parametrize("where", ["a folder in another tree", "a zip file"])
def test_workers_find_the_package_where_it_is(
    where: str, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place, tmp_path: Path,
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


def test_they_serve_without_a_stdin_too(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start(command=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "socks5srv"))
    new_client(service).connect(echo)
    assert service.stop() == 0


def test_every_kind_of_visit_leaves_nothing_behind(start: Callable[..., Any]) -> None:
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


def settled(service: Any) -> Optional[List[int]]:
    """The numbers of descriptors of all workers; None while one has a client."""
    if not os.path.isdir("/proc/self/fd"):
        return [0]
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    if any(row[1].endswith(f":{service.port:04X}") and row[3] == "01" for row in connections):
        return None
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in sorted(workers_of(service))]


def test_session_numbers_are_unique_and_lines_whole_in_one_log_file(
    start: Callable[..., Any], echo: Place, tmp_path: Path,
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


# --- limits of all together ---

@needs_linux
@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_a_limit_is_of_all_workers(
    option: str, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start(option, "4")
    clients = [new_client(service) for _ in range(4)]
    for client in clients:
        client.connect(echo)
    for _ in range(6):
        assert new_client(service).rest() == b""
    clients[0].close()
    eventually(lambda: comes_in(service))
    for client in clients[1:]:
        exchange(client)
    assert service.stderr.count("WARNING") in (1, 2), "told once a minute, or twice in the same instant"


def comes_in(service: Any) -> bool:
    with Client(service.server_address) as client:
        client.send(b"\5\1\0")
        return first_octets(client) == b"\5\0"


def first_octets(client: Client) -> bytes:
    try:
        return client.read(2)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_not_even_a_burst_exceeds_a_limit(option: str, start: Callable[..., Any]) -> None:
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
        eventually(lambda: comes_in(service))
    assert max(welcome) <= 5
    assert sum(welcome) > 0         # not in each round: places of the one before may not be free again yet


def test_a_parent_that_does_not_answer_keeps_no_client_out(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
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
def test_another_address_has_places_of_its_own(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("--max-per-client", "2")
    for source in (LOCALHOST, "127.0.0.2"):
        for _ in range(2):
            new_client(service, source=source).connect(echo)
        assert new_client(service, source=source).rest() == b""


@needs_linux
@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_the_clients_of_a_dead_worker_do_not_count(
    option: str, start: Callable[..., Any], client_at: Callable[..., Client], new_client: Callable[..., Client],
) -> None:
    # The first one who dies is replaced at once, the next one so late that nobody else can have forgotten its clients.
    service = start(option, "6", command=changed("workers.PAUSE = 60"))
    killed, other = workers_of(service)
    os.kill(killed, signal.SIGKILL)
    (successor,) = eventually(lambda: workers_of(service) - {killed, other})
    clients = [client_at(service, successor)]
    refused = False
    while not refused:
        clients.append(new_client(service))
        clients[-1].send(b"\5\1\0")
        refused = first_octets(clients[-1]) == b""
    os.kill(successor, signal.SIGKILL)
    eventually(lambda: service.stderr.count("has died") == 2)
    assert not workers_of(service) - {other}
    eventually(lambda: comes_in(service))


# For the workers that are started: how long the same trouble is not told again.
SOON_AGAIN = """
command = workers.command
def with_less_patience(descriptor):
    words = command(descriptor)
    return [*words[:2], "import socks5srv.server; socks5srv.server.TELL_AGAIN = 0.5; " + words[2], *words[3:]]
workers.command = with_less_patience
"""


@needs_linux
def test_each_worker_tells_how_many_lines_it_has_left_out_itself(start: Callable[..., Any], client_at: Callable[..., Client]) -> None:
    service = start("--log-format", "json", command=changed(SOON_AGAIN))
    visits: Dict[int, List[str]] = {pid: [] for pid in workers_of(service)}

    def told(pid: int) -> Dict[str, int]:
        """The lines of its strangers, by their addresses, and how many each says were left out before it."""
        lines = [json.loads(line) for line in service.stderr.splitlines() if "this is HTTP" in line]
        return {line["client"]: line.get("left_out", 0) for line in lines if line["client"] in visits[pid]}

    def come_to_each() -> bool:
        for pid, clients in visits.items():
            with client_at(service, pid) as client:
                clients.append("{}:{}".format(*client.socket.getsockname()))
                client.send(b"GET / HTTP/1.1\r\n\r\n")
                client.rest()
        return all(any(told(pid).values()) for pid in visits)

    eventually(come_to_each)
    for pid, clients in visits.items():
        left_out, lines = 0, told(pid)      # the last one's may still be due
        for client in clients:
            left_out = left_out + 1 if client not in lines else left_out - lines[client]
            assert left_out >= 0
            assert client not in lines or left_out == 0


@needs_linux
def test_who_guesses_at_one_worker_waits_at_all_others_and_at_their_successors(
    start: Callable[..., Any], client_at: Callable[..., Client],
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
def test_sighup_reads_the_users_file_once_for_all_workers(start: Callable[..., Any], logins: Path) -> None:
    service = start("--users-file", str(logins))
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("users read")
    service.stop()
    assert service.stderr.count("users read") == 1


@needs_linux
def test_a_removed_user_is_cut_off_at_every_worker_and_a_new_one_comes_in(
    start: Callable[..., Any], on_each: Callable[..., Any], logins: Path, echo: Place,
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
    start: Callable[..., Any], on_each: Callable[..., Any], logins: Path,
) -> None:
    service = start("--users-file", str(logins))
    logins.write_text("anna\n")
    service.wait_for("the users stay as they were")
    os.kill(min(workers_of(service)), signal.SIGKILL)
    service.wait_for("has died")
    for client in eventually(lambda: len(workers_of(service)) == 2 and on_each(service)).values():
        assert try_to_log_in(client, "sesame")


# --- the other workers' sockets ---

@needs_linux
def test_the_relay_of_another_workers_client_is_no_target(
    start: Callable[..., Any], client_at: Callable[..., Client],
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
def test_no_worker_connects_to_the_server_itself(host: str, start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start()
    for _ in range(4):
        assert new_client(service).ask(Command.CONNECT, (host, service.port)).code is ReplyCode.NOT_ALLOWED


def test_they_serve_a_link_together_and_stop(
    link_local: LinkLocal, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("-b", link_local.named, "--allow-open-proxy")
    for _ in range(8):
        client = new_client((link_local.named, service.port))
        client.connect(echo)
        exchange(client)
    client = new_client((link_local.named, service.port))
    assert client.ask(Command.UDP_ASSOCIATE, Address.numeric("::", 0)).bound.host == link_local.host
    assert service.stop() == 0


def test_bind_works_at_any_worker(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start()
    for _ in range(6):
        client = new_client(service)
        bound = client.ask(Command.BIND, ("0.0.0.0", 0)).bound
        with socket.create_connection((bound.host, bound.port), TIMEOUT) as peer:
            assert Reply.read(client).bound == Address.of(peer.getsockname())
            peer.sendall(b"hello")
            assert client.exactly(5) == b"hello"


# --- a worker dies ---

@needs_linux
def test_a_dead_worker_is_replaced_and_the_tunnels_of_the_others_live_on(
    start: Callable[..., Any], on_each: Callable[..., Any], echo: Place,
) -> None:
    service = start()
    clients = on_each(service)
    tunnels(clients, echo)
    (killed, cut_off), (other, lives_on) = clients.items()
    os.kill(killed, signal.SIGKILL)
    line = service.wait_for("has died")
    assert "ERROR worker " in line
    assert f"(process {killed}, killed by signal 9)" in line
    assert cut_off.rest() == b""
    exchange(lives_on)
    assert killed not in eventually(lambda: len(workers_of(service)) == 2 and workers_of(service))
    assert other in workers_of(service)
    tunnels(on_each(service), echo)
    exchange(lives_on)
    assert service.stop() == 0


@needs_linux
def test_the_last_known_figures_of_a_dead_worker_are_in_the_summary(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--log-format", "json")
    (pid, _other) = workers_of(service)
    served = 0
    while served < 5:
        client = new_client(service)
        mine = eventually(lambda client=client: owner(service, client)) == pid
        client.connect(echo)
        exchange(client)
        client.close()
        if mine:
            served += 1
        number = len(objects(service))
        service.wait_until(lambda number=number: len(objects(service)) > number or objects(service)[-1].get("up") == 5, "its line")
    told = len([line for line in objects(service) if line["event"] == "close"])
    os.kill(pid, signal.SIGKILL)
    service.wait_for("has died")
    assert service.stop() == 0
    stop = objects(service)[-1]
    assert stop["event"] == "stop"
    assert stop["events"]["close"] >= told - 1, "the very last may have had no time to be reported"
    assert stop["most_at_once"] >= 1


@needs_linux
def test_session_numbers_go_on_after_a_worker_has_been_replaced(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--log-format", "json")
    for again in range(2):
        for _ in range(5):
            with new_client(service) as client:
                client.connect(echo)
        if not again:
            eventually(lambda: len([line for line in objects(service) if "id" in line]) == 5)
            for pid in workers_of(service):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda: service.stderr.count("has died") == 2)
    assert service.stop() == 0
    assert sorted(line["id"] for line in objects(service) if "id" in line) == list(range(1, 11))


def test_workers_that_die_as_soon_as_they_start_end_the_server(start: Callable[..., Any], tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="it ended instead of the port file") as failure:
        start(command=changed('workers.PAUSE, workers.PROGRAM = 0.2, "import sys; sys.exit(3)"'))
    assert time.monotonic() - began >= 0.2 + 0.4 + 0.8
    message = str(failure.value)            # pytest indents it
    assert "socks5srv: error: the workers end as soon as they have started: " in message
    assert ", exit code 3\n    without --workers one process serves" in message
    assert "Traceback" not in message
    assert 2 * 4 < message.count("has died") <= 2 * 5
    assert not list(tmp_path.glob("*/port"))


def test_what_a_worker_has_died_of_is_told(start: Callable[..., Any]) -> None:
    broken = "import socks5srv.service.log as log; log.set_up = None;"
    with pytest.raises(AssertionError) as failure:
        start(command=changed(f'workers.PROGRAM = workers.PROGRAM.replace("__import__", "{broken} __import__", 1)'))
    assert "TypeError: 'NoneType' object is not callable" in str(failure.value)


def test_no_program_to_start_is_an_error_and_no_traceback(start: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError) as failure:
        start(command=changed('sys.executable = "/no/such/python"'))
    assert "socks5srv: error: the workers end as soon as they have started: No such file or directory" in str(failure.value)
    assert "Traceback" not in str(failure.value)


# Once it serves, no worker that is started lives.
BROKEN_LATER = """
get_ready, workers.PAUSE = workers.Workers.get_ready, 0.01
def then_break(server):
    found = get_ready(server)
    workers.PROGRAM = "import sys; sys.exit(3)"
    return found
workers.Workers.get_ready = then_break
"""


@needs_linux
def test_workers_that_cannot_be_started_again_end_it_when_the_last_one_has_died(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    """Not before: those that live have clients."""
    service = start(command=changed(BROKEN_LATER))
    first, last = sorted(workers_of(service))
    os.kill(first, signal.SIGKILL)
    service.wait_until(lambda: service.stderr.count("has died") > 6, "some tries")
    client = new_client(service)
    client.connect(echo)
    exchange(client)
    os.kill(last, signal.SIGKILL)
    assert service.process.wait(TIMEOUT) == 1
    assert "socks5srv: error: the workers end as soon as they have started: " in service.stderr
    assert ", exit code 3" in service.stderr
    assert not service.port_file.exists()


# --- the end ---

@needs_linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_the_sum_is_right(
    number: int, start: Callable[..., Any], on_each: Callable[..., Any], echo: Place,
) -> None:
    service = start("--log-format", "json")
    clients = on_each(service)
    tunnels(clients, echo)
    pids = workers_of(service)
    assert service.stop(number) == 0
    assert not any(map(alive, pids))
    assert not service.port_file.exists()
    told = objects(service)
    assert [line["event"] for line in told].count("stop") == 1
    stop = told[-1]
    assert stop["event"] == "stop"
    assert stop["events"]["close"] == 2
    assert (stop["up"], stop["down"], stop["clients"], stop["targets"]) == (10, 10, 1, 1)
    assert stop["sessions"] == sum(stop["events"].values()) >= len([line for line in told if "id" in line]), "of the same mistake one is told"
    assert 2 <= stop["most_at_once"] <= stop["sessions"]
    for client in clients.values():
        assert client.rest() == b""


def test_they_stop_at_once(start: Callable[..., Any]) -> None:
    """Which on a busy computer may be seen at the second or third attempt only."""
    assert any(duration(start().stop) < 0.3 for _ in range(10))


def duration(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_for_the_whole_group_does_the_same(number: int, start: Callable[..., Any]) -> None:
    """Ctrl-C at a terminal, or a service manager that means well."""
    service = start()
    os.killpg(service.process.pid, number)
    assert service.process.wait(TIMEOUT) == 0
    assert service.stderr.splitlines()[-1].count(" stopped after ") == 1
    assert "Traceback" not in service.stderr
    assert "has died" not in service.stderr


def test_ctrl_c_at_a_terminal_ends_all_with_one_summary(at_terminal: Callable[..., Any]) -> None:
    terminal = at_terminal("--workers", "2", "0")
    terminal.wait_for("Ctrl-C stops")
    terminal.type("\x03")
    code, text = terminal.end()
    assert code == 0
    assert text.count("stopped after") == 1
    assert text.count("proxy address:") == 1
    assert "Traceback" not in text


@needs_linux
def test_ctrl_c_while_they_start_is_no_traceback(at_terminal: Callable[..., Any]) -> None:
    for _ in range(3):
        terminal = at_terminal("--workers", "3", "0", "--log-format", "json", "-v")
        terminal.type("\x03")
        code, text = terminal.end()
        assert code == 0
        assert "Traceback" not in text


@needs_linux
def test_a_signal_for_a_worker_alone_is_not_heard(start: Callable[..., Any], on_each: Callable[..., Any], echo: Place) -> None:
    service = start()
    pids = workers_of(service)
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    tunnels(on_each(service), echo)
    assert workers_of(service) == pids


@needs_linux
def test_a_worker_that_has_hardly_started_stops_as_fast(start: Callable[..., Any]) -> None:
    service = start()
    os.kill(min(workers_of(service)), signal.SIGKILL)
    service.wait_for("has died")
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < within(3)
    assert "does not stop" not in service.stderr


@needs_linux
def test_a_worker_that_does_not_stop_is_killed(start: Callable[..., Any]) -> None:
    service = start(command=changed("workers.STOP_TIME = -0.5"))
    pids = workers_of(service)
    os.kill(min(pids), signal.SIGSTOP)
    assert service.stop(signal.SIGTERM) == 0
    assert "does not stop, and is killed" in service.stderr
    assert not any(map(alive, pids))


@needs_linux
def test_the_second_ctrl_c_does_not_wait_for_them(start: Callable[..., Any]) -> None:
    service = start()
    pids = workers_of(service)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    service.process.send_signal(signal.SIGINT)
    service.wait_until(lambda: not service.port_file.exists(), "the end of the port file")
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(TIMEOUT) == 130
    eventually(lambda: not any(map(alive, pids)))


@needs_linux
def test_when_the_parent_is_killed_the_workers_stop(start: Callable[..., Any], on_each: Callable[..., Any], echo: Place) -> None:
    service = start(workers="3")
    clients = on_each(service)
    tunnels(clients, echo)
    pids = workers_of(service)
    service.process.kill()
    eventually(lambda: not any(map(alive, pids)))
    for client in clients.values():
        assert client.rest() == b""
    with pytest.raises(ConnectionError):
        Client(service.server_address)
    assert "Traceback" not in service.stderr


# --- options ---

@pytest.mark.parametrize("word", ["0", "-1", "257", "1000000000000", "two", "", "1.5", "\u00b2"])
def test_what_is_no_number_of_processes_is_told(word: str, expect_error: Callable[..., str]) -> None:
    assert f"argument --workers: {word!r} is no number of processes: 1 to 256, or auto, is" in expect_error(options.parse, [f"--workers={word}"])


def test_by_default_there_is_one() -> None:
    assert options.parse([]).workers == 1
    assert options.parse(["--workers", "3"]).workers == 3


def test_auto_asks_which_cpus_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda _pid: {1, 3, 5}, raising=False)
    assert options.parse(["--workers", "auto"]).workers == 3


@pytest.mark.parametrize(("number", "workers"), [(6, 6), (None, 1)])
def test_auto_counts_all_cpus_where_nobody_knows(number: Optional[int], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(options.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(options.os, "cpu_count", lambda: number)
    assert options.parse(["--workers", "auto"]).workers == workers


def test_a_system_that_cannot_do_it_says_so(monkeypatch: pytest.MonkeyPatch, expect_error: Callable[..., str]) -> None:
    monkeypatch.setattr(options, "os", SimpleNamespace(name="nt", environ=os.environ, cpu_count=lambda: 4))
    for word in ("2", "auto"):
        assert "several processes cannot share a listening socket on this system" in expect_error(options.parse, ["--workers", word])
    assert options.parse(["--workers", "1"]).workers == 1


# --- the line ---

def receive(line: Line) -> List[Any]:
    line.fill()
    return [pickle.loads(message) for message in line.messages()]


@pytest.fixture
def lines() -> Iterator[Tuple[Line, Line]]:
    """Both ends of one."""
    ends = [Line(sock) for sock in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


def test_what_is_said_on_a_line_comes_in_its_order(lines: Tuple[Line, Line]) -> None:
    one, other = lines
    assert receive(other) == []
    one.send("failed", "192.0.2.1")
    one.send("stop")
    assert receive(other) == [("failed", "192.0.2.1"), ("stop",)]


def test_a_long_message_waits_for_the_other_end_and_no_hint_is_added_to_it(lines: Tuple[Line, Line]) -> None:
    one, other = lines
    users = {f"user {number}": 10 * str(number) for number in range(50_000)}
    one.send("users", users)        # does not block
    assert one.outgoing
    one.hint("failed", "192.0.2.1")
    one.send("stop")
    heard: List[Any] = []
    while len(heard) < 2:
        heard += receive(other)
        one.flush()
    assert heard == [("users", users), ("stop",)]


def test_the_end_of_a_line_comes_after_the_last_message(lines: Tuple[Line, Line]) -> None:
    one, other = lines
    one.send("stopped")
    one.close()
    assert receive(other) == [("stopped",)]
    with pytest.raises(EOFError):
        receive(other)
    other.send("stop")              # to nobody, which is no error
    other.send("stop")
    with pytest.raises(EOFError):
        receive(other)


def test_workers_answer_every_question_about_conformance(start: Callable[..., Any]) -> None:
    host, port = start("--workers", "2").server_address
    done = subprocess.run(
        [sys.executable, "-m", "socks5srv.check", f"{host}:{port}"], cwd=Path(socks5srv.__file__).parent.parent, capture_output=True, timeout=50,
        check=False, encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
