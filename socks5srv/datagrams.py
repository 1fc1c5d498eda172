"""
The UDP association: datagrams to and from any number of hosts, for one client.

UDP has no connections, so SOCKS gives each datagram an envelope: the client sends to the relay a header that names
the target, and the payload; the relay sends the payload on, and wraps what comes back in a header that names the
sender.  Only the TCP connection on which UDP ASSOCIATE was asked for shows that the client still lives; when it
ends, so does this.

    client  == TCP ==  ControlConnection  (says nothing any more; its end is the end)
    client  <- UDP ->  ClientSocket       bound where the control connection came in, or to all addresses (advertise.py)
                       TargetSocket  <- UDP ->  targets     (one per family, made on demand)

The one idea: a header already seen is not parsed again.  As octets it is the key to the target, and a source's
address is the key to the header of what it sends, so that a datagram costs a look-up in a dict, and two system calls at
most: those of one size that come together for one place leave together (trains.py).

The client's socket accepts datagrams from the client's host only: from the port that the client has named in its
request, or else from that of the first good one, or a neighbour behind the same address could take the association,
and its answers.  A client that has been silent for a while may go on from another port.  The targets' sockets accept
them only from hosts that the client has written to (from any port: a TFTP server answers from a new one).  A datagram
that is wrong in any way is dropped in silence, as RFC 1928 section 7 asks, and costs nothing but itself.

An association lives in the relay thread, next to the tunnels (relay.py).  A name is looked up in a thread of its
own, while other datagrams go on.

Not here: what may be reached (policy.py), how to look up a name (resolver.py), and what several datagrams in one call
take (trains.py).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from contextlib import suppress
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, NoReturn, Optional, Protocol, Sequence, Tuple, Union

from . import outbound
from .advertise import Ancillary, answering_from, ask_for_arrival, receive_at
from .observer import Hooks
from .protocol import DATAGRAM_MAX, Address, AddressType, Command, Datagram, ProtocolError, ReplyCode, RequestFailed
from .relay import READ, Pollable, Relay, reason_of
from .resolver import NO_SUCH_NAME, LookUp, look_ups
from .rules import Verdict
from .session import Session, word
from .trains import DATAGRAM_ROOM, MANY, Arrivals, Octets, Path, cut, runs

logger = logging.getLogger("socks5srv")

TURN = 32               # datagrams moved in one turn at most, so that a flood leaves room for the others: under 1 ms
REMEMBERED = 4096       # targets, sources and hosts known at a time; then the oldest are forgotten
QUEUED = 64             # datagrams that wait for their names to be looked up
LOOK_UPS = 16           # names being looked up at a time, for one client

SockAddr = Tuple[Any, ...]
Outcome = Union[Path, str]                  # of a datagram: where it went, or in a sentence what happened instead


class Dropped(str):
    """The outcome of a datagram that goes nowhere."""

    __slots__ = ()


def header_length(octets: memoryview) -> int:
    """How long the header of this datagram is (it may end before); 0 for an unknown ATYP."""
    atyp = octets[3] if len(octets) > 4 else 0
    if atyp == AddressType.IPV4:
        return 10
    if atyp == AddressType.IPV6:
        return 22
    return 7 + octets[4] if atyp == AddressType.DOMAINNAME else 0


def dropped(reason: object) -> Dropped:
    """The outcome for this reason, or error."""
    return Dropped(f"Dropped: {reason_of(reason)}.")


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
    """One client's UDP relay, at `host`: where the client has come, unless another address is advertised to it."""

    # In seconds:
    idle_timeout = 30.0         # until the client may go on from another port: NATs forget, and phones move
    forget = 60.0               # until all targets are found out afresh: names may move
    dead = 2.0                  # that a failed look-up, or an address without a route, is remembered: it may work the next moment
    missing = 10.0              # that a name is remembered which does not exist

    def __init__(self, conversation: Conversation, relay: Relay, host: str, route: outbound.Route, reassemble: bool = False) -> None:
        """In the conversation's thread; from start() on it is the relay thread's.  OSError if there is no socket."""
        self.relay, self.conversation, self.route = relay, conversation, route
        self.session = conversation.session
        self.client_host = self.session.client.host
        traced = bool(conversation.hooks.datagram)
        host, told = route.reached_by(self.session.client, host)
        self.client_socket = (TracedClientSocket if traced else ClientSocket)(self, route.udp_relay(host))
        self.target_sockets: Dict[int, TargetSocket] = {}   # by address family
        self.sockets: List[AssociationSocket] = [self.client_socket]    # all of them
        self.closed = False
        self.here = Address.of(self.client_socket.socket.getsockname())     # what the client's socket is bound to
        self.bound = Address.numeric(told, self.here.port)                  # where the client has to send to
        # What has been found out, each to be thrown away at any time, and the oldest if there is too much:
        self.targets: Dict[bytes, Path] = {}                # by header
        self.stale: Dict[bytes, Path] = {}                  # names that are to be looked up again when they are used again
        self.nowhere: Dict[bytes, Tuple[float, str]] = {}   # until when, and why, by header
        self.headers: Dict[SockAddr, bytes] = {}            # by source
        self.contacted: Dict[str, None] = {}                # hosts that may answer
        self.looking_up: Dict[bytes, List[bytes]] = {}      # payloads that wait, by header
        self.forget_at = time.monotonic() + self.forget
        self.fragments: Optional[Fragments] = Fragments() if reassemble else None

    @property
    def addresses(self) -> FrozenSet[Address]:
        """By which it is reached."""
        return frozenset((self.here, self.bound))

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
        old = self.client_socket.socket
        try:
            if outbound.PORT_CAN_BE_SHARED:         # for a moment, in which no other process can take it
                old.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                self.relay.discard(old)
            self.client_socket.listen_on(self.route.udp(self.here.sockaddr, share=outbound.PORT_CAN_BE_SHARED))
            self.relay.discard(old)
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
                self.session.up += target.send(payload)
            except OSError as error:    # too long, unroutable, no room: UDP may lose it
                return dropped(error)
        return target

    def counted(self, outcome: Outcome) -> Outcome:
        """The same.  Datagrams that go where others went before, ClientSocket.ready() counts by itself."""
        self.session.dropped_up += isinstance(outcome, Dropped)
        return outcome

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
            return path_to(sock, address.sockaddr)
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

    def way_to(self, target: Path) -> str:
        """The outcome of a datagram that has been sent there."""
        return f"It goes to {Address.of(target.address)} without the header, from port {target.sock.getsockname()[1]}."

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
            self.counted(self.send_out(header, memoryview(payload)))

    def found(self, header: bytes, addresses: List[Address], name: str) -> None:
        """The name leads to the first of its addresses that is allowed and has a route."""
        # But an address in use stays, as long as the name has it: resolvers turn the order round, and the host that
        # knows the client is the one that it has spoken to.
        current = self.targets.get(header)
        if current is not None:
            addresses.sort(key=lambda each: (each.host, each.port) != current.address[:2])
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
    singly = False                  # datagrams come and go one by one, by receive() and send()
    most = TURN                     # datagrams in one turn, either way; fewer, if each of them takes long

    def __init__(self, association: Association, sock: socket.socket) -> None:
        super().__init__(association, sock)
        self.client: Optional[SockAddr] = None      # its host and port: where it has sent from last
        self.there: SockAddr = ()                   # the same, as its socket address
        self.answer_from: Ancillary = ()            # our address for that, if the route may choose another
        self.heard_at = 0.0             # when it has last sent something, by time.monotonic()
        self.turn = self.most           # datagrams in the next one: to ask in vain costs as much as to move one
        self.listen_on(sock)

    def listen_on(self, sock: socket.socket) -> None:
        """Hear the client's host on any port, until the first good datagram locks one."""
        self.exclusive = False          # all that waits in it is the client's
        self.everywhere = Address.of(sock.getsockname()).is_unspecified     # on all our addresses,
        self.arrived_at = ""                                                # and the client sends to this one of them
        if self.everywhere:
            ask_for_arrival(sock)
        self.socket = sock if self.coded is None else self.coded(sock)
        self.arrivals = Arrivals(self.socket)
        self.locked = self.connected = False
        self.receive = self.receive_from_anyone
        self.send_by(self.send_unconnected)

    def expect(self, client: Address) -> None:
        """Hear this port only, from now on; if it is silent for long, any."""
        self.heard_at = time.monotonic()
        self.lock((client.host, client.port), client.sockaddr)

    def lock(self, source: SockAddr, sockaddr: SockAddr) -> None:
        """Hear no others from now on."""
        self.client, self.there, self.locked = source, sockaddr, True
        if not self.everywhere:
            self.connect()

    def connect(self) -> None:
        """Have the kernel keep all others out."""
        self.socket.connect(self.there)
        self.connected = True
        self.send_by(self.socket.send)

    def arrives_at(self, host: str) -> None:
        """
        The client sends to this address of ours, so NAT, or the client itself, takes answers from no other.

        connect() would choose the address by the route, and hear only that one then: it has to be the same.
        """
        self.arrived_at, self.answer_from = host, answering_from(host)
        route = outbound.Route(socket_factory=self.association.route.socket_factory)
        with suppress(OSError):         # there may be no way back
            if host == outbound.local_address_towards(Address.of(self.there), route):
                self.connect()

    def send_by(self, send: Callable[[Octets], int]) -> None:
        self.send = send
        self.path = Path(send, self.socket, singly=self.singly or not self.connected)

    def ready(self, events: int) -> None:
        association, session = self.association, self.association.session
        now = association.forget_old()
        came = self.receive_some()
        if came:
            self.heard_at = now
        # Usually all headers equal the previous one, so their length is tried first.  A known header of this length is a
        # complete header: its length follows from its content.
        length = self.length
        headers = [bytes(octets[:length]) for octets in came]
        for header, datagrams in neighbours(headers, came):
            target = association.targets.get(header)
            if target is not None:
                for run in runs([octets[length:] for octets in datagrams]):
                    session.up += target.send_run(run)
                session.dropped_up += target.take_lost()
            else:
                for octets in datagrams:
                    self.pass_on(octets)
        session.datagrams_up += len(came)

    def receive_some(self) -> List[memoryview]:
        """What has come from the client, as much as is for one turn."""
        chunk = self.association.relay.chunk
        if self.arrivals.coalescing:
            return [datagram for octets, size, _client in self.arrivals.read(chunk, TURN) for datagram in cut(octets, size)]
        receive, at = self.receive, 0
        came: List[memoryview] = []
        for moved in range(min(self.turn, self.most)):
            try:
                n = receive(chunk[at:])
            except BlockingIOError:
                self.all_received(moved)
                break
            except OSError:             # an ICMP error of an earlier answer; or this is not the client's
                continue
            came.append(chunk[at:at + n])
            at += n
            if at > len(chunk) - DATAGRAM_ROOM:
                break
        else:
            self.turn = min(2 * self.turn, self.most)
        if len(came) >= MANY and self.exclusive:    # whose a train is, is not looked at
            self.arrivals.consider(came)
        return came

    def all_received(self, moved: int) -> None:
        """Nothing is there any more after these."""
        if self.connected and not self.exclusive:   # so all that came before that has been seen
            self.receive, self.exclusive = self.socket.recv_into, True
        self.turn = moved or 1

    def pass_on(self, octets: memoryview) -> Outcome:
        """A datagram unlike the one before."""
        length = header_length(octets)
        if not 0 < length <= len(octets):
            return self.association.counted(dropped("its header cannot be read"))
        self.length = length
        return self.association.counted(self.association.send_out(bytes(octets[:length]), octets[length:]))

    def receive_from_anyone(self, chunk: memoryview) -> int:
        """The next datagram's length; OSError if it is not the client's.  The first good one locks its port."""
        n, sockaddr, here = receive_at(self.socket, chunk) if self.everywhere else (*self.socket.recvfrom_into(chunk), "")
        source, octets = (Address.of(sockaddr).host, sockaddr[1]), chunk[:n]
        if source[0] != self.association.client_host:
            self.drop(octets, f"it comes from {source[0]}, and the client is {self.association.client_host}")
        if not self.locked and 0 < header_length(octets) <= n:
            self.lock(source, sockaddr)
        if self.locked and source != self.client:       # it has been queued before
            self.drop(octets, f"it comes from port {source[1]}, and the client sends from another")
        if self.locked and here != self.arrived_at:
            self.arrives_at(here)
        return n

    def drop(self, octets: memoryview, reason: str) -> NoReturn:
        """Not the client's datagram."""
        raise OSError(errno.EACCES, reason)

    def send_unconnected(self, octets: Octets) -> int:
        """To where the client was last; it may still listen there although it is silent."""
        if self.client is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        if self.answer_from:
            return self.socket.sendmsg([octets], self.answer_from, 0, self.there)
        return self.socket.sendto(octets, self.there)


class TracedClientSocket(ClientSocket):
    """One whose datagrams are observed: each is told with its outcome, and so none of them takes the fast way."""

    length = 0                      # no header is as short
    singly, most = True, 1          # what becomes of one is told before the next is received

    def pass_on(self, octets: memoryview) -> Outcome:
        outcome = super().pass_on(octets)
        self.length = 0
        self.tell(False, octets, outcome if isinstance(outcome, str) else self.association.way_to(outcome))
        return outcome

    def drop(self, octets: memoryview, reason: str) -> NoReturn:
        self.tell(False, octets, dropped(reason))
        super().drop(octets, reason)

    def send_by(self, send: Callable[[Octets], int]) -> None:
        def send_and_tell(octets: Octets) -> int:
            sent = send(octets)
            self.tell(True, octets, "")
            return sent

        super().send_by(send_and_tell)

    def tell(self, to_client: bool, octets: Octets, outcome: str) -> None:
        for datagram in self.association.conversation.hooks.datagram:
            datagram(self.association.session, to_client, bytes(octets), outcome)


class TargetSocket(AssociationSocket):
    """The socket that all targets of one family are written to and heard on."""

    turn = TURN                     # as ClientSocket's

    def __init__(self, association: Association, sock: socket.socket) -> None:
        super().__init__(association, sock)
        self.arrivals = Arrivals(sock)
        self.envelope = len(bytes(Datagram(Address.of(sock.getsockname()), b"")))     # octets, of each header

    def ready(self, events: int) -> None:
        session, path, envelope = self.association.session, self.association.client_socket.path, self.envelope
        answers = self.receive_trains() if self.arrivals.coalescing else self.receive_singly()
        for run in runs(answers):
            session.down += path.send_run(run, envelope)
        session.datagrams_down += len(answers)
        session.dropped_down += path.take_lost()

    # What has come from targets, as much as is for one turn, each with its header for the client.

    def receive_singly(self) -> List[bytes]:
        headers, receive, chunk = self.association.headers, self.socket.recvfrom_into, self.association.relay.chunk
        answers: List[bytes] = []
        for moved in range(min(self.turn, self.association.client_socket.most)):
            try:
                n, source = receive(chunk)
            except BlockingIOError:
                self.turn = moved or 1
                break
            except OSError:             # an ICMP error of an earlier one
                continue
            header = headers.get(source) or self.header(source)
            if header:
                answers.append(b"".join((header, chunk[:n])))
            else:
                self.count_unasked(1)
        else:
            self.turn = min(2 * self.turn, TURN)
        if len(answers) >= MANY:
            self.arrivals.consider(answers)
        return answers

    def receive_trains(self) -> List[bytes]:
        answers: List[bytes] = []
        for octets, size, source in self.arrivals.read(self.association.relay.chunk, TURN):
            header = self.association.headers.get(source) or self.header(source)
            datagrams = cut(octets, size)
            if header:
                answers += [b"".join((header, datagram)) for datagram in datagrams]
            else:
                self.count_unasked(len(datagrams))
        return answers

    def count_unasked(self, number: int) -> None:
        """Datagrams of hosts that the client has not written to."""
        self.association.session.datagrams_down += number
        self.association.session.dropped_down += number

    def header(self, source: Tuple[str, int]) -> bytes:
        """The header for what this source sends; empty if the client has not written to it."""
        address = Address.of(source)
        if address.host not in self.association.contacted:
            return b""
        header = bytes(Datagram(address, b""))
        keep(self.association.headers, source, header)
        return header


def neighbours(headers: List[bytes], datagrams: List[memoryview]) -> Iterable[Tuple[bytes, List[memoryview]]]:
    """Each header with its datagrams, of those that are next to each other."""
    if headers and headers.count(headers[0]) == len(headers):      # as it usually is, and as groupby() needs longer for
        return ((headers[0], datagrams),)
    pairs = groupby(zip(headers, datagrams), key=itemgetter(0))
    return ((header, [octets for _header, octets in group]) for header, group in pairs)


def path_to(sock: socket.socket, sockaddr: SockAddr) -> Path:
    """For payloads to this address."""
    return Path(lambda payload: sock.sendto(payload, sockaddr), sock, sockaddr)


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
