"""
socks5srv: a SOCKS5 proxy server in plain Python (RFC 1928 and RFC 1929).

    from socks5srv import Socks5Server, Socks5Handler

To read the source, begin with protocol.py, then handler.py, outbound.py, relay.py and
datagrams.py; docs/architecture.rst has the order of all modules, and what there is to learn in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .handler import Socks5Handler
    from .observer import Observer
    from .protocol import (
        Address, AddressType, Command, LoginFailed, Method, ProtocolError, ReplyCode, Request, RequestFailed,
        Socks5Error,
    )
    from .server import Socks5Server
    from .session import Session

# Where the public names live.  They are imported when they are first used, so that a program
# that only has this package installed does not pay for it at its start.
HOMES = {
    "Socks5Server": "server", "Socks5Handler": "handler", "Session": "session", "Observer": "observer",
    "Address": "protocol", "AddressType": "protocol", "Command": "protocol", "Method": "protocol",
    "ReplyCode": "protocol", "Request": "protocol", "Socks5Error": "protocol", "ProtocolError": "protocol",
    "LoginFailed": "protocol", "RequestFailed": "protocol",
}

__all__ = [
    "Address", "AddressType", "Command", "LoginFailed", "Method", "Observer", "ProtocolError", "ReplyCode", "Request",
    "RequestFailed", "Session", "Socks5Error", "Socks5Handler", "Socks5Server",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("." + HOMES[name], __name__), name)
