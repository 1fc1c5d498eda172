"""
The proxy as users start it, targets to reach through it, and real programs to run.

A test asks its client for something that only its target can know, and then asks the proxy's log whether the client
came through it, and how: `Proxy.sessions()` waits for the lines, so that no test ever sleeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, ClassVar, Dict, Iterable, Iterator, List, Match, NoReturn, Optional, Set, Tuple
from urllib.parse import quote

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HERE = pathlib.Path(__file__).resolve().parent

PATIENCE = 30       # seconds for what takes milliseconds, on a machine that is busy with other things
USER, PASSWORD = "alice", "s3cret:/@word"       # with all that has a meaning of its own in a URL


# --- what is needed ---

def need(*tools: str) -> str:
    """The path of the first of these programs that is there.  Without one: a skip, and a failure in CI."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", os.path.dirname(sys.executable)])
    for tool in tools:
        found = shutil.which(tool, path=path)
        if found:
            return found
    lack(f"{tools[0]} is not installed")


def need_module(name: str) -> Any:
    """The Python module of this name, in the same way."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lack(str(error))


def need_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"not on this platform: no ::1 ({error})")


def lack(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and in CI nothing may be missing", pytrace=False)
    pytest.skip(reason)


# --- programs ---

def environment(**more: str) -> Dict[str, str]:
    """Ours, without whatever would tell a proxy or a client to do something else."""
    ours = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("SOCKS", "GIT_", "PROXYCHAINS")) and not name.lower().endswith("_proxy")
    }
    return {**ours, "PYTHONPATH": str(ROOT), **more}


def run(*words: object, stdin: bytes = b"", code: int = 0, cwd: Optional[pathlib.Path] = None, **more: str) -> bytes:
    """Run a program to its end; its output.  `more` goes into its environment."""
    argv = [str(word) for word in words]
    done = subprocess.run(argv, input=stdin, capture_output=True, cwd=cwd, env=environment(**more), timeout=PATIENCE, check=False)
    errors = done.stderr.decode(errors="replace")
    assert done.returncode == code, f"{' '.join(argv)} ended with {done.returncode} instead of {code}:\n{errors}"
    return done.stdout


# --- the proxy ---

def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Logged:
    """One session as the log tells of it: its line, and the messages that `-vv` shows."""

    def __init__(self, line: Dict[str, Any], messages: List[Tuple[str, Dict[str, str]]]) -> None:
        self.line = line
        self.messages = messages
        self.event: str = line["event"]
        self.user: str = line["user"] or ""
        self.command: str = line["command"]
        self.host: str = line["host"]
        self.port: int = line["port"]
        self.reply: Optional[int] = line["reply"]
        self.up: int = line["up"]
        self.down: int = line["down"]

    def said(self, message: str, field: str) -> str:
        """What a field of a message said, the first of its kind."""
        return next(fields[field] for name, fields in self.messages if name == message)

    @property
    def methods(self) -> List[str]:
        return self.said("Greeting", "METHODS").split(",")

    @property
    def asked(self) -> Tuple[str, str]:
        """ATYP and DST.ADDR of the request, as the client wrote it."""
        return self.said("Request", "ATYP"), self.said("Request", "DST.ADDR")

    def __repr__(self) -> str:
        return f"<Logged {self.line} {self.messages}>"


class Proxy:
    """``python -m socks5srv 0`` in a process of its own, and all that it logs."""

    def __init__(self, directory: pathlib.Path, *options: str, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port_file = directory / "port"
        self.records: List[Dict[str, Any]] = []
        self.text = ""
        self.news = threading.Condition()
        argv = [
            sys.executable, "-m", "socks5srv", "0", "--bind", host, "--port-file", str(self.port_file),
            "--log-format", "json", "-vv", "--workers", os.environ.get("SOCKS5SRV_TEST_WORKERS", "1"), *options,
        ]
        self.process = subprocess.Popen(argv, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        try:
            self.port = self.wait_for_port()
        except BaseException:
            self.process.kill()
            raise

    def wait_for_port(self) -> int:
        until = time.monotonic() + PATIENCE
        while not self.port_file.exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.005)
                self.reader.join()
                pytest.fail(f"the proxy has ended with {self.process.returncode}:\n{self.text}")
            assert time.monotonic() < until, f"no port file after {PATIENCE} s:\n{self.text}"
        return int(self.port_file.read_text())

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for octets in self.process.stderr:
            line = octets.decode()
            with self.news:
                self.text += line
                if line.startswith("{"):        # else a traceback, which stop() complains of
                    self.records.append(json.loads(line))
                self.news.notify_all()

    # --- its addresses ---

    @property
    def address(self) -> str:
        return f"{in_url(self.host)}:{self.port}"

    def url(self, scheme: str = "socks5h", login: bool = False) -> str:
        credentials = f"{USER}:{quote(PASSWORD, safe='')}@" if login else ""
        return f"{scheme}://{credentials}{self.address}"

    # --- what it has logged ---

    def sessions(self, count: int, **facts: Any) -> List[Logged]:
        """The sessions with these facts: at least so many, and as many as have been begun."""
        def found() -> List[Dict[str, Any]]:
            return [line for line in self.ended() if all(line[name] == value for name, value in facts.items())]

        with self.news:
            come = self.news.wait_for(lambda: len(found()) >= count and len(self.ended()) == len(self.begun()), PATIENCE)
            number, ended, begun = len(found()), len(self.ended()), len(self.begun())
            assert come, f"{number} of {count} sessions with {facts} have ended, and {ended} of {begun} at all:\n{self.text}"
            return [Logged(line, self.messages(line["id"])) for line in found()]

    def ended(self) -> List[Dict[str, Any]]:
        return [line for line in self.records if line.get("client") and line["event"] != "open"]

    def begun(self) -> Set[int]:
        """The numbers of the sessions in which there has been a message."""
        return {int(match[1]) for match in map(self.message, self.records) if match}

    def session(self, **facts: Any) -> Logged:
        """The only session with these facts."""
        found = self.sessions(1, **facts)
        assert len(found) == 1, found
        return found[0]

    def messages(self, number: int) -> List[Tuple[str, Dict[str, str]]]:
        found = filter(None, map(self.message, self.records))
        return [(match[2], dict(re.findall(r"([A-Z.]+)=(\S*)", match[3]))) for match in found if int(match[1]) == number]

    @staticmethod
    def message(record: Dict[str, Any]) -> Optional[Match[str]]:
        """A line that shows a message: its session's number, its name and its fields."""
        return re.match(r"#(\d+) [<>] (\w+) (.*)", record.get("message", ""))

    # --- its end ---

    def stop(self) -> None:
        """End it as a user would, and see that it has nothing to complain of."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)
        self.reader.join()
        assert self.process.returncode == 0, self.text
        assert not self.port_file.exists()
        assert "Traceback" not in self.text, self.text
        assert not [record for record in self.records if record.get("level") in ("warning", "error", "critical")], self.text
        assert PASSWORD not in self.text

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, kind: object, *_exception: object) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.process.kill()
            self.process.wait()
            self.reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()


# --- targets: each knows something that nobody else does ---

@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[Any]:
    """Serve in a thread, until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Server(socketserver.TCPServer):
    """At a port of its own, and it knows these facts."""

    def __init__(self, handler: Any, host: str = "127.0.0.1", **facts: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), handler)
        self.port: int = self.server_address[1]
        self.__dict__.update(facts)


class TcpServer(Server, socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


class UdpServer(Server, socketserver.UDPServer):
    max_packet_size = 65536


class WebServer(TcpServer, ThreadingHTTPServer):
    def server_bind(self) -> None:      # http.server's asks the resolver for our name
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]


BIG = 100       # MiB


def blocks(count: int = BIG) -> Iterator[bytes]:
    """So many MiB, no two alike: a part that is lost, doubled or moved changes the digest."""
    block = hashlib.shake_128(b"socks5srv").digest(1 << 20)
    for number in range(count):
        yield number.to_bytes(8, "big") + block[8:]


def digest(octets: Any) -> str:
    """The SHA-256 of octets, or of an iterable of them."""
    sha = hashlib.sha256()
    for part in [octets] if isinstance(octets, bytes) else octets:
        sha.update(part)
    return sha.hexdigest()


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


class Page(Quiet):
    """The web site's secret; /big is big; /echo/X is the secret and X; what is sent is answered with its SHA-256."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/big":
            self.answer_with(BIG << 20, blocks())
        else:
            self.answer(self.server.secret + self.path.partition("/echo/")[2])

    def do_PUT(self) -> None:
        self.answer(digest(self.rfile.read(int(self.headers["Content-Length"]))))

    do_POST = do_PUT

    def answer(self, text: str, kind: str = "text/plain") -> None:
        self.answer_with(len(text.encode()), [text.encode()], kind)

    def answer_with(self, size: int, body: Iterable[bytes], kind: str = "text/plain") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.writelines(body)


def website(host: str = "127.0.0.1") -> Any:
    return serving(WebServer(Page, host, secret=secrets.token_hex()))


def files(directory: pathlib.Path) -> Any:
    """A web site of the files in a folder."""
    class Files(Quiet, SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(directory))

    return serving(WebServer(Files))


class DigestAtEnd(socketserver.StreamRequestHandler):
    """Answers only when the client has ended: the SHA-256 of all it sent, and the server's secret."""

    server: Any

    def handle(self) -> None:
        self.wfile.write(f"{digest(iter(lambda: self.rfile.read(65536), b''))} {self.server.secret}\n".encode())


def digester(host: str = "127.0.0.1") -> Any:
    return serving(TcpServer(DigestAtEnd, host, secret=secrets.token_hex()))


class Program(socketserver.BaseRequestHandler):
    """Does what inetd does: each connection is the standard input and output of a program."""

    server: Any

    def handle(self) -> None:
        argv, connection = self.server.argv, self.request
        subprocess.run(argv, stdin=connection, stdout=connection, stderr=subprocess.DEVNULL, env=environment(), check=False)


def inetd(*argv: object) -> Any:
    return serving(TcpServer(Program, argv=[str(word) for word in argv]))


class Ftp(socketserver.StreamRequestHandler):
    """As much of an FTP server as it takes to send one file in active mode: it calls the client."""

    server: Any

    answers: ClassVar = {"USER": "230 logged in", "PWD": '257 "/"', "TYPE": "200 yes", "EPRT": "200 yes", "RETR": "150 coming"}

    def handle(self) -> None:
        self.say("220 hello")
        for line in self.rfile:
            word, _, rest = line.decode().strip().partition(" ")
            self.say(self.answers.get(word, "502 no such command"))
            if word == "EPRT":
                _, _, host, port, _ = rest.split("|")
                self.client = (host, int(port))
            elif word == "RETR":
                with socket.create_connection(self.client, PATIENCE) as connection:
                    connection.sendall(self.server.content)
                self.say("226 done")

    def say(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\r\n")


def ftp_server(content: bytes) -> Any:
    return serving(TcpServer(Ftp, content=content))


class UdpEcho(socketserver.BaseRequestHandler):
    """Answers with the server's secret and what came."""

    server: Any

    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(self.server.secret + data, self.client_address)


def udp_echo(host: str = "127.0.0.1") -> Any:
    return serving(UdpServer(UdpEcho, host, secret=secrets.token_hex(4).encode()))


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else will get meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def in_threads(count: int, function: Callable[[int], Any]) -> List[Any]:
    """``function(0)`` to ``function(count - 1)``, all at once, each in a thread; their results."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))
