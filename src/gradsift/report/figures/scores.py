"""Figures of the scores and the ensemble's statistics over the pool: distributions and correlations."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import AsinhLocator, NullLocator

from gradsift.data.load import EXAMPLES_FILE
from gradsift.report.figures import groups, style
from gradsift.report.figures.style import Style, report_figure
from gradsift.report.material import Material, Missing, Run
from gradsift.report.run_tables import mean
from gradsift.scoring.scores import SCORED
from gradsift.selection.checks import lengths
from gradsift.selection.choice import best_first

MOST_POINTS = 1500  # points of a scatter plot; a larger pool is drawn as hexagons of counts
_CLOUD = "#7d8296"
_GREYS = LinearSegmentedColormap.from_list("counts", ["#c9ccd6", "#4a5068"])  # visible on white and on black
_BINS = 40
_WIDE = 20  # interquartile ranges; scores that span at least so many are drawn on an asinh scale
_BANDS = 20  # number of bands of the ranking in `score_length`


@report_figure("selection", "Score distributions")
def score_distributions(material: Material) -> Figure:
    """Histograms of the scores: all scored rows in grey, and the selected rows in colour. Each method has its own
    horizontal scale. If a method's scores have a wide range, the scale is linear around zero and logarithmic far from
    zero. The figure shows at most eight methods."""
    scored = [run for run in groups.reached(material, "select") if SCORED in material.scores(run).status]
    if not scored:
        raise Missing("no run has a scored row")
    by_method = groups.by_method(scored, groups.middle_alpha(scored), groups.MOST_LINES)
    shown = {name: runs[0] for name, runs in by_method.items()}
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = style.panels(columns, rows, width=1.2 + 2.0 * columns, height=0.9 + 1.7 * rows)
    for panel, (name, run) in zip(axes, shown.items(), strict=False):
        scores = material.scores(run)
        values = scores.score[scores.status == SCORED]
        bins, width = _bins(values)
        if width is not None:
            panel.set_xscale("asinh", linear_width=width)
            panel.xaxis.set_major_locator(AsinhLocator(width, numticks=3))
            panel.xaxis.set_minor_locator(NullLocator())
        panel.hist(values, bins=bins, color=style.NEUTRAL, label="all rows")
        options: Style = {"color": style.COLOURS[1], "hatch": style.HATCHES[1], "edgecolor": style.INK}
        panel.hist(scores.score[material.selected(run)], bins=bins, label="selected", **options)
        panel.set_title(fill(name, 22))
        panel.locator_params(axis="y" if width is not None else "both", nbins=4)
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    for panel in axes[max(0, len(shown) - columns) : len(shown)]:  # figure.supxlabel would overlap the legend
        panel.set_xlabel("score")
    figure.supylabel("rows", fontsize=9)
    return figure


def _bins(values: np.ndarray) -> tuple[list[float], float | None]:
    """Return the edges of the bins, and the `linear_width` of matplotlib's asinh scale (None for a linear scale)."""
    low, high = np.quantile(values, [0.25, 0.75])
    width = float(high - low)
    if width <= 0 or np.ptp(values) < _WIDE * width:
        return np.histogram_bin_edges(values, _BINS).tolist(), None
    first, last = (float(np.arcsinh(value / width)) for value in (values.min(), values.max()))
    edges = width * np.sinh(np.linspace(first, last, _BINS + 1))
    edges[0], edges[-1] = values.min(), values.max()  # rounding may have moved the outer edges inward
    return edges.tolist(), width


@report_figure("selection", "Early against late gradient norms")
def early_late_norms(material: Material) -> Figure:
    """Gradient norm of each row at the early and at the late snapshot, averaged over the members. The rows below the
    dashed diagonal are those whose norm fell between the snapshots. G-SNR treats such a fall as learning."""
    run = groups.representative(material, "statistics")
    values = material.statistics(run)
    figure, (axes,) = style.panels(width=4.8, height=4.0)
    cloud(axes, values.G_s, values.G_t, _chosen(material, run))
    both = np.concatenate([values.G_s, values.G_t])
    ends = np.nanmin(both[both > 0]), np.nanmax(both)
    axes.plot(ends, ends, color=style.INK, **style.DASHED, label="no change")
    axes.set(xlabel="mean norm at the early snapshot, $G_s$", ylabel="mean norm at the late snapshot, $G_t$")
    rose = float((values.G_t > values.G_s)[np.isfinite(values.G_s)].mean())
    style.plain_log(axes.xaxis, axes.yaxis)
    axes.set_title(f"{run.method}\nthe norm rose for {rose:.0%} of the rows")
    return figure


def _chosen(material: Material, run: Run) -> np.ndarray | None:
    return material.selected(run) if run.has("select") else None


@report_figure("selection", "Score against response length")
def score_length(material: Material) -> Figure:
    """Each ranking is divided into bands of equal size, with the best rows at the left, and each mark shows the median
    response length in one band. If a method's line is much higher or lower at the left end than elsewhere, the method
    selects by length. The figure shows at most eight methods."""
    runs = groups.reached(material, "score")
    alpha = groups.middle_alpha(runs)
    shown = groups.by_method(runs, alpha, groups.MOST_LINES)
    figure, (axes,) = style.panels(width=5.4, height=3.4)
    for (name, group), look in zip(shown.items(), style.looks_of(shown).values(), strict=True):
        curve = np.mean([_lengths_by_rank(material, run) for run in group], axis=0)
        places = (np.arange(len(curve)) + 0.5) / len(curve)
        axes.plot(places, curve, marker=look.marker, ms=4, color=look.colour, label=name)
    axes.axvspan(0, alpha, color=style.FAINT, alpha=0.12, lw=0)
    axes.text(alpha / 2, 1.01, f"alpha {alpha:g}", transform=axes.get_xaxis_transform(), ha="center", color=style.FAINT)
    axes.set(xlim=(0, 1), xlabel="place in the ranking, best at the left", ylabel="median response (characters)")
    axes.set_ylim(bottom=0)
    style.in_percent(axes.xaxis)
    return figure


def _lengths_by_rank(material: Material, run: Run) -> np.ndarray:
    """Return the median response length in characters in each band of the ranking, shape (_BANDS,)."""
    order = best_first(material.scores(run))
    if len(order) < _BANDS:
        raise Missing(f"{run.name}: {len(order)} scored rows are too few for {_BANDS} bands")
    response = lengths(run.one("load").file(EXAMPLES_FILE))["response_characters"]
    return np.array([np.median(response[band]) for band in np.array_split(order, _BANDS)])


@report_figure("selection", "Variance of the norms and loss")
def variance_and_loss(material: Material) -> Figure:
    """The left panel shows each row's loss and the variance of its gradient norm over the members, both at the late
    snapshot. If several selections have a held-out loss, the right panel shows for each of them the mean of this
    variance over the selected rows and the held-out loss of the target tuned on these rows."""
    run = groups.representative(material, "statistics")
    values = material.statistics(run)
    points = selections_by_variance(material, values.V_t, run)
    panel_count = 2 if len(points) > 1 else 1
    figure, axes = style.panels(panel_count, width=1.0 + 2.7 * panel_count, height=3.5)
    cloud(axes[0], values.loss_t, values.V_t, _chosen(material, run))
    axes[0].set(xlabel="late loss (nats a token)", ylabel="variance over members, $V_t$")
    axes[0].set_title(as_text(groups.spearman(values.loss_t, values.V_t)))
    if len(points) > 1:
        names, variance, loss = (np.array(column) for column in zip(*points, strict=True))
        for name, look in style.looks_of(names.tolist()).items():
            own = names == name
            axes[1].plot(variance[own], loss[own], look.marker, ms=6, color=look.colour, label=name)
        axes[1].set(xscale="log", xlabel="mean $V_t$ of the selection", ylabel="held-out loss (nats a token)")
        axes[1].set_title(as_text(groups.spearman(variance, loss)))
    style.plain_log(axes[0].yaxis, *(panel.xaxis for panel in axes))
    return figure


def selections_by_variance(material: Material, variance: np.ndarray, of: Run) -> list[tuple[str, float, float]]:
    """Return (method, mean V_t of the selection, held-out loss) for each run that has the same data as the run `of`.

    Full-data runs and runs without a selection or a held-out loss are left out. `variance` (N,) is V_t: for each
    example, the variance of its late gradient norm over the members of `of`.
    """
    points = []
    for run in material.runs:
        loss = groups.heldout_loss(run)
        if run.data == of.data and run.has("select") and not run.is_full and loss is not None:
            level = mean([float(v) for v in variance[material.selected(run)] if np.isfinite(v)])
            if level is not None and level > 0:
                points.append((run.method, level, float(loss)))
    return points


def cloud(axes: Axes, x: np.ndarray, y: np.ndarray, chosen: np.ndarray | None) -> None:
    """Draw all examples in grey on logarithmic axes, and the chosen ones on top in colour.

    Args:
        x, y: (N,) coordinates of the examples. Examples with a coordinate that is not finite and positive are left out.
        chosen: positions of the chosen examples; None to draw all examples in grey only.
    """
    usable = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    scale: Style = {"xscale": "log", "yscale": "log"}
    axes.set(**scale)
    if usable.sum() <= MOST_POINTS:
        axes.plot(x[usable], y[usable], "o", ms=2.6, mec="none", color=_CLOUD, alpha=0.7, label="all rows")
    else:
        options: Style = {"gridsize": (48, 30), "mincnt": 1, "bins": "log", "cmap": _GREYS, "linewidths": 0}
        axes.hexbin(x[usable], y[usable], **options, **scale)
        axes.plot([], [], "h", ms=7, mec="none", color=_CLOUD, label="all rows, darker where there are more")
    if chosen is not None:
        drawable = np.sort(chosen[usable[chosen]])
        shown = drawable
        if len(drawable) > MOST_POINTS:
            shown = np.sort(np.random.default_rng(0).choice(drawable, MOST_POINTS, replace=False))
        label = "selected" if len(shown) == len(drawable) else f"selected ({len(shown):,} of {len(drawable):,})"
        axes.plot(x[shown], y[shown], "s", ms=3.2, mec="none", color=style.COLOURS[1], alpha=0.8, label=label)


def as_text(correlation: float | None) -> str:
    if correlation is None:
        return "rank correlation not defined"
    return f"rank correlation {round(correlation, 2) + 0.0:+.2f}"  # + 0.0: no "-0.00"
