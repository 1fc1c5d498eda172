"""
Real clients, struck by each of the faults: what they do is what the table says.

A client of another version than the table's, or on another Python, may put it in other words.
"""

from __future__ import annotations

import gc
from typing import Dict, Tuple

import pytest

from socks5srv.testing import faults

from ..clients.harness import lack
from . import clients
from .clients import CLIENTS, FAULTS, Client, kind, outcome, python_version, read_table, table_s_python

COLUMNS = {name.partition(" ")[0]: (name.partition(" ")[2], column) for name, column in read_table().items()}
TRIES = 3       # a busy computer cuts the octets in other places


# Some of them leave their sockets to the garbage collector when things go wrong.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_does_what_the_table_says(client: Client) -> None:
    if client.version is None:
        lack(f"{client.name} is not installed")
    version, column = COLUMNS[client.name]
    exactly = version == client.version and table_s_python() == python_version()
    wrong: Dict[str, Tuple[str, str]] = {}
    for fault in FAULTS:
        expected = column[repr(fault)]
        word_by_word = exactly and "Reset" not in repr(fault)       # what a reset overtakes is a matter of luck
        for _ in range(TRIES):
            found = outcome(client, fault)
            if found == expected if word_by_word else kind(found) == kind(expected):
                break
        else:
            wrong[repr(fault)] = (found, expected)
    gc.collect()
    assert wrong == {}


def test_the_table_has_a_row_for_every_fault() -> None:
    for _version, column in COLUMNS.values():
        assert list(column) == list(map(repr, FAULTS))
    assert list(COLUMNS) == [client.name for client in CLIENTS]


def test_every_kind_of_fault_is_in_the_table() -> None:
    known = [getattr(faults, name) for name in faults.__all__]
    kinds = {each.__name__ for each in known if isinstance(each, type) and issubclass(each, faults.Fault)}
    assert kinds - {"Fault"} == {type(fault).__name__ for fault in FAULTS}


def test_the_table_is_written_as_it_is_read() -> None:
    assert clients.table(read_table(), table_s_python()) == clients.TABLE.read_text(encoding="utf-8")
