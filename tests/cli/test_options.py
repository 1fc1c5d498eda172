"""
The command line: what it means, and what is said of a mistake.
"""

from __future__ import annotations

import os
import pickle
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest

from socks5srv import __version__
from socks5srv.protocol import Command
from socks5srv.cli.options import build_parser, parse, print_hash
from socks5srv.cli.selftest import self_test
from socks5srv.service.settings import Settings

Expect = Callable[..., str]


def listens(*words: str) -> Any:
    """On which addresses, and which port."""
    settings: Any = parse(words)
    return list(settings.hosts), settings.port


# --- where to listen ---

def test_without_options_it_is_this_computer_only_on_port_1080_and_nobody_logs_in() -> None:
    assert listens() == (["127.0.0.1"], 1080)
    assert parse([]).users is None


@pytest.mark.parametrize(("words", "bind", "port"), [
    ("8080", ["127.0.0.1"], 8080),
    ("0", ["127.0.0.1"], 0),
    ("-p 0", ["127.0.0.1"], 0),
    ("--port 65535", ["127.0.0.1"], 65535),
    ("-b 192.168.1.20", ["192.168.1.20"], 1080),
    ("192.168.1.20:8080", ["192.168.1.20"], 8080),
    ("localhost:8080", ["localhost"], 8080),
    ("[::1]:0", ["::1"], 0),
    ("-b ::1 8080", ["::1"], 8080),
    ("-b 127.0.0.1 -b ::1 -p 8080", ["127.0.0.1", "::1"], 8080),
    ("127.0.0.1:8080 --bind ::1", ["127.0.0.1", "::1"], 8080),
])
def test_it_listens_where_it_is_told_to(words: str, bind: Any, port: int) -> None:
    assert listens(*words.split()) == (bind, port)


@pytest.mark.parametrize("word", ["65536", "99999", "localhost:65536", "localhost:", "localhost:http", "\u00b2", "127.0.0.1:-1"])
def test_what_is_no_port_is_told(word: str, expect_error: Expect) -> None:
    assert "is no port: a number from 0 to 65535 is" in expect_error(parse, [word])


def test_a_port_alone_may_not_be_negative(expect_error: Expect) -> None:
    assert "'-1' is no port" in expect_error(parse, ["--port=-1"])


def test_a_colon_and_a_port_are_too_little_since_programs_differ_in_what_they_mean(expect_error: Expect) -> None:
    message = expect_error(parse, [":1080"])
    assert "127.0.0.1:1080 for this computer only" in message
    assert "0.0.0.0:1080 for all" in message


@pytest.mark.parametrize("word", ["localhost", "192.168.1.20"])
def test_an_address_without_a_port_is_told_both_ways_to_give_it(word: str, expect_error: Expect) -> None:
    message = expect_error(parse, [word])
    assert f"-b {word}," in message
    assert f"{word}:1080" in message


@pytest.mark.parametrize("word", ["::1", "::1:1080", "2001:db8::1:1080"])
def test_an_ipv6_address_and_a_port_need_brackets(word: str, expect_error: Expect) -> None:
    assert "needs brackets around its IPv6 address, as in [::1]:1080" in expect_error(parse, [word])


@pytest.mark.parametrize("words", ["8080 -p 8080", "127.0.0.1:8080 -p 0"])
def test_a_port_given_twice_is_refused(words: str, expect_error: Expect) -> None:
    assert "the port is given twice" in expect_error(parse, words.split())


# --- who may use it ---

@pytest.mark.parametrize(("words", "users"), [
    ("-u anna:sesame", {"anna": "sesame"}),
    ("--user anna:sesame", {"anna": "sesame"}),
    ("-u anna:sesame -u ben:4711", {"anna": "sesame", "ben": "4711"}),
    ("-u anna:with:colons:", {"anna": "with:colons:"}),
    ("-u 'anna b:pass word'", {"anna b": "pass word"}),
    ("-u \u00e4nne:\u00fcber", {"\u00e4nne": "\u00fcber"}),
])
def test_users_have_names_and_passwords(words: str, users: Any) -> None:
    assert parse(shlex.split(words)).users == users


def test_a_password_that_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", "from outside")
    assert parse(["-u", "anna", "-u", "ben:4711"]).users == {"anna": "from outside", "ben": "4711"}


def test_without_a_terminal_to_ask_at_a_password_is_needed(run_command: Callable[..., Any]) -> None:
    outcome = run_command("-u", "anna", "0")
    assert outcome.code == 2
    assert "user 'anna' has no password: set SOCKS5SRV_PASSWORD, or write -u anna:PASSWORD" in outcome.stderr


def test_at_a_terminal_the_password_is_asked_for_and_not_shown(at_terminal: Callable[..., Any]) -> None:
    terminal = at_terminal("-u", "anna", "0")
    terminal.wait_for("Password for anna: ")
    terminal.type("sesame\n")
    terminal.wait_for("login required (1 user)")
    terminal.type("\x03")
    code, text = terminal.end()
    assert code == 0
    assert "sesame" not in text


def test_ctrl_c_at_the_prompt_is_no_crash(at_terminal: Callable[..., Any]) -> None:
    terminal = at_terminal("-u", "anna", "0")
    terminal.wait_for("Password for anna: ")
    terminal.type("\x03")
    code, text = terminal.end()
    assert code == 2
    assert "no password was given" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("login", [":sesame", "a" * 256 + ":sesame", "\u00e4" * 128 + ":sesame", "an\x1bna:sesame", "an\nna:sesame"])
def test_a_name_that_socks5_cannot_carry_is_refused(login: str, expect_error: Expect) -> None:
    assert "SOCKS5 takes 1 to 255 octets of text" in expect_error(parse, ["-u", login])


@pytest.mark.parametrize("password", ["sesame" * 50, "sesame\x00", "sesame\n"])
def test_a_password_that_socks5_cannot_carry_is_refused_without_being_shown(password: str, expect_error: Expect) -> None:
    message = expect_error(parse, ["-u", "anna:" + password])
    assert "the password of user 'anna'" in message
    assert "sesame" not in message


@pytest.mark.parametrize(("words", "variable"), [("-u anna:", "sesame"), ("-u anna", "")])
def test_an_empty_password_is_none(words: str, variable: str, monkeypatch: pytest.MonkeyPatch, expect_error: Expect) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", variable)
    assert "the password of user 'anna' does not do" in expect_error(parse, words.split())


# --- what it may do, and how it goes out ---

@pytest.mark.parametrize(("text", "commands"), [
    ("connect", {Command.CONNECT}),
    ("connect,udp", {Command.CONNECT, Command.UDP_ASSOCIATE}),
    ("bind,connect,udp", set(Command)),
])
def test_commands_can_be_chosen(text: str, commands: Any) -> None:
    assert parse(["--commands", text]).commands == commands


@pytest.mark.parametrize("text", ["fe80::/10%eth0", "fe80::1%2"])
def test_a_network_has_no_zone(text: str, expect_error: Expect) -> None:
    assert f"{text!r} has a zone, and networks are known without" in expect_error(parse, ["--allow-from", text])


@pytest.mark.parametrize("text", ["listen", "connect,", "", "CONNECT", "connect bind"])
def test_an_unknown_command_is_told_which_there_are(text: str, expect_error: Expect) -> None:
    assert "is no command; choose from connect,bind,udp" in expect_error(parse, ["--commands", text])


@pytest.mark.parametrize(("words", "family"), [("", socket.AF_UNSPEC), ("-4", socket.AF_INET), ("-6", socket.AF_INET6)])
def test_a_family_can_be_chosen(words: str, family: Any) -> None:
    assert parse(words.split()).family == family


def test_only_one_family_can_be_chosen(expect_error: Expect) -> None:
    assert "-4" in expect_error(parse, ["-4", "-6"])


@pytest.mark.parametrize(("words", "addresses"), [
    ("", None), ("--source 192.0.2.7", ("192.0.2.7",)), ("--source 2001:DB8:0::7", ("2001:db8::7",)),
    ("--source 2001:db8::7 --source 192.0.2.7", ("2001:db8::7", "192.0.2.7")), ("-6 --source 2001:db8::7", ("2001:db8::7",)),
])
def test_a_source_address_can_be_chosen_for_each_family(words: str, addresses: Any) -> None:
    assert parse(words.split()).source == addresses


@pytest.mark.parametrize(("words", "complaint"), [
    ("--source 192.0.2.7 --source 192.0.2.8", "--source is given twice for IPv4: one address of each family is enough"),
    ("--source ::1 --source 192.0.2.8 --source ::1", "--source is given twice for IPv6: one address of each family is enough"),
    ("-6 --source 192.0.2.7", "-6 and --source 192.0.2.7 leave no way out: leave one of them out"),
    ("-4 --source ::1", "-4 and --source ::1 leave no way out: leave one of them out"),
])
def test_sources_that_make_no_sense_together_are_refused(words: str, complaint: str, expect_error: Expect) -> None:
    assert expect_error(parse, words.split()) == complaint


@pytest.mark.parametrize("text", ["fe80::1%eth0", "fe80::1%1", "fe80::1", "2001:db8::7%eth0"])
def test_a_source_has_no_zone(text: str, expect_error: Expect) -> None:
    assert f"{text!r} reaches only one link: give an address without a zone" in expect_error(parse, ["--source", text])


@pytest.mark.parametrize("text", ["localhost", "", "300.0.0.1", "192.0.2.7:80"])
def test_a_source_has_to_be_an_ip_address(text: str, expect_error: Expect) -> None:
    assert f"{text!r} is no IP address" in expect_error(parse, ["--source", text])


@pytest.mark.parametrize("name", ["handshake", "connect", "bind", "idle"])
def test_every_timeout_is_a_setting_of_the_server(name: str) -> None:
    from socks5srv import Socks5Server

    assert getattr(parse([f"--{name}-timeout", "2.5"]), f"{name}_timeout") == 2.5
    assert getattr(parse([]), f"{name}_timeout") is None, "then the server's own default counts"
    assert hasattr(Socks5Server, f"{name}_timeout")


@pytest.mark.parametrize("text", ["0", "-1", "soon", "", "nan", "inf", "1e10"])
def test_a_timeout_has_to_be_a_number_of_seconds(text: str, expect_error: Expect) -> None:
    assert f"must be a positive number of seconds, not {text!r}" in expect_error(parse, [f"--idle-timeout={text}"])


# --- options from elsewhere ---

def test_a_file_has_options_line_by_line_with_comments(tmp_path: Path) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text("# who\n\n-u anna:'pass word'   # the boss\n--user ben:4711\n  # where\n-b 127.0.0.1 -p 8080\n")
    options = parse([f"@{file}"])
    assert options.users == {"anna": "pass word", "ben": "4711"}
    assert (options.hosts, options.port) == (("127.0.0.1",), 8080)


@pytest.mark.parametrize("text", ["-p 8080\n", "# where\n-p 8080\n"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path, text: str) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text(text, encoding="utf-8-sig")
    assert parse([f"@{file}"]).port == 8080


def test_what_stands_behind_a_file_wins(tmp_path: Path) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text("-p 8080\n--idle-timeout 60\n")
    options = parse([f"@{file}", "-p", "9090"])
    assert (options.port, options.idle_timeout) == (9090, 60)


def test_a_number_sign_within_a_password_is_no_comment(tmp_path: Path) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text("-u anna:sesame#4711\n")
    assert parse([f"@{file}"]).users == {"anna": "sesame#4711"}


def test_a_file_that_is_not_there_is_told(tmp_path: Path, expect_error: Expect) -> None:
    assert "no-such.conf" in expect_error(parse, [f"@{tmp_path / 'no-such.conf'}"])


def test_a_quote_that_is_not_closed_in_a_file_is_told(tmp_path: Path, expect_error: Expect) -> None:
    file = tmp_path / "proxy.conf"
    file.write_text("-u 'anna:sesame\n")
    message = expect_error(parse, [f"@{file}"])
    assert "proxy.conf:1: No closing quotation" in message
    assert "sesame" not in message


def test_a_file_that_is_no_text_is_told(tmp_path: Path, expect_error: Expect) -> None:
    file = tmp_path / "proxy.conf"
    file.write_bytes(b"-u \xffanna:sesame\n")      # from Python 3.12 on it can be read, but no user is called so
    assert "sesame" not in expect_error(parse, [f"@{file}"])


def test_the_environment_has_further_options_which_the_command_line_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKS5SRV_OPTIONS", "-p 8080 --idle-timeout 60 -u 'anna:pass word' -b 127.0.0.1")
    options = parse(["-p", "9090", "-b", "::1"])
    assert options.users == {"anna": "pass word"}
    assert (options.port, options.idle_timeout) == (9090, 60)
    assert options.hosts == ("127.0.0.1", "::1"), "what can be repeated adds up"


def test_a_quote_that_is_not_closed_in_the_environment_is_told(monkeypatch: pytest.MonkeyPatch, expect_error: Expect) -> None:
    monkeypatch.setenv("SOCKS5SRV_OPTIONS", "-u 'anna:sesame")
    assert "SOCKS5SRV_OPTIONS" in expect_error(parse, [])


# --- the rest ---

@pytest.mark.parametrize("words", ["--frobnicate", "1080 1081", "--log-format xml", "--color sometimes", "--port-file"])
def test_a_wrong_option_is_told(words: str, expect_error: Expect) -> None:
    assert expect_error(parse, words.split())


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_the_version_can_be_asked_for(word: str, run_command: Callable[..., Any]) -> None:
    outcome = run_command(word)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, f"socks5srv {__version__}\n", "")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_every_option_in_a_group_and_fits_80_columns(word: str, run_command: Callable[..., Any]) -> None:
    outcome = run_command(word)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("usage: socks5srv [options] [PORT | ADDRESS:PORT]\n")
    for action in build_parser()._actions:
        assert action.help, f"{action} says nothing"
        for option in action.option_strings:
            assert option in outcome.stdout
    assert "SOCKS5SRV_OPTIONS" in outcome.stdout
    assert "Exit codes:" in outcome.stdout
    assert max(map(len, outcome.stdout.split("\n"))) <= 80


def test_every_example_in_the_help_is_a_command_line_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", "sesame")
    monkeypatch.chdir(tmp_path)
    Path("proxy.conf").write_text("-p 8080\n")
    epilog = build_parser().epilog or ""
    examples = [line.strip() for line in epilog.split("\n") if line.startswith("  socks5srv")]
    assert len(examples) >= 4
    for example in examples:
        parse(shlex.split(example.split("   ")[0].partition("  ")[0])[1:])


# --- what comes of them ---

def test_without_options_all_settings_have_their_defaults() -> None:
    assert parse([]) == Settings()


def test_settings_travel_to_a_worker_as_they_are() -> None:
    words = "-u anna:sesame --allow *.example:80 --allow-from 10.0.0.0/8 -4 --upstream socks5h://a:b@192.0.2.1:1 --status 0 --workers 2 -vv"
    settings: Any = parse(words.split())
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.status == ("127.0.0.1", 0)
    assert settings.verbose == 2
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize(("word", "action"), [("--self-test", self_test), ("--hash-password", print_hash)])
def test_some_options_are_done_in_place_of_serving(word: str, action: Any) -> None:
    assert parse([word, "--users-file", "no-such-file"]) is action


def test_a_command_changes_the_port_and_what_is_logged() -> None:
    settings: Any = parse(["--run", "curl", "-v"])
    assert (settings.command, settings.port, settings.quiet, settings.summary) == (("curl", "-v"), 0, True, True)
    assert parse(["-q", "--run", "curl"]).summary is False


# --- --workers ---

@pytest.mark.parametrize("word", ["0", "-1", "257", "1000000000000", "two", "", "1.5", "\u00b2"])
def test_what_is_no_number_of_processes_is_told(word: str, expect_error: Expect) -> None:
    assert f"argument --workers: {word!r} is no number of processes: 1 to 256, or auto, is" in expect_error(parse, [f"--workers={word}"])


def test_by_default_there_is_one_process() -> None:
    assert [workers_of(), workers_of("--workers", "3")] == [1, 3]


def workers_of(*words: str) -> Any:
    settings: Any = parse(words)
    return settings.workers


def test_auto_asks_which_cpus_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 3, 5}, raising=False)
    assert workers_of("--workers", "auto") == 3


@pytest.mark.parametrize(("number", "workers"), [(6, 6), (None, 1)])
def test_auto_counts_all_cpus_where_the_system_does_not_tell(number: Optional[int], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: number)
    assert workers_of("--workers", "auto") == workers


def test_a_system_that_cannot_do_it_says_so(monkeypatch: pytest.MonkeyPatch, expect_error: Expect) -> None:
    monkeypatch.setattr("socks5srv.cli.options.os", SimpleNamespace(name="nt", environ=os.environ, cpu_count=lambda: 4))
    for word in ("2", "auto"):
        assert "several processes cannot share a listening socket on this system" in expect_error(parse, ["--workers", word])
    assert workers_of("--workers", "1") == 1
