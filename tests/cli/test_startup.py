"""What the command line promises about safety: who comes in, what they reach, and what a bad day does to it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, List, Tuple

import pytest
from tests.conftest import (
    LOCALHOST, TIMEOUT, Client, Place, cheap_hash, eventually, exchange, in_thread, name, needs_ipv6, needs_neighbour, within,
)
from tests.program import AtTerminal, Run, Service, Start, by_shell, needs_full_disk, needs_hangup, needs_posix, processes_too

from socks5srv import outbound
from socks5srv.cli import startup
from socks5srv.protocol import Command, Credentials, Method, ReplyCode

NEIGHBOUR = "127.0.0.2"


def write_users(path: Path, *lines: str, mode: int = 0o600, **users: str) -> Path:
    """Put the file in place as a whole, as a careful editor does: these lines, and others for users with these passwords."""
    new = path.with_name(path.name + ".new")
    all_lines = [*lines, *(f"{user}:{cheap_hash(password)}" for user, password in users.items())]
    new.write_text("".join(f"{line}\n" for line in all_lines), encoding="utf-8")
    new.chmod(mode)
    os.replace(str(new), str(path))
    return path


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    return write_users(tmp_path / "users", "# the family", "", anna="sesame", ben="4711")


@pytest.fixture
def service(users_file: Path, start: Start) -> Service:
    """With those users."""
    return start("--users-file", str(users_file))


def asks_for_a_login(service: Service) -> bool:
    return service.client().greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS


def first_answer(client: Client) -> bytes:
    """What comes back to a greeting without a login; nothing if the server has hung up."""
    try:
        client.send(b"\x05\x01\x00")
        return client.read(2)
    except ConnectionError:
        return b""


def http(client: Client, path: str) -> Tuple[str, str]:
    """The head and the body of the answer to a GET."""
    client.send(f"GET {path} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode())
    head, _, body = client.rest().decode().partition("\r\n\r\n")
    return head, body


def assert_unharmed(service: Service) -> None:
    assert service.process.poll() is None
    assert "Traceback" not in service.stderr
    assert " a bug" not in service.stderr


# --- the refusal to be an open proxy ---

@pytest.fixture
def ways_out(run_command: Run) -> List[List[str]]:
    """The options of the command lines that the refusal prints."""
    error = run_command("-b", "0.0.0.0").error()
    return [found.split() for found in re.findall(r"^ +socks5srv((?: \S+)*)  ", error, re.MULTILINE)]


def test_the_refusal_names_four_ways_out(ways_out: List[List[str]]) -> None:
    assert ways_out == [
        ["-b", "0.0.0.0", "-u", "NAME"], ["-b", "0.0.0.0", "--allow-from", startup.network_of("0.0.0.0")], ["-b", "0.0.0.0", "--allow-open-proxy"], [],
    ]


@pytest.mark.parametrize("address", ["10.0.0.5", "192.168.100.200", "2001:db8::20"])
def test_the_ways_out_stand_in_one_column(address: str, run_command: Run) -> None:
    lines = [line for line in run_command("-b", address).error().split("\n") if line.startswith("    socks5srv")]
    assert len({line.rindex("  ") for line in lines}) == 1
    assert len(lines) == 4


def test_behind_a_balancer_loopback_is_refused_as_well(run_command: Run) -> None:
    message = run_command("--proxy-protocol", "10.0.0.2").error()
    assert "Whoever can reach the load balancer could use your connection" in message
    assert "  socks5srv -b 127.0.0.1 --proxy-protocol 10.0.0.2/32 -u NAME  " in message


@pytest.mark.parametrize(("address", "way_out", "network"), [
    ("10.0.0.5", "", "10.0.0.0/24"), ("2001:db8:1:2:3::4", "", "2001:db8:1:2::/64"), ("fe80::1%1", "", "fe80::/64"),
    ("0.0.0.0", "192.168.7.20", "192.168.7.0/24"), ("::", "10.1.2.3", "10.1.2.0/24"), ("0.0.0.0", "127.0.0.1", "192.168.1.0/24"),
])
def test_the_network_of_the_way_out_is_that_of_the_address(
    address: str, way_out: str, network: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound, "local_address_towards", lambda *_: way_out)
    assert startup.network_of(address) == network


def test_the_first_way_out_asks_everybody_for_a_login(ways_out: List[List[str]], start: Start, echo: Place) -> None:
    service = start(*ways_out[0], SOCKS5SRV_PASSWORD="sesame")
    assert asks_for_a_login(service)
    assert not service.admits("NAME", "4711")
    service.tunnel(echo, "NAME", "sesame")


def test_the_second_way_out_serves_nobody_else(ways_out: List[List[str]], start: Start) -> None:
    service = start(*ways_out[1])
    assert first_answer(service.client()) == b""
    assert "127.0.0.1 rejected: not in --allow-from" in service.wait_for("rejected")


@needs_neighbour
def test_with_a_network_and_no_users_only_that_network_is_served(start: Start, echo: Place) -> None:
    service = start("-b", "0.0.0.0", "--allow-from", f"{NEIGHBOUR}/32")
    assert first_answer(service.client()) == b""
    service.tunnel(echo, source=NEIGHBOUR)


@needs_ipv6
def test_a_network_is_known_again_behind_the_ipv6_wildcard(start: Start, echo: Place) -> None:
    service = start("-b", "::", "--allow-from", f"{LOCALHOST}/32")
    service.tunnel(echo)
    assert first_answer(service.client("::1")) == b""


@pytest.mark.parametrize("way", [2, 3])
def test_the_other_ways_out_ask_nobody(way: int, ways_out: List[List[str]], start: Start, echo: Place) -> None:
    service = start(*ways_out[way])
    service.tunnel(echo)
    assert f"socks5h://{['', '', '0.0.0.0', LOCALHOST][way]}:" in service.wait_for("listening")


# --- logins without a password in sight ---

@needs_neighbour
def test_a_trusted_network_needs_no_login_while_the_others_do(users_file: Path, start: Start, echo: Place) -> None:
    service = start("--users-file", str(users_file), "--allow-from", f"{NEIGHBOUR}/32")
    service.tunnel(echo, source=NEIGHBOUR)
    assert asks_for_a_login(service)
    service.tunnel(echo, "anna", "sesame")


def test_the_logins_of_a_file_are_good_and_no_others(service: Service, echo: Place) -> None:
    assert asks_for_a_login(service)
    for user, password in (("anna", "4711"), ("carl", "sesame"), ("# the family", "sesame")):
        assert not service.admits(user, password)
    for _ in range(2):          # computed, and remembered
        service.tunnel(echo, "anna", "sesame")
    assert not service.admits("anna", "4711")
    assert "sesame" not in service.stderr.replace("carl sesame", "")


BAD_LINES = {
    "anna": "expected NAME:HASH, with a HASH from socks5srv hash-password",
    ":" + cheap_hash("sesame"): "expected NAME:HASH, with a HASH from socks5srv hash-password",
    "anna:sesame": "expected a HASH from socks5srv hash-password",
    "anna:md5$1$c2FsdA==$c2FsdA==": "expected a HASH from socks5srv hash-password",
    "anna:scrypt$16384$8$1$$": "takes too little or too much to compute",
    "anna:scrypt$16384$8$1$!$c2FsdA==": "this HASH is damaged; make another with socks5srv hash-password",
    "anna:pbkdf2_sha256$1$c2FsdA==$AAAAAAAAAAAAAAAAAAAAAA==": "takes too little or too much to compute",
    "ben:" + cheap_hash("sesame"): "user 'ben' is listed twice",
}


@pytest.mark.parametrize(("line", "says"), BAD_LINES.items(), ids=[str(number) for number, _ in enumerate(BAD_LINES)])
def test_a_bad_line_is_told_with_its_number_and_what_was_expected(line: str, says: str, tmp_path: Path, run_command: Run) -> None:
    path = write_users(tmp_path / "users", "# comment", f"ben:{cheap_hash('4711')}", line)
    first = run_command("--users-file", str(path), "0").error().splitlines()[0]
    assert first.startswith(f"{path}:3: ")
    assert says in first


@pytest.mark.parametrize(("octets", "mode", "says"), [
    pytest.param(b"# nobody yet\n", 0o644, " {0} is readable by everyone: chmod o-rw {0}\n", id="readable", marks=needs_posix),
    pytest.param(None, 0o600, " {}: No such file", id="missing"),
    pytest.param(b"anna:\xff\n", 0o600, " {}: not UTF-8\n", id="no text"),
])
def test_a_bad_file_is_told_with_the_remedy(octets: Any, mode: int, says: str, tmp_path: Path, run_command: Run) -> None:
    path = tmp_path / "users"
    if octets is not None:
        path.write_bytes(octets)
        path.chmod(mode)
    assert run_command("--users-file", str(path), "0").error().startswith(f"users file{says}".format(path))


def test_users_come_from_one_place(users_file: Path, run_command: Run) -> None:
    error = run_command("--users-file", str(users_file), "-u", "carl:pass", "0").error()
    assert error.startswith("-u and --users-file exclude each other: put all users into the file")


@needs_neighbour
@processes_too
def test_it_stops_at_once_although_hundreds_wait_for_their_hashes(words: Tuple[str, ...], tmp_path: Path, start: Start) -> None:
    path = write_users(tmp_path / "users", f"anna:{cheap_hash('sesame', 400_000)}")
    service = start("--users-file", str(path), *words)
    for number in range(300):
        client = service.client(source=f"127.0.{number // 5}.2")
        client.send(b"\x05\x01\x02" + bytes(Credentials(b"anna", b"wrong")))
        assert client.exactly(2) == b"\x05\x02"
    began = time.monotonic()
    assert service.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < within(0.5)


# --- the users change while it serves ---

def test_a_user_who_is_removed_is_cut_off_and_a_new_one_comes_in(users_file: Path, start: Start, echo: Place) -> None:
    ben = f"ben:{cheap_hash('4711')}"
    write_users(users_file, ben, anna="sesame")
    service = start("--users-file", str(users_file))
    anna = service.tunnel(echo, "anna", "sesame")
    stays = service.tunnel(echo, "ben", "4711")
    write_users(users_file, ben, carl="open")
    assert anna.rest() == b""
    assert " user anna CONNECT " in service.wait_for("the user has been removed")
    exchange(stays)
    service.tunnel(echo, "carl", "open")
    assert not service.admits("anna", "sesame")
    assert "2 users read from" in service.wait_for("users read")


def test_a_changed_password_ends_the_tunnels_of_the_old_one(users_file: Path, service: Service, echo: Place) -> None:
    old = service.tunnel(echo, "anna", "sesame")
    write_users(users_file, anna="open")
    assert old.rest() == b""
    assert not service.admits("anna", "sesame")
    service.tunnel(echo, "anna", "open")


def test_a_new_file_with_a_mistake_changes_nothing_and_is_told(users_file: Path, service: Service, echo: Place) -> None:
    anna = service.tunnel(echo, "anna", "sesame")
    write_users(users_file, f"carl:{cheap_hash('open')}", "anna")
    assert f"ERROR keeping the previous users: {users_file}:2: expected NAME:HASH" in service.wait_for("keeping the previous users")
    exchange(anna)
    service.tunnel(echo, "ben", "4711")
    assert not service.admits("carl", "open")
    write_users(users_file, carl="open")
    assert anna.rest() == b""
    service.tunnel(echo, "carl", "open")


def test_a_file_that_vanishes_changes_nothing_and_is_told_once(users_file: Path, service: Service, echo: Place) -> None:
    users_file.unlink()
    assert "No such file" in service.wait_for("keeping the previous users")
    service.tunnel(echo, "anna", "sesame")
    write_users(users_file, carl="open")
    service.wait_for("1 users read")
    service.tunnel(echo, "carl", "open")
    assert service.stderr.count("keeping the previous users") == 1


@needs_posix
def test_the_remedy_for_a_file_that_all_can_read_helps_while_it_serves(users_file: Path, service: Service, echo: Place) -> None:
    write_users(users_file, mode=0o644, carl="open")
    assert f"chmod o-rw {users_file}" in service.wait_for("keeping the previous users")
    users_file.chmod(0o600)
    service.wait_for("1 users read")
    service.tunnel(echo, "carl", "open")


@needs_hangup
def test_sighup_has_the_file_read_again_although_it_has_not_changed(users_file: Path, service: Service) -> None:
    service.process.send_signal(signal.SIGHUP)
    assert f"2 users read from {users_file}" in service.wait_for("users read")


@needs_hangup
def test_sighup_tells_of_a_file_that_is_still_missing(users_file: Path, service: Service) -> None:
    users_file.unlink()
    service.wait_for("keeping the previous users")
    service.process.send_signal(signal.SIGHUP)
    service.wait_until(lambda: service.stderr.count("keeping the previous users") == 2, "a word about the file")


@needs_hangup
def test_a_login_that_is_being_computed_when_its_user_is_removed_is_refused(users_file: Path, start: Start, echo: Place) -> None:
    write_users(users_file, f"anna:{cheap_hash('sesame', 3_000_000)}")      # a second or so
    service = start("--users-file", str(users_file))
    client = service.client()
    client.greet(Method.USERNAME_PASSWORD)
    client.send(b"\x01\x04anna\x06sesame")
    eventually(lambda: not queued(client))
    write_users(users_file, ben="4711")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("1 users read")
    octets = client.read(2)
    if octets == b"\x01\x00":       # let in, then at least it must not stay
        client.request(Command.CONNECT, echo)
        assert client.rest() == b""


def queued(client: Client) -> int:
    """How much of what we have sent the server's kernel has not acknowledged; 0 where that is not told."""
    try:
        import fcntl
        import struct
        import termios

        return int(struct.unpack("i", fcntl.ioctl(client.socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    except (ImportError, AttributeError, OSError):
        return 0


@needs_hangup
def test_a_storm_of_sighups_harms_nobody(users_file: Path, service: Service, echo: Place) -> None:
    before = service.tunnel(echo, "anna", "sesame")

    def come_and_go() -> None:
        for _ in range(25):
            service.tunnel(echo, "ben", "4711").close()

    results = [in_thread(come_and_go) for _ in range(4)]
    for _ in range(200):
        service.process.send_signal(signal.SIGHUP)
        exchange(before)
    for result in results:
        result()
    exchange(before)
    assert_unharmed(service)
    write_users(users_file, carl="open")
    service.wait_for("1 users read")
    assert before.rest() == b""
    service.tunnel(echo, "carl", "open")
    assert service.stop() == 0
    assert " ERROR " not in service.stderr


# --- --hash-password ---

def test_a_hash_that_is_printed_works_in_a_file(tmp_path: Path, at_terminal: AtTerminal, start: Start, echo: Place) -> None:
    code, text = at_terminal("--hash-password").talk("Password: ", "päss wörd\n", "Repeat it: ", "päss wörd\n")
    assert code == 0
    assert "wörd" not in text
    hash = text.split()[-1]
    assert re.fullmatch(r"(scrypt|pbkdf2_sha256)\$\S+", hash)
    service = start("--users-file", str(write_users(tmp_path / "users", f"anna:{hash}")))
    service.tunnel(echo, "anna", "päss wörd")
    assert not service.admits("anna", "pass word")


@pytest.mark.parametrize("words", [["--hash-password"], ["hash-password"]], ids=" ".join)
@pytest.mark.parametrize(("first", "second", "says"), [
    ("sesame\n", "sesame2\n", "the two passwords differ"), ("\n", "\n", "invalid password"),
    ("sesame\n", "\x04", "no password was given"), ("sesame\n", "\x03", "no password was given"),
])
def test_no_hash_is_printed_for_a_password_that_does_not_do(
    first: str, second: str, says: str, words: List[str], at_terminal: AtTerminal,
) -> None:
    code, text = at_terminal(*words).talk("Password: ", first, "Repeat it: ", second)
    assert code == 2
    assert f"{' '.join(['socks5srv', *words]) if words == ['hash-password'] else 'socks5srv'}: error: {says}" in text
    assert "$" not in text


def test_keys_that_are_no_utf8_are_no_traceback(at_terminal: AtTerminal) -> None:
    terminal = at_terminal("--hash-password", PYTHONIOENCODING="utf-8", PYTHONUTF8="1")
    terminal.wait_for("Password: ")
    os.write(terminal.screen, b"\xff\n")
    if "Repeat" in eventually(lambda: terminal.read(TIMEOUT) and terminal.text):
        os.write(terminal.screen, b"\xff\n")
    assert terminal.end()[0] == 2


# --- rules ---

def test_the_first_rule_that_matches_wins_in_the_order_of_the_command_line(start: Start, echo: Place) -> None:
    port = echo[1]
    allowing = start("--allow", f"{LOCALHOST}:{port}", "--deny", "127.0.0.0/8", "--allow", "*")
    allowing.tunnel(echo)
    assert allowing.client().ask(Command.CONNECT, (LOCALHOST, port ^ 1)).code is ReplyCode.NOT_ALLOWED
    denying = start("--deny", "127.0.0.0/8", "--allow", f"{LOCALHOST}:{port}")
    assert denying.client().ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
    assert "denied (reply 02): rule: deny 127.0.0.0/8" in denying.wait_for("#1")


def test_rules_of_a_file_stand_where_the_file_does(tmp_path: Path, start: Start, echo: Place) -> None:
    file = tmp_path / "rules"
    file.write_text(f"# all but one\n--allow 127.0.0.1:{echo[1]}\n--deny '*'  # and that is it\n")
    service = start(f"@{file}", "--allow", "*", "--log-format", "json")
    service.tunnel(echo)
    assert service.client().ask(Command.CONNECT, (LOCALHOST, 9)).code is ReplyCode.NOT_ALLOWED
    line = json.loads(service.wait_for('"denied"'))
    assert (line["event"], line["reply"], line["reason"]) == ("denied", 2, "rule: deny *")
    first = start("--deny", f":{echo[1]}", f"@{file}")
    assert first.client().ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
    assert service.process.poll() is None


@pytest.mark.parametrize("spelling", ["localhost", "LOCALHOST.", "127.0.0.1", "127.1", "0x7f000001", "2130706433"])
def test_a_denied_network_stays_denied_under_any_name(spelling: str, start: Start, echo: Place) -> None:
    service = start("-4", "--deny", "127.0.0.0/8")
    reply = service.client().ask(Command.CONNECT, name(spelling, echo[1]))
    assert reply.code in (ReplyCode.NOT_ALLOWED, ReplyCode.HOST_UNREACHABLE)
    assert " ok," not in service.wait_for("#1")


def test_rules_are_of_bind_too(start: Start) -> None:
    service = start("--deny", LOCALHOST)
    assert service.client().ask(Command.BIND, (LOCALHOST, 9)).code is ReplyCode.NOT_ALLOWED
    assert f"denied (reply 02): rule: deny {LOCALHOST}" in service.wait_for("#1")


# --- how many ---

def test_more_clients_than_allowed_are_turned_away_until_one_leaves(start: Start, echo: Place, processes: int) -> None:
    service = start("--max-clients", "2")
    clients = [service.tunnel(echo) for _ in range(2)]
    for _ in range(3):
        assert first_answer(service.client()) == b""
    assert "WARNING limit of 2 connections reached" in service.wait_for("WARNING")
    for client in clients:
        exchange(client)
    clients[0].close()
    eventually(lambda: first_answer(service.client()) == b"\x05\x00")
    assert service.stderr.count("WARNING") <= processes


@needs_neighbour
def test_one_address_cannot_take_all_the_room(start: Start, echo: Place) -> None:
    service = start("--max-per-client", "1")
    client = service.tunnel(echo)
    assert first_answer(service.client()) == b""
    assert f"WARNING {LOCALHOST} has reached its limit of 1 connections" in service.wait_for("WARNING")
    service.tunnel(echo, source=NEIGHBOUR)
    exchange(client)
    client.close()
    eventually(lambda: first_answer(service.client()) == b"\x05\x00")


@needs_posix
def test_a_crowd_beyond_the_descriptors_is_survived(start: Start, echo: Place) -> None:
    service = start(command=by_shell('ulimit -n 64 && exec "$@"'))
    crowd = [service.client() for _ in range(100)]
    served = [client for client in crowd if first_answer(client) == b"\x05\x00"]
    assert 2 <= len(served) <= 31
    for client in served:
        assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
        exchange(client)
    assert_unharmed(service)
    assert "WARNING" in service.wait_for("no descriptors for more than")
    for client in crowd:
        client.close()

    def full_house() -> bool:
        with Client(service.server_address) as client:
            if first_answer(client) != b"\x05\x00":
                return False
            assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
            exchange(client)
            return True

    for _ in range(len(served) + 1):        # none of the room is lost
        eventually(full_house)
    assert_unharmed(service)
    assert service.stop() == 0
    assert "Traceback" not in service.stderr


# --- what is no SOCKS ---

@pytest.mark.parametrize("words", [(), ("-u", "anna:sesame")])
def test_a_browser_that_takes_it_for_a_web_server_gets_a_page(words: Tuple[str, ...], start: Start) -> None:
    service = start(*words)
    head, body = http(service.client(), "/")
    assert head.startswith("HTTP/1.1 501 ")
    assert f"SOCKS Host (version 5) to {LOCALHOST}:{service.port}" in body
    assert f"Content-Length: {len(body)}" in head
    assert "bad protocol: this is HTTP: use socks5h://" in service.wait_for("#1")


def test_a_browser_finds_its_configuration(start: Start) -> None:
    service = start()
    head, body = http(service.client(), "/proxy.pac")
    assert head.startswith("HTTP/1.1 200 ")
    assert "Content-Type: application/x-ns-proxy-autoconfig" in head
    assert f'return "SOCKS5 {LOCALHOST}:{service.port}; ' in body


# --- the log cannot be written ---

@needs_full_disk
def test_a_full_disk_stops_only_the_log(start: Start, echo: Place, processes: int) -> None:
    service = start("--log-file", "/dev/full", "-vv")
    for _ in range(5):
        service.tunnel(echo)
    assert service.stop() == 0
    assert service.stderr.startswith("socks5srv: error: the log cannot be written: ")
    assert service.stderr.count("cannot be written") <= processes
    assert "Traceback" not in service.stderr
    assert "Exception ignored" not in service.stderr


@needs_full_disk
def test_a_full_disk_under_stderr_stops_nothing(start: Start, echo: Place) -> None:
    service = start("-vv", command=by_shell('exec "$@" 2>/dev/full'))
    service.tunnel(echo)
    assert service.stop() == 0
