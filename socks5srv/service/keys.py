"""
What can be typed while the server serves: ``l`` and Enter, for instance, to see who is being served.

Keys are read as lines, which every terminal can do, on Windows, too; nothing of the terminal is
changed.  A thread waits for them, and the thread that keeps the books does what they say, so that what
is shown never mixes with a log line.

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
from functools import partial
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

from ..relay import Tunnel
from ..handler import Socks5Handler
from ..session import COMMAND_WORDS, amount, word
from .banner import counted
from .options import show
from .run import ServiceServer

logger = logging.getLogger("socks5srv")

LOOK_AGAIN = 1.0        # seconds between two looks whether we are in the foreground again
SHOWN = 50              # sessions in a list: more would push away the rest of what is on the screen


class Keys:
    """What the keys of a server do: see KEYS."""

    def __init__(self, server: ServiceServer) -> None:
        self.server = server

    def press(self, line: str) -> None:
        """Do what a line says; an empty one says nothing."""
        word = line.strip().lower()
        if not word:
            return
        try:
            _help, do = KEYS.get(word, KEYS["h"])
            do(self)
        except Exception:
            logger.exception("a bug, met at the keyboard")

    def do_list(self) -> None:
        if self.server.options.workers > 1:
            show("The workers know their clients, this process does not: s counts those that have been served.")
            return
        show(listing(self.server.being_served()))

    def do_summary(self) -> None:
        show(self.server.tally.summary("serving for"))

    def do_explain(self) -> None:
        on = not self.server.options.explain
        self.server.explain(on)
        show(f"explain is {'on for new clients' if on else 'off'}")

    def do_quit(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def do_help(self) -> None:
        show("\n".join(f"  {word}  {help}" for word, (help, _do) in KEYS.items()) + "\nEach with Enter.")


KEYS: Dict[str, Tuple[str, Callable[[Keys], None]]] = {
    "l": ("list the clients that are being served", Keys.do_list),
    "s": ("what has happened so far", Keys.do_summary),
    "e": ("explain every message of new clients, or no longer", Keys.do_explain),
    "q": ("stop, as Ctrl-C does", Keys.do_quit),
    "h": ("show this", Keys.do_help),
}


# --- who is being served ---

HEADINGS = ("id", "client", "user", "command", "target", "up", "down", "seconds")
NUMBERS = {"id", "up", "down", "seconds"}       # which are aligned at the right


def listing(handlers: Sequence[Socks5Handler]) -> str:
    """A table of the sessions, oldest first, in the words of the log."""
    newest = handlers[-SHOWN:]
    lines = table([HEADINGS, *map(row, newest)]) if newest else []
    moved = [octets_moved(handler) for handler in handlers]
    up, down = (amount(sum(octets)) for octets in zip(*moved, (0, 0)))
    some = f", of which these are the newest {SHOWN}" if len(newest) < len(handlers) else ""
    return "\n".join([*lines, f"{counted(len(handlers), 'client')} being served, {up} up, {down} down{some}"])


def row(handler: Socks5Handler) -> Tuple[str, ...]:
    session = handler.session
    up, down = octets_moved(handler)
    command = COMMAND_WORDS[session.command] if session.command is not None else "-"
    target = " ".join(session.target_words()[1:])
    return (
        f"#{session.id}", str(session.client), word(session.user or "-"), command, target, amount(up), amount(down),
        f"{time.monotonic() - session.clock:.1f}",
    )


def octets_moved(handler: Socks5Handler) -> Tuple[int, int]:
    """
    Octets of payload, up and down, by now.

    A tunnel hands its sums to the session when it ends: until then the one is zero, and then
    both are the same, so there is no moment at which the larger one is wrong.
    """
    session, carried = handler.session, handler.carried
    if isinstance(carried, Tunnel):
        return max(session.up, carried.up.octets), max(session.down, carried.down.octets)
    return session.up, session.down


def table(rows: Sequence[Sequence[str]]) -> List[str]:
    """Lines of columns, each as wide as what stands in it."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(text.rjust(width) if name in NUMBERS else text.ljust(width) for name, text, width in zip(rows[0], row, widths)).rstrip()
        for row in rows
    ]


# --- the keyboard ---

def listen_to_keys(server: ServiceServer) -> None:
    """Do as the keys say, from now on until the keyboard's end; returns at once."""
    if hasattr(signal, "SIGTTIN"):
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)       # who reads in the background gets an error, and is not stopped
    keys = Keys(server)

    def read() -> None:
        for line in lines(sys.stdin.fileno()):
            server.call(partial(keys.press, line))

    threading.Thread(target=read, name="socks5srv-keys", daemon=True).start()


def lines(fd: int) -> Iterator[str]:
    """
    What is typed, line by line, until the end.

    By os.read(): a thread that waits in sys.stdin holds a lock that the interpreter wants at its end.
    """
    rest = b""
    while True:
        while not in_foreground(fd):
            time.sleep(LOOK_AGAIN)
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
    except OSError:             # it is no terminal of a shell, or none any more
        return True
