"""``--self-test``: three commands, three lines, and an exit code that can be relied on."""

from __future__ import annotations

import re

import pytest
from tests.program import Run

from socks5srv import Socks5Handler, Socks5Server
from socks5srv.protocol import Command
from socks5srv.cli import selftest
from socks5srv.cli.selftest import expect, self_test


def test_it_tries_every_command_through_a_server_of_its_own(run_command: Run) -> None:
    outcome = run_command("--self-test")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert re.fullmatch(r"CONNECT +ok, \d+\.\d ms\nBIND +ok, \d+\.\d ms\nUDP ASSOCIATE +ok, \d+\.\d ms\n", outcome.stdout)


def test_there_is_a_test_for_every_command() -> None:
    assert {name.replace(" ", "_") for name in selftest.TESTS} == {command.name for command in Command}


def test_what_does_not_work_is_told_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Socks5Handler):
        do_BIND = None

    monkeypatch.setattr(selftest, "Socks5Server", lambda address: Socks5Server(address, Broken))
    assert self_test() == 1
    connect, bind, udp = capsys.readouterr().out.splitlines()
    assert connect.startswith("CONNECT        ok, ")
    assert re.fullmatch(r"BIND +failed: RequestFailed: the proxy says: command not supported", bind)
    assert udp.startswith("UDP ASSOCIATE  ok, ")


def test_what_came_instead_is_told() -> None:
    expect(b"there", b"there")
    with pytest.raises(RuntimeError, match="b'here' came instead of b'there'"):
        expect(b"here", b"there")
