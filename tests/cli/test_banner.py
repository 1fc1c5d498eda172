"""The first words: where it listens, and what to paste where."""

from __future__ import annotations

import os
import re
import socket
from ipaddress import ip_network
from typing import Any, List

import pytest
from tests.conftest import Place
from tests.program import AtTerminal, Start

from socks5srv import __version__
from socks5srv.cli import banner as module
from socks5srv.cli.banner import banner, listening, reachable_address
from socks5srv.policy import is_loopback
from socks5srv.protocol import Address, Command

WIDTH = 80      # columns of a terminal as it has always been


def addresses(*hosts: str, port: int = 1080) -> List[Address]:
    return [Address.numeric(host, port) for host in hosts]


# --- the banner ---

def test_the_first_lines_say_who_is_served_and_where() -> None:
    lines = banner(addresses("127.0.0.1"), None).split("\n")
    assert lines[0] == f"socks5srv {__version__}  serving this computer only, no password"
    assert lines[1] == "proxy address:   socks5h://127.0.0.1:1080"


@pytest.mark.parametrize("line", [
    "curl -x socks5h://127.0.0.1:1080 example.com", "export ALL_PROXY=socks5h://127.0.0.1:1080",
    'pip install "requests[socks]"', 'requests.get(url, proxies={"http": P, "https": P})',
    "chrome --proxy-server=socks5://127.0.0.1:1080",
    "SOCKS Host 127.0.0.1, Port 1080, SOCKS v5", "Proxy DNS when using SOCKS v5", "HTTP and HTTPS Proxy empty",
    "Ctrl-C stops, h + Enter shows keys.",
])
def test_it_has_the_lines_to_paste(line: str) -> None:
    assert line in banner(addresses("127.0.0.1"), None)


def test_with_users_it_says_how_many_and_warns() -> None:
    text = banner(addresses("127.0.0.1"), 2)
    assert "password required (2 users)" in text
    assert "(1 user)" in banner(addresses("127.0.0.1"), 1)
    assert "socks5h://anna%40home:PASSWORD@127.0.0.1:1080" in banner(addresses("127.0.0.1"), 1, user="anna@home")
    assert "socks5h://NAME:PASSWORD@127.0.0.1:1080" in text
    assert "SOCKS5 sends the password unencrypted" in text
    assert "Firefox and Chrome have no place to type a SOCKS5 password" in text
    assert "SOCKS Host" not in text
    assert "chrome --proxy-server" not in text


def test_with_kerberos_it_says_so_and_warns_if_a_password_does_as_well() -> None:
    text = banner(addresses("127.0.0.1"), None, gssapi=True)
    assert "only, Kerberos required\n" in text
    assert "clients need a ticket (kinit)" in text
    assert "password" not in text.lower()
    text = banner(addresses("127.0.0.1"), 2, gssapi=True)
    assert "only, Kerberos or password (2 users)\n" in text
    assert "clients need a ticket (kinit)" in text
    assert "SOCKS5 sends the password unencrypted" in text
    assert max(map(len, text.split("\n"))) <= WIDTH


def test_beyond_loopback_it_says_so() -> None:
    assert "serving other computers, too" in banner(addresses("127.0.0.1", "192.168.1.20"), 1)
    assert "serving this computer only" in banner(addresses("127.0.0.1", "::1", "127.0.0.2"), None)


def test_it_says_which_balancers_have_to_send_a_header() -> None:
    lines = banner(addresses("127.0.0.1"), 1, balancers=[ip_network("10.0.0.2"), ip_network("2001:db8::/64")]).split("\n")
    assert "serving other computers, too" in lines[0]
    assert lines[1:3] == ["balancers:       10.0.0.2/32, with a PROXY header", "balancers:       2001:db8::/64, with a PROXY header"]


def test_several_addresses_are_all_listed_and_the_first_is_the_one_to_paste() -> None:
    text = banner(addresses("127.0.0.1", "::1"), None)
    assert "listening on     127.0.0.1:1080\nlistening on     [::1]:1080\nproxy address:   socks5h://127.0.0.1:1080\n" in text


@pytest.mark.parametrize(("scope", "zone"), [(1, socket.if_indextoname(1)), (2 ** 31 - 1, str(2 ** 31 - 1))], ids=["there", "gone"])
def test_a_link_local_address_is_pasted_with_its_zone(scope: int, zone: str) -> None:
    """Programs cannot reach it without; and in a URL a percent sign is written as one."""
    places = [Address.numeric(f"fe80::1%{scope}", 1080), *addresses("127.0.0.1")]
    text = banner(places, None)
    assert f"listening on     [fe80::1%{zone}]:1080\n" in text
    assert f"SOCKS Host fe80::1%{zone}, Port 1080" in text
    assert text.count(f"[fe80::1%25{zone}]:1080") == 4
    assert listening(places, None, [])["urls"] == [f"socks5h://[fe80::1%25{zone}]:1080", "socks5h://127.0.0.1:1080"]
    assert "serving other computers, too" in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_is_no_address_to_paste(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.outbound, "local_address_towards", lambda *_arguments: "192.168.1.20")
    assert reachable_address(Address.numeric(host, 1080)) == Address.numeric("192.168.1.20", 1080)
    assert "curl -x socks5h://NAME:PASSWORD@192.168.1.20:1080 " in banner(addresses(host), 1)


def test_without_a_network_a_wildcard_is_reached_by_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_arguments: Any) -> str:
        raise OSError("network is unreachable")

    monkeypatch.setattr(module.outbound, "local_address_towards", unreachable)
    assert reachable_address(Address.numeric("0.0.0.0", 1080)) == Address.numeric("127.0.0.1", 1080)


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("192.168.1.20", False),
])
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("users", [None, 1])
@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("127.0.0.1", "::1"), ("::1",)])
def test_the_banner_of_a_loopback_server_fits_the_terminal(hosts: Any, users: Any) -> None:
    lines = banner(addresses(*hosts), users).split("\n")
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= 18


@pytest.mark.parametrize(("host", "port", "users"), [
    ("192.168.100.200", 10800, 1), ("127.0.0.1", 10800, 1), ("2001:db8::192:168:100:200", 10800, None),
])
def test_the_banner_of_any_server_fits_the_terminal(host: str, port: int, users: Any) -> None:
    assert max(map(len, banner(addresses(host, port=port), users).split("\n"))) <= WIDTH


@pytest.mark.parametrize(("users", "gssapi", "auth"), [
    (None, False, "none"), (1, False, "password"), (None, True, "gssapi"), (1, True, "gssapi,password"),
])
def test_programs_are_told_the_same(users: Any, gssapi: bool, auth: str) -> None:
    assert listening(addresses("127.0.0.1", "::1"), users, frozenset([Command.UDP_ASSOCIATE, Command.CONNECT]), gssapi) == {
        "urls": ["socks5h://127.0.0.1:1080", "socks5h://[::1]:1080"], "auth": auth, "commands": ["connect", "udp"], "pid": os.getpid(),
    }


# --- on the screen ---

def test_at_a_terminal_the_banner_is_shown_and_at_the_end_the_summary(at_terminal: AtTerminal, echo: Place) -> None:
    terminal = at_terminal("0")
    text = terminal.wait_for("Ctrl-C stops, h + Enter shows keys.")
    [terminal.port] = map(int, re.findall(r"proxy address:   socks5h://127\.0\.0\.1:(\d+)\n", text))
    assert text.startswith(banner(addresses("127.0.0.1", port=terminal.port), None))
    assert max(map(len, text.split("\n"))) <= WIDTH
    terminal.tunnel(echo).close()
    code, text = terminal.talk("closed by client\n", "\x03")
    assert code == 0
    after = text[text.index("^C"):]
    assert re.search(r"stopped after \d s: 1 connection \(1 succeeded, 0 failed\) from 1 client address,", after)
    assert f"  most traffic  127.0.0.1:{echo[1]}: 10 B\n" in after
    assert "listening" not in text


def test_without_a_terminal_one_line_is_enough(start: Start) -> None:
    service = start()
    line = service.wait_for("listening")
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d listening socks5h://127\.0\.0\.1:{service.port} auth=none commands=connect,bind,udp pid={service.process.pid}", line,
    )
    assert service.stderr == line + "\n"


def test_at_a_terminal_quiet_is_quiet(at_terminal: AtTerminal) -> None:
    code, text = at_terminal("-q", "0", "--port-file", "/dev/stdout").talk("\n", "\x03")
    assert code == 0
    assert re.fullmatch(r"\d+\n(\^C)?", text)
