"""
What a service goes through from outside: it is ready, reads its files again, drains, restarts its workers, stops.

Signals ask for it (cli/signals.py), a `Node` does it, and the log and the service manager are told.

Not here: what draining is (server.py, workers/supervisor.py), and how the manager is told (systemd.py).
"""

from __future__ import annotations

import logging
import threading
from typing import Callable, Optional, Sequence

from ..rules import Rule
from ..session import plural
from . import systemd
from .node import Node

logger = logging.getLogger("socks5srv")


class Lifecycle:
    """
    Of one node, with `reread`, which reads the rules again: None if they are in no file.  ValueError tells why it cannot.

    Signal handlers may call all of it: what takes its time is done in the thread of serve_forever().
    """

    def __init__(self, node: Node, reread: Callable[[], Optional[Sequence[Rule]]] = lambda: None) -> None:
        self.node, self.reread = node, reread
        self.draining = self.stopping = False
        self.watchdog_answered = True

    def ready(self) -> None:
        """It serves from now on."""
        systemd.notify("READY=1", f"STATUS={self.status()}")
        interval = systemd.watchdog_interval()
        if interval is not None:
            threading.Thread(target=self.watch, args=(interval,), name="socks5srv-watchdog", daemon=True).start()

    def status(self) -> str:
        return f"serving on {' '.join(map(str, self.node.addresses))}"

    # --- what is asked for ---

    def reload(self) -> None:
        """Read the users, the rules, and open the log file afresh."""
        self.node.call(self.reload_now)

    def reload_now(self) -> None:
        systemd.notify("RELOADING=1", systemd.now())
        try:
            self.node.reload(self.rules())
        finally:
            systemd.notify("READY=1", f"STATUS={self.status()}")

    def rules(self) -> Optional[Sequence[Rule]]:
        """Those of now; None if they stay as they are."""
        try:
            rules = self.reread()
        except ValueError as error:
            logger.error("the rules stay as they are: %s", error)
            return None
        if rules is not None:
            logger.info("%s read", plural(len(rules), "rule"))
        return rules

    def restart_workers(self) -> None:
        self.node.call(self.node.restart_workers)

    def drain(self) -> None:
        """End when the clients have gone; the second time, now."""
        if self.draining or self.stopping:
            self.stop()
            return
        self.draining = True
        systemd.notify("STOPPING=1", "STATUS=draining")
        self.node.call(self.tell_of_drain)
        self.node.drain()

    def tell_of_drain(self) -> None:
        open_now, _most = self.node.stats.capacity()
        logger.info("draining, with %s open", plural(open_now, "connection"), extra={"event": "drain", "facts": {"connections": open_now}})

    def stop(self) -> None:
        """End now."""
        self.stopping = True
        systemd.notify("STOPPING=1", "STATUS=stopping")
        self.node.shutdown()

    # --- the watchdog ---

    def watch(self, interval: float) -> None:
        """In a thread of its own: have the thread of serve_forever() say so often that it is alive."""
        pause = threading.Event()
        while not pause.wait(interval):
            if self.watchdog_answered:      # else it is stuck, and need not be asked twice
                self.watchdog_answered = False
                self.node.call(self.answer_watchdog)

    def answer_watchdog(self) -> None:
        self.watchdog_answered = True
        systemd.notify("WATCHDOG=1")
