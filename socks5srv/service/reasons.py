"""
Why the server answered so: what has been found out about a request, in sentences.

Here are only words, made of plain values; explaining.py finds them out.
"""

from __future__ import annotations

import errno
import os
from typing import Dict, List, NamedTuple, Optional, Sequence

from ..meanings import brief, counted, plain_sentence
from ..protocol import Address, AddressType, Command, Method, ReplyCode, Request, Socks5Error


class Judgement(NamedTuple):
    """What the rules have said about an address: why not, or by which rule; neither if no rule speaks of it."""

    address: Address
    reason: str
    rule: str = ""


class Attempt(NamedTuple):
    """An address that was tried: the errno, 0 for success, None if it was given up; or why it could not be tried."""

    place: str
    code: Optional[int]
    seconds: Optional[float]
    reason: str = ""


# --- the login ---

def about_method(method: int, wanted: Method, trusted: bool, trouble: Optional[Socks5Error]) -> List[str]:
    if method == Method.NO_ACCEPTABLE_METHODS:
        return [f"Why: this proxy wanted {wanted:02x}, which METHODS has not got: {plain_sentence(str(trouble))}.", *NO_METHOD]
    if method == Method.NO_AUTHENTICATION_REQUIRED:
        who = "clients of this network need no login" if trusted else "this proxy has no users, so it asks nobody for a login"
        return [f"Why: {who}."]
    return ["Why: this proxy has users, so it never picks 00. It would have answered ff (no acceptable methods) and hung up, had the client "
            "not offered 02."]


def about_login(user: Optional[str], trouble: Optional[Socks5Error]) -> List[str]:
    """`user` is who has been let in."""
    if user is not None:
        return [f"Why: {brief(user)} is a user, and the password is right."]
    reason = plain_sentence(str(trouble or "its method says so"))
    same = " Both get the same answer, so that nobody finds out which names there are." if reason == WRONG else ""
    return [f"Why: {reason}.{same}", *NO_LOGIN]


WRONG = "wrong name or password"


# --- the request ---

def about_request(request: Request, by_name: bool) -> List[str]:
    """Who looks the name up; `by_name` if it is left to an upstream."""
    if request.command is Command.UDP_ASSOCIATE:
        return ["DST.ADDR and DST.PORT are where the client will send from, as far as it knows. This proxy relies on them only where they name the client's own address and a port."]
    if request.destination.literal is not None:
        if request.destination.address_type is AddressType.DOMAINNAME:
            return []
        return ["The client sent an address; if it has begun with a name, it has looked that up itself (that is socks5://)."]
    return [f"The client sent the name, so the {'upstream' if by_name else 'proxy'} looks it up (that is socks5h://)."]


def about_look_up(host: str, found: Sequence[str], seconds: float, error: Optional[Exception] = None) -> str:
    if error is not None:
        found = [f"failed: {plain_sentence(str(getattr(error, 'strerror', None) or error))}"]
    addresses = list(dict.fromkeys(map(plain_sentence, found)))
    rest = f" and {len(addresses) - 8} more" if len(addresses) > 8 else ""
    return f"Lookup: {brief(host)} -> {', '.join(addresses[:8]) or 'no address'}{rest} ({seconds * 1000:.1f} ms)"


def about_rules(judgements: Sequence[Judgement]) -> List[str]:
    if not judgements:
        return []
    if not any(judgement.reason or judgement.rule for judgement in judgements):
        return ["Rules: allowed, as no rule forbids it."]
    judged = dict.fromkeys(about_judgement(judgement) for judgement in judgements)
    return [f"Rules: {', '.join(list(judged)[:8])}{' ..' * (len(judged) > 8)}"]


def about_judgement(judgement: Judgement) -> str:
    address = brief(judgement.address)
    if judgement.reason:
        return f"{address} refused ({plain_sentence(judgement.reason)})"
    return f"{address} allowed ({f'rule: {plain_sentence(judgement.rule)}' if judgement.rule else 'no rule forbids it'})"


def about_tries(attempts: Sequence[Attempt]) -> List[str]:
    if not attempts:
        return []
    return [f"Tried: {', '.join(map(about_attempt, attempts[:8]))}{' ..' * (len(attempts) > 8)}"]


def about_attempt(attempt: Attempt) -> str:
    if attempt.reason:
        return f"{attempt.place} impossible ({plain_sentence(attempt.reason)})"
    if attempt.code is None or attempt.seconds is None:
        return f"{attempt.place} did not answer before this was decided"
    after = f"after {attempt.seconds * 1000:.1f} ms"
    if attempt.code == 0:
        return f"{attempt.place} connected {after}"
    return f"{attempt.place} {errno.errorcode.get(attempt.code, attempt.code)} ({os.strerror(attempt.code)}) {after}"


# --- the reply ---

def about_success(command: Optional[Command], bound: Address, first: bool, bind_timeout: float) -> List[str]:
    """What such a reply says, by command; BIND has two."""
    place = brief(bound)
    if command is Command.UDP_ASSOCIATE:
        return [f'"Send your datagrams to {place}, each with a header that says where to."',
                "This relay lives as long as this TCP connection, which from now on says nothing."]
    if command is not Command.BIND:
        return [f'"Done. I talk to the target from {place}."', "From here on the proxy copies octets and understands none of them."]
    if not first:
        return [f'"They have called: it is {place}. What follows comes from them."', "From here on the proxy copies octets and understands none of them."]
    return [f'"I listen on {place}. Tell them."{about_ftp(bound)}',
            f"Waiting up to {bind_timeout:g} s for one connection; then comes the second reply."]


def about_ftp(bound: Address) -> str:
    """How an FTP client tells the server: RFC 959 section 4.1.2, and RFC 2428 section 2."""
    if bound.address_type is AddressType.IPV4:
        return f" In FTP: PORT {','.join(map(str, [*bound.octets(), bound.port >> 8, bound.port & 255]))}"
    return f" In FTP: EPRT |2|{bound.host}|{bound.port}|" if bound.address_type is AddressType.IPV6 else ""


# What PySocks 1.7, python-socks 2, and httpx 0.2x (with socksio) print; curl has the same words for all.
CLIENTS: Dict[int, Sequence[str]] = {
    ReplyCode.GENERAL_FAILURE: ("General SOCKS server failure", "General SOCKS server failure", "General SOCKS server failure"),
    ReplyCode.NOT_ALLOWED: ("Connection not allowed by ruleset", "Connection not allowed by ruleset", "Connection not allowed by ruleset"),
    ReplyCode.NETWORK_UNREACHABLE: ("Network unreachable", "Network unreachable", "Network unreachable"),
    ReplyCode.HOST_UNREACHABLE: ("Host unreachable", "Host unreachable", "Host unreachable"),
    ReplyCode.CONNECTION_REFUSED: ("Connection refused", "Connection refused by destination host", "Connection refused"),
    ReplyCode.TTL_EXPIRED: ("TTL expired", "TTL expired", "TTL expired"),
    ReplyCode.COMMAND_NOT_SUPPORTED: (
        "Command not supported, or protocol error", "Command not supported or protocol error", "Command not supported",
    ),
    ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED: ("Address type not supported",) * 3,
}


def what_clients_print(code: int) -> List[str]:
    if code not in CLIENTS:
        return []
    pysocks, python_socks, httpx = CLIENTS[code]
    return printed(
        f"Can't complete SOCKS5 connection to ... ({code:d})", f"0x{code:02x}: {pysocks}", python_socks,
        f"Proxy Server could not connect: {httpx}.",
    )


def printed(curl: str, pysocks: str, python_socks: str, httpx: str) -> List[str]:
    return ["What clients print:", f"curl: {curl}", f"PySocks: {pysocks}", f"python-socks: {python_socks}", f"httpx: {httpx}"]


NO_METHOD = printed(
    "No authentication method was acceptable.", "All offered SOCKS5 authentication methods were rejected",
    "No acceptable authentication methods were offered",
    "Requested NO AUTHENTICATION REQUIRED from proxy server, but got NO ACCEPTABLE METHODS.",
)
NO_LOGIN = printed(
    "User was rejected by the SOCKS5 server (1 1).", "SOCKS5 authentication failed", "Username and password authentication failure",
    "Invalid username/password",
)


def about_datagrams_left_out(number: int) -> str:
    return f"{counted(number, 'datagram')} more within a second, not shown"
