"""
What each client makes of each fault: found by running them, and written down in docs/faults.rst.

    python -m tests.testing.clients         # writes docs/faults.rst anew

Each client asks for a page, through a proxy that has one fault, with a timeout of a second; those that know UDP
ask an echo as well.  The table has what they say then, less what is another each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional
from urllib.parse import urlsplit

from socks5srv.protocol import Method
from socks5srv.testing.faults import (
    BoundTo, CloseAfter, Credentials, CredentialsReply, Delay, Drip, DropDatagrams, DuplicateDatagrams, Fault, FragmentDatagrams,
    Greeting, LoginStatus, MethodSelection, Raw, ReorderDatagrams, Reply, ReplyCode, ReplyWith, Request, ResetAfter, SelectMethod,
    Truncate,
)
from socks5srv.testing.proxy import Proxy, start
from socks5srv.testing.targets import EchoServer, WebServer

TABLE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.rst"
PAGE = "It works."
HOST = "web.example.com"
PATIENCE = 1.0      # seconds that a client waits
LOGIN = {"anna": "sesame"}

TOO_LONG = 3.0      # seconds after which it can be said that it does not keep to that

WORKS, WAITS, FOR_EVER, CANNOT = "works", "waits", "waits for ever", "knows no UDP"


class Failed(Exception):
    """What a client says that is a program."""


class Waited(Exception):
    """Its time was up."""


# --- the clients: each returns the page, or raises ---

def fetch(url: str, connect: Callable[[str, int], Any]) -> str:
    """The page, over the socket that the function makes."""
    host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
    with contextlib.closing(HTTPConnection(host, port)) as connection:
        connection.sock = connect(host, port)
        connection.sock.settimeout(PATIENCE)
        connection.request("GET", "/")
        with connection.getresponse() as answer:
            return answer.read().decode()


def pysocks(proxy: Proxy, url: str) -> str:
    socks = importlib.import_module("socks")
    there = (socks.SOCKS5, *proxy.address, True, proxy.user, proxy.password)
    return fetch(url, lambda host, port: socks.create_connection((host, port), PATIENCE, None, *there))


def python_socks(proxy: Proxy, url: str) -> str:
    client = importlib.import_module("python_socks.sync").Proxy.from_url(proxy.url.replace("socks5h", "socks5"), rdns=True)
    return fetch(url, lambda host, port: client.connect(host, port, timeout=PATIENCE))


def httpx(proxy: Proxy, url: str) -> str:
    with importlib.import_module("httpx").Client(proxy=proxy.url, timeout=PATIENCE) as client:
        return str(client.get(url).text)


def aiohttp_socks(proxy: Proxy, url: str) -> str:
    aiohttp, socks = importlib.import_module("aiohttp"), importlib.import_module("aiohttp_socks")

    async def fetch() -> str:
        connector = socks.ProxyConnector.from_url(proxy.url.replace("socks5h", "socks5"), rdns=True)
        session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(PATIENCE))
        async with session, session.get(url) as answer:
            return str(await answer.text())

    return asyncio.run(fetch())


def curl(proxy: Proxy, url: str) -> str:
    argv = ["curl", "-sS", "--max-time", str(PATIENCE), "-x", proxy.url, url]
    done = subprocess.run(argv, env={**proxy.env, "ALL_PROXY": ""}, capture_output=True, timeout=30, check=False)
    if done.returncode == 28:
        raise Waited
    if done.returncode:
        raise Failed(done.stderr.decode().strip())
    return done.stdout.decode()


def pysocks_udp(proxy: Proxy, echo: EchoServer) -> str:
    """Sends 1, 2, 3 and 4 to the echo; what comes back, joined."""
    socks = importlib.import_module("socks")
    with socks.socksocket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.set_proxy(socks.SOCKS5, *proxy.address)
        sock.settimeout(PATIENCE / 4)
        for octet in b"1234":
            sock.sendto(bytes([octet]) * 2, echo.address)
        return " ".join(until_timeout(lambda: sock.recvfrom(100)[0][:1].decode()))


def until_timeout(receive: Callable[[], str]) -> Iterator[str]:
    while True:
        try:
            yield receive()
        except socket.timeout:
            return


class Client(NamedTuple):
    name: str
    module: Optional[str]       # None: a program
    fetch: Callable[[Proxy, str], str]
    udp: Optional[Callable[[Proxy, EchoServer], str]] = None

    @property
    def version(self) -> Optional[str]:
        """None if it is not there."""
        if self.module is None:
            path = shutil.which(self.name)
            return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.split()[1] if path else None
        try:
            importlib.import_module(self.module)
            return importlib.metadata.version(self.name)
        except ImportError:
            return None


CLIENTS = [
    Client("PySocks", "socks", pysocks, pysocks_udp),
    Client("python-socks", "python_socks.sync", python_socks),
    Client("httpx", "httpx", httpx),
    Client("aiohttp-socks", "aiohttp_socks", aiohttp_socks),
    Client("curl", None, curl),
]


# --- the faults ---

FAULTS: List[Fault] = [
    *(ReplyWith(code) for code in ReplyCode), ReplyWith(0x09),
    SelectMethod(Method.GSSAPI), SelectMethod(Method.USERNAME_PASSWORD), SelectMethod(0x80), SelectMethod(Method.NO_ACCEPTABLE_METHODS),
    LoginStatus(0x01), LoginStatus(0xFF),
    CloseAfter(Greeting), CloseAfter(MethodSelection), CloseAfter(Credentials), CloseAfter(Request), CloseAfter(Reply),
    ResetAfter(Greeting), ResetAfter(Request), ResetAfter(Reply),
    Truncate(MethodSelection, 1), Truncate(CredentialsReply, 1), Truncate(Reply, 3), Truncate(Reply, 9),
    Raw(MethodSelection, b"\x04\x00"), Raw(CredentialsReply, b"\x05\x00"), Raw(Reply, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    Delay(Reply, 0.1), Delay(Reply, 30), Drip(MethodSelection), Drip(Reply),
    BoundTo("proxy.example.com", 1080), BoundTo("2001:db8::1", 1080),
    DropDatagrams("up", every=2), DropDatagrams("down", every=2), DuplicateDatagrams("down", times=1), ReorderDatagrams("down"),
    FragmentDatagrams("down", times=1),
]


def login_is_needed(fault: Fault) -> bool:
    return bool({Credentials, CredentialsReply} & set(fault.about))


def outcome(client: Client, fault: Fault) -> str:
    """What the client makes of the fault."""
    if isinstance(fault, DropDatagrams):
        return outcome_of_datagrams(client, fault)
    with WebServer({"/": PAGE}) as web, start(hosts={HOST: web.host}, users=LOGIN if login_is_needed(fault) else None, faults=[fault]) as proxy:
        patience = threading.Timer(TOO_LONG, proxy.close)
        patience.start()
        try:
            page = client.fetch(proxy, f"http://{HOST}:{web.port}/")
        except Exception as error:
            return WAITS if has_waited(error) else complaint(error) if proxy.server else FOR_EVER
        finally:
            patience.cancel()
            patience.join()
        return WORKS if page == PAGE else f"takes {page!r} for the page"


def outcome_of_datagrams(client: Client, fault: Fault) -> str:
    if client.udp is None:
        return CANNOT
    with EchoServer() as echo, start(faults=[fault]) as proxy:
        try:
            return f"sends 1 2 3 4, gets {client.udp(proxy, echo)}"
        except Exception as error:
            return complaint(error)


def has_waited(error: Optional[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, (Waited, TimeoutError, socket.timeout, asyncio.TimeoutError)) or "imed out" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def complaint(error: BaseException) -> str:
    """In its words, but for what is another each time."""
    words = re.sub(r"\b\d{4,5}\b", "PORT", " ".join(str(error).split()))
    words = re.sub(r"<[^>]* at 0x[^>]*>", "<...>", words).replace("127.0.0.1:PORT", "PROXY")
    return words if isinstance(error, Failed) else f"{type(error).__name__}: {words}".rstrip(": ")


def is_ours(text: str) -> bool:
    """None of the client's words."""
    return text in (WORKS, WAITS, FOR_EVER, CANNOT) or text.startswith("sends")


def kind(text: str) -> str:
    """What is the same in all versions of a client."""
    return text if is_ours(text) else "complains"


def outcomes(client: Client) -> Dict[str, str]:
    """What the client makes of each of the faults."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(map(repr, FAULTS), pool.map(lambda fault: outcome(client, fault), FAULTS)))


# --- the table ---

HEAD = """\
What clients make of faults
===========================

After this page you know what your client library raises, or whether it waits, when a proxy misbehaves.

Each client has asked for a page, by name, through a proxy with the fault on the left, and was given a second for it.  *works*: it
got the page; *waits*: until its time was up, or *for ever*, whatever its timeout; the rest is what it raised, or said.  What the
faults do is in :ref:`faults-on-purpose`.

Written by ``python -m tests.testing.clients``, on Python {python}; a test runs it again, and compares.

.. list-table::
   :class: wide
   :header-rows: 1

   * - Fault
"""


def table(found: Dict[str, Dict[str, str]], python: str) -> str:
    """As reStructuredText; `found` is by the name and version of the client, and then by fault."""
    lines = [HEAD.format(python=python).rstrip("\n"), *(f"     - {client}" for client in found)]
    for fault in map(repr, FAULTS):
        lines.append(f"   * - ``{fault}``")
        lines += [f"     - {cell(column[fault])}" for column in found.values()]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text if is_ours(text) else f"``{text}``"


def read_table() -> Dict[str, Dict[str, str]]:
    """The table as it was written."""
    rows = [re.split(r"\n     - ", row.strip("\n")) for row in TABLE.read_text(encoding="utf-8").split("\n   * - ")[1:]]
    head, *body = [[text.strip().strip("`") for text in row] for row in rows]
    return {client: {row[0]: row[number] for row in body} for number, client in enumerate(head) if number}


def table_s_python() -> str:
    """The version of Python that the table was made on."""
    found = re.search(r"on Python (\d+\.\d+);", TABLE.read_text(encoding="utf-8"))
    assert found
    return found[1]


def python_version() -> str:
    return "{}.{}".format(*sys.version_info)


def main() -> None:
    missing = [client.name for client in CLIENTS if client.version is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    found = {f"{client.name} {client.version}": outcomes(client) for client in CLIENTS}
    TABLE.write_text(table(found, python_version()), encoding="utf-8")


if __name__ == "__main__":
    main()
