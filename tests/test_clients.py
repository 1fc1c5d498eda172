"""
Real clients, each through a proxy started as users start it.

Each must get what only its target knows, and the proxy's log must tell how it asked.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import pathlib
import socket
import subprocess
import sys
import urllib.request
from ipaddress import ip_address
from typing import Any, Iterator

import pytest

from .clients.harness import (
    BIG, HERE, PASSWORD, PATIENCE, USER, Proxy, blocks, closed_port, digest, digester, environment, files,
    ftp_server, in_threads, in_url, inetd, lack, need, need_ipv6, need_module, run, udp_echo, website,
)

NAME = ("DOMAINNAME", "localhost")      # what a client writes that leaves names to the proxy
IPV4 = ("IPV4", "127.0.0.1")
IPV6 = ("IPV6", "::1")

# What a client is asked for, and what it should write then.
WAYS = pytest.mark.parametrize(("host", "asked"), [("localhost", NAME), ("127.0.0.1", IPV4), ("::1", IPV6)], ids=["name", "ipv4", "ipv6"])
HOSTS = pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"], ids=["name", "ipv4", "ipv6"])


@pytest.fixture(autouse=True)
def no_other_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """None that the environment names for the clients in this process."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def proxy(tmp_path: pathlib.Path) -> Iterator[Proxy]:
    with Proxy(tmp_path) as proxy:
        yield proxy


@pytest.fixture
def guarded(tmp_path: pathlib.Path) -> Iterator[Proxy]:
    """A proxy that asks for a login."""
    with Proxy(tmp_path, "-u", f"{USER}:{PASSWORD}") as proxy:
        yield proxy


def listening(host: str) -> str:
    """Where a target for this host has to listen; a skip if it cannot."""
    if host == "::1":
        need_ipv6()
    return "127.0.0.1" if host == "localhost" else host


# --- curl ---

@WAYS
def test_curl_gets_a_page(proxy: Proxy, host: str, asked: Any) -> None:
    curl = need("curl")
    with website(listening(host)) as site:
        page = run(curl, "-sS", "-x", proxy.url(), f"http://{in_url(host)}:{site.port}/")
        assert page.decode() == site.secret
        session = proxy.session(port=site.port)
    assert session.event == "close"
    assert session.asked == asked
    assert session.down > len(page)


def test_curl_resolves_the_name_itself_with_socks5(proxy: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        assert run(curl, "-sS4", "-x", proxy.url("socks5"), f"http://localhost:{site.port}/").decode() == site.secret
    assert proxy.session().asked == IPV4


def test_curl_logs_in(guarded: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        page = run(curl, "-sS", "-x", guarded.url(), "-U", f"{USER}:{PASSWORD}", f"http://localhost:{site.port}/")
        assert page.decode() == site.secret
    session = guarded.session()
    assert session.user == USER
    assert "USERNAME_PASSWORD" in session.methods


def test_curl_logs_in_with_what_the_url_says(guarded: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        page = run(curl, "-sS", "-x", guarded.url(login=True), f"http://localhost:{site.port}/")
        assert page.decode() == site.secret
    assert guarded.session().user == USER


def test_curl_logs_in_beyond_ascii(tmp_path: pathlib.Path) -> None:
    curl = need("curl")
    with Proxy(tmp_path, "-u", "j\u00fcrgen:schl\u00fcssel") as proxy, website() as site:
        page = run(curl, "-sS", "-x", proxy.url(), "-U", "j\u00fcrgen:schl\u00fcssel", f"http://localhost:{site.port}/")
        assert page.decode() == site.secret
        assert proxy.session().user == "j\u00fcrgen"


@pytest.mark.parametrize("login", [f"{USER}:guessed", f"bob:{PASSWORD}", f"{USER}:", None])
def test_curl_with_a_wrong_login_gets_nothing(guarded: Proxy, login: Any) -> None:
    curl = need("curl")
    with website() as site:
        words = ["-U", login] if login else []
        assert run(curl, "-sS", "-x", guarded.url(), *words, f"http://localhost:{site.port}/", code=97) == b""
    session = guarded.session()
    assert session.event == ("login_failed" if login else "no_acceptable_method")
    assert session.host is None


def test_curl_is_told_of_a_port_that_refuses(proxy: Proxy) -> None:
    curl = need("curl")
    with closed_port() as port:
        run(curl, "-sS", "-x", proxy.url(), f"http://127.0.0.1:{port}/", code=97)
        session = proxy.session(port=port)
    assert (session.event, session.reply) == ("failed", 5)


def test_curl_is_told_of_a_name_that_does_not_exist(proxy: Proxy) -> None:
    curl = need("curl")
    run(curl, "-sS", "-x", proxy.url(), "http://nowhere.invalid/", code=97)
    session = proxy.session()
    assert (session.event, session.reply) == ("failed", 4)
    assert session.asked == ("DOMAINNAME", "nowhere.invalid")


def test_curl_downloads_a_big_file_whole(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    curl = need("curl")
    with website() as site:
        run(curl, "-sS", "-x", proxy.url(), "-o", tmp_path / "big", f"http://localhost:{site.port}/big")
    with open(tmp_path / "big", "rb") as stream:
        assert digest(iter(lambda: stream.read(1 << 20), b"")) == digest(blocks())
    assert proxy.session().down > BIG << 20


def test_curl_uploads_a_big_file_whole(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    curl = need("curl")
    with open(tmp_path / "big", "wb") as stream:
        stream.writelines(blocks())
    with website() as site:
        answer = run(curl, "-sS", "-x", proxy.url(), "-T", tmp_path / "big", f"http://localhost:{site.port}/")
    assert answer.decode() == digest(blocks())
    assert proxy.session().up > BIG << 20


def test_curl_gets_fifty_pages_at_once(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    curl = need("curl")
    with website() as site:
        words = ["-sS", "-Z", "--parallel-immediate", "--parallel-max", "50", "--http1.0", "-x", proxy.url()]
        for number in range(50):
            words += ["-o", str(tmp_path / f"{number}"), f"http://localhost:{site.port}/echo/{number}"]
        run(curl, *words)
        for number in range(50):
            assert (tmp_path / f"{number}").read_text() == f"{site.secret}{number}"
        assert {session.event for session in proxy.sessions(50, port=site.port)} == {"close"}


def test_curl_keeps_a_connection_for_several_pages(proxy: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        urls = [f"http://localhost:{site.port}/echo/{number}" for number in range(5)]
        assert run(curl, "-sS", "-x", proxy.url(), *urls).decode() == "".join(f"{site.secret}{n}" for n in range(5))
    proxy.session(port=site.port)


def test_curl_gets_a_page_over_a_proxy_on_ipv6(tmp_path: pathlib.Path) -> None:
    need_ipv6()
    curl = need("curl")
    with Proxy(tmp_path, host="::1") as proxy, website() as site:
        page = run(curl, "-sS", "-x", proxy.url(), f"http://localhost:{site.port}/")
        assert page.decode() == site.secret
        assert proxy.session().line["client"].startswith("[::1]:")


# --- PySocks ---

@pytest.fixture
def socks() -> Any:
    return need_module("socks")


def pysocks(socks: Any, proxy: Proxy, kind: int = socket.SOCK_STREAM, **options: Any) -> Any:
    sock = socks.socksocket(socket.AF_INET, kind)
    sock.set_proxy(socks.SOCKS5, proxy.host, proxy.port, **options)
    sock.settimeout(PATIENCE)
    return sock


def ask_digester(sock: Any, secret: str) -> None:
    """Send, finish sending, and get an answer about all of it."""
    sock.sendall(b"all of it")
    sock.shutdown(socket.SHUT_WR)
    assert sock.makefile().read().split() == [digest(b"all of it"), secret]


@WAYS
def test_pysocks_talks_over_tcp(socks: Any, proxy: Proxy, host: str, asked: Any) -> None:
    with digester(listening(host)) as target, pysocks(socks, proxy) as sock:
        sock.connect((host, target.port))
        ask_digester(sock, target.secret)
    assert proxy.session().asked == asked


def test_pysocks_resolves_the_name_itself_if_told_so(socks: Any, proxy: Proxy) -> None:
    with digester() as target, pysocks(socks, proxy, rdns=False) as sock:
        sock.connect(("localhost", target.port))
        ask_digester(sock, target.secret)
    assert proxy.session().asked == IPV4


def test_pysocks_logs_in(socks: Any, guarded: Proxy) -> None:
    with digester() as target, pysocks(socks, guarded, username=USER, password=PASSWORD) as sock:
        sock.connect(("localhost", target.port))
        ask_digester(sock, target.secret)
    session = guarded.session()
    assert session.user == USER
    assert session.methods == ["NO_AUTHENTICATION_REQUIRED", "USERNAME_PASSWORD"]


def test_pysocks_is_told_of_a_wrong_password(socks: Any, guarded: Proxy) -> None:
    sock = pysocks(socks, guarded, username=USER, password="guessed")
    with sock, closed_port() as port, pytest.raises(socks.ProxyError, match="SOCKS5 authentication failed"):
        sock.connect(("localhost", port))
    assert guarded.session().event == "login_failed"


def test_pysocks_is_told_why_it_cannot_connect(socks: Any, proxy: Proxy) -> None:
    sock = pysocks(socks, proxy)
    with sock, closed_port() as port, pytest.raises(socks.ProxyError, match="0x05: Connection refused"):
        sock.connect(("127.0.0.1", port))


@HOSTS
def test_pysocks_exchanges_datagrams(socks: Any, proxy: Proxy, host: str) -> None:
    with udp_echo(listening(host)) as target, pysocks(socks, proxy, socket.SOCK_DGRAM) as sock:
        for size in (1, 1400, 60000):
            sock.sendto(os.urandom(size - 1) + b"!", (host, target.port))
            data, source = sock.recvfrom(65536)
            assert len(data) == len(target.secret) + size
            assert data.startswith(target.secret)
            assert data.endswith(b"!")
            assert source == (listening(host), target.port)
    session = proxy.session()
    assert (session.event, session.command) == ("close", "udp")
    assert session.up == 1 + 1400 + 60000
    assert session.down == session.up + 3 * len(target.secret)


def test_pysocks_logs_in_for_datagrams(socks: Any, guarded: Proxy) -> None:
    with udp_echo() as target, pysocks(socks, guarded, socket.SOCK_DGRAM, username=USER, password=PASSWORD) as sock:
        sock.sendto(b"hello", ("localhost", target.port))
        assert sock.recvfrom(100) == (target.secret + b"hello", ("127.0.0.1", target.port))
    assert guarded.session().user == USER


def test_pysocks_reaches_several_hosts_with_one_association(socks: Any, proxy: Proxy) -> None:
    with udp_echo() as one, udp_echo() as other, pysocks(socks, proxy, socket.SOCK_DGRAM) as sock:
        for target in (one, other, one):
            sock.sendto(b"hello", ("127.0.0.1", target.port))
            assert sock.recvfrom(100) == (target.secret + b"hello", ("127.0.0.1", target.port))
    assert proxy.session().command == "udp"


def test_pysocks_in_place_of_socket_serves_urllib(proxy: Proxy) -> None:
    need_module("socks")
    program = f"""
import socket, socks, sys, urllib.request
socks.set_default_proxy(socks.SOCKS5, "127.0.0.1", {proxy.port})
socket.socket = socks.socksocket
print(urllib.request.urlopen(sys.argv[1]).read().decode())
"""
    with website() as site:
        assert run(sys.executable, "-c", program, f"http://127.0.0.1:{site.port}/").decode().strip() == site.secret
    assert proxy.session().asked == IPV4


def test_pysocks_handler_serves_urllib(socks: Any, proxy: Proxy) -> None:
    handler = need_module("sockshandler").SocksiPyHandler(socks.SOCKS5, proxy.host, proxy.port)
    opener = urllib.request.build_opener(handler)
    with website() as site, opener.open(f"http://localhost:{site.port}/", timeout=PATIENCE) as answer:
        assert answer.read().decode() == site.secret
    assert proxy.session().asked == NAME


# --- requests ---

# Its answers keep their sockets of PySocks open for as long as they live: no test may hold on to one.

@pytest.fixture
def requests() -> Any:
    need_module("socks")
    return need_module("requests")


def test_requests_gets_pages_in_a_session(requests: Any, proxy: Proxy) -> None:
    with website() as site, requests.Session() as session:
        session.proxies = {"http": proxy.url()}
        for number in range(5):
            assert session.get(f"http://localhost:{site.port}/echo/{number}", timeout=PATIENCE).text == f"{site.secret}{number}"
    assert proxy.session().asked == NAME


@pytest.mark.parametrize(("host", "asked"), [("127.0.0.1", IPV4), ("::1", IPV6)], ids=["ipv4", "ipv6"])
def test_requests_posts_to_an_address(requests: Any, proxy: Proxy, host: str, asked: Any) -> None:
    body = os.urandom(100000)
    with website(listening(host)) as site:
        url = f"http://{in_url(host)}:{site.port}/"
        assert requests.post(url, body, proxies={"http": proxy.url("socks5")}, timeout=PATIENCE).text == digest(body)
    assert proxy.session().asked == asked


def test_requests_logs_in(requests: Any, guarded: Proxy) -> None:
    with website() as site:
        url = f"http://localhost:{site.port}/"
        assert requests.get(url, proxies={"http": guarded.url(login=True)}, timeout=PATIENCE).text == site.secret
        with pytest.raises(requests.ConnectionError):
            requests.get(url, proxies={"http": guarded.url()}, timeout=PATIENCE)
    assert guarded.session(event="close").user == USER
    assert guarded.session(event="no_acceptable_method").host is None


def test_requests_in_twenty_threads_each_get_their_own_page(requests: Any, proxy: Proxy) -> None:
    with website() as site:
        def get(number: int) -> Any:
            url = f"http://localhost:{site.port}/echo/{number}"
            return requests.get(url, proxies={"http": proxy.url()}, timeout=PATIENCE).text

        assert in_threads(20, get) == [f"{site.secret}{number}" for number in range(20)]
    assert len(proxy.sessions(20)) == 20


# --- httpx ---

@WAYS
def test_httpx_gets_a_page(proxy: Proxy, host: str, asked: Any) -> None:
    httpx = need_module("httpx")
    need_module("socksio")
    with website(listening(host)) as site, httpx.Client(proxy=proxy.url("socks5"), timeout=PATIENCE) as client:
        assert client.get(f"http://{in_url(host)}:{site.port}/").text == site.secret
    assert proxy.session().asked == asked


def test_httpx_with_a_login_offers_nothing_else(guarded: Proxy) -> None:
    httpx = need_module("httpx")
    need_module("socksio")
    with website() as site, httpx.Client(proxy=guarded.url("socks5", login=True), timeout=PATIENCE) as client:
        assert client.get(f"http://localhost:{site.port}/").text == site.secret
    session = guarded.session()
    assert session.methods == ["USERNAME_PASSWORD"]
    assert session.user == USER


def test_httpx_gets_twenty_pages_at_once(proxy: Proxy) -> None:
    httpx = need_module("httpx")
    need_module("socksio")

    async def get_all(port: int) -> Any:
        async with httpx.AsyncClient(proxy=proxy.url("socks5"), timeout=PATIENCE) as client:
            answers = await asyncio.gather(*(client.get(f"http://localhost:{port}/echo/{n}") for n in range(20)))
            return [answer.text for answer in answers]

    with website() as site:
        assert asyncio.run(get_all(site.port)) == [f"{site.secret}{number}" for number in range(20)]
    assert {session.asked for session in proxy.sessions(1)} == {NAME}


# --- python-socks, and aiohttp-socks on top of it ---

@WAYS
def test_python_socks_connects(proxy: Proxy, host: str, asked: Any) -> None:
    client = need_module("python_socks.sync").Proxy.from_url(proxy.url("socks5"), rdns=True)
    with digester(listening(host)) as target, client.connect(host, target.port, timeout=PATIENCE) as sock:
        ask_digester(sock, target.secret)
    assert proxy.session().asked == asked


def test_python_socks_logs_in(guarded: Proxy) -> None:
    client = need_module("python_socks.sync").Proxy.from_url(guarded.url("socks5", login=True), rdns=True)
    with digester() as target, client.connect("localhost", target.port, timeout=PATIENCE) as sock:
        ask_digester(sock, target.secret)
    assert guarded.session().user == USER


def test_python_socks_is_told_why_it_cannot_connect(proxy: Proxy) -> None:
    python_socks = need_module("python_socks")
    client = need_module("python_socks.sync").Proxy.from_url(proxy.url("socks5"))
    with closed_port() as port, pytest.raises(python_socks.ProxyError) as caught:
        client.connect("127.0.0.1", port, timeout=PATIENCE)
    assert caught.value.error_code == 5


def test_python_socks_is_told_of_a_wrong_password(guarded: Proxy) -> None:
    python_socks = need_module("python_socks")
    client = need_module("python_socks.sync").Proxy.from_url(f"socks5://{USER}:guessed@{guarded.address}")
    with closed_port() as port, pytest.raises(python_socks.ProxyError, match="authentication failure"):
        client.connect("127.0.0.1", port, timeout=PATIENCE)
    assert guarded.session().event == "login_failed"


def aiohttp_pages(url: str, *pages: str) -> Any:
    aiohttp, aiohttp_socks = need_module("aiohttp"), need_module("aiohttp_socks")

    async def get_all() -> Any:
        connector = aiohttp_socks.ProxyConnector.from_url(url, rdns=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(PATIENCE)) as session:
            async def get(page: str) -> Any:
                async with session.get(page) as answer:
                    return await answer.text()

            return await asyncio.gather(*map(get, pages))

    return asyncio.run(get_all())


@WAYS
def test_aiohttp_gets_a_page(proxy: Proxy, host: str, asked: Any) -> None:
    with website(listening(host)) as site:
        assert aiohttp_pages(proxy.url("socks5"), f"http://{in_url(host)}:{site.port}/") == [site.secret]
    assert proxy.session().asked == asked


def test_aiohttp_logs_in_and_gets_fifty_pages_at_once(guarded: Proxy) -> None:
    with website() as site:
        pages = [f"http://localhost:{site.port}/echo/{number}" for number in range(50)]
        assert aiohttp_pages(guarded.url("socks5", login=True), *pages) == [f"{site.secret}{number}" for number in range(50)]
    sessions = guarded.sessions(1)
    assert {(session.user, session.event, session.asked) for session in sessions} == {(USER, "close", NAME)}


# --- node's socks ---

@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs node_socks.js.  Its package is where SOCKS5SRV_NODE_MODULES says, or fetched anew."""
    program, npm = need("node"), need("npm")
    modules = os.environ.get("SOCKS5SRV_NODE_MODULES")
    if not modules:
        folder = tmp_path_factory.mktemp("node")
        words = ["install", "--prefix", str(folder), "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000", "socks@2"]
        done = subprocess.run([npm, *words], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=50, check=False)
        if done.returncode != 0:
            lack(f"npm cannot install socks: {done.stdout.decode().strip()}")
        modules = str(folder / "node_modules")

    def start(command: str, proxy: Proxy, *words: object) -> Any:
        argv = [program, str(HERE / "node_socks.js"), command, proxy.host, str(proxy.port), *map(str, words)]
        return subprocess.Popen(argv, env=environment(NODE_PATH=modules), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def output(process: Any) -> str:
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors.decode()
    return str(out.decode())


@WAYS
def test_node_connects(node: Any, proxy: Proxy, host: str, asked: Any) -> None:
    with digester(listening(host)) as target:
        assert output(node("connect", proxy, host, target.port, "hello")).split() == [digest(b"hello"), target.secret]
    assert proxy.session().asked == asked


def test_node_logs_in(node: Any, guarded: Proxy) -> None:
    with digester() as target:
        answer = output(node("connect", guarded, "localhost", target.port, "hello", USER, PASSWORD))
        assert answer.split() == [digest(b"hello"), target.secret]
    session = guarded.session()
    assert session.user == USER
    assert session.methods == ["NO_AUTHENTICATION_REQUIRED", "USERNAME_PASSWORD"]


def test_node_is_called_back_after_bind(node: Any, proxy: Proxy) -> None:
    with node("bind", proxy, "127.0.0.1", 0, "from the client") as process:
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as peer:
            peer.sendall(b"from the peer")
            peer.shutdown(socket.SHUT_WR)
            assert peer.makefile().read() == "from the client"
        assert output(process) == "from the peer"
    session = proxy.session()
    assert (session.command, session.event) == ("bind", "close")
    assert (session.up, session.down) == (len("from the client"), len("from the peer"))


def test_node_exchanges_datagrams_with_a_proxy_on_ipv6(node: Any, tmp_path: pathlib.Path) -> None:
    need_ipv6()
    with Proxy(tmp_path, host="::1") as proxy, udp_echo() as target:
        answer = json.loads(output(node("associate", proxy, "127.0.0.1", target.port, "hello")))
        assert answer["data"] == target.secret.decode() + "hello"
        assert answer["from"] == {"host": "127.0.0.1", "port": target.port}


@HOSTS
def test_node_exchanges_datagrams(node: Any, proxy: Proxy, host: str) -> None:
    with udp_echo(listening(host)) as target:
        answer = json.loads(output(node("associate", proxy, host, target.port, "hello")))
        assert answer["data"] == target.secret.decode() + "hello"
        assert ip_address(answer["from"]["host"]) == ip_address(listening(host))     # it writes all zeros out
        assert answer["from"]["port"] == target.port
    session = proxy.session()
    assert (session.command, session.up) == ("udp", len("hello"))


# --- netcats ---

SENT = b"".join(blocks(8))      # more than all buffers on the way hold


@WAYS
def test_ncat_gets_the_answer_after_its_input_has_ended(proxy: Proxy, host: str, asked: Any) -> None:
    ncat = need("ncat")
    with digester(listening(host)) as target:
        answer = run(ncat, "--proxy", proxy.address, "--proxy-type", "socks5", host, target.port, stdin=SENT)
        assert answer.decode().split() == [digest(SENT), target.secret]
    session = proxy.session()
    assert session.asked == asked
    assert session.up == len(SENT)


def test_ncat_logs_in(guarded: Proxy) -> None:
    ncat = need("ncat")
    with digester() as target:
        answer = run(ncat, "--proxy", guarded.address, "--proxy-type", "socks5", "--proxy-auth", f"{USER}:{PASSWORD}",
                     "localhost", target.port, stdin=b"hello")
        assert answer.decode().split() == [digest(b"hello"), target.secret]
    assert guarded.session().user == USER


@WAYS
def test_openbsd_nc_gets_the_answer_after_its_input_has_ended(proxy: Proxy, host: str, asked: Any) -> None:
    nc = need("nc.openbsd")
    with digester(listening(host)) as target:
        answer = run(nc, "-N", "-X", "5", "-x", proxy.address, host, target.port, stdin=SENT)
        assert answer.decode().split() == [digest(SENT), target.secret]
    session = proxy.session()
    assert session.asked == asked
    assert session.up == len(SENT)


# --- ssh ---

@pytest.fixture
def sshd(tmp_path: pathlib.Path) -> Iterator[Any]:
    """An ssh server for whoever runs the tests, and the words for its client."""
    keygen, ssh, program = need("ssh-keygen"), need("ssh"), need("sshd")
    for key in ("host", "user"):
        run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key)
    (tmp_path / "config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\nUseDNS no\n"
    )
    (tmp_path / "known").write_text("* " + (tmp_path / "host.pub").read_text())
    if os.getuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)     # where Debian's sshd locks itself up; its service makes it
    with inetd(program, "-i", "-f", tmp_path / "config") as server:
        words = [ssh, "-F", "none", "-i", tmp_path / "user", "-l", getpass.getuser(), "-p", server.port]
        for option in ("BatchMode=yes", "IdentitiesOnly=yes", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={tmp_path}/known"):
            words += ["-o", option]
        yield server, words


@pytest.mark.parametrize("command", ["nc.openbsd -X 5 -x {} %h %p", "ncat --proxy-type socks5 --proxy {} %h %p"], ids=["nc", "ncat"])
def test_ssh_runs_a_command_through_a_netcat(proxy: Proxy, sshd: Any, command: str) -> None:
    need(command.split()[0])
    server, words = sshd
    answer = run(*words, "-o", f"ProxyCommand={command.format(proxy.address)}", "localhost", "sha256sum; exec cat /dev/null", stdin=SENT)
    assert answer.decode().split()[0] == digest(SENT)
    session = proxy.session(port=server.port)
    assert session.asked == NAME
    assert session.up > len(SENT)


# --- programs that know nothing of proxies: proxychains, socksify ---

@pytest.fixture
def proxychains(tmp_path: pathlib.Path) -> Any:
    program = need("proxychains4")
    config = tmp_path / "proxychains.conf"

    def start(proxy: Proxy, *words: object, login: str = "", **options: Any) -> bytes:
        config.write_text(f"strict_chain\nproxy_dns\nremote_dns_subnet 224\n[ProxyList]\nsocks5 {proxy.host} {proxy.port} {login}\n")
        return run(program, "-q", "-f", config, *words, **options)

    return start


@pytest.mark.parametrize(("host", "asked"), [("127.0.0.1", IPV4), ("::1", IPV6)], ids=["ipv4", "ipv6"])
def test_proxychains_leads_curl_through_the_proxy(proxychains: Any, proxy: Proxy, host: str, asked: Any) -> None:
    curl = need("curl")
    with website(listening(host)) as site:
        assert proxychains(proxy, curl, "-sS", f"http://{in_url(host)}:{site.port}/").decode() == site.secret
    assert proxy.session().asked == asked


def test_proxychains_logs_in(proxychains: Any, guarded: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        page = proxychains(guarded, curl, "-sS", f"http://127.0.0.1:{site.port}/", login=f"{USER} {PASSWORD}")
        assert page.decode() == site.secret
    assert guarded.session().user == USER


def test_proxychains_leaves_names_to_the_proxy(proxychains: Any, proxy: Proxy) -> None:
    # It finds localhost in /etc/hosts itself, so this takes a name that nobody finds.
    proxychains(proxy, need("curl"), "-sS", "http://nowhere.invalid/", code=7)
    session = proxy.session()
    assert session.asked == ("DOMAINNAME", "nowhere.invalid")
    assert session.reply == 4


@pytest.fixture
def socksify(tmp_path: pathlib.Path) -> Any:
    """Dante's client."""
    program = need("socksify")
    config = tmp_path / "socks.conf"

    def start(proxy: Proxy, *words: object, login: bool = False, names: str = "udp", **options: Any) -> bytes:
        config.write_text(f"""
resolveprotocol: {names}
route {{
    from: 0.0.0.0/0  to: 0.0.0.0/0  via: {proxy.host} port = {proxy.port}
    protocol: tcp udp
    command: connect bind udpassociate
    proxyprotocol: socks_v5
    method: {"username" if login else "none"}
}}
""")
        # Else it goes to networks that it is part of, the loopback among them, by itself.
        options.update(SOCKS_CONF=str(config), SOCKS_AUTOADD_LANROUTES="no")
        if login:
            options.update(SOCKS_USERNAME=USER, SOCKS_PASSWORD=PASSWORD)
        return run(program, *words, **options)

    return start


def test_socksify_leads_curl_through_the_proxy(socksify: Any, proxy: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        assert socksify(proxy, curl, "-sS", f"http://127.0.0.1:{site.port}/").decode() == site.secret
    assert proxy.session().asked == IPV4


def test_socksify_logs_in(socksify: Any, guarded: Proxy) -> None:
    curl = need("curl")
    with website() as site:
        assert socksify(guarded, curl, "-sS", f"http://127.0.0.1:{site.port}/", login=True).decode() == site.secret
    assert guarded.session().user == USER


def test_socksify_leaves_names_to_the_proxy(socksify: Any, proxy: Proxy) -> None:
    socksify(proxy, need("curl"), "-sS", "http://nowhere.invalid/", names="fake", code=7)
    session = proxy.session()
    assert session.asked == ("DOMAINNAME", "nowhere.invalid")
    assert session.reply == 4


def test_socksify_leads_datagrams_through_the_proxy(socksify: Any, proxy: Proxy) -> None:
    program = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.sendto(b"hello", ("127.0.0.1", int(sys.argv[1])))
data, (host, port) = sock.recvfrom(100)
print(data.decode(), host, port)
"""
    with udp_echo() as target:
        answer = socksify(proxy, sys.executable, "-c", program, target.port).decode()
        assert answer.split() == [target.secret.decode() + "hello", "127.0.0.1", str(target.port)]
    session = proxy.session()
    assert (session.command, session.up, session.down) == ("udp", 5, 5 + len(target.secret))


def test_socksify_lets_an_ftp_server_call_curl_back(socksify: Any, proxy: Proxy) -> None:
    curl = need("curl")
    content = b"".join(blocks(1))
    with ftp_server(content) as server:
        received = socksify(proxy, curl, "-sS", "--ftp-port", "-", f"ftp://127.0.0.1:{server.port}/file")
        assert digest(received) == digest(content)
        assert proxy.session(command="connect").port == server.port
    session = proxy.session(command="bind")
    assert (session.asked, session.down) == (IPV4, len(content))


# --- git ---

@pytest.fixture
def repository(tmp_path: pathlib.Path) -> Any:
    """A folder with a bare repository in it, and its only commit."""
    git = need("git")
    work, bare = tmp_path / "work", tmp_path / "served" / "repository.git"
    run(git, "init", "-q", work)
    (work / "file").write_bytes(SENT)
    run(git, "add", "file", cwd=work)
    run(git, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", "first", cwd=work)
    run(git, "clone", "-q", "--bare", work, bare)
    run(git, "update-server-info", cwd=bare)
    return bare.parent, run(git, "rev-parse", "HEAD", cwd=work)


def clone(folder: pathlib.Path, url: str, *options: str, **more: Any) -> bytes:
    """Clone, check the file, and return the commit."""
    git = need("git")
    run(git, *options, "clone", "-q", url, folder, **more)
    assert digest((folder / "file").read_bytes()) == digest(SENT)
    return run(git, "rev-parse", "HEAD", cwd=folder)


def test_git_clones_over_http(proxy: Proxy, repository: Any, tmp_path: pathlib.Path) -> None:
    folder, commit = repository
    with files(folder) as site:
        url = f"http://localhost:{site.port}/repository.git"
        assert clone(tmp_path / "clone", url, ALL_PROXY=proxy.url()) == commit
        sessions = proxy.sessions(1, port=site.port)
    assert {session.asked for session in sessions} == {NAME}
    assert sum(session.down for session in sessions) > len(SENT) // 2000     # it compresses well


def test_git_logs_in(guarded: Proxy, repository: Any, tmp_path: pathlib.Path) -> None:
    folder, commit = repository
    with files(folder) as site:
        url = f"http://localhost:{site.port}/repository.git"
        assert clone(tmp_path / "clone", url, "-c", f"http.proxy={guarded.url(login=True)}") == commit
        assert {session.user for session in guarded.sessions(1, port=site.port)} == {USER}


def test_git_clones_over_its_own_protocol_and_a_netcat(proxy: Proxy, repository: Any, tmp_path: pathlib.Path) -> None:
    folder, commit = repository
    script = tmp_path / "through"
    script.write_text(f'#!/bin/sh\nexec {need("nc.openbsd")} -X 5 -x {proxy.address} "$1" "$2"\n')
    script.chmod(0o755)
    with inetd(need("git"), "daemon", "--inetd", "--export-all", f"--base-path={folder}") as server:
        url = f"git://localhost:{server.port}/repository.git"
        assert clone(tmp_path / "clone", url, "-c", f"core.gitProxy={script}") == commit
        assert proxy.session(port=server.port).asked == NAME
