"""The man page and the shells' completions: they are up to date, go with the package, and do what they are for."""

from __future__ import annotations

import os
import runpy
import subprocess
from configparser import ConfigParser
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.clients.harness import need
from tests.conftest import TIMEOUT
from tests.program import ROOT

from socks5srv.cli.options import COMMANDS, build_parser

SHARE = ROOT / "share"
BASH_FILE = SHARE / "bash-completion/completions/socks5srv"

# Has bash complete the last of the words that it is told, and prints what it has found.
BASH = """
source "$1"; shift
COMP_WORDS=(socks5srv "$@") COMP_CWORD=$#
_socks5srv
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def made() -> Any:
    """The names of the program that makes them."""
    return runpy.run_path(str(SHARE / "generate.py"))


def completed(*words: str, folder: Path = SHARE) -> List[str]:
    """What bash offers for the last of these words."""
    done = subprocess.run(
        [need("bash"), "--norc", "-c", BASH, "bash", str(BASH_FILE), *words],
        cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=True,
    )
    assert done.stderr == ""
    return sorted(done.stdout.split("\n")[:-1]) if done.stdout != "\n" else []


# --- all of them ---

def test_they_are_what_is_made_of_the_parsers_now(made: Any) -> None:
    texts: Dict[Path, str] = made["files"]()
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: python3 share/generate.py"
    assert set(texts) == {path for path in SHARE.rglob("*") if path.is_file() and path.parent != SHARE and path.suffix != ".pyc"}


def test_all_of_them_go_with_the_package_to_where_they_are_looked_for(made: Any) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = {ROOT / source: folder for folder, source in setup["options.data_files"].items()}
    assert installed == {path: path.parent.relative_to(ROOT).as_posix() for path in made["files"]()}
    assert "graft share\n" in (ROOT / "MANIFEST.in").read_text()


@pytest.mark.parametrize("option", [option for action in build_parser()._actions for option in action.option_strings])
def test_each_of_them_has_every_option(option: str, made: Any) -> None:
    for path, text in made["files"]().items():
        spelled = {".1": option.replace("-", "\\-"), ".fish": f"-l {option[2:]} " if option[1] == "-" else f"-s {option[1:]} "}.get(path.suffix, option)
        assert spelled in text, path.name


# --- the man page ---

@pytest.mark.parametrize("command", [("groff", "-man", "-ww", "-Tutf8", "-z"), ("man", "--warnings", "-l")], ids=lambda words: words[0])
def test_the_man_page_is_formatted_without_a_warning(command: List[str]) -> None:
    """By the one as by the other, as far as they are there."""
    done = subprocess.run(
        [need(command[0]), *command[1:], str(SHARE / "man/man1/socks5srv.1")], env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
        capture_output=True, encoding="utf-8", timeout=TIMEOUT, check=True,
    )
    assert done.stderr == ""
    if command[0] == "man":
        assert "socks5srv check HOST:PORT [options]\n" in done.stdout
        assert max(map(len, done.stdout.split("\n"))) <= 80


def test_what_begins_a_line_of_the_man_page_is_no_request_by_accident(made: Any) -> None:
    assert made["roff"](".br is -text- of 'the' \\fR help") == r"\&.br is \-text\- of \(aqthe\(aq \efR help"


# --- bash ---

@pytest.mark.parametrize(("line", "offered"), [
    ("--log-f", ["--log-file", "--log-format"]), ("-q --ver", ["--verbose", "--version"]), ("--log-format ", ["json", "text"]),
    ("--log-format = ", ["json", "text"]), ("--log-format = t", ["text"]), ("--color al", ["always"]), ("--color =", ["always", "auto", "never"]),
    ("", sorted(COMMANDS)), ("ch", ["check"]), ("-q ch", []), ("--max-clients ", []), ("-b 127", []),
    ("check --t", ["--target", "--timeout"]), ("check --timeout ", []), ("check --log", []), ("explain -", ["--help"]), ("hash-password --h", ["--help"]),
    ("--log-file one", ["one.conf"]), ("--pcap ", ["a b.conf", "one.conf", "two.conf"]), ("@tw", ["@two.conf"]), ("-q @", ["@a b.conf", "@one.conf", "@two.conf"]),
    ("--run ./prog one", ["one.conf"]), ("--run prin", ["printenv", "printf"]),
])
def test_bash_completes(line: str, offered: List[str], tmp_path: Path) -> None:
    for name in ("a b.conf", "one.conf", "two.conf"):
        (tmp_path / name).touch()
    found = completed(*line.split(" "), folder=tmp_path)
    assert set(found) >= set(offered) if line.startswith("--run prin") else found == offered


def test_bash_knows_for_which_command_it_is() -> None:
    words = [need("bash"), "--norc", "-c", 'source "$1"; complete -p socks5srv', "bash", str(BASH_FILE)]
    assert subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT, check=True).stdout == "complete -o filenames -F _socks5srv socks5srv\n"


# --- the others ---

@pytest.mark.parametrize(("shell", "path"), [("zsh", "zsh/site-functions/_socks5srv"), ("fish", "fish/vendor_completions.d/socks5srv.fish")])
def test_another_shell_can_read_its_file(shell: str, path: str) -> None:
    done = subprocess.run([need(shell), "--no-exec", str(SHARE / path)], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert done.stderr == ""
