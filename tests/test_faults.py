"""
What goes wrong on other computers: targets that are killed, clients that vanish in every phase.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any, Callable, List, Tuple

import pytest

from socks5srv.protocol import UNSPECIFIED, Command, Greeting, Method, MethodSelection, Request

from .conftest import LOCALHOST, Client, address_of, eventually, exchange, handler_with, name

SENDER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _address = listener.accept()
while True:
    connection.send(bytes(65536))
"""


def test_a_target_that_is_killed_in_the_middle_ends_the_tunnel_and_no_other(start_server: Any, new_client: Any, echo: Any) -> None:
    server = start_server()
    other = new_client(server)
    other.connect(echo)
    with subprocess.Popen([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        client = new_client(server)
        client.connect((LOCALHOST, int(target.stdout.readline())))
        client.exactly(1_000_000)
        target.kill()
    assert len(client.rest()) > 0           # what was under way, and then the end
    client.close()
    assert server.next_ended().down >= 1_000_000
    exchange(other)


Place = Tuple[str, int]


def greeting(client: Client, **_places: Place) -> None:
    client.send(b"\5\2\0")


def method(client: Client, **_places: Place) -> None:
    assert client.greet(Method.NO_AUTHENTICATION_REQUIRED) == MethodSelection(Method.NO_AUTHENTICATION_REQUIRED)


def request(client: Client, **_places: Place) -> None:
    client.send(Greeting(b"\0"), bytes(Request(Command.CONNECT, UNSPECIFIED))[:-1])


def look_up(client: Client, **_places: Place) -> None:
    client.send(Greeting(b"\0"), Request(Command.CONNECT, name("unknown.invalid", 80)))


def connect(client: Client, silent: Place, **_places: Place) -> None:
    client.send(Greeting(b"\0"), Request(Command.CONNECT, address_of(silent)))


def refusal(client: Client, refusing: Place, **_places: Place) -> None:
    client.send(Greeting(b"\0"), Request(Command.CONNECT, address_of(refusing)), b"and more")


def tunnel(client: Client, echo: Place, **_places: Place) -> None:
    client.connect(echo)
    exchange(client)


def full_tunnel(client: Client, echo: Place, **_places: Place) -> None:
    client.connect(echo)
    client.socket.setblocking(False)
    try:
        while True:
            client.socket.send(bytes(65536))
    except BlockingIOError:
        pass


def bind(client: Client, **_places: Place) -> None:
    client.ask(Command.BIND, UNSPECIFIED)


def bind_called(client: Client, **_places: Place) -> None:
    bound = client.ask(Command.BIND, UNSPECIFIED).bound
    socket.create_connection(bound[:2], 10).close()


def udp(client: Client, **_places: Place) -> None:
    client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED)


def offline(_self: Any, _host: str) -> List[str]:
    raise socket.gaierror(socket.EAI_NONAME, "no such host")


PHASES = [greeting, method, request, look_up, connect, refusal, tunnel, full_tunnel, bind, bind_called, udp]
REASONS = ["client: connection reset", "client: broken pipe", "the client has left"]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_a_client_that_resets_in_any_phase_leaves_nothing_behind(
        phase: Callable[..., None], start_server: Any, new_client: Any, echo: Any, silent: Any, refusing: Any) -> None:
    """The fixture looks for threads, descriptors and bugs at the end."""
    server = start_server(handler_with(resolve=offline), connect_timeout=5.0)
    places = {"echo": echo, "silent": silent(), "refusing": refusing()}
    for _ in range(5):
        client = new_client(server)
        phase(client, **places)
        client.reset()
        session = server.next_ended()
        # It says whose connection that was, unless the client has had its answer before.
        assert session.reason in REASONS or phase in (look_up, refusal)
    eventually(lambda: not server.registry.live)
    good = new_client(server)
    good.connect(echo)
    exchange(good)
