"""
Options that are not ours, and which of ours was probably meant.

argparse converts the positional argument first: of ``--host 0.0.0.0`` it says that 0.0.0.0 is no port.  So the words
are looked through before it sees them.  What stands behind an unknown option is not shown: it may be a password.
"""

from __future__ import annotations

import argparse
import re
from typing import Dict, Iterable, List, Optional

NEGATIVE = re.compile(r"-\d+(\.\d*)?")
LISTEN = "-b ADDRESS or -p PORT"

# Options of other programs (ssh, curl, uvicorn, http.server, mitmproxy, microsocks), and what does the same here.
HABITS: Dict[str, str] = {
    "-D": "-p PORT", "-P": "-p PORT", "--listen-port": "-p PORT", "--socks-port": "-p PORT", "-l": LISTEN, "-L": LISTEN, "--listen": LISTEN,
    "-i": "-b ADDRESS", "-a": "-b ADDRESS", "-H": "-b ADDRESS",
    **dict.fromkeys(("--host", "--ip", "--address", "--addr", "--interface", "--listen-host", "--listen-address"), "-b ADDRESS"),
    **dict.fromkeys(("--username", "--password", "--pass", "--auth", "--login"), "-u NAME[:PASSWORD]"),
    "-d": "-v", "--debug": "-v", "--log-level": "-v or -q", "--silent": "-q", "--log": "--log-file", "-o": "--log-file",
    "-c": "@FILE", "-f": "@FILE", "--config": "@FILE", "--conf": "@FILE",
    "--proxy": "--upstream", "--parent": "--upstream", "-x": "--upstream", "--ipv4": "-4", "--ipv6": "-6",
    "--timeout": "--idle-timeout", "--threads": "--workers", "--processes": "--workers", "-e": "--run", "-?": "--help",
}


def complaint(parser: argparse.ArgumentParser, words: Iterable[str]) -> Optional[str]:
    """What to say of the first unknown option; None if there is none."""
    for word in words:
        if word == "--":
            break
        unknown = unknown_in(parser, word) if word.startswith("-") and word != "-" and " " not in word else None
        if unknown is not None:
            where, meant = getattr(word, "where", None), meant_by(parser, unknown)
            return f"{where + ': ' if where else ''}unknown option {unknown}{f'; did you mean {meant}?' if meant else ''}"
    return None


def unknown_in(parser: argparse.ArgumentParser, word: str) -> Optional[str]:
    """The option in this word that is not ours, without its value."""
    options = parser._option_string_actions
    if word.startswith("--") or f"-{word}" in options:      # -port is a slip for --port: nobody means -p and the value "ort"
        name = word.partition("=")[0]
        return None if name in options else name
    for option in (f"-{letter}" for letter in word[1:]):    # -vq is -v -q
        if option not in options:
            return option
        if options[option].nargs != 0:                      # -p8080 is -p 8080
            break
    return None


def meant_by(parser: argparse.ArgumentParser, unknown: str) -> Optional[str]:
    if unknown in HABITS:
        return HABITS[unknown]
    if len(unknown) == 2:
        return None
    from difflib import get_close_matches       # only for who has mistyped

    ours = [option for option in parser._option_string_actions if option.startswith("--")]
    return next(iter(get_close_matches(f"--{unknown.lstrip('-')}", ours, 1)), None)


def with_values(parser: argparse.ArgumentParser, words: Iterable[str]) -> List[str]:
    """
    The words, with a negative number in one word with its option.

    argparse would take -1 for an option, since there are -4 and -6.  So it can be told that -1 is too low.
    """
    options = parser._option_string_actions
    joined: List[str] = []
    for word in words:
        before = options.get(joined[-1]) if joined else None
        if before is not None and before.nargs is None and NEGATIVE.fullmatch(word) and word not in options:
            joined[-1] += f"={word}" if joined[-1].startswith("--") else word
        else:
            joined.append(word)
    return joined
