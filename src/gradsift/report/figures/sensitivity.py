"""How far the result hangs on what the paper leaves open: M, the snapshots, eps, the seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.config import GsnrConfig
from gradsift.gradients.statistics import Statistics, compute_statistics
from gradsift.report.audit_tables import jaccard
from gradsift.report.figures.clouds import spearman
from gradsift.report.figures.groups import MOST_ROWS, by_method, mean, middle_alpha, reached, standing_for
from gradsift.report.figures.style import COLOURS, FAINT, INK, cells, legend, panels, styled
from gradsift.report.material import Material, Missing, Run
from gradsift.scoring.gsnr import gsnr

Setting = tuple[int, tuple[int, ...]]  # M, snapshots
EPS = np.logspace(-12, 2, 57)


# ------------------------------------------------------------------------------- M and snapshots


def members_and_snapshots(material: Material) -> Figure:
    """A cell for each M and pair of snapshots: PWS, or else held-out loss, or else overlap with the largest setting."""
    scorer, measure, values = settings_grid(material)
    members = sorted({m for m, _ in values})
    snapshots = sorted({s for _, s in values})
    grid = np.array([[values.get((m, s), np.nan) for s in snapshots] for m in members], float)
    span = np.nanmax(grid) - np.nanmin(grid)
    shades = (grid - np.nanmin(grid)) / (span if span > 0 else 1.0)
    if measure == "held-out loss":
        shades = 1 - shades  # brighter is better
    with styled():
        figure, (axes,) = panels(width=2.2 + 0.95 * len(snapshots), height=1.4 + 0.5 * len(members))
        cells(axes, shades, [[f"{value:.3f}" for value in line] for line in grid])
        axes.set_xticks(range(len(snapshots)), [", ".join(map(str, s)) for s in snapshots])
        axes.set_yticks(range(len(members)), [str(m) for m in members])
        axes.set(xlabel="snapshots (epochs s, t)", ylabel="members M")
        axes.set_title(f"{measure}, {scorer}")
    return figure


def settings_grid(material: Material) -> tuple[str, str, dict[Setting, float]]:
    """Scorer, measure, and the mean over runs of that measure for each setting.

    Raises:
        Missing: M and the snapshots do not vary in the runs of any one scorer.
    """
    by_scorer: dict[str, list[Run]] = {}
    for run in material.runs:
        if run.has("select") and run.has("statistics"):
            by_scorer.setdefault(str(run.record["scorer"]), []).append(run)
    varied = {name: runs for name, runs in by_scorer.items() if len({setting_of(run) for run in runs}) > 1}
    if not varied:
        raise Missing(
            "proxy.members and proxy.snapshots do not vary; sweep them with experiment=gradfiltering_sensitivity"
        )
    scorer = "gsnr" if "gsnr" in varied else next(iter(varied))
    runs = [run for run in varied[scorer] if run.alpha == middle_alpha(varied[scorer])]
    for measure, value in (("PWS", _pws), ("held-out loss", _heldout)):
        found = {setting: mean([value(run) for run in group]) for setting, group in _by_setting(runs).items()}
        if all(level is not None for level in found.values()):
            return scorer, measure, {setting: level for setting, level in found.items() if level is not None}
    largest = max(_by_setting(runs))
    return scorer, f"overlap with M={largest[0]}, {list(largest[1])}", _overlap_with(material, runs, largest)


def setting_of(run: Run) -> Setting:
    return int(run.record["members"]), tuple(run.record["snapshots"])


def _by_setting(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    groups: dict[Setting, list[Run]] = {}
    for run in runs:
        groups.setdefault(setting_of(run), []).append(run)
    return groups


def _pws(run: Run) -> float | None:
    return run.record.get("pws")


def _heldout(run: Run) -> float | None:
    return (run.record.get("heldout_loss") or {}).get("model")


def _overlap_with(material: Material, runs: Sequence[Run], largest: Setting) -> dict[Setting, float]:
    """Mean Jaccard with the selection under the largest setting on the same data and seed."""
    beside = {(run.data, run.record["seed"]): run for run in runs if setting_of(run) == largest}
    found: dict[Setting, list[float]] = {}
    for run in runs:
        other = beside.get((run.data, run.record["seed"]))
        if other is not None:
            common = jaccard(material.selected(run).tolist(), material.selected(other).tolist())
            found.setdefault(setting_of(run), []).append(common)
    return {setting: float(np.mean(values)) for setting, values in found.items()}


def ensemble_size(material: Material) -> Figure:
    """The ranking by the first m members held against that by all of them."""
    run = standing_for(material, "statistics")
    with styled():
        figure, (axes,) = panels(width=6.0, height=3.4)
        sizes, correlation, overlap = size_curves(material, run)
        axes.plot(sizes, correlation, "o-", color=COLOURS[0], label="rank correlation of the scores")
        axes.plot(sizes, overlap, "s--", color=COLOURS[1], label=f"overlap of the top {run.alpha:.0%}")
        axes.set(xlabel=f"members, of {sizes[-1]}", ylabel="agreement with all members", ylim=_agreement(correlation))
        axes.set_xticks(sizes)
        axes.set_title(run.name)
        legend(figure, axes)
    return figure


def size_curves(material: Material, run: Run) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Numbers of members m from 2 to M; Spearman and Jaccard of the score by the first m with that by all.

    Raises:
        Missing: there are fewer than three members.
    """
    early, late = (material.norms(run, epoch) for epoch in run.record["snapshots"])
    sizes = list(range(2, len(early) + 1))
    if len(sizes) < 2:
        raise Missing(f"{run.name}: {len(early)} members are too few to leave some out")
    scope, count = run.config["proxy"]["norm_scope"], len(material.statistics(run).G_s)
    scores = [gsnr(compute_statistics(early[:m], late[:m], scope, count), eps=own_eps(run)).score for m in sizes]
    size = int(run.alpha * count)
    overlap = [jaccard(top(score, size), top(scores[-1], size)) for score in scores]
    return sizes, _correlations(scores, scores[-1]), np.array(overlap)


def _correlations(scores: Sequence[np.ndarray], with_: np.ndarray) -> np.ndarray:
    """Spearman of each with one; NaN, a gap in the line, where it is not defined."""
    return np.array([spearman(score, with_) for score in scores], float)


def _agreement(correlation: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that shows these and shares."""
    return float(np.fmin.reduce(correlation, initial=0.0)) - 0.02, 1.03


# --------------------------------------------------------------------------------------------- eps


def eps(material: Material) -> Figure:
    """The score computed again from the statistics under other values of eps, held against the run's own."""
    run = standing_for(material, "statistics")
    values, own = material.statistics(run), own_eps(run)
    with styled():
        figure, (axes,) = panels(width=6.2, height=3.5)
        correlation, overlap = eps_curves(values, own, run.alpha)
        axes.plot(EPS, correlation, color=COLOURS[0], label="rank correlation of the scores")
        axes.plot(EPS, overlap, color=COLOURS[1], linestyle=(0, (5, 2)), label=f"overlap of the top {run.alpha:.0%}")
        axes.axvline(own, color=INK, linewidth=1, label=f"this run: {own:g}")
        middle = float(np.nanmedian(values.V_t))
        axes.axvline(middle, color=FAINT, linewidth=1, linestyle=(0, (1, 1.5)), label=f"median $V_t$: {middle:.2g}")
        axes.set(xscale="log", xlabel="eps", ylabel=f"agreement with eps = {own:g}")
        axes.set_ylim(_agreement(correlation))
        axes.set_title(run.name)
        legend(figure, axes)
    return figure


def own_eps(run: Run) -> float:
    """The run's eps, or the package's default where its scorer has none."""
    scorer: Any = run.config.get("scorer") or {}
    return float(scorer.get("eps", GsnrConfig.eps))


def eps_curves(values: Statistics, own: float, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Spearman with the score under `own`, and Jaccard of the top alpha, for each of the values that are drawn."""
    base = gsnr(values, eps=own).score
    size = int(alpha * len(base))
    kept = top(base, size)
    scores = [gsnr(values, eps=float(value)).score for value in EPS]
    correlation = _correlations(scores, base)
    overlap = np.array([jaccard(kept, top(score, size)) for score in scores])
    return correlation, overlap


def top(score: np.ndarray, size: int) -> list[int]:
    """Positions of the highest scores; those without one never."""
    ranked = np.where(np.isfinite(score), score, -np.inf)
    chosen: list[int] = np.argsort(-ranked, kind="stable")[:size].tolist()
    return chosen


# ------------------------------------------------------------------------------------------- seeds


def seeds(material: Material) -> Figure:
    """Agreement of a method with itself under another seed, on the same data."""
    alpha, found = seed_agreement(material)
    with styled():
        figure, (axes,) = panels(width=6.6, height=1.2 + 0.36 * len(found))
        for place, (correlations, overlaps) in enumerate(found.values()):
            axes.plot(correlations, [place - 0.13] * len(correlations), "o", ms=6, color=COLOURS[0], alpha=0.8)
            axes.plot(overlaps, [place + 0.13] * len(overlaps), "s", ms=6, color=COLOURS[1], alpha=0.8)
        axes.plot([], [], "o", color=COLOURS[0], label="rank correlation of the scores")
        axes.plot([], [], "s", color=COLOURS[1], label=f"overlap of the selections, alpha {alpha:g}")
        chance = alpha / (2 - alpha)
        axes.axvline(chance, color=FAINT, linewidth=1, linestyle=(0, (1, 1.5)), label=f"chance overlap {chance:.2f}")
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set(xlim=(min(-0.05, axes.get_xlim()[0]), 1.03), xlabel="agreement between two seeds")
        legend(figure, axes)
    return figure


def seed_agreement(material: Material) -> tuple[float, dict[str, tuple[list[float], list[float]]]]:
    """alpha, and by method Spearman and Jaccard of every two runs on one dataset that differ in the seed.

    Raises:
        Missing: there are no two such runs.
    """
    runs = reached(material, "select")
    alpha = middle_alpha(runs)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for method, group in by_method(runs, alpha, MOST_ROWS).items():
        for one, other in itertools.combinations(group, 2):
            if one.data == other.data and one.record["seed"] != other.record["seed"]:
                correlation = spearman(material.scores(one).score, material.scores(other).score)
                lists = found.setdefault(method, ([], []))
                lists[0].extend([] if correlation is None else [correlation])
                lists[1].append(jaccard(material.selected(one).tolist(), material.selected(other).tolist()))
    if not found:
        raise Missing("no two runs of a method differ in the seed alone on the same data; sweep seed=0,1,2")
    return alpha, found
