"""``--upstream URL``: the option, what is told, and two servers in a row as users start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
from tests.conftest import LOCALHOST, exchange
from tests.program import Run, Start

from socks5srv.client import Proxy, connect
from socks5srv.cli.options import parse

URL = "socks5h://anna:sesame@192.0.2.1:1081"


def test_without_the_option_there_is_none() -> None:
    assert parse([]).upstream is None


@pytest.mark.parametrize("url", [URL, "socks5://[2001:db8::1]:1080", "socks5h+gssapi://socks@proxy.example"])
def test_the_option_is_a_url(url: str) -> None:
    assert parse(["--upstream", url]).upstream == Proxy.parse(url)


@pytest.mark.parametrize("url", ["192.0.2.1:1080", "http://192.0.2.1:1080", "socks5h://anna:sesa/me@192.0.2.1:1080", ""])
def test_what_is_no_url_is_told_without_the_password(url: str, expect_error: Callable[..., str]) -> None:
    message = expect_error(parse, ["--upstream", url])
    assert "argument --upstream: invalid proxy URL: expected socks5h://[NAME:PASSWORD@]HOST:PORT" in message
    assert "sesa/me" not in message


def test_a_file_and_the_environment_keep_the_password_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proxy.conf").write_text(f"--upstream={URL}  # secret\n")
    assert parse([f"@{tmp_path / 'proxy.conf'}"]).upstream == Proxy.parse(URL)
    monkeypatch.setenv("SOCKS5SRV_OPTIONS", f"--upstream {URL}")
    assert parse([]).upstream == Proxy.parse(URL)


def test_two_servers_in_a_row(start: Start, echo: Any) -> None:
    far = start("-u", "anna:sesame", SOCKS5SRV_PASSWORD="unused")
    near = start("-v", "--upstream", f"socks5h://anna:sesame@{LOCALHOST}:{far.port}")
    near.wait_for(f"going out through socks5h://anna:***@{LOCALHOST}:{far.port}")
    with connect(f"socks5h://{LOCALHOST}:{near.port}", "localhost", echo[1]) as sock:
        exchange(sock)
    line = near.wait_for(" ok,")
    assert f"CONNECT localhost:{echo[1]} ({LOCALHOST}:{far.port}) ok, 5 B up, 5 B down" in line
    assert f"user anna CONNECT localhost:{echo[1]} (" in far.wait_for(" ok,")
    assert (near.stop(), far.stop()) == (0, 0)
    assert "sesame" not in near.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_server_is_not_its_own_upstream(start: Start, run_command: Run, host: str) -> None:
    taken = start()
    taken.stop()
    error = run_command(str(taken.port), "--upstream", f"socks5h://{host}:{taken.port}").error()
    assert error.startswith(f"--upstream socks5h://{host}:{taken.port} is this server itself\n  ")


def test_another_server_on_the_same_port_elsewhere_is_one(start: Start) -> None:
    port = start().port
    assert start("--upstream", f"socks5h://192.0.2.1:{port}").stop() == 0
    assert start("--upstream", f"socks5h://no-such-host.invalid:{port}").stop() == 0
