"""
Both ends of every connection: the client in front of the proxy, and the target behind it.

They are tasks of one loop, so octets are counted where they arrive, and nothing has to be
agreed upon between programs.  A `Way` says how a client gets to a target: through a SOCKS5
server, or straight.  Everything that a client says is put together before it is needed.

What fails is put down in a `Failures`, by kind, and never tried again in silence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections import Counter
from functools import lru_cache
from io import BytesIO
from typing import Callable, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from socks5srv.protocol import (
    UNSPECIFIED, Address, Command, Credentials, CredentialsReply, Datagram, Greeting, Method, MethodSelection, Reply,
    ReplyCode, Request, Socks5Error,
)

from .loop import READ, WRITE, Loop, Task, clock

LOCALHOST = "127.0.0.1"
PATIENCE = 5.0              # seconds for a client to get its tunnel, or to be served altogether
IN_A_ROW = 5                # failures after which a client tries no more
OPENERS = 32                # clients that open tunnels at a time
BLOCK = 256 * 1024          # octets of bulk data in a call
BACKLOG = 4096
TRAIN = 16                  # datagrams in a train
WINDOW = 128                # datagrams under way; without trains more would not fit into a usual buffer
UDP_SEGMENT, UDP_GRO = 103, 104     # of Linux: udp(7); the socket module does not know them

Place = Tuple[str, int]
Login = Tuple[str, str]
Opened = Generator[None, None, socket.socket]

NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)
NOT_YET = {0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0)}
SUCCEEDED = bytes(Reply(ReplyCode.SUCCEEDED))[:2]
NO_LOGIN = bytes(MethodSelection(Method.NO_AUTHENTICATION_REQUIRED))
LOGIN = bytes(MethodSelection(Method.USERNAME_PASSWORD))
WELCOME = bytes(CredentialsReply(CredentialsReply.SUCCESS))


class Failures:
    """How often something has failed, by what it was."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def add(self, error: OSError) -> None:
        self.kinds[kind(error)] += 1

    def total(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.kinds.items()))


def kind(error: OSError) -> str:
    """What to call a failure, in a word or two."""
    if isinstance(error, TimeoutError) and not error.errno:
        return "without an answer"
    return os.strerror(error.errno).lower() if error.errno else str(error)


class Ended(ConnectionError):
    """The other end has closed where something was to come."""

    def __init__(self) -> None:
        super().__init__("closed early")


# --- the client ---

class Way(NamedTuple):
    """How to get to a target: through the server at `proxy`, or straight if that is None."""

    proxy: Optional[Place] = None
    login: Optional[Login] = None

    def open(self, loop: Loop, target: Place, hello: bytes = b"") -> Opened:
        """The part of a task that gets a tunnel; `hello` is sent through it as soon as it stands."""
        if self.proxy is None:
            return (yield from dial(loop, target, hello))
        sock, _reply = yield from self.ask(loop, request_to(target))
        if hello:
            sock.send(hello)
        return sock

    def ask(self, loop: Loop, request: bytes) -> Generator[None, None, Tuple[socket.socket, bytes]]:
        """Greeting, login if the server wants it, and a request; the connection, and the reply."""
        assert self.proxy is not None
        sock = yield from dial(loop, self.proxy, greeting(self.login))
        try:
            chosen = yield from receive(sock, 2)
            if chosen == LOGIN and self.login:
                sock.send(credentials(self.login))
                if (yield from receive(sock, 2)) != WELCOME:
                    raise ConnectionError("refused the login")
            elif chosen != NO_LOGIN:
                raise ConnectionError("wants a login")
            sock.send(request)
            reply = yield from receive(sock, 10)    # all of it, where BND.ADDR is an IPv4 address
            if reply[:2] != SUCCEEDED:
                raise ConnectionError(f"refused with reply {reply[1]:02x}")
            if reply[3] != UNSPECIFIED.address_type:
                reply += yield from rest_of_reply(sock, reply)
            return sock, reply
        except BaseException:
            loop.shut(sock)
            raise


# Put together once: these are asked for by every connection.

@lru_cache(None)
def request_to(target: Place) -> bytes:
    return bytes(Request(Command.CONNECT, Address.of(target)))


@lru_cache(None)
def greeting(login: Optional[Login]) -> bytes:
    return bytes(Greeting(bytes([Method.NO_AUTHENTICATION_REQUIRED] + [Method.USERNAME_PASSWORD] * bool(login))))


@lru_cache(None)
def credentials(login: Login) -> bytes:
    return bytes(Credentials(*(text.encode() for text in login)))


def rest_of_reply(sock: socket.socket, reply: bytes) -> Generator[None, None, bytes]:
    """What a reply with a longer address has beyond ten octets."""
    more = b""
    while True:
        try:
            Reply.read(BytesIO(reply + more))
            return more
        except Socks5Error:
            more += yield from receive(sock, 1)


def dial(loop: Loop, place: Place, hello: bytes) -> Opened:
    """
    Connect, and say the first thing.  The socket is watched for reading from then on.

    On loopback the connection mostly stands when connect() returns, so it is worth a try to
    send at once: that spares a wait.
    """
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | NONBLOCK)
    if not NONBLOCK:
        sock.setblocking(False)
    try:
        code = sock.connect_ex(place)
        if code not in NOT_YET:
            raise OSError(code, "")
        try:
            sock.send(hello)
        except OSError as error:
            if not isinstance(error, BlockingIOError) and error.errno != errno.ENOTCONN:
                raise
            loop.watch(sock, WRITE)
            yield
            sock.send(hello)
            loop.change(sock, READ)
        else:
            loop.watch(sock, READ)
        return sock
    except BaseException:
        loop.shut(sock)
        raise


def receive(sock: socket.socket, n: int) -> Generator[None, None, bytes]:
    """Exactly so many octets."""
    octets = b""
    while len(octets) < n:
        yield
        more = sock.recv(n - len(octets))
        if not more:
            raise Ended
        octets += more
    return octets


class Tunnels:
    """Opens many tunnels and keeps them.  The sockets are its own: close() closes them."""

    def __init__(self, loop: Loop, way: Way, failures: Failures) -> None:
        self.loop, self.way, self.failures = loop, way, failures
        self.sockets: List[socket.socket] = []
        self.relays: List[Place] = []           # of UDP associations, where to send to

    def __enter__(self) -> Tunnels:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def open(self, count: int, targets: Sequence[Place]) -> float:
        """Have `count` of them; fewer if it fails too often or takes too long.  The seconds that it took."""
        began, wanted = clock(), iter(range(len(self.sockets), count))
        openers = [0]
        for _ in range(min(OPENERS, count - len(self.sockets))):
            openers[0] += 1
            self.loop.start(self.opener(wanted, targets, openers))
        self.loop.run(5 + count / 300, lambda: not openers[0])
        took = clock() - began
        left = openers[0] + sum(1 for _ in wanted)
        if left:
            self.failures.kinds["not opened"] += left
        return took

    def opener(self, wanted: Iterator[int], targets: Sequence[Place], openers: List[int]) -> Task:
        failed = 0
        for number in wanted:
            self.loop.hurry(PATIENCE)
            try:
                sock = yield from self.one(targets[number % len(targets)])
                self.loop.leave(sock)
                self.sockets.append(sock)
                failed = 0
            except OSError as error:
                self.failures.add(error)
                failed += 1
                if failed == IN_A_ROW:
                    break
        openers[0] -= 1

    def one(self, target: Place) -> Opened:
        return self.way.open(self.loop, target)

    def close(self) -> None:
        for sock in self.sockets:
            self.loop.shut(sock)
        self.sockets.clear()


class Associations(Tunnels):
    """The same for UDP: each socket is the connection that keeps an association alive; the targets do not matter."""

    def one(self, target: Place) -> Opened:
        assert self.way.proxy is not None
        sock, reply = yield from self.way.ask(self.loop, bytes(Request(Command.UDP_ASSOCIATE, UNSPECIFIED)))
        bound = Reply.read(BytesIO(reply)).bound
        host = self.way.proxy[0] if bound.is_unspecified else bound.host
        self.relays.append((host, bound.port))
        return sock


def visitor(loop: Loop, way: Way, targets: Iterator[Place], message: bytes, until: float, times: List[float], failures: Failures) -> Task:
    """A client that comes again and again: a connection, a message, its echo; `times` get the seconds of each."""
    failed = 0
    while failed < IN_A_ROW:
        began = clock()
        if began > until:
            return
        loop.hurry(PATIENCE)
        try:
            sock = yield from way.open(loop, next(targets), message)
            try:
                yield from receive(sock, len(message))
            finally:
                loop.shut(sock)
            times.append(clock() - began)
            failed = 0
        except OSError as error:
            failures.add(error)
            failed += 1


def pinger(loop: Loop, sock: socket.socket, message: bytes, until: float, times: List[float], busy: List[int], failures: Failures) -> Task:
    """Ping-pong on a tunnel that stands; `times` get the seconds of each exchange."""
    buffer, length = bytearray(len(message)), len(message)
    send, recv_into = sock.send, sock.recv_into
    loop.watch(sock, READ)
    try:
        began = clock()
        while began < until:
            send(message)
            yield
            missing = length - recv_into(buffer)
            while missing:
                if missing == length:
                    raise Ended
                yield
                received = recv_into(buffer, missing)
                if not received:
                    raise Ended
                missing -= received
            now = clock()
            times.append(now - began)
            began = now
    except OSError as error:
        failures.add(error)
    busy[0] -= 1
    loop.leave(sock)


# --- the target ---

Service = Callable[[Loop, socket.socket], Task]


class Waiting:
    """In a task: watch a socket, and close it at the end, which may be that the other end has gone."""

    def __init__(self, loop: Loop, sock: socket.socket, events: int = READ) -> None:
        self.loop, self.sock = loop, sock
        loop.watch(sock, events)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        self.loop.shut(self.sock)
        return isinstance(error, OSError)


def listen(loop: Loop, service: Service, ports: int = 4) -> List[Place]:
    """
    Accept connections on free ports, and serve each with a task of its own; the addresses.

    More than one port, since every connection of the last minute still has a pair of ports to itself.
    """
    places = []
    for _ in range(ports):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((LOCALHOST, 0))
        listener.listen(BACKLOG)
        listener.setblocking(False)
        loop.start(acceptor(loop, listener, service))
        places.append(listener.getsockname())
    return places


def acceptor(loop: Loop, listener: socket.socket, service: Service) -> Task:
    loop.watch(listener, READ)
    try:
        while True:
            yield
            try:
                while True:
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    loop.start(service(loop, sock))
            except BlockingIOError:
                pass
    finally:
        loop.shut(listener)


def echo(loop: Loop, sock: socket.socket) -> Task:
    recv, send = sock.recv, sock.send
    with Waiting(loop, sock):
        while True:
            yield
            octets = recv(1024)
            if not octets:
                return
            send(octets)


def source(loop: Loop, sock: socket.socket) -> Task:
    """As much as the other end takes, once it has sent an octet: then all streams begin together."""
    with Waiting(loop, sock):
        yield
        sock.recv(1)
        loop.change(sock, WRITE)
        yield from pour(sock)


def sending(loop: Loop, sock: socket.socket) -> Task:
    """The client's end of an upload."""
    with Waiting(loop, sock, WRITE):
        yield from pour(sock)


def pour(sock: socket.socket) -> Task:
    block, send = memoryview(bytes(BLOCK)), sock.send
    while True:
        yield
        send(block)


class Drain:
    """Takes what comes, and counts the octets."""

    # On Linux a TCP socket throws octets away without copying them, if asked to: tcp(7).
    def __init__(self, portable: bool = False) -> None:
        self.octets = 0
        self.buffer = bytearray(BLOCK)
        self.flags = 0 if portable else socket.MSG_TRUNC

    def service(self, loop: Loop, sock: socket.socket) -> Task:
        recv_into, buffer, flags = sock.recv_into, self.buffer, self.flags
        with Waiting(loop, sock):
            while True:
                yield
                received = recv_into(buffer, BLOCK, flags)
                if not received:
                    return
                self.octets += received


# --- datagrams ---

def datagram_socket(peer: Optional[Place] = None) -> socket.socket:
    """One that sends to its peer, or is a target."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
    sock.setblocking(False)
    if peer:
        sock.connect(peer)
    else:
        sock.bind((LOCALHOST, 0))
    return sock


def datagram_echo(loop: Loop, sock: socket.socket) -> Task:
    recvfrom, sendto = sock.recvfrom, sock.sendto
    with Waiting(loop, sock):
        while True:
            yield
            try:
                for _ in range(32):         # then the others have their turn
                    octets, sender = recvfrom(2048)
                    sendto(octets, sender)
            except OSError:                 # nothing more to read, or no room to send: that one is lost
                pass


class Juggler:
    """Keeps so many datagrams under way in one association, and counts how many come back."""

    def __init__(self, place: Place, header: bytes, payload: bytes, under_way: int) -> None:
        self.datagram, self.under_way = header + payload, under_way
        self.sent = self.received = self.wrong = 0
        self.seen = 0                       # of the received, at the last look
        self.sending = True
        self.sock = datagram_socket(place)
        self.sockets = [self.sock]

    def start(self, loop: Loop) -> None:
        loop.start(self.catch(loop))

    def throw(self, count: int) -> None:
        try:
            for _ in range(count):
                self.sock.send(self.datagram)
                self.sent += 1
        except OSError:                     # full, or refused for one before: look() tries again
            pass

    def catch(self, loop: Loop) -> Task:
        recv, send, datagram, length = self.sock.recv, self.sock.send, self.datagram, len(self.datagram)
        with Waiting(loop, self.sock):
            while True:
                yield
                try:
                    for _ in range(32):
                        if recv(2048)[-length:] != datagram:
                            self.wrong += 1
                        self.received += 1
                        if self.sending:
                            send(datagram)
                            self.sent += 1
                except OSError:
                    pass

    def look(self) -> None:
        """If nothing has come back since the last look, those under way are lost: throw others."""
        if self.seen == self.received:
            self.throw(self.under_way)
        self.seen = self.received


class Transfer:
    """
    Bulk data one way in one association, as QUIC moves it: trains of datagrams, in a window that acknowledgements open.

    The client speaks first, so that the target knows whom to send to.  Then the one end sends
    data, and the other says now and then how many datagrams have come.
    """

    def __init__(self, target: socket.socket, place: Place, header: bytes, payload: bytes, up: bool, portable: bool) -> None:
        self.target, self.client, self.header = target, datagram_socket(place), header
        self.sockets = [self.target, self.client]
        self.sender, self.receiver = (self.client, target) if up else (target, self.client)
        # The client has the header before all that it sends and gets, the target before nothing.
        datagram, self.expected = (header + payload, payload) if up else (payload, header + payload)
        self.before_count = b"" if up else header
        trains = not portable and in_trains(self.sender, self.receiver, len(datagram))
        self.load, self.carries = (datagram * TRAIN, TRAIN) if trains else (datagram, 1)
        self.sent = self.received = self.wrong = 0
        self.acknowledged = self.lost = 0   # of the sent: no longer under way, and of these, given up
        self.seen = 0                       # of the received, at the last look
        self.met = False
        self.sending = True

    def start(self, loop: Loop) -> None:
        loop.start(self.send(loop))
        loop.start(self.take(loop))

    def send(self, loop: Loop) -> Task:
        """The end that the data comes from: each acknowledgement opens the window."""
        recv = self.sender.recv
        with Waiting(loop, self.sender):
            if self.sender is self.target:
                yield from self.meet()
                self.fill()
            while True:
                yield
                try:
                    for _ in range(32):     # then the others have their turn
                        arrived = int.from_bytes(recv(2048)[-8:], "big")
                        self.acknowledged = min(self.sent, max(self.acknowledged, self.lost + arrived))
                        self.fill()
                except OSError:
                    pass

    def fill(self) -> None:
        """Send as much as the window lets us."""
        send, load, carries = self.sender.send, self.load, self.carries
        most = self.acknowledged + WINDOW - carries
        try:
            while self.sent <= most and self.sending:
                send(load)
                self.sent += carries
        except OSError:                     # full, or refused for one before: the next acknowledgement or look() tries again
            pass

    def take(self, loop: Loop) -> Task:
        """The end that the data goes to: counts what comes, several datagrams at once if they are given so."""
        recv_into, buffer, expected = self.receiver.recv_into, bytearray(1 << 16), self.expected
        length, waiting = len(expected), 0
        with Waiting(loop, self.receiver):
            if self.receiver is self.target:
                yield from self.meet()
                self.say(0)
            while True:
                yield
                try:
                    for _ in range(8):
                        count, rest = divmod(recv_into(buffer), length)
                        if count:           # not the client's first word once more
                            self.wrong += bool(rest) or not buffer.startswith(expected)
                            self.received += count
                            waiting += count
                        if waiting >= TRAIN or not count:
                            self.say(self.received)
                            waiting = 0
                except OSError:
                    pass

    def say(self, arrived: int) -> None:
        """An acknowledgement."""
        self.receiver.send(self.before_count + arrived.to_bytes(8, "big"))

    def meet(self) -> Task:
        """The target waits for the client's first word, and answers to where it came from."""
        yield
        _octets, sender = self.target.recvfrom(2048)
        self.target.connect(sender)
        self.met = True

    def look(self) -> None:
        """If nothing has arrived since the last look, those under way are lost: send others."""
        if not self.met:
            with contextlib.suppress(OSError):      # refused for one before
                self.client.send(self.header + bytes(8))
        elif self.seen == self.received:
            self.lost, self.acknowledged = self.sent - self.received, self.sent
            self.fill()
        self.seen = self.received


def in_trains(sender: socket.socket, receiver: socket.socket, length: int) -> bool:
    """
    Let one send trains of datagrams of this length, and the other take them as they come; whether it can be.

    The kernel cuts up what is sent at once, and puts together what belongs together.  An older
    one only cuts, and the receiver reads one by one.
    """
    if sys.platform != "linux":
        return False
    try:
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, length)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    return True


def header_to(target: Place) -> bytes:
    """What stands before the payload of a datagram through a proxy.  RFC 1928 section 7."""
    return bytes(Datagram(Address.of(target), b""))


def flood(loop: Loop, sock: socket.socket, datagram: bytes) -> Task:
    """As many datagrams as the socket takes, and nobody waits for an answer."""
    with Waiting(loop, sock, WRITE):
        while True:
            yield
            try:
                for _ in range(32):
                    sock.send(datagram)
            except OSError:
                pass
