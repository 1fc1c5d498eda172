"""
``python -m socks5srv`` from its start to its exit code, as a process of its own.

What the options mean once it serves, how it ends, and that no mistake of the user's shows a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from typing import Any, Callable, Iterator, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, Client, address_of, exchange, needs_ipv6, needs_neighbour, within
from tests.networks import LinkLocal

from socks5srv.protocol import Command, CredentialsReply, Method, Reply, ReplyCode, Request
from socks5srv.cli import startup
from socks5srv.cli.options import parse
from socks5srv.service.build import cannot_listen

Place = Tuple[Any, ...]

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
    except PermissionError:
        return False
    except OSError:
        pass
    return True


# --- it serves ---

def test_it_serves_connect_on_the_port_found(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start()
    client = new_client(service)
    client.connect(echo)
    exchange(client)


def test_stdout_stays_empty_for_scripts(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-vv")
    new_client(service).connect(echo)
    service.stop()
    assert service.stdout == ""
    assert service.stderr != ""


def test_it_serves_without_a_stderr_too(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start(command=("sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-m", "socks5srv"))
    new_client(service).connect(echo)


@needs_ipv6
def test_an_address_in_brackets_is_served(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start(port="[::1]:0")
    new_client(("::1", service.port)).connect(echo)
    with pytest.raises(ConnectionRefusedError):
        Client((LOCALHOST, service.port))


@needs_ipv6
def test_several_addresses_are_served_on_the_same_port(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-b", LOCALHOST, "-b", "::1")
    new_client((LOCALHOST, service.port)).connect(echo)
    new_client(("::1", service.port)).connect(echo)
    assert f"socks5h://127.0.0.1:{service.port} socks5h://[::1]:{service.port}" in service.wait_for("listening")


def test_an_address_given_twice_is_served_once(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-b", LOCALHOST, "-b", LOCALHOST)
    new_client(service).connect(echo)
    assert service.wait_for("listening").count("socks5h://") == 1


def test_a_name_can_be_listened_on(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-b", "localhost")
    new_client(("localhost", service.port)).connect(echo)


def test_a_file_and_the_environment_can_have_all_options(start: Callable[..., Any], tmp_path: Path, new_client: Callable[..., Client]) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text("--user anna:sesame     # the only one\n")
    service = start(f"@{file}", SOCKS5SRV_OPTIONS="--commands bind,udp")
    assert "auth=password commands=bind,udp" in service.wait_for("listening")
    assert new_client(service).greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS


def test_the_script_is_the_same_program() -> None:
    setup = ConfigParser()
    setup.read(Path(__file__).resolve().parent.parent.parent / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "socks5srv = socks5srv.cli.main:main"


# --- the port file ---

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: pipes with a name")


def test_the_port_file_goes_at_the_end(start: Callable[..., Any]) -> None:
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
    with startup.port_file(str(path), 1080):
        assert seen == [("1080\n", "of an earlier run\n")]
        assert path.read_text() == "1080\n"
        assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o644
    assert not path.exists()


def test_a_port_file_that_somebody_else_has_removed_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "port"
    with startup.port_file(str(path), 1080):
        path.unlink()


def test_without_a_port_file_nothing_is_written() -> None:
    with startup.port_file(None, 1080):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout here")
def test_the_port_can_be_written_to_a_pipe() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "socks5srv", "-q", "0", "--port-file", "/dev/stdout"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            Client((LOCALHOST, int(process.stdout.readline()))).close()
        finally:
            process.terminate()
        assert process.wait(TIMEOUT) == 0
    assert os.path.exists("/dev/stdout")


@needs_pipes
@pytest.mark.parametrize("words", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_a_pipe_that_no_process_reads_is_no_port_file_and_is_not_waited_for(
        words: Tuple[str, ...], tmp_path: Path, run_command: Callable[..., Any]) -> None:
    path = tmp_path / "port"
    os.mkfifo(str(path))
    outcome = run_command("-q", *words, "--port-file", str(path), "0")
    assert outcome.code == 1
    assert f"cannot write the port file {path}: it is a pipe that no process reads\n" in outcome.stderr
    assert path.exists()


@needs_pipes
def test_a_pipe_that_no_process_reads_is_no_log_file_and_is_not_waited_for(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    path = tmp_path / "log"
    os.mkfifo(str(path))
    outcome = run_command("--log-file", str(path), "0")
    assert outcome.code == 1
    assert f"cannot write the log file {path}: it is a pipe that no process reads\n" in outcome.stderr


@needs_pipes
def test_a_pipe_in_place_of_the_log_file_stops_nothing(
        tmp_path: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    path = tmp_path / "log"
    service = start("--log-file", str(path))
    path.unlink()
    os.mkfifo(str(path))
    for _ in range(2):
        client = new_client(service)
        client.connect(echo)
        client.close()
    service.wait_for("cannot be opened afresh")
    assert service.stop(signal.SIGTERM) == 0


# --- who may use it ---

@pytest.fixture
def with_login(start: Callable[..., Any]) -> Any:
    return start("-u", "anna:sesame", "-u", "ben", SOCKS5SRV_PASSWORD="4711")


@pytest.mark.parametrize(("name", "password", "status"), [
    ("anna", "sesame", CredentialsReply.SUCCESS),
    ("ben", "4711", CredentialsReply.SUCCESS),
    ("anna", "4711", CredentialsReply.FAILURE),
    ("carl", "sesame", CredentialsReply.FAILURE),
    ("anna", "", CredentialsReply.FAILURE),
])
def test_with_users_a_login_is_needed(name: str, password: str, status: int, with_login: Any, new_client: Callable[..., Client]) -> None:
    client = new_client(with_login)
    assert client.greet(Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
    assert client.login(name, password).status == status


def test_with_users_nobody_comes_in_without_a_login(with_login: Any, new_client: Callable[..., Client]) -> None:
    client = new_client(with_login)
    assert client.greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.20", "2001:db8::20", "169.254.1.1"])
def test_it_refuses_to_be_an_open_proxy_and_says_how_to_go_on(address: str, run_command: Callable[..., Any]) -> None:
    outcome = run_command("-b", address)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("socks5srv: error: refusing to be an open proxy\n")
    assert f"socks5srv -b {address} -u NAME" in outcome.stderr
    assert "port 1080" in outcome.stderr


def test_one_address_beyond_loopback_is_enough_to_refuse(run_command: Callable[..., Any]) -> None:
    outcome = run_command("-b", "127.0.0.1", "-b", "192.168.1.20", "-b", "::1")
    assert outcome.code == 2
    assert "socks5srv -b 192.168.1.20 -u NAME" in outcome.stderr


def test_with_a_login_it_serves_all_addresses(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start("-u", "anna:sesame", port="0.0.0.0:0")
    assert new_client(service).greet(Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD


@needs_ipv6
def test_with_a_login_it_serves_both_families_on_the_ipv6_wildcard(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start("-u", "anna:sesame", port="[::]:0")
    for host in (LOCALHOST, "::1"):
        assert new_client((host, service.port)).greet(Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_needs_no_login(address: str) -> None:
    startup.refuse_to_be_open(parse(["-b", address]), [address])


# --- what it does, and how it goes out ---

@pytest.mark.parametrize("command", [Command.BIND, Command.UDP_ASSOCIATE])
def test_commands_that_are_not_chosen_are_not_supported(
    command: Command, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--commands", "connect")
    assert new_client(service).ask(command, ("0.0.0.0", 0)).code is ReplyCode.COMMAND_NOT_SUPPORTED
    new_client(service).connect(echo)


@pytest.mark.parametrize(("option", "place"), [("-4", ("::1", 9)), ("-6", (LOCALHOST, 9))])
def test_the_other_family_is_not_supported(option: str, place: Place, start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    assert new_client(start(option)).ask(Command.CONNECT, place).code is ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED


def test_the_chosen_family_is_served(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    new_client(start("-4")).connect(("localhost", echo[1]))


def test_a_source_that_is_not_of_this_computer_is_told_at_the_start(run_command: Callable[..., Any]) -> None:
    outcome = run_command("--source", ELSEWHERE, "0")
    assert outcome.code == 1
    assert f"--source {ELSEWHERE} is not an address of this computer" in outcome.stderr


@needs_neighbour
def test_it_goes_out_from_the_source_address(
    start: Callable[..., Any], new_client: Callable[..., Client], listen: Callable[..., socket.socket],
) -> None:
    target = listen()
    new_client(start("--source", "127.0.0.2")).connect(target.getsockname())
    connection, address = target.accept()
    connection.close()
    assert address[0] == "127.0.0.2"


@needs_ipv6
def test_a_target_that_the_source_cannot_reach_is_told_in_the_log(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start("--source", LOCALHOST)
    assert new_client(service).ask(Command.CONNECT, ("::1", 9)).code is ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED
    assert service.wait_for("failed(08)").endswith("[::1]:9 is IPv6, and --source has only an IPv4 address")


@needs_ipv6
@needs_neighbour
def test_every_source_has_to_be_of_this_computer(start: Callable[..., Any], run_command: Callable[..., Any], new_client: Any, listen: Any) -> None:
    outcome = run_command("--source", LOCALHOST, "--source", "2001:db8::7", "0")
    assert "--source 2001:db8::7 is not an address of this computer" in outcome.stderr
    service = start("--source", "::1", "--source", "127.0.0.2")
    for host, source in ((LOCALHOST, "127.0.0.2"), ("::1", "::1")):
        target = listen(host)
        new_client(service).connect(target.getsockname())
        connection, address = target.accept()
        connection.close()
        assert address[0] == source


def test_the_handshake_timeout_counts(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start("--handshake-timeout", "0.2")
    client = new_client(service)
    client.send(b"\x05")
    assert client.rest() == b""
    assert "bad-protocol the handshake took too long" in service.wait_for("#1")


def test_the_connect_timeout_counts(start: Callable[..., Any], new_client: Callable[..., Client], silent: Callable[..., Place]) -> None:
    service = start("--connect-timeout", "0.2")
    assert new_client(service).ask(Command.CONNECT, silent()).code is ReplyCode.TTL_EXPIRED


def test_the_bind_timeout_counts(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    client = new_client(start("--bind-timeout", "0.2"))
    assert client.ask(Command.BIND, (LOCALHOST, 9)).code is ReplyCode.SUCCEEDED
    assert Reply.read(client).code is ReplyCode.TTL_EXPIRED


def test_the_idle_timeout_counts(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("--idle-timeout", "0.2")
    client = new_client(service)
    client.connect(echo)
    exchange(client)
    assert client.rest() == b""
    assert service.wait_for("#1").endswith(" idle")


# --- how it ends ---

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_summary_and_exit_code_0(
    number: int, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start()
    with new_client(service) as client:
        client.connect(echo)
        exchange(client)
    service.wait_for("#1")
    assert service.stop(number) == 0
    last = service.stderr.splitlines()[-1]
    assert " stopped after " in last
    assert "(1 ok, 0 not)" in last
    assert "5 up, 5 down" in last
    assert "Traceback" not in service.stderr


def test_it_stops_within_a_second_whatever_goes_on(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place, silent: Callable[..., Place],
) -> None:
    service = start()
    tunnel = new_client(service)
    tunnel.connect(echo)
    new_client(service)                                                 # says nothing
    new_client(service).send(b"\x05\x01")                               # stops in mid-message
    new_client(service).ask(Command.BIND, (LOCALHOST, 9))               # waits to be called
    new_client(service).ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0))
    connecting = new_client(service)
    connecting.greet(Method.NO_AUTHENTICATION_REQUIRED)
    connecting.send(Request(Command.CONNECT, address_of(silent())))
    exchange(tunnel)
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < within(1)
    assert "Traceback" not in service.stderr
    assert service.stderr.splitlines()[-2].endswith(" server stopped")


def test_it_stops_before_it_has_had_a_client(start: Callable[..., Any]) -> None:
    service = start()
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < within(1)


def test_ctrl_c_works_although_a_shell_script_ignores_it_for_what_it_starts_with_and(start: Callable[..., Any]) -> None:
    # Without job control sh gives its background commands a SIGINT that is ignored.  It tells their
    # number on stdout, and their exit code in its own.
    script = '"$@" & echo $!; wait $!'
    service = start(command=("sh", "-c", script, "sh", sys.executable, "-m", "socks5srv"))
    os.kill(int(service.stdout), signal.SIGINT)
    assert service.process.wait(TIMEOUT) == 0
    assert " stopped after " in service.stderr


def test_sigterm_works_in_the_background_too(start: Callable[..., Any]) -> None:
    service = start(command=("sh", "-c", '"$@" & echo $!; wait $!', "sh", sys.executable, "-m", "socks5srv"))
    os.kill(int(service.stdout), signal.SIGTERM)
    assert service.process.wait(TIMEOUT) == 0


def test_the_second_ctrl_c_ends_it_at_once_with_exit_code_130(start: Callable[..., Any]) -> None:
    service = start("--workers", "1", command=(sys.executable, "-c", SLOW))     # of several: tests/workers
    service.process.send_signal(signal.SIGINT)
    service.wait_until(lambda: service.stdout == "closing\n", "closing")
    service.process.send_signal(signal.SIGINT)
    assert service.ended_within(2)
    assert service.process.returncode == 130


def test_a_second_sigterm_is_patient(start: Callable[..., Any]) -> None:
    service = start("--workers", "1", command=(sys.executable, "-c", SLOW))     # of several: tests/workers
    service.process.send_signal(signal.SIGTERM)
    service.wait_until(lambda: service.stdout == "closing\n", "closing")
    service.process.send_signal(signal.SIGTERM)
    assert not service.ended_within(0.3)


# --- why it cannot start ---

@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as sock:
        sock.bind((LOCALHOST, 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_port_in_use_is_told_with_two_ways_out(taken: int, run_command: Callable[..., Any]) -> None:
    outcome = run_command(str(taken))
    assert outcome.code == 1
    assert outcome.stderr.startswith(f"socks5srv: error: port {taken} on 127.0.0.1 is already in use\n")
    assert "socks5srv 0" in outcome.stderr
    assert f":{taken}" in outcome.stderr.splitlines()[-1]


@needs_ipv6
def test_a_second_address_that_is_in_use_is_told_as_well(taken: int, run_command: Callable[..., Any]) -> None:
    outcome = run_command("-b", "::1", "-b", LOCALHOST, str(taken))
    assert outcome.code == 1
    assert f"port {taken} on 127.0.0.1 is already in use" in outcome.stderr


def test_an_address_of_another_computer_is_told(run_command: Callable[..., Any]) -> None:
    outcome = run_command("-u", "anna:sesame", f"{ELSEWHERE}:0")
    assert outcome.code == 1
    assert outcome.stderr.startswith(f"socks5srv: error: {ELSEWHERE} is not an address of this computer\n")


@pytest.mark.skipif(can_listen_on_low_ports(), reason="not on this platform: any port will do here")
def test_a_port_for_root_is_told(run_command: Callable[..., Any]) -> None:
    outcome = run_command("999")
    assert outcome.code == 1
    assert "may not listen on port 999 (ports below 1024 need root)" in outcome.stderr


@pytest.mark.parametrize(("number", "words"), [
    (errno.EADDRINUSE, ("port 80 on 127.0.0.1 is already in use", "socks5srv 0", "lsof -i :80")),
    (errno.EACCES, ("may not listen on port 80", "ports below 1024 need root", "socks5srv 1080")),
    (errno.EPERM, ("may not listen on port 80", "socks5srv 1080")),
    (errno.EADDRNOTAVAIL, ("127.0.0.1 is not an address of this computer", "socks5srv -b 127.0.0.1")),
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

def test_it_serves_a_link(link_local: LinkLocal, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    """And its page, and says where both are so that it can be pasted."""
    place = f"[{link_local.host}%25{link_local.interface}]"
    service = start("-b", link_local.named, "--allow-open-proxy", "--status", f"[{link_local.named}]:0", "--status-open", "-v")
    assert f" socks5h://{place}:{service.port} " in service.wait_for("listening")
    page = service.wait_for("listening").split("status=")[1]
    assert page.startswith(f"http://{place}:")
    with socket.create_connection((link_local.named, int(page[:-1].rpartition(":")[2])), TIMEOUT) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    client = new_client((link_local.named, service.port))
    client.connect(echo)
    exchange(client)
    client.close()
    assert f" [{link_local.host}]:" in service.wait_for(" ok ")
    assert service.stop() == 0


def test_it_goes_on_through_an_upstream_on_the_link(
    link_local: LinkLocal, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    far = start("-b", link_local.named, "--allow-open-proxy")
    url = f"socks5h://[{link_local.host}%25{link_local.interface}]:{far.port}"
    near = start("--upstream", url)
    assert near.wait_for("going out through").endswith(url)
    client = new_client(near)
    client.connect(echo)
    exchange(client)


def test_it_is_not_its_own_upstream_on_the_link(link_local: LinkLocal, run_command: Callable[..., Any], closed_port: Any) -> None:
    port = closed_port()[1]
    outcome = run_command(
        "-b", link_local.named, "-p", str(port), "--allow-open-proxy", "--upstream", f"socks5h://[{link_local.host}%25{link_local.interface}]:{port}",
    )
    assert outcome.code == 2
    assert "is this server itself" in outcome.stderr


MISTAKES = {
    "no such address": (("-b", "no-such-host.invalid"), 1),
    "an empty address": (("-b", ""), 1),
    "an address with a port": (("-b", "127.0.0.1:1080"), 1),
    "a name that is no name": (("-b", "a..b"), 1),
    "a link-local address of another computer": (("-b", "fe80::dead%lo", "-u", "anna:sesame", "0"), 1),
    "no such zone": (("-b", "fe80::1%no-such", "-u", "anna:sesame", "0"), 1),
    "a zone in a rule": (("--deny", "fe80::1%lo"), 2),
    "a zone in a source": (("--source", "fe80::1%lo"), 2),
    "a source elsewhere": (("--source", ELSEWHERE, "0"), 1),
    "no folder for the port file": (("--port-file", "/no/such/folder/port", "0"), 1),
    "a folder for a port file": (("--port-file", os.getcwd(), "0"), 1),
    "no folder for the log file": (("--log-file", "/no/such/folder/log", "0"), 1),
    "a folder for a log file": (("--log-file", os.getcwd(), "0"), 1),
    "no such option": (("--frobnicate",), 2),
    "no such file": (("@no-such-file",), 2),
    "no port": (("localhost",), 2),
    "a very long port": (("9" * 5000,), 2),
    "open to all": (("-b", "0.0.0.0"), 2),
}


@pytest.mark.parametrize(("words", "code"), MISTAKES.values(), ids=MISTAKES.keys())
def test_no_mistake_shows_a_traceback(words: Tuple[str, ...], code: int, run_command: Callable[..., Any]) -> None:
    outcome = run_command(*words)
    assert (outcome.code, outcome.stdout) == (code, "")
    greeting, error, text = outcome.stderr.partition("socks5srv: error: ")
    assert not greeting or "--port-file" in words, "that is written when all else is right"
    assert error
    assert "\n  " in text, "there is no way out"
    assert "Traceback" not in outcome.stderr
