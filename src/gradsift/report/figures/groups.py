"""Functions that choose the runs for a figure, and functions that measure how well two runs agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gradsift.report.audit_tables import jaccard
from gradsift.report.material import Material, Missing, Run
from gradsift.report.run_tables import grouped

MOST_LINES = 8  # methods in a figure of lines: as many as there are colours
MOST_ROWS = 24  # methods in a figure of bars or cells


def middle_alpha(runs: Sequence[Run]) -> float:
    """Return the median of the different alphas below 1 (the lower one of two middle alphas); 1 if none is below 1."""
    alphas = sorted({run.alpha for run in runs if run.alpha < 1})
    return alphas[(len(alphas) - 1) // 2] if alphas else 1.0


def by_method(runs: Sequence[Run], alpha: float, most: int = MOST_ROWS) -> dict[str, list[Run]]:
    """Return a dict from each method to its runs at `alpha`, in the order of the sweep.

    The dict has at most `most` methods, which `among` chooses.
    """
    groups = grouped((run for run in runs if run.alpha == alpha), lambda run: run.method)
    shown = among({name: str(group[0].record["scorer"]) for name, group in groups.items()}, most)
    return {name: group for name, group in groups.items() if name in shown}


def among(scorers: Mapping[str, str], most: int) -> set[str]:
    """Return at most `most` methods: the first of each scorer, then the second of each scorer, and so on.

    `scorers` maps each method (a scorer with its settings) to the name of its scorer.
    """
    seen: Counter[str] = Counter()
    turns = []
    for name, scorer in scorers.items():
        turns.append((seen[scorer], name))
        seen[scorer] += 1
    return {name for _, name in sorted(turns, key=lambda turn: turn[0])[:most]}


def reached(material: Material, stage: str, but_full: bool = True) -> list[Run]:
    """Return the runs that have an artifact of the stage; if `but_full`, full-data runs are left out.

    If no run has such an artifact, raises `Missing` with the reason why the first run has none.
    """
    wanted = [run for run in material.runs if not (but_full and run.is_full)]
    if not wanted:
        raise Missing("there is only the full-data run, which selects nothing")
    runs = [run for run in wanted if run.has(stage)]
    if not runs:
        wanted[0].one(stage)  # raises Missing
    return runs


def representative(material: Material, stage: str) -> Run:
    """Return the run that a figure of a single run shows.

    It is the first G-SNR run at the middle alpha, or else the first run at this alpha, among the runs that have an
    artifact of `stage`.
    """
    runs = reached(material, stage)
    at_alpha = [run for run in runs if run.alpha == middle_alpha(runs)]
    return next((run for run in at_alpha if run.record["scorer"] == "gsnr"), at_alpha[0])


def largest_ensemble(material: Material) -> Run:
    """Return, of the runs with the scorer and alpha of the representative run, the one with the most members."""
    one = representative(material, "statistics")
    runs = [run for run in reached(material, "statistics") if run.alpha == one.alpha]
    return max((run for run in runs if run.record["scorer"] == one.record["scorer"]), key=lambda r: r.record["members"])


def over_seeds_of(material: Material, one: Run) -> list[Run]:
    """Return `one` and, for each other pair of data seed and seed, a run that is comparable with `one`.

    This run has the alpha, dataset, models, snapshots and method of `one`, and artifacts of at least the same stages.
    """
    same = ("scorer", "alpha", "dataset", "proxy", "members", "snapshots", "target")
    runs = [one, *(run for run in material.runs if all(run.record.get(key) == one.record.get(key) for key in same))]
    runs = [run for run in runs if run.method == one.method and run.artifacts.keys() >= one.artifacts.keys()]
    by_seed = {(run.record.get("data_seed"), run.record.get("seed")): run for run in reversed(runs)}
    return list(reversed(by_seed.values()))


def seed_of(run: Run) -> str:
    """Return the seed of a run as text, followed by its data seed unless that is 0: "seed 1" or "seed 1, data 2"."""
    data = run.record.get("data_seed")
    return f"seed {run.record.get('seed')}" + (f", data {data}" if data else "")


def named(run: Run) -> str:
    """Return the method, budget and seeds of a run as text, for the title of a panel."""
    return f"{run.label}, {seed_of(run)}"


def heldout_loss(run: Run) -> float | None:
    """Return the held-out loss of the run's finetuned target, in nats per token; None if it was not measured."""
    return (run.record.get("heldout_loss") or {}).get("model")


def overlap_of(material: Material, one: Run, other: Run) -> float:
    """Return the Jaccard index of the selections of two runs on the same data."""
    return jaccard(material.selected(one).tolist(), material.selected(other).tolist())


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Spearman's rank correlation over the entries that are finite in both arrays.

    The result is None if there are fewer than two such entries, or if they are all equal in one of the arrays.
    """
    from scipy.stats import spearmanr

    usable = np.isfinite(x) & np.isfinite(y)
    if usable.sum() < 2 or np.ptp(x[usable]) == 0 or np.ptp(y[usable]) == 0:
        return None
    return float(spearmanr(x[usable], y[usable]).statistic)
