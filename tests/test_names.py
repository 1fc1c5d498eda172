"""How names are spelled: one form to compare, and the same to ask for."""

from __future__ import annotations

import ast
import unicodedata
from pathlib import Path
from typing import Any, Callable

import idna
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import socks5srv
from socks5srv.names import ascii_form, canonical

PACKAGE = Path(socks5srv.__file__).resolve().parent

LETTERS = st.text(st.characters(whitelist_categories=("L",)), min_size=1, max_size=8)
# Many of what has a rule of its own, some of everything.
TRICKY = st.sampled_from("aA0-_.\u00df\u1e9e\u03c2\u03a3\u200c\u200d\u3002\uff0e\uff61\u2024\u2488\u2025\u00ad\ufe0f\u0301\u0130\ufb06\uff21\uff1a\uff05\u2100\u3164\uffa0\U0001d6d3")
NAMES = st.text(TRICKY | st.characters(blacklist_categories=("Cs",)), max_size=20)


@pytest.mark.parametrize(("written", "form"), [
    ("fa\u00df.test", "xn--fa-hia.test"), ("FA\u1e9e.test", "xn--fa-hia.test"), ("fass.test", "fass.test"),
    ("\u03bf\u03b4\u03cc\u03c2.gr", "xn--pxavk3b.gr"), ("\u03bf\u03b4\u03cc\u03c3.gr", "xn--pxavn9a.gr"), ("\u039f\u0394\u038c\u03a3.gr", "xn--pxavn9a.gr"),
    ("\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.com", "xn--mgba3gch31f060k.com"), ("\u0dc1\u0dca\u200d\u0dbb\u0dd3.com", "xn--10cl1a0b660p.com"),
    ("b\u00fccher.example", "xn--bcher-kva.example"), ("B\u00dcCHER.Example", "xn--bcher-kva.example"), ("bu\u0308cher.example", "xn--bcher-kva.example"),
    ("\u65e5\u672c\u3002example", "xn--wgv71a.example"), ("\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45\uff0ecom", "example.com"), ("a\uff61b", "a.b"),
    ("a\u2024b.\u00e4", "a.b.xn--4ca"), ("\u2c00.test", "xn--tej.test"), ("na\u00adme.\u00e4", "name.xn--4ca"), ("\u2665\ufe0f.test", "xn--g6h.test"),
    ("localhost", "localhost"), ("a..b", "a..b"), ("a_b-c.d", "a_b-c.d"), ("_x.\u00e4", "_x.xn--4ca"), ("", ""),
])
def test_a_name_in_ascii_is_the_one_that_browsers_send(written: str, form: str) -> None:
    assert ascii_form(written) == canonical(written) == form


@pytest.mark.parametrize("dot", [".", "\u3002", "\uff0e", "\uff61"])
def test_a_dot_at_the_end_is_asked_for_and_not_compared(dot: str) -> None:
    assert ascii_form("fa\u00df.test" + dot) == "xn--fa-hia.test."
    assert canonical("fa\u00df.test" + dot) == canonical("FASS.test.").replace("fass", "xn--fa-hia") == "xn--fa-hia.test"


@pytest.mark.parametrize("name", [
    "\u00e4..b", ".\u00e4", "\u00e4..", "\u00e4" * 64, "\u00e4." + "b" * 64, "\u2028", "\u00e4\u00a0b", "\u2100.test", "\uff1a\uff1a1", "fe80\uff1a\uff1a1\uff05lo", "xn--\u00e4", "\ue000", "\ufdfa",
    "\u00e4.*", "\ufffe", "\u3002", "\u00e9." * 80 + "test", "\u202eabc", "\ud800",
], ids=ascii)
def test_what_cannot_be_spelled_is_a_unicode_error(name: str) -> None:
    with pytest.raises(UnicodeError):
        ascii_form(name)
    assert canonical(canonical(name)) == canonical(name)


def test_the_longest_label_and_the_longest_name_can_be_spelled() -> None:
    assert len(ascii_form("a" * 55 + "\u00e4")) == 63
    name = ".".join(["a" * 55 + "\u00e4"] * 3 + ["b" * 51 + "\u00e4", "c"])
    assert len(ascii_form(name)) == 253
    assert ascii_form(name + ".") == ascii_form(name) + "."
    with pytest.raises(UnicodeError):
        ascii_form(name + "c")


def spelled(spell: Callable[[str], Any], name: str) -> Any:
    """None if it cannot be."""
    try:
        return spell(name)
    except UnicodeError:
        return None


def by_the_library(name: str) -> Any:
    """That comes with requests, and knows all the tables; also what is no letter of any language: that is None."""
    return spelled(lambda name: idna.encode(name, uts46=True, transitional=False).decode(), name)


@given(NAMES)
@example("\u00e4..")
@example("\u00e4\u3002")
@example("\u2100.")
@example("\u0130\u3002\u3002")
def test_what_is_judged_is_what_is_asked_for(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)
    form = spelled(ascii_form, name)
    if form is not None:
        assert form.isascii()
        assert form.rstrip(".").lower() == canonical(name)
        assert ascii_form(form) == form


@given(LETTERS, NAMES)
def test_all_spellings_that_fold_to_one_are_one(label: str, name: str) -> None:
    for written in (label, name):
        for other in (unicodedata.normalize("NFD", written), unicodedata.normalize("NFC", written), written + "."):
            assert canonical(other) == canonical(written)


@given(LETTERS)
@example("Fa\u1e9e")
@example("\u0646\u0627\u0645\u0647\u200c\u0627\u06cc")
@example("\U0001d6d3")
def test_it_agrees_with_the_library_that_knows_all_the_tables(label: str) -> None:
    expected = by_the_library(label)
    if expected is not None:
        assert ascii_form(label).lower() == canonical(label) == expected


def test_it_agrees_with_it_on_every_letter() -> None:
    accepted = 0
    for letter in map(chr, [*range(0x80, 0xd800), *range(0xe000, 0x1f000), 0x20000, 0x2f801]):
        if unicodedata.category(letter)[0] in "LM":
            expected = by_the_library(f"a{letter}b")
            if expected is not None:
                assert (letter, ascii_form(f"a{letter}b")) == (letter, expected)
                accepted += 1
    assert accepted > 20000


# --- there is one way to spell them ---

@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_name_is_left_to_pythons_codec_of_2003(path: Path) -> None:
    """getaddrinfo() would use it for a str that is not ASCII."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "getaddrinfo":
                names = {found.id for found in ast.walk(node.args[0]) if isinstance(found, ast.Name)}
                assert "ascii_form" in names, f"line {node.lineno}"
            if node.func.attr in ("encode", "decode"):
                assert [argument.value for argument in node.args if isinstance(argument, ast.Constant)] != ["idna"], f"line {node.lineno}"
