"""
SIGTERM, as whoever manages services sends it: real signals for real processes, with clients that look at every octet.

(What a server in the same process does is in tests/test_drain.py.)
"""

from __future__ import annotations

import json
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Tuple

import pytest

from socks5srv.cli.options import parse
from socks5srv.cli.startup import port_file
from tests.conftest import Place, eventually, exchange, within
from tests.load import Load
from tests.monitor.watched import Page
from tests.program import AtTerminal, Run, Start, needs_posix, processes_too

pytestmark = needs_posix

needs_reuse_port = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="not on this platform: SO_REUSEPORT")

Words = Tuple[str, ...]


def is_refused(service: Any) -> bool:
    try:
        socket.create_connection(service.server_address, 0.1).close()
    except OSError:
        return True
    return False


# --- what becomes of the clients ---

@processes_too
def test_clients_are_waited_for_and_then_it_ends_with_exit_code_0(words: Words, start: Start, echo: Place) -> None:
    service = start(*words, "--drain-timeout", "60", "--status", "0")
    page, tunnels = Page.of(service), [service.tunnel(echo) for _ in range(3)]
    assert page.ask("/readyz")[:2] == (200, b"ok\n")
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("draining, with 3 connections open")
    eventually(lambda: is_refused(service))
    assert page.ask("/readyz")[:2] == (503, b"draining\n")
    assert page.ask("/healthz")[:2] == (200, b"ok\n")
    for tunnel in tunnels:
        exchange(tunnel)
        assert service.process.poll() is None
        tunnel.close()
    assert service.process.wait(within(3)) == 0
    assert "(3 succeeded, " in service.stderr.splitlines()[-1]
    assert "server stopped" not in service.stderr
    assert "Traceback" not in service.stderr


@processes_too
@pytest.mark.parametrize(("options", "at_least", "at_most"), [
    ((), 3, 5), (("--drain-timeout", "0"), 0, 1.5), (("--drain-timeout", "1"), 1, 3), (("--drain-grace", "1", "--drain-timeout", "0"), 1, 3),
], ids=["default", "none", "a second", "grace"])
def test_but_not_for_ever(options: Words, at_least: float, at_most: float, words: Words, start: Start, echo: Place) -> None:
    service = start(*words, *options)
    tunnel = service.tunnel(echo)
    began = time.monotonic()
    assert service.stop(signal.SIGTERM) == 0
    assert at_least <= time.monotonic() - began < within(at_most)
    assert tunnel.rest() == b""
    assert service.stderr.splitlines()[-2].endswith(" server stopped")


@processes_too
def test_without_clients_nobody_waits(words: Words, start: Start) -> None:
    service = start(*words)
    began = time.monotonic()
    assert service.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < within(1)


@processes_too
def test_for_the_time_of_grace_a_balancer_can_notice(words: Words, start: Start, echo: Place) -> None:
    service = start(*words, "--drain-grace", "1.5", "--status", "0")
    page = Page.of(service)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    eventually(lambda: page.ask("/readyz")[:2] == (503, b"draining\n"))
    while time.monotonic() - began < 1:
        service.tunnel(echo).close()
    assert service.process.wait(within(5)) == 0
    assert time.monotonic() - began >= 1.5


def test_the_json_log_has_it(start: Start, echo: Place) -> None:
    service = start("--log-format", "json")
    tunnel = service.tunnel(echo)
    service.process.send_signal(signal.SIGTERM)
    line = json.loads(service.wait_for('"drain"'))
    assert (line["event"], line["connections"]) == ("drain", 1)
    tunnel.close()
    assert service.process.wait(within(3)) == 0
    assert json.loads(service.stderr.splitlines()[-1])["event"] == "stop"


# --- who does not want to wait ---

@processes_too
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_is_now(second: int, words: Words, start: Start, echo: Place) -> None:
    service = start(*words, "--drain-grace", "60", "--drain-timeout", "60")
    tunnel = service.tunnel(echo)
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("draining")
    assert not service.ended_within(0.2)
    began = time.monotonic()
    assert service.stop(second) == 0
    assert time.monotonic() - began < within(1.5)
    assert tunnel.rest() == b""


def test_ctrl_c_at_a_terminal_is_always_now(at_terminal: AtTerminal, echo: Place) -> None:
    terminal = at_terminal("0", "--drain-grace", "60", "--drain-timeout", "60")
    terminal.wait_until_it_serves()
    tunnel = terminal.tunnel(echo)
    began = time.monotonic()
    terminal.type("\x03")
    assert terminal.end()[0] == 0
    assert time.monotonic() - began < within(1)
    assert tunnel.rest() == b""


@pytest.mark.parametrize("option", ["--drain-grace", "--drain-timeout"])
@pytest.mark.parametrize("text", ["-1", "soon", "nan", "inf"])
def test_a_time_that_is_none_is_told(option: str, text: str, run_command: Run) -> None:
    assert f"invalid number of seconds {text!r}: expected 0 or more" in run_command(f"{option}={text}", "0").error()


# --- another server takes over ---

@needs_reuse_port
@processes_too
def test_a_second_server_on_the_same_port_takes_over_and_nobody_is_lost(words: Words, start: Start, echo: Place) -> None:
    """Three times, with other options each time."""
    options = (*words, "-q", "--reuse-port", "--drain-timeout", "60")
    service = start(*options)
    with Load(service.port, echo) as load:
        for number in range(3):
            successor = start(*options, "--max-clients", str(900 + number), port=str(service.port))
            assert service.stop(signal.SIGTERM) == 0
            assert successor.port_file.exists()
            service = successor
            load.wait_for(20)
    assert load.lost == []
    assert service.stop() == 0


@needs_reuse_port
@pytest.mark.parametrize("options", [((), ()), (("--reuse-port",), ()), ((), ("--reuse-port",))], ids=["neither", "the first", "the second"])
def test_only_if_both_say_so(options: Tuple[Words, Words], start: Start, run_command: Run) -> None:
    service = start(*options[0])
    assert "is already in use" in run_command(*options[1], str(service.port)).error(1)


def test_the_port_file_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "port"
    with ExitStack() as first, port_file(str(path), 2) as write_second:
        first.enter_context(port_file(str(path), 1))()
        write_second()
        first.close()
        assert path.read_text() == "2\n"


def test_where_ports_cannot_be_shared_it_says_so(monkeypatch: pytest.MonkeyPatch, expect_error: Callable[..., str]) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
    assert expect_error(parse, ["--reuse-port"]).startswith("--reuse-port: two servers cannot share a port on this system")
