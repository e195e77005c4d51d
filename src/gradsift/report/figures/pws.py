"""What came out: PWS of every method and alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.report.figures.groups import MOST_ROWS
from gradsift.report.figures.style import INK, Look, Looks, legend, panels, styled
from gradsift.report.material import Material
from gradsift.report.paper_tables import Column, cells_of
from gradsift.report.tables import Row

_MOST_PANELS = 4


def pws(material: Material) -> Figure:
    """PWS with its interval, a panel for each dataset, target and benchmark; 1 is the full-data model."""
    cells = cells_of(material)
    places = list(dict.fromkeys(place for place, _ in cells))[:_MOST_PANELS]
    methods = list(dict.fromkeys(method for _, (_, method) in cells))[:MOST_ROWS]
    alphas = sorted({alpha for _, (alpha, _) in cells})
    with styled():
        height = 1.2 + (0.12 + 0.16 * len(alphas)) * len(methods)
        figure, axes = panels(len(places), width=3.4 + 2.6 * len(places), height=max(2.2, height))
        for panel, place in zip(axes, places, strict=True):
            _panel(panel, {column: row for (where, column), row in cells.items() if where == place}, methods, alphas)
            panel.set_title(" / ".join(place), fontsize=8.5)
        for panel in axes[1:]:
            panel.set_yticklabels([])
        legend(figure, axes[0])
    return figure


def _panel(axes: Axes, cells: Mapping[Column, Row], methods: Sequence[str], alphas: Sequence[float]) -> None:
    looks = Looks(f"{alpha:g}" for alpha in alphas)
    for number, alpha in enumerate(alphas):
        shift = (number - (len(alphas) - 1) / 2) * 0.7 / max(1, len(alphas))
        found = [(place, cells[alpha, method]) for place, method in enumerate(methods) if (alpha, method) in cells]
        values = [row["pws"] for _, row in found]
        ends = [
            [max(0.0, row["pws"] - (row["pws_low"] or row["pws"])) for _, row in found],
            [max(0.0, (row["pws_high"] or row["pws"]) - row["pws"]) for _, row in found],
        ]
        look: Look = {"color": looks.colour(f"{alpha:g}"), "marker": looks.marker(f"{alpha:g}")}
        rows = [place + shift for place, _ in found]
        axes.errorbar(values, rows, xerr=ends, ls="none", ms=5, capsize=2, label=f"alpha {alpha:g}", **look)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel("PWS (1: as good as all rows)")
    axes.grid(axis="y", visible=False)
