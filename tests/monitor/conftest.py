"""A server in this process that has a status page, as most of these tests want one."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Iterator

import pytest
from tests.conftest import eventually, serve

from socks5srv.monitor.http import StatusPage

from .watched import Start, Watched


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a server with a page: ``watch(host=, users=, others=, **attributes of the server)``."""
    before = set(threading.enumerate())
    monkeypatch.setattr(StatusPage, "poll_interval", 0.02)
    with ExitStack() as stack:
        def start(**keywords: object) -> Watched:
            watched = Watched(**keywords)
            stack.callback(watched.server.server_close)
            stack.enter_context(watched.page)
            serve(watched.server)
            stack.callback(watched.server.shutdown)
            return watched

        yield start
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("socks5srv") and thread not in before])


@pytest.fixture
def page(watch: Start) -> Watched:
    """Of a server like any other."""
    return watch()
