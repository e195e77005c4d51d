"""The scores over the pool: how they lie, and what they go with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AsinhLocator, NullLocator

from gradsift.report.figures.clouds import as_text, cloud, spearman
from gradsift.report.figures.groups import MOST_LINES, by_method, mean, middle_alpha, reached, standing_for
from gradsift.report.figures.style import (
    COLOURS,
    FAINT,
    HATCHES,
    INK,
    NEUTRAL,
    Looks,
    legend,
    panels,
    plain_log,
    styled,
)
from gradsift.report.material import Material, Missing, Run
from gradsift.scoring.scores import SCORED
from gradsift.selection.diagnostics import lengths

_BINS = 40
_DECADES = 20  # a range of so many interquartile ranges wants a scale that bends
_BANDS = 20  # of the ranking, in `score_length`


def score_distributions(material: Material) -> Figure:
    """A histogram a method at the middle alpha, of all scored examples and of the selected ones."""
    runs = reached(material, "select")
    scored = [run for run in runs if SCORED in material.scores(run).status]
    if not scored:
        raise Missing("no run has a scored row")
    shown = {name: group[0] for name, group in by_method(scored, middle_alpha(scored), MOST_LINES).items()}
    with styled():
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure, axes = panels(columns, rows, width=1.2 + 2.0 * columns, height=0.9 + 1.7 * rows)
        for panel, (name, run) in zip(axes, shown.items(), strict=False):
            scores = material.scores(run)
            values = scores.score[scores.status == SCORED]
            bins, width = _bins(values)
            if width is not None:
                panel.set_xscale("asinh", linear_width=width)
                panel.xaxis.set_major_locator(AsinhLocator(width, numticks=4))
                panel.xaxis.set_minor_locator(NullLocator())
            panel.hist(values, bins=bins, color=NEUTRAL, label="all rows")
            chosen = scores.score[material.selected(run)]
            panel.hist(chosen, bins=bins, color=COLOURS[1], hatch=HATCHES[1], label="selected", edgecolor=INK)
            panel.set_title(name)
            panel.locator_params(axis="y", nbins=4)
            if width is None:
                panel.locator_params(axis="x", nbins=4)
        for panel in axes[len(shown) :]:
            panel.set_visible(False)
        figure.supxlabel("score (each method's own scale)", fontsize=9)
        figure.supylabel("rows", fontsize=9)
        legend(figure, axes[0])
    return figure


def _bins(values: np.ndarray) -> tuple[list[float], float | None]:
    """Edges of the bins; even on an asinh scale where scores span decades, with that scale's linear width."""
    low, high = np.quantile(values, [0.25, 0.75])
    width = float(high - low)
    if width <= 0 or np.ptp(values) < _DECADES * width:
        return np.histogram_bin_edges(values, _BINS).tolist(), None
    first, last = (float(np.arcsinh(value / width)) for value in (values.min(), values.max()))
    edges = width * np.sinh(np.linspace(first, last, _BINS + 1))
    edges[0], edges[-1] = values.min(), values.max()  # but for rounding they are
    return edges.tolist(), width


def early_late_norms(material: Material) -> Figure:
    """G_s against G_t; below the diagonal the norm fell, which is what the score takes for learning."""
    run = standing_for(material, "statistics")
    values = material.statistics(run)
    with styled():
        figure, (axes,) = panels(width=4.8, height=4.0)
        cloud(axes, values.G_s, values.G_t, _marked(material, run, len(values.G_s)), log=True)
        both = np.concatenate([values.G_s, values.G_t])
        ends = np.nanmin(both[both > 0]), np.nanmax(both)
        axes.plot(ends, ends, color=INK, linewidth=1, linestyle=(0, (4, 2)), label="no change")
        axes.set(xlabel="mean norm at the early snapshot, $G_s$", ylabel="mean norm at the late snapshot, $G_t$")
        rose = float((values.G_t > values.G_s)[np.isfinite(values.G_s)].mean())
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.set_title(f"{run.method}: the norm rose for {rose:.0%} of the rows")
        legend(figure, axes)
    return figure


def _marked(material: Material, run: Run, count: int) -> np.ndarray | None:
    if not run.has("select"):
        return None
    marked = np.zeros(count, bool)
    marked[material.selected(run)] = True
    return marked


def score_length(material: Material) -> Figure:
    """Median response length along each method's ranking, in bands of equal size from the best to the worst."""
    runs = reached(material, "score")
    alpha = middle_alpha(runs)
    shown = by_method(runs, alpha, MOST_LINES)
    with styled():
        figure, (axes,) = panels(width=6.4, height=3.6)
        looks = Looks(shown)
        for name, group in shown.items():
            curve = np.mean([_lengths_by_rank(material, run) for run in group], axis=0)
            places = (np.arange(len(curve)) + 0.5) / len(curve)
            axes.plot(places, curve, marker=looks.marker(name), ms=4, color=looks.colour(name), label=name)
        axes.axvspan(0, alpha, color=FAINT, alpha=0.12, lw=0)
        axes.set(xlim=(0, 1), xlabel="place in the ranking, best at the left", ylabel="median response (characters)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(bottom=0)
        axes.text(alpha / 2, 1.01, f"alpha {alpha:g}", transform=axes.get_xaxis_transform(), ha="center", color=FAINT)
        legend(figure, axes)
    return figure


def _lengths_by_rank(material: Material, run: Run) -> np.ndarray:
    """Median response length (characters) in each band of the scored examples, best first."""
    scores = material.scores(run)
    scored = np.flatnonzero(scores.status == SCORED)
    if len(scored) < _BANDS:
        raise Missing(f"{run.name}: {len(scored)} scored rows are too few to look at {_BANDS} bands of them")
    order = scored[np.argsort(-scores.score[scored], kind="stable")]
    response = lengths(material.examples_file(run))["response_characters"]
    return np.array([np.median(response[band]) for band in np.array_split(order, _BANDS)])


def variance_and_loss(material: Material) -> Figure:
    """V_t against the late loss, example by example; and of whole selections, their mean V_t against held-out loss."""
    run = standing_for(material, "statistics")
    values = material.statistics(run)
    points = selections_by_variance(material, values.V_t, run)
    with styled():
        panel_count = 2 if len(points) > 1 else 1
        figure, axes = panels(panel_count, width=1.2 + 3.0 * panel_count, height=3.5)
        cloud(axes[0], values.loss_t, values.V_t, _marked(material, run, len(values.V_t)), log=True)
        axes[0].set(xlabel="late loss (nats a token)", ylabel="variance over members, $V_t$")
        axes[0].set_title(as_text(spearman(values.loss_t, values.V_t)))
        if len(points) > 1:
            _selections(axes[1], points)
        for panel in axes:
            plain_log(panel.xaxis)
        plain_log(axes[0].yaxis)
        legend(figure, *axes)
    return figure


def _selections(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """A point a run that selected from the same data: its selection's mean V_t, and the tuned target's loss."""
    looks = Looks(name for name, _, _ in points)
    for name in dict.fromkeys(name for name, _, _ in points):
        theirs = [(v, loss) for other, v, loss in points if other == name]
        axes.plot(*zip(*theirs, strict=True), looks.marker(name), ms=6, color=looks.colour(name), label=name)
    x, y = (np.array([point[i] for point in points]) for i in (1, 2))
    axes.set(xscale="log", xlabel="mean $V_t$ of the selection", ylabel="held-out loss (nats a token)")
    axes.set_title(as_text(spearman(x, y)))


def selections_by_variance(material: Material, variance: np.ndarray, of: Run) -> list[tuple[str, float, float]]:
    """Method, mean V_t of its selection under the ensemble of the run `of`, and held-out loss, run by run."""
    points = []
    for run in material.runs:
        loss = (run.record.get("heldout_loss") or {}).get("model")
        if run.data == of.data and run.has("select") and not run.is_full and loss is not None:
            level = mean([float(v) for v in variance[material.selected(run)] if np.isfinite(v)])
            if level is not None and level > 0:
                points.append((run.method, level, float(loss)))
    return points
