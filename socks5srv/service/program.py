"""
``--run COMMAND...``: run a program through the proxy, and tell what it has contacted.

The program finds the proxy in ALL_PROXY, as curl, git, pip and whatever uses Requests do.  A
program that does not look there goes its own way, and that it has contacted nothing is told
as well.  Its exit code is ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple
from urllib.parse import quote

from ..protocol import Address
from ..server import Socks5Server
from ..session import Session, amount
from .banner import Tally, counted, in_url, reachable_address
from .options import show
from .signals import answer_hangup

if TYPE_CHECKING:
    from .run import ServiceServer

LAST_OCTETS = 5.0       # seconds that connections have to end by themselves when the program has
OTHERS = ("SIGQUIT", "SIGUSR1", "SIGUSR2")      # that would end us
PLACES = 1000           # of which the rest is summed up


class Contacts(Tally):
    """A tally that knows the places apart."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Dict[Tuple[str, ...], List[int]] = {}      # how often, octets up and down

    def add(self, session: Session) -> None:
        super().add(session)
        place = (*session.target_words(), outcome(session))
        if place not in self.places and len(self.places) >= PLACES:
            place = ("-", "elsewhere", outcome(session))
        numbers = self.places.setdefault(place, [0, 0, 0])
        for index, number in enumerate((1, session.up, session.down)):
            numbers[index] += number

    def told(self, command: str) -> str:
        """All of it in lines."""
        if not self.places:
            return f"socks5srv: {command} has contacted nothing through the proxy; it may not look for ALL_PROXY"
        lines = [f"socks5srv: {command} has contacted {counted(len(self.places), 'place')}"]
        for words, (times, up, down) in self.places.items():
            lines.append(f"  {' '.join(words)}  {times} x  {amount(up)} up  {amount(down)} down")
        return "\n".join(lines)


def outcome(session: Session) -> str:
    if session.event == "close":
        return "ok"
    return session.event.replace("_", "-") + (f"({session.reply:02x})" if session.reply else "")


def run_program(server: ServiceServer, contacts: Contacts, options: argparse.Namespace) -> int:
    """
    Run it while `server`, which counts with `contacts`, serves.

    Its exit code, or 128 and the number of the signal that has ended it.  OSError if it cannot be started.
    """
    heard: List[int] = []
    started: List[subprocess.Popen[bytes]] = []
    pass_signals_to(started, heard, server, options)
    with subprocess.Popen(options.run, env=environment(server, options)) as program:
        started.append(program)
        for number in heard:
            program.send_signal(number)
        thread = threading.Thread(target=server.serve_forever, name="socks5srv-serving", daemon=True)
        thread.start()
        code = program.wait()
    await_the_last(server)
    server.server_close()
    thread.join()
    if options.summary:
        show(contacts.told(os.path.basename(options.run[0])))
    return 128 - code if code < 0 else code


def pass_signals_to(
        started: List[subprocess.Popen[bytes]], heard: List[int], server: ServiceServer, options: argparse.Namespace) -> None:
    """
    No signal that can be caught ends us and leaves the program alone: it is the program's to answer.

    SIGTERM stands for SIGHUP, too: till we end, that the terminal has been closed is told to us alone.  Ctrl-C reaches
    the program by itself, as it does all that runs in this terminal.  What comes while it is being started is `heard`.
    """
    def pass_on(number: int, _frame: Any) -> None:
        number = signal.SIGTERM if number == signal_number("SIGHUP") else number
        if not started:
            heard[:] = [number]
        elif number != signal.SIGINT:
            started[0].send_signal(number)

    answer_hangup(server, options, pass_on)
    for name in ("SIGTERM", "SIGINT", *OTHERS):
        if signal_number(name):
            signal.signal(signal_number(name), pass_on)


def signal_number(name: str) -> int:
    """0 where there is no such signal."""
    return int(getattr(signal, name, 0))


def environment(server: Socks5Server, options: argparse.Namespace) -> Dict[str, str]:
    """Ours, with this proxy in ALL_PROXY, and no other; without our options, in which there may be passwords."""
    ours = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("SOCKS5SRV_")}
    url = proxy_url(reachable_address(server.listeners[0].address), options.users)
    return {**ours, "ALL_PROXY": url, "all_proxy": url}


def proxy_url(address: Address, users: Optional[Dict[str, str]]) -> str:
    if not users:
        return f"socks5h://{in_url(address)}"
    name, password = next(iter(users.items()))
    return f"socks5h://{quote(name, safe='')}:{quote(password, safe='')}@{in_url(address)}"


def await_the_last(server: Socks5Server) -> None:
    """What the program has sent before it ended may still be on its way."""
    until = time.monotonic() + LAST_OCTETS
    while server.sessions and time.monotonic() < until:
        threading.Event().wait(0.005)
