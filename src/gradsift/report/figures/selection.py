"""What the methods select, and by what."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.audit_tables import jaccard
from gradsift.report.figures.style import SEQUENTIAL, bars_of_cells, panels, styled
from gradsift.report.material import Material, Missing, Run

_MOST_METHODS = 24  # in one figure
_MOST_NUMBERED = 12  # methods beside which a number fits into each cell


def overlap(material: Material) -> Figure:
    """Jaccard of the methods' selections at one alpha, a mean over the datasets (seeds) that both selected from."""
    alpha, names, values = overlaps(material)
    with styled():
        figure, (axes,) = panels(width=1.8 + 0.75 * len(names), height=1.2 + 0.5 * len(names))
        axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(values if len(names) <= _MOST_NUMBERED else []):
            for column, colour in enumerate(bars_of_cells(line)):
                axes.text(column, row, f"{line[column]:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"alpha {alpha:g}")
        axes.grid(False)
    return figure


def overlaps(material: Material) -> tuple[float, list[str], np.ndarray]:
    """alpha, K methods, and (K, K) Jaccard; NaN where no dataset has both."""
    datasets = material.datasets()
    runs = [run for group in datasets.values() for run in group]
    alphas = sorted({run.alpha for run in runs})
    if not alphas:
        raise Missing("no run came as far as a selection")
    alpha = alphas[len(alphas) // 2]
    names = list(dict.fromkeys(run.method for run in runs if run.alpha == alpha))[:_MOST_METHODS]
    if len(names) < 2:
        raise Missing(f"only one method selected at alpha={alpha:g}")
    found: dict[tuple[str, str], list[float]] = {}
    for group in datasets.values():
        chosen: dict[str, Run] = {run.method: run for run in group if run.alpha == alpha and run.method in names}
        sets = {name: material.selected(run).tolist() for name, run in chosen.items()}
        for one in sets:
            for other in sets:
                found.setdefault((one, other), []).append(jaccard(sets[one], sets[other]))
    values = [[np.mean(found[one, other]) if (one, other) in found else np.nan for other in names] for one in names]
    return alpha, names, np.array(values)
