"""
The first and the last words of a run: what to paste where, and what has happened.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections import Counter
from itertools import islice
from typing import Any, Counter as CounterType, Dict, List, Optional, Set, Sized

from .. import __version__, outbound
from ..protocol import Address
from ..session import COMMAND_WORDS, Session, amount, shown


def banner(addresses: List[Address], users: Optional[Sized], keys: bool = True, status: Optional[str] = None) -> str:
    """The lines to paste, for a server that listens on these addresses, and on the keyboard; `status` is its page's URL."""
    login = f"login required ({counted(len(users), 'user')})" if users is not None else "no password"
    whom = "this computer only" if all(is_loopback(address.host) for address in addresses) else "other computers, too"
    reachable = reachable_address(addresses[0])
    name = "NAME:PASSWORD@" if users is not None else ""
    url = f"socks5h://{name}{in_url(reachable)}"
    lines = [
        f"socks5srv {__version__}  serving {whom}, {login}",
        *(f"listening on     {with_zone(address)}" for address in addresses if len(addresses) > 1),
        f"proxy address:   {url}",
        *([f"status page:     {status}"] if status is not None else []),
        "",
        f"  try it     curl -x {url} example.com",
        f"  a shell    export ALL_PROXY={url}",
        '  python     pip install "requests[socks]"  and then, with P the address above,',
        '             requests.get(url, proxies={"http": P, "https": P})',
        *(WITH_A_LOGIN if users is not None else browsers(reachable)),
        "",
        f"Ctrl-C stops{', h + Enter shows keys' * keys}.  socks5srv --help shows more.",
    ]
    return "\n".join(lines)


WITH_A_LOGIN = [
    "  browsers   Firefox and Chrome have no place to type a SOCKS5 password",
    "",
    "SOCKS5 sends the password unencrypted: use it where nobody listens in.",
]


def browsers(address: Address) -> List[str]:
    return [
        "  firefox    Settings > Network Settings > Manual:",
        f"             SOCKS Host {host_with_zone(address)}, Port {address.port}, SOCKS v5,",
        "             Proxy DNS when using SOCKS v5; HTTP and HTTPS Proxy empty",
        f"  chrome     chrome --proxy-server=socks5://{in_url(address)}",
    ]


def listening(addresses: List[Address], users: Optional[Sized], commands: Any) -> Dict[str, Any]:
    """The same for programs: what the line "listening" says."""
    return {
        "urls": [f"socks5h://{in_url(address)}" for address in addresses],
        "auth": "password" if users is not None else "none",
        "commands": [COMMAND_WORDS[command] for command in sorted(commands)],
        "pid": os.getpid(),
    }


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def host_with_zone(address: Address) -> str:
    """The host as a person writes it, ``fe80::1%eth0``: without its zone nobody gets to a link-local one."""
    if not address.scope:
        return address.host
    try:
        return f"{address.host}%{socket.if_indextoname(address.scope)}"
    except OSError:                 # it is gone by now
        return address.zoned


def with_zone(address: Address) -> str:
    return str(address._replace(host=host_with_zone(address)))


def in_url(address: Address) -> str:
    """The same with the percent sign as URLs have it: RFC 6874."""
    return with_zone(address).replace("%", "%25")


def reachable_address(address: Address) -> Address:
    """What to tell a client: a wildcard is no address to connect to, so one of ours instead."""
    if not address.is_unspecified:
        return address
    elsewhere = Address.numeric("192.0.2.1", 9)     # documentation only: asked for the route, never sent to
    try:
        return Address.numeric(outbound.local_address_towards(elsewhere, outbound.Route()), address.port)
    except OSError:
        return Address.numeric("127.0.0.1", address.port)


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


MOST = 10_000           # clients and targets that are told apart, or a server that runs for months would grow without end


class Tally:
    """What has happened since the start, for the summary."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.events: CounterType[str] = Counter()
        self.clients: Set[str] = set()                  # by address; as many as are worth counting
        self.octets: CounterType[str] = Counter()       # by target
        self.failures: CounterType[str] = Counter()     # by target and reason
        self.up = self.down = self.most = 0

    def add(self, session: Session) -> None:
        event = session.event
        self.events[event] += 1
        if len(self.clients) < MOST:
            self.clients.add(session.client.host)
        self.up += session.up
        self.down += session.down
        if event == "close":
            self.count(self.octets, str(session.destination), session.up + session.down)
        else:
            code = f" ({session.reply:02x})" if session.reply else ""
            self.count(self.failures, f"{session.destination or '-'} {event.replace('_', ' ')}{code}", 1)

    def count(self, counter: CounterType[str], key: str, number: int) -> None:
        counter[key] += number
        keep_the_largest(counter)

    def merge(self, other: Tally) -> None:
        """Add what another one has counted.  `most` is not a sum: each counts over all."""
        self.events += other.events
        self.clients |= set(islice(other.clients - self.clients, MOST - len(self.clients)))
        self.up += other.up
        self.down += other.down
        self.most = max(self.most, other.most)
        for ours, theirs in ((self.octets, other.octets), (self.failures, other.failures)):
            ours.update(theirs)
            keep_the_largest(ours)

    def facts(self) -> Dict[str, Any]:
        return {
            "seconds": round(time.monotonic() - self.started, 3), "sessions": sum(self.events.values()),
            "events": dict(self.events), "clients": len(self.clients), "targets": len(self.octets),
            "up": self.up, "down": self.down, "most_at_once": self.most,
        }

    def __str__(self) -> str:
        return self.summary("stopped after")

    def summary(self, beginning: str) -> str:
        total, ok = sum(self.events.values()), self.events["close"]
        seconds = int(time.monotonic() - self.started)
        length = f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
        lines = [
            f"{beginning} {length}: {counted(total, 'connection')} ({ok} ok, {total - ok} not)"
            f" from {'at least ' * (len(self.clients) >= MOST)}{counted(len(self.clients), 'client')},",
            f"{amount(self.up)} up, {amount(self.down)} down, at most {self.most} at once",
        ]
        for title, counter in (("most traffic", self.octets), ("not ok", self.failures)):
            for target, count in counter.most_common(3):
                number = amount(count) if counter is self.octets else f"{count} x"
                lines.append(f"  {title:<12}  {shown(target)}  {number}")
                title = ""
        return "\n".join(lines)


def keep_the_largest(counter: CounterType[str]) -> None:
    """Of too many forget those that count least."""
    if len(counter) > MOST:
        for key, _count in counter.most_common()[MOST // 2:]:
            del counter[key]
