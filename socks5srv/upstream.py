"""
Another proxy in front of us: every command of our clients goes through one more SOCKS5 server.

    client  --->  this server  --->  the upstream  --->  target

    class Chained(UpstreamHandler):
        upstream = "socks5h://anna:sesame@192.0.2.1:1080"

or, to log in there by Kerberos, ``"socks5h+gssapi://proxy.example.com:1080"``: the way to it is encrypted then.

It is a handler like any other, with `connect()`, BIND and UDP ASSOCIATE overridden: to our client
it is the server, to the upstream a client (client.py).  Names are left to the upstream, under
either scheme.  What it answers is what our client gets, reply code and address; what goes
wrong with the upstream itself is reply 01, and the log says what.

The one idea: what is judged is what is sent on.  A name or a literal address can be judged here;
the addresses that a name has over there cannot.  So a rule that allows a network allows no names,
and one that denies a network does not see what is behind a name.

A chain may lead back to us, and would go in circles until the descriptors are used up.  When
suspiciously many clients wait for the upstream, we ask it for a name that does not exist; if we
are asked for that name ourselves, there is a loop, and all who wait are told so.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union
from weakref import WeakKeyDictionary

from . import outbound, resolver
from .client import Conversation, Proxy
from .descriptors import on_error
from .datagrams import Association, ControlConnection, Outcome, TargetSocket, dropped, header_length
from .names import ascii_form
from .outbound import ClientGone
from .protocol import UNSPECIFIED, Address, AddressType, Command, Datagram, ReplyCode, Request, RequestFailed, Socks5Error
from .relay import READ, WRITE
from .handler import Socks5Handler
from .trains import Path

SUSPICIOUS = 32     # clients that wait for the upstream at a time: a busy server, or a loop
UPSTREAM = "upstream"       # whose share of the look-ups it is: one runs at a time, for all clients that wait for it
LOOK_AGAIN = 60.0   # seconds until we ask once more whether there is a loop


class UpstreamHandler(Socks5Handler):
    """A handler that reaches everything through the proxy `upstream`."""

    upstream: Union[str, Proxy, None] = None    # to be set in a subclass, or on the server; see Proxy.parse()

    def setup(self) -> None:
        self._upstream_proxy = Proxy.parse(self.upstream if self.upstream is not None else self.server.upstream)
        self._loop = loops.setdefault(self.server, LoopDetector())
        self.session.upstream = Address.named(self._upstream_proxy.host, self._upstream_proxy.port)
        super().setup()

    # --- commands ---

    def perform(self, request: Request) -> None:
        if request.destination.host.lower() == self._loop.name:
            self.session.command, self.session.destination = request.command, request.destination
            self._loop.found()
            self.server.warn_once("loop", "the upstream %s leads back to this server: no client can be served", self._upstream_proxy)
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, LEADS_BACK)
        super().perform(request)

    def connect(self, request: Request) -> socket.socket:
        """A non-blocking socket to the upstream, on which it carries our client's octets."""
        call, bound = self._ask(request.command, self._judged(request), time.monotonic() + self.server.connect_timeout)
        self.session.bound = bound.literal or UNSPECIFIED   # some clients cannot read a name here
        self._target_coded = call.coded
        return call.socket

    def do_BIND(self, request: Request) -> None:
        """The upstream's two replies become ours."""
        until = time.monotonic() + self.server.bind_timeout
        call, bound = self._ask(request.command, self._judged(request), min(until, time.monotonic() + self.server.connect_timeout))
        with on_error(call.socket.close):
            self.succeed(call.here(bound))
            self._wait_for_peer(call.socket, until)
            peer = self._peer(call)
            self._target_coded = call.coded
        self.open_tunnel(call.socket, peer)

    def _peer(self, call: UpstreamConversation) -> Address:
        """Who has called the upstream, which says so already; not everybody may."""
        call.until = time.monotonic() + self.server.connect_timeout
        with self._target_errors():
            peer = call.success()
        call.socket.setblocking(False)
        peer = peer.literal or UNSPECIFIED
        self._check(Command.BIND, peer)
        return peer

    def _association(self) -> Association:
        call, bound = self._ask(Command.UDP_ASSOCIATE, UNSPECIFIED, time.monotonic() + self.server.connect_timeout)
        with on_error(call.socket.close):
            relay = call.here(bound).literal
            if relay is None:
                raise RequestFailed(ReplyCode.GENERAL_FAILURE, f"the upstream's UDP relay is {bound}, and that is no address")
            return ChainedAssociation(self, call, relay)

    # --- decisions ---

    def _judged(self, request: Request) -> Address:
        """What to ask the upstream for; RequestFailed 02 if it may not be reached."""
        if request.command is Command.BIND and request.destination.is_unspecified:
            self._check_anyone(request.command)
            return UNSPECIFIED
        address = spelled_out(request.destination)
        self._check(request.command, address)
        return address

    # --- the upstream ---

    def _ask(self, command: Command, destination: Address, until: float) -> Tuple[UpstreamConversation, Address]:
        """A call in which the upstream has said yes, its socket non-blocking, and the address in its reply."""
        with self._loop.one_more_waits() as suspicious:
            if suspicious:
                self._look_for_a_loop(until)
            if self._loop.is_there:
                raise RequestFailed(ReplyCode.GENERAL_FAILURE, LEADS_BACK)
            return self._ask_anyway(command, destination, until)

    def _ask_anyway(self, command: Command, destination: Address, until: float) -> Tuple[UpstreamConversation, Address]:
        with self._upstream_errors():
            call = self._call(until)
        with on_error(call.socket.close):
            with self._upstream_errors():
                call.negotiate(self._upstream_proxy, datagrams=command is Command.UDP_ASSOCIATE)
            with self._target_errors():
                bound = call.ask(command, destination)
            call.socket.setblocking(False)
        return call, bound

    def _call(self, until: float) -> UpstreamConversation:
        """A connection to the upstream."""
        addresses = self._addresses_of_upstream(until)
        if any(self.server.policy.is_own(Command.CONNECT, address) for address in addresses):
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, "it is this server itself")
        sock, self.session.peer = self._dial(addresses, until)
        return UpstreamConversation(sock, until, self.connection)

    def _addresses_of_upstream(self, until: float) -> List[Address]:
        proxy, place = self._upstream_proxy, Address.named(self._upstream_proxy.host, self._upstream_proxy.port)
        if place.literal is not None:
            return [place.literal.dialled]
        family = self.server.route.family
        look_up = resolver.LookUp(lambda host: resolver.look_up(host, family), proxy.host, UPSTREAM, (proxy.host, family))
        hosts = resolver.in_time(look_up, self.connection, until)
        return outbound.interleave(Address.numeric(host, proxy.port).dialled for host in hosts)

    def _look_for_a_loop(self, until: float) -> None:
        try:
            self._ask_anyway(Command.CONNECT, Address(self._loop.name, 1, AddressType.DOMAINNAME), until)[0].socket.close()
        except RequestFailed:       # as it should be: there is no such name
            pass

    @contextmanager
    def _upstream_errors(self) -> Iterator[None]:
        """Whatever goes wrong with the upstream itself is reply 01: the target has no part in it."""
        try:
            yield
        except ClientGone:
            raise
        except (OSError, ValueError, Socks5Error) as error:
            text = getattr(error, "strerror", None) or error
            raise RequestFailed(ReplyCode.GENERAL_FAILURE, f"upstream {self._upstream_proxy.host} port {self._upstream_proxy.port}: {text}") from error

    @contextmanager
    def _target_errors(self) -> Iterator[None]:
        """What the upstream says about the target is passed on; and silence then is the target's."""
        try:
            with self._upstream_errors():
                yield
        except RequestFailed as error:
            cause = error.__cause__
            if isinstance(cause, RequestFailed):
                raise RequestFailed(cause.code, str(error)) from error
            if isinstance(cause, socket.timeout):
                raise RequestFailed(ReplyCode.TTL_EXPIRED, str(error)) from error
            raise


LEADS_BACK = "the upstream leads back to this server"


class UpstreamConversation(Conversation):
    """A conversation with the upstream, given up when our own client leaves."""

    def __init__(self, sock: socket.socket, until: float, client: socket.socket) -> None:
        super().__init__(sock, until)
        self.client = client

    def receive_octets(self, n: int) -> bytes:
        self.wait(READ)
        return super().receive_octets(n)

    def write(self, octets: bytes) -> None:
        self.wait(WRITE)
        super().write(octets)       # which finds room for all of it: a message is short

    def wait(self, interest: int) -> None:
        if not outbound.wait({self.socket.fileno(): interest}, self.client, self.until):
            raise socket.timeout("it did not answer in time")


def spelled_out(address: Address) -> Address:
    """
    The address as it is to be judged and sent: an IP address as one, in whatever spelling it came, and a name in ASCII.

    Resolvers take 127.1 and 0x7f.1 for addresses.  Sent on as names they would pass the rules, and so would
    a name beyond ASCII that the upstream spells in another way.  RequestFailed 04 if there can be no such name.
    """
    if address.literal is not None:
        return address.literal.dialled
    with outbound.errors_as_replies(address):
        host = ascii_form(address.host)
    try:
        octets = socket.inet_aton(host)             # which knows all the spellings
    except OSError:
        return address._replace(host=host)
    return Address.numeric(socket.inet_ntoa(octets), address.port).dialled


class LoopDetector:
    """Whether the upstream leads back to us: known for a minute, and asked only under suspicion."""

    def __init__(self) -> None:
        self.name = f"{secrets.token_hex(16)}.invalid"      # RFC 6761: there is no such name
        self.lock = threading.Lock()
        self.waiting = 0
        self.next_look = self.until = 0.0                   # by time.monotonic()

    @contextmanager
    def one_more_waits(self) -> Iterator[bool]:
        """Count those who wait for the upstream; whether it is time to be suspicious."""
        with self.lock:
            self.waiting += 1
            suspicious = self.waiting >= SUSPICIOUS and time.monotonic() >= self.next_look
            if suspicious:
                self.next_look = time.monotonic() + LOOK_AGAIN
        try:
            yield suspicious
        finally:
            with self.lock:
                self.waiting -= 1

    def found(self) -> None:
        self.until = time.monotonic() + LOOK_AGAIN

    @property
    def is_there(self) -> bool:
        return time.monotonic() < self.until


loops: WeakKeyDictionary[Any, LoopDetector] = WeakKeyDictionary()       # one for each server


# --- UDP ---

class ChainedAssociation(Association):
    """
    A client's UDP relay whose outer side is the upstream's relay: a header leaves as it came.

    It lives in the relay thread, by both control connections.
    """

    def __init__(self, handler: UpstreamHandler, call: UpstreamConversation, relay: Address) -> None:
        super().__init__(handler, handler.server.relay_thread(), handler.here(), handler.server.route, handler.server.reassemble)
        with on_error(self.close):
            sock = udp_towards(relay, Address.of(call.socket.getsockname()), handler.server.route)
            if call.protection is not None:
                from .gssapi.protected import DATAGRAMS, protected

                sock = protected(sock, call.protection)
                self.client_socket.most = min(self.client_socket.most, DATAGRAMS)
            self.answers = Answers(self, sock)
        self.sockets += [self.answers, UpstreamControl(self, call.socket)]

    # --- in the relay thread ---

    def open_towards(self, addresses: Sequence[Address], name: Optional[str]) -> Outcome:
        """For the one address, or name, if it is allowed: the upstream's relay."""
        try:
            address = spelled_out(addresses[0])     # RequestFailed if there can be no such name
            self.check(address)
        except RequestFailed as error:
            return dropped(error)
        return self.answers.path_for(bytes(Datagram(address, b"")))

    def look_up(self, header: bytes, address: Address, payload: bytes) -> Outcome:
        """Not here: the name goes on as it is."""
        return self.remember(header, self.open_towards([address], None))

    def way_to(self, target: Path) -> str:
        return "It goes to the upstream's relay as it is."


class Answers(TargetSocket):
    """The socket that is connected to the upstream's relay, for the ways of all targets."""

    def path_for(self, header: bytes) -> Path:
        """On which a payload gets its header again."""
        return Path(lambda payload: self.socket.send(b"".join((header, payload))) - len(header), self.socket, singly=True)

    def ready(self, events: int) -> None:
        session, client_socket, chunk = self.association.session, self.association.client_socket, self.association.relay.chunk
        for _ in range(client_socket.most):
            try:
                octets = chunk[:self.socket.recv_into(chunk)]
            except BlockingIOError:
                break
            except OSError:             # an ICMP error of an earlier one
                continue
            length = header_length(octets)
            session.datagrams_down += 1
            if 0 < length <= len(octets) and not octets[2]:     # nor a fragment
                session.down += client_socket.path.send_run([octets], length)
            else:
                session.dropped_down += 1
        session.dropped_down += client_socket.path.take_lost()


class UpstreamControl(ControlConnection):
    """Our control connection to the upstream: its end is the end."""

    side = "upstream"


def udp_towards(relay: Address, here: Address, route: outbound.Route) -> socket.socket:
    """A UDP socket connected to `relay`, from the address that it expects us at, if we can; RequestFailed 08 if we may not."""
    sock = route.udp((here.zoned if here.address_type is relay.address_type else route.source_towards(relay) or relay.wildcard, 0))
    with on_error(sock.close):
        sock.connect(relay.sockaddr)
    return sock
