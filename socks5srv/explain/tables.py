"""
A message as the RFC draws it: its fields with their sizes, the octets in them, and what they mean.

The one idea: a table is made of `Message.fields()`, the list that the octets on the wire are made of, so that the two
cannot disagree.  A malformed message has no such list.  It is split into fields by `cut()`, as far as it goes, and what
is wrong is marked with an exclamation mark.

Passwords are never shown: not their octets, and not how many they are.  A login that cannot be read may have the
password anywhere, so nothing behind its first two octets is shown then.  Of a token of GSSAPI's only the beginning is shown,
which says what kind of token it is; and nothing of one that is not complete, since it may be a login instead.

Here are no sockets, and no client is served: see tracer.py.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from io import BytesIO
from itertools import zip_longest
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

from .. import foreign
from ..gssapi.messages import Frame
from .fields import (
    LAYOUTS, FieldOctets, Meaning, address_type, cut, deviations, ends_too_soon, meanings, name_text, plain,
    plain_sentence, sentence,
)
from ..protocol import (
    CREDENTIALS_VER, VER, Address, Credentials, CredentialsReply, Datagram, Greeting, Message, Method, MethodSelection, Reply,
    Request, Socks5Error,
)
from ..session import plural

WIDTH = 79          # columns of a table
CELL = 6            # octets of a field in the picture; of more, the first three and the last
COLUMN = 16         # octets beside their meaning at most, four in a line
LINES = 16          # lines that the meanings of one field have at most
KEPT = 64           # octets of DATA, and of what is not known, that an explanation keeps
LOGIN = bytes((CREDENTIALS_VER,))       # what a login begins with, wherever it comes
BEGINNING = 8       # octets of what is no SOCKS5: HTTP may have a password further on

HIDDEN = {
    "PLEN": "hidden, as it tells how long the password is", "PASSWD": "hidden here; on the wire anyone can read it",
}


# --- what is shown ---

class FieldRow(NamedTuple):
    """One field: its name, its size as the RFC has it, its octets (None: secret), and what they mean, piece by piece."""

    name: str
    size: str
    octets: Optional[bytes]
    meanings: List[Meaning]
    left_out: int = 0           # octets behind these, which are not kept

    def as_dict(self) -> Dict[str, Any]:
        found = [{"octets": octets.hex(), "text": text} for octets, text in self.meanings]
        return {**self._asdict(), "octets": None if self.octets is None else self.octets.hex(), "meanings": found}


@dataclass
class Explanation:
    """One message as it was on the wire, or a note about the connection, which has no fields."""

    title: str
    section: str = ""
    sender: str = ""
    fields: List[FieldRow] = field(default_factory=list)
    remarks: List[str] = field(default_factory=list)    # sentences; with "! " before it a deviation from the RFC
    session: int = 0
    number: str = ""            # of the message in its session; empty where there is none
    at: float = 0.0             # seconds since the session began

    @property
    def receiver(self) -> str:
        return {"client": "proxy", "proxy": "client"}.get(self.sender, "")

    @property
    def octets(self) -> bytes:
        """Those of all fields, without what is secret."""
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
        label = f"#{self.session}{'.' * bool(self.number)}{self.number} " if self.session else ""
        if not self.fields:
            return "\n".join(wrapped(f"{label}{self.title}  {'. '.join(self.remarks)}", later="   "))
        length = "" if self.length is None else f", {plural(self.length, 'octet')}"
        direction = f"client {'<-' if self.sender == 'proxy' else '->'} proxy{length}"
        clock = f"+{self.at * 1000:.1f} ms" if self.session else ""
        lines = [justified(label + self.title, self.section), justified(direction, clock)]
        marked = [("  ! ", text[2:]) if text.startswith("! ") else ("  = ", text) for text in self.remarks]
        remarks = [line for mark, text in marked for line in wrapped(text, first=mark, later=mark)]
        return "\n".join(lines + drawn(self.fields) + described(self.fields) + remarks)

    @property
    def deviates(self) -> bool:
        """Whether the RFC has something in it otherwise."""
        return any(remark.startswith("! ") for remark in self.remarks)


def justified(left: str, right: str) -> str:
    return f"{left}{right:>{WIDTH - len(left)}}".rstrip()


def wrapped(text: str, width: int = WIDTH, first: str = "", later: str = "") -> List[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def drawn(rows: Sequence[FieldRow]) -> List[str]:
    """The picture: names, sizes, and the octets that are here."""
    columns = [(row.name, row.size, shortened(row.octets, CELL, row.left_out)) for row in rows]
    widths = [max(map(len, column)) + 2 for column in columns]
    rule = "     +" + "+".join("-" * width for width in widths) + "+"
    names, sizes, here = ("|".join(text.center(width) for text, width in zip(line, widths)) for line in zip(*columns))
    return [rule, f"     |{names}|", rule, f"size |{sizes}|", f"here |{here}|", rule]


def shortened(octets: Optional[bytes], most: int, left_out: int) -> str:
    if octets is None:
        return "***"
    if len(octets) <= most and not left_out:
        return octets.hex(" ")
    return f"{octets[:3].hex(' ')} .." + f" {octets[-1]:02x}" * (not left_out)


def described(rows: Sequence[FieldRow]) -> List[str]:
    """Field by field: name, octets, meaning."""
    names = max(len(row.name) for row in rows)
    width = max(len(line) for row in rows for octets, _text in row.meanings for line in column(octets, row.left_out))
    lines: List[str] = []
    for row in rows:
        name, found = row.name, []
        for octets, text in row.meanings:
            beside = wrapped(text, WIDTH - 5 - names - 2 - width - 2)
            for left, right in zip_longest(column(octets, row.left_out), beside, fillvalue=""):
                found.append(f"     {name:<{names}}  {left:<{width}}  {right}".rstrip())
                name = ""       # it stands in the first line
        if len(found) > LINES:
            found[LINES - 1:] = [f"     .. and {len(found) - LINES + 1} lines more"]
        lines += found
    return lines


def column(octets: bytes, left_out: int) -> List[str]:
    """The octets beside their meaning, in lines."""
    if len(octets) > COLUMN or left_out:
        return [shortened(octets, COLUMN, left_out)]
    return [octets[start:start + 4].hex(" ") for start in range(0, len(octets), 4)] or [""]


# --- a message to its table ---

def table(message: Message) -> str:
    """One message as its table."""
    return str(explanation(message))


def explanation(message: Message, octets: Optional[bytes] = None) -> Explanation:
    """Of one message; `octets` are those that have come, which it forgets where they do not matter."""
    kind = type(message)
    if kind not in LAYOUTS:
        return unknown(message)
    fields = message.fields()
    parts = [FieldOctets(each.name, each.octets) for each in fields] if octets is None else cut(kind, octets)
    rows = [row_of(kind, part, parts, each.secret) for part, each in zip(parts, fields)]
    remarks = [f"! {text}" for text in deviations(kind, parts)]
    return Explanation(*LAYOUTS[kind][:3], rows, [*remarks, sentence(message)])


def row_of(kind: Type[Message], part: FieldOctets, parts: List[FieldOctets], secret: bool = False) -> FieldRow:
    """One field, complete or not."""
    size = LAYOUTS[kind].sizes[part.name]
    if secret:
        return FieldRow(part.name, size, None, [(b"", HIDDEN[part.name])])
    if part.name == "DATA":
        kept, left_out = part.octets[:KEPT], max(0, len(part.octets) - KEPT)
        about = f"{plural(len(part.octets), 'octet')} of payload, behind the header"
        return FieldRow(part.name, size, kept, [(kept, about)], left_out)
    if part.name == "TOKEN":
        kept = part.octets[:BEGINNING]
        if not part.whole:
            return FieldRow(part.name, size, None, [(b"", "cut off here, and not shown")])
        return FieldRow(part.name, size, kept, [(kept, about_token(part.octets))], len(part.octets) - len(kept))
    if not part.whole:
        return FieldRow(part.name, size, part.octets, [(part.octets, "cut off here")])
    return FieldRow(part.name, size, part.octets, meanings(kind, part.name, part.octets, address_type(parts)))


TOKENS = {b"\x60": "to get to know each other; its mechanism comes first (RFC 2743 section 3.1)", b"\x05\x04": "something wrapped (RFC 4121 section 4.2.6.2)"}


def about_token(octets: bytes) -> str:
    kind = next((text for first, text in TOKENS.items() if octets.startswith(first)), "")
    return kind or ("one octet, in clear" if len(octets) == 1 else "GSSAPI's own" if octets else "none")


def unknown(message: Message) -> Explanation:
    """A message that is in no picture of these RFCs: its fields, as they speak of themselves, with their first octets."""
    rows = []
    for each in message.fields():
        name, kept = plain(each.name), each.octets[:BEGINNING]
        if each.secret:
            rows.append(FieldRow(name, "Variable", None, [(b"", "hidden")]))
        else:
            meaning = (kept, plain_sentence(str(each.meaning)))
            rows.append(FieldRow(name, "Variable", kept, [meaning], len(each.octets) - len(kept)))
    return Explanation(plain(type(message).__name__).upper(), "", "client", rows)


def lacking(kind: Type[Message], parts: List[FieldOctets]) -> str:
    """What a message that ends too soon has not, or not all of."""
    missing = ", ".join(list(LAYOUTS[kind].sizes)[len(parts):])
    return ", ".join([*(f"{part.name} incomplete" for part in parts if not part.whole), *([f"{missing} missing"] if missing else [])])


def broken(kind: Type[Message], octets: bytes) -> Explanation:
    """What came instead of such a message, or only the beginning of one."""
    parts = cut(kind, octets)
    secret = kind is Credentials or (kind is Request and octets[:1] == LOGIN)
    if secret:
        parts = parts[:2 if kind is Credentials and octets[:1] == LOGIN else 1]
    rows = [row_of(kind, part, parts) for part in parts]
    if secret:
        hidden = [(b"", "not shown: it may be the password, or have it in it")]
        rows += [FieldRow(name, size, None, hidden) for name, size in list(LAYOUTS[kind].sizes.items())[len(rows):]]
    remarks = [f"! {text}" for text in deviations(kind, parts)]
    if not remarks and ends_too_soon(kind, parts):
        remarks.append("! truncated" if secret else f"! truncated: {lacking(kind, parts)}")
    elif kind is not Credentials and sum(len(part.octets) for part in parts) < len(octets):
        remarks.append("! what is behind this cannot be read")
    return Explanation(*LAYOUTS[kind][:3], rows, remarks)


# --- octets, and nothing is known of them ---

AFTER: Dict[Type[Message], List[Type[Message]]] = {     # what the same side may send next
    Greeting: [Credentials, Request], Credentials: [Request], MethodSelection: [CredentialsReply, Reply],
    CredentialsReply: [Reply], Reply: [Reply],
}
Chain = List[Tuple[Message, bytes]]


def explanations(octets: bytes) -> List[Explanation]:
    """Whatever these octets may be: one message, several in a row, or several that each would fit."""
    return [part for reading in readings(octets) for part in reading]


def readings(octets: bytes) -> List[List[Explanation]]:
    """The ways to read these octets, at least one, each as the messages that it finds in a row."""
    chains = list(chained(octets, [kind for kind in LAYOUTS if not issubclass(kind, Frame)]))     # which could be logins as well
    with_login = [chain for chain in chains if any(isinstance(message, Credentials) for message, _part in chain)]
    suspicious = suspected_login(octets)
    if suspicious is not None and not with_login:       # what may have a password in it is read as nothing else
        return [suspicious]
    found = [[explanation(message, part) for message, part in chain] for chain in with_login or chains]
    proper = [reading for reading in found if not any(part.deviates for part in reading)]
    return proper or found or [[guessed(octets)]]


def chained(octets: bytes, kinds: Sequence[Type[Message]]) -> Iterator[Chain]:
    """The ways to read all of these octets, beginning with one of `kinds`.  (No recursion: a row may be long.)"""
    begun: List[Tuple[Chain, bytes, Sequence[Type[Message]]]] = [([], octets, kinds)]
    while begun:
        chain, rest, kinds = begun.pop()
        if chain and not rest:
            yield chain
            continue
        for kind in reversed(kinds):
            if found := parsed(kind, rest):
                begun.append(([*chain, found], rest[len(found[1]):], AFTER.get(kind, [])))


def parsed(kind: Type[Any], octets: bytes) -> Optional[Tuple[Any, bytes]]:
    """The message of this kind that the octets begin with, and its own octets; None if there is none."""
    if kind is Datagram and octets[:2] != b"\0\0":      # else whatever has a 01, 03 or 04 in fourth place would be one
        return None
    stream = BytesIO(octets)
    try:
        return kind.read(stream), octets[:stream.tell()]
    except Socks5Error:
        return None


def suspected_login(octets: bytes) -> Optional[List[Explanation]]:
    """A login that cannot be read to its end, alone or behind a greeting; None if it is none."""
    if octets[:1] == LOGIN and len(octets) != 2:
        return [broken(Credentials, octets)]
    greeting, part = parsed(Greeting, octets) or (Greeting(b""), b"")
    rest = octets[len(part):]
    if Method.USERNAME_PASSWORD not in greeting.methods or rest[:1] != LOGIN:
        return None
    return [explanation(greeting), broken(Credentials, rest)]


def guessed(octets: bytes) -> Explanation:
    """What these octets may have been meant to be."""
    if octets[:2] == b"\0\0":
        return broken(Datagram, octets)
    if octets[0] != VER:
        return not_socks(octets)
    return broken(Request if octets[2:3] == b"\0" else Greeting, octets)


def not_socks(octets: bytes, reason: str = "") -> Explanation:
    """What is no SOCKS5 at all: its first octets, and what it seems to be."""
    reason = reason or str(foreign.identify(octets, Address.numeric("127.0.0.1", 1080), pac=False))
    if octets[:1] == LOGIN:         # without a greeting
        found = broken(Credentials, octets)
        found.remarks = [f"! {plain_sentence(reason)}"]
        return found
    kept = octets[:BEGINNING]
    row = FieldRow("FIRST OCTETS", "Variable", kept, [(kept, name_text(kept))], len(octets) - len(kept))
    return Explanation("NOT SOCKS5", "", "client", [row], [f"! {plain_sentence(reason)}"])
