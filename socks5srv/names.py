"""
How a host name is spelled: the one form in which names are compared.

Nothing is looked up here (resolver.py does that).
"""

from __future__ import annotations


def normal(name: str) -> str:
    """A name as it is compared: in ASCII and lower case, without the dot at its end."""
    name = name.rstrip(".").lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:        # no such name can be looked up
            pass
    return name
