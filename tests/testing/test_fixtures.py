"""
The fixtures, used as any project would.  (test_pytest_plugin.py has what it takes another pytest to see.)
"""

from __future__ import annotations

from typing import Any, Callable

import pytest

from socks5srv.protocol import Command, MethodSelection, ReplyCode
from socks5srv.testing.proxy import Proxy

from ..conftest import Client, exchange


def test_a_proxy_without_a_login(socks5_proxy: Proxy, socks5_targets: Any) -> None:
    with Client(socks5_proxy.address) as client:
        client.connect(("localhost", socks5_targets.echo.port))
        exchange(client)
    socks5_proxy.assert_used(host="localhost", times=1)


def test_a_proxy_with_a_login(socks5_proxy_auth: Proxy) -> None:
    assert socks5_proxy_auth.user
    assert socks5_proxy_auth.password
    with Client(socks5_proxy_auth.address) as client:
        assert client.greet(0, 2) == MethodSelection(2)
        assert client.login(socks5_proxy_auth.user, socks5_proxy_auth.password).status == 0


@pytest.mark.socks5(hosts={"api.example.com": "127.0.0.1"})
def test_proxies_that_a_mark_has_words_for(make_socks5_proxy: Callable[..., Proxy], socks5_targets: Any) -> None:
    proxies = [make_socks5_proxy(), make_socks5_proxy(hosts={})]
    codes = []
    for proxy in proxies:
        with Client(proxy.address) as client:
            codes.append(client.ask(Command.CONNECT, ("api.example.com", socks5_targets.web.port)).code)
    assert codes == [ReplyCode.SUCCEEDED, ReplyCode.HOST_UNREACHABLE]


def test_a_target_that_there_is_not(socks5_targets: Any) -> None:
    with pytest.raises(AttributeError, match="only echo, web, ftp, dns"):
        _ = socks5_targets.smtp
