"""Workers start, die, and end: what becomes of the others, and of their clients."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from socks5srv.service.build import CannotStart
from socks5srv.workers.supervisor import Supervisor, worker_command
from tests.conftest import TIMEOUT, Client, eventually, exchange, in_thread, within
from tests.program import ROOT

from .processes import Start, alive, comes_in, door, kill, may_come, needs_linux, needs_posix, objects, owner, workers_of

pytestmark = needs_posix

Supervise = Callable[..., Supervisor]


def in_each_worker(folder: Path, code: str) -> Dict[str, str]:
    """An environment in which workers begin with this.  (They do not get the variables of the program.)"""
    (folder / "sitecustomize.py").write_text(f"import os\nif 'SOCKS5SRV_OPTIONS' not in os.environ:\n    {code}\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "SOCKS5SRV_OPTIONS": ""}


# --- the start ---

def test_it_has_started_when_all_serve(supervise: Supervise) -> None:
    started: List[int] = []

    def one_slowly(descriptor: int) -> List[str]:
        started.append(descriptor)
        words = worker_command(descriptor)
        return [*words[:2], f"import time; time.sleep({len(started) - 1}); {words[2]}", *words[3:]]

    began, supervisor = time.monotonic(), supervise(command=one_slowly)
    assert supervisor.stats.not_ready() == "starting"
    assert supervisor.start()
    assert time.monotonic() - began > 1
    assert [worker.serving for worker in supervisor.workers] == [True, True]
    assert supervisor.stats.not_ready() == ""


def test_it_can_be_stopped_while_it_starts(supervise: Supervise) -> None:
    supervisor = supervise(command=lambda _descriptor: [sys.executable, "-c", "import time; time.sleep(60)"], stop_timeout=0)
    started = in_thread(supervisor.start)
    eventually(lambda: supervisor.workers)
    supervisor.shutdown()
    assert started() is False
    assert supervisor.stats.not_ready() == "stopping"


def test_workers_that_die_as_soon_as_they_start_end_the_server(start: Start, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="it ended instead of the port file") as failure:
        start(**in_each_worker(tmp_path, "os._exit(3)"))
    assert time.monotonic() - began >= 0.1 + 0.2 + 0.4
    message = str(failure.value)            # pytest indents it
    assert "socks5srv: error: the workers end as soon as they have started: " in message
    assert ", exit code 3\n    without --workers one process serves" in message
    assert "Traceback" not in message
    assert 2 * 4 < message.count("has died") <= 2 * 5
    assert not list(tmp_path.glob("*/port"))


def test_what_a_worker_has_died_of_is_told(supervise: Supervise, tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match=r"they have started: process .*, FileNotFoundError: .*no such folder"):
        supervise("--log-file", str(tmp_path / "no such folder" / "log"), restart_backoff=0).start()


def test_no_program_to_start_is_an_error(supervise: Supervise) -> None:
    with pytest.raises(CannotStart, match="the workers end as soon as they have started: No such file or directory"):
        supervise(command=lambda _descriptor: ["/no/such/python"], restart_backoff=0).start()


# --- a worker dies ---

def test_a_dead_worker_is_replaced_and_the_tunnels_of_the_others_live_on(start: Start, tunnels: Any) -> None:
    service = start()
    (killed, cut_off), (other, lives_on) = tunnels(service).items()
    kill(service, killed)
    line = service.wait_for("has died")
    assert "ERROR worker " in line
    assert f"(process {killed}, killed by signal 9)" in line
    assert cut_off.rest() == b""
    exchange(lives_on)
    assert killed not in eventually(lambda: len(workers_of(service)) == 2 and workers_of(service))
    assert other in workers_of(service)
    tunnels(service)
    exchange(lives_on)
    assert service.stop() == 0


@pytest.mark.parametrize("option", ["--max-clients", "--max-per-client"])
def test_the_clients_of_a_dead_worker_do_not_count(option: str, supervise: Supervise, client_at: Any, new_client: Any) -> None:
    # The first one that dies is replaced at once, the next one so late that no successor can have forgotten its clients.
    supervisor = supervise(option, "6", restart_backoff=60, min_uptime=1000)      # however busy the computer is
    assert supervisor.start()
    done = in_thread(supervisor.serve_forever)
    killed, other = workers_of(supervisor)
    os.kill(killed, signal.SIGKILL)
    (successor,) = eventually(lambda: workers_of(supervisor) - {killed, other})
    client_at(supervisor, successor)
    while comes_in(new_client(door(supervisor))):
        pass
    os.kill(successor, signal.SIGKILL)
    eventually(lambda: len(supervisor.workers) == 1)
    eventually(lambda: may_come(door(supervisor)))
    supervisor.shutdown()
    done()


@needs_linux
def test_the_last_known_figures_of_a_dead_worker_are_in_the_summary(start: Start, tunnel: Any) -> None:
    service = start("--log-format", "json")
    (pid, _other) = workers_of(service)
    served = 0
    while served < 5:
        with tunnel(service) as client:
            served += owner(service, client) == pid
        number = len(objects(service))
        service.wait_until(lambda number=number: len(objects(service)) > number or objects(service)[-1].get("up") == 5, "its line")
    told = len([line for line in objects(service) if line["event"] == "close"])
    kill(service, pid)
    assert service.stop() == 0
    stop = objects(service)[-1]
    assert stop["event"] == "stop"
    assert stop["events"]["close"] >= told - 1, "the very last may have had no time to be reported"
    assert stop["most_at_once"] >= 1


@needs_linux
def test_session_numbers_go_on_after_a_worker_has_been_replaced(start: Start, tunnel: Any) -> None:
    service = start("--log-format", "json")
    for _ in range(5):
        tunnel(service).close()
    eventually(lambda: len([line for line in objects(service) if "id" in line]) == 5)
    for pid in workers_of(service):
        kill(service, pid)
    for _ in range(5):
        tunnel(service).close()
    assert service.stop() == 0
    assert sorted(line["id"] for line in objects(service) if "id" in line) == list(range(1, 11))


@needs_linux
def test_workers_that_cannot_be_started_again_end_it_when_the_last_one_has_died(
    start: Start, tunnel: Any, tmp_path: Path,
) -> None:
    """Not before: those that live have clients."""
    service = start(**in_each_worker(tmp_path, f"if os.path.exists({str(tmp_path / 'broken')!r}): os._exit(3)"))
    (tmp_path / "broken").touch()
    first, last = sorted(workers_of(service))
    os.kill(first, signal.SIGKILL)
    service.wait_until(lambda: service.stderr.count("has died") > 5, "some tries")
    tunnel(service)
    os.kill(last, signal.SIGKILL)
    assert service.process.wait(TIMEOUT) == 1
    assert "socks5srv: error: the workers end as soon as they have started: " in service.stderr
    assert ", exit code 3" in service.stderr
    assert not service.port_file.exists()


# --- the end ---

@needs_linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_and_the_sum_is_right(number: int, start: Start, tunnels: Any) -> None:
    service = start("--log-format", "json")
    clients, pids = tunnels(service), workers_of(service)
    assert service.stop(number) == 0
    assert not any(map(alive, pids))
    assert not service.port_file.exists()
    told = objects(service)
    (stop,) = [line for line in told if line["event"] == "stop"]
    assert stop is told[-1]
    assert (stop["events"]["close"], stop["up"], stop["down"], stop["client_addresses"], stop["targets"]) == (2, 10, 10, 1, 1)
    assert stop["sessions"] == sum(stop["events"].values()) >= len([line for line in told if "id" in line]), "of the same mistake one is told"
    assert 2 <= stop["most_at_once"] <= stop["sessions"]
    for client in clients.values():
        assert client.rest() == b""


def test_they_stop_at_once(start: Start) -> None:
    """Which on a busy computer may be seen at the second or third attempt only."""
    def duration(service: Any) -> float:
        began = time.monotonic()
        service.stop()
        return time.monotonic() - began

    assert any(duration(start()) < 0.3 for _ in range(10))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_for_the_whole_group_does_the_same(number: int, start: Start) -> None:
    """Ctrl-C at a terminal, or a service manager that means well."""
    service = start()
    os.killpg(service.process.pid, number)
    assert service.process.wait(TIMEOUT) == 0
    assert service.stderr.splitlines()[-1].count(" stopped after ") == 1
    assert not [trouble for trouble in ("Traceback", "has died") if trouble in service.stderr]


def test_ctrl_c_at_a_terminal_ends_all_with_one_summary(at_terminal: Any) -> None:
    terminal = at_terminal("--workers", "2", "0")
    terminal.wait_for("Ctrl-C stops")
    terminal.type("\x03")
    code, text = terminal.end()
    assert (code, [text.count(words) for words in ("stopped after", "proxy address:", "Traceback")]) == (0, [1, 1, 0])


@needs_linux
def test_ctrl_c_while_they_start_is_no_traceback(at_terminal: Any) -> None:
    for _ in range(3):
        terminal = at_terminal("--workers", "3", "0", "--log-format", "json", "-v")
        terminal.type("\x03")
        code, text = terminal.end()
        assert (code, "Traceback" in text) == (0, False)


@needs_linux
def test_a_signal_for_a_worker_alone_is_not_heard(start: Start, tunnels: Any) -> None:
    service = start()
    pids = workers_of(service)
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    tunnels(service)
    assert workers_of(service) == pids


@needs_linux
def test_a_worker_that_has_hardly_started_stops_as_fast(start: Start) -> None:
    service = start()
    kill(service, min(workers_of(service)))
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < within(3)
    assert "does not stop" not in service.stderr


@needs_linux
def test_a_worker_that_does_not_stop_is_killed(supervise: Supervise, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = supervise(stop_timeout=0.5)
    assert supervisor.start()
    pids = workers_of(supervisor)
    os.kill(min(pids), signal.SIGSTOP)
    supervisor.close()
    assert "does not stop, and is killed" in caplog.text
    assert not any(map(alive, pids))
    supervisor.close()          # once more does nothing


@needs_linux
def test_the_second_ctrl_c_does_not_wait_for_them(start: Start) -> None:
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
def test_when_the_parent_is_killed_the_workers_stop(start: Start, tunnels: Any) -> None:
    service = start(workers="3")
    clients, pids = tunnels(service), workers_of(service)
    service.process.kill()
    eventually(lambda: not any(map(alive, pids)))
    for client in clients.values():
        assert client.rest() == b""
    with pytest.raises(ConnectionError):
        Client(service.server_address)
    assert "Traceback" not in service.stderr
