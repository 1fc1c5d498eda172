"""
Clients of others that have Kerberos, each through a proxy started as its users start it.

What they can do is in a table of docs/kerberos.rst, which is compared with what they do here.  Debian builds Dante's client
without GSSAPI, and to build another takes minutes: its tests run where SOCKS5SRV_KERBEROS_SOCKSIFY is the path of a
``socksify`` that has it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Callable, Tuple

import pytest

pytest.importorskip("gssapi")

from ..clients.harness import Logged, Proxy, digest, files, lack, need, need_module, run, udp_echo, website
from ..clients.harness import blocks as blocks_of_octets
from ..docs.pages import blocks, page, table
from ..kerberos import REALM, Realm

ALICE = f"alice@{REALM}"
SOCKSIFY = "SOCKS5SRV_KERBEROS_SOCKSIFY"
SENT = b"".join(blocks_of_octets(8))

# What a user of pycurl writes; the exit code is curl's number for what went wrong.
PYCURL = """
import io, pycurl, sys
page, curl = io.BytesIO(), pycurl.Curl()
for option, value in [(pycurl.PROXY, sys.argv[1]), (pycurl.URL, sys.argv[2]), (pycurl.WRITEDATA, page), (pycurl.NOPROXY, "")]:
    curl.setopt(option, value)
try:
    curl.perform()
except pycurl.error as error:
    sys.exit(error.args[0])
print(page.getvalue().decode(), end="")
"""


@pytest.fixture
def started(kerberos: Realm, tmp_path: Path) -> Callable[..., Proxy]:
    """A proxy that asks for Kerberos: ``with started("--gssapi-levels", "0") as proxy``."""
    return lambda *options: Proxy(tmp_path, "--gssapi", "--keytab", str(kerberos.keytab), *options)


# --- libcurl, the system's and that of pycurl: one that has Kerberos offers it to every server ---

class Curl:
    """The command."""

    def version(self) -> Tuple[int, ...]:
        said = run(need("curl"), "-V").decode()
        if "GSS-API" not in said:
            lack("curl is built without GSSAPI")
        return tuple(map(int, re.findall(r"libcurl/(\d+)\.(\d+)", said)[0]))

    def get(self, proxy: str, url: str, code: int = 0) -> str:
        return run(need("curl"), "-sS", "-x", proxy, url, code=code).decode()


class PyCurl:
    """Its wheels have a libcurl and a Kerberos of their own."""

    def version(self) -> Tuple[int, ...]:
        self.need()
        said = run(sys.executable, "-c", "import pycurl; print(pycurl.version)").decode()
        return tuple(map(int, re.findall(r"libcurl/(\d+)\.(\d+)", said)[0]))

    def need(self) -> None:
        if sys.version_info < (3, 9):
            pytest.skip("not on this platform: pycurl for this Python, but from its sources")
        need_module("pycurl")

    def get(self, proxy: str, url: str, code: int = 0) -> str:
        self.need()
        return run(sys.executable, "-c", PYCURL, proxy, url, code=code).decode()


def failure(version: Tuple[int, ...]) -> int:
    """Its number for whatever goes wrong with a proxy."""
    return 97 if version >= (7, 73) else 7


LIBCURL = [((7, 69), "libcurl up to 7.68"), ((8, 17), "libcurl 7.69 to 8.16"), ((999,), "libcurl 8.17 and newer")]
WORKS = {"yes": {"0", "0,1,2"}, "alone": {"0"}, "no": set()}        # by what the table says of level 0: with which --gssapi-levels
either = pytest.mark.parametrize("curl", [Curl(), PyCurl()], ids=["curl", "pycurl"])


def in_the_manual(client: str) -> Any:
    """What the table says of it: for levels 0, 1 and 2, and for UDP."""
    return next(cells for name, *cells in table("kerberos", "Client") if name == client)


@either
@pytest.mark.parametrize("levels", ["0", "0,1,2", "1,2"])
def test_what_libcurl_can_do_is_what_the_manual_says(started: Any, curl: Any, levels: str) -> None:
    version = curl.version()
    at_0, at_1, at_2, _udp = in_the_manual(next(name for before, name in LIBCURL if version < before))
    works = levels in WORKS[at_0]
    with website() as site, started("--gssapi-levels", levels) as proxy:
        got = curl.get(f"socks5h://localhost:{proxy.port}", f"http://localhost:{site.port}/", code=0 if works else failure(version))
        session = proxy.session()
    assert (got, session.event == "close") == ((site.secret, True) if works else ("", False))
    assert (at_1, at_2) == ("no", "no")
    assert session.methods == ["NO_AUTHENTICATION_REQUIRED", "GSSAPI"]
    assert session.user == ALICE or not works
    assert works or version < (8, 17) or session.line["reason"] in page("kerberos")


@either
@pytest.mark.parametrize(("options", "login", "user"), [
    (["--allow-from", "127.0.0.0/8"], "", ""), (["-u", "anna:sesame"], "anna:sesame@", "anna"),
], ids=["its network is trusted", "it has a password"])
def test_a_libcurl_that_need_not_use_kerberos_does_not(started: Any, curl: Any, options: Any, login: str, user: str) -> None:
    with website() as site, started(*options) as proxy:
        assert curl.get(f"socks5h://{login}localhost:{proxy.port}", f"http://localhost:{site.port}/") == site.secret
        session = proxy.session()
    assert (session.event, session.user, "GSSAPI" in session.methods) == ("close", user, True)


@either
@pytest.mark.usefixtures("kerberos")
def test_a_libcurl_that_offers_kerberos_is_served_where_there_is_none(curl: Any, tmp_path: Path) -> None:
    with website() as site, Proxy(tmp_path) as proxy:
        assert curl.get(f"socks5h://localhost:{proxy.port}", f"http://localhost:{site.port}/") == site.secret
        assert "GSSAPI" in proxy.session().methods


def test_a_principal_that_may_not_come_in_is_told_so_and_named_in_the_log(started: Any) -> None:
    with started("--gssapi-levels", "0", "--gssapi-allow", f"bob@{REALM}") as proxy:
        curl = PyCurl()
        curl.get(f"socks5h://localhost:{proxy.port}", "http://localhost:9/", code=failure(curl.version()))
        session = proxy.session()
    assert (session.event, session.user) == ("login_failed", ALICE)


# --- Dante's client, which leads other programs through the proxy ---

ENCTYPES = ["clear", "integrity", "confidentiality"]
UDP = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for length in (5, 1400, 60000):
    sock.sendto(b"x" * length, ("127.0.0.1", int(sys.argv[1])))
    octets, (host, port) = sock.recvfrom(65536)
    print(octets.decode(), host, port)
"""


@pytest.fixture
def socksify(tmp_path: Path) -> Callable[..., bytes]:
    program, config = os.environ.get(SOCKSIFY), tmp_path / "socks.conf"
    if not program:
        pytest.skip(f"not on this platform: a socksify with GSSAPI, whose path {SOCKSIFY} has to be")

    def run_by(proxy: Proxy, level: int, nec: bool, *words: object) -> bytes:
        (text,) = blocks("text", "kerberos")
        text = text.replace("proxy.example.com port = 1080", f"localhost port = {proxy.port}").replace("confidentiality", ENCTYPES[level])
        config.write_text(text.replace("}", "clientcompatibility: necgssapi\n}") if nec else text)
        return run(program, *words, SOCKS_CONF=str(config), SOCKS_AUTOADD_LANROUTES="no")

    return run_by


def check_level(session: Logged, nec: bool) -> None:
    assert (session.event, session.user) == ("close", ALICE)
    assert (session.said("LevelToken", "LEN") == "1") == nec


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("nec", [False, True], ids=["wrapped", "NEC"])
class TestDante:
    """
    The proxy has one level only, so that this is the one that is agreed on.

    Without BIND: what comes at once behind its second reply this client may lose, with Kerberos.
    """

    def test_files_go_up_and_down_unchanged(self, started: Any, socksify: Any, tmp_path: Path, level: int, nec: bool) -> None:
        assert in_the_manual("Dante's client")[level] == "yes"
        folder = tmp_path / "files"
        folder.mkdir()
        (folder / "file").write_bytes(SENT)
        with website() as site, files(folder) as other, started("--gssapi-levels", f"{level}", *["--gssapi-nec"] * nec) as proxy:
            up = socksify(proxy, level, nec, need("curl"), "-sS", "-T", folder / "file", f"http://127.0.0.1:{site.port}/")
            down = socksify(proxy, level, nec, need("curl"), "-sS", f"http://127.0.0.1:{other.port}/file")
            assert (up.decode(), digest(down)) == (digest(SENT), digest(SENT))
            check_level(proxy.session(port=other.port), nec)

    def test_datagrams(self, started: Any, socksify: Any, level: int, nec: bool) -> None:
        assert in_the_manual("Dante's client")[3] == "yes"
        with udp_echo() as target, started("--gssapi-levels", f"{level}", *["--gssapi-nec"] * nec) as proxy:
            answers = socksify(proxy, level, nec, sys.executable, "-c", UDP, target.port).decode().split("\n")
            assert answers[:3] == [f"{target.secret.decode()}{'x' * length} 127.0.0.1 {target.port}" for length in (5, 1400, 60000)]
            session = proxy.session()
        check_level(session, nec)
        assert (session.command, session.up) == ("udp", 5 + 1400 + 60000)
