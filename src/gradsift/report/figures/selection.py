"""Figures of the selected rows, of the overlap between methods, and of the noise audit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.audit_tables import jaccard
from gradsift.report.figures import groups, style
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Material, Missing
from gradsift.report.run_tables import grouped

_MOST_NUMBERED = 12  # number of methods up to which a number fits into each cell
Audit = Mapping[str, Any]


def overlaps(material: Material) -> Records:
    """Return, for each pair of methods, the Jaccard index of their selections at the middle alpha of the runs.

    The index is averaged over datasets and seeds. It is NaN if the two methods have no dataset and seed in common.
    """
    runs = groups.reached(material, "select")
    alpha = groups.middle_alpha(runs)
    names = list(groups.by_method(runs, alpha))
    if len(names) < 2:
        raise Missing(f"only one method selected at alpha={alpha:g}")
    datasets: dict[tuple[Any, Any], dict[str, list[int]]] = {}
    for run in runs:
        if run.alpha == alpha and run.method in names:
            chosen = datasets.setdefault((run.data, run.record["seed"]), {})
            chosen[run.method] = material.selected(run).tolist()
    records = []
    for one, other in itertools.combinations(names, 2):
        both = [jaccard(own[one], own[other]) for own in datasets.values() if one in own and other in own]
        mean = sum(both) / len(both) if both else float("nan")
        records.append({"alpha": alpha, "method": one, "other": other, "jaccard": mean})
    return records


@report_figure("selection", "Overlap of the selections", overlaps)
def overlap(material: Material) -> Figure:
    """For each pair of methods, the number of rows that both select, divided by the number of rows that at least one of
    them selects. This is the Jaccard index; 1 means that the selections are equal."""
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
    """Return the share of each quality label in the pool ("all rows") and in the selections at the middle alpha."""
    labels = [(run, material.labels(run)) for run in groups.reached(material, "select")]
    qualities = {run: Counter(known.quality) for run, known in labels if known is not None}
    if not qualities:
        raise Missing("the data has no quality labels; the embedded world and data.corruption make them")
    alpha = groups.middle_alpha(list(qualities))
    shares = {"all rows": [{q: count / counts.total() for q, count in counts.items()} for counts in qualities.values()]}
    for name, group in groups.by_method(list(qualities), alpha).items():
        shares[name] = [run.record["selection"]["labels"] for run in group]
    records = []
    for name, group_shares in shares.items():
        names = sorted({quality for own in group_shares for quality in own})
        means = {q: sum(own.get(q, 0.0) for own in group_shares) / len(group_shares) for q in names}
        records.append({"method": name, "alpha": alpha, **means})
    return records


@report_figure("selection", "Quality of the selected rows", label_shares)
def labels(material: Material) -> Figure:
    """Share of the selected rows that have each quality label. The first bar shows the whole pool; a useful method has
    a larger share of clean rows than the pool."""
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


def audits(material: Material, most: int = groups.MOST_LINES) -> dict[str, list[Audit]]:
    """Return a dict from each of at most `most` methods to its audits, one for each dataset and seed.

    Runs that differ only in alpha share an audit, since an audit selects at all of `audit.alphas`.
    """
    audited = [run for run in material.runs if run.record.get("audit") is not None]
    shown = groups.among({run.method: str(run.record["scorer"]) for run in audited}, most)
    by_method: dict[str, dict[tuple[Any, Any], Audit]] = {}
    for run in audited:
        if run.method in shown:
            audit = run.record["audit"]
            by_method.setdefault(run.method, {})[audit["data"], run.record["seed"]] = audit
    if not by_method:
        raise Missing("no run was audited; audit.enabled=true measures known corruption (experiment=audit)")
    return {method: list(audits.values()) for method, audits in by_method.items()}


def spoilt_shares(material: Material) -> Records:
    """Return the share of corrupted rows in each method's selection at each alpha, averaged over datasets and seeds."""
    records = []
    for method, own in audits(material).items():
        for cells in zip(*(audit["selections"] for audit in own), strict=True):  # the cells of one alpha
            share = sum(cell["spoilt"] for cell in cells) / len(cells)
            records.append({"method": method, "alpha": cells[0]["alpha"], "spoilt_share": share})
    return records


@report_figure("audit", "Noise audit: spoilt rows selected", spoilt_shares)
def audit_spoilt(material: Material) -> Figure:
    """Share of corrupted rows in each selection. The band shows the share in random selections: its mean, plus or minus
    two standard deviations. A method below the band avoids corrupted rows; a method within the band does no better than
    chance. The figure shows at most eight methods."""
    figure, (axes,) = style.panels(width=5.2, height=3.4)
    by_method = grouped(spoilt_shares(material), itemgetter("method"))
    for (method, cells), look in zip(by_method.items(), style.looks_of(by_method).values(), strict=True):
        alphas, shares = style.column(cells, "alpha"), style.column(cells, "spoilt_share")
        axes.plot(alphas, shares, marker=look.marker, color=look.colour, label=method)
    first = next(iter(audits(material).values()))[0]
    spread = 2 * style.column(first["selections"], "spoilt_random_sd")
    axes.fill_between(alphas, first["spoilt"] - spread, first["spoilt"] + spread, color=style.FAINT, alpha=0.18, lw=0)
    axes.axhline(first["spoilt"], color=style.INK, **style.DASHED, label="all rows")
    axes.set(xlabel="alpha", ylabel="spoilt share of the selection")
    axes.set_ylim(bottom=0)
    style.in_percent(axes.xaxis, axes.yaxis)
    return figure


@report_figure("audit", "Noise audit: AUROC of the scores")
def audit_auroc(material: Material) -> Figure:
    """AUROC of each method's scores for telling clean rows from each kind of corrupted rows. At 1 every clean row ranks
    above every corrupted row, at 0.5 the score cannot distinguish them, and below 0.5 it prefers the corrupted rows."""
    by_method = audits(material, groups.MOST_ROWS)
    kinds = list(dict.fromkeys(kind for own in by_method.values() for audit in own for kind in audit["kinds"]))
    values = np.array([[_mean_auroc(own, kind) for kind in kinds] for own in by_method.values()])
    figure, (axes,) = style.panels(width=2.2 + 0.62 * len(kinds), height=1.4 + 0.36 * len(by_method))
    texts = [[f"{value:.2f}" for value in line] for line in values]
    names = [kind.replace("_", " ") for kind in kinds]
    style.cells(axes, values, texts, rows=list(by_method), columns=names, rotation=25, diverging=True)
    return figure


def _mean_auroc(audits: list[Audit], kind: str) -> float:
    aurocs = [audit["kinds"][kind]["auroc"] for audit in audits if kind in audit["kinds"]]
    known = [value for value in aurocs if value is not None]
    return float(np.mean(known)) if known else float("nan")
