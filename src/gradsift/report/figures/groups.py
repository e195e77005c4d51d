"""Which runs a figure shows: methods beside each other at one alpha, and the run whose examples stand for all."""

from __future__ import annotations

from collections.abc import Sequence

from gradsift.report.material import Material, Missing, Run

MOST_LINES = 8  # methods in one figure of lines: as many as there are colours
MOST_ROWS = 24  # methods in one figure of bars or cells


def middle_alpha(runs: Sequence[Run]) -> float:
    """The alpha at which methods are compared where one has to do: the middle one, the lower of two."""
    alphas = sorted({run.alpha for run in runs if run.alpha < 1})
    return alphas[(len(alphas) - 1) // 2] if alphas else 1.0


def by_method(runs: Sequence[Run], alpha: float, most: int = MOST_ROWS) -> dict[str, list[Run]]:
    """The runs at `alpha` by method, at most so many methods, in the order of the sweep."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.alpha == alpha and (run.method in groups or len(groups) < most):
            groups.setdefault(run.method, []).append(run)
    return groups


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


def mean(values: Sequence[float | None]) -> float | None:
    """None where any is not known: a mean over some of the runs would be compared with means over all."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
