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

import re
import sys
import textwrap
from dataclasses import dataclass, field
from io import BytesIO
from ipaddress import IPv6Address
from itertools import zip_longest
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

from . import strangers
from .protocol import (
    COMMANDS, CREDENTIALS_VER, REPLY_CODES, VER, Address, AddressType, Command, Credentials, CredentialsReply,
    Datagram, Field, Greeting, Message, Method, MethodSelection, Reply, ReplyCode, Request, Socks5Error, read_name,
)
from .session import shown

WIDTH = 79          # columns of a table
CELL = 6            # octets in a box at most; of more, the first three and the last
COLUMN = 16         # octets beside their meaning at most, four in a line
LINES = 16          # lines that the meanings of one box have at most
KEPT = 64           # octets of DATA, and of what is not known, that an exhibit keeps
BEGINNING = 8       # octets of what is no SOCKS5: HTTP may have a password further on

Meaning = Tuple[bytes, str]
Boxes = List[Tuple[str, bytes]]


class Kind(NamedTuple):
    """What is the same in all messages of a class: the RFC's picture, and who says it."""

    title: str
    section: str
    sender: str
    receiver: str
    sizes: Dict[str, str]       # by box, in the order of the picture


def picture(names: str, sizes: str) -> Dict[str, str]:
    return dict(zip(names.split(), sizes.split(",")))


KINDS: Dict[Type[Message], Kind] = {
    Greeting: Kind("GREETING", "RFC 1928 section 3", "client", "proxy", picture("VER NMETHODS METHODS", "1,1,1 to 255")),
    MethodSelection: Kind("METHOD SELECTION", "RFC 1928 section 3", "proxy", "client", picture("VER METHOD", "1,1")),
    Credentials: Kind("USERNAME/PASSWORD", "RFC 1929 section 2", "client", "proxy", picture("VER ULEN UNAME PLEN PASSWD", "1,1,1 to 255,1,1 to 255")),
    CredentialsReply: Kind("LOGIN STATUS", "RFC 1929 section 2", "proxy", "client", picture("VER STATUS", "1,1")),
    Request: Kind("REQUEST", "RFC 1928 section 4", "client", "proxy", picture("VER CMD RSV ATYP DST.ADDR DST.PORT", "1,1,X'00',1,Variable,2")),
    Reply: Kind("REPLY", "RFC 1928 section 6", "proxy", "client", picture("VER REP RSV ATYP BND.ADDR BND.PORT", "1,1,X'00',1,Variable,2")),
    Datagram: Kind("DATAGRAM", "RFC 1928 section 7", "client", "proxy", picture("RSV FRAG ATYP DST.ADDR DST.PORT DATA", "2,1,1,Variable,2,Variable")),
}
STRANGER = Kind("NOT SOCKS5", "no RFC of SOCKS", "client", "proxy", {})


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
            return "\n".join(wrapped(f"{self.label}{self.title}  {'; '.join(self.remarks)}", indent="   "))
        lines = [justified(f"{self.label}{self.title}", self.section), justified(self.direction, self.clock)]
        return "\n".join(lines + drawn(self.fields) + told(self.fields) + remarked(self.remarks))

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


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


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


def spaced(octets: bytes) -> str:
    return " ".join(f"{octet:02x}" for octet in octets)


def told(rows: Sequence[Row]) -> List[str]:
    """Box by box: name, octets, meaning."""
    names = max(len(row.name) for row in rows)
    columns = {octets: column(octets, row.left_out) for row in rows for octets, _text in row.meanings}
    width = max(len(line) for lines in columns.values() for line in lines)
    lines: List[str] = []
    for row in rows:
        lines += limited([
            f"     {name:<{names}}  {octets:<{width}}  {text}".rstrip()
            for name, octets, text in pieces(row, columns, WIDTH - 5 - names - 2 - width - 2)
        ])
    return lines


def column(octets: bytes, left_out: int) -> List[str]:
    if len(octets) > COLUMN:
        return [shortened(octets, COLUMN, left_out)]
    return [spaced(octets[start:start + 4]) for start in range(0, len(octets), 4)] or [""]


def pieces(row: Row, columns: Dict[bytes, List[str]], width: int) -> Iterator[Tuple[str, str, str]]:
    name = row.name
    for octets, text in row.meanings:
        for left, right in zip_longest(columns[octets], textwrap.wrap(text, width, break_on_hyphens=False), fillvalue=""):
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


# --- text ---

def plain(text: str) -> str:
    """In ASCII, and with whatever could forge a line escaped; blanks too, which wrapping would change."""
    return shown(text).encode("ascii", "backslashreplace").decode().replace(" ", "\\x20")


def name_text(octets: bytes) -> str:
    """A name as it can be shown: as text if it is some."""
    try:
        return plain(octets.decode())
    except UnicodeDecodeError:
        return plain(repr(octets)[2:-1])


# --- what the octets of a box mean ---

METHOD_WORDS = {
    0x00: "no authentication required", 0x01: "GSSAPI", 0x02: "username/password", 0x03: "CHAP", 0x05: "challenge-response",
    0x06: "SSL", 0x07: "NDS", 0x08: "multi-authentication framework", 0x09: "JSON parameter block", 0xFF: "no acceptable methods",
}
COMMAND_WORDS = {Command.CONNECT: "CONNECT", Command.BIND: "BIND", Command.UDP_ASSOCIATE: "UDP ASSOCIATE"}
TYPE_WORDS = {AddressType.IPV4: "IPv4", AddressType.DOMAINNAME: "domain name", AddressType.IPV6: "IPv6"}


def method_words(code: int) -> str:
    """RFC 1928 section 3, and IANA's list."""
    return METHOD_WORDS.get(code) or ("a private method" if code >= 0x80 else "a method that nobody has defined")


def of_several(code: int, words: Dict[Any, str]) -> str:
    """This one, and in parentheses what it could have been."""
    others = ", ".join(f"{other:02x} {word}" for other, word in words.items() if other != code)
    return f"{words.get(code, 'nothing that the RFC knows')} ({others})"


def one(octets: bytes, text: str) -> List[Meaning]:
    return [(octets, text)]


def of_version(octets: bytes) -> List[Meaning]:
    return one(octets, "SOCKS version 5" if octets[0] == VER else "not SOCKS version 5")


def of_login_version(octets: bytes) -> List[Meaning]:
    words = "version of this sub-negotiation, not of SOCKS: 01, not 05"
    return one(octets, words if octets[0] == CREDENTIALS_VER else "not 01, the version of this sub-negotiation")


def of_nmethods(octets: bytes) -> List[Meaning]:
    return one(octets, f"{counted(octets[0], 'method')} {'follow' if octets[0] != 1 else 'follows'}")


def of_methods(octets: bytes) -> List[Meaning]:
    return [(octets[i:i + 1], method_words(octets[i])) for i in range(len(octets))] or one(b"", "none")


def of_method(octets: bytes) -> List[Meaning]:
    follows = " (the next message follows RFC 1929)" if octets[0] == Method.USERNAME_PASSWORD else ""
    return one(octets, method_words(octets[0]) + follows)


def of_ulen(octets: bytes) -> List[Meaning]:
    return one(octets, f"{counted(octets[0], 'octet')} of user name")


def of_uname(octets: bytes) -> List[Meaning]:
    return one(octets, name_text(octets) or "empty")


def of_status(octets: bytes) -> List[Meaning]:
    return one(octets, "failure (whatever is not 00 is one), and the proxy hangs up" if octets[0] else "success (any other value is failure)")


def of_command(octets: bytes) -> List[Meaning]:
    return one(octets, of_several(octets[0], COMMAND_WORDS))


def of_reply_code(octets: bytes) -> List[Meaning]:
    code = REPLY_CODES.get(octets[0])
    return one(octets, code.phrase if code is not None else "unassigned")


def of_reserved(octets: bytes) -> List[Meaning]:
    return one(octets, f"reserved, must be {'00' * len(octets)}")


def of_fragment(octets: bytes) -> List[Meaning]:
    frag = octets[0]
    if not frag:
        return one(octets, "a whole datagram, not a fragment")
    return one(octets, f"fragment {frag & ~Datagram.LAST_FRAGMENT}{', the last one' if frag & Datagram.LAST_FRAGMENT else ''}")


def of_address_type(octets: bytes) -> List[Meaning]:
    return one(octets, of_several(octets[0], TYPE_WORDS))


def of_port(octets: bytes) -> List[Meaning]:
    port = int.from_bytes(octets, "big")
    return one(octets, f"0x{port:04x} = {port}, most significant octet first")


def of_data(octets: bytes) -> List[Meaning]:
    return one(octets, "the payload: whatever is behind the header")


def of_address(octets: bytes, atyp: int) -> List[Meaning]:
    """DST.ADDR or BND.ADDR, complete."""
    if atyp == AddressType.DOMAINNAME:
        length = (octets[:1], f"{counted(octets[0], 'octet')} of name, without a zero at its end")
        return [length, (octets[1:], name_text(octets[1:]))] if octets[1:] else [length]
    if atyp == AddressType.IPV6:
        return one(octets, str(IPv6Address(octets)))
    return one(octets, ".".join(map(str, octets)))


MEANINGS: Dict[str, Callable[[bytes], List[Meaning]]] = {
    "VER": of_version, "NMETHODS": of_nmethods, "METHODS": of_methods, "METHOD": of_method, "ULEN": of_ulen, "UNAME": of_uname,
    "STATUS": of_status, "CMD": of_command, "REP": of_reply_code, "RSV": of_reserved, "FRAG": of_fragment,
    "ATYP": of_address_type, "DST.PORT": of_port, "BND.PORT": of_port, "DATA": of_data,
}


def meanings(kind: Type[Message], box: str, octets: bytes, atyp: int) -> List[Meaning]:
    """What these octets say in this box, which has them all."""
    if box.endswith(".ADDR"):
        return of_address(octets, atyp)
    if box == "VER" and kind in (Credentials, CredentialsReply):
        return of_login_version(octets)
    return MEANINGS[box](octets)


# --- a message to its table ---

def table(message: Message) -> str:
    """One message as its table."""
    return str(exhibit(message))


def exhibit(message: Message, octets: Optional[bytes] = None) -> Exhibit:
    """
    One message as an `Exhibit`, with what it says in a sentence, and its deviations.

    `octets` are those that came, where they may differ from those that the message would be sent as.
    """
    kind = KINDS.get(type(message))
    if kind is None:
        return unknown(message)
    boxes = message.fields()
    parts = cut(type(message), octets) if octets is not None else [(box.name, box.octets) for box in boxes]
    rows = [row_of(type(message), box, part, parts) for box, (_name, part) in zip(boxes, parts)]
    remarks = [f"! {text}" for text in deviations(type(message), parts)] + [f'"{SENTENCES[type(message)](message)}"']
    return Exhibit(kind.title, kind.section, kind.sender, kind.receiver, rows, remarks)


def row_of(kind: Type[Message], box: Field, octets: bytes, parts: Boxes) -> Row:
    size = KINDS[kind].sizes[box.name]
    if box.secret:
        text = "hidden here; on the wire anyone can read it" if box.name == "PASSWD" else "hidden: how long the password is"
        return Row(box.name, size, None, one(b"", text))
    left_out = max(0, len(octets) - KEPT) if box.name == "DATA" else 0
    octets = octets[:len(octets) - left_out]
    found = meanings(kind, box.name, octets, dict(parts).get("ATYP", b"\0")[0])
    if box.name == "DATA":
        found = one(octets, f"{counted(len(octets) + left_out, 'octet')} of payload; all in front of it is the header")
    return Row(box.name, size, octets, found, left_out)


def unknown(message: Message) -> Exhibit:
    """A message that is in no RFC that this file knows: its fields, as they say of themselves."""
    rows = []
    for box in message.fields():
        if box.secret:
            rows.append(Row(box.name, "", None, one(b"", "hidden")))
        else:
            kept = box.octets[:BEGINNING]
            rows.append(Row(box.name, str(len(box.octets)), kept, one(kept, plain(str(box.meaning))), len(box.octets) - len(kept)))
    return Exhibit(type(message).__name__.upper(), "", "client", "proxy", rows)


# --- octets to boxes: what no reader takes ---

LENGTHS = {"RSV": 1, "DST.PORT": 2, "BND.PORT": 2}      # octets; of all others that are not listed, 1


def cut(kind: Type[Message], octets: bytes) -> Boxes:
    """
    The octets in the boxes of the picture, as far as they go.

    The last box may have too few.  Behind an ATYP that nobody knows no box can be told from the next.
    """
    boxes: Boxes = []
    for name in KINDS[kind].sizes:
        length = length_of(kind, name, boxes, octets)
        if length is None or (not octets and length):
            break
        boxes.append((name, octets[:length]))
        octets = octets[length:]
    return boxes


def length_of(kind: Type[Message], name: str, boxes: Boxes, ahead: bytes) -> Optional[int]:
    """How many octets this box has, behind those `boxes` and with these `ahead`; None if nobody knows."""
    if name in ("METHODS", "UNAME", "PASSWD"):
        return boxes[-1][1][0]
    if name == "DATA":
        return len(ahead)
    if name == "RSV" and kind is Datagram:
        return 2
    if not name.endswith(".ADDR"):
        return LENGTHS.get(name, 1)
    atyp = boxes[-1][1][0]
    if atyp == AddressType.DOMAINNAME:
        return 1 + ahead[0] if ahead else 1
    return {AddressType.IPV4: 4, AddressType.IPV6: 16}.get(AddressType(atyp)) if atyp in (1, 4) else None


def is_whole(kind: Type[Message], boxes: Boxes) -> bool:
    """Whether no octet is lacking."""
    if len(boxes) < len(KINDS[kind].sizes):
        return False
    name, octets = boxes[-1]
    return len(octets) == length_of(kind, name, boxes[:-1], octets)


def broken(kind: Type[Message], octets: bytes, remarks: Sequence[str] = ()) -> Exhibit:
    """What came instead of such a message, or only the beginning of one; `remarks` say what is made of it."""
    about = KINDS[kind]
    if kind is Credentials:
        rows = broken_login(octets)
    else:
        boxes = cut(kind, octets)
        atyp = dict(boxes).get("ATYP", b"\0")[0]
        rows = []
        for name, part in boxes:
            whole = len(part) == length_of(kind, name, boxes[:boxes.index((name, part))], part)
            found = meanings(kind, name, part, atyp) if whole else one(part, "cut off here")
            rows.append(Row(name, about.sizes[name], part, found))
    marks = [f"! {text}" for text in deviations(kind, [(row.name, row.octets or b"") for row in rows if row.octets is not None])]
    return Exhibit(about.title, about.section, about.sender, about.receiver, rows, marks + list(remarks))


def broken_login(octets: bytes) -> List[Row]:
    """Its first octets only: whatever is behind them may be the password."""
    sizes = KINDS[Credentials].sizes
    shown_octets = octets[:2] if octets[:1] == bytes((CREDENTIALS_VER,)) else octets[:1]
    rows = [Row(name, sizes[name], part, meanings(Credentials, name, part, 0)) for name, part in zip(sizes, (shown_octets[:1], shown_octets[1:])) if part]
    hidden = one(b"", "not shown: in a login that cannot be read the password may be anywhere")
    return rows + [Row(name, size, None, hidden) for name, size in list(sizes.items())[len(rows):]]


# --- deviations from the RFC ---

def deviations(kind: Type[Message], boxes: Boxes) -> List[str]:
    """What the RFC has otherwise, and what this server makes of it."""
    found: List[str] = []
    for name, octets in boxes:
        if octets or name in ("UNAME", "PASSWD", "METHODS"):
            found += DEVIATIONS.get(name, nothing)(kind, octets)
    address = next((octets for name, octets in boxes if name.endswith(".ADDR")), b"")
    if address and dict(boxes)["ATYP"][0] == AddressType.DOMAINNAME and len(address) == 1 + address[0]:
        found += of_a_name(kind, address[1:])
    return found


def nothing(_kind: Type[Message], _octets: bytes) -> List[str]:
    return []


def verdict(kind: Type[Message], code: ReplyCode) -> str:
    """What this server does with a message that cannot be carried out."""
    return {Request: f" (refused with reply {code:02x})", Datagram: " (dropped)", Greeting: " (refused)", Credentials: " (refused)"}.get(kind, "")


def wrong_version(kind: Type[Message], octets: bytes) -> List[str]:
    right = CREDENTIALS_VER if kind in (Credentials, CredentialsReply) else VER
    if octets[0] == right:
        return []
    return [f"VER is {octets[0]:02x}, {KINDS[kind].section} says {right:02x}{verdict(kind, ReplyCode.GENERAL_FAILURE)}"]


def no_methods(_kind: Type[Message], octets: bytes) -> List[str]:
    return [] if octets[0] else ["NMETHODS is 00, RFC 1928 section 3 says 1 to 255 methods (refused: there is none to choose)"]


def methods_twice(_kind: Type[Message], octets: bytes) -> List[str]:
    twice = sorted({code for code in octets if octets.count(code) > 1})
    return [f"METHODS has {spaced(bytes(twice[:8]))}{' ..' * (len(twice) > 8)} more than once (accepted)"] if twice else []


def empty(what: str) -> Callable[[Type[Message], bytes], List[str]]:
    def complain(_kind: Type[Message], octets: bytes) -> List[str]:
        return [] if octets else [f"{what} is empty, RFC 1929 section 2 says 1 to 255 octets"]

    return complain


def unknown_command(_kind: Type[Message], octets: bytes) -> List[str]:
    return [] if octets[0] in COMMANDS else [f"CMD is {octets[0]:02x}, RFC 1928 section 4 knows 01, 02 and 03 (refused with reply 07)"]


def unknown_type(kind: Type[Message], octets: bytes) -> List[str]:
    if octets[0] in (1, 3, 4):
        return []
    return [f"ATYP is {octets[0]:02x}, RFC 1928 section 5 knows 01, 03 and 04{verdict(kind, ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED)}"]


def unknown_reply(_kind: Type[Message], octets: bytes) -> List[str]:
    return [] if octets[0] in REPLY_CODES else [f"REP is {octets[0]:02x}, RFC 1928 section 6 knows 00 to 08"]


def not_reserved(kind: Type[Message], octets: bytes) -> List[str]:
    if not any(octets):
        return []
    accepted = " (accepted)" if KINDS[kind].sender == "client" else ""
    return [f"RSV is {spaced(octets)}, {KINDS[kind].section} says {spaced(bytes(len(octets)))}{accepted}"]


def fragment(_kind: Type[Message], octets: bytes) -> List[str]:
    if not octets[0]:
        return []
    return [f"FRAG is {octets[0]:02x}: a fragment, which RFC 1928 section 7 has dropped by who does not put them together"]


def of_a_name(kind: Type[Message], octets: bytes) -> List[str]:
    """A name that is none, or is an address."""
    refused = verdict(kind, ReplyCode.HOST_UNREACHABLE)
    if not octets:
        return [f"the name is empty{refused}"]
    if octets.endswith(b"\0"):
        return [f"the name has a zero octet at its end, where RFC 1928 section 5 has none{refused}"]
    try:
        name = read_name(octets)
    except Socks5Error:
        return [f"no host can have this name{refused}"]
    if Address(name, 0, AddressType.DOMAINNAME).literal is not None:
        return [f"{plain(name)} is an IP address, and is sent as a name{' (accepted as the address)' if refused else ''}"]
    return []


DEVIATIONS: Dict[str, Callable[[Type[Message], bytes], List[str]]] = {
    "VER": wrong_version, "NMETHODS": no_methods, "METHODS": methods_twice, "UNAME": empty("the user name"),
    "PASSWD": empty("the password"), "CMD": unknown_command, "REP": unknown_reply, "RSV": not_reserved, "ATYP": unknown_type,
    "FRAG": fragment,
}


# --- what a message says, as one sentence ---

def of_greeting(message: Any) -> str:
    ways = "is the one way" if len(message.methods) == 1 else f"are the {len(message.methods)} ways"
    return f"I speak SOCKS5. Here {ways} I can log in."


def of_selection(message: Any) -> str:
    return {
        Method.NO_AUTHENTICATION_REQUIRED: "You need no login. Say what you want.", Method.GSSAPI: "Log in with GSSAPI.",
        Method.USERNAME_PASSWORD: "Use a username and password.", Method.NO_ACCEPTABLE_METHODS: "None of these will do. Goodbye.",
    }.get(message.method, f"Log in with {method_words(message.method)}.")


def of_credentials(message: Any) -> str:
    return f"I am {name_text(message.username) or 'nobody'}, here is my password."


def of_login_reply(message: Any) -> str:
    return "I do not let you in. Goodbye." if message.status else "Welcome."


def of_request(message: Any) -> str:
    host, port = plain(message.destination.host), message.destination.port
    if message.command is Command.CONNECT:
        return f"Connect me to {host}, port {port}."
    if message.command is Command.BIND:
        caller = "Someone" if message.destination.is_unspecified else f"Someone at {host}"
        return f"Open a port for me. {caller} will connect to it."
    return "Relay datagrams for me, as long as this connection lives."


def of_reply(message: Any) -> str:
    if message.code == ReplyCode.SUCCEEDED:
        return f"Done. My end is {plain(str(message.bound))}."
    return REPLIES.get(message.code, "It did not work, for a reason that the RFC does not know.")


REPLIES: Dict[int, str] = {
    ReplyCode.GENERAL_FAILURE: "It did not work.", ReplyCode.NOT_ALLOWED: "My rules forbid it.",
    ReplyCode.NETWORK_UNREACHABLE: "There is no way to that network.", ReplyCode.HOST_UNREACHABLE: "That host cannot be reached.",
    ReplyCode.CONNECTION_REFUSED: "The target said no.", ReplyCode.TTL_EXPIRED: "It took too long.",
    ReplyCode.COMMAND_NOT_SUPPORTED: "I do not do that.", ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED: "I cannot go to that kind of address.",
}


def of_datagram(message: Any) -> str:
    return f"These {counted(len(message.data), 'octet')} are for, or from, {plain(str(message.address))}."


SENTENCES: Dict[Type[Message], Callable[[Any], str]] = {
    Greeting: of_greeting, MethodSelection: of_selection, Credentials: of_credentials, CredentialsReply: of_login_reply,
    Request: of_request, Reply: of_reply, Datagram: of_datagram,
}


# --- octets, and nothing is known of them ---

AFTER: Dict[Type[Message], List[Type[Message]]] = {     # what the same side may send next
    Greeting: [Credentials, Request], Credentials: [Request], MethodSelection: [CredentialsReply, Reply],
    CredentialsReply: [Reply], Reply: [Reply],
}


def exhibits(octets: bytes) -> List[Exhibit]:
    """Whatever these octets may be: one message, several in a row, or several that each would fit."""
    return [exhibit for reading in readings(octets) for exhibit in reading]


def readings(octets: bytes) -> List[List[Exhibit]]:
    """
    All the ways to read these octets, each as the messages that it finds in a row; at least one.

    What may have a password in it is read as a login, and as nothing else.
    """
    chains = list(chained(octets, list(KINDS)))
    with_login = [chain for chain in chains if any(isinstance(message, Credentials) for message, _part in chain)]
    suspicious = suspected_login(octets)
    if with_login or suspicious is not None:
        if not with_login and suspicious is not None:
            return [suspicious]
        chains = with_login
    found = [[exhibit(message, part) for message, part in chain] for chain in chains]
    proper = [reading for reading in found if not any(remark.startswith("! ") for one_of in reading for remark in one_of.remarks)]
    return proper or found or [[guessed(octets)]]


Chain = List[Tuple[Message, bytes]]


def chained(octets: bytes, kinds: Sequence[Type[Message]]) -> Iterator[Chain]:
    """The ways to read all of these octets, beginning with one of `kinds`."""
    for kind in kinds:
        if kind is Datagram and octets[:2] != b"\0\0":      # else whatever has a 01, 03 or 04 in fourth place would be one
            continue
        stream = BytesIO(octets)
        try:
            message: Message = kind.read(stream)            # type: ignore[attr-defined]
        except Socks5Error:
            continue
        rest = stream.read()
        part = octets[:len(octets) - len(rest)]
        if not rest:
            yield [(message, part)]
            continue
        for chain in chained(rest, AFTER.get(kind, [])):
            yield [(message, part), *chain]


def suspected_login(octets: bytes) -> Optional[List[Exhibit]]:
    """A login that cannot be read to its end, alone or behind a greeting; None if it is none."""
    if octets[:1] == bytes((CREDENTIALS_VER,)) and len(octets) != 2:
        return [broken(Credentials, octets)]
    try:
        stream = BytesIO(octets)
        greeting = Greeting.read(stream)
    except Socks5Error:
        return None
    rest = stream.read()
    if Method.USERNAME_PASSWORD not in greeting.methods or rest[:1] != bytes((CREDENTIALS_VER,)):
        return None
    return [exhibit(greeting), broken(Credentials, rest)]


def guessed(octets: bytes) -> Exhibit:
    """What these octets may have been meant to be."""
    if octets[:2] == b"\0\0":
        return broken(Datagram, octets, ["This is no datagram that could be relayed."])
    if octets[0] != VER:
        return stranger(octets)
    if octets[2:3] == b"\0":
        return broken(Request, octets)
    return broken(Greeting, octets)


def stranger(octets: bytes, reason: str = "") -> Exhibit:
    """What is no SOCKS5 at all: its first octets, and what it seems to be."""
    reason = reason or str(strangers.recognise(octets, Address.numeric("127.0.0.1", 1080), pac=False))
    kept = octets[:BEGINNING]
    row = Row("FIRST OCTETS", "Variable", kept, one(kept, name_text(kept)), len(octets) - len(kept))
    return Exhibit(STRANGER.title, "", "client", "proxy", [row], [f"! {plain_sentence(reason)}"])


def plain_sentence(text: str) -> str:
    """Like plain(), but with its blanks."""
    return plain(text).replace("\\x20", " ")


# --- the program ---

USAGE = """\
usage: python -m socks5srv.explain HEX...

Shows what these octets are as messages of SOCKS5: 050100, 05:01:00, 05 01 00 and
0x050100 are the same.  With - they are read from standard input.  Passwords are
not shown.
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
        octets = octets_of(sys.stdin.buffer.read().decode("latin-1") if list(words) == ["-"] else " ".join(words))
        if not octets:
            raise ValueError("there is not one octet: write some, as in 050100")
        print(report(octets), flush=True)
    except ValueError as error:
        print(f"socks5srv.explain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
