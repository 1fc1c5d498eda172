"""docs/client-messages.rst says what the clients that are installed here print."""

from __future__ import annotations

import pytest

from .harness import need, need_module
from .messages import CLIENTS, PAGE, line, messages, named


def test_the_page_has_what_the_clients_print() -> None:
    need("curl")
    for module in ("socks", "python_socks", "httpx"):
        need_module(module)
    page = PAGE.read_text(encoding="utf-8")
    known = [client for client in CLIENTS if named(client) in page]
    if not known:
        pytest.skip("the page has other versions of all these clients")
    for title, texts in messages().items():
        here = page.partition(f"{title}\n---")[2].partition("\n\n")[2].partition("\n\n")[0].splitlines()
        assert [line(client, texts[client]) for client in known] == [each for each in here if each.split(":")[1] in known], title
