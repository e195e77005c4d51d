"""Many examples in one panel, as points, or as counts in hexagons if there are thousands, so that files stay small."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from gradsift.report.figures.style import COLOURS, Style

MOST_POINTS = 1500
_CLOUD = "#7d8296"
_GREYS = LinearSegmentedColormap.from_list("counts", ["#c9ccd6", "#4a5068"])  # visible on white and on black


def cloud(axes: Axes, x: np.ndarray, y: np.ndarray, marked: np.ndarray | None = None, log: bool = False) -> None:
    """Draw all examples in grey, and the marked ones on top in colour.

    Args:
        x, y: (N,) values. Examples that are not finite, or not positive if `log`, are left out.
        marked: (N,) bool.
    """
    usable = np.isfinite(x) & np.isfinite(y) & ((x > 0) & (y > 0) if log else True)
    scale: Style = {"xscale": "log", "yscale": "log"} if log else {}
    axes.set(**scale)
    if usable.sum() <= MOST_POINTS:
        axes.plot(x[usable], y[usable], "o", ms=2.6, mec="none", color=_CLOUD, alpha=0.7, label="all rows")
    else:
        options: Style = {"gridsize": (48, 30), "mincnt": 1, "bins": "log", "cmap": _GREYS, "linewidths": 0}
        axes.hexbin(x[usable], y[usable], **options, **scale)
        axes.plot([], [], "h", ms=7, mec="none", color=_CLOUD, label="all rows, darker where there are more")
    if marked is not None:
        chosen = np.flatnonzero(usable & marked)
        shown = thinned(chosen, MOST_POINTS)
        label = "selected" if len(shown) == len(chosen) else f"selected ({len(shown):,} of {len(chosen):,})"
        axes.plot(x[shown], y[shown], "s", ms=3.2, mec="none", color=COLOURS[1], alpha=0.8, label=label)


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the values, in their order; the draw is seeded."""
    if len(values) <= most:
        return values
    kept = np.random.default_rng(0).choice(len(values), most, replace=False)
    thin: np.ndarray = values[np.sort(kept)]
    return thin


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return the rank correlation over the entries that are finite in both; None where it is not defined."""
    from scipy.stats import spearmanr

    usable = np.isfinite(x) & np.isfinite(y)
    if usable.sum() < 2 or np.ptp(x[usable]) == 0 or np.ptp(y[usable]) == 0:
        return None
    return float(spearmanr(x[usable], y[usable]).statistic)


def as_text(correlation: float | None) -> str:
    if correlation is None:
        return "rank correlation not defined"
    return f"rank correlation {round(correlation, 2) + 0.0:+.2f}"  # + 0.0: no "-0.00"
