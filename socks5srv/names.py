"""
How a host name is spelled: the one form in which names are compared, and the one that is asked for.

Beyond ASCII a name has many spellings, and the DNS knows it in ASCII only ("xn--...").  Which ASCII that
is has changed: Python's codec "idna" is of 2003 and makes faß.test fass.test, but browsers have followed
the rules of 2008 and send xn--fa-hia.test.  So the mapping is done here, in the later way (UTS #46,
non-transitional): case and compatible forms are folded, but ß, the final sigma and the two joiners are
letters of their own.

The one idea: a rule's name and a client's go through the same mapping as what the resolver is asked for,
so what is judged is what is looked up.  Nothing is looked up here (resolver.py does that).
"""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import normalize

KEPT = "\u00df\u03c2\u200c\u200d"       # what was folded away in 2003
JOINERS = {0x200C: None, 0x200D: None}  # of these; for str.translate().  Not printable, and yet parts of Persian and Indic words
CAPITAL_SHARP_S = "\u1e9e"              # casefold() makes it ss; its small letter is the sharp s

FULL_STOPS = re.compile("[\u3002\uff0e\uff61]")
# What stands for nothing, though it is printable or often pasted: hyphens that only show at the end of a line, fillers, variants.
IGNORED = re.compile("[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u200b\u2060\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0100-\U000e01ef]")
ASCII = re.compile(r"[a-z0-9._\-]*")    # that a name may have; a colon or a % would make an address of it

LABEL_MAX, NAME_MAX = 63, 253       # octets, without the dot at the end; RFC 1035 section 2.3.4


def quoted(text: object) -> str:
    """Text or octets from the wire, for a sentence: as Python writes them, but without blanks, which would forge columns of a log line."""
    return repr(text).replace(" ", "\\x20")


@lru_cache(maxsize=256)     # a long list asks for the same name again and again
def canonical(name: str) -> str:
    """A name as it is compared: in ASCII and lower case, without the dot at its end."""
    if name.isascii():
        return name.rstrip(".").lower()
    mapped = folded(name).rstrip(".")
    try:
        return spelled(mapped)
    except UnicodeError:        # no such name can be looked up
        return mapped


def ascii_form(name: str) -> str:
    """
    A name as the resolver or another proxy is asked for it; UnicodeError if it cannot be spelled in ASCII.

    What is ASCII already stays as it is: whether there is such a name, the resolver knows.
    """
    return name if name.isascii() else spelled(folded(name))


def folded(name: str) -> str:
    """One spelling for all that mean the same, folded until nothing changes: NFKC may make letters that have a case, or dots."""
    while True:
        mapped = normalize("NFKC", "".join(map(folded_letter, IGNORED.sub("", name))))
        mapped = FULL_STOPS.sub(".", mapped)
        if mapped == name:
            return name
        name = mapped


def folded_letter(letter: str) -> str:
    if letter in KEPT:
        return letter
    if letter == CAPITAL_SHARP_S:
        return "\u00df"
    return normalize("NFKC", letter.casefold()).casefold()      # twice: a mathematical final sigma is but a sigma


def spelled(name: str) -> str:
    """A folded name in ASCII, label by label; one dot may end it."""
    dot = "." if name.endswith(".") else ""
    octets = ".".join(map(spelled_label, name[:len(name) - len(dot)].split(".")))
    if len(octets) > NAME_MAX:
        raise UnicodeError(f"{quoted(name)} has more than {NAME_MAX} octets in ASCII")
    return octets + dot


def spelled_label(label: str) -> str:
    octets = "".join(letter for letter in label if letter.isascii())
    if not ASCII.fullmatch(octets) or not label.translate(JOINERS).isprintable():
        raise UnicodeError(f"{quoted(label)} has what no name has")
    if not label.isascii():
        if label.startswith("xn--"):
            raise UnicodeError(f"{quoted(label)} is half spelled already")
        label = "xn--" + label.encode("punycode").decode("ascii")
    if not 0 < len(label) <= LABEL_MAX:
        raise UnicodeError(f"{quoted(label)} is no label: it has 1 to {LABEL_MAX} octets")
    return label
