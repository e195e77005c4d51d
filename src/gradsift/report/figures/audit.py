"""The noise audit: known corruption in the selections, and how far the scores tell it apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.figures.groups import MOST_LINES, MOST_ROWS, among
from gradsift.report.figures.style import FAINT, INK, Looks, cells, legend, panels, styled
from gradsift.report.material import Material, Missing

Audit = Mapping[str, Any]


def audits(material: Material, most: int = MOST_LINES) -> dict[str, list[Audit]]:
    """Audits by method; a run's alpha does not matter to them, so one run a method and dataset counts."""
    found: dict[str, dict[tuple[Any, Any], Audit]] = {}
    audited = [run for run in material.runs if run.record.get("audit") is not None]
    shown = among({run.method: str(run.record["scorer"]) for run in audited}, most)
    for run in audited:
        if run.method in shown:
            found.setdefault(run.method, {})[run.record["audit"]["data"], run.record["seed"]] = run.record["audit"]
    if not found:
        raise Missing("no run was audited; audit.enabled=true looks at known corruption (experiment=audit)")
    return {method: list(audits.values()) for method, audits in found.items()}


def spoilt(material: Material) -> Figure:
    """Share of corrupted rows in the selection at each alpha; the band is where random draws of that size lie."""
    found = audits(material)
    with styled():
        figure, (axes,) = panels(width=6.2, height=3.6)
        looks = Looks(found)
        for method, theirs in found.items():
            alphas, shares = spoilt_shares(theirs)
            axes.plot(alphas, shares, marker=looks.marker(method), color=looks.colour(method), label=method)
        first = next(iter(found.values()))[0]
        spread = 2 * np.array([cell["spoilt_random_sd"] for cell in first["selections"]])
        axes.fill_between(alphas, first["spoilt"] - spread, first["spoilt"] + spread, color=FAINT, alpha=0.18, lw=0)
        axes.axhline(first["spoilt"], color=INK, linewidth=1, linestyle=(0, (4, 2)), label="all rows")
        axes.set(xlabel="alpha", ylabel="spoilt share of the selection")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend(figure, axes)
    return figure


def spoilt_shares(audits: list[Audit]) -> tuple[list[float], np.ndarray]:
    """alphas, and the mean over datasets and seeds of the spoilt share at each."""
    alphas = [cell["alpha"] for cell in audits[0]["selections"]]
    return alphas, np.mean([[cell["spoilt"] for cell in audit["selections"]] for audit in audits], axis=0)


def auroc(material: Material) -> Figure:
    """Chance that a clean row scores higher than one of each kind of corruption; below .5 the score prefers it."""
    found = audits(material, MOST_ROWS)
    kinds = list(dict.fromkeys(kind for theirs in found.values() for audit in theirs for kind in audit["kinds"]))
    methods = list(found)
    values = np.array([[_mean_auroc(found[method], kind) for kind in kinds] for method in methods])
    with styled():
        figure, (axes,) = panels(width=2.6 + 0.85 * len(kinds), height=1.4 + 0.36 * len(methods))
        cells(axes, values, [[f"{value:.2f}" for value in line] for line in values], diverging=True)
        axes.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], rotation=25, ha="right")
        axes.set_yticks(range(len(methods)), methods)
    return figure


def _mean_auroc(audits: list[Audit], kind: str) -> float:
    found = [audit["kinds"][kind]["auroc"] for audit in audits if kind in audit["kinds"]]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else float("nan")
