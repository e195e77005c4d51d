"""Does a selection train the target faster? The training loss, selection by selection (the paper's Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.figures import style
from gradsift.report.figures.groups import MOST_LINES, by_method, middle_alpha, reached
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Curve, Material

ALL = "all rows"
_MOST_POINTS = 400  # of a line
_SMOOTHED = 0.05  # share of the steps that a running mean spans
Line = tuple[np.ndarray, np.ndarray]  # tokens seen so far (P,) and smoothed loss (P,), step by step


def smooth(values: np.ndarray, share: float = _SMOOTHED) -> np.ndarray:
    """Return the running mean over `share` of the values, over fewer where it would reach beyond an end."""
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    mean: np.ndarray = (total[last] - total[first]) / (last - first)
    return mean


def shown_steps(loss: np.ndarray) -> np.ndarray:
    """Return the indices of the steps that a line draws."""
    return np.unique(np.linspace(0, len(loss) - 1, min(_MOST_POINTS, len(loss))).astype(int))


def _records(material: Material) -> Records:
    return [
        {"method": method, "step": step, "tokens": float(seen), "smoothed_loss": float(level)}
        for method, (tokens, loss) in curves(material).items()
        for step, (seen, level) in enumerate(zip(tokens, loss, strict=True), start=1)
    ]


@report_figure("Convergence", _records)
def convergence(material: Material) -> Figure:
    """Training loss of the target on each method's selection, smoothed. At equal tokens the lower line learns faster,
    but a low line can also mean easy rows, and noisy rows cannot be learned. Shows at most eight methods."""
    lines = curves(material)
    figure, (by_step, by_token) = style.panels(2, height=3.4)
    for (name, (tokens, loss)), look in zip(lines.items(), style.looks_of(lines).values(), strict=True):
        options: Style = {"color": style.INK if name == ALL else look.colour, "linestyle": look.dash, "label": name}
        steps = shown_steps(loss)
        by_step.plot(steps + 1, loss[steps], **options)
        by_token.plot(tokens[steps], loss[steps], **options)
    by_step.set(xlabel="optimiser steps", ylabel="training loss (nats a token)")
    # compare at equal compute: end all lines where the shortest one ends
    by_token.set(xlabel="tokens", xlim=(0, min(tokens[-1] for tokens, _ in lines.values())))
    by_token.sharey(by_step)
    return figure


def curves(material: Material) -> dict[str, Line]:
    """Return the curve of each method at one alpha and of all rows, as means over the runs (seeds)."""
    runs = reached(material, "finetune", but_full=False)
    groups: dict[str, list[Line]] = {}
    for method, group in by_method(runs, middle_alpha(runs), MOST_LINES).items():
        groups[ALL if group[0].is_full else method] = [_line(material.curve(run)) for run in group]
    references = {run.artifacts["finetune"][1].path: run for run in runs if len(run.artifacts["finetune"]) > 1}
    if references:
        groups[ALL] = [_line(material.curve(run, reference=True)) for run in references.values()]
    return {name: _mean(lines) for name, lines in groups.items()}


def _line(curve: Curve) -> Line:
    tokens, loss = (np.array([entry[key] for entry in curve]) for key in ("tokens", "loss"))
    return np.cumsum(tokens), smooth(loss)


def _mean(lines: Sequence[Line]) -> Line:
    """Average step by step, up to where the shortest line ends."""
    steps = min(len(loss) for _, loss in lines)
    tokens, loss = (np.mean([line[part][:steps] for line in lines], axis=0) for part in (0, 1))
    return tokens, loss
