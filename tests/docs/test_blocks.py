"""Every code block of README.rst and of the manual: programs are run, commands parsed, and what is shown is what is printed."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from socks5srv import Socks5Server, check, testing
from socks5srv.cli.banner import banner
from socks5srv.cli.child import Destinations
from socks5srv.cli.options import build_parser, parse
from socks5srv.explain.__main__ import main as explain
from socks5srv.explain.reasons import about_request
from socks5srv.explain.tables import explanation
from socks5srv.protocol import Address, AddressType, Command, ReplyCode, Request
from socks5srv.rules import Rule
from socks5srv.service.summary import Summary
from socks5srv.session import Session

from .pages import ROOT, Block, all_blocks, blocks, page

BLOCKS = all_blocks()
EXPLAINED = Request(Command.CONNECT, Address("localhost", 8000, AddressType.DOMAINNAME))

# A block of text is known by how it begins, and compared by this test.
SHOWN = {
    "$ socks5srv\nsocks5srv 0.1.0": "docs/test_blocks.py::test_the_first_screen_is_what_is_printed",
    "$ curl -x socks5h://127.0.0.1:1080 http://localhost:8000/": "docs/test_blocks.py::test_the_first_lines_of_the_log_are_what_is_printed",
    "11:27:56 #1 ": "docs/test_blocks.py::test_the_first_lines_of_the_log_are_what_is_printed",
    "$ socks5srv [options]": "docs/test_blocks.py::test_the_usage_is_that_of_the_parser",
    "#1.3 REQUEST": "docs/test_blocks.py::test_the_table_of_a_message_is_the_one_that_is_printed",
    "proxy = subprocess.Popen([\"tests/bin/3proxy\"": "docs/test_blocks.py::test_what_a_line_of_testing_replaces_is_python",
    "proxy = subprocess.Popen([sys.executable, \"-m\", \"pproxy\"": "docs/test_blocks.py::test_what_a_line_of_testing_replaces_is_python",
    "docker run --rm -d -p 1080:1080": "docs/test_blocks.py::test_what_a_line_of_testing_replaces_is_python",
    "proxy = make_socks5_proxy(users=": "docs/test_blocks.py::test_the_line_that_replaces_them_starts_such_a_proxy",
    "logoutput: stderr\nroute {": "gssapi/test_clients.py::socksify",
    "example.com        *.ads.example": "docs/test_blocks.py::test_every_target_of_a_rule_is_one",
    "09:05:05 #1 192.0.2.7:51958 via": "docs/test_blocks.py::test_a_line_behind_a_load_balancer_is_what_is_printed",
    "defaults\n": "test_balancers.py::test_the_configuration_of_the_manual_is_one_that_serves",
    "stream {": "test_balancers.py::test_the_configuration_of_the_manual_is_one_that_serves",
    "failregex = ": "service/test_log.py::test_the_fail2ban_filter_is_the_one_that_the_manual_gives",
    "+---": "docs/test_architecture.py::test_no_module_imports_from_a_layer_above",
    "client                 a conversation thread": "docs/test_architecture.py::test_the_life_of_a_connect_has_the_names_of_the_source",
    "$ python3 -m socks5srv.check 127.0.0.1:1080": "test_homework.py::test_the_grades_in_the_manual_are_what_is_printed",
    "$ for port in 2001 2002 2003": "docs/test_blocks.py::test_the_marks_of_a_class_are_counts_of_all_questions",
}

# Commands of others, which the manual shows beside ours.
OTHERS = {
    "apt-get", "cd", "chromium", "cp", "curl", "docker", "echo", "export", "git", "google-chrome", "kadmin", "kinit", "kubectl", "mkdir", "pipx", "socksify", "tshark",
    "./socks5srv.pyz",
}


def commands() -> List[List[str]]:
    """The words of each command in a console block, less what only the shell sees."""
    found = []
    for block in BLOCKS:
        for line in re.findall(r"^\$ (.+)$", block.text, re.MULTILINE) if block.language == "console" else ():
            for part in [*re.findall(r"\$\(([^)]+)\)", line), *re.split(r" && ", line)]:
                found.append(shlex.split(part.partition(" | ")[0].lstrip("("), comments=True))
    return found


def words_of(command: List[str]) -> List[str]:
    """`command` as ``socks5srv ...``, if it is one of ours in another form."""
    if command[0].startswith(".venv/bin/"):
        command = [command[0][len(".venv/bin/"):], *command[1:]]
    if command[:3] == ["python3", "-m", "socks5srv"]:
        return ["socks5srv", *command[3:]]
    if command[:2] == ["python3", "-m"] and command[2].startswith("socks5srv."):
        return ["socks5srv", command[2].partition(".")[2], *command[3:]]
    return command


# --- programs ---

@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: block.page)
def test_a_program_in_the_manual_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(block.text, feature_version=(3, 8))
    if "def test_" in block.text:
        return passes(block.text, tmp_path)
    served: List[Socks5Server] = []
    monkeypatch.setattr(Socks5Server, "serve_forever", lambda self: served.append(self))
    names: Dict[str, Any] = {}
    exec(compile(block.text.replace("1080", "0"), block.page, "exec"), names)
    (server,) = served
    server.server_close()
    assert (server.RequestHandlerClass, server.users.passwords) == (names["Office"], {"anna": "sesame"})


def passes(text: str, folder: Path) -> None:
    pytest.importorskip("requests")
    pytest.importorskip("socks")
    (folder / "test_mine.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "socks5srv.testing.pytest_plugin", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=30, text=True, check=False,
    )
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_the_first_test_takes_six_lines_here_and_in_the_readme() -> None:
    first = blocks("python", "testing")[0]
    assert "\nSix lines, with pytest." in page("testing")
    assert len(first.splitlines()) == 6
    assert first in blocks("python", "README.rst")


# --- commands ---

def test_every_command_in_the_manual_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", "sesame")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users").touch(0o600)
    seen = set()
    for command in commands():
        program, *words = words_of(command)
        if program == "socks5srv" and words[:1] == ["check"]:
            check.build_parser("socks5srv check").parse_args(words[1:])
        elif program == "socks5srv" and words[:1] == ["explain"]:
            assert explain(words[1:]) == 0
        elif program == "socks5srv" and words[:1] != ["hash-password"]:
            parse(words)
        elif program == "python3" and words[0] != "-m":
            assert (ROOT / words[0]).exists()
        elif program in ("python", "python3"):
            assert words[1] in ("pip", "pytest", "venv", "zipapp")
        elif program != "socks5srv":
            assert program in OTHERS | {"umask"}, command
        seen.add(program)
    assert {"socks5srv", "python3", "curl"} <= seen
    capsys.readouterr()


def test_a_unit_of_systemd_starts_this_program_with_a_file_of_options() -> None:
    read = configparser.ConfigParser(strict=False)
    read.read(str(ROOT / "examples" / "systemd" / "socks5srv.service"), encoding="utf-8")
    program, options = read["Service"]["ExecStart"].split()
    assert (os.path.basename(program), options[0]) == ("socks5srv", "@")


def test_the_usage_is_that_of_the_parser() -> None:
    (shown,) = blocks("text", "cli")
    assert shown.splitlines()[0] == f"$ {build_parser().usage}"


# --- what is shown ---

@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "text"], ids=lambda block: f"{block.page}: {block.text[:30]!r}")
def test_what_is_shown_is_compared_with_what_is_printed(block: Block) -> None:
    (test,) = [test for start, test in SHOWN.items() if block.text.startswith(start)]
    file, _colons, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_there_are_no_other_kinds_of_blocks() -> None:
    assert {block.language for block in BLOCKS} <= {"console", "ini", "python", "text"}


@pytest.mark.parametrize("name", ["README.rst", "laptop"])
def test_the_first_screen_is_what_is_printed(name: str) -> None:
    first = blocks("text", name)[0]
    command, _, shown = first.partition("\n")
    assert command == "$ socks5srv"
    version = re.compile(r"socks5srv \d+\.\d+\.\d+")
    assert version.sub("", shown.rstrip()) == version.sub("", banner([Address.numeric("127.0.0.1", 1080)], None))


def served(session: Session, seconds: float, up: int, down: int) -> Session:
    session.user, session.command, session.reply = "", Command.CONNECT, ReplyCode.SUCCEEDED
    session.up, session.down = up, down
    session.end("closed by target")
    session.seconds = seconds
    return session


def test_the_first_lines_of_the_log_are_what_is_printed() -> None:
    _first, second, third = blocks("text", "laptop")[:3]
    assert second.startswith("$ curl -x socks5h://127.0.0.1:1080 http://localhost:8000/")
    session = Session(1, Address.numeric("127.0.0.1", 33524))
    session.destination, session.peer = Address.named("localhost", 8000), Address.numeric("127.0.0.1", 8000)
    served(session, 0.0, 87, 213)
    summary = Summary()
    summary.peak = 1
    summary.ended(session)
    summary.since -= 41
    lines = [re.sub(r"^(\^C)?\d\d:\d\d:\d\d ", "", line) for line in third.splitlines()]
    assert lines == [str(session), *summary.text().splitlines()]


def test_a_line_behind_a_load_balancer_is_what_is_printed() -> None:
    session = Session(1, Address.numeric("192.0.2.7", 51958))
    session.via = Address.numeric("10.0.0.2", 40001)
    session.destination, session.peer = Address.named("example.com", 443), Address.numeric("192.0.2.80", 443)
    assert f"09:05:05 {served(session, 0.4, 1200, 5300)}\n" == blocks("text", "scaleout")[0]


@pytest.mark.parametrize("name", ["README.rst", "laptop"])
def test_what_a_program_has_contacted_is_what_is_printed(name: str) -> None:
    (block,) = [block for block in blocks("console", name) if " --run " in block]
    session = Session(1, Address.numeric("127.0.0.1", 33524))
    session.destination, session.peer = Address.named("example.com", 443), Address.numeric("192.0.2.7", 443)
    destinations = Destinations()
    destinations.ended(served(session, 0.1, 1200, 5300))
    assert destinations.contacted_by("curl") in block


def test_the_table_of_a_message_is_the_one_that_is_printed() -> None:
    (shown,) = blocks("text", "observing")
    found = explanation(EXPLAINED)
    found.session, found.number, found.at = 1, "3", 0.0006
    found.remarks += about_request(EXPLAINED, by_upstream=False)
    assert shown == f"{found}\n"


def test_what_a_line_of_testing_replaces_is_python() -> None:
    three_proxy, pproxy, docker = blocks("text", "testing")[:3]
    ast.parse(three_proxy)
    ast.parse(pproxy)
    assert docker.startswith("docker run ")


def test_the_line_that_replaces_them_starts_such_a_proxy() -> None:
    names: Dict[str, Any] = {"make_socks5_proxy": testing.start}
    exec(blocks("text", "testing")[3], names)
    with names["proxy"] as proxy:
        assert (proxy.user, proxy.password) == ("anna", "sesame")


def test_every_target_of_a_rule_is_one() -> None:
    targets = blocks("text", "rules-users-upstream")[0].split()
    assert len(targets) == 8
    for target in targets:
        Rule.parse(f"deny {target}")


def test_the_marks_of_a_class_are_counts_of_all_questions() -> None:
    (block,) = [block for block in blocks("text", "course/teachers") if block.startswith("$ for port")]
    counts = [ast.literal_eval(found) for found in re.findall(r"\{.*\}$", block, re.MULTILINE)]
    assert [sum(found.values()) for found in counts] == [len(check.QUESTIONS)] * 3
    assert f"{len(check.QUESTIONS)} lines" in " ".join(page("course/teachers").split())


