"""The rooms of the package: who may import whom, and that it can be carried elsewhere as it is."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import socks5srv

PACKAGE = Path(socks5srv.__file__).resolve().parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SERVICE = sorted((PACKAGE / "service").glob("*.py"))

# From the bottom to the top; a module of the core imports only from below.
CORE = {
    "names": set(),
    "protocol": {"names"},
    "session": {"protocol"},
    "descriptors": {"protocol"},
    "places": {"session"},
    "users": {"descriptors"},
    "rules": {"protocol", "names"},
    "strangers": {"protocol"},
    "listener": {"protocol"},
    "relay": {"session", "descriptors"},
    "outbound": {"protocol", "names", "descriptors", "relay"},
    "resolver": {"protocol", "names", "descriptors", "relay", "outbound"},
    "datagrams": {"protocol", "session", "relay", "outbound", "resolver"},
    "handler": {"protocol", "session", "descriptors", "strangers", "listener", "relay", "outbound", "resolver", "datagrams"},
    "server": {"protocol", "session", "descriptors", "places", "users", "rules", "listener", "relay", "outbound", "datagrams", "handler"},
}
# What uses it, or stands beside it: nothing in the core imports these.
BESIDE = {
    "client": {"protocol", "names"},
    "check": {"protocol", "names", "client"},
    "meanings": {"protocol", "session"},
    "explain": {"protocol", "strangers", "meanings"},
    "upstream": {"protocol", "names", "rules", "relay", "outbound", "resolver", "datagrams", "handler", "client"},
}
FRONT = {"__init__", "__main__"}
PLUGINS = {"pytest_plugin": {"pytest"}, "metrics": {"prometheus_client"}}      # what is imported only where that is there
A_PROGRAMS_BUSINESS = {"argparse", "signal", "getpass", "sys", "subprocess", "atexit", "json"}

modules = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def for_type_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path):
    """What a module imports when it runs, wherever in it: names of modules, with dots in front of our own."""
    module = tree(path)
    module.body = [node for node in module.body if not for_type_checkers(node)]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            if node.module:
                yield dots + node.module
            else:
                yield from (dots + alias.name for alias in node.names)


def ours(path):
    return {name.lstrip(".").partition(".")[0] for name in imports(path) if name.startswith(".")}


def others(path):
    return {name.partition(".")[0] for name in imports(path) if not name.startswith(".")}


def python(*arguments, cwd=None, path=None):
    """Run Python with nothing of this checkout in its path; what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment.update({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)], cwd=str(cwd or PACKAGE.parent), env=environment, timeout=30, check=False,
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(CORE) | set(BESIDE) | FRONT


@pytest.mark.parametrize("module", CORE)
def test_imports_go_one_way(module):
    below = set(CORE)
    for name in reversed(list(CORE)):       # the table itself has no circle
        below.discard(name)
        assert CORE[name] <= below
    assert ours(PACKAGE / f"{module}.py") <= CORE[module]


@pytest.mark.parametrize("module", BESIDE)
def test_who_stands_beside_the_core_imports_only_what_it_needs(module):
    assert ours(PACKAGE / f"{module}.py") <= BESIDE[module]


@modules
def test_nothing_is_imported_but_the_standard_library(path):
    if not hasattr(sys, "stdlib_module_names"):
        pytest.skip("not on this platform: Python before 3.10 does not know what its library has")
    assert others(path) - PLUGINS.get(path.stem, set()) <= sys.stdlib_module_names


@modules
def test_the_package_never_calls_itself_by_name(path):
    """Or it could not be a part of another."""
    assert "socks5srv" not in others(path)


@pytest.mark.parametrize("module", CORE)
def test_the_core_leaves_alone_what_is_a_programs_business(module):
    assert not others(PACKAGE / f"{module}.py") & A_PROGRAMS_BUSINESS
    calls = [node.func for node in ast.walk(tree(PACKAGE / f"{module}.py")) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]
    assert "basicConfig" not in [call.attr for call in calls if isinstance(call, ast.Attribute)]


@modules
def test_text_files_are_read_with_or_without_a_byte_order_mark(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            mode, encoding = ([argument.value for argument in node.args[1:2]] or ["r"])[0], [word for word in node.keywords if word.arg == "encoding"]
            if "r" in mode and "b" not in mode:
                assert [word.value.value for word in encoding] == ["utf-8-sig"], f"line {node.lineno}"


def test_there_are_no_sockets_in_the_protocol():
    assert not others(PACKAGE / "protocol.py") & {"socket", "select", "threading", "time", "os"}


@modules
def test_every_module_says_first_what_it_is_for(path):
    text = ast.get_docstring(tree(path))
    assert text
    assert text.splitlines()[0].endswith((".", ":"))


# --- the front door ---

def test_to_import_the_package_costs_nothing():
    """A program that only has it installed does not pay for the server, its sockets and threads."""
    print_modules = "import sys; before = set(sys.modules); import socks5srv; print(*sorted(set(sys.modules) - before))"
    loaded = python("-c", print_modules).split()
    assert [name for name in loaded if name.startswith("socks5srv")] == ["socks5srv"]
    assert not {"socket", "selectors", "logging", "socketserver"} & set(loaded)


def test_every_public_name_is_there_when_it_is_asked_for():
    assert sorted(socks5srv.__all__) == socks5srv.__all__
    assert set(socks5srv.HOMES) == set(socks5srv.__all__)
    for name in socks5srv.__all__:
        assert getattr(socks5srv, name).__module__ == f"socks5srv.{socks5srv.HOMES[name]}"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = socks5srv.no_such_name
    assert python("-c", "from socks5srv import *; print(Socks5Server.__name__)") == "Socks5Server\n"


def test_type_checkers_see_the_same_names():
    [block] = [node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == socks5srv.HOMES
    assert (PACKAGE / "py.typed").exists()


# --- elsewhere ---

def copy(destination):
    shutil.copytree(str(PACKAGE), str(destination), ignore=shutil.ignore_patterns("__pycache__"))


def test_the_folder_works_as_a_part_of_another_tree(tmp_path):
    copy(tmp_path / "vendor" / "socks5srv")
    run = """if True:
        import runpy, sys
        sys.argv[1:] = ["--self-test"]
        try:
            runpy.run_module("vendor.socks5srv", run_name="__main__", alter_sys=True)
        finally:
            print([name for name in sys.modules if name.startswith("socks5srv")])
    """
    assert python("-c", run, cwd=tmp_path).endswith("\n[]\n"), "it went back to the one that is installed"
    assert python("-m", "vendor.socks5srv", "--version", cwd=tmp_path).strip().endswith(socks5srv.__version__)


def test_so_does_what_is_there_for_tests(tmp_path):
    copy(tmp_path / "vendor" / "socks5srv")
    run = "from vendor.socks5srv.testing import start, faults, targets; start().stop(); import sys; print('socks5srv' in sys.modules)"
    assert python("-c", run, cwd=tmp_path) == "False\n"


PAGE = "import pkgutil, {0}.service.status as s; print(sorted(len(pkgutil.get_data(s.__package__, name)) > 99 for name, _ in s.FILES.values()))"


def test_the_files_of_the_status_page_go_with_it(tmp_path):
    copy(tmp_path / "vendor" / "socks5srv")
    assert python("-c", PAGE.format("vendor.socks5srv"), cwd=tmp_path) == f"{[True] * 4}\n"
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", str(tmp_path / "vendor"))
    assert python("-c", PAGE.format("socks5srv"), cwd=tmp_path / "vendor" / "socks5srv" / "service", path=archive) == f"{[True] * 4}\n"


def test_the_package_works_out_of_a_zip_file(tmp_path):
    """setup.cfg says so."""
    copy(tmp_path / "tree" / "socks5srv")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", str(tmp_path / "tree"))
    assert python("-m", "socks5srv", "--version", cwd=tmp_path, path=archive).strip().endswith(socks5srv.__version__)
    assert archive in python("-c", "import socks5srv.server as s; print(s.__file__)", cwd=tmp_path, path=archive)
