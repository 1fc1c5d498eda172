"""
Results as plain JSON: {server: {column: {key: number}}}.

The keys are those of measures.py.  Beside the numbers a column may have ``"failures"``, a
number as well, and ``"note"``, words about it.  A number that is not known is left out, or null.
Any generator of load may write this.
"""

from __future__ import annotations

import json
from typing import Any, Dict

from .measures import COLUMNS, FAILURES, NOTE

Results = Dict[str, Dict[str, Dict[str, Any]]]


class BadResults(Exception):
    """Why these are none, in a sentence."""


def load(path: str) -> Results:
    """Read a file; BadResults if it cannot be used."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except OSError as error:
        raise BadResults(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadResults(f"{path} is no JSON: {error}") from None
    check(found, path)
    return {server: {column: known(numbers) for column, numbers in columns.items()} for server, columns in found.items()}


def known(numbers: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in numbers.items() if value is not None}


def check(found: Any, path: str) -> None:
    """Whether it has the right shape and known keys."""
    if not isinstance(found, dict) or not all(isinstance(columns, dict) for columns in found.values()) or not found:
        raise BadResults(f"{path} is not of the form {{server: {{column: {{key: number}}}}}}")
    for server, columns in found.items():
        for column, numbers in columns.items():
            if column not in COLUMNS or not isinstance(numbers, dict):
                raise BadResults(f"{path}: {server} has a column {column!r}; there are {', '.join(COLUMNS)}")
            for key, value in numbers.items():
                check_number(column, key, value, f"{path}: {server}, {column}")


def check_number(column: str, key: str, value: Any, where: str) -> None:
    if key == NOTE and isinstance(value, str):
        return
    if key != FAILURES:
        try:
            COLUMNS[column].describe(key)
        except KeyError:
            raise BadResults(f"{where}: there is no key {key!r}; there are {', '.join(COLUMNS[column].all_keys())}") from None
    if isinstance(value, bool) or not (value is None or isinstance(value, (int, float))):
        raise BadResults(f"{where}: {key} is {value!r}, and should be a number")


def save(results: Results, path: str) -> None:
    """Write a file, the numbers with the few digits that they are good for."""
    short = {server: {column: {key: rounded(value) for key, value in numbers.items()} for column, numbers in columns.items()} for server, columns in results.items()}
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(short, stream, indent=1)
        stream.write("\n")


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
