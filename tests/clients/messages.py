"""
What clients print when a proxy refuses: ``python3 -m tests.clients.messages`` writes it to docs/client-messages.rst.

Each is run, once for each answer that it can get: a login that is refused, and each reply code, which stands in
the port that is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import sys
from typing import Any, Dict, Iterator, List, Tuple

from socks5srv import Socks5Handler, Socks5Server
from socks5srv.protocol import REPLY_CODES, ReplyCode, Request, RequestFailed

from .harness import PATIENCE, ROOT, environment, need, run, serving

PAGE = ROOT / "docs" / "client-messages.rst"
CLIENTS = ("curl", "PySocks", "python-socks", "httpx")
HEAD = """\
What clients print
==================

.. Written by python3 -m tests.clients.messages, which runs these clients: do not edit it.

After this page you can tell from the words of a client why the proxy has refused it.

A client that is refused puts the reason into its own words.  These are the words of
{versions}, which ask for ``localhost``.
What the proxy knows beyond that is in its log, and with ``--explain`` step by step.
"""

# In a process of its own: HTTPX leaves its sockets to the garbage collector.
ASK = """
import json, sys
from urllib.parse import urlsplit
import httpx, python_socks.sync, socks

def pysocks(url, port):
    client, proxy = socks.socksocket(), urlsplit(url)
    client.set_proxy(socks.SOCKS5, proxy.hostname, proxy.port, True, proxy.username, proxy.password)
    client.connect(("localhost", port))

def asked(ask, url, port):
    try:
        ask(url, port)
    except Exception as error:
        return str(error)

for url, port in json.load(sys.stdin):
    print(json.dumps({
        "PySocks": asked(pysocks, url, port),
        "python-socks": asked(lambda url, port: python_socks.sync.Proxy.from_url(url).connect("localhost", port), url, port),
        "httpx": asked(lambda url, port: httpx.get(f"http://localhost:{port}/", proxy=url), url, port),
    }))
"""

Answer = Tuple[str, str, int]       # its title, the URL of the proxy that gives it, and the port to ask for


class Refusing(Socks5Handler):
    """Answers a request with the code that stands in its port."""

    def connect(self, request: Request) -> Any:
        raise RequestFailed(ReplyCode(request.destination.port), "as the port says")


@contextlib.contextmanager
def answers() -> Iterator[List[Answer]]:
    with serving(Socks5Server(("127.0.0.1", 0), Refusing)) as proxy, \
            serving(Socks5Server(("127.0.0.1", 0), Refusing, users={"anna": "sesame"})) as guarded:
        url, port = f"socks5://127.0.0.1:{proxy.server_address[1]}", guarded.server_address[1]
        yield [
            ("No acceptable method (ff): it has not offered to log in", f"socks5://127.0.0.1:{port}", 1),
            ("Login failed (01)", f"socks5://anna:wrong@127.0.0.1:{port}", 1),
            *((f"Reply {code:02x}: {code.phrase}", url, int(code)) for code in REPLY_CODES.values() if code is not ReplyCode.SUCCEEDED),
        ]


def curl(url: str, port: int) -> str:
    argv = [need("curl"), "-sS", "-x", url.replace("socks5:", "socks5h:"), f"http://localhost:{port}/"]
    return subprocess.run(argv, capture_output=True, env=environment(), timeout=PATIENCE, check=False, text=True).stderr.strip()


def messages() -> Dict[str, Dict[str, str]]:
    """What each client prints, by the title of the answer."""
    with answers() as asked:
        lines = run(sys.executable, "-c", ASK, stdin=json.dumps([answer[1:] for answer in asked]).encode()).splitlines()
        return {title: {"curl": curl(url, port), **json.loads(line)} for (title, url, port), line in zip(asked, lines)}


def named(client: str) -> str:
    version = run(need("curl"), "--version").split()[1].decode() if client == "curl" else importlib.metadata.version(client)
    return f"{client} {version}"


def section(title: str, texts: Dict[str, str]) -> str:
    return "\n".join([title, "-" * len(title), "", *(line(client, texts[client]) for client in CLIENTS), ""])


def line(client: str, text: str) -> str:
    return f":{client}: ``{text}``"


def page() -> str:
    *most, last = map(named, CLIENTS)
    head = HEAD.format(versions=f"{', '.join(most)} and {last}")
    return "\n".join([head, *(section(title, texts) for title, texts in messages().items())]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
