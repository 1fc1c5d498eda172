"""``--status``: the option, and the program with it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any, Tuple

import pytest
from tests.conftest import LOCALHOST, TIMEOUT, Client, can_bind, eventually
from tests.monitor.watched import Page

from socks5srv.cli.options import parse
from socks5srv.cli.startup import status_address
from socks5srv.service.settings import Settings


@pytest.mark.parametrize(("text", "place"), [
    ("9180", ("127.0.0.1", 9180)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("localhost:1", ("127.0.0.1", 1)),
])
def test_a_port_alone_is_on_this_computer(text: str, place: Tuple[str, int]) -> None:
    settings = parse(["--status", text])
    assert isinstance(settings, Settings)
    assert settings.status is not None
    assert status_address(*settings.status, False)[:2] == place


def test_other_computers_see_it_only_when_that_is_said_in_so_many_words(run_command: Any) -> None:
    done = run_command("0", "--status", "0.0.0.0:9180")
    assert done.code == 2
    assert done.stderr.splitlines() == [
        "socks5srv: error: --status 0.0.0.0:9180 would show other computers who uses this proxy, and for what",
        "  for this computer only:  --status 9180",
        "  for everybody who can reach it, on purpose:  --status-open",
    ]


def test_a_port_that_is_taken_is_told_like_any_other(run_command: Any, listen: Any) -> None:
    port = listen().getsockname()[1]
    done = run_command("0", "--status", str(port))
    assert done.code == 1
    assert done.stderr.splitlines()[:2] == [
        f"socks5srv: error: --status 127.0.0.1:{port}: port {port} on 127.0.0.1 is already in use", "  take another, or a free one with  --status 0",
    ]


@pytest.mark.parametrize("words", [("127.0.0.1:{}",), ("0.0.0.0:{}", "--allow-open-proxy")], ids=" ".join)
def test_the_proxys_own_port_is_told_to_be_that(words: Tuple[str, ...], run_command: Any, closed_port: Any) -> None:
    port = closed_port()[1]
    error = run_command(*(word.format(port) for word in words), "--status", str(port)).error(1)
    assert error == f"--status 127.0.0.1:{port}: that is the proxy's own port\n  take another, or a free one with  --status 0\n"


def test_the_first_line_says_where_the_page_is_and_it_is_there_until_the_end(start: Any) -> None:
    service = start("--status", "0", "--log-format", "json")
    page = Page.at(json.loads(service.wait_for("listening"))["status"])
    eventually(lambda: page.ask("/readyz").status == 200)
    with Client(service.server_address) as client:
        client.greet()
        assert service.stop() == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((LOCALHOST, page.port), TIMEOUT)


def test_the_page_has_the_facts_of_this_run(start: Any) -> None:
    service = start("--status", "0", "--commands", "udp", "-u", "anna:sesame")
    status = Page.of(service).status()
    assert status["listening"] == [f"socks5h://{LOCALHOST}:{service.port}"]
    assert (status["auth"], status["commands"]) == ("password", ["udp"])
    assert not {"pid", "urls"} & set(status)


def test_a_watcher_does_not_keep_it_from_stopping(start: Any) -> None:
    service = start("--status", "0")
    place = (LOCALHOST, Page.of(service).port)
    with socket.create_connection(place, TIMEOUT) as watcher, socket.create_connection(place, TIMEOUT):
        watcher.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        assert watcher.recv(100)
        assert service.stop() == 0


def test_without_the_option_nothing_of_it_is_imported() -> None:
    program = (
        "import sys; from socks5srv.cli import main as run, options; settings = options.parse(['0']);"
        "run.make_node(settings, ['127.0.0.1']).close(); found = [name for name in sys.modules if name.startswith(('http', 'prometheus'))"
        " or '.monitor' in name or '.explain' in name]; print(found)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.skipif(not can_bind("0.0.0.0"), reason="no IPv4 here")
def test_in_a_container_it_can_be_open(start: Any) -> None:
    page = Page.of(start("--status", "0.0.0.0:0", "--status-open"))
    assert page.ask("/healthz", Host="proxy:8080").status == 200
