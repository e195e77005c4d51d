"""The noise audit: known corruption in the selections, and how well the scores separate it from clean rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.figures import style
from gradsift.report.figures.groups import MOST_LINES, MOST_ROWS, among
from gradsift.report.figures.style import Records, report_figure
from gradsift.report.material import Material, Missing

Audit = Mapping[str, Any]


def audits(material: Material, most: int = MOST_LINES) -> dict[str, list[Audit]]:
    """Return the audits by method, one for each dataset and seed; an audit does not depend on the run's alpha."""
    audited = [run for run in material.runs if run.record.get("audit") is not None]
    shown = among({run.method: str(run.record["scorer"]) for run in audited}, most)
    by_method: dict[str, dict[tuple[Any, Any], Audit]] = {}
    for run in audited:
        if run.method in shown:
            audit = run.record["audit"]
            by_method.setdefault(run.method, {})[audit["data"], run.record["seed"]] = audit
    if not by_method:
        raise Missing("no run was audited; audit.enabled=true measures known corruption (experiment=audit)")
    return {method: list(audits.values()) for method, audits in by_method.items()}


def spoilt_shares(material: Material) -> Records:
    """Return the spoilt share of each method's selection at each alpha, averaged over datasets and seeds."""
    records = []
    for method, own in audits(material).items():
        for cells in zip(*(audit["selections"] for audit in own), strict=True):  # the cells of one alpha
            share = sum(cell["spoilt"] for cell in cells) / len(cells)
            records.append({"method": method, "alpha": cells[0]["alpha"], "spoilt_share": share})
    return records


@report_figure("Noise audit: spoilt rows selected", spoilt_shares)
def audit_spoilt(material: Material) -> Figure:
    """Share of corrupted rows in each selection. The band shows random draws (plus or minus two standard deviations). A
    method below the band avoids corrupted rows; within the band it does no better than chance. Shows at most eight
    methods."""
    figure, (axes,) = style.panels(width=5.2, height=3.4)
    by_method = style.grouped(spoilt_shares(material), "method")
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


@report_figure("Noise audit: how well the scores tell it apart")
def audit_auroc(material: Material) -> Figure:
    """AUROC of clean rows against each kind of corruption. At 1 all clean rows rank first, at 0.5 the score cannot
    distinguish clean from corrupted rows, and below 0.5 it prefers the corrupted rows."""
    by_method = audits(material, MOST_ROWS)
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
