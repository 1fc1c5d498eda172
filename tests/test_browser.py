"""
A real browser loads a page through the proxy: dozens of connections at once, each for a name.
"""

from __future__ import annotations

import pathlib
import re
import secrets
from typing import Any, Iterator, List

import pytest

from .clients.harness import Page, Proxy, WebServer, need, need_ipv6, run, serving

IMAGES = 24

# Every part writes the secret it has got into the page, so that the page shows what came.
DOCUMENT = """<!DOCTYPE html>
<link rel="stylesheet" href="/style.css">
<body>
<iframe src="/frame.html"></iframe>
{images}
<script src="/script.js"></script>
<script>
    addEventListener("load", () => {{
        document.body.dataset.style = getComputedStyle(document.body).fontFamily;
        document.body.dataset.frame = document.querySelector("iframe").contentDocument.body.textContent;
        document.body.dataset.images = [...document.images].filter((image) => image.naturalWidth === 7).length;
        const request = new XMLHttpRequest();
        request.open("POST", "/echo", false);
        request.send("posted-{secret}");
        document.body.dataset.posted = request.responseText;
    }});
</script>
"""

IMAGE = '<svg xmlns="http://www.w3.org/2000/svg" width="7" height="7"/>'


class Site(Page):
    """The page and its parts."""

    def do_GET(self) -> None:
        secret = self.server.secret
        if self.path == "/":
            # Under three names, since a browser opens only so many connections to one.
            images = "".join(f'<img src="http://{self.server.names[n % len(self.server.names)]}/{n}.svg">' for n in range(IMAGES))
            self.answer(DOCUMENT.format(images=images, secret=secret), "text/html")
        elif self.path == "/style.css":
            self.answer(f"body {{ font-family: style-{secret} }}", "text/css")
        elif self.path == "/script.js":
            self.answer(f'document.body.dataset.script = "script-{secret}";', "text/javascript")
        elif self.path == "/frame.html":
            self.answer(f"frame-{secret}", "text/html")
        elif self.path.endswith(".svg"):
            self.answer(IMAGE, "image/svg+xml")
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])).decode())


@pytest.fixture
def site() -> Iterator[Any]:
    """The page's server on 127.0.0.1; its `names` are those of the sites that have the images."""
    need_ipv6()
    with serving(WebServer(Site, secret=secrets.token_hex())) as site, serving(WebServer(Site, "::1", secret=site.secret)) as other:
        site.names = [f"127.0.0.1:{site.port}", f"localhost:{site.port}", f"[::1]:{other.port}"]
        site.other = other
        yield site


def chromium(directory: pathlib.Path, proxy: Proxy, url: str) -> str:
    """The page as Chromium has it after it is loaded."""
    program = need("chromium", "chromium-browser", "google-chrome")
    switches: List[object] = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={directory / 'browser'}",
        f"--proxy-server=socks5://{proxy.address}", "--proxy-bypass-list=<-loopback>",
        # Nothing but the page: no updates, and no visit to its makers.
        "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-extensions", "--disable-features=NetworkTimeServiceQuerying,OptimizationHints",
        "--gaia-url=http://127.0.0.1:1/", "--component-updater=url-source=http://127.0.0.1:1/",
    ]
    # It writes files at home whatever --user-data-dir says.
    return run(program, *switches, "--dump-dom", url, HOME=str(directory)).decode()


def test_chromium_loads_a_page_with_many_parts(site: Any, tmp_path: pathlib.Path) -> None:
    with Proxy(tmp_path) as proxy:
        page = chromium(tmp_path, proxy, f"http://127.0.0.1:{site.port}/")
        shown = dict(re.findall(r'data-(\w+)="([^"]*)"', page))
        assert shown == {
            **{part: f"{part}-{site.secret}" for part in ("style", "frame", "script", "posted")},
            "images": str(IMAGES),
        }
        sessions = proxy.sessions(1, port=site.port) + proxy.sessions(1, port=site.other.port)
        assert {session.event for session in sessions} == {"close"}
        # It leaves all to the proxy, and writes even addresses as names.
        assert {session.asked for session in sessions} == {("DOMAINNAME", host) for host in ("127.0.0.1", "localhost", "::1")}
        assert len(sessions) > 3
