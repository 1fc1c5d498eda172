"""What the README promises: its commands, snippets, tables and pictures, compared with what is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from inspect import getdoc, signature
from pathlib import Path
from typing import Any, Dict, List, Tuple

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
from socks5srv.testing.targets import WebServer

from .conftest import TIMEOUT
from .test_layout import ABOVE, MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "socks5srv"
README = (ROOT / "README.rst").read_text(encoding="utf-8")

EXPLAINED = Request(Command.CONNECT, Address("localhost", 8000, AddressType.DOMAINNAME))
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


def table(heading: str, title: str) -> List[List[str]]:
    """The rows of the table in this section whose first heading is this one, each a list of its cells."""
    for rows in re.findall(r"^\.\. list-table::\n(?:   :.*\n)+\n((?:   .*\n)+)", section(title), re.MULTILINE):
        cells = [re.split(r"^     - ", row, flags=re.MULTILINE) for row in re.split(r"^   \* - ", rows, flags=re.MULTILINE)[1:]]
        if cells[0][0].strip() == heading:
            return [[" ".join(cell.split()) for cell in row] for row in cells[1:]]
    raise AssertionError(f"there is no table that begins with {heading!r}")


def literals(text: str) -> List[str]:
    return re.findall(r"``([^`]+)``", text)


def first_column(heading: str, title: str) -> List[str]:
    """What is literal in the first cells of that table."""
    return [literal for row in table(heading, title) for literal in literals(row[0])]


# --- commands ---

def test_there_are_two_commands_and_the_second_one_can_be_found_by_a_program() -> None:
    assert blocks("console", section("Two commands")) == ["$ python3 -m socks5srv\n", f"$ {SETUP_AND_TESTS}\n"]
    before = r"^This one passes the tests.*\n\n\.\. code-block:: console\n\n   \$ "
    assert re.search(before + re.escape(SETUP_AND_TESTS) + r"$", section("Two commands"), re.MULTILINE)


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
    session.end("closed by target")
    session.seconds = 0.0
    summary = Summary()
    summary.peak = 1
    summary.ended(session)
    summary.since -= 41
    lines = [re.sub(r"^(\^C)?\d\d:\d\d:\d\d ", "", line) for line in third.splitlines()]
    assert lines == [str(session), *summary.text().splitlines()]


def test_the_table_of_a_message_is_the_one_that_is_printed() -> None:
    (shown,) = blocks("text", section("Every message explained"))
    found = explanation(EXPLAINED)
    found.session, found.number, found.at = 1, "3", 0.0006
    found.remarks += about_request(EXPLAINED, by_upstream=False)
    assert shown == f"{found}\n"


def test_the_names_in_the_json_of_a_message_are_told() -> None:
    told = set(literals(section("JSON log").partition("With ``--explain``")[2]))
    found = explanation(EXPLAINED).as_dict()
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

def test_the_table_of_options_has_exactly_those_of_the_parser_and_names_their_values_as_the_help_does() -> None:
    shown = [literal.partition(" ") for literal in first_column("Option", "Options")]
    documented = {option: value for option, _space, value in shown if option.startswith("-")}
    assert documented == {
        option: "" if action.nargs == 0 else "|".join(action.choices) if action.choices else action.metavar or action.dest.upper()
        for action in build_parser()._actions for option in action.option_strings
    }


@pytest.mark.parametrize("name", ["handshake", "connect", "bind"])
def test_the_table_of_options_tells_the_real_defaults(name: str) -> None:
    (meaning,) = [meaning for option, meaning in table("Option", "Options") if f"--{name}-timeout" in option]
    assert meaning.endswith(f"({getattr(Socks5Server, name + '_timeout')})")


def test_the_table_of_exit_codes_is_that_of_the_help() -> None:
    found = re.search(r"Exit codes: (.+)\.", build_parser().epilog or "")
    assert found
    assert [code for code, _meaning in table("Exit code", "Options")] == re.findall(r"\b\d+\b", found.group(1))


def test_the_table_of_json_fields_has_exactly_those_of_a_session() -> None:
    assert first_column("Field", "JSON log") == list(Session(1, Address.numeric("127.0.0.1", 1080)).as_dict())


def test_the_table_of_json_fields_has_every_event() -> None:
    (meaning,) = [meaning for field, meaning in table("Field", "JSON log") if field == "``event``"]
    assert set(literals(meaning)) - {"-v"} == set(re.findall(r"``(\w+)``", Session.__doc__ or ""))


def test_the_fields_of_the_first_and_the_last_line_are_told() -> None:
    told = set(literals(section("JSON log")))
    assert set(listening([], None, frozenset())) <= told
    assert set(Summary().facts()) <= told


def test_the_table_of_hooks_is_that_of_the_handler() -> None:
    documented = first_column("Method", "In your script")
    assert documented == re.findall(r"^- (\w+\(.*\))$", getdoc(Socks5Handler) or "", re.MULTILINE)
    for method in documented:
        name, _, arguments = method.rstrip(")").partition("(")
        assert ", ".join(list(signature(getattr(Socks5Handler, name)).parameters)[1:]) == arguments


def test_the_table_of_settings_is_right() -> None:
    documented = {literals(name)[0]: default for name, default, _meaning in table("Attribute", "In your script")}
    with Socks5Server(("127.0.0.1", 0)) as server:
        for name, default in documented.items():
            if name not in ("commands", "route"):
                assert repr(getattr(server, name)) == literals(default)[0]
        assert server.commands == frozenset(Command)
        assert repr(server.route) == repr(type(server.route)())


def test_the_table_of_fixtures_has_those_of_the_plugin() -> None:
    plugin = (PACKAGE / "testing" / "pytest_plugin.py").read_text(encoding="utf-8")
    assert set(first_column("Fixture", "In your tests")) == set(re.findall(r"^@pytest.fixture\ndef (\w+)", plugin, re.MULTILINE))


def test_the_table_of_keywords_has_those_of_start() -> None:
    assert [*first_column("Keyword", "In your tests"), "settings"] == list(signature(testing.start).parameters)


def test_the_table_of_the_proxy_has_what_it_has() -> None:
    with testing.start() as proxy:
        assert not [name for name in first_column("Proxy", "In your tests") if not hasattr(proxy, name.rstrip("()"))]
    told = set(re.findall(r"\w+", " ".join(literals(section("In your tests")))))
    internal = {"add", "tell", "keep", "keeping_bugs", "place_of", "may_be_reached", "check", "close", "report"}
    assert {name for name in vars(testing.Proxy) if not name.startswith("_")} - internal <= told


def test_the_table_of_faults_has_all_of_them() -> None:
    documented = [name.partition("(")[0] for name in first_column("Fault", "In your tests")]
    kinds = [name for name in faults.__all__ if isinstance(getattr(faults, name), type) and issubclass(getattr(faults, name), faults.Fault)]
    assert sorted([*documented, "Fault"]) == sorted(kinds)


# --- the house ---

BESIDE = {"testing", "check"}       # at no floor


def reading_order() -> List[Tuple[str, int, int]]:
    return [(literals(file)[0], int(lines), int(minutes)) for file, lines, minutes, _what in table("File", "In your class")]


def test_the_reading_order_has_every_room_of_the_protocol_once() -> None:
    assert sorted(re.sub(r"\.py$|/$", "", file) for file, _lines, _minutes in reading_order()) == sorted(MAY_IMPORT)


@pytest.mark.parametrize(("file", "lines", "minutes"), reading_order())
def test_the_line_counts_are_about_right_and_the_minutes_go_with_them(file: str, lines: int, minutes: int) -> None:
    files = (PACKAGE / file).glob("*.py") if file.endswith("/") else [PACKAGE / file]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) == pytest.approx(lines, rel=0.12)
    assert 12 <= lines / minutes <= 30


def test_no_room_imports_from_a_floor_above() -> None:
    """Nor may one above the core import from its own."""
    (picture,) = [block for block in blocks("text") if "service/" in block]
    floors = [re.findall(r"\b(\w+)(?:\.py|/) ", floor) for floor in re.split(r"^\+", picture, flags=re.MULTILINE)]
    height = {room: floor for floor, rooms in enumerate(reversed(floors)) for room in rooms}
    assert set(height) == set(MAY_IMPORT)
    for room in MAY_IMPORT.keys() - BESIDE:
        for imported in MAY_IMPORT[room]:
            assert height[imported] <= height[room] - (imported in ABOVE), f"{room} imports {imported}"


# --- what else it says ---

@pytest.mark.parametrize("target", sorted(set(re.findall(r"<([^`>:]+)>`_", README))))
def test_what_is_linked_to_is_there(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_example_is_within_reach() -> None:
    assert "`examples/ <examples/README.rst>`_" in README


def test_urllib_goes_around_the_proxy_without_a_word() -> None:
    program = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with WebServer({"/": "direct"}) as web:
        done = subprocess.run(
            [sys.executable, "-c", program, f"http://127.0.0.1:{web.port}/"], timeout=TIMEOUT, check=False,
            env={**clean, "ALL_PROXY": "socks5h://127.0.0.1:1"}, capture_output=True, text=True,
        )
    assert (done.stdout, done.stderr) == ("direct\n", "")


def test_it_can_be_rendered() -> None:
    rst = pytest.importorskip("readme_renderer.rst", reason="readme_renderer is not installed")
    assert rst.render(README) is not None


@pytest.mark.parametrize("forbidden", [r"^\.\. raw::", r":(ref|class|func|mod|meth|doc):`"])
def test_it_is_plain_restructured_text(forbidden: str) -> None:
    assert not re.search(forbidden, README, re.MULTILINE)
