"""What `plan=true` shows: what is done, what is to do, and what it will take; from `run.json` files alone.

A unit that several runs of a sweep want is made by the first of them and `shared` by the others, so that a total
counts it once.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gradsift.cost import duration
from gradsift.planning import DONE, TO_DO, Planner
from gradsift.report.tables import with_settings

RUN_FILE = "run.json"
SHARED = "shared"
AT_MOST = "to do, at most"
Run = Mapping[str, Any]
PlannedUnit = Mapping[str, Any]  # as `gradsift.planning.Unit` has it


def write_plan(folder: Path, about: Mapping[str, Any], planner: Planner, ends: str | None) -> None:
    """`run.json` of a run that was only planned.

    Args:
        ends: why the plan goes no further; None where it reaches the end of the line.
    """
    place = next(parent for parent in (planner.store.absolute(), *planner.store.absolute().parents) if parent.is_dir())
    content = {
        "status": "planned",
        **about,
        "stages": [],
        "pws": None,
        "plan": planner.units_as_dicts(),
        "plan_ends": ends,
        "free_bytes": shutil.disk_usage(place).free,
    }
    (folder / RUN_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def states(runs: Sequence[Run]) -> list[list[tuple[PlannedUnit, str]]]:
    """Each run's units with their state: DONE, TO_DO, AT_MOST or SHARED; the runs in the order of their jobs."""
    promised: set[str] = set()

    def state(unit: PlannedUnit) -> str:
        if unit["state"] == DONE:
            return DONE
        if unit["fingerprint"] in promised:
            return SHARED
        promised.add(unit["fingerprint"])
        return TO_DO if unit["certain"] else AT_MOST

    return [[(unit, state(unit)) for unit in run["plan"]] for run in runs]


def to_do(runs: Sequence[Run]) -> list[PlannedUnit]:
    """What is to be made, each unit once."""
    return [unit for units in states(runs) for unit, state in units if state in (TO_DO, AT_MOST)]


def plan_table(run: Run) -> Table:
    """A line for each unit of one run."""
    table = _table("Plan", ("stage", "unit", "state"), ("time", "disk", "judge calls"))
    for unit, state in states([run])[0]:
        shown = _estimates([unit]) if state != DONE else ("", "", "")
        table.add_row(unit["name"], Text(Path(unit["artifact"]).name), state, *shown)
    return table


def jobs_table(runs: Sequence[Run]) -> Table:
    """A line for each job of a sweep: the stages that it finds done, that an earlier job makes, that it makes."""
    table = _table("Plan by job", ("job", "settings", "done", "shared", "to do"), ())
    named = with_settings(runs, told_apart=())
    for number, (run, units) in enumerate(zip(named, states(runs), strict=True), start=1):
        by_state = [_stages(units, wanted) for wanted in ((DONE,), (SHARED,), (TO_DO, AT_MOST))]
        table.add_row(str(number), Text(run["settings"]), *by_state)
    return table


def _stages(units: Sequence[tuple[PlannedUnit, str]], wanted: Sequence[str]) -> str:
    counts = Counter(unit["name"] for unit, state in units if state in wanted)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items()) or "-"


def stages_table(runs: Sequence[Run]) -> Table:
    """A line for each stage of a sweep, each unit once, and one for all of them."""
    table = _table("Plan by stage", ("stage",), ("done", "to do", "at most", "shared", "time", "disk", "judge calls"))
    everything = [pair for units in states(runs) for pair in units]
    names = dict.fromkeys(unit["name"] for unit, _ in everything)
    for name in (*names, None):
        ours = [pair for pair in everything if name in (None, pair[0]["name"])]
        done = {unit["fingerprint"] for unit, state in ours if state == DONE}
        counts = Counter(state for _, state in ours)
        estimates = _estimates([unit for unit, state in ours if state in (TO_DO, AT_MOST)])
        shown = [len(done), *(counts[state] for state in (TO_DO, AT_MOST, SHARED))]
        table.add_row(name or "all", *(f"{count:,}" for count in shown), *estimates)
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _estimates(units: Sequence[PlannedUnit]) -> tuple[str, str, str]:
    """Time, disk and the judge's calls of what is to do; `?` for what nothing is known of."""
    if not units:
        return "", "", ""
    calls = sum(unit["calls"] for unit in units)
    return (
        _sum([unit["seconds"] for unit in units], duration),
        _sum([unit["bytes"] for unit in units], volume),
        f"{calls:,}" if calls else "",
    )


def _sum(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "?"
    return show(sum(known)) + (" + ?" if len(known) < len(values) else "")


def volume(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def plan_lines(runs: Sequence[Run]) -> list[str]:
    """The plan of a run or of all jobs of a sweep in words."""
    return list(_lines(runs))


def _lines(runs: Sequence[Run]) -> Iterator[str]:
    pairs = [pair for units in states(runs) for pair in units]
    units = to_do(runs)
    done = len({unit["fingerprint"] for unit, state in pairs if state == DONE})
    open_ = sum(not unit["certain"] for unit in units)
    coincide = f", {open_:,} of them at most: selections that agree share one finetune" if open_ else ""
    yield f"plan: {done:,} units done, {len(units):,} to do{coincide}"
    if not units:
        return
    unknown = sum(unit["seconds"] is None for unit in units)
    time, disk, calls = _estimates(units)
    peaks = [unit["peak_gb"] for unit in units if unit["peak_gb"] is not None]
    memory = f"{max(peaks):.1f} GB" if peaks else "?"
    yield f"estimates: time {time}, disk {disk}, peak memory {memory}, judge calls {calls or 'none'}"
    if unknown:
        yield f"?: {unknown:,} units are like none in the store, so what they take is not known"
    needed, free = sum(unit["bytes"] or 0 for unit in units), min(run["free_bytes"] for run in runs)
    if needed > free:
        yield f"warning: the disk has {volume(free)} free; give another folder with artifacts=DIR, or free this one"
    yield from dict.fromkeys(f"the plan ends early: {run['plan_ends']}" for run in runs if run["plan_ends"])
    yield "nothing was made; the same command without plan=true does it"
