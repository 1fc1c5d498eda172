"""
Homework: what `socks5srv.check` says of a right one, and of the typical mistakes that docs/course/teachers.rst tells teachers of.

The right one is a server of a hundred lines, as a student would write it; each wrong one is the same with one mistake.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import socketserver
import threading
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple, Type

import pytest

from socks5srv.check import QUESTIONS, Examiner, can_bind, table
from socks5srv.client import Proxy, connect
from socks5srv.protocol import RequestFailed
from socks5srv.testing.targets import EchoServer

from .conftest import TIMEOUT
from .docs.pages import blocks, page

PATIENCE = 3.0          # seconds that the examiner waits for an answer, and an association for a datagram
IMPATIENCE = 0.4        # the same, in a first try: most answers that do not come are mistakes that are meant

TEACHERS = " ".join(page("course/teachers").split())


class Closed(Exception):
    """The client has gone in mid-message."""


def hang_up(*socks: socket.socket) -> None:
    for sock in socks:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:         # it has been done, or the other end has gone
            pass


class Homework(socketserver.BaseRequestHandler):
    """CONNECT and UDP ASSOCIATE, for clients that need no login."""

    request: socket.socket

    def handle(self) -> None:
        self.request.settimeout(TIMEOUT)
        try:
            self.converse()
        except (Closed, OSError):
            pass

    def converse(self) -> None:
        if not self.negotiate():
            return
        ver, cmd, _rsv, atyp = self.read(4)
        if ver != 5:
            return
        destination = self.address(atyp)
        if destination is None:
            return self.reply(8)
        if cmd not in (1, 3):
            return self.reply(7)
        if cmd == 3:
            return self.associate()
        try:
            target = self.connect(*destination)
        except (OSError, ValueError) as error:
            return self.reply({ConnectionRefusedError: 5, PermissionError: 2}.get(type(error), 4))
        with target:
            self.reply(0, target.getsockname())
            self.carry(target)

    def negotiate(self) -> bool:
        ver, nmethods = self.read(2)
        if ver != 5:
            return False
        method = 0 if 0 in self.read(nmethods) else 0xFF
        self.request.sendall(bytes([5, method]))
        return method == 0

    def read(self, n: int) -> bytes:
        """Exactly so many octets."""
        octets = b""
        while len(octets) < n:
            more = self.request.recv(n - len(octets))
            if not more:
                raise Closed
            octets += more
        return octets

    def address(self, atyp: int) -> Optional[Tuple[str, int]]:
        if atyp not in (1, 3, 4):
            return None
        octets = self.read({1: 4, 4: 16}.get(atyp) or self.read(1)[0])
        host = octets.decode() if atyp == 3 else str(ipaddress.ip_address(octets))
        return host, int.from_bytes(self.read(2), "big")

    def connect(self, host: str, port: int) -> socket.socket:
        if not host or "\0" in host:
            raise ValueError("no host")
        return socket.create_connection((host, port), TIMEOUT)

    def reply(self, code: int, bound: Tuple[Any, ...] = ("0.0.0.0", 0)) -> None:
        ip = ipaddress.ip_address(bound[0])
        self.request.sendall(bytes([5, code, 0, 1 if ip.version == 4 else 4]) + ip.packed + bound[1].to_bytes(2, "big"))

    def carry(self, target: socket.socket) -> None:
        """Each way until its own end."""
        up = threading.Thread(target=self.copy, args=(self.request, target))
        up.start()
        self.copy(target, self.request)
        up.join()

    def copy(self, one: socket.socket, other: socket.socket) -> None:
        try:
            for octets in iter(lambda: one.recv(65536), b""):
                other.sendall(octets)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            hang_up(one, other)

    # --- UDP ---

    def associate(self) -> None:
        here, client = self.request.getsockname()[0], self.request.getpeername()[0]
        with socket.socket(type=socket.SOCK_DGRAM) as inner, socket.socket(type=socket.SOCK_DGRAM) as outer:
            inner.bind((here, 0))
            outer.bind((here, 0))
            self.reply(0, inner.getsockname())
            back = None
            while True:
                ready, _, _ = select.select([*self.lifeline(), inner, outer], [], [], PATIENCE)
                if self.request in ready or not ready:
                    return
                if inner in ready:
                    octets, sender = inner.recvfrom(65535)
                    if self.is_welcome(sender[0], client):
                        back = sender
                        self.pass_on(outer, octets)
                if outer in ready:
                    data, source = outer.recvfrom(65535)
                    if back is not None:
                        inner.sendto(b"\0\0\0\1" + socket.inet_aton(source[0]) + source[1].to_bytes(2, "big") + data, back)

    def lifeline(self) -> List[socket.socket]:
        """Whose end is the end of the association."""
        return [self.request]

    def is_welcome(self, sender: str, client: str) -> bool:
        return sender == client

    def pass_on(self, outer: socket.socket, octets: bytes) -> None:
        try:
            destination, data = self.taken_apart(octets)
            outer.sendto(data, destination)
        except (OSError, ValueError, IndexError):
            pass

    def taken_apart(self, octets: bytes) -> Tuple[Tuple[str, int], bytes]:
        """Where to, and the payload; ValueError for a fragment, and for what is no header."""
        if octets[2]:
            raise ValueError("a fragment")
        length = {1: 4, 3: 1 + octets[4]}[octets[3]] if octets[3] in (1, 3) else 0
        end = 4 + length + 2
        if not length or len(octets) < end:
            raise ValueError("no header")
        host = socket.inet_ntoa(octets[4:8]) if octets[3] == 1 else octets[5:end - 2].decode()
        return (host, int.from_bytes(octets[end - 2:end], "big")), octets[end:]


# --- the mistakes ---

class EndsWithTheFirst(Homework):
    """The first end is the end of both ways."""

    def copy(self, one: socket.socket, other: socket.socket) -> None:
        try:
            for octets in iter(lambda: one.recv(65536), b""):
                other.sendall(octets)
        except OSError:
            pass
        hang_up(one, other)


class RecvIsAMessage(Homework):
    """One recv() is one message, it thinks."""

    left = b""

    def negotiate(self) -> bool:
        greeting = self.request.recv(4096)
        if greeting[:1] != b"\5" or 0 not in greeting[2:]:
            self.request.sendall(b"\5\xff")
            return False
        self.request.sendall(b"\5\0")
        self.left = self.request.recv(4096)
        return True

    def read(self, n: int) -> bytes:
        octets, self.left = self.left[:n], self.left[n:]
        if len(octets) < n:
            raise Closed
        return octets


class OneErrorForAll(Homework):
    """Whatever goes wrong is 01."""

    def reply(self, code: int, bound: Tuple[Any, ...] = ("0.0.0.0", 0)) -> None:
        super().reply(1 if code else 0, bound)


class ForgetsTheLength(Homework):
    """A name ends with a zero, it thinks, as in C."""

    def address(self, atyp: int) -> Optional[Tuple[str, int]]:
        if atyp != 3:
            return super().address(atyp)
        octets = b""
        while not octets.endswith(b"\0"):
            octets += self.read(1)
        return octets[1:-1].decode(), int.from_bytes(self.read(2), "big")


class DeniesNames(Homework):
    """It denies what is called so, whatever else that is called."""

    def connect(self, host: str, port: int) -> socket.socket:
        if host.lower() == "localhost":
            raise PermissionError
        return super().connect(host, port)


class DeniesAddresses(Homework):
    """It looks the name up, judges the address, and connects to that."""

    def connect(self, host: str, port: int) -> socket.socket:
        for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not ipaddress.ip_address(row[4][0]).is_loopback:
                return super().connect(str(row[4][0]), port)
        raise PermissionError


class TenOctets(Homework):
    """The header of a datagram has ten octets, it thinks: FRAG and ATYP are not looked at."""

    def taken_apart(self, octets: bytes) -> Tuple[Tuple[str, int], bytes]:
        return (socket.inet_ntoa(octets[4:8]), int.from_bytes(octets[8:10], "big")), octets[10:]


class IgnoresFrag(Homework):
    def taken_apart(self, octets: bytes) -> Tuple[Tuple[str, int], bytes]:
        return super().taken_apart(octets[:2] + b"\0" + octets[3:])


class OutlivesItsClient(Homework):
    def lifeline(self) -> List[socket.socket]:
        return []


class ServesEverybody(Homework):
    def is_welcome(self, sender: str, client: str) -> bool:
        return True


# --- what check says ---

@contextmanager
def served(handler: Type[Homework]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(TIMEOUT)


def red(handler: Type[Homework], expected: List[str]) -> List[str]:
    """The questions that such a server fails; if they are not the expected ones, a busy computer is given more time."""
    found = failed(handler, IMPATIENCE)
    return found if found == expected else failed(handler, PATIENCE)


def failed(handler: Type[Homework], patience: float) -> List[str]:
    """But for BIND and UDP over IPv6, which nobody has asked it to have."""
    with served(handler) as port:
        examiner = Examiner(Proxy("127.0.0.1", port), timeout=patience)
        answers = [examiner.answer(question) for question in QUESTIONS if "bind" not in question.name and question.name != "udp_ipv6"]
    return [answer.question for answer in answers if answer.verdict == "fail"]


def test_a_right_one_fails_no_question() -> None:
    assert red(Homework, []) == []


MISTAKES = {
    EndsWithTheFirst: ["The client can half-close and still receive the answer", "The target can half-close and still receive from the client"],
    RecvIsAMessage: ["Messages may come octet by octet", "Data right behind the request reaches the target"],
    ForgetsTheLength: ["CONNECT to a name (ATYP 03) works", "CONNECT to an address written as a name (browsers) works"],
    TenOctets: ["Datagrams reach a name, and its answers the client", "Fragments are dropped, or reassembled", "The relay survives malformed datagrams"],
    IgnoresFrag: ["Fragments are dropped, or reassembled"],
    OutlivesItsClient: ["The association ends with its TCP connection"],
    ServesEverybody: ["Datagrams from another host than the client's are dropped"],
}


@pytest.mark.parametrize("handler", MISTAKES, ids=lambda handler: handler.__name__)
def test_a_typical_mistake_fails_the_questions_that_teachers_are_told(handler: Type[Homework]) -> None:
    if handler is ServesEverybody and not can_bind("127.0.0.2"):
        pytest.skip("not on this platform: 127.0.0.1 is the only loopback address")
    assert red(handler, MISTAKES[handler]) == MISTAKES[handler]
    for question in MISTAKES[handler]:
        assert f"*{question}*" in TEACHERS


def test_one_code_for_all_failures_is_a_warning_and_no_answer_to_bind() -> None:
    with served(OneErrorForAll) as port:
        answers = Examiner(Proxy("127.0.0.1", port), timeout=1).examine()
    odd = {answer.question: answer.observed for answer in answers if answer.verdict == "warn"}
    assert odd["A target that refuses is reported as such"] == "01 general SOCKS server failure"
    assert "A name that does not exist is reported as such" in odd
    assert [answer.verdict for answer in answers if answer.question == "BIND is supported"] == ["fail"]


@pytest.mark.parametrize(("handler", "code"), [(DeniesNames, None), (DeniesAddresses, 2)])
def test_a_rule_on_a_name_is_dodged_by_a_client_that_looks_it_up_by_itself(handler: Type[Homework], code: Optional[int]) -> None:
    with served(handler) as port, EchoServer() as echo:
        assert code_of(f"socks5h://127.0.0.1:{port}", echo.port) == 2
        assert code_of(f"socks5://127.0.0.1:{port}", echo.port) == code


def code_of(url: str, port: int) -> Optional[int]:
    """The code of a refusal; None if there is none."""
    try:
        connect(url, "localhost", port, timeout=TIMEOUT).close()
    except RequestFailed as refusal:
        return int(refusal.code)
    return None


def test_the_grades_in_the_manual_are_what_is_printed() -> None:
    (block,) = [block for block in blocks("text", "course/teachers") if block.startswith("$ python3 -m socks5srv.check ")]
    promised = [line.split() for line in block.splitlines() if line.strip().startswith(("fail ", "warn "))]
    with served(EndsWithTheFirst) as port:
        answers = Examiner(Proxy("127.0.0.1", port), timeout=1).examine()
    printed = [line.split() for line in table(answers).splitlines()]
    assert promised
    assert [line for line in printed if line in promised] == promised
