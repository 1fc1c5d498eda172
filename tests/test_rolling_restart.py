"""examples/haproxy: three nodes behind HAProxy, restarted under load, and one of them killed.  (.ci/run does that ten times in a row.)"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest

from . import test_examples
from .clients.harness import PATIENCE, need
from .conftest import needs_neighbour
from .test_examples import ROOT, environment, promised_output

SCRIPT = ROOT / "examples" / "haproxy" / "rolling_restart.py"
ROUNDS = 2

pytestmark = [needs_neighbour, pytest.mark.timeout(10 * PATIENCE)]


def run(script: Path, *words: str) -> Tuple[int, str, str]:
    """Its exit code, and what it has printed."""
    need("haproxy")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *words], env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=8 * PATIENCE, check=False,
    )
    return done.returncode, done.stdout, done.stderr


def changed(folder: Path, *changes: Tuple[str, str]) -> Path:
    """A copy of the example in a folder, with the script changed."""
    text = SCRIPT.read_text(encoding="utf-8")
    for before, after in [*changes, ("ROOT = HERE.parent.parent", f"ROOT = {str(ROOT)!r}")]:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    for path in SCRIPT.parent.glob("*.c*f*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")
    return folder / SCRIPT.name


def numbers(pattern: str, text: str) -> List[List[int]]:
    """Those in the groups of each line like this."""
    return [[int(number) for number in found.groups()] for found in re.finditer(f"(?m)^{pattern}$", text)]


def test_restarts_cost_nobody_a_session_and_with_a_node_that_is_killed_go_its_own_only(tmp_path: Path) -> None:
    code, stdout, stderr = run(SCRIPT, "--rounds", str(ROUNDS), "--log", str(tmp_path / "log"))
    assert (code, stderr) == (0, ""), stdout + stderr
    assert numbers(r"round (\d+): node(\d) is restarted: \d+ sessions so far, (\d+) lost", stdout) == [
        [number, node, 0] for number in range(1, ROUNDS + 1) for node in (1, 2, 3)]
    [[lost, *of_each]] = numbers(r"node2 is killed: it had \d+ sessions, (\d+) are lost: node1 (\d+), node2 (\d+), node3 (\d+)", stdout)
    assert of_each == [0, lost, 0]
    assert lost > 0
    assert numbers(r"node2 is there again: \d+ sessions since then, (\d+) lost", stdout) == [[0]]
    [[total, *of_each]] = numbers(r"all (\d+) sessions: node1 (\d+), node2 (\d+), node3 (\d+)", stdout)
    assert sum(of_each) == total
    assert min(of_each) > total // 50
    the_balancer_has_heard_of_each_restart_from_the_node_itself((tmp_path / "log").read_text())
    the_docstring_shows_what_is_printed(stdout)


def the_balancer_has_heard_of_each_restart_from_the_node_itself(log: str) -> None:
    for name in ("node1", "node2", "node3"):
        heard = re.findall(rf"(?m)^Server nodes/{name} is DOWN, reason: Layer7 wrong status, code: 503,", log)
        assert ROUNDS <= len(heard) <= ROUNDS + 1       # they go, too, when all is over


def the_docstring_shows_what_is_printed(stdout: str) -> None:
    promised = promised_output(SCRIPT).strip().splitlines()
    lines = [line for line in stdout.splitlines() if not line.startswith("round 2:")]
    assert [re.sub(r"\d+", "N", line) for line in lines] == [re.sub(r"\d+", "N", line) for line in promised]


def test_so_it_is_if_haproxy_drains_a_node_that_is_told_nothing() -> None:
    code, stdout, stderr = run(SCRIPT, "--by-haproxy")
    assert (code, stderr) == (0, ""), stdout + stderr
    assert numbers(r"round 1: node(\d) is restarted: \d+ sessions so far, (\d+) lost", stdout) == [[1, 0], [2, 0], [3, 0]]


def test_nodes_that_do_not_drain_cost_sessions_and_it_says_so(tmp_path: Path) -> None:
    code, stdout, stderr = run(changed(tmp_path, ("=signal.SIGTERM", "=signal.SIGINT")))
    assert code == 1, stderr
    assert re.search(r"(?m)^round 1: node3 is restarted: \d+ sessions so far, [1-9]\d* lost$", stdout), stdout
    assert re.search(r"(?m)^lost on node[13]: ", stdout)


def test_a_session_whose_octets_are_changed_is_lost(tmp_path: Path) -> None:
    change = "writer.write(octets)\n                assert", "writer.write(octets if turn < 19 else octets[::-1])\n                assert"
    code, stdout, stderr = run(changed(tmp_path, change), "--rounds", "0")
    assert code == 1, stderr
    assert re.search(r"(?m)^lost on node[13]: AssertionError\('it has been changed on the way'\)$", stdout), stdout


@pytest.mark.parametrize(("name", "words", "told"), [
    ("node.conf", "--udp-ports nonsense", " does not start\n"), ("haproxy.cfg", "nonsense", "HAProxy does not start:\n"),
])
def test_what_does_not_start_is_told_in_a_sentence(name: str, words: str, told: str, tmp_path: Path) -> None:
    script = changed(tmp_path)
    with (script.parent / name).open("a", encoding="utf-8") as file:
        file.write(f"\n{words}\n")
    code, _stdout, stderr = run(script)
    assert code == 1
    assert told in stderr
    assert "Traceback" not in stderr


def test_its_questions_are_answered() -> None:
    test_examples.test_the_questions_of_an_example_are_answered(SCRIPT)
