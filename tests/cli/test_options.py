"""The command line: what it means, and what is said of a mistake."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List, Optional, Tuple

import pytest
from tests.program import COMMAND, AtTerminal, Run, by_shell

from socks5srv import Socks5Server, __version__
from socks5srv.protocol import Command
from socks5srv.cli.options import COMMANDS, build_parser, parse, print_hash
from socks5srv.cli.selftest import self_test
from socks5srv.cli.unknown import HABITS
from socks5srv.service.settings import Settings

Conf = Expect = Callable[..., str]      # what the fixtures are


@pytest.fixture
def conf(tmp_path: Path) -> Conf:
    """The word for a file with these options: ``conf("-p 8080\\n")``."""
    def written(text: str, encoding: str = "utf-8") -> str:
        (tmp_path / "proxy.conf").write_text(text, encoding=encoding)
        return f"@{tmp_path / 'proxy.conf'}"

    return written


def listens(*words: str) -> Any:
    """On which addresses, and which port."""
    settings: Any = parse(words)
    return list(settings.hosts), settings.port


# --- where to listen ---

def test_without_options_it_is_this_computer_only_on_port_1080_and_nobody_logs_in() -> None:
    assert listens() == (["127.0.0.1"], 1080)
    assert parse([]).users is None


@pytest.mark.parametrize(("words", "bind", "port"), [
    ("8080", ["127.0.0.1"], 8080), ("0", ["127.0.0.1"], 0), ("-p 0", ["127.0.0.1"], 0), ("--port 65535", ["127.0.0.1"], 65535),
    ("-b 192.168.1.20", ["192.168.1.20"], 1080), ("192.168.1.20:8080", ["192.168.1.20"], 8080),
    ("localhost:8080", ["localhost"], 8080), ("[::1]:0", ["::1"], 0), ("-b ::1 8080", ["::1"], 8080),
    ("-b 127.0.0.1 -b ::1 -p 8080", ["127.0.0.1", "::1"], 8080), ("127.0.0.1:8080 --bind ::1", ["127.0.0.1", "::1"], 8080),
])
def test_it_listens_where_it_is_told_to(words: str, bind: Any, port: int) -> None:
    assert listens(*words.split()) == (bind, port)


# --- who may use it ---

@pytest.mark.parametrize(("words", "users"), [
    ("-u anna:sesame", {"anna": "sesame"}), ("--user anna:sesame", {"anna": "sesame"}),
    ("-u anna:sesame -u ben:4711", {"anna": "sesame", "ben": "4711"}), ("-u anna:with:colons:", {"anna": "with:colons:"}),
    ("-u 'anna b:pass word'", {"anna b": "pass word"}), ("-u \u00e4nne:\u00fcber", {"\u00e4nne": "\u00fcber"}),
])
def test_users_have_names_and_passwords(words: str, users: Any) -> None:
    assert parse(shlex.split(words)).users == users


def test_a_password_that_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", "from outside")
    assert parse(["-u", "anna", "-u", "ben:4711"]).users == {"anna": "from outside", "ben": "4711"}


def test_without_a_terminal_to_ask_at_a_password_is_needed(run_command: Run) -> None:
    error = run_command("-u", "anna", "0").error()
    assert "user 'anna' has no password: set SOCKS5SRV_PASSWORD, or write -u anna:PASSWORD" in error


def test_at_a_terminal_the_password_is_asked_for_and_not_shown(at_terminal: AtTerminal) -> None:
    code, text = at_terminal("-u", "anna", "0").talk(
        "Password for anna: ", "sesame\n", "Repeat it: ", "sesame\n", "password required (1 user)", "\x03",
    )
    assert code == 0
    assert "sesame" not in text
    assert re.search(r"socks5h://anna:PASSWORD@127\.0\.0\.1:\d+\n", text)


def test_a_slip_at_the_prompt_is_told_before_it_serves(at_terminal: AtTerminal) -> None:
    code, text = at_terminal("-u", "anna", "0").talk("Password for anna: ", "sesame\n", "Repeat it: ", "seasme\n")
    assert code == 2
    assert text.endswith("socks5srv: error: the two passwords differ\n  try again\n")


@pytest.mark.parametrize("command", [COMMAND, by_shell('trap "" INT; exec "$@"', "/bin/sh")], ids=["as usual", "ignored by a script"])
def test_ctrl_c_at_the_prompt_is_no_crash(command: Tuple[str, ...], at_terminal: AtTerminal) -> None:
    code, text = at_terminal("-u", "anna", "0", command=command).talk("Password for anna: ", "\x03")
    assert code == 2
    assert "no password was given" in text


@pytest.mark.parametrize("password", ["sesame" * 50, "sesame\x00", "sesame\n"])
def test_a_password_that_socks5_cannot_carry_is_refused_without_being_shown(password: str, expect_error: Expect) -> None:
    message = expect_error(parse, ["-u", "anna:" + password])
    assert "invalid password of user 'anna'" in message
    assert "sesame" not in message


@pytest.mark.parametrize(("words", "variable"), [("-u anna:", "sesame"), ("-u anna", "")])
def test_an_empty_password_is_none(words: str, variable: str, monkeypatch: pytest.MonkeyPatch, expect_error: Expect) -> None:
    monkeypatch.setenv("SOCKS5SRV_PASSWORD", variable)
    assert "invalid password of user 'anna'" in expect_error(parse, words.split())


# --- what it may do, and how it goes out ---

@pytest.mark.parametrize(("text", "commands"), [
    ("connect", {Command.CONNECT}), ("connect,udp", {Command.CONNECT, Command.UDP_ASSOCIATE}), ("bind,connect,udp", set(Command)),
])
def test_commands_can_be_chosen(text: str, commands: Any) -> None:
    assert parse(["--commands", text]).commands == commands


@pytest.mark.parametrize(("words", "family"), [("", socket.AF_UNSPEC), ("-4", socket.AF_INET), ("-6", socket.AF_INET6)])
def test_a_family_can_be_chosen(words: str, family: Any) -> None:
    assert parse(words.split()).family == family


@pytest.mark.parametrize(("words", "addresses"), [
    ("", None), ("--source 192.0.2.7", ("192.0.2.7",)), ("--source 2001:DB8:0::7", ("2001:db8::7",)),
    ("--source 2001:db8::7 --source 192.0.2.7", ("2001:db8::7", "192.0.2.7")), ("-6 --source 2001:db8::7", ("2001:db8::7",)),
])
def test_a_source_address_can_be_chosen_for_each_family(words: str, addresses: Any) -> None:
    assert parse(words.split()).source == addresses


def test_addresses_can_be_advertised_for_networks(conf: Conf) -> None:
    file = conf("--advertise=203.0.113.7\n--advertise 10.0.0.0/8=auto\n")
    found = parse([file, "--advertise", "2001:db8::7", "--advertise=fd00::/8=fd00::5", "--advertise", "auto"]).advertise
    assert [(str(each.network), each.host) for each in found] == [
        ("0.0.0.0/0", "203.0.113.7"), ("10.0.0.0/8", "auto"), ("::/0", "2001:db8::7"), ("fd00::/8", "fd00::5"),
    ]
    assert parse([]).advertise == ()


@pytest.mark.parametrize(("words", "ports"), [("", None), ("--udp-ports 20000-20999", range(20000, 21000)), ("--udp-ports 4000", range(4000, 4001))])
def test_ports_can_be_chosen_for_those_who_come_straight(words: str, ports: Any) -> None:
    assert parse(words.split()).udp_ports == ports


@pytest.mark.parametrize("name", ["handshake", "connect", "bind", "idle"])
def test_every_timeout_is_a_setting_of_the_server(name: str) -> None:
    assert getattr(parse([f"--{name}-timeout", "2.5"]), f"{name}_timeout") == 2.5
    assert getattr(parse([]), f"{name}_timeout") is None, "then the server's own default counts"
    assert hasattr(Socks5Server, f"{name}_timeout")


# --- what is told of a mistake ---

MISTAKES: List[Tuple[Any, ...]] = [     # what it is, command lines that make it, and texts of the answer; {!r} is the last word
    (
        "no port", ["65536", "99999", "localhost:65536", "localhost:", "localhost:http", "\u00b2", "127.0.0.1:-1"],
        "invalid port ", "expected 0-65535",
    ),
    ("a port alone that is negative", ["--port=-1", "--port -1"], "invalid port {!r}: expected 0-65535"),
    ("a colon and a port, which is unclear", [":1080"], "127.0.0.1:1080 for this computer only", "0.0.0.0:1080 for all"),
    ("an address without a port, which can be given in two ways", ["localhost", "192.168.1.20"], "-b {},", "{}:1080"),
    ("no brackets", ["::1", "::1:1080", "2001:db8::1:1080"], "invalid address {!r}: IPv6 needs brackets, as in [::1]:1080"),
    ("a port given twice", ["8080 -p 8080", "127.0.0.1:8080 -p 0"], "the port is given twice"),
    (
        "a name SOCKS5 cannot carry", [f"-u '{name}:sesame'" for name in ("a" * 256, "\u00e4" * 128, "an\x1bna", "an\nna")],
        "invalid name", "expected 1 to 255 bytes of printable text",
    ),
    ("no name", ["-u ''", "-u :sesame"], "-u needs a NAME, as in -u anna"),
    ("a command that does not come first", [f"-v {name}" for name in COMMANDS], "the command comes first: socks5srv {} ..."),
    (
        "an unknown command", [f"--commands='{text}'" for text in ("listen", "connect,", "", "CONNECT", "connect bind")],
        "invalid command", "choose from connect,bind,udp",
    ),
    ("both families", ["-4 -6"], "-4"),
    (
        "no number of seconds",
        ["--idle-timeout -1", "--bind-timeout -1.5", *(f"--idle-timeout={text}" for text in ("0", "-1", "soon", "", "nan", "inf", "1e10"))],
        "invalid number of seconds {!r}: expected more than 0",
    ),
    ("a zone", ["--allow-from fe80::/10%eth0", "--allow-from fe80::1%2"], "invalid network {!r}: leave out the zone"),
    (
        "a source with a zone", [f"--source {text}" for text in ("fe80::1%eth0", "fe80::1%1", "fe80::1", "2001:db8::7%eth0")],
        "invalid address {!r}: expected one that is not link-local, without a zone",
    ),
    ("no source", [f"--source '{text}'" for text in ("localhost", "", "300.0.0.1", "192.0.2.7:80")], "invalid address {!r}: expected an IP address"),
    (
        "no number of workers", [f"--workers={text}" for text in ("0", "-1", "257", "1000000000000", "two", "", "1.5", "\u00b2")],
        "argument --workers: invalid number of processes {!r}: expected 1-256, or auto",
    ),
    ("no network, but near one", ["--deny 10.0.0.1/8"], "invalid network {!r}: host bits set; did you mean 10.0.0.0/8?"),
    ("half an address", ["--deny 127.1", "--allow 10.0.0.0/33"], "write it out, as in 127.0.0.1 or 10.0.0.0/8"),
    ("a port by its name", ["--allow example.com:http"], "invalid port in {!r}: expected PORT or PORT-PORT, 0-65535"),
    ("a port in a rule that is none", ["--allow example.com:70000"], "invalid port in {!r}"),
    ("ports the wrong way round", ["--deny :90-80"], "the lower one comes first"),
    ("half a bracket", ["--deny [::1"], "its closing bracket is missing"),
    ("a pattern", ["--deny a.*.example"], "invalid host {!r}: expected NAME, *.DOMAIN, an IP address or NETWORK/BITS"),
    ("nothing", ["--deny ''"], "expected allow TARGET or deny TARGET"),
    ("a network with an address in it", ["--allow-from 192.168.1.7/24"], "did you mean 192.168.1.0/24?"),
    ("the same of a balancer", ["--proxy-protocol 10.0.0.2/8"], "did you mean 10.0.0.0/8?"),
    ("a name as a network", ["--allow-from example.com", "--allow-from 'has host bits set'"], "invalid network {!r}: expected an IP address or NETWORK/BITS"),
    (
        "nothing to advertise", [f"--advertise={text}" for text in ("proxy.example.com", "", "203.0.113.7:1080")],
        "invalid address {!r}: expected an IP address, or one with its network, as in 10.0.0.0/8=10.0.0.5",
    ),
    ("a network to advertise for that is none", ["--advertise 10.0.0.1/8=auto"], "invalid network '10.0.0.1/8': expected NETWORK/BITS without host bits"),
    ("no ports", [f"--udp-ports={text}" for text in ("20000-", "", "20000-70000", "many")], "invalid port in {!r}: expected PORT or PORT-PORT, 0-65535"),
    ("ports for clients the wrong way round", ["--udp-ports 9-8"], "the lower one comes first"),
    ("the port for any port", ["--udp-ports 0-9"], "invalid ports {!r}: 0 is none that a client could send to"),
    ("no levels", [f"--gssapi-levels='{text}'" for text in ("3", "", "1,", "one", "1 2", "-1")], "invalid levels {!r}: expected some of 0,1,2"),
    ("no number of clients", ["--max-clients 0", "--max-per-client many"], "invalid number {!r}: expected 1 or more"),
]


@pytest.mark.parametrize(("line", "says"), [
    pytest.param(line, says, id=f"{what}: {line[:40]}") for what, lines, *says in MISTAKES for line in lines
])
def test_a_mistake_is_told_with_what_was_expected(line: str, says: List[str], expect_error: Expect) -> None:
    words = shlex.split(line)
    message = expect_error(parse, words)
    for text in says:
        assert text.format(words[-1].rpartition("=")[2]) in message
    if line.startswith("--"):
        assert re.match(rf"argument (-\w/)?{words[0].partition('=')[0]}\b", message), "it is said of which option"


@pytest.mark.parametrize(("words", "unknown", "meant"), [
    ("--prot 8080", "--prot", "--port"), ("8080 --verbos", "--verbos", "--verbose"), ("-port 8080", "-port", "--port"), ("-help", "-help", "--help"),
    ("-D 1080", "-D", "-p PORT"), ("--host 0.0.0.0", "--host", "-b ADDRESS"), ("--listen 1080", "--listen", "-b ADDRESS or -p PORT"),
    ("-l 127.0.0.1:80", "-l", "-b ADDRESS or -p PORT"), ("-i 0.0.0.0 -p x", "-i", "-b ADDRESS"), ("-qi ::", "-i", "-b ADDRESS"),
    ("--password=sesame", "--password", "-u NAME[:PASSWORD]"), ("--user-file sesame", "--user-file", "--users-file"), ("-Zsesame", "-Z", None),
    ("x --frobnicate=sesame", "--frobnicate", None), ("-1", "-1", None), ("-q @conf", "--prot", "--port"),
])
def test_an_unknown_option_is_told_first_and_with_what_was_probably_meant(
    words: str, unknown: str, meant: Optional[str], conf: Conf, expect_error: Expect,
) -> None:
    file = conf("# where\n--prot 8080\n")
    where = f"{file[1:]}:2: " if "@conf" in words else ""
    message = expect_error(parse, words.replace("@conf", file).split())
    assert message == f"{where}unknown option {unknown}{f'; did you mean {meant}?' if meant else ''}"


def test_what_others_are_used_to_is_no_option_here_and_what_was_meant_is_one() -> None:
    options = build_parser()._option_string_actions
    assert not set(HABITS) & set(options)
    for meant in HABITS.values():
        assert meant == "@FILE" or {word for word in meant.split() if word.startswith("-")} <= set(options)


@pytest.mark.parametrize(("words", "complaint"), [
    ("--keytab proxy.keytab", "--keytab needs --gssapi, which asks for Kerberos"),
    ("--gssapi-nec", "--gssapi-nec needs --gssapi, which asks for Kerberos"),
    ("--gssapi-allow *@EXAMPLE.COM --gssapi-levels 1", "--gssapi-levels needs --gssapi, which asks for Kerberos"),
    ("--source 192.0.2.7 --source 192.0.2.8", "--source is given twice for IPv4: one address of each family is enough"),
    ("--source ::1 --source 192.0.2.8 --source ::1", "--source is given twice for IPv6: one address of each family is enough"),
    ("-6 --source 192.0.2.7", "-6 and --source 192.0.2.7 leave no way out: leave one of them out"),
    ("-4 --source ::1", "-4 and --source ::1 leave no way out: leave one of them out"),
])
def test_sources_that_make_no_sense_together_are_refused(words: str, complaint: str, expect_error: Expect) -> None:
    assert expect_error(parse, words.split()) == complaint


def test_a_command_that_is_run_has_no_balancer_in_front(expect_error: Expect) -> None:
    words = "--proxy-protocol 10.0.0.2 --proxy-protocol 2001:db8::/64"
    assert list(map(str, parse(words.split()).proxy_protocol)) == ["10.0.0.2/32", "2001:db8::/64"]
    assert expect_error(parse, [*words.split(), "--run", "curl"]) == "--run serves one COMMAND, and no balancer: leave --proxy-protocol out"


def test_addresses_to_advertise_that_contradict_each_other_are_refused(expect_error: Expect) -> None:
    assert expect_error(parse, ["--advertise=203.0.113.7", "--advertise=203.0.113.8"]) == (
        "--advertise: 203.0.113.7 and 203.0.113.8 are for the same clients: name the network that one of them is for, as in 10.0.0.0/8=203.0.113.8"
    )


# --- options from elsewhere ---

def test_a_file_has_options_line_by_line_with_comments(conf: Conf) -> None:
    options = parse([conf("# who\n\n-u anna:'pass word'   # the boss\n--user ben:4711\n  # where\n-b 127.0.0.1 -p 8080\n")])
    assert options.users == {"anna": "pass word", "ben": "4711"}
    assert (options.hosts, options.port) == (("127.0.0.1",), 8080)


@pytest.mark.parametrize("text", ["-p 8080\n", "# where\n-p 8080\n"])
def test_a_file_may_begin_with_a_byte_order_mark(conf: Conf, text: str) -> None:
    assert parse([conf(text, encoding="utf-8-sig")]).port == 8080


def test_what_stands_behind_a_file_wins(conf: Conf) -> None:
    options = parse([conf("-p 8080\n--idle-timeout 60\n"), "-p", "9090"])
    assert (options.port, options.idle_timeout) == (9090, 60)


@pytest.mark.parametrize("line", ["# anna's", "#anna's", "  # anna's", "--quiet # anna's", "--quiet  # \"anna"])
def test_a_comment_may_have_an_apostrophe(line: str, conf: Conf) -> None:
    assert parse([conf(f"{line}\n-p 1081\n")]).port == 1081


def test_a_number_sign_within_a_password_is_no_comment(conf: Conf) -> None:
    assert parse([conf("-u anna:sesame#4711\n")]).users == {"anna": "sesame#4711"}


def test_a_file_that_is_not_there_is_told(tmp_path: Path, expect_error: Expect) -> None:
    assert "no-such.conf" in expect_error(parse, [f"@{tmp_path / 'no-such.conf'}"])


def test_a_quote_that_is_not_closed_in_a_file_is_told(conf: Conf, expect_error: Expect) -> None:
    message = expect_error(parse, [conf("-u 'anna:sesame\n")])
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

@pytest.mark.parametrize("words", ["1080 1081", "--log-format xml", "--color sometimes", "--port-file"])
def test_a_wrong_option_is_told(words: str, expect_error: Expect) -> None:
    assert expect_error(parse, words.split())


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_the_version_can_be_asked_for(word: str, run_command: Run) -> None:
    outcome = run_command(word)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, f"socks5srv {__version__}\n", "")


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_every_option_in_a_group_and_fits_80_columns(word: str, run_command: Run) -> None:
    outcome = run_command(word)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("usage: socks5srv [options] [PORT | ADDRESS:PORT]\n")
    for command in COMMANDS:
        assert f"\n  socks5srv {command} " in outcome.stdout
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

def test_by_default_there_is_one_process() -> None:
    assert [workers_of(), workers_of("--workers", "3")] == [1, 3]


def workers_of(*words: str) -> Any:
    settings: Any = parse(words)
    return settings.workers


def test_auto_asks_which_cpus_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 3, 5}, raising=False)
    assert workers_of("--workers", "auto") == 3


@pytest.mark.parametrize(("number", "workers"), [(6, 6), (None, 1)])
def test_auto_counts_all_cpus_where_the_system_does_not_tell(
    number: Optional[int], workers: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: number)
    assert workers_of("--workers", "auto") == workers


def test_a_system_that_cannot_do_it_says_so(monkeypatch: pytest.MonkeyPatch, expect_error: Expect) -> None:
    monkeypatch.setattr("socks5srv.cli.options.os", SimpleNamespace(name="nt", environ=os.environ, cpu_count=lambda: 4))
    for word in ("2", "auto"):
        assert "several processes cannot share a listening socket on this system" in expect_error(parse, ["--workers", word])
    assert workers_of("--workers", "1") == 1
