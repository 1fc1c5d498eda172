"""
The manifests in examples/kubernetes/, as far as that goes without a cluster.

They are compared with the schemas of Kubernetes and with each other, and a server is started with their options.  What is
not tried is what a cluster does with them: see docs/scaleout.rst.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from socks5srv import advertise
from socks5srv.cli.options import parse
from socks5srv.protocol import Command
from socks5srv.rules import Rule
from socks5srv.server import Defaults
from socks5srv.service.settings import Settings

from .clients.harness import need_module
from .conftest import Place, cheap_hash, eventually, exchange
from .monitor.watched import Page
from .program import ROOT, Service
from .test_container import dockerfile, user

MANIFESTS = ROOT / "examples" / "kubernetes"
VERSIONS = ["1.30", "1.37"]     # the first with all that the manifests use, and the last that the validator knows
HOST_IP = "203.0.113.7"

Start = Callable[..., Service]
each_file = pytest.mark.parametrize("name", ["socks5srv", "nodes"])


def documents(name: str) -> List[Dict[str, Any]]:
    return list(need_module("yaml").safe_load_all((MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8")))


class Manifests:
    """What a file has for the pods, and for their one container."""

    def __init__(self, name: str) -> None:
        self.all = {document["kind"]: document for document in documents(name)}
        (self.workload,) = [document for kind, document in self.all.items() if kind in ("Deployment", "DaemonSet")]
        self.pod = self.workload["spec"]["template"]["spec"]
        (self.container,) = self.pod["containers"]

    @property
    def options(self) -> str:
        return str(self.all["ConfigMap"]["data"]["options"])

    def words(self, folder: Path) -> List[str]:
        """The options of the image and of the container, with its files in this folder, and the variables filled in."""
        (folder / "options").write_text(self.options, encoding="utf-8")
        image = re.findall(r'SOCKS5SRV_OPTIONS="(.+?)"', dockerfile("ENV")[-1])[0].split()
        return [*image, *(word.replace("/etc/socks5srv", str(folder)).replace("$(HOST_IP)", HOST_IP) for word in self.container["args"])]

    def settings(self, folder: Path) -> Settings:
        settings = parse(self.words(folder))
        assert isinstance(settings, Settings)
        return settings

    def probes(self) -> Dict[str, Any]:
        return {name: value["httpGet"] for name, value in self.container.items() if name.endswith("Probe")}


@each_file
@pytest.mark.parametrize("version", VERSIONS)
def test_it_fits_the_schemas_of_kubernetes(name: str, version: str) -> None:
    validator = need_module("kubernetes_validate")
    for document in documents(name):
        validator.validate(document, version, strict=True)


def test_what_does_not_fit_is_found() -> None:
    """So that the test above can fail."""
    validator = need_module("kubernetes_validate")
    manifests = Manifests("socks5srv")
    manifests.container["lifecycle"]["preStop"]["sleep"]["minutes"] = 1
    with pytest.raises(validator.ValidationError):
        validator.validate(manifests.workload, VERSIONS[0], strict=True)


@each_file
def test_what_names_other_parts_names_such_as_there_are(name: str) -> None:
    manifests = Manifests(name)
    template = manifests.workload["spec"]["template"]
    spec = manifests.workload["spec"]
    selectors = [spec["selector"]["matchLabels"]]
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in manifests.pod.get("topologySpreadConstraints", ())]
    if name == "socks5srv":
        selectors += [manifests.all["Service"]["spec"]["selector"], manifests.all["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
                      manifests.all["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    assert all(selector == template["metadata"]["labels"] for selector in selectors)
    named = {port["name"] for port in manifests.container["ports"]}
    asked = {probe["port"] for probe in manifests.probes().values()}
    asked |= {port["targetPort"] for port in manifests.all.get("Service", {"spec": {"ports": []}})["spec"]["ports"]}
    asked |= {port["port"] for rule in manifests.all.get("NetworkPolicy", {"spec": {"ingress": []}})["spec"]["ingress"] for port in rule["ports"]}
    assert asked <= named
    (volume,), (mount,) = manifests.pod["volumes"], manifests.container["volumeMounts"]
    assert volume["name"] == mount["name"]
    assert volume["projected"]["sources"][0]["configMap"]["name"] == manifests.all["ConfigMap"]["metadata"]["name"]


@each_file
def test_the_ports_are_those_of_the_options(name: str, tmp_path: Path) -> None:
    manifests = Manifests(name)
    settings = manifests.settings(tmp_path)
    ports = {port["name"]: port["containerPort"] for port in manifests.container["ports"]}
    assert settings.status is not None
    assert ports == {"socks": settings.port, "status": settings.status[1]}
    for probe in manifests.probes().values():       # from outside the pod, but for pods that have no network of their own
        assert probe.get("host", "0.0.0.0") == settings.status[0]
    assert ("host" in probe) == bool(manifests.pod.get("hostNetwork")) != settings.status_open


@each_file
def test_the_pod_is_killed_only_after_it_has_drained(name: str, tmp_path: Path) -> None:
    manifests = Manifests(name)
    settings = manifests.settings(tmp_path)
    before = manifests.container.get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})["preStop"]["sleep"]["seconds"]
    assert manifests.pod["terminationGracePeriodSeconds"] > before + (settings.drain_grace or Defaults.drain_grace) + (settings.drain_timeout or 0)


@each_file
def test_the_pod_may_do_no_more_than_the_strictest_standard_has_it(name: str) -> None:
    manifests = Manifests(name)
    security = manifests.pod["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["seccompProfile"]["type"]) == (True, user(), "RuntimeDefault")
    assert manifests.container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }
    assert bool(manifests.pod.get("hostNetwork")) == (name == "nodes")


@each_file
def test_the_users_can_be_read_by_the_program_and_by_nobody_else(name: str) -> None:
    """Or it does not start."""
    manifests = Manifests(name)
    assert manifests.pod["securityContext"]["fsGroup"] == user()
    assert manifests.pod["volumes"][0]["projected"]["defaultMode"] & 0o777 == 0o440
    assert "subPath" not in manifests.container["volumeMounts"][0]


# --- a server with their options ---

class Mounted:
    """A volume as the kubelet makes it: its files are links into a folder, which is exchanged as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version = folder, 0
        folder.mkdir()

    def write(self, **files: str) -> None:
        self.version += 1
        new = self.folder / f"..{self.version}"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
            (new / name).chmod(0o440)
            if self.version == 1:
                (self.folder / name).symlink_to(os.path.join("..data", name))
        link = self.folder / "..new"
        link.symlink_to(new.name)
        link.replace(self.folder / "..data")


@each_file
def test_a_server_with_the_options_answers_the_probes_and_notices_a_new_secret(name: str, start: Start, echo: Place, tmp_path: Path) -> None:
    manifests = Manifests(name)
    words = manifests.words(tmp_path)
    volume = Mounted(tmp_path / "etc")
    users = f"anna:{cheap_hash('sesame')}\n"
    volume.write(options=manifests.options, users=users)
    service = start(
        *words, "--users-file", str(volume.folder / "users"), "--status", "127.0.0.1:0", "--log-format", "text", "--allow-local-targets",
        "--drain-grace", "60", "-p", "0", port=None,
    )
    page = Page.of(service)
    assert {probe["path"] for probe in manifests.probes().values()} == {"/healthz", "/readyz"}
    eventually(lambda: page.ask("/healthz").status == page.ask("/readyz").status == 200)
    tunnel = service.tunnel(echo, "anna", "sesame")
    volume.write(options=manifests.options, users=f"{users}ben:{cheap_hash('mellon')}\n")
    service.wait_for("2 users read from")
    assert service.admits("ben", "mellon")
    service.process.send_signal(signal.SIGTERM)
    eventually(lambda: page.ask("/readyz").status == 503)
    assert page.ask("/healthz").status == 200
    exchange(tunnel)
    assert service.stop(signal.SIGTERM) == 0


@each_file
def test_clients_are_kept_out_of_the_cluster(name: str, tmp_path: Path) -> None:
    rules = Manifests(name).settings(tmp_path).rules
    assert {Rule.parse(f"deny {network}") for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")} <= set(rules)


def test_a_balancer_is_not_asked_to_pass_on_what_it_cannot(tmp_path: Path) -> None:
    assert Manifests("socks5srv").settings(tmp_path).commands == {Command.CONNECT}
    nodes = Manifests("nodes").settings(tmp_path)
    assert nodes.commands == set(Command)
    assert nodes.advertise == advertise.parse(HOST_IP)
    assert nodes.udp_ports is not None
    assert nodes.udp_ports[-1] < 30000, "NodePorts, and what Linux takes for connections, are beyond"
