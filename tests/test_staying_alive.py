"""
Nothing that serve_forever() does for itself may end it.

Whatever the thread of serve_forever() calls is made to fail once, one call after the other, while clients come and
go: see failing.py.  There is no list of places here, so a new one is found by itself.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import OrderedDict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Iterator, List, Set, Tuple

import pytest

from socks5srv import users as users_module
from socks5srv.monitor.http import StatusPage
from socks5srv.monitor.stats import LocalStats
from socks5srv.protocol import Address, Command, Method
from socks5srv.server import Socks5Server
from socks5srv.service.affinity import CoreAffinity
from socks5srv.service.build import Single, listening_sockets
from socks5srv.service.settings import Settings
from socks5srv.users import UsersFile
from socks5srv.workers.channel import Channel, LoginFailed, UsersChanged, WorkerConfig
from socks5srv.workers.shared import Scoreboard
from socks5srv.workers.supervisor import Supervisor
from socks5srv.workers.worker import WorkerServer

from .conftest import LOCALHOST, TIMEOUT, Client, cheap_hash, eventually, server_threads
from .failing import ERRORS, FailingCalls

QUIET = 20          # turns in a row in which nothing new has been called: then all has failed
PATIENCE = 40.0     # seconds that this may take

needs_posix = pytest.mark.skipif(os.name != "posix", reason="not on this platform: one process is all there is")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[List[str]]:
    """What is told, without what it is told of, and to nobody else."""
    told: List[str] = []
    logger, handler = logging.getLogger("socks5srv"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())      # type: ignore[method-assign]
    caplog.set_level(logging.INFO, "socks5srv")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _a_users_file_is_read_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_module, "SETTLED", 0.0)


class Turns:
    """A server whose every turn begins with something to do, and with one more failure ahead."""

    def __init__(self, server: Any, address: Tuple[Any, ...], calls: FailingCalls, users: UsersFile, each: str = "_pause") -> None:
        self.server, self.address, self.calls = server, address, calls
        self.users_file = Path(users.path)
        self.number = 0
        self.error: List[BaseException] = []
        self.original = getattr(server, each)
        setattr(server, each, self.turn)
        self.thread = threading.Thread(target=self.serve, name="test-serve", daemon=True)
        self.thread.start()
        eventually(lambda: self.number)

    def serve(self) -> None:
        try:
            self.server.serve_forever(0.001)
        except BaseException as error:
            self.error.append(error)

    def close(self) -> None:
        self.server.server_close()

    def turn(self, *arguments: Any) -> None:
        self.number += 1
        if self.number % 4 == 0:        # there is another users file to read
            new = self.users_file.with_name("new")
            new.write_bytes(self.users_file.read_bytes())
            new.chmod(0o600)
            os.replace(str(new), str(self.users_file))
        self.calls.arm()
        if arguments:
            self.original(*arguments)

    def go_on_until_all_has_failed(self, functions: Set[str]) -> None:
        until = time.monotonic() + PATIENCE
        while self.calls.quiet <= QUIET or functions - set(self.calls.functions()):
            assert time.monotonic() < until, f"there is no end: {list(self.calls.failed)[-5:]}, {functions - set(self.calls.functions())}"
            assert self.thread.is_alive(), f"{list(self.calls.failed)[-1]} has ended it: {self.error}"
            visit(self.address)


def visit(address: Tuple[Any, ...]) -> None:
    """A client that logs in, if it can, and has its request refused."""
    try:
        with Client(address) as client:
            if client.greet(Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD:
                client.login("anna", "sesame")
            client.request(Command.CONNECT, (LOCALHOST, 1))
    except Exception:               # it may have met one of the failures
        pass


@pytest.fixture
def calls() -> Iterator[FailingCalls]:
    found = FailingCalls("serve_forever", "_attempt", "call", "give_up_if_hopeless", "is_hopeless", "<genexpr>")
    yield found
    found.stop()


@pytest.fixture
def users(tmp_path: Path) -> UsersFile:
    path = tmp_path / "users"
    path.write_text(f"anna:{cheap_hash('sesame')}\n", encoding="utf-8")
    path.chmod(0o600)
    return UsersFile(str(path))


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def survives(turns: Turns, log: List[str], *functions: str) -> None:
    """It goes on, tells what has failed, and has really been asked to."""
    try:
        turns.go_on_until_all_has_failed(set(functions))
    finally:
        turns.calls.stop()
        turns.close()
        turns.thread.join(TIMEOUT)
    assert log
    assert not turns.error
    eventually(lambda: not [thread for thread in server_threads() if thread.name == "socks5srv-conversation"])


DUTIES = [
    "server.py:_report_ended", "server.py:_report", "registry.py:hang_up_on_slow", "users.py:refresh", "users.py:read_users",
    "handler.py:session_ended",
]


def test_a_server_survives_the_failure_of_all_that_it_calls(calls: FailingCalls, users: UsersFile, log: List[str]) -> None:
    server = Socks5Server((LOCALHOST, 0), users=users)
    survives(Turns(server, server.server_address, calls, users), log, *DUTIES)


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
def test_so_does_the_program(watched: bool, calls: FailingCalls, users: UsersFile, log: List[str], closing: ExitStack) -> None:
    """And so does its page, if it has one."""
    node = Single(Settings(users_file=users.path, status=(LOCALHOST, 0) if watched else None), listening_sockets([LOCALHOST], 0))
    pages = [closing.enter_context(StatusPage(node.stats, {}, Address.numeric(LOCALHOST, 0)))] if watched else []
    turns = Turns(node.server, node.addresses[0], calls, users)
    node.call(lambda: None)
    survives(turns, log, *DUTIES, "service/summary.py:ended", *["monitor/metrics.py:ended", "explain/tracer.py:ended"] * watched)
    assert all(page.thread.is_alive() for page in pages)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this platform: no thread is tied")
def test_what_ties_threads_to_a_core_survives_it_in_any_thread(closing: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tied at one look, and untied at the next."""
    closing.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
    for name, value in {"many": 0.0, "few": 1e9, "min_interval": 0.0, "watch_interval": 0.0}.items():
        monkeypatch.setattr(CoreAffinity, name, value)
    calls, affinity = FailingCalls("look"), CoreAffinity(lambda _function: None)
    affinity.cores |= {0, 1}
    while calls.quiet <= QUIET:
        calls.arm()
        affinity.look()
    calls.stop()
    calls.arm()
    assert {f"service/affinity.py:{name}" for name in ("change", "current_core", "place_threads")} <= set(calls.functions())


@pytest.mark.usefixtures("log")
def test_the_page_survives_the_failure_of_all_that_it_calls(closing: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = FailingCalls("_attempt", "service_actions", errors=ERRORS[:1])      # socketserver lets a bug of get_request() through
    monkeypatch.setattr(StatusPage, "poll_interval", 0.001)
    server = Socks5Server((LOCALHOST, 0))
    closing.callback(server.server_close)
    page = StatusPage(LocalStats(server), {}, Address.numeric(LOCALHOST, 0))
    service_actions = page.service_actions

    def turn() -> None:
        calls.arm()
        service_actions()

    page.service_actions = turn        # type: ignore[method-assign]
    closing.enter_context(page)
    until = time.monotonic() + PATIENCE
    while calls.quiet <= QUIET and time.monotonic() < until:
        assert page.thread.is_alive(), f"{list(calls.failed)[-1]} has ended it"
        with suppress(OSError):
            socket.create_connection(page.server_address[:2], 0.2).close()
    calls.stop()
    assert {"monitor/http.py:get_request", "monitor/http.py:process_request"} <= set(calls.functions())
    eventually(lambda: not page.silent and not page.busy)


@needs_posix
def test_so_does_a_worker(calls: FailingCalls, users: UsersFile, log: List[str], closing: ExitStack) -> None:
    ours, theirs = socket.socketpair()
    parent = Channel(ours)
    closing.callback(parent.close)
    (listener,) = [sock.detach() for sock in listening_sockets([LOCALHOST], 0)]
    settings, state = Settings(users_file=users.path), (OrderedDict(), {})
    config = WorkerConfig(0, 1, settings, users.hashes, [listener], Scoreboard.new(1).descriptor, frozenset(), state)
    server = WorkerServer(Channel(theirs), config)
    closing.callback(server.channel.close)
    closing.callback(server.scoreboard.close)

    class Controlled(Turns):
        """What the control thread does with messages is guarded as well."""

        def turn(self, *arguments: Any) -> None:
            parent.send(UsersChanged(users.hashes))
            parent.send(LoginFailed("192.0.2.1"))
            server.channel.fill()
            messages = list(server.channel.messages())
            super().turn(*arguments)
            for message in messages:
                server._attempt(server.receive, message)

        def close(self) -> None:
            server.stopping_all.set()
            super().close()

    survives(
        Controlled(server, server.server_address, calls, users), log, "server.py:_report_ended", "workers/shared.py:refresh",
        "workers/worker.py:update_summary", "workers/worker.py:on_UsersChanged", "workers/shared.py:on_LoginFailed",
    )


# A process whose beginning or end has been broken off by force is left to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@needs_posix
@pytest.mark.parametrize("error", ERRORS, ids=["out of something", "a bug"])
def test_so_does_the_parent_of_workers(
        error: Any, calls: FailingCalls, users: UsersFile, log: List[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls.errors = [error]          # each may cost a process its start, which takes longest
    for name, value in {"restart_backoff": 0.01, "max_backoff": 0.01, "max_fast_failures": 10**6}.items():
        monkeypatch.setattr(Supervisor, name, value)
    supervisor = Supervisor(Settings(users_file=users.path, quiet=True, workers=2), listening_sockets([LOCALHOST], 0))
    assert supervisor.start()

    class Killing(Turns):
        def turn(self, *arguments: Any) -> None:
            if self.number % 25 == 0 and any(worker.serving for worker in supervisor.workers):
                os.kill(supervisor.workers[0].process.pid, signal.SIGKILL)
            super().turn(*arguments)

        def close(self) -> None:
            supervisor.close()

    survives(
        Killing(supervisor, supervisor.addresses[0], calls, users, "turn"), log,
        *(f"workers/supervisor.py:{name}" for name in ("turn", "start_worker", "fill", "receive", "bury", "on_SummaryUpdate")),
        "workers/channel.py:fill", "users.py:read_users",
    )
