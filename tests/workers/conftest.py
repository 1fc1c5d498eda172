"""Servers of several processes, and clients at a certain one of them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import pytest

from socks5srv.cli.options import parse
from socks5srv.service.build import listening_sockets
from socks5srv.service.settings import Settings
from socks5srv.workers.supervisor import Supervisor, worker_command
from tests.conftest import LOCALHOST, TIMEOUT, Client, exchange

from .processes import Place, Start, door, hash_of, owner, workers_of


@pytest.fixture
def start(start: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """As ever, but with two workers."""
    monkeypatch.delenv("SOCKS5SRV_TEST_WORKERS", raising=False)
    return lambda *words, workers="2", **more: start("--workers", workers, *words, **more)


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervisor]]:
    """A Supervisor in this process, to be started: ``supervise("--max-clients", "4", restart_backoff=60)``."""
    with ExitStack() as stack:
        def make(*words: str, command: Any = worker_command, **attributes: Any) -> Supervisor:
            settings = parse(["--workers", "2", *words])
            assert isinstance(settings, Settings)
            supervisor = Supervisor(settings, listening_sockets([LOCALHOST], 0), command)
            stack.callback(supervisor.close)
            for name, value in attributes.items():
                assert hasattr(supervisor, name)
                setattr(supervisor, name, value)
            return supervisor

        yield make


@pytest.fixture
def on_each(new_client: Callable[..., Client]) -> Callable[..., Dict[int, Client]]:
    """A client at each worker, on which nothing has been said: by process id."""
    def visit(service: Any) -> Dict[int, Client]:
        found: Dict[int, Client] = {}
        until = time.monotonic() + TIMEOUT
        while set(found) < workers_of(service):
            assert time.monotonic() < until, "some worker gets no clients"
            client = new_client(door(service))
            found.setdefault(owner(service, client), client)
        return found

    return visit


@pytest.fixture
def tunnel(new_client: Callable[..., Client], echo: Place) -> Callable[..., Client]:
    """A client that has a tunnel, which works: ``tunnel(service)``."""
    def stand(service: Any, client: Optional[Client] = None) -> Client:
        client = client or new_client(service)
        client.connect(echo)
        exchange(client)
        return client

    return stand


@pytest.fixture
def tunnels(on_each: Callable[..., Dict[int, Client]], tunnel: Callable[..., Client]) -> Callable[..., Dict[int, Client]]:
    """The same at each worker."""
    return lambda service: {pid: tunnel(service, client) for pid, client in on_each(service).items()}


@pytest.fixture
def client_at(new_client: Callable[..., Client]) -> Callable[..., Client]:
    """A client of one worker: ``client_at(service, pid)``."""
    def visit(service: Any, pid: int) -> Client:
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            client = new_client(door(service))
            if owner(service, client) == pid:
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
