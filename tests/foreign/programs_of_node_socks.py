"""
The programs in the README of `socks`, for Node.js, run through this package.

Its package has no tests, so its examples are run instead.  The addresses of proxies in them are replaced by those of ours;
ours lead the destinations to servers of ours.  A program is ended once it has done what it shows.
"""

import re
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from socks5srv.protocol import Command
from socks5srv.testing import start
from socks5srv.testing.targets import EchoServer, WebServer

README = Path("node_modules/socks/README.md").read_text(encoding="utf-8")
BEFORE = "const { SocksClient } = require('socks'); const dgram = require('dgram'); (async () => {\n"

# Each of the first two does the same three times: with await, with a promise, with a callback.
TIMES = 3


def example(title, places):
    """The program below that heading, with other addresses in the place of some."""
    below = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"```javascript\n(.*?)```", below, re.DOTALL)
    for host, (other, port) in places.items():
        program, count = re.subn(rf"host: '{host}',([^\n]*\n)?(\s*)port: \d+", f"host: '{other}',\\1\\2port: {port}", program)
        assert count, f"{host} is not in the program"
    return program


@contextmanager
def running(program):
    """Its standard output, until it is ended."""
    command = ["node", "--unhandled-rejections=strict", "-e", f"{BEFORE}{program}}})();"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
        try:
            yield node.stdout
        finally:
            node.kill()


def find(pattern, output, times=1):
    """The first group of the pattern in a line of the output, which is waited for; the last, if there have to be several."""
    for line in output:
        found = re.search(pattern, line)
        if found:
            times -= 1
            if not times:
                return found[1]
    return pytest.fail(f"the program has ended and not said {pattern!r}")


@pytest.fixture
def proxy():
    with start() as proxy:
        yield proxy


def test_quick_start():
    with WebServer() as site, start(hosts={"192.30.253.113": site.address}) as proxy, \
            running(example("Quick Start Example", {"159.203.75.200": proxy.address})) as output:
        find(r"^(?:<ref \*1> )?(Socket) \{", output, TIMES)
        proxy.assert_used(host="192.30.253.113", port=80, times=TIMES)


def test_a_chain_of_two_proxies(proxy):
    with WebServer({"/json": "what the last proxy was told\n"}) as site, start(hosts={"ip-api.com": site.address}) as last:
        places = {"159.203.75.235": proxy.address, "104.131.124.203": last.address}
        with running(example("Chaining Proxies", places)) as output:
            find("^(what the last proxy was told)", output, TIMES)
        proxy.assert_used(*last.address, times=TIMES)
        last.assert_used(host="ip-api.com", port=80, times=TIMES)


def test_bind(proxy):
    with running(example("Bind Example (TCP Relay)", {"159.203.75.235": proxy.address})) as output:
        port = int(find(r"host: '127\.0\.0\.1', port: (\d+)", output))
        with socket.create_connection((proxy.host, port)) as peer:
            assert find(r"host: '127\.0\.0\.1', port: (\d+)", output) == str(peer.getsockname()[1])
            peer.sendall(b"hello")
            assert find("recv <Buffer (.*)>", output) == "68 65 6c 6c 6f"
    proxy.assert_used(command=Command.BIND, times=1)


def test_udp_associate(proxy):
    with EchoServer() as echo:
        places = {"159.203.75.235": proxy.address, "165.227.108.231": echo.address}
        with running(example("Associate Example (UDP Relay)", places)) as output:
            assert find(r"remoteHost: \{ host: '127\.0\.0\.1', port: (\d+) \}", output) == str(echo.port)
            assert find("data: <Buffer (.*)>", output) == "68 65 6c 6c 6f"
        assert echo.datagrams == [b"hello"]
    proxy.assert_used(command=Command.UDP_ASSOCIATE, times=1)
