"""What the methods select, and how far they agree."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.audit_tables import jaccard
from gradsift.report.figures import style
from gradsift.report.figures.groups import MOST_ROWS, by_method, middle_alpha, reached
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Material, Missing

_MOST_NUMBERED = 12  # number of methods up to which a number fits into each cell


def overlaps(material: Material) -> Records:
    """Return the Jaccard index of each pair of methods at the middle alpha, averaged over datasets and seeds.

    The value is NaN if no dataset and seed has both methods.
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
    records = []
    for one, other in itertools.combinations(names, 2):
        both = [
            jaccard(chosen[one], chosen[other]) for chosen in datasets.values() if one in chosen and other in chosen
        ]
        mean = sum(both) / len(both) if both else float("nan")
        records.append({"alpha": alpha, "method": one, "other": other, "jaccard": mean})
    return records


@report_figure("Overlap of the selections", overlaps)
def overlap(material: Material) -> Figure:
    """Number of rows that both methods select, divided by the number of rows that at least one of them selects
    (Jaccard; 1 means the same selection)."""
    records = overlaps(material)
    names = list(dict.fromkeys(name for record in records for name in (record["method"], record["other"])))
    values = np.eye(len(names))
    for record in records:
        i, j = names.index(record["method"]), names.index(record["other"])
        values[i, j] = values[j, i] = record["jaccard"]
    figure, (axes,) = style.panels(width=1.8 + 0.75 * len(names), height=1.2 + 0.5 * len(names))
    texts = [[f"{value:.2f}" if len(names) <= _MOST_NUMBERED else "" for value in line] for line in values]
    style.cells(axes, values, texts, rows=names, columns=names, rotation=30)
    axes.set_title(f"alpha {records[0]['alpha']:g}")
    return figure


def label_shares(material: Material) -> Records:
    """Return the share of each quality in the pool ("all rows") and in each method's selections at the middle alpha.

    Raises:
        Missing: the data has no labels.
    """
    labels = [(run, material.labels(run)) for run in reached(material, "select")]
    qualities = {run: Counter(known.quality) for run, known in labels if known is not None}
    if not qualities:
        raise Missing("the data has no quality labels; the embedded world and data.corruption make them")
    alpha = middle_alpha(list(qualities))
    shares = {"all rows": [{q: count / counts.total() for q, count in counts.items()} for counts in qualities.values()]}
    for name, group in by_method(list(qualities), alpha).items():
        shares[name] = [run.record["selection"]["labels"] for run in group]
    records = []
    for name, group_shares in shares.items():
        names = sorted({quality for own in group_shares for quality in own})
        means = {q: sum(own.get(q, 0.0) for own in group_shares) / len(group_shares) for q in names}
        records.append({"method": name, "alpha": alpha, **means})
    return records


@report_figure("Quality of the selected rows", label_shares)
def labels(material: Material) -> Figure:
    """Share of the rows with each quality label. The first bar is the pool; a useful method selects a larger share of
    clean rows."""
    records = label_shares(material)
    qualities = sorted({q for record in records for q in record} - {"method", "alpha"}, key=lambda q: (q != "clean", q))
    figure, (axes,) = style.panels(width=5.6, height=1.3 + 0.3 * len(records))
    start = np.zeros(len(records))
    for name, look in style.looks_of(qualities).items():
        values = np.array([record.get(name, 0.0) for record in records])
        options: Style = {"color": look.colour, "hatch": look.hatch, "label": name.replace("_", " ")}
        axes.barh(range(len(records)), values, left=start, **options, **style.BAR)
        start += values
    style.name_rows(axes, [record["method"] for record in records])
    axes.set(xlim=(0, 1), xlabel=f"share of the rows (alpha {records[0]['alpha']:g})")
    style.in_percent(axes.xaxis)
    return figure
