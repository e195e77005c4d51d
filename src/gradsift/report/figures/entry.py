"""The decorator that makes a drawing function a figure of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from gradsift.report.figures.style import styled
from gradsift.report.material import Material
from gradsift.report.table import Table, table_of_records

Records = Callable[[Material], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """A figure of the report. Call it with the material to draw it; it raises `Missing` if the files do not suffice.

    The name of the drawing function is that of the figure's files, and its docstring is the caption.
    """

    title: str
    draw: Callable[[Material], Figure]
    records: Records | None = None  # returns the numbers behind the figure, for a CSV file

    @property
    def name(self) -> str:
        return self.draw.__name__

    @property
    def module(self) -> str:
        return self.draw.__module__.rpartition(".")[2]

    @property
    def caption(self) -> str:
        return " ".join((self.draw.__doc__ or "").split())

    def __call__(self, material: Material) -> Figure:
        with styled():
            return self.draw(material)

    def table(self, material: Material) -> Table:
        """Return the table of the numbers behind the figure."""
        assert self.records is not None  # noqa: S101 - the caller has looked
        return table_of_records(self.title, self.records(material), self.caption)


def report_figure(title: str, records: Records | None = None) -> Callable[[Callable[[Material], Figure]], Entry]:
    """Return a decorator that makes a drawing function an `Entry`."""
    return lambda draw: Entry(title, draw, records)
