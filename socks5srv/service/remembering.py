"""
A handler that keeps what is explained, and what goes on at the other side, for the status page.

The messages come from explaining.py, which shows each in its order; a name looked up, a target
connected and a caller are told in between.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, Type

from ..explain import Exhibit
from ..protocol import Address, Request, RequestFailed
from ..session import shown
from .conversations import Conversation
from .explaining import Explaining, explained
from .figures import Counting
from .run import ServiceHandler


class Remembering(Counting, Explaining):
    """Mixed in in front of a handler class; see remembering()."""

    def setup(self) -> None:
        self.conversation: Optional[Conversation] = None
        super().setup()
        self.conversation = self.server.book.conversations.open(self.session)

    def show(self, exhibit: Exhibit) -> None:
        if self.conversation is not None:
            self.conversation.add_exhibit(exhibit)
        if self.server.options.explain:
            super().show(exhibit)

    def tell(self, sender: str, receiver: str, label: str, failed: bool = False, at: Optional[float] = None) -> None:
        if self.conversation is not None:
            self.conversation.add(sender, receiver, label, at, failed=failed)

    def resolved(self, host: str, hosts: Sequence[str], began: float, error: Optional[Exception] = None) -> None:
        self.tell("proxy", "target", f"look up {shown(host)}", at=began - self.session.clock)
        if error is not None:
            self.tell("target", "proxy", f"no address: {getattr(error, 'strerror', None) or error}", failed=True)
        else:
            self.tell("target", "proxy", f"{shown(host)} is {', '.join(hosts)}")
        super().resolved(host, hosts, began, error)

    def connect(self, request: Request) -> Any:
        try:
            target = super().connect(request)
        except (RequestFailed, OSError) as error:
            self.tell("proxy", "target", f"not connected: {error}", failed=True)
            raise
        self.tell("proxy", "target", f"connected to {self.session.peer}")
        return target

    def await_peer(self, listener: Any, expected: List[Address], until: float) -> Tuple[Any, Address]:
        target, peer = super().await_peer(listener, expected, until)
        self.tell("target", "proxy", f"{peer} calls")
        return target, peer


def remembering(handler_class: Type[ServiceHandler]) -> Type[ServiceHandler]:
    """The handler class that does it; its `forgetting` is the one for who comes when there are too many."""
    forgetting = type(f"Counting{handler_class.__name__}", (Counting, handler_class), {})
    return type(f"Remembering{handler_class.__name__}", (Remembering, explained(handler_class)), {"forgetting": forgetting})
