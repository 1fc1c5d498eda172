"""
In place of the proxies that the tests of python-socks start, and of its kin: the same two names, and SOCKS5 by this package.

Its tests of HTTP and SOCKS4 proxies are not run; their ports only have to be open.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from socks5srv.testing import start
from socks5srv.testing.faults import Delay, Request

HOSTS = {"ip4.target.example.com": "127.0.0.1", "ip6.target.example.com": "::1"}


@dataclass
class ProxyConfig:
    proxy_type: str
    host: str
    port: int
    username: str | None = None
    password: str | None = None
    ssl_context: Any = None


class ProxyServer:
    def __init__(self, config):
        self.config = config
        self.started = []

    def start(self):
        for one in self.config:
            if one.proxy_type == "socks5":
                users = {one.username: one.password} if one.username else None
                # Theirs takes a moment to connect, for a test of a timeout; and some suites do not go to all of them.
                delay = Delay(Request, 0.01, optional=True)
                self.started.append(start(host=one.host, port=one.port, users=users, hosts=HOSTS, faults=[delay]))
            else:
                self.started.append(socket.create_server((one.host, one.port)))

    def shutdown(self):
        for one in self.started:
            (one.close if isinstance(one, socket.socket) else one.stop)()
