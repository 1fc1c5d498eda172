"""
What a signal means: the end, or that a file has changed.

SIGINT and SIGTERM, on Windows SIGBREAK, are the end.  SIGHUP is one of two things.  The terminal has been
closed: that is the end as well.  Or a daemon, which has no terminal, is told to read its files again.

A handler runs in the main thread, between any two of its steps and with any lock that it holds.  So what
is called here takes no lock, and leaves the work to the thread of serve_forever().

Not here: the signals of a command that is run (child.py).
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any, Callable, Iterable, List

from ..service.node import Node
from ..service.settings import Settings


def stop_on_signals(node: Node, settings: Settings) -> None:
    """
    Ctrl-C and SIGTERM end serve_forever(); the second Ctrl-C ends the process.

    Set even where SIGINT is ignored: a shell script ignores it for what it starts with &.
    """
    asked: List[int] = []

    def stop(number: int, _frame: Any) -> None:
        if asked and number == signal.SIGINT:
            node.kill()
            os._exit(130)
        asked.append(number)
        node.shutdown()

    answer(("SIGINT", "SIGTERM", "SIGBREAK"), stop)
    answer_hangup(node, settings, stop)


def hear_ctrl_c() -> None:
    """Let it end a prompt, or the wait for a named pipe, also where a shell script ignores SIGINT for what it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def answer(names: Iterable[str], handler: Callable[[int, Any], None]) -> None:
    """Have it called at these signals, as far as this system has them."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def answer_hangup(node: Node, settings: Settings, end: Callable[[int, Any], None]) -> None:
    """
    SIGHUP is the end, by this handler, or has the users file and the log file opened afresh.

    That it does where it was ignored (nohup), and where there is a users file.  A server with a log file may
    be a daemon or not: the terminal tells.
    """
    if hasattr(signal, "SIGHUP"):
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        reloads = ignored or settings.users_file is not None or (settings.log_file is not None and not has_terminal())
        answer(["SIGHUP"], (lambda _number, _frame: node.reload()) if reloads else end)


def has_terminal() -> bool:
    """Whether a terminal controls this process.  (When SIGHUP comes it is too late to ask.)"""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False
