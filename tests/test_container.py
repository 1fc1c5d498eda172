"""
What is in examples/container/: the image is built, and it and compose.yaml run.

By podman and podman-compose, which read the files of Docker.  Docker itself, and the official image of Python, which
the image is made from, are not here: see engine.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from socks5srv.cli.options import parse
from socks5srv.client import bind, connect, udp_associate
from socks5srv.service.settings import Settings

from .clients.harness import need
from .conftest import LOCALHOST, TIMEOUT, cheap_hash, eventually, in_thread, udp_socket
from .engine import Engine
from .networks import Host, Networks
from .program import ROOT, Served

FILES = ROOT / "examples" / "container"
COMPOSE = "examples/container/compose.yaml"
IMAGE = "localhost/socks5srv"
TARGET = "192.0.2.9"
SLOW = pytest.mark.timeout(600)     # an image is built first, and podman takes a second for each word on a busy machine


def dockerfile(instruction: str) -> List[str]:
    """What follows this instruction, wherever it is."""
    text = (FILES / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(rf"(?m)^{instruction} +(.+)$", text)


def user() -> int:
    return int(dockerfile("USER")[0].partition(":")[0])


def composed() -> Dict[str, Any]:
    """The service in compose.yaml, as docker-compose reads it."""
    done = subprocess.run(
        [need("docker-compose"), "-f", str(ROOT / COMPOSE), "config", "--format", "json"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (service,) = json.loads(done.stdout)["services"].values()
    return dict(service)


def options_of_compose() -> Settings:
    settings = parse([*composed()["command"]])
    assert isinstance(settings, Settings)
    return settings


# --- what can be read ---

def test_the_linter_has_nothing_against_the_dockerfile() -> None:
    done = subprocess.run([need("hadolint"), str(FILES / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_who_runs_in_the_container_is_a_number_and_not_root() -> None:
    assert user() >= 10000


def test_no_shell_is_between_the_engine_and_the_program() -> None:
    """It would get the signals."""
    assert json.loads(dockerfile("ENTRYPOINT")[0]) == ["python3", "-m", "socks5srv"]
    assert not dockerfile("CMD")


def test_compose_publishes_the_ports_that_clients_are_told() -> None:
    published = {(port["protocol"], int(port["published"])): port["target"] for port in composed()["ports"]}
    ports = options_of_compose().udp_ports
    assert ports is not None
    assert published == {("tcp", 1080): 1080, **{(protocol, port): port for protocol in ("tcp", "udp") for port in ports}}


def test_compose_waits_longer_than_the_server_drains() -> None:
    assert int(composed()["stop_grace_period"].rstrip("s")) > options_of_compose().drain_timeout


def test_compose_mounts_the_folder_of_the_users_file_and_not_the_file() -> None:
    (volume,) = composed()["volumes"]
    assert volume["target"] == os.path.dirname(options_of_compose().users_file or "")
    assert volume["read_only"]


# --- what runs ---

@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A clone, as far as the files in it are concerned that an image is made of."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(str(ROOT / "socks5srv"), f"{folder}/socks5srv")
        shutil.copytree(str(FILES), f"{folder}/examples/container")
        yield Path(folder)


@pytest.fixture(scope="module")
def engine(project: Path) -> Iterator[Engine]:
    """With the image, which is built where there is no network."""
    with tempfile.TemporaryDirectory() as folder:
        made = Engine(Path(folder))
        # Its format, since that of the OCI has no HEALTHCHECK.
        made.podman(
            "build", "--format=docker", "--network=none", "--pull=never", "--layers=false", "-t", IMAGE,
            "-f", str(project / "examples/container/Dockerfile"), str(project),
        )
        yield made


@SLOW
def test_of_the_image_alone_the_program_is_all_that_runs(engine: Engine) -> None:
    run = "run", "--rm", "--network=none", "--read-only", "--health-interval=disable"
    assert "refusing to be an open proxy" in engine.podman(*run, IMAGE, code=2)
    assert len(re.findall(" ok, ", engine.podman(*run, IMAGE, "--self-test"))) == 3
    assert "socks5srv explain" in engine.podman(*run, IMAGE, "explain", "--help")
    modules = engine.podman(*run, "--entrypoint=python3", IMAGE, "-v", "-c", "import socks5srv.server, socks5srv.monitor.http, prometheus_client")
    assert not re.findall(r"code object from .+\.py'", modules), "each start compiles it"
    files = engine.podman(*run, "--entrypoint=python3", IMAGE, "-c", "import os; print(sorted(os.listdir('/opt/socks5srv')), os.getuid())")
    assert re.findall(r"'(\w+)'|(\d+)$", files.strip()) == [("bytecode", ""), ("prometheus_client", ""), ("socks5srv", ""), ("", str(user()))]


class Container(Served):
    """The service of compose.yaml on a host, which has the users file and a network to a target."""

    def __init__(self, engine: Engine, host: Host, project: Path) -> None:
        super().__init__()
        self.engine, self.host, self.users, self.port = engine, host, project / "examples/container/etc/users", 1080
        self.project = f"socks5srv{os.getpid()}"

    def write_users(self, **passwords: str) -> None:
        """A new file in place of the old one, as an editor does it."""
        self.users.parent.mkdir(exist_ok=True)
        new = self.users.with_name("new")
        new.write_text("".join(f"{name}:{cheap_hash(password)}\n" for name, password in passwords.items()), encoding="ascii")
        os.chown(str(new), 0, user())
        new.chmod(0o640)
        new.replace(self.users)

    def compose(self, *words: str) -> None:
        with self.host.inside():
            self.engine.compose("-p", self.project, "-f", str(self.users.parent.parent / "compose.yaml"), *words)

    def podman(self, *words: str, code: Optional[int] = 0) -> str:
        with self.host.inside():
            return self.engine.podman(*words, f"{self.project}_socks5srv_1", code=code)

    def is_healthy(self) -> bool:
        return "unhealthy" not in self.podman("healthcheck", "run", code=None)

    @property
    def url(self) -> str:
        return f"socks5h://anna:sesame@{LOCALHOST}:{self.port}"


@pytest.fixture
def networks() -> Iterator[Networks]:
    found = Networks()
    yield found
    found.close()


@pytest.fixture
def target(networks: Networks) -> Host:
    return networks.host("target")


@pytest.fixture
def container(networks: Networks, target: Host, engine: Engine, project: Path) -> Iterator[Container]:
    host = networks.host("docker")
    networks.cable(host, "192.0.2.1/24", target, f"{TARGET}/24")
    host.forward()
    found = Container(engine, host, project)
    found.write_users(anna="sesame")
    found.compose("up", "-d")
    try:
        eventually(found.is_healthy)
        with host.inside():
            yield found
    finally:
        found.clients.close()
        found.compose("down")
        shutil.rmtree(f"/var/lib/cni/networks/{found.project}_default", ignore_errors=True)      # which addresses were in use


@SLOW
def test_all_three_commands_come_through_the_ports_that_are_published(container: Container, target: Host) -> None:
    ports = options_of_compose().udp_ports or ()
    with target.inside():
        listener, datagrams = socket.create_server((TARGET, 0)), udp_socket(TARGET)
    with listener, datagrams:
        with connect(container.url, *listener.getsockname()) as tunnel, accepted(listener) as peer:
            tunnel.sendall(b"hello")
            assert peer.recv(100) == b"hello"
        with udp_associate(container.url) as relay:
            relay.socket.settimeout(TIMEOUT)
            assert (relay.address.host, relay.address.port in ports) == (LOCALHOST, True)
            relay.sendto(b"hello", datagrams.getsockname())
            data, source = datagrams.recvfrom(100)
            datagrams.sendto(data, source)
            assert relay.recvfrom() == (b"hello", datagrams.getsockname())
    with bind(container.url, timeout=TIMEOUT) as waiting:
        assert (waiting.address.host, waiting.address.port in ports) == (LOCALHOST, True)
        with socket.create_connection((waiting.address.host, waiting.address.port), TIMEOUT) as peer, waiting.accept()[0] as incoming:
            peer.sendall(b"hello")
            assert incoming.recv(100) == b"hello"


@contextmanager
def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    listener.settimeout(TIMEOUT)
    with listener.accept()[0] as peer:
        peer.settimeout(TIMEOUT)
        yield peer


@SLOW
def test_users_that_are_replaced_are_noticed(container: Container) -> None:
    assert container.admits("anna", "sesame")
    container.write_users(ben="mellon")
    eventually(lambda: "1 users read from" in container.podman("logs"))
    assert container.admits("ben", "mellon")
    assert not container.admits("anna", "sesame")
    assert container.is_healthy()


@SLOW
def test_it_drains_when_it_is_stopped_and_is_healthy_meanwhile(container: Container, target: Host) -> None:
    """The first process of a container gets no signal that it has no handler for."""
    with target.inside():
        listener = socket.create_server((TARGET, 0))
    with listener, connect(container.url, *listener.getsockname()) as tunnel, accepted(listener) as peer:
        stopped = in_thread(container.podman, "stop", "--time=60")
        eventually(lambda: "draining, with 1 connection open" in container.podman("logs"))
        assert container.is_healthy()
        peer.sendall(b"the rest")
        peer.close()
        tunnel.settimeout(TIMEOUT)
        assert tunnel.recv(100) == b"the rest"
    stopped()
    assert container.podman("inspect", "--format={{.State.Status}} {{.State.ExitCode}}").strip() == "exited 0"


@SLOW
def test_it_is_not_healthy_without_its_page(engine: Engine) -> None:
    """So a check can fail."""
    name = f"socks5srv{os.getpid()}"
    engine.podman("run", "-d", f"--name={name}", "--network=none", "--health-interval=disable", IMAGE, "-u", "anna:sesame", "--status", "9181")
    try:
        assert "unhealthy" in engine.podman("healthcheck", "run", name, code=1)
    finally:
        engine.podman("rm", "-f", name)
