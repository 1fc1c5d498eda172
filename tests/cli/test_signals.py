"""
What SIGHUP means: to a server at a terminal that is closed, to one that nohup has started, and to a daemon.

(Ctrl-C and SIGTERM are in test_main.py, users files in test_startup.py, log files in service/test_log.py.)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Tuple

import pytest
from tests.conftest import TIMEOUT, Place, eventually
from tests.program import AtTerminal, Start, Terminal, by_shell, needs_hangup, processes_too, started
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
    terminal = serve(*words, "--users-file", str(users), "--log-file", str(log))
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
