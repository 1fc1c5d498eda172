"""
What the octets of a message mean: field by field, as one sentence, and where they deviate from the RFC.

The one idea: everything follows from the octets in the fields of the RFC's picture, so that a malformed message
can be put into words as well.  `cut()` splits octets into these fields, as far as they go.
All of it is text in plain ASCII, and what could forge a line is escaped.

Not here: how it is laid out (tables.py).
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type

from ..gssapi.messages import Abort, ContextToken, Encapsulated, Frame, Level, LevelToken, MessageType
from ..protocol import (
    COMMANDS, CREDENTIALS_VER, REPLY_CODES, VER, Address, AddressType, Command, Credentials, CredentialsReply,
    Datagram, Greeting, Message, Method, MethodSelection, Reply, ReplyCode, Request, Socks5Error, read_name,
)
from ..session import plural, shown, word

Meaning = Tuple[bytes, str]

MAX_NAMED = 12      # methods; most clients offer three at most


class MessageLayout(NamedTuple):
    """What all messages of a class have in common: the RFC's picture, and who sends it."""

    title: str
    section: str
    sender: str                 # client or proxy; of a datagram either
    sizes: Dict[str, str]       # by field, in the order of the picture


LAYOUTS: Dict[Type[Message], MessageLayout] = {
    kind: MessageLayout(title, f"RFC {section}", sender, dict(box.split(" ", 1) for box in boxes.split(", ")))
    for kind, title, section, sender, boxes in (
        (Greeting, "GREETING", "1928 section 3", "client", "VER 1, NMETHODS 1, METHODS 1 to 255"),
        (MethodSelection, "METHOD SELECTION", "1928 section 3", "proxy", "VER 1, METHOD 1"),
        (Credentials, "USERNAME/PASSWORD", "1929 section 2", "client", "VER 1, ULEN 1, UNAME 1 to 255, PLEN 1, PASSWD 1 to 255"),
        (CredentialsReply, "LOGIN STATUS", "1929 section 2", "proxy", "VER 1, STATUS 1"),
        (Request, "REQUEST", "1928 section 4", "client", "VER 1, CMD 1, RSV X'00', ATYP 1, DST.ADDR Variable, DST.PORT 2"),
        (Reply, "REPLY", "1928 section 6", "proxy", "VER 1, REP 1, RSV X'00', ATYP 1, BND.ADDR Variable, BND.PORT 2"),
        (Datagram, "DATAGRAM", "1928 section 7", "client", "RSV 2, FRAG 1, ATYP 1, DST.ADDR Variable, DST.PORT 2, DATA Variable"),
        (ContextToken, "CONTEXT TOKEN", "1961 section 3.4", "client", "VER 1, MTYP 1, LEN 2, TOKEN up to 65,535"),
        (LevelToken, "PROTECTION LEVEL", "1961 section 4.3", "client", "VER 1, MTYP 1, LEN 2, TOKEN up to 65,535"),
        (Encapsulated, "WRAPPED", "1961 section 5", "client", "VER 1, MTYP 1, LEN 2, TOKEN up to 65,535"),
        (Abort, "ABORT", "1961 section 3.8", "proxy", "VER 1, MTYP 1"),
    )
}


# --- octets to fields ---

class FieldOctets(NamedTuple):
    """The octets of one field; not `whole` if some are missing."""

    name: str
    octets: bytes
    whole: bool = True


def cut(kind: Type[Message], octets: bytes) -> List[FieldOctets]:
    """The octets split into the fields of the picture, as far as they go: behind an unknown ATYP nothing is known."""
    parts: List[FieldOctets] = []
    for name in LAYOUTS[kind].sizes:
        length = length_of(kind, name, parts, octets)
        if length is None or (not octets and length) or (parts and not parts[-1].whole):
            break
        parts.append(FieldOctets(name, octets[:length], len(octets) >= length))
        octets = octets[length:]
    return parts


def length_of(kind: Type[Message], name: str, parts: List[FieldOctets], ahead: bytes) -> Optional[int]:
    """How many octets this field has, after those `parts` and with these octets `ahead`; None if that is unknown."""
    if name in ("METHODS", "UNAME", "PASSWD"):
        return parts[-1].octets[0]
    if name == "DATA":
        return len(ahead)
    if name == "TOKEN":
        return int.from_bytes(parts[-1].octets, "big")
    if name.endswith(".ADDR"):
        return {1: 4, 3: 1 + ahead[0] if ahead else 1, 4: 16}.get(parts[-1].octets[0])
    return 2 if name.endswith(".PORT") or name == "LEN" or (name == "RSV" and kind is Datagram) else 1


def ends_too_soon(kind: Type[Message], parts: List[FieldOctets]) -> bool:
    """Whether more should have come, as far as that can be known."""
    if len(parts) == len(LAYOUTS[kind].sizes):
        return not parts[-1].whole
    return not parts or parts[-1].name != "ATYP" or parts[-1].octets[0] in TYPE_WORDS


def address_type(parts: List[FieldOctets]) -> int:
    """What ATYP says; 0 if it has not come."""
    return next((part.octets[0] for part in parts if part.name == "ATYP"), 0)


# --- text ---

def plain(text: str) -> str:
    """In ASCII, and with whatever could forge a line escaped; blanks too, which wrapping would change."""
    return word(text).encode("ascii", "backslashreplace").decode()


def name_text(octets: bytes) -> str:
    """A name as it can be shown: as text if it is some."""
    try:
        return plain(octets.decode())
    except UnicodeDecodeError:
        return plain(repr(octets)[2:-1])


def trimmed(text: str, most: int) -> str:
    """Of what is too long the beginning and the end."""
    return text if len(text) <= most else f"{text[:most - 20]}..{text[-18:]}"


def brief(text: object) -> str:
    """Like plain(), for names in a sentence."""
    return trimmed(plain(str(text)), 80)


def plain_sentence(text: str) -> str:
    """A sentence from elsewhere: like plain(), but with its blanks, though not those of what it quotes."""
    return trimmed(shown(text).encode("ascii", "backslashreplace").decode(), 240)


# --- what the octets of a field mean ---

METHOD_WORDS = {
    0x00: "no authentication required", 0x01: "GSSAPI", 0x02: "username/password", 0x03: "CHAP", 0x05: "challenge-response",
    0x06: "SSL", 0x07: "NDS", 0x08: "multi-authentication framework", 0x09: "JSON parameter block", 0xFF: "no acceptable methods",
}
COMMAND_WORDS = {Command.CONNECT: "CONNECT", Command.BIND: "BIND", Command.UDP_ASSOCIATE: "UDP ASSOCIATE"}
LEVEL_WORDS = {
    Level.NONE: "no protection", Level.INTEGRITY: "nobody can change what follows", Level.CONFIDENTIALITY: "nobody can read what follows, either",
    Level.SELECTIVE: "each message as its sender likes",
}
FRAME_WORDS = {
    MessageType.AUTHENTICATION: "who it is", MessageType.PROTECTION_LEVEL: "what protection", MessageType.ENCAPSULATED: "wrapped", MessageType.ABORT: "refused",
}
TYPE_WORDS = {AddressType.IPV4: "IPv4", AddressType.DOMAINNAME: "domain name", AddressType.IPV6: "IPv6"}


def method_words(code: int) -> str:
    """RFC 1928 section 3, and IANA's list."""
    return METHOD_WORDS.get(code) or ("a private method" if code >= 0x80 else "a method that is not assigned")


def of_several(code: int, words: Dict[Any, str]) -> str:
    """This one, and in parentheses what it could have been."""
    others = ", ".join(f"{other:02x} {word}" for other, word in words.items() if other != code)
    return f"{words.get(code, 'nothing that the RFC knows')} ({others})"


# Fields that are a number, and what it means; VER is another one in RFC 1929.
NUMBERS: Dict[str, Callable[[int], str]] = {
    "VER": lambda ver: "SOCKS version 5" if ver == VER else "not SOCKS version 5",
    "NMETHODS": lambda number: f"{plural(number, 'method')} {'follows' if number == 1 else 'follow'}",
    "METHOD": lambda code:
        method_words(code) + " (the next message follows RFC 1929)" * (code == Method.USERNAME_PASSWORD),
    "ULEN": lambda number: f"{plural(number, 'octet')} of user name",
    "STATUS": lambda code:
        "failure (whatever is not 00 is one), and the proxy hangs up" if code
        else "success (any other value is failure)",
    "CMD": lambda code: of_several(code, COMMAND_WORDS),
    "REP": lambda code: REPLY_CODES[code].phrase if code in REPLY_CODES else "unassigned",
    "FRAG": lambda frag:
        f"fragment {frag & ~Datagram.LAST_FRAGMENT}{', the last one' * (frag >= Datagram.LAST_FRAGMENT)}" if frag
        else "a whole datagram, not a fragment",
    "ATYP": lambda code: of_several(code, TYPE_WORDS),
    "MTYP": lambda code: of_several(code, FRAME_WORDS),
    "LEN": lambda length: f"{plural(length, 'octet')} of token",
    "PORT": lambda port: f"0x{port:04x} = {port}, most significant octet first",
}


def meanings(kind: Type[Message], name: str, octets: bytes, atyp: int) -> List[Meaning]:
    """What these octets mean as this field, which is complete."""
    if name.endswith(".ADDR"):
        return of_address(octets, atyp)
    if name == "METHODS":
        return of_methods(octets)
    if name == "UNAME":
        return [(octets, name_text(octets) or "empty")]
    if name == "RSV":
        return [(octets, f"reserved, must be {'00' * len(octets)}")]
    if name == "VER" and version_of(kind) == CREDENTIALS_VER:
        words = "version of this sub-negotiation, not of SOCKS: 01, not 05"
        return [(octets, words if octets[0] == CREDENTIALS_VER else "not 01, the version of this sub-negotiation")]
    return [(octets, NUMBERS[name.rpartition(".")[2]](int.from_bytes(octets, "big")))]


def of_address(octets: bytes, atyp: int) -> List[Meaning]:
    if atyp != AddressType.DOMAINNAME:
        return [(octets, str(ip_address(octets)))]
    length, name = octets[:1], octets[1:]
    counted = (length, f"{plural(length[0], 'octet')} of name, without a zero at its end")
    return [counted, (name, name_text(name))] if name else [counted]


def of_methods(octets: bytes) -> List[Meaning]:
    found = [(octets[i:i + 1], method_words(octets[i])) for i in range(min(len(octets), MAX_NAMED))]
    rest = octets[MAX_NAMED:]
    return found + [(rest, f"and {len(rest)} more")] * bool(rest) or [(b"", "none")]


def version_of(kind: Type[Message]) -> int:
    """What its VER should be."""
    return CREDENTIALS_VER if kind in (Credentials, CredentialsReply) or issubclass(kind, Frame) else VER


# --- deviations from the RFC ---

def deviations(kind: Type[Message], parts: List[FieldOctets]) -> Iterator[str]:
    """What the RFC has otherwise, and what this server makes of it."""
    for name, octets, is_whole in parts:
        found = list(deviations_of(kind, name, octets, address_type(parts))) if is_whole else []
        yield from found
        if found and name == "VER":         # some other layout: the other fields mean nothing
            return


def deviations_of(kind: Type[Message], name: str, octets: bytes, atyp: int) -> Iterator[str]:
    """Those of one field, which is complete."""
    here, section = octets.hex(" "), LAYOUTS[kind].section
    if name == "VER" and octets[0] != version_of(kind):
        yield f"VER is {here}, {section} says {version_of(kind):02x}{verdict(kind, ReplyCode.GENERAL_FAILURE)}"
    elif name == "MTYP" and issubclass(kind, Frame) and octets[0] != kind.mtyp:
        yield f"MTYP is {here}, where {section} has {kind.mtyp:02x}{' (the client gives up)' * (octets[0] == MessageType.ABORT)}"
    elif name == "ATYP" and octets[0] not in TYPE_WORDS:
        refused = verdict(kind, ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED)
        yield f"ATYP is {here}, RFC 1928 section 5 knows 01, 03 and 04{refused}"
    elif name == "RSV" and any(octets):
        accepted = " (accepted)" if LAYOUTS[kind].sender == "client" else ""
        yield f"RSV is {here}, {section} says {bytes(len(octets)).hex(' ')}{accepted}"
    elif name == "METHODS":
        yield from odd_methods(octets)
    elif name.endswith(".ADDR") and atyp == AddressType.DOMAINNAME:
        yield from of_a_name(kind, octets[1:])
    elif name in DEVIATIONS and DEVIATIONS[name][0](octets):
        yield DEVIATIONS[name][1].format(here)


# When a field deviates, whatever the message, and the sentence for that.
DEVIATIONS: Dict[str, Tuple[Callable[[bytes], bool], str]] = {
    "NMETHODS": (
        lambda octets: not octets[0],
        "NMETHODS is {}, RFC 1928 section 3 says 1 to 255 methods (refused: there is none to choose)",
    ),
    "UNAME": (lambda octets: not octets, "the user name is empty, RFC 1929 section 2 says 1 to 255 octets"),
    "PASSWD": (lambda octets: not octets, "the password is empty, RFC 1929 section 2 says 1 to 255 octets"),
    "CMD": (
        lambda octets: octets[0] not in COMMANDS,
        "CMD is {}, RFC 1928 section 4 knows 01, 02 and 03 (refused with reply 07)",
    ),
    "REP": (lambda octets: octets[0] not in REPLY_CODES, "REP is {}, RFC 1928 section 6 knows 00 to 08"),
    "FRAG": (
        lambda octets: octets[0] != 0,
        "FRAG is {}: a fragment, which RFC 1928 section 7 has a proxy drop that does not put them together",
    ),
}


def odd_methods(octets: bytes) -> Iterator[str]:
    if Method.NO_ACCEPTABLE_METHODS in octets:
        yield "METHODS has ff, which is the answer that there is none (ignored)"
    twice = bytes(code for code, number in sorted(Counter(octets).items()) if number > 1)
    if twice:
        yield f"METHODS has {twice[:8].hex(' ')}{' ..' * (len(twice) > 8)} more than once (accepted)"


def verdict(kind: Type[Message], code: ReplyCode) -> str:
    """What this server does with a message that cannot be carried out."""
    if kind is Request:
        return f" (refused with reply {code:02x})"
    return {Datagram: " (dropped)", Greeting: " (refused)", Credentials: " (refused)"}.get(kind, "")


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
        return [f"{brief(name)} is an IP address, and is sent as a name{' (accepted as the address)' if refused else ''}"]
    return []


# --- what a message says, as one sentence ---

def of_selection(message: Any) -> str:
    return {
        Method.NO_AUTHENTICATION_REQUIRED: "You need no authentication. Send your request.", Method.GSSAPI: "Log in with GSSAPI.",
        Method.USERNAME_PASSWORD: "Use a username and password.", Method.NO_ACCEPTABLE_METHODS: "None of these will do. Goodbye.",
    }.get(message.method, f"Log in with {method_words(message.method)}.")


def of_request(message: Any) -> str:
    host, port = brief(message.destination.host), message.destination.port
    if message.command is Command.CONNECT:
        return f"Connect me to {host}, port {port}."
    if message.command is Command.BIND:
        caller = "Someone" if message.destination.is_unspecified else f"Someone at {host}"
        return f"Open a port for me. {caller} will connect to it."
    return "Relay datagrams for me, as long as this connection lives."


def of_level(frame: Any) -> str:
    """The proxy knows what it sends; what the client sends is wrapped, but for clients that speak as NEC's did."""
    if frame.level is not None:
        return f"You get level {frame.level}: {LEVEL_WORDS[frame.level]}."
    return f"I want level {frame.token[0]}." if len(frame.token) == 1 else "I want this level of protection; it is in the token."


REPLIES: Dict[int, str] = {
    ReplyCode.GENERAL_FAILURE: "It did not work.", ReplyCode.NOT_ALLOWED: "My rules forbid it.",
    ReplyCode.NETWORK_UNREACHABLE: "There is no way to that network.", ReplyCode.HOST_UNREACHABLE: "That host cannot be reached.",
    ReplyCode.CONNECTION_REFUSED: "The target said no.", ReplyCode.TTL_EXPIRED: "It took too long.",
    ReplyCode.COMMAND_NOT_SUPPORTED: "I do not do that.", ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED: "I cannot go to that kind of address.",
}

SENTENCES: Dict[Type[Message], Callable[[Any], str]] = {
    Greeting: lambda greeting:
        "I speak SOCKS5. Here is the one way I can log in." if len(greeting.methods) == 1
        else f"I speak SOCKS5. Here are the {len(greeting.methods)} ways I can log in.",
    MethodSelection: of_selection,
    Credentials: lambda login: f"I am {trimmed(name_text(login.username), 80) or 'nobody'}, here is my password.",
    CredentialsReply: lambda reply: "I do not let you in. Goodbye." if reply.status else "Welcome.",
    Request: of_request,
    Reply: lambda reply:
        f"Done. My end is {brief(reply.bound)}." if reply.code == ReplyCode.SUCCEEDED
        else REPLIES.get(reply.code, "It did not work, for a reason that the RFC does not know."),
    ContextToken: lambda frame: "This is my token: see who I am." if frame.token else "I have no more to say: you know me.",
    LevelToken: lambda frame: of_level(frame),
    Encapsulated: lambda _frame: "What is in it is for you only.",
    Abort: lambda _frame: "I do not let you in. Goodbye.",
    Datagram: lambda datagram: f"{plural(len(datagram.data), 'octet')}, to or from {brief(datagram.address)}.",
}


def sentence(message: Message) -> str:
    """What a message says, in quotation marks."""
    return f'"{SENTENCES[type(message)](message)}"'
