"""
Every program in examples/ runs, in a process of its own, and prints what its docstring shows.

A new file there is covered by being there.  The labs also check themselves (``--check``), talk to nobody but
this computer, and have all their questions answered.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import runpy
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Dict, List, Sequence, Set, Tuple

import pytest

from .clients.harness import need, need_module
from .docs.pages import page, table
from .conftest import Place, eventually, within
from .monitor.watched import Page
from .program import Start
from socks5srv.users import UsersFile, verify

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LABS = [path for path in EXAMPLES if path.name.startswith("lab")]
INDEX, COURSE = page("examples/README.rst"), page("course/labs")

examples = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
labs = pytest.mark.parametrize("path", LABS, ids=lambda path: path.name)

# Ports are others in each run: as numbers, as FTP's PORT has them, and as octets, behind an address or the end of a name, or
# in a box or a line of a table.
OCTET = "[0-9a-f]{2}"
BEHIND = [*(octets.hex(" ") + " " for octets in (b"\x7f\0\0\1", b"echo", b"host", b".com", b"fice", b"rnal")), r"\|  ", r"\.PORT  "]
PORT = re.compile(
    r"\b\d{5}\b|(?<=PORT 127,0,0,1,)\d+,\d+|(?<=0x)" + OCTET * 2
    + f"|(?:{'|'.join(f'(?<={before})' for before in BEHIND)}){OCTET} {OCTET}(?! {OCTET})"
)
# And so are times, and what a measurement gives.
VARIABLE = [
    (r"\b\d+\.\d+ ?s\b", "SECONDS"),
    (r'"time": "[-:.\dTZ]{24}"', '"time": NOW'),
    (r'"seconds": [\d.]+', '"seconds": SECONDS'),
    (r"  #+ +[\d,]+$", "  BAR"),
]


def comparable(text: str) -> str:
    text = PORT.sub("PORT", text)
    for pattern, replacement in VARIABLE:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip()


def ports(text: str) -> List[int]:
    """The ports in it, however they are written, in the order in which they stand there."""
    return [port(found) for found in PORT.findall(text)]


def port(text: str) -> int:
    if re.fullmatch(r"\d{5}", text):
        return int(text)
    high, low = [int(part) for part in text.split(",")] if "," in text else bytes.fromhex(text)
    return high << 8 | low


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def promised_output(path: Path) -> str:
    """The indented block that follows "You should see"."""
    _before, found, after = docstring(path).partition("\nYou should see")
    assert found, f"the docstring of {path.name} does not say what you should see"
    block = re.search(r":\n\n((?:    .*\n|\n)+)", after)
    assert block, f"what you should see in {path.name} is not an indented block"
    return textwrap.dedent(block.group(1))


def questions(text: str) -> List[str]:
    """The questions at the end of a docstring."""
    _before, _found, after = text.partition("\nQuestions (answers in ")
    return re.findall(r"\S.*?\?", " ".join(after.partition("): ")[2].split()))


def environment() -> Dict[str, str]:
    """Ours, without what would change the output or lead to another copy of the package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("SOCKS5SRV_")}


def ran(*words: str, directory: Path, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python with these words, by the command `within` which it is to be run, if there is one."""
    return subprocess.run(
        [*within, sys.executable, "-W", "error", *words], cwd=directory, env=environment(), timeout=20, check=False,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )


def run(*words: str, directory: Path, within: Sequence[str] = ()) -> str:
    """What such a Python program prints; it may neither fail nor complain."""
    done = ran(*words, directory=directory, within=within)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- PAM ---

PAM = ROOT / "examples" / "users_pam.py"


def with_pam_services(folder: Path, **services: str) -> List[str]:
    """The command within which a program finds these services in /etc/pam.d and no others: nothing else tells PAM where they are."""
    need_module("pam")
    (folder / "pam.d").mkdir()
    for name, lines in services.items():
        (folder / "pam.d" / name).write_text(lines)
    as_root = ["--map-root-user"] * (os.geteuid() != 0)
    within = [need("unshare"), *as_root, "--mount", "sh", "-c", f"mount --bind '{folder / 'pam.d'}' /etc/pam.d && exec \"$@\"", "sh"]
    if subprocess.run([*within, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("not on this platform: a mount namespace for this user, with /etc/pam.d in it")
    return within


def lines_of_pam(text: str) -> str:
    return "".join(re.findall(r"^    ((?:auth|account) .*\n)", text, re.MULTILINE))


def surroundings(path: Path, folder: Path) -> List[str]:
    """The command within which this example is run, if it needs one."""
    if path != PAM:
        return []
    if sys.platform != "linux":
        pytest.skip("not on this platform: PAM as Linux has it")
    return with_pam_services(folder, socks5srv=lines_of_pam(docstring(path)))


# --- all examples ---

@examples
def test_an_example_runs_from_anywhere_and_prints_what_its_docstring_promises(path: Path, tmp_path: Path) -> None:
    within_what, promised, started = surroundings(path, tmp_path), promised_output(path), time.monotonic()
    printed = run(str(path), *["--check"] * (path in LABS), directory=tmp_path, within=within_what)
    assert time.monotonic() - started < within(5)
    assert comparable(printed) == comparable(promised)
    pairs = set(zip(ports(promised), ports(printed)))
    assert len(pairs) == len(set(ports(promised))), f"what is one port in the docstring is two here: {sorted(pairs)}"


def test_an_example_runs_as_a_module_too() -> None:
    assert "Hello, 127.0.0.1:" in run("-m", "examples.lab01_first_request", directory=ROOT)


@examples
def test_an_example_says_what_it_is_for_and_how_to_run_it(path: Path) -> None:
    text = docstring(path)
    assert "\nGoal: " in text
    assert f"python examples/{path.name}" in text


def test_the_index_lists_every_example() -> None:
    listed = re.findall(r"^`(\w+\.py) <\1>`_ ", INDEX, re.MULTILINE)
    assert listed[:len(LABS)] == [path.name for path in LABS]
    assert sorted(listed) == [path.name for path in EXAMPLES]


def answered(path: Path) -> str:
    """What the course has under the name of this lab, or the index under that of another example."""
    _before, _name, after = (COURSE if path in LABS else INDEX).partition(f"\n{path.name}\n{'-' * len(path.name) if path in LABS else '~~~'}")
    return re.split(r"\n\n\S.*\n[~-]{3,}\n", after)[0]


@examples
def test_the_questions_of_an_example_are_answered(path: Path) -> None:
    asked = [" ".join(question.split()) for question in re.findall(r"^\*([^*]+\?)\*\s+\S", answered(path), re.MULTILINE)]
    assert asked == questions(docstring(path))


# --- accounts from elsewhere ---

@pytest.mark.skipif(sys.platform != "linux", reason="not on this platform: PAM as Linux has it")
def test_while_pam_cannot_say_nobody_comes_in_and_nobody_is_told_that_the_password_is_wrong(tmp_path: Path) -> None:
    lines = run(str(PAM), directory=tmp_path, within=with_pam_services(tmp_path)).splitlines()
    assert {line.partition(": ")[2] for line in lines[::2]} == {"the proxy has closed the connection instead of answering"}
    assert all(" bad protocol: PAM: " in line for line in lines[1::2])
    assert len(lines) == 2 * 3


def test_what_socks5_can_carry_and_pam_cannot_is_no_password() -> None:
    need_module("pam")
    authenticate = runpy.run_path(str(PAM))["Handler"].authenticate
    assert [authenticate(None, *login) for login in (("an\0na", "sesame"), ("anna", "sesame\0"))] == [False, False]


def test_a_password_that_was_right_costs_no_second_hash(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "users_sql.py"))
    path, hashes = str(tmp_path / "accounts.db"), []
    example["set_password"](path, "anna", "sesame")
    accounts = example["Accounts"](path)
    accounts.check.__globals__["verify"] = lambda *arguments: hashes.append(arguments) or verify(*arguments)
    assert [accounts.check("anna", password) for password in ("sesame", "sesame", "open", "sesame")] == [True, True, False, True]
    assert len(hashes) == 2
    example["set_password"](path, "anna", "sesame")     # and so another hash
    assert accounts.check("anna", "sesame")
    assert len(hashes) == 3


def test_the_query_in_the_manual_makes_a_users_file_of_such_a_database(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "users_sql.py"))
    for name in ("anna", "ben"):
        example["set_password"](str(tmp_path / "accounts.db"), name, f"of {name}")
    (query,) = re.findall(r"``(SELECT .*?)``", page("rules-users-upstream"))
    with contextlib.closing(sqlite3.connect(tmp_path / "accounts.db")) as database:
        lines = [row[0] for row in database.execute(query)]
    (tmp_path / "users").touch(0o600)
    (tmp_path / "users").write_text("\n".join(lines))
    users = UsersFile(str(tmp_path / "users"))
    assert [users.check(name, f"of {name}") for name in ("anna", "ben", "carl")] == [True, True, False]


# --- files of options ---

@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.conf")), ids=lambda path: path.name)
def test_a_server_starts_with_the_options_of_an_example(path: Path, start: Start, echo: Place) -> None:
    service = start(f"@{path}", "--status", "0")
    (page,) = re.findall(r"status=(http://[^/]+)/", service.wait_for("status="))
    eventually(lambda: Page.at(page).ask("/readyz").status == 200)
    if "--proxy-protocol" not in path.read_text(encoding="utf-8"):
        service.tunnel(echo)
    assert service.stop() == 0


# --- the labs ---

def test_there_are_ten_labs_in_order() -> None:
    assert [path.name[:6] for path in LABS] == [f"lab{number:02}_" for number in range(1, 11)]


@labs
def test_a_lab_is_one_file_of_a_page_or_two(path: Path) -> None:
    assert 40 <= len(path.read_text(encoding="utf-8").splitlines()) <= 120


@labs
def test_a_lab_has_its_number_and_three_to_five_questions(path: Path) -> None:
    assert docstring(path).startswith(f"Lab {int(path.name[3:5])}.  ")
    assert 3 <= len(questions(docstring(path))) <= 5


@labs
def test_a_lab_has_its_goal_command_and_output_in_the_course(path: Path) -> None:
    text = answered(path)
    assert "**Goal**" in text
    assert f"python examples/{path.name}" in text
    assert "**You should see**" in text
    promised = [line.strip() for line in promised_output(path).splitlines()]
    for block in re.findall(r"::\n\n((?:    .*\n)+)", text):
        assert {line.strip() for line in block.splitlines()} <= set(promised)


def modules(path: Path) -> Set[str]:
    """What it imports, at its top and in its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@labs
def test_a_lab_needs_the_standard_library_and_this_package_only(path: Path) -> None:
    if not hasattr(sys, "stdlib_module_names"):
        pytest.skip("not on this platform: Python before 3.10 does not know what its library has")
    assert modules(path) - {"socks5srv"} - {"matplotlib"} <= sys.stdlib_module_names
    assert ("matplotlib" in modules(path)) == ("--svg" in path.read_text(encoding="utf-8"))


WATCHED = r"""
import ipaddress, os, runpy, socket, sys

def watch(event, arguments):
    if event == "socket.bind" and arguments[0].type == socket.SOCK_DGRAM:
        return      # it does not listen, and sendto is watched
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else "127.0.0.1"
    elif event == "socket.getaddrinfo":
        host = arguments[0] or "127.0.0.1"
    else:
        return
    host = "127.0.0.1" if host in ("localhost", b"localhost") else host.decode() if isinstance(host, bytes) else host
    if not ipaddress.ip_address(host).is_loopback:      # a name is an error, too
        raise AssertionError

def audit(event, arguments):
    try:
        watch(event, arguments)
    except Exception:
        print(f"beyond this computer: {event} {arguments[1:]}", file=sys.stderr, flush=True)
        os._exit(3)

sys.addaudithook(audit)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@labs
def test_a_lab_talks_to_this_computer_only(path: Path, tmp_path: Path) -> None:
    assert run("-c", WATCHED, str(path), directory=tmp_path)


def test_the_watch_over_the_labs_sees_who_goes_beyond(tmp_path: Path) -> None:
    for line in ("socket.create_connection(('192.0.2.1', 9), 0.1)", "socket.getaddrinfo('www.example.com', 80)"):
        (tmp_path / "lab.py").write_text(f"import socket\n{line}\n")
        done = ran("-c", WATCHED, str(tmp_path / "lab.py"), directory=tmp_path)
        assert (done.returncode, done.stderr[:20]) == (3, "beyond this computer")


@labs
def test_a_lab_checks_all_that_it_has_found_out(path: Path) -> None:
    lab = runpy.run_path(str(path))
    facts: Tuple[object, ...] = lab["main"]()
    if not isinstance(facts, tuple):
        facts = (facts,)
    lab["check"](*facts)
    for i in range(len(facts)):
        with pytest.raises((AssertionError, AttributeError, TypeError)):
            lab["check"](*facts[:i], None, *facts[i + 1:])


def test_the_course_in_the_manual_has_all_labs_in_order() -> None:
    weeks = table("course/index", "Week")
    assert [int(lab) for _week, numbers, _files, _assignment in weeks for lab in numbers.split(",")] == list(range(1, len(LABS) + 1))
    for _week, _numbers, files, _assignment in weeks:
        for file in re.findall(r"``(\w+\.py)``", files):
            assert (ROOT / "socks5srv" / file).exists()


def test_the_last_lab_draws_a_picture(tmp_path: Path) -> None:
    need_module("matplotlib")
    run(str(LABS[-1]), "--svg", "rates.svg", directory=tmp_path)
    assert "<svg" in (tmp_path / "rates.svg").read_text(encoding="utf-8")
