"""
What SIGHUP means: to a server at a terminal that is closed, to one that nohup has started, and to a daemon.

(Ctrl-C is in test_main.py, SIGTERM in test_drain.py, users files in test_startup.py, log files in service/test_log.py.)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Tuple

import pytest

from socks5srv.protocol import Command, ReplyCode
from tests.conftest import TIMEOUT, Place, eventually, exchange
from tests.load import Load
from tests.program import AtTerminal, Service, Start, Terminal, by_shell, needs_hangup, processes_too, started
from tests.cli.test_startup import write_users

pytestmark = needs_hangup

# Tells its number when it runs, and is ended by SIGTERM and SIGUSR1 with codes of their own.
PROGRAM = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: os._exit(5))
signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def serve(at_terminal: AtTerminal, tmp_path: Path) -> AtTerminal:
    """Start a server at a terminal, with these options and a port file."""
    def served(*words: str) -> Terminal:
        terminal = at_terminal("0", *words, "--port-file", str(tmp_path / "port"))
        eventually((tmp_path / "port").exists)
        terminal.port = int((tmp_path / "port").read_text())
        return terminal

    return served


# --- a terminal that is closed ---

@processes_too
@pytest.mark.parametrize("logged", [False, True], ids=["on the screen", "in a file"])
def test_a_terminal_that_is_closed_ends_the_server_as_sigterm_does(
    words: Tuple[str, ...], logged: bool, serve: AtTerminal, echo: Place, tmp_path: Path,
) -> None:
    terminal = serve(*words, *["--log-file", str(tmp_path / "log")] * logged)
    client = terminal.tunnel(echo)
    terminal.hang_up()
    assert terminal.process.wait(TIMEOUT) == 0
    assert client.rest() == b""
    assert not (tmp_path / "port").exists()
    with pytest.raises(ConnectionError):        # which a worker that is left would accept
        terminal.client()
    if logged:
        *_others, session, farewell = (tmp_path / "log").read_text().splitlines()
        assert session.endswith(" server stopped")
        assert " stopped after " in farewell


@processes_too
def test_a_server_with_a_users_file_outlives_its_terminal(
    words: Tuple[str, ...], serve: AtTerminal, echo: Place, tmp_path: Path,
) -> None:
    users, log = write_users(tmp_path / "users", anna="sesame"), tmp_path / "log"
    terminal = serve(*words, "--users-file", str(users), "--log-file", str(log), "--drain-timeout", "0")
    terminal.hang_up()
    eventually(lambda: "1 users read" in log.read_text())
    terminal.tunnel(echo, "anna", "sesame")
    terminal.process.terminate()
    assert terminal.process.wait(TIMEOUT) == 0


def test_a_program_that_is_run_is_told_of_the_closed_terminal_as_by_sigterm(at_terminal: AtTerminal) -> None:
    terminal = at_terminal("--run", sys.executable, "-c", PROGRAM)
    terminal.wait_for("\n")
    terminal.hang_up()
    assert terminal.process.wait(TIMEOUT) == 5


# --- the signal alone ---

@processes_too
def test_a_daemon_reads_the_rules_of_its_file_again(words: Tuple[str, ...], start: Start, echo: Place, tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("# nothing yet\n")
    service = start(*words, f"@{options}")
    tunnel = service.tunnel(echo)
    options.write_text("--deny *.ads.example\n--deny 127.0.0.0/8\n")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("2 rules read")
    eventually(lambda: reply_to(service, echo) == ReplyCode.NOT_ALLOWED)
    exchange(tunnel)
    options.write_text("--allow :*oops\n")
    service.process.send_signal(signal.SIGHUP)
    line = service.wait_for("the rules stay as they are")
    assert f"{options}:1: " in line
    assert reply_to(service, echo) == ReplyCode.NOT_ALLOWED
    options.write_text("--help\n")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("--help or --version is among the options")
    options.write_text("")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("0 rules read")
    eventually(lambda: reply_to(service, echo) == ReplyCode.SUCCEEDED)
    assert service.stop() == 0
    assert service.stdout == ""


def reply_to(service: Service, place: Place) -> ReplyCode:
    with service.client() as client:
        return client.ask(Command.CONNECT, place).code


def test_a_file_in_the_environment_counts_as_well(start: Start, tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("--deny 192.0.2.1\n")
    service = start(SOCKS5SRV_OPTIONS=f"@{options}")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("1 rule read")
    assert service.stop() == 0


def test_at_a_terminal_a_file_with_options_makes_no_daemon(serve: AtTerminal, tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("--deny 192.0.2.1\n")
    terminal = serve(f"@{options}")
    terminal.hang_up()
    assert terminal.process.wait(TIMEOUT) == 0


@processes_too
def test_logrotate_under_load_loses_no_line_and_no_client(words: Tuple[str, ...], start: Start, echo: Place, tmp_path: Path) -> None:
    """As it does it: rename, signal, and later look into what it has put aside."""
    log = tmp_path / "log"
    service = start(*words, "--log-file", str(log), "--log-format", "json")
    with Load(service.port, echo) as load:
        for number in range(3):
            log.rename(tmp_path / f"log.{number}")
            service.process.send_signal(signal.SIGHUP)
            eventually(log.exists)
            load.wait_for(10)
    assert load.lost == []
    assert service.stop() == 0
    lines = [json.loads(line) for path in sorted(tmp_path.glob("log*")) for line in path.read_text().splitlines()]
    ids = [line["id"] for line in lines if line["event"] == "close"]
    assert sorted(ids) == sorted(set(ids))
    assert len(ids) == len(load.done)


def test_sighup_ends_a_server_that_has_no_file_to_read_again(start: Start) -> None:
    service = start()
    assert service.stop(signal.SIGHUP) == 0
    assert " stopped after " in service.stderr.splitlines()[-1]
    assert not service.port_file.exists()


@pytest.mark.parametrize("users", [False, True], ids=["without users", "with a users file"])
def test_a_server_that_nohup_has_started_is_not_ended(users: bool, start: Start, echo: Place, tmp_path: Path) -> None:
    file = write_users(tmp_path / "users", anna="sesame")
    service = start(*["--users-file", str(file)] * users, command=by_shell("trap '' HUP; exec \"$@\""))
    for _ in range(5):
        service.process.send_signal(signal.SIGHUP)
    if users:
        service.wait_for("1 users read")
        service.tunnel(echo, "anna", "sesame")
    else:
        service.tunnel(echo)
    assert service.stop() == 0


@pytest.mark.parametrize(("script", "code"), [("", 5), ("trap '' HUP; ", 7)], ids=["told", "under nohup"])
def test_a_program_that_is_run_is_told_of_sighup_unless_nohup_has_started_it(script: str, code: int) -> None:
    with started(*by_shell(script + 'exec "$@"'), "--run", sys.executable, "-c", PROGRAM) as (process, pid):
        process.send_signal(signal.SIGHUP)
        if script:
            os.kill(int(pid), signal.SIGUSR1)
        assert process.wait(TIMEOUT) == code
