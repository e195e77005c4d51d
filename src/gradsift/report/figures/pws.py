"""The PWS of every method and alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.report.figures import style
from gradsift.report.figures.groups import MOST_ROWS
from gradsift.report.figures.style import Style, report_figure
from gradsift.report.material import Material
from gradsift.report.paper_tables import Column, cells_of
from gradsift.report.run_tables import Row

_MOST_PANELS = 4
_ENDS = ("pws_low", "pws_high")  # keys of a row for the ends of the interval; the values may be None


@report_figure("PWS of every method")
def pws(material: Material) -> Figure:
    """Each mark is a PWS with its interval over items and, if there are several, seeds. A mark right of the dashed line
    means that the model is better than the model tuned on all rows. If an interval contains the line, the two models
    are not distinguishable. With many intervals, some miss the line by chance. Shows at most four combinations of
    dataset, target and benchmark; the table has all of them."""
    cells = cells_of(material)
    places = list(dict.fromkeys(place for place, _ in cells))[:_MOST_PANELS]
    methods = list(dict.fromkeys(method for _, (_, method) in cells))[:MOST_ROWS]
    alphas = sorted({alpha for _, (alpha, _) in cells})
    columns, height = 1 if len(places) < 3 else 2, (0.12 + 0.16 * len(alphas)) * len(methods)
    rows = -(-len(places) // columns)
    size: Style = {"width": 2.6 + 2.2 * columns, "height": max(2.2, 1.2 + rows * height)}
    figure, axes = style.panels(columns, rows, **size)
    for panel in axes[len(places) :]:
        panel.set_visible(False)
    axes = axes[: len(places)]
    for panel, place in zip(axes, places, strict=True):
        _draw_place(panel, {column: row for (where, column), row in cells.items() if where == place}, methods, alphas)
        panel.set_title(" / ".join(place), fontsize=8.5)
    for number, panel in enumerate(axes):
        if number % columns:
            panel.set_yticklabels([])
    return figure


def _draw_place(axes: Axes, cells: Mapping[Column, Row], methods: Sequence[str], alphas: Sequence[float]) -> None:
    """Draw the PWS of one dataset, target and benchmark, with the alphas of a method one below the other."""
    for number, (alpha, look) in enumerate(zip(alphas, style.looks_of(map(str, alphas)).values(), strict=True)):
        shift = (number - (len(alphas) - 1) / 2) * 0.7 / max(1, len(alphas))
        rows = {place + shift: cells[alpha, m] for place, m in enumerate(methods) if (alpha, m) in cells}
        values = [row["pws"] for row in rows.values()]
        low, high = ([row["pws"] if row[end] is None else row[end] for row in rows.values()] for end in _ENDS)
        ends = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)
        options: Style = {"color": look.colour, "marker": look.marker, "label": f"alpha {alpha:g}"}
        axes.errorbar(values, list(rows), xerr=ends, ls="none", ms=5, capsize=2, **options)
    axes.axvline(1, color=style.INK, **style.DASHED)
    style.name_rows(axes, methods)
    axes.set_xlabel("PWS (1: as good as all rows)")
