"""
The UDP association: datagrams to and from any number of hosts, for one client.

UDP has no connections, so SOCKS gives each datagram an envelope: the client sends to the
relay a header that names the target, and the payload; the relay sends the payload on, and
wraps what comes back in a header that names the sender.  Only the TCP connection on which
UDP ASSOCIATE was asked for shows that the client still lives; when it ends, so does this.

    client  == TCP ==  control           (says nothing any more; its end is the end)
    client  <- UDP ->  inner socket      bound where the control connection came in
                       outer sockets  <- UDP ->  targets        (one per family, made on demand)

The one idea: a header already seen is not parsed again.  As octets it is the key to the
target, and a source's address is the key to the header of what it sends, so that a datagram
costs two system calls and a look-up in a dict.

The inner socket accepts datagrams from the client's host only: from the port that the client has
named in its request, or else from that of the first good one, or a neighbour behind the same
address could take the association, and its answers.  A client that has been silent for `SILENT`
seconds may go on from another port.  On the outer side, only hosts that the client has written to are heard (on any
port: a TFTP server answers from a new one).  A datagram that is wrong in any way is dropped
in silence, as RFC 1928 section 7 asks, and costs nothing but itself.

An association lives in the relay thread, next to the tunnels (relay.py).  A name is looked up
in a thread of its own, while other datagrams go on.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from io import BytesIO
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple, TypeVar

from . import outbound
from .protocol import DATAGRAM_MAX, Address, AddressType, Command, Datagram, ProtocolError, RequestFailed
from .relay import READ, Relay, broken
from .resolver import NO_SUCH_NAME, LookUp, look_ups
from .session import Session, word

logger = logging.getLogger("socks5srv")

TURN = 32               # datagrams moved in one turn at most, so that a flood leaves room for the others: under 1 ms
SPACE = 22              # octets in front of what is received: the longest header of an answer
REMEMBERED = 4096       # targets, sources and hosts known at a time; then the oldest are forgotten
FORGET = 60.0           # seconds after which all targets are found out afresh: names may move
DEAD = 2.0              # seconds that a failed look-up, or an address without a route, is remembered: it may work the next moment
MISSING = 10.0          # seconds that a name is remembered which does not exist
QUEUED = 64             # datagrams that wait for their names to be looked up
LOOK_UPS = 16           # names being looked up at a time, for one client
SILENT = 30.0           # seconds after which the client may go on from another port: NATs forget, and phones move
REASSEMBLY = 5.0        # seconds that fragments wait for the rest; RFC 1928 section 7 asks for 5 at least

SockAddr = Tuple[Any, ...]
Target = Tuple[socket.socket, SockAddr]     # the outer socket that can reach it, and its address


def header_length(octets: memoryview) -> int:
    """How long the header of this datagram is (it may end before); 0 for an unknown ATYP."""
    atyp = octets[3] if len(octets) > 4 else 0
    if atyp == AddressType.IPV4:
        return 10
    if atyp == AddressType.IPV6:
        return 22
    return 7 + octets[4] if atyp == AddressType.DOMAINNAME else 0


K = TypeVar("K")
V = TypeVar("V")


def keep(known: Dict[K, V], key: K, value: V) -> None:
    """Remember it as the newest, and forget the oldest if there are too many."""
    known.pop(key, None)
    if len(known) >= REMEMBERED:
        del known[next(iter(known))]
    known[key] = value


class Conversation(Protocol):
    """What an association asks of the conversation that it comes from: handler.py's."""

    session: Session

    def may_reach(self, command: Command, address: Address, name: Optional[str] = None) -> bool: ...
    def look_up_of(self, host: str) -> LookUp: ...
    def resolved(self, host: str, hosts: Sequence[str], began: float, error: Optional[Exception] = None) -> None: ...
    def finished(self) -> None: ...


class Association:
    """
    One client's UDP relay.  `bound` is where the client has to send to: on `host`, this
    computer's address as the client sees it.

    Made in the conversation's thread, which tells the client; after start() it belongs to the
    relay thread.  OSError if there is no socket to be had.
    """

    def __init__(self, conversation: Conversation, relay: Relay, host: str, route: outbound.Route,
                 reassemble: bool = False) -> None:
        self.relay = relay
        self.conversation = conversation
        self.session = conversation.session
        self.route = route
        self.client_host = self.session.client.host
        self.inner = Inner(self, self.inner_socket((host, 0)))
        self.outer: Dict[int, Outer] = {}                   # by address family
        self.control: Optional[Control] = None
        self.bound = Address.of(self.inner.socket.getsockname())
        # What has been found out, each to be thrown away at any time, and the oldest if there is too much:
        self.targets: Dict[bytes, Target] = {}              # by header
        self.stale: Dict[bytes, Target] = {}                # names that are to be looked up again when they are used again
        self.dead: Dict[bytes, float] = {}                  # headers that lead nowhere, and until when
        self.headers: Dict[SockAddr, bytes] = {}            # by source
        self.contacted: Dict[str, None] = {}                # hosts that may answer
        self.looking_up: Dict[bytes, List[bytes]] = {}      # payloads that wait, by header
        self.forget_at = time.monotonic() + FORGET
        self.patience = SILENT                              # how often look() is called follows from it
        self.fragments: Optional[Fragments] = Fragments() if reassemble else None

    def __enter__(self) -> Association:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.control is None:
            self.inner.socket.close()

    def start(self, connection: socket.socket) -> None:
        """Hand it to the relay thread, with the TCP connection that it lives by."""
        connection.setblocking(False)
        self.control = Control(self, connection)
        try:
            if self.named_port:
                self.inner.expect(self.session.client._replace(port=self.named_port))
            self.relay.watch((connection, self.control, READ), (self.inner.socket, self.inner, READ))
            self.relay.call(lambda: self.relay.watch_idleness(self))
        except (OSError, ValueError) as error:
            if self.inner.socket.fileno() < 0:      # it has been aborted already, and did not know this one
                connection.close()
            else:                                   # so it is being, just now, or the system will not watch any more
                self.abort_soon(str(error))

    @property
    def named_port(self) -> int:
        """
        DST.PORT, where the client says that it sends from; 0 if it leaves that open, or is wrong about its own host.

        A wrong host is behind a NAT, which gives it another port as well, or has written its target there.
        """
        destination = self.session.destination
        named = destination.literal if destination is not None else None
        return named.port if named is not None and named.host == self.client_host else 0

    def abort_soon(self, reason: str) -> None:
        """abort(), called in any thread."""
        self.relay.call(lambda: self.abort(reason))

    # --- all of what follows runs in the relay thread ---

    def forget_old(self) -> float:
        """Now and then, find everything out afresh.  Returns the time.  (No timer does it: those of the dead would pile up.)"""
        now = time.monotonic()
        if now >= self.forget_at:
            self.stale = {header: target for header, target in self.targets.items() if header[3] == AddressType.DOMAINNAME}
            self.targets.clear()
            self.forget_at = now + FORGET
        return now

    def look(self, now: float) -> None:
        """Called several times in SILENT seconds: if the client has been silent for so long, it may have another port by now."""
        if self.ended:
            self.relay.impatient.discard(self)
        elif self.inner.locked and now - self.inner.heard_at >= SILENT:
            self.unlock()

    def unlock(self) -> None:
        """
        Hear the client's host on any port again.

        No call takes back the connect() that keeps the others out, so the socket is made anew, on the same port.
        """
        sockaddr = self.inner.socket.getsockname()
        self.relay.unwatch(self.inner.socket.fileno())
        self.inner.socket.close()
        try:
            self.inner.listen_on(self.inner_socket(sockaddr))
            self.relay.watch((self.inner.socket, self.inner, READ))
        except OSError as error:        # another program has taken the port meanwhile
            self.abort(f"its UDP port is lost: {error.strerror or error}")

    def inner_socket(self, sockaddr: SockAddr) -> socket.socket:
        """The socket that the client sends to."""
        return self.route.udp(sockaddr)

    @property
    def ended(self) -> bool:
        return self.session.seconds is not None

    def abort(self, reason: str) -> None:
        if self.ended:
            return
        self.relay.impatient.discard(self)
        for owner in (self.control, self.inner, *self.outer.values()):
            if owner is not None:
                self.relay.unwatch(owner.socket.fileno())
                owner.socket.close()
        self.session.end(reason)
        self.conversation.finished()

    def send_out(self, header: bytes, payload: memoryview) -> None:
        """A datagram of the client's: on to where its header says, if that is known."""
        target = self.targets.get(header) or self.find(header, payload)
        if target is not None:
            outer, sockaddr = target
            try:
                self.session.up += outer.sendto(payload, sockaddr)
            except OSError:             # too long, unroutable, no room: UDP may lose it
                pass

    def find(self, header: bytes, payload: memoryview) -> Optional[Target]:
        """What a header not seen before stands for; None if it leads nowhere, or not yet."""
        if self.dead.get(header, 0.0) > time.monotonic():
            return None
        try:
            datagram = Datagram.read(BytesIO(header))
        except (ProtocolError, RequestFailed):
            return None                 # not remembered: nonsense has no end
        if datagram.frag:
            self.add_fragment(datagram, bytes(payload))
            return None
        literal = datagram.address.literal
        if literal is None:
            return self.look_up(header, datagram.address, bytes(payload))
        target = self.open_towards([literal.dialled.on_the_link_of(self.session.client)], None)
        if target is None:
            keep(self.dead, header, time.monotonic() + DEAD)
            return None
        return self.remember(header, target)

    def remember(self, header: bytes, target: Target) -> Target:
        keep(self.targets, header, target)
        return target

    def open_towards(self, addresses: Sequence[Address], name: Optional[str]) -> Optional[Target]:
        """The first of the addresses that is allowed and can be sent to."""
        for address in addresses:
            try:
                if not self.may_reach(address, name):
                    continue
                if len(addresses) > 1:
                    outbound.local_address_towards(address, self.route)     # an error if there is no route
                outer = self.outer_socket(address)
            except (OSError, RequestFailed):
                continue
            keep(self.contacted, address.host, None)
            return outer, address.sockaddr
        return None

    def may_reach(self, address: Address, name: Optional[str] = None) -> bool:
        try:
            return self.conversation.may_reach(Command.UDP_ASSOCIATE, address, name)
        except RequestFailed:           # of an allow() that says so in its own words
            return False

    def outer_socket(self, address: Address) -> socket.socket:
        """The socket for all targets of this family."""
        family = outbound.family_of(address)
        if family not in self.outer:
            sock = self.route.socket(address, socket.SOCK_DGRAM)
            outbound.enlarge(sock)
            if sock.getsockname()[1] == 0:      # a port is needed before it can be waited for
                sock.bind(("", 0))
            self.outer[family] = Outer(self, sock)
            self.relay.watch((sock, self.outer[family], READ))
        return self.outer[family].socket

    # --- names ---

    def look_up(self, header: bytes, address: Address, payload: bytes) -> Optional[Target]:
        """Have the name looked up aside.  Until the answer comes its datagrams wait, or go where they went before."""
        target = self.stale.pop(header, None)
        if target is not None:
            self.remember(header, target)
        waiting = self.looking_up.get(header)
        if waiting is None:
            self.start_look_up(header, address)
            waiting = self.looking_up.get(header)
        if target is None and waiting is not None and sum(map(len, self.looking_up.values())) < QUEUED:
            waiting.append(payload)
        return target

    def start_look_up(self, header: bytes, address: Address) -> None:
        """Ask the resolver, unless too many questions are open: then a datagram is lost, as on a bad line."""
        if len(self.looking_up) >= LOOK_UPS or not self.may_reach(address):
            return
        began = time.monotonic()
        self.looking_up[header] = []
        try:
            look_ups.begin(
                self.conversation.look_up_of(address.host),
                lambda answer: self.relay.call(lambda: self.resolved(header, address, answer, began)), patient=False,
            )
        except (OSError, RequestFailed):
            del self.looking_up[header]

    def resolved(self, header: bytes, address: Address, answer: LookUp, began: float) -> None:
        """The answer has come: send what has waited for it."""
        waiting = self.looking_up.pop(header, [])
        if self.ended:
            return
        self.conversation.resolved(address.host, answer.hosts, began, answer.error)
        try:
            addresses = [Address.numeric(host, address.port).dialled for host in answer.result()]
        except Exception as error:
            self.not_found(header, address, error)
        else:
            self.found(header, addresses, address.host)
        for payload in waiting:
            self.send_out(header, memoryview(payload))

    def found(self, header: bytes, addresses: List[Address], name: str) -> None:
        """
        Where the name leads from now on.

        To the first of its addresses that is allowed and has a route.  But an address in use stays, as long as
        the name has it: resolvers turn the order round, and the host that knows the client is the one that it has spoken to.
        """
        current = self.targets.get(header)
        if current is not None:
            addresses.sort(key=lambda each: (each.host, each.port) != current[1][:2])
        target = self.open_towards(addresses, name)
        if target is None:
            self.targets.pop(header, None)
            keep(self.dead, header, time.monotonic() + (DEAD if addresses else MISSING))
        else:
            self.remember(header, target)

    def not_found(self, header: bytes, address: Address, error: Exception) -> None:
        """A name that does not exist any more leads nowhere; other failures change nothing for an address in use."""
        missing = isinstance(error, socket.gaierror) and error.errno in NO_SUCH_NAME
        if not isinstance(error, (OSError, ValueError, RequestFailed)):
            logger.error("a bug, met while looking up %s", word(str(address)), exc_info=error)
        if missing:
            self.targets.pop(header, None)
        if header not in self.targets:
            keep(self.dead, header, time.monotonic() + (MISSING if missing else DEAD))

    # --- fragments ---

    def add_fragment(self, datagram: Datagram, payload: bytes) -> None:
        """RFC 1928 section 7: without reassembly every fragment must be dropped."""
        if self.fragments is None:
            return
        self.fragments.add(datagram, payload)
        whole = self.fragments.take_whole()
        if whole is not None:
            header = bytes(Datagram(whole.address, b""))
            self.send_out(header, memoryview(whole.data))


class Control:
    """The TCP connection of the association: it says nothing, but its end ends everything."""

    def __init__(self, association: Association, connection: socket.socket) -> None:
        self.association = association
        self.socket = connection

    def ready(self, events: int) -> None:
        try:
            if not self.socket.recv(4096):
                self.association.abort("client closed")
        except BlockingIOError:
            pass
        except OSError as error:
            self.association.abort(broken("client", error))

    def abort(self, reason: str) -> None:
        self.association.abort(reason)


class Inner:
    """The socket that the client sends to, and gets its answers from."""

    def __init__(self, association: Association, sock: socket.socket) -> None:
        self.association = association
        self.client: Optional[SockAddr] = None      # its host and port: where it has sent from last
        self.there: SockAddr = ()                   # the same, as its socket address
        self.heard_at = 0.0             # when it has last sent something, by time.monotonic()
        self.listen_on(sock)
        self.length = 10                # octets, of the header that came last
        self.turn = TURN                # datagrams in the next one: to ask in vain costs as much as to move one

    def listen_on(self, sock: socket.socket) -> None:
        """Hear the client's host on any port, until the first good datagram locks one."""
        self.socket = sock
        self.locked = False
        self.receive: Callable[[memoryview], int] = self.receive_from_anyone
        self.send: Callable[[memoryview], int] = self.send_unlocked

    def expect(self, client: Address) -> None:
        """Hear this port only, from now on; if it is silent for long, any."""
        self.heard_at = time.monotonic()
        self.lock((client.host, client.port), client.sockaddr)

    def lock(self, source: SockAddr, sockaddr: SockAddr) -> None:
        """From now on the kernel keeps all others out."""
        self.client, self.there, self.locked = source, sockaddr, True
        self.socket.connect(sockaddr)
        self.send = self.socket.send

    def abort(self, reason: str) -> None:
        self.association.abort(reason)

    def ready(self, events: int) -> None:
        now, errors = self.association.forget_old(), 0
        chunk, targets, length = self.association.relay.chunk, self.association.targets, self.length
        receive, up = self.receive, 0
        for moved in range(self.turn):
            try:
                n = receive(chunk)
            except BlockingIOError:
                if self.locked:         # all that came before the lock has been seen
                    self.receive = self.socket.recv_into
                self.turn = moved or 1
                break
            except OSError:             # an ICMP error of an earlier answer
                errors += 1
                continue
            # Most datagrams have a header like the one before.  A header tells its own
            # length, so if these octets are a known one, they are all of it.
            target = targets.get(bytes(chunk[:length])) if n >= length else None
            if target is None:
                length = self.slow(chunk[:n]) or length
                continue
            try:
                up += target[0].sendto(chunk[length:n], target[1])
            except OSError:             # as in send_out()
                pass
        else:
            moved, self.turn = self.turn, min(2 * self.turn, TURN)
        if moved > errors:
            self.heard_at = now
        self.association.session.up += up

    def slow(self, octets: memoryview) -> int:
        """A datagram unlike the one before; the length of its header, 0 if it has none."""
        length = header_length(octets)
        if not 0 < length <= len(octets):
            return 0
        self.length = length
        self.association.send_out(bytes(octets[:length]), octets[length:])
        return length

    def receive_from_anyone(self, chunk: memoryview) -> int:
        """
        The next datagram's length; 0 if a stranger sent it.

        The first good one locks the client's port.  Those that have been queued before are still
        checked here, until the queue is empty.
        """
        n, sockaddr = self.socket.recvfrom_into(chunk)
        source = (Address.of(sockaddr).host, sockaddr[1])
        if not self.locked and source[0] == self.association.client_host:
            if not 0 < header_length(chunk[:n]) <= n:
                return 0
            self.lock(source, sockaddr)
        return n if self.locked and source == self.client else 0

    def send_unlocked(self, octets: memoryview) -> int:
        """To where the client was last; it may still listen there although it is silent."""
        if self.client is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        return self.socket.sendto(octets, self.there)


class Outer:
    """The socket that all targets of one family are written to and heard on."""

    def __init__(self, association: Association, sock: socket.socket) -> None:
        self.association = association
        self.socket = sock
        self.turn = TURN                # as Inner's

    def abort(self, reason: str) -> None:
        self.association.abort(reason)

    def ready(self, events: int) -> None:
        association = self.association
        chunk = association.relay.chunk
        room = chunk[SPACE:]
        headers, receive, answer = association.headers, self.socket.recvfrom_into, association.inner.send
        down = 0
        for moved in range(self.turn):
            try:
                n, source = receive(room)
                header = headers.get(source) or self.header(source)
                if header:
                    start = SPACE - len(header)
                    chunk[start:SPACE] = header
                    down += answer(chunk[start:SPACE + n]) - len(header)
            except BlockingIOError:
                self.turn = moved or 1
                break
            except OSError:             # an ICMP error of an earlier one, or too long with its header
                continue
        else:
            self.turn = min(2 * self.turn, TURN)
        association.session.down += down

    def header(self, source: Tuple[str, int]) -> bytes:
        """The header for what this source sends; empty if the client has not written to it."""
        address = Address.of(source)
        if address.host not in self.association.contacted:
            return b""
        header = bytes(Datagram(address, b""))
        keep(self.association.headers, source, header)
        return header


class Fragments:
    """
    The reassembly queue of RFC 1928 section 7, for one client.

    Fragments come in order: one that does not follow the one before drops the queue, and so
    does another destination, too much, or too long a wait.
    """

    def __init__(self) -> None:
        self.parts: List[Datagram] = []
        self.expires = 0.0          # by time.monotonic()

    def add(self, datagram: Datagram, payload: bytes) -> None:
        """Queue a fragment, if it belongs to the queue or begins a new one."""
        position = datagram.frag & ~Datagram.LAST_FRAGMENT
        if not self.follows(position, datagram.address) or time.monotonic() >= self.expires:
            self.parts = []
        if position == 1:
            self.expires = time.monotonic() + REASSEMBLY
        if position == len(self.parts) + 1:
            self.parts.append(Datagram(datagram.address, payload, datagram.frag))

    def follows(self, position: int, address: Address) -> bool:
        if not self.parts or position <= len(self.parts) or sum(len(part.data) for part in self.parts) > DATAGRAM_MAX:
            return False
        return self.parts[0].address == address

    def take_whole(self) -> Optional[Datagram]:
        """The whole datagram, once its last fragment is there."""
        if not self.parts or not self.parts[-1].frag & Datagram.LAST_FRAGMENT:
            return None
        whole = Datagram(self.parts[0].address, b"".join(part.data for part in self.parts))
        self.parts = []
        return whole
