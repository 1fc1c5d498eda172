"""
What a signal means: the end, now or when the clients have gone, or that a file has changed.

SIGTERM comes from whoever manages services, and wants no client lost: the server drains.  SIGINT (on Windows
SIGBREAK, too) comes from the keyboard, where somebody waits: it is the end.  SIGHUP is one of two things.  The
terminal has been closed: that is the end as well.  Or a daemon, which has no terminal, is told to read its files
again.  SIGUSR2 has the workers replaced.

A handler runs in the main thread, between any two of its steps and with any lock that it holds.  So what
is called here takes no lock, and leaves the work to the thread of serve_forever().

Not here: the signals of a command that is run (child.py).
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any, Callable, Iterable

from ..service import systemd
from ..service.lifecycle import Lifecycle
from ..service.settings import Settings
from .options import has_files


def answer_signals(lifecycle: Lifecycle, settings: Settings) -> None:
    """
    SIGTERM drains, Ctrl-C stops; the second SIGTERM stops as well, and the second Ctrl-C ends the process.

    Set even where SIGINT is ignored: a shell script ignores it for what it starts with &.
    """
    def stop(number: int, _frame: Any) -> None:
        if lifecycle.stopping and number == signal.SIGINT:
            lifecycle.node.kill()
            os._exit(130)
        lifecycle.stop()

    answer(("SIGINT", "SIGBREAK"), stop)
    answer(["SIGTERM"], lambda _number, _frame: lifecycle.drain())
    answer(["SIGUSR2"], lambda _number, _frame: lifecycle.restart_workers())
    answer_hangup(settings, stop, lifecycle.reload)


def hear_ctrl_c() -> None:
    """Let it end a prompt, or the wait for a named pipe, also where a shell script ignores SIGINT for what it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def answer(names: Iterable[str], handler: Callable[[int, Any], None]) -> None:
    """Have it called at these signals, as far as this system has them."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def answer_hangup(settings: Settings, end: Callable[[int, Any], None], reload: Callable[[], None]) -> None:
    """
    SIGHUP is the end, by this handler, or has the files read again.

    That it does where it was ignored (nohup), under a service manager, and where there is a users file.  A server with
    a log file or an @FILE may be a daemon or not: the terminal tells.
    """
    if hasattr(signal, "SIGHUP"):
        expected = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or systemd.is_told() or settings.users_file is not None
        reloads = expected or ((settings.log_file is not None or has_files(settings.words)) and not has_terminal())
        answer(["SIGHUP"], (lambda _number, _frame: reload()) if reloads else end)


def has_terminal() -> bool:
    """Whether a terminal controls this process.  (When SIGHUP comes it is too late to ask.)"""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False
