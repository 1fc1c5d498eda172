"""
``--status ADDRESS:PORT``: a web page that shows what the proxy is doing, and the same for programs.

The page is three files beside this one, and asks for nothing from elsewhere.  `Pulse` looks once a
second what there is to tell, and all who watch are told the same text; `Handler` answers one request
per connection; `StatusPage` is the two of them, with a beginning and an end.

The one idea: whoever comes can only look.  There is no method but GET and HEAD, no request
changes anything, and how many may look at a time is limited, so that no number of them can disturb
the proxy.  A page of somebody else's that has its name point here (DNS rebinding) is found out by the
Host that its browser sends.

Not here: what is counted (figures.py), the conversations (conversations.py), the metrics (metrics.py).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import platform
import socket
import socketserver
import sys
import threading
import time
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pkgutil import get_data
from typing import Any, Callable, Deque, Dict, Iterator, Optional, Set, Tuple

from .. import __version__
from ..descriptors import descriptors
from ..protocol import Address, ReplyCode
from ..session import COMMAND_WORDS, rfc3339, word
from .banner import in_url
from .figures import Figures, Report, WatchedServer

logger = logging.getLogger("socks5srv")

SECOND = 1.0            # between two looks
SOON = 0.2              # seconds until a session that has just begun or ended is told of
HISTORY = 120           # looks that the plot shows
WATCHERS = 16           # of /events at a time
REQUESTS = 16           # others at a time
PROBES = 8              # beyond those, for /healthz and /readyz, and for connections that have not asked yet
DESCRIPTORS = WATCHERS + REQUESTS + PROBES + 8       # for all of these, the listener, and files that are read: the page is there when the proxy is full
ASKING_TIME = 10.0      # seconds that a request may take to come
TAKING_TIME = 5.0       # seconds that somebody may take for what is sent
LOOK = 0.5              # seconds between two looks for who is too slow
LONGEST = 16 * 1024     # octets of a request

HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}
FILES = {
    "/": ("status.html", "text/html; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/status.svg": ("status.svg", "image/svg+xml"),
}
PROBED = ("/healthz", "/readyz")        # whose answers are so short that none waits for its reader
NO_METRICS = 'the metrics need a package that is not installed: pip install "socks5srv[metrics]"\n'


class Pulse:
    """What there is to tell, looked up once a second, for all who watch."""

    def __init__(self, server: WatchedServer) -> None:
        self.server = server
        self.started = time.time()
        self.clock = time.monotonic()
        self.news = threading.Condition()
        self.number = 0                 # of the text
        self.text = ""                  # what is told now
        self.watchers = 0
        self.history: Deque[Tuple[float, float]] = deque(maxlen=HISTORY)
        self.next_look = 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, name="socks5srv-pulse", daemon=True)

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                self.beat()
            except Exception:
                logger.exception("a bug, met while looking what there is to tell")
            self.rest()

    def beat(self) -> None:
        """One look, which is drawn only if a second has gone by."""
        reports = self.server.reports(sessions=self.watchers > 0)
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + SECOND
            self.history.append(sum_of_rates(reports))
        if self.watchers:
            self.tell(json.dumps(self.facts(reports)))

    def tell(self, text: str) -> None:
        with self.news:
            self.text, self.number = text, self.number + 1
            self.news.notify_all()

    def rest(self) -> None:
        """Until the next look, or until there is news, if anybody wants to hear it."""
        news = self.server.book.news
        if self.watchers:
            self.stopped.wait(SOON)
            news.wait(max(0.0, self.next_look - time.monotonic()))
        else:
            news.clear()
            while not self.stopped.is_set() and not self.watchers and time.monotonic() < self.next_look:
                self.stopped.wait(SOON)
        news.clear()

    def now(self) -> Dict[str, Any]:
        return self.facts(self.server.reports())

    def facts(self, reports: Dict[int, Report]) -> Dict[str, Any]:
        """What /status.json says; its names are documented in the README, and stable."""
        figures = sum_of_figures(reports)
        server, options = self.server, self.server.options
        reason = server.not_ready()
        up, down = sum_of_rates(reports)
        sessions = [{**row, "worker": number} for number, report in reports.items() for row in report.sessions]
        return {
            "version": __version__, "python": platform.python_version(), "started": rfc3339(self.started),
            "uptime": round(time.monotonic() - self.clock, 3),
            "listening": [f"socks5h://{listener.address}" for listener in server.listeners],
            "auth": "password" if server.users is not None else "none",
            "commands": [COMMAND_WORDS[command] for command in sorted(server.commands)],
            "workers": options.workers, "ready": not reason, "reason": reason,
            "live": sum(sum(report.live.values()) for report in reports.values()),
            "sessions": sorted(sessions, key=lambda row: int(row["id"])),
            "recent": self.server.conversations(),
            "counters": counters(figures),
            "rates": {
                "up": round(up), "down": round(down),
                "history": {"seconds": SECOND, "up": [round(up) for up, _down in self.history], "down": [round(down) for _up, down in self.history]},
            },
        }

    def stop(self) -> None:
        self.stopped.set()
        with self.news:
            self.news.notify_all()
        self.server.book.news.set()
        self.thread.join()


def sum_of_figures(reports: Dict[int, Report]) -> Figures:
    figures = Figures()
    for report in reports.values():
        figures.merge(report.figures)
    return figures


def sum_of_rates(reports: Dict[int, Report]) -> Tuple[float, float]:
    return sum(report.rates[0] for report in reports.values()), sum(report.rates[1] for report in reports.values())


def counters(figures: Figures) -> Dict[str, Any]:
    """The figures that a person looks at."""
    replies: Dict[str, int] = {code.name.lower(): 0 for code in ReplyCode}
    for (_command, reply), number in figures.by("requests").items():
        replies[reply] = replies.get(reply, 0) + number
    return {
        "clients": figures.sum_of("clients", "taken"), "turned_away": figures.sum_of("clients", "turned_away"),
        "sessions": {event: number for (event,), number in figures.by("sessions").items()},
        "replies": replies, "up": figures.up, "down": figures.down,
        "failed_logins": figures.sum_of("auth_attempts", "username_password", "failure"),
        "handshake_failures": {reason: number for (reason,), number in figures.by("handshake_failures").items()},
    }


# --- one request ---

class Limited:
    """A stream of which only so much is read: what is longer ends there."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.left = LONGEST

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self.stream.readline(min(self.left, limit) if limit >= 0 else self.left)
        self.left -= len(line)
        return line

    def close(self) -> None:
        self.stream.close()

    @property
    def closed(self) -> bool:
        return bool(self.stream.closed)


class Handler(BaseHTTPRequestHandler):
    """One request; then the connection is closed."""

    server: HttpServer
    protocol_version = "HTTP/1.1"
    timeout = TAKING_TIME           # for one octet, or for one call of sendall(); the whole request: ASKING_TIME

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = Limited(self.rfile)

    def handle(self) -> None:
        self.close_connection = True
        try:
            self.handle_one_request()
        except OSError as error:        # it has gone, or is too slow
            logger.debug("status page: %s has gone: %s", self.client_address[0], error)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        welcome = self.server.has_asked(self.connection, path in PROBED)
        refusal = self.refusal(path)
        if not welcome:
            self.answer("too many are looking at this page\n", status=HTTPStatus.SERVICE_UNAVAILABLE, Retry_After="1")
        elif refusal:
            self.answer(refusal[1] + "\n", status=refusal[0])
        elif path in FILES:
            name, kind = FILES[path]
            self.answer(get_data(__package__ or "", name) or b"", kind)
        elif path.startswith("/conversations/"):
            self.tell_conversation(path[len("/conversations/"):])
        else:
            {
                "/status.json": self.tell_status, "/events": self.tell_events, "/metrics": self.tell_metrics,
                "/healthz": self.tell_health, "/readyz": self.tell_readiness,
            }.get(path, self.tell_nothing)()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer("this page can only be looked at\n", status=HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

    # --- who may ask ---

    def refusal(self, path: str) -> Optional[Tuple[HTTPStatus, str]]:
        """The status and the sentence for who should not be answered; None for who may."""
        old, self.request_version = self.request_version == "HTTP/0.9", self.protocol_version    # or it would get no headers
        if self.rfile.left <= 0:        # and what is cut off may be its Host
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "this is too long"
        if old:
            return HTTPStatus.BAD_REQUEST, "the version of HTTP is lacking"
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1:
            return HTTPStatus.BAD_REQUEST, "one Host is enough"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and self.headers.get("Sec-Fetch-Mode") != "navigate":
            return HTTPStatus.FORBIDDEN, "this is not for other web pages"
        if hosts and not self.server.page.is_called(hosts[0], path):
            return HTTPStatus.MISDIRECTED_REQUEST, f"this page is at {self.server.page.url}"
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

    def answer_json(self, facts: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.answer(json.dumps(facts) + "\n", "application/json", status)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """What http.server itself complains of, without its page and without the words of whoever asked."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.command, self.request_version = self.command or "GET", self.protocol_version
            self.answer(HTTPStatus(code).phrase + "\n", status=HTTPStatus(code))

    def tell_nothing(self) -> None:
        self.answer("there is no such page\n", status=HTTPStatus.NOT_FOUND)

    def tell_status(self) -> None:
        self.answer_json(self.server.page.pulse.now())

    def tell_conversation(self, name: str) -> None:
        id = name[:-len(".json")] if name.endswith(".json") else ""
        found = self.server.page.server.conversation(int(id)) if id.isascii() and id.isdigit() and len(id) < 19 else None
        if found is None:
            self.answer_json({"error": "it is not kept"}, HTTPStatus.NOT_FOUND)
        else:
            self.answer_json(found)

    def tell_metrics(self) -> None:
        try:
            from .metrics import exposition     # which needs an extra
        except ImportError:
            self.answer(NO_METRICS, status=HTTPStatus.NOT_IMPLEMENTED)
            return
        self.answer(*exposition(self.server.page.server, self.headers.get("Accept", "")))

    def tell_health(self) -> None:
        self.answer("ok\n")

    def tell_readiness(self) -> None:
        reason = self.server.page.server.not_ready()
        self.answer(f"{reason or 'ok'}\n", status=HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK)

    def tell_events(self) -> None:
        """Server-sent events: one a second, until the reader goes, or is too slow."""
        with self.server.page.one_more_watches() as welcome:
            if not welcome:
                self.answer("too many are watching\n", status=HTTPStatus.SERVICE_UNAVAILABLE, Retry_After="10")
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            if self.command != "HEAD":
                self.server.has_patience(self.connection)
                self.stream_events()

    def stream_events(self) -> None:
        pulse = self.server.page.pulse
        number, text = -1, json.dumps(pulse.now())
        while not pulse.stopped.is_set():
            self.wfile.write(f"data: {text}\n\n".encode())
            with pulse.news:
                number = pulse.number if number < 0 else number
                pulse.news.wait_for(lambda number=number: pulse.stopped.is_set() or pulse.number != number, 5 * SECOND)  # type: ignore[misc]
                number, text = pulse.number, pulse.text

    # --- what http.server would do otherwise ---

    def version_string(self) -> str:
        return "socks5srv"

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("status page: " + format, *(word(each) if isinstance(each, str) else each for each in arguments))


class HttpServer(HTTPServer):
    """
    A few threads.  When all are taken, the connection that has been silent longest makes room for the next one.

    So to connect and say nothing keeps out no other client; and who keeps many answers waiting, no probe.
    """

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"
    request_queue_size = 32

    def __init__(self, address: Address, page: StatusPage) -> None:
        self.page = page
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.lock = threading.Lock()
        self.connections: Dict[socket.socket, float] = {}       # until when it has to have asked, by time.monotonic()
        self.silent: Dict[socket.socket, None] = {}             # of those, which have not asked yet; the oldest first
        self.busy: Dict[socket.socket, None] = {}               # and which have asked for more than a probe does
        self.threads: Set[threading.Thread] = set()
        super().__init__(address.sockaddr, Handler)

    def server_bind(self) -> None:
        """Without asking the resolver for our name, as http.server does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.page.address.host != "::")
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> Tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            threading.Event().wait(0.1)         # out of descriptors: it stays in the backlog, and would wake us at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            crowded_out = next(iter(self.silent), None) if len(self.connections) >= WATCHERS + REQUESTS + PROBES else None
            if crowded_out is not None:
                del self.silent[crowded_out]
            room = crowded_out is not None or len(self.connections) < WATCHERS + REQUESTS + PROBES
            if room:
                self.connections[request] = time.monotonic() + ASKING_TIME
                self.silent[request] = None
        if crowded_out is not None:
            shut(crowded_out)
        if not room:
            self.turn_away(request)
            return
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), name="socks5srv-status", daemon=True)
        try:
            thread.start()
        except RuntimeError:                    # no more threads: the page has to stay alive, whatever there is
            self.turn_away(request)

    def turn_away(self, request: socket.socket) -> None:
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        thread = threading.current_thread()
        with self.lock:
            self.threads.add(thread)
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)
            with self.lock:
                self.threads.discard(thread)

    def shutdown_request(self, request: Any) -> None:
        """Wherever it ends: its place is free."""
        with self.lock:
            for places in (self.connections, self.silent, self.busy):
                places.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("a bug, met while showing the status page")

    def has_asked(self, connection: socket.socket, probe: bool) -> bool:
        """Whether it may have its answer; a probe always may, since its answer is short."""
        self.wait_until(connection, time.monotonic() + 2 * TAKING_TIME)
        with self.lock:
            self.silent.pop(connection, None)
            if probe:
                return True
            if len(self.busy) >= WATCHERS + REQUESTS:
                return False
            self.busy[connection] = None
            return True

    def has_patience(self, connection: socket.socket) -> None:
        """This one watches, as long as it likes."""
        self.wait_until(connection, float("inf"))

    def wait_until(self, connection: socket.socket, until: float) -> None:
        with self.lock:
            if connection in self.connections:
                self.connections[connection] = until

    def service_actions(self) -> None:
        """Called every now and then: hang up on who drips its request, or our answer."""
        self.page.server.attempt(self.hang_up, lambda until: until < time.monotonic())

    def hang_up(self, on: Callable[[float], bool]) -> None:
        with self.lock:
            late = [connection for connection, until in self.connections.items() if on(until)]
        for connection in late:
            shut(connection)

    def server_close(self) -> None:
        super().server_close()
        self.hang_up(lambda _until: True)
        with self.lock:
            threads = list(self.threads)
        for thread in threads:
            thread.join(1)


def shut(connection: socket.socket) -> None:
    """Have its thread find that it has ended."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class StatusPage:
    """The page of a server, from open to close.  OSError if it cannot listen there."""

    def __init__(self, server: WatchedServer, address: Address, others: bool = False) -> None:
        self.server = server
        self.address = address
        self.others = others            # other computers may come, by names that we do not know
        self.lock = threading.Lock()
        self.pulse = Pulse(server)
        self.http = HttpServer(address, self)
        self.address = Address.of(self.http.server_address)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(LOOK,), name="socks5srv-status-accept", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{in_url(self.address)}/"

    def __enter__(self) -> StatusPage:
        descriptors.set_aside(DESCRIPTORS)
        self.pulse.thread.start()
        self.thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.pulse.stop()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
        descriptors.set_aside(-DESCRIPTORS)

    @contextlib.contextmanager
    def one_more_watches(self) -> Iterator[bool]:
        with self.lock:
            welcome = self.pulse.watchers < WATCHERS
            self.pulse.watchers += welcome
        try:
            yield welcome
        finally:
            with self.lock:
                self.pulse.watchers -= welcome

    def is_called(self, host: str, path: str) -> bool:
        """
        Whether this is a Host that we have.

        Who rebinds a name cannot do it with an address, nor with "localhost".  Where others may come,
        it may be through a port or an address that leads here, and monitors use whatever name they
        have: they see no names.
        """
        name, port = split_host(host)
        if not self.others:
            return port == self.address.port and name.partition("%")[0] in ("localhost", self.address.host)
        return path in ("/metrics", *PROBED) or name in ("localhost", socket.gethostname().lower()) or is_ip(name)


def split_host(text: str) -> Tuple[str, int]:
    """A Host in its two parts; port -1 if it is nonsense."""
    host, colon, port = text.strip().lower().rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text.strip().lower(), "80"
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else -1
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host, number


def is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
