"""
Containers for a test, by podman, which builds and runs what Docker does.

What it keeps is in a folder of the test.  No image comes from anywhere: the one that others are made from, ``python``, is
made of the Python that runs the tests, with what its official image has that matters here: no byte code, and pip.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Dict, Iterable, Iterator, Optional

import pytest

from .clients.harness import need, need_module

PYTHON = "docker.io/library/python:3.13-slim"       # as podman calls what Docker calls python:3.13-slim
LEFT_OUT = {"__pycache__", "test", "idlelib", "tkinter", "site-packages", "dist-packages"}      # of Python's library
METRICS = "prometheus_client"       # which pip finds in the image, and nothing else

# Which limits root may raise, how control groups are managed, and where things are noted differs between machines; this does anywhere.
CONTAINERS = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
tmp_dir = "{0}/tmp"
[network]
network_config_dir = "{0}/networks"
"""
# vfs mounts nothing, so that a test that is killed leaves nothing that is mounted.
STORAGE = """
[storage]
driver = "vfs"
graphroot = "{0}/root"
runroot = "{0}/run"
"""


class Engine:
    """podman, with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            pytest.skip("not on this platform: containers of Linux, made by root")
        self.command = need("podman")
        need("runc")
        self.variables: Dict[str, str] = {}
        for name, text in (("CONTAINERS_CONF", CONTAINERS), ("CONTAINERS_STORAGE_CONF", STORAGE)):
            (folder / name).write_text(text.format(folder), encoding="ascii")
            self.variables[name] = str(folder / name)
        archive = folder / "python.tar"
        write_python_image(archive)
        self.podman("import", str(archive), PYTHON)
        archive.unlink()

    def podman(self, *words: str, code: Optional[int] = 0) -> str:
        """What it prints; `code` is the exit code that it has to have, None for any."""
        return self.run(self.command, *words, code=code)

    def compose(self, *words: str) -> str:
        """podman-compose, which does with a compose.yaml what Docker does."""
        return self.run(sys.executable, need_module("podman_compose").__file__, *words)

    def run(self, *command: str, code: Optional[int] = 0) -> str:
        done = subprocess.run(
            command, env={**os.environ, **self.variables}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", timeout=300, check=False,
        )
        assert code in (None, done.returncode), f"{' '.join(command)}: {done.returncode}: {done.stdout}"
        return done.stdout


def write_python_image(archive: Path) -> None:
    """A tar file with Python, the C libraries that it needs, pip, and one package for that."""
    name = "python{}.{}".format(*sys.version_info)
    program, library = Path(sys.base_prefix, "bin", name), Path(os.__file__).parent
    with tarfile.open(str(archive), "w") as tar:
        for path in shared_libraries([program, *library.glob("lib-dynload/*.so")]):
            tar.add(os.path.realpath(path), path)
        tar.add(os.path.realpath(program), "usr/local/bin/python3")
        tar.add(str(library), f"usr/local/lib/{name}", filter=without_what_is_left_out)
        tar.add(str(folder_of("pip")), f"usr/local/lib/{name}/pip", filter=without_what_is_left_out)
        for path, octets in ((f"wheels/{wheel_name(METRICS)}", wheel(METRICS)), ("etc/pip.conf", b"[global]\nno-index = true\nfind-links = /wheels\n")):
            entry = tarfile.TarInfo(path)
            entry.size = len(octets)
            tar.addfile(entry, io.BytesIO(octets))
        tar.addfile(temporary_folder())


def shared_libraries(programs: Iterable[Path]) -> Iterator[str]:
    told = subprocess.run([need("ldd"), *map(str, programs)], capture_output=True, text=True, check=False).stdout
    return iter(sorted(set(re.findall(r"(/\S+) \(0x", told))))


def without_what_is_left_out(entry: tarfile.TarInfo) -> Optional[tarfile.TarInfo]:
    entry.uid = entry.gid = 0
    return None if LEFT_OUT & set(entry.name.split("/")) else entry


def folder_of(module: str) -> Path:
    need_module(module)
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def wheel_name(package: str) -> str:
    return f"{package}-{distribution(package).version}-py3-none-any.whl"


def wheel(package: str) -> bytes:
    """A package that is installed, as what it was installed from: pip in the image gets it without a network."""
    need_module(package)
    octets = io.BytesIO()
    with zipfile.ZipFile(octets, "w") as archive:
        for path in distribution(package).files or ():
            if path.suffix != ".pyc":
                archive.write(str(path.locate()), str(path))
    return octets.getvalue()


def temporary_folder() -> tarfile.TarInfo:
    entry = tarfile.TarInfo("tmp")
    entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
    return entry

