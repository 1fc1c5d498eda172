"""
Log lines: one a client, for people or for programs, on the screen or in a file.
"""

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
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from tests.conftest import LOCALHOST, Client, exchange
from tests.program import ROOT

from socks5srv import foreign
from socks5srv.names import ascii_form
from socks5srv.protocol import (
    Address, Command, Credentials, CredentialsReply, Method, ReplyCode, Request, Socks5Error, read_name,
)
from socks5srv.service import log
from socks5srv.service.settings import Settings
from socks5srv.session import Session

Place = Tuple[Any, ...]

CLOCK = r"\d\d:\d\d:\d\d"
CLIENT = r"127\.0\.0\.1:\d+"
OF_ALL = {"time", "event"}
OF_THE_SERVER = {"level", "message"}        # lines that tell of no client


@pytest.fixture
def visit(new_client: Callable[..., Client], echo: Place) -> Callable[..., None]:
    """Connect to the echo through a server, have five octets echoed, and leave."""
    def visit(service: Any) -> None:
        with new_client(service) as client:
            client.connect(echo)
            exchange(client)

    return visit


@pytest.fixture
def as_anna(new_client: Callable[..., Client], echo: Place) -> Callable[..., None]:
    """The same after a login, or a failed one: ``as_anna(service, "sesame")``."""
    def visit(service: Any, password: str) -> None:
        with new_client(service) as client:
            client.greet(Method.USERNAME_PASSWORD)
            if client.login("anna", password).status == CredentialsReply.SUCCESS:
                assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
                exchange(client)

    return visit


# --- text ---

def test_a_client_that_has_been_served_is_one_line(start: Callable[..., Any], visit: Callable[..., None], echo: Place) -> None:
    service = start()
    visit(service)
    line = service.wait_for("#1")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} - connect 127\.0\.0\.1:{echo[1]} ok 5 up 5 down \d\.\ds client closed", line)
    service.stop()
    listening, session, summary = service.stderr.splitlines()
    assert (" listening " in listening, session, " stopped after " in summary) == (True, line, True)


def test_a_client_that_has_not_been_served_is_one_line_with_the_reason(
    start: Callable[..., Any], new_client: Callable[..., Client], refusing: Callable[..., Place],
) -> None:
    service, (host, port) = start(), refusing()
    with new_client(service) as client:
        client.ask(Command.CONNECT, (host, port))
    line = service.wait_for("#1")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} - connect {host}:{port} failed\(05\) .*refused", line)


def test_a_failed_login_is_one_line_that_other_programs_can_watch_for(start: Callable[..., Any], as_anna: Callable[..., None]) -> None:
    service = start("-u", "anna:sesame")
    as_anna(service, "guess")
    line = service.wait_for("#1")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} anna - - login-failed wrong name or password", line)


def test_a_client_that_speaks_something_else_is_told_of_in_words(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start()
    with new_client(service) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
        client.rest()
    assert "bad-protocol this is HTTP: use socks5h://" in service.wait_for("#1")


def test_verbose_tells_also_when_a_client_is_connected(start: Callable[..., Any], new_client: Callable[..., Client], echo: Place) -> None:
    service = start("-v")
    client = new_client(service)
    client.connect(echo)
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} - connect 127\.0\.0\.1:{echo[1]} open", service.wait_for("#1"))
    client.close()
    service.wait_for(" ok ")


def test_more_verbose_tells_every_message_but_no_password(start: Callable[..., Any], as_anna: Callable[..., None], echo: Place) -> None:
    service = start("-vv", "-u", "anna:sesame", "-u", "ben", SOCKS5SRV_PASSWORD="from outside")
    as_anna(service, "sesame")
    as_anna(service, "guess")
    service.wait_for("login-failed")
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
    for password in ("sesame", "guess", "from outside"):
        assert password not in service.stderr


@pytest.mark.parametrize("words", ["", "-v", "-vv", "--log-format json", "-vv --log-format json"])
def test_no_password_is_in_any_log(words: str, start: Callable[..., Any], as_anna: Callable[..., None]) -> None:
    service = start("-u", "anna:sesame", *words.split())
    as_anna(service, "sesame")
    as_anna(service, "guess")
    service.wait_until(lambda: "login" in service.stderr and ("#2" in service.stderr or '"id": 2' in service.stderr), "both")
    service.stop()
    assert "anna" in service.stderr
    assert "sesame" not in service.stderr
    assert "guess" not in service.stderr
    assert "Traceback" not in service.stderr


def test_quiet_says_nothing(start: Callable[..., Any], visit: Callable[..., None]) -> None:
    service = start("-q")
    visit(service)
    assert service.stop() == 0
    assert service.stderr == ""


def test_quiet_wins_over_verbose(start: Callable[..., Any], visit: Callable[..., None]) -> None:
    service = start("-q", "-vv")
    visit(service)
    service.stop()
    assert service.stderr == ""


# --- JSON ---

def objects(text: str) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_a_line_from_the_first_to_the_last(
    start: Callable[..., Any], visit: Callable[..., None], new_client: Callable[..., Client], refusing: Callable[..., Place], echo: Place,
) -> None:
    service = start("--log-format", "json")
    visit(service)
    service.wait_until(lambda: '"id": 1' in service.stderr, "the first session")
    with new_client(service) as client:
        client.ask(Command.CONNECT, refusing())
    service.wait_until(lambda: '"id": 2' in service.stderr, "the second session")
    service.stop()
    listening, closed, failed, stop = objects(service.stderr)

    assert listening.keys() == OF_ALL | OF_THE_SERVER | {"urls", "auth", "commands", "pid"}
    assert (listening["event"], listening["auth"]) == ("listening", "none")
    assert listening["urls"] == [f"socks5h://127.0.0.1:{service.port}"]
    assert listening["commands"] == ["connect", "bind", "udp"]
    assert listening["pid"] == service.process.pid

    for line, id in ((closed, 1), (failed, 2)):
        assert line.keys() == Session(1, Address.numeric("192.0.2.1", 9)).as_dict().keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert (line["id"], line["command"], line["host"], line["user"]) == (id, "connect", "127.0.0.1", "")
        assert re.fullmatch(CLIENT, line["client"])
    assert (closed["event"], closed["reply"], closed["reason"]) == ("close", 0, "client closed")
    assert (closed["up"], closed["down"], closed["port"], closed["peer"]) == (5, 5, echo[1], f"127.0.0.1:{echo[1]}")
    assert (failed["event"], failed["reply"], failed["peer"]) == ("failed", 5, None)

    assert stop.keys() == OF_ALL | OF_THE_SERVER | {
        "seconds", "sessions", "events", "clients", "targets", "up", "down", "most_at_once",
    }
    assert (stop["event"], stop["sessions"], stop["events"]) == ("stop", 2, {"close": 1, "failed": 1})
    assert (stop["clients"], stop["targets"], stop["up"], stop["down"], stop["most_at_once"]) == (1, 1, 5, 5, 1)


def test_json_has_an_opening_line_too_if_that_is_wanted(start: Callable[..., Any], visit: Callable[..., None]) -> None:
    service = start("--log-format", "json", "-v")
    visit(service)
    service.wait_for('"close"')
    service.stop()
    _listening, opened, closed, _stop = objects(service.stderr)
    assert (opened["event"], opened["reply"], opened["seconds"]) == ("open", 0, None)
    assert (opened["id"], closed["event"]) == (closed["id"], "close")


def test_json_has_messages_too_if_they_are_wanted(start: Callable[..., Any], visit: Callable[..., None]) -> None:
    service = start("--log-format", "json", "-vv")
    visit(service)
    service.wait_for('"close"')
    service.stop()
    messages = [line for line in objects(service.stderr) if line["event"] == "log"]
    assert messages[0].keys() == OF_ALL | OF_THE_SERVER
    assert (messages[0]["level"], messages[0]["message"][:15]) == ("debug", "#1 < Greeting V")


def test_json_at_a_terminal_is_json_only(at_terminal: Callable[..., Any]) -> None:
    terminal = at_terminal("--log-format", "json", "0")
    terminal.wait_for('"listening"')
    terminal.type("\x03")
    code, text = terminal.end()
    assert code == 0
    assert [line["event"] for line in objects(text.replace("^C", ""))] == ["listening", "stop"]


def test_json_keeps_the_text_of_a_bug_in_one_line() -> None:
    record = logging.LogRecord("socks5srv", logging.ERROR, __file__, 1, "a bug, met while %s", ("testing",), caught())
    text = log.JsonFormatter().format(record)
    assert "\n" not in text
    facts = json.loads(text)
    assert (facts["event"], facts["level"], facts["message"]) == ("log", "error", "a bug, met while testing")
    assert facts["traceback"].endswith("ZeroDivisionError: division by zero")


def caught() -> Any:
    try:
        return 1 / 0
    except ZeroDivisionError as error:
        return type(error), error, error.__traceback__


# --- names from the wire ---

HOSTILE = "a\x1b[2Jb\nc\r#2 \u202ed\x00\u2028e\x9b"
ESCAPED = r"a\x1b[2Jb\nc\r#2 \u202ed\x00\u2028e\x9b"


def hostile_session() -> Session:
    session = Session(1, Address.numeric("192.0.2.1", 40000))
    session.user, session.reason = HOSTILE, HOSTILE
    session.command, session.destination = Command.CONNECT, Address.named(HOSTILE, 80)
    session.peer, session.reply = Address.numeric("192.0.2.2", 80), ReplyCode.GENERAL_FAILURE
    session.end()
    return session


def record_of(session: Session) -> logging.LogRecord:
    record = logging.LogRecord("socks5srv", logging.INFO, __file__, 1, "%s", (session,), None)
    record.session = session
    return record


def test_a_hostile_name_is_escaped_in_a_line_for_people() -> None:
    text = log.TextFormatter(color=False).format(record_of(hostile_session()))
    assert text.isprintable()
    assert text.replace("\\x20", " ").count(ESCAPED) == 3


def test_a_hostile_name_stays_in_its_line_and_its_string_for_programs() -> None:
    text = log.JsonFormatter().format(record_of(hostile_session()))
    assert "\n" not in text
    assert "\x1b" not in text
    facts = json.loads(text)
    assert (facts["user"], facts["host"], facts["reason"]) == (HOSTILE, HOSTILE, HOSTILE)


def test_a_hostile_name_does_nothing_to_a_terminal_that_json_is_shown_at() -> None:
    assert log.JsonFormatter().format(record_of(hostile_session())).isprintable()


@pytest.mark.parametrize("words", ["", "-vv"])
def test_a_hostile_user_cannot_forge_a_line(words: str, start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start("-u", "anna:sesame", *words.split())
    with new_client(service) as client:
        client.greet(Method.USERNAME_PASSWORD)
        client.login("x\n00:00:00 #7 192.0.2.1:1 anna - - login-failed\x1b[2J\u202e\x9b", "guess")
    line = service.wait_for("wrong name or password")
    assert re.fullmatch(rf"{CLOCK} #1 {CLIENT} x\\n00:00:00\S+ - - login-failed wrong name or password", line)
    service.stop()
    assert all(line.isprintable() for line in service.stderr.split("\n"))
    assert not any(line.startswith("00:00:00 #7") for line in service.stderr.splitlines())


FORGED = "x #9 198.51.100.7:5 root - - login-failed x"


def test_blanks_from_the_wire_are_escaped_in_every_line_that_quotes_them(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    """A name that cannot exist, a user's before the login, and what the status page is asked for."""
    service = start("-vv", "-u", "anna:sesame", "--status", "0")
    page = service.wait_for("status=").split("status=")[1]
    host, port = re.findall(r"//([0-9.]+):(\d+)/", page)[0]
    for path in (f"/{FORGED}", f"/{FORGED}\t", "/status.json"):
        with new_client((host, int(port))) as client:
            client.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            client.rest()
    for username, password in ((FORGED, "guess"), ("anna", "sesame")):
        with new_client(service) as client:
            client.greet(Method.USERNAME_PASSWORD)
            client.login(username, password)
            client.send(b"\x05\x01\x00\x03" + bytes([len(FORGED)]) + FORGED.encode() + b"\x00\x50")
            client.rest()
    service.wait_for("failed(04)")
    service.stop()
    assert service.stderr.count("198.51.100.7:5") >= 4
    assert " 198.51.100.7" not in service.stderr
    assert "GET\\x20/status.json\\x20HTTP/1.0" in service.stderr


@pytest.mark.parametrize("name", [b"a\x1b[2J.example", b"a\n.example", b"a\xff\xfe", b"a b.example"])
def test_a_name_that_cannot_exist_is_refused_and_escaped(
    name: bytes, start: Callable[..., Any], new_client: Callable[..., Client],
) -> None:
    service = start("-vv")
    with new_client(service) as client:
        client.greet(Method.NO_AUTHENTICATION_REQUIRED)
        client.send(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + b"\x00\x50")
        client.rest()
    assert "failed(04) a name that" in service.wait_for("failed(04)")
    service.stop()
    assert all(line.isprintable() for line in service.stderr.split("\n"))


# --- where it goes ---

def test_a_log_file_has_the_lines_instead_of_the_screen(start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "proxy.log"
    file.write_text("of yesterday\n")
    service = start("--log-file", str(file))
    visit(service)
    service.wait_until(lambda: "#1" in file.read_text(), "the line in the file")
    service.stop()
    yesterday, listening, session, stopped = file.read_text().splitlines()
    assert yesterday == "of yesterday"
    assert (" listening " in listening, " #1 " in session, " stopped after " in stopped) == (True, True, True)
    assert service.stderr == ""


def test_a_log_file_has_no_colors(start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "proxy.log"
    service = start("-v", "--color", "always", "--log-file", str(file))
    visit(service)
    service.stop()
    assert "#1" in file.read_text()
    assert "\x1b" not in file.read_text()


def test_at_a_terminal_a_log_file_leaves_the_banner_on_the_screen(at_terminal: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "proxy.log"
    terminal = at_terminal("--log-file", str(file), "0")
    terminal.wait_for("Ctrl-C stops")
    terminal.type("\x03")
    code, text = terminal.end()
    assert code == 0
    assert "listening" not in text
    assert " listening " in file.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_file_that_is_full_is_told_once_and_serving_goes_on(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place, processes: int,
) -> None:
    service = start("-v", "--log-file", "/dev/full")
    for _ in range(3):
        new_client(service).connect(echo)
    assert service.stop() == 0
    assert 1 <= service.stderr.count("the log cannot be written: ") <= processes
    assert "Traceback" not in service.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stderr_that_cannot_be_written_does_not_keep_it_from_serving(
    start: Callable[..., Any], new_client: Callable[..., Client], echo: Place,
) -> None:
    service = start("-v", command=("sh", "-c", 'exec "$@" 2>/dev/full', "sh", sys.executable, "-m", "socks5srv"))
    new_client(service).connect(echo)
    assert service.stop() in (0, 120)       # 120: Python could not write the rest when it ended


# --- a file that is put aside, as logrotate does ---

needs_posix = pytest.mark.skipif(os.name != "posix", reason="not on this platform: a file that is open cannot be renamed, and there is one process")
processes_too = pytest.mark.parametrize("words", [(), ("--workers", "2")], ids=["one process", "two workers"])

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
    words: Tuple[str, ...], start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path,
) -> None:
    file, aside = tmp_path / "proxy.log", [tmp_path / f"proxy.log.{number}" for number in range(3)]
    service = start(*words, "--log-file", str(file))
    for number, old in enumerate(aside):
        for _ in range(10):
            visit(service)
        service.wait_until(lambda number=number: max(ids(file), default=0) == 10 * (number + 1) and len(ids(file)) == 10, "ten lines")
        file.rename(old)
    visit(service)
    service.wait_until(lambda: ids(file) == [31], "the line in the new file")
    assert service.stop() == 0
    assert [sorted(ids(old)) for old in aside] == [list(range(1, 11)), list(range(11, 21)), list(range(21, 31))]
    assert "stopped after" in file.read_text()
    assert service.stderr == ""


@needs_posix
def test_no_line_is_lost_or_doubled_while_files_are_put_aside(start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path) -> None:
    file, aside = tmp_path / "proxy.log", []
    service = start("--log-file", str(file))
    for number in range(40):
        visit(service)
        if file.exists():
            aside.append(tmp_path / f"proxy.log.{number}")
            file.rename(aside[-1])
    assert service.stop() == 0
    assert sorted(id for old in [*aside, file] for id in ids(old)) == list(range(1, 41))


@needs_posix
@processes_too
def test_sighup_opens_the_log_file_afresh_at_once(words: Tuple[str, ...], start: Callable[..., Any], tmp_path: Path) -> None:
    file, old = tmp_path / "proxy.log", tmp_path / "proxy.log.1"
    service = start(*words, "--log-file", str(file))
    file.rename(old)
    service.process.send_signal(signal.SIGHUP)
    service.wait_until(file.exists, "the new file")
    if os.path.isdir("/proc/self/fd"):
        service.wait_until(lambda: str(old) not in open_files(service.process.pid), "the end of the old file, in all processes")
        assert str(file) in open_files(service.process.pid)
    assert service.stop() == 0
    assert "stopped after" in file.read_text()


def open_files(pid: int) -> List[str]:
    """What the descriptors of a process, and of those that it has started, lead to."""
    found = []
    for each in [pid, *children(pid)]:
        for fd in os.listdir(f"/proc/{each}/fd"):
            try:
                found.append(os.readlink(f"/proc/{each}/fd/{fd}"))
            except OSError:         # closed meanwhile
                pass
    return found


def children(pid: int) -> List[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@needs_posix
def test_a_log_file_that_is_copied_and_emptied_is_written_from_its_beginning(
    start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path,
) -> None:
    file = tmp_path / "proxy.log"
    service = start("--log-file", str(file))
    visit(service)
    service.wait_until(lambda: ids(file) == [1], "the first line")
    os.truncate(str(file), 0)
    visit(service)
    service.wait_until(lambda: ids(file) == [2], "the second line")
    assert re.match(r"\d{4}-", file.read_text())


@needs_posix
def test_a_log_file_that_cannot_be_opened_afresh_goes_on_in_the_old_one_and_is_told_once(
    start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path, processes: int,
) -> None:
    folder, aside = tmp_path / "log", tmp_path / "aside"
    folder.mkdir()
    service = start("--log-file", str(folder / "proxy.log"))
    folder.rename(aside)
    for _ in range(3):
        visit(service)
    service.wait_until(lambda: sorted(ids(aside / "proxy.log")) == [1, 2, 3], "the lines in the old file")
    service.wait_for("goes on in the old file")
    assert service.stderr.count("cannot be opened afresh: ") <= processes
    folder.mkdir()
    visit(service)
    service.wait_until(lambda: ids(folder / "proxy.log") == [4], "the line in the new file")
    assert service.stop() == 0
    assert "Traceback" not in service.stderr


@needs_posix
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="not on this platform: /dev/full"))])
def test_with_neither_a_log_nor_a_stderr_it_serves_on(
    full: bool, start: Callable[..., Any], visit: Callable[..., None], tmp_path: Path,
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    file = "/dev/full" if full else str(folder / "proxy.log")
    service = start("--log-file", file, command=(sys.executable, "-c", WITHOUT_READER, sys.executable, "-m", "socks5srv"))
    folder.rename(tmp_path / "aside")
    service.process.send_signal(signal.SIGHUP)
    for _ in range(3):
        visit(service)
    assert service.stop() == 0


@pytest.mark.usefixtures("_logger_as_before")
def test_nothing_that_goes_wrong_with_the_file_comes_out_of_the_call_that_logs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    def fail(*_arguments: Any, **_keywords: Any) -> Any:
        raise PermissionError("not yours")

    log.set_up(Settings(log_file=str(tmp_path / "log")))
    logger = logging.getLogger("socks5srv")
    monkeypatch.setattr(sys, "stderr", Closed())
    with monkeypatch.context() as patch:
        patch.setattr(log.os, "stat", fail)
        logger.info("first")
        log.reopen()
    (tmp_path / "log").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(log.File, "_open", fail)
        logger.info("second")
    assert not (tmp_path / "log").exists()
    logger.info("third")
    assert (tmp_path / "log").read_text().endswith("third\n")


# --- color ---

class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Exactly these variables, of those that count for colors: ``variables("NO_COLOR=1 TERM=dumb")``."""
    def set_to(text: str) -> None:
        for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for assignment in text.split():
            monkeypatch.setenv(*assignment.split("="))

    return set_to


@pytest.mark.skipif(os.name == "nt", reason="there they come only if asked for")
@pytest.mark.parametrize(("when", "terminal", "text", "wanted"), [
    ("auto", True, "TERM=xterm", True),
    ("auto", True, "", True),
    ("auto", False, "TERM=xterm", False),
    ("auto", True, "TERM=dumb", False),
    ("auto", True, "TERM=xterm NO_COLOR=1", False),
    ("auto", True, "TERM=xterm NO_COLOR=", True),
    ("auto", False, "FORCE_COLOR=1", True),
    ("auto", True, "NO_COLOR=1 FORCE_COLOR=1", False),
    ("always", False, "NO_COLOR=1 TERM=dumb", True),
    ("never", True, "FORCE_COLOR=1", False),
])
def test_colors_come_where_they_are_wanted(
    when: str, terminal: bool, text: str, wanted: bool, variables: Callable[[str], None],
) -> None:
    variables(text)
    assert log.wants_color(when, Screen(terminal)) is wanted


def test_a_failure_is_red_and_a_success_as_it_is(
    start: Callable[..., Any], visit: Callable[..., None], new_client: Callable[..., Client], refusing: Callable[..., Place],
) -> None:
    service = start("--color", "always")
    visit(service)
    service.wait_for("#1")
    with new_client(service) as client:
        client.ask(Command.CONNECT, refusing())
    assert re.fullmatch(r"\x1b\[31m.*failed\(05\).*\x1b\[0m", service.wait_for("#2"))
    with new_client(service) as client:
        client.greet(Method.USERNAME_PASSWORD)
    assert re.fullmatch(r"\x1b\[31m.*no-acceptable-method .*start with -u NAME.*\x1b\[0m", service.wait_for("#3"))
    assert "\x1b" not in service.wait_for("#1")


def test_without_a_terminal_there_are_no_colors(start: Callable[..., Any], new_client: Callable[..., Client]) -> None:
    service = start()
    with new_client(service) as client:
        client.send(b"GET")
    assert "\x1b" not in service.wait_for("#1")


@pytest.mark.parametrize(("variables", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_at_a_terminal_there_are_colors_unless_unwanted(
    variables: Dict[str, str], colored: bool, at_terminal: Callable[..., Any], new_client: Callable[..., Client], refusing: Callable[..., Place],
) -> None:
    terminal = at_terminal("0", **variables)
    port = int(re.findall(r"socks5h://127\.0\.0\.1:(\d+)", terminal.wait_for("Ctrl-C stops"))[0])
    with new_client(("127.0.0.1", port)) as client:
        client.ask(Command.CONNECT, refusing())
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
def test_the_options_set_levels_of_our_own_loggers_only(quiet: bool, verbose: int, level: int, wire: bool, tmp_path: Path) -> None:
    root = logging.getLogger().level
    log.set_up(Settings(log_file=str(tmp_path / "log"), quiet=quiet, verbose=verbose))
    assert logging.getLogger("socks5srv").level == level
    assert logging.getLogger("socks5srv").isEnabledFor(logging.ERROR), "errors are always told"
    if not quiet:
        assert logging.getLogger("socks5srv.wire").isEnabledFor(logging.DEBUG) is wire
    assert logging.getLogger().level == root


def test_a_request_is_shown_as_the_rfc_names_its_fields() -> None:
    request = Request(Command.CONNECT, Address.named("example.com", 80))
    assert str(request) == "Request VER=5 CMD=CONNECT RSV=00 ATYP=DOMAINNAME DST.ADDR=example.com DST.PORT=80"


# --- what a log watcher sees ---

# As README.rst gives it to fail2ban, which puts a pattern for addresses in place of <HOST>.
FAIL2BAN = r"^\s*(?:\S+ \S+\[\d+\]: )?[-:\d ]*#\d+ \[?<HOST>\]?:\d+ \S+ - - login-failed "
HOST = r"(?P<host>[\w.:^-]*\w)"      # as fail2ban has it, or wider
PLACES = ("2026-01-02 03:04:05 ", " ", "", "03:04:05 ", "host socks5srv[17]: 03:04:05 ")      # a file, and without its date; a terminal; the journal


def test_the_documented_fail2ban_filter_finds_the_address_of_a_failed_login(start_server: Any, new_client: Any) -> None:
    server = start_server(users={"anna": "sesame"})
    lines: List[str] = []
    for username in ("anna", "an na", "x - - login-failed", "#9 192.0.2.1:5 y - - login-failed z"):
        with new_client(server) as client:
            client.greet(Method.USERNAME_PASSWORD)
            client.login(username, "guess")
        lines.append(str(server.next_ended()))
    for line in (place + line for line in lines for place in PLACES):
        assert banned(line) == [LOCALHOST], line


def test_the_fail2ban_filter_is_the_one_that_the_manual_gives() -> None:
    assert f"failregex = {FAIL2BAN}\n" in (ROOT / "README.rst").read_text(encoding="utf-8")


def banned(lines: str, pattern: str = FAIL2BAN) -> List[str]:
    """Whom the filter takes for somebody whose login has failed."""
    found = (re.search(pattern.replace("<HOST>", HOST), line) for line in lines.split("\n"))
    return [match["host"] for match in found if match]


FORGERIES = [FORGED, "\n#9 198.51.100.7:5 root - - login-failed x", "#9 198.51.100.7:5 root - - login-failed ",
          "198.51.100.7:5", "root - - login-failed ", "- - login-failed ", "h s[1]: #9 [198.51.100.7]:5 a - - login-failed "]
PIECES = [*FORGERIES, " ", "\n", "\r", "\u2028", "\u3000", "\xa0", "#9", "x", "\x1b[2J", "\ufdfa", "'", '"', "\\x20", ".", ":", "\u202e", "\t", "\xff", "\uff03", "a" * 70]


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


def sessions_of(text: str) -> Iterator[Session]:
    """One whose name, reason or destination comes from the wire, for all that can quote one."""
    address = bytes((len(text.encode()),)) + text.encode() + b"\0\7"
    request = b"\5\1\0\3" + address, b"\5\x99\0\3" + address
    for reason in (
        *(error_of(Request.read, io.BytesIO(octets)) for octets in request), error_of(read_name, text.encode()), error_of(read_name, text.encode() + b"\xff"),
        error_of(ascii_form, text), error_of(lambda octets: foreign.identify(octets, Address.numeric(LOCALHOST, 1080), pac=True), text.encode()),
    ):
        made = Session(1, Address.numeric("192.0.2.1", 1))
        made.command, made.destination = Command.CONNECT, Address.named(text, 1)
        if isinstance(reason, Exception):
            made.end(str(reason))
        yield made
    made = Session(1, Address.numeric("192.0.2.1", 1))
    made.user, made.command, made.destination, made.peer = text, Command.BIND, Address.named(text, 1), Address.named(text, 2)
    made.end()
    yield made


def lines_of(text: str) -> Iterator[str]:
    """All that the log can have of a client that sends this instead of a name, but for a failed login."""
    formatter = log.TextFormatter(color=False)
    request = error_of(Request.read, io.BytesIO(b"\5\1\0\3" + bytes((len(text.encode()),)) + text.encode() + b"\0\7"))
    for message in (*sessions_of(text), f"#1 < {Credentials(text.encode(), b'')}", f"#1 < {request}"):
        yield formatter.format(logging.LogRecord("socks5srv", logging.INFO, "", 0, "%s", (message,), None))
    try:
        raise ValueError(f"no user {text}")             # of an overridden method
    except ValueError:
        yield formatter.format(logging.LogRecord("socks5srv", logging.ERROR, "", 0, "a bug", (), sys.exc_info()))


def test_ten_thousand_hostile_names_ban_nobody_but_the_client_that_has_failed_to_log_in() -> None:
    dice = random.Random(1929)
    for text in (*FORGERIES, *(hostile_name(dice) for _ in range(10_000))):
        for lines in lines_of(text):
            assert banned(lines) == [], lines
            assert not lines.startswith("|")
            # Nor with a filter that looks anywhere in a line, except in the text of somebody else's error.
            assert "\n| " in lines or banned(lines, FAIL2BAN.replace("^", "", 1)) == [], lines
        session = Session(1, Address.numeric("192.0.2.1", 1))
        session.user, session.login_failed = text, True
        session.end("wrong name or password")
        assert banned(f"03:04:05 {session}") == ["192.0.2.1"]
