"""What a reader wants to know first: what was asked, what came out, and what to beware of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.cost import duration
from gradsift.diagnostics import DIAGNOSTICS_FILE, read_diagnostics
from gradsift.report.material import FAILED, Material, Missing, Run
from gradsift.report.notes import remarks_of_all, warnings_of
from gradsift.report.paper_tables import cells_of, count


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Note:
    """Something to beware of; `kind` is warning, failed or remark."""

    kind: str
    text: str


@dataclass(frozen=True)
class Headline:
    title: str
    asked: str
    verdicts: list[str]
    tiles: list[Tile]
    notes: list[Note]


def headline(material: Material) -> Headline:
    """The head of a report, from what the runs wrote."""
    if material.is_sweep:
        title, verdicts, tiles = _of_sweep(material)
    else:
        title, verdicts, tiles = _of_run(material.runs[0])
    return Headline(title, _asked(material), verdicts, tiles, list(_notes(material)))


def _of_sweep(material: Material) -> tuple[str, list[str], list[Tile]]:
    runs = material.runs
    known = [run for run in runs if "variant" in run.record]  # the others failed before they said what they were
    parts = [
        counted(len({run.method for run in known}), "method"),
        counted(len({run.alpha for run in known if run.record["scorer"] != "full"}), "budget"),
        counted(len({(run.record.get("data_seed"), run.record.get("seed")) for run in known}), "seed"),
    ]
    verdicts, tiles = _best(material)
    counts = {
        "did not": sum(run.status in FAILED for run in runs),
        "stopped as asked": sum(run.status == "stopped" for run in runs),
    }
    others = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    tiles += [
        Tile("runs finished", f"{len(material.finished)} of {len(runs)}", others),
        *_rows(runs),
        Tile("time", duration(sum(run.record.get("seconds", 0.0) for run in runs)), "all runs, one after the other"),
    ]
    title = counted(len(runs), "run")
    return f"{title}: {', '.join(parts)}" if known else title, verdicts, tiles


def _best(material: Material) -> tuple[list[str], list[Tile]]:
    try:
        cells = cells_of(material)
    except Missing as reason:
        return [f"There is no PWS to compare: {reason}."], []
    (place, (alpha, method)), best = max(cells.items(), key=lambda cell: float(cell[1]["pws"]))
    interval = "" if best["pws_low"] is None else f" [{best['pws_low']:.3f}, {best['pws_high']:.3f}]"
    side = "above" if best["pws"] > 1 else "below" if best["pws"] < 1 else "equal to"
    where = f" on {' / '.join(place)}" if len({place for place, _ in cells}) > 1 else ""
    verdicts = [
        f"The best cell is {method} at {100 * alpha:g} % of the rows{where}: PWS {best['pws']:.3f}{interval}, "
        f"{side} the model tuned on all rows (1)."
    ]
    tiles = [Tile("best PWS", f"{best['pws']:.3f}", f"{method} at {100 * alpha:g} %")]
    try:
        found = count(cells)
    except Missing as reason:
        return [*verdicts, f"Cells are not counted: {reason}."], tiles
    tiles.append(Tile("matches or beats", f"{found.matches_or_beats} of {found.cells}", "cells, against the baselines"))
    return [*verdicts, f"{found}."], tiles


def _of_run(run: Run) -> tuple[str, list[str], list[Tile]]:
    record = run.record
    name = "all rows" if record["scorer"] == "full" else f"{run.method} at {100 * run.alpha:g} %"
    verdicts = []
    if run.status in FAILED:
        verdicts.append(f"This run did not finish ({run.status}): {run.error}.")
    elif run.status != "finished":
        verdicts.append(f"This run ended early: {run.outcome}.")
    pooled = record.get("pooled") or {}
    tiles = []
    if record.get("pws_by_definition"):
        verdicts.append("This run keeps every row; its PWS is 1 by definition.")
    elif record.get("pws") is not None:
        low, high = pooled.get("pws_low"), pooled.get("pws_high")
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        wins = f"{pooled['win']} wins, {pooled['tie']} ties and {pooled['lose']} losses"
        verdicts.append(f"PWS {record['pws']:.3f}{interval} against the model tuned on all rows (1): {wins}.")
        tiles.append(Tile("PWS", f"{record['pws']:.3f}", f"{pooled['win']} / {pooled['tie']} / {pooled['lose']}"))
    selection, accuracy = record.get("selection") or {}, record.get("accuracy") or {}
    if "rows" in selection:
        rows = (record.get("data") or {}).get("rows")
        tiles.append(Tile("rows kept", f"{selection['rows']:,}", f"of {rows:,}" if rows else ""))
    if accuracy.get("model") is not None:
        beside = {"full data": accuracy.get("reference"), "before": accuracy.get("untuned")}
        note = ", ".join(f"{key} {value:.3f}" for key, value in beside.items() if value is not None)
        tiles.append(Tile("accuracy", f"{accuracy['model']:.3f}", note))
    if selection.get("spoilt_share") is not None:
        note = f"of all rows {selection['spoilt_share_pool']:.0%}"
        tiles.append(Tile("spoilt rows kept", f"{selection['spoilt_share']:.0%}", note))
    if "seconds" in record:
        peaks = (record.get("memory") or {}).values()
        tiles.append(Tile("time", duration(record["seconds"]), f"peak {max(peaks):.1f} GB" if peaks else ""))
    return f"One run: {name}", verdicts, tiles


def _rows(runs: Sequence[Run]) -> list[Tile]:
    sizes = sorted({run.record["data"]["rows"] for run in runs if "data" in run.record})
    if not sizes:
        return []
    return [Tile("rows to select from", f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}")]


def _asked(material: Material) -> str:
    """The settings that all runs have in common, or their different values."""
    records = [run.record for run in material.runs]
    found = []
    for key, name in (
        ("dataset", "data"),
        ("proxy", "proxy"),
        ("members", "members"),
        ("snapshots", "snapshots"),
        ("target", "target"),
        ("benchmark_sets", "benchmark"),
        ("judge", "judge"),
    ):
        values = dict.fromkeys(_plain(record[key]) for record in records if record.get(key) is not None)
        found += [f"{name} {' or '.join(values)}"] if values else []
    stages = dict.fromkeys(str(run.config["stop_after"]) for run in material.runs if run.config.get("stop_after"))
    found += [f"stopped after {' or '.join(stages)}"] if stages else []
    return "; ".join(found)


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _notes(material: Material) -> Iterator[Note]:
    runs = material.runs
    failed = [run for run in runs if run.status in FAILED]
    if failed and material.is_sweep:
        yield Note("failed", f"{len(failed)} of {len(runs)} runs did not finish; see what is missing.")
    named: dict[str, list[str]] = {}
    for run in runs:
        for name, message in warnings_of(run.record.get("diagnostics")).items():
            where = f"{run.name}: " if material.is_sweep else ""
            named.setdefault(name, []).append(where + message)
    path = material.folder / DIAGNOSTICS_FILE
    if material.is_sweep and path.is_file():
        named |= {name: [message] for name, message in warnings_of(read_diagnostics(Path(material.folder))).items()}
    for name, messages in named.items():
        others = f" ({len(messages)} of {len(runs)} runs are warned of; this is the first)" if len(messages) > 1 else ""
        yield Note("warning", f"{messages[0]} [{name}]{others}")
    for line in remarks_of_all(run.record for run in runs):
        yield Note("remark", line)


def counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
