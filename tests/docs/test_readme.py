"""README.rst is one page that can be read anywhere: it is short, its links are absolute, and its commands can be found by a program."""

from __future__ import annotations

import re

import pytest

from .pages import DOCS, blocks, page, table

README = page("README.rst")
MANUAL = "https://socks5srv.readthedocs.io/"
SETUP_AND_TESTS = 'python3 -m venv .venv && .venv/bin/python -m pip install -q -e ".[test]" && .venv/bin/python -m pytest -n 4'

LINKS = dict(re.findall(r"^\.\. _(.+): (\S+)$", README, re.MULTILINE))


def test_it_has_at_most_180_lines() -> None:
    assert len(README.splitlines()) <= 180


def test_there_are_two_commands_and_the_second_one_can_be_found_by_a_program() -> None:
    assert "$ python3 -m socks5srv\n" in blocks("console", "README.rst")
    before = r"^This one passes the tests.*\n\n\.\. code-block:: console\n\n   \$ "
    assert re.search(before + re.escape(SETUP_AND_TESTS) + r"$", README, re.MULTILINE)


def test_every_link_is_absolute_and_used() -> None:
    assert "<" not in re.sub(r"``[^`]+``", "", README), "a link has its target at the end of the page"
    assert set(re.findall(r"(?<!`)`([^`]+)`_", " ".join(README.split()))) == set(LINKS)


@pytest.mark.parametrize("url", sorted(LINKS.values()))
def test_a_link_leads_to_a_page_of_the_manual(url: str) -> None:
    assert url.startswith(MANUAL)
    name, _, anchor = url[len(MANUAL):].partition("#")
    text = (DOCS / name).with_suffix(".rst").read_text(encoding="utf-8")
    assert f".. _{anchor}:\n" in text or not anchor


@pytest.mark.parametrize(("name", "heading", "numbers"), [("performance", "What", 4), ("comparison", "Server", 0)])
def test_its_tables_are_parts_of_those_in_the_manual(name: str, heading: str, numbers: int) -> None:
    rows = {row[0]: set(row) for row in table(name, heading)}
    for row in table("README.rst", heading):
        assert set(row) <= rows[row[0]]
        assert not numbers or len(row) == numbers


def test_the_speeds_that_it_shows_have_a_loss_among_them() -> None:
    assert any(float(ours) < 1 for _what, ours, *_others in table("README.rst", "What"))


def test_it_can_be_rendered() -> None:
    rst = pytest.importorskip("readme_renderer.rst", reason="readme_renderer is not installed")
    assert rst.render(README) is not None


@pytest.mark.parametrize("forbidden", [r"^\.\. raw::", r":(ref|class|func|mod|meth|doc|source):`"])
def test_it_is_plain_restructured_text(forbidden: str) -> None:
    assert not re.search(forbidden, README, re.MULTILINE)
