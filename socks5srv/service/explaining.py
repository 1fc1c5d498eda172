"""
``--explain``: every message of every client as the RFC draws it, and why the server decided as it did.

`explained(handler_class)` is that class, explaining itself: the messages are overheard where they are
received and sent, and the reasons where they come up (a name looked up, a rule asked, an address tried).
All of it is done by overriding; the conversation knows nothing of it.

The one idea: an `Exhibit` is shown when its message is received, or just before it is sent, and so
always before whatever comes of it: the table of a reply stands in front of the line of its tunnel.
Whoever wants to do something else with them than to log them overrides `show()`.

Datagrams are moved by the relay thread, which may not wait for a screen.  It puts what it has seen into
a queue, and a thread of the association's own shows it; of a flood only so much a second.

This is for looking, not for speed.
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
from typing import Any, Dict, List, Optional, Type, TypeVar

from ..explain import Exhibit, broken, exhibit
from ..protocol import (
    Greeting, Message, Socks5Error,
)
from ..server import ClientStream, Socks5Handler
from ..strangers import Note

logger = logging.getLogger("socks5srv.explain")     # every exhibit, at INFO


class Overheard(ClientStream):
    """What the client sends, kept until the message that it belongs to has been shown."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.heard = b""

    def read(self, n: int = -1, /) -> bytes:
        octets = super().read(n)
        self.heard += octets
        return octets

    def take_heard(self) -> bytes:
        octets, self.heard = self.heard, b""
        return octets


class Explaining(Socks5Handler):
    """Mixed in in front of a handler class; see explained()."""

    stream: ClientStream
    greeting: Optional[Greeting] = None
    trouble: Optional[Socks5Error] = None       # what refuse() is about to answer
    replies = 0                                 # sent so far: BIND has two
    opened = False                              # a tunnel or a relay

    def setup(self) -> None:
        self.numbers = itertools.count(1)
        self.findings: List[str] = []           # why the next reply will be what it is
        super().setup()
        self.stream = Overheard(self.connection)

    def show(self, exhibit: Exhibit) -> None:
        """Called for each message in its order on the wire, in the thread of the conversation or of its datagrams."""
        logger.info("%s", exhibit.title, extra={"exhibit": exhibit})

    def shown_now(self, exhibit: Exhibit, number: str = "") -> None:
        """Show it as the next message of this session, or with another `number`."""
        exhibit.session, exhibit.at = self.session.id, time.monotonic() - self.session.clock
        if exhibit.fields:
            exhibit.number = number or str(next(self.numbers))
        self.show(exhibit)

    # --- the two choke points ---

    def receive(self, message: Any) -> Any:
        try:
            received = super().receive(message)
        except (Socks5Error, OSError) as error:
            self.explain_broken(message, error)
            raise
        octets = self.stream.take_heard() if isinstance(self.stream, Overheard) else None
        self.explain_received(received, octets)
        return received

    def send(self, message: Message) -> None:
        if not isinstance(message, Note):
            self.explain_sent(message)
        super().send(message)

    def explain_broken(self, message: Type[Message], error: Exception) -> None:
        octets = self.stream.take_heard() if isinstance(self.stream, Overheard) else b""
        if octets:
            self.shown_now(broken(message, octets))

    def explain_received(self, message: Message, octets: Optional[bytes]) -> None:
        if isinstance(message, Greeting):
            self.greeting = message
        self.shown_now(exhibit(message, octets))

    def explain_sent(self, message: Message) -> None:
        self.shown_now(exhibit(message))


H = TypeVar("H", bound=Socks5Handler)

CLASSES: Dict[type, type] = {}      # what explained() has made


def explained(handler_class: Type[H]) -> Type[H]:
    """
    The handler class, with `Explaining` mixed in in front; always the same one for the same class.

    ``server.RequestHandlerClass = explained(server.RequestHandlerClass)`` explains all clients that come from now on.
    """
    if issubclass(handler_class, Explaining):
        return handler_class
    if handler_class not in CLASSES:
        CLASSES[handler_class] = type(f"Explained{handler_class.__name__}", (Explaining, handler_class), {})
    return CLASSES[handler_class]
