"""What runs made and what they found made: units of work, optimiser steps, forward tokens (see `gradsift.cost`).

A run counts its own; a sweep is counted from its `run.json` files alone, wherever its jobs ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gradsift.report.text_table import write_records

WORK_FILE = "work.csv"
COLUMNS = ("made", "reused", "seconds", "optimizer_steps", "forward_tokens", "saved_steps", "saved_tokens")
_HEADINGS = ("made", "reused", "seconds", "steps", "tokens", "steps reused", "tokens reused")

Work = dict[str, float]


def work_of(stages: Sequence[Mapping[str, Any]]) -> Work:
    """Totals over the `stages` of one `run.json` or of several.

    made, reused     units of work; a unit that several runs found there counts once for each of them
    seconds          spent, on finding finished work too
    optimizer_steps  taken; forward_tokens: passed
    saved_steps      what the reused units had taken when they were made, for each time; saved_tokens: likewise
    """
    total: Work = dict.fromkeys(COLUMNS, 0)
    for stage in stages:
        total["reused" if stage["reused"] else "made"] += 1
        for name in COLUMNS[2:]:
            total[name] += stage.get(name, 0)
    total["seconds"] = round(total["seconds"], 3)
    return total


def work_by_stage(runs: Sequence[Mapping[str, Any]]) -> dict[str, Work]:
    """Totals over the runs of a sweep for each stage, in the order of their first appearance, and for `all`."""
    stages = [stage for run in runs for stage in run.get("stages", [])]
    names = dict.fromkeys(stage["name"] for stage in stages)
    return {name: work_of([s for s in stages if s["name"] == name]) for name in names} | {"all": work_of(stages)}


def work_table(by_stage: Mapping[str, Work]) -> Table:
    """The table of a sweep."""
    table = Table(title="Work by stage", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, work in by_stage.items():
        table.add_row(name, *(f"{work[c]:,.1f}" if c == "seconds" else f"{work[c]:,}" for c in COLUMNS))
    return table


def write_work(path: Path, by_stage: Mapping[str, Work]) -> None:
    """`work.csv`: a line a stage, and one for all of them."""
    write_records(path, [{"stage": name, **work} for name, work in by_stage.items()])
