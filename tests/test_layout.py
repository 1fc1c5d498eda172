"""The rooms of the package: who may import whom, and that it can be carried elsewhere as it is."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import socks5srv

PACKAGE = Path(socks5srv.__file__).resolve().parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each module of the core imports of the others.
CORE = {
    "names": set(), "protocol": {"names"}, "session": {"protocol"}, "waker": set(), "descriptors": {"protocol"},
    "users": {"descriptors"}, "rules": {"names", "protocol"}, "proxyprotocol": {"names", "protocol", "descriptors"},
    "foreign": {"protocol", "proxyprotocol"}, "listener": {"protocol"}, "ratelimit": {"listener"},
    "observer": {"protocol", "session", "rules"}, "registry": {"session", "waker", "descriptors", "users"},
    "advertise": {"protocol", "rules"},
    "relay": {"protocol", "session", "waker", "descriptors"}, "outbound": {"names", "protocol", "descriptors", "observer", "relay", "advertise"},
    "locality": {"protocol", "outbound"},
    "policy": {"protocol", "users", "rules", "listener", "locality"},
    "resolver": {"names", "protocol", "waker", "descriptors", "relay", "outbound"},
    "trains": {"protocol"},
    "datagrams": {"protocol", "session", "rules", "observer", "relay", "advertise", "outbound", "resolver", "trains"},
    "handler": {
        "protocol", "session", "descriptors", "users", "rules", "proxyprotocol", "foreign", "listener", "ratelimit", "observer", "registry", "relay", "outbound", "policy",
        "resolver", "datagrams",
    },
    "server": {
        "protocol", "session", "waker", "descriptors", "users", "rules", "proxyprotocol", "listener", "ratelimit", "observer", "registry", "relay", "outbound",
        "policy", "handler",
    },
}
# What stands beside and above it: each may import the core, and imports this of the others.
ABOVE = {
    "gssapi": set(), "client": {"gssapi"}, "check": {"gssapi", "client"}, "upstream": {"gssapi", "client"}, "explain": {"gssapi"}, "capture": set(), "monitor": {"explain"},
    "service": {"gssapi", "client", "upstream", "explain", "capture", "monitor"}, "workers": {"monitor", "service"},
    "cli": {"gssapi", "client", "check", "explain", "monitor", "service", "workers"}, "testing": {"gssapi", "upstream"},
}
MAY_IMPORT = {**CORE, **{room: {*CORE, *others} for room, others in ABOVE.items()}}
FRONT = {"__init__", "__main__"}
PLUGINS = {"pytest_plugin": {"pytest"}, "prometheus": {"prometheus_client"}, "context": {"gssapi"}}      # what is imported only where that is there
MADE_IN = {("proxy", "in_front_of"), ("tracer", "explained")}      # functions in which a class is made; the second goes with the next release
A_PROGRAMS_BUSINESS = {"argparse", "signal", "getpass", "sys", "subprocess", "atexit", "json"}

modules = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


@lru_cache(maxsize=None)
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes(path, kind):
    return [node for node in ast.walk(tree(path)) if isinstance(node, kind)]


def calls(path):
    """The calls in it, each with the name of the function or method."""
    for node in nodes(path, ast.Call):
        yield getattr(node.func, "id", None) or getattr(node.func, "attr", None), node


@lru_cache(maxsize=None)
def imported(path):
    """The modules that a module imports, wherever in it and for whatever: absolute as they are, our own as ``room`` or ``room.module``."""
    return list(found_imports(path))


def found_imports(path):
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                parts = [*base, alias.name]
                while parts and not is_module(parts):
                    parts.pop()
                yield "." + ".".join(parts)


def is_module(parts):
    return PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts[:-1], f"{parts[-1]}.py").exists()


def ours(path):
    """Those of our own, without the package itself (for its version)."""
    return {name[1:] for name in imported(path) if name.startswith(".")} - {""}


def name_of(path):
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def room_of(name):
    return name.partition(".")[0]


def others(path):
    return {room_of(name) for name in imported(path) if not name.startswith(".")}


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
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == {*MAY_IMPORT, *FRONT}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_the_table_says(room):
    """docs/architecture.rst has the same as a picture: tests/docs/test_architecture.py."""
    imports = {room_of(name) for path in MODULES if room_of(name_of(path)) == room for name in ours(path)}
    assert (imports if room in CORE else imports - {room, *CORE}) == {**CORE, **ABOVE}[room]


def test_no_module_imports_itself_by_any_way():
    """Nor for type hints, or within a function."""
    left = {name_of(path): ours(path) - {name_of(path)} for path in MODULES}
    while left:
        free = {name for name, imports in left.items() if not imports & set(left)}
        assert free, f"these import each other, or one that does: {sorted(left)}"
        left = {name: imports for name, imports in left.items() if name not in free}


@modules
def test_no_class_is_made_at_run_time(path):
    """Nor is one changed.  (Faults stand in front of a handler that the test brings along, which takes a class of both.)"""
    assert not [f"line {node.lineno}" for called, node in calls(path) if called == "type" and len(node.args) > 1]
    for node in nodes(path, ast.Attribute):
        assert node.attr != "__class__" or isinstance(node.ctx, ast.Load), f"line {node.lineno}"
    for node in nodes(path, ast.FunctionDef):
        if (path.stem, node.name) not in MADE_IN:
            assert not any(isinstance(each, ast.ClassDef) for each in ast.walk(node)), f"{node.name}()"


def classes_of_the_handler(*words):
    from socks5srv.cli.options import parse
    from socks5srv.service.build import handler_class

    packages = [each.__module__.partition(".")[0] for each in handler_class(parse(words)).__mro__]
    return packages.count("socks5srv")


def test_with_every_option_on_a_handler_has_few_classes_of_ours():
    every = ("--status", "0", "--explain", "--pcap", os.devnull, "--upstream", "socks5h://127.0.0.1:1", "0")
    assert classes_of_the_handler("0") == 1
    assert classes_of_the_handler(*every) == 2      # and a user's own
    pytest.importorskip("gssapi")
    assert classes_of_the_handler("--gssapi", *every) == 4      # these two, Kerberos, and the one that is all of them


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
    path = PACKAGE / f"{module}.py"
    assert not others(path) & A_PROGRAMS_BUSINESS
    assert not {called for called, _node in calls(path)} & {"print", "basicConfig"}


@modules
def test_text_files_are_read_with_or_without_a_byte_order_mark(path):
    for called, node in calls(path):
        if called == "open" and isinstance(node.func, ast.Name):
            mode = node.args[1].value if len(node.args) > 1 else "r"
            if "r" in mode and "b" not in mode:
                encodings = [word.value.value for word in node.keywords if word.arg == "encoding"]
                assert encodings == ["utf-8-sig"], f"line {node.lineno}"


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


DOCUMENTED = {
    "socks5srv.check": ["main"], "socks5srv.client": ["bind", "connect", "udp_associate", "Proxy", "Conversation"],
    "socks5srv.explain": ["table", "Exhibit", "broken", "exhibit", "exhibits", "readings"],
    "socks5srv.explain.tracer": ["Tracer"], "socks5srv.observer": ["Observer"], "socks5srv.outbound": ["Route", "ClientGone"],
    "socks5srv.protocol": ["Address", "Credentials", "CredentialsReply", "Datagram", "Greeting", "MethodSelection", "Reply", "Request"],
    "socks5srv.rules": ["Rule", "Rules", "BadRule"], "socks5srv.testing": ["start", "faults", "targets"],
    "socks5srv.testing.faults": ["BoundTo", "CloseAfter", "Delay", "Raw", "ReplyWith", "ResetAfter", "SelectMethod", "Truncate"],
    "socks5srv.testing.targets": ["DnsServer", "EchoServer", "FtpServer", "WebServer"], "socks5srv.upstream": ["UpstreamHandler"],
    "socks5srv.users": ["Users", "UsersFile", "hash_password", "verify"],
    "socks5srv.service.explaining": ["explained"],      # until the next release
}


@pytest.mark.parametrize("module", DOCUMENTED)
def test_what_is_documented_can_be_imported_from_where_it_is_documented(module):
    for name in DOCUMENTED[module]:
        assert f"{getattr(importlib.import_module(module), name)}"


def test_every_import_in_the_manual_works():
    paths = [*PACKAGE.parent.glob("*.rst"), *PACKAGE.parent.glob("examples/*"), *PACKAGE.rglob("*.rst")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
    lines = set(re.findall(r"^ *((?:from socks5srv\S* import|import socks5srv).*[^(\s]) *$", text, re.MULTILINE))
    assert len(lines) > 10
    for line in lines:
        if ".gssapi." in line and importlib.util.find_spec("gssapi") is None:
            continue            # an extra, which in CI is there
        exec(line.partition("#")[0], {})


def test_type_checkers_see_the_same_names():
    [block] = [node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == socks5srv.HOMES
    assert (PACKAGE / "py.typed").exists()


# --- elsewhere ---

@pytest.fixture
def vendor(tmp_path):
    """A folder with the package in it, and nothing else."""
    shutil.copytree(str(PACKAGE), str(tmp_path / "vendor" / "socks5srv"), ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "vendor"


@pytest.fixture
def archive(vendor, tmp_path):
    return shutil.make_archive(str(tmp_path / "archive"), "zip", str(vendor))


def test_the_folder_works_as_a_part_of_another_tree(vendor):
    run = """if True:
        import runpy, sys
        sys.argv[1:] = ["--self-test"]
        try:
            runpy.run_module("vendor.socks5srv", run_name="__main__", alter_sys=True)
        finally:
            print([name for name in sys.modules if name.startswith("socks5srv")])
    """
    assert python("-c", run, cwd=vendor.parent).endswith("\n[]\n"), "it went back to the one that is installed"
    assert python("-m", "vendor.socks5srv", "--version", cwd=vendor.parent).strip().endswith(socks5srv.__version__)


def test_so_does_what_is_there_for_tests(vendor):
    run = "from vendor.socks5srv.testing import start, faults, targets; start().stop(); import sys; print('socks5srv' in sys.modules)"
    assert python("-c", run, cwd=vendor.parent) == "False\n"


PAGE = "import pkgutil, {0}.monitor.http as s; print(sorted(len(pkgutil.get_data(s.__package__, name)) > 99 for name, _ in s.FILES.values()))"


def test_the_files_of_the_status_page_go_with_it(vendor, archive):
    assert python("-c", PAGE.format("vendor.socks5srv"), cwd=vendor.parent) == f"{[True] * 4}\n"
    assert python("-c", PAGE.format("socks5srv"), cwd=vendor / "socks5srv" / "service", path=archive) == f"{[True] * 4}\n"


def test_the_package_works_out_of_a_zip_file(archive, tmp_path):
    """setup.cfg says so."""
    assert python("-m", "socks5srv", "--version", cwd=tmp_path, path=archive).strip().endswith(socks5srv.__version__)
    assert archive in python("-c", "import socks5srv.server as s; print(s.__file__)", cwd=tmp_path, path=archive)
