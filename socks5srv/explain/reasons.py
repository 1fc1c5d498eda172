"""
Why the server answered so: what has been found out about a request, in sentences.

Here are only words, made of plain values; tracer.py finds them out.
"""

from __future__ import annotations

import errno
import os
from typing import List, Optional, Sequence

from .. import relay
from ..gssapi.messages import Level
from ..observer import Attempt
from ..protocol import Address, AddressType, Command, Method, Request, Socks5Error
from ..rules import Verdict
from ..session import plural
from .fields import brief, plain_sentence

MAX_LISTED = 8                  # addresses in one sentence
WHAT_CLIENTS_PRINT = "What clients print for it: docs/client-messages.rst"
WRONG = "wrong name or password"


def listed(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:MAX_LISTED])}{' ..' * (len(texts) > MAX_LISTED)}"


def reason_of(error: object) -> str:
    return plain_sentence(relay.reason_of(error))


# --- the login ---

def about_method(method: int, trusted: bool, has_users: bool, wanted: Optional[Method], error: Optional[Socks5Error]) -> List[str]:
    """`wanted` is the only one that would have done; None if select_method() has reasons of its own."""
    if method == Method.NO_ACCEPTABLE_METHODS:
        lack = f"this proxy wanted {wanted:02x}, which METHODS has not got: " if wanted is not None else ""
        return [f"Why: {lack}{reason_of(error)}.", WHAT_CLIENTS_PRINT]
    if method == Method.NO_AUTHENTICATION_REQUIRED and (trusted or not has_users):
        return [f"Why: {'clients of this network need no authentication' if trusted else 'this proxy has no users, so it requires no authentication'}."]
    if method == Method.GSSAPI:
        return ["Why: this proxy asks for Kerberos, so it never picks 00."]
    if method == Method.USERNAME_PASSWORD and not trusted:
        return ["Why: this proxy has users, so it never picks 00. It would have answered ff (no acceptable methods) and hung up, had the client "
                "not offered 02."]
    return []


def about_login(user: Optional[str], error: Optional[Socks5Error]) -> List[str]:
    """`user` is who has been let in; None if the login has failed."""
    if user is not None:
        return [f"Why: {brief(user)} is a user, and the password is right."]
    reason = reason_of(error or "its method says so")
    same = " Both get the same answer, so that guessing does not show which names there are." if reason == WRONG else ""
    return [f"Why: {reason}.{same}", WHAT_CLIENTS_PRINT]


def about_abort(error: Optional[Socks5Error]) -> List[str]:
    return [f"Why: {reason_of(error or 'its method says so')}. Clients are told nothing but that it is so."]


def about_level(level: Optional[int]) -> List[str]:
    """Of a message that is wrapped, if it is."""
    if not level:
        return []
    return [f"It is wrapped, at level {level}: on the wire there are 01 03, two octets of length, and a token in which it is "
            f"{'encrypted' if level == Level.CONFIDENTIALITY else 'signed'}."]


# --- the request ---

def about_ahead(octets: int, is_request: bool) -> str:
    # Not how many there are: behind a greeting that may be a login, and tell how long the password is.
    much = plural(octets, "octet") if is_request else "more"
    return f"! {much} came ahead of the answer, which RFC 1928 has the client wait for (accepted: kept for later)"


def about_request(request: Request, by_upstream: bool) -> List[str]:
    """Who looks the name up; `by_upstream` if it is left to an upstream."""
    if request.command is Command.UDP_ASSOCIATE:
        return ["DST.ADDR and DST.PORT are where the client will send from, as far as it knows. This proxy relies on them only "
                "where they name the client's own address and a port."]
    if request.destination.literal is not None:
        if request.destination.address_type is AddressType.DOMAINNAME:
            return []
        return ["The client sent an address; if it has begun with a name, it has looked that up itself (that is socks5://)."]
    return [f"The client sent the name, so the {'upstream' if by_upstream else 'proxy'} looks it up (that is socks5h://)."]


def about_look_up(host: str, addresses: Sequence[str], seconds: float, error: Optional[Exception] = None) -> str:
    found = [f"failed: {reason_of(error)}"] if error is not None else list(dict.fromkeys(map(plain_sentence, addresses)))
    rest = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return f"Lookup: {brief(host)} -> {', '.join(found[:MAX_LISTED]) or 'no address'}{rest} ({seconds * 1000:.1f} ms)"


def about_rules(verdicts: Sequence[Verdict]) -> List[str]:
    if not verdicts:
        return []
    if not any(verdict.reason or verdict.rule for verdict in verdicts):
        return ["Rules: allowed, as no rule forbids it."]
    return [f"Rules: {listed(list(dict.fromkeys(map(about_verdict, verdicts))))}"]


def about_verdict(verdict: Verdict) -> str:
    address = brief(verdict.address)
    if not verdict.allowed:
        return f"{address} refused ({plain_sentence(verdict.reason)})"
    return f"{address} allowed ({f'rule: {plain_sentence(verdict.rule.text)}' if verdict.rule is not None else 'no rule forbids it'})"


def about_attempts(attempts: Sequence[Attempt]) -> List[str]:
    return [f"Tried: {listed(list(map(about_attempt, attempts)))}"] if attempts else []


def about_attempt(attempt: Attempt) -> str:
    place, error = brief(attempt.address), attempt.error
    if error is not None and attempt.seconds is None:
        return f"{place} impossible ({reason_of(error)})"
    if error is None and not attempt.connected:
        return f"{place} did not answer before this was decided"
    return f"{place} {'connected' if error is None else about_error(error)} after {(attempt.seconds or 0.0) * 1000:.1f} ms"


def about_error(error: Exception) -> str:
    """ECONNREFUSED (Connection refused)"""
    code = error.errno if isinstance(error, OSError) else None
    return reason_of(error) if code is None else f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"


# --- the reply ---

def about_success(command: Optional[Command], bound: Address, first: bool, bind_timeout: float) -> List[str]:
    """What such a reply says, by command; BIND has two."""
    place = brief(bound)
    if command is Command.UDP_ASSOCIATE:
        return [f'"Send your datagrams to {place}, each with a header that says where to."',
                "This relay lives as long as this TCP connection, which from now on says nothing."]
    if command is Command.BIND and first:
        return [f'"I listen on {place}. Tell them."{about_ftp(bound)}',
                f"Waiting up to {bind_timeout:g} s for one connection; then comes the second reply."]
    called = f'"They have called: it is {place}. What follows comes from them."'
    return [called if command is Command.BIND else f'"Done. I talk to the target from {place}."',
            "From here on the proxy copies octets and understands none of them."]


def about_ftp(bound: Address) -> str:
    """How an FTP client tells the server: RFC 959 section 4.1.2, and RFC 2428 section 2."""
    if bound.address_type is AddressType.IPV4:
        return f" In FTP: PORT {','.join(map(str, [*bound.octets(), bound.port >> 8, bound.port & 255]))}"
    return f" In FTP: EPRT |2|{bound.host}|{bound.port}|" if bound.address_type is AddressType.IPV6 else ""


def about_failure(error: Optional[Socks5Error], findings: Sequence[str]) -> List[str]:
    why = f"Why: {reason_of(error)}." if error is not None else "Why: an unhandled exception, which is in the log."
    return [why, *findings, "BND.ADDR and BND.PORT say nothing then, but clients wait for them.", WHAT_CLIENTS_PRINT]
