"""
What must be right before the server serves, and what scripts find when it does.

Whatever is not is a CannotStart, in words and with a way out.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import tempfile
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

from ..client import Proxy
from ..descriptors import open_at_once
from ..locality import is_own_address, with_zone
from ..policy import is_at, is_loopback
from ..protocol import Address
from ..resolver import look_up
from ..rules import behind
from ..service import log
from ..service.build import CannotStart, cannot_listen, cannot_write, or_cannot_start
from ..service.settings import DEFAULT_PORT, Settings
from .banner import reachable_address

logger = logging.getLogger("socks5srv")


def check(settings: Settings) -> List[str]:
    """The IP addresses to listen on, if it may serve there.  From here on there is a log."""
    addresses = listen_addresses(settings.hosts)
    refuse_to_be_open(settings, addresses)
    for source in settings.source or ():
        if not is_own_address(source):
            raise CannotStart(f"--source {source} is not an address of this computer", "leave it out to have one chosen")
    with or_cannot_start(cannot_write, "log file", settings.log_file, "--log-file"):
        log.set_up(settings)
    raise_descriptor_limit()
    if settings.upstream is not None and settings.upstream.gssapi:
        need_gssapi(f"--upstream {settings.upstream}")
    if settings.gssapi:
        need_gssapi("--gssapi")
        check_keytab(settings)
    return addresses


def need_gssapi(what: str) -> None:
    try:
        from ..gssapi import context    # noqa: F401
    except ImportError as error:
        raise CannotStart(
            f"{what} needs the package gssapi: {error.__cause__ or error}", "install it with:  pip install 'socks5srv[gssapi]'",
            "On Linux that takes a compiler and headers:  apt-get install gcc python3-dev libkrb5-dev",
        ) from None


def check_keytab(settings: Settings) -> None:
    from ..gssapi.context import GssapiError
    from ..service.kerberos import gssapi

    try:
        gssapi(settings)
    except GssapiError as error:
        keytab = settings.keytab or os.environ.get("KRB5_KTNAME") or "of the system"
        raise CannotStart(
            f"cannot use the keytab {keytab}: {error}", "give one with  --keytab FILE",
            "or make one with  kadmin -q 'ktadd -k FILE rcmd/HOST', where HOST is what clients call this proxy",
        ) from None


# --- where to listen ---

def listen_addresses(hosts: Sequence[str]) -> List[str]:
    found = [address for host in hosts for address in resolved(host, "-b 127.0.0.1")]
    if "::" in found and socket.has_dualstack_ipv6():
        found = [address for address in found if address != "0.0.0.0"]      # which is served by it
    return list(dict.fromkeys(found))


def resolved(host: str, way_out: str) -> List[str]:
    """The IP addresses of a host to listen on, at least one."""
    try:
        found = look_up(host.strip("[]"))
    except (OSError, UnicodeError):
        raise CannotStart(f"invalid address to listen on {host!r}", f"try  {way_out}") from None
    return sorted(set(found), key=lambda address: ":" in address)


def refuse_to_be_open(settings: Settings, addresses: Sequence[str]) -> None:
    asks_for_login, port = settings.users is not None or settings.users_file is not None or settings.gssapi, settings.port
    beyond = [address for address in addresses if not is_loopback(address)]
    if beyond and not (asks_for_login or settings.allow_from or settings.allow_open_proxy):
        ways_out = {
            f"socks5srv -b {beyond[0]} -u NAME": "require a password",
            f"socks5srv -b {beyond[0]} --allow-from {network_of(beyond[0])}": "only these computers",
            f"socks5srv -b {beyond[0]} --allow-open-proxy": "everybody, on purpose",
            "socks5srv": "this computer only",
        }
        width = max(map(len, ways_out))
        raise CannotStart(
            "refusing to be an open proxy",
            f"Whoever can reach {beyond[0]}{f' port {port}' * bool(port)} could use your connection, and",
            "reach machines that only you can reach.  Choose one:",
            *(f"  {command:<{width}}  {what}" for command, what in ways_out.items()),
            code=2,
        )


def network_of(host: str) -> str:
    """The local network that this IP address is probably of; of a wildcard, that of the way out of here."""
    host = reachable_address(Address.numeric(host.partition("%")[0], DEFAULT_PORT)).host
    ip = ipaddress.ip_address("192.168.1.1" if is_loopback(host) else host.partition("%")[0])       # loopback: there is no way out
    return str(ipaddress.ip_network(f"{ip}/{24 if ip.version == 4 else 64}", strict=False))


def refuse_to_be_its_own_upstream(proxy: Optional[Proxy], addresses: Sequence[Address]) -> None:
    """As far as that can be seen now; longer loops are found when they are used."""
    if proxy is None or all(own.port != proxy.port for own in addresses):
        return
    try:
        hosts = look_up(proxy.host)
    except (OSError, UnicodeError):         # it may be known later, when the network is there
        return
    called = [Address.numeric(host, proxy.port).dialled for host in hosts]
    every = [each for address in called for each in (address, *behind(address))]
    if any(own.port == proxy.port and is_at(own, each) for own in addresses for each in every):
        raise CannotStart(f"--upstream {proxy} is this server itself", "give the address of another proxy, or leave it out", code=2)


def status_address(host: str, port: int, is_open: bool) -> Address:
    """Where the page is to be, which is not for other computers unless they are let in."""
    address = Address.numeric(resolved(host, "--status 127.0.0.1:9180")[0], port)
    if not is_loopback(address.host) and not is_open:
        raise CannotStart(
            f"--status {with_zone(address)} would show other computers who uses this proxy, and for what",
            f"for this computer only:  --status {port}",
            "for everybody who can reach it, on purpose:  --status-open", code=2,
        )
    return address


def cannot_show(error: OSError, address: Address, own: Sequence[Address]) -> Tuple[str, ...]:
    """Why there is no page at this address, and the ways out; `own`: where the proxy itself listens."""
    option = f"--status {with_zone(address)}"
    if error.errno == errno.EADDRINUSE and any(each.port == address.port for each in own):
        return f"{option}: that is the proxy's own port", "take another, or a free one with  --status 0"
    why, _way_out, *others = cannot_listen(error, address.host, address.port)
    return (f"{option}: {why}", "take another, or a free one with  --status 0", *others)


# --- the process and its files ---

def raise_descriptor_limit() -> None:
    """As far as the system lets us: each client takes two."""
    try:
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except ImportError:             # Windows has no such limit
        pass
    except (OSError, ValueError) as error:      # macOS calls it unlimited, and means 10240
        logger.debug("the limit of descriptors stays: %s", error)


@contextlib.contextmanager
def port_file(path: Optional[str], port: int) -> Iterator[Callable[[], None]]:
    """
    While serving, a file with the port in it.  What is yielded writes it: whole, since scripts wait for it.

    It is opened before: CannotStart, and nobody is told that the server listens.
    """
    if path is None:
        yield lambda: None
        return
    whole = not os.path.exists(path) or os.path.isfile(path)        # /dev/stdout, say, is not
    complain = cannot_write, "port file", path, "--port-file"

    with contextlib.ExitStack() as new, contextlib.ExitStack() as old:
        with or_cannot_start(*complain):
            folder = new.enter_context(tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path)))) if whole else ""
            stream = new.enter_context(open(os.path.join(folder, "new") if whole else path, "w", encoding="ascii", opener=open_at_once))

        def write() -> None:
            with or_cannot_start(*complain), new:
                stream.write(f"{port}\n")
                stream.close()
                if whole:
                    os.chmod(stream.name, 0o644)
                    os.replace(stream.name, path)
                    old.callback(remove, path)

        yield write


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
