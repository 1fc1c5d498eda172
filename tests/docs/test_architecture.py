"""The page for readers of the source: the reading order, the picture of the layers, and the life of a CONNECT."""

from __future__ import annotations

import re
from socket import socket
from typing import List, Tuple

import pytest

from socks5srv import Socks5Handler, Socks5Server, protocol
from tests.test_layout import ABOVE, MAY_IMPORT

from .pages import ROOT, blocks, literals, table

PACKAGE = ROOT / "socks5srv"
BESIDE = {"testing", "check"}       # in no layer


def reading_order() -> List[Tuple[str, int, int]]:
    return [(literals(file)[0], int(lines), int(minutes)) for file, lines, minutes, _what in table("architecture", "File")]


def test_the_reading_order_has_every_module_once() -> None:
    assert sorted(re.sub(r"\.py$|/$", "", file) for file, _lines, _minutes in reading_order()) == sorted(MAY_IMPORT)


@pytest.mark.parametrize(("file", "lines", "minutes"), reading_order())
def test_the_line_counts_are_about_right_and_the_minutes_go_with_them(file: str, lines: int, minutes: int) -> None:
    files = (PACKAGE / file).glob("*.py") if file.endswith("/") else [PACKAGE / file]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) == pytest.approx(lines, rel=0.12)
    assert 12 <= lines / minutes <= 30


def test_no_module_imports_from_a_layer_above() -> None:
    """Nor may one above the core import from its own."""
    picture = blocks("text", "architecture")[0]
    layers = [re.findall(r"\b(\w+)(?:\.py|/) ", layer) for layer in re.split(r"^\+", picture, flags=re.MULTILINE)]
    height = {module: layer for layer, modules in enumerate(reversed(layers)) for module in modules}
    assert set(height) == set(MAY_IMPORT)
    for module in MAY_IMPORT.keys() - BESIDE:
        for imported in MAY_IMPORT[module]:
            assert height[imported] <= height[module] - (imported in ABOVE), f"{module} imports {imported}"


def test_the_life_of_a_connect_has_the_names_of_the_source() -> None:
    life = blocks("text", "architecture")[1]
    for name in re.findall(r"\b(\w+)\(\)", life):
        assert any(hasattr(owner, name) for owner in (Socks5Handler, Socks5Server, socket)), name
    messages = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", life)) - {"Tunnel"}
    assert len(messages) == 6
    assert not [name for name in messages if not hasattr(protocol, name)]
