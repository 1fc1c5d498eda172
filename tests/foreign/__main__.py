"""
The test suites of clients, run against this server in place of the ones that they bring, play or want.

    python -m tests.foreign                 # or: python -m tests.foreign python-socks urllib3

Fetches their sources from PyPI and npm into a folder that is gone afterwards, puts the stand-ins of this folder in the
place of their servers, and runs those of their tests that are about SOCKS5.  Nothing of theirs is kept.  The exit code is
1 if one of those tests fails.  It takes Python 3.11 or later, and for `socks` Node.js with npm.

What is left out is said at each of the `SUITES`, with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

NODE = "node"       # the folder of what comes from npm
PYTEST = ["pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", "-p", "timeout", "--timeout=60"]


class Suite(NamedTuple):
    name: str                   # of the client, on PyPI or npm
    folder: str                 # where its sources are, once they are fetched
    files: Dict[str, str]       # what is put there: a stand-in of ours, or a file of another's sources
    commands: List[List[str]]   # which run its tests
    shares_ports: bool = False  # with the others that say so: their ports are fixed


SUITES = [
    # Left out: HTTP and SOCKS4, which this server does not speak; and a connection to 10.0.0.0, to see nobody answer, for
    # that would leave this computer.
    Suite(
        "PySocks", "PySocks-1.7.1",
        {"three_proxy.py": "test/bin/3proxy", "web_server_of_pysocks.py": "test_server.py"},
        [[*PYTEST, "test/test_pysocks.py", "-k", "socks5 and not connect_timeout"]],
    ),
    # Left out: HTTP and SOCKS4; chains, each of which has a link of those; and what meets no proxy.
    Suite(
        "python-socks", "python_socks-3.2.1",
        {"proxy_server_of_python_socks.py": "tests/proxy_server.py"},
        [[*PYTEST, "-p", "anyio", "-p", "asyncio", "-p", "trio", "tests", "-k", "test_socks5"]],
        shares_ports=True,
    ),
    # Left out: the same.  Its sources have its tests, but not the files that they import: they are python-socks', of the same
    # author, but for the URL of a slow page, which httpx-socks' has.
    Suite(
        "aiohttp-socks", "aiohttp_socks-0.12.0",
        {
            "proxy_server_of_python_socks.py": "tests/proxy_server.py", "httpx_socks-0.13.1/tests/config.py": "tests/config.py",
            **{f"python_socks-3.2.1/tests/{name}.py": f"tests/{name}.py"
               for name in ["__init__", "conftest", "http_app", "http_server", "mocks", "utils"]},
        },
        [[*PYTEST, "-p", "asyncio", "tests", "-k", "socks5"]],
        shares_ports=True,
    ),
    # Left out: the same, and HTTP/2, which they try through an HTTP proxy alone.
    Suite(
        "httpx-socks", "httpx_socks-0.13.1",
        {"proxy_server_of_python_socks.py": "tests/proxy_server.py"},
        [[*PYTEST, "-p", "asyncio", "-p", "trio", "tests", "-k", "socks5"]],
        shares_ports=True,
    ),
    # Left out: SOCKS4; and of the tests of SOCKS5 those in which nothing is said to a server: a URL that is wrong, a mocked
    # socket, a listener that does not answer, and one that is closed.
    Suite(
        "urllib3", "urllib3-2.8.0",
        {"handshake_of_urllib3.py": "test/contrib/conftest.py"},
        [[*PYTEST, "test/contrib/test_socks.py", "-k", "not SOCKS4 and not version and not timeout and not connection_failure"]],
    ),
    # Left out: what does not want their echo server, its tests of SOCKS among it, for they have mocks and a closed port; a
    # test that they have switched off; and test_sockopt, since the client sets options only on what it connects itself.
    Suite(
        "websocket-client", "websocket_client-1.9.2",
        {"proxy_of_websocket_client.py": "websocket/tests/conftest.py"},
        [[*PYTEST, "websocket/tests", "-k", "not sockopt and not run_forever_dispatcher"]],
    ),
    # For Node.js.  Its package has no tests (they are in its repository only), so there are those of socks-proxy-agent, in the
    # last version that has its own in the package, on top of it; and the programs in its README.  Left out: the examples in its
    # docs/, for those of CONNECT do not parse, and those of BIND and UDP ASSOCIATE never connect.
    Suite(
        "socks", NODE,
        {"socksv5_of_socks_proxy_agent.js": "node_modules/socksv5/index.js", "programs_of_node_socks.py": "test_programs.py"},
        [
            ["mocha", "--exit", "--timeout=20000", "--reporter=dot", "node_modules/socks-proxy-agent/test/test.js"],
            [*PYTEST, "test_programs.py"],
        ],
    ),
]

# What the tests import, and what it takes to unpack sources.
FROM_PYPI = [
    "pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-timeout==2.4.0", "pytest-trio==0.8.0",
    "aiohttp==3.14.5", "anyio==4.16.0", "httpx==0.28.1", "hypercorn==0.18.0", "psutil==7.2.2", "PySocks==1.7.1",
    "python-socks==3.2.1", "quart==0.22.0", "quart-trio==0.12.0", "starlette==1.10.0", "trio==0.35.0", "trustme==1.2.1",
    "uvicorn==0.54.0", "websockets==17.4", "yarl==1.25.1",
    "hatch-vcs==0.5.0", "hatchling==1.33.0", "setuptools==82.0.1",
]

# The agent wants an older `socks`, and is given that of today.
FROM_NPM = {
    "dependencies": {"mocha": "10.8.2", "raw-body": "2.3.3", "socks": "2.8.11", "socks-proxy-agent": "4.0.2"},
    "overrides": {"socks": "$socks"},
}


def fetch_from_pypi(folder: Path) -> None:
    """What the tests need, in an environment in the folder, and the sources of the suites, unpacked beside it."""
    venv.create(folder / "venv", symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv" / "bin" / "python"), "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "install", "--no-compile", *FROM_PYPI], check=True)
    sources = [suite.folder.replace("-", "==") for suite in SUITES if suite.folder != NODE]
    subprocess.run([*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", f"--dest={folder}", *sources], check=True)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def fetch_from_npm(folder: Path) -> None:
    (folder / NODE).mkdir()
    (folder / NODE / "package.json").write_text(json.dumps(FROM_NPM))
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder / NODE, check=True)


def environment(folder: Path, sources: Path) -> Dict[str, str]:
    """Where the tests find their client, this package, and the programs that run them."""
    paths = {
        "PYTHONPATH": [sources, sources / "src", ROOT],
        "PATH": [folder / "venv" / "bin", folder / NODE / "node_modules" / ".bin", os.environ["PATH"]],
    }
    return {
        **os.environ, **{name: os.pathsep.join(map(str, folders)) for name, folders in paths.items()},
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",      # a suite names those that it needs, and minds others
        "PYTEST_ADDOPTS": "",                       # which may be for our own tests
    }


def run(suite: Suite, folder: Path, ports: threading.Lock) -> Tuple[int, str]:
    """The exit code of its tests, and what they have printed."""
    sources = folder / suite.folder
    for file, theirs in suite.files.items():
        (sources / theirs).parent.mkdir(exist_ok=True)
        shutil.copy((HERE if (HERE / file).exists() else folder) / file, sources / theirs)
        (sources / theirs).chmod(0o755)
    code, said = 0, ""
    with ports if suite.shares_ports else threading.Lock():
        for command in suite.commands:
            ran = subprocess.run(
                command, cwd=sources, env=environment(folder, sources), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                encoding="utf-8", check=False,
            )
            code, said = code or ran.returncode, said + ran.stdout
    return code, said


def why_not(names: List[str], wanted: List[Suite]) -> str:
    """Why these cannot be run; empty if they can."""
    known = [suite.name for suite in SUITES]
    for name in names:
        if name not in known:
            return f"no suite {name!r}: there are {', '.join(known)}"
    if sys.version_info < (3, 11):
        return "what it fetches takes Python 3.11 or later: run it with that"
    if any(suite.folder == NODE for suite in wanted) and not shutil.which("npm"):
        return "no npm on PATH: install Node.js and npm, or name the suites that are Python's"
    return ""


def main() -> int:
    names = sys.argv[1:]
    wanted = [suite for suite in SUITES if suite.name in names or not names]
    reason = why_not(names, wanted)
    if reason:
        sys.exit(f"tests.foreign: {reason}")
    ports, codes = threading.Lock(), []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(len(SUITES)) as threads:
        folder = Path(temporary).resolve()
        fetches = [fetch_from_pypi, *[fetch_from_npm for suite in wanted if suite.folder == NODE]]
        for fetched in [threads.submit(fetch, folder) for fetch in fetches]:
            fetched.result()
        for suite, ran in [(suite, threads.submit(run, suite, folder, ports)) for suite in wanted]:
            code, said = ran.result()
            print(f"=== {suite.name}\n{said}", flush=True)
            codes.append(code)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
