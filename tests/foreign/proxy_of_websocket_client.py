"""
Between websocket-client's tests and their echo server: a proxy of this package.

They have no server of SOCKS5 to be replaced.  So those of their tests that want an echo server get one (of websockets, as
theirs is), and whatever connects to it is sent through our proxy; the others are not run.

It is the conftest.py beside their tests.
"""

import inspect
import os
import threading

import pytest
import websocket
import websockets.sync.server

from socks5srv.testing import start


def echo(connection):
    for message in connection:
        connection.send(message)


server = websockets.sync.server.serve(echo, "127.0.0.1", 0)
port = server.socket.getsockname()[1]
os.environ["LOCAL_WS_SERVER_PORT"] = str(port)      # which they read when they are imported


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if "LOCAL_WS_SERVER_PORT" in inspect.getsource(item.function)]


@pytest.fixture(scope="session", autouse=True)
def echo_server():
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def our_proxy(monkeypatch):
    connect = websocket._core.connect
    with start(users={"anna": "secret"}) as proxy:
        ours = websocket._http.proxy_info(
            proxy_type="socks5h", http_proxy_host=proxy.host, http_proxy_port=proxy.port, http_proxy_auth=("anna", "secret"),
        )
        monkeypatch.setattr("websocket._core.connect", lambda url, options, _, socket: connect(url, options, ours, socket))
        yield
        proxy.assert_used(host="127.0.0.1", port=port, user="anna")
