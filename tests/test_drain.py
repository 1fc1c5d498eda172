"""A server that drains: who is still let in, who is waited for and how long, and that nobody is lost.

(The signals are in cli/test_drain.py, workers in workers/test_restart.py.)
"""

from __future__ import annotations

import errno
import gc
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest

from socks5srv import listener as listener_module
from socks5srv import server as server_module
from socks5srv.listener import Listener
from socks5srv.monitor.stats import LocalStats
from socks5srv.observer import Observer
from socks5srv.protocol import Command
from socks5srv.server import Socks5Server
from socks5srv.session import Session
from socks5srv.users import UsersFile

from .conftest import LOCALHOST, TIMEOUT, Client, Place, cheap_hash, eventually, exchange, in_thread, needs_ipv6, within
from .failing import FailingCalls
from .test_staying_alive import PATIENCE, QUIET, log

__all__ = ["log"]       # a fixture

Drain = Callable[..., Callable[[], None]]


@pytest.fixture
def drain() -> Drain:
    """Have a server drain; what is returned waits for its end."""
    def begin(server: Any) -> Callable[[], None]:
        ended = in_thread(server.drain)
        eventually(lambda: server.draining or server.stopped.is_set())
        return ended

    return begin


def is_closed(address: Tuple[Any, ...]) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection(address[:2], 0.05).close()
    except OSError:         # refused, or not answered for a moment
        return True
    return False


# --- who is waited for ---

def test_without_clients_it_ends_at_once(start_server: Any, drain: Drain) -> None:
    server = start_server()
    began = time.monotonic()
    drain(server)()
    assert time.monotonic() - began < within(0.6)
    assert is_closed(server.server_address)


@pytest.mark.parametrize("host", [LOCALHOST, pytest.param("::1", marks=needs_ipv6)])
def test_clients_are_waited_for_and_nobody_else_is_let_in(host: str, start_server: Any, new_tunnel: Any, drain: Drain) -> None:
    server = start_server(address=(host, 0), drain_timeout=None)
    first, second = new_tunnel(server), new_tunnel(server)
    ended = drain(server)
    eventually(lambda: is_closed(server.server_address))
    for client in (first, second):
        exchange(client)
        assert not server.stopped.is_set()
        client.close()
    ended()
    tunnels = 0
    while tunnels < 2:          # there are those that have looked whether it is closed
        tunnels += server.next_ended().up == 10


@pytest.mark.parametrize("command", [Command.BIND, Command.UDP_ASSOCIATE])
def test_so_are_those_that_wait_for_a_peer_or_send_datagrams(command: Command, start_server: Any, new_client: Any, drain: Drain) -> None:
    server = start_server(drain_timeout=None)
    client = new_client(server)
    client.ask(command, ("0.0.0.0", 0))
    ended = drain(server)
    eventually(lambda: is_closed(server.server_address))
    assert not server.stopped.wait(0.2)
    client.close()
    ended()


def test_so_is_one_that_has_said_nothing_yet(start_server: Any, new_client: Any, echo: Place, drain: Drain) -> None:
    server = start_server(drain_timeout=None)
    client = new_client(server)
    eventually(lambda: server.sessions)
    ended = drain(server)
    eventually(lambda: is_closed(server.server_address))
    client.connect(echo)
    exchange(client)
    client.close()
    ended()


def test_after_the_timeout_those_that_are_left_are_cut_off(start_server: Any, new_tunnel: Any, drain: Drain) -> None:
    server = start_server(drain_timeout=0.3)
    client = new_tunnel(server)
    began = time.monotonic()
    drain(server)()
    assert 0.3 <= time.monotonic() - began < within(1)
    exchange(client)            # it is server_close() that does it
    server.server_close()
    assert client.rest() == b""
    assert server.next_ended().reason == "server stopped"


def test_shutdown_makes_an_end_of_it(start_server: Any, new_tunnel: Any, drain: Drain) -> None:
    server = start_server(drain_grace=60, drain_timeout=None)
    new_tunnel(server)
    ended = drain(server)
    server.shutdown()
    ended()


def test_in_the_thread_that_serves_it_does_not_wait_for_itself(start_server: Any, new_tunnel: Any) -> None:
    server = start_server(drain_timeout=None)
    client = new_tunnel(server)
    server.call(server.drain)
    eventually(lambda: is_closed(server.server_address))
    client.close()
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()


def test_to_drain_twice_is_to_drain_once(start_server: Any, new_tunnel: Any, drain: Drain) -> None:
    server = start_server(drain_timeout=0.5)
    new_tunnel(server)
    began = time.monotonic()
    first = drain(server)
    eventually(lambda: time.monotonic() - began > 0.3)
    drain(server)
    first()
    assert time.monotonic() - began < within(1)


def test_a_server_that_does_not_serve_has_nobody_to_wait_for() -> None:
    with Socks5Server((LOCALHOST, 0)) as server:
        server.drain()
        server.serve_forever()
        assert is_closed(server.server_address)


# --- grace ---

def test_for_the_time_of_grace_all_goes_on_but_it_is_not_ready(start_server: Any, new_tunnel: Any, drain: Drain) -> None:
    server = start_server(drain_grace=0.8)
    stats = LocalStats(server)
    assert stats.not_ready() == ""
    began = time.monotonic()
    ended = drain(server)
    assert stats.not_ready() == "draining"
    while time.monotonic() - began < 0.5:
        new_tunnel(server).close()
    ended()
    assert time.monotonic() - began >= 0.8
    assert stats.not_ready() == "stopping"


# --- nobody is lost ---

@pytest.fixture(params=["by shutdown", "by calls"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How threads are taken out of accept(): the second is that of BSD and Windows, which cannot drop SYNs either."""
    if request.param == "by calls":
        def shutdown(sock: socket.socket, how: int) -> None:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return real(sock, how)
            raise OSError(errno.ENOTCONN, "not here")

        real = socket.socket.shutdown
        monkeypatch.setattr(socket.socket, "shutdown", shutdown)
        monkeypatch.setattr(listener_module, "drop_new", lambda _sock: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_those_in_the_accept_queue_are_served(start_server: Any, new_client: Any, echo: Place, drain: Drain) -> None:
    """As many as the system lets in while nobody accepts."""
    gate = threading.Event()
    serving: List[threading.Thread] = []

    class Busy(Socks5Server):
        def _accept(self, sock: socket.socket) -> Any:
            if self.draining is None:
                serving.append(threading.current_thread())
                gate.wait(TIMEOUT)
            return super()._accept(sock)

    server = start_server(server_class=Busy)
    eventually(lambda: serving)
    clients = [new_client(server) for _ in range(100)]
    for client in clients[::2]:
        client.send(b"\5\1\0")
    ended = drain(server)
    for client in clients:
        gate.set()
        client.connect(echo) if client not in clients[::2] else client.exactly(2)
    for client in clients[1::2]:
        exchange(client)
    for client in clients:
        client.close()
    ended()
    assert len({server.next_ended().id for _ in clients}) == len(clients)


@pytest.mark.usefixtures("way")
def test_what_takes_threads_out_of_accept_is_no_client(start_server: Any, new_client: Any, drain: Drain) -> None:
    class Told(Observer):
        def started(self, session: Session) -> None:
            clients.append(session)

        def accept_failed(self, error: OSError) -> None:
            errors.append(error)

    clients: List[Session] = []
    errors: List[OSError] = []
    server = start_server(observers=(Told(),))
    callers = [new_client(server) for _ in range(20)]
    for client in callers:
        client.send(b"\5\1\0")
        client.exactly(2)
    for client in callers:          # whose threads are all there at once, and wait for others then
        client.close()
    for _ in range(20):
        server.next_ended()
    eventually(lambda: server.listeners[0].waiting > 5)
    drain(server)()
    assert (len(clients), errors) == (20, [])


def test_whoever_has_connected_gets_an_answer_however_many_come(start_server: Any, echo: Place, drain: Drain) -> None:
    """Connected at the very last, refused, or not answered: but never reset."""
    servers = []
    for _ in range(5):
        servers.append(start_server())
        lost: List[Exception] = []
        callers = [in_thread(come_until_refused, servers[-1].server_address, echo, lost) for _ in range(4)]
        eventually(lambda: len(servers[-1].sessions) > 1)
        drain(servers[-1])()
        assert sum(caller() for caller in callers) > 0
        assert lost == []


def come_until_refused(address: Tuple[Any, ...], echo: Place, lost: List[Exception]) -> int:
    """How many clients have been served."""
    for number in range(10**6):
        try:
            sock = socket.create_connection(address[:2], 0.5)
            sock.close()
            client = Client(address)
        except OSError:
            return number
        with client:
            try:
                client.connect(echo)
                exchange(client)
            except Exception as error:
                lost.append(error)
    raise AssertionError("it goes on for ever")


@pytest.mark.skipif(not hasattr(listener_module.select, "epoll"), reason="not on this platform: SYNs are dropped on Linux")
def test_who_wants_to_connect_at_the_last_moment_is_not_answered_and_whoever_has_begun_is(listen: Any) -> None:
    sock = listen()
    with socket.create_connection(sock.getsockname(), TIMEOUT):
        assert listener_module.drop_new(sock)
        with pytest.raises(socket.timeout):
            socket.create_connection(sock.getsockname(), 0.2)
        accepted, _ = sock.accept()
        accepted.close()


def test_a_system_without_such_filters_closes_at_once(listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = listen()
    assert not listener_module.drop_new(FullOfTrouble(sock.family, sock.type, fileno=sock.detach()))
    monkeypatch.delattr(listener_module.select, "epoll", raising=False)
    assert not listener_module.drop_new(sock)


class FullOfTrouble(socket.socket):
    def setsockopt(self, *_arguments: Any) -> None:
        self.close()
        raise OSError(errno.EPERM, "not you")


# --- what fails meanwhile ---

def test_threads_that_cannot_be_had_are_tried_again(listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who should have had it is lost, and the others are not."""
    talked = []
    sock = listen()
    listener = Listener(sock, socket.socket.accept, lambda connection, _address: talked.append(connection.close()))
    listener.backlog = 9
    clients = [socket.create_connection(sock.getsockname(), TIMEOUT) for _ in range(3)]
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda _thread: (_ for _ in ()).throw(RuntimeError("no more threads")))
    with pytest.raises(RuntimeError):
        drain_to_its_end(listener)
    monkeypatch.setattr(threading.Thread, "start", start)
    drain_to_its_end(listener)
    listener.join(TIMEOUT)
    assert len(talked) == 2
    for client in clients:
        client.close()


def drain_to_its_end(listener: Listener) -> None:
    while listener.socket.fileno() >= 0:
        listener.drain()
        time.sleep(0.01)


# A client whose conversation could not begin is left to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_drain_comes_to_its_end_whatever_fails(
    log: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    """As in test_staying_alive.py, server after server: each call fails once, and each server ends."""
    path = tmp_path / "users"
    path.write_text(f"anna:{cheap_hash('sesame')}\n", encoding="utf-8")
    path.chmod(0o600)
    monkeypatch.setattr(listener_module, "IN_FLIGHT", 0.0)
    monkeypatch.setattr(server_module, "BATCH", 0.001)
    calls, until = FailingCalls("serve_forever", "_attempt", "call", "stop", "call_away"), time.monotonic() + PATIENCE
    steps = {"server.py:_continue_drain", "server.py:_stop_accepting", "listener.py:drain", "listener.py:accept_queue"}
    quiet = 0
    while quiet <= QUIET // 4 or steps - set(calls.functions()):
        assert time.monotonic() < until
        before = len(calls.failed)
        drain_with(calls, UsersFile(str(path)))
        quiet = quiet + 1 if len(calls.failed) == before else 0
    calls.stop()
    assert log
    caplog.clear()      # its records have tracebacks, and these have sockets
    gc.collect()


def drain_with(calls: FailingCalls, users: UsersFile) -> None:
    """Every turn of its drain begins with one more failure ahead."""
    server = Socks5Server((LOCALHOST, 0), users=users, drain_timeout=0.2)
    pause, armed = server._pause, threading.Event()

    def turn() -> None:
        calls.arm()
        armed.set()
        pause()

    thread = threading.Thread(target=server.serve_forever, args=(0.001,), name="test-serve", daemon=True)
    thread.start()
    eventually(lambda: not server.stopped.is_set())
    server._pause = turn        # type: ignore[method-assign]
    assert armed.wait(TIMEOUT)
    with suppress(OSError), Client(server.server_address):
        server.drain()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    server.server_close()
