"""
Where the package keeps more than one thing: attributes and names that hold a container, found in the source.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import socks5srv

PACKAGE = Path(socks5srv.__file__).parent

KINDS = {
    "dict", "list", "set", "deque", "Counter", "OrderedDict", "defaultdict", "bytearray", "SimpleQueue", "Queue",
    "Dict", "List", "Set", "Deque", "CounterType", "Mapping", "MutableMapping",
}
CACHES = {"lru_cache", "cache"}


def containers() -> Iterator[str]:
    """``file.py:Class.attribute``, ``file.py:NAME`` and ``file.py:cached_function``, for each of them."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in sorted(set(found_in(tree.body, ""))):
            yield f"{path.relative_to(PACKAGE).as_posix()}:{name}"


def found_in(body: List[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from found_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any(name in CACHES for decorator in node.decorator_list for name in names_in(decorator)):
                yield prefix + node.name
            if prefix:
                yield from (prefix + name for name in attributes_set_in(node))
        else:
            yield from (prefix + target.id for target, holds in assignments(node) if isinstance(target, ast.Name) and holds)


def attributes_set_in(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        for target, holds in assignments(node):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self" and holds:
                yield target.attr


def assignments(node: ast.AST) -> Iterator[Tuple[ast.expr, bool]]:
    """What is assigned to, and whether that is a container."""
    if isinstance(node, ast.AnnAssign):
        yield node.target, outermost(node.annotation) in KINDS or is_container(node.value)
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, map(is_container, node.value.elts))
            else:
                yield target, is_container(node.value)
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and not isinstance(node.value, ast.Constant):
        yield node.target, isinstance(node.target, ast.Attribute) and node.target.attr in BUFFERS


BUFFERS = {"buffer", "heard", "outgoing", "incoming"}       # octets that are added to; += on other attributes counts


def is_container(value: Optional[ast.AST]) -> bool:
    if isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)):
        return True
    return isinstance(value, ast.Call) and outermost(value.func) in KINDS


def outermost(node: ast.AST) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.partition("[")[0].rpartition(".")[2]
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names_in(node: ast.AST) -> Iterator[str]:
    return (each.id if isinstance(each, ast.Name) else each.attr for each in ast.walk(node) if isinstance(each, (ast.Name, ast.Attribute)))


# --- calls that open a descriptor ---

OPENING = {
    "socket", "socketpair", "accept", "create_connection", "create_server", "pipe", "pipe2", "open", "epoll", "DefaultSelector", "dup", "memfd_create",
    "TemporaryFile", "mkstemp", "Popen", "FileIO", "FileHandler", "WatchedFileHandler", "getaddrinfo",
}


def openings() -> Iterator[str]:
    """``file.py:Class.function`` for each that calls, or is built on, something that opens a descriptor."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in openings_in(ast.parse(path.read_text(encoding="utf-8")), ""):
            yield f"{path.relative_to(PACKAGE).as_posix()}:{name}"


def openings_in(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            name = f"{prefix}.{child.name}" if prefix else child.name
            if isinstance(child, ast.ClassDef) and any(outermost(base) in OPENING - {"socket"} for base in child.bases):
                yield name
            yield from openings_in(child, name)
        else:
            if isinstance(child, ast.Call) and outermost(child.func) in OPENING:
                yield prefix
            yield from openings_in(child, prefix)
