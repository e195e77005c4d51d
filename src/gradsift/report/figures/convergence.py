"""The target's training loss on each selection, to show where the target learns faster (the paper's Fig. 3)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.figures import style
from gradsift.report.figures.groups import MOST_LINES, by_method, middle_alpha, reached
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Curve, Material

ALL = "all rows"
_MOST_POINTS = 400  # largest number of points drawn for a line
_SMOOTHED = 0.05  # share of the steps that a running mean spans


def smooth(values: np.ndarray, share: float = _SMOOTHED) -> np.ndarray:
    """Return the running mean; its window holds `share` of the values, and fewer values near the ends."""
    window = np.ones(2 * int(len(values) * share / 2) + 1)
    sums, counts = (np.convolve(each, window, mode="same") for each in (values, np.ones(len(values))))
    mean: np.ndarray = sums / counts
    return mean


def shown_steps(loss: np.ndarray) -> np.ndarray:
    """Return the indices of the steps to draw: all, or _MOST_POINTS evenly spaced ones if there are more."""
    return np.unique(np.linspace(0, len(loss) - 1, min(_MOST_POINTS, len(loss))).astype(int))


def curves(material: Material) -> Records:
    """Return the tokens so far and the smoothed loss at each step, by method at the middle alpha and for all rows.

    The values are means over the runs (seeds), up to the last step of the shortest curve.
    """
    runs = reached(material, "finetune", but_full=False)
    groups: dict[str, list[Curve]] = {}
    for method, group in by_method(runs, middle_alpha(runs), MOST_LINES).items():
        groups[ALL if group[0].is_full else method] = [material.curve(run) for run in group]
    references = {run.artifacts["finetune"][1].path: run for run in runs if len(run.artifacts["finetune"]) > 1}
    if references:
        groups[ALL] = [material.curve(run, reference=True) for run in references.values()]
    records = []
    for method, lines in groups.items():
        steps = min(map(len, lines))  # up to where the shortest curve ends
        tokens = np.mean([np.cumsum(style.column(line, "tokens"))[:steps] for line in lines], axis=0)
        loss = np.mean([smooth(style.column(line, "loss"))[:steps] for line in lines], axis=0)
        for step in range(steps):
            values = {"tokens": float(tokens[step]), "smoothed_loss": float(loss[step])}
            records.append({"method": method, "step": step + 1, **values})
    return records


@report_figure("Convergence", curves)
def convergence(material: Material) -> Figure:
    """Training loss of the target on each method's selection, smoothed. At equal tokens, a lower line means that the
    target learns faster. But a line may also be low because its rows are easy, or high because its rows are noise,
    which cannot be learned. Shows at most eight methods."""
    figure, (by_step, by_token) = style.panels(2, width=6.4, height=3.3)
    lines = style.grouped(curves(material), "method")
    for (name, steps), look in zip(lines.items(), style.looks_of(lines).values(), strict=True):
        options: Style = {"color": style.INK if name == ALL else look.colour, "linestyle": look.dash, "label": name}
        tokens, loss = style.column(steps, "tokens"), style.column(steps, "smoothed_loss")
        shown = shown_steps(loss)
        by_step.plot(shown + 1, loss[shown], **options)
        by_token.plot(tokens[shown], loss[shown], **options)
    by_step.set(xlabel="optimiser steps", ylabel="training loss (nats a token)")
    # compare at equal compute: end all lines where the shortest one ends
    by_token.set(xlabel="tokens", xlim=(0, min(steps[-1]["tokens"] for steps in lines.values())))
    by_token.sharey(by_step)
    return figure
