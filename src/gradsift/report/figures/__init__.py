"""Every figure of the report, one function each: `draw(material)` gives a matplotlib `Figure` or raises `Missing`.

In a notebook:

    from gradsift.report.figures import selection
    from gradsift.report.material import read
    selection.overlap(read(Path("multirun/DATE/TIME")))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from gradsift.report.figures import convergence, selection
from gradsift.report.figures.style import Format, save
from gradsift.report.material import Material, Missing

__all__ = ["FIGURES", "Entry", "write_figures"]


class Entry(NamedTuple):
    """A figure of the report."""

    name: str  # of its files
    title: str
    caption: str  # one sentence: how to read it
    draw: Callable[[Material], Figure]  # raises Missing


FIGURES = (
    Entry(
        "convergence",
        "Convergence",
        "Training loss of the target on each method's selection; at equal tokens the lower line learns faster.",
        convergence.convergence,
    ),
    Entry(
        "overlap",
        "Overlap of the selections",
        "Share of examples that two methods have in common (Jaccard); random selections share alpha / (2 - alpha).",
        selection.overlap,
    ),
)


def write_figures(material: Material, folder: Path, formats: Iterable[Format] = ("png", "svg")) -> dict[str, str]:
    """Write each figure as `<name>.<format>`.

    Returns:
        The reasons of those that could not be drawn, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for entry in FIGURES:
        try:
            figure = entry.draw(material)
        except Missing as reason:
            reasons[entry.name] = str(reason)
            continue
        for form in formats:
            save(figure, folder / f"{entry.name}.{form}", form)
    return reasons
