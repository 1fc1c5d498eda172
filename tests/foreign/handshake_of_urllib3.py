"""
In place of the SOCKS5 server that urllib3's tests play themselves: the same generator, with this package behind it.

Each of their tests accepts the client, lets handle_socks5_negotiation() talk to it until it has asked for something, says
whether it gets that, and is the target from then on, all with the one socket.  Here a server of ours has the client's
connection, and the test's socket becomes the far end of the tunnel.

It is the conftest.py beside their test_socks.py.
"""

import os
import queue
import socket

import pytest

from socks5srv import ReplyCode, RequestFailed, Socks5Handler
from socks5srv.testing import start


@pytest.fixture(autouse=True)
def our_server(request, monkeypatch):
    proxies = []

    def handle_socks5_negotiation(sock, negotiate, username=None, password=None):
        asked, answers = queue.Queue(), queue.Queue()

        class Handler(Socks5Handler):
            def connect(self, request):
                asked.put(request.destination)
                target = answers.get()
                if target is None:
                    raise RequestFailed(ReplyCode.GENERAL_FAILURE, "rejected by the test")
                return target

            def session_ended(self):
                asked.put(None)

        proxy = start(Handler, users={username.decode(): password.decode()} if negotiate else None)
        proxies.append(proxy)
        client, address = sock.dup(), sock.getpeername()
        assert proxy.server.verify_request(client, address)
        proxy.server.process_request(client, address)
        destination = asked.get()
        if destination is None:     # refused before it could ask
            sock.close()
            return
        host = destination.host if destination.literal else destination.host.encode()
        answers.put(become_the_target(sock) if (yield host, destination.port) else None)

    monkeypatch.setattr(request.module, "handle_socks5_negotiation", handle_socks5_negotiation)
    yield
    assert proxies, "the test has not come to our server"
    for proxy in proxies:
        proxy.stop()


def become_the_target(sock):
    """Put a new connection behind `sock`, and return the other end of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        with listener.accept()[0] as far:
            os.dup2(far.fileno(), sock.fileno())
    return near
