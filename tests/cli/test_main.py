"""
``python -m socks5srv`` from its start to its exit code, as a process of its own.

What the options mean once it serves, how it ends, and that no mistake of the user's shows a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, Client, Place, address_of, exchange, needs_ipv6, needs_neighbour, within
from tests.networks import LinkLocal
from tests.program import COMMAND, ROOT, Run, Start, by_shell

from socks5srv.protocol import Command, CredentialsReply, Method, Reply, ReplyCode, Request
from socks5srv.cli import startup
from socks5srv.cli.options import parse
from socks5srv.service.build import cannot_listen

ELSEWHERE = "203.0.113.77"      # for documentation only: no computer has it

# A server that takes its time to close, so that there is time for a second Ctrl-C.
SLOW = """
import sys, time
from socks5srv.cli import main as run

def slow_node(*arguments):
    def close():
        print("closing", flush=True)
        time.sleep(60)

    node = make_node(*arguments)
    node.close = close
    return node

make_node, run.make_node = run.make_node, slow_node
sys.exit(run.main())
"""


def can_listen_on_low_ports() -> bool:
    try:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((LOCALHOST, 999))
    except OSError as error:
        return not isinstance(error, PermissionError)
    return True


# --- it serves ---

def test_stdout_stays_empty_for_scripts(start: Start, echo: Place) -> None:
    service = start("-vv")
    service.tunnel(echo)
    service.stop()
    assert service.stdout == ""
    assert service.stderr != ""


def test_it_serves_without_a_stderr_too(start: Start, echo: Place) -> None:
    start(command=by_shell('"$@" 2>&-')).tunnel(echo)


@needs_ipv6
def test_an_address_in_brackets_is_served(start: Start, echo: Place) -> None:
    service = start(port="[::1]:0")
    service.tunnel(echo, host="::1")
    with pytest.raises(ConnectionRefusedError):
        service.client()


@needs_ipv6
def test_several_addresses_are_served_on_the_same_port(start: Start, echo: Place) -> None:
    service = start("-b", LOCALHOST, "-b", "::1")
    service.tunnel(echo)
    service.tunnel(echo, host="::1")
    assert f"socks5h://127.0.0.1:{service.port} socks5h://[::1]:{service.port}" in service.wait_for("listening")


def test_an_address_given_twice_is_served_once(start: Start, echo: Place) -> None:
    service = start("-b", LOCALHOST, "-b", LOCALHOST)
    service.tunnel(echo)
    assert service.wait_for("listening").count("socks5h://") == 1


def test_a_name_can_be_listened_on(start: Start, echo: Place) -> None:
    start("-b", "localhost").tunnel(echo, host="localhost")


def test_a_file_and_the_environment_can_have_all_options(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text("--user anna:sesame     # the only one\n")
    service = start(f"@{file}", SOCKS5SRV_OPTIONS="--commands bind,udp")
    assert "auth=password commands=bind,udp" in service.wait_for("listening")
    assert service.client().greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS


def test_the_script_is_the_same_program() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "socks5srv = socks5srv.cli.main:main"


# --- the commands beside it ---

@pytest.mark.parametrize(("words", "code", "stdout", "stderr"), [
    ("explain 05 01 00", 0, "VER", ""), ("explain", 2, "", "usage: socks5srv explain HEX...\n"),
    ("explain xyz", 2, "", "socks5srv explain: error: invalid hex: expected two digits of 0-9a-f"),
    ("explain --json", 2, "", "socks5srv explain: error: unknown option --json; see  socks5srv explain --help\n"),
    ("check", 2, "", "socks5srv check: error: "), ("check --frobnicate", 2, "", "socks5srv check: error: "),
    ("check --help", 0, "usage: socks5srv check ", ""), ("check 127.0.0.1:0", 2, "", "socks5srv check: error: invalid server '127.0.0.1:0'"),
    ("hash-password --help", 0, "usage: socks5srv hash-password", ""),
    ("hash-password sesame", 2, "", "socks5srv hash-password: error: "),
    ("hash-password", 2, "", "socks5srv hash-password: error: no password was given"),
])
def test_a_command_does_something_else_under_its_own_name(words: str, code: int, stdout: str, stderr: str, run_command: Run) -> None:
    outcome = run_command(*words.split())
    assert outcome.code == code
    for expected, text in ((stdout, outcome.stdout), (stderr, outcome.stderr)):
        assert expected in text
        assert bool(expected) is bool(text)
    assert "Traceback" not in outcome.stderr


def test_a_server_is_checked_by_the_same_program(start: Start, run_command: Run) -> None:
    outcome = run_command("check", f"127.0.0.1:{start().port}", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["counts"]["fail"] == 0


@pytest.mark.parametrize(("words", "loaded"), [
    (["-V"], set()), (["--prot"], set()), (["explain", "050100"], {"explain"}), (["check", "-h"], {"check"}),
])
def test_what_only_a_command_takes_is_loaded_for_it_alone(words: List[str], loaded: Set[str]) -> None:
    run = f"""if True:
        import sys
        from socks5srv.cli.main import main
        try:
            main({words})
        except SystemExit:
            pass
        print(*sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    modules = set(done.stdout.split("\n")[-2].split())
    assert {name for name in ("check", "explain") if f"socks5srv.{name}" in modules} == loaded


# --- the port file ---

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: pipes with a name")


def test_the_port_file_goes_at_the_end(start: Start) -> None:
    service = start()
    assert service.port_file.read_text() == f"{service.port}\n"
    service.stop()
    assert not service.port_file.exists()
    assert list(service.port_file.parent.glob("tmp*")) == [], "nothing of how it was made is left"


def test_the_port_file_appears_whole_and_can_be_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "port"
    path.write_text("of an earlier run\n")
    seen = []

    def replace(source: str, destination: str) -> None:
        seen.append((Path(source).read_text(), Path(destination).read_text()))
        rename(source, destination)

    rename = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with startup.port_file(str(path), 1080) as write:
        assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["port"]
        write()
        assert list(tmp_path.iterdir()) == [path]
        assert seen == [("1080\n", "of an earlier run\n")]
        assert path.read_text() == "1080\n"
        assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o644
    assert not path.exists()


def test_a_port_file_that_somebody_else_has_removed_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "port"
    with startup.port_file(str(path), 1080) as write:
        write()
        path.unlink()


def test_a_port_file_of_another_stays_if_it_has_not_come_to_ours(tmp_path: Path) -> None:
    path = tmp_path / "port"
    path.write_text("of another\n")
    with startup.port_file(str(path), 1080):
        pass
    assert path.read_text() == "of another\n"
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_port_file_nothing_is_written() -> None:
    with startup.port_file(None, 1080) as write:
        write()


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout here")
def test_the_port_can_be_written_to_a_pipe() -> None:
    with subprocess.Popen(
        [*COMMAND, "0", "--port-file", "/dev/stdout"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            assert b" listening " in process.stdout.readline(), "who waits for the port finds the greeting in the log"
            Client((LOCALHOST, int(process.stdout.readline()))).close()
        finally:
            process.terminate()
        assert process.wait(TIMEOUT) == 0
    assert os.path.exists("/dev/stdout")


@needs_pipes
@pytest.mark.parametrize("words", [["-q", "--port-file"], ["-q", "--workers", "2", "--port-file"], ["--log-file"]], ids=" ".join)
def test_a_pipe_that_nobody_reads_is_no_file_and_is_not_waited_for(words: List[str], tmp_path: Path, run_command: Run) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(str(path))
    what = words[-1].strip("-").replace("-", " ")
    error = run_command(*words, str(path), "0").error(1)
    assert error.startswith(f"cannot write the {what} {path}: it is a pipe that no process reads\n")
    assert path.exists()


@needs_pipes
def test_a_pipe_in_place_of_the_log_file_stops_nothing(tmp_path: Path, start: Start, echo: Place) -> None:
    path = tmp_path / "log"
    service = start("--log-file", str(path))
    path.unlink()
    os.mkfifo(str(path))
    for _ in range(2):
        service.tunnel(echo).close()
    service.wait_for("cannot be opened afresh")
    assert service.stop(signal.SIGTERM) == 0


# --- who may use it ---

@pytest.mark.parametrize(("name", "password", "status"), [
    ("anna", "sesame", CredentialsReply.SUCCESS), ("ben", "4711", CredentialsReply.SUCCESS),
    ("anna", "4711", CredentialsReply.FAILURE), ("carl", "sesame", CredentialsReply.FAILURE),
    ("anna", "", CredentialsReply.FAILURE),
])
def test_with_users_a_login_is_needed(name: str, password: str, status: int, start: Start) -> None:
    client = start("-u", "anna:sesame", "-u", "ben", SOCKS5SRV_PASSWORD="4711").client()
    assert client.greet(Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
    assert client.login(name, password).status == status


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.20", "2001:db8::20", "169.254.1.1"])
def test_it_refuses_to_be_an_open_proxy_and_says_how_to_go_on(address: str, run_command: Run) -> None:
    error = run_command("-b", address).error()
    assert error.startswith("refusing to be an open proxy\n")
    assert f"socks5srv -b {address} -u NAME" in error
    assert "port 1080" in error


def test_one_address_beyond_loopback_is_enough_to_refuse(run_command: Run) -> None:
    error = run_command("-b", "127.0.0.1", "-b", "192.168.1.20", "-b", "::1").error()
    assert "socks5srv -b 192.168.1.20 -u NAME" in error


@needs_ipv6
def test_with_a_login_it_serves_both_families_on_the_ipv6_wildcard(start: Start) -> None:
    service = start("-u", "anna:sesame", port="[::]:0")
    for host in (LOCALHOST, "::1"):
        assert service.client(host).greet(Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_needs_no_login(address: str) -> None:
    startup.refuse_to_be_open(parse(["-b", address]), [address])


# --- what it does, and how it goes out ---

@pytest.mark.parametrize("command", [Command.BIND, Command.UDP_ASSOCIATE])
def test_commands_that_are_not_chosen_are_not_supported(command: Command, start: Start, echo: Place) -> None:
    service = start("--commands", "connect")
    assert service.client().ask(command, ("0.0.0.0", 0)).code is ReplyCode.COMMAND_NOT_SUPPORTED
    service.tunnel(echo)


@pytest.mark.parametrize(("option", "place"), [("-4", ("::1", 9)), ("-6", (LOCALHOST, 9))])
def test_the_other_family_is_not_supported(option: str, place: Place, start: Start) -> None:
    assert start(option).client().ask(Command.CONNECT, place).code is ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED


def test_the_chosen_family_is_served(start: Start, echo: Place) -> None:
    start("-4").client().connect(("localhost", echo[1]))


@needs_neighbour
@pytest.mark.parametrize("sources", [
    {LOCALHOST: "127.0.0.2"}, pytest.param({"::1": "::1", LOCALHOST: "127.0.0.2"}, marks=needs_ipv6),
], ids=["of one family", "of both"])
def test_it_goes_out_from_the_source_address(sources: Dict[str, str], start: Start, listen: Callable[..., socket.socket]) -> None:
    service = start(*[word for source in sources.values() for word in ("--source", source)])
    for host, source in sources.items():
        target = listen(host)
        service.client().connect(target.getsockname())
        connection, address = target.accept()
        connection.close()
        assert address[0] == source


@needs_ipv6
def test_a_target_that_the_source_cannot_reach_is_told_in_the_log(start: Start) -> None:
    service = start("--source", LOCALHOST)
    assert service.client().ask(Command.CONNECT, ("::1", 9)).code is ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED
    assert service.wait_for("failed (reply 08)").endswith("[::1]:9 is IPv6, and --source has only an IPv4 address")


@needs_ipv6
def test_every_source_has_to_be_of_this_computer(run_command: Run) -> None:
    error = run_command("--source", LOCALHOST, "--source", "2001:db8::7", "0").error(1)
    assert error.startswith("--source 2001:db8::7 is not an address of this computer")


def test_the_handshake_timeout_counts(start: Start) -> None:
    service = start("--handshake-timeout", "0.2")
    client = service.client()
    client.send(b"\x05")
    assert client.rest() == b""
    assert "bad protocol: the handshake took too long" in service.wait_for("#1")


def test_the_connect_timeout_counts(start: Start, silent: Callable[..., Place]) -> None:
    assert start("--connect-timeout", "0.2").client().ask(Command.CONNECT, silent()).code is ReplyCode.TTL_EXPIRED


def test_the_bind_timeout_counts(start: Start) -> None:
    client = start("--bind-timeout", "0.2").client()
    assert client.ask(Command.BIND, (LOCALHOST, 9)).code is ReplyCode.SUCCEEDED
    assert Reply.read(client).code is ReplyCode.TTL_EXPIRED


def test_the_idle_timeout_counts(start: Start, echo: Place) -> None:
    service = start("--idle-timeout", "0.2")
    assert service.tunnel(echo).rest() == b""
    assert service.wait_for("#1").endswith(" idle")


# --- how it ends ---

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_summary_and_exit_code_0(number: int, start: Start, echo: Place) -> None:
    service = start()
    service.tunnel(echo).close()
    service.wait_for("#1")
    assert service.stop(number) == 0
    last = service.stderr.splitlines()[-1]
    assert " stopped after " in last
    assert "(1 succeeded, 0 failed)" in last
    assert "5 B up, 5 B down" in last
    assert "Traceback" not in service.stderr


def test_it_stops_within_a_second_whatever_goes_on(start: Start, echo: Place, silent: Callable[..., Place]) -> None:
    service = start()
    tunnel = service.tunnel(echo)
    service.client()                                        # says nothing
    service.client().send(b"\x05\x01")                      # stops in mid-message
    service.client().ask(Command.BIND, (LOCALHOST, 9))      # waits to be called
    service.client().ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0))
    connecting = service.client()
    connecting.greet(Method.NO_AUTHENTICATION_REQUIRED)
    connecting.send(Request(Command.CONNECT, address_of(silent())))
    exchange(tunnel)
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < within(1)
    assert "Traceback" not in service.stderr
    assert service.stderr.splitlines()[-2].endswith(" server stopped")


def test_it_stops_before_it_has_had_a_client(start: Start) -> None:
    service = start()
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < within(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_work_although_a_shell_script_ignores_ctrl_c_for_what_it_starts_with_and(number: int, start: Start) -> None:
    # Without job control sh gives its background commands a SIGINT that is ignored.  It tells their
    # number on stdout, and their exit code in its own.
    service = start(command=by_shell('"$@" & echo $!; wait $!'))
    os.kill(int(service.stdout), number)
    assert service.process.wait(TIMEOUT) == 0
    assert " stopped after " in service.stderr


@pytest.mark.parametrize(("number", "seconds", "code"), [(signal.SIGINT, 2, 130), (signal.SIGTERM, 0.3, None)])
def test_a_second_ctrl_c_ends_it_at_once_unlike_a_second_sigterm(number: int, seconds: float, code: Any, start: Start) -> None:
    service = start("--workers", "1", command=(sys.executable, "-c", SLOW))     # of several: tests/workers
    service.process.send_signal(number)
    service.wait_until(lambda: service.stdout == "closing\n", "closing")
    service.process.send_signal(number)
    assert service.ended_within(seconds) is (code is not None)
    assert service.process.returncode == code


# --- why it cannot start ---

@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as sock:
        sock.bind((LOCALHOST, 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_port_in_use_is_told_with_two_ways_out(taken: int, run_command: Run) -> None:
    error = run_command(str(taken)).error(1)
    assert error.startswith(f"port {taken} on 127.0.0.1 is already in use\n")
    assert "socks5srv 0" in error
    assert f":{taken}" in error.splitlines()[-1]


@needs_ipv6
def test_a_second_address_that_is_in_use_is_told_as_well(taken: int, run_command: Run) -> None:
    error = run_command("-b", "::1", "-b", LOCALHOST, str(taken)).error(1)
    assert error.startswith(f"port {taken} on 127.0.0.1 is already in use")


@pytest.mark.skipif(can_listen_on_low_ports(), reason="not on this platform: any port will do here")
def test_a_port_for_root_is_told(run_command: Run) -> None:
    assert "may not listen on port 999 (ports below 1024 need root)" in run_command("999").error(1)


@pytest.mark.parametrize(("number", "words"), [
    (errno.EADDRINUSE, ("port 80 on 127.0.0.1 is already in use", "socks5srv 0", "lsof -i :80")),
    (errno.EACCES, ("may not listen on port 80", "ports below 1024 need root", "socks5srv 1080")),
    (errno.EPERM, ("may not listen on port 80", "socks5srv 1080")),
    (errno.EADDRNOTAVAIL, ("127.0.0.1 is not an address of this computer", "socks5srv -b ::1")),
    (errno.ENOBUFS, ("cannot listen on 127.0.0.1 port 80", os.strerror(errno.ENOBUFS), "-b and -p")),
])
def test_whatever_the_system_says_is_explained(number: int, words: Tuple[str, ...]) -> None:
    message = "\n".join(cannot_listen(OSError(number, os.strerror(number)), LOCALHOST, 80))
    for word in words:
        assert word in message


def test_on_windows_another_program_finds_who_has_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    message = cannot_listen(OSError(errno.EADDRINUSE, "in use"), LOCALHOST, 80)
    assert "netstat -ano | findstr :80" in message[-1]


def test_a_link_local_address_without_its_zone_is_told_to_have_one() -> None:
    message = cannot_listen(OSError(errno.EINVAL, "Invalid argument"), "fe80::1", 1080)
    assert message == ("fe80::1 is link-local: on which link has to be said, too", "as in  socks5srv -b fe80::1%eth0")


# --- link-local addresses ---

def test_it_serves_a_link(link_local: LinkLocal, start: Start, echo: Place) -> None:
    """And its page, and says where both are so that it can be pasted."""
    place = f"[{link_local.host}%25{link_local.interface}]"
    service = start("-b", link_local.named, "--allow-open-proxy", "--status", f"[{link_local.named}]:0", "--status-open", "-v")
    assert f" socks5h://{place}:{service.port} " in service.wait_for("listening")
    page = service.wait_for("listening").split("status=")[1]
    assert page.startswith(f"http://{place}:")
    with socket.create_connection((link_local.named, int(page[:-1].rpartition(":")[2])), TIMEOUT) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    service.tunnel(echo, host=link_local.named).close()
    assert f" [{link_local.host}]:" in service.wait_for(" ok,")
    assert service.stop() == 0


def test_it_goes_on_through_an_upstream_on_the_link(link_local: LinkLocal, start: Start, echo: Place) -> None:
    far = start("-b", link_local.named, "--allow-open-proxy")
    url = f"socks5h://[{link_local.host}%25{link_local.interface}]:{far.port}"
    near = start("--upstream", url)
    assert near.wait_for("going out through").endswith(url)
    near.tunnel(echo)


def test_it_is_not_its_own_upstream_on_the_link(link_local: LinkLocal, run_command: Run, closed_port: Any) -> None:
    port = closed_port()[1]
    url = f"socks5h://[{link_local.host}%25{link_local.interface}]:{port}"
    outcome = run_command("-b", link_local.named, "-p", str(port), "--allow-open-proxy", "--upstream", url)
    assert "is this server itself" in outcome.error()


MISTAKES: Dict[str, Tuple[Any, ...]] = {     # the command line, the exit code, and how the complaint begins
    "no such address": (("-b", "no-such-host.invalid"), 1), "an empty address": (("-b", ""), 1),
    "an address with a port": (("-b", "127.0.0.1:1080"), 1), "a name that is no name": (("-b", "a..b"), 1),
    "an address elsewhere": (("-u", "anna:sesame", f"{ELSEWHERE}:0"), 1, f"{ELSEWHERE} is not an address of this computer\n"),
    "a link-local address of another computer": (("-b", "fe80::dead%lo", "-u", "anna:sesame", "0"), 1),
    "no such zone": (("-b", "fe80::1%no-such", "-u", "anna:sesame", "0"), 1),
    "a zone in a rule": (("--deny", "fe80::1%lo"), 2), "a zone in a source": (("--source", "fe80::1%lo"), 2),
    "a source elsewhere": (("--source", ELSEWHERE, "0"), 1, f"--source {ELSEWHERE} is not an address of this computer"),
    "no folder for the port file": (("--port-file", "/no/such/folder/port", "0"), 1),
    "a folder for a port file": (("--port-file", os.getcwd(), "0"), 1),
    "no folder for the log file": (("--log-file", "/no/such/folder/log", "0"), 1),
    "a folder for a log file": (("--log-file", os.getcwd(), "0"), 1),
    "no such option": (("--frobnicate",), 2), "no such file": (("@no-such-file",), 2), "no port": (("localhost",), 2),
    "a very long port": (("9" * 5000,), 2), "open to all": (("-b", "0.0.0.0"), 2),
}


@pytest.mark.parametrize("words_and_outcome", MISTAKES.values(), ids=MISTAKES.keys())
def test_no_mistake_shows_a_traceback(words_and_outcome: Tuple[Any, ...], run_command: Run) -> None:
    words, code, *beginning = words_and_outcome
    error = run_command(*words).error(code)      # and there is no greeting before it, for which scripts wait
    assert error.startswith("".join(beginning))
