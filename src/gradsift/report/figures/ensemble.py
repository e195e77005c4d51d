"""The trajectories of the members' adapters (the paper's Fig. 1), and signs that the ensemble has collapsed."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.gradients.ensemble_checks import LEAST_ADAPTER_SPREAD, LEAST_NORM_SPREAD
from gradsift.report.figures import style
from gradsift.report.figures.convergence import shown_steps, smooth
from gradsift.report.figures.groups import named, over_seeds_of, representative, seed_of
from gradsift.report.figures.style import Style, report_figure
from gradsift.report.material import Material, Missing, Run

_BOUND: Style = {"color": style.COLOURS[1], **style.DASHED}
Trajectories = list[tuple[np.ndarray, np.ndarray]]  # for each member: steps (P,) and points (P, D)


@report_figure("Trajectories of the members (PCA)")
def trajectories_pca(material: Material) -> Figure:
    """The updates of the members of one seed while they train, projected on two principal components. All members start
    at the ringed point, and later steps have larger marks. If the lines diverge, the members differ; if they run
    together, the ensemble is collapsing."""
    run, trajectories = _trajectories(material)
    flat, shares = principal(np.concatenate([points for _, points in trajectories]))
    first, second = (f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    return _draw(run, trajectories, flat, first, second)


@report_figure("Trajectories of the members (t-SNE)")
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
    """Return the coordinates (P, 2) of `points` (P, D) on two principal components, and their variance shares."""
    centred = points.astype(np.float64) - points.mean(0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    flat = left[:, :2] * size[:2]
    flat *= np.where(flat[np.abs(flat).argmax(0), [0, 1]] < 0, -1, 1)  # an SVD leaves the signs open
    return flat, size[:2] ** 2 / max(float((size**2).sum()), 1e-30)


def _trajectories(material: Material) -> tuple[Run, Trajectories]:
    run = representative(material, "member")
    trajectories = material.trajectories(run)
    if len(trajectories) * len(trajectories[0][0]) < 4:
        raise Missing(f"{run.name}: the trajectories have too few points to draw")
    return run, trajectories


def _draw(run: Run, trajectories: Trajectories, flat: np.ndarray, xlabel: str, ylabel: str) -> Figure:
    """Draw a line for each member through its points; `flat` (M P, 2) holds all points, one member after the other."""
    figure, (axes,) = style.panels(width=5.2, height=4.2)
    looks = style.looks_of(f"member {number}" for number in range(len(trajectories)))
    ends = np.cumsum([len(steps) for steps, _ in trajectories])
    for (name, look), points in zip(looks.items(), np.split(flat, ends[:-1]), strict=True):
        x, y = points.T
        axes.plot(x, y, color=look.colour, linewidth=1, alpha=0.7)
        axes.scatter(x, y, s=np.linspace(6, 34, len(x)), color=look.colour, marker=look.marker, lw=0)
        axes.plot(x[:1], y[:1], "o", ms=6, mfc="none", mec=style.INK)
        axes.plot(x[-1:], y[-1:], look.marker, ms=8, color=look.colour, mec=style.INK, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(f"{named(run)}: {trajectories[0][0][-1]:,} steps")
    return figure


def spread_over_steps(trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (P,) and the spread (P,) of the members' updates.

    The spread is the mean distance between two members' updates divided by the mean norm of the updates; NaN where no
    member has moved yet.
    """
    points = np.stack([points for _, points in trajectories]).astype(np.float64)  # (M, P, D)
    first, second = np.triu_indices(len(points), k=1)
    between = np.linalg.norm(points[first] - points[second], axis=2).mean(0)
    norm = np.linalg.norm(points, axis=2).mean(0)
    spread = np.divide(between, norm, out=np.full(len(norm), np.nan), where=norm > 0)
    return trajectories[0][0], spread


@report_figure("Collapse of the ensemble")
def collapse(material: Material) -> Figure:
    """An ensemble has collapsed if the distance of its members, or the median spread of their gradient norms, is below
    the dashed bound. Each seed has its own colour."""
    runs = over_seeds_of(material, representative(material, "statistics"))
    figure, (left, right) = style.panels(2, width=6.4, height=3.2)
    looks = style.looks_of(run.name for run in runs)
    for run in runs:
        seed = f"{seed_of(run)}: " if len(runs) > 1 else ""
        try:
            trajectories = material.trajectories(run)
        except Missing:  # the norms may still be there
            trajectories = []
        if len(trajectories) > 1:
            steps, spread = spread_over_steps(trajectories)
            left.plot(steps, spread, marker="o", ms=3, color=looks[run.name].colour)
        values = material.statistics(run)
        moved = values.G_t > 0
        variation = np.sqrt(values.V_t[moved]) / values.G_t[moved]
        kind: Style = {"histtype": "step", "linewidth": 1.2} if len(runs) > 1 else {}
        right.hist(variation, bins=40, color=looks[run.name].colour, **kind)
        middle = float(np.median(variation))
        ink = style.INK if len(runs) == 1 else looks[run.name].colour
        right.axvline(middle, color=ink, linewidth=1.2, label=f"{seed}median {middle:.3f}")
    if left.lines:
        _draw_bounds(left)
    else:
        left.set_visible(False)
    right.axvline(
        LEAST_NORM_SPREAD, color=style.COLOURS[1], **style.DASHED, label=f"spread below {LEAST_NORM_SPREAD}: collapsed"
    )
    right.set(xlabel="$V_t^{1/2} / G_t$ of an example", ylabel="examples", xlim=(0, None))
    right.set_title("spread of the gradient norms")
    return figure


def _draw_bounds(axes: Axes) -> None:
    label = f"distance below {LEAST_ADAPTER_SPREAD}: collapsed"
    axes.axhline(LEAST_ADAPTER_SPREAD, color=style.COLOURS[1], **style.DASHED, label=label)
    axes.axhline(2**0.5, color=style.INK, **style.DOTTED, label="unrelated members")
    axes.set(xlabel="optimiser steps", ylabel="distance / norm", ylim=(0, 1.6))
    axes.set_title("distance of two members' updates")


@report_figure("Training of the members")
def member_loss(material: Material) -> Figure:
    """Smoothed training loss of each member. If a line does not fall, the proxy does not learn, and scores from it are
    noise. With several seeds, the members of one seed share a colour."""
    runs = over_seeds_of(material, representative(material, "member"))
    figure, (axes,) = style.panels(width=5.2, height=3.2)
    lines = []  # each line's name in the legend, and its losses
    for run in runs:
        for number, curve in enumerate(material.member_curves(run)):
            name = f"member {number}" if len(runs) == 1 else seed_of(run)
            lines.append((name, smooth(np.array([entry["loss"] for entry in curve]))))
    looks = style.looks_of(name for name, _ in lines)
    for name, loss in lines:
        look, steps = looks[name], shown_steps(loss)
        axes.plot(steps + 1, loss[steps], color=look.colour, linestyle=look.dash, label=name)
    axes.set(xlabel="optimiser steps", ylabel="training loss (nats a token)")
    axes.set_title(named(runs[0]) if len(runs) == 1 else f"{runs[0].method}, {len(runs)} seeds")
    return figure
