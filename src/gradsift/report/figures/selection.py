"""What the methods select, and how far they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.audit_tables import jaccard
from gradsift.report.figures import style
from gradsift.report.figures.groups import MOST_ROWS, by_method, middle_alpha, reached
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Material, Missing

_MOST_NUMBERED = 12  # methods up to which a number fits into each cell


def _overlap_records(material: Material) -> Records:
    alpha, names, values = overlaps(material)
    return [
        {"alpha": alpha, "method": names[i], "other": names[j], "jaccard": float(values[i, j])}
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]


@report_figure("Overlap of the selections", _overlap_records)
def overlap(material: Material) -> Figure:
    """Share of rows that two methods have in common (Jaccard; 1 means the same selection)."""
    alpha, names, values = overlaps(material)
    figure, (axes,) = style.panels(width=1.8 + 0.75 * len(names), height=1.2 + 0.5 * len(names))
    texts = [[f"{value:.2f}" if len(names) <= _MOST_NUMBERED else "" for value in line] for line in values]
    style.cells(axes, values, texts, rows=names, columns=names, rotation=30)
    axes.set_title(f"alpha {alpha:g}")
    return figure


def overlaps(material: Material) -> tuple[float, list[str], np.ndarray]:
    """Return alpha, K methods and their Jaccard (K, K), averaged over the datasets and seeds that both have.

    An entry is NaN if no dataset and seed has both methods.
    """
    runs = reached(material, "select")
    alpha = middle_alpha(runs)
    names = list(by_method(runs, alpha, MOST_ROWS))
    if len(names) < 2:
        raise Missing(f"only one method selected at alpha={alpha:g}")
    datasets: dict[tuple[Any, Any], dict[str, list[int]]] = {}
    for run in runs:
        if run.alpha == alpha and run.method in names:
            chosen = datasets.setdefault((run.data, run.record["seed"]), {})
            chosen[run.method] = material.selected(run).tolist()
    values = np.full((len(names), len(names)), np.nan)
    for i, j in np.ndindex(values.shape):
        both = [chosen for chosen in datasets.values() if names[i] in chosen and names[j] in chosen]
        if both:
            values[i, j] = np.mean([jaccard(chosen[names[i]], chosen[names[j]]) for chosen in both])
    return alpha, names, values


def _label_records(material: Material) -> Records:
    alpha, rows = label_shares(material)
    return [{"method": name, "alpha": alpha, **shares} for name, shares in rows.items()]


@report_figure("Quality of the selected rows", _label_records)
def labels(material: Material) -> Figure:
    """Share of each known quality. A useful method keeps more clean rows than the pool in the first bar."""
    alpha, rows = label_shares(material)
    qualities = sorted({name for shares in rows.values() for name in shares}, key=lambda name: (name != "clean", name))
    figure, (axes,) = style.panels(width=7.2, height=1.3 + 0.3 * len(rows))
    start = np.zeros(len(rows))
    for name, look in style.looks_of(qualities).items():
        values = np.array([shares.get(name, 0.0) for shares in rows.values()])
        options: Style = {"color": look.colour, "hatch": look.hatch, "label": name.replace("_", " ")}
        axes.barh(range(len(rows)), values, left=start, **options, **style.BAR)
        start += values
    style.name_rows(axes, list(rows))
    axes.set(xlim=(0, 1), xlabel=f"share of the rows (alpha {alpha:g})")
    style.in_percent(axes.xaxis)
    return figure


def label_shares(material: Material) -> tuple[float, dict[str, dict[str, float]]]:
    """Return alpha and the shares of each quality in the pool ("all rows") and in each method's selections.

    Raises:
        Missing: the data has no labels.
    """
    labelled = [(run, known) for run in reached(material, "select") if (known := material.labels(run)) is not None]
    if not labelled:
        raise Missing("the data has no quality labels; the embedded world and data.corruption make them")
    runs = [run for run, _ in labelled]
    alpha = middle_alpha(runs)
    pools = [_shares(known.quality) for _, known in labelled]
    rows = {"all rows": _mean_shares(pools)}
    for name, group in by_method(runs, alpha).items():
        rows[name] = _mean_shares([run.record["selection"]["labels"] for run in group])
    return alpha, rows


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for share in shares for name in share})
    return {name: sum(share.get(name, 0.0) for share in shares) / len(shares) for name in names}


def _shares(quality: Sequence[str]) -> dict[str, float]:
    return {name: count / len(quality) for name, count in Counter(quality).items()}
