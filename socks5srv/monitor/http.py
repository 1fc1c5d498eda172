"""
The admin page: what the proxy is doing, for people, monitors and scrapers.

The page is four files beside this one, and asks for nothing from elsewhere.  `Handler` answers one request
per connection; `StatusPage` is the server of the page, with a beginning and an end.

The one idea: a visitor can only look.  There is no method but GET and HEAD, no request changes
anything, and the number of visitors is limited, so that no number of them can disturb the proxy.  A name of
a foreign web page that is made to point here (DNS rebinding) is found out by the Host that the browser sends.

Not here: what there is to tell (stats.py), the sessions step by step (history.py), the metrics (prometheus.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pkgutil import get_data
from typing import Any, Dict, Mapping, Optional, Set, Tuple

from ..descriptors import descriptors
from ..locality import in_url
from ..protocol import Address, without_brackets
from ..server import listening_socket
from ..session import word
from .stats import Publisher, Stats

logger = logging.getLogger("socks5srv")

HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",          # by which http.server knows that it is to answer one request only
}
FILES = {
    "/": ("page/status.html", "text/html; charset=utf-8"),
    "/status.css": ("page/status.css", "text/css; charset=utf-8"),
    "/status.js": ("page/status.js", "text/javascript; charset=utf-8"),
    "/status.svg": ("page/status.svg", "image/svg+xml"),
}
PAGES = {"/status.json": "get_status", "/events": "get_events", "/metrics": "get_metrics", "/readyz": "get_readiness"}
PROBES = ("/healthz", "/readyz")        # whose answers are so short that sending them never waits for the reader
METRICS_LINK = b'<a href="metrics">metrics</a> '      # in the page's foot
NO_METRICS = 'the metrics need a package that is not installed: pip install "socks5srv[metrics]"\n'


# --- one request ---

class RequestStream(io.RawIOBase):
    """The octets of one request: so many at most, and only until a deadline, however slowly they come."""

    most = 16 * 1024        # octets
    seconds = 10.0          # that a request may take to come

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.left = self.most
        self.until = time.monotonic() + self.seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As RawIOBase has it, but socket.timeout after the deadline, and the end where it is too long."""
        timeout = self.connection.gettimeout()
        self.connection.settimeout(max(0.001, self.until - time.monotonic()))
        number = self.connection.recv_into(memoryview(buffer)[:self.left])
        self.connection.settimeout(timeout)
        self.left -= number
        return number


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: StatusPage
    protocol_version = "HTTP/1.1"
    timeout = 5.0           # seconds for one call of sendall(), of which there are two, or one for each event

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.stream = RequestStream(self.connection)
        self.rfile = io.BufferedReader(self.stream)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        refusal = self.refusal(path)
        if not self.server.has_asked(self.connection, is_probe=path in PROBES):
            self.answer("too many requests at a time\n", status=HTTPStatus.SERVICE_UNAVAILABLE, Retry_After="1")
        elif refusal:
            self.answer(refusal[1] + "\n", status=refusal[0])
        elif path in FILES:
            self.get_file(*FILES[path])
        elif path.startswith("/conversations/"):
            self.get_session(path[len("/conversations/"):])
        elif path == "/healthz":
            self.answer("ok\n")
        elif path in PAGES:
            getattr(self, PAGES[path])()
        else:
            self.answer("no such page\n", status=HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer("only GET and HEAD are allowed\n", status=HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

    # --- who may ask ---

    def refusal(self, path: str) -> Optional[Tuple[HTTPStatus, str]]:
        """The status and the sentence, if this is not to be answered."""
        old, self.request_version = self.request_version == "HTTP/0.9", self.protocol_version    # or it would get no headers
        if self.stream.left <= 0:       # and what is cut off may be its Host
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request is too long"
        if old:
            return HTTPStatus.BAD_REQUEST, "the version of HTTP is missing"
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1:
            return HTTPStatus.BAD_REQUEST, "more than one Host"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and self.headers.get("Sec-Fetch-Mode") != "navigate":
            return HTTPStatus.FORBIDDEN, "requests from other web pages are rejected"
        if hosts and not self.server.is_called(hosts[0], path):
            return HTTPStatus.MISDIRECTED_REQUEST, f"this page is at {self.server.url}"
        return None

    # --- answers ---

    def answer(self, body: Any, kind: str = "text/plain; charset=utf-8", status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        octets = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(octets)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(octets)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """What http.server itself complains of, without its page and without the words of the request."""
        self.command, self.request_version = self.command or "GET", self.protocol_version
        self.answer(HTTPStatus(code).phrase + "\n", status=HTTPStatus(code))

    def get_file(self, name: str, kind: str) -> None:
        octets = get_data(__package__ or "", name) or b""
        if importlib.util.find_spec("prometheus_client") is None:
            octets = octets.replace(METRICS_LINK, b"")
        self.answer(octets, kind)

    def get_status(self) -> None:
        self.answer(json.dumps(self.server.publisher.now()) + "\n", "application/json")

    def get_session(self, name: str) -> None:
        id = name[:-len(".json")] if name.endswith(".json") else ""
        found = self.server.stats.session(int(id)) if id.isascii() and id.isdigit() and len(id) < 19 else None
        body = json.dumps(found or {"error": "no such session is kept"}) + "\n"
        self.answer(body, "application/json", HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)

    def get_metrics(self) -> None:
        try:
            from .prometheus import exposition     # which needs an extra
        except ImportError:
            self.answer(NO_METRICS, status=HTTPStatus.NOT_IMPLEMENTED)
            return
        self.answer(*exposition(self.server.stats, self.headers.get("Accept", "")))

    def get_readiness(self) -> None:
        reason = self.server.stats.not_ready()
        self.answer(f"{reason or 'ok'}\n", status=HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK)

    def get_events(self) -> None:
        """Server-sent events: one a second, until the reader goes, or is too slow."""
        publisher = self.server.publisher
        with publisher.watching() as may_watch:
            if not may_watch:
                self.answer("too many readers at a time\n", status=HTTPStatus.SERVICE_UNAVAILABLE, Retry_After="10")
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for text in publisher.texts() if self.command != "HEAD" else ():
                self.wfile.write(f"data: {text}\n\n".encode())

    # --- what http.server would do otherwise ---

    def version_string(self) -> str:
        return "socks5srv"

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("status page: " + format, *(word(each) if isinstance(each, str) else each for each in arguments))


# --- the page ---

class StatusPage(ThreadingHTTPServer):
    """
    The page, from open to close; `facts` are those of /status.json that stay the same.  OSError if it cannot listen there.
    It may be given a socket that does.

    With `others` it is meant for other computers, too, which may call this one by names that are not known here.
    Each connection has a thread, and beyond a limit the one that has been silent longest makes room: so connections
    that say nothing keep out no request, and answers that wait for their readers no probe.
    """

    most_answers = Publisher.most_watchers + 16     # at a time, but for short ones
    most = most_answers + 8                         # connections, silent ones among them
    descriptors = most + 8      # for all connections, the listener, and files: it is there when the proxy is full
    poll_interval = 0.5         # seconds between two looks whether it is to end

    def __init__(self, stats: Stats, facts: Mapping[str, Any], address: Address, others: bool = False, sock: Optional[socket.socket] = None) -> None:
        self.stats, self.others = stats, others
        self.publisher = Publisher(stats, facts)
        self.lock = threading.Lock()
        self.silent: Dict[socket.socket, None] = {}     # which have not asked yet; the oldest first
        self.busy: Set[socket.socket] = set()           # which get more than a short answer
        self.socket = sock or listening_socket(address.sockaddr)
        self.address = Address.of(self.socket.getsockname())
        self.url = f"http://{in_url(self.address)}/"
        socketserver.BaseServer.__init__(self, self.socket.getsockname(), Handler)
        self.thread = threading.Thread(
            target=self.serve_forever, args=(self.poll_interval,), name="socks5srv-status-accept", daemon=True,
        )

    def __enter__(self) -> StatusPage:
        descriptors.set_aside(self.descriptors)
        self.publisher.thread.start()
        self.thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.publisher.stop()
        self.shutdown()
        self.thread.join()
        self.server_close()
        self.hang_up()
        descriptors.set_aside(-self.descriptors)

    def is_called(self, host: str, path: str) -> bool:
        """Whether this Host is one of ours."""
        # DNS rebinding needs a name, so addresses and "localhost" are safe.  With `others` a port or an address may
        # lead here by way of another one, and any Host is accepted for metrics and probes, which show no names.
        name, port = split_host(host)
        if not self.others:
            return port == self.address.port and name.partition("%")[0] in ("localhost", self.address.host)
        is_ip = Address.named(name.partition("%")[0], port).literal is not None
        return is_ip or path in ("/metrics", *PROBES) or name in ("localhost", socket.gethostname().lower())

    # --- connections ---

    def hang_up(self) -> None:
        with self.lock:
            for connection in [*self.silent, *self.busy]:
                shut(connection)

    def get_request(self) -> Tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)         # out of descriptors: it stays in the backlog, and would wake us at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.silent[request] = None
            if len(self.silent) + len(self.busy) > self.most:
                oldest = next(iter(self.silent))
                del self.silent[oldest]
                shut(oldest)
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), name="socks5srv-status", daemon=True)
        try:
            thread.start()
        except RuntimeError:        # no more threads
            self.shutdown_request(request)

    def has_asked(self, connection: socket.socket, is_probe: bool) -> bool:
        """Whether it may have its answer; a probe always may."""
        with self.lock:
            self.silent.pop(connection, None)
            may = is_probe or len(self.busy) < self.most_answers
            if may and not is_probe:
                self.busy.add(connection)
            return may

    def shutdown_request(self, request: Any) -> None:
        """However it ends: its place is free."""
        with self.lock:
            self.silent.pop(request, None)
            self.busy.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logger.debug("status page: %s closed the connection, or is too slow: %s", client_address[0], error)
        else:
            logger.exception("unhandled exception while serving the status page")


def shut(connection: socket.socket) -> None:
    """Have its thread find that it has ended."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def split_host(text: str) -> Tuple[str, int]:
    """A Host in its two parts; port -1 if it is nonsense."""
    host, colon, port = text.strip().lower().rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text.strip().lower(), "80"
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else -1
    return without_brackets(host), number
