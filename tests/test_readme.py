"""
What the README promises: its commands, snippets, tables and pictures, compared with what is there.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from inspect import getdoc, signature
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import pytest

from socks5srv import Socks5Handler, Socks5Server, testing
from socks5srv.protocol import Address, AddressType, Command, ReplyCode, Request
from socks5srv.cli.banner import banner, listening
from socks5srv.cli.options import build_parser, parse
from socks5srv.explain.reasons import about_request
from socks5srv.explain.tables import explanation
from socks5srv.service.summary import Summary
from socks5srv.session import Session
from socks5srv.testing import faults

from .conftest import TIMEOUT
from .test_layout import ABOVE, MODULES, name_of, ours, room_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "socks5srv"
README = (ROOT / "README.rst").read_text(encoding="utf-8")

SETUP_AND_TESTS = 'python3 -m venv .venv && .venv/bin/python -m pip install -q -e ".[test]" && .venv/bin/python -m pytest -n 4'


def blocks(language: str, text: str = README) -> List[str]:
    """What stands in the code blocks of this language, without its indentation."""
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:   .*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    _before, _title, after = README.partition(f"\n{title}\n{'-' * len(title)}\n")
    assert after, f"there is no section {title!r}"
    return re.split(r"^.+\n-{4,}$", after, flags=re.MULTILINE)[0]


def table(heading: str, text: str) -> List[List[str]]:
    """The rows of the table whose first heading is this one, each a list of its cells."""
    for rows in re.findall(r"^\.\. list-table::\n(?:   :.*\n)+\n((?:   .*\n)+)", text, re.MULTILINE):
        cells = [re.split(r"^     - ", row, flags=re.MULTILINE) for row in re.split(r"^   \* - ", rows, flags=re.MULTILINE)[1:]]
        if cells[0][0].strip() == heading:
            return [[" ".join(cell.split()) for cell in row] for row in cells[1:]]
    raise AssertionError(f"there is no table that begins with {heading!r}")


def literals(text: str) -> List[str]:
    return re.findall(r"``([^`]+)``", text)


# --- commands ---

def test_there_are_two_commands_and_the_second_one_can_be_found_by_a_program() -> None:
    assert blocks("console", section("Two commands")) == ["$ python3 -m socks5srv\n", f"$ {SETUP_AND_TESTS}\n"]
    assert re.search(
        r"^This one passes the tests.*\n\n\.\. code-block:: console\n\n   \$ " + re.escape(SETUP_AND_TESTS) + r"$",
        section("Two commands"), re.MULTILINE,
    )


def test_every_server_command_is_one_that_the_parser_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", "sesame")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users").touch(0o600)
    commands = [line for block in blocks("console") for line in block.splitlines() if line.split()[:4] == ["$", "python3", "-m", "socks5srv"]]
    assert len(commands) >= 2
    for command in commands:
        parse(command.split()[4:])


def test_the_terminal_session_shows_what_is_really_printed() -> None:
    first, second, third = blocks("text")[:3]
    command, _, shown = first.partition("\n")
    assert command == "$ python3 -m socks5srv"
    version = re.compile(r"socks5srv \d+\.\d+\.\d+")
    assert version.sub("", shown.rstrip()) == version.sub("", banner([Address.numeric("127.0.0.1", 1080)], None))
    assert second.startswith("$ curl -x socks5h://127.0.0.1:1080 http://localhost:8000/")

    session = Session(1, Address.numeric("127.0.0.1", 33524))
    session.user, session.command, session.reply = "", Command.CONNECT, ReplyCode.SUCCEEDED
    session.destination, session.peer = Address.named("localhost", 8000), Address.numeric("127.0.0.1", 8000)
    session.up, session.down = 87, 213
    session.end("target closed")
    session.seconds = 0.0
    summary = Summary()
    summary.peak = 1
    summary.ended(session)
    summary.since -= 41
    lines = [re.sub(r"^(\^C)?\d\d:\d\d:\d\d ", "", line) for line in third.splitlines()]
    assert lines == [str(session), *summary.text().splitlines()]


def test_the_table_of_a_message_is_the_one_that_is_printed() -> None:
    (shown,) = blocks("text", section("Every message explained"))
    request = Request(Command.CONNECT, Address("localhost", 8000, AddressType.DOMAINNAME))
    found = explanation(request)
    found.session, found.number, found.at = 1, "3", 0.0006
    found.remarks += about_request(request, by_upstream=False)
    assert shown == f"{found}\n"


def test_the_names_in_the_json_of_a_message_are_told() -> None:
    told = set(literals(section("JSON log").partition("With ``--explain``")[2]))
    found = explanation(Request(Command.CONNECT, Address("localhost", 8000, AddressType.DOMAINNAME))).as_dict()
    (row, *_others) = found["fields"]
    assert {*found, *row, *row["meanings"][0]} <= told


# --- snippets ---

@pytest.mark.parametrize(("number", "passed"), [(0, "1 passed"), (1, "1 passed"), (2, "9 passed")])
def test_the_tests_in_the_readme_pass(tmp_path: Path, number: int, passed: str) -> None:
    pytest.importorskip("requests")
    pytest.importorskip("socks")
    (tmp_path / "test_mine.py").write_text(blocks("python", section("In your tests"))[number])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "socks5srv.testing.pytest_plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=30, text=True, check=False,
    )
    assert passed in done.stdout, done.stdout + done.stderr


def test_the_first_test_takes_six_lines() -> None:
    assert "\nSix lines, with pytest." in section("In your tests")
    assert len(blocks("python", section("In your tests"))[0].splitlines()) == 6


def test_the_script_in_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    served: List[Socks5Server] = []
    monkeypatch.setattr(Socks5Server, "serve_forever", lambda self: served.append(self))
    (snippet,) = blocks("python", section("In your script"))
    names: Dict[str, Any] = {}
    exec(compile(snippet.replace("1080", "0"), "README.rst", "exec"), names)
    assert [(server.RequestHandlerClass, server.users.passwords) for server in served] == [(names["Office"], {"anna": "sesame"})]


def test_all_snippets_are_python_38() -> None:
    snippets = blocks("python")
    assert len(snippets) == 4
    for snippet in snippets:
        ast.parse(snippet, feature_version=(3, 8))


# --- tables ---

def test_the_table_of_options_has_exactly_those_of_the_parser() -> None:
    documented: Set[str] = set()
    for option, _meaning in table("Option", section("Options")):
        documented.update(literal.split()[0] for literal in literals(option) if literal.startswith("-"))
    assert documented == {option for action in build_parser()._actions for option in action.option_strings}


def test_the_table_of_options_names_their_values_as_the_help_does() -> None:
    documented = {
        literal.split()[0]: literal.partition(" ")[2]
        for option, _meaning in table("Option", section("Options")) for literal in literals(option) if literal.startswith("-")
    }
    for action in build_parser()._actions:
        for option in action.option_strings:
            value = "|".join(action.choices) if action.choices else action.metavar or action.dest.upper()
            assert documented[option] == ("" if action.nargs == 0 else value)


@pytest.mark.parametrize("name", ["handshake", "connect", "bind"])
def test_the_table_of_options_tells_the_real_defaults(name: str) -> None:
    (meaning,) = [meaning for option, meaning in table("Option", section("Options")) if f"--{name}-timeout" in option]
    assert meaning.endswith(f"({getattr(Socks5Server, name + '_timeout')})")


def test_the_table_of_exit_codes_is_that_of_the_help() -> None:
    codes = [code for code, _meaning in table("Exit code", section("Options"))]
    found = re.search(r"Exit codes: (.+)\.", build_parser().epilog or "")
    assert found
    assert codes == re.findall(r"\b\d+\b", found.group(1))


def test_the_table_of_json_fields_has_exactly_those_of_a_session() -> None:
    fields = [literals(field)[0] for field, _meaning in table("Field", section("JSON log"))]
    assert fields == list(Session(1, Address.numeric("127.0.0.1", 1080)).as_dict())


def test_the_table_of_json_fields_has_every_event() -> None:
    (meaning,) = [meaning for field, meaning in table("Field", section("JSON log")) if field == "``event``"]
    assert set(literals(meaning)) - {"-v"} == set(re.findall(r"``(\w+)``", Session.__doc__ or ""))


def test_the_fields_of_the_first_and_the_last_line_are_told() -> None:
    told = set(literals(section("JSON log")))
    assert set(listening([], None, frozenset())) <= told
    assert set(Summary().facts()) <= told


def test_the_table_of_hooks_is_that_of_the_handler() -> None:
    documented = [literals(method)[0] for method, _called in table("Method", section("In your script"))]
    assert documented == re.findall(r"^- (\w+\(.*\))$", getdoc(Socks5Handler) or "", re.MULTILINE)
    for method in documented:
        name, _, arguments = method.rstrip(")").partition("(")
        assert ", ".join(list(signature(getattr(Socks5Handler, name)).parameters)[1:]) == arguments


def test_the_table_of_settings_is_right() -> None:
    documented = {literals(name)[0]: default for name, default, _meaning in table("Attribute", section("In your script"))}
    with Socks5Server(("127.0.0.1", 0)) as server:
        for name, default in documented.items():
            if name not in ("commands", "route"):
                assert repr(getattr(server, name)) == literals(default)[0]
        assert server.commands == frozenset(Command)
        assert repr(server.route) == repr(type(server.route)())


def test_the_table_of_fixtures_has_those_of_the_plugin() -> None:
    documented = {literals(name)[0] for name, _what in table("Fixture", section("In your tests"))}
    plugin = (PACKAGE / "testing" / "pytest_plugin.py").read_text(encoding="utf-8")
    assert documented == set(re.findall(r"^@pytest.fixture\ndef (\w+)", plugin, re.MULTILINE))


def test_the_table_of_keywords_has_those_of_start() -> None:
    documented = [keyword for keywords, _meaning in table("Keyword", section("In your tests")) for keyword in literals(keywords)]
    assert documented == [name for name in signature(testing.start).parameters if name != "settings"]


def test_the_table_of_the_proxy_has_what_it_has() -> None:
    rows = table("Proxy", section("In your tests"))
    with testing.start() as proxy:
        for name, _what in rows:
            assert hasattr(proxy, literals(name)[0].rstrip("()"))
    told = set(re.findall(r"\w+", " ".join(literals(section("In your tests")))))
    internal = {"add", "tell", "keep", "keeping_bugs", "place_of", "may_be_reached", "check", "close", "report"}
    assert {name for name in vars(testing.Proxy) if not name.startswith("_")} - internal <= told


def test_the_table_of_faults_has_all_of_them() -> None:
    documented = [literals(name)[0].partition("(")[0] for name, _what in table("Fault", section("In your tests"))]
    kinds = [name for name in faults.__all__ if isinstance(getattr(faults, name), type) and issubclass(getattr(faults, name), faults.Fault)]
    assert sorted([*documented, "Fault"]) == sorted(kinds)


# --- the house ---

BESIDE = {"testing", "check"}       # at no floor


def reading_order() -> List[Tuple[str, int, int]]:
    return [(literals(file)[0], int(lines), int(minutes)) for file, lines, minutes, _what in table("File", section("In your class"))]


def test_the_reading_order_has_every_room_of_the_protocol_once() -> None:
    rooms = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert sorted(file for file, _lines, _minutes in reading_order()) == sorted([*rooms, *(f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py"))])


@pytest.mark.parametrize(("file", "lines", "minutes"), reading_order())
def test_the_line_counts_are_about_right_and_the_minutes_go_with_them(file: str, lines: int, minutes: int) -> None:
    files = (PACKAGE / file).glob("*.py") if file.endswith("/") else [PACKAGE / file]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) == pytest.approx(lines, rel=0.12)
    assert 12 <= lines / minutes <= 30


def test_no_room_imports_from_a_floor_above() -> None:
    (picture,) = [block for block in blocks("text") if "service/" in block]
    floors: List[List[str]] = [[]]
    for line in picture.splitlines():
        if line.startswith("+"):
            floors.append([])
        floors[-1] += re.findall(r"\b(\w+)(?:\.py|/) ", line)
    height = {room: floor for floor, rooms in enumerate(reversed(floors)) for room in rooms}
    assert set(height) == {room_of(name_of(path)) for path in MODULES} - {"__main__", ""}
    for path in MODULES:
        room = room_of(name_of(path))
        for imported in {room_of(name) for name in ours(path)} - {room}:
            if room in height and room not in BESIDE:
                assert height[imported] <= height[room], f"{room} imports {imported}"
                assert not (imported in ABOVE and height[imported] == height[room]), f"{room} imports {imported} beside it"


# --- what else it says ---

@pytest.mark.parametrize("target", sorted(set(re.findall(r"<([^`>:]+)>`_", README))))
def test_what_is_linked_to_is_there(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_example_is_within_reach() -> None:
    assert "`examples/ <examples/README.rst>`_" in README


def test_urllib_goes_around_the_proxy_without_a_word() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"direct")

        def log_message(self, *_arguments: Any) -> None:
            pass

    program = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with HTTPServer(("127.0.0.1", 0), Page) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.02,))
        thread.start()
        try:
            done = subprocess.run(
                [sys.executable, "-c", program, f"http://127.0.0.1:{web.server_address[1]}/"], timeout=TIMEOUT, check=False,
                env={**clean, "ALL_PROXY": "socks5h://127.0.0.1:1"}, capture_output=True, text=True,
            )
        finally:
            web.shutdown()
            thread.join(TIMEOUT)
    assert (done.stdout, done.stderr) == ("direct\n", "")


def test_it_can_be_rendered() -> None:
    rst = pytest.importorskip("readme_renderer.rst", reason="readme_renderer is not installed")
    assert rst.render(README) is not None


@pytest.mark.parametrize("forbidden", [r"^\.\. raw::", r":(ref|class|func|mod|meth|doc):`"])
def test_it_is_plain_restructured_text(forbidden: str) -> None:
    assert not re.search(forbidden, README, re.MULTILINE)
