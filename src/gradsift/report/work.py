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
from gradsift.run_record import WORK_COLUMNS, Work, work_of

WORK_FILE = "work.csv"
_HEADINGS = ("made", "reused", "seconds", "steps", "tokens", "steps reused", "tokens reused")


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
        table.add_row(name, *(f"{work[c]:,.1f}" if c == "seconds" else f"{work[c]:,}" for c in WORK_COLUMNS))
    return table


def write_work(path: Path, by_stage: Mapping[str, Work]) -> None:
    """`work.csv`: a line a stage, and one for all of them."""
    write_records(path, [{"stage": name, **work} for name, work in by_stage.items()])
