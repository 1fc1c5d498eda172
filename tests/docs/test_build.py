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


@pytest.mark.skipif(sys.version_info < (3, 9), reason="not on this platform: the last Sphinx for it wants an older docutils than other tools")
def test_the_manual_is_built_without_a_warning_and_each_link_in_it_leads_somewhere(tmp_path: Path) -> None:
    need_module("sphinx")
    need_module("furo")
    built = tmp_path / "html"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-n", "-d", str(tmp_path / "doctrees"), str(DOCS), str(built)],
        cwd=ROOT, capture_output=True, text=True, timeout=55, check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path.relative_to(built).as_posix(): Links(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}
    assert {f"{name}.html" for name in NAMES} <= set(pages)
    assert [(name, link) for name, page in pages.items() for link in page.links if is_dead(link, name, built, pages)] == []
    to_teachers = {name for name, page in pages.items() for link in page.links if "teachers" in link}
    assert to_teachers <= {f"{FOR_TEACHERS}.html"}, "students read these"


def is_dead(link: str, name: str, built: Path, pages: Dict[str, Links]) -> bool:
    """Whether a link on the page of this name leads to no file, or to no place in it; those to elsewhere are not looked at."""
    url = urlsplit(link)
    if url.scheme:
        return False
    target = (built / name).parent.joinpath(unquote(url.path)).resolve() if url.path else built / name
    known = pages.get(target.relative_to(built.resolve()).as_posix() if url.path else name)
    return not target.is_file() or bool(url.fragment and known and unquote(url.fragment) not in known.targets)
