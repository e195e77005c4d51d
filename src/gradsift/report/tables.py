"""Tables on the terminal and as CSV, from `run.json` files alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

Run = Mapping[str, Any]


def _get(run: Run, *keys: str) -> Any:
    value: Any = run
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(value: Any, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _pws(cell: Mapping[str, Any] | None, pws: float | None) -> str:
    if cell is None or cell.get("pws") is None:
        return _number(pws)
    return f"{cell['pws']:.3f} [{cell['pws_low']:.3f}, {cell['pws_high']:.3f}]"


def _outcomes(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    invalid = f" ({cell['invalid']} invalid)" if cell["invalid"] else ""
    return f"{cell['win']}/{cell['tie']}/{cell['lose']}{invalid}"


def rows_of(run: Run) -> list[dict[str, str]]:
    """The table's rows for one run: one a benchmark, and the pooled one where there are several."""
    cells: list[tuple[str, Mapping[str, Any] | None]] = (
        list(_get(run, "benchmarks").items()) if run.get("benchmarks") else []
    )
    if len(cells) != 1:
        cells.append((("pooled" if cells else ", ".join(run.get("benchmark_sets") or [])), run.get("pooled")))
    full = run.get("scorer") == "full"
    rows = []
    for name, cell in cells:
        row = {
            "scorer": str(run.get("scorer")),
            "alpha": "all" if full else f"{run.get('alpha'):g}",
            "rows": str(_get(run, "selection", "rows") or "-"),
            "benchmark": name,
            "PWS": "1 (itself)" if full and run.get("pws") == 1 else _pws(cell, run.get("pws")),
            "win/tie/lose": _outcomes(cell),
            "accuracy": _number(_get(run, "accuracy", "model")),
            "held-out": _number(_get(run, "heldout_loss", "model")),
            "spoilt": _number(_get(run, "selection", "spoilt_share"), 2),
            "families": _number(_get(run, "selection", "families"), 1),
            "note": "" if run.get("status") == "finished" else str(run.get("error") or run.get("status")),
        }
        rows.append(row)
    return rows


def context_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Rows that every comparison needs beside it: the target before any finetuning."""
    for run in runs:
        if _get(run, "accuracy", "untuned") is not None or _get(run, "heldout_loss", "untuned") is not None:
            row = dict.fromkeys(rows_of(run)[0], "-")
            row |= {
                "scorer": "(no finetuning)",
                "accuracy": _number(_get(run, "accuracy", "untuned")),
                "held-out": _number(_get(run, "heldout_loss", "untuned")),
                "note": "",
            }
            return [row]
    return []


def pws_table(runs: Sequence[Run], title: str) -> Table:
    """The PWS table; columns without any value are left out."""
    rows = [row for run in runs for row in rows_of(run)] + context_rows(runs)
    shown = [name for name in rows[0] if any(row[name] not in ("-", "") for row in rows)]
    benchmarks = {row["benchmark"] for row in rows} - {"-"}
    if len(benchmarks) == 1:  # said once, in the title
        shown.remove("benchmark")
        title += f", benchmark {benchmarks.pop()}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in shown:
        table.add_column(
            name, justify="left" if name in ("scorer", "benchmark", "note") else "right", no_wrap=name != "note"
        )
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """The same rows as the PWS table, all columns."""
    rows = [row for run in runs for row in rows_of(run)] + context_rows(runs)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
