"""``socks5srv explain 05 01 00``, or ``python -m socks5srv.explain``: any octets as the messages that they may be."""

from __future__ import annotations

import os
import re
import sys
from typing import Optional, Sequence

from ..session import plural
from .tables import readings

USAGE = """\
usage: {} HEX...

Shows what these octets are as messages of SOCKS5: 050100, 05:01:00, 05 01 00 and
0x050100 are the same.  With - they are read from standard input.  Messages in a row
must be those of one side, client or proxy.  Passwords are not shown.
"""


def octets_of(text: str) -> bytes:
    """ValueError if it is not hexadecimal, and without the text in it: there may be a password in that."""
    digits = re.sub(r"0[xX]|\\x|[\s:,]", "", text)
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise ValueError("invalid hex: expected two digits of 0-9a-f for each octet, as in 050100") from None


def report(octets: bytes) -> str:
    found = readings(octets)
    if len(found) == 1:
        return "\n\n".join(map(str, found[0]))
    parts = [f"These {plural(len(octets), 'octet')} can be read in {len(found)} ways."]
    for number, reading in enumerate(found, 1):
        parts += [f"--- {number} of {len(found)} ---", *map(str, reading)]
    return "\n\n".join(parts)


def main(words: Optional[Sequence[str]] = None, prog: str = "python -m socks5srv.explain") -> int:
    """Print the tables, and return the exit code."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(prog), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        unknown = next((word for word in words if word.startswith("-") and word != "-"), None)
        if unknown is not None:
            raise ValueError(f"unknown option {unknown}; see  {prog} --help")
        octets = octets_of(sys.stdin.buffer.read().decode("utf-8-sig", "replace") if list(words) == ["-"] else " ".join(words))
        if not octets:
            raise ValueError("no octets: write some, as in 050100")
        print(report(octets), flush=True)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:     # the reader has closed the pipe; at exit Python would write to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
