"""Which runs a figure shows: methods beside each other at one alpha, and the run whose examples stand for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gradsift.report.material import Material, Missing, Run

MOST_LINES = 8  # methods in one figure of lines: as many as there are colours
MOST_ROWS = 24  # methods in one figure of bars or cells


def middle_alpha(runs: Sequence[Run]) -> float:
    """The alpha at which methods are compared where one has to do: the middle one, the lower of two."""
    alphas = sorted({run.alpha for run in runs if run.alpha < 1})
    return alphas[(len(alphas) - 1) // 2] if alphas else 1.0


def by_method(runs: Sequence[Run], alpha: float, most: int = MOST_ROWS) -> dict[str, list[Run]]:
    """The runs at `alpha` by method, in the sweep's order; of more than `most` methods one of each scorer first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.alpha == alpha:
            groups.setdefault(run.method, []).append(run)
    shown = among({name: str(group[0].record["scorer"]) for name, group in groups.items()}, most)
    return {name: group for name, group in groups.items() if name in shown}


def among(scorers: Mapping[str, str], most: int) -> set[str]:
    """At most so many methods, given with their scorers: one of each scorer, then a second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for name, scorer in scorers.items():
        turns.append((seen[scorer], name))
        seen[scorer] += 1
    return {name for _, name in sorted(turns, key=lambda turn: turn[0])[:most]}


def reached(material: Material, stage: str, but_full: bool = True) -> list[Run]:
    """Runs that have an artifact of the stage.

    Raises:
        Missing: there is none; says how the runs ended.
    """
    found = [run for run in material.runs if run.has(stage) and not (but_full and run.is_full)]
    if found:
        return found
    for run in material.runs:
        if not (but_full and run.is_full):
            run.one(stage)  # raises the reason of the first
    raise Missing("there is the full-data run alone, which selects nothing")


def standing_for(material: Material, stage: str, scorer: str = "gsnr") -> Run:
    """One run whose examples are shown: with the stage, at the middle alpha, of `scorer` where there is one."""
    runs = reached(material, stage)
    at_alpha = [run for run in runs if run.alpha == middle_alpha(runs)]
    return next((run for run in at_alpha if run.record["scorer"] == scorer), at_alpha[0])


def largest_ensemble(material: Material) -> Run:
    """Of the runs like the one that stands for all, the first with the most members."""
    one = standing_for(material, "statistics")
    like = [run for run in reached(material, "statistics") if run.alpha == one.alpha]
    return max((run for run in like if run.record["scorer"] == one.record["scorer"]), key=lambda r: r.record["members"])


def mean(values: Sequence[float | None]) -> float | None:
    """None where any is not known: a mean over some of the runs would be compared with means over all."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
