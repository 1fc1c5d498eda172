"""
The UDP association: datagrams to and from any number of hosts, for one client.

UDP has no connections, so SOCKS gives each datagram an envelope: the client sends to the relay a header that names
the target, and the payload; the relay sends the payload on, and wraps what comes back in a header that names the
sender.  Only the TCP connection on which UDP ASSOCIATE was asked for shows that the client still lives; when it
ends, so does this.

    client  == TCP ==  ControlConnection  (says nothing any more; its end is the end)
    client  <- UDP ->  ClientSocket       bound where the control connection came in
                       TargetSocket  <- UDP ->  targets     (one per family, made on demand)

The one idea: a header already seen is not parsed again.  As octets it is the key to the target, and a source's
address is the key to the header of what it sends, so that a datagram costs two system calls and a look-up in a dict.

The client's socket accepts datagrams from the client's host only: from the port that the client has named in its
request, or else from that of the first good one, or a neighbour behind the same address could take the association,
and its answers.  A client that has been silent for a while may go on from another port.  The targets' sockets accept
them only from hosts that the client has written to (from any port: a TFTP server answers from a new one).  A datagram
that is wrong in any way is dropped in silence, as RFC 1928 section 7 asks, and costs nothing but itself.

An association lives in the relay thread, next to the tunnels (relay.py).  A name is looked up in a thread of its
own, while other datagrams go on.

Not here: what may be reached (policy.py), and how to look up a name (resolver.py).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from io import BytesIO
from typing import Any, Callable, Dict, List, NoReturn, Optional, Protocol, Sequence, Tuple, Union

from . import outbound
from .observer import Hooks
from .protocol import DATAGRAM_MAX, Address, AddressType, Command, Datagram, ProtocolError, ReplyCode, RequestFailed
from .relay import READ, Pollable, Relay, reason_of
from .resolver import NO_SUCH_NAME, LookUp, look_ups
from .rules import Verdict
from .session import Session, word

logger = logging.getLogger("socks5srv")

TURN = 32               # datagrams moved in one turn at most, so that a flood leaves room for the others: under 1 ms
SPACE = 22              # octets in front of what is received: the longest header of an answer
REMEMBERED = 4096       # targets, sources and hosts known at a time; then the oldest are forgotten
QUEUED = 64             # datagrams that wait for their names to be looked up
LOOK_UPS = 16           # names being looked up at a time, for one client

SockAddr = Tuple[Any, ...]
Target = Tuple[socket.socket, SockAddr]     # the socket that can reach it, and its address
Outcome = Union[Target, str]                # of a datagram: where it went, or in a sentence what happened instead


def header_length(octets: memoryview) -> int:
    """How long the header of this datagram is (it may end before); 0 for an unknown ATYP."""
    atyp = octets[3] if len(octets) > 4 else 0
    if atyp == AddressType.IPV4:
        return 10
    if atyp == AddressType.IPV6:
        return 22
    return 7 + octets[4] if atyp == AddressType.DOMAINNAME else 0


def dropped(reason: object) -> str:
    """The outcome for this reason, or error."""
    return f"Dropped: {reason_of(reason)}."


def keep(known: Dict[Any, Any], key: Any, value: Any) -> None:
    """Remember it as the newest, and forget the oldest if there are too many."""
    known.pop(key, None)
    if len(known) >= REMEMBERED:
        del known[next(iter(known))]
    known[key] = value


class Conversation(Protocol):
    """What an association asks of the conversation that it comes from: handler.py's."""

    session: Session
    hooks: Hooks

    def judge(self, command: Command, address: Address, name: Optional[str] = None) -> Verdict: ...
    def look_up_of(self, host: str) -> LookUp: ...
    def resolved(self, host: str, hosts: Sequence[str], began: float, error: Optional[Exception] = None) -> None: ...
    def close(self) -> None: ...


class Association:
    """One client's UDP relay, on `host`: this computer's address as the client sees it."""

    # In seconds:
    idle_timeout = 30.0         # until the client may go on from another port: NATs forget, and phones move
    forget = 60.0               # until all targets are found out afresh: names may move
    dead = 2.0                  # that a failed look-up, or an address without a route, is remembered: it may work the next moment
    missing = 10.0              # that a name is remembered which does not exist

    most = TURN                 # datagrams moved in one turn; fewer, if each of them takes long

    def __init__(self, conversation: Conversation, relay: Relay, host: str, route: outbound.Route, reassemble: bool = False) -> None:
        """In the conversation's thread; from start() on it is the relay thread's.  OSError if there is no socket."""
        self.relay, self.conversation, self.route = relay, conversation, route
        self.session = conversation.session
        self.client_host = self.session.client.host
        traced = bool(conversation.hooks.datagram)
        self.client_socket = (TracedClientSocket if traced else ClientSocket)(self, route.udp((host, 0)))
        self.target_sockets: Dict[int, TargetSocket] = {}   # by address family
        self.sockets: List[AssociationSocket] = [self.client_socket]    # all of them
        self.closed = False
        self.bound = Address.of(self.client_socket.socket.getsockname())    # where the client has to send to
        # What has been found out, each to be thrown away at any time, and the oldest if there is too much:
        self.targets: Dict[bytes, Target] = {}              # by header
        self.stale: Dict[bytes, Target] = {}                # names that are to be looked up again when they are used again
        self.nowhere: Dict[bytes, Tuple[float, str]] = {}   # until when, and why, by header
        self.headers: Dict[SockAddr, bytes] = {}            # by source
        self.contacted: Dict[str, None] = {}                # hosts that may answer
        self.looking_up: Dict[bytes, List[bytes]] = {}      # payloads that wait, by header
        self.forget_at = time.monotonic() + self.forget
        self.fragments: Optional[Fragments] = Fragments() if reassemble else None

    def start(self, connection: socket.socket) -> None:
        """Hand it to the relay thread, with the TCP connection that it lives by."""
        connection.setblocking(False)
        self.sockets.append(ControlConnection(self, connection))
        try:
            named = self.session.destination.literal if self.session.destination is not None else None
            # DST.PORT is where the client sends from, if it says so.  With a host that is not its own it is behind a NAT,
            # which gives it another port as well, or has written its target there.
            if named is not None and named.port and named.host == self.client_host:
                self.client_socket.expect(self.session.client._replace(port=named.port))
            self.relay.watch(*((each.socket, each, READ) for each in reversed(self.sockets)))
            self.relay.call(lambda: self.relay.watch_idle(self.check_idle, self.idle_timeout))
        except (OSError, ValueError) as error:      # it has been aborted already, or the system will not watch any more
            self.abort_soon(reason_of(error))

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
            self.forget_at = now + self.forget
        return now

    def check_idle(self, now: float) -> None:
        """If the client has been silent for so long, it may have another port by now."""
        if self.closed:
            self.relay.idle_watch.pop(self.check_idle, None)
        elif self.client_socket.locked and now - self.client_socket.heard_at >= self.idle_timeout:
            self.unlock()

    def unlock(self) -> None:
        """Hear the client's host on any port again.  No call takes back connect(), so the socket is made anew, on the same port."""
        sockaddr = self.client_socket.socket.getsockname()
        self.relay.discard(self.client_socket.socket)
        try:
            self.client_socket.listen_on(self.route.udp(sockaddr))
            self.relay.watch((self.client_socket.socket, self.client_socket, READ))
        except OSError as error:        # another program has taken the port meanwhile
            self.abort(f"its UDP port is lost: {reason_of(error)}")

    def abort(self, reason: str) -> None:
        was_closed = self.closed
        self.close()                # again, for a start() that came later
        if not was_closed:
            self.relay.idle_watch.pop(self.check_idle, None)
            self.session.end(reason)
            self.conversation.close()

    def close(self) -> None:
        self.closed = True
        for each in self.sockets:
            self.relay.discard(each.socket)

    def send_out(self, header: bytes, payload: memoryview) -> Outcome:
        """A datagram of the client's: on to where its header says, if that is known."""
        target = self.targets.get(header) or self.find(header, payload)
        if not isinstance(target, str):
            try:
                self.session.up += target[0].sendto(payload, target[1])
            except OSError as error:    # too long, unroutable, no room: UDP may lose it
                return dropped(error)
        return target

    def find(self, header: bytes, payload: memoryview) -> Outcome:
        """What a header not seen before stands for, unless it leads nowhere, or not yet."""
        until, outcome = self.nowhere.get(header, (0.0, ""))
        if until > time.monotonic():
            return outcome
        try:
            datagram = Datagram.read(BytesIO(header))
        except (ProtocolError, RequestFailed) as error:
            return dropped(error)       # not remembered: nonsense has no end
        if datagram.frag:
            return self.add_fragment(datagram, bytes(payload))
        literal = datagram.address.literal
        if literal is None:
            return self.look_up(header, datagram.address, bytes(payload))
        return self.remember(header, self.open_towards([literal.dialled.on_the_link_of(self.session.client)], None))

    def remember(self, header: bytes, found: Outcome, missing: bool = False) -> Outcome:
        """From now on the header leads there; or for a while nowhere, longer if its name is missing."""
        if isinstance(found, str):
            self.targets.pop(header, None)
            keep(self.nowhere, header, (time.monotonic() + (self.missing if missing else self.dead), found))
        else:
            keep(self.targets, header, found)
        return found

    def open_towards(self, addresses: Sequence[Address], name: Optional[str]) -> Outcome:
        """The first of the addresses that is allowed and can be sent to."""
        failures: List[object] = []
        for address in addresses:
            try:
                self.check(address, name)
                if len(addresses) > 1:
                    outbound.local_address_towards(address, self.route)     # an error if there is no route
                sock = self.socket_towards(address)
            except (OSError, RequestFailed) as error:
                failures.append(error)
                continue
            keep(self.contacted, address.host, None)
            return sock, address.sockaddr
        return dropped((failures or ["the name has no address"])[0])

    def check(self, address: Address, name: Optional[str] = None) -> None:
        """RequestFailed if the address may not be reached."""
        verdict = self.conversation.judge(Command.UDP_ASSOCIATE, address, name)
        if not verdict.allowed:
            raise RequestFailed(ReplyCode.NOT_ALLOWED, verdict.reason)

    def socket_towards(self, address: Address) -> socket.socket:
        """The socket for all targets of this family."""
        family = outbound.family_of(address)
        if family not in self.target_sockets:
            sock = self.route.socket(address, socket.SOCK_DGRAM)
            outbound.enlarge(sock)
            if sock.getsockname()[1] == 0:      # a port is needed before it can be waited for
                sock.bind(("", 0))
            self.target_sockets[family] = TargetSocket(self, sock)
            self.sockets.append(self.target_sockets[family])
            self.relay.watch((sock, self.target_sockets[family], READ))
        return self.target_sockets[family].socket

    def way_to(self, target: Target) -> str:
        """The outcome of a datagram that has been sent there."""
        return f"It goes to {Address.of(target[1])} without the header, from port {target[0].getsockname()[1]}."

    # --- names ---

    def look_up(self, header: bytes, address: Address, payload: bytes) -> Outcome:
        """Have the name looked up aside.  Until the answer comes its datagrams wait, or go where they went before."""
        target = self.stale.pop(header, None)
        try:
            if header not in self.looking_up:
                self.start_look_up(header, address)
        except (OSError, RequestFailed) as error:
            if target is None:
                return dropped(error)
        if target is not None:
            return self.remember(header, target)
        if sum(map(len, self.looking_up.values())) >= QUEUED:
            return dropped("too many wait until their names have been looked up")
        self.looking_up[header].append(payload)
        return "It waits until the name has been looked up."

    def start_look_up(self, header: bytes, address: Address) -> None:
        """Ask the resolver.  OSError or RequestFailed if too many questions are open, or this one may not be asked."""
        if len(self.looking_up) >= LOOK_UPS:
            raise OSError(errno.EAGAIN, "too many names are being looked up")
        self.check(address)
        began = time.monotonic()
        look_up = self.conversation.look_up_of(address.host)
        look_ups.begin(look_up, lambda answer: self.relay.call(lambda: self.resolved(header, address, answer, began)), patient=False)
        self.looking_up[header] = []

    def resolved(self, header: bytes, address: Address, answer: LookUp, began: float) -> None:
        """The answer has come: send what has waited for it."""
        waiting = self.looking_up.pop(header, [])
        if self.closed:
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
        """The name leads to the first of its addresses that is allowed and has a route."""
        # But an address in use stays, as long as the name has it: resolvers turn the order round, and the host that
        # knows the client is the one that it has spoken to.
        current = self.targets.get(header)
        if current is not None:
            addresses.sort(key=lambda each: (each.host, each.port) != current[1][:2])
        self.remember(header, self.open_towards(addresses, name), missing=not addresses)

    def not_found(self, header: bytes, address: Address, error: Exception) -> None:
        """A name that does not exist any more leads nowhere; other failures change nothing for an address in use."""
        missing = isinstance(error, socket.gaierror) and error.errno in NO_SUCH_NAME
        if not isinstance(error, (OSError, ValueError, RequestFailed)):
            logger.error("unhandled exception while looking up %s", word(str(address)), exc_info=error)
        if missing or header not in self.targets:
            self.remember(header, dropped(error), missing)

    # --- fragments ---

    def add_fragment(self, datagram: Datagram, payload: bytes) -> str:
        """RFC 1928 section 7: without reassembly every fragment must be dropped."""
        if self.fragments is None:
            return dropped("this proxy puts no fragments together")
        whole = self.fragments.add(datagram, payload)
        if whole is None:
            return "It waits for the other fragments."
        outcome = self.send_out(bytes(Datagram(whole.address, b"")), memoryview(whole.data))
        return outcome if isinstance(outcome, str) else self.way_to(outcome)


class AssociationSocket(Pollable):
    """One of the sockets of an association."""

    side = ""

    def __init__(self, association: Association, sock: socket.socket) -> None:
        self.association, self.socket = association, sock

    def abort(self, reason: str) -> None:
        self.association.abort(reason)


class ControlConnection(AssociationSocket):
    """A TCP connection that the association lives by: it says nothing, but its end ends everything."""

    side = "client"                 # whose it is

    def ready(self, events: int) -> None:
        if not self.socket.recv(4096):
            self.association.abort(f"closed by {self.side}")


class ClientSocket(AssociationSocket):
    """The socket that the client sends to, and gets its answers from."""

    receive: Callable[[memoryview], int]        # the length of the next datagram
    coded: Optional[Callable[[socket.socket], socket.socket]] = None    # what makes of a socket one whose datagrams are coded
    length = 10                     # octets, of the header that came last

    def __init__(self, association: Association, sock: socket.socket) -> None:
        super().__init__(association, sock)
        self.client: Optional[SockAddr] = None      # its host and port: where it has sent from last
        self.there: SockAddr = ()                   # the same, as its socket address
        self.heard_at = 0.0             # when it has last sent something, by time.monotonic()
        self.turn = TURN                # datagrams in the next one: to ask in vain costs as much as to move one
        self.listen_on(sock)

    def listen_on(self, sock: socket.socket) -> None:
        """Hear the client's host on any port, until the first good datagram locks one."""
        self.socket = sock if self.coded is None else self.coded(sock)
        self.locked = False
        self.receive = self.receive_from_anyone
        self.send_by(self.send_unlocked)

    def expect(self, client: Address) -> None:
        """Hear this port only, from now on; if it is silent for long, any."""
        self.heard_at = time.monotonic()
        self.lock((client.host, client.port), client.sockaddr)

    def lock(self, source: SockAddr, sockaddr: SockAddr) -> None:
        """From now on the kernel keeps all others out."""
        self.client, self.there, self.locked = source, sockaddr, True
        self.socket.connect(sockaddr)
        self.send_by(self.socket.send)

    def send_by(self, send: Callable[[memoryview], int]) -> None:
        self.send = send

    def ready(self, events: int) -> None:
        association, receive, length = self.association, self.receive, self.length
        now, chunk, targets = association.forget_old(), association.relay.chunk, association.targets
        up = errors = 0
        for moved in range(min(self.turn, association.most)):
            try:
                n = receive(chunk)
            except BlockingIOError:
                if self.locked:         # all that came before the lock has been seen
                    self.receive = self.socket.recv_into
                self.turn = moved or 1
                break
            except OSError:             # an ICMP error of an earlier answer; or this is not the client's
                errors += 1
                continue
            # Usually the header equals the previous one, so try that length first.  A known header of this length is a
            # complete header: its length follows from its content.
            target = targets.get(bytes(chunk[:length])) if n >= length else None
            if target is None:
                self.pass_on(chunk[:n])
                length = self.length
                continue
            try:
                up += target[0].sendto(chunk[length:n], target[1])
            except OSError:             # as in send_out()
                pass
        else:
            moved, self.turn = self.turn, min(2 * self.turn, TURN)
        if moved > errors:
            self.heard_at = now
        association.session.up += up

    def pass_on(self, octets: memoryview) -> Outcome:
        """A datagram unlike the one before."""
        length = header_length(octets)
        if not 0 < length <= len(octets):
            return dropped("its header cannot be read")
        self.length = length
        return self.association.send_out(bytes(octets[:length]), octets[length:])

    def receive_from_anyone(self, chunk: memoryview) -> int:
        """The next datagram's length; OSError if it is not the client's.  The first good one locks its port."""
        n, sockaddr = self.socket.recvfrom_into(chunk)
        source, octets = (Address.of(sockaddr).host, sockaddr[1]), chunk[:n]
        if source[0] != self.association.client_host:
            self.drop(octets, f"it comes from {source[0]}, and the client is {self.association.client_host}")
        if not self.locked and 0 < header_length(octets) <= n:
            self.lock(source, sockaddr)
        if self.locked and source != self.client:       # it has been queued before
            self.drop(octets, f"it comes from port {source[1]}, and the client sends from another")
        return n

    def drop(self, octets: memoryview, reason: str) -> NoReturn:
        """Not the client's datagram."""
        raise OSError(errno.EACCES, reason)

    def send_unlocked(self, octets: memoryview) -> int:
        """To where the client was last; it may still listen there although it is silent."""
        if self.client is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        return self.socket.sendto(octets, self.there)


class TracedClientSocket(ClientSocket):
    """One whose datagrams are observed: each is told with its outcome, and so none of them takes the fast way."""

    length = 0                      # no header is as short

    def pass_on(self, octets: memoryview) -> Outcome:
        outcome = super().pass_on(octets)
        self.length = 0
        self.tell(False, octets, outcome if isinstance(outcome, str) else self.association.way_to(outcome))
        return outcome

    def drop(self, octets: memoryview, reason: str) -> NoReturn:
        self.tell(False, octets, dropped(reason))
        super().drop(octets, reason)

    def send_by(self, send: Callable[[memoryview], int]) -> None:
        def send_and_tell(octets: memoryview) -> int:
            sent = send(octets)
            self.tell(True, octets, "")
            return sent

        self.send = send_and_tell

    def tell(self, to_client: bool, octets: memoryview, outcome: str) -> None:
        for datagram in self.association.conversation.hooks.datagram:
            datagram(self.association.session, to_client, bytes(octets), outcome)


class TargetSocket(AssociationSocket):
    """The socket that all targets of one family are written to and heard on."""

    turn = TURN                     # as ClientSocket's

    def ready(self, events: int) -> None:
        association = self.association
        chunk = association.relay.chunk
        room = chunk[SPACE:]
        headers, receive, answer = association.headers, self.socket.recvfrom_into, association.client_socket.send
        down = 0
        for moved in range(min(self.turn, association.most)):
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
    """The reassembly queue of RFC 1928 section 7, for one client."""

    timeout = 5.0           # seconds that they wait for the rest; RFC 1928 section 7 asks for 5 at least

    def __init__(self) -> None:
        self.parts: List[Datagram] = []
        self.expires = 0.0          # by time.monotonic()

    def add(self, datagram: Datagram, payload: bytes) -> Optional[Datagram]:
        """Queue a fragment, if it belongs to the queue or begins a new one; the datagram, if it is whole now."""
        # One that does not follow the one before drops the queue; so does another target, too much, or too long a wait.
        position = datagram.frag & ~Datagram.LAST_FRAGMENT
        if not self.follows(position, datagram.address) or time.monotonic() >= self.expires:
            self.parts = []
        if position == 1:
            self.expires = time.monotonic() + self.timeout
        if position == len(self.parts) + 1:
            self.parts.append(Datagram(datagram.address, payload, datagram.frag))
        if not self.parts or not self.parts[-1].frag & Datagram.LAST_FRAGMENT:
            return None
        parts, self.parts = self.parts, []
        return Datagram(datagram.address, b"".join(part.data for part in parts))

    def follows(self, position: int, address: Address) -> bool:
        if not self.parts or position <= len(self.parts) or sum(len(part.data) for part in self.parts) > DATAGRAM_MAX:
            return False
        return self.parts[0].address == address
