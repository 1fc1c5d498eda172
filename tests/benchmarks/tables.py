"""
Results as tables in reStructuredText, which can be read as they are.

A row for each server, a column for each number that is worth a look; all the others are in
the JSON file.  Three digits, since noise leaves no more.
"""

from __future__ import annotations

import textwrap
from typing import Any, Dict, Iterator, List, Optional, Tuple

from .measures import COLUMNS, FAILURES, NOTE, Column
from .results import Results

Cell = Tuple[str, ...]      # its lines

NARROW = 13                 # letters in a line of a heading


def tables(results: Results, reference: Optional[str] = None) -> str:
    """All of them; with a reference, rates also as multiples of its own."""
    return "\n\n\n".join(table for name in COLUMNS for table in column_tables(name, results, reference)) + "\n"


def column_tables(name: str, results: Results, reference: Optional[str]) -> Iterator[str]:
    """The tables of one column: one, or for growth one a quantity."""
    column = COLUMNS[name]
    measured = {server: columns[name] for server, columns in results.items() if name in columns}
    if not measured:
        return
    if column.shown:
        yield captioned(column.title, rows(column, [key for key in column.shown if anybody_has(key, measured)], measured, reference))
    else:
        for quantity, meaning in column.quantities.items():
            keys = sizes(quantity, measured)
            if keys:
                yield captioned(f"{column.title}: {meaning.title}, {meaning.unit}", rows(column, keys, measured, reference))
    notes = [f"- {server}: {words(numbers)}" for server, numbers in measured.items() if words(numbers)]
    if notes:
        yield "\n".join(notes)


def words(numbers: Dict[str, Any]) -> str:
    """What has to be said about a column: failures have to, whoever wrote the file."""
    failed = f"{numbers[FAILURES]} failed" if numbers.get(FAILURES) and not numbers.get(NOTE) else ""
    return str(numbers.get(NOTE, failed))


def anybody_has(key: str, measured: Dict[str, Dict[str, Any]]) -> bool:
    return any(key in numbers for numbers in measured.values())


def sizes(quantity: str, measured: Dict[str, Dict[str, Any]]) -> List[str]:
    """The keys of a quantity that anybody has, by the number in them."""
    keys = {key for numbers in measured.values() for key in numbers if key.startswith(quantity + "_")}
    return sorted(keys, key=lambda key: int(key.partition("_")[2]))


def rows(column: Column, keys: List[str], measured: Dict[str, Dict[str, Any]], reference: Optional[str]) -> List[List[Cell]]:
    """The cells of a table, headings first."""
    found = [[("server",), *(heading(column, key) for key in keys)]]
    base = measured.get(reference or "", {})
    for server, numbers in measured.items():
        found.append([(server,), *((cell(column, key, numbers, base),) for key in keys)])
    if column.shown and any(numbers.get(FAILURES) for numbers in measured.values()):
        found[0].append(("failed",))
        for row, numbers in zip(found[1:], measured.values()):
            row.append((str(numbers.get(FAILURES, 0)),))
    return found


def heading(column: Column, key: str) -> Cell:
    """Where the caption says what is counted, the situation is enough."""
    quantity, situation = column.describe(key)
    if not column.shown:
        return (situation.partition(" ")[0],)
    what = quantity.unit if quantity.title == "rate" else f"{quantity.title} {quantity.unit}"
    return (*textwrap.wrap(situation, NARROW), *textwrap.wrap(what, NARROW))


def cell(column: Column, key: str, numbers: Dict[str, Any], base: Dict[str, Any]) -> str:
    """The number, and how often it has that of the reference in it."""
    if key not in numbers:
        return "-"
    text = digits(numbers[key])
    quantity, _situation = column.describe(key)
    if quantity.title == "rate" and base.get(key) and base is not numbers:
        text += f" ({digits(numbers[key] / base[key])}x)"
    return text


def digits(value: float) -> str:
    """Three of them, with commas for the thousands."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def captioned(title: str, cells: List[List[Cell]]) -> str:
    """A simple table of reStructuredText, with its title."""
    return f"**{title}**\n\n{simple_table(cells)}"


def simple_table(cells: List[List[Cell]]) -> str:
    """Cells of several lines are wanted in the heading only; numbers stand at the right."""
    lines = [*unfolded(cells[0]), *([cell[0] for cell in row] for row in cells[1:])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(cells[0]))]
    rule = "  ".join("=" * width for width in widths)
    text = [aligned(line, widths) for line in lines]
    height = len(lines) - len(cells) + 1
    return "\n".join([rule, *text[:height], rule, *text[height:], rule])


def unfolded(row: List[Cell]) -> List[List[str]]:
    """
    A row of cells as lines; an empty first cell makes a line go on with the one above.

    The lines of a cell begin at the same place: what is indented would be a quotation.
    """
    blocks = [[line.ljust(max(map(len, cell))) for line in cell] for cell in row]
    return [[block[i] if i < len(block) else "" for block in blocks] for i in range(max(map(len, row)))]


def aligned(line: List[str], widths: List[int]) -> str:
    first, *others = zip(line, widths)
    return "  ".join([first[0].strip().ljust(first[1]), *(text.rjust(width) for text, width in others)]).rstrip()
