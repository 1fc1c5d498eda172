"""What can be typed while the server serves, at a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from socks5srv.protocol import UNSPECIFIED, Address, Command, ReplyCode
from socks5srv.cli import console
from tests.clients.harness import need
from tests.conftest import TIMEOUT, Place, eventually, exchange
from tests.program import READY, AtTerminal, Terminal, by_shell


class Keyboard:
    """A server at a terminal, and who sits there."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self.client, self.tunnel = terminal, terminal.client, terminal.tunnel
        terminal.wait_until_it_serves()
        self.seen = terminal.text.index(READY + "\n") + len(READY + "\n")

    def wait_for(self, text: str) -> str:
        """What is shown up to this text, behind what has been waited for before."""
        while text not in self.terminal.text[self.seen:]:
            assert self.terminal.read(TIMEOUT), f"waited for {text!r} in vain: {self.terminal.text[self.seen:]!r}"
        start, self.seen = self.seen, self.terminal.text.index(text, self.seen) + len(text)
        return self.terminal.text[start:self.seen]

    def press(self, key: str, end: str) -> List[str]:
        """Type it and Enter; the lines that are shown then, up to the one with `end` in it."""
        self.terminal.type(key + "\n")
        self.wait_for(key + "\n")       # which the terminal shows by itself
        lines = self.wait_for(end)
        return (lines + self.wait_for("\n")).splitlines()

    def stop(self) -> Tuple[int, str]:
        return self.terminal.talk("", "\x03")


AtKeyboard = Callable[..., Keyboard]


@pytest.fixture
def keyboard(at_terminal: AtTerminal) -> AtKeyboard:
    return lambda *words, **keywords: Keyboard(at_terminal("0", *words, **keywords))


# --- the keys ---

@pytest.mark.parametrize("key", ["h", "H", "?", "help"])
def test_help_has_a_line_for_each_key(keyboard: AtKeyboard, key: str) -> None:
    lines = keyboard().press(key, "Each with Enter.")
    assert lines == [
        "  l  list the open connections", "  s  what has happened so far", "  e  switch on or off: explain every message of new clients",
        "  q  stop, as Ctrl-C does", "  h  show this", "Each with Enter.",
    ]


def test_an_unknown_key_is_told(keyboard: AtKeyboard) -> None:
    assert keyboard().press("What is this", "h for help") == ["unknown key 'what is this', h for help"]


def test_enter_alone_shows_nothing(keyboard: AtKeyboard) -> None:
    server = keyboard()
    server.terminal.type("\n \n")
    server.wait_for("\n \n")
    assert server.press("l", " open, ") == ["0 connections open, 0 B up, 0 B down"]


def test_the_list_has_what_a_living_tunnel_has_carried_by_now(keyboard: AtKeyboard, echo: Place) -> None:
    server = keyboard("-u", "anna:sesame")
    with server.client() as client, server.client():
        client.greet(2)
        client.login("anna", "sesame")
        assert client.request(Command.CONNECT, Address.named("localhost", echo[1])).code is ReplyCode.SUCCEEDED
        exchange(client, b"x" * 1234)
        name = "%s:%d" % client.socket.getsockname()
        # A client may have its octets a moment before the relay has counted them.
        eventually(lambda: server.press("l", " open, ")[-1] == "2 connections open, 1.2 kB up, 1.2 kB down")
        heading, first, second, sum = server.press("l", " open, ")
        assert heading.split() == ["id", "client", "user", "command", "destination", "up", "down", "seconds"]
        assert re.fullmatch(rf"#1 +{name} +anna +CONNECT +localhost:{echo[1]} \(127.0.0.1:{echo[1]}\) +1\.2 kB +1\.2 kB +\d\.\d", first)
        assert re.fullmatch(r"#2 +127.0.0.1:\d+ +- +- +- +0 B +0 B +\d\.\d", second)
        assert len(heading) == len(first) == len(second), "in columns"
        assert sum == "2 connections open, 1.2 kB up, 1.2 kB down"
        exchange(client, b"x" * 1000)
        eventually(lambda: server.press("l", " open, ")[-1] == "2 connections open, 2.2 kB up, 2.2 kB down")
    eventually(lambda: server.press("l", " open, ")[-1] == "0 connections open, 0 B up, 0 B down")
    assert "1 succeeded, 1 failed" in server.stop()[1]


def test_the_list_has_udp_clients(keyboard: AtKeyboard) -> None:
    server = keyboard()
    with server.client() as client:
        client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED)
        assert re.search(r"#1 .* UDP ASSOCIATE +0\.0\.0\.0:0 +0 B +0 B ", server.press("l", " open, ")[1])


def test_the_summary_so_far(keyboard: AtKeyboard, echo: Place) -> None:
    server = keyboard()
    assert re.fullmatch(r"serving for \d s: 0 connections .*", server.press("s", "peak ")[0])
    server.tunnel(echo).close()
    server.wait_for("closed by client\n")
    first, second = server.press("s", "peak ")
    assert re.fullmatch(r"serving for \d s: 1 connection \(1 succeeded, 0 failed\) from 1 client address,", first)
    assert second == "5 B up, 5 B down, peak 1"
    code, text = server.stop()
    assert code == 0
    assert "stopped after" in text


@pytest.mark.parametrize("words", [(), ("--workers", "2"), ("--pcap", os.devnull)])
def test_explain_is_switched_for_new_clients(keyboard: AtKeyboard, echo: Place, words: Tuple[str, ...]) -> None:
    server = keyboard(*words)

    def converse() -> str:
        server.tunnel(echo).close()
        return server.wait_for("closed by client\n")

    soon = eventually if "--workers" in words else lambda condition: condition()      # they hear of it a moment later
    assert "RFC 1928" not in converse()
    assert server.press("e", "explain is")[-1] == "explain is on for new clients"
    assert soon(lambda: "RFC 1928" in converse())
    assert server.press("e", "explain is")[-1] == "explain is off"
    assert soon(lambda: "RFC 1928" not in converse())


def test_explain_that_was_an_option_can_be_switched_off(keyboard: AtKeyboard, echo: Place) -> None:
    server = keyboard("--explain")
    assert server.press("e", "explain is") == ["explain is off"]
    server.tunnel(echo).close()
    assert "RFC 1928" not in server.wait_for("closed by client\n")


def test_quit_is_like_ctrl_c(keyboard: AtKeyboard, echo: Place) -> None:
    server = keyboard()
    server.tunnel(echo)
    code, text = server.terminal.talk("", "q\n")
    assert code == 0
    assert "server stopped" in text
    assert "stopped after" in text


def test_ctrl_c_is_not_held_up(keyboard: AtKeyboard) -> None:
    """By the thread that waits for the next line."""
    code, text = keyboard().stop()
    assert code == 0
    assert text.count("stopped after") == 1


def test_with_workers_all_keys_work_too(keyboard: AtKeyboard, echo: Place) -> None:
    server = keyboard("--workers", "2")
    with server.tunnel(echo), server.tunnel(echo):
        eventually(lambda: server.press("l", " open, ")[-1] == "2 connections open, 10 B up, 10 B down")
        assert [line.split()[0] for line in server.press("l", " open, ")[:-1]] == ["id", "#1", "#2"]
    server.wait_for("closed by client\n")
    eventually(lambda: "2 connections (2 succeeded" in server.press("s", "peak ")[0])
    assert server.terminal.talk("", "q\n")[0] == 0


# --- the keyboard ---

def test_the_end_of_the_keyboard_is_not_the_end_of_the_server(keyboard: AtKeyboard, echo: Place) -> None:
    server = keyboard()
    server.terminal.type("\x04")
    server.tunnel(echo).close()
    server.wait_for("closed by client\n")
    code, text = server.stop()
    assert code == 0
    assert "stopped after" in text


def test_without_a_keyboard_there_are_no_keys(at_terminal: AtTerminal) -> None:
    terminal = at_terminal("0", command=by_shell('"$@" </dev/null', need("sh")))
    text = terminal.wait_for(READY)
    assert "Ctrl-C stops.  " + READY in text
    assert "h + Enter" not in text
    assert "list the clients" not in terminal.talk("", "h\n\x03")[1]


def test_a_program_that_is_run_has_the_keyboard_to_itself(at_terminal: AtTerminal) -> None:
    code, text = at_terminal("--run", need("sh"), "-c", "echo ready; exec cat").talk("ready\n", "h\n", "h\nh\n", "\x04")
    assert code == 0
    assert "list the clients" not in text


InShell = Callable[[str], Terminal]


@pytest.fixture
def in_shell(at_terminal: AtTerminal) -> InShell:
    """A shell at a terminal that runs this script, in which ``"$@"`` is a server, once it serves."""
    def started(script: str) -> Terminal:
        terminal = at_terminal("0", command=by_shell(script, need("bash")))
        terminal.wait_until_it_serves()
        return terminal

    return started


def test_in_the_background_the_server_serves_and_leaves_the_keyboard_alone(in_shell: InShell, echo: Place) -> None:
    """A shell stops programs that read the keyboard from there."""
    terminal = in_shell('set -m; "$@" & echo "so be it"; read line; echo "the shell has $line"; kill %1; wait')
    terminal.tunnel(echo).close()
    terminal.type("h\n")
    terminal.wait_for("the shell has h\n")
    assert "list the clients" not in terminal.end()[1]


def test_sent_to_the_background_it_serves_on_and_back_in_the_foreground_it_listens_again(in_shell: InShell, echo: Place) -> None:
    terminal = in_shell('set -m; "$@"; echo "it is stopped"; bg; read line; echo "the shell has $line"; fg')
    terminal.type("l\n")
    terminal.wait_for("0 connections open")
    terminal.type("\x1a")
    terminal.wait_for("it is stopped\n")
    terminal.tunnel(echo).close()
    terminal.type("h\n")
    terminal.wait_for("the shell has h\n")
    assert "list the clients" not in terminal.text
    assert "stopped after" in terminal.talk("", "h\n", "Each with Enter.\n", "\x03")[1]


# --- lines and lists by themselves ---

@pytest.fixture
def pipe() -> Iterator[Tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


@pytest.mark.parametrize(("octets", "found"), [
    (b"l\ns\n", ["l", "s"]), (b"l\r\n", ["l\r"]), (b"l\nnot entered", ["l"]), (b"", []), (b"\xff\n", ["\ufffd"]),
])
def test_lines_are_read_until_the_end(pipe: Tuple[int, int], octets: bytes, found: List[str]) -> None:
    reader, writer = pipe
    os.write(writer, octets)
    os.close(writer)
    assert list(console.lines(reader)) == found


def test_a_line_that_comes_in_pieces_is_one(pipe: Tuple[int, int]) -> None:
    reader, writer = pipe
    found = console.lines(reader)
    os.write(writer, b"s\nhe")
    assert next(found) == "s"
    os.write(writer, b"lp\n")
    assert next(found) == "help"
    os.close(writer)
    assert list(found) == []


def row(id: int, **changes: Any) -> Dict[str, Any]:
    return {
        "id": id, "client": f"192.0.2.1:{40000 + id}", "user": "anna\n", "command": "connect", "host": "a\x1b[2Jb", "port": 80, "peer": None,
        "up": 10, "down": 0, "seconds": 1.5, **changes,
    }


def test_of_many_clients_the_newest_are_listed_and_all_are_counted() -> None:
    lines = console.listing([row(id) for id in range(1, 71)], 70, 50).split("\n")
    assert [line.split()[0] for line in lines[1:-1]] == [f"#{id}" for id in range(21, 71)]
    assert lines[-1] == "70 connections open, 700 B up, 0 B down, of which these are the newest 50"


def test_of_very_many_clients_only_some_are_known() -> None:
    assert console.listing([row(1), row(7)], 900, 50).endswith("\n900 connections open, of which these are 2 that are busy")


def test_hostile_names_are_escaped_in_the_list() -> None:
    text = console.listing([row(1, peer="c\n:80")], 1, 50)
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"a\x1b[2Jb:80 (c\n:80)" in text


@pytest.mark.parametrize(("changes", "target"), [
    ({"host": "::1"}, "[::1]:80"), ({"host": "::1", "peer": "[::1]:80"}, "[::1]:80"), ({"host": "a", "peer": "[::1]:80"}, "a:80 ([::1]:80)"),
    ({"host": None, "port": None}, "-"),
])
def test_the_target_is_as_in_the_log(changes: Dict[str, Any], target: str) -> None:
    assert console.target_of(row(1, **changes)) == target


def test_a_bug_is_told_and_not_met_by_the_server(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(console.KEYS, "l", ("fail", lambda _console: 1 // 0))
    node: Any = None
    console.Console(node, False).press("l")
    assert [record.getMessage() for record in caplog.records] == ["unhandled exception at the keyboard"]


def test_what_the_terminal_does_not_take_any_more_is_lost_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as unwritable:
        monkeypatch.setattr(sys, "stderr", unwritable)
        console.show("anything")
