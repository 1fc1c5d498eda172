"""
Fixtures for pytest: a proxy for each test, and what is behind it.

    def test_my_program_uses_the_proxy(socks5_proxy, socks5_targets):
        my_program.fetch(socks5_targets.web.url, proxy=socks5_proxy.url)
        socks5_proxy.assert_used(port=socks5_targets.web.port, times=1)

    socks5_proxy        a Proxy without a login
    socks5_proxy_auth   one with a login, whose `user` and `password` are random
    make_socks5_proxy   a function like start(): as many as you like, of any kind
    socks5_targets      servers, started when they are first asked for: .echo .web .ftp .dns

Each test gets its own, and its end stops them.  ``@pytest.mark.socks5(...)`` gives keywords of start() to all
proxies of a test: without ``internet=True`` nothing leaves this computer.  When a test fails its report shows
the sessions of its proxies.  A test that has passed fails nevertheless if a fault of its proxies has never struck.

    socks5_proxy_session        one proxy for the whole run, for a program that is started once
    make_socks5_proxy_session   a function that starts such proxies

Their sessions and faults are of one test: each test that uses them begins without any.  Connections go on.

pytest imports this in each run of each project that has the package installed, so it imports nothing else before
a fixture is used.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Generator, Iterator, List

import pytest

if TYPE_CHECKING:
    from .proxy import Proxy
    from .targets import DnsServer, EchoServer, FtpServer, WebServer

proxies_of = pytest.StashKey[List["Proxy"]]()       # of a test, or of the session
has_passed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "socks5(**keywords): of socks5srv.testing.start(), for all proxies of the test; internet=True leads beyond loopback",
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, None]:
    """What the session's proxies tell is of this test alone, if it uses them."""
    shared = []
    if "make_socks5_proxy_session" in getattr(item, "fixturenames", ()):
        shared = item.session.stash.setdefault(proxies_of, [])
        for proxy in shared:
            proxy.clear()
    outcome = yield
    if outcome.excinfo is None:
        for proxy in shared:
            item.stash.setdefault(proxies_of, []).append(proxy)
            item.addfinalizer(partial(check_faults, item, proxy))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """The sessions of a test that has failed, in a section of its report, unless its last words have shown them."""
    outcome = yield
    report = outcome.get_result()
    item.stash[has_passed] = report.passed
    proxies = item.stash.get(proxies_of, [])
    shown = str(call.excinfo.value) if call.excinfo else ""
    sections = [proxy.report() for proxy in proxies if proxy._headline not in shown]
    if report.failed and sections:
        report.sections.append(("socks5", "\n".join(sections)))


def check_faults(item: pytest.Item, proxy: Proxy) -> None:
    """A test that has passed fails for a fault that has never struck.  (One that has failed may not have come so far.)"""
    if item.stash.get(has_passed, False):
        complaint = proxy._idle_faults()
        if complaint:
            pytest.fail(complaint, pytrace=False)


@pytest.fixture
def make_socks5_proxy(request: pytest.FixtureRequest) -> Callable[..., Proxy]:
    """A function that starts proxies, with the keywords of socks5srv.testing.start(), and those of the mark."""
    from .proxy import start

    marked: Dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("socks5"))):        # the nearest is the last to speak
        if mark.args:
            raise TypeError(f"pytest.mark.socks5 takes keywords only, such as internet=True, not {mark.args[0]!r}")
        marked.update(mark.kwargs)
    started = request.node.stash.setdefault(proxies_of, [])

    def make(*arguments: Any, **keywords: Any) -> Proxy:
        proxy = start(*arguments, **{**marked, **keywords})
        started.append(proxy)
        request.addfinalizer(partial(check_faults, request.node, proxy))
        request.addfinalizer(proxy._end)         # which comes first
        return proxy

    return make


@pytest.fixture(scope="session")
def make_socks5_proxy_session(request: pytest.FixtureRequest) -> Callable[..., Proxy]:
    """A function that starts proxies for the whole run, with the keywords of socks5srv.testing.start()."""
    from .proxy import start

    started = request.session.stash.setdefault(proxies_of, [])

    def make(*arguments: Any, **keywords: Any) -> Proxy:
        proxy = start(*arguments, **keywords)
        started.append(proxy)
        request.addfinalizer(proxy._end)
        return proxy

    return make


@pytest.fixture(scope="session")
def socks5_proxy_session(make_socks5_proxy_session: Callable[..., Proxy]) -> Proxy:
    """A SOCKS5 proxy for the whole run, without a login.  Each test finds it without sessions and faults."""
    return make_socks5_proxy_session()


@pytest.fixture
def socks5_proxy(make_socks5_proxy: Callable[..., Proxy]) -> Proxy:
    """A SOCKS5 proxy on a free port of this computer, without a login."""
    return make_socks5_proxy()


@pytest.fixture
def socks5_proxy_auth(make_socks5_proxy: Callable[..., Proxy]) -> Proxy:
    """A SOCKS5 proxy that asks for a login: its `user` and its `password`, which its `url` has, too."""
    from secrets import token_hex

    return make_socks5_proxy(users={f"user-{token_hex(4)}": token_hex(8)})


class Targets:
    """Servers on this computer, each started when it is first asked for."""

    echo: EchoServer
    web: WebServer
    ftp: FtpServer
    dns: DnsServer

    def __getattr__(self, name: str) -> Any:
        from . import targets

        kinds = {"echo": targets.EchoServer, "web": targets.WebServer, "ftp": targets.FtpServer, "dns": targets.DnsServer}
        if name not in kinds:
            raise AttributeError(f"there is no target {name!r}, only {', '.join(kinds)}")
        setattr(self, name, kinds[name]())
        return getattr(self, name)


@pytest.fixture
def socks5_targets() -> Iterator[Targets]:
    """Servers to talk to behind the proxy: .echo (TCP and UDP), .web, .ftp and .dns."""
    targets = Targets()
    yield targets
    for target in vars(targets).values():
        target.close()
