"""
What one run is to do: typed, frozen, plain values, so that a worker can be sent them as they are.

The command line makes them (cli/options.py), build.py makes a server of them.  What changes while the
server serves (explanations on or off, the page's address, its state) is kept in objects, never here.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import FrozenSet, Mapping, Optional, Sequence, Tuple

from ..advertise import Advertised
from ..client import Proxy
from ..protocol import Command
from ..rules import Network, Rule

DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 1080


@dataclass(frozen=True)
class Settings:
    """The options under their own names; what may be None is not asked for, or left to the defaults of Socks5Server."""

    # Where to listen: names or addresses, and one port for all of them.
    hosts: Sequence[str] = (DEFAULT_ADDRESS,)
    port: int = DEFAULT_PORT            # 0: a free one
    port_file: Optional[str] = None     # where to write it when the server serves
    reuse_port: bool = False            # other servers may listen there as well
    proxy_protocol: Sequence[Network] = ()      # of load balancers

    # Who may use it, and for what.
    users: Optional[Mapping[str, str]] = field(default=None, repr=False)    # passwords by name; None: no login is asked for
    users_file: Optional[str] = None    # or hashes by name in this file
    gssapi: bool = False                # Kerberos is asked for
    keytab: Optional[str] = None        # a file; None: as KRB5_KTNAME says, or the system's
    gssapi_levels: Sequence[int] = (1, 2)
    gssapi_nec: bool = False
    gssapi_allow: Sequence[str] = ()    # patterns of principals; none: all
    allow_from: Sequence[Network] = ()
    allow_open_proxy: bool = False
    rules: Sequence[Rule] = ()
    commands: FrozenSet[Command] = frozenset(Command)
    allow_local_targets: bool = False

    # How it goes out.
    family: int = socket.AF_UNSPEC      # or AF_INET, or AF_INET6
    source: Optional[Tuple[str, ...]] = None    # one address for each family at most
    upstream: Optional[Proxy] = None

    # How clients and the peers of BIND come straight to it.
    advertise: Tuple[Advertised, ...] = ()
    udp_ports: Optional[range] = None   # None: whichever the system chooses

    # How many there may be, and how many seconds it waits.
    max_clients: Optional[int] = None
    max_per_client: Optional[int] = None
    workers: int = 1
    handshake_timeout: Optional[float] = None
    connect_timeout: Optional[float] = None
    bind_timeout: Optional[float] = None
    idle_timeout: Optional[float] = None
    drain_grace: Optional[float] = None
    drain_timeout: Optional[float] = None

    # What is seen of it, how and where.
    verbose: int = 0                    # -v, -vv
    quiet: bool = False
    explain: bool = False
    log_format: str = "text"            # or "json"
    log_file: Optional[str] = None
    color: str = "auto"                 # or "always", "never"
    pcap: Optional[str] = None          # a file; "-" is standard output
    status: Optional[Tuple[str, int]] = None    # host and port of the admin page; 0: a free one
    status_open: bool = False           # to other computers

    # What to run while it serves, and whether to tell at its end what it has contacted.
    command: Sequence[str] = ()
    summary: bool = True

    # The words that all this was made of: files among them are read again for their rules.
    words: Sequence[str] = field(default=(), repr=False)
