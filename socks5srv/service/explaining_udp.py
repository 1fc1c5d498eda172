"""
Datagrams explained: what passes the socket that an association has towards its client.

`overhear(association, handler)` puts a socket in place of that one which tells what it receives and sends,
and the association into a class that tells what becomes of it.

The one idea: the relay thread, which may not wait for a screen, only notes what it has seen; the tables are
made and shown in a thread of the association's own.  Of a flood a few a second are noted, and the others counted.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from io import BytesIO
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple, Type, TypeVar, cast

from ..datagrams import REMEMBERED, Association, SockAddr, header_length
from ..explain import Exhibit, broken, exhibit
from ..meanings import brief, counted, plain_sentence
from ..protocol import Address, Datagram, Socks5Error
from ..resolver import LookUp
from . import reasons

if TYPE_CHECKING:
    from .explaining import Explaining

logger = logging.getLogger("socks5srv")

MOST = 10           # datagrams of an association that are shown in a second
BACKLOG = 100       # that wait to be shown at most: the screen may be slow


class OverheardAssociation(Association):
    """Mixed in in front of an association's class, once that is made; see overhear()."""

    handler: Explaining
    teller: Teller
    refused: Dict[bytes, str]       # why, by header
    number = 0
    pending: Optional[Tuple[str, float, bytes]] = None      # a datagram of which it is not known yet what becomes of it

    def start(self, connection: socket.socket) -> None:
        self.handler.note("RELAY OPEN", f"for datagrams from {self.client_host}, at {self.bound}")
        super().start(connection)

    def inner_socket(self, sockaddr: SockAddr) -> socket.socket:
        return self.with_an_ear(super().inner_socket(sockaddr))

    def with_an_ear(self, sock: socket.socket) -> Ear:
        ear = turned_into(Ear, sock)
        ear.association = self
        return ear

    def told(self) -> None:
        """Wait until all has been shown, but not for ever."""
        self.teller.end()

    # --- in the relay thread ---

    def heard(self, octets: memoryview, source: Optional[Tuple[Any, ...]]) -> None:
        """The client, or somebody else, has sent this."""
        self.number += 1
        if not self.teller.has_room():
            return
        seen = (f"u{self.number}", time.monotonic(), bytes(octets))
        fate = self.fate(seen[2], source)
        if fate:
            self.teller.put(lambda: self.tabled(seen, fate))
        else:
            self.pending = seen         # send_out() will know

    def fate(self, octets: bytes, source: Optional[Tuple[Any, ...]]) -> str:
        """What becomes of it, if that is known before it is looked at."""
        if source is not None:
            host = Address.of(source).host
            if host != self.client_host:
                return f"Dropped: it comes from {host}, and the client is {self.client_host}."
            if self.inner.locked and self.inner.client != (host, source[1]):
                return f"Dropped: it comes from port {source[1]}, and the client sends from another."
        length = header_length(memoryview(octets))
        if not 0 < length <= len(octets):
            return "Dropped: its header cannot be read."
        target = self.targets.get(octets[:length])
        return self.way(target) if target is not None else ""

    def way(self, target: Any) -> str:
        outer, place = target
        if not isinstance(outer, socket.socket):
            return "It goes to the upstream's relay as it is."
        return f"It goes to {brief(Address.of(place))} without the header, from port {outer.getsockname()[1]}."

    def send_out(self, header: bytes, payload: memoryview) -> None:
        seen, self.pending = self.pending, None
        self.handler.judgements.clear()         # before each, or those that are not shown would pile up
        if seen is None:
            super().send_out(header, payload)
            return
        super().send_out(header, payload)
        fate = self.fate_of(header)
        self.teller.put(lambda: self.tabled(seen, fate))

    def fate_of(self, header: bytes) -> str:
        """What has become of it, by what is known about its header now."""
        target = self.targets.get(header)
        if target is not None:
            return self.way(target)
        if header in self.looking_up:
            return "It waits until the name has been looked up."
        reason = self.why_not(header)
        if reason:
            return f"Dropped: {reason}."
        try:
            datagram = Datagram.read(BytesIO(header))
        except Socks5Error as error:
            return f"Dropped: {plain_sentence(str(error))}."
        if datagram.frag:
            return "It waits for the other fragments." if self.fragments is not None else "Dropped: this proxy puts no fragments together."
        return "Dropped: there is no way to it."

    def why_not(self, header: bytes) -> str:
        """The rule that has just been applied to it, or earlier; empty if none has."""
        refused = [judgement for judgement in self.handler.judgements if judgement.reason]
        if refused:
            if len(self.refused) > REMEMBERED:
                self.refused.clear()
            self.refused[header] = reasons.about_judgement(refused[0])
        return self.refused.get(header, "")

    def resolved(self, header: bytes, address: Address, answer: LookUp, began: float) -> None:
        self.handler.judgements.clear()
        super().resolved(header, address, answer, began)
        words, at = [self.handler.looked_up, self.fate_of(header)], time.monotonic()
        if self.teller.has_room():
            self.teller.put(lambda: (Exhibit("NAME LOOKED UP", remarks=words), "", at))

    def said(self, octets: Any) -> None:
        """This goes to the client."""
        self.number += 1
        if self.teller.has_room():
            seen = (f"u{self.number}", time.monotonic(), bytes(octets))
            self.teller.put(lambda: self.tabled(seen, "", to_client=True))

    # --- in the teller's thread ---

    def tabled(self, seen: Tuple[str, float, bytes], fate: str, to_client: bool = False) -> Told:
        number, at, octets = seen
        try:
            message = Datagram.read(BytesIO(octets))
            found = exhibit(message, octets)
        except Socks5Error:
            return broken_with(octets, fate), number, at
        place, amount = brief(message.address), counted(len(message.data), "octet")
        if to_client:
            found.sender, found.receiver = "proxy", "client"
            found.remarks[-1] = f'"This is {amount} from {place}."'
        else:
            found.remarks[-1] = f'"Send {amount} to {place}."'
        found.remarks += [fate] * bool(fate)
        return found, number, at


Told = Tuple[Exhibit, str, float]       # with its number, and when


def broken_with(octets: bytes, fate: str) -> Exhibit:
    found = broken(Datagram, octets)
    found.remarks += [fate] * bool(fate)
    return found


class Ear(socket.socket):
    """The association's socket towards the client."""

    association: OverheardAssociation

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> Tuple[int, Any]:
        n, source = super().recvfrom_into(buffer, nbytes, flags)
        self.association.heard(memoryview(buffer)[:n], source)
        return n, source

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        n = super().recv_into(buffer, nbytes, flags)
        self.association.heard(memoryview(buffer)[:n], None)
        return n

    def send(self, data: Any, flags: int = 0, /) -> int:
        n = super().send(data, flags)
        self.association.said(data)
        return n


class Teller:
    """Shows what has been noted in another thread, in a thread of its own, which starts with the first."""

    def __init__(self, show: Callable[..., None]) -> None:
        self.show = show
        self.noted: queue.SimpleQueue[Optional[Callable[[], Told]]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.until = 0.0            # the end of the second at hand
        self.shown = 0              # in it
        self.left_out = 0
        self.over = threading.Event()
        self.thread: Optional[threading.Thread] = None

    def has_room(self) -> bool:
        """Whether one more may be put; if not, it is counted."""
        now = time.monotonic()
        with self.lock:
            if now >= self.until:
                self.until, self.shown = now + 1, 0
            if self.shown < MOST and self.noted.qsize() < BACKLOG:
                self.shown += 1
                return True
            self.left_out += 1
            first = self.left_out == 1
        if first:
            self.put(self.summary)
        return False

    def put(self, make: Callable[[], Told]) -> None:
        """Have made and shown what this makes."""
        self.noted.put(make)
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="socks5srv-explain", daemon=True)
            try:
                self.thread.start()
            except RuntimeError:    # no more threads: then this is not shown
                self.thread = None

    def run(self) -> None:
        for make in iter(self.noted.get, None):
            try:
                self.show(*make())
            except Exception:
                logger.exception("a bug, met while explaining a datagram")

    def summary(self) -> Told:
        """How many were left out, once the second is over."""
        self.over.wait(max(0.0, self.until - time.monotonic()))
        with self.lock:
            number, self.left_out = self.left_out, 0
        return Exhibit("DATAGRAMS", remarks=[reasons.about_datagrams_left_out(number)]), "", time.monotonic()

    def end(self) -> None:
        """Show what is left, and end; returns when that is done, or takes too long."""
        self.over.set()
        self.noted.put(None)
        if self.thread is not None:
            self.thread.join(timeout=1)


CLASSES: Dict[type, type] = {}
SOCKETS: Dict[Tuple[type, type], type] = {}

S = TypeVar("S", bound=socket.socket)


def overhear(association: Association, handler: Explaining) -> Association:
    """The same association, telling the handler what passes."""
    kind = type(association)
    if kind not in CLASSES:
        CLASSES[kind] = type(f"Overheard{kind.__name__}", (OverheardAssociation, kind), {})
    association.__class__ = CLASSES[kind]
    overheard = cast(OverheardAssociation, association)
    overheard.refused = {}
    overheard.handler, overheard.teller = handler, Teller(handler.show_now)
    association.inner.listen_on(overheard.with_an_ear(association.inner.socket))
    return overheard


def turned_into(kind: Type[S], sock: socket.socket) -> S:
    """The same socket in this class: a plain one is taken over, one that does more (wiretap.py) does that as well."""
    if type(sock) is socket.socket:
        found = kind(sock.family, sock.type, sock.proto, fileno=sock.detach())
        found.setblocking(False)
        return found
    both = kind, type(sock)
    if both not in SOCKETS:
        SOCKETS[both] = type(f"{kind.__name__}{type(sock).__name__}", both, {})
    sock.__class__ = SOCKETS[both]
    return cast(S, sock)
