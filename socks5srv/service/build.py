"""
Settings to a server that watches itself: the only place that knows all features.

`Service` equips any Socks5Server, that of a worker, too; `Single` is the Node of one process.  What only
some runs need is imported for them alone.

Not here: what an operator is told (cli/), and how several processes work together (workers/).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from functools import cached_property
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from ..handler import Socks5Handler
from ..observer import Observer
from ..outbound import Route
from ..protocol import Address
from ..rules import Rule, Rules
from ..server import Socks5Server, listening_socket
from ..upstream import UpstreamHandler
from ..users import UsersFile
from . import log
from .affinity import CoreAffinity
from .settings import DEFAULT_ADDRESS, Settings
from .shared_listener import SharedListener
from .summary import Summary

if TYPE_CHECKING:
    from ..capture.pcap import CaptureWriter
    from ..explain.tracer import Sink
    from ..monitor.history import History
    from ..monitor.metrics import Metrics
    from ..monitor.stats import Stats

logger = logging.getLogger("socks5srv")

# Settings that are attributes of the server by the same name; None leaves its default.
OF_THE_SERVER = (
    "commands", "allow_from", "allow_open_proxy", "allow_local_targets", "proxy_protocol", "upstream", "max_clients", "max_per_client",
    "handshake_timeout", "connect_timeout", "bind_timeout", "idle_timeout", "drain_grace", "drain_timeout",
)


class CannotStart(Exception):
    """Why not, and the ways out, as complain() takes them; `code` is the exit code."""

    def __init__(self, *message: str, code: int = 1) -> None:
        super().__init__(*message)
        self.code = code


class Service:
    """What a server has around it: the observers that its settings ask for."""

    def __init__(self, server: Socks5Server, settings: Settings, summary: Summary) -> None:
        self.server = server
        self.summary = summary
        self.metrics: Optional[Metrics] = None
        self.history: Optional[History] = None
        self.observers: List[Observer] = [self.summary, CoreAffinity(server.call)]
        if settings.status is not None:
            from ..monitor.history import History
            from ..monitor.metrics import Metrics

            self.metrics, self.history = Metrics(), History()
            self.observers += [self.metrics, self.history]
        self.set_explain(settings.explain)

    @cached_property
    def stats(self) -> Stats:
        from ..monitor.stats import LocalStats

        return LocalStats(self.server, self.metrics, self.history)

    def set_explain(self, on: bool) -> None:
        """Explain every message of new clients in the log, or no longer; what the history keeps is explained anyway."""
        observers = list(self.observers)
        if on or self.history is not None:
            from ..explain.tracer import LogSink, Tracer

            sinks: List[Sink] = [LogSink()] if on else []
            observers.append(Tracer(self.server, sinks if self.history is None else [self.history, *sinks]))
        self.server.observers = observers


def server_settings(settings: Settings) -> Dict[str, Any]:
    """What the constructor of Socks5Server is to be given by name, beside the users."""
    given = {name: getattr(settings, name) for name in OF_THE_SERVER if getattr(settings, name) is not None}
    if settings.gssapi:
        from . import kerberos

        given["gssapi"] = kerberos.gssapi(settings)
    return {**given, "rules": settings.rules, "route": Route(settings.family, settings.source, advertise=settings.advertise, udp_ports=settings.udp_ports)}


def handler_class(settings: Settings) -> Type[Socks5Handler]:
    if settings.gssapi:
        from . import kerberos

        return kerberos.handler_class(settings)
    return Socks5Handler if settings.upstream is None else UpstreamHandler


class Single(Service):
    """
    The Node of one process.  It adopts the listening sockets; `passed` ones are those of a service manager, which goes on with them.

    BadUsersFile if there is a users file that cannot be read.
    """

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket], summary: Type[Summary] = Summary, passed: bool = False) -> None:
        users = settings.users if settings.users_file is None else UsersFile(settings.users_file)
        handler, address = handler_class(settings), sockets[0].getsockname()
        server = Socks5Server(address, handler, users=users, sockets=sockets, **server_settings(settings))
        if passed or settings.reuse_port:
            server.listeners[:] = [SharedListener(sock, server._accept, server._talk, takes_queue=not passed) for sock in sockets]
        super().__init__(server, settings, summary(lambda: server.registry.clients))
        self.serve_forever, self.shutdown, self.call = server.serve_forever, server.shutdown, server.call
        self.drain = server.drain
        self.addresses: Sequence[Address] = [listener.address for listener in server.listeners]
        self.private = server.policy.private
        self.capturing: Optional[CaptureWriter] = None

    @property
    def users(self) -> Optional[int]:
        return None if self.server.users is None else len(self.server.users)

    def capture(self, path: str) -> None:
        """Before start(): have every socket write down what passes it.  CannotStart if the file cannot be opened."""
        from ..capture.pcap import CaptureWriter, open_file
        from ..capture.sockets import Capture

        try:
            with or_cannot_start(cannot_write, "recording", path, "--pcap"):
                self.capturing = CaptureWriter(open_file(path))
        except KeyboardInterrupt:       # a named pipe waits until another process opens it
            raise CannotStart(f"no program reads {path}", code=130) from None
        factory = Capture(self.capturing).socket
        self.server.route = self.server.route._replace(socket_factory=factory)
        for listener in self.server.listeners:
            sock = listener.socket
            listener.socket = factory(sock.family, sock.type, sock.proto, sock.detach())
        self.server.socket = self.server.listeners[0].socket

    def start(self) -> bool:
        return not (self.server.stopping or self.server.draining)

    def close(self) -> None:
        self.server.server_close()
        if self.capturing is not None:
            self.capturing.close()

    def kill(self) -> None:
        """There is no other process to end."""

    def reload(self, rules: Optional[Sequence[Rule]]) -> None:
        log.reopen()
        if rules is not None:
            self.server.rules = Rules(rules)
        if isinstance(self.server.users, UsersFile):
            self.server.users.read_again()

    def restart_workers(self) -> None:
        logger.warning("there are no workers to restart: see --workers")


# --- what can be opened, and why not ---

def listening_sockets(hosts: Sequence[str], port: int, reuse_port: bool = False) -> List[socket.socket]:
    """
    A socket at each IP address, all on the same port; 0 is a free one.  CannotStart if one of them cannot listen.

    With `reuse_port` other servers of this user may listen there as well, if all of them say so.
    """
    with contextlib.ExitStack() as stack:
        sockets: List[socket.socket] = []
        for host in hosts:
            with or_cannot_start(cannot_listen, host, port):
                sockets.append(stack.enter_context(listening_socket((host, port), reuse_port=reuse_port)))
            port = sockets[0].getsockname()[1]
        stack.pop_all()
        return sockets


@contextlib.contextmanager
def or_cannot_start(explain: Callable[..., Tuple[str, ...]], *what: Any) -> Iterator[None]:
    """Turn an OSError into a sentence with a way out, by one of the functions below."""
    try:
        yield
    except OSError as error:
        raise CannotStart(*explain(error, *what)) from None


def cannot_listen(error: OSError, host: str, port: int) -> Tuple[str, ...]:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is already in use", "another socks5srv may be running.  Take a free port with:  socks5srv 0",
            f"or find the other program with:  {'netstat -ano | findstr' if os.name == 'nt' else 'lsof -i'} :{port}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"may not listen on port {port} (ports below 1024 need root)", "use a higher port:  socks5srv 1080"
    if error.errno == errno.EINVAL and ":" in host and "%" not in host:
        return f"{host} is link-local: on which link has to be said, too", f"as in  socks5srv -b {host}%eth0"
    if error.errno == errno.EADDRNOTAVAIL:
        own = "::1" if host == DEFAULT_ADDRESS else DEFAULT_ADDRESS     # there are computers without IPv4
        return f"{host} is not an address of this computer", f"for this computer only:  socks5srv -b {own}"
    return f"cannot listen on {host} port {port}: {error.strerror or error}", "try another with -b and -p"


def cannot_write(error: OSError, what: str, path: str, option: str) -> Tuple[str, ...]:
    why = "it is a pipe that no process reads" if error.errno == errno.ENXIO else error.strerror or error
    return f"cannot write the {what} {path}: {why}", f"choose another file with {option}"
