"""One look for all figures: colours that colour-blind readers can tell apart, a marker and a hatch beside each.

Everything neutral is drawn in one of INK, FAINT, RULE and PAPER, and nothing else is: a page may replace these four in
an SVG to suit a dark background. Text inside coloured cells is ON_LIGHT or ON_DARK, which stay as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

INK = "#1d1e21"  # text and lines
FAINT = "#6c6e75"  # secondary text, ticks
RULE = "#d9dade"  # grid and frames
PAPER = "#fdfdfc"  # background
ON_LIGHT, ON_DARK = "#000000", "#ffffff"

# Okabe and Ito's palette without its yellow, which is too light for lines, and its black, which is INK
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#6a51a3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# lines alone: a dot in a hatch is a circle for each in an SVG
HATCHES = ("", "//", "\\\\", "xx", "--", "||", "++", "/")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
SEQUENTIAL = "cividis"  # made for colour-blind readers
DIVERGING = LinearSegmentedColormap.from_list("diverging", [COLOURS[1], "#f4f2ee", COLOURS[0]])  # around a middle
NEUTRAL = "#a9adbb"  # a fill beside colours: all rows, ties, what was reused; seen on white and on black

_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "figure.dpi": 100,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "patch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradsift",
}
Format = Literal["png", "svg"]
Look = dict[str, Any]  # keywords of an artist


def styled() -> Any:
    """A context in which figures are made and drawn; nothing outside it is changed."""
    return rc_context(_SETTINGS)


def panels(columns: int = 1, rows: int = 1, *, width: float = 7.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [axis for row in axes for axis in row]


class Looks:
    """A colour, a marker, a dash and a hatch for each name, by the order of the names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._place = {name: place for place, name in enumerate(dict.fromkeys(names))}

    def colour(self, name: str) -> str:
        return COLOURS[self._place[name] % len(COLOURS)]

    def marker(self, name: str) -> str:
        return MARKERS[self._place[name] % len(MARKERS)]

    def hatch(self, name: str) -> str:
        return HATCHES[self._place[name] % len(HATCHES)]

    def dash(self, name: str) -> Any:
        return DASHES[self._place[name] % len(DASHES)]


def legend(figure: Figure, *axes: Axes) -> None:
    """The legend of all `axes` below the figure, where it covers nothing; in as many columns as fit."""
    found: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        width = 0.5 + 0.085 * max(map(len, found))  # inches that a column takes
        columns = max(1, min(len(found), int(figure.get_figwidth() / width)))
        figure.legend(list(found.values()), list(found), loc="outside lower left", ncols=columns)


def plain_log(axis: Axis, numbers: int = 6) -> None:
    """Plain numbers on a logarithmic axis that spans few decades; powers of ten elsewhere."""
    low, high = axis.get_view_interval()
    if high / low < 1000:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=numbers))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def cells(axes: Axes, shades: np.ndarray, texts: Sequence[Sequence[str]], *, diverging: bool = False) -> None:
    """A coloured field (rows, columns) of shades from 0 to 1, and a text in each cell; NaN stays empty."""
    axes.imshow(shades, cmap=DIVERGING if diverging else SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*shades.shape):
        shade = shades[row, column]
        is_dark = abs(shade - 0.5) > 0.3 if diverging else shade < 0.55
        if np.isfinite(shade):
            colour = ON_DARK if is_dark else ON_LIGHT
            axes.text(column, row, texts[row][column], ha="center", va="center", color=colour)
    axes.grid(False)


def bytes_of(figure: Figure, form: Format) -> bytes:
    """The figure as a file, the same bytes each time: PNG on paper, SVG with a transparent background."""
    stream = io.BytesIO()
    with styled():
        if (layout := figure.get_layout_engine()) is not None:  # once for all formats, which otherwise differ by a hair
            layout.execute(figure)
            figure.set_layout_engine("none")
        if form == "svg":
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(stream, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    return stream.getvalue()
