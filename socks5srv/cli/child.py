"""
``--run COMMAND...``: run a program through the proxy, and tell what it has contacted.

The program finds the proxy in ALL_PROXY, as curl, git, pip and whatever uses Requests do.  One that
does not look there goes its own way, and that it has contacted nothing is told as well.  Its exit code is ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple
from urllib.parse import quote

from ..locality import in_url
from ..protocol import Address
from ..service.node import Node
from ..service.settings import Settings
from ..service.summary import Summary
from ..session import Session, amount, plural
from .banner import reachable_address
from .signals import answer, answer_hangup

LAST_OCTETS = 5.0       # seconds that connections have to end by themselves when the program has
PASSED_ON = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2")      # which would end us


class Destinations(Summary):
    """A summary that tells destinations apart."""

    max_destinations = 1000         # the rest is summed up

    def __init__(self, at_once: Callable[[], int] = int) -> None:
        super().__init__(at_once)
        self.destinations: Dict[Tuple[str, ...], List[int]] = {}        # how often, octets up and down

    def ended(self, session: Session) -> None:
        super().ended(session)
        destination = (*session.target_words(), session.outcome_words)
        if destination not in self.destinations and len(self.destinations) >= self.max_destinations:
            destination = ("others", session.outcome_words)
        sums = self.destinations.get(destination, (0, 0, 0))
        self.destinations[destination] = [sum + number for sum, number in zip(sums, (1, session.up, session.down))]

    def contacted_by(self, command: str) -> str:
        """All of it in lines."""
        if not self.destinations:
            return f"socks5srv: {command} has contacted nothing through the proxy; it may not look for ALL_PROXY"
        return "\n".join([f"socks5srv: {command} has contacted {plural(len(self.destinations), 'destination')}", *(
            f"  {' '.join(words)}, {plural(times, 'connection')}, {amount(up)} up, {amount(down)} down"
            for words, (times, up, down) in self.destinations.items()
        )])


def run_command(node: Node, settings: Settings) -> int:
    """Run it while `node` serves; its exit code, or 128 and a signal's number.  OSError if it cannot be started."""
    early: List[int] = []
    started: List[subprocess.Popen[bytes]] = []
    pass_signals_to(started, early, node, settings)
    with subprocess.Popen(settings.command, env=environment(node.addresses[0], settings.users)) as program:
        started.append(program)
        for number in early:
            program.send_signal(number)
        thread = threading.Thread(target=node.serve_forever, name="socks5srv-serving", daemon=True)
        thread.start()
        code = program.wait()
    await_last_octets(node)
    node.close()
    thread.join()
    return 128 - code if code < 0 else code


def pass_signals_to(started: List[subprocess.Popen[bytes]], early: List[int], node: Node, settings: Settings) -> None:
    """
    No signal that can be caught ends us and leaves the program alone: it is the program's to answer.

    SIGTERM stands for SIGHUP, too: as long as we live, only we are told that the terminal has been closed.  Ctrl-C
    reaches the program by itself, as it does all that runs in this terminal.  A signal that comes while it is being
    started goes to `early`.
    """
    def pass_on(number: int, _frame: Any) -> None:
        number = signal.SIGTERM if signal.Signals(number).name == "SIGHUP" else number
        if not started:
            early[:] = [number]
        elif number != signal.SIGINT:
            started[0].send_signal(number)

    answer_hangup(settings, pass_on, lambda: node.call(lambda: node.reload(None)))
    answer(PASSED_ON, pass_on)


def environment(address: Address, users: Optional[Mapping[str, str]]) -> Dict[str, str]:
    """Ours, with this proxy in ALL_PROXY, and no other; without our options, in which there may be passwords."""
    ours = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("SOCKS5SRV_")}
    url = proxy_url(reachable_address(address), users)
    return {**ours, "ALL_PROXY": url, "all_proxy": url}


def proxy_url(address: Address, users: Optional[Mapping[str, str]]) -> str:
    """With the first login, if one is asked for."""
    login = "".join(f"{quote(name, safe='')}:{quote(password, safe='')}@" for name, password in list((users or {}).items())[:1])
    return f"socks5h://{login}{in_url(address)}"


def await_last_octets(node: Node) -> None:
    """What the program has sent before it ended may still be on its way."""
    until = time.monotonic() + LAST_OCTETS
    while any(snapshot.live for snapshot in node.stats.snapshots(sessions=False).values()) and time.monotonic() < until:
        time.sleep(0.005)
