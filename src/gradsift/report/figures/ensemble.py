"""Do the members part? The ways of their adapters through training (the paper's Fig. 1), and signs of a collapse."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.gradients.diagnostics import LEAST_ADAPTER_SPREAD, LEAST_NORM_SPREAD
from gradsift.report.figures.convergence import smooth
from gradsift.report.figures.groups import standing_for
from gradsift.report.figures.style import COLOURS, INK, Looks, legend, panels, styled
from gradsift.report.material import Material, Missing, Run

_BOUND: dict[str, Any] = {"color": COLOURS[1], "linestyle": (0, (4, 2))}
Ways = list[tuple[np.ndarray, np.ndarray]]  # of each member: steps (P,) and points (P, D)


def trajectories_pca(material: Material) -> Figure:
    """The members' updates over training in their two main directions: distances are kept as far as two can."""
    run, ways = _ways(material)
    flat, shares = principal(np.concatenate([points for _, points in ways]))
    labels = tuple(f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    return _drawn(run, ways, flat, labels)


def trajectories_tsne(material: Material) -> Figure:
    """The same by t-SNE, as the paper shows it: neighbours are kept, distances between groups mean nothing."""
    from sklearn.manifold import TSNE

    run, ways = _ways(material)
    points = np.concatenate([points for _, points in ways])
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points.astype(np.float64))
    return _drawn(run, ways, flat, ("t-SNE 1", "t-SNE 2"))


def principal(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (P, 2) in the two main directions, their signs set, and the share of the variance of each."""
    centred = points.astype(np.float64) - points.mean(0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    flat = left[:, :2] * size[:2]
    flat *= np.where(flat[np.abs(flat).argmax(0), [0, 1]] < 0, -1, 1)  # an SVD leaves the sign open
    return flat, size[:2] ** 2 / max(float((size**2).sum()), 1e-30)


def _ways(material: Material) -> tuple[Run, Ways]:
    run = standing_for(material, "member")
    ways = material.trajectories(run)
    if len(ways) * len(ways[0][0]) < 4:
        raise Missing(f"{run.name}: the adapters were noted at too few steps to draw their ways")
    return run, ways


def _drawn(run: Run, ways: Ways, flat: np.ndarray, labels: tuple[str, ...]) -> Figure:
    names = [f"member {number}" for number in range(len(ways))]
    with styled():
        figure, (axes,) = panels(width=5.2, height=4.2)
        looks = Looks(names)
        start = 0
        for name, (steps, _) in zip(names, ways, strict=True):
            x, y = flat[start : start + len(steps)].T
            start += len(steps)
            axes.plot(x, y, color=looks.colour(name), linewidth=1, alpha=0.7)
            axes.scatter(x, y, s=np.linspace(6, 34, len(x)), color=looks.colour(name), marker=looks.marker(name), lw=0)
            axes.plot(x[:1], y[:1], "o", ms=6, mfc="none", mec=INK)
            axes.plot(x[-1:], y[-1:], looks.marker(name), ms=8, color=looks.colour(name), mec=INK, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(f"{run.name}: {ways[0][0][-1]:,} steps, larger marks later")
        legend(figure, axes)
    return figure


def spread_over_steps(ways: Ways) -> tuple[np.ndarray, np.ndarray]:
    """Steps (P,) and the mean distance of two members' updates over the mean norm of an update; NaN before any."""
    points = np.stack([points for _, points in ways]).astype(np.float64)  # (M, P, D)
    first, second = np.triu_indices(len(points), k=1)
    between = np.linalg.norm(points[first] - points[second], axis=2).mean(0)
    norm = np.linalg.norm(points, axis=2).mean(0)
    spread = np.divide(between, norm, out=np.full(len(norm), np.nan), where=norm > 0)
    return ways[0][0], spread


def collapse(material: Material) -> Figure:
    """How far the members lie apart while they train, and how much their gradient norms of an example vary."""
    run = standing_for(material, "statistics")
    values = material.statistics(run)
    with styled():
        figure, (left, right) = panels(2, height=3.3)
        _spread(material, run, left)
        moved = values.G_t > 0
        variation = np.sqrt(values.V_t[moved]) / values.G_t[moved]
        right.hist(variation, bins=40, color=COLOURS[0])
        middle = float(np.median(variation))
        right.axvline(middle, color=INK, linewidth=1.2, label=f"median {middle:.3f}")
        right.axvline(
            LEAST_NORM_SPREAD, color=COLOURS[1], linestyle=(0, (4, 2)), label=f"collapsed below {LEAST_NORM_SPREAD}"
        )
        right.set(xlabel="$V_t^{1/2} / G_t$ of an example", ylabel="examples", xlim=(0, None))
        right.set_title("spread of the gradient norms")
        right.legend()
    return figure


def _spread(material: Material, run: Run, axes: Axes) -> None:
    try:
        ways = material.trajectories(run)
    except Missing:
        ways = []
    if len(ways) < 2:
        axes.set_visible(False)
        return
    steps, spread = spread_over_steps(ways)
    axes.plot(steps, spread, marker="o", ms=3.5, color=COLOURS[0])
    axes.axhline(
        LEAST_ADAPTER_SPREAD, color=COLOURS[1], linestyle=(0, (4, 2)), label=f"collapsed below {LEAST_ADAPTER_SPREAD}"
    )
    axes.axhline(2**0.5, color=INK, linewidth=1, linestyle=(0, (1, 1.5)), label="unrelated members")
    axes.set(xlabel="optimiser steps", ylabel="distance / norm", ylim=(0, 1.6))
    axes.set_title("distance of two members' updates")
    axes.legend(loc="lower right")


def training_loss(material: Material) -> Figure:
    """Each member's training loss over its epochs."""
    run = standing_for(material, "member")
    curves = material.member_curves(run)
    with styled():
        figure, (axes,) = panels(width=5.6, height=3.2)
        looks = Looks(f"member {number}" for number in range(len(curves)))
        for number, curve in enumerate(curves):
            name = f"member {number}"
            loss = smooth(np.array([entry["loss"] for entry in curve]))
            keep = np.unique(np.linspace(0, len(loss) - 1, min(400, len(loss))).astype(int))
            axes.plot(keep + 1, loss[keep], color=looks.colour(name), linestyle=looks.dash(name), label=name)
        axes.set(xlabel="optimiser steps", ylabel="training loss (nats a token)")
        axes.set_title(run.name)
        legend(figure, axes)
    return figure
