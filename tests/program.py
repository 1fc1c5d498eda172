"""
``python -m socks5srv`` as its users start it: a process of its own, a file or a terminal to write to.

With SOCKS5SRV_TEST_WORKERS=2 in the environment all that `start` starts has two workers.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from socks5srv.protocol import Command, CredentialsReply, Method, ReplyCode
from tests.conftest import LOCALHOST, TIMEOUT, Client, Place, exchange

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {ROOT / "tests" / room for room in ("capture", "cli", "explain", "monitor", "service", "workers")}
COMMAND = (sys.executable, "-m", "socks5srv")
WORKERS = "SOCKS5SRV_TEST_WORKERS"
READY = "socks5srv --help shows more."      # the end of the banner

needs_posix = pytest.mark.skipif(os.name != "posix", reason="not on this platform: POSIX")
needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on this platform: SIGHUP")
needs_full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this platform: /dev/full")
processes_too = pytest.mark.parametrize("words", [(), ("--workers", "2")], ids=["one process", "two workers"])

# Opens the terminal that it is told as its own, as a login does, and becomes what else it is told.
IN_TERMINAL = """
import os, sys
os.setsid()
tty = os.open(sys.argv[1], os.O_RDWR)
for fd in range(3):
    os.dup2(tty, fd)
os.execv(sys.argv[2], sys.argv[2:])
"""


def environment(**changes: str) -> Dict[str, str]:
    """Ours, without what would change what the command does or how it looks."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SOCKS5SRV_")}
    for name in ("NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS"):
        ours.pop(name, None)
    return {**ours, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", **changes}


def by_shell(script: str, shell: str = "sh") -> Tuple[str, ...]:
    """The command as a shell's script starts it, in which it is ``"$@"``."""
    return (shell, "-c", script, shell, *COMMAND)


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """With workers leave out what starts no server, and would only do again what it does without."""
    if WORKERS in os.environ:
        same = {item for item in items if Path(item.fspath).parent in ROOMS and "start" not in getattr(item, "fixturenames", ())}
        items[:] = [item for item in items if item not in same]
        config.hook.pytest_deselected(items=list(same))


@pytest.fixture
def processes() -> int:
    """How many `start` starts."""
    return int(os.environ.get(WORKERS, 0)) + 1


@pytest.fixture(autouse=True)
def _no_options_from_outside(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of these rooms.  (Not by `monkeypatch`, which all tests would have before their other fixtures then.)"""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if Path(request.node.fspath).parent in ROOMS and name.startswith("SOCKS5SRV_") and name != WORKERS:
                patch.delenv(name)
        yield


class Outcome(NamedTuple):
    """What a command that has ended has left."""

    code: int
    stdout: str
    stderr: str

    def error(self, code: int = 2, greeting: bool = False) -> str:
        """Its complaint, which has to be all that it says (but for a greeting), with a way out and no traceback."""
        before, error, message = self.stderr.partition("socks5srv: error: ")
        assert (self.code, self.stdout) == (code, "")
        assert error
        assert greeting or not before
        assert "\n  " in message, "there is no way out"
        assert "Traceback" not in self.stderr
        return message


@pytest.fixture
def run_command() -> Callable[..., Outcome]:
    """Run it to its end, without a terminal: ``run_command("-V")``; keywords are environment variables."""
    def run(*words: str, **variables: str) -> Outcome:
        done = subprocess.run(
            [*COMMAND, *words], env=environment(**variables), stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
            timeout=TIMEOUT, check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@contextmanager
def started(*command: str) -> Iterator[Tuple[Any, str]]:
    """A process in a session of its own, and the first line that it says."""
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().rstrip("\n")


class Served:
    """What serves on a port of this computer, and its clients, which are there until its end."""

    def __init__(self) -> None:
        self.port = 0
        self.clients = ExitStack()

    @property
    def server_address(self) -> Tuple[str, int]:
        return LOCALHOST, self.port

    def client(self, host: str = LOCALHOST, source: Optional[str] = None) -> Client:
        return self.clients.enter_context(Client((host, self.port), source))

    def admits(self, user: str, password: str) -> bool:
        """Whether somebody can log in so."""
        with self.client() as client:
            return logged_in(client, user, password)

    def tunnel(self, place: Place, *login: str, host: str = LOCALHOST, source: Optional[str] = None) -> Client:
        """A client that is connected to an echo by it, after a login or without, and has had five octets echoed."""
        client = self.client(host, source)
        if login:
            assert logged_in(client, *login)
            assert client.request(Command.CONNECT, place).code is ReplyCode.SUCCEEDED
        else:
            client.connect(place)
        exchange(client)
        return client


def logged_in(client: Client, user: str, password: str) -> bool:
    assert client.greet(Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
    return client.login(user, password).status == CredentialsReply.SUCCESS


class Service(Served):
    """A server that serves, in a process of its own; its stdout and stderr go to files."""

    def __init__(self, directory: Path, command: Tuple[str, ...], variables: Dict[str, str]) -> None:
        super().__init__()
        self.port_file, self.stdout_file, self.stderr_file = (directory / name for name in ("port", "stdout", "stderr"))
        with self.stdout_file.open("wb") as stdout, self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--port-file", str(self.port_file)], env=environment(**variables),
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
            )

    def wait_until_it_serves(self) -> None:
        self.wait_until(self.port_file.exists, "the port file")
        self.port = int(self.port_file.read_text())

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text(encoding="utf-8")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        until = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > until:
                raise AssertionError(f"waited for {what} in vain; stderr:\n{self.stderr}")
            if self.ended_within(0.005):
                assert condition(), f"it ended instead of {what}; stderr:\n{self.stderr}"

    def wait_for(self, text: str) -> str:
        """The line of stderr that has this text in it, as soon as it is there in full."""
        self.wait_until(lambda: any(text in line for line in self.stderr.split("\n")[:-1]), repr(text))
        return next(line for line in self.stderr.split("\n") if text in line)

    def ended_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send it a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        """End it, and what a shell may have started for it."""
        self.clients.close()
        with suppress(ProcessLookupError, PermissionError):     # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a server on a free port: ``start("-v")``; keywords are environment variables."""
    with_workers = ["--workers", os.environ[WORKERS]] if WORKERS in os.environ else []
    with ExitStack() as stack:
        def started(*words: str, port: Optional[str] = "0", command: Tuple[str, ...] = COMMAND, **variables: str) -> Service:
            directory = tmp_path / f"service-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            service = Service(directory, (*command, *with_workers, *words, *([port] if port else [])), variables)
            stack.callback(service.kill)
            service.wait_until_it_serves()
            return service

        yield started


class Terminal(Served):
    """A command at a terminal: what it shows, and what is typed."""

    def __init__(self, words: Tuple[str, ...], variables: Dict[str, str], command: Tuple[str, ...]) -> None:
        super().__init__()
        self.text = ""
        self.screen, terminal = os.openpty()
        try:
            start = [sys.executable, "-c", IN_TERMINAL, os.ttyname(terminal), *command, *words]
            self.process = subprocess.Popen(start, env=environment(**variables))
            self.read(TIMEOUT)      # before its first text, the terminal is only ours, and would be gone with our end
        finally:
            os.close(terminal)

    def read(self, seconds: float) -> bool:
        """Take what is shown next; False if nothing is, or nothing will be."""
        if not select.select([self.screen], [], [], max(0, seconds))[0]:
            return False
        try:
            octets = os.read(self.screen, 65536)
        except OSError:         # Linux: the other end is closed
            return False
        self.text += octets.decode().replace("\r\n", "\n")
        return bool(octets)

    def wait_for(self, text: str) -> str:
        """All that is shown, as soon as this text is among it."""
        until = time.monotonic() + TIMEOUT
        while text not in self.text:
            assert self.read(until - time.monotonic()), f"waited for {text!r} in vain: {self.text!r}"
        return self.text

    def wait_until_it_serves(self) -> None:
        self.wait_for(READY + "\n")
        self.port = int(re.findall(r"socks5h://\S+:(\d+)\n", self.text)[0])

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def end(self) -> Tuple[int, str]:
        """Wait for its end: the exit code, and all that was shown, which has no crash in it."""
        while self.read(TIMEOUT):
            pass
        assert "Traceback" not in self.text
        assert "Fatal" not in self.text
        return self.process.wait(TIMEOUT), self.text

    def talk(self, *lines: str) -> Tuple[int, str]:
        """Wait for the first, type the second, and so on, and wait for its end."""
        for shown, keys in zip(lines[::2], lines[1::2]):
            self.wait_for(shown)
            self.type(keys)
        return self.end()

    def hang_up(self) -> None:
        """Close the terminal, as somebody does who closes its window."""
        os.close(self.screen)
        self.screen = -1

    def close(self) -> None:
        self.clients.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        if self.screen >= 0:
            os.close(self.screen)


@pytest.fixture
def at_terminal() -> Iterator[Callable[..., Terminal]]:
    """Start a command at a terminal: ``at_terminal("-v")``; keywords are environment variables."""
    if not hasattr(os, "openpty"):
        pytest.skip("not on this platform: pseudo-terminals")
    with ExitStack() as stack:
        def started(*words: str, command: Tuple[str, ...] = COMMAND, **variables: str) -> Terminal:
            terminal = Terminal(words, variables, command)
            stack.callback(terminal.close)
            return terminal

        yield started


@pytest.fixture
def expect_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of a function that has to complain as all do, with exit code 2: ``expect_error(function, argument)``."""
    def expect(function: Callable[..., Any], *arguments: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            function(*arguments)
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        before, after = "socks5srv: error: ", "\n  see  socks5srv --help\n"
        assert (out, err[:len(before)], err[-len(after):]) == ("", before, after)
        return err[len(before):-len(after)]

    return expect


Run, Start, AtTerminal = Callable[..., Outcome], Callable[..., Service], Callable[..., Terminal]    # what the fixtures are
