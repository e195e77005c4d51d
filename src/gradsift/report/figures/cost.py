"""What the work took: time, tokens and memory by stage, and what was reused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.artifacts import Artifact
from gradsift.report.figures.style import COLOURS, HATCHES, INK, NEUTRAL, Look, legend, panels, styled
from gradsift.report.material import Material, Missing
from gradsift.training.curves import CURVE_FILE, read_curve


@dataclass
class StageCost:
    """Of one stage over all runs of the folder."""

    made: int = 0  # units of work that these runs did
    reused: int = 0  # times that they found one done
    seconds: float = 0.0  # spent on it
    saved: float = 0.0  # that a unit took when it was made, for each time that it was found
    tokens: int = 0  # passed through a model by the units that were made
    memory: float = 0.0  # GB, the process's peak when a unit of it ended


def costs(material: Material) -> dict[str, StageCost]:
    """By stage, in the order of the line."""
    found: dict[str, StageCost] = {}
    for run in material.runs:
        there = {artifact.fingerprint: artifact for group in run.artifacts.values() for artifact in group}
        for record in run.record["stages"]:
            cost = found.setdefault(record["name"], StageCost())
            artifact = there.get(record["fingerprint"])
            if record["reused"]:
                cost.reused += 1
                cost.saved += float(artifact.manifest["seconds"]) if artifact else 0.0
                continue
            cost.made += 1
            cost.seconds += float(record["seconds"])
            if artifact is not None:
                cost.tokens += tokens_of(artifact)
                cost.memory = max(cost.memory, float(artifact.manifest.get("peak_resident_gb") or 0.0))
    if not found:
        raise Missing("no run has finished a stage")
    return found


def tokens_of(artifact: Artifact) -> int:
    """Tokens that passed through a model: as counted, or where nothing was counted those of the training curve."""
    counted = artifact.info.get("forward_tokens")
    if counted is not None:
        return int(counted)
    if artifact.file(CURVE_FILE).is_file():
        return int(sum(entry["tokens"] for entry in read_curve(artifact.path)))
    return 0


def cost(material: Material) -> Figure:
    """Seconds, units, tokens and memory, a row for each stage."""
    found = costs(material)
    stages, all_costs = list(found), list(found.values())
    memory = [its.memory for its in all_costs]
    columns = 4 if any(memory) else 3  # artifacts of before it was recorded have none
    with styled():
        figure, axes = panels(columns, width=8.6, height=1.3 + 0.24 * len(stages))
        _bars(axes[0], [its.seconds for its in all_costs], [its.saved for its in all_costs], "seconds")
        _bars(axes[1], [its.made for its in all_costs], [its.reused for its in all_costs], "units of work")
        _bars(axes[2], [its.tokens for its in all_costs], None, "tokens through a model")
        axes[2].xaxis.set_major_formatter(_short)
        if columns == 4:
            _bars(axes[3], memory, None, "peak memory so far (GB)")
        for panel in axes:
            panel.set_yticks(range(len(stages)), stages if panel is axes[0] else [])
            panel.set_ylim(len(stages) - 0.5, -0.5)
            panel.grid(axis="y", visible=False)
            panel.locator_params(axis="x", nbins=4)
        legend(figure, axes[0])
    return figure


def _bars(axes: Axes, made: list[float] | list[int], reused: list[float] | list[int] | None, label: str) -> None:
    places = np.arange(len(made))
    axes.barh(places, made, color=COLOURS[0], edgecolor=INK, label="done", height=0.72)
    if reused is not None:
        look: Look = {"color": NEUTRAL, "hatch": HATCHES[1], "edgecolor": INK}
        axes.barh(places, reused, left=made, label="reused: not done again", height=0.72, **look)
    axes.set_title(label, fontsize=8.5)


def _short(value: float, _: object) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
