"""
The test suites of two clients, run against this server in place of the ones that they bring or want.

    python -m tests.foreign                 # or: python -m tests.foreign python-socks

Fetches the sources of PySocks and of python-socks from PyPI into a folder that is gone afterwards, puts the stand-ins of
this folder in the place of their servers, and runs those of their tests that are about SOCKS5.  Nothing of theirs is
kept.  The exit code is 1 if one of those tests fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import List, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Suite(NamedTuple):
    name: str                       # on PyPI
    needs: List[str]                # what its tests import, there, too
    stand_ins: List[List[str]]      # ours, and where theirs would be
    tests: List[str]                # files, and options of pytest


SUITES = [
    Suite(
        "PySocks", ["pytest", "psutil"],
        [["three_proxy.py", "test/bin/3proxy"], ["web_server_of_pysocks.py", "test_server.py"]],
        # The one test that is left out connects to 10.0.0.0, to see nobody answer: that would leave this computer.
        ["test/test_pysocks.py", "-k", "socks5 and not connect_timeout"],
    ),
    Suite(
        "python-socks", ["pytest", "pytest-asyncio", "pytest-trio", "trio", "anyio", "yarl", "trustme", "uvicorn", "starlette"],
        [["proxy_server_of_python_socks.py", "tests/proxy_server.py"]],
        ["tests", "-k", "test_socks5"],
    ),
]


def run(suite: Suite, folder: Path) -> int:
    """The exit code of its tests."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", *suite.needs], check=True)
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), suite.name], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    (sources,) = [path.parent for path in folder.glob("*/PKG-INFO")]
    for ours, theirs in suite.stand_ins:
        shutil.copy(HERE / ours, sources / theirs)
        (sources / theirs).chmod(0o755)
    paths = {"PYTHONPATH": [str(sources), str(ROOT)], "PATH": [os.path.dirname(python), os.environ["PATH"]]}
    environment = {**os.environ, **{name: os.pathsep.join(folders) for name, folders in paths.items()}}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite.tests]
    return subprocess.run(command, cwd=sources, env=environment, check=False).returncode


def main() -> int:
    wanted = sys.argv[1:] or [suite.name for suite in SUITES]
    codes = []
    for suite in (suite for suite in SUITES if suite.name in wanted):
        print(f"=== {suite.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            codes.append(run(suite, Path(folder)))
    return int(not codes or any(codes))


if __name__ == "__main__":
    sys.exit(main())
