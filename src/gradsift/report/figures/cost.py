"""What the work took: time, tokens and memory by stage, and what was reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsift.artifacts import Artifact
from gradsift.report.figures.entry import report_figure
from gradsift.report.figures.style import BAR, COLOURS, HATCHES, NEUTRAL, Style, legend, name_rows, panels
from gradsift.report.material import Material, Missing
from gradsift.training.curves import CURVE_FILE, read_curve


@dataclass
class StageCost:
    """The cost of one stage over all runs of the folder."""

    made: int = 0  # units of work that these runs did
    reused: int = 0  # times that a run found a unit done
    seconds: float = 0.0  # spent on units that were made
    saved: float = 0.0  # seconds that a reused unit took when it was made, for each reuse
    tokens: int = 0  # forward tokens of the units that were made
    memory: float = 0.0  # GB, highest peak of the process at the end of a unit


def costs(material: Material) -> dict[str, StageCost]:
    """Return the cost of each stage, in the order of the pipeline."""
    by_stage: dict[str, StageCost] = {}
    for run in material.runs:
        artifacts = {artifact.fingerprint: artifact for group in run.artifacts.values() for artifact in group}
        for record in run.record["stages"]:
            cost = by_stage.setdefault(record["name"], StageCost())
            artifact = artifacts.get(record["fingerprint"])
            if record["reused"]:
                cost.reused += 1
                cost.saved += float(artifact.manifest["seconds"]) if artifact else 0.0
                continue
            cost.made += 1
            cost.seconds += float(record["seconds"])
            if artifact is not None:
                cost.tokens += _tokens_of(artifact)
                cost.memory = max(cost.memory, float(artifact.manifest.get("peak_resident_gb") or 0.0))
    if not by_stage:
        raise Missing("no run has finished a stage")
    return by_stage


def _tokens_of(artifact: Artifact) -> int:
    """Return the tokens that passed through a model, from the training curve if the artifact has no count."""
    counted = artifact.info.get("forward_tokens")
    if counted is not None:
        return int(counted)
    has_curve = artifact.file(CURVE_FILE).is_file()
    return int(sum(entry["tokens"] for entry in read_curve(artifact.path))) if has_curve else 0


def _records(material: Material) -> Sequence[Mapping[str, Any]]:
    return [{"stage": stage, **asdict(cost)} for stage, cost in costs(material).items()]


@report_figure("Cost", _records)
def cost(material: Material) -> Figure:
    """Seconds, units of work, tokens and memory (GB) of each stage in these runs, and the work that was reused from the
    store."""
    by_stage = costs(material)
    stages = list(by_stage.values())
    memory = [stage.memory for stage in stages]
    figure, axes = panels(4 if any(memory) else 3, width=8.6, height=1.3 + 0.24 * len(stages))
    _bars(axes[0], "seconds", [stage.seconds for stage in stages], [stage.saved for stage in stages])
    _bars(axes[1], "units of work", [stage.made for stage in stages], [stage.reused for stage in stages])
    _bars(axes[2], "tokens through a model", [stage.tokens for stage in stages])
    axes[2].xaxis.set_major_formatter(_short)
    if any(memory):  # artifacts of early versions have no record of it
        _bars(axes[3], "peak memory so far (GB)", memory)
    for panel in axes:
        name_rows(panel, list(by_stage))
        panel.locator_params(axis="x", nbins=4)
    for panel in axes[1:]:
        panel.set_yticklabels([])
    legend(figure, axes[0])
    return figure


def _bars(axes: Axes, title: str, made: Sequence[float], reused: Sequence[float] = ()) -> None:
    axes.barh(range(len(made)), made, color=COLOURS[0], label="done", **BAR)
    if reused:
        style: Style = {"color": NEUTRAL, "hatch": HATCHES[1], "label": "reused: not done again"}
        axes.barh(range(len(made)), reused, left=made, **style, **BAR)
    axes.set_title(title, fontsize=8.5)


def _short(value: float, _: object) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
