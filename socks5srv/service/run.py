"""
``python -m socks5srv`` from its options to its exit code.

(signals.py decides what the server does on a signal, program.py for a program that is run, and keys.py what
becomes of reading the keyboard in the background.)
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import logging
import os
import socket
import sys
import tempfile
from collections import deque
from typing import Any, Callable, Deque, Iterator, List, Optional, Sequence, Tuple, Type, cast

from ..client import Proxy
from ..descriptors import open_at_once
from ..outbound import Route, is_own_address
from ..protocol import Address, Command
from ..handler import Socks5Handler
from ..resolver import look_up
from ..server import Socks5Server
from ..upstream import UpstreamHandler
from . import log
from .banner import Tally, banner, is_loopback, listening, with_zone
from .cores import OneCore
from .options import DEFAULT_ADDRESS, complain, parse, print_hash, settings, show
from .program import Contacts, run_program
from .selftest import self_test
from .signals import stop_on_signals

logger = logging.getLogger("socks5srv")


class CannotStart(Exception):
    """Why not, and the ways out, as complain() takes them; `code` is the exit code."""

    def __init__(self, *message: str, code: int = 1) -> None:
        super().__init__(*message)
        self.code = code


class ServiceServer(Socks5Server):
    """A server that counts for the summary, and keeps its threads together when that is faster."""

    options: argparse.Namespace

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.tally = Tally()
        self.core = OneCore()
        self.newest = 0             # the id of the last client, which is also how many there were
        self.calls: Deque[Callable[[], None]] = deque()     # for the thread of serve_forever()
        super().__init__(*arguments, **keywords)

    def begin(self, handler: Socks5Handler) -> None:
        super().begin(handler)
        self.newest = handler.session.id
        if self.newest % 32 == 0 and self.core.follow(self.newest):
            self.bell.ring()        # to look more often from now on
        if self.clients > self.tally.most:
            self.tally.most = self.clients

    def keep_books(self, timeout: float) -> None:
        super().keep_books(min(timeout, 0.1) if self.core.tied else timeout)    # to be free again soon

    def service_actions(self) -> None:
        super().service_actions()
        self.core.follow(self.newest)
        while self.calls:
            self.attempt(self.calls.popleft())

    def call(self, function: Callable[[], None]) -> None:
        """Have it called soon, in the thread of serve_forever()."""
        self.calls.append(function)
        self.bell.ring()

    def explain(self, on: bool) -> None:
        """Explain every message of new clients, or no longer."""
        self.options.explain = on
        if self.options.status is None:         # with it, the handler looks at the option
            self.RequestHandlerClass = handler_class(self.options)

    def look_again(self) -> None:
        """See soon what has become of the users file and of the log file, changed or not; signal handlers may call it."""
        self.read_users_again()
        self.call(self.follow_log)

    def follow_log(self) -> None:
        """Open the log file afresh if it has been put aside."""
        log.look_again()

    def get_ready(self) -> bool:
        """Before serve_forever(), whatever it takes to serve; False if a signal says to stop meanwhile."""
        return not self.stopping

    def kill(self) -> None:
        """The process is about to end in the middle of everything."""


class ServiceHandler(Socks5Handler):
    server: ServiceServer

    def session_ended(self) -> None:
        self.server.tally.add(self.session)
        super().session_ended()


def handler_class(options: argparse.Namespace) -> Type[ServiceHandler]:
    """The handler for these options."""
    handler: Type[ServiceHandler] = ServiceHandler
    if options.upstream is not None:
        handler = type("ServiceUpstreamHandler", (ServiceHandler, UpstreamHandler), {"upstream": options.upstream})
    if options.pcap is not None:
        from .wiretap import overheard          # which only those import who use it

        handler = overheard(handler)
    if options.status is not None:
        from .remembering import remembering    # which explains to the page, and to the log if that is asked for

        handler = remembering(handler)
    elif options.explain:
        from .explaining import explained

        handler = explained(handler)
    return handler


def main(words: Optional[Sequence[str]] = None) -> int:
    """Run the server; returns the exit code."""
    if sys.stderr is None:      # started with it closed
        sys.stderr = open(os.devnull, "w")      # noqa: SIM115
    options = parse(words)
    if options.self_test:
        return self_test()
    if options.hash_password:
        return print_hash()
    try:
        addresses = listen_addresses(options)
        refuse_to_be_open(options, addresses)
        check_source(options)
        set_up_log(options)
        raise_descriptor_limit()
        with listen(options, addresses) as server, status_page(server, options):
            start_recording(server, options)
            return serve(server, options) if options.run is None else serve_program(server, options)
    except CannotStart as error:
        complain(*error.args)
        return error.code


# --- before serving ---

def listen_addresses(options: argparse.Namespace) -> List[str]:
    """The IP addresses to listen on, for addresses and names."""
    found: List[str] = []
    for host in options.bind:
        found += resolved(host, "-b 127.0.0.1")
    if "::" in found and socket.has_dualstack_ipv6():
        found = [address for address in found if address != "0.0.0.0"]      # which is served by it
    return list(dict.fromkeys(found))


def resolved(host: str, way_out: str) -> List[str]:
    """The IP addresses of a host to listen on, at least one."""
    try:
        found = look_up(host.strip("[]"))
    except (OSError, UnicodeError):
        raise CannotStart(f"{host!r} is no address to listen on", f"try  {way_out}") from None
    return sorted(set(found), key=lambda address: ":" in address)


def refuse_to_be_open(options: argparse.Namespace, addresses: List[str]) -> None:
    beyond = [address for address in addresses if not is_loopback(address)]
    if beyond and options.users is None and not options.allow_from and not options.allow_open_proxy:
        port = f" port {options.port}" if options.port else ""
        raise CannotStart(
            "refusing to be an open proxy",
            f"Whoever can reach {beyond[0]}{port} could use your connection, and",
            "reach machines that only you can reach.  Choose one:",
            f"  socks5srv -b {beyond[0]} -u NAME                      ask for a login",
            f"  socks5srv -b {beyond[0]} --allow-from 192.168.1.0/24  only these computers",
            f"  socks5srv -b {beyond[0]} --allow-open-proxy           everybody, on purpose",
            "  socks5srv                                      this computer only",
            code=2,
        )


def check_source(options: argparse.Namespace) -> None:
    for source in options.source or ():
        if not is_own_address(source):
            raise CannotStart(f"--source {source} is not an address of this computer", "leave it out to have one chosen")


def raise_descriptor_limit() -> None:
    """As far as the system lets us: each client takes two."""
    try:
        import resource
    except ImportError:             # Windows has no such limit
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:      # macOS calls it unlimited, and means 10240
        logger.debug("the limit of descriptors stays: %s", error)


def set_up_log(options: argparse.Namespace) -> None:
    try:
        log.set_up(options)
    except OSError as error:
        raise CannotStart(f"cannot write the log file {options.log_file}: {why_not(error)}", "choose another with --log-file") from None


def why_not(error: OSError) -> str:
    """Why a file cannot be opened to be written."""
    return "it is a pipe that no process reads" if error.errno == errno.ENXIO else error.strerror or str(error)


def start_recording(server: ServiceServer, options: argparse.Namespace) -> None:
    if options.pcap is None:
        return
    from .pcap import open_file
    from .wiretap import OverheardServer

    assert isinstance(server, OverheardServer)      # handler_class() and server_class() have seen to it
    try:
        server.record(open_file(options.pcap))
    except OSError as error:
        raise CannotStart(f"cannot write the recording {options.pcap}: {error.strerror or error}", "choose another file with --pcap") from None
    except KeyboardInterrupt:       # a named pipe waits for somebody to read it
        raise CannotStart(f"nobody has begun to read {options.pcap}", code=130) from None


def listen(options: argparse.Namespace, addresses: List[str]) -> ServiceServer:
    """A server that listens on all the addresses; with port 0, on the same free port of each."""
    port = options.port
    with in_words(addresses[0], port):
        server = server_class(options)((addresses[0], port), handler_class(options), users=options.users, rules=options.rules)
    try:
        for address in addresses[1:]:
            with in_words(address, port):
                server.add_listener((address, server.server_address[1]))
        refuse_to_be_its_own_upstream(server, options.upstream)
    except BaseException:
        server.server_close()
        raise
    configure(server, options)
    return server


def server_class(options: argparse.Namespace) -> Type[ServiceServer]:
    """The server for these options; what few need is imported for them only."""
    server: Type[ServiceServer] = ServiceServer
    if options.workers > 1:
        from .workers import Workers

        server = Workers
    if options.pcap is not None:
        from .wiretap import OverheardServer

        server = type("OverheardServiceServer", (OverheardServer, server), {})
    if options.status is not None and options.workers > 1:
        from .gathering import WatchedWorkers

        server = WatchedWorkers
    elif options.status is not None:
        from .figures import watched

        server = watched(server)
    return server


@contextlib.contextmanager
def status_page(server: ServiceServer, options: argparse.Namespace) -> Iterator[None]:
    """While serving, and until all has ended, the page of --status."""
    if options.status is None:
        yield
        return
    from .status import StatusPage

    address = status_address(options)
    with in_words(address.host, address.port):
        page = StatusPage(cast(Any, server), address, options.status_open)
    options.status_address, options.status_url = page.address, page.url
    with page:
        yield


def status_address(options: argparse.Namespace) -> Address:
    """Where the page is to be, which is not for other computers unless they are let in."""
    host, port = options.status
    (found, *_others) = resolved(host or DEFAULT_ADDRESS, "--status 127.0.0.1:9180")
    if not is_loopback(found) and not options.status_open:
        raise CannotStart(
            f"--status {with_zone(Address.numeric(found, port))} would show other computers who uses this proxy, and for what",
            f"for this computer only:  --status {port}",
            "for everybody who can reach it, on purpose:  --status-open", code=2,
        )
    return Address.numeric(found, port)


def configure(server: ServiceServer, options: argparse.Namespace) -> None:
    server.options = options
    for name, value in settings(options).items():
        setattr(server, name, value)
    family = {4: socket.AF_INET, 6: socket.AF_INET6}.get(options.family, socket.AF_UNSPEC)
    server.route = Route(family, options.source)


def refuse_to_be_its_own_upstream(server: ServiceServer, proxy: Optional[Proxy]) -> None:
    """As far as that can be seen now; longer loops are found when they are used."""
    if proxy is None or all(listener.address.port != proxy.port for listener in server.listeners):
        return
    try:
        hosts = look_up(proxy.host)
    except (OSError, UnicodeError):         # it may be known later, when the network is there
        return
    if any(server.is_own(Command.CONNECT, Address.numeric(host, proxy.port).dialled) for host in hosts):
        raise CannotStart(f"--upstream {proxy} is this server itself", "give the address of another proxy, or leave it out", code=2)


@contextlib.contextmanager
def in_words(address: str, port: int) -> Iterator[None]:
    """Turn what bind() says into a sentence with a way out."""
    try:
        yield
    except OSError as error:
        raise CannotStart(*explanation(error, address, port)) from None


def explanation(error: OSError, address: str, port: int) -> Tuple[str, ...]:
    if error.errno == errno.EADDRINUSE:
        finder = f"netstat -ano | findstr :{port}" if os.name == "nt" else f"lsof -i :{port}"
        return (
            f"port {port} on {address} is already in use",
            "another socks5srv may be running.  Take a free port with:  socks5srv 0",
            f"or find the other program with:  {finder}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"may not listen on port {port} (ports below 1024 need root)", "use a higher port:  socks5srv 1080"
    if error.errno == errno.EINVAL and ":" in address and "%" not in address:
        return f"{address} is link-local: on which link has to be said, too", f"as in  socks5srv -b {address}%eth0"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of this computer", "for this computer only:  socks5srv -b 127.0.0.1"
    return f"cannot listen on {address} port {port}: {error.strerror or error}", "try another with -b and -p"


# --- serving ---

def serve(server: ServiceServer, options: argparse.Namespace) -> int:
    """Serve until a signal says to stop."""
    addresses = [listener.address for listener in server.listeners]
    stop_on_signals(server, options)
    if server.get_ready():
        greet(server, options, addresses)
        if options.upstream is not None:
            logger.info("going out through %s", options.upstream)
        with port_file(options.port_file, addresses[0].port):      # who waits for it finds the greeting in the log
            if at_keyboard():
                from .keys import listen_to_keys

                listen_to_keys(server)
            gc.freeze()             # what is here by now stays: the collector need not look at it again
            server.serve_forever()
    server.server_close()
    logger.info("%s", farewell(server), extra={"event": "stop", "facts": server.tally.facts()})
    return 0


def serve_program(server: ServiceServer, options: argparse.Namespace) -> int:
    """Serve one program, until it has ended."""
    server.tally = contacts = Contacts()
    try:
        return run_program(server, contacts, options)
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT else 126      # as a shell has it
        raise CannotStart(f"cannot run {options.run[0]}: {error.strerror}", "check its name, and PATH", code=code) from None


def at_keyboard() -> bool:
    """Whether somebody sits at a terminal who types and sees."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def greet(server: ServiceServer, options: argparse.Namespace, addresses: List[Address]) -> None:
    facts, page = listening(addresses, server.users, server.commands), options.status_url
    if page is not None:
        facts["status"] = page
    if sys.stderr.isatty() and options.log_format == "text" and not options.quiet:
        show(banner(addresses, server.users, at_keyboard(), page))
        if not options.log_file:
            return
    logger.info(
        "listening %s auth=%s commands=%s pid=%d%s", " ".join(facts["urls"]), facts["auth"], ",".join(facts["commands"]), facts["pid"],
        f" status={page}" * (page is not None),
        extra={"event": "listening", "facts": facts},
    )


def farewell(server: ServiceServer) -> str:
    """The summary; where nobody sits and reads, its first line."""
    text = str(server.tally)
    return text if sys.stderr.isatty() else " ".join(text.split("\n")[:2])


@contextlib.contextmanager
def port_file(path: Optional[str], port: int) -> Iterator[None]:
    """While serving, a file with the port in it.  It appears whole, since scripts wait for it."""
    if path is None:
        yield
        return
    whole = not os.path.exists(path) or os.path.isfile(path)
    try:
        if whole:
            write_whole(path, f"{port}\n")
        else:                       # /dev/stdout, say
            with open(path, "w", encoding="ascii", opener=open_at_once) as stream:
                stream.write(f"{port}\n")
    except OSError as error:
        raise CannotStart(f"cannot write the port file {path}: {why_not(error)}", "choose another with --port-file") from None
    try:
        yield
    finally:
        if whole:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def write_whole(path: str, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)))
    try:
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise
