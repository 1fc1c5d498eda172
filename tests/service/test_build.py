"""What becomes of Settings: a server that has them, and observers that they ask for."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

from socks5srv.client import Proxy
from socks5srv.handler import Socks5Handler
from socks5srv.protocol import Command
from socks5srv.rules import Rule
from socks5srv.server import Socks5Server
from socks5srv.service.build import CannotStart, Single, handler_class, listening_sockets
from socks5srv.service.settings import Settings
from socks5srv.upstream import UpstreamHandler
from tests.conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange, needs_ipv6


@pytest.fixture
def single() -> Iterator[Callable[..., Single]]:
    """Make a node of one process on a free port: ``single(users=...)``."""
    nodes: List[Single] = []

    def make(**parts: Any) -> Single:
        nodes.append(Single(Settings(port=0, **parts), listening_sockets([LOCALHOST], 0)))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def serve(node: Single) -> Any:
    assert node.start()
    threading.Thread(target=node.serve_forever, daemon=True).start()
    return node.addresses[0].sockaddr


def test_settings_are_attributes_of_the_server_and_what_is_not_set_keeps_its_default(single: Callable[..., Single]) -> None:
    network = ipaddress.ip_network("10.0.0.0/8")
    server = single(
        users={"anna": "sesame"}, allow_from=[network], rules=[Rule.parse("deny :25")], commands=frozenset([Command.CONNECT]),
        max_clients=7, idle_timeout=2.5, family=socket.AF_INET, source=("127.0.0.1",),
    ).server
    assert (server.max_clients, server.idle_timeout, list(server.allow_from), server.commands) == (7, 2.5, [network], {Command.CONNECT})
    assert [rule.text for rule in server.rules] == ["deny :25"]
    assert server.route[:2] == (socket.AF_INET, ("127.0.0.1",))
    for name in ("max_per_client", "handshake_timeout", "connect_timeout", "bind_timeout"):
        assert getattr(server, name) == getattr(Socks5Server, name)


def test_an_upstream_needs_another_handler() -> None:
    assert handler_class(Settings()) is Socks5Handler
    assert handler_class(Settings(upstream=Proxy("192.0.2.1"))) is UpstreamHandler


def test_users_are_counted_wherever_they_come_from(single: Callable[..., Single], tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text("# nobody yet\n")
    file.chmod(0o600)
    assert single().users is None
    assert single(users={"anna": "sesame"}).users == 1
    assert single(users_file=str(file)).users == 0


def test_only_what_the_settings_ask_for_is_imported() -> None:
    program = (
        "import sys; from socks5srv.cli.main import make_node, parse; make_node(parse(['0']), ['127.0.0.1']).close(); print([name for name in sys.modules"
        " if name.startswith(('http', 'prometheus', *('socks5srv.' + room for room in ('capture', 'explain', 'monitor', 'workers'))))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("status", [None, ("127.0.0.1", 0)])
def test_it_counts_and_can_be_asked_with_a_page_or_without(status: Any, single: Callable[..., Single], echo: Any) -> None:
    node = single(status=status)
    with Client(serve(node)) as client:
        client.connect(echo)
        exchange(client)
        eventually(lambda: [(row["id"], row["up"], row["down"]) for row in node.stats.snapshots()[0].sessions] == [(1, 5, 5)])
        assert sum(node.stats.snapshots()[0].live.values()) == 1
    eventually(lambda: node.summary.facts()["sessions"])
    assert (node.summary.up, node.summary.down, node.summary.peak) == (5, 5, 1)
    assert len(node.stats.recent()) == (status is not None)


@pytest.mark.parametrize("status", [None, ("127.0.0.1", 0)])
def test_explanations_go_to_the_log_while_that_is_on(
    status: Any, single: Callable[..., Single], echo: Any, caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "socks5srv.explain")
    node = single(explain=True, status=status)
    address = serve(node)

    def explanations() -> int:
        before, sessions = len(caplog.records), node.summary.facts()["sessions"]
        with Client(address) as client:
            client.connect(echo)
        eventually(lambda: node.summary.facts()["sessions"] > sessions)
        all_reported = threading.Event()
        node.call(all_reported.set)
        assert all_reported.wait(TIMEOUT)
        return len([record for record in caplog.records[before:] if hasattr(record, "explanation")])

    assert explanations() > 3
    node.set_explain(False)
    assert explanations() == 0
    node.set_explain(True)
    assert explanations() > 3


@needs_ipv6
def test_all_sockets_listen_on_the_same_free_port() -> None:
    sockets = listening_sockets([LOCALHOST, "::1"], 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


def test_none_listens_if_one_of_them_cannot() -> None:
    [taken] = listening_sockets([LOCALHOST], 0)
    port = taken.getsockname()[1]
    with pytest.raises(CannotStart, match=f"port {port} on 127.0.0.1 is already in use"):
        listening_sockets(["127.0.0.2", LOCALHOST], port)
    taken.close()
    for sock in listening_sockets([LOCALHOST], port):
        sock.close()


def test_a_capture_has_all_sockets_from_before_the_first_client(single: Callable[..., Single], echo: Any, tmp_path: Path) -> None:
    node = single()
    node.capture(str(tmp_path / "file"))
    with Client(serve(node)) as client:
        client.connect(echo)
        exchange(client, b"to be recorded")
    node.close()
    assert (tmp_path / "file").read_bytes().count(b"to be recorded") == 4


def test_a_capture_that_cannot_be_written_is_told(single: Callable[..., Single], tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="cannot write the recording"):
        single().capture(str(tmp_path / "no" / "such" / "folder"))
