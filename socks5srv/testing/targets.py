"""
Servers to talk to behind the proxy: an echo, a web server, an FTP server, a DNS server.

    with EchoServer() as echo, start() as proxy:
        ...                                     # connect to echo.host, echo.port through the proxy
        assert echo.received == b"hello"

Each serves in the background on a free port as soon as it is made, until close() or the end of its ``with`` block,
and keeps what it saw.  They are toys: they know just enough of their protocols for a client to be content.
"""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, TypeVar, Union

T = TypeVar("T", bound="Target")

PATIENCE = 10.0     # seconds after which a target gives up on a client


class Target:
    """
    What they have in common: `host`, `port`, `address`; close(); and `clients`, the addresses that they were called from.

    Behind a proxy those are the proxy's.
    """

    host: str
    port: int

    def __init__(self) -> None:
        self.clients: List[Tuple[str, int]] = []
        self.servers: List[Server] = []

    def serve(self, server: Server) -> None:
        self.servers.append(server)
        self.host, self.port = server.server_address[:2]        # type: ignore[assignment]

    @property
    def address(self) -> Tuple[str, int]:
        return self.host, self.port

    def close(self) -> None:
        """Serve no more, and end all connections.  May be called again."""
        while self.servers:
            self.servers.pop().close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.host}:{self.port}>"


class Server(socketserver.TCPServer):
    """Serves in a thread, until close().  (Its own serve_forever() would take half a second to end.)"""

    request_queue_size = 128
    ending = False

    def __init__(self, target: Target, handler: Type[socketserver.BaseRequestHandler], host: str, port: int = 0) -> None:
        self.target = target
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)
        self.thread = threading.Thread(target=self.run, name="target", daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.ending:
            self.handle_request()

    def verify_request(self, _request: Any, _client_address: Any) -> bool:
        return not self.ending

    def close(self) -> None:
        self.ending = True
        with socket.socket(self.address_family, self.socket_type) as sock:     # a client, so that it looks
            sock.settimeout(PATIENCE)
            sock.connect(self.server_address)
            if self.socket_type == socket.SOCK_DGRAM:
                sock.send(b"")
        self.thread.join()
        self.server_close()


class TcpServer(Server):
    """A thread for each connection, which ends with the server at the latest."""

    def __init__(self, *arguments: Any) -> None:
        self.connections: Dict[Any, threading.Thread] = {}
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.converse, args=(request, client_address), name="target", daemon=True)
        thread.start()
        self.connections = {known: other for known, other in self.connections.items() if other.is_alive()}
        self.connections[request] = thread

    def converse(self, request: Any, client_address: Any) -> None:
        request.settimeout(PATIENCE)
        try:
            with suppress(OSError, ValueError, IndexError):     # the client has left, or says what no toy understands
                self.finish_request(request, client_address)
        finally:
            self.shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection, thread in self.connections.items():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()


class UdpServer(Server, socketserver.UDPServer):
    """Answers one datagram after the other."""

    max_packet_size = 65535

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone, or has sent what is no question: no answer."""


# --- echo ---

class EchoServer(Target):
    """
    Sends back what it gets, over TCP and over UDP, on the same port.  ``EchoServer("::1")`` is on IPv6.

    `received` is all that came over TCP, `datagrams` a list of what came over UDP.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.received = b""
        self.datagrams: List[bytes] = []
        tcp, udp = on_one_port(self, host)
        self.serve(tcp)
        self.serve(udp)


def on_one_port(target: Target, host: str) -> Tuple[TcpServer, UdpServer]:
    for _ in range(100):
        tcp = TcpServer(target, EchoOverTcp, host)
        with suppress(OSError):         # UDP has another user of that port
            return tcp, UdpServer(target, EchoOverUdp, host, tcp.server_address[1])
        tcp.close()
    raise OSError("no port is free for both TCP and UDP")


class EchoOverTcp(socketserver.BaseRequestHandler):
    server: TcpServer

    def handle(self) -> None:
        target: Any = self.server.target
        target.clients.append(self.client_address[:2])
        for octets in iter(lambda: self.request.recv(65536), b""):
            with target.lock:
                target.received += octets
            self.request.sendall(octets)


class EchoOverUdp(socketserver.BaseRequestHandler):
    server: UdpServer

    def handle(self) -> None:
        target: Any = self.server.target
        target.clients.append(self.client_address[:2])
        octets, sock = self.request
        target.datagrams.append(octets)
        sock.sendto(octets, self.client_address)


# --- HTTP ---

class Seen(NamedTuple):
    """A request that a WebServer has had."""

    method: str
    path: str
    headers: Dict[str, str]
    body: bytes


class WebServer(Target):
    """
    A web server.  `pages` are bodies by path, text or octets; every other path is answered with JSON that tells what
    was asked: ``{"method": "GET", "path": "/", "host": "api.example.com"}``.

    `requests` is a list of what it was asked.
    """

    def __init__(self, pages: Optional[Mapping[str, Union[str, bytes]]] = None, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.pages = dict(pages or {})
        self.requests: List[Seen] = []
        self.serve(TcpServer(self, Page, host))

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


class Page(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        target = self.server.target
        target.clients.append(self.client_address[:2])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target.requests.append(Seen(self.command, self.path, dict(self.headers.items()), body))
        asked = {"method": self.command, "path": self.path, "host": self.headers.get("Host", "").split(":")[0]}
        page = target.pages.get(self.path, json.dumps(asked))
        octets = page.encode() if isinstance(page, str) else page
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if self.path in target.pages else "application/json")
        self.send_header("Content-Length", str(len(octets)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(octets)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_arguments: object) -> None:
        """It keeps what it saw in a list."""


# --- FTP, active mode: it calls the client back ---

FTP_ANSWERS = {"USER": "230 come in", "PASS": "230 come in", "PWD": '257 "/"', "TYPE": "200 so be it", "QUIT": "221 bye"}


class FtpServer(Target):
    """
    An FTP server that knows active mode only: to deliver a file it connects to where PORT or EPRT says.

    So a client behind a proxy needs BIND.  `files` are octets by name; `commands` is a list of the lines
    that it was told, `calls` of the addresses that it has called.
    """

    def __init__(self, files: Optional[Mapping[str, bytes]] = None, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.files = dict(files or {"hello.txt": b"hello\n"})
        self.commands: List[str] = []
        self.calls: List[Tuple[str, int]] = []
        self.serve(TcpServer(self, Ftp, host))


class Ftp(socketserver.StreamRequestHandler):
    """RFC 959, and EPRT of RFC 2428."""

    server: Any
    where: Optional[Tuple[str, int]] = None

    def handle(self) -> None:
        self.target = self.server.target
        self.target.clients.append(self.client_address[:2])
        self.say("220 ready")
        for line in self.rfile:
            command = line.decode(errors="replace").strip()
            self.target.commands.append(command)
            verb, _, argument = command.partition(" ")
            do = getattr(self, f"do_{verb.upper()}", None)
            self.say(do(argument) if do is not None else FTP_ANSWERS.get(verb.upper(), "502 not here"))
            if verb.upper() == "QUIT":
                return

    def say(self, line: str) -> None:
        self.wfile.write(line.encode() + b"\r\n")

    def do_PORT(self, argument: str) -> str:
        numbers = argument.split(",")
        self.where = ".".join(numbers[:4]), int(numbers[4]) << 8 | int(numbers[5])
        return "200 I will call there"

    def do_EPRT(self, argument: str) -> str:
        _, _family, host, port, _ = argument.split("|")
        self.where = host, int(port)
        return "200 I will call there"

    def do_RETR(self, name: str) -> str:
        if self.where is None:
            return "425 PORT or EPRT first"
        if name not in self.target.files:
            return "550 no such file"
        self.say("150 calling")
        self.target.calls.append(self.where)
        try:
            with socket.create_connection(self.where, PATIENCE) as data:
                data.sendall(self.target.files[name])
        except OSError as error:
            return f"425 {error.strerror or error}"
        return "226 done"


# --- DNS ---

class DnsServer(Target):
    """
    A DNS server, over UDP: `names` are IP addresses by name, for questions of type A and AAAA; no other name exists.

    `questions` is a list of the names that it was asked for.
    """

    def __init__(self, names: Optional[Mapping[str, str]] = None, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.names = {name.lower(): address for name, address in (names or {}).items()}
        self.questions: List[str] = []
        self.serve(UdpServer(self, Dns, host))


class Dns(socketserver.BaseRequestHandler):
    """Just enough of RFC 1035: one question, one answer."""

    server: UdpServer

    def handle(self) -> None:
        target: Any = self.server.target
        message, sock = self.request
        name, kind, end = question_in(message)
        target.clients.append(self.client_address[:2])
        target.questions.append(name)
        records = answers(target.names.get(name), kind)
        known = 0 if name in target.names else 3        # NXDOMAIN
        head = message[:2] + struct.pack("!5H", 0x8180 | known, 1, len(records), 0, 0)
        sock.sendto(head + message[12:end] + b"".join(records), self.client_address)


def question_in(message: bytes) -> Tuple[str, int, int]:
    """The name and the type that are asked for, and where the question ends."""
    labels, at = [], 12
    while message[at]:
        labels.append(message[at + 1:at + 1 + message[at]].decode("ascii").lower())
        at += 1 + message[at]
    (kind,) = struct.unpack_from("!H", message, at + 1)
    return ".".join(labels), kind, at + 5


def answers(address: Optional[str], kind: int) -> List[bytes]:
    """The record with this address, if it is of the type that was asked for: 1 is A, 28 is AAAA."""
    if address is None or kind != (28 if ":" in address else 1):
        return []
    octets = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    return [struct.pack("!3HIH", 0xC00C, kind, 1, 60, len(octets)) + octets]     # C00C: the name in the question
