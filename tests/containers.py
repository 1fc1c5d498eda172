"""Where the package keeps more than one thing: attributes and names that hold a container, found in the source."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Set, Tuple

import socks5srv

PACKAGE = Path(socks5srv.__file__).parent
SOURCE: Dict[str, ast.Module] = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}

CONTAINERS = {
    "dict", "list", "set", "deque", "Counter", "OrderedDict", "defaultdict", "bytearray", "SimpleQueue", "Queue", "WeakKeyDictionary",
    "Dict", "List", "Set", "Deque", "CounterType", "Mapping", "MutableMapping",
}
CACHES = {"lru_cache", "cache"}


def outermost(node: ast.AST) -> str:
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.partition("[")[0].rpartition(".")[2]
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names_in(node: ast.AST) -> Iterator[str]:
    return (each.id if isinstance(each, ast.Name) else each.attr for each in ast.walk(node) if isinstance(each, (ast.Name, ast.Attribute)))


KINDS = CONTAINERS | {
    node.name for tree in SOURCE.values() for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and any(outermost(base) in CONTAINERS for base in node.bases)
}


def containers() -> Iterator[str]:
    """``file.py:Class.attribute``, ``file.py:NAME`` and ``file.py:cached_function``, for each of them."""
    return (f"{file}:{name}" for file, tree in SOURCE.items() for name in sorted(set(found_in(tree.body, ""))))


def found_in(body: List[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from found_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            if any(name in CACHES for decorator in node.decorator_list for name in names_in(decorator)):
                yield prefix + node.name
            if prefix:
                yield from (prefix + name for name in attributes_set_in(node))
        else:
            yield from (prefix + target.id for target in filled_in(node, set()) if isinstance(target, ast.Name))


def attributes_set_in(function: ast.FunctionDef) -> Iterator[str]:
    arguments = (*function.args.args, *function.args.kwonlyargs)
    given = {argument.arg for argument in arguments if argument.annotation is not None and can_hold(argument.annotation)}
    for target in (target for node in ast.walk(function) for target in filled_in(node, given)):
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            yield target.attr


def filled_in(node: ast.AST, given: Set[str]) -> Iterator[ast.expr]:
    """What a container is assigned to; `given` are names of some."""
    if isinstance(node, ast.AnnAssign) and (can_hold(node.annotation) or (node.value is not None and is_container(node.value, given))):
        yield node.target
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            pairs: Iterable[Tuple[ast.expr, ast.expr]] = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts)
            yield from (each for each, value in pairs if is_container(value, given))


def can_hold(annotation: ast.expr) -> bool:
    """Whether there is a container in it that is no argument of a function."""
    return outermost(annotation) != "Callable" and any(name in KINDS for name in names_in(annotation))


def is_container(value: ast.expr, given: Set[str]) -> bool:
    if isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)):
        return True
    if isinstance(value, ast.Constant):
        return value.value == b""           # to which octets will be added
    return value.id in given if isinstance(value, ast.Name) else isinstance(value, ast.Call) and outermost(value.func) in KINDS


# --- calls that open a descriptor ---

OPENING = {
    "socket", "socketpair", "accept", "create_connection", "create_server", "pipe", "pipe2", "open", "epoll", "DefaultSelector", "dup", "memfd_create",
    "TemporaryFile", "mkstemp", "Popen", "FileIO", "FileHandler", "WatchedFileHandler", "getaddrinfo",
    "Waker", "factory", "socket_factory", "listener", "udp", "udp_relay", "listening_socket",       # ours that do
}


def openings() -> Iterator[str]:
    """``file.py:Class.function`` for each that calls, or is built on, something that opens a descriptor."""
    return (f"{file}:{name}" for file, tree in SOURCE.items() for name in sorted(set(openings_in(tree, ""))))


def openings_in(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        place = prefix
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            place = f"{prefix}.{child.name}".lstrip(".")
            if isinstance(child, ast.ClassDef) and any(outermost(base) in OPENING - {"socket"} for base in child.bases):
                yield place
        elif isinstance(child, ast.Call) and outermost(child.func) in OPENING:
            yield place
        yield from openings_in(child, place)
