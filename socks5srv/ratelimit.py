"""
Which warnings may be logged now: each kind once a minute.  What is left out is counted, and told with the next line of its kind.

The other half is `Resilient`: a thread that serves many goes on whatever happens, and so may meet the same error forever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Callable, Optional, Tuple

from .listener import OUT_OF

logger = logging.getLogger("socks5srv")


class RateLimit:
    """When each kind was logged last.  Any thread may call it."""

    interval = 60.0     # seconds between two lines of the same kind
    kinds_kept = 1000   # a client that makes up new kinds gets each logged once

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # When each was logged last, and how many have been left out since; the one logged longest ago comes first.
        self.kinds: OrderedDict[str, Tuple[float, int]] = OrderedDict()

    def allows(self, kind: str) -> Optional[int]:
        """One more of this kind is to be logged: how many have been left out before it; None if it is left out, too."""
        now = time.monotonic()
        with self.lock:
            last, left_out = self.kinds.get(kind, (float("-inf"), 0))
            if now - last < self.interval:
                self.kinds[kind] = last, left_out + 1
                return None
            self.note(kind, now, 0)
            return left_out

    def logged(self, kind: str) -> None:
        """Another process has logged this kind; what is left out here is still told here."""
        with self.lock:
            _last, left_out = self.kinds.get(kind, (0.0, 0))
            self.note(kind, time.monotonic(), left_out)

    def note(self, kind: str, last: float, left_out: int) -> None:
        self.kinds[kind] = last, left_out
        self.kinds.move_to_end(kind)
        if len(self.kinds) > self.kinds_kept:
            self.kinds.popitem(last=False)


def and_more(left_out: int) -> str:
    """The end of a line before which so many of its kind have been left out."""
    return f" (and {left_out} more since the last line like this)" if left_out else ""


class Resilient:
    """Mixed into what serves many, and ends for no error."""

    rate_limit: RateLimit

    def _attempt(self, duty: Callable[..., Any], *arguments: Any) -> None:
        """
        Call it, and go on whatever comes of it: a users file that cannot be opened must not end every tunnel.

        For all that the thread of serve_forever() does by itself.
        """
        try:
            duty(*arguments)
        except Exception as error:
            with suppress(Exception):       # a log that fails is no place to tell of it
                self._tell_of(error)

    def _tell_of(self, error: Exception) -> None:
        """Log an error that no client can be told of, once a minute.  To be out of something is no bug."""
        if isinstance(error, OSError) and error.errno in OUT_OF:
            self.warn_once("short", "%s: new connections have to wait; fewer at a time (--max-clients) or a higher ulimit -n would help", error.strerror)
        else:
            self._tell(logging.ERROR, f"bug {error!r}", "unhandled exception in serve_forever()", error=error)

    def warn_once(self, kind: str, message: str, *details: object) -> None:
        """Log it, once a minute for each kind of trouble."""
        self._tell(logging.WARNING, kind, message, *details)

    def _tell(self, level: int, kind: str, message: str, *details: object, error: Optional[Exception] = None) -> None:
        """The same on any level, with a traceback if there is an `error`."""
        left_out = self.rate_limit.allows(kind)
        if left_out is not None:
            extra = {"facts": {"left_out": left_out}} if left_out else None
            logger.log(level, message + "%s", *details, and_more(left_out), exc_info=error, extra=extra)
