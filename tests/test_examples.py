"""
Every program in examples/ runs, in a process of its own, and prints what its docstring shows.

A new file there is covered by being there.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Dict

import pytest

from .conftest import within

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# What is another in each run: ports, as numbers, as octets behind an address or a name, and as
# FTP's PORT writes them; times; and how many octets a port in an HTTP header makes.
VARIABLE = [
    (r"\b\d{5}\b", "PORT"),
    (r"(7f 00 00 01|6c 6f 63 61 6c 68 6f 73 74) [0-9a-f]{2} [0-9a-f]{2}\b", r"\1 PO RT"),
    (r"PORT (127,0,0,1),\d+,\d+", r"PORT \1,PO,RT"),
    (r"\b\d+\.\d+s\b", "SECONDS"),
]


def comparable(text: str) -> str:
    for pattern, replacement in VARIABLE:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def promised_output(path: Path) -> str:
    """The indented block that follows "You should see"."""
    _before, found, after = docstring(path).partition("\nYou should see")
    assert found, f"the docstring of {path.name} does not say what you should see"
    block = re.search(r":\n\n((?:    .*\n|\n)+)", after)
    assert block, f"what you should see in {path.name} is not an indented block"
    return textwrap.dedent(block.group(1))


def environment() -> Dict[str, str]:
    """Ours, without what would change the output or lead to another copy of the package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("SOCKS5SRV_")}


def run(*words: str, directory: Path) -> str:
    """What such a Python program prints; it may neither fail nor complain."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], cwd=directory, env=environment(), timeout=20, check=False,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_from_anywhere_and_prints_what_its_docstring_promises(path: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    printed = run(str(path), directory=tmp_path)
    assert comparable(printed) == comparable(promised_output(path))
    assert time.monotonic() - started < within(5)


def test_an_example_runs_as_a_module_too() -> None:
    assert "Hello, 127.0.0.1:" in run("-m", "examples.quickstart", directory=ROOT)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_what_it_is_for_and_how_to_run_it(path: Path) -> None:
    text = docstring(path)
    assert "\nGoal: " in text
    assert f"python examples/{path.name}" in text


def test_the_index_lists_every_example() -> None:
    index = (ROOT / "examples" / "README.rst").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^`(\w+\.py) <\1>`_ ", index, re.MULTILINE)) == [path.name for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_questions_of_an_example_are_answered_in_the_index(path: Path) -> None:
    index = (ROOT / "examples" / "README.rst").read_text(encoding="utf-8")
    assert ("\nQuestions (" in docstring(path)) == (f"\n{path.name}\n~~~" in index)
