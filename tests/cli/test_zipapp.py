"""The whole package in one file, made as docs/install.rst says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT
from tests.program import ROOT, environment


@pytest.fixture
def pyz(tmp_path: Path) -> Path:
    """socks5srv.pyz, by the commands of the manual, in a copy of what they need."""
    if os.name != "posix":
        pytest.skip("not on this platform: the manual's commands are for a POSIX shell")
    text = (ROOT / "docs" / "install.rst").read_text(encoding="utf-8")
    block = re.search(r"\.\. code-block:: console\n\n((?:   [^\n]*\n)*   [^\n]*zipapp[^\n]*\n)", text)
    assert block is not None
    commands = [line.strip()[2:] for line in block.group(1).splitlines()]
    shutil.copytree(ROOT / "socks5srv", tmp_path / "socks5srv", ignore=shutil.ignore_patterns("__pycache__"))
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-euc", "\n".join(commands)], cwd=tmp_path, env=environment(PATH=path), check=True, timeout=TIMEOUT)
    return tmp_path / "socks5srv.pyz"


def run(pyz: Path, *words: str) -> str:
    variables = environment()
    del variables["PYTHONPATH"]         # or it would find the package elsewhere
    command, folder = [sys.executable, str(pyz), *words], pyz.parent.parent
    return subprocess.check_output(command, cwd=folder, env=variables, timeout=TIMEOUT, encoding="utf-8")


def test_one_file_is_the_whole_program(pyz: Path) -> None:
    assert run(pyz, "--version").startswith("socks5srv ")
    run(pyz, "--self-test")


def test_one_file_keeps_the_exit_code_of_what_it_runs(pyz: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(pyz, "--run", "sh", "-c", "exit 9")
    assert caught.value.returncode == 9
