"""A table as text: what a page, Markdown and the terminal show, with the plain values for CSV beside it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class TextTable:
    """The first column names the rows; the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of cells to be shown in bold
    note: str = ""  # how to read it
    records: Sequence[Mapping[str, Any]] = field(default=())  # one a line of the CSV, plain values


def markdown(table: TextTable) -> str:
    """The table with its title above and its note below."""
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    rows = [[_bold(cell, (i, j) in table.best) for j, cell in enumerate(row)] for i, row in enumerate(table.rows)]
    lines = [f"**{table.title}**", "", *map(_line, (table.header, rule, *rows))]
    return "\n".join([*lines, "", table.note] if table.note else lines)


def _bold(cell: str, is_best: bool) -> str:
    return f"**{cell}**" if is_best else cell


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """CSV with a column for every key that any record has."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(map(plain_cell, columns))
        writer.writerows([plain_cell(record.get(column, "")) for column in columns] for record in records)


def plain_cell(value: Any) -> Any:
    """The value, with an apostrophe before a text that a spreadsheet would take for a formula; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
