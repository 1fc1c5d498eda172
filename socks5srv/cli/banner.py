"""The first words of a run: where it listens, and what to paste where."""

from __future__ import annotations

import os
from typing import Any, Dict, Iterable, Optional, Sequence
from urllib.parse import quote

from .. import __version__, outbound
from ..locality import host_with_zone, in_url, with_zone
from ..policy import is_loopback
from ..protocol import Address, Command
from ..rules import Network
from ..session import COMMAND_WORDS, plural

BANNER = """\
socks5srv {version}  serving {whom}, {login}
{listening}proxy address:   {url}
{status}
  try it     curl -x {url} example.com
  a shell    export ALL_PROXY={url}
  python     pip install "requests[socks]"  and then, with P the address above,
             requests.get(url, proxies={{"http": P, "https": P}})
{browsers}

Ctrl-C stops{keys}.  socks5srv --help shows more."""

WITHOUT_A_LOGIN = """\
  firefox    Settings > Network Settings > Manual:
             SOCKS Host {host}, Port {port}, SOCKS v5,
             Proxy DNS when using SOCKS v5; HTTP and HTTPS Proxy empty
  chrome     chrome --proxy-server=socks5://{place}"""

WITH_A_LOGIN = """\
  browsers   Firefox and Chrome have no place to type a SOCKS5 password

SOCKS5 sends the password unencrypted: use it on trusted networks only."""

WITH_KERBEROS = """\
  kerberos   clients need a ticket (kinit); browsers have no Kerberos for SOCKS5"""


def banner(
    addresses: Sequence[Address], users: Optional[int], keys: bool = True, status: Optional[str] = None, user: Optional[str] = None,
    balancers: Sequence[Network] = (), gssapi: bool = False,
) -> str:
    """
    The lines to paste.

    `users`: how many, None if no password is asked for; `user`: the name, if there is one only and it is known;
    `keys`: it listens on the keyboard, too; `balancers`: who has to send a PROXY header; `gssapi`: Kerberos is asked for, or one of the two.
    """
    reachable = reachable_address(addresses[0])
    place = in_url(reachable)
    login, name, browsers = "no password", "", WITHOUT_A_LOGIN
    if users is not None:
        login, name, browsers = f"password required ({plural(users, 'user')})", f"{quote(user or 'NAME', safe='')}:PASSWORD@", WITH_A_LOGIN
    if gssapi:
        login = "Kerberos required" if users is None else f"Kerberos or password ({plural(users, 'user')})"
        browsers = WITH_KERBEROS if users is None else f"{WITH_KERBEROS}\n{WITH_A_LOGIN}"
    return BANNER.format(
        version=__version__, login=login, url=f"socks5h://{name}{place}", keys=", h + Enter shows keys" * keys,
        whom="this computer only" if not balancers and all(is_loopback(each.host) for each in addresses) else "other computers, too",
        listening="".join(f"listening on     {with_zone(address)}\n" for address in addresses if len(addresses) > 1)
        + "".join(f"balancers:       {network}, with a PROXY header\n" for network in balancers),
        status=f"status page:     {status}\n" if status is not None else "",
        browsers=browsers.format(host=host_with_zone(reachable), port=reachable.port, place=place),
    )


def listening(addresses: Sequence[Address], users: Optional[int], commands: Iterable[Command], gssapi: bool = False) -> Dict[str, Any]:
    """The same for programs: what the line "listening" says."""
    return {
        "urls": [f"socks5h://{in_url(address)}" for address in addresses],
        "auth": ",".join(["gssapi"] * gssapi + ["password"] * (users is not None)) or "none",
        "commands": [COMMAND_WORDS[command] for command in sorted(commands)],
        "pid": os.getpid(),
    }


def reachable_address(address: Address) -> Address:
    """What to tell a client: a wildcard is no address to connect to, so one of ours instead."""
    if not address.is_unspecified:
        return address
    elsewhere = Address.numeric("192.0.2.1", 9)     # documentation only: asked for the route, never sent to
    try:
        return Address.numeric(outbound.local_address_towards(elsewhere, outbound.Route()), address.port)
    except OSError:
        return Address.numeric("127.0.0.1", address.port)
