"""
How Sphinx builds the manual: ``sphinx-build -W docs build/docs`` (pip install "socks5srv[docs]").

The pages are plain files beside this one.  faults.rst, client-messages.rst and cli.rst are written by programs, and tests
say when they are out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from socks5srv import __version__

SOURCE = "https://github.com/socks5srv/socks5srv"

project = "socks5srv"
author = "The socks5srv authors"
copyright = author      # Sphinx asks for this name
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.extlinks"]
extlinks = {"source": (f"{SOURCE}/blob/main/%s", "%s")}
exclude_patterns = ["_build"]
smartquotes = False             # -- is the beginning of an option
default_role = "literal"        # `name` in a docstring is code
nitpicky = True                 # a reference within the manual that leads nowhere is a warning
nitpick_ignore_regex = [("py:.*", ".*")]      # types of the library, and those that have no entry of their own

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = sys.version_info >= (3, 9)     # before, it fails with named tuples
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"socks5srv {version}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"


def list_names(_app: Any, what: str, _name: str, _object: Any, _options: Any, lines: List[str]) -> None:
    """Docstrings align the meanings of names behind them, which reads well in a terminal; here they become a list."""
    found: List[str] = []
    inside = False
    for line in lines:
        item = re.match(r"(`\w+`(?:, `\w+`)*)  +(\S.*)", line)
        if item:
            found += [""] * (not inside) + [f"- {item[1]}: {item[2]}"]
        elif inside and line.startswith(" "):
            found.append(f"  {line.strip()}")
        else:
            found += [""] * (inside and bool(line)) + [line]
        inside = bool(item) or (inside and line.startswith(" "))
    # napoleon takes what stands before a colon in the first line of a property for its type
    lines[:] = ["..", "", *found] if what == "property" else found


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", list_names, priority=400)      # before napoleon
