"""
What a service manager passes and is told: sockets, notifications, and the units in examples/systemd.

The manager is the test itself, as the two protocols are a few variables; and systemd's own tools, where they are.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from socks5srv.service import systemd
from socks5srv.service.build import CannotStart
from tests.clients.harness import need
from tests.conftest import LOCALHOST, TIMEOUT, Client, Place, eventually, exchange, needs_ipv6, within
from tests.load import Load
from tests.monitor.watched import Page
from tests.program import COMMAND, ROOT, Outcome, Start, environment, needs_posix, processes_too

pytestmark = needs_posix

UNITS = ROOT / "examples" / "systemd"

# Becomes the command behind -- with these descriptors from 3 on, as systemd starts a service: python -c ACTIVATE NAMES FD ... -- COMMAND ...
ACTIVATE = """
import fcntl, os, sys
end = sys.argv.index("--")
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 64) for fd in sys.argv[2:end]]
for fd in sys.argv[2:end]:
    os.close(int(fd))
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[1])
os.execv(sys.argv[end + 1], sys.argv[end + 1:])
"""

Words = Tuple[str, ...]


# --- sockets that are passed ---

@pytest.fixture
def passed(listen: Callable[..., socket.socket]) -> socket.socket:
    """A socket that the manager has opened, and keeps."""
    return listen(backlog=1024)


@pytest.fixture
def start_with(start: Start) -> Callable[..., Any]:
    """Start a server that is passed these sockets: ``start_with([socket], "name", "-q")``."""
    def begin(sockets: List[socket.socket], names: str, *words: str, **variables: str) -> Any:
        fds = [str(os.dup(sock.fileno())) for sock in sockets]
        for fd in fds:
            os.set_inheritable(int(fd), True)
        try:
            command = (sys.executable, "-c", ACTIVATE, names, *fds, "--", *COMMAND)
            service = start_inheriting(start, fds, command, *words, **variables)
        finally:
            for fd in fds:
                os.close(int(fd))
        service.port = sockets[0].getsockname()[1]
        return service

    return begin


def start_inheriting(start: Start, fds: List[str], command: Words, *words: str, **variables: str) -> Any:
    real = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *arguments, **more: real(*arguments, **{**more, "pass_fds": list(map(int, fds))}))
        return start(*words, port=None, command=command, **variables)


@processes_too
def test_it_serves_on_the_sockets_that_are_passed(words: Words, start_with: Any, listen: Any, echo: Place) -> None:
    sockets = [listen(), listen()]
    service = start_with(sockets, "socks:socks", *words)
    assert service.wait_for(" listening ").count("socks5h://") == 2
    for sock in sockets:
        service.port = sock.getsockname()[1]
        service.tunnel(echo)
    assert service.stop() == 0
    for sock in sockets:            # and they have outlived it
        with Client(sock.getsockname()):
            sock.accept()[0].close()


@needs_ipv6
def test_of_both_families(start_with: Any, listen: Any, echo: Place) -> None:
    service = start_with([listen(), listen("::1")], "")
    assert "[::1]" in service.wait_for(" listening ")
    service.tunnel(echo)
    assert service.stop() == 0


@pytest.mark.parametrize("names", ["socks:status", "status:socks"])
def test_the_one_named_status_is_for_the_page(names: str, start_with: Any, listen: Any, echo: Place) -> None:
    sockets = [listen(), listen()]
    service = start_with(sockets, names)
    page, proxy = sockets[::-1] if names.startswith("socks") else sockets
    service.port = proxy.getsockname()[1]
    service.tunnel(echo)
    assert Page.of(service).port == page.getsockname()[1]
    assert Page.of(service).ask("/readyz")[:2] == (200, b"ok\n")


@processes_too
def test_clients_wait_in_the_queue_while_it_restarts_and_nobody_is_lost(
    words: Words, passed: socket.socket, start_with: Any, echo: Place,
) -> None:
    """The old server goes first, and then the new one comes: with a socket of its own it would be hundreds."""
    service = start_with([passed], "socks", *words, "--drain-timeout", "60")
    with Load(service.port, echo) as load:
        for _ in range(3):
            assert service.stop(signal.SIGTERM) == 0
            service = start_with([passed], "socks", *words, "--drain-timeout", "60")
            load.wait_for(20)
    assert load.lost == []
    assert service.stop() == 0


@processes_too
def test_two_servers_may_have_the_socket_and_one_of_them_goes(words: Words, passed: socket.socket, start_with: Any, echo: Place) -> None:
    """As two services with one .socket unit."""
    service = start_with([passed], "socks", *words, "--drain-timeout", "60")
    with Load(service.port, echo) as load:
        for _ in range(3):
            successor = start_with([passed], "socks", *words, "--drain-timeout", "60")
            assert service.stop(signal.SIGTERM) == 0
            service = successor
            load.wait_for(20)
    assert load.lost == []
    assert max(load.done) < within(4)
    assert service.stop() == 0


@processes_too
def test_the_variables_are_not_passed_on(words: Words, passed: socket.socket, start_with: Any) -> None:
    """A program that is started from here must not take our sockets for its own."""
    service = start_with([passed], "socks", *words)
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    assert children or not words
    for pid in children:
        assert b"LISTEN_" not in Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.parametrize("pid", ["1", "", "me"])
def test_those_for_another_process_are_none_of_ours(pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LISTEN_FDS": "1", "LISTEN_PID": pid, "LISTEN_FDNAMES": "socks"}.items():
        monkeypatch.setenv(name, value)
    assert systemd.passed_sockets() == {}
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


def test_a_socket_that_is_passed_is_not_inherited_and_has_what_every_listener_has(passed: socket.socket) -> None:
    passed.setblocking(False)
    fd = os.dup(passed.fileno())
    os.set_inheritable(fd, True)
    with systemd.adopted(fd) as sock:
        assert not sock.get_inheritable()
        assert sock.gettimeout() is None
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@contextmanager
def descriptor_of(kind: str) -> Iterator[int]:
    with ExitStack() as stack:
        if kind == "none":
            yield 999
        elif kind == "file":
            yield os.open(os.devnull, os.O_RDONLY)
        else:
            family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM))
            if kind == "unix":
                sock.bind("\0" + f"socks5srv-{os.getpid()}")
                sock.listen()
            yield os.dup(sock.fileno())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("kind", "says"), [
    ("none", "Bad file descriptor"), ("file", "Socket operation on non-socket"), ("udp", "not a TCP socket that listens"),
    ("tcp", "not a TCP socket that listens"), pytest.param("unix", "not a TCP socket that listens", marks=pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="not on this platform: sockets without a file")),
])
def test_what_is_no_listening_socket_is_told(kind: str, says: str) -> None:
    with descriptor_of(kind) as fd:
        with pytest.raises(CannotStart, match=rf"^\('descriptor {fd} of LISTEN_FDS: {says}'"):
            systemd.adopted(fd)
        if kind == "file":
            os.close(fd)


def activated(sockets: List[socket.socket], names: str, *words: str) -> Outcome:
    """What becomes of a server that cannot start with these sockets."""
    fds = [os.dup(sock.fileno()) for sock in sockets]
    try:
        done = subprocess.run(
            [sys.executable, "-c", ACTIVATE, names, *map(str, fds), "--", *COMMAND, *words], env=environment(), pass_fds=fds,
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=TIMEOUT, check=False,
        )
    finally:
        for fd in fds:
            os.close(fd)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("words", [["1081"], ["-b", "::1"]])
def test_options_that_name_other_addresses_contradict(words: List[str], passed: socket.socket) -> None:
    error = activated([passed], "socks", *words).error()
    assert error.startswith("sockets were passed to listen on, and the options name others\n")


def test_there_is_one_page(passed: socket.socket, listen: Any) -> None:
    error = activated([passed, listen(), listen()], "socks:status:status").error(1)
    assert error.startswith("several sockets are named status\n")


def test_a_socket_for_all_is_no_way_to_an_open_proxy(listen: Any) -> None:
    error = activated([listen("0.0.0.0")], "socks").error()
    assert error.startswith("refusing to be an open proxy\n")


def test_systemd_itself_passes_them(echo: Place, tmp_path: Path, closed_port: Callable[..., Tuple[str, int]]) -> None:
    """Its tool starts the service with the first client, who waits in the queue meanwhile."""
    ports = [closed_port()[1], closed_port()[1]]
    command = [
        need("systemd-socket-activate"), *(word for port in ports for word in ("-l", f"{LOCALHOST}:{port}")), "--fdname=socks:status",
        "-E", f"PYTHONPATH={ROOT}", *COMMAND,
    ]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stderr=log, env=environment()) as process:
        try:
            eventually(lambda: "Listening on" in (tmp_path / "log").read_text())
            with eventually(lambda: connected(ports[0])) as client:
                client.connect(echo)
                exchange(client)
                assert Page(LOCALHOST, ports[1]).ask("/readyz")[:2] == (200, b"ok\n")
            process.terminate()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()


def connected(port: int) -> Any:
    try:
        return Client((LOCALHOST, port))
    except OSError:
        return None


# --- what it tells ---

class Manager:
    """Hears what services tell it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(TIMEOUT)
        self.socket.bind(address.replace("@", "\0", 1))
        self.variables = {"NOTIFY_SOCKET": address}

    def next(self, *but: str) -> Dict[str, str]:
        """The next notification, but for those that begin so."""
        while True:
            text = self.socket.recv(4096).decode()
            if not text.startswith(but or "\0"):
                return dict(line.split("=", 1) for line in text.split("\n"))


@pytest.fixture(params=["a file", "no file"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    if request.param == "no file" and not sys.platform.startswith("linux"):
        pytest.skip("not on this platform: sockets without a file")
    made = Manager(str(tmp_path / "notify") if request.param == "a file" else f"@socks5srv-{os.getpid()}")
    yield made
    made.socket.close()


@processes_too
def test_the_manager_is_told_of_all_that_it_waits_for(words: Words, manager: Manager, start: Start, echo: Place) -> None:
    service = start(*words, "--drain-timeout", "60", **manager.variables)
    assert manager.next() == {"READY": "1", "STATUS": f"serving on {LOCALHOST}:{service.port}"}
    tunnel = service.tunnel(echo)
    before = time.monotonic_ns() // 1000
    service.process.send_signal(signal.SIGHUP)      # with no file to read, and yet it is no end
    reloading = manager.next()
    assert reloading.pop("RELOADING") == "1"
    assert before <= int(reloading.pop("MONOTONIC_USEC")) <= time.monotonic_ns() // 1000
    assert not reloading
    assert manager.next()["READY"] == "1"
    service.process.send_signal(signal.SIGTERM)
    assert manager.next() == {"STOPPING": "1", "STATUS": "draining"}
    service.process.send_signal(signal.SIGTERM)
    assert manager.next() == {"STOPPING": "1", "STATUS": "stopping"}
    assert service.process.wait(TIMEOUT) == 0
    assert tunnel.rest() == b""


@processes_too
def test_it_barks_while_it_is_alive_and_not_while_it_is_stuck(words: Words, manager: Manager, start: Start) -> None:
    service = start(*words, WATCHDOG_USEC="200000", **manager.variables)
    assert "READY" in manager.next()
    for _ in range(3):
        assert manager.next() == {"WATCHDOG": "1"}
    service.process.send_signal(signal.SIGSTOP)
    manager.socket.settimeout(within(1))
    with suppress(socket.timeout):
        for _ in range(5):          # what it has told before is still to be heard
            assert manager.next() == {"WATCHDOG": "1"}
        raise AssertionError("who is stopped barks")
    service.process.send_signal(signal.SIGCONT)
    manager.socket.settimeout(TIMEOUT)
    assert manager.next() == {"WATCHDOG": "1"}
    assert service.stop() == 0


@pytest.mark.parametrize(("variables", "seconds"), [
    ({"WATCHDOG_USEC": "30000000"}, 15), ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None), ({}, None),
    ({"WATCHDOG_USEC": "0"}, None), ({"WATCHDOG_USEC": "soon"}, None),
])
def test_how_often_the_watchdog_wants_to_hear(variables: Dict[str, str], seconds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert systemd.watchdog_interval() == seconds


def test_a_manager_that_is_not_there_ends_nothing(start: Start, echo: Place, tmp_path: Path) -> None:
    service = start(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    service.tunnel(echo).close()
    assert service.stop(signal.SIGTERM) == 0


def test_without_unix_sockets_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.delattr(socket, "AF_UNIX")
    systemd.notify("READY=1")


# --- the units ---

@pytest.fixture
def units(tmp_path: Path) -> List[Path]:
    """Those of the examples, with a command that is there."""
    paths = []
    for path in sorted(UNITS.glob("socks5srv.s*")):
        text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text(encoding="utf-8"))
        paths.append(tmp_path / path.name)
        paths[-1].write_text(text, encoding="utf-8")
    assert [path.suffix for path in paths] == [".service", ".socket"]
    return paths


def test_systemd_has_nothing_against_the_units(units: List[Path]) -> None:
    done = subprocess.run(
        [need("systemd-analyze"), "verify", "--man=no", *map(str, units)], capture_output=True, text=True, timeout=30, check=False)
    complaints = [line for line in done.stderr.splitlines() if "socks5srv" in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_service_may_do_little_beyond_what_it_needs(units: List[Path]) -> None:
    """On systemd's scale from 0 to 10; its network alone is 0.8."""
    done = subprocess.run(
        [need("systemd-analyze"), "security", "--offline=yes", "--no-pager", "--threshold=20", str(units[0])],
        capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_manager_waits_longer_than_the_service_does() -> None:
    unit = (UNITS / "socks5srv.service").read_text(encoding="utf-8")
    options = (UNITS / "socks5srv.conf").read_text(encoding="utf-8")
    grace, timeout = (int(re.findall(rf"(?m)^--drain-{word} (\d+)$", options)[0]) for word in ("grace", "timeout"))
    assert int(re.findall(r"(?m)^TimeoutStopSec=(\d+)$", unit)[0]) > grace + timeout
