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
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator, List, Set

import pytest

from socks5srv import users as users_module
from socks5srv.protocol import Address, Command, Method
from socks5srv.server import Socks5Server
from socks5srv.service import cores
from socks5srv.service import workers as workers_module
from socks5srv.service.figures import watched
from socks5srv.service.options import build_parser
from socks5srv.service.remembering import remembering
from socks5srv.service.run import ServiceHandler, ServiceServer
from socks5srv.service.status import StatusPage
from socks5srv.service.worker import Line, Orders, WorkerServer
from socks5srv.service.workers import Workers, shared_memory
from socks5srv.users import UsersFile, hash_password

from .conftest import LOCALHOST, TIMEOUT, Client, eventually, server_threads
from .failing import ERRORS, FailingCalls

QUIET = 20          # turns in a row in which nothing new has been called: then all has failed
PATIENCE = 40.0     # seconds that this may take

needs_posix = pytest.mark.skipif(os.name != "posix", reason="not on this platform: one process is all there is")


class ToNull(logging.Handler):
    """A log that counts what is told."""

    def __init__(self) -> None:
        super().__init__()
        self.records: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[ToNull]:
    logger, handler = logging.getLogger("socks5srv"), ToNull()
    before = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.propagate, logger.level = before


@pytest.fixture(autouse=True)
def _all_at_each_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The threads are tied to a core at one look, and untied at the next; and a users file that has changed is read."""
    monkeypatch.setattr(cores, "MANY", 0.0)
    monkeypatch.setattr(cores, "FEW", 1e9)
    monkeypatch.setattr(cores, "LOOK", 0.0)
    monkeypatch.setattr(users_module, "SETTLED", 0.0)
    use_all_cores()         # the server of another test may have left this process on one
    yield
    use_all_cores()


def use_all_cores() -> int:
    """How many there are; 0 where that cannot be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        return 0
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    return len(os.sched_getaffinity(0))


class Turns:
    """A server whose every turn begins with something to do, and with one more failure ahead."""

    def __init__(self, server: Any, calls: FailingCalls, users_file: Path, each: str = "pause") -> None:
        self.server = server
        self.calls = calls
        self.users_file = users_file
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
            assert time.monotonic() < until, f"there is no end: {self.calls.failed[-5:]}, {functions - set(self.calls.functions())}"
            assert self.thread.is_alive(), f"{self.calls.failed[-1]} has ended it: {self.error}"
            visit(self.server)


def visit(server: Any) -> None:
    """A client that logs in, if it can, and has its request refused."""
    try:
        with Client(server.server_address) as client:
            if client.greet(Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD:
                client.login("anna", "sesame")
            client.request(Command.CONNECT, (LOCALHOST, 1))
    except Exception:               # it may have met one of the failures
        pass


@pytest.fixture
def calls() -> Iterator[FailingCalls]:
    found = FailingCalls("serve_forever", "attempt", "give_up_if_hopeless", "is_hopeless", "<genexpr>")
    yield found
    found.stop()


@pytest.fixture
def users(tmp_path: Path) -> UsersFile:
    path = tmp_path / "users"
    path.write_text(f"anna:{hash_password('sesame')}\n", encoding="utf-8")
    path.chmod(0o600)
    return UsersFile(str(path))


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def options(*words: str) -> Any:
    found = build_parser().parse_args(list(words))
    found.status_address = None
    return found


def survives(turns: Turns, log: ToNull, *functions: str) -> None:
    """It goes on, tells what has failed, and has really been asked to."""
    try:
        turns.go_on_until_all_has_failed(set(functions))
    finally:
        turns.calls.stop()
        turns.close()
        turns.thread.join(TIMEOUT)
    assert log.records
    assert not turns.error
    eventually(lambda: not [thread for thread in server_threads() if thread.name == "socks5srv-conversation"])


BOOKS = ("server.py:keep_books", "server.py:end_slow_handshakes", "users.py:refresh", "users.py:read_users", "handler.py:session_ended")


def test_a_server_survives_the_failure_of_all_that_it_calls(calls: FailingCalls, users: UsersFile, log: ToNull) -> None:
    server = Socks5Server((LOCALHOST, 0), users=users)
    survives(Turns(server, calls, Path(users.path)), log, *BOOKS)


def test_so_does_the_program(calls: FailingCalls, users: UsersFile, log: ToNull) -> None:
    server = ServiceServer((LOCALHOST, 0), ServiceHandler, users=users)
    server.options = options()
    turns = Turns(server, calls, Path(users.path))
    server.call(lambda: None)
    looks = ("service/cores.py:follow", "service/cores.py:place_threads") if use_all_cores() > 1 else ()
    survives(turns, log, *BOOKS, "service/banner.py:add", *looks)


def test_so_does_one_that_is_watched_and_so_does_its_page(calls: FailingCalls, users: UsersFile, log: ToNull, closing: ExitStack) -> None:
    server: Any = watched(ServiceServer)((LOCALHOST, 0), remembering(ServiceHandler), users=users)
    server.options = options()
    page = closing.enter_context(StatusPage(server, Address.numeric(LOCALHOST, 0)))
    survives(Turns(server, calls, Path(users.path)), log, *BOOKS, "service/figures.py:end")
    assert page.thread.is_alive()


@pytest.mark.usefixtures("log")
def test_the_page_survives_the_failure_of_all_that_it_calls(closing: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = FailingCalls("attempt", "service_actions", errors=ERRORS[:1])      # socketserver lets a bug of get_request() through
    server: Any = watched(ServiceServer)((LOCALHOST, 0), remembering(ServiceHandler))
    closing.callback(server.server_close)
    server.options = options()
    page = StatusPage(server, Address.numeric(LOCALHOST, 0))
    monkeypatch.setattr("socks5srv.service.status.LOOK", 0.001)
    service_actions = page.http.service_actions

    def turn() -> None:
        calls.arm()
        service_actions()

    page.http.service_actions = turn        # type: ignore[method-assign]
    closing.enter_context(page)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert page.thread.is_alive(), f"{calls.failed[-1]} has ended it"
        try:
            socket.create_connection(page.http.server_address[:2], 0.2).close()
        except OSError:
            pass
        if calls.quiet > QUIET:
            break
    calls.stop()
    assert {"service/status.py:get_request", "service/status.py:process_request", "service/status.py:hang_up"} <= set(calls.functions())
    assert len(page.http.connections) == 0 or eventually(lambda: not page.http.connections)


@needs_posix
def test_so_does_a_worker(calls: FailingCalls, users: UsersFile, log: ToNull, closing: ExitStack) -> None:
    ours, theirs = socket.socketpair()
    parent = Line(ours)
    closing.callback(parent.close)
    with socket.socket() as listener:
        listener.bind((LOCALHOST, 0))
        listener.listen()
        orders = Orders(0, 1, options("--users-file", users.path), users.hashes, [os.dup(listener.fileno())], shared_memory(8), OrderedDict(), {})
    server = WorkerServer(Line(theirs), orders)
    closing.callback(server.line.close)
    closing.callback(server.board.close)
    server.options = orders.options

    class Obeying(Turns):
        """What the thread that obeys does with messages is guarded as well."""

        def turn(self, *arguments: Any) -> None:
            parent.send("users", users.hashes)
            parent.send("failed", "192.0.2.1")
            server.line.fill()
            messages = list(server.line.messages())
            super().turn(*arguments)
            for message in messages:
                server.attempt(server.do, message)

        def close(self) -> None:
            server.told_to_stop.set()
            super().close()

    survives(
        Obeying(server, calls, Path(users.path)), log,
        "server.py:keep_books", "service/worker.py:refresh", "service/worker.py:tell_tally", "service/worker.py:on_users", "service/worker.py:on_failed",
    )


# A process whose beginning or end has been broken off by force is left to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@needs_posix
@pytest.mark.parametrize("error", ERRORS, ids=["out of something", "a bug"])
def test_so_does_the_parent_of_workers(
        error: Any, calls: FailingCalls, users: UsersFile, log: ToNull, monkeypatch: pytest.MonkeyPatch) -> None:
    calls.errors = [error]          # each may cost a process its start, which takes longest
    monkeypatch.setattr(workers_module, "PAUSE", 0.01)
    monkeypatch.setattr(workers_module, "TRIES", 10**6)
    server = Workers((LOCALHOST, 0), ServiceHandler, users=users)
    server.options = options("--workers", "2", "--users-file", users.path, "-q")
    assert server.get_ready()

    class Killing(Turns):
        def turn(self, *arguments: Any) -> None:
            if self.number % 25 == 0 and any(worker.serving for worker in server.workers):
                os.kill(server.workers[0].process.pid, signal.SIGKILL)
            super().turn(*arguments)

    survives(
        Killing(server, calls, Path(users.path), "look_after_all"), log,
        "service/workers.py:look_after_all", "service/workers.py:start", "service/workers.py:hear", "service/workers.py:bury",
        "service/workers.py:hear_message", "service/worker.py:fill", "users.py:read_users",
    )
