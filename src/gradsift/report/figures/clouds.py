"""Many examples in one panel, small however many there are: points, or counts in hexagons beyond some thousands."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from gradsift.report.figures.style import COLOURS

MOST_POINTS = 1500
_CLOUD = "#7d8296"
_GREYS = LinearSegmentedColormap.from_list("counts", ["#c9ccd6", "#4a5068"])  # seen on white and on black


def cloud(axes: Axes, x: np.ndarray, y: np.ndarray, marked: np.ndarray | None = None, log: bool = False) -> None:
    """All examples in grey, the marked ones (N,) bool on top in colour; only what is finite, and positive if `log`."""
    usable = np.isfinite(x) & np.isfinite(y) & ((x > 0) & (y > 0) if log else True)
    if log:
        axes.set(xscale="log", yscale="log")
    _draw(axes, x[usable], y[usable], log)
    if marked is not None:
        chosen = np.flatnonzero(usable & marked)
        shown = thinned(chosen, MOST_POINTS)
        label = "selected" if len(shown) == len(chosen) else f"selected ({len(shown):,} of {len(chosen):,})"
        axes.plot(x[shown], y[shown], "s", ms=3.2, mec="none", color=COLOURS[1], alpha=0.8, label=label)


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, log: bool) -> None:
    if len(x) <= MOST_POINTS:
        axes.plot(x, y, "o", ms=2.6, mec="none", color=_CLOUD, alpha=0.7, label="all rows")
        return
    scale: dict[str, Any] = {"xscale": "log", "yscale": "log"} if log else {}
    axes.hexbin(x, y, gridsize=(48, 30), mincnt=1, bins="log", cmap=_GREYS, linewidths=0, **scale)
    axes.plot([], [], "h", ms=7, mec="none", color=_CLOUD, label="all rows, darker where there are more")


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the values, drawn alike each time, in their order."""
    if len(values) <= most:
        return values
    kept = np.random.default_rng(0).choice(len(values), most, replace=False)
    thin: np.ndarray = values[np.sort(kept)]
    return thin


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Rank correlation over what is finite in both; None where there is none."""
    from scipy.stats import spearmanr

    usable = np.isfinite(x) & np.isfinite(y)
    if usable.sum() < 2 or np.ptp(x[usable]) == 0 or np.ptp(y[usable]) == 0:
        return None
    return float(spearmanr(x[usable], y[usable]).statistic)


def as_text(correlation: float | None) -> str:
    return (
        "rank correlation not defined"
        if correlation is None
        else f"rank correlation {round(correlation, 2) + 0.0:+.2f}"
    )
