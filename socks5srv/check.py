"""
Questions of RFC 1928 and RFC 1929 to any SOCKS5 server: ``python -m socks5srv.check HOST:PORT``.

Each question is a function of a few lines: it talks to the server as a client, plays the target as
well, and returns what it has observed, or raises `Wrong` (the RFC says otherwise, or octets are
lost), `Odd` (the RFC leaves it open, and most servers do it in another way) or `Unasked`.  The
decorator in front of it says what is asked, and what is expected.

The one idea: nothing waits for "nothing happens".  Whatever must not come is followed by something
that must, and the order tells.  Every step has a deadline, and there is never more than one
connection to the server, so that servers for one client at a time can be examined, too.

The targets are on this computer, and on its loopback unless `--target` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from io import BytesIO
from ipaddress import ip_address
from select import select
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .client import Conversation, Proxy, dial
from .names import ascii_form
from .protocol import (
    UNSPECIFIED, VER, Address, AddressType, Command, Credentials, CredentialsReply, Datagram, Greeting, Method, MethodSelection,
    ProtocolError, Reply, ReplyCode, Request, Socks5Error,
)

TIMEOUT = 5.0           # seconds for each step
CLOSING = 10.0          # seconds from a failure to the end of the connection; RFC 1928 section 6
PAUSE = 0.01            # seconds between octets that are not to travel together
MUCH = bytes(range(256)) * 4096     # 1 MiB
RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)    # SO_LINGER: close() sends RST
NO_SUCH_HOST = "no-such-host.invalid"       # RFC 6761
PRIVATE = 0x80          # a method that nobody has heard of
NONE, LOGIN, FF = Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD, Method.NO_ACCEPTABLE_METHODS


class Wrong(Exception):
    """Observed: something that the RFC has otherwise."""


class Odd(Exception):
    """Observed: something that the RFC leaves open, and most have otherwise."""


class Unasked(Exception):
    """Why the question makes no sense here."""


class Question(NamedTuple):
    name: str
    section: str
    text: str
    expected: str
    ask: Callable[[Examiner], str]


class Answer(NamedTuple):
    name: str
    section: str
    question: str
    expected: str
    observed: str
    verdict: str            # pass, fail, warn or skip


QUESTIONS: List[Question] = []


def question(section: str, text: str, expected: str) -> Callable[[Callable[[Examiner], str]], Callable[[Examiner], str]]:
    def add(ask: Callable[[Examiner], str]) -> Callable[[Examiner], str]:
        QUESTIONS.append(Question(ask.__name__, section, text, expected, ask))
        return ask

    return add


# --- the examiner ---

class Talk(Conversation):
    """A conversation with the server that remembers what was said, and closes at the end of its block."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        super().__init__(sock, time.monotonic() + timeout)
        self.timeout = timeout
        self.heard = b""

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.socket.close()

    def read(self, n: int = -1, /) -> bytes:
        octets = super().read(n)
        self.heard += octets
        return octets

    def drip(self, octets: bytes) -> None:
        """Send every octet in a segment of its own."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(octets)):
            self.write(octets[i:i + 1])
            time.sleep(PAUSE)

    def choose(self, *methods: int) -> int:
        """Offer these methods; the one that the server selects."""
        self.send(Greeting(bytes(methods)))
        return self.receive(MethodSelection).method

    def log_in_as(self, username: bytes, password: bytes) -> int:
        """The status of the login."""
        if self.choose(LOGIN) != LOGIN:
            raise Unasked("the server does not select method 02")
        self.send(Credentials(username, password))
        return self.receive(CredentialsReply).status

    def request(self, command: Command, destination: Address) -> Reply:
        self.send(Request(command, destination))
        return self.receive(Reply)

    def ends(self, seconds: float) -> bool:
        """Whether the server closes the connection, whatever it says before."""
        self.until = time.monotonic() + seconds
        try:
            while True:
                self.read(4096)
        except socket.timeout:
            return False
        except (ProtocolError, OSError):        # a reset is an end, too
            return True

    def exactly(self, n: int) -> bytes:
        octets = b""
        while len(octets) < n:
            octets += self.read(n - len(octets))
        return octets


class Examiner:
    """Who asks the questions: where the server is, who we are, and where the targets are."""

    def __init__(self, proxy: Proxy, target: Optional[str] = None, timeout: float = TIMEOUT) -> None:
        self.proxy = proxy
        self.timeout = timeout
        self.name = (target or "localhost").partition("%")[0]      # a zone says nothing to the server
        self.hosts: Dict[AddressType, str] = {AddressType.IPV4: "127.0.0.1", AddressType.IPV6: "::1"}
        if target is not None:
            literal = Address.of(socket.getaddrinfo(ascii_form(target), None)[0][4])
            self.hosts = {literal.address_type: literal.zoned}
        self.wants_a_login = False

    def examine(self) -> List[Answer]:
        """Ask all questions.  OSError if there is nobody to ask."""
        with self.talk() as talk:
            talk.send(Greeting(bytes([NONE])))
            try:
                self.wants_a_login = talk.receive(MethodSelection).method != NONE
            except (Socks5Error, OSError):      # which the questions will find out
                pass
        return [self.answer(question) for question in QUESTIONS]

    def answer(self, question: Question) -> Answer:
        def found(observed: object, verdict: str) -> Answer:
            return Answer(question.name, question.section, question.text, question.expected, str(observed), verdict)

        try:
            return found(question.ask(self), "pass")
        except Unasked as reason:
            return found(reason, "skip")
        except Odd as observed:
            return found(observed, "warn")
        except socket.timeout:
            return found(f"nothing within {self.timeout:g} s", "fail")
        except (Wrong, Socks5Error) as observed:
            return found(observed, "fail")
        except OSError as error:
            return found(f"the connection breaks: {error.strerror or error}", "fail")

    # --- what the questions need ---

    def talk(self) -> Talk:
        return Talk(dial(self.proxy, time.monotonic() + self.timeout), self.timeout)

    def need_a_login(self) -> None:
        if self.wants_a_login and not self.proxy.username:
            raise Unasked("the server wants a login: --user NAME:PASSWORD")

    def ready(self) -> Talk:
        """A talk in which the request comes next."""
        self.need_a_login()
        talk = self.talk()
        try:
            talk.negotiate(self.proxy)
        except BaseException:
            talk.socket.close()
            raise
        return talk

    def host(self, kind: AddressType = AddressType.IPV4) -> str:
        if kind not in self.hosts or not can_bind(self.hosts[kind]):
            raise Unasked(f"no target of the type {kind.name}: see --target")
        return self.hosts[kind]

    def any_host(self) -> str:
        """The address to use where any will do."""
        return next(iter(self.hosts.values()))

    def target(self, *hosts: str) -> Target:
        """Somebody who listens, on the same port of all these addresses."""
        for _ in range(10):
            try:
                return Target(hosts or (self.any_host(),), self.timeout)
            except OSError:         # at one of the others somebody has the port
                pass
        raise Unasked("no port that is free at all addresses of this computer")

    @contextmanager
    def tunnel(self) -> Iterator[Tuple[Talk, socket.socket]]:
        """Both ends of a connection through the server."""
        with self.target() as target, self.ready() as talk:
            succeeded(talk.request(Command.CONNECT, target.address))
            with target.accept() as accepted:
                yield talk, accepted

    @contextmanager
    def binding(self, expected: Optional[str] = None) -> Iterator[Tuple[Talk, Address]]:
        """A server that waits for a call, and where."""
        with self.ready() as talk:
            reply = talk.request(Command.BIND, Address.numeric(expected or self.any_host(), 0))
            offered(reply, Command.BIND)
            yield talk, talk.here(reply.bound)

    @contextmanager
    def association(self) -> Iterator[Tuple[Talk, Relay]]:
        with self.ready() as talk:
            reply = talk.request(Command.UDP_ASSOCIATE, UNSPECIFIED)
            offered(reply, Command.UDP_ASSOCIATE)
            with self.udp(Address.of(talk.socket.getsockname()).zoned) as sock:
                yield talk, Relay(sock, talk.here(reply.bound))

    def stranger(self) -> str:
        """Another address of this computer, from which nobody expects us."""
        host = "127.0.0.3" if self.any_host() == "127.0.0.2" else "127.0.0.2"
        if ":" in self.any_host() or not ip_address(self.any_host()).is_loopback:
            raise Unasked("only with a target on loopback")
        if not can_bind(host):
            raise Unasked("127.0.0.1 is the only loopback address here")
        return host

    def free_port(self, host: Optional[str] = None) -> Tuple[Any, ...]:
        """For bind(): one of this host, or of any."""
        return Address.numeric(host or self.any_host(), 0).sockaddr

    def call(self, address: Address, host: Optional[str] = None) -> socket.socket:
        """A connection to this address, from this host or from any."""
        return socket.create_connection((address.zoned, address.port), self.timeout, self.free_port(host))

    def udp(self, host: Optional[str] = None) -> socket.socket:
        sock = socket.socket(family_of(host or self.any_host()), socket.SOCK_DGRAM)
        sock.settimeout(self.timeout)
        sock.bind(self.free_port(host))
        return sock


class Target:
    """One or more sockets that listen on one port."""

    def __init__(self, hosts: Sequence[str], timeout: float) -> None:
        self.timeout = timeout
        self.listeners: List[socket.socket] = []
        try:
            for host in hosts:
                self.listeners.append(socket.socket(family_of(host)))
                self.listeners[-1].bind(Address.numeric(host, self.address.port if len(self.listeners) > 1 else 0).sockaddr)
                self.listeners[-1].listen(5)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_exception: object) -> None:
        for listener in self.listeners:
            listener.close()

    @property
    def address(self) -> Address:
        return Address.of(self.listeners[0].getsockname())

    @property
    def called(self) -> bool:
        """Whether somebody has connected."""
        return bool(select(self.listeners, [], [], 0)[0])

    def accept(self) -> socket.socket:
        ready = select(self.listeners, [], [], self.timeout)[0]
        if not ready:
            raise Wrong("nobody connects to the target")
        accepted = ready[0].accept()[0]
        accepted.settimeout(self.timeout)
        return accepted


class Relay:
    """The server's UDP relay, and the socket that we use it with."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.socket = sock
        self.address = address

    def send(self, message: object) -> None:
        """A `Datagram`, or octets that are none."""
        self.socket.sendto(bytes(message), self.address.sockaddr)     # type: ignore[call-overload]

    def receive(self) -> Datagram:
        return Datagram.read(BytesIO(self.socket.recv(65535)))


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def as_told(sockaddr: Tuple[Any, ...]) -> Address:
    """The address of a socket as a message names it: without its zone."""
    return Address.of(sockaddr)._replace(scope=0)


def can_bind(host: str) -> bool:
    try:
        with socket.socket(family_of(host)) as sock:
            sock.bind(Address.numeric(host, 0).sockaddr)
    except OSError:
        return False
    return True


def words(reply: Reply) -> str:
    """A reply's code, and what it means."""
    return f"{reply.code:02x} {reply.code.phrase}" if isinstance(reply.code, ReplyCode) else f"{reply.code:02x}, which means nothing"


def succeeded(reply: Reply) -> Reply:
    if reply.code != ReplyCode.SUCCEEDED:
        raise Wrong(words(reply))
    return reply


def failed(reply: Reply, *usual: ReplyCode) -> str:
    """A reply that has to be a failure, of one of the usual codes if there are any."""
    if reply.code == ReplyCode.SUCCEEDED or not isinstance(reply.code, ReplyCode):
        raise Wrong(words(reply))
    if usual and reply.code not in usual:
        raise Odd(words(reply))
    return words(reply)


def offered(reply: Reply, command: Command) -> None:
    if reply.code == ReplyCode.COMMAND_NOT_SUPPORTED:
        raise Unasked(f"the server has no {command.name}")
    succeeded(reply)


def arrives(octets: bytes, one: socket.socket, other: socket.socket) -> None:
    """What one sends, the other receives; both with a timeout."""
    one.sendall(octets)
    received = b""
    while len(received) < len(octets):
        more = other.recv(65536)
        if not more:
            raise Wrong(f"the connection ends after {len(received)} of {len(octets)} octets")
        received += more
    if received != octets:
        raise Wrong("other octets than were sent")


def rest(sock: socket.socket) -> bytes:
    """All that comes until the end."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def silent_refusal(talk: Talk) -> str:
    """The failure reply that follows, or the end, which refuses as well."""
    try:
        return failed(talk.receive(Reply))
    except (ProtocolError, ConnectionError):
        return "closed"


# --- RFC 1928 section 3: method negotiation ---

NEGOTIATION = "RFC 1928 section 3"


def selected(e: Examiner, methods: Sequence[int], *right: int) -> str:
    """What the server selects of these methods."""
    with e.talk() as talk:
        method = talk.choose(*methods)
    if method not in right:
        raise Wrong(f"{method:02x}")
    return f"{method:02x}"


@question(NEGOTIATION, "A client offers method 00 alone: what is selected?", "00, or FF for a login")
def no_login(e: Examiner) -> str:
    method = selected(e, [NONE], NONE, FF)
    if e.proxy.username and method == "00":
        raise Odd("00: nobody has to log in")
    return method


@question(NEGOTIATION, "It offers 00 and 02?", "one of them")
def both_methods(e: Examiner) -> str:
    return selected(e, [NONE, LOGIN], NONE, LOGIN)


@question(NEGOTIATION, "It offers only methods that nobody knows?", "FF")
def unknown_methods(e: Examiner) -> str:
    return selected(e, [PRIVATE, PRIVATE + 1], FF)


@question(NEGOTIATION, "It offers FF, which is no method?", "FF")
def offer_of_ff(e: Examiner) -> str:
    return selected(e, [FF], FF)


@question(NEGOTIATION, "It offers 255, the last of them a good one?", "the last one")
def many_methods(e: Examiner) -> str:
    wanted = LOGIN if e.wants_a_login else NONE
    return selected(e, [PRIVATE] * 254 + [wanted], wanted)


@question(NEGOTIATION, "It offers none (NMETHODS 00)?", "FF, or the end")
def no_methods(e: Examiner) -> str:
    try:
        return selected(e, [], FF)
    except socket.timeout:
        raise Odd("nothing, and it waits") from None
    except (ProtocolError, ConnectionError):
        return "closed"


@question(NEGOTIATION, "Is the connection over after FF?", "closed")
def end_after_ff(e: Examiner) -> str:
    with e.talk() as talk:
        talk.send(Greeting(bytes([PRIVATE])))
        if talk.ends(CLOSING):
            return "closed"
    raise Odd(f"still open after {CLOSING:g} s")


@question(NEGOTIATION, "Is a method selected if VER is 04?", "no")
def other_version(e: Examiner) -> str:
    with e.talk() as talk:
        talk.write(b"\x04" + bytes(Greeting(bytes([NONE])))[1:])
        quietly(talk.socket.shutdown, socket.SHUT_WR)           # it may have hung up by now
        try:
            talk.exactly(2)
        except (ProtocolError, ConnectionError):
            return "closed"
        except socket.timeout:
            raise Odd("nothing, and it waits") from None
    if talk.heard[0] == VER and talk.heard[1] != FF:
        raise Wrong(talk.heard.hex())
    return talk.heard.hex()


@question(NEGOTIATION, "May messages come octet by octet?", "yes")
def octet_by_octet(e: Examiner) -> str:
    e.need_a_login()
    with e.target() as target, e.talk() as talk:
        talk.drip(bytes(Greeting(bytes([LOGIN if e.wants_a_login else NONE]))))
        talk.receive(MethodSelection)
        if e.wants_a_login:
            talk.drip(bytes(Credentials(e.proxy.username, e.proxy.password)))
            talk.receive(CredentialsReply)
        talk.drip(bytes(Request(Command.CONNECT, target.address)))
        succeeded(talk.receive(Reply))
        target.accept().close()
    return "yes"


@question(NEGOTIATION, "May greeting and request come in one segment?", "yes")
def one_segment(e: Examiner) -> str:
    e.need_a_login()
    login = bytes(Credentials(e.proxy.username, e.proxy.password)) if e.wants_a_login else b""
    with e.target() as target, e.talk() as talk:
        talk.write(bytes(Greeting(bytes([LOGIN if login else NONE]))) + login + bytes(Request(Command.CONNECT, target.address)))
        try:
            talk.receive(MethodSelection)
            if login:
                talk.receive(CredentialsReply)
            succeeded(talk.receive(Reply))
        except (Wrong, Socks5Error, OSError) as error:
            raise Odd(f"no: {error}") from error
        target.accept().close()
    return "yes"


# --- RFC 1929 ---

RFC_1929 = "RFC 1929 section 2"


def refused_login(e: Examiner, username: bytes, password: bytes) -> str:
    with e.talk() as talk:
        try:
            status = talk.log_in_as(username, password)
        except (ProtocolError, ConnectionError) as error:
            if talk.heard[2:]:
                raise Wrong(str(error)) from error
            raise Odd("closed without an answer") from None
    if status == CredentialsReply.SUCCESS:
        raise Wrong("welcome")
    return f"status {status:02x}"


def other(octets: bytes) -> bytes:
    """Not the same."""
    return bytes([octets[0] ^ 1]) + octets[1:] if octets else b"!"


def name_and_password(e: Examiner) -> Tuple[bytes, bytes]:
    if not e.proxy.username:
        raise Unasked("no --user NAME:PASSWORD")
    return e.proxy.username, e.proxy.password


@question(RFC_1929, "Does the right login let in?", "STATUS 00")
def right_login(e: Examiner) -> str:
    with e.talk() as talk:
        status = talk.log_in_as(*name_and_password(e))
    if status != CredentialsReply.SUCCESS:
        raise Wrong(f"status {status:02x}")
    return "status 00"


@question(RFC_1929, "Does a wrong password?", "no: another STATUS")
def wrong_password(e: Examiner) -> str:
    name, password = name_and_password(e)
    return refused_login(e, name, other(password))


@question(RFC_1929, "Does a wrong name?", "no: another STATUS")
def wrong_name(e: Examiner) -> str:
    name, password = name_and_password(e)
    return refused_login(e, other(name), password)


@question(RFC_1929, "Does the right password with a NUL and more?", "no: another STATUS")
def password_with_nul(e: Examiner) -> str:
    name, password = name_and_password(e)
    if len(password) > 250:
        raise Unasked("the password is too long for it")
    return refused_login(e, name, password + b"\0more")


@question(RFC_1929, "Does an empty login?", "no: another STATUS")
def empty_login(e: Examiner) -> str:
    name_and_password(e)
    return refused_login(e, b"", b"")


@question(RFC_1929, "Does a wrong one of 255 octets each?", "no: another STATUS")
def long_login(e: Examiner) -> str:
    name_and_password(e)
    return refused_login(e, b"n" * 255, b"p" * 255)


@question(RFC_1929, "Is the connection over after a wrong login?", "closed")
def end_after_wrong_login(e: Examiner) -> str:
    name, password = name_and_password(e)
    with e.talk() as talk:
        if talk.log_in_as(name, other(password)) == CredentialsReply.SUCCESS:
            raise Wrong("welcome")
        if not talk.ends(CLOSING):
            raise Wrong(f"still open after {CLOSING:g} s")
    return "closed"


@question(RFC_1929, "Is a request after a wrong login carried out?", "no")
def request_after_wrong_login(e: Examiner) -> str:
    name, password = name_and_password(e)
    with e.talk() as talk:
        return not_carried_out(e, talk, bytes(Credentials(name, other(password))))


@question(RFC_1929, "Is a request instead of the login?", "no")
def request_instead_of_login(e: Examiner) -> str:
    name_and_password(e)
    with e.talk() as talk:
        return not_carried_out(e, talk, b"")


def not_carried_out(e: Examiner, talk: Talk, before: bytes) -> str:
    with e.target() as target:
        if talk.choose(LOGIN) != LOGIN:
            raise Unasked("the server does not select method 02")
        talk.write(before + bytes(Request(Command.CONNECT, target.address)))
        quietly(talk.socket.shutdown, socket.SHUT_WR)
        talk.ends(e.timeout)
        if target.called:
            raise Wrong("yes")
    return "no"


# --- RFC 1928 sections 4 to 6: CONNECT ---

CONNECT, REPLIES = "RFC 1928 section 4", "RFC 1928 section 6"


def connects(e: Examiner, target: Target, destination: Address) -> Reply:
    with e.ready() as talk:
        reply = succeeded(talk.request(Command.CONNECT, destination))
        with target.accept() as accepted:
            talk.socket.settimeout(e.timeout)
            arrives(b"there", talk.socket, accepted)
            arrives(b"and back", accepted, talk.socket)
    return reply


@question(CONNECT, "CONNECT to an IPv4 address (ATYP 01)", "00, and octets both ways")
def connect_ipv4(e: Examiner) -> str:
    with e.target(e.host(AddressType.IPV4)) as target:
        return words(connects(e, target, target.address))


@question(CONNECT, "CONNECT to a name (ATYP 03)", "00, and octets both ways")
def connect_name(e: Examiner) -> str:
    with e.target(*filter(can_bind, e.hosts.values())) as target:
        return words(connects(e, target, Address(e.name, target.address.port, AddressType.DOMAINNAME)))


@question(CONNECT, "CONNECT to an IPv6 address (ATYP 04)", "00, and octets both ways")
def connect_ipv6(e: Examiner) -> str:
    with e.target(e.host(AddressType.IPV6)) as target:
        try:
            return words(connects(e, target, target.address))
        except Wrong as error:
            raise Odd(str(error)) from error        # it may have no IPv6


@question(CONNECT, "CONNECT to an address written as a name, as browsers do", "00, and octets both ways")
def connect_literal_name(e: Examiner) -> str:
    with e.target() as target:
        try:
            return words(connects(e, target, target.address._replace(address_type=AddressType.DOMAINNAME)))
        except (Wrong, Socks5Error) as error:
            raise Odd(str(error)) from error


@question(CONNECT, "A request with an unknown CMD", "07")
def unknown_command(e: Examiner) -> str:
    return malformed(e, 1, 0x09, ReplyCode.COMMAND_NOT_SUPPORTED)


@question(CONNECT, "A request with an unknown ATYP", "08")
def unknown_address_type(e: Examiner) -> str:
    return malformed(e, 3, 0x02, ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED)


def malformed(e: Examiner, place: int, octet: int, *usual: ReplyCode) -> str:
    """The reply to a request with another octet in this place."""
    with e.target() as target, e.ready() as talk:
        request = bytearray(bytes(Request(Command.CONNECT, target.address)))
        request[place] = octet
        talk.write(bytes(request))
        try:
            return failed(talk.receive(Reply), *usual)
        except (ProtocolError, ConnectionError):
            raise Wrong("closed without a reply") from None


@question(CONNECT, "Is a request with VER 04 carried out?", "no")
def request_version(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.write(b"\x04" + bytes(Request(Command.CONNECT, target.address))[1:])
        quietly(talk.socket.shutdown, socket.SHUT_WR)           # so that nobody waits for more of whatever it is
        talk.ends(e.timeout)
        if target.called:
            raise Wrong("yes")
    return f"no: {talk.heard[2:].hex() or 'closed'}"


@question(CONNECT, "A request with RSV 01", "a reply")
def request_rsv(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.send(Request(Command.CONNECT, target.address, rsv=1))
        try:
            return words(talk.receive(Reply))
        except (ProtocolError, ConnectionError):
            raise Odd("closed without a reply") from None


@question(CONNECT, "CONNECT to a name of 0 octets", "a failure")
def empty_name(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.send(Request(Command.CONNECT, Address("", target.address.port, AddressType.DOMAINNAME)))
        return silent_refusal(talk)


@question(CONNECT, "CONNECT to a name with a NUL in it", "a failure")
def name_with_nul(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.send(Request(Command.CONNECT, Address(e.any_host() + "\0.example", target.address.port, AddressType.DOMAINNAME)))
        return silent_refusal(talk)


@question(REPLIES, "CONNECT to a target that refuses", "05")
def refused(e: Examiner) -> str:
    with socket.socket(family_of(e.any_host())) as sock, e.ready() as talk:
        sock.bind(e.free_port())                # and does not listen
        return failed(talk.request(Command.CONNECT, Address.of(sock.getsockname())), ReplyCode.CONNECTION_REFUSED)


@question(REPLIES, "CONNECT to a name that does not exist", "04")
def unknown_name(e: Examiner) -> str:
    with e.ready() as talk:
        try:
            return failed(talk.request(Command.CONNECT, Address(NO_SUCH_HOST, 80, AddressType.DOMAINNAME)), ReplyCode.HOST_UNREACHABLE)
        except socket.timeout:
            raise Odd(f"nothing within {e.timeout:g} s") from None      # its resolver may be slow


@question(REPLIES, "Is the connection over soon after a failure?", f"within {CLOSING:g} s")
def end_after_failure(e: Examiner) -> str:
    with socket.socket(family_of(e.any_host())) as sock, e.ready() as talk:
        sock.bind(e.free_port())
        failed(talk.request(Command.CONNECT, Address.of(sock.getsockname())))
        if not talk.ends(CLOSING):
            raise Wrong(f"still open after {CLOSING:g} s")
    return "closed"


@question(REPLIES, "Is RSV of a reply 00?", "00")
def reply_rsv(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        before = len(talk.heard)
        succeeded(talk.request(Command.CONNECT, target.address))
        rsv = talk.heard[before + 2]
    if rsv:
        raise Wrong(f"{rsv:02x}")
    return "00"


@question(REPLIES, "BND.ADDR and BND.PORT of CONNECT", "what the target sees")
def bound_address(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        bound = succeeded(talk.request(Command.CONNECT, target.address)).bound
        with target.accept() as accepted:
            seen = as_told(accepted.getpeername())
    if bound != seen:
        raise Odd(f"{bound}, and the target sees {seen}")
    return str(bound)


# --- what is carried ---

@question(REPLIES, "Does the reply come before what the target says?", "yes")
def reply_first(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.send(Request(Command.CONNECT, target.address))
        with target.accept() as accepted:
            accepted.sendall(b"220 hello")
            succeeded(talk.receive(Reply))
            if talk.exactly(9) != b"220 hello":
                raise Wrong("other octets than were sent")
    return "yes"


@question(REPLIES, "Are octets right behind the request kept for the target?", "yes")
def early_data(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.write(bytes(Request(Command.CONNECT, target.address)) + b"early, ")
        with target.accept() as accepted:
            succeeded(talk.receive(Reply))
            talk.write(b"late")
            talk.socket.shutdown(socket.SHUT_WR)
            received = rest(accepted)
    if received != b"early, late":
        raise Wrong(f"{received!r} arrives")
    return "yes"


@question(REPLIES, "Do a million octets each way arrive, at the same time?", "yes")
def much_both_ways(e: Examiner) -> str:
    with e.tunnel() as (talk, target):
        talk.socket.settimeout(e.timeout)
        senders = [threading.Thread(target=send_all, args=(sock, MUCH), daemon=True) for sock in (talk.socket, target)]
        for sender in senders:
            sender.start()
        try:
            for sock in (target, talk.socket):
                if Talk(sock, e.timeout).exactly(len(MUCH)) != MUCH:
                    raise Wrong("other octets than were sent")
        finally:
            for sock in (target, talk.socket):
                quietly(sock.shutdown, socket.SHUT_RDWR)     # or a sender might wait for ever
            for sender in senders:
                sender.join(e.timeout)
    return "yes"


def send_all(sock: socket.socket, octets: bytes) -> None:
    quietly(sock.sendall, octets)


def quietly(function: Callable[[Any], object], argument: object) -> None:
    try:
        function(argument)
    except OSError:         # which the other end will tell
        pass


@question(REPLIES, "Can the client end its way and still hear the answer?", "yes")
def half_close_up(e: Examiner) -> str:
    with e.tunnel() as (talk, target):
        return half_closed(e, talk.socket, target)


@question(REPLIES, "Can the target end its way and still hear the client?", "yes")
def half_close_down(e: Examiner) -> str:
    with e.tunnel() as (talk, target):
        return half_closed(e, target, talk.socket)


def half_closed(e: Examiner, one: socket.socket, other: socket.socket) -> str:
    one.settimeout(e.timeout)
    other.settimeout(e.timeout)
    one.sendall(b"question")
    one.shutdown(socket.SHUT_WR)
    if rest(other) != b"question":
        raise Wrong("octets are lost before the end")
    try:
        other.sendall(b"answer")
        other.shutdown(socket.SHUT_WR)
        heard = rest(one)
    except socket.timeout:
        raise
    except OSError:             # both ways have been ended, and not this one alone
        heard = b""
    if heard != b"answer":
        raise Wrong("no: the answer is lost")
    return "yes"


@question(REPLIES, "Does a reset arrive as one (and not as if all had come)?", "yes")
def reset(e: Examiner) -> str:
    with e.tunnel() as (talk, target):
        arrives(b"half of it", target, talk.socket)
        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        target.close()
        try:
            talk.read(1)
        except ConnectionError:
            return "yes"
        except ProtocolError:
            raise Odd("as a clean end") from None
    raise Wrong("as octets")


# --- BIND ---

BIND = "RFC 1928 section 6, BIND"


@question(BIND, "Is there BIND?", "00")
def bind_there(e: Examiner) -> str:
    return there_is(e, Command.BIND, Address.numeric(e.any_host(), 0))


def there_is(e: Examiner, command: Command, destination: Address) -> str:
    with e.ready() as talk:
        try:
            reply = talk.request(command, destination)
        except (ProtocolError, ConnectionError):
            raise Wrong("closed without a reply, where 07 would say no") from None
    if reply.code == ReplyCode.COMMAND_NOT_SUPPORTED:
        raise Odd(words(reply))
    if succeeded(reply).bound.is_unspecified or not reply.bound.port:
        raise Odd(f"00, at {reply.bound}, which clients have to guess about")
    return f"00, at {reply.bound}"


@question(BIND, "The second reply, when somebody has called", "00, BND is the caller")
def bind_second_reply(e: Examiner) -> str:
    with e.binding() as (talk, address), e.call(address) as peer:
        reply = succeeded(talk.receive(Reply))
        if reply.bound != as_told(peer.getsockname()):
            raise Wrong(f"{reply.bound}, and the caller is {as_told(peer.getsockname())}")
        talk.socket.settimeout(e.timeout)
        arrives(b"there", talk.socket, peer)
        arrives(b"and back", peer, talk.socket)
    return words(reply)


@question(BIND, "Is a caller from another host than DST.ADDR let in?", "no")
def bind_stranger(e: Examiner) -> str:
    stranger = e.stranger()
    with e.binding() as (talk, address), e.call(address, stranger):
        # The one who is expected calls second, so whoever is named first has been let in.
        try:
            with e.call(address) as peer:
                reply = talk.receive(Reply)
                expected = as_told(peer.getsockname())
        except ConnectionError:         # it has ended with the stranger
            reply, expected = talk.receive(Reply), UNSPECIFIED
    if reply.code == ReplyCode.SUCCEEDED and reply.bound != expected:
        raise Wrong("yes")
    return "no, and the other one is" if reply.code == ReplyCode.SUCCEEDED else f"no: {words(reply)}"


@question(BIND, "Does it still listen when the client has gone?", "no")
def bind_client_gone(e: Examiner) -> str:
    with e.binding() as (_talk, address):
        pass
    for _ in range(5):
        time.sleep(e.timeout / 10)          # it may need a moment to notice
        try:
            dial(Proxy(address.zoned, address.port), time.monotonic() + e.timeout).close()
        except socket.timeout:
            break
        except OSError:
            return "no"
    raise Odd("yes")


# --- UDP ASSOCIATE ---

UDP, HEADER = "RFC 1928 section 6, UDP ASSOCIATE", "RFC 1928 section 7"


@question(UDP, "Is there UDP ASSOCIATE?", "00")
def udp_there(e: Examiner) -> str:
    return there_is(e, Command.UDP_ASSOCIATE, UNSPECIFIED)


@question(UDP, "Does the association end with its TCP connection?", "yes")
def udp_lifetime(e: Examiner) -> str:
    with e.udp() as target, e.association() as (talk, relay):
        there = Address.of(target.getsockname())
        echoes(e, relay, target, there, b"question")
        talk.socket.close()
        until = time.monotonic() + e.timeout
        target.settimeout(0.25)
        while time.monotonic() < until:         # it may need a moment to notice
            try:
                relay.send(Datagram(there, b"still there?"))
                target.recv(100)
            except OSError:
                return "yes"
    raise Wrong(f"no, not within {e.timeout:g} s")


def datagram_arrives(e: Examiner, relay: Relay, target: socket.socket, destination: Address, data: bytes) -> Tuple[bytes, Any]:
    """What the target gets, and from where."""
    relay.send(Datagram(destination, data))
    try:
        return target.recvfrom(65535)
    except socket.timeout:
        raise Wrong(f"nothing arrives within {e.timeout:g} s") from None


def echoes(e: Examiner, relay: Relay, target: socket.socket, destination: Address, data: bytes) -> Datagram:
    """The answer of a target that sends the data back."""
    received, source = datagram_arrives(e, relay, target, destination, data)
    if received != data:
        raise Wrong(f"{len(received)} octets arrive, and not the {len(data)} that were sent")
    target.sendto(received, source)
    try:
        answer = relay.receive()
    except socket.timeout:
        raise Wrong(f"no answer within {e.timeout:g} s") from None
    if answer.data != data:
        raise Wrong("the answer is another one")
    return answer


@question(HEADER, "Datagrams to an IPv4 address, and the answers", "the target's address in front")
def udp_ipv4(e: Examiner) -> str:
    return udp_to(e, e.host(AddressType.IPV4))


@question(HEADER, "Datagrams to an IPv6 address, and the answers", "the target's address in front")
def udp_ipv6(e: Examiner) -> str:
    host = e.host(AddressType.IPV6)
    try:
        return udp_to(e, host)
    except (Wrong, OSError) as error:
        raise Odd(str(error)) from error


def udp_to(e: Examiner, host: str) -> str:
    with e.udp(host) as target, e.association() as (_talk, relay):
        destination = as_told(target.getsockname())
        answer = echoes(e, relay, target, destination, b"question")
    if answer.address != destination:
        raise Wrong(f"the answer is said to be from {answer.address}")
    if answer.rsv or answer.frag:
        raise Wrong(f"RSV {answer.rsv:04x}, FRAG {answer.frag:02x}")
    return "yes"


@question(HEADER, "Datagrams to a name, and the answers", "both arrive")
def udp_name(e: Examiner) -> str:
    with ExitStack() as stack:
        target = stack.enter_context(e.udp(e.any_host()))
        _talk, relay = stack.enter_context(e.association())
        echoes(e, relay, target, Address(e.name, target.getsockname()[1], AddressType.DOMAINNAME), b"question")
    return "yes"


@question(HEADER, "Fragments (FRAG not 00)", "dropped, or put together")
def udp_fragments(e: Examiner) -> str:
    with e.udp() as target, e.association() as (_talk, relay):
        there = Address.of(target.getsockname())
        relay.send(Datagram(there, b"one ", 0x01))
        relay.send(Datagram(there, b"two", 0x02 | Datagram.LAST_FRAGMENT))
        received, _source = datagram_arrives(e, relay, target, there, b"whole")
    verdicts = {b"whole": "dropped", b"one two": "put together"}
    if received not in verdicts:
        raise Wrong(f"{received!r} arrives")
    return verdicts[received]


@question(HEADER, "Are datagrams of another host than the client's dropped?", "yes")
def udp_stranger(e: Examiner) -> str:
    stranger = e.stranger()
    with e.udp() as target, e.association() as (_talk, relay), e.udp(stranger) as sock:
        if ":" in relay.address.host:
            raise Unasked("only for a relay on 127.0.0.1")
        there = Address.of(target.getsockname())
        sock.sendto(bytes(Datagram(there, b"stranger")), relay.address.sockaddr)
        received, _source = datagram_arrives(e, relay, target, there, b"client")
    if received != b"client":
        raise Wrong("no")
    return "yes"


@question(HEADER, "Does the relay outlive datagrams without a sense?", "yes")
def udp_nonsense(e: Examiner) -> str:
    with e.udp() as target, e.association() as (_talk, relay):
        there = Address.of(target.getsockname())
        whole = bytes(Datagram(there, b""))
        for octets in (b"", b"\0", whole[:3], whole[:-1], whole[:3] + b"\x02" + whole[4:], b"\xff" * 64):
            relay.send(octets)
        echoes(e, relay, target, there, b"question")
    return "yes"


@question(HEADER, "Does an empty payload arrive?", "yes")
def udp_empty(e: Examiner) -> str:
    with e.udp() as target, e.association() as (_talk, relay):
        there = Address.of(target.getsockname())
        relay.send(Datagram(there, b""))
        received, _source = datagram_arrives(e, relay, target, there, b"next")
        if received:
            raise Odd("no: it is dropped")
        if target.recv(100) != b"next":
            raise Wrong("and then nothing does")
    return "yes"


@question(HEADER, "How large may a payload be?", "8192 octets at least")
def udp_large(e: Examiner) -> str:
    with e.udp() as target, e.association() as (_talk, relay):
        there = Address.of(target.getsockname())
        largest = 0
        for size in (512, 1472, 8192, 32768, 65000):
            try:
                echoes(e, relay, target, there, b"x" * size)
            except (Wrong, OSError):
                break
            largest = size
    if largest < 8192:
        raise Odd(f"{largest} octets")
    return f"{largest} octets"


# --- the program ---

def table(answers: Sequence[Answer]) -> str:
    """The answers for people, section by section."""
    widths = [max(len(answer[column]) for answer in answers) for column in (2, 3)]
    lines: List[str] = []
    section = ""
    for answer in answers:
        if answer.section != section:
            section = answer.section
            lines += [*[""] * bool(lines), section]
        lines.append(f"  {answer.verdict}  {answer.question:<{widths[0]}}  {answer.expected:<{widths[1]}}  {answer.observed}")
    return "\n".join(lines)


def counts(answers: Sequence[Answer]) -> Dict[str, int]:
    return {verdict: sum(answer.verdict == verdict for answer in answers) for verdict in ("pass", "fail", "warn", "skip")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m socks5srv.check", allow_abbrev=False,
        description="Ask a SOCKS5 server the questions of RFC 1928 and RFC 1929.",
        epilog="Exit codes: 0 nothing failed, 1 something did, 2 usage.",
    )
    parser.add_argument("server", metavar="HOST:PORT", help="where the server is")
    parser.add_argument("--user", metavar="NAME:PASSWORD", help="the login, where one is required")
    parser.add_argument("--json", action="store_true", help="the answers for programs")
    parser.add_argument("--target", metavar="HOST",
                        help="an address of this computer that the server can reach (default: its loopback, for a server on it)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="S", help=f"seconds for each step (default: {TIMEOUT:g})")
    return parser


def examiner(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Examiner:
    host, _colon, port = options.server.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536) or (":" in host and host[0] + host[-1] != "[]"):
        parser.error(f"{options.server!r} is no HOST:PORT, such as 127.0.0.1:1080 or [::1]:1080")
    name, colon, password = (options.user or "").partition(":")
    if options.user is not None and not (name and colon and len(name.encode()) < 256 and len(password.encode()) < 256):
        parser.error("the login is NAME:PASSWORD, each of 255 octets at most")
    if not 0 < options.timeout < 1000:
        parser.error("the timeout is a number of seconds above 0")
    proxy = Proxy(host.strip("[]"), int(port), name.encode(), password.encode())
    try:
        here = all(ip_address(row[4][0]).is_loopback for row in socket.getaddrinfo(ascii_form(proxy.host), proxy.port))
    except (OSError, UnicodeError) as error:
        parser.error(f"{proxy.host!r} is no host: {getattr(error, 'strerror', None) or error}")
    if options.target is None and not here:
        parser.error("the server is on another computer: --target has to say how it can reach this one")
    try:
        found = Examiner(proxy, options.target, options.timeout)
    except (OSError, UnicodeError):
        parser.error(f"--target {options.target} is no host")
    if options.target is not None and not can_bind(found.any_host()):
        parser.error(f"--target {options.target} is not an address of this computer")
    return found


def main(words: Optional[Sequence[str]] = None) -> int:
    """Ask, print, and return the exit code."""
    parser = build_parser()
    options = parser.parse_args(words)
    asking = examiner(parser, options)
    try:
        answers = asking.examine()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"{parser.prog}: error: nobody to ask at {options.server}: {error.strerror or error}", file=sys.stderr)
        return 1
    summary = counts(answers)
    if options.json:
        print(json.dumps({"server": options.server, "counts": summary, "answers": [answer._asdict() for answer in answers]}, indent=2))
    else:
        print(table(answers))
        print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in summary.items()))
    return 1 if summary["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
