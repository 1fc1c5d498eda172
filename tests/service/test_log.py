"""Log lines: one a client, for people or for programs, on the screen or in a file."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from tests.conftest import LOCALHOST, Client, Place
from tests.program import COMMAND, ROOT, AtTerminal, Start, needs_full_disk, needs_posix, processes_too

from socks5srv import foreign
from socks5srv.names import ascii_form
from socks5srv.protocol import (
    Address, AddressType, Command, Credentials, Method, ReplyCode, Request, Socks5Error, read_name,
)
from socks5srv.service import log
from socks5srv.service.settings import Settings
from socks5srv.session import Session

CLOCK = r"\d\d:\d\d:\d\d"
CLIENT = r"127\.0\.0\.1:\d+"
OF_THE_SERVER = {"time", "event", "level", "message"}       # what lines that tell of no client have


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the lines may go."""
    return tmp_path / "proxy.log"


# --- text ---

def test_a_client_that_has_been_served_is_one_line(start: Start, echo: Place) -> None:
    service = start()
    service.tunnel(echo).close()
    line = service.wait_for("#1")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} CONNECT 127\.0\.0\.1:{echo[1]} ok, 5 B up, 5 B down, \d\.\d s, closed by client", line)
    service.stop()
    listening, session, summary = service.stderr.splitlines()
    assert (" listening " in listening, session, " stopped after " in summary) == (True, line, True)


def test_a_client_that_has_not_been_served_is_one_line_with_the_reason(start: Start, refusing: Callable[..., Place]) -> None:
    service, (host, port) = start(), refusing()
    service.client().ask(Command.CONNECT, (host, port))
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} CONNECT {host}:{port} failed \(reply 05\): .*refused", service.wait_for("#1"))


def test_a_failed_login_is_one_line_that_other_programs_can_watch_for(start: Start) -> None:
    service = start("-u", "anna:sesame")
    assert not service.admits("anna", "guess")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} user anna login failed: wrong name or password", service.wait_for("#1"))


def test_verbose_tells_also_when_a_client_is_connected(start: Start, echo: Place) -> None:
    service = start("-v")
    client = service.tunnel(echo)
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} CONNECT 127\.0\.0\.1:{echo[1]} open", service.wait_for("#1"))
    client.close()
    service.wait_for(" ok,")


def test_more_verbose_tells_every_message_but_no_password(start: Start, echo: Place) -> None:
    service = start("-vv", "-u", "anna:sesame", "-u", "ben", SOCKS5SRV_PASSWORD="from outside")
    service.tunnel(echo, "anna", "sesame").close()
    assert not service.admits("anna", "guess")
    service.wait_for("login failed")
    service.stop()
    lines = [re.sub(rf"^{CLOCK} DEBUG ", "", line) for line in service.stderr.splitlines()]
    conversation = [line for line in lines if re.match(r"#1 [<>] ", line)]
    assert conversation[:5] == [
        "#1 < Greeting VER=5 NMETHODS=1 METHODS=USERNAME_PASSWORD",
        "#1 > MethodSelection VER=5 METHOD=USERNAME_PASSWORD",
        "#1 < Credentials VER=1 ULEN=4 UNAME=anna PLEN=*** PASSWD=***",
        "#1 > CredentialsReply VER=1 STATUS=success",
        f"#1 < Request VER=5 CMD=CONNECT RSV=00 ATYP=IPV4 DST.ADDR=127.0.0.1 DST.PORT={echo[1]}",
    ]
    assert conversation[5].startswith("#1 > Reply VER=5 REP=SUCCEEDED RSV=00 ATYP=IPV4 BND.ADDR=127.0.0.1 BND.PORT=")
    assert not re.search("sesame|guess|from outside", service.stderr)


@pytest.mark.parametrize("words", ["", "-v", "-vv", "--log-format json", "-vv --log-format json"])
def test_no_password_is_in_any_log(words: str, start: Start, echo: Place) -> None:
    service = start("-u", "anna:sesame", *words.split())
    service.tunnel(echo, "anna", "sesame").close()
    assert not service.admits("anna", "guess")
    service.wait_until(lambda: "login" in service.stderr and ("#2" in service.stderr or '"id": 2' in service.stderr), "both")
    service.stop()
    assert "anna" in service.stderr
    assert not re.search("sesame|guess|Traceback", service.stderr)


@pytest.mark.parametrize("words", [["-q"], ["-q", "-vv"]], ids=["alone", "with -vv"])
def test_quiet_says_nothing(words: List[str], start: Start, echo: Place) -> None:
    service = start(*words)
    service.tunnel(echo).close()
    assert service.stop() == 0
    assert service.stderr == ""


# --- JSON ---

def objects(text: str) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_a_line_from_the_first_to_the_last(start: Start, echo: Place, refusing: Callable[..., Place]) -> None:
    service = start("--log-format", "json")
    service.tunnel(echo).close()
    service.wait_until(lambda: '"id": 1' in service.stderr, "the first session")
    service.client().ask(Command.CONNECT, refusing())
    service.wait_until(lambda: '"id": 2' in service.stderr, "the second session")
    service.stop()
    listening, closed, failed, stop = objects(service.stderr)

    assert listening.keys() == OF_THE_SERVER | {"urls", "auth", "commands", "pid"}
    assert (listening["event"], listening["auth"]) == ("listening", "none")
    assert listening["urls"] == [f"socks5h://127.0.0.1:{service.port}"]
    assert listening["commands"] == ["connect", "bind", "udp"]
    assert listening["pid"] == service.process.pid

    for line, id in ((closed, 1), (failed, 2)):
        assert line.keys() == Session(1, Address.numeric("192.0.2.1", 9)).as_dict().keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert (line["id"], line["command"], line["host"], line["user"]) == (id, "connect", "127.0.0.1", "")
        assert re.fullmatch(CLIENT, line["client"])
    assert (closed["event"], closed["reply"], closed["reason"]) == ("close", 0, "closed by client")
    assert (closed["up"], closed["down"], closed["port"], closed["peer"]) == (5, 5, echo[1], f"127.0.0.1:{echo[1]}")
    assert (failed["event"], failed["reply"], failed["peer"]) == ("failed", 5, None)

    assert stop.keys() == OF_THE_SERVER | {"seconds", "sessions", "events", "client_addresses", "targets", "up", "down", "most_at_once"}
    assert (stop["event"], stop["sessions"], stop["events"]) == ("stop", 2, {"close": 1, "failed": 1})
    assert (stop["client_addresses"], stop["targets"], stop["up"], stop["down"], stop["most_at_once"]) == (1, 1, 5, 5, 1)


def test_json_has_an_opening_line_too_if_that_is_wanted(start: Start, echo: Place) -> None:
    service = start("--log-format", "json", "-v")
    service.tunnel(echo).close()
    service.wait_for('"close"')
    service.stop()
    _listening, opened, closed, _stop = objects(service.stderr)
    assert (opened["event"], opened["reply"], opened["seconds"]) == ("open", 0, None)
    assert (opened["id"], closed["event"]) == (closed["id"], "close")


def test_json_has_messages_too_if_they_are_wanted(start: Start, echo: Place) -> None:
    service = start("--log-format", "json", "-vv")
    service.tunnel(echo).close()
    service.wait_for('"close"')
    service.stop()
    messages = [line for line in objects(service.stderr) if line["event"] == "log"]
    assert messages[0].keys() == OF_THE_SERVER
    assert (messages[0]["level"], messages[0]["message"][:15]) == ("debug", "#1 < Greeting V")


def test_json_at_a_terminal_is_json_only(at_terminal: AtTerminal) -> None:
    code, text = at_terminal("--log-format", "json", "0").talk('"listening"', "\x03")
    assert code == 0
    assert [line["event"] for line in objects(text.replace("^C", ""))] == ["listening", "stop"]


def test_json_keeps_the_text_of_a_bug_in_one_line() -> None:
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError:
        record = logging.LogRecord("socks5srv", logging.ERROR, __file__, 1, "unhandled exception while %s", ("testing",), sys.exc_info())
    text = log.JsonFormatter().format(record)
    assert "\n" not in text
    facts = json.loads(text)
    assert (facts["event"], facts["level"], facts["message"]) == ("log", "error", "unhandled exception while testing")
    assert facts["traceback"].endswith("ZeroDivisionError: division by zero")


# --- names from the wire ---

HOSTILE = "a\x1b[2Jb\nc\r#2 \u202ed\x00\u2028e\x9b"
ESCAPED = r"a\x1b[2Jb\nc\r#2 \u202ed\x00\u2028e\x9b"


def hostile_record() -> logging.LogRecord:
    session = Session(1, Address.numeric("192.0.2.1", 40000))
    session.user, session.reason = HOSTILE, HOSTILE
    session.command, session.destination = Command.CONNECT, Address.named(HOSTILE, 80)
    session.peer, session.reply = Address.numeric("192.0.2.2", 80), ReplyCode.GENERAL_FAILURE
    session.end()
    record = logging.LogRecord("socks5srv", logging.INFO, __file__, 1, "%s", (session,), None)
    record.session = session
    return record


def test_a_hostile_name_is_escaped_in_a_line_for_people() -> None:
    text = log.TextFormatter(color=False).format(hostile_record())
    assert text.isprintable()
    assert text.replace("\\x20", " ").count(ESCAPED) == 3


def test_a_hostile_name_stays_in_its_string_for_programs_and_does_nothing_to_a_terminal_that_it_is_shown_at() -> None:
    text = log.JsonFormatter().format(hostile_record())
    assert text.isprintable(), "so it is one line, too"
    facts = json.loads(text)
    assert (facts["user"], facts["host"], facts["reason"]) == (HOSTILE, HOSTILE, HOSTILE)


@pytest.mark.parametrize("words", ["", "-vv"])
def test_a_hostile_user_cannot_forge_a_line(words: str, start: Start) -> None:
    service = start("-u", "anna:sesame", *words.split())
    assert not service.admits("x\n00:00:00 #7 192.0.2.1:1 user anna login failed: \x1b[2J\u202e\x9b", "guess")
    line = service.wait_for("wrong name or password")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} user x\\n00:00:00\S+ login failed: wrong name or password", line)
    service.stop()
    assert all(line.isprintable() for line in service.stderr.split("\n"))
    assert not any(line.startswith("00:00:00 #7") for line in service.stderr.splitlines())


FORGED = "x #9 198.51.100.7:5 user root login failed: x"


def test_blanks_from_the_wire_are_escaped_in_every_line_that_quotes_them(start: Start) -> None:
    """A name that cannot exist, a user's before the login, and what the status page is asked for."""
    service = start("-vv", "-u", "anna:sesame", "--status", "0")
    [(host, port)] = re.findall(r"status=http://([0-9.]+):(\d+)/", service.wait_for("status="))
    for path in (f"/{FORGED}", f"/{FORGED}\t", "/status.json"):
        with Client((host, int(port))) as client:
            client.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            client.rest()
    for username, password in ((FORGED, "guess"), ("anna", "sesame")):
        with service.client() as client:
            client.greet(Method.USERNAME_PASSWORD)
            client.login(username, password)
            client.send(b"\x05\x01\x00\x03", bytes([len(FORGED)]), FORGED.encode(), b"\x00\x50")
            client.rest()
    service.wait_for("failed (reply 04)")
    service.stop()
    assert service.stderr.count("198.51.100.7:5") >= 4
    assert " 198.51.100.7" not in service.stderr
    assert "GET\\x20/status.json\\x20HTTP/1.0" in service.stderr


@pytest.mark.parametrize("name", [b"a\x1b[2J.example", b"a\n.example", b"a\xff\xfe", b"a b.example"])
def test_a_name_that_cannot_exist_is_refused_and_escaped(name: bytes, start: Start) -> None:
    service = start("-vv")
    with service.client() as client:
        client.greet(Method.NO_AUTHENTICATION_REQUIRED)
        client.send(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + b"\x00\x50")
        client.rest()
    assert "failed (reply 04): a name that" in service.wait_for("failed (reply 04)")
    service.stop()
    assert all(line.isprintable() for line in service.stderr.split("\n"))


# --- where it goes ---

def test_a_log_file_has_the_lines_instead_of_the_screen(start: Start, echo: Place, file: Path) -> None:
    file.write_text("of yesterday\n")
    service = start("--log-file", str(file))
    service.tunnel(echo).close()
    service.wait_until(lambda: "#1" in file.read_text(), "the line in the file")
    service.stop()
    yesterday, listening, session, stopped = file.read_text().splitlines()
    assert yesterday == "of yesterday"
    assert (" listening " in listening, " #1 " in session, " stopped after " in stopped) == (True, True, True)
    assert service.stderr == ""


def test_a_log_file_has_no_colors(start: Start, echo: Place, file: Path) -> None:
    service = start("-v", "--color", "always", "--log-file", str(file))
    service.tunnel(echo).close()
    service.stop()
    assert "#1" in file.read_text()
    assert "\x1b" not in file.read_text()


def test_at_a_terminal_a_log_file_leaves_the_banner_on_the_screen(at_terminal: AtTerminal, file: Path) -> None:
    code, text = at_terminal("--log-file", str(file), "0").talk("Ctrl-C stops", "\x03")
    assert code == 0
    assert "listening" not in text
    assert " listening " in file.read_text()


# --- a file that is put aside, as logrotate does ---

# Becomes the command that it is told, with a stderr that is a pipe nobody reads.
WITHOUT_READER = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader)
os.execv(sys.argv[1], sys.argv[1:])
"""


def ids(file: Path) -> List[int]:
    """The numbers of the sessions that a log file tells of."""
    return [int(number) for number in re.findall(r" #(\d+) ", file.read_text())] if file.exists() else []


@needs_posix
@processes_too
def test_a_log_file_that_is_put_aside_goes_on_in_a_new_one_without_loss(
    words: Tuple[str, ...], start: Start, echo: Place, file: Path,
) -> None:
    aside = [file.with_name(f"proxy.log.{number}") for number in range(3)]
    service = start(*words, "--log-file", str(file))
    for number, old in enumerate(aside):
        for _ in range(10):
            service.tunnel(echo).close()
        service.wait_until(lambda number=number: max(ids(file), default=0) == 10 * (number + 1) and len(ids(file)) == 10, "ten lines")
        file.rename(old)
    service.tunnel(echo).close()
    service.wait_until(lambda: ids(file) == [31], "the line in the new file")
    assert service.stop() == 0
    assert [sorted(ids(old)) for old in aside] == [list(range(1, 11)), list(range(11, 21)), list(range(21, 31))]
    assert "stopped after" in file.read_text()
    assert service.stderr == ""


@needs_posix
def test_no_line_is_lost_or_doubled_while_files_are_put_aside(start: Start, echo: Place, file: Path) -> None:
    aside: List[Path] = []
    service = start("--log-file", str(file))
    for number in range(40):
        service.tunnel(echo).close()
        if file.exists():
            aside.append(file.with_name(f"proxy.log.{number}"))
            file.rename(aside[-1])
    assert service.stop() == 0
    assert sorted(id for old in [*aside, file] for id in ids(old)) == list(range(1, 41))


@needs_posix
@processes_too
def test_sighup_opens_the_log_file_afresh_at_once(words: Tuple[str, ...], start: Start, echo: Place, file: Path) -> None:
    old = file.with_name("proxy.log.1")
    service = start(*words, "--log-file", str(file))
    file.rename(old)
    service.process.send_signal(signal.SIGHUP)
    service.wait_until(file.exists, "the new file")
    if os.path.isdir("/proc/self/fd"):
        service.wait_until(lambda: str(old) not in open_files(service.process.pid), "the end of the old file, in all processes")
        assert str(file) in open_files(service.process.pid)
    service.tunnel(echo)
    assert service.stop() == 0
    assert "stopped after" in file.read_text()


def open_files(pid: int) -> List[str]:
    """What the descriptors of a process, and of those that it has started, lead to."""
    found = []
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in [str(pid), *children]:
        for fd in os.listdir(f"/proc/{each}/fd"):
            try:
                found.append(os.readlink(f"/proc/{each}/fd/{fd}"))
            except OSError:         # closed meanwhile
                pass
    return found


@needs_posix
def test_a_log_file_that_is_copied_and_emptied_is_written_from_its_beginning(start: Start, echo: Place, file: Path) -> None:
    service = start("--log-file", str(file))
    service.tunnel(echo).close()
    service.wait_until(lambda: ids(file) == [1], "the first line")
    os.truncate(str(file), 0)
    service.tunnel(echo).close()
    service.wait_until(lambda: ids(file) == [2], "the second line")
    assert re.match(r"\d{4}-", file.read_text())


@needs_posix
def test_a_log_file_that_cannot_be_opened_afresh_goes_on_in_the_old_one_and_is_told_once(
    start: Start, echo: Place, tmp_path: Path, processes: int,
) -> None:
    folder, aside = tmp_path / "log", tmp_path / "aside"
    folder.mkdir()
    service = start("--log-file", str(folder / "proxy.log"))
    folder.rename(aside)
    for _ in range(3):
        service.tunnel(echo).close()
    service.wait_until(lambda: sorted(ids(aside / "proxy.log")) == [1, 2, 3], "the lines in the old file")
    service.wait_for("goes on in the old file")
    assert service.stderr.count("cannot be opened afresh: ") <= processes
    folder.mkdir()
    service.tunnel(echo).close()
    service.wait_until(lambda: ids(folder / "proxy.log") == [4], "the line in the new file")
    assert service.stop() == 0
    assert "Traceback" not in service.stderr


@needs_posix
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=needs_full_disk)])
def test_with_neither_a_log_nor_a_stderr_it_serves_on(full: bool, start: Start, echo: Place, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    file = "/dev/full" if full else str(folder / "proxy.log")
    service = start("--log-file", file, command=(sys.executable, "-c", WITHOUT_READER, *COMMAND))
    folder.rename(tmp_path / "aside")
    service.process.send_signal(signal.SIGHUP)
    for _ in range(3):
        service.tunnel(echo).close()
    assert service.stop() == 0


@pytest.mark.usefixtures("_logger_as_before")
def test_nothing_that_fails_with_the_file_comes_out_of_the_call_that_logs(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    def fail(*_arguments: Any, **_keywords: Any) -> Any:
        raise PermissionError("not yours")

    log.set_up(Settings(log_file=str(file)))
    logger = logging.getLogger("socks5srv")
    monkeypatch.setattr(sys, "stderr", Closed())
    with monkeypatch.context() as patch:
        patch.setattr(log.os, "stat", fail)
        logger.info("first")
        log.reopen()
    file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(log.File, "_open", fail)
        logger.info("second")
    assert not file.exists()
    logger.info("third")
    assert file.read_text().endswith("third\n")


# --- color ---

@pytest.mark.skipif(os.name == "nt", reason="there they come only if asked for")
@pytest.mark.parametrize(("when", "terminal", "text", "wanted"), [
    ("auto", True, "TERM=xterm", True), ("auto", True, "", True), ("auto", False, "TERM=xterm", False), ("auto", True, "TERM=dumb", False),
    ("auto", True, "TERM=xterm NO_COLOR=1", False), ("auto", True, "TERM=xterm NO_COLOR=", True), ("auto", False, "FORCE_COLOR=1", True),
    ("auto", True, "NO_COLOR=1 FORCE_COLOR=1", False), ("always", False, "NO_COLOR=1 TERM=dumb", True), ("never", True, "FORCE_COLOR=1", False),
])
def test_colors_come_where_wanted(when: str, terminal: bool, text: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for assignment in text.split():
        monkeypatch.setenv(*assignment.split("="))
    screen: Any = SimpleNamespace(isatty=lambda: terminal)
    assert log.wants_color(when, screen) is wanted


def test_a_failure_is_red_and_a_success_as_it_is(start: Start, echo: Place, refusing: Callable[..., Place]) -> None:
    service = start("--color", "always")
    service.tunnel(echo).close()
    service.wait_for("#1")
    service.client().ask(Command.CONNECT, refusing())
    assert re.fullmatch(r"[^\x1b]* \x1b\[31mfailed \(reply 05\)\x1b\[0m: [^\x1b]*refused", service.wait_for("#2"))
    with service.client() as client:
        client.greet(Method.USERNAME_PASSWORD)
    assert re.fullmatch(r".* \x1b\[31mno acceptable method\x1b\[0m: .*start with -u NAME.*", service.wait_for("#3"))
    assert "\x1b" not in service.wait_for("#1")


@pytest.mark.parametrize(("variables", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_at_a_terminal_there_are_colors_unless_unwanted(
    variables: Dict[str, str], colored: bool, at_terminal: AtTerminal, refusing: Callable[..., Place],
) -> None:
    terminal = at_terminal("0", **variables)
    terminal.wait_until_it_serves()
    terminal.client().ask(Command.CONNECT, refusing())
    assert ("\x1b[31m" in terminal.wait_for("refused")) is colored


# --- the logger is ours alone ---

@pytest.fixture
def _logger_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("socks5srv", "socks5srv.wire")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("_logger_as_before")
@pytest.mark.parametrize(("quiet", "verbose", "level", "wire"), [
    (False, 0, logging.INFO, False), (False, 1, logging.DEBUG, False), (False, 2, logging.DEBUG, True), (True, 2, logging.ERROR, False),
])
def test_the_options_set_levels_of_our_own_loggers_only(quiet: bool, verbose: int, level: int, wire: bool, file: Path) -> None:
    root = logging.getLogger().level
    log.set_up(Settings(log_file=str(file), quiet=quiet, verbose=verbose))
    assert logging.getLogger("socks5srv").level == level
    assert logging.getLogger("socks5srv").isEnabledFor(logging.ERROR), "errors are always told"
    if not quiet:
        assert logging.getLogger("socks5srv.wire").isEnabledFor(logging.DEBUG) is wire
    assert logging.getLogger().level == root


def test_a_request_is_shown_as_the_rfc_names_its_fields() -> None:
    request = Request(Command.CONNECT, Address.named("example.com", 80))
    assert str(request) == "Request VER=5 CMD=CONNECT RSV=00 ATYP=DOMAINNAME DST.ADDR=example.com DST.PORT=80"


# --- what a log watcher sees ---

# As docs/rules-users-upstream.rst gives it to fail2ban, which puts a pattern for addresses in place of <HOST>.
FAIL2BAN = r"^\s*(?:\S+ \S+\[\d+\]: )?[-:\d ]*#\d+ \[?<HOST>\]?:\d+ (?:via \S+ )?(?:user \S+ )?login failed: "
HOST = r"(?P<host>[\w.:^-]*\w)"      # as fail2ban has it, or wider
PLACES = ("2026-01-02 03:04:05 ", " ", "", "03:04:05 ", "host socks5srv[17]: 03:04:05 ")      # a file, and without its date; a terminal; the journal


def test_the_documented_fail2ban_filter_finds_the_address_of_a_failed_login(start_server: Any, new_client: Any) -> None:
    server = start_server(users={"anna": "sesame"})
    lines: List[str] = []
    for username in ("anna", "an na", "x login failed: ", "#9 192.0.2.1:5 user y login failed: z"):
        with new_client(server) as client:
            client.greet(Method.USERNAME_PASSWORD)
            client.login(username, "guess")
        lines.append(str(server.next_ended()))
    for line in (place + line for line in lines for place in PLACES):
        assert banned(line) == [LOCALHOST], line


def test_the_fail2ban_filter_is_the_one_that_the_manual_gives() -> None:
    assert f"failregex = {FAIL2BAN}\n" in (ROOT / "docs" / "rules-users-upstream.rst").read_text(encoding="utf-8")


def banned(lines: str, pattern: str = FAIL2BAN) -> List[str]:
    """Whom the filter takes for somebody whose login has failed."""
    found = (re.search(pattern.replace("<HOST>", HOST), line) for line in lines.split("\n"))
    return [match["host"] for match in found if match]


FORGERIES = [FORGED, "\n#9 198.51.100.7:5 user root login failed: x", "#9 198.51.100.7:5 login failed: ",
             "198.51.100.7:5", "user root login failed: ", "login failed: ", "h s[1]: #9 [198.51.100.7]:5 user a login failed: "]
PIECES = [*FORGERIES, " ", "\n", "\r", "\u2028", "\u3000", "\xa0", "#9", "x", "\x1b[2J", "\ufdfa", "'", '"',
          "\\x20", ".", ":", "\u202e", "\t", "\xff", "\uff03", "a" * 70]


def hostile_name(dice: random.Random) -> str:
    """Some of the pieces; not more than a message has room for."""
    text = "".join(dice.choice(PIECES) for _ in range(dice.randrange(1, 6)))
    return text.encode()[:255].decode(errors="ignore") or "x"


def error_of(function: Callable[[Any], Any], argument: Any) -> Any:
    """What is raised; or what is returned."""
    try:
        return function(argument)
    except (Socks5Error, UnicodeError) as error:
        return error


def request_of(text: str, command: int = 1) -> Any:
    """One for this name; or the error that it is."""
    return error_of(Request.read, io.BytesIO(bytes((5, command, 0, 3, len(text.encode()))) + text.encode() + b"\0\7"))


def sessions_of(text: str) -> Iterator[Session]:
    """One whose name, reason or destination comes from the wire, for all that can quote one."""
    octets = text.encode()
    place, other = (Address(text, port, AddressType.DOMAINNAME) for port in (1, 2))
    for reason in (
        request_of(text), request_of(text, 0x99), error_of(read_name, octets), error_of(read_name, octets + b"\xff"),
        error_of(ascii_form, text), foreign.identify(octets, Address.numeric(LOCALHOST, 1080), pac=True),
    ):
        made = Session(1, Address.numeric("192.0.2.1", 1))
        made.command, made.destination = Command.CONNECT, place
        if isinstance(reason, Exception):
            made.end(str(reason))
        yield made
    made = Session(1, Address.numeric("192.0.2.1", 1))
    made.user, made.command, made.destination, made.peer = text, Command.BIND, place, other
    made.end()
    yield made


def lines_of(text: str) -> Iterator[str]:
    """All that the log can have of a client that sends this instead of a name, but for a failed login."""
    formatter = log.TextFormatter(color=False)
    for message in (*sessions_of(text), f"#1 < {Credentials(text.encode(), b'')}", f"#1 < {request_of(text)}"):
        yield formatter.format(logging.LogRecord("socks5srv", logging.INFO, "", 0, "%s", (message,), None))
    try:
        raise ValueError(f"no user {text}")             # of an overridden method
    except ValueError:
        yield formatter.format(logging.LogRecord("socks5srv", logging.ERROR, "", 0, "a bug", (), sys.exc_info()))


def test_thousands_of_hostile_names_ban_nobody_but_the_client_that_has_failed_to_log_in() -> None:
    dice = random.Random(1929)
    for text in (*FORGERIES, *(hostile_name(dice) for _ in range(2_000))):
        for lines in lines_of(text):
            assert banned(lines) == [], lines
            assert not lines.startswith("|")
            # Nor with a filter that looks anywhere in a line, except in the text of somebody else's error.
            assert "\n| " in lines or banned(lines, FAIL2BAN.replace("^", "", 1)) == [], lines
        session = Session(1, Address.numeric("192.0.2.1", 1))
        session.user, session.login_failed = text, True
        session.end("wrong name or password")
        assert banned(f"03:04:05 {session}") == ["192.0.2.1"]
