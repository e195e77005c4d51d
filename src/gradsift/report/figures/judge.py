"""What the judge said, and what moves it besides quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradsift.report.figures.groups import MOST_ROWS
from gradsift.report.figures.style import COLOURS, FAINT, HATCHES, INK, NEUTRAL, Look, legend, panels, styled
from gradsift.report.material import Material, Missing, Run

_OUTCOMES = {"win": COLOURS[0], "tie": NEUTRAL, "lose": COLOURS[1], "invalid": COLOURS[3]}


def judged(material: Material) -> dict[str, list[Run]]:
    """Finished runs with judgments by alpha and method, at most MOST_ROWS of them."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(material.finished, key=lambda run: run.alpha):
        label = f"{run.method}, {run.alpha:g}"
        if run.record.get("pooled") and (label in groups or len(groups) < MOST_ROWS):
            groups.setdefault(label, []).append(run)
    if not groups:
        raise Missing("no run has judgments")
    return groups


def total(runs: Sequence[Run], part: str, name: str) -> int:
    """A count of `run.json`, summed over runs."""
    return sum(int((run.record.get(part) or {}).get(name) or 0) for run in runs)


def outcomes(material: Material) -> Figure:
    """Share of the items won, tied and lost against the full-data model, and of those without a valid verdict."""
    groups = judged(material)
    with styled():
        figure, (axes,) = panels(width=7.2, height=1.1 + 0.3 * len(groups))
        start = np.zeros(len(groups))
        for name, colour in _OUTCOMES.items():
            counts = np.array([total(runs, "pooled", name) for runs in groups.values()], float)
            if name == "invalid" and not counts.any():
                continue
            shares = counts / [total(runs, "pooled", "n") for runs in groups.values()]
            hatch = HATCHES[1] if name in ("lose", "invalid") else ""
            axes.barh(
                range(len(groups)),
                shares,
                left=start,
                color=colour,
                hatch=hatch,
                edgecolor=INK,
                label=name,
                height=0.72,
            )
            for place, (share, before, count) in enumerate(zip(shares, start, counts, strict=True)):
                if share > 0.06:
                    text: Look = {"backgroundcolor": colour, "color": "#ffffff" if name != "tie" else "#000000"}
                    axes.text(before + share / 2, place, f"{count:.0f}", ha="center", va="center", fontsize=7.5, **text)
            start += shares
        _rows(axes, list(groups))
        axes.set(xlim=(0, 1), xlabel="share of the items")
        legend(figure, axes)
    return figure


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def position_bias(material: Material) -> Figure:
    """Share of the items in which the judge named the same place in both orders, by that place."""
    groups = judged(material)
    groups = {name: runs for name, runs in groups.items() if total(runs, "position_bias", "items")}
    if not groups:
        raise Missing("no item has a valid judgment in both orders")
    with styled():
        figure, (axes,) = panels(width=7.2, height=1.1 + 0.3 * len(groups))
        items = np.array([total(runs, "position_bias", "items") for runs in groups.values()])
        for sign, name, colour in ((-1, "to_first", COLOURS[0]), (1, "to_second", COLOURS[1])):
            shares = sign * np.array([total(runs, "position_bias", name) for runs in groups.values()]) / items
            label = f"flips to the {name.removeprefix('to_')} place"
            hatch = HATCHES[1] if sign > 0 else ""
            axes.barh(range(len(groups)), shares, color=colour, hatch=hatch, edgecolor=INK, label=label, height=0.72)
        for place, count in enumerate(items):
            axes.text(1.02, place, f"n={count}", va="center", color=FAINT, transform=axes.get_yaxis_transform())
        _rows(axes, list(groups))
        axes.axvline(0, color=INK, linewidth=1)
        if not any(total(runs, "position_bias", "flips") for runs in groups.values()):
            axes.set_title("no verdict changed with the order")
        most = max(0.02, *np.abs(axes.get_xlim()))
        axes.set(xlim=(-most, most), xlabel="share of the items whose\ntwo verdicts contradict each other")
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")
        legend(figure, axes)
    return figure


def length_bias(material: Material) -> Figure:
    """How often the longer answer won, over the decided items whose answers differ in length; half is no preference."""
    shares = longer_shares(judged(material))
    if not shares:
        raise Missing("no decided item has answers of different lengths")
    with styled():
        figure, (axes,) = panels(width=7.2, height=1.1 + 0.3 * len(shares))
        for place, (share, items) in enumerate(shares.values()):
            low, high = wilson(share, items)
            axes.errorbar(
                share, place, xerr=[[share - low], [high - share]], fmt="o", ms=6, color=COLOURS[0], capsize=3
            )
            axes.text(1.02, place, f"n={items}", va="center", color=FAINT, transform=axes.get_yaxis_transform())
        axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        _rows(axes, list(shares))
        axes.set(xlim=(0, 1), xlabel="share of the decided items that\nthe longer answer won (95 % interval)")
    return figure


def wilson(share: float, items: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which few items and a share of 0 or 1 leave as wide as it is."""
    z = 1.96**2 / items
    half = (z * share * (1 - share) + z * z / 4) ** 0.5
    return max(0.0, (share + z / 2 - half) / (1 + z)), min(1.0, (share + z / 2 + half) / (1 + z))


def longer_shares(groups: Mapping[str, Sequence[Run]]) -> dict[str, tuple[float, int]]:
    """Share and number of items, by method and alpha, over all seeds."""
    counts = {
        name: [total(runs, "length_bias", key) for key in ("longer_wins", "items")] for name, runs in groups.items()
    }
    return {name: (longer / items, items) for name, (longer, items) in counts.items() if items}
