"""Real load balancers in front of the program: what HAProxy and nginx send, and what is made of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from socks5srv.protocol import UNSPECIFIED, Address, Command, Datagram, ReplyCode

from .clients.harness import lack, need
from .docs.pages import blocks
from .conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange, needs_ipv6, needs_neighbour, reset, socket_for, udp_socket
from .program import Start, logged_in, processes_too

HAPROXY = """
global
    stats socket {folder}/admin.sock mode 600 level admin
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout check 10s
frontend socks
    bind fd@{listening}
    bind unix@{folder}/socks.sock
    unique-id-format %{{+X}}o%ci:%cp_%fi:%fp_%Ts_%rt
    default_backend nodes
backend nodes
{checks}
    server n1 {node} {options} inter 50ms fall 2 rise 1
"""
CHECKS = """
    option tcp-check
    tcp-check connect {words}
    tcp-check send-binary {sent}
    tcp-check expect binary {expected}
"""
NGINX = """
load_module {module};
daemon off;
user root;
pid {folder}/nginx.pid;
error_log stderr;
events {{ }}
stream {{
    server {{
        listen {here};
        proxy_pass {node};
        proxy_protocol on;
        proxy_timeout 1h;
    }}
}}
"""
STREAM_MODULES = ("/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so", "/usr/libexec/nginx/ngx_stream_module.so")


SCALEOUT = blocks("text", "scaleout")      # the manual's: a line, and the configurations of HAProxy and nginx


class Balancer:
    """One in a process of its own, which listens at `address`."""

    def __init__(self, folder: Path, address: Tuple[str, int]) -> None:
        self.folder, self.address = folder, address

    def client(self, source: str = LOCALHOST) -> Client:
        return Client(self.address, source)

    def unix_socket(self, name: str) -> Any:
        """A connection to one of HAProxy's, which may not be there yet."""
        def connected() -> Optional[socket.socket]:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(TIMEOUT)
            if sock.connect_ex(str(self.folder / name)) == 0:
                return sock
            sock.close()
            return None

        return eventually(connected)

    def status(self) -> Dict[str, str]:
        """What HAProxy says of its node."""
        with self.unix_socket("admin.sock") as sock:
            sock.sendall(b"show stat\n")
            text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        head, *rows = text.lstrip("# ").splitlines()
        [node] = [row for row in rows if row.startswith("nodes,n1,")]
        return dict(zip(head.split(","), node.split(",")))

    def wait_until_checked(self, status: str) -> None:
        """Some times."""
        eventually(lambda: self.status()["check_status"] == status)
        first = int(self.status()["lastchg"]) + 1
        eventually(lambda: int(self.status()["lastchg"]) >= first)      # so many seconds with twenty checks each


@pytest.fixture
def balance(tmp_path: Path) -> Iterator[Callable[..., Balancer]]:
    """Start a balancer: ``balance(configuration, command, host)``; it inherits the socket that it listens on."""
    with ExitStack() as stack:
        def start(configuration: str, *command: str, host: str = LOCALHOST, **words: Any) -> Balancer:
            listening = stack.enter_context(socket_for(host))
            listening.bind((host, 0))
            listening.listen()
            here = listening.getsockname()
            path = tmp_path / "balancer.conf"
            path.write_text(configuration.format(folder=tmp_path, listening=listening.fileno(), here=Address.of(here), **words), encoding="ascii")
            log = stack.enter_context((tmp_path / "balancer.log").open("wb"))
            process = subprocess.Popen(
                [*command, str(path)], pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "NGINX": f"{listening.fileno()};"}, start_new_session=True,
            )
            stack.callback(process.wait, TIMEOUT)
            stack.callback(process.terminate)
            return Balancer(tmp_path, here[:2])

        yield start


@pytest.fixture
def haproxy(balance: Callable[..., Balancer]) -> Callable[..., Balancer]:
    """In front of this node, with these words in its line, and with or without checks of what it says."""
    command = need("haproxy"), "-db", "-f"
    return lambda node, options, checks="", host=LOCALHOST: balance(
        HAPROXY, *command, node=f"{LOCALHOST}:{node.port}", options=options, checks=checks, host=host)


@pytest.fixture
def nginx(balance: Callable[..., Balancer]) -> Callable[..., Balancer]:
    command = need("nginx"), "-e", "stderr", "-c"
    return lambda node: balance(NGINX, *command, node=f"{LOCALHOST}:{node.port}", module=stream_module())


def stream_module() -> str:
    modules = [path for path in STREAM_MODULES if os.path.exists(path)]
    return modules[0] if modules else lack("the module of nginx for streams is not installed")


def lines(service: Any) -> List[Dict[str, Any]]:
    """What it has logged, but for its start."""
    found = [json.loads(line) for line in service.stderr.split("\n")[:-1]]
    return [line for line in found if line["event"] != "listening"]


def line_of(service: Any, client: str) -> Dict[str, Any]:
    """The line of the client from this address."""
    return eventually(lambda: next((line for line in lines(service) if line.get("client", "").startswith(f"{client}:")), {}))


BEHIND = ("--proxy-protocol", LOCALHOST, "--allow-open-proxy", "--allow-local-targets", "--log-format", "json")
SENDING = ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c", "send-proxy-v2 proxy-v2-options crc32c,unique-id"]


def serves(balancer: Balancer, service: Any, target: Any, source: str = LOCALHOST) -> None:
    """That a client from this address is served by it, and known."""
    with balancer.client(source) as client:
        client.connect(target)
        exchange(client)
        exchange(client, b"x" * 100_000)
        own = client.socket.getsockname()
    line = line_of(service, source)
    assert (line["client"], line["via"].rpartition(":")[0], line["event"]) == (f"{source}:{own[1]}", LOCALHOST, "close")


@needs_neighbour
@processes_too
@pytest.mark.parametrize("options", SENDING)
def test_haproxy_brings_its_clients_with_their_addresses(
        options: str, words: Tuple[str, ...], start: Start, haproxy: Callable[..., Balancer], echo: Any) -> None:
    service = start(*BEHIND, *words)
    serves(haproxy(service, options), service, echo, "127.0.0.3")


@needs_neighbour
@processes_too
def test_so_does_nginx(words: Tuple[str, ...], start: Start, nginx: Callable[..., Balancer], echo: Any) -> None:
    service = start(*BEHIND, *words)
    serves(nginx(service), service, echo, "127.0.0.3")


@needs_ipv6
@pytest.mark.parametrize("options", SENDING)
def test_clients_of_the_other_family_are_known_too(options: str, start: Start, haproxy: Callable[..., Balancer], echo: Any) -> None:
    service = start(*BEHIND)
    with Client(haproxy(service, options, host="::1").address, "::1") as client:
        client.connect(echo)
        own = client.socket.getsockname()
    assert line_of(service, "[::1]")["client"] == f"[::1]:{own[1]}"


@pytest.mark.parametrize("options", SENDING)
def test_of_a_client_without_an_address_the_balancer_is_the_client(options: str, start: Start, haproxy: Callable[..., Balancer], echo: Any) -> None:
    service = start(*BEHIND)
    balancer = haproxy(service, options)
    with balancer.unix_socket("socks.sock") as sock:
        sock.sendall(b"\x05\x01\x00")
        assert sock.recv(2) == b"\x05\x00"
        sock.sendall(b"\x05\x01\x00\x01" + socket.inet_aton(echo[0]) + echo[1].to_bytes(2, "big"))
        assert sock.recv(10)[1] == ReplyCode.SUCCEEDED
        exchange(sock)
    line = line_of(service, LOCALHOST)
    assert (line["client"], line["event"]) == (line["via"], "close")


@needs_neighbour
def test_the_datagrams_of_a_client_come_straight_from_it(start: Start, haproxy: Callable[..., Balancer]) -> None:
    balancer = haproxy(start(*BEHIND), "send-proxy-v2")
    with balancer.client("127.0.0.3") as client, udp_socket() as target, udp_socket("127.0.0.3") as own:
        bound = client.ask(Command.UDP_ASSOCIATE, UNSPECIFIED).bound
        own.sendto(bytes(Datagram(Address.of(target.getsockname()), b"hello")), bound.sockaddr)
        octets, relay = target.recvfrom(100)
        assert octets == b"hello"
        target.sendto(b"answer", relay)
        assert own.recv(100).endswith(b"answer")


@pytest.mark.parametrize(("options", "checks", "status"), [
    ("send-proxy check", "", "L4OK"), ("send-proxy check check-send-proxy", "", "L4OK"), ("send-proxy-v2 check", "", "L4OK"),
    ("send-proxy-v2 check check-send-proxy", "", "L4OK"),
    ("send-proxy check", CHECKS.format(words="send-proxy", sent="050100", expected="0500"), "L7OK"),
    ("send-proxy-v2 check", CHECKS.format(words="send-proxy", sent="050100", expected="0500"), "L7OK"),
    ("send-proxy-v2 check proxy-v2-options crc32c,unique-id", CHECKS.format(words="send-proxy", sent="050100", expected="0500"), "L7OK"),
])
def test_health_checks_succeed_and_are_not_in_the_log(
        options: str, checks: str, status: str, start: Start, haproxy: Callable[..., Balancer], echo: Any) -> None:
    service = start(*BEHIND)
    balancer = haproxy(service, options, checks)
    balancer.wait_until_checked(status)
    serves(balancer, service, echo)
    service.stop()
    [client, stop] = lines(service)
    assert (client["event"], stop["event"], stop["sessions"]) == ("close", "stop", 1)


def test_checks_of_a_server_with_a_login_need_no_password(start: Start, haproxy: Callable[..., Balancer], echo: Any) -> None:
    service = start(*BEHIND, "-u", "anna:sesame")
    balancer = haproxy(service, "send-proxy-v2 check", CHECKS.format(words="send-proxy", sent="050102", expected="0502"))
    balancer.wait_until_checked("L7OK")
    with balancer.client() as client:
        assert logged_in(client, "anna", "sesame")
        assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    assert line_of(service, LOCALHOST)["user"] == "anna"
    assert len(lines(service)) == 1


def test_checks_with_a_wrong_password_fail_and_are_told_once_a_minute(start: Start, haproxy: Callable[..., Balancer]) -> None:
    service = start(*BEHIND, "-u", "anna:sesame")
    steps = CHECKS.format(words="send-proxy", sent="050102", expected="0502") + "    tcp-check send-binary 0104616e6e610178\n    tcp-check expect binary 0100\n"
    balancer = haproxy(service, "send-proxy-v2 check", steps)
    balancer.wait_until_checked("L7RSP")
    [line] = lines(service)
    assert (line["event"], line["client"]) == ("login_failed", line["via"])


def test_checks_that_forget_the_header_are_told_once_a_minute(start: Start, haproxy: Callable[..., Balancer]) -> None:
    """``tcp-check connect`` sends none, though the server's line says so."""
    service = start(*BEHIND)
    balancer = haproxy(service, "send-proxy-v2 check", CHECKS.format(words="", sent="050100", expected="0500"))
    eventually(lambda: lines(service))
    eventually(lambda: balancer.status()["status"] == "DOWN")
    [line] = lines(service)
    assert "SOCKS5 without a PROXY header: have the balancer send one" in line["message"]


def test_a_client_that_a_balancer_resets_is_one_that_has_left(start: Start, nginx: Callable[..., Balancer]) -> None:
    service = start(*BEHIND, "--log-format", "json", "-v")
    with suppress(OSError):
        reset(nginx(service).client().socket)
    eventually(lambda: lines(service))
    assert not [line for line in lines(service) if line.get("level") in ("warning", "error")]


def test_without_the_option_the_log_says_what_is_missing(start: Start, haproxy: Callable[..., Balancer]) -> None:
    service = start("--log-format", "json")
    with haproxy(service, "send-proxy-v2").client() as client:
        client.send(b"\x05\x01\x00")
        assert client.rest() == b""
    assert line_of(service, LOCALHOST)["reason"] == "this is a PROXY header, and --proxy-protocol does not have its sender's address"


@pytest.mark.parametrize("program", ["haproxy", "nginx"])
def test_the_configuration_of_the_manual_is_one_that_serves(
        program: str, start: Start, balance: Callable[..., Balancer], echo: Any) -> None:
    service, path = start(*BEHIND), need(program)
    if program == "haproxy":
        text = f"global\n    stats socket {{folder}}/admin.sock\n{SCALEOUT[1]}".replace("bind :1080", "bind fd@{listening}").replace("inter 1s", "inter 50ms")
        balancer = balance(text.replace("10.0.0.11:1080", "{node}"), path, "-db", "-f", node=f"{LOCALHOST}:{service.port}")
        balancer.wait_until_checked("L7OK")
    else:
        head, (_line, _haproxy, text) = NGINX.partition("stream {{")[0], SCALEOUT
        text = text.replace("{", "{{").replace("}", "}}").replace("listen 1080", "listen {here}").replace("10.0.0.11:1080", "{node}")
        balancer = balance(head + text, path, "-e", "stderr", "-c", node=f"{LOCALHOST}:{service.port}", module=stream_module())
    serves(balancer, service, echo)
