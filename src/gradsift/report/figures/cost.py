"""The cost of each stage (time, units of work, tokens, memory), and the work that was reused."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gradsift.report.figures import style
from gradsift.report.figures.style import Style, report_figure
from gradsift.report.material import Material, Missing

_COLUMNS = ("made", "reused", "seconds", "saved", "tokens", "memory")


def costs(material: Material) -> dict[str, dict[str, float]]:
    """Return the cost of each stage over all runs, in the order of the pipeline.

    Returns:
        made, reused: units of work.
        seconds: time spent on the units made.
        saved: seconds that the reused units took when they were made, counted at each reuse.
        tokens: forward tokens of the units made.
        memory: highest peak memory of the process in GB, as recorded when a unit was made; 0 if unknown.
    """
    by_stage: dict[str, dict[str, float]] = {}
    for run in material.runs:
        manifests = {artifact.fingerprint: artifact.manifest for own in run.artifacts.values() for artifact in own}
        for stage in run.record["stages"]:
            cost = by_stage.setdefault(stage["name"], dict.fromkeys(_COLUMNS, 0))
            manifest = manifests.get(stage["fingerprint"], {})
            if stage["reused"]:
                cost["reused"] += 1
                cost["saved"] += float(manifest.get("seconds", 0))
            else:
                cost["made"] += 1
                cost["seconds"] += float(stage["seconds"])
                cost["tokens"] += int(stage.get("forward_tokens", 0))
                cost["memory"] = max(cost["memory"], float(manifest.get("peak_resident_gb") or 0))
    if not by_stage:
        raise Missing("no run has finished a stage")
    return by_stage


@report_figure("Cost", lambda material: [{"stage": stage, **cost} for stage, cost in costs(material).items()])
def cost(material: Material) -> Figure:
    """Seconds, units of work, tokens and memory (GB) of each stage in these runs, and the work that was reused from the
    store."""
    by_stage = costs(material)
    column = {name: [cost[name] for cost in by_stage.values()] for name in _COLUMNS}
    figure, axes = style.panels(4 if any(column["memory"]) else 3, width=7.2, height=1.3 + 0.24 * len(by_stage))
    _bars(axes[0], "seconds", column["seconds"], column["saved"])
    _bars(axes[1], "units of work", column["made"], column["reused"])
    _bars(axes[2], "tokens through a model", column["tokens"])
    axes[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    if any(column["memory"]):
        _bars(axes[3], "peak memory (GB)", column["memory"])
    for panel in axes:
        style.name_rows(panel, list(by_stage))
        panel.locator_params(axis="x", nbins=4)
    for panel in axes[1:]:
        panel.set_yticklabels([])
    return figure


def _bars(axes: Axes, title: str, made: Sequence[float], reused: Sequence[float] = ()) -> None:
    axes.barh(range(len(made)), made, color=style.COLOURS[0], label="done", **style.BAR)
    if reused:
        options: Style = {"color": style.NEUTRAL, "hatch": style.HATCHES[1], "label": "reused: not done again"}
        axes.barh(range(len(made)), reused, left=made, **options, **style.BAR)
    axes.set_title(title, fontsize=8.5)
