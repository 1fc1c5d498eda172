"""
Questions of RFC 1928 and RFC 1929 to any SOCKS5 server: ``socks5srv check HOST:PORT``; with ``--gssapi`` of RFC 1961, too.

Each question is an assertion, and a function of a few lines or a row in a table of such: it talks to the
server as a client, plays the target as well, and returns what it has observed (nothing, if that is just what
is expected), or raises `Wrong` (the RFC says otherwise, or octets are lost), `Odd` (the RFC leaves it open,
and most servers do it in another way) or `Unasked`.

The one idea: nothing waits for "nothing happens".  Whatever must not come is followed by something
that must, and the order tells.  Every step has a deadline, and there is never more than one
connection to the server, so that servers for one client at a time can be examined, too.

The targets are on this computer, and on its loopback unless `--target` says otherwise.  With ``--gssapi`` all that is asked
behind a login is wrapped.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import BytesIO
from ipaddress import ip_address
from itertools import groupby
from select import select
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

from .client import SERVICE, Conversation, Methods, NO_OTHERS, Proxy, dial
from .descriptors import on_error
from .gssapi.messages import Abort, ContextToken, Encapsulated, Level, LevelToken
from .names import ascii_form
from .protocol import (
    UNSPECIFIED, VER, Address, AddressType, Command, Credentials, CredentialsReply, Datagram, Greeting, LoginFailed, Method, MethodSelection,
    NoAcceptableMethod, ProtocolError, Reply, ReplyCode, Request, Socks5Error, read_exactly,
)
from .relay import RESET

if TYPE_CHECKING:
    from .gssapi.context import Initiator, Protection

TIMEOUT = 5.0           # seconds for each step
CLOSING = 10.0          # seconds from a failure to the end of the connection; RFC 1928 section 6
PAUSE = 0.01            # seconds between octets that are not to travel together
MUCH = bytes(range(256)) * 4096     # 1 MiB
PRIVATE = 0x80          # a method that no server knows
NONE, LOGIN, GSSAPI, FF = Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD, Method.GSSAPI, Method.NO_ACCEPTABLE_METHODS
CLOSED = ProtocolError, ConnectionError     # what a read raises if the server has closed the connection
SILENCES = 5            # of them in a row, the questions end: each takes seconds
OTHERS = {"HTTP": [b"HT", b"<!", b"<h"], "SSH": [b"SS"], "TLS": [b"\x15\x03"], "FTP or SMTP": [b"22"]}      # how their answers begin


class Wrong(Exception):
    """Observed: something that the RFC has otherwise."""


class Odd(Exception):
    """Observed: something that the RFC leaves open, and most have otherwise."""


class Unasked(Exception):
    """Why the question makes no sense here."""


class NotSocks5(Exception):
    """What the server has said to a greeting, which is no answer to one."""


class Question(NamedTuple):
    name: str
    section: str
    text: str
    expected: str
    ask: Ask


class Answer(NamedTuple):
    name: str
    section: str
    question: str
    expected: str
    observed: str
    verdict: str            # pass, fail, warn or skip


Ask = Callable[["Examiner"], Optional[str]]
QUESTIONS: List[Question] = []
OF_KERBEROS: List[Question] = []        # which are asked with --gssapi only


def question(section: str, text: str, expected: str) -> Callable[[Ask], Ask]:
    def add(ask: Ask) -> Ask:
        (OF_KERBEROS if section.startswith("RFC 1961") else QUESTIONS).append(Question(ask.__name__, section, text, expected, ask))
        return ask

    return add


# --- the examiner ---

class Talk(Conversation):
    """A conversation with the server that remembers what the server says."""

    frames: Optional[Protection] = None     # in which its datagrams are, too

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        super().__init__(sock, time.monotonic() + timeout)
        self.timeout = timeout
        self.heard = b""

    def read(self, n: int, /) -> bytes:
        octets = super().read(n)
        self.heard += octets
        return octets

    def negotiate(self, proxy: Proxy, methods: Methods = NO_OTHERS, datagrams: bool = False) -> None:
        """As ever; but `socket` is for what is said in clear, since most questions go on with it."""
        super().negotiate(proxy, methods, datagrams)
        if self.protection is not None:
            self.frames, self.socket, self.protection, self.heard = self.protection, self.as_socket(), None, self.heard[:2]

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

    def choose_login(self) -> None:
        if self.choose(LOGIN) != LOGIN:
            raise Unasked("the server does not select method 02")

    def log_in_as(self, username: bytes, password: bytes) -> int:
        """The status of the login."""
        self.choose_login()
        self.send(Credentials(username, password))
        return self.receive(CredentialsReply).status

    def request(self, command: Command, destination: Address) -> Reply:
        self.send(Request(command, destination))
        return self.receive(Reply)

    def half_close(self) -> None:
        """Say that no more comes, so that the server need not wait for it; it may have hung up by now."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

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

    def closes(self, otherwise: Type[Exception] = Wrong) -> str:
        """What is observed if the server closes the connection in time."""
        if not self.ends(CLOSING):
            raise otherwise(f"still open after {CLOSING:g} s")
        return "closed"


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

    def examine(self, most_silences: float = SILENCES) -> List[Answer]:
        """Ask all questions, or those before the server is silent too often.  OSError if it cannot be reached; NotSocks5."""
        self.greet()
        answers: List[Answer] = []
        for question in self.questions:
            answers.append(self.answer(question))
            last = [answer.observed for answer in answers if answer.verdict != "skip"][-int(min(most_silences, len(self.questions))):]
            if len(last) >= most_silences and set(last) == {self.silence}:
                break
        return answers

    @property
    def questions(self) -> List[Question]:
        return [*QUESTIONS, *OF_KERBEROS] if self.proxy.gssapi else QUESTIONS

    def greet(self) -> None:
        """One greeting, to see whether it is a SOCKS5 server, and whether it asks for a login."""
        said = f"is silent for {self.timeout:g} s"
        with self.talk() as talk:
            talk.send(Greeting(bytes([NONE])))
            try:
                read_exactly(talk, 2)
            except socket.timeout:
                talk.half_close()           # after which others may answer
                talk.ends(self.timeout)
            except CLOSED:
                said = "closes the connection without an answer"
        heard = talk.heard[:2]
        if len(heard) < 2 or heard[0] != VER:
            guess = "".join(f" ({name}?)" for name, firsts in OTHERS.items() if heard in firsts)
            raise NotSocks5(f"answers {heard.hex(' ')}{guess}" if heard else said)
        self.wants_a_login = heard[1] != NONE

    def answer(self, question: Question) -> Answer:
        try:
            observed, verdict = question.ask(self) or question.expected, "pass"
        except (Wrong, Odd, Unasked, Socks5Error) as error:
            observed, verdict = str(error), {Odd: "warn", Unasked: "skip"}.get(type(error), "fail")
        except socket.timeout:
            observed, verdict = self.silence, "fail"
        except OSError as error:
            observed, verdict = f"the connection breaks: {error.strerror or error}", "fail"
        return Answer(*question[:4], observed, verdict)

    # --- what the questions need ---

    @property
    def silence(self) -> str:
        return f"nothing within {self.timeout:g} s"

    @contextmanager
    def talk(self) -> Iterator[Talk]:
        talk = Talk(dial(self.proxy, time.monotonic() + self.timeout), self.timeout)
        try:
            yield talk
        finally:
            talk.socket.close()

    def need_a_login(self) -> None:
        if self.wants_a_login and not (self.proxy.username or self.proxy.gssapi):
            raise Unasked("needs --user NAME:PASSWORD, or --gssapi: the server asks for a login")

    def need_a_method(self) -> int:
        """The one to offer where what follows is written in advance."""
        self.need_a_login()
        if self.proxy.gssapi:
            raise Unasked("not with --gssapi")
        return LOGIN if self.wants_a_login else NONE

    @contextmanager
    def ready(self, datagrams: bool = False) -> Iterator[Talk]:
        """A talk in which the request comes next."""
        self.need_a_login()
        with self.talk() as talk:
            with errors_as(Unasked, "{}", *(LoginFailed, NoAcceptableMethod) if self.proxy.gssapi else ()):      # a question of RFC 1961 tells
                talk.negotiate(self.proxy, datagrams=datagrams)
            yield talk

    @contextmanager
    def known(self) -> Iterator[Tuple[Talk, Initiator]]:
        """A talk in which both sides know each other by Kerberos, and the level comes next."""
        from .gssapi.client import establish
        from .gssapi.context import Initiator

        with self.talk() as talk:
            self.choose_gssapi(talk)
            context = Initiator(self.proxy.host, self.proxy.service)
            establish(talk, context)
            yield talk, context

    def choose_gssapi(self, talk: Talk) -> None:
        if talk.choose(GSSAPI) != GSSAPI:
            raise Unasked("the server does not select method 01")

    @contextmanager
    def protected(self, level: Level = Level.CONFIDENTIALITY) -> Iterator[Tuple[Talk, Initiator]]:
        """A talk in which a request comes next, in frames; what is sent by its socket is in none."""
        from .gssapi.client import agree
        from .gssapi.context import Protection

        with self.known() as (talk, context):
            if agree(talk, context, level) is not level:
                raise Unasked(f"the server does not grant level {level}")
            talk.protection = Protection(context, level)
            yield talk, context

    @contextmanager
    def protected_tunnel(self) -> Iterator[Tuple[Talk, Initiator, socket.socket]]:
        with self.target() as target, self.protected() as (talk, context):
            succeeded(talk.request(Command.CONNECT, target.address))
            with target.accept() as accepted:
                yield talk, context, accepted

    def host(self, kind: AddressType) -> str:
        if kind not in self.hosts or not can_bind(self.hosts[kind]):
            raise Unasked(f"no target of the type {kind.name}: see --target")
        return self.hosts[kind]

    def any_host(self) -> str:
        """The address to use where any will do."""
        return next(iter(self.hosts.values()))

    def target(self, *hosts: str) -> Target:
        """A target that listens on the same port of all these addresses."""
        for _ in range(10):
            try:
                return Target(hosts or (self.any_host(),), self.timeout)
            except OSError:         # the port is taken at one of the others
                pass
        raise Unasked("no port that is free at all addresses of this computer")

    @contextmanager
    def tunnel(self, *hosts: str, name: Optional[str] = None) -> Iterator[Tuple[Talk, socket.socket]]:
        """Both ends of a connection through the server to a target on these hosts, asked for by this name if any."""
        with self.target(*hosts) as target, self.ready() as talk:
            succeeded(talk.request(Command.CONNECT, named(target.address, name) if name else target.address))
            with target.accept() as accepted:
                talk.socket.settimeout(self.timeout)
                yield talk, accepted

    @contextmanager
    def binding(self) -> Iterator[Tuple[Talk, Address]]:
        """A server that waits for a call, and where."""
        with self.ready() as talk:
            yield talk, offered(talk, Command.BIND, Address.numeric(self.any_host(), 0))

    @contextmanager
    def association(self, host: Optional[str] = None) -> Iterator[Relay]:
        """The server's UDP relay, and a target on this host, or on any."""
        with self.udp(host) as target, self.ready(datagrams=True) as talk:
            address = offered(talk, Command.UDP_ASSOCIATE, UNSPECIFIED)
            with self.udp(Address.of(talk.socket.getsockname()).zoned) as client:
                yield Relay(talk, address, client, target, as_told(target.getsockname()))

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


class Target(ExitStack):
    """One or more sockets that listen on one port."""

    def __init__(self, hosts: Sequence[str], timeout: float) -> None:
        super().__init__()
        self.timeout = timeout
        self.listeners: List[socket.socket] = []
        port = 0
        with on_error(self.close):
            for host in hosts:
                listener = socket.create_server(Address.numeric(host, port).sockaddr, family=family_of(host))
                self.listeners.append(self.enter_context(listener))
                port = listener.getsockname()[1]
        self.address = Address.of(self.listeners[0].getsockname())

    def accept(self) -> socket.socket:
        ready = select(self.listeners, [], [], self.timeout)[0]
        if not ready:
            raise Wrong("no connection reaches the target")
        accepted = ready[0].accept()[0]
        accepted.settimeout(self.timeout)
        return accepted


class Relay(NamedTuple):
    """The server's UDP relay at `address`, the socket that we use it with, and a target at `there`."""

    talk: Talk
    address: Address
    client: socket.socket
    target: socket.socket
    there: Address

    def send(self, data: bytes, destination: Optional[Address] = None, frag: int = 0) -> None:
        """Have it sent to the target."""
        self.send_octets(bytes(Datagram(destination or self.there, data, frag)))

    def send_octets(self, octets: bytes) -> None:
        """A datagram, or octets that are none."""
        frames = self.talk.frames
        self.client.sendto(frames.frame(octets) if frames else octets, self.address.sockaddr)

    def arrival(self, data: bytes, destination: Optional[Address] = None) -> Tuple[bytes, Any]:
        """What the target gets when this is sent, and from where."""
        self.send(data, destination)
        with errors_as(Wrong, f"nothing arrives within {self.talk.timeout:g} s", socket.timeout):
            return self.target.recvfrom(65535)

    def echo(self, data: bytes, destination: Optional[Address] = None) -> Datagram:
        """The answer of a target that sends the data back."""
        received, source = self.arrival(data, destination)
        if received != data:
            raise Wrong(f"{len(received)} bytes arrive, and not the {len(data)} that were sent")
        self.target.sendto(received, source)
        with errors_as(Wrong, f"no answer within {self.talk.timeout:g} s", socket.timeout):
            octets, frames = self.client.recv(65535), self.talk.frames
        answer = Datagram.read(BytesIO(frames.decode_datagram(octets) if frames else octets))
        if answer.data != data:
            raise Wrong("the answer is another one")
        return answer


@contextmanager
def errors_as(verdict: Type[Exception], text: str, *errors: Type[Exception]) -> Iterator[None]:
    """Raise this verdict in place of these errors; `{}` in its text is the text of the error."""
    try:
        yield
    except errors as error:
        raise verdict(text.format(error)) from error


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def as_told(sockaddr: Tuple[Any, ...]) -> Address:
    """The address of a socket as a message names it: without its zone."""
    return Address.of(sockaddr)._replace(scope=0)


def named(address: Address, name: str) -> Address:
    """The same port of a host that is written as a name."""
    return Address(name, address.port, AddressType.DOMAINNAME)


def can_bind(host: str) -> bool:
    with suppress(OSError), socket.socket(family_of(host)) as sock:
        sock.bind(Address.numeric(host, 0).sockaddr)
        return True
    return False


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


def offered(talk: Talk, command: Command, destination: Address) -> Address:
    """Where the server waits for the call, or for datagrams."""
    reply = talk.request(command, destination)
    if reply.code == ReplyCode.COMMAND_NOT_SUPPORTED:
        raise Unasked(f"the server has no {command.name}")
    return talk.here(succeeded(reply).bound)


def arrives(octets: bytes, one: socket.socket, other: socket.socket) -> None:
    """What one sends, the other receives; both with a timeout."""
    one.sendall(octets)
    received = b""
    while len(received) < len(octets):
        more = other.recv(65536)
        if not more:
            raise Wrong(f"the connection ends after {len(received)} of {len(octets)} bytes")
        received += more
    if received != octets:
        raise Wrong("other bytes than were sent")


def rest(sock: socket.socket) -> bytes:
    """All that comes until the end."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


# --- RFC 1928 section 3: method negotiation ---

NEGOTIATION = "RFC 1928 section 3"


def selected(e: Examiner, methods: Sequence[int], right: Sequence[int]) -> str:
    """What the server selects of these methods."""
    with e.talk() as talk:
        method = talk.choose(*methods)
    if method not in right:
        raise Wrong(f"{method:02x}")
    return f"{method:02x}"


@question(NEGOTIATION, "Method 00 alone is selected, or refused for want of a password", "00, or FF")
def no_login(e: Examiner) -> str:
    method = selected(e, [NONE], [NONE, FF])
    if (e.proxy.username or e.proxy.gssapi) and method == "00":
        raise Odd(f"00: no {'ticket' if e.proxy.gssapi else 'password'} is asked for")
    return method


@question(NEGOTIATION, "Of 00 and 02 one is selected", "00 or 02")
def both_methods(e: Examiner) -> str:
    return selected(e, [NONE, LOGIN], [NONE, LOGIN, *[FF] * e.proxy.gssapi])


for name, text, expected, offer, right in (
    ("unknown_methods", "Unknown methods alone are refused", "FF", [PRIVATE, PRIVATE + 1], [FF]),
    ("offer_of_ff", "FF, which is no method, is refused as an offer", "FF", [FF], [FF]),
):
    QUESTIONS.append(Question(name, NEGOTIATION, text, expected, partial(selected, methods=offer, right=right)))


@question(NEGOTIATION, "Of 255 methods the last, the only known one, is selected", "the last one")
def many_methods(e: Examiner) -> str:
    wanted = GSSAPI if e.proxy.gssapi else LOGIN if e.wants_a_login else NONE
    return selected(e, [PRIVATE] * 254 + [wanted], [wanted])


@question(NEGOTIATION, "An offer of no methods (NMETHODS 00) is refused", "FF, or closed")
def no_methods(e: Examiner) -> str:
    try:
        return selected(e, [], [FF])
    except socket.timeout:
        raise Odd("no answer, and it waits") from None
    except CLOSED:
        return "closed"


@question(NEGOTIATION, "The server closes the connection after FF", "closed")
def end_after_ff(e: Examiner) -> str:
    with e.talk() as talk:
        talk.send(Greeting(bytes([PRIVATE])))
        return talk.closes(otherwise=Odd)


@question(NEGOTIATION, "No method is selected if VER is 04", "closed")
def other_version(e: Examiner) -> str:
    with e.talk() as talk:
        talk.write(b"\x04" + bytes(Greeting(bytes([NONE])))[1:])
        talk.half_close()
        try:
            read_exactly(talk, 2)
        except CLOSED:
            return "closed"
        except socket.timeout:
            raise Odd("no answer, and it waits") from None
    if talk.heard[0] == VER and talk.heard[1] != FF:
        raise Wrong(talk.heard.hex())
    return talk.heard.hex()


@question(NEGOTIATION, "Messages may come octet by octet", "served")
def octet_by_octet(e: Examiner) -> None:
    method = e.need_a_method()
    with e.target() as target, e.talk() as talk:
        talk.drip(bytes(Greeting(bytes([method]))))
        talk.receive(MethodSelection)
        if e.wants_a_login:
            talk.drip(bytes(Credentials(e.proxy.username, e.proxy.password)))
            talk.receive(CredentialsReply)
        talk.drip(bytes(Request(Command.CONNECT, target.address)))
        succeeded(talk.receive(Reply))
        target.accept().close()


@question(NEGOTIATION, "Greeting and request may come in one segment", "served")
def one_segment(e: Examiner) -> None:
    method = e.need_a_method()
    login = bytes(Credentials(e.proxy.username, e.proxy.password)) if e.wants_a_login else b""
    with e.target() as target, e.talk() as talk:
        talk.write(bytes(Greeting(bytes([method]))) + login + bytes(Request(Command.CONNECT, target.address)))
        with errors_as(Odd, "not served: {}", Wrong, Socks5Error, OSError):
            talk.receive(MethodSelection)
            if login:
                talk.receive(CredentialsReply)
            succeeded(talk.receive(Reply))
        target.accept().close()


# --- RFC 1929 ---

RFC_1929 = "RFC 1929 section 2"


def refused_login(e: Examiner, wrong: Callable[[bytes, bytes], Tuple[bytes, bytes]]) -> str:
    """What the server says to a login that is made a wrong one."""
    login = wrong(*name_and_password(e))
    if max(map(len, login)) > 255:
        raise Unasked("the password is too long for it")
    with e.talk() as talk:
        try:
            status = talk.log_in_as(*login)
        except CLOSED as error:
            if talk.heard[2:]:
                raise Wrong(str(error)) from error
            raise Odd("closed without a status") from None
    if status == CredentialsReply.SUCCESS:
        raise Wrong("status 00: accepted")
    return f"status {status:02x}"


def other(octets: bytes) -> bytes:
    return bytes([octets[0] ^ 1]) + octets[1:] if octets else b"!"


def name_and_password(e: Examiner) -> Tuple[bytes, bytes]:
    if not e.proxy.username:
        raise Unasked("needs --user NAME:PASSWORD")
    return e.proxy.username, e.proxy.password


@question(RFC_1929, "The right password is accepted", "status 00")
def right_login(e: Examiner) -> str:
    with e.talk() as talk:
        status = talk.log_in_as(*name_and_password(e))
    if status != CredentialsReply.SUCCESS:
        raise Wrong(f"status {status:02x}")
    return "status 00"


for name, text, wrong in (
    ("wrong_password", "A wrong password is rejected", lambda user, password: (user, other(password))),
    ("wrong_name", "A wrong name is rejected", lambda user, password: (other(user), password)),
    ("password_with_nul", "The right password with a NUL and more is rejected",
     lambda user, password: (user, password + b"\0more")),
    ("empty_login", "Empty credentials are rejected", lambda _user, _password: (b"", b"")),
    ("long_login", "Wrong credentials of 255 octets each are rejected", lambda _user, _password: (b"n" * 255, b"p" * 255)),
):
    QUESTIONS.append(Question(name, RFC_1929, text, "another status", partial(refused_login, wrong=wrong)))


@question(RFC_1929, "The server closes the connection after a wrong password", "closed")
def end_after_wrong_login(e: Examiner) -> str:
    name, password = name_and_password(e)
    with e.talk() as talk:
        if talk.log_in_as(name, other(password)) == CredentialsReply.SUCCESS:
            raise Wrong("status 00: accepted")
        return talk.closes()


QUESTIONS += [
    Question("request_after_wrong_login", RFC_1929, "A request after a wrong password is not carried out", "not carried out",
             lambda e: not_let_in(e, lambda name, password: bytes(Credentials(name, other(password))))),
    Question("request_instead_of_login", RFC_1929, "A request in place of the credentials is not carried out", "not carried out",
             lambda e: not_let_in(e, lambda _name, _password: b"")),
]


def not_let_in(e: Examiner, login: Callable[[bytes, bytes], bytes]) -> None:
    octets = login(*name_and_password(e))
    with e.target() as target, e.talk() as talk:
        talk.choose_login()
        not_carried_out(talk, target, octets + bytes(Request(Command.CONNECT, target.address)))


def not_carried_out(talk: Talk, target: Target, octets: bytes) -> None:
    """Wrong if these octets, and no more, have the server connect to the target."""
    talk.write(octets)
    talk.half_close()
    talk.ends(talk.timeout)
    if select(target.listeners, [], [], 0)[0]:
        raise Wrong("carried out")


# --- RFC 1928 sections 4 to 6: CONNECT ---

CONNECT, REPLIES = "RFC 1928 section 4", "RFC 1928 section 6"


def connects(e: Examiner, *hosts: str, name: Optional[str] = None) -> str:
    with e.tunnel(*hosts, name=name) as (talk, accepted):
        arrives(b"there", talk.socket, accepted)
        arrives(b"and back", accepted, talk.socket)
    return words(Reply(ReplyCode.SUCCEEDED))


QUESTIONS += [
    Question("connect_ipv4", CONNECT, "CONNECT to an IPv4 address (ATYP 01) works", "00, and bytes both ways",
             lambda e: connects(e, e.host(AddressType.IPV4))),
    Question("connect_name", CONNECT, "CONNECT to a name (ATYP 03) works", "00, and bytes both ways",
             lambda e: connects(e, *filter(can_bind, e.hosts.values()), name=e.name)),
]


@question(CONNECT, "CONNECT to an IPv6 address (ATYP 04) works", "00, and bytes both ways")
def connect_ipv6(e: Examiner) -> str:
    with errors_as(Odd, "{}", Wrong):       # it may have no IPv6
        return connects(e, e.host(AddressType.IPV6))


@question(CONNECT, "CONNECT to an address written as a name (browsers) works", "00, and bytes both ways")
def connect_literal_name(e: Examiner) -> str:
    with errors_as(Odd, "{}", Wrong, Socks5Error):
        return connects(e, name=e.any_host().partition("%")[0])


QUESTIONS += [
    Question("unknown_command", CONNECT, "A request with an unknown CMD is refused", "07",
             lambda e: malformed(e, 1, 0x09, ReplyCode.COMMAND_NOT_SUPPORTED)),
    Question("unknown_address_type", CONNECT, "A request with an unknown ATYP is refused", "08",
             lambda e: malformed(e, 3, 0x02, ReplyCode.ADDRESS_TYPE_NOT_SUPPORTED)),
]


def malformed(e: Examiner, place: int, octet: int, *usual: ReplyCode) -> str:
    """The reply to a request with another octet in this place."""
    with e.target() as target, e.ready() as talk:
        request = bytearray(bytes(Request(Command.CONNECT, target.address)))
        request[place] = octet
        talk.write(bytes(request))
        with errors_as(Wrong, "closed without a reply", *CLOSED):
            return failed(talk.receive(Reply), *usual)


@question(CONNECT, "A request with VER 04 is not carried out", "not carried out")
def request_version(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        not_carried_out(talk, target, b"\x04" + bytes(Request(Command.CONNECT, target.address))[1:])
    return f"not carried out: {talk.heard[2:].hex() or 'closed'}"


@question(CONNECT, "A request with RSV 01 gets a reply", "a reply")
def request_rsv(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        talk.send(Request(Command.CONNECT, target.address, rsv=1))
        with errors_as(Odd, "closed without a reply", *CLOSED):
            return words(talk.receive(Reply))


QUESTIONS += [
    Question("empty_name", CONNECT, "CONNECT to a name of 0 octets is refused", "a failure", lambda e: refused_name(e, "")),
    Question("name_with_nul", CONNECT, "CONNECT to a name with a NUL in it is refused", "a failure",
             lambda e: refused_name(e, e.any_host() + "\0.example")),
]


def refused_name(e: Examiner, name: str) -> str:
    """The failure reply, or the end, which refuses as well."""
    with e.target() as target, e.ready() as talk:
        try:
            return failed(talk.request(Command.CONNECT, named(target.address, name)))
        except CLOSED:
            return "closed"


@question(REPLIES, "A target that refuses is reported as such", "05")
def refused(e: Examiner) -> str:
    with socket.socket(family_of(e.any_host())) as sock, e.ready() as talk:
        sock.bind(e.free_port())                # and does not listen
        return failed(talk.request(Command.CONNECT, Address.of(sock.getsockname())), ReplyCode.CONNECTION_REFUSED)


@question(REPLIES, "A name that does not exist is reported as such", "04")
def unknown_name(e: Examiner) -> str:
    with e.ready() as talk, errors_as(Odd, f"nothing within {e.timeout:g} s", socket.timeout):      # a slow resolver
        reply = talk.request(Command.CONNECT, Address("no-such-host.invalid", 80, AddressType.DOMAINNAME))  # RFC 6761
        return failed(reply, ReplyCode.HOST_UNREACHABLE)


@question(REPLIES, "The server closes the connection soon after a failure", f"within {CLOSING:g} s")
def end_after_failure(e: Examiner) -> str:
    with socket.socket(family_of(e.any_host())) as sock, e.ready() as talk:
        sock.bind(e.free_port())
        failed(talk.request(Command.CONNECT, Address.of(sock.getsockname())))
        return talk.closes()


@question(REPLIES, "RSV of a reply is 00", "00")
def reply_rsv(e: Examiner) -> None:
    with e.target() as target, e.ready() as talk:
        before = len(talk.heard)
        succeeded(talk.request(Command.CONNECT, target.address))
        rsv = talk.heard[before + 2]
    if rsv:
        raise Wrong(f"{rsv:02x}")


@question(REPLIES, "BND.ADDR and BND.PORT are what the target sees", "the same")
def bound_address(e: Examiner) -> str:
    with e.target() as target, e.ready() as talk:
        bound = succeeded(talk.request(Command.CONNECT, target.address)).bound
        with target.accept() as accepted:
            seen = as_told(accepted.getpeername())
    if bound != seen:
        raise Odd(f"{bound}, and the target sees {seen}")
    return str(bound)


# --- what is carried ---

@question(REPLIES, "The reply comes before what the target sends", "in this order")
def reply_first(e: Examiner) -> None:
    with e.target() as target, e.ready() as talk:
        talk.send(Request(Command.CONNECT, target.address))
        with target.accept() as accepted:
            accepted.sendall(b"220 hello")
            succeeded(talk.receive(Reply))
            if read_exactly(talk, 9) != b"220 hello":
                raise Wrong("other bytes than were sent")


@question(REPLIES, "Data right behind the request reaches the target", "all of them")
def early_data(e: Examiner) -> None:
    with e.target() as target, e.ready() as talk:
        talk.write(bytes(Request(Command.CONNECT, target.address)) + b"early, ")
        with target.accept() as accepted:
            succeeded(talk.receive(Reply))
            talk.write(b"late")
            talk.socket.shutdown(socket.SHUT_WR)
            received = rest(accepted)
    if received != b"early, late":
        raise Wrong(f"{received!r} arrives")


@question(REPLIES, "A million bytes each way arrive, at the same time", "all of them")
def much_both_ways(e: Examiner) -> None:
    with e.tunnel() as (talk, target), ThreadPoolExecutor() as senders:
        for sock in (talk.socket, target):
            senders.submit(sock.sendall, MUCH)      # if it fails, the other end will tell
        for sock in (target, talk.socket):
            if read_exactly(Talk(sock, e.timeout), len(MUCH)) != MUCH:
                raise Wrong("other bytes than were sent")


@question(REPLIES, "The client can half-close and still receive the answer", "the answer")
def half_close_up(e: Examiner) -> None:
    with e.tunnel() as (talk, target):
        half_closed(talk.socket, target)


@question(REPLIES, "The target can half-close and still receive from the client", "the answer")
def half_close_down(e: Examiner) -> None:
    with e.tunnel() as (talk, target):
        half_closed(target, talk.socket)


def half_closed(one: socket.socket, other: socket.socket) -> None:
    one.sendall(b"question")
    one.shutdown(socket.SHUT_WR)
    if rest(other) != b"question":
        raise Wrong("bytes before the end are lost")
    try:
        other.sendall(b"answer")
        other.shutdown(socket.SHUT_WR)
        heard = rest(one)
    except socket.timeout:
        raise
    except OSError:             # both ways have been ended, and not this one alone
        heard = b""
    if heard != b"answer":
        raise Wrong("the answer is lost")


@question(REPLIES, "A reset arrives as a reset, not as a clean end", "a reset")
def reset(e: Examiner) -> None:
    with e.tunnel() as (talk, target):
        arrives(b"half of it", target, talk.socket)
        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        target.close()
        with suppress(ConnectionError), errors_as(Odd, "a clean end", ProtocolError):
            talk.read(1)
            raise Wrong("octets")


# --- BIND ---

BIND = "RFC 1928 section 6, BIND"


QUESTIONS.append(Question("bind_there", BIND, "BIND is supported", "00", lambda e: there_is(e, Command.BIND, Address.numeric(e.any_host(), 0))))


def there_is(e: Examiner, command: Command, destination: Address) -> str:
    with e.ready() as talk, errors_as(Wrong, "closed without a reply, where 07 would do", *CLOSED):
        reply = talk.request(command, destination)
    if reply.code == ReplyCode.COMMAND_NOT_SUPPORTED:
        raise Odd(words(reply))
    if succeeded(reply).bound.is_unspecified or not reply.bound.port:
        raise Odd(f"00, at {reply.bound}, which tells clients nothing")
    return f"00, at {reply.bound}"


@question(BIND, "BIND's second reply names the peer that has connected", "00, BND is the peer")
def bind_second_reply(e: Examiner) -> str:
    with e.binding() as (talk, address), e.call(address) as peer:
        reply = succeeded(talk.receive(Reply))
        if reply.bound != as_told(peer.getsockname()):
            raise Wrong(f"{reply.bound}, and the peer is {as_told(peer.getsockname())}")
        talk.socket.settimeout(e.timeout)
        arrives(b"there", talk.socket, peer)
        arrives(b"and back", peer, talk.socket)
    return words(reply)


@question(BIND, "A peer from another host than DST.ADDR is rejected", "rejected")
def bind_stranger(e: Examiner) -> str:
    stranger = e.stranger()
    with e.binding() as (talk, address), e.call(address, stranger):
        # The expected peer connects second, so the one that the reply names has been accepted.
        try:
            with e.call(address) as peer:
                reply = talk.receive(Reply)
                expected = as_told(peer.getsockname())
        except ConnectionError:         # it has ended with the stranger
            reply, expected = talk.receive(Reply), UNSPECIFIED
    if reply.code == ReplyCode.SUCCEEDED and reply.bound != expected:
        raise Wrong("accepted")
    return "rejected, and the expected one is accepted" if reply.code == ReplyCode.SUCCEEDED else f"rejected: {words(reply)}"


@question(BIND, "BIND stops listening when the client has left", "closed")
def bind_client_gone(e: Examiner) -> None:
    with e.binding() as (_talk, address):
        pass
    with suppress(OSError), errors_as(Odd, "still listening", socket.timeout):
        for _ in range(5):
            time.sleep(e.timeout / 10)          # it may need a moment to notice
            dial(Proxy(address.zoned, address.port), time.monotonic() + e.timeout).close()
        raise Odd("still listening")


# --- UDP ASSOCIATE ---

UDP, HEADER = "RFC 1928 section 6, UDP ASSOCIATE", "RFC 1928 section 7"


QUESTIONS.append(Question("udp_there", UDP, "UDP ASSOCIATE is supported", "00", lambda e: there_is(e, Command.UDP_ASSOCIATE, UNSPECIFIED)))


@question(UDP, "The association ends with its TCP connection", "it ends")
def udp_lifetime(e: Examiner) -> None:
    with e.association() as relay:
        relay.echo(b"question")
        relay.talk.socket.close()
        until = time.monotonic() + e.timeout
        relay.target.settimeout(0.25)
        with suppress(OSError):
            while time.monotonic() < until:         # it may need a moment to notice
                relay.send(b"still there?")
                relay.target.recv(100)
            raise Wrong(f"it lives on for {e.timeout:g} s")


QUESTIONS.append(Question("udp_ipv4", HEADER, "Datagrams reach an IPv4 address, and answers name it", "the target's address",
                          lambda e: udp_to(e, e.host(AddressType.IPV4))))


@question(HEADER, "Datagrams reach an IPv6 address, and answers name it", "the target's address")
def udp_ipv6(e: Examiner) -> str:
    with errors_as(Odd, "{}", Wrong, OSError):
        return udp_to(e, e.host(AddressType.IPV6))


def udp_to(e: Examiner, host: str) -> str:
    with e.association(host) as relay:
        answer = relay.echo(b"question")
    if answer.address != relay.there:
        raise Wrong(f"the answer names {answer.address}")
    if answer.rsv or answer.frag:
        raise Wrong(f"RSV {answer.rsv:04x}, FRAG {answer.frag:02x}")
    return str(answer.address)


@question(HEADER, "Datagrams reach a name, and its answers the client", "both arrive")
def udp_name(e: Examiner) -> None:
    with e.association() as relay:
        relay.echo(b"question", named(relay.there, e.name))


@question(HEADER, "Fragments are dropped, or reassembled", "either")
def udp_fragments(e: Examiner) -> str:
    with e.association() as relay:
        relay.send(b"one ", frag=0x01)
        relay.send(b"two", frag=0x02 | Datagram.LAST_FRAGMENT)
        received, _source = relay.arrival(b"whole")
    verdicts = {b"whole": "dropped", b"one two": "reassembled"}
    if received not in verdicts:
        raise Wrong(f"{received!r} arrives")
    return verdicts[received]


@question(HEADER, "Datagrams from another host than the client's are dropped", "dropped")
def udp_stranger(e: Examiner) -> None:
    stranger = e.stranger()
    with e.association() as relay, e.udp(stranger) as sock:
        if ":" in relay.address.host:
            raise Unasked("only for a relay on 127.0.0.1")
        sock.sendto(bytes(Datagram(relay.there, b"stranger")), relay.address.sockaddr)
        received, _source = relay.arrival(b"client")
    if received != b"client":
        raise Wrong("relayed")


@question(HEADER, "The relay survives malformed datagrams", "it goes on")
def udp_nonsense(e: Examiner) -> None:
    with e.association() as relay:
        whole = bytes(Datagram(relay.there, b""))
        for octets in (b"", b"\0", whole[:3], whole[:-1], whole[:3] + b"\x02" + whole[4:], b"\xff" * 64):
            relay.send_octets(octets)
        relay.echo(b"question")


@question(HEADER, "An empty payload arrives", "empty")
def udp_empty(e: Examiner) -> None:
    with e.association() as relay:
        relay.send(b"")
        received, _source = relay.arrival(b"next")
        if received:
            raise Odd("dropped")
        if relay.target.recv(100) != b"next":
            raise Wrong("another payload than the next")


@question(HEADER, "A payload of 8192 bytes arrives", "8192 bytes or more")
def udp_large(e: Examiner) -> str:
    with e.association() as relay:
        largest = 0
        for size in (512, 1472, 8192, 32768, 65000):
            try:
                relay.echo(b"x" * size)
            except (Wrong, OSError):
                break
            largest = size
    if largest < 8192:
        raise Odd(f"{largest} bytes")
    return f"{largest} bytes"


# --- RFC 1961: with --gssapi ---

CONTEXT, LEVELS, FRAMES = "RFC 1961 section 3", "RFC 1961 section 4", "RFC 1961 section 5"
ABORTED = bytes(Abort())


@question(CONTEXT, "Method 01 alone is selected", "01")
def gssapi_alone(e: Examiner) -> str:
    return selected(e, [GSSAPI], [GSSAPI])


@question(CONTEXT, "A client with a ticket is let in", "let in")
def ticket(e: Examiner) -> None:
    with e.known():
        pass


@question(CONTEXT, "A token that is none is refused", "01 ff")
def junk_for_a_token(e: Examiner) -> str:
    with e.talk() as talk:
        e.choose_gssapi(talk)
        talk.send(ContextToken(b"junk" * 16))
        return aborted(talk)


def aborted(talk: Talk) -> str:
    """What is observed if the server refuses: 01 FF, or the end, which does so as well."""
    try:
        heard = read_exactly(talk, 2)
    except CLOSED:
        raise Odd("closed without 01 ff") from None
    if heard != ABORTED:
        raise Wrong(heard.hex(" "))
    return heard.hex(" ")


@question(CONTEXT, "A request in place of a token is not carried out", "not carried out")
def request_instead_of_a_token(e: Examiner) -> None:
    with e.target() as target, e.talk() as talk:
        e.choose_gssapi(talk)
        not_carried_out(talk, target, bytes(Request(Command.CONNECT, target.address)))


def granted(e: Examiner, level: Level) -> str:
    from .gssapi.client import agree

    with e.known() as (talk, context), errors_as(Odd, "closed", *CLOSED):
        found = agree(talk, context, level)
    if found is Level.NONE:
        raise Wrong("00: no protection")
    if found is not level:
        raise Odd(f"{found:02x}")
    return f"{found:02x}"


for name, level in (("integrity", Level.INTEGRITY), ("confidentiality", Level.CONFIDENTIALITY)):
    OF_KERBEROS.append(Question(f"level_{name}", LEVELS, f"Level {level}, {name}, is granted to who asks for it", f"{level:02x}", partial(granted, level=level)))


@question(LEVELS, "A level that there is not is refused", "01 ff")
def unknown_level(e: Examiner) -> str:
    with e.known() as (talk, context):
        talk.send(LevelToken(context.wrap(b"\x04", False)))
        return aborted(talk)


@question(LEVELS, "A request in clear is not carried out once level 2 is granted", "not carried out")
def request_in_clear(e: Examiner) -> None:
    with e.target() as target, e.protected() as (talk, _context):
        talk.protection = None
        not_carried_out(talk, target, bytes(Request(Command.CONNECT, target.address)))


@question(FRAMES, "A request may be in two frames, and data in the second one", "served")
def request_in_two_frames(e: Examiner) -> None:
    with e.target() as target, e.protected() as (talk, _context):
        octets = bytes(Request(Command.CONNECT, target.address))
        talk.write(octets[:3])
        talk.write(octets[3:] + b"early")
        with errors_as(Odd, "not served: {}", Wrong, *CLOSED):
            succeeded(talk.receive(Reply))
            with target.accept() as accepted:
                if read_exactly(Talk(accepted, e.timeout), 5) != b"early":
                    raise Wrong("other bytes than were sent")


def altered(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def ends_the_tunnel(e: Examiner, spoiled: Callable[[Initiator, Callable[[bytes], bytes]], bytes], kept: bytes) -> None:
    """Whether the tunnel ends by these octets, and no more than `kept` of them reaches the target."""
    with e.protected_tunnel() as (talk, context, accepted):
        assert talk.protection is not None
        talk.socket.sendall(spoiled(context, talk.protection.encode))
        received = b""
        with suppress(ConnectionError), errors_as(Odd, "it goes on", socket.timeout):
            for octets in iter(lambda: accepted.recv(100), b""):
                received += octets
                if len(received) > len(kept):
                    raise Wrong("it reaches the target")


for name, text, spoiled, kept in (
    ("altered_frame", "A frame that has been altered ends the tunnel", lambda _context, encode: altered(encode(b"octets")), b""),
    ("repeated_frame", "A frame that comes twice ends the tunnel", lambda _context, encode: encode(b"octets") * 2, b"octets"),
    ("frame_in_clear", "At level 2, a frame that is not encrypted ends the tunnel",
     lambda context, _encode: bytes(Encapsulated(context.wrap(b"octets", False))), b""),
):
    OF_KERBEROS.append(Question(name, FRAMES, text, "it ends", partial(ends_the_tunnel, spoiled=spoiled, kept=kept)))


@question(FRAMES, "Datagrams in clear are dropped", "dropped")
def datagram_in_clear(e: Examiner) -> None:
    with e.association() as relay:
        relay.client.sendto(bytes(Datagram(relay.there, b"clear")), relay.address.sockaddr)
        received, _source = relay.arrival(b"wrapped")
    if received != b"wrapped":
        raise Wrong("relayed")


# --- the program ---

def table(answers: Sequence[Answer]) -> str:
    """The answers for people, section by section."""
    text, expected = (max(len(answer[column]) for answer in answers) for column in (2, 3))
    lines: List[str] = []
    for section, of_section in groupby(answers, lambda answer: answer.section):
        lines += ["", section]
        lines += [f"  {a.verdict}  {a.question:<{text}}  {a.expected:<{expected}}  {a.observed}" for a in of_section]
    return "\n".join(lines[1:])


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, description="Ask a SOCKS5 server the questions of RFC 1928 and RFC 1929, and with --gssapi of RFC 1961.",
        epilog="Exit codes: 0 nothing failed, 1 something did or there is no connection, 2 usage, or it is no SOCKS5 server.",
    )
    parser.add_argument("server", metavar="HOST:PORT", help="where the server is")
    parser.add_argument("--user", metavar="NAME:PASSWORD", help="the credentials, where they are required")
    parser.add_argument("--gssapi", action="store_true", help="log in by Kerberos, with the ticket of whoever asks, and ask about that, too")
    parser.add_argument("--service", default=SERVICE, metavar="NAME", help=f"the server's service for --gssapi (default: {SERVICE})")
    parser.add_argument("--json", action="store_true", help="the answers for programs")
    parser.add_argument("--all", action="store_true", help=f"go on also after {SILENCES} timeouts in a row")
    parser.add_argument("--target", metavar="HOST",
                        help="an address of this computer that the server can reach (default: its loopback, for a server on it)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="S", help=f"seconds for each step (default: {TIMEOUT:g})")
    return parser


def examiner(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Examiner:
    host, _colon, port = options.server.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536) or (":" in host and host[0] + host[-1] != "[]"):
        parser.error(f"invalid server {options.server!r}: expected HOST:PORT, such as 127.0.0.1:1080 or [::1]:1080")
    name, colon, password = (options.user or "").partition(":")
    if options.user is not None and not (name and colon and len(name.encode()) < 256 and len(password.encode()) < 256):
        parser.error("invalid --user: expected NAME:PASSWORD, each of 255 bytes at most")
    if not 0 < options.timeout < 1000:
        parser.error(f"invalid --timeout {options.timeout:g}: expected seconds above 0")
    proxy = Proxy(host.strip("[]"), int(port), name.encode(), password.encode(), gssapi=options.gssapi, service=options.service)
    try:
        here = all(ip_address(row[4][0]).is_loopback for row in socket.getaddrinfo(ascii_form(proxy.host), proxy.port))
    except (OSError, UnicodeError) as error:
        parser.error(f"invalid host {proxy.host!r}: {getattr(error, 'strerror', None) or error}")
    if options.target is None and not here:
        parser.error("the server is on another computer: --target has to say how it can reach this one")
    try:
        found = Examiner(proxy, options.target, options.timeout)
    except (OSError, UnicodeError):
        parser.error(f"invalid --target {options.target}: there is no such host")
    if options.target is not None and not can_bind(found.any_host()):
        parser.error(f"--target {options.target} is not an address of this computer")
    return found


def main(words: Optional[Sequence[str]] = None, prog: str = "python -m socks5srv.check") -> int:
    """Ask, print, and return the exit code."""
    parser = build_parser(prog)
    options = parser.parse_args(words)
    asking = examiner(parser, options)
    if options.gssapi and (error := no_ticket(asking.proxy)):
        return complain(parser, options, error, 1)
    try:
        answers = asking.examine(float("inf") if options.all else SILENCES)
    except KeyboardInterrupt:
        return 130
    except NotSocks5 as error:
        return complain(parser, options, f"{options.server} does not speak SOCKS5: it {error}", 2)
    except OSError as error:
        return complain(parser, options, f"cannot connect to {options.server}: {error.strerror or error}", 1)
    found = Counter(answer.verdict for answer in answers)
    summary = {verdict: found[verdict] for verdict in ("pass", "fail", "warn", "skip")}
    if options.json:
        print(json.dumps({"server": options.server, "counts": summary, "answers": [answer._asdict() for answer in answers]}, indent=2))
    else:
        print(table(answers))
        print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in summary.items()))
    if len(answers) < len(asking.questions):
        print(f"{prog}: stopped after {SILENCES} timeouts in a row; --all goes on", file=sys.stderr)
    return 1 if summary["fail"] else 0


def no_ticket(proxy: Proxy) -> str:
    """Why nobody can log in there by Kerberos from here; empty if that is not so."""
    try:
        from .gssapi.context import GssapiError, Initiator
    except ImportError as error:
        return str(error)
    try:
        Initiator(proxy.host, proxy.service).step()
    except GssapiError as error:
        return f"no ticket for {proxy.service} on {proxy.host}: {error}"
    return ""


def complain(parser: argparse.ArgumentParser, options: argparse.Namespace, error: str, code: int) -> int:
    """There are no answers."""
    if options.json:
        print(json.dumps({"server": options.server, "error": error}, indent=2))
    print(f"{parser.prog}: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
