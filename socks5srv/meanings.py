"""
What the octets of a message mean: box by box, as one sentence, and where they deviate from the RFC.

The one idea: everything is asked of the octets in the boxes of the RFC's picture, so that what no reader
takes can be put into words as well.  `cut()` puts octets into the boxes, as far as they go.

All of it is text in plain ASCII, and whatever could forge a line is escaped.  How it is laid out is up to
explain.py.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Type

from .protocol import (
    COMMANDS, CREDENTIALS_VER, REPLY_CODES, VER, Address, AddressType, Command, Credentials, CredentialsReply,
    Datagram, Greeting, Message, Method, MethodSelection, Reply, ReplyCode, Request, Socks5Error, read_name,
)
from .session import shown, word

Meaning = Tuple[bytes, str]

SOME = 12           # methods that are named; hardly a client offers more than three


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


# --- octets to boxes ---

class Part(NamedTuple):
    """What is in one box; not `whole` if some of its octets are lacking."""

    name: str
    octets: bytes
    whole: bool = True


def cut(kind: Type[Message], octets: bytes) -> List[Part]:
    """
    The octets in the boxes of the picture, as far as they go.

    Behind an ATYP that nobody knows one box cannot be told from the next: there it ends.
    """
    parts: List[Part] = []
    for name in KINDS[kind].sizes:
        length = length_of(kind, name, parts, octets)
        if length is None or (not octets and length) or (parts and not parts[-1].whole):
            break
        parts.append(Part(name, octets[:length], len(octets) >= length))
        octets = octets[length:]
    return parts


def length_of(kind: Type[Message], name: str, parts: List[Part], ahead: bytes) -> Optional[int]:
    """How many octets this box has, behind those `parts` and with these octets `ahead`; None if nobody knows."""
    if name in ("METHODS", "UNAME", "PASSWD"):
        return parts[-1].octets[0]
    if name == "DATA":
        return len(ahead)
    if name.endswith(".ADDR"):
        return {1: 4, 3: 1 + ahead[0] if ahead else 1, 4: 16}.get(parts[-1].octets[0])
    return 2 if name.endswith(".PORT") or (name == "RSV" and kind is Datagram) else 1


def ends_too_soon(kind: Type[Message], parts: List[Part]) -> bool:
    """Whether more should have come, as far as that can be known."""
    if len(parts) == len(KINDS[kind].sizes):
        return not parts[-1].whole
    return not parts or parts[-1].name != "ATYP" or parts[-1].octets[0] in TYPE_WORDS


def octets_in(parts: List[Part], name: str) -> bytes:
    return next((part.octets for part in parts if part.name.endswith(name)), b"")


# --- text ---

def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def spaced(octets: bytes) -> str:
    """In hexadecimal, as the tables have it."""
    return " ".join(f"{octet:02x}" for octet in octets)


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
    """A sentence that somebody else has made: like plain(), but with its blanks, though not those of what it quotes."""
    return trimmed(shown(text).encode("ascii", "backslashreplace").decode(), 240)


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
    found = [(octets[i:i + 1], method_words(octets[i])) for i in range(min(len(octets), SOME))]
    rest = octets[SOME:]
    return found + one(rest, f"and {len(rest)} more") * bool(rest) or one(b"", "none")


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


# --- deviations from the RFC ---

def deviations(kind: Type[Message], parts: List[Part]) -> List[str]:
    """What the RFC has otherwise, and what this server makes of it."""
    found: List[str] = []
    for part in parts:
        if part.name in DEVIATIONS and part.whole:
            found += DEVIATIONS[part.name](kind, part.octets)
            if found and part.name == "VER":        # some other layout: the other boxes mean nothing
                return found
        if part.name.endswith(".ADDR") and part.whole and octets_in(parts, "ATYP")[0] == AddressType.DOMAINNAME:
            found += of_a_name(kind, part.octets[1:])
    return found


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


def odd_methods(_kind: Type[Message], octets: bytes) -> List[str]:
    found = ["METHODS has ff, which is the answer that there is none (ignored)"] if Method.NO_ACCEPTABLE_METHODS in octets else []
    twice = sorted({code for code in octets if octets.count(code) > 1})
    if twice:
        found.append(f"METHODS has {spaced(bytes(twice[:8]))}{' ..' * (len(twice) > 8)} more than once (accepted)")
    return found


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
        return [f"{brief(name)} is an IP address, and is sent as a name{' (accepted as the address)' if refused else ''}"]
    return []


DEVIATIONS: Dict[str, Callable[[Type[Message], bytes], List[str]]] = {
    "VER": wrong_version, "NMETHODS": no_methods, "METHODS": odd_methods, "UNAME": empty("the user name"),
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
    return f"I am {trimmed(name_text(message.username), 80) or 'nobody'}, here is my password."


def of_login_reply(message: Any) -> str:
    return "I do not let you in. Goodbye." if message.status else "Welcome."


def of_request(message: Any) -> str:
    host, port = brief(message.destination.host), message.destination.port
    if message.command is Command.CONNECT:
        return f"Connect me to {host}, port {port}."
    if message.command is Command.BIND:
        caller = "Someone" if message.destination.is_unspecified else f"Someone at {host}"
        return f"Open a port for me. {caller} will connect to it."
    return "Relay datagrams for me, as long as this connection lives."


def of_reply(message: Any) -> str:
    if message.code == ReplyCode.SUCCEEDED:
        return f"Done. My end is {brief(message.bound)}."
    return REPLIES.get(message.code, "It did not work, for a reason that the RFC does not know.")


REPLIES: Dict[int, str] = {
    ReplyCode.GENERAL_FAILURE: "It did not work.", ReplyCode.NOT_ALLOWED: "My rules forbid it.",
    ReplyCode.NETWORK_UNREACHABLE: "There is no way to that network.", ReplyCode.HOST_UNREACHABLE: "That host cannot be reached.",
    ReplyCode.CONNECTION_REFUSED: "The target said no.", ReplyCode.TTL_EXPIRED: "It took too long.",
    ReplyCode.COMMAND_NOT_SUPPORTED: "I do not do that.", ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED: "I cannot go to that kind of address.",
}


def of_datagram(message: Any) -> str:
    return f"{counted(len(message.data), 'octet')}, to or from {brief(message.address)}."


SENTENCES: Dict[Type[Message], Callable[[Any], str]] = {
    Greeting: of_greeting, MethodSelection: of_selection, Credentials: of_credentials, CredentialsReply: of_login_reply,
    Request: of_request, Reply: of_reply, Datagram: of_datagram,
}


def sentence(message: Message) -> str:
    """What a message says, in quotation marks."""
    return f'"{SENTENCES[type(message)](message)}"'
