"""
What can be typed while the server serves: ``l`` and Enter, for instance, to see who is being served.

Keys are read as lines, which every terminal can do, on Windows, too; nothing of the terminal is changed.
A thread waits for them.  The summary is read in the thread that writes it; the list is asked for in the
thread of the keys, since the thread that serves may have to hear the answers of workers.

The one idea: the keyboard is a luxury.  Whatever goes wrong with it (its end, a terminal that is gone, a
shell that has sent us to the background) ends or pauses this, and nothing else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

from ..service.log import show
from ..service.node import Node
from ..session import COMMAND_NAMES, amount, plural, word

logger = logging.getLogger("socks5srv")


class Console:
    """Does what is typed, from start() until the keyboard's end."""

    max_rows = 50           # sessions in a list: more would push away the rest of what is on the screen

    def __init__(self, node: Node, explaining: bool) -> None:
        self.node = node
        self.explaining = explaining

    def start(self) -> None:
        """Returns at once."""
        if hasattr(signal, "SIGTTIN"):
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)       # to read in the background is an error then, and does not stop us
        threading.Thread(target=self.run, name="socks5srv-console", daemon=True).start()

    def run(self) -> None:
        for line in lines(sys.stdin.fileno()):
            self.press(line)

    def press(self, line: str) -> None:
        """Do what a line says; an empty one says nothing."""
        key = line.strip().lower()
        if not key:
            return
        key = "h" if key in ("?", "help") else key
        if key not in KEYS:
            show(f"unknown key {key!r}, h for help")
            return
        try:
            _help, do = KEYS[key]
            do(self)
        except Exception:
            logger.exception("unhandled exception at the keyboard")

    def do_list(self) -> None:
        snapshots = self.node.stats.snapshots().values()
        sessions = sorted((row for snapshot in snapshots for row in snapshot.sessions), key=lambda row: int(row["id"]))
        show(listing(sessions, sum(sum(snapshot.live.values()) for snapshot in snapshots), self.max_rows))

    def do_summary(self) -> None:
        self.node.call(lambda: show(self.node.summary.text("serving for")))

    def do_explain(self) -> None:
        self.explaining = not self.explaining
        self.node.call(self.set_explain)

    def set_explain(self) -> None:
        self.node.set_explain(self.explaining)
        show(f"explain is {'on for new clients' if self.explaining else 'off'}")

    def do_quit(self) -> None:
        self.node.call(lambda: signal.raise_signal(signal.SIGINT))      # in the main thread, which it wakes

    def do_help(self) -> None:
        show("\n".join(f"  {key}  {help}" for key, (help, _do) in KEYS.items()) + "\nEach with Enter.")


KEYS: Dict[str, Tuple[str, Callable[[Console], None]]] = {
    "l": ("list the open connections", Console.do_list),
    "s": ("what has happened so far", Console.do_summary),
    "e": ("switch on or off: explain every message of new clients", Console.do_explain),
    "q": ("stop, as Ctrl-C does", Console.do_quit),
    "h": ("show this", Console.do_help),
}


# --- who is being served ---

HEADINGS = ("id", "client", "user", "command", "destination", "up", "down", "seconds")
NUMBERS = {"id", "up", "down", "seconds"}       # which are aligned at the right


def listing(sessions: Sequence[Dict[str, Any]], number: int, most: int) -> str:
    """
    A table of sessions as a Snapshot has them, oldest first, in the words of the log.

    `number` is how many there are in all: a Snapshot may have only those that move most.  Of `sessions` the newest are shown.
    """
    newest = sessions[-most:]
    lines = table([HEADINGS, *map(columns, newest)]) if newest else []
    up, down = (amount(sum(session[name] for session in sessions)) for name in ("up", "down"))
    end, some = f", {up} up, {down} down", f", of which these are the newest {most}" if len(newest) < number else ""
    if len(sessions) < number:
        end, some = "", f", of which these are {len(newest)} that are busy"
    return "\n".join([*lines, f"{plural(number, 'connection')} open{end}{some}"])


def columns(session: Dict[str, Any]) -> Tuple[str, ...]:
    return (
        f"#{session['id']}", session["client"], word(session["user"] or "-"), COMMAND_NAMES.get(session["command"], "-"), target_of(session),
        amount(session["up"]), amount(session["down"]), f"{session['seconds']:.1f}",
    )


def target_of(session: Dict[str, Any]) -> str:
    """What the client has asked for, and the peer where it is another."""
    host, port, peer = session["host"], session["port"], session["peer"]
    if host is None:
        return "-"
    asked = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return word(asked) if peer in (None, asked) else f"{word(asked)} ({word(peer)})"


def table(rows: Sequence[Sequence[str]]) -> List[str]:
    """Lines of columns, each as wide as what stands in it."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(text.rjust(width) if name in NUMBERS else text.ljust(width) for name, text, width in zip(rows[0], row, widths)).rstrip()
        for row in rows
    ]


# --- the keyboard ---

def lines(fd: int, pause: float = 1.0) -> Iterator[str]:
    """
    What is typed, line by line, until the end; `pause` seconds between two looks whether we are in the foreground again.

    By os.read(): a thread that waits in sys.stdin holds a lock that the interpreter wants at its end.
    """
    rest = b""
    while True:
        while not in_foreground(fd):
            time.sleep(pause)
        try:
            octets = os.read(fd, 4096)
        except OSError:
            if in_foreground(fd):
                return
            continue
        if not octets:
            return
        *whole, rest = (rest + octets).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)


def in_foreground(fd: int) -> bool:
    """Whether the terminal is ours to read from; a shell gives it to one program at a time."""
    try:
        return os.name != "posix" or os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:             # not a controlling terminal
        return True
