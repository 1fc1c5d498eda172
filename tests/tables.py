"""What a table of --explain shows, read back into octets."""

from __future__ import annotations

import re
from typing import Any, List, Optional, Tuple

from socks5srv.explain import Explanation

HEX = re.compile(r"((?:(?:[0-9a-f]{2}|\.\.) )*(?:[0-9a-f]{2}|\.\.))(?: {2,}|$)")

ATOMIC = 4096       # octets that several processes can write to a pipe without mixing them up: POSIX asks for 512, Linux has these

Cells = List[Tuple[str, Optional[bytes], bool]]     # name, octets (None: secret), and whether that is all of them


def octets_of(text: str) -> Tuple[Optional[bytes], bool]:
    """What stands in a cell: all octets, or the first three and the last."""
    if text == "***":
        return None, True
    return bytes.fromhex(text.replace("..", "")), ".." not in text


def here(text: str) -> Cells:
    """The boxes of the picture, with what is here."""
    lines = text.split("\n")
    number = next(number for number, line in enumerate(lines) if line.startswith("here |"))
    names, sizes, octets = ([cell.strip() for cell in lines[i].split("|")[1:-1]] for i in (number - 3, number - 1, number))
    assert len(names) == len(sizes) == len(octets)
    return [(name, *octets_of(cell)) for name, cell in zip(names, octets)]


def beside(text: str) -> Cells:
    """The boxes one by one, with the octets beside their meaning; all of them, unless there are too many."""
    width = max(len(name) for name, _octets, _whole in here(text))
    found: Cells = []
    lines = text.split("\n")
    first = [number for number, line in enumerate(lines) if line.startswith("     +")][2] + 1
    for line in lines[first:]:
        if line.startswith(("  =", "  !")):
            break
        if line.startswith("     .. and"):
            found[-1] = (found[-1][0], found[-1][1], False)
            continue
        name, match = line[5:5 + width].strip(), HEX.match(line[7 + width:])
        octets, whole = octets_of(match.group(1)) if match else (b"", True)
        if not name:
            name, before, all_before = found.pop()
            octets, whole = (before or b"") + (octets or b""), all_before and whole
        found.append((name, octets, whole))
    return found


def check(explanation: Explanation) -> None:
    """The text says what the data say, in plain ASCII and 79 columns."""
    text, data = str(explanation), explanation.as_dict()
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert all(len(line) <= 79 and line == line.rstrip() for line in text.split("\n")), text
    assert len(text) < ATOMIC
    if not explanation.fields:
        return
    check_cells(data, here(text), secret=None)
    check_cells(data, beside(text), secret=b"")
    assert data["octets"] == "".join(row["octets"] or "" for row in data["fields"])
    for row in data["fields"]:
        said = "".join(meaning["octets"] for meaning in row["meanings"])
        assert said == (row["octets"] or ""), f"what {row['name']} means is not told for all of it"


def check_cells(data: Any, cells: Cells, secret: Optional[bytes]) -> None:
    assert [name for name, _octets, _whole in cells] == [row["name"] for row in data["fields"]]
    for (_name, octets, whole), row in zip(cells, data["fields"]):
        if row["octets"] is None:
            assert octets == secret
            continue
        assert octets is not None
        expected = bytes.fromhex(row["octets"])
        if whole and not row["left_out"]:
            assert octets == expected
        else:
            assert octets[:3] == expected[:3]
            assert row["left_out"] or len(expected) > len(octets)
