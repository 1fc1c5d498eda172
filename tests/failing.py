"""
Every call that a thread makes in our code fails once: what has to survive that?

`FailingCalls.arm()`, called in a thread, makes the next call there fail that has not failed before: a function
of ours at its first line, or a function written in C that ours calls.  It is one failure for each arm(), so that
whoever guards the thread can go on until the next.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import socks5srv

PACKAGE = str(Path(socks5srv.__file__).parent)

# What the system may lack, and what a bug may be.
ERRORS: List[Callable[[], Exception]] = [lambda: OSError(errno.EMFILE, "Too many open files"), lambda: ZeroDivisionError("a bug")]
LOCKING = ("acquire", "release", "__enter__", "__exit__")      # cannot fail, and a lock that is never released stops everything


class FailingCalls:
    def __init__(self, *spared: str, errors: Sequence[Callable[[], Exception]] = ERRORS) -> None:
        self.spared = spared            # functions that are the guard, not what is guarded
        self.errors = errors
        self.over = False
        self.failed: Dict[Tuple[str, str, int, int], None] = {}        # in this order; it is looked into at every call
        self.quiet = 0                  # times in a row that nothing new was called

    def arm(self) -> None:
        self.quiet += 1
        sys.setprofile(None if self.over else self.look)

    def stop(self) -> None:
        """Nothing more is to fail."""
        self.over = True

    def look(self, frame: FrameType, event: str, argument: Any) -> None:
        place = self.place_of(frame, event, argument)
        if place is None or self.over:
            return
        for number, error in enumerate(self.errors):
            if (*place, number) not in self.failed:
                self.failed[(*place, number)] = None
                self.quiet = 0
                sys.setprofile(None)
                raise error()

    def place_of(self, frame: FrameType, event: str, argument: Any) -> Optional[Tuple[str, str, int]]:
        code = frame.f_code
        if event not in ("call", "c_call") or not code.co_filename.startswith(PACKAGE) or code.co_name in self.spared:
            return None
        if event == "c_call" and argument.__name__ in LOCKING:
            return None
        file = code.co_filename[len(PACKAGE) + 1:]
        return (file, code.co_name, 0) if event == "call" else (file, f"{code.co_name}: {argument.__name__}", frame.f_lineno)

    def functions(self) -> List[str]:
        return sorted({f"{file}:{function}" for file, function, _line, _error in self.failed})
