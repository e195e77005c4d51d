"""The figure `cost`: what each stage cost, and how much of its work was reused from the store."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gradsift.report.figures import style
from gradsift.report.figures.style import Style, report_figure
from gradsift.report.material import Material, Missing

_COLUMNS = ("made", "reused", "seconds", "saved", "tokens", "memory")


def costs(material: Material) -> dict[str, dict[str, float]]:
    """Return the cost of each stage over all runs, in the order of the pipeline.

    Returns:
        made, reused: numbers of units of work that were computed and that were taken from the store.
        seconds: time spent on the units made.
        saved: seconds that the reused units took when they were made; a unit that was reused twice counts twice.
        tokens: tokens that passed forward through a model for the units made.
        memory: the highest peak memory of the process, in GB, that is recorded for the units made; 0 without a record.
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


@report_figure("cost", "Cost", lambda material: [{"stage": stage, **cost} for stage, cost in costs(material).items()])
def cost(material: Material) -> Figure:
    """For each stage, the seconds, units of work, tokens and peak memory (GB) that these runs took, and the work that
    was reused from the store."""
    by_stage = costs(material)
    shown = [
        ("seconds", "seconds", "saved"),
        ("units of work", "made", "reused"),
        ("tokens through a model", "tokens", None),
    ]
    if any(cost["memory"] for cost in by_stage.values()):
        shown.append(("peak memory (GB)", "memory", None))
    places = range(len(by_stage))
    reuse: Style = {"color": style.NEUTRAL, "hatch": style.HATCHES[1], "label": "reused: not done again"}
    figure, axes = style.panels(len(shown), width=7.2, height=1.3 + 0.24 * len(by_stage))
    for panel, (title, done, reused) in zip(axes, shown, strict=True):
        made = [cost[done] for cost in by_stage.values()]
        panel.barh(places, made, color=style.COLOURS[0], label="done", **style.BAR)
        if reused is not None:
            panel.barh(places, [cost[reused] for cost in by_stage.values()], left=made, **reuse, **style.BAR)
        panel.set_title(title, fontsize=8.5)
        style.name_rows(panel, list(by_stage))
        panel.locator_params(axis="x", nbins=4)
    axes[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in axes[1:]:
        panel.set_yticklabels([])
    return figure
