"""
The pages of the manual, as other tests read them: their sections, tables and code blocks.

A page is named as Sphinx does it, by its file below docs/ without ``.rst``; those at the top of the clone have their file's name.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import List, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
NAMES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.rst"))
AT_THE_TOP = ["README.rst", "SECURITY.rst", "CHANGES.rst", "examples/README.rst"]
GENERATED = ["cli", "client-messages", "faults"]


class Block(NamedTuple):
    """A code block: the page it is on, its language, and its text without the indentation."""

    page: str
    language: str
    text: str


def page(name: str) -> str:
    path = ROOT / name if name.endswith(".rst") else DOCS / f"{name}.rst"
    return path.read_text(encoding="utf-8")


def all_blocks() -> List[Block]:
    """Those of README.rst and of the whole manual."""
    return [
        Block(name, language, textwrap.dedent(block).strip() + "\n")
        for name in [*NAMES, *AT_THE_TOP]
        for language, block in re.findall(r"^\.\. code-block:: (\w+)\n\n((?:   .*\n|\n)+)", page(name), re.MULTILINE)
    ]


def blocks(language: str, name: str) -> List[str]:
    """What stands in the code blocks of this language on a page."""
    return [block.text for block in all_blocks() if (block.page, block.language) == (name, language)]


def table(name: str, heading: str) -> List[List[str]]:
    """The rows of the table on a page whose first heading is this one, each a list of its cells."""
    for rows in re.findall(r"^\.\. list-table::\n(?:   :.*\n)+\n((?:   .*\n)+)", page(name), re.MULTILINE):
        cells = [re.split(r"^     - ", row, flags=re.MULTILINE) for row in re.split(r"^   \* - ", rows, flags=re.MULTILINE)[1:]]
        if cells[0][0].strip() == heading:
            return [[" ".join(cell.split()) for cell in row] for row in cells[1:]]
    raise AssertionError(f"{name} has no table that begins with {heading!r}")


def literals(text: str) -> List[str]:
    return re.findall(r"``([^`]+)``", text)


def first_column(name: str, heading: str) -> List[str]:
    """What is literal in the first cells of that table."""
    return [literal for row in table(name, heading) for literal in literals(row[0])]
