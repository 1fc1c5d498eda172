"""
What the tests of a proxy in the background share: one of them, its client, and a target.

At the end of every test no thread of theirs may be left.
"""

from __future__ import annotations

import threading
from typing import Iterator

import pytest

from socks5srv.testing.proxy import Proxy, start
from socks5srv.testing.targets import EchoServer

from ..conftest import Client, server_threads


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in server_threads():
        if thread.name == "socks5srv-lookup":       # those are not waited for, but have to end
            thread.join(10)
    assert server_threads() == []
    assert [thread for thread in threading.enumerate() if thread.name == "target"] == []


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with start() as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Client]:
    with Client(proxy.address) as client:
        yield client


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer() as echo:
        yield echo
