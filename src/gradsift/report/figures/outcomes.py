"""Figures of the PWS (Pairwise Winning Score) of each method, of wins, ties and losses, and of the judge's biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.report.figures import groups, style
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Material, Missing, Run
from gradsift.report.paper_tables import cells_of

_MOST_PANELS = 4
_OUTCOMES = {"win": style.COLOURS[0], "tie": style.NEUTRAL, "lose": style.COLOURS[1], "invalid": style.COLOURS[3]}


@report_figure("results", "PWS of every method")
def pws(material: Material) -> Figure:
    """Each mark is a PWS with its confidence interval over items and, if there are several seeds, over seeds. A mark
    right of the dashed line means that the model tuned on the selection is better than the model tuned on all rows. If
    an interval contains the dashed line, the data do not show which of the two models is better. Among many intervals,
    some miss the line by chance, even if the models are equally good. The figure shows at most four combinations of
    dataset, target and benchmark; the report's table of PWS has all of them."""
    cells = cells_of(material)
    places = list(dict.fromkeys(place for place, _ in cells))[:_MOST_PANELS]
    methods = list(dict.fromkeys(method for _, (_, method) in cells))[: groups.MOST_ROWS]
    alphas = sorted({alpha for _, (alpha, _) in cells})
    columns, height = 1 if len(places) < 3 else 2, (0.12 + 0.16 * len(alphas)) * len(methods)
    rows = -(-len(places) // columns)
    size: Style = {"width": 2.6 + 2.2 * columns, "height": max(2.2, 1.2 + rows * height)}
    figure, axes = style.panels(columns, rows, **size)
    for panel in axes[len(places) :]:
        panel.set_visible(False)
    axes = axes[: len(places)]
    marks = list(zip(alphas, style.looks_of(map(str, alphas)).values(), strict=True))
    for panel, place in zip(axes, places, strict=True):
        for number, (alpha, look) in enumerate(marks):  # in a method's row, the alphas are one below the other
            shift = (number - (len(alphas) - 1) / 2) * 0.7 / len(alphas)
            own = {i + shift: cells[place, (alpha, m)] for i, m in enumerate(methods) if (place, (alpha, m)) in cells}
            values, low, high = (style.column(list(own.values()), key) for key in ("pws", "pws_low", "pws_high"))
            ends = np.nan_to_num(np.maximum([values - low, high - values], 0))  # 0 without an interval
            options: Style = {"color": look.colour, "marker": look.marker, "label": f"alpha {alpha:g}"}
            panel.errorbar(values, list(own), xerr=ends, ls="none", ms=5, capsize=2, **options)
        panel.axvline(1, color=style.INK, **style.DASHED)
        style.name_rows(panel, methods)
        panel.set_xlabel("PWS (1: as good as all rows)")
        panel.set_title(" / ".join(place), fontsize=8.5)
    for panel in axes[1::2] if columns == 2 else ():
        panel.set_yticklabels([])
    return figure


def judged(material: Material) -> dict[str, list[Run]]:
    """Return the finished runs that have judgments, in at most `groups.MOST_ROWS` groups of equal method and alpha."""
    by_alpha: dict[str, list[Run]] = {}
    for run in sorted(material.finished, key=lambda run: run.alpha):
        label = f"{run.method}, {run.alpha:g}"
        if run.record.get("pooled") and (label in by_alpha or len(by_alpha) < groups.MOST_ROWS):
            by_alpha.setdefault(label, []).append(run)
    if not by_alpha:
        raise Missing("no run has judgments")
    return by_alpha


def total(runs: Sequence[Run], part: str, name: str) -> int:
    """Return the count `name` under the key `part` of `run.json`, summed over the runs that have this count."""
    return sum(int((run.record.get(part) or {}).get(name) or 0) for run in runs)


def longer_shares(cells: Mapping[str, Sequence[Run]]) -> dict[str, tuple[float, int]]:
    """Return for each cell (a method and alpha) the share of items that the longer answer won, and the number of items.

    The number and the share include only items that have a winner and answers of different length. A cell without such
    items is left out.
    """
    shares = {}
    for name, runs in cells.items():
        if items := total(runs, "length_bias", "items"):
            shares[name] = (total(runs, "length_bias", "longer_wins") / items, items)
    return shares


def _records(material: Material) -> Records:
    cells = judged(material)
    longer = longer_shares(cells)
    return [
        {"method and alpha": name}
        | {key: total(runs, "pooled", key) for key in ("n", "win", "tie", "lose", "invalid")}
        | {key: total(runs, "position_bias", key) for key in ("to_first", "to_second")}
        | dict(zip(("longer_won", "items_of_unequal_length"), longer.get(name, (None, 0)), strict=True))
        for name, runs in cells.items()
    ]


@report_figure("judge", "Wins, ties and losses", _records)
def judge_outcomes(material: Material) -> Figure:
    """Number of items on which the target tuned on the selection won, tied or lost against the target tuned on all
    rows. Each item is judged in both orders of its answers, and the two judgments together give one outcome. The items
    of all runs of a method and alpha are counted, whatever their seed, data and target."""
    cells = judged(material)
    figure, axes = _rows_panel(cells)
    items = np.array([total(runs, "pooled", "n") for runs in cells.values()])
    start = np.zeros(len(cells))
    for name, colour in _OUTCOMES.items():
        counts = np.array([total(runs, "pooled", name) for runs in cells.values()])
        if name == "invalid" and not counts.any():
            continue
        shares = counts / items
        hatch = style.HATCHES[1] if name in ("lose", "invalid") else ""
        axes.barh(range(len(cells)), shares, left=start, color=colour, hatch=hatch, label=name, **style.BAR)
        ink = style.ON_LIGHT if name == "tie" else style.ON_DARK
        options: Style = {"backgroundcolor": colour, "color": ink, "fontsize": 7.5, "ha": "center", "va": "center"}
        for place in np.flatnonzero(shares > 0.06).tolist():  # the bar is long enough for a number
            middle = start[place] + shares[place] / 2
            axes.text(middle, place, f"{counts[place]}", **options)
        start += shares
    axes.set(xlim=(0, 1), xlabel="share of the items")
    return figure


@report_figure("judge", "Position bias of the judge")
def position_bias(material: Material) -> Figure:
    """Share of the items whose winner changed with the order in which the answers were shown. If one of the two bars of
    a row is much longer than the other, the judge prefers the position that the longer bar stands for."""
    cells = {name: runs for name, runs in judged(material).items() if total(runs, "position_bias", "items")}
    if not cells:
        raise Missing("no item has a valid judgment in both orders")
    items = np.array([total(runs, "position_bias", "items") for runs in cells.values()])
    figure, axes = _rows_panel(cells, items)
    for number, (sign, place) in enumerate(((-1, "first"), (1, "second"))):
        shares = sign * np.array([total(runs, "position_bias", f"to_{place}") for runs in cells.values()]) / items
        options: Style = {"color": style.COLOURS[number], "hatch": style.HATCHES[number], **style.BAR}
        axes.barh(range(len(cells)), shares, label=f"flips to the {place} place", **options)
    axes.axvline(0, color=style.INK, linewidth=1)
    if not any(total(runs, "position_bias", "flips") for runs in cells.values()):
        axes.set_title("no verdict changed with the order")
    most = max(0.02, *np.abs(axes.get_xlim()))
    axes.set(xlim=(-most, most), xlabel="share of the items whose\ntwo verdicts contradict each other")
    return figure


@report_figure("judge", "Length bias of the judge")
def length_bias(material: Material) -> Figure:
    """Share of the items that the longer answer won, among the items that have a winner and answers of different
    length. If an interval does not contain the dashed line at 50 %, the judge prefers longer or shorter answers."""
    from scipy.stats import binomtest

    shares = longer_shares(judged(material))
    if not shares:
        raise Missing("no decided item has answers of different lengths")
    figure, axes = _rows_panel(shares, [items for _, items in shares.values()])
    for place, (share, items) in enumerate(shares.values()):
        interval = binomtest(round(share * items), items).proportion_ci(0.95, "wilson")  # its width is never 0
        ends = [[share - interval.low], [interval.high - share]]
        axes.errorbar(share, place, xerr=ends, fmt="o", ms=6, color=style.COLOURS[0], capsize=3)
    axes.axvline(0.5, color=style.INK, **style.DASHED)
    axes.set(xlim=(0, 1), xlabel="share of the decided items that\nthe longer answer won (95 % interval)")
    return figure


def _rows_panel(names: Mapping[str, Any], items: Sequence[int] | np.ndarray = ()) -> tuple[Figure, Axes]:
    """Return a figure and its only panel, which has a row for each name.

    `items`, if given, are the numbers of items to write beside the rows.
    """
    figure, (axes,) = style.panels(width=5.6, height=1.1 + 0.3 * len(names))
    style.name_rows(axes, list(names))
    style.in_percent(axes.xaxis)
    for place, count in enumerate(items):
        axes.text(1.02, place, f"n={count}", va="center", color=style.FAINT, transform=axes.get_yaxis_transform())
    return figure, axes
