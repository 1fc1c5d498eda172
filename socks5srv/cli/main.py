"""
``python -m socks5srv`` from its words to its exit code.

Not here: what the words mean (options.py), what a server is made of (service/build.py), what a signal does (signals.py).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, List, Optional, Sequence

from ..service.build import CannotStart, Single, listening_sockets, or_cannot_start
from ..service.lifecycle import Lifecycle
from ..service.log import complain, show
from ..service.node import Node
from ..service.settings import Settings
from ..service.summary import Summary
from ..users import BadUsersFile
from .banner import banner, listening
from .child import Destinations, run_command
from .options import COMMANDS, Parser, parse, print_hash, rules_again
from .signals import answer_signals, hear_ctrl_c
from .startup import cannot_show, check, passed_sockets, port_file, refuse_to_be_its_own_upstream, status_address

if TYPE_CHECKING:
    from ..monitor.http import StatusPage

logger = logging.getLogger("socks5srv")


def main(words: Optional[Sequence[str]] = None) -> int:
    """Run the server; returns the exit code."""
    if sys.stderr is None:      # started with it closed
        sys.stderr = open(os.devnull, "w")      # noqa: SIM115
    hear_ctrl_c()
    given = list(sys.argv[1:] if words is None else words)
    name = given[0] if given[:1] and given[0] in COMMANDS else None
    prog = "socks5srv" if name is None else f"socks5srv {name}"
    try:
        task = parse(given) if name is None else partial(command, name, given[1:], prog)
        return run(task) if isinstance(task, Settings) else task()
    except CannotStart as error:
        complain(*error.args, prog=prog)
        return error.code
    except BadUsersFile as error:
        complain(str(error), "make a HASH with  socks5srv hash-password")
        return 2


def command(name: str, words: List[str], prog: str) -> int:
    """``socks5srv NAME WORDS...``: its exit code.  What it takes is imported for it alone."""
    if name == "check":
        from .. import check as examination

        return examination.main(words, prog)
    if name == "explain":
        from ..explain import __main__ as explain

        return explain.main(words, prog)
    Parser(prog=prog, description="Ask for a password twice, and print its HASH, for --users-file.").parse_args(words)
    return print_hash()


def run(settings: Settings) -> int:
    with contextlib.ExitStack() as stack:
        passed, page_socket = ([], None) if settings.command else passed_sockets()
        if page_socket is not None:
            settings = replace(settings, status=page_socket.getsockname()[:2])
        node = stack.enter_context(contextlib.closing(make_node(settings, check(settings, passed), passed)))
        refuse_to_be_its_own_upstream(settings.upstream, node.addresses)
        page = stack.enter_context(status_page(node, settings, *settings.status, page_socket)).url if settings.status else None
        if isinstance(node, Single) and settings.pcap is not None:
            node.capture(settings.pcap)     # now that nothing else can fail, since it empties the file
        return serve_command(node, settings) if settings.command else serve(node, settings, page)


def make_node(settings: Settings, hosts: Sequence[str], passed: Sequence[socket.socket] = ()) -> Node:
    """What serves, at these IP addresses, on the sockets that were passed if there are any."""
    sockets = passed or listening_sockets(hosts, settings.port, settings.reuse_port)
    if settings.workers > 1:
        from ..workers.supervisor import Supervisor

        return Supervisor(settings, sockets, passed=bool(passed))
    return Single(settings, sockets, Destinations if settings.command else Summary, bool(passed))


def status_page(node: Node, settings: Settings, host: str, port: int, passed: Optional[socket.socket]) -> StatusPage:
    """The page of --status, to be entered while serving and until all has ended."""
    from ..monitor.http import StatusPage

    address = status_address(host, port, settings.status_open)
    words = listening(node.addresses, node.users, settings.commands, settings.gssapi)
    facts = {"listening": [f"socks5h://{each}" for each in node.addresses], "auth": words["auth"], "commands": words["commands"], "workers": settings.workers}
    with or_cannot_start(cannot_show, address, node.addresses):
        page = StatusPage(node.stats, facts, address, settings.status_open, passed)
    node.private.add(page.address)
    return page


def serve(node: Node, settings: Settings, page: Optional[str]) -> int:
    """Serve until a signal says to stop."""
    lifecycle = Lifecycle(node, partial(rules_again, settings.words))
    answer_signals(lifecycle, settings)
    if node.start():
        with port_file(settings.port_file, node.addresses[0].port) as write_port:
            greet(node, settings, page)
            write_port()            # a script that waits for it finds the greeting in the log
            lifecycle.ready()
            if at_keyboard():
                from .console import Console

                Console(node, settings.explain).start()
            gc.freeze()             # objects of the start live forever: keep them out of every collection
            node.serve_forever()
    node.close()
    text = node.summary.text()
    short = " ".join(text.split("\n")[:2])      # for programs
    logger.info("%s", text if sys.stderr.isatty() else short, extra={"event": "stop", "facts": node.summary.facts()})
    return 0


def serve_command(node: Node, settings: Settings) -> int:
    """Serve one command, until it has ended."""
    try:
        code = run_command(node, settings)
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT else 126      # as a shell has it
        raise CannotStart(f"cannot run {settings.command[0]}: {error.strerror}", "check its name, and PATH", code=code) from None
    if settings.summary and isinstance(node.summary, Destinations):
        show(node.summary.contacted_by(os.path.basename(settings.command[0])))
    return code


def greet(node: Node, settings: Settings, page: Optional[str]) -> None:
    facts = {**listening(node.addresses, node.users, settings.commands, settings.gssapi), **({"status": page} if page is not None else {})}
    if sys.stderr.isatty() and settings.log_format == "text" and not settings.quiet:
        show(banner(node.addresses, node.users, at_keyboard(), page, only_user(settings), settings.proxy_protocol, settings.gssapi))
    if settings.log_file or settings.log_format == "json" or not sys.stderr.isatty():
        words = f"listening {' '.join(facts['urls'])} auth={facts['auth']} commands={','.join(facts['commands'])} pid={facts['pid']}"
        logger.info("%s%s", words, f" status={page}" * (page is not None), extra={"event": "listening", "facts": facts})
    if settings.upstream is not None:
        logger.info("going out through %s", settings.upstream)


def only_user(settings: Settings) -> Optional[str]:
    """The name of -u, if there is one."""
    names = list(settings.users or ())
    return names[0] if len(names) == 1 else None


def at_keyboard() -> bool:
    """Whether there is a terminal to type at and to look at."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
