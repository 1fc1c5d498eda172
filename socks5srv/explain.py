"""
A message as the RFC draws it: its boxes with their sizes, the octets in them, and what they say.

    print(table(Greeting(b"\\x00\\x02")))                     one message
    python -m socks5srv.explain 05 01 00                    whatever these octets may be

The one idea: a table is made of `Message.fields()`, the list that the octets on the wire are made of,
so that the two cannot disagree.  What a reader refuses has no such list.  It is cut into boxes by
`cut()`, as far as it goes, and what is wrong is marked with an exclamation mark.

Passwords are never shown: not their octets, and not how many they are.  A login that cannot be read
may have the password anywhere, so nothing behind its first two octets is shown then.

Here are no sockets, and nobody is served: see service/explaining.py.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from io import BytesIO
from itertools import zip_longest
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

from . import strangers
from .meanings import (
    KINDS, Meaning, Part, counted, cut, deviations, ends_too_soon, meanings, name_text, octets_in, one, plain, plain_sentence,
    sentence, spaced,
)
from .protocol import (
    CREDENTIALS_VER, VER, Address, Credentials, CredentialsReply, Datagram, Greeting, Message, Method, MethodSelection, Reply,
    Request, Socks5Error,
)

WIDTH = 79          # columns of a table
CELL = 6            # octets in a box at most; of more, the first three and the last
COLUMN = 16         # octets beside their meaning at most, four in a line
LINES = 16          # lines that the meanings of one box have at most
KEPT = 64           # octets of DATA, and of what is not known, that an exhibit keeps
LOGIN = bytes((CREDENTIALS_VER,))       # what a login begins with, wherever it comes
BEGINNING = 8       # octets of what is no SOCKS5: HTTP may have a password further on

HIDDEN = {
    "PLEN": "hidden, as it tells how long the password is", "PASSWD": "hidden here; on the wire anyone can read it",
}


# --- what is shown ---

class Row(NamedTuple):
    """One box: its name, its size as the RFC has it, its octets (None: secret), and what they say, piece by piece."""

    name: str
    size: str
    octets: Optional[bytes]
    meanings: List[Meaning]
    left_out: int = 0           # octets behind these, which are not kept

    def as_dict(self) -> Dict[str, Any]:
        return {
            "name": self.name, "size": self.size, "octets": None if self.octets is None else self.octets.hex(),
            "left_out": self.left_out,
            "meanings": [{"octets": octets.hex(), "text": text} for octets, text in self.meanings],
        }


@dataclass
class Exhibit:
    """
    One message as it was on the wire, or a note about the connection, which has no fields.

    `remarks` are sentences; one that begins with ``! `` tells of a deviation from the RFC.  `number`
    counts the messages of a session, and is empty where there is none; `at` is in seconds since it began.
    """

    title: str
    section: str = ""
    sender: str = ""
    receiver: str = ""
    fields: List[Row] = field(default_factory=list)
    remarks: List[str] = field(default_factory=list)
    session: int = 0
    number: str = ""
    at: float = 0.0

    @property
    def octets(self) -> bytes:
        """Those of all boxes, without what is secret."""
        return b"".join(row.octets or b"" for row in self.fields)

    @property
    def length(self) -> Optional[int]:
        """How many octets the message has on the wire; None if that would tell a secret."""
        if any(row.octets is None for row in self.fields):
            return None
        return sum(len(row.octets or b"") + row.left_out for row in self.fields)

    def as_dict(self) -> Dict[str, Any]:
        """The same as data, all of it text, numbers and lists.  More may come, nothing will go."""
        return {
            "id": self.session, "number": self.number, "title": self.title, "section": self.section, "sender": self.sender,
            "receiver": self.receiver, "at": round(self.at, 6), "length": self.length, "octets": self.octets.hex(),
            "fields": [row.as_dict() for row in self.fields], "remarks": self.remarks,
        }

    def __str__(self) -> str:
        """At most 79 columns wide, plain ASCII, without a line end behind."""
        if not self.fields:
            return "\n".join(wrapped(f"{self.label}{self.title}  {'. '.join(self.remarks)}", indent="   "))
        lines = [justified(f"{self.label}{self.title}", self.section), justified(self.direction, self.clock)]
        return "\n".join(lines + drawn(self.fields) + told(self.fields) + remarked(self.remarks))

    @property
    def deviates(self) -> bool:
        """Whether the RFC has something in it otherwise."""
        return any(remark.startswith("! ") for remark in self.remarks)

    @property
    def label(self) -> str:
        return f"#{self.session}{'.' * bool(self.number)}{self.number} " if self.session else ""

    @property
    def direction(self) -> str:
        way = f"{self.receiver} <- {self.sender}" if self.sender == "proxy" else f"{self.sender} -> {self.receiver}"
        return way if self.length is None else f"{way}, {counted(self.length, 'octet')}"

    @property
    def clock(self) -> str:
        return f"+{self.at * 1000:.1f} ms" if self.session else ""


def justified(left: str, right: str) -> str:
    return f"{left}{right:>{WIDTH - len(left)}}".rstrip()


def wrapped(text: str, indent: str) -> List[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def drawn(rows: Sequence[Row]) -> List[str]:
    """The picture: names, sizes, and the octets that are here."""
    columns = [(row.name, row.size, cell(row)) for row in rows]
    widths = [max(map(len, column)) + 2 for column in columns]
    rule = "     +" + "+".join("-" * width for width in widths) + "+"
    names, sizes, here = ("|".join(text.center(width) for text, width in zip(line, widths)) for line in zip(*columns))
    return [rule, f"     |{names}|", rule, f"size |{sizes}|", f"here |{here}|", rule]


def cell(row: Row) -> str:
    if row.octets is None:
        return "***"
    return shortened(row.octets, CELL, row.left_out)


def shortened(octets: bytes, most: int, left_out: int = 0) -> str:
    if len(octets) <= most and not left_out:
        return spaced(octets)
    return f"{spaced(octets[:3])} .." + f" {octets[-1]:02x}" * (not left_out)


def told(rows: Sequence[Row]) -> List[str]:
    """Box by box: name, octets, meaning."""
    names = max(len(row.name) for row in rows)
    width = max(len(line) for row in rows for octets, _text in row.meanings for line in column(octets, row.left_out))
    lines: List[str] = []
    for row in rows:
        lines += limited([
            f"     {name:<{names}}  {octets:<{width}}  {text}".rstrip()
            for name, octets, text in pieces(row, WIDTH - 5 - names - 2 - width - 2)
        ])
    return lines


def column(octets: bytes, left_out: int) -> List[str]:
    """The octets beside their meaning, in lines."""
    if len(octets) > COLUMN or left_out:
        return [shortened(octets, COLUMN, left_out)]
    return [spaced(octets[start:start + 4]) for start in range(0, len(octets), 4)] or [""]


def pieces(row: Row, width: int) -> Iterator[Tuple[str, str, str]]:
    """Line by line: the name in the first, octets and text as far as they go."""
    name = row.name
    for octets, text in row.meanings:
        for left, right in zip_longest(column(octets, row.left_out), textwrap.wrap(text, width, break_on_hyphens=False), fillvalue=""):
            yield name, left, right
            name = ""


def limited(lines: List[str]) -> List[str]:
    return lines if len(lines) <= LINES else [*lines[:LINES - 1], f"     .. and {len(lines) - LINES + 1} lines more"]


def remarked(remarks: Sequence[str]) -> List[str]:
    lines = []
    for remark in remarks:
        mark, text = ("!", remark[2:]) if remark.startswith("! ") else ("=", remark)
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {mark} ", subsequent_indent=f"  {mark} ", break_on_hyphens=False)
    return lines


# --- a message to its table ---

def table(message: Message) -> str:
    """One message as its table."""
    return str(exhibit(message))


def exhibit(message: Message, octets: Optional[bytes] = None) -> Exhibit:
    """
    One message as an `Exhibit`: its fields, where it deviates from the RFC, and what it says.

    `octets` are those that have come, which a message forgets where they do not matter.
    """
    kind = type(message)
    if kind not in KINDS:
        return unknown(message)
    fields = message.fields()
    parts = [Part(box.name, box.octets) for box in fields] if octets is None else cut(kind, octets)
    rows = [row_of(kind, part, parts, box.secret) for part, box in zip(parts, fields)]
    return of_kind(kind, rows, [f"! {text}" for text in deviations(kind, parts)] + [sentence(message)])


def of_kind(kind: Type[Message], rows: List[Row], remarks: List[str]) -> Exhibit:
    about = KINDS[kind]
    return Exhibit(about.title, about.section, about.sender, about.receiver, rows, remarks)


def row_of(kind: Type[Message], part: Part, parts: List[Part], secret: bool = False) -> Row:
    """One box, complete or not."""
    size = KINDS[kind].sizes[part.name]
    if secret:
        return Row(part.name, size, None, one(b"", HIDDEN[part.name]))
    if part.name == "DATA":
        kept, left_out = part.octets[:KEPT], max(0, len(part.octets) - KEPT)
        return Row(part.name, size, kept, one(kept, f"{counted(len(part.octets), 'octet')} of payload, behind the header"), left_out)
    found = meanings(kind, part.name, part.octets, (octets_in(parts, "ATYP") or b"\0")[0]) if part.whole else one(part.octets, "cut off here")
    return Row(part.name, size, part.octets, found)


def unknown(message: Message) -> Exhibit:
    """A message that is in no picture of these RFCs: its fields, as they speak of themselves, with their first octets."""
    rows = []
    for box in message.fields():
        kept = b"" if box.secret else box.octets[:BEGINNING]
        text = "hidden" if box.secret else plain_sentence(str(box.meaning))
        rows.append(Row(plain(box.name), "Variable", None if box.secret else kept, one(kept, text), 0 if box.secret else len(box.octets) - len(kept)))
    return Exhibit(plain(type(message).__name__).upper(), "", "client", "proxy", rows)


def broken(kind: Type[Message], octets: bytes) -> Exhibit:
    """What came instead of such a message, or only the beginning of one."""
    parts = cut(kind, octets)
    secret = kind is Credentials or (kind is Request and octets[:1] == LOGIN)
    if secret:
        parts = [part for part in parts[:2] if part.name == "VER" or (kind is Credentials and octets[:1] == LOGIN)]
    rows = [row_of(kind, part, parts) for part in parts]
    if secret:
        hidden = one(b"", "not shown: it may be the password, or have it in it")
        rows += [Row(name, size, None, hidden) for name, size in KINDS[kind].sizes.items() if name not in [row.name for row in rows]]
    remarks = [f"! {text}" for text in deviations(kind, parts)]
    if not remarks and ends_too_soon(kind, parts):
        remarks.append("! it ends too soon")
    elif kind is not Credentials and sum(len(part.octets) for part in parts) < len(octets):
        remarks.append("! what is behind this cannot be read")
    return of_kind(kind, rows, remarks)


# --- octets, and nothing is known of them ---

AFTER: Dict[Type[Message], List[Type[Message]]] = {     # what the same side may send next
    Greeting: [Credentials, Request], Credentials: [Request], MethodSelection: [CredentialsReply, Reply],
    CredentialsReply: [Reply], Reply: [Reply],
}


def exhibits(octets: bytes) -> List[Exhibit]:
    """Whatever these octets may be: one message, several in a row, or several that each would fit."""
    return [part for reading in readings(octets) for part in reading]


def readings(octets: bytes) -> List[List[Exhibit]]:
    """
    All the ways to read these octets, each as the messages that it finds in a row; at least one.

    What may have a password in it is read as a login, and as nothing else.
    """
    chains = list(chained(octets, list(KINDS)))
    with_login = [chain for chain in chains if any(isinstance(message, Credentials) for message, _part in chain)]
    suspicious = suspected_login(octets)
    if suspicious is not None and not with_login:
        return [suspicious]
    found = [[exhibit(message, part) for message, part in chain] for chain in with_login or chains]
    proper = [reading for reading in found if not any(part.deviates for part in reading)]
    return proper or found or [[guessed(octets)]]


Chain = List[Tuple[Message, bytes]]


def chained(octets: bytes, kinds: Sequence[Type[Message]]) -> Iterator[Chain]:
    """The ways to read all of these octets, beginning with one of `kinds`.  (No recursion: a row may be long.)"""
    begun: List[Tuple[Chain, bytes, Sequence[Type[Message]]]] = [([], octets, kinds)]
    while begun:
        chain, rest, kinds = begun.pop()
        if chain and not rest:
            yield chain
            continue
        found = list(beginnings(rest, kinds))
        begun += [([*chain, (message, part)], rest[len(part):], AFTER.get(type(message), [])) for message, part in reversed(found)]


def beginnings(octets: bytes, kinds: Sequence[Type[Message]]) -> Iterator[Tuple[Message, bytes]]:
    """The messages of these kinds that the octets can begin with, each with its own."""
    for kind in kinds:
        if kind is Datagram and octets[:2] != b"\0\0":      # else whatever has a 01, 03 or 04 in fourth place would be one
            continue
        stream = BytesIO(octets)
        try:
            message: Message = kind.read(stream)            # type: ignore[attr-defined]
        except Socks5Error:
            continue
        yield message, octets[:stream.tell()]


def suspected_login(octets: bytes) -> Optional[List[Exhibit]]:
    """A login that cannot be read to its end, alone or behind a greeting; None if it is none."""
    if octets[:1] == LOGIN and len(octets) != 2:
        return [broken(Credentials, octets)]
    try:
        stream = BytesIO(octets)
        greeting = Greeting.read(stream)
    except Socks5Error:
        return None
    rest = stream.read()
    if Method.USERNAME_PASSWORD not in greeting.methods or rest[:1] != LOGIN:
        return None
    return [exhibit(greeting), broken(Credentials, rest)]


def guessed(octets: bytes) -> Exhibit:
    """What these octets may have been meant to be."""
    if octets[:2] == b"\0\0":
        return broken(Datagram, octets)
    if octets[0] != VER:
        return stranger(octets)
    if octets[2:3] == b"\0":
        return broken(Request, octets)
    return broken(Greeting, octets)


def stranger(octets: bytes, reason: str = "") -> Exhibit:
    """What is no SOCKS5 at all: its first octets, and what it seems to be."""
    reason = reason or str(strangers.recognise(octets, Address.numeric("127.0.0.1", 1080), pac=False))
    if octets[:1] == LOGIN:         # without a greeting
        found = broken(Credentials, octets)
        found.remarks = [f"! {plain_sentence(reason)}"]
        return found
    kept = octets[:BEGINNING]
    row = Row("FIRST OCTETS", "Variable", kept, one(kept, name_text(kept)), len(octets) - len(kept))
    return Exhibit("NOT SOCKS5", "", "client", "proxy", [row], [f"! {plain_sentence(reason)}"])


# --- the program ---

USAGE = """\
usage: python -m socks5srv.explain HEX...

Shows what these octets are as messages of SOCKS5: 050100, 05:01:00, 05 01 00 and
0x050100 are the same.  With - they are read from standard input.  Messages in a row
must be those of one side, client or proxy.  Passwords are not shown.
"""
NO_HEX = "this is no hexadecimal: two digits of 0-9a-f for each octet, as in 050100"


def octets_of(text: str) -> bytes:
    """ValueError if it is not hexadecimal, and without the text in it: there may be a password in that."""
    digits = re.sub(r"0[xX]|\\x|[\s:,]", "", text)
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise ValueError(NO_HEX) from None


def report(octets: bytes) -> str:
    found = readings(octets)
    lines = [f"These {counted(len(octets), 'octet')} can be read in {len(found)} ways."] if len(found) > 1 else []
    for number, reading in enumerate(found, 1):
        if len(found) > 1:
            lines.append(f"--- {number} of {len(found)} ---")
        lines += [str(part) for part in reading]
    return "\n\n".join(lines)


def main(words: Optional[Sequence[str]] = None) -> int:
    """Print the tables, and return the exit code."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        octets = octets_of(sys.stdin.buffer.read().decode("utf-8-sig", "replace") if list(words) == ["-"] else " ".join(words))
        if not octets:
            raise ValueError("there is not one octet: write some, as in 050100")
        print(report(octets), flush=True)
    except ValueError as error:
        print(f"socks5srv.explain: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:     # whoever reads it has seen enough; at our end Python would try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
