"""SIGUSR2: each worker is replaced by a new one, one after the other, and no client notices."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Callable, List, Set

import pytest

from tests.conftest import eventually, exchange
from tests.load import Load
from tests.monitor.watched import Page

from .processes import Place, Start, alive, door, needs_linux, needs_posix, objects, workers_of
from .test_supervisor import in_each_worker

pytestmark = [needs_posix, needs_linux]


def restart(service: Any, old: Set[int]) -> Set[int]:
    """Have it restart; returns when new workers serve, of which these are the process ids."""
    told = service.stderr.count("has a successor")
    service.process.send_signal(signal.SIGUSR2)
    service.wait_until(lambda: service.stderr.count("has a successor") == told + 2, "the successors")
    return workers_of(service) - old


def test_workers_are_replaced_under_load_and_nobody_is_lost(start: Start, echo: Place) -> None:
    service = start("--drain-timeout", "60")
    pids = workers_of(service)
    with Load(service.port, echo) as load:
        for _ in range(3):
            pids, old = restart(service, pids), pids
            load.wait_for(10)
            eventually(lambda old=old: not any(map(alive, old)))
            assert workers_of(service) == pids
    assert load.lost == []
    assert not [trouble for trouble in ("has died", "Traceback", "cut off") if trouble in service.stderr]
    assert service.stop() == 0


def test_those_that_have_been_replaced_go_when_their_clients_have(start: Start, tunnels: Any, client_at: Any, tunnel: Any) -> None:
    """However long it takes, unless there is a --drain-timeout."""
    service = start("--log-format", "json", "--status", "0")
    page, clients = Page.at(objects(service)[0]["status"]), tunnels(service)
    new = restart(service, set(clients))
    assert len(new) == 2
    for pid in new:
        tunnel(service, client_at(service, pid))
    for pid, client in clients.items():
        exchange(client)
        client.close()
        eventually(lambda pid=pid: not alive(pid))
    assert page.ask("/readyz")[:2] == (200, b"ok\n")
    assert workers_of(service) == new
    assert service.stop() == 0
    stop = objects(service)[-1]
    assert stop["events"]["close"] == 4
    assert (stop["up"], stop["down"]) == (30, 30)


def test_with_a_timeout_they_are_cut_off(start: Start, tunnels: Any) -> None:
    service = start("--drain-timeout", "0.3")
    clients = tunnels(service)
    new = restart(service, set(clients))
    for pid, client in clients.items():
        assert client.rest() == b""
        eventually(lambda pid=pid: not alive(pid))
    assert workers_of(service) == new
    assert "has died" not in service.stderr


def test_a_third_generation_waits_until_the_first_has_gone(start: Start, tunnels: Any, client_at: Any, tunnel: Any) -> None:
    """Or processes would add up."""
    service = start()
    clients = tunnels(service)
    second = restart(service, set(clients))
    service.process.send_signal(signal.SIGUSR2)
    for pid in second:
        tunnel(service, client_at(service, pid))
    assert workers_of(service) == second | set(clients)
    for client in clients.values():
        client.close()
    service.wait_until(lambda: service.stderr.count("has a successor") == 4, "the third generation")
    eventually(lambda: len(workers_of(service)) == 4)
    assert second <= workers_of(service), "of whom two have clients"


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM])
def test_those_that_drain_end_with_the_others(ends: int, start: Start, tunnels: Any) -> None:
    service = start("--drain-timeout", "600") if ends == signal.SIGINT else start()
    clients = tunnels(service)
    pids = restart(service, set(clients)) | set(clients)
    assert service.stop(ends) == 0
    assert not any(map(alive, pids))
    for client in clients.values():
        assert client.rest() == b""


def test_a_successor_that_cannot_start_leaves_all_as_it_is(start: Start, tunnels: Any, tmp_path: Path) -> None:
    service = start(**in_each_worker(tmp_path, f"if os.path.exists({str(tmp_path / 'broken')!r}): os._exit(3)"))
    clients = tunnels(service)
    (tmp_path / "broken").touch()
    service.process.send_signal(signal.SIGUSR2)
    line = service.wait_for("the restart is given up")
    assert "exit code 3" in line
    assert workers_of(service) == set(clients)
    (tmp_path / "broken").unlink()
    assert len(restart(service, set(clients))) == 2
    for client in clients.values():
        exchange(client)


def test_one_that_dies_while_it_drains_is_told_and_not_replaced(start: Start, tunnels: Any) -> None:
    service = start()
    clients = tunnels(service)
    new = restart(service, set(clients))
    victim, client = next(iter(clients.items()))
    os.kill(victim, signal.SIGKILL)
    assert " has died while it was draining (process " in service.wait_for("has died")
    assert client.rest() == b""
    assert workers_of(service) == new | set(clients) - {victim}


def test_one_that_dies_while_its_successor_starts_is_replaced_by_that(supervise: Callable[..., Any]) -> None:
    supervisor = supervise(restart_backoff=60)
    assert supervisor.start()
    slot = supervisor.slots[0]
    supervisor.restart_workers()
    supervisor.continue_restart()
    assert slot.successor is not None
    slot.worker.process.kill()
    turns(supervisor, lambda: slot.worker is not None and slot.successor is None and not slot.wants_successor)
    turns(supervisor, lambda: not any(slot.wants_successor for slot in supervisor.slots))
    assert len(workers_of(supervisor)) >= 2
    assert all(slot.worker.serving for slot in supervisor.slots)


def turns(supervisor: Any, condition: Callable[[], Any]) -> None:
    def turn() -> Any:
        supervisor.turn(0.05)
        supervisor.continue_restart()
        return condition()

    eventually(turn)


def test_limits_hold_for_both_generations_together(start: Start, tunnels: Any, new_client: Any) -> None:
    service = start("--max-clients", "8")
    clients = tunnels(service)
    restart(service, set(clients))
    others = [new_client(door(service)) for _ in range(20)]
    answers: List[bytes] = []
    for client in others:
        try:
            client.send(b"\5\1\0")
            answers.append(client.read(2))
        except ConnectionError:
            answers.append(b"")
    assert 0 < answers.count(b"\5\0") <= 6


def test_a_server_without_workers_has_none_to_restart(start: Start, echo: Place) -> None:
    service = start(workers="1")
    service.process.send_signal(signal.SIGUSR2)
    assert "WARNING there are no workers to restart" in service.wait_for("no workers")
    service.tunnel(echo)
    assert service.stop() == 0


def test_rules_read_again_are_those_of_workers_to_come_as_well(start: Start, echo: Place, tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("--deny 192.0.2.1\n")
    service = start(f"@{options}")
    old = workers_of(service)
    service.tunnel(echo)
    options.write_text("--deny *\n")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("1 rule read")
    restart(service, old)
    for _ in range(10):
        with service.client() as client:
            assert client.ask(1, echo).code == 2
