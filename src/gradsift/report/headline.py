"""The first section of the report: the settings, the main results, and the warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gradsift.diagnostics import DIAGNOSTICS_FILE, read_diagnostics
from gradsift.report.material import FAILED, Material, Missing, Run
from gradsift.report.notes import AGAINST_RANDOM, remarks_of_all, warnings_of
from gradsift.report.paper_tables import cells_of, count, is_distinguishable
from gradsift.report.run_tables import COUNTS, LEVEL, Row, flat_rows, mean, pws_text
from gradsift.report.table import counted, percent

ONE_SEED = "; with one seed, the interval does not include the variation between seeds"


class Tile(NamedTuple):
    """A number in large type, with its name above and a note below it."""

    name: str
    value: str
    note: str = ""


class Note(NamedTuple):
    kind: str  # warning, failed or remark
    text: str


class Headline(NamedTuple):
    title: str
    settings: str
    verdicts: list[str]
    tiles: list[Tile]
    notes: list[Note]


def headline(material: Material) -> Headline:
    """Return the first section, made from the runs' `run.json` files and, for a sweep, its `diagnostics.json`."""
    title, verdicts, tiles = _of_sweep(material) if material.is_sweep else _of_run(material.runs[0])
    return Headline(title, _settings(material), verdicts, tiles, list(_notes(material)))


def _of_sweep(material: Material) -> tuple[str, list[str], list[Tile]]:
    runs = material.runs
    known = [run for run in runs if "variant" in run.record]  # the others failed before their settings were recorded
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
    tiles.append(Tile("runs finished", f"{len(material.finished)} of {len(runs)}", others))
    title = counted(len(runs), "run")
    return f"{title}: {', '.join(parts)}" if known else title, verdicts, tiles


def _best(material: Material) -> tuple[list[str], list[Tile]]:
    """Return sentences and tiles about the cell with the highest PWS, and about G-SNR compared with the baselines.

    A cell is a method at one alpha, for one dataset, target and benchmark.
    """
    try:
        cells = cells_of(material)
    except Missing as reason:
        return [f"There is no PWS to compare: {reason}."], []
    (place, (alpha, method)), best = max(cells.items(), key=lambda cell: float(cell[1]["pws"]))
    differs = is_distinguishable(cells)[place, (alpha, method)]
    side = "not distinguishable from" if not differs else "above" if best["pws"] > 1 else "below"
    where = f" on {' / '.join(place)}" if len({place for place, _ in cells}) > 1 else ""
    tests = f" (Holm's correction over {counted(len(cells), 'cell')})" if len(cells) > 1 else ""
    verdicts = [
        f"The highest PWS is that of {method} at {percent(alpha)} of the rows{where}: {pws_text(best)}, {side} the "
        f"model tuned on all rows{tests}{_invalid(best)}{ONE_SEED if best['runs'] == 1 else ''}."
    ]
    if invalid := sum(row["invalid"] or 0 for row in cells.values()):
        items = sum(row[name] or 0 for row in cells.values() for name in COUNTS)
        share = f"{invalid:,} ({invalid / items:.1%})"
        verdicts.append(f"Of the {items:,} items in all cells {share} have no valid judgment.")
    tiles = [Tile("highest PWS", f"{best['pws']:.3f}", f"{method} at {percent(alpha)}")]
    tiles += [*_length_tile(best), *_baselines_tile(material, best)]
    try:
        won = count(cells)
    except Missing as reason:
        return [*verdicts, f"Cells are not counted: {reason}."], tiles
    tiles.append(Tile("better than every baseline", f"{won.better} of {won.cells}", f"cells; worse in {won.worse}"))
    return [*verdicts, f"{won}."], tiles


def _invalid(row: Row) -> str:
    """Return a text with the share of a cell's items that have no valid judgment; "" if all items have one."""
    if not row["invalid"]:
        return ""
    items = sum(row[name] for name in COUNTS)
    return f"; {row['invalid'] / items:.0%} of its {items} items have no valid judgment"


def _length_tile(row: Row) -> list[Tile]:
    value = row["pws_length_controlled"]
    return [] if value is None else [Tile("length-controlled PWS", f"{value:.3f}", "at answers of equal length")]


def _baselines_tile(material: Material, best: Row) -> list[Tile]:
    """Return a list with a tile that shows the accuracy of the cell `best`.

    If the accuracy was not measured, the tile shows the held-out loss. If neither was measured, the list is empty.
    """
    alike = ("dataset", "target", "scorer", "alpha", "members", "settings")
    runs = [run.record for run in material.finished]
    runs = [run for run in runs if [flat_rows(run)[0][key] for key in alike] == [best[key] for key in alike]]
    if best["accuracy"] is None:
        losses = [run.get("heldout_loss") or {} for run in runs]
        return _measured_tile("its held-out loss", best["heldout_loss"], losses)
    by_benchmark = [run["accuracy"].get("by_benchmark") or {} for run in runs]
    own = [{kind: values.get(best["benchmark"]) for kind, values in each.items()} for each in by_benchmark]
    return _measured_tile("its accuracy", best["accuracy"], own)


def _measured_tile(name: str, value: float | None, measured: Sequence[Mapping[str, float | None]]) -> list[Tile]:
    """Return a list with a tile that shows `value`; an empty list if `value` is None.

    `measured` has an entry for each run, with the values of the full-data target (`reference`) and of the target before
    finetuning (`untuned`). The tile's note shows the mean of each value over the runs; a
    value that a run lacks is left out.
    """
    notes = []
    for baseline, key in (("full data", "reference"), ("no finetuning", "untuned")):
        if (of_baseline := mean([each.get(key) for each in measured])) is not None:
            notes.append(f"{baseline} {of_baseline:.3f}")
    return [] if value is None else [Tile(name, f"{value:.3f}", ", ".join(notes))]


def _of_run(run: Run) -> tuple[str, list[str], list[Tile]]:
    record = run.record
    verdicts, tiles = [], []
    if run.status in FAILED:
        verdicts.append(f"This run did not finish ({run.status}): {record.get('error')}.")
    elif run.status != "finished":
        verdicts.append(f"This run ended early: {run.outcome}.")
    if record.get("pws_by_definition"):
        verdicts.append("This run keeps every row; its PWS is 1 by definition.")
    elif record.get("pws") is not None:
        row = flat_rows(record)[-1]
        outcomes = f"{row['win']} wins, {row['tie']} ties and {row['lose']} losses{_invalid(row)}"
        distinct = row["p_value"] is not None and row["p_value"] < LEVEL
        verdict = "" if distinct else "; not distinguishable from 1"
        verdicts.append(f"PWS {pws_text(row)} against the model tuned on all rows: {outcomes}{verdict}{ONE_SEED}.")
        tiles.append(Tile("PWS", f"{row['pws']:.3f}", f"{row['win']} / {row['tie']} / {row['lose']}"))
        tiles += _length_tile(row)
    selection = record.get("selection") or {}
    if "rows" in selection:
        rows = (record.get("data") or {}).get("rows")
        tiles.append(Tile("rows kept", f"{selection['rows']:,}", f"of {rows:,}" if rows else ""))
    accuracy, losses = record.get("accuracy") or {}, record.get("heldout_loss") or {}
    tiles += _measured_tile("accuracy", accuracy.get("model"), [accuracy]) or _measured_tile(
        "held-out loss", losses.get("model"), [losses]
    )
    return f"One run: {'all rows' if run.is_full else run.label}", verdicts, tiles


def _settings(material: Material) -> str:
    """Return the main settings of the runs as text; for a setting that varies, the text has all its values."""
    keys = ("dataset", "proxy", "members", "snapshots", "target", "benchmark_sets", "judge")
    names = {"dataset": "data", "benchmark_sets": "benchmark"}
    values = {names.get(key, key): [run.record.get(key) for run in material.runs] for key in keys}
    values["stopped after"] = [run.config.get("stop_after") for run in material.runs]
    parts = []
    for name, of_runs in values.items():
        known = [value for value in of_runs if value is not None]
        texts = dict.fromkeys(",".join(map(str, value)) if isinstance(value, list) else str(value) for value in known)
        if texts:
            parts.append(f"{name} {' or '.join(texts)}")
    return "; ".join(parts)


def _notes(material: Material) -> Iterator[Note]:
    runs = material.runs
    failed = sum(run.status in FAILED for run in runs)
    if failed and material.is_sweep:
        yield Note("failed", f"{failed} of {len(runs)} runs did not finish; see what is missing.")
    if material.is_sweep and (material.folder / DIAGNOSTICS_FILE).is_file():
        diagnostics = read_diagnostics(material.folder)  # of the comparison with random rows alone
        if below := {name: diagnostics[name]["values"] for name in warnings_of(diagnostics)}:
            methods = [
                f"{name.removeprefix(AGAINST_RANDOM).strip(' ()')} ({values['pws']:.3f}, random "
                f"{values['pws_random']:.3f})"
                for name, values in below.items()
            ]
            apart = sum(values["p_value"] is not None and values["p_value"] < LEVEL for values in below.values())
            text = (
                f"The PWS is below that of random rows for {'; '.join(methods)}. Paired tests with Holm's correction "
                f"tell {apart} of these {len(below)} from random rows [{AGAINST_RANDOM}]"
            )
            yield Note("warning", text)
    messages: dict[str, list[str]] = {}
    for run in runs:
        for name, message in warnings_of(run.record.get("diagnostics")).items():
            messages.setdefault(name, []).append(f"{run.name}: {message}" if material.is_sweep else message)
    for name, texts in messages.items():
        others = f" ({len(texts)} of {len(runs)} runs have this warning; this is the first)" if len(texts) > 1 else ""
        yield Note("warning", f"{texts[0]} [{name}]{others}")
    for line in remarks_of_all(run.record for run in runs):
        yield Note("remark", line)
