"""The manual can be built without a warning, and every link within it leads somewhere."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Dict, List, Optional, Set, Tuple
from urllib.parse import unquote, urlsplit

import pytest

from tests.clients.harness import need_module

from .pages import DOCS, NAMES, ROOT

FOR_TEACHERS = "course/teachers"


class Links(HTMLParser):
    """What a page links to, and what can be linked to on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: Set[str] = set()
        self.links: List[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        found = dict(attrs)
        self.targets.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manual as HTML; a warning is an error."""
    need_module("sphinx")
    need_module("furo")
    folder = tmp_path_factory.mktemp("manual")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-n", "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")],
        cwd=ROOT, capture_output=True, text=True, timeout=55, check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.fixture(scope="module")
def html(built: Path) -> Dict[str, Links]:
    """Every page, by its path."""
    return {path.relative_to(built).as_posix(): Links(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}


def test_every_page_is_built(html: Dict[str, Links]) -> None:
    assert {f"{name}.html" for name in NAMES} <= set(html)


def test_every_link_within_the_manual_leads_somewhere(built: Path, html: Dict[str, Links]) -> None:
    dead = []
    for name, page in html.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (built / name).parent.joinpath(unquote(url.path)).resolve() if url.path else built / name
            known = html.get(target.relative_to(built.resolve()).as_posix() if url.path else name)
            if not target.is_file() or (url.fragment and known and unquote(url.fragment) not in known.targets):
                dead.append((name, link))
    assert dead == []


def test_no_page_of_students_leads_to_that_of_teachers(html: Dict[str, Links]) -> None:
    found = [name for name, page in html.items() for link in page.links if "teachers" in link]
    assert set(found) <= {f"{FOR_TEACHERS}.html"}
