"""Tables for the terminal (`console.print(table)`), for the HTML page, and for CSV, Markdown and LaTeX files."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet reads a cell that begins so as a formula
_WORD, _NUMBER = re.compile(r"[^\W\d_]|\("), re.compile(r"[+-]*\d")  # beginnings of cells
_ESCAPES = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # LaTeX reads a [ at the start of a row as an argument of the line break before it
    "]": "{]}",
}
_LATEX = str.maketrans(_ESCAPES)
_LONGEST_MARKDOWN = 200  # rows; longer tables are written as CSV alone


@dataclass(frozen=True)
class Table:
    """A table of formatted cells. The first column names the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells in bold
    note: str = ""  # text below the table
    records: Sequence[Mapping[str, Any]] = ()  # unformatted values, one mapping for each row of the CSV file

    @property
    def text_columns(self) -> set[int]:
        """Indices of the columns to align left: the first, and all columns that contain words and no numbers."""
        columns = enumerate(zip(*self.rows, strict=True))
        return {0} | {i for i, cells in columns if any(map(_WORD.match, cells)) and not any(map(_NUMBER.match, cells))}

    def __rich__(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        shown.caption, shown.caption_justify = self.note or None, "left"
        left = self.text_columns
        for i, name in enumerate(self.header):
            shown.add_column(name, justify="left" if i in left else "right", no_wrap=i == 0, overflow="fold")
        for row in self.rows:
            shown.add_row(*map(Text, row))  # a str would be parsed as markup, for example "[0.9, 1.1]"
        return shown

    def fitted(self, console: Console) -> tuple[Table, list[str]]:
        """Return the table cut to the console's width, and the headings of the columns that were cut off at the right.

        The first three columns are always kept.
        """
        from rich.measure import Measurement

        options = console.options.update(max_width=10_000)
        fitted, left_out = self, list[str]()
        while len(fitted.header) > 3 and Measurement.get(console, options, fitted).maximum > console.width:
            left_out.insert(0, fitted.header[-1])
            fitted = replace(fitted, header=fitted.header[:-1], rows=[row[:-1] for row in fitted.rows])
        return fitted, left_out

    def _cells(self, escaped: Callable[[str], str], bold: str) -> list[list[str]]:
        """Return the escaped cells; `bold` is a format with one `%s` for the cells of `best`."""
        return [
            [bold % escaped(cell) if (i, j) in self.best else escaped(cell) for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]

    def markdown(self) -> str:
        """Return the table as Markdown, with its title above and its note below."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        rows = self._cells(lambda text: text.replace("|", "\\|"), "**%s**")
        header = [name.replace("|", "\\|") for name in self.header]
        lines = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in (header, rule, *rows))]
        return "\n".join([*lines, "", self.note] if self.note else lines)

    def latex(self) -> str:
        """Return the table as LaTeX (package booktabs), with its title as the caption and its note below it."""
        left = self.text_columns
        rows = self._cells(lambda text: text.translate(_LATEX), r"\textbf{%s}")
        header = [[name.translate(_LATEX) for name in self.header]]
        if groups := groups_of(header[0]):
            above = [rf"\multicolumn{{{len(names)}}}{{c}}{{{title}}}" for title, names in groups]
            header = [["", *above], [header[0][0], *(name for _, names in groups for name in names)]]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{self.title.translate(_LATEX)}}}",
            rf"\begin{{tabular}}{{{''.join('l' if i in left else 'r' for i in range(len(self.header)))}}}",
            r"\toprule",
            *(" & ".join(row) + r" \\" for row in header),
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\smallskip{{\footnotesize {self.note.translate(_LATEX)}}}"] if self.note else []),
            r"\end{table}",
        ]
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> None:
        """Write `<name>.csv` and, if the table has at most `_LONGEST_MARKDOWN` rows, `<name>.md` and `<name>.tex`."""
        if len(self.rows) <= _LONGEST_MARKDOWN:
            (folder / f"{name}.tex").write_text(self.latex() + "\n", encoding="utf-8")
            (folder / f"{name}.md").write_text(self.markdown() + "\n", encoding="utf-8")
        write_records(folder / f"{name}.csv", self.records)


def table_of_records(title: str, records: Sequence[Mapping[str, Any]], note: str = "") -> Table:
    """Return a table with a row for each record and a column for each key; floats have four significant digits."""
    header = list(dict.fromkeys(key for record in records for key in record))
    rows = [[cell_text(record.get(key), 4) for key in header] for record in records]
    return Table(title, header, rows, note=note, records=records)


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as CSV, with a column for each key that any record has."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(map(plain_cell, columns))
        writer.writerows([plain_cell(record.get(column, "")) for column in columns] for record in records)


def plain_cell(value: Any) -> Any:
    """Return the value, with an apostrophe before a text that a spreadsheet would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def cell_text(value: Any, digits: int = 6) -> str:
    """Return the text of a cell: floats have `digits` significant digits, None and "" become "-"."""
    if value is None or value == "":
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def fixed(value: float | None, decimals: int = 3) -> str:
    """Return the number with `decimals` decimal places, or "-" for None."""
    return "-" if value is None else f"{value:.{decimals}f}"


def percent(share: float) -> str:
    """Return a share as a percentage, as in "2.5 %"."""
    return f"{100 * share:g} %"


def counted(number: int, name: str) -> str:
    """Return the number with its noun, such as "1 run" or "2 runs"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def groups_of(header: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Group the columns named `ALPHA: METHOD` by alpha; return each group's title and its methods.

    The first column belongs to no group. The list is empty if any other column has a name of another form, or if no two
    adjacent columns share an alpha.
    """
    pairs = [name.partition(": ") for name in header[1:]]
    groups: list[tuple[str, list[str]]] = []
    for alpha, _, name in pairs:
        if not groups or groups[-1][0] != f"alpha {alpha}":
            groups.append((f"alpha {alpha}", []))
        groups[-1][1].append(name)
    return groups if all(colon for _, colon, _ in pairs) and len(groups) < len(pairs) else []
