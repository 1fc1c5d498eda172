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
from typing import Any, Callable, Iterator
from unittest.mock import ANY

import pytest

from .clients.harness import (
    BIG, HERE, PASSWORD, PATIENCE, USER, Proxy, blocks, closed_port, digest, digester, environment, files,
    ftp_server, in_threads, in_url, inetd, lack, need, need_ipv6, need_module, run, udp_echo, website,
)

NAME = ("DOMAINNAME", "localhost")      # what a client writes that leaves names to the proxy
IPV4 = ("IPV4", "127.0.0.1")
IPV6 = ("IPV6", "::1")

# What a client is asked for, and what it should write then.
IDS = ["name", "ipv4", "ipv6"]
WAYS = pytest.mark.parametrize(("host", "asked"), [("localhost", NAME), ("127.0.0.1", IPV4), ("::1", IPV6)], ids=IDS)
HOSTS = pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"], ids=IDS)


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


# --- all that get a page: called with the proxy and its URL ---

def curl(proxy: Proxy, *words: object, login: bool = False, **options: Any) -> str:
    return run(need("curl"), "-sS", "-x", proxy.url(login=login), *words, **options).decode()


def httpx(proxy: Proxy, url: str, login: bool = False) -> str:
    need_module("socksio")
    with need_module("httpx").Client(proxy=proxy.url("socks5", login), timeout=PATIENCE) as client:
        return str(client.get(url).text)


def aiohttp(proxy: Proxy, *urls: str, login: bool = False) -> str:
    """All of them at once."""
    module, socks = need_module("aiohttp"), need_module("aiohttp_socks")

    async def get_all() -> Any:
        connector = socks.ProxyConnector.from_url(proxy.url("socks5", login), rdns=True)
        async with module.ClientSession(connector=connector, timeout=module.ClientTimeout(PATIENCE)) as session:
            async def get(url: str) -> Any:
                async with session.get(url) as answer:
                    return await answer.text()

            return await asyncio.gather(*map(get, urls))

    return " ".join(asyncio.run(get_all()))


@WAYS
@pytest.mark.parametrize("get", [curl, httpx, aiohttp])
def test_a_client_gets_a_page(proxy: Proxy, get: Callable[..., str], host: str, asked: Any) -> None:
    with website(listening(host)) as site:
        page = get(proxy, f"http://{in_url(host)}:{site.port}/")
        assert page == site.secret
        session = proxy.session(port=site.port)
    assert session.event == "close"
    assert session.asked == asked
    assert session.down > len(page)


@pytest.mark.parametrize(("get", "methods"), [(curl, ANY), (httpx, ["USERNAME_PASSWORD"])])      # httpx offers nothing else
def test_a_client_logs_in_with_what_the_url_says(guarded: Proxy, get: Callable[..., str], methods: Any) -> None:
    with website() as site:
        assert get(guarded, f"http://localhost:{site.port}/", login=True) == site.secret
    session = guarded.session()
    assert session.user == USER
    assert session.methods == methods


# --- all that talk to a server: called with the proxy, the server's host and port, and what to say ---

SENT = b"".join(blocks(8))      # more than all buffers on the way hold


def ask_digester(sock: Any, octets: bytes = b"all of it") -> str:
    """Send, finish sending, and get an answer about all of it."""
    sock.sendall(octets)
    sock.shutdown(socket.SHUT_WR)
    return str(sock.makefile().read())


def pysocks_socket(proxy: Proxy, kind: int = socket.SOCK_STREAM, **options: Any) -> Any:
    socks = need_module("socks")
    sock = socks.socksocket(socket.AF_INET, kind)
    sock.set_proxy(socks.SOCKS5, proxy.host, proxy.port, **options)
    sock.settimeout(PATIENCE)
    return sock


def pysocks(proxy: Proxy, host: str, port: int, octets: bytes, login: bool = False) -> str:
    with pysocks_socket(proxy, **{"username": USER, "password": PASSWORD} if login else {}) as sock:
        sock.connect((host, port))
        return ask_digester(sock, octets)


def python_socks(proxy: Proxy, host: str, port: int, octets: bytes, login: bool = False) -> str:
    client = need_module("python_socks.sync").Proxy.from_url(proxy.url("socks5", login), rdns=True)
    with client.connect(host, port, timeout=PATIENCE) as sock:
        return ask_digester(sock, octets)


def ncat(proxy: Proxy, host: str, port: int, octets: bytes, login: bool = False) -> str:
    words = ["--proxy", proxy.address, "--proxy-type", "socks5", *["--proxy-auth", f"{USER}:{PASSWORD}"] * login]
    return run(need("ncat"), *words, host, port, stdin=octets).decode()


def openbsd_nc(proxy: Proxy, host: str, port: int, octets: bytes) -> str:
    return run(need("nc.openbsd"), "-N", "-X", "5", "-x", proxy.address, host, port, stdin=octets).decode()


@WAYS
@pytest.mark.parametrize("talk", [pysocks, python_socks, ncat, openbsd_nc])
def test_a_client_gets_the_answer_after_its_end(proxy: Proxy, talk: Callable[..., str], host: str, asked: Any) -> None:
    with digester(listening(host)) as target:
        assert talk(proxy, host, target.port, SENT).split() == [digest(SENT), target.secret]
    session = proxy.session()
    assert session.asked == asked
    assert session.up == len(SENT)


BOTH_METHODS = ["NO_AUTHENTICATION_REQUIRED", "USERNAME_PASSWORD"]


@pytest.mark.parametrize(("talk", "methods"), [(pysocks, BOTH_METHODS), (python_socks, ANY), (ncat, ANY)])
def test_a_client_logs_in_and_talks(guarded: Proxy, talk: Callable[..., str], methods: Any) -> None:
    with digester() as target:
        assert talk(guarded, "localhost", target.port, b"hello", login=True).split() == [digest(b"hello"), target.secret]
    session = guarded.session()
    assert session.user == USER
    assert session.methods == methods


# --- curl ---

def test_curl_resolves_the_name_itself_with_socks5(proxy: Proxy) -> None:
    with website() as site:
        assert curl(proxy, "-4", "-x", proxy.url("socks5"), f"http://localhost:{site.port}/") == site.secret
    assert proxy.session().asked == IPV4


@pytest.mark.parametrize("login", [f"{USER}:{PASSWORD}", "j\u00fcrgen:schl\u00fcssel"], ids=["usual", "beyond_ascii"])
def test_curl_logs_in(tmp_path: pathlib.Path, login: str) -> None:
    with Proxy(tmp_path, "-u", login) as proxy, website() as site:
        assert curl(proxy, "-U", login, f"http://localhost:{site.port}/") == site.secret
        assert proxy.session().user == login.partition(":")[0]


@pytest.mark.parametrize("login", [f"{USER}:guessed", f"bob:{PASSWORD}", f"{USER}:", None])
def test_curl_with_a_wrong_login_gets_nothing(guarded: Proxy, login: Any) -> None:
    with website() as site:
        words = ["-U", login] if login else []
        assert curl(guarded, *words, f"http://localhost:{site.port}/", code=97) == ""
    session = guarded.session()
    assert session.event == ("login_failed" if login else "no_acceptable_method")
    assert session.host is None


def test_curl_is_told_of_a_port_that_refuses(proxy: Proxy) -> None:
    with closed_port() as port:
        curl(proxy, f"http://127.0.0.1:{port}/", code=97)
        session = proxy.session(port=port)
    assert (session.event, session.reply) == ("failed", 5)


def test_curl_is_told_of_a_name_that_does_not_exist(proxy: Proxy) -> None:
    curl(proxy, "http://nowhere.invalid/", code=97)
    session = proxy.session()
    assert (session.event, session.reply) == ("failed", 4)
    assert session.asked == ("DOMAINNAME", "nowhere.invalid")


def test_curl_downloads_a_big_file_whole(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    with website() as site:
        curl(proxy, "-o", tmp_path / "big", f"http://localhost:{site.port}/big")
    with open(tmp_path / "big", "rb") as stream:
        assert digest(iter(lambda: stream.read(1 << 20), b"")) == digest(blocks())
    assert proxy.session().down > BIG << 20


def test_curl_uploads_a_big_file_whole(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "big", "wb") as stream:
        stream.writelines(blocks())
    with website() as site:
        assert curl(proxy, "-T", tmp_path / "big", f"http://localhost:{site.port}/") == digest(blocks())
    assert proxy.session().up > BIG << 20


def test_curl_gets_fifty_pages_at_once(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    with website() as site:
        url = f"http://localhost:{site.port}/echo/"
        words = [word for number in range(50) for word in ("-o", tmp_path / f"{number}", f"{url}{number}")]
        curl(proxy, "-Z", "--parallel-immediate", "--parallel-max", "50", "--http1.0", *words)
        for number in range(50):
            assert (tmp_path / f"{number}").read_text() == f"{site.secret}{number}"
        assert {session.event for session in proxy.sessions(50, port=site.port)} == {"close"}


def test_curl_keeps_a_connection_for_several_pages(proxy: Proxy) -> None:
    with website() as site:
        urls = [f"http://localhost:{site.port}/echo/{number}" for number in range(5)]
        assert curl(proxy, *urls) == "".join(f"{site.secret}{n}" for n in range(5))
    proxy.session(port=site.port)


def test_curl_gets_a_page_over_a_proxy_on_ipv6(tmp_path: pathlib.Path) -> None:
    need_ipv6()
    with Proxy(tmp_path, host="::1") as proxy, website() as site:
        assert curl(proxy, f"http://localhost:{site.port}/") == site.secret
        assert proxy.session().line["client"].startswith("[::1]:")


# --- PySocks ---

@pytest.fixture
def socks() -> Any:
    return need_module("socks")


def test_pysocks_resolves_the_name_itself_if_told_so(proxy: Proxy) -> None:
    with digester() as target, pysocks_socket(proxy, rdns=False) as sock:
        sock.connect(("localhost", target.port))
        assert ask_digester(sock).split() == [digest(b"all of it"), target.secret]
    assert proxy.session().asked == IPV4


def test_pysocks_is_told_of_a_wrong_password(socks: Any, guarded: Proxy) -> None:
    sock = pysocks_socket(guarded, username=USER, password="guessed")
    with sock, closed_port() as port, pytest.raises(socks.ProxyError, match="SOCKS5 authentication failed"):
        sock.connect(("localhost", port))
    assert guarded.session().event == "login_failed"


def test_pysocks_is_told_why_it_cannot_connect(socks: Any, proxy: Proxy) -> None:
    with pysocks_socket(proxy) as sock, closed_port() as port, pytest.raises(socks.ProxyError, match="0x05: Connection refused"):
        sock.connect(("127.0.0.1", port))


@HOSTS
def test_pysocks_exchanges_datagrams(proxy: Proxy, host: str) -> None:
    with udp_echo(listening(host)) as target, pysocks_socket(proxy, socket.SOCK_DGRAM) as sock:
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


def test_pysocks_logs_in_for_datagrams(guarded: Proxy) -> None:
    with udp_echo() as target, pysocks_socket(guarded, socket.SOCK_DGRAM, username=USER, password=PASSWORD) as sock:
        sock.sendto(b"hello", ("localhost", target.port))
        assert sock.recvfrom(100) == (target.secret + b"hello", ("127.0.0.1", target.port))
    assert guarded.session().user == USER


def test_pysocks_reaches_several_hosts_with_one_association(proxy: Proxy) -> None:
    with udp_echo() as one, udp_echo() as other, pysocks_socket(proxy, socket.SOCK_DGRAM) as sock:
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

def test_httpx_gets_twenty_pages_at_once(proxy: Proxy) -> None:
    module, _socksio = need_module("httpx"), need_module("socksio")

    async def get_all(port: int) -> Any:
        async with module.AsyncClient(proxy=proxy.url("socks5"), timeout=PATIENCE) as client:
            answers = await asyncio.gather(*(client.get(f"http://localhost:{port}/echo/{n}") for n in range(20)))
            return [answer.text for answer in answers]

    with website() as site:
        assert asyncio.run(get_all(site.port)) == [f"{site.secret}{number}" for number in range(20)]
    assert {session.asked for session in proxy.sessions(1)} == {NAME}


# --- python-socks, and aiohttp-socks on top of it ---

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


def test_aiohttp_logs_in_and_gets_fifty_pages_at_once(guarded: Proxy) -> None:
    with website() as site:
        urls = [f"http://localhost:{site.port}/echo/{number}" for number in range(50)]
        assert aiohttp(guarded, *urls, login=True).split() == [f"{site.secret}{number}" for number in range(50)]
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
        words = ["--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000", "socks@2"]
        done = subprocess.run([npm, "install", "--prefix", str(folder), *words], env=environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=50, check=False)
        if done.returncode != 0:
            lack(f"npm cannot install socks: {(done.stdout + done.stderr).decode().strip()}")
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
    assert (session.user, session.methods) == (USER, BOTH_METHODS)


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

    def start(proxy: Proxy, *words: object, login: bool = False, **options: Any) -> bytes:
        place = f"{proxy.host} {proxy.port} " + f"{USER} {PASSWORD}" * login
        config.write_text(f"strict_chain\nproxy_dns\nremote_dns_subnet 224\n[ProxyList]\nsocks5 {place}\n")
        return run(program, "-q", "-f", config, *words, **options)

    return start


@pytest.fixture
def socksify(tmp_path: pathlib.Path) -> Any:
    """Dante's client."""
    program = need("socksify")
    config = tmp_path / "socks.conf"

    def start(proxy: Proxy, *words: object, login: bool = False, **options: Any) -> bytes:
        config.write_text(f"""
resolveprotocol: fake
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


@pytest.fixture
def wrapper(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


WRAPPERS = pytest.mark.parametrize("wrapper", ["proxychains", "socksify"], indirect=True)


@pytest.mark.parametrize(("wrapper", "host", "asked"), [
    ("proxychains", "127.0.0.1", IPV4), ("proxychains", "::1", IPV6), ("socksify", "127.0.0.1", IPV4),
], ids=["proxychains-ipv4", "proxychains-ipv6", "socksify-ipv4"], indirect=["wrapper"])
def test_a_wrapper_leads_curl_through_the_proxy(wrapper: Any, proxy: Proxy, host: str, asked: Any) -> None:
    with website(listening(host)) as site:
        assert wrapper(proxy, need("curl"), "-sS", f"http://{in_url(host)}:{site.port}/").decode() == site.secret
    assert proxy.session().asked == asked


@WRAPPERS
def test_a_wrapper_logs_in(wrapper: Any, guarded: Proxy) -> None:
    with website() as site:
        assert wrapper(guarded, need("curl"), "-sS", f"http://127.0.0.1:{site.port}/", login=True).decode() == site.secret
    assert guarded.session().user == USER


@WRAPPERS
def test_a_wrapper_leaves_names_to_the_proxy(wrapper: Any, proxy: Proxy) -> None:
    # proxychains finds localhost in /etc/hosts itself, so this takes a name that nobody finds.
    wrapper(proxy, need("curl"), "-sS", "http://nowhere.invalid/", code=7)
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
    content = b"".join(blocks(1))
    with ftp_server(content) as server:
        received = socksify(proxy, need("curl"), "-sS", "--ftp-port", "-", f"ftp://127.0.0.1:{server.port}/file")
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
