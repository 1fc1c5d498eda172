"""
The fixtures, as a project sees them that has the package: each test here runs a pytest of its own.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from ..conftest import within

ROOT = Path(__file__).resolve().parent.parent.parent
PLUGIN = "socks5srv.testing.pytest_plugin"

ASK = """
import socket
from socks5srv.protocol import *

def ask(proxy, host, port, login=None):
    '''The reply to a CONNECT.'''
    with socket.create_connection(proxy.address, 5) as sock, sock.makefile("rb") as stream:
        sock.sendall(bytes(Greeting(b"\\2" if login else b"\\0")))
        method = MethodSelection.read(stream).method
        if method == Method.USERNAME_PASSWORD:
            sock.sendall(bytes(Credentials(*login)))
            if CredentialsReply.read(stream).status:
                return "login failed"
        elif method == Method.NO_ACCEPTABLE_METHODS:
            return "no acceptable method"
        sock.sendall(bytes(Request(Command.CONNECT, Address.named(host, port))))
        return Reply.read(stream).code
"""


def python(*words: str, cwd: Path = ROOT, **variables: str) -> Any:
    """Run Python to its end."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**ours, "PYTHONPATH": os.pathsep.join([str(ROOT), str(cwd)]), **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=50, check=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run pytest on a module in which so many tests end so; all that it prints: ``run(MODULE, "-v", passed=2, failed=1)``."""
    def run_pytest(test: str, *options: str, **expected: int) -> str:
        (tmp_path / "ask.py").write_text(ASK, encoding="utf-8")
        (tmp_path / "test_mine.py").write_text("from ask import ask\n" + test, encoding="utf-8")
        # The summary, which in CI repeats whole messages, is left out.
        words = ["-p", PLUGIN, "-p", "no:cacheprovider", "--strict-markers", "-rN", "--rootdir", str(tmp_path), *options, str(tmp_path)]
        # Other plugins take their time, and are not what is tested.
        done = python("-m", "pytest", *words, cwd=tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        printed = str(done.stdout + done.stderr)
        counts = re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout.strip().splitlines()[-1])
        assert {how: int(count) for count, how in counts} == expected, printed
        return printed

    return run_pytest


# --- fixtures ---

def test_a_proxy_with_a_login_which_is_another_each_time(run: Any) -> None:
    run("""
import pytest
seen = set()

@pytest.mark.parametrize("number", range(3))
def test_mine(socks5_proxy_auth, socks5_targets, number):
    proxy, echo = socks5_proxy_auth, socks5_targets.echo
    assert f"{proxy.user}:{proxy.password}@" in proxy.url
    assert ask(proxy, "localhost", echo.port, (proxy.user.encode(), proxy.password.encode())) == 0
    assert ask(proxy, "localhost", echo.port, (b"guess", b"work")) == "login failed"
    assert ask(proxy, "localhost", echo.port) == "no acceptable method"
    seen.update([proxy.user, proxy.password])
    assert len(seen) == 2 * number + 2
""", passed=3)


def test_any_number_of_proxies_of_any_kind(run: Any) -> None:
    run("""
import socket
import pytest
stopped = []

def test_mine(make_socks5_proxy, socks5_targets):
    here = make_socks5_proxy(hosts={"api.example.com": "127.0.0.1"})
    there = make_socks5_proxy()
    assert ask(here, "api.example.com", socks5_targets.web.port) == 0
    assert ask(there, "api.example.com", socks5_targets.web.port) == 4
    stopped.extend([here, there, socks5_targets.web])

def test_they_have_been_stopped():
    for each in stopped:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(each.address)
""", passed=2)


def test_every_test_has_its_own(run: Any) -> None:
    run("""
def test_one(socks5_proxy):
    ask(socks5_proxy, "localhost", 1)

def test_other(socks5_proxy):
    socks5_proxy.assert_not_used()
""", passed=2)


def test_targets_are_started_when_they_are_asked_for(run: Any) -> None:
    run("""
import threading

def test_mine(socks5_targets):
    before = threading.active_count()
    kinds = [type(getattr(socks5_targets, name)).__name__ for name in ("echo", "web", "ftp", "dns", "web")]
    assert kinds == ["EchoServer", "WebServer", "FtpServer", "DnsServer", "WebServer"]
    assert threading.active_count() == before + 5       # the echo has two: TCP and UDP

def test_they_have_ended():
    assert threading.active_count() == 1
""", passed=2)


def test_a_fixture_of_the_project_s_own_wins(run: Any) -> None:
    run("""
import pytest

@pytest.fixture
def socks5_proxy():
    return "mine"

def test_mine(socks5_proxy):
    assert socks5_proxy == "mine"
""", passed=1)


# --- the mark ---

def test_nothing_leaves_this_computer_without_the_mark(run: Any) -> None:
    run("""
import pytest

def test_mine(socks5_proxy, socks5_proxy_auth, make_socks5_proxy):
    for proxy in (socks5_proxy, make_socks5_proxy()):
        assert ask(proxy, "192.0.2.1", 80) == 2
        assert ask(proxy, "www.example.com", 80) == 4
        assert not proxy.internet
    assert not socks5_proxy_auth.internet

@pytest.mark.socks5(internet=True)
def test_marked(socks5_proxy, socks5_proxy_auth, make_socks5_proxy):
    assert socks5_proxy.internet and socks5_proxy_auth.internet and make_socks5_proxy().internet
    assert not make_socks5_proxy(internet=False).internet
""", passed=2)


def test_the_mark_has_any_keyword_of_start_and_the_nearest_counts(run: Any) -> None:
    run("""
import pytest

@pytest.mark.socks5(hosts={"a.example": "127.0.0.1"}, connect_timeout=3)
class TestMine:
    def test_of_the_class(self, socks5_proxy, socks5_targets):
        assert ask(socks5_proxy, "a.example", socks5_targets.echo.port) == 0

    @pytest.mark.socks5(hosts={"b.example": "127.0.0.1"})
    def test_of_its_own(self, socks5_proxy, socks5_targets):
        assert ask(socks5_proxy, "a.example", socks5_targets.echo.port) == 4
        assert ask(socks5_proxy, "b.example", socks5_targets.echo.port) == 0
        assert socks5_proxy.server.connect_timeout == 3
""", passed=2)


@pytest.mark.parametrize(("words", "complaint"), [
    ("interent=True", "start() got an unexpected keyword 'interent'; did you mean 'internet'?"),
    ("True", "pytest.mark.socks5 takes keywords only, such as internet=True, not True"),
])
def test_a_mark_that_is_misspelt_is_an_error(run: Any, words: str, complaint: str) -> None:
    assert f"TypeError: {complaint}\n" in run(f"""
import pytest

@pytest.mark.socks5({words})
def test_mine(socks5_proxy):
    pass
""", error=1)


def test_the_mark_is_registered(tmp_path: Path) -> None:
    done = python("-m", "pytest", "-p", PLUGIN, "--markers", cwd=tmp_path)
    assert "@pytest.mark.socks5(**keywords)" in done.stdout, done.stderr


# --- when a test fails ---

def test_the_report_of_a_test_that_fails_has_the_sessions(run: Any) -> None:
    printed = run("""
def test_bad(socks5_proxy, make_socks5_proxy):
    ask(socks5_proxy, "www.example.com", 80)
    assert 0

def test_good(socks5_proxy):
    ask(socks5_proxy, "www.example.org", 80)
""", failed=1, passed=1)
    assert re.search(r"-- socks5 --+\n<Proxy 127.0.0.1:\d+> has had 1 session\n  #1 .* CONNECT www.example.com:80 failed \(reply 04\)", printed), printed
    assert "www.example.org" not in printed


def test_what_a_method_of_the_test_s_raises_is_an_error_of_the_test(run: Any) -> None:
    printed = run("""
from socks5srv import Socks5Handler

class Checked(Socks5Handler):
    def allow(self, command, address):
        assert address.port != 80, "no HTTP"
        return True

def test_mine(make_socks5_proxy):
    assert ask(make_socks5_proxy(Checked), "localhost", 80) == 1
""", passed=1, error=1)
    assert 'assert address.port != 80, "no HTTP"' in printed


FAULT = """
import pytest
from socks5srv.testing.faults import *

def test_one(socks5_proxy):
    socks5_proxy.inject(ReplyWith(5, host="api.exmaple.com", times=1))
    assert ask(socks5_proxy, "api.example.com", 80) == 4

@pytest.mark.socks5(faults=[ReplyWith(5)])
def test_two(make_socks5_proxy):
    make_socks5_proxy()
    make_socks5_proxy(faults=[ReplyWith(5, optional=True)]).clear()

def test_good(socks5_proxy):
    socks5_proxy.inject(ReplyWith(5, times=1))
    assert ask(socks5_proxy, "api.example.com", 80) == 5
"""


def test_a_fault_that_never_struck_fails_the_test_that_has_passed(run: Any) -> None:
    printed = run(FAULT, passed=3, error=2)
    assert re.search(r"""_ ERROR at teardown of test_one _+
ReplyWith.*, times=1, host='api.exmaple.com'\) never struck: the host was api.example.com; did you mean host='api.example.com'\?
A fault that need not strike takes optional=True.
<Proxy .*> has had 1 session
  #1 .*
_+ ERROR at teardown of test_two _+
.* never struck: no Request reached it
""", printed), printed
    assert printed.count("has had") == 3


def test_but_not_one_that_has_failed_or_was_skipped(run: Any) -> None:
    printed = run("""
import pytest
from socks5srv.testing.faults import *

@pytest.mark.parametrize("end", [pytest.fail, pytest.skip])
def test_mine(socks5_proxy, end):
    socks5_proxy.inject(ReplyWith(5))
    end("for another reason")
""", failed=1, skipped=1)
    assert "  ReplyWith(ReplyCode.CONNECTION_REFUSED) never struck: no Request reached it" in printed


def test_an_assertion_is_shown_where_the_test_makes_it_and_the_sessions_once(run: Any) -> None:
    lines = ['proxy.assert_used("b.example")', "proxy.assert_not_used()", "proxy.wait_for(2, 0.01)", "proxy.assert_faults_struck()", "proxy.stop()"]
    tests = "".join(f"""
def test_{number}(make_socks5_proxy):
    proxy = make_socks5_proxy(faults=[ReplyWith(5, host="c.example")])
    ask(proxy, "a.example", 80)
    {line}
""" for number, line in enumerate(lines))
    printed = run(f"""
from socks5srv.testing.faults import *
{tests}
async def waits(proxy):
    await proxy.wait_for_async(1, 0.01)

def test_async(socks5_proxy):
    import asyncio
    asyncio.run(waits(socks5_proxy))

def test_last(socks5_proxy):
    socks5_proxy.last()
""", failed=7)
    assert "proxy.py" not in printed
    for line in [*lines, "await proxy.wait_for_async(1, 0.01)", "socks5_proxy.last()"]:
        assert re.search(rf">\s+{re.escape(line)}\nE ", printed), printed
    assert printed.count("has had 1 session\n") == len(lines)


# --- for the whole run ---

SESSION = """
import socket
import pytest
from socks5srv.protocol import *
from socks5srv.testing.faults import *

@pytest.fixture(scope="session")
def program(make_socks5_proxy_session):
    # It is started once, and keeps its connection.
    proxy = make_socks5_proxy_session(hosts={"a.example": "127.0.0.1"})
    with socket.create_connection(proxy.address, 5) as connection:
        connection.sendall(bytes(Greeting(b"\\0")))
        assert connection.recv(2) == bytes(MethodSelection(0))
        yield proxy, connection

def test_one(program, socks5_proxy_session, socks5_targets):
    proxy, _connection = program
    assert ask(proxy, "a.example", socks5_targets.web.port) == 0
    assert ask(socks5_proxy_session, "a.example", 1) == 4
    proxy.inject(ReplyWith(5))

def test_two(program, socks5_proxy_session, socks5_targets):
    proxy, connection = program
    proxy.assert_not_used()
    assert (proxy.faults, socks5_proxy_session.sessions) == ([], [])
    connection.sendall(bytes(Request(Command.CONNECT, Address.named("a.example", socks5_targets.web.port))))
    assert Reply.read(connection.makefile("rb", 0)).code == 0

def test_bad(socks5_proxy_session):
    ask(socks5_proxy_session, "b.example", 1)
    assert 0

def test_last(program):
    program[0].inject(ReplyWith(5, optional=True))
"""


def test_a_proxy_for_the_whole_run_forgets_between_tests_and_keeps_its_connections(run: Any) -> None:
    printed = run(SESSION, passed=3, failed=1, error=1)
    assert "ERROR at teardown of test_one" in printed
    assert re.search(r"-- socks5 --+\n(<Proxy .*> has had 0 sessions\n)?<Proxy .*> has had 1 session\n  #\d+ .* b.example:1", printed), printed


# --- with others ---

def test_it_works_side_by_side(run: Any) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    run("""
import pytest

@pytest.mark.parametrize("number", range(20))
def test_mine(socks5_proxy, socks5_targets, number):
    assert ask(socks5_proxy, "localhost", socks5_targets.echo.port) == 0
    socks5_proxy.assert_used(times=1)
""", "-p", "xdist.plugin", "-n", "3", passed=20)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_works_with_async_tests(run: Any, backend: str) -> None:
    """Those of anyio's own plugin, which runs them with either."""
    pytest.importorskip("anyio", reason="anyio is not installed")
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    run(f"""
import anyio
import pytest

@pytest.fixture
def anyio_backend():
    return {backend!r}

@pytest.mark.anyio
async def test_mine(socks5_proxy):
    async with await anyio.connect_tcp(*socks5_proxy.address) as stream:
        await stream.send(b"\\5\\1\\0")
        assert await stream.receive(2) == b"\\5\\0"
    (session,) = await anyio.to_thread.run_sync(lambda: socks5_proxy.wait_for(closed=True))
    assert session.command is None
""", "-p", "anyio.pytest_plugin", passed=1)


UNITTEST = """
import unittest
import socks5srv.testing

class TestMine(unittest.TestCase):
    def setUp(self):
        self.proxy = socks5srv.testing.start()
        self.addCleanup(self.proxy.stop)

    def test_mine(self):
        self.assertEqual(ask(self.proxy, "www.example.com", 80), 4)
        self.proxy.assert_used(host="www.example.com", times=1)

    @unittest.skipUnless(hasattr(unittest.TestCase, "enterContext"), "not on this platform: Python before 3.11 has none")
    def test_in_a_context(self):
        proxy = self.enterContext(socks5srv.testing.start())
        self.assertEqual(ask(proxy, "www.example.com", 80), 4)
"""


def test_it_works_with_unittest(run: Any, tmp_path: Path) -> None:
    run(UNITTEST, **{"passed": 2} if sys.version_info >= (3, 11) else {"passed": 1, "skipped": 1})
    done = python("-W", "error", "-m", "unittest", "-v", "test_mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr


def test_a_project_may_name_the_plugin_itself(run: Any, tmp_path: Path) -> None:
    """Installed or not: the entry point has the same name as the module, or pytest would complain."""
    (tmp_path / "conftest.py").write_text(f"pytest_plugins = [{PLUGIN!r}]\n")
    run("def test_mine(socks5_proxy): pass\n", passed=1)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["pytest11"].strip() == f"{PLUGIN} = {PLUGIN}"


# --- what it costs those who do not use it ---

def test_to_load_it_costs_next_to_nothing() -> None:
    """In milliseconds, with pytest loaded already; the least of some tries, since the computer may be busy."""
    costs = [import_time(PLUGIN) for _ in range(5)]
    assert min(costs) < within(10)


def import_time(module: str) -> float:
    done = python("-X", "importtime", "-c", f"import pytest, {module}")
    (cumulative,) = re.findall(rf"\| +(\d+) \| {re.escape(module)}$", done.stderr, re.MULTILINE)
    return int(cumulative) / 1000


def test_to_load_it_loads_nothing_of_the_server() -> None:
    program = f"import sys, pytest; before = set(sys.modules); import {PLUGIN}; print(*sorted(set(sys.modules) - before))"
    assert python("-c", program).stdout.split() == ["socks5srv", "socks5srv.testing", PLUGIN]
