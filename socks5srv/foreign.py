"""
What to tell a client that does not speak SOCKS5.

Browsers set to "HTTP proxy", SOCKS4 programs and TLS scanners all find the port.  They are
told apart by their first octets, and answered in their own language where that helps the
person behind them: HTTP with a page that says what to set, SOCKS4 with its own refusal.
Of HTTP that takes a whole method, and a blank: a letter may be the begin of anything.
A PROXY header from anybody but a balancer of ours is no better than noise, but the log says so.

A browser may also ask for ``/proxy.pac``, the file that sets it up by itself.
"""

from __future__ import annotations

from typing import List, Optional

from .protocol import CREDENTIALS_VER, Address, Field, Message, ProtocolError
from .proxyprotocol import SIGNATURE, WORD

HTTP = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ")     # RFC 9110 section 9
PROXY_HEADERS = (WORD, SIGNATURE)      # how they begin
MOST = 4096             # octets of an HTTP request that are read: its first line is in them

PAGE = """\
This is a SOCKS5 proxy, not an HTTP proxy.

In a browser, set SOCKS Host (version 5) to {address}, and leave HTTP Proxy empty;
or set the address for automatic configuration to http://{address}/proxy.pac
Elsewhere write socks5h://{address} instead of http://{address}
"""

PAC = """\
function FindProxyForURL(url, host) {{
  if (isPlainHostName(host) || host === "127.0.0.1" || host === "[::1]") return "DIRECT";
  return "SOCKS5 {address}; SOCKS {address}";
}}
"""


class Note(Message):
    """An answer that is no SOCKS5 message: these octets, as they are."""

    def __init__(self, name: str, octets: bytes) -> None:
        self.name = name
        self.octets = octets

    def fields(self) -> List[Field]:
        return [Field(self.name, self.octets, f"{len(self.octets)} octets")]


class ForeignProtocol(ProtocolError):
    """A client that speaks something else; `kind` is socks4, http, pac (HTTP that gets the file), tls, proxy_protocol or not_socks."""

    answer: Optional[Message] = None

    def __init__(self, reason: str, answer: Optional[Message] = None, kind: str = "not_socks") -> None:
        super().__init__(reason)
        self.answer = answer
        self.kind = kind


def unsettled(octets: bytes) -> bool:
    """Whether these octets, at least one, are HTTP whose first line is not all there, or can still become that, or a PROXY header."""
    if octets.startswith(HTTP):
        return b"\n" not in octets and len(octets) < MOST
    return any(word.startswith(octets) and word != octets for word in (*HTTP, *PROXY_HEADERS))


def identify(octets: bytes, here: Address, pac: bool) -> ForeignProtocol:
    """
    What client begins like this.

    `octets` is at least one; of HTTP the first line, as far as it has come.  `here` is
    the address that the client has found us by; with `pac` it may have the PAC file.
    """
    if octets[0] == 4:
        return ForeignProtocol("this is SOCKS4: set the client to SOCKS5", Note("SOCKS4", bytes((0, 91, 0, 0, 0, 0, 0, 0))), "socks4")
    if octets.startswith(HTTP):
        if pac and octets.startswith((b"GET /proxy.pac ", b"GET /proxy.pac?")):
            return ForeignProtocol("the PAC file, for a browser", page("200 OK", "application/x-ns-proxy-autoconfig", PAC, here), "pac")
        return ForeignProtocol(f"this is HTTP: use socks5h://{here}", page("501 Not Implemented", "text/plain; charset=utf-8", PAGE, here), "http")
    if octets[0] == 0x16:
        return ForeignProtocol("this is TLS: the proxy's address begins with socks5h://, not https://", kind="tls")
    if octets.startswith(PROXY_HEADERS):
        return ForeignProtocol("this is a PROXY header, and --proxy-protocol does not have its sender's address", kind="proxy_protocol")
    if octets[0] == CREDENTIALS_VER:    # of which nothing is told: the password may be in it
        return ForeignProtocol("these are credentials that were not asked for: a greeting comes first")
    return ForeignProtocol(f"this is not SOCKS: it begins with {octets[:3].hex(' ')}")


def page(status: str, kind: str, text: str, here: Address) -> Note:
    body = text.format(address=here).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return Note("HTTP", head.encode() + body)
