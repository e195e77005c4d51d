"""What the methods select, and by what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.audit_tables import jaccard
from gradsift.report.figures.groups import MOST_ROWS, by_method, middle_alpha, reached
from gradsift.report.figures.style import INK, Look, Looks, cells, legend, panels, styled
from gradsift.report.material import Material, Missing

_MOST_NUMBERED = 12  # methods beside which a number fits into each cell


def overlap(material: Material) -> Figure:
    """Jaccard of the methods' selections at one alpha, a mean over the datasets and seeds that both have."""
    alpha, names, values = overlaps(material)
    with styled():
        figure, (axes,) = panels(width=1.8 + 0.75 * len(names), height=1.2 + 0.5 * len(names))
        texts = [[f"{value:.2f}" if len(names) <= _MOST_NUMBERED else "" for value in line] for line in values]
        cells(axes, values, texts)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"alpha {alpha:g}")
    return figure


def overlaps(material: Material) -> tuple[float, list[str], np.ndarray]:
    """alpha, K methods, and (K, K) Jaccard; NaN where no dataset and seed have both."""
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
    found: dict[tuple[str, str], list[float]] = {}
    for sets in datasets.values():
        for one in sets:
            for other in sets:
                found.setdefault((one, other), []).append(jaccard(sets[one], sets[other]))
    values = [[np.mean(found[one, other]) if (one, other) in found else np.nan for other in names] for one in names]
    return alpha, names, np.array(values)


def labels(material: Material) -> Figure:
    """Share of each quality label in the pool and in the selections at one alpha."""
    alpha, rows = label_shares(material)
    qualities = list(dict.fromkeys(name for shares in rows.values() for name in shares))
    qualities.sort(key=lambda name: name != "clean")
    with styled():
        figure, (axes,) = panels(width=7.2, height=1.3 + 0.3 * len(rows))
        looks = Looks(qualities)
        start = np.zeros(len(rows))
        for name in qualities:
            values = np.array([shares.get(name, 0.0) for shares in rows.values()])
            look: Look = {"color": looks.colour(name), "hatch": looks.hatch(name), "edgecolor": INK}
            axes.barh(range(len(rows)), values, left=start, label=name.replace("_", " "), height=0.72, **look)
            start += values
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set(xlim=(0, 1), xlabel=f"share of the rows (alpha {alpha:g})")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend(figure, axes)
    return figure


def label_shares(material: Material) -> tuple[float, dict[str, dict[str, float]]]:
    """alpha, and the shares of the pool ("all rows") and of each method's selections, means over the runs.

    Raises:
        Missing: the data has no labels.
    """
    runs = [run for run in reached(material, "select") if material.labels(run) is not None]
    if not runs:
        raise Missing("the data has no quality labels; the embedded world and data.corruption make them")
    alpha = middle_alpha(runs)
    known = [found.quality for run in runs if (found := material.labels(run)) is not None]
    pools = [{name: quality.count(name) / len(quality) for name in sorted(set(quality))} for quality in known]
    rows = {"all rows": _mean_shares(pools)}
    for name, group in by_method(runs, alpha).items():
        rows[name] = _mean_shares([run.record["selection"]["labels"] for run in group])
    return alpha, rows


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) / len(shares) for name in names}
