"""
What a signal means: the end, or that a file has changed.

SIGINT and SIGTERM, on Windows SIGBREAK, are the end.  SIGHUP is one of two things.  The terminal has been
closed: that is the end as well.  Or a daemon, which has no terminal, is told to read its files again.

A handler runs in the main thread, between any two of its steps and with any lock that it holds.  So what
is called here takes no lock, and leaves the work to the thread of serve_forever().

Not here: the signals of a program that is run (program.py).
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING, Any, Callable, List

if TYPE_CHECKING:
    from .run import ServiceServer


def stop_on_signals(server: ServiceServer, options: argparse.Namespace) -> None:
    """
    Ctrl-C and SIGTERM end serve_forever(); the second Ctrl-C ends the process.

    Set even where SIGINT is ignored: a shell script ignores it for what it starts with &.
    """
    asked: List[int] = []

    def stop(number: int, _frame: Any) -> None:
        if asked and number == signal.SIGINT:
            server.kill()
            os._exit(130)
        asked.append(number)
        server.shutdown()

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    answer_hangup(server, options, stop)


def answer_hangup(server: ServiceServer, options: argparse.Namespace, end: Callable[[int, Any], None]) -> None:
    """SIGHUP is the end, by this handler, or has the users file and the log file looked at."""
    def look_again(_number: int, _frame: Any) -> None:
        server.look_again()

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, end if hangup_ends(options) else look_again)


def hangup_ends(options: argparse.Namespace) -> bool:
    """
    Whether SIGHUP is the end; to be asked before there is a handler for it.

    Not where it is ignored (nohup), and not where there is a file to read again.  A log file may be that of a
    daemon or of somebody who watches the screen: then it is the terminal that tells.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or options.users_file is not None:
        return False
    return options.log_file is None or has_terminal()


def has_terminal() -> bool:
    """Whether a terminal controls this process.  (When SIGHUP comes it is too late to ask: it does not any more.)"""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
