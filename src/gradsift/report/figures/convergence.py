"""Does a selection train the target faster? The training loss, selection by selection (the paper's Fig. 3)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.figures.groups import MOST_LINES, by_method, middle_alpha, reached
from gradsift.report.figures.style import INK, Look, Looks, legend, panels, styled
from gradsift.report.material import Material, Run

_POINTS = 400  # a line needs no more
ALL = "all rows"
_SMOOTH = 0.05  # share of the steps that a running mean spans


def smooth(values: np.ndarray, share: float = _SMOOTH) -> np.ndarray:
    """Running mean over `share` of the values, shorter where it would reach beyond an end."""
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    mean: np.ndarray = (total[last] - total[first]) / (last - first)
    return mean


def convergence(material: Material) -> Figure:
    """Loss against optimiser steps, and against tokens: equal steps are not equal compute where answers are longer."""
    found = curves(material)
    with styled():
        figure, (by_step, by_token) = panels(2, height=3.4)
        looks = Looks(found)
        for name, (tokens, loss) in found.items():
            look: Look = {"color": INK} if name == ALL else {"color": looks.colour(name)}
            keep = np.unique(np.linspace(0, len(loss) - 1, min(_POINTS, len(loss))).astype(int))
            by_step.plot(keep + 1, loss[keep], label=name, linestyle=looks.dash(name), **look)
            by_token.plot(tokens[keep], loss[keep], label=name, linestyle=looks.dash(name), **look)
        by_step.set(xlabel="optimiser steps", ylabel="training loss (nats a token)")
        # equal compute: no line goes beyond where the shortest one ends
        by_token.set(xlabel="tokens", xlim=(0, min(tokens[-1] for tokens, _ in found.values())))
        by_token.sharey(by_step)
        legend(figure, by_step)
    return figure


def curves(material: Material) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By method: tokens seen and smoothed loss, means over the runs (seeds) at one alpha."""
    runs = reached(material, "finetune", but_full=False)
    alpha = middle_alpha(runs)
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for method, group in by_method(runs, alpha, MOST_LINES).items():
        groups[ALL if group[0].is_full else method] = [_curve(material, run, "model") for run in group]
    references = {run.artifacts["finetune"][1].path: run for run in runs if len(run.artifacts["finetune"]) > 1}
    if references:
        groups[ALL] = [_curve(material, run, "reference") for run in references.values()]
    return {name: _mean(curves) for name, curves in groups.items()}


def _curve(material: Material, run: Run, which: str) -> tuple[np.ndarray, np.ndarray]:
    curve = material.curve(run, which)
    tokens = np.cumsum([entry["tokens"] for entry in curve])
    return tokens, smooth(np.array([entry["loss"] for entry in curve]))


def _mean(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Over runs, step by step up to where the shortest ends."""
    steps = min(len(loss) for _, loss in curves)
    tokens = np.mean([tokens[:steps] for tokens, _ in curves], axis=0)
    return tokens, np.mean([loss[:steps] for _, loss in curves], axis=0)
