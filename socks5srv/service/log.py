"""
Log lines on the screen or in a file: as text for people, as JSON for programs.

The server logs to the logger "socks5srv" and leaves the rest to the program; here is that rest.
A record of a client has an attribute `session`, one that explains a message `explanation`; any other
may have `event`, a word, and `facts`, a dict.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from logging.handlers import WatchedFileHandler
from typing import Any, Dict, TextIO

from ..descriptors import open_at_once
from ..session import Session, rfc3339, shown
from .settings import Settings

COLORS = {"failed": "31", "login_failed": "31", "no_acceptable_method": "31", "bad_protocol": "31", "denied": "33", "open": "2", "probe": "2"}


def complain(message: str, *ways_out: str, prog: str = "socks5srv") -> None:
    """An error as every error looks: what is wrong, then what to do."""
    show("\n".join([f"{prog}: error: {message}", *(f"  {way}" for way in ways_out)]))


def show(text: str) -> None:
    """Write it to stderr.  Where the terminal or the reader of a pipe has gone it is lost, and that is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")       # at once, or a log line could come in between
        sys.stderr.flush()


class TextFormatter(logging.Formatter):
    """``09:05:05 #1 127.0.0.1:51958 ...``, in color where it is wanted.  The form may change."""

    def __init__(self, color: bool, clock: str = "%H:%M:%S") -> None:
        super().__init__(datefmt=clock)
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, "explanation"):
            return f"{record.explanation}\n"
        level = "" if record.levelno == logging.INFO or hasattr(record, "session") else record.levelname + " "
        line = f"{self.formatTime(record, self.datefmt)} {level}{record.getMessage()}"
        if record.exc_info:
            # An error may quote the wire, line ends and all: none of its lines may begin like one of the log's own.
            line += "".join(f"\n| {shown(each)}" for each in self.formatException(record.exc_info).splitlines())
        session = getattr(record, "session", None)
        code = COLORS.get(session.outcome) if isinstance(session, Session) else None
        if session is None or code is None or not self.color:
            return line
        return line.replace(str(session), session.line(lambda outcome: f"\x1b[{code}m{outcome}\x1b[0m"))


class JsonFormatter(logging.Formatter):
    """One object a line.  Its names are documented in docs/observing.rst, and stable."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.facts(record))

    def facts(self, record: logging.LogRecord) -> Dict[str, Any]:
        session = getattr(record, "session", None)
        if isinstance(session, Session):
            left_out = getattr(record, "left_out", 0)
            return {**session.as_dict(), **({"left_out": left_out} if left_out else {})}
        if hasattr(record, "explanation"):
            return {"time": rfc3339(record.created), "event": "message", **record.explanation.as_dict()}
        facts = {
            "time": rfc3339(record.created), "event": getattr(record, "event", "log"),
            "level": record.levelname.lower(), "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return facts


class Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """A log that cannot be written (the reader has gone, the disk is full) is no reason to stop serving."""

    told = False                # of a trouble that comes with every line

    def handleError(self, record: logging.LogRecord) -> None:
        if self.stream is not sys.stderr:
            self.tell(f"the log cannot be written: {sys.exc_info()[1]}", "serving goes on without it")

    def tell(self, trouble: str, consequence: str) -> None:
        """Complain, but once."""
        if not self.told:
            self.told = True
            complain(trouble, consequence)


class File(Screen, WatchedFileHandler):
    """
    The same in a file.  When that has been renamed (logrotate), the lines go on in a new one.

    The base class checks before every line, in each process by itself.  But its errors reach the caller
    of the logger, it closes the old file before it has the new one, and on a pipe it would block.
    """

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=open_at_once)

    def reopenIfNeeded(self) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.baseFilename)
                if (found.st_dev, found.st_ino) == (self.dev, self.ino):
                    return
            old, self.stream = self.stream, self._open()
            self._statstream()
            self.told = False
            if old is not None:
                old.close()
        except OSError as error:
            self.tell(f"the log file {self.baseFilename} cannot be opened afresh: {error.strerror}", "it goes on in the old file")


def reopen() -> None:
    """Open the log file afresh if it has been renamed; else that happens with the next line."""
    for handler in logging.getLogger("socks5srv").handlers:
        if isinstance(handler, File):
            handler.acquire()
            try:
                handler.reopenIfNeeded()
            finally:
                handler.release()


def set_up(settings: Settings) -> None:
    """Send the log where the settings say.  OSError if the file cannot be opened."""
    handler = File(settings.log_file, encoding="utf-8") if settings.log_file else Screen(sys.stderr)
    in_color = wants_color(settings.color, sys.stderr) and not settings.log_file
    clock = "%Y-%m-%d %H:%M:%S" if settings.log_file else "%H:%M:%S"        # a screen is of today
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter(in_color, clock))
    logger = logging.getLogger("socks5srv")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if settings.quiet else logging.DEBUG if settings.verbose else logging.INFO)
    logging.getLogger("socks5srv.explain").setLevel(logging.INFO)      # asked for in so many words, -q or not
    logging.getLogger("socks5srv.wire").setLevel(logging.DEBUG if settings.verbose > 1 and not settings.quiet else logging.ERROR)


def wants_color(when: str, stream: TextIO) -> bool:
    """NO_COLOR (see no-color.org) wins over FORCE_COLOR, and both over what the stream is."""
    if when != "auto":
        return when == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb" and os.name != "nt"
