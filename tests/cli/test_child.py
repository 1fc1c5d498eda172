"""``--run COMMAND...``: a program that goes through the proxy, and what is told of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any, Dict, List, Tuple

import pytest

from socks5srv.protocol import Address, AddressType, Command, ReplyCode
from socks5srv.cli.child import Destinations, proxy_url
from socks5srv.session import Session
from tests.conftest import TIMEOUT, eventually
from tests.program import COMMAND, Run, needs_posix, started

Place = Tuple[str, int]

# A program that asks the proxy in ALL_PROXY for an echo, and says what it has heard.
CLIENT = """
import os, sys
from socks5srv.client import connect
with connect(os.environ["ALL_PROXY"], sys.argv[1], int(sys.argv[2])) as sock:
    sock.sendall(b"to and fro")
    print(sock.recv(100).decode(), flush=True)
sys.exit(int(sys.argv[3]))
"""


def python(program: str, *words: str) -> List[str]:
    return ["--run", sys.executable, "-c", program, *words]


def client(place: Place, code: int = 0) -> List[str]:
    return python(CLIENT, place[0], str(place[1]), str(code))


def test_a_program_finds_the_proxy_and_its_exit_code_is_kept(run_command: Run, echo: Place) -> None:
    done = run_command(*client(echo, code=7))
    assert done.stdout == "to and fro\n"
    assert done.code == 7
    first, second = done.stderr.splitlines()
    assert first == f"socks5srv: {os.path.basename(sys.executable)} has contacted 1 destination"
    assert second == f"  CONNECT {echo[0]}:{echo[1]} ok, 1 connection, 10 B up, 10 B down"


def test_it_logs_in_with_the_login_that_is_asked_for(run_command: Run, echo: Place) -> None:
    done = run_command("-u", "anna:s@:/%", *client(echo))
    assert (done.code, done.stdout) == (0, "to and fro\n")


def test_what_was_refused_is_told_as_well(run_command: Run, echo: Place) -> None:
    done = run_command("--deny", f":{echo[1]}", *client(echo))
    assert done.code == 1
    assert f"  CONNECT {echo[0]}:{echo[1]} denied (reply 02), 1 connection, 0 B up, 0 B down" in done.stderr.splitlines()


def test_a_program_that_goes_its_own_way_is_told_of(run_command: Run) -> None:
    done = run_command(*python("pass"))
    assert done.code == 0
    assert done.stderr.endswith("has contacted nothing through the proxy; it may not look for ALL_PROXY\n")


def test_with_q_only_the_program_is_heard(run_command: Run, echo: Place) -> None:
    assert run_command("-q", *client(echo)).stderr == ""


def test_with_v_the_log_lines_are_there_as_ever(run_command: Run, echo: Place) -> None:
    assert "listening" not in run_command(*client(echo)).stderr
    assert f"CONNECT {echo[0]}:{echo[1]} ok, 10 B up, 10 B down" in run_command("-v", *client(echo)).stderr


PROXIES = "import os; print(sorted(name for name in os.environ if name.lower().endswith('_proxy')))"
SECRETS = "import os; print(sorted(n for n in os.environ if n.startswith('SOCKS5SRV_')), 'hush' in str(os.environ.values()))"
WORDS = "import sys; print(sys.argv[1:])"
OURS = {"SOCKS5SRV_OPTIONS": "--upstream socks5h://ben:hush@127.0.0.1:9", "SOCKS5SRV_PASSWORD": "sesame"}


@pytest.mark.parametrize(("words", "variables", "printed"), [
    (python(PROXIES), {"http_proxy": "http://127.0.0.1:1", "NO_PROXY": "*"}, "['ALL_PROXY', 'all_proxy']\n"),
    (["-u", "anna", *python(SECRETS)], OURS, "[] False\n"),
    (python(WORDS, "-q", "@nowhere", "--run", "--workers", "2"), {}, "['-q', '@nowhere', '--run', '--workers', '2']\n"),
], ids=["no other proxy", "no option and no password of ours", "what follows, whatever it looks like"])
def test_what_a_program_finds(words: List[str], variables: Dict[str, str], printed: str, run_command: Run) -> None:
    assert run_command(*words, **variables).stdout == printed


def test_the_port_is_a_free_one_unless_it_is_given(run_command: Run) -> None:
    program = "import os; print(os.environ['ALL_PROXY'].rpartition(':')[2])"
    assert run_command(*python(program)).stdout.strip() not in ("0", "1080")


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--run"], 2, "--run needs a COMMAND"),
    (["--workers", "2", "--run", "true"], 2, "leave them out"),
    (["--run", "./no-such-program"], 127, "cannot run ./no-such-program"),
    (["--run", os.path.dirname(__file__)], 126, "cannot run"),
])
def test_what_cannot_be_run_is_one_sentence_and_an_exit_code(words: List[str], code: int, says: str, run_command: Run) -> None:
    assert says in run_command(*words).error(code)


@needs_posix
def test_a_program_that_is_killed_ends_us_as_a_shell_tells_it(run_command: Run) -> None:
    assert run_command("--run", "sh", "-c", "kill -9 $$").code == 128 + 9


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_the_programs_to_answer(number: int) -> None:
    program = """
import os, signal
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(5))
print("ready", flush=True)
while True:
    signal.pause()
"""
    with started(*COMMAND, *python(program)) as (process, first):
        assert first == "ready"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)      # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(TIMEOUT) == 5


@needs_posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"])
def test_a_signal_while_the_program_is_being_started_leaves_no_program_alone(name: str) -> None:
    """The signal comes right after the program has begun, before anything else of ours has."""
    number = getattr(signal, name)
    ours = f"""
import os, subprocess, sys
class Popen(subprocess.Popen):
    def __init__(self, *words, **more):
        super().__init__(*words, **more)
        print(self.pid, flush=True)
        os.kill(os.getpid(), {int(number)})
subprocess.Popen = Popen
from socks5srv.cli.main import main
sys.exit(main())
"""
    with started(sys.executable, "-c", ours, *python("import signal; signal.pause()")) as (process, first):
        pid = int(first)
        try:
            assert process.wait(TIMEOUT) == 128 + number
            eventually(lambda: not alive(pid))
        finally:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_places_are_told_one_by_one_up_to_a_number() -> None:
    destinations = Destinations()
    for port in range(1, destinations.max_destinations + 11):
        session = Session(port, Address("127.0.0.1", 9, AddressType.IPV4))
        session.command, session.destination = Command.CONNECT, Address("a.example", port, AddressType.DOMAINNAME)
        session.reply, session.up = ReplyCode.SUCCEEDED, 1
        session.end()
        destinations.ended(session)
    assert destinations.contacted_by("it").splitlines()[-1] == "  others ok, 10 connections, 10 B up, 0 B down"


@pytest.mark.parametrize(("users", "login"), [
    (None, ""), ({"anna": "sesame"}, "anna:sesame@"), ({"a@b": "c:d/é"}, "a%40b:c%3Ad%2F%C3%A9@"),
])
@pytest.mark.parametrize(("address", "place"), [
    (Address("127.0.0.1", 9, AddressType.IPV4), "127.0.0.1:9"),
    (Address("fe80::1", 9, AddressType.IPV6, 1), f"[fe80::1%25{socket.if_indextoname(1)}]:9"),
], ids=["IPv4", "link-local, with its zone"])
def test_the_url_says_where_and_who(address: Address, place: str, users: Any, login: str) -> None:
    assert proxy_url(address, users) == f"socks5h://{login}{place}"
