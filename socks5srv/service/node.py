"""
What the command line runs: one process that serves, or a supervisor of many.

`Node` is all that cli/ knows of either; service/build.py has the one, workers/supervisor.py the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Optional, Protocol, Sequence, Set

from ..protocol import Address
from ..rules import Rule
from .summary import Summary

if TYPE_CHECKING:
    from ..monitor.stats import Stats


class Node(Protocol):
    """One process or many, from start() to close()."""

    addresses: Sequence[Address]        # where it listens
    private: Set[Address]               # that only clients of this computer may reach: the admin page's.  To be added to before start()
    summary: Summary                    # since the start.  To be read in the thread of serve_forever(): see call()

    @property
    def users(self) -> Optional[int]: """How many there are; None if no login is asked for."""
    @property
    def stats(self) -> Stats: """What happens now.  Not to be asked in the thread of serve_forever(), which may have to hear the answers."""

    def start(self) -> bool: """Whatever it takes to serve; False if it has been told to stop meanwhile.  CannotStart if it cannot."""
    def serve_forever(self) -> None: """Serve until shutdown()."""
    def call(self, function: Callable[[], None]) -> None: """Have it called soon, in the thread of serve_forever()."""
    def drain(self) -> None: """Make serve_forever() return when the clients have gone, as Socks5Server has it.  Signal handlers may call it."""
    def shutdown(self) -> None: """Make serve_forever() return.  Signal handlers may call it."""
    def close(self) -> None: """End all connections, and wait for the threads or processes; once more does nothing."""
    def kill(self) -> None: """The process is about to end in the middle of everything."""
    def reload(self, rules: Optional[Sequence[Rule]]) -> None:
        """Read the users file and open the log file afresh, and have these rules, if there are any new ones.  In the thread of serve_forever()."""
    def restart_workers(self) -> None: """Replace each process that serves by a new one, without a loss.  In the thread of serve_forever()."""
    def set_explain(self, on: bool) -> None: """Explain every message of new clients, or no longer.  In the thread of serve_forever()."""
