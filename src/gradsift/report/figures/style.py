"""The declaration of a figure, the colours and markers of all figures, and functions for parts that several figures
share.

Only neutral elements (text, axes, grids, background) have the colours INK, FAINT, RULE and PAPER. The report's HTML
page replaces these four colours in an SVG to suit a dark background. Text inside coloured cells is ON_LIGHT or ON_DARK,
which the page does not replace.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from gradsift.report.material import Material
from gradsift.report.table import Table, table_of_records

Style = dict[str, Any]  # keyword arguments of matplotlib
Records = Sequence[Mapping[str, Any]]

FORMATS = ("png", "svg")  # of the figures' files

INK = "#1d1e21"  # text and lines
FAINT = "#6c6e75"  # secondary text, ticks
RULE = "#d9dade"  # grid and frames
PAPER = "#fdfdfc"  # background
ON_LIGHT, ON_DARK = "#000000", "#ffffff"

# six colours of Okabe and Ito's palette (its yellow is too light for lines, its black is like INK) and two more
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#6a51a3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "\\\\", "xx", "--", "||", "++", "/")  # no dots, as an SVG has a circle for each dot
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
SEQUENTIAL = "cividis"  # made for colour-blind readers
DIVERGING = LinearSegmentedColormap.from_list("diverging", [COLOURS[1], "#f4f2ee", COLOURS[0]])
NEUTRAL = "#a9adbb"  # fill for all rows, ties and reused work; visible on white and on black

BAR: Style = {"edgecolor": INK, "height": 0.72}  # style of every horizontal bar
DASHED: Style = {"linewidth": 1, "linestyle": (0, (4, 2))}  # lines to compare with
DOTTED: Style = {"linewidth": 1, "linestyle": (0, (1, 1.5))}

_SETTINGS: Style = {
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0),
    **dict.fromkeys(("grid.linewidth", "hatch.linewidth", "patch.linewidth"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradsift",
}


styled = partial(rc_context, _SETTINGS)  # styled() is a context in which to make and draw figures


def column(records: Records, key: str) -> np.ndarray:
    """Return the value of `key` in each record, as a float64 array with NaN for None."""
    return np.array([record[key] for record in records], float)


@dataclass(frozen=True)
class Entry:
    """A figure of the report. Calling an entry with the material draws the figure, or raises `Missing` with the reason
    why the figure cannot be drawn.

    The figure's files have the name of the drawing function, and the caption is the function's docstring.
    """

    section: str  # id of the page's section
    title: str
    records: Callable[[Material], Records] | None  # returns the values that the figure shows, for a CSV file
    draw: Callable[[Material], Figure]

    @property
    def name(self) -> str:
        return self.draw.__name__

    @property
    def caption(self) -> str:
        return " ".join((self.draw.__doc__ or "").split())

    def __call__(self, material: Material) -> Figure:
        with styled():
            figure = self.draw(material)
            add_legend(figure)
        return figure

    def table(self, material: Material) -> Table:
        """Return the table of the values that the figure shows."""
        records = self.records(material) if self.records is not None else []
        return table_of_records(self.title, records, self.caption)


def report_figure(section: str, title: str, records: Callable[[Material], Records] | None = None) -> partial[Entry]:
    """Return a decorator that makes a drawing function a figure of the report."""
    return partial(Entry, section, title, records)


def panels(columns: int = 1, rows: int = 1, *, width: float = 7.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` x `height` inches and the axes of its panels, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@dataclass(frozen=True)
class Look:
    """How a method, a member or a quality label is drawn in a figure."""

    colour: str
    marker: str
    dash: Any
    hatch: str


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """Return a look for each name; a look depends only on the name's position in the sequence."""
    looks = {}
    for place, name in enumerate(dict.fromkeys(names)):
        # shifted by one after each round of the colours, so that a colour recurs with another marker
        other = place + place // len(COLOURS)
        marker, dash, hatch = (group[other % len(group)] for group in (MARKERS, DASHES, HATCHES))
        looks[name] = Look(COLOURS[place % len(COLOURS)], marker, dash, hatch)
    return looks


def add_legend(figure: Figure) -> None:
    """Add one legend below the figure for all panels without their own legend; it has as many columns as fit.

    A legend of more than two lines makes the figure higher, so that the panels do not shrink.
    """
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        if panel.get_legend() is None:
            handles, labels = panel.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
    if entries:
        width = 0.5 + 0.085 * max(map(len, entries))  # inches of a column
        columns = max(1, min(len(entries), int(figure.get_figwidth() / width)))
        lines = -(-len(entries) // columns)
        figure.set_figheight(figure.get_figheight() + 0.17 * max(0, lines - 2))  # two lines fit anyway
        figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of horizontal bars or points, with the first name on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def in_percent(*axes: Axis) -> None:
    """Label axes of shares (0 to 1) in percent; the negative values of bars to the left get no minus sign."""
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")


def plain_log(*axes: Axis) -> None:
    """Label logarithmic axes with plain numbers if they span less than three decades, else with powers of ten."""
    for axis in axes:
        low, high = axis.get_view_interval()
        if high / low < 1000:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())


def cells(
    axes: Axes,
    shades: np.ndarray,
    texts: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    rotation: float = 0,
    diverging: bool = False,
) -> None:
    """Draw a matrix of coloured cells, with a text in each cell and the names of the rows and columns.

    Args:
        shades: (rows, columns) values from 0 to 1; a NaN cell stays empty.
        rotation: angle of the columns' names, in degrees.
    """
    axes.imshow(shades, cmap=DIVERGING if diverging else SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*shades.shape):
        shade = shades[row, column]
        is_dark = abs(shade - 0.5) > 0.3 if diverging else shade < 0.55
        if np.isfinite(shade):
            colour = ON_DARK if is_dark else ON_LIGHT
            axes.text(column, row, texts[row][column], ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=rotation, ha="right" if rotation else "center")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)


def bytes_of(figure: Figure, form: str) -> bytes:
    """Return the content of the figure's file in the format `form`, with equal bytes at each call.

    The background of a PNG is PAPER; the background of an SVG is transparent.
    """
    stream = io.BytesIO()
    with styled():
        if (layout := figure.get_layout_engine()) is not None:  # once, so that all formats have the same layout
            layout.execute(figure)
            figure.set_layout_engine("none")
        if form == "svg":
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(stream, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    return stream.getvalue()
