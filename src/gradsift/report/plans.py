"""The output of `plan=true`: which units of work are done, which are to do, and what the latter are estimated to cost.

The output is made from `run.json` files alone. If several runs of a sweep need the same unit and it is not done yet,
its state is `to do` in the first of these runs and `shared` in the later ones.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal as volume

from gradsift.cost import duration
from gradsift.planning import DONE, TO_DO, Planner
from gradsift.report.run_tables import with_settings
from gradsift.report.table import Table
from gradsift.run_folder import RUN_FILE

SHARED = "shared"
ESTIMATES = ("time", "disk", "judge calls")
Run = Mapping[str, Any]
PlannedUnit = Mapping[str, Any]  # an entry of `gradsift.planning.Planner.units`


def write_plan(
    folder: Path, about: Mapping[str, Any], planner: Planner, ends: str | None, finetunes: Mapping[str, Any] | None
) -> None:
    """Write `run.json` of a run that was only planned.

    Args:
        ends: why the plan stops before the end of the pipeline; None if it reaches the end.
        finetunes: the forecast of the finetunes, as `gradsift.forecast.forecast` returns it.
    """
    store = planner.store.absolute()
    existing = next(folder for folder in (store, *store.parents) if folder.is_dir())
    content = {
        "status": "planned",
        **about,
        "stages": [],
        "pws": None,
        "plan": list(planner.units.values()),
        "plan_ends": ends,
        "forecast": finetunes,
        "free_bytes": shutil.disk_usage(existing).free,
    }
    (folder / RUN_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def states(runs: Sequence[Run]) -> list[list[tuple[PlannedUnit, str]]]:
    """Return the units of each run, in the order of the jobs, with their state: DONE, TO_DO or SHARED."""
    of_earlier_runs: set[str] = set()
    found = []
    for run in runs:
        units = run["plan"]
        found.append([(unit, SHARED if unit["fingerprint"] in of_earlier_runs else unit["state"]) for unit in units])
        of_earlier_runs |= {unit["fingerprint"] for unit in units if unit["state"] == TO_DO}
    return found


def to_do(runs: Sequence[Run]) -> list[PlannedUnit]:
    """Return the units that are not done yet, each once."""
    return [unit for units in states(runs) for unit, state in units if state == TO_DO]


def jobs_table(runs: Sequence[Run]) -> Table:
    """Return a table with a row for each job of a sweep; the row names the stages that are done, shared or to do."""
    rows = []
    named = with_settings(runs, told_apart=())
    for number, (run, units) in enumerate(zip(named, states(runs), strict=True), start=1):
        row = [str(number), run["settings"]]
        for wanted in (DONE, SHARED, TO_DO):
            counts = Counter(unit["name"] for unit, state in units if state == wanted)
            row.append(", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items()) or "-")
        rows.append(row)
    return Table("Plan by job", ("job", "settings", "done", "shared", "to do"), rows)


def stages_table(runs: Sequence[Run]) -> Table:
    """Return a table with a row for each stage of these runs and a row for all stages.

    A unit that is done counts once, even if several runs use it. A unit that is not done counts once in `to do`, and in
    `shared` once for each later run that needs it.
    """
    rows = []
    pairs = [pair for units in states(runs) for pair in units]
    for name in (*dict.fromkeys(unit["name"] for unit, _ in pairs), None):
        chosen = [(unit, state) for unit, state in pairs if name in (None, unit["name"])]
        counts = Counter(state for _, state in chosen)
        counts[DONE] = len({unit["fingerprint"] for unit, state in chosen if state == DONE})
        shown = [f"{counts[state]:,}" for state in (DONE, TO_DO, SHARED)]
        estimates = _estimates([unit for unit, state in chosen if state == TO_DO])
        rows.append((name or "all", *shown, *estimates))
    return Table("Plan by stage", ("stage", "done", "to do", "shared", *ESTIMATES), rows)


def _estimates(units: Sequence[PlannedUnit]) -> tuple[str, str, str]:
    """Return the total time, disk space and judge calls of units as text, with `?` for unknown estimates."""
    if not units:
        return "", "", ""
    totals = []
    for key, show in (("seconds", duration), ("bytes", volume)):
        known = [unit[key] for unit in units if unit[key] is not None]
        rest = " + ?" if len(known) < len(units) else ""
        totals.append(show(sum(known)) + rest if known else "?")
    calls = sum(unit["calls"] for unit in units)
    return totals[0], totals[1], f"{calls:,}" if calls else ""


def plan_lines(runs: Sequence[Run]) -> list[str]:
    """Return the plan of a run, or of all jobs of a sweep, in words."""
    units = to_do(runs)
    done = len({unit["fingerprint"] for run in runs for unit in run["plan"] if unit["state"] == DONE})
    uncertain = sum(not unit["certain"] for unit in units)
    at_most = f", {uncertain:,} of them at most: equal selections share one finetune" if uncertain else ""
    lines = [f"plan: {done:,} units done, {len(units):,} to do{at_most}"]
    if not units:
        return lines
    time, disk, calls = _estimates(units)
    peaks = [unit["peak_gb"] for unit in units if unit["peak_gb"] is not None]
    memory = f"{max(peaks):.1f} GB" if peaks else "?"
    lines.append(f"estimates: time {time}, disk {disk}, peak memory {memory}, judge calls {calls or 'none'}")
    if unknown := sum(unit["seconds"] is None for unit in units):
        lines.append(f"?: the store has no work like {unknown:,} of the units, so no estimate is known for them")
    needed, free = sum(unit["bytes"] or 0 for unit in units), min(run["free_bytes"] for run in runs)
    if needed > free:
        lines.append(f"warning: only {volume(free)} are free on the disk; give another folder with artifacts=DIR")
    lines += dict.fromkeys(line for run in runs if run.get("forecast") for line in forecast_lines(run["forecast"]))
    lines += dict.fromkeys(f"the plan ends early: {run['plan_ends']}" for run in runs if run["plan_ends"])
    return [*lines, "nothing was made; the same command without plan=true makes it"]


def forecast_lines(forecast: Mapping[str, Any]) -> list[str]:
    """Return the forecast of a target's finetunes in words: the memory needed on each GPU, and their GPU hours."""
    target, ranks = forecast["target"], forecast["ranks"]
    active = f" ({forecast['active'] / 1e9:.1f} per token)" if forecast["active"] < forecast["parameters"] else ""
    size = f"{target}: {forecast['parameters'] / 1e9:.1f} billion parameters{active}, {forecast['precision']}"
    size += f", divided over {ranks} GPUs" if ranks > 1 else ""
    weights, adapter = forecast["weights"], forecast["adapter"]
    held = weights + adapter
    memory = f"each GPU holds {volume(weights)} of weights and {volume(adapter)} of adapter and optimizer"
    per_token = forecast["per_token"], forecast["per_token_checkpointed"]
    if None in per_token:
        memory += "; the activations per token are not known for this type of model"
    else:
        plain, checkpointed = (
            f"{each / 1e6:.1f} MB per token (with 4,096 tokens at once {volume(held + 4096 * each)} in all)"
            for each in per_token
        )
        memory += f"; activations take {plain}, with compute.checkpointing=true {checkpointed}, besides buffers"
    works = [
        f"{hours:.2g} GPU hours on {rows:,} rows ({tokens:,} tokens)"
        for rows, tokens, hours in zip(forecast["rows"], forecast["tokens"], forecast["hours"], strict=True)
    ]
    rate = "at an assumed 1e14 operations per second of a GPU"
    return [f"{size}; {memory}", f"finetunes of {target}: {', '.join(works)}, {rate}"]
