"""
What the command line promises about safety: who comes in, what they reach, and what a bad day does to it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange, in_thread, name, needs_ipv6, needs_neighbour, within

from socks5srv.protocol import Command, Credentials, CredentialsReply, Method, ReplyCode
from socks5srv.users import Hash

Place = Tuple[Any, ...]

NEIGHBOUR = "127.0.0.2"
needs_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
needs_full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def cheap_hash(password: str, rounds: int = 1000) -> str:
    """A hash as --hash-password makes it, but quick to compute."""
    blank = Hash("pbkdf2_sha256", (rounds,), os.urandom(16), bytes(32))
    return str(blank._replace(digest=blank.of(password)))


def write_users(path: Path, *lines: str) -> Path:
    """Put the file in place as a whole, as a careful editor does."""
    new = path.with_name(path.name + ".new")
    new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    new.chmod(0o600)
    os.replace(str(new), str(path))
    return path


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    return write_users(tmp_path / "users", "# the family", f"anna:{cheap_hash('sesame')}", "", f"ben:{cheap_hash('4711')}")


def log_in(client: Client, user: str, password: str) -> bool:
    assert client.greet(Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
    return client.login(user, password).status == CredentialsReply.SUCCESS


def tunnel(client: Client, place: Place, user: str, password: str) -> Client:
    assert log_in(client, user, password)
    assert client.request(Command.CONNECT, place).code is ReplyCode.SUCCEEDED
    exchange(client)
    return client


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


def assert_unharmed(service: Any) -> None:
    assert service.process.poll() is None
    assert "Traceback" not in service.stderr
    assert " a bug" not in service.stderr


# --- the refusal to be an open proxy ---

@pytest.fixture
def ways_out(run_command: Callable[..., Any]) -> List[List[str]]:
    """The options of the command lines that the refusal prints."""
    outcome = run_command("-b", "0.0.0.0")
    assert (outcome.code, outcome.stdout) == (2, "")
    return [line.group(1).split() for line in re.finditer(r"^ +socks5srv((?: \S+)*)  ", outcome.stderr, re.MULTILINE)]


def test_the_refusal_names_four_ways_out(ways_out: List[List[str]]) -> None:
    assert ways_out == [
        ["-b", "0.0.0.0", "-u", "NAME"], ["-b", "0.0.0.0", "--allow-from", "192.168.1.0/24"], ["-b", "0.0.0.0", "--allow-open-proxy"], [],
    ]


def test_the_first_way_out_asks_everybody_for_a_login(
    ways_out: List[List[str]], start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start(*ways_out[0], SOCKS5SRV_PASSWORD="sesame")
    assert new_client(service).greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS
    assert not log_in(new_client(service), "NAME", "4711")
    tunnel(new_client(service), echo, "NAME", "sesame")


def test_the_second_way_out_serves_nobody_else(
    ways_out: List[List[str]], start: Callable[..., Any], new_client: Callable[..., Client],
) -> None:
    service = start(*ways_out[1])
    assert first_answer(new_client(service)) == b""
    assert "127.0.0.1 rejected: not in --allow-from" in service.wait_for("rejected")


@needs_neighbour
def test_with_a_network_and_no_users_only_that_network_is_served(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("-b", "0.0.0.0", "--allow-from", f"{NEIGHBOUR}/32")
    assert first_answer(new_client(service)) == b""
    neighbour = new_client(service, source=NEIGHBOUR)
    neighbour.connect(echo)
    exchange(neighbour)


@needs_ipv6
def test_a_network_is_known_again_behind_the_ipv6_wildcard(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-b", "::", "--allow-from", f"{LOCALHOST}/32")
    new_client(service).connect(echo)
    assert first_answer(new_client(("::1", service.port))) == b""


@pytest.mark.parametrize("way", [2, 3])
def test_the_other_ways_out_ask_nobody(
    way: int, ways_out: List[List[str]], start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start(*ways_out[way])
    client = new_client(service)
    client.connect(echo)
    exchange(client)
    assert f"socks5h://{['', '', '0.0.0.0', LOCALHOST][way]}:" in service.wait_for("listening")


# --- logins without a password in sight ---

@needs_neighbour
def test_a_trusted_network_needs_no_login_while_the_others_do(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file), "--allow-from", f"{NEIGHBOUR}/32")
    new_client(service, source=NEIGHBOUR).connect(echo)
    assert new_client(service).greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS
    tunnel(new_client(service), echo, "anna", "sesame")


def test_the_logins_of_a_file_are_good_and_no_others(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file))
    assert new_client(service).greet(Method.NO_AUTHENTICATION_REQUIRED).method == Method.NO_ACCEPTABLE_METHODS
    for user, password in (("anna", "4711"), ("carl", "sesame"), ("# the family", "sesame")):
        assert not log_in(new_client(service), user, password)
    for _ in range(2):          # computed, and remembered
        tunnel(new_client(service), echo, "anna", "sesame")
    assert not log_in(new_client(service), "anna", "4711")
    assert "sesame" not in service.stderr.replace("carl sesame", "")


BAD_LINES = {
    "anna": "expected NAME:HASH, with a HASH from --hash-password",
    ":" + cheap_hash("sesame"): "expected NAME:HASH, with a HASH from --hash-password",
    "anna:sesame": "expected a HASH from --hash-password",
    "anna:md5$1$c2FsdA==$c2FsdA==": "expected a HASH from --hash-password",
    "anna:scrypt$16384$8$1$$": "takes too little or too much to compute",
    "anna:scrypt$16384$8$1$!$c2FsdA==": "this HASH is damaged; make it anew with --hash-password",
    "anna:pbkdf2_sha256$1$c2FsdA==$AAAAAAAAAAAAAAAAAAAAAA==": "takes too little or too much to compute",
    "ben:" + cheap_hash("sesame"): "user 'ben' is there twice",
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.items(), ids=[str(number) for number, _ in enumerate(BAD_LINES)])
def test_a_bad_line_is_told_with_its_number_and_what_was_expected(
    line: str, expected: str, tmp_path: Path, run_command: Callable[..., Any],
) -> None:
    path = write_users(tmp_path / "users", "# comment", f"ben:{cheap_hash('4711')}", line)
    outcome = run_command("--users-file", str(path), "0")
    assert (outcome.code, outcome.stdout) == (2, "")
    first = outcome.stderr.splitlines()[0]
    assert first.startswith(f"socks5srv: error: {path}:3: ")
    assert expected in first


@needs_posix
def test_a_file_that_everybody_can_read_is_refused_with_the_remedy(users_file: Path, run_command: Callable[..., Any]) -> None:
    users_file.chmod(0o644)
    outcome = run_command("--users-file", str(users_file), "0")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert f"users file {users_file} is readable by everyone: chmod o-rw {users_file}\n" in outcome.stderr


def test_a_file_that_is_missing_is_told(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    path = tmp_path / "nobody"
    outcome = run_command("--users-file", str(path), "0")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(f"socks5srv: error: users file {path}: No such file")


def test_a_file_that_is_no_text_is_told(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    path = tmp_path / "users"
    path.write_bytes(b"anna:\xff\n")
    path.chmod(0o600)
    outcome = run_command("--users-file", str(path), "0")
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"socks5srv: error: users file {path}: not UTF-8\n")


def test_users_come_from_one_place(users_file: Path, run_command: Callable[..., Any]) -> None:
    outcome = run_command("--users-file", str(users_file), "-u", "carl:pass", "0")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "-u and --users-file exclude each other: put all logins into the file" in outcome.stderr


@needs_neighbour
@pytest.mark.parametrize("words", [(), ("--workers", "2")], ids=["one process", "workers"])
def test_it_stops_at_once_although_hundreds_wait_for_their_hashes(
    words: Tuple[str, ...], tmp_path: Path, start: Callable[..., Any], new_client: Callable[..., Client],
) -> None:
    path = write_users(tmp_path / "users", f"anna:{cheap_hash('sesame', 400_000)}")
    service = start("--users-file", str(path), *words)
    for number in range(300):
        client = new_client(service, source=f"127.0.{number // 5}.2")
        client.send(b"\x05\x01\x02" + bytes(Credentials(b"anna", b"wrong")))
        assert client.exactly(2) == b"\x05\x02"
    began = time.monotonic()
    assert service.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < within(0.5)


# --- the users change while it serves ---

def test_a_user_who_is_removed_is_cut_off_and_a_new_one_comes_in(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    ben = f"ben:{cheap_hash('4711')}"
    write_users(users_file, f"anna:{cheap_hash('sesame')}", ben)
    service = start("--users-file", str(users_file))
    anna = tunnel(new_client(service), echo, "anna", "sesame")
    stays = tunnel(new_client(service), echo, "ben", "4711")
    write_users(users_file, ben, f"carl:{cheap_hash('open')}")
    assert anna.rest() == b""
    assert " anna connect " in service.wait_for("the user has been removed")
    exchange(stays)
    tunnel(new_client(service), echo, "carl", "open")
    assert not log_in(new_client(service), "anna", "sesame")
    assert "2 users read from" in service.wait_for("users read")


def test_a_changed_password_ends_the_tunnels_of_the_old_one(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file))
    old = tunnel(new_client(service), echo, "anna", "sesame")
    write_users(users_file, f"anna:{cheap_hash('open')}")
    assert old.rest() == b""
    assert not log_in(new_client(service), "anna", "sesame")
    tunnel(new_client(service), echo, "anna", "open")


def test_a_new_file_with_a_mistake_changes_nothing_and_is_told(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file))
    anna = tunnel(new_client(service), echo, "anna", "sesame")
    write_users(users_file, f"carl:{cheap_hash('open')}", "anna")
    assert f"ERROR keeping the previous users: {users_file}:2: expected NAME:HASH" in service.wait_for("keeping the previous users")
    exchange(anna)
    tunnel(new_client(service), echo, "ben", "4711")
    assert not log_in(new_client(service), "carl", "open")
    write_users(users_file, f"carl:{cheap_hash('open')}")
    assert anna.rest() == b""
    tunnel(new_client(service), echo, "carl", "open")


def test_a_file_that_vanishes_changes_nothing_and_is_told_once(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file))
    users_file.unlink()
    assert "No such file" in service.wait_for("keeping the previous users")
    tunnel(new_client(service), echo, "anna", "sesame")
    write_users(users_file, f"carl:{cheap_hash('open')}")
    service.wait_for("1 users read")
    tunnel(new_client(service), echo, "carl", "open")
    assert service.stderr.count("keeping the previous users") == 1


@needs_posix
def test_the_remedy_for_a_file_that_everybody_can_read_helps_while_it_serves(
    users_file: Path, tmp_path: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file))
    new = tmp_path / "new"
    new.write_text(f"carl:{cheap_hash('open')}\n")
    new.chmod(0o644)
    os.replace(str(new), str(users_file))
    assert f"chmod o-rw {users_file}" in service.wait_for("keeping the previous users")
    users_file.chmod(0o600)
    service.wait_for("1 users read")
    tunnel(new_client(service), echo, "carl", "open")


@needs_hangup
def test_sighup_has_the_file_read_again_although_it_has_not_changed(users_file: Path, start: Callable[..., Any]) -> None:
    service = start("--users-file", str(users_file))
    service.process.send_signal(signal.SIGHUP)
    assert f"2 users read from {users_file}" in service.wait_for("users read")


@needs_hangup
def test_sighup_tells_of_a_file_that_is_still_missing(users_file: Path, start: Callable[..., Any]) -> None:
    service = start("--users-file", str(users_file))
    users_file.unlink()
    service.wait_for("keeping the previous users")
    service.process.send_signal(signal.SIGHUP)
    service.wait_until(lambda: service.stderr.count("keeping the previous users") == 2, "a word about the file")


@needs_hangup
def test_a_login_that_was_being_computed_when_its_user_was_removed_is_refused(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    write_users(users_file, f"anna:{cheap_hash('sesame', 3_000_000)}")      # a second or so
    service = start("--users-file", str(users_file))
    client = new_client(service)
    client.greet(Method.USERNAME_PASSWORD)
    client.send(b"\x01\x04anna\x06sesame")
    eventually(lambda: not queued(client))
    write_users(users_file, f"ben:{cheap_hash('4711')}")
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
def test_a_storm_of_sighups_harms_nobody(
    users_file: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("--users-file", str(users_file))
    before = tunnel(new_client(service), echo, "anna", "sesame")

    def come_and_go() -> None:
        for _ in range(25):
            with Client(service.server_address) as client:
                tunnel(client, echo, "ben", "4711")

    results = [in_thread(come_and_go) for _ in range(4)]
    for _ in range(200):
        service.process.send_signal(signal.SIGHUP)
        exchange(before)
    for result in results:
        result()
    exchange(before)
    assert_unharmed(service)
    write_users(users_file, f"carl:{cheap_hash('open')}")
    service.wait_for("1 users read")
    assert before.rest() == b""
    tunnel(new_client(service), echo, "carl", "open")
    assert service.stop() == 0
    assert " ERROR " not in service.stderr


# --- --hash-password ---

def test_a_hash_that_is_printed_works_in_a_file(
    tmp_path: Path, at_terminal: Callable[..., Any], start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    terminal = at_terminal("--hash-password")
    terminal.wait_for("Password: ")
    terminal.type("päss wörd\n")
    terminal.wait_for("The same again: ")
    terminal.type("päss wörd\n")
    code, text = terminal.end()
    assert code == 0
    assert "wörd" not in text
    hash = text.split()[-1]
    assert re.fullmatch(r"(scrypt|pbkdf2_sha256)\$\S+", hash)
    service = start("--users-file", str(write_users(tmp_path / "users", f"anna:{hash}")))
    tunnel(new_client(service), echo, "anna", "päss wörd")
    assert not log_in(new_client(service), "anna", "pass word")


@pytest.mark.parametrize(("first", "second", "expected"), [
    ("sesame\n", "sesame2\n", "socks5srv: error: the two are not the same"),
    ("\n", "\n", "socks5srv: error: a password has 1 to 255 octets"),
    ("sesame\n", "\x04", "socks5srv: error: no password was given"),
    ("sesame\n", "\x03", "socks5srv: error: no password was given"),
])
def test_no_hash_is_printed_for_a_password_that_does_not_do(
    first: str, second: str, expected: str, at_terminal: Callable[..., Any],
) -> None:
    terminal = at_terminal("--hash-password")
    terminal.wait_for("Password: ")
    terminal.type(first)
    terminal.wait_for("The same again: ")
    terminal.type(second)
    code, text = terminal.end()
    assert code == 2
    assert expected in text
    assert "$" not in text
    assert "Traceback" not in text


def test_keys_that_are_no_utf8_are_no_traceback(at_terminal: Callable[..., Any]) -> None:
    terminal = at_terminal("--hash-password", PYTHONIOENCODING="utf-8", PYTHONUTF8="1")
    terminal.wait_for("Password: ")
    os.write(terminal.screen, b"\xff\n")
    if "again" in eventually(lambda: terminal.read(TIMEOUT) and terminal.text):
        os.write(terminal.screen, b"\xff\n")
    code, text = terminal.end()
    assert "Traceback" not in text
    assert code == 2


# --- rules ---

def test_the_first_rule_that_matches_wins_in_the_order_of_the_command_line(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    port = echo[1]
    allowing = start("--allow", f"{LOCALHOST}:{port}", "--deny", "127.0.0.0/8", "--allow", "*")
    new_client(allowing).connect(echo)
    assert new_client(allowing).ask(Command.CONNECT, (LOCALHOST, port ^ 1)).code is ReplyCode.NOT_ALLOWED
    denying = start("--deny", "127.0.0.0/8", "--allow", f"{LOCALHOST}:{port}")
    assert new_client(denying).ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
    assert "denied(02) rule: deny 127.0.0.0/8" in denying.wait_for("#1")


def test_rules_of_a_file_stand_where_the_file_does(
    tmp_path: Path, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    file = tmp_path / "rules"
    file.write_text(f"# all but one\n--allow 127.0.0.1:{echo[1]}\n--deny '*'  # and that is it\n")
    service = start(f"@{file}", "--allow", "*", "--log-format", "json")
    new_client(service).connect(echo)
    assert new_client(service).ask(Command.CONNECT, (LOCALHOST, 9)).code is ReplyCode.NOT_ALLOWED
    line = json.loads(service.wait_for('"denied"'))
    assert (line["event"], line["reply"], line["reason"]) == ("denied", 2, "rule: deny *")
    first = start("--deny", f":{echo[1]}", f"@{file}")
    assert new_client(first).ask(Command.CONNECT, echo).code is ReplyCode.NOT_ALLOWED
    assert service.process.poll() is None


@pytest.mark.parametrize("spelling", ["localhost", "LOCALHOST.", "127.0.0.1", "127.1", "0x7f000001", "2130706433"])
def test_a_denied_network_stays_denied_under_any_name(
    spelling: str, start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("-4", "--deny", "127.0.0.0/8")
    client = new_client(service)
    reply = client.ask(Command.CONNECT, name(spelling, echo[1]))
    assert reply.code in (ReplyCode.NOT_ALLOWED, ReplyCode.HOST_UNREACHABLE)
    assert " ok " not in service.wait_for("#1")


def test_rules_are_of_bind_too(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start("--deny", LOCALHOST)
    assert new_client(service).ask(Command.BIND, (LOCALHOST, 9)).code is ReplyCode.NOT_ALLOWED
    assert f"denied(02) rule: deny {LOCALHOST}" in service.wait_for("#1")


@pytest.mark.parametrize(("words", "expected"), [
    (("--deny", "10.0.0.1/8"), "'10.0.0.1/8' is no network: 10.0.0.0/8 would be one"),
    (("--deny", "127.1"), "write it out, as in 127.0.0.1 or 10.0.0.0/8"),
    (("--allow", "10.0.0.0/33"), "write it out, as in 127.0.0.1 or 10.0.0.0/8"),
    (("--allow", "example.com:http"), "has no port after its colon: PORT or PORT-PORT, from 0 to 65535"),
    (("--allow", "example.com:70000"), "has no port after its colon"),
    (("--deny", ":90-80"), "the lower one comes first"),
    (("--deny", "[::1"), "lacks its closing bracket"),
    (("--deny", "a.*.example"), "NAME, *.DOMAIN, an IP address or NETWORK/BITS is"),
    (("--deny", ""), "allow TARGET or deny TARGET is"),
    (("--allow-from", "192.168.1.7/24"), "192.168.1.0/24 would be one"),
    (("--allow-from", "example.com"), "'example.com' is no network"),
    (("--allow-from", "has host bits set"), "'has host bits set' is no network"),
    (("--max-clients", "0"), "must be a positive number, not '0'"),
    (("--max-per-client", "many"), "must be a positive number, not 'many'"),
])
def test_a_value_that_does_not_do_is_told_with_what_was_expected(
    words: Tuple[str, ...], expected: str, run_command: Callable[..., Any],
) -> None:
    outcome = run_command(*words, "0")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(f"socks5srv: error: argument {words[0]}")
    assert expected in outcome.stderr


# --- how many ---

def test_more_clients_than_allowed_are_turned_away_until_one_leaves(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place, processes: int,
) -> None:
    service = start("--max-clients", "2")
    clients = [new_client(service) for _ in range(2)]
    for client in clients:
        client.connect(echo)
    for _ in range(3):
        assert first_answer(new_client(service)) == b""
    assert "WARNING limit of 2 clients reached" in service.wait_for("WARNING")
    for client in clients:
        exchange(client)
    clients[0].close()
    eventually(lambda: first_answer(new_client(service)) == b"\x05\x00")
    assert service.stderr.count("WARNING") <= processes


@needs_neighbour
def test_one_address_cannot_take_all_the_room(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("--max-per-client", "1")
    client = new_client(service)
    client.connect(echo)
    assert first_answer(new_client(service)) == b""
    assert f"WARNING {LOCALHOST} has reached its limit of 1 connections" in service.wait_for("WARNING")
    new_client(service, source=NEIGHBOUR).connect(echo)
    exchange(client)
    client.close()
    eventually(lambda: first_answer(new_client(service)) == b"\x05\x00")


@needs_posix
def test_a_crowd_beyond_the_descriptors_is_survived(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start(command=("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable, "-m", "socks5srv"))
    crowd = [new_client(service) for _ in range(100)]
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
def test_a_browser_that_takes_it_for_a_web_server_gets_a_page(
    words: Tuple[str, ...], start: Callable[..., Any], new_client: Callable[..., Client],
) -> None:
    service = start(*words)
    head, body = http(new_client(service), "/")
    assert head.startswith("HTTP/1.1 501 ")
    assert f"SOCKS Host (version 5) to {LOCALHOST}:{service.port}" in body
    assert f"Content-Length: {len(body)}" in head
    assert "bad-protocol this is HTTP" in service.wait_for("#1")


def test_a_browser_finds_its_configuration(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start()
    head, body = http(new_client(service), "/proxy.pac")
    assert head.startswith("HTTP/1.1 200 ")
    assert "Content-Type: application/x-ns-proxy-autoconfig" in head
    assert f'return "SOCKS5 {LOCALHOST}:{service.port}; ' in body


# --- the log cannot be written ---

@needs_full_disk
def test_a_full_disk_stops_only_the_log(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place, processes: int,
) -> None:
    service = start("--log-file", "/dev/full", "-vv")
    for _ in range(5):
        client = new_client(service)
        client.connect(echo)
        exchange(client)
    assert service.stop() == 0
    assert service.stderr.startswith("socks5srv: error: the log cannot be written: ")
    assert service.stderr.count("cannot be written") <= processes
    assert "Traceback" not in service.stderr
    assert "Exception ignored" not in service.stderr


@needs_full_disk
def test_a_full_disk_under_stderr_stops_nothing(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-vv", command=("sh", "-c", 'exec "$@" 2>/dev/full', "sh", sys.executable, "-m", "socks5srv"))
    client = new_client(service)
    client.connect(echo)
    exchange(client)
    assert service.stop() == 0
