"""The tables of the manual, each compared with the part of the source that it is about, and the words that it is written in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from inspect import getdoc, signature
from typing import Any

import pytest

import socks5srv
from socks5srv import Socks5Handler, Socks5Server, descriptors, testing
from socks5srv.cli.banner import listening
from socks5srv.cli.console import KEYS
from socks5srv.cli.options import build_parser
from socks5srv.explain.tables import explanation
from socks5srv.protocol import Address, AddressType, Command, Request
from socks5srv.server import Defaults
from socks5srv.service.summary import Summary
from socks5srv.session import Session
from socks5srv.testing import faults
from socks5srv.testing.targets import WebServer
from tests.conftest import TIMEOUT

from .pages import AT_THE_TOP, DOCS, GENERATED, NAMES, ROOT, first_column, literals, page, table

PACKAGE = ROOT / "socks5srv"


# --- the command line ---

def cli_page() -> Any:
    import runpy

    return runpy.run_path(str(DOCS / "cli_page.py"))


def test_the_page_of_the_command_line_is_that_of_the_parser() -> None:
    assert page("cli") == cli_page()["page"](), "write it anew with:  python3 docs/cli_page.py"


def test_what_is_added_to_an_option_is_about_one_that_there_is() -> None:
    names = {cli_page()["name_of"](action) for action in build_parser()._actions}
    assert set(cli_page()["MORE"]) <= names


@pytest.mark.parametrize("name", ["handshake", "connect", "bind"])
def test_the_help_of_an_option_has_the_real_default(name: str) -> None:
    (action,) = [action for action in build_parser()._actions if f"--{name}-timeout" in action.option_strings]
    assert f"(default: {getattr(Socks5Server, name + '_timeout')})" in (action.help or "")


def test_the_table_of_exit_codes_is_that_of_the_help() -> None:
    found = re.search(r"Exit codes: (.+)\.", build_parser().epilog or "")
    assert found
    assert [code for code, _meaning in table("cli", "Exit code")] == re.findall(r"\b\d+\b", found.group(1))


@pytest.mark.parametrize("name", [*NAMES, *AT_THE_TOP])
def test_every_option_in_the_manual_is_one_of_ours_or_of_a_program_beside_it(name: str) -> None:
    options = {option for action in build_parser()._actions for option in action.option_strings}
    options |= {"--json", "--service", "--target", "--timeout", "--check", "--svg", "--proxy-server", "--args", "--seconds", "--all", "--log-level", "--by-haproxy"}
    assert set(re.findall(r"(?<![\w`-])``(--[a-z][a-z-]*)", page(name))) <= options


# --- the log and the status page (more is in tests/monitor) ---

def test_the_table_of_json_fields_has_exactly_those_of_a_session() -> None:
    assert first_column("observing", "Field") == list(Session(1, Address.numeric("127.0.0.1", 1080)).as_dict())


def test_the_table_of_json_fields_has_every_event() -> None:
    (meaning,) = [meaning for field, meaning in table("observing", "Field") if field == "``event``"]
    assert set(literals(meaning)) - {"-v"} == set(re.findall(r"``(\w+)``", Session.__doc__ or ""))


def test_the_fields_of_the_first_and_the_last_line_are_told() -> None:
    told = set(literals(page("observing").partition("\nJSON log\n")[2]))
    assert set(listening([], None, frozenset())) <= told
    assert set(Summary().facts()) <= told


def test_the_names_in_the_json_of_a_message_are_told() -> None:
    told = set(literals(page("observing").partition("\nJSON log\n")[2].partition("With ``--explain``")[2]))
    found = explanation(Request(Command.CONNECT, Address("localhost", 8000, AddressType.DOMAINNAME))).as_dict()
    (row, *_others) = found["fields"]
    assert {*found, *row, *row["meanings"][0]} <= told


# --- sizing ---

@pytest.mark.parametrize("limit", [20_000, 65_536, 1_048_576])
def test_the_numbers_of_sessions_for_a_number_of_descriptors_are_right(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: float(limit))
    assert f" {descriptors.Descriptors().most_clients:,}" in page("sizing")
    assert f" {descriptors.RESERVED + descriptors.SPARE} for itself" in page("sizing")


def test_what_the_simulation_prints_is_in_the_manual() -> None:
    (printed,) = re.findall(r"(?s)You should see:\n\n(.*?)\n\n\S", (ROOT / "examples" / "spread.py").read_text(encoding="utf-8"))
    rows = [re.split(r"x? {2,}", line.strip().rstrip("x")) for line in printed.splitlines()[2:]]
    assert rows == table("sizing", "Choice")


# --- scripts ---

def test_the_table_of_hooks_is_that_of_the_handler() -> None:
    documented = first_column("scripting", "Method")
    assert documented == [hook.partition(" -> ")[0] for hook in re.findall(r"^- `*(\w+\(.*?\)(?: -> .+?)?)`*$", getdoc(Socks5Handler) or "", re.MULTILINE)]
    for method in documented:
        name, _, arguments = method.rstrip(")").partition("(")
        assert ", ".join(list(signature(getattr(Socks5Handler, name)).parameters)[1:]) == arguments


def test_the_table_of_settings_is_right() -> None:
    documented = {literals(name)[0]: default for name, default, _meaning in table("scripting", "Attribute")}
    assert set(documented) == {name for name in vars(Defaults) if not name.startswith("_")}
    with Socks5Server(("127.0.0.1", 0)) as server:
        for name, default in documented.items():
            if name not in ("commands", "route"):
                assert repr(getattr(server, name)) == literals(default)[0]
        assert server.commands == frozenset(Command)
        assert repr(server.route) == repr(type(server.route)())


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    documented = set(re.findall(r"\w+", page("api")))
    targets = {"EchoServer", "WebServer", "FtpServer", "DnsServer"}
    kinds = {name for name in faults.__all__ if isinstance(getattr(faults, name), type) and issubclass(getattr(faults, name), faults.Fault)}
    assert {*socks5srv.__all__, *testing.__all__, *kinds, *targets} <= documented


# --- tests ---

def test_the_table_of_fixtures_has_those_of_the_plugin() -> None:
    plugin = (PACKAGE / "testing" / "pytest_plugin.py").read_text(encoding="utf-8")
    assert set(first_column("testing", "Fixture")) == set(re.findall(r"^@pytest.fixture(?:\(.*\))?\ndef (\w+)", plugin, re.MULTILINE))


def test_the_table_of_keywords_has_those_of_start() -> None:
    assert [*first_column("testing", "Keyword"), "settings"] == list(signature(testing.start).parameters)


def test_the_table_of_the_proxy_has_what_it_has() -> None:
    with testing.start() as proxy:
        assert not [name for name in first_column("testing", "Proxy") if not hasattr(proxy, name.rstrip("()"))]
    told = set(re.findall(r"\w+", " ".join(literals(page("testing")))))
    internal = {"close", "report"}
    assert {name for name in vars(testing.Proxy) if not name.startswith("_")} - internal <= told


def test_the_table_of_faults_has_all_of_them() -> None:
    documented = [name.partition("(")[0] for name in first_column("testing", "Fault")]
    kinds = [name for name in faults.__all__ if isinstance(getattr(faults, name), type) and issubclass(getattr(faults, name), faults.Fault)]
    assert sorted([*documented, "Fault"]) == sorted(kinds)


# --- laptops ---

def test_the_table_of_keys_has_those_of_the_terminal() -> None:
    assert first_column("laptop", "Key") == list(KEYS)


def test_urllib_goes_around_the_proxy_without_a_warning() -> None:
    program = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with WebServer({"/": "direct"}) as web:
        done = subprocess.run(
            [sys.executable, "-c", program, f"http://127.0.0.1:{web.port}/"], timeout=TIMEOUT, check=False,
            env={**clean, "ALL_PROXY": "socks5h://127.0.0.1:1"}, capture_output=True, text=True,
        )
    assert (done.stdout, done.stderr) == ("direct\n", "")


# --- how it is written ---

@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("security", "changes")] + ["SECURITY.rst"])
def test_a_page_says_first_what_its_reader_can_do_after_it(name: str) -> None:
    lines = page(name).splitlines()
    title = next(number for number, line in enumerate(lines) if re.fullmatch("=+", line))
    first = next(line for line in lines[title + 1:] if line and not line.startswith(".. "))
    assert re.match(r"(After|On|From) this page\b", first), first


# What readers would have to guess at; octet is the word of the RFCs, where their messages are meant.
ODD = re.compile(r"look-ups?\b|turned away|crowded out|\bas started\b|\b(?:eleven|twenty) rooms|for ever\b|without a word|\bthe house\b", re.IGNORECASE)
WITHOUT_OCTETS = ["README.rst", "install", "laptop", "scripting", "operations", "performance", "comparison", "rules-users-upstream", "kerberos"]


@pytest.mark.parametrize("name", [name for name in [*NAMES, *AT_THE_TOP] if name not in GENERATED])
def test_a_page_is_written_in_words_that_users_know(name: str) -> None:
    assert not ODD.findall(re.sub(r"``[^`]+``", "", page(name)))


@pytest.mark.parametrize("name", WITHOUT_OCTETS)
def test_what_is_carried_is_bytes(name: str) -> None:
    assert "octet" not in page(name)
