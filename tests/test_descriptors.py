"""How many descriptors there are, and who may have the last of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import pytest

from socks5srv import descriptors as module
from socks5srv.descriptors import CLIENT, Descriptors, open_at_once


@pytest.fixture
def with_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Descriptors]:
    def make(limit: float) -> Descriptors:
        monkeypatch.setattr(module, "descriptor_limit", lambda: limit)
        return Descriptors()

    return make


@pytest.mark.parametrize(("limit", "most"), [(256, 84), (1024, 400), (20000, 9888), (float("inf"), float("inf")), (20, 1), (0, 1)])
def test_as_many_clients_fit_in_as_the_limit_allows(limit: float, most: float, with_limit: Callable[[float], Descriptors]) -> None:
    found = with_limit(limit)
    assert found.most_clients == most
    for _ in range(min(int(min(most, 10000)), 10000)):
        assert found.take_for_client()
    if most < 10000:
        assert found.are_scarce()
        assert not found.take_for_client()
    found.give_back(CLIENT)
    assert found.take_for_client()


def test_new_clients_leave_some_and_what_is_nice_to_have_leaves_fewer(with_limit: Callable[[float], Descriptors]) -> None:
    found = with_limit(256)
    while found.take_for_client():
        pass
    while found.take_if_plenty(1):
        pass
    taken = found.taken
    assert not found.take_for_client()
    assert found.take(10)
    assert found.taken == taken + 10
    while found.take(1):
        pass
    assert found.taken == found.room == 256 - module.RESERVED


def test_what_is_set_aside_is_nobody_elses(with_limit: Callable[[float], Descriptors]) -> None:
    found = with_limit(256)
    most = found.most_clients
    found.set_aside(40)
    assert found.most_clients == most - 15
    found.measure()
    assert found.most_clients == most - 15
    found.set_aside(-40)
    assert found.most_clients == most


def test_the_limit_is_that_of_the_system() -> None:
    resource = pytest.importorskip("resource", reason="not on this platform: limits of descriptors")
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert module.descriptor_limit() in (soft, float("inf"))


@pytest.mark.parametrize("flag", [True, False], ids=["with O_NONBLOCK", "without"])
def test_a_file_is_opened_as_ever_whether_the_system_can_open_without_waiting_or_not(
        flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flag:
        monkeypatch.delattr(os, "O_NONBLOCK", raising=False)
    path = str(tmp_path / "file")
    with open(path, "w", opener=open_at_once) as stream:
        stream.write("octets")
    with open(path, opener=open_at_once) as stream:
        assert stream.read() == "octets"
        assert not stream.isatty()
        assert not flag or not hasattr(os, "O_NONBLOCK") or os.get_blocking(stream.fileno())
