"""Figures of the training of the target (the paper's Fig. 3) and of the ensemble's members (the paper's Fig. 1)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.gradients.ensemble_checks import LEAST_ADAPTER_SPREAD, LEAST_NORM_SPREAD
from gradsift.report.figures import groups, style
from gradsift.report.figures.style import Records, Style, report_figure
from gradsift.report.material import Material, Missing, Run
from gradsift.report.run_tables import grouped
from gradsift.training.optimization import read_curve

ALL = "all rows"
_MOST_POINTS = 400  # points drawn for a line
_SMOOTHED = 0.05  # share of the steps that a running mean spans
_BOUND: Style = {"color": style.COLOURS[1], **style.DASHED}
Trajectories = list[tuple[np.ndarray, np.ndarray]]  # for each member: steps (P,) and points (P, D)


def smooth(values: np.ndarray, share: float = _SMOOTHED) -> np.ndarray:
    """Return the running mean of the values; the window spans the fraction `share` of them, and fewer near the ends."""
    window = np.ones(2 * int(len(values) * share / 2) + 1)
    sums, counts = (np.convolve(each, window, mode="same") for each in (values, np.ones(len(values))))
    mean: np.ndarray = sums / counts
    return mean


def shown_steps(loss: np.ndarray) -> np.ndarray:
    """Return the indices of the steps to draw: all, or _MOST_POINTS evenly spaced steps if there are more."""
    return np.unique(np.linspace(0, len(loss) - 1, min(_MOST_POINTS, len(loss))).astype(int))


def curves(material: Material) -> Records:
    """Return, for each optimiser step, the number of tokens so far and the smoothed loss of the target.

    There are records for each method at the middle alpha (`groups.middle_alpha`) and for the training on all rows.
    The values are means over a method's runs (seeds), up to the last step of its shortest run.
    """
    runs = groups.reached(material, "finetune", but_full=False)
    by_method: dict[str, list[Any]] = {}  # for each run the loss and tokens of every optimiser step
    for method, own in groups.by_method(runs, groups.middle_alpha(runs), groups.MOST_LINES).items():
        by_method[ALL if own[0].is_full else method] = [read_curve(run.one("finetune").path) for run in own]
    references = dict.fromkeys(artifact.path for run in runs for artifact in run.artifacts["finetune"][1:2])
    if references:
        by_method[ALL] = list(map(read_curve, references))
    records = []
    for method, lines in by_method.items():
        steps = min(map(len, lines))
        tokens = np.mean([np.cumsum(style.column(line, "tokens"))[:steps] for line in lines], axis=0)
        loss = np.mean([smooth(style.column(line, "loss"))[:steps] for line in lines], axis=0)
        for step in range(steps):
            values = {"tokens": float(tokens[step]), "smoothed_loss": float(loss[step])}
            records.append({"method": method, "step": step + 1, **values})
    return records


@report_figure("convergence", "Convergence", curves)
def convergence(material: Material) -> Figure:
    """Training loss of the target on each method's selection, smoothed. At equal tokens, a lower line means that the
    target learns faster. But a line may also be low because the selected rows are easy, or high because they are noise,
    which cannot be learned. The figure shows at most eight methods."""
    figure, (by_step, by_token) = style.panels(2, width=6.4, height=3.3)
    lines = grouped(curves(material), itemgetter("method"))
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


@report_figure("ensemble", "Trajectories of the members (PCA)")
def trajectories_pca(material: Material) -> Figure:
    """Each line is the path of a member's weight update (the change of the weights since the start of training),
    projected on two principal components. All members belong to one seed. All paths start at the ringed point, and
    later steps have larger marks. If the lines diverge, the members differ; if the lines stay close together, the
    ensemble is collapsing."""
    run, trajectories = _trajectories(material)
    flat, shares = principal(np.concatenate([points for _, points in trajectories]))
    first, second = (f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    return _draw(run, trajectories, flat, first, second)


@report_figure("ensemble", "Trajectories of the members (t-SNE)")
def trajectories_tsne(material: Material) -> Figure:
    """The points of the PCA figure, projected with t-SNE as in the paper's figure. t-SNE keeps neighbours together; the
    distances between groups mean nothing."""
    from sklearn.manifold import TSNE

    run, trajectories = _trajectories(material)
    points = np.concatenate([points for _, points in trajectories])
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points.astype(np.float64))
    return _draw(run, trajectories, flat, "t-SNE 1", "t-SNE 2")


def principal(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates (P, 2) of `points` (P, D) on two principal components, and their shares of variance."""
    centred = points.astype(np.float64) - points.mean(0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    flat = left[:, :2] * size[:2]
    flat *= np.where(flat[np.abs(flat).argmax(0), [0, 1]] < 0, -1, 1)  # an SVD leaves the signs open
    return flat, size[:2] ** 2 / max(float((size**2).sum()), 1e-30)


def _trajectories(material: Material) -> tuple[Run, Trajectories]:
    run = groups.representative(material, "member")
    trajectories = material.trajectories(run)
    if len(trajectories) * len(trajectories[0][0]) < 4:
        raise Missing(f"{run.name}: the trajectories have too few points to draw")
    return run, trajectories


def _draw(run: Run, trajectories: Trajectories, flat: np.ndarray, xlabel: str, ylabel: str) -> Figure:
    """Draw a line for each member through its points, which are consecutive rows of `flat`, shape (M P, 2)."""
    figure, (axes,) = style.panels(width=5.2, height=4.2)
    looks = style.looks_of(f"member {number}" for number in range(len(trajectories)))
    for (name, look), points in zip(looks.items(), np.split(flat, len(trajectories)), strict=True):
        x, y = points.T
        axes.plot(x, y, color=look.colour, linewidth=1, alpha=0.7)
        axes.scatter(x, y, s=np.linspace(6, 34, len(x)), color=look.colour, marker=look.marker, lw=0)
        axes.plot(x[:1], y[:1], "o", ms=6, mfc="none", mec=style.INK)
        axes.plot(x[-1:], y[-1:], look.marker, ms=8, color=look.colour, mec=style.INK, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(f"{groups.named(run)}: {trajectories[0][0][-1]:,} steps")
    return figure


def spread_over_steps(trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """Return P optimiser steps (P,) and the spread of the members' updates at each of these steps (P,).

    The spread is the mean distance between two members' updates divided by the mean norm of the updates; NaN where no
    member has moved yet.
    """
    points = np.stack([points for _, points in trajectories]).astype(np.float64)  # (M, P, D)
    first, second = np.triu_indices(len(points), k=1)
    between = np.linalg.norm(points[first] - points[second], axis=2).mean(0)
    norm = np.linalg.norm(points, axis=2).mean(0)
    spread = np.divide(between, norm, out=np.full(len(norm), np.nan), where=norm > 0)
    return trajectories[0][0], spread


@report_figure("ensemble", "Collapse of the ensemble")
def collapse(material: Material) -> Figure:
    """An ensemble has collapsed if the distance of its members, or the median spread of their gradient norms, is below
    the dashed bound. Each seed has its own colour."""
    runs = groups.over_seeds_of(material, groups.representative(material, "statistics"))
    figure, (left, right) = style.panels(2, width=6.4, height=3.2)
    kind: Style = {"histtype": "step", "linewidth": 1.2} if len(runs) > 1 else {}
    for run, look in zip(runs, style.looks_of(run.name for run in runs).values(), strict=True):
        try:
            trajectories = material.trajectories(run)
        except Missing:  # the right panel may still have data
            trajectories = []
        if len(trajectories) > 1:
            left.plot(*spread_over_steps(trajectories), marker="o", ms=3, color=look.colour)
        values = material.statistics(run)
        moved = values.G_t > 0
        variation = np.sqrt(values.V_t[moved]) / values.G_t[moved]
        right.hist(variation, bins=40, color=look.colour, **kind)
        middle = float(np.median(variation))
        seed, ink = (f"{groups.seed_of(run)}: ", look.colour) if len(runs) > 1 else ("", style.INK)
        right.axvline(middle, color=ink, linewidth=1.2, label=f"{seed}median {middle:.3f}")
    if left.lines:
        left.axhline(LEAST_ADAPTER_SPREAD, **_BOUND, label=f"distance below {LEAST_ADAPTER_SPREAD}: collapsed")
        left.axhline(2**0.5, color=style.INK, **style.DOTTED, label="unrelated members")
        left.set(xlabel="optimiser steps", ylabel="distance / norm", ylim=(0, 1.6))
        left.set_title("distance of two members' updates")
    else:
        left.set_visible(False)
    right.axvline(LEAST_NORM_SPREAD, **_BOUND, label=f"spread below {LEAST_NORM_SPREAD}: collapsed")
    right.set(xlabel="$V_t^{1/2} / G_t$ of an example", ylabel="examples", xlim=(0, None))
    right.set_title("spread of the gradient norms")
    return figure


@report_figure("ensemble", "Training of the members")
def member_loss(material: Material) -> Figure:
    """Smoothed training loss of each member. If a line does not fall, the proxy does not learn, and scores from it are
    noise. With several seeds, the members of one seed share a colour."""
    runs = groups.over_seeds_of(material, groups.representative(material, "member"))
    figure, (axes,) = style.panels(width=5.2, height=3.2)
    lines = []  # (name in the legend, losses)
    for run in runs:
        for number, epochs in enumerate(material.members(run)):
            curve = [entry for artifact in epochs for entry in read_curve(artifact.path)]
            name = f"member {number}" if len(runs) == 1 else groups.seed_of(run)
            lines.append((name, smooth(style.column(curve, "loss"))))
    looks = style.looks_of(name for name, _ in lines)
    for name, loss in lines:
        look, steps = looks[name], shown_steps(loss)
        axes.plot(steps + 1, loss[steps], color=look.colour, linestyle=look.dash, label=name)
    axes.set(xlabel="optimiser steps", ylabel="training loss (nats a token)")
    axes.set_title(groups.named(runs[0]) if len(runs) == 1 else f"{runs[0].method}, {len(runs)} seeds")
    return figure
