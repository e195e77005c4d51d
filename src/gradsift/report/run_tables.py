"""The tables of results and of work, made from `run.json` files alone.

In the results, runs whose configs differ only in seeds share a row with their mean and an interval over seeds and
items. The column `settings` shows the overrides that not all runs share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from gradsift.cost import WORK_COLUMNS, work_of
from gradsift.evaluation.intervals import Difference, difference, mean_interval, p_value
from gradsift.report.table import Table, cell_text, fixed, percent

Run = Mapping[str, Any]  # the content of a `run.json`
Row = dict[str, Any]
T = TypeVar("T")
K = TypeVar("K")

WORK_FILE = "work.csv"
SETTINGS = ("dataset", "proxy", "members", "snapshots", "target", "judge", "scorer", "alpha", "settings", "benchmark")
SEEDS = ("data_seed", "seed")
SEED_KEYS = ("seed", "data.seed", "data.corruption.seed", "scorer.seed", "selector.seed")
COUNTS = ("win", "tie", "lose", "invalid")
MEASURES = ("rows", "pws", "pws_length_controlled", "accuracy", "heldout_loss", "spoilt_share", "families")
LEVEL = 0.05  # family-wise significance level of the tests of one table
OUTCOMES = "outcomes"  # key of (hash of the items, one letter per item); in a mean row, of a list of such pairs
UNTUNED = "(no finetuning)"
TITLE = "PWS against the model tuned on all rows"
_OWN_COLUMN = ("scorer", "alpha", "data", "proxy", "target", "judge", "proxy.members", "proxy.snapshots")


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return a dict from each value of `key(item)` to the list of its items, in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def with_settings(runs: Sequence[Run], told_apart: Sequence[str] = _OWN_COLUMN) -> list[Run]:
    """Return copies of the runs with the key `settings`: the overrides that not all runs share, as one text.

    Seeds, and overrides with a key in `told_apart`, are left out, because they are shown elsewhere.
    """
    elsewhere = (*told_apart, *SEED_KEYS)
    own = [[o for o in run.get("overrides") or [] if o.split("=", 1)[0] not in elsewhere] for run in runs]
    shared = set.intersection(*map(set, own)) if own else set()
    return [
        {**run, "settings": " ".join(o for o in overrides if o not in shared)}
        for run, overrides in zip(runs, own, strict=True)
    ]


def method_name(scorer: str, settings: str | None) -> str:
    """Return the scorer and its settings, shortened for legends and axes."""
    short = (settings or "").replace("proxy.members=", "M=").replace("proxy.snapshots=", "")
    return f"{scorer} {short}".strip()


def flat_rows(run: Run) -> list[Row]:
    """Return a row for each benchmark of a run and, unless it has exactly one benchmark, a last row over all items.

    Values that the run lacks are None.
    """
    cells: dict[str, Mapping[str, Any]] = dict(run.get("benchmarks") or {})
    outcomes = {name: (each["items"], each["outcomes"]) for name, each in (run.get("outcomes") or {}).items()}
    name = next(iter(cells), "pooled")  # the name of the row over all items
    if len(cells) != 1:
        name = "pooled" if cells else "+".join(run.get("benchmark_sets") or [])
        cells[name] = run.get("pooled") or {"pws": run.get("pws")}
        if outcomes:
            items, letters = zip(*(outcomes[each] for each in sorted(outcomes)), strict=True)
            outcomes[name] = " ".join(items), "".join(letters)
    of_all = run.get("length_controlled") or {}
    controlled = {name: each["pws"] for name, each in of_all.get("benchmarks", {}).items()} | {name: of_all.get("pws")}
    selection, accuracy = run.get("selection") or {}, run.get("accuracy") or {}
    by_benchmark = accuracy.get("benchmarks") or {}
    return [
        {
            **{name: run.get(name) for name in ("variant", *SETTINGS, *SEEDS)},
            "snapshots": ",".join(map(str, run.get("snapshots") or [])),
            "alpha": "all" if run.get("scorer") == "full" else run.get("alpha"),
            "benchmark": benchmark,
            "rows": selection.get("rows"),
            **{name: cell.get(name) for name in ("pws", "pws_low", "pws_high", *COUNTS)},
            "p_value": _p_value_of(outcomes[benchmark][1]) if benchmark in outcomes else None,
            OUTCOMES: outcomes.get(benchmark),
            "pws_length_controlled": controlled.get(benchmark),
            "confidence": run.get("confidence", 0.95),
            "accuracy": by_benchmark.get(benchmark, accuracy.get("model")),
            "heldout_loss": (run.get("heldout_loss") or {}).get("model"),
            "spoilt_share": selection.get("spoilt_share"),
            "families": selection.get("families"),
            **{f"label_{name}": share for name, share in (selection.get("labels") or {}).items()},
            "status": run.get("status"),
        }
        for benchmark, cell in cells.items()
    ]


def _p_value_of(letters: str) -> float | None:
    matrix = outcome_matrix([letters])
    return p_value(matrix) if matrix.size else None


def untuned_rows(runs: Iterable[Run]) -> list[Row]:
    """Return the results of the targets before finetuning: a row for each dataset, target, `settings` and seeds."""
    rows: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        accuracy, loss = ((run.get(name) or {}).get("untuned") for name in ("accuracy", "heldout_loss"))
        key = tuple(run.get(name) for name in ("dataset", "target", "settings", *SEEDS))
        if (accuracy is not None or loss is not None) and key not in rows:
            shared = {name: run.get(name) for name in ("dataset", "target", "settings", "status", *SEEDS)}
            own = {"scorer": UNTUNED, "accuracy": accuracy, "heldout_loss": loss}
            rows[key] = dict.fromkeys(flat_rows(run)[0]) | shared | own
    return list(rows.values())


def all_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the rows of all runs, followed by the rows of the untuned targets."""
    return [row for run in runs for row in flat_rows(run)] + untuned_rows(runs)


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """Average rows that differ only in seeds.

    Counts are summed, and the interval of the PWS is computed over seeds and items.

    Each returned row has two more keys: `runs`, the number of averaged rows, and `seeds`, their [data seed, seed]
    pairs.
    """
    # A sweep over alpha repeats the full-data run for each alpha. Keep one row for each seed, a finished one if any.
    kept: dict[Any, Row] = {}
    for place, row in enumerate(rows):
        is_full = row["scorer"] == "full"
        key = tuple(row[name] for name in (*SETTINGS, *SEEDS)) if is_full else place
        if key not in kept or kept[key]["status"] != "finished":
            kept[key] = row | {"variant": None} if is_full else row
    return [
        (_mean_row(group) if len(group) > 1 else group[0] | {"runs": 1})
        | {"seeds": [[row[name] for name in SEEDS] for row in group]}
        for group in grouped(kept.values(), lambda row: tuple(row[name] for name in ("variant", *SETTINGS))).values()
    ]


def _mean_row(group: Sequence[Row]) -> Row:
    shared: Row = {name: group[0][name] for name in (*SETTINGS, "confidence")} | {"runs": len(group)}
    means = {name: mean([each[name] for each in group]) for name in MEASURES}
    counts = {name: [each[name] for each in group] for name in COUNTS}
    sums = {name: None if None in values else sum(values) for name, values in counts.items()}
    row = shared | means | sums | {"pws_low": None, "pws_high": None, "p_value": None, OUTCOMES: None}
    outcomes = [each[OUTCOMES] for each in group]
    if row["pws"] is not None and all(outcomes) and len({items for items, _ in outcomes}) == 1:
        matrix = outcome_matrix([letters for _, letters in outcomes])
        if matrix.size:
            low, high = mean_interval(matrix, group[0]["confidence"])
            row |= {"pws_low": low + 1, "pws_high": high + 1, "p_value": p_value(matrix), OUTCOMES: outcomes}
    return row


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values; None if there is no value, or if one of them is None.

    A missing value is not skipped, because means over different runs are not comparable.
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def outcome_matrix(letters: Sequence[str]) -> np.ndarray:
    """Return the outcomes (seeds, items) of the items that are valid with every seed: 1 (win), 0 (tie) or -1 (loss).

    `letters` has a text for each seed. A text has one letter for each item: w, t, l, or i (invalid). The items have the
    same order in all texts.
    """
    values = {"w": 1.0, "t": 0.0, "l": -1.0, "i": math.nan}
    matrix = np.array([[values[letter] for letter in each] for each in letters])
    return matrix[:, ~np.isnan(matrix).any(0)]


def compared(first: Row, second: Row) -> Difference | None:
    """Return the difference in PWS of two rows that `over_seeds` returned, paired by seed and item.

    Returns None if a row has no outcomes, if the rows differ in items or in seeds (after a failed job), or if no item
    is valid with every seed of both rows.
    """
    if first.get("seeds") != second.get("seeds"):
        return None
    ours, theirs = (each if isinstance(each, list) else [each] for each in (first[OUTCOMES], second[OUTCOMES]))
    if None in ours or None in theirs or len({items for items, _ in (*ours, *theirs)}) > 1:
        return None
    matrix = outcome_matrix([letters for _, letters in (*ours, *theirs)])
    return difference(matrix[: len(ours)], matrix[len(ours) :]) if matrix.size else None


def pws_text(row: Row) -> str:
    """Return the PWS of a row with its interval, as in "1.400 [1.150, 1.650]"."""
    if row["pws"] is None:
        return "-"
    if row["scorer"] == "full":
        return "1 (itself)"
    interval = "" if row["pws_low"] is None else f" [{row['pws_low']:.3f}, {row['pws_high']:.3f}]"
    return f"{row['pws']:.3f}{interval}"


def intervals_text(rows: Iterable[Row]) -> str:
    """Describe the rows' intervals, as in "PWS with 95 % intervals over items and seeds"; "" without intervals."""
    shown = [row for row in rows if row["pws_low"] is not None]
    if not shown:
        return ""
    shares = " or ".join(percent(share) for share in sorted({row["confidence"] for row in shown}))
    over = "items and seeds" if any(row["runs"] > 1 for row in shown) else "items alone"
    return f"PWS with {shares} intervals over {over}"


def outcomes_text(row: Row) -> str:
    """Return wins, ties and losses of a row, as in "6/2/2 (1 invalid)"."""
    if row["win"] is None:
        return "-"
    invalid = f" ({row['invalid']} invalid)" if row["invalid"] else ""
    return f"{row['win']}/{row['tie']}/{row['lose']}{invalid}"


def results_table(runs: Sequence[Run]) -> Table:
    """Return the table of results, without empty columns and without settings that do not vary.

    The table's `records`, for the CSV file, have all columns.
    """
    records = all_rows(with_settings(runs))
    rows = over_seeds(records)
    title = TITLE
    benchmarks = {row["benchmark"] for row in rows} - {None}
    if len(benchmarks) == 1:
        title += f", benchmark {benchmarks.pop()}"
    if (most := max(row["runs"] for row in rows)) > 1:
        title += f"; means of {most} seeds"
    if intervals := intervals_text(rows):
        title += f"; {intervals}"
    varied = [n for n in SETTINGS if n in ("scorer", "alpha") or len({row[n] for row in rows} - {None}) > 1]
    columns = {
        **{name: [cell_text(row[name]) for row in rows] for name in varied},
        "rows": [cell_text(row["rows"]) for row in rows],
        "PWS": [pws_text(row) for row in rows],
        "PWS, length-controlled": [fixed(row["pws_length_controlled"]) for row in rows],
        "win/tie/lose": [outcomes_text(row) for row in rows],
        "accuracy": [fixed(row["accuracy"]) for row in rows],
        "held-out": [fixed(row["heldout_loss"]) for row in rows],
        "spoilt": [fixed(row["spoilt_share"], 2) for row in rows],
        "families": [fixed(row["families"], 1) for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    without_outcomes = [{name: value for name, value in row.items() if name != OUTCOMES} for row in records]
    return Table(title, list(columns), list(zip(*columns.values(), strict=True)), records=without_outcomes)


def work_table(runs: Sequence[Run]) -> Table:
    """Return the table of work, with a row for each stage in order of first appearance and a row for all stages."""
    stages = [stage for run in runs for stage in run.get("stages", [])]
    names = dict.fromkeys(stage["name"] for stage in stages)
    by_stage = {name: work_of([s for s in stages if s["name"] == name]) for name in names} | {"all": work_of(stages)}
    header = ["stage", "made", "reused", "seconds", "steps", "tokens", "steps reused", "tokens reused"]
    rows = [
        [name, *(f"{work[c]:,.1f}" if c == "seconds" else f"{work[c]:,}" for c in WORK_COLUMNS)]
        for name, work in by_stage.items()
    ]
    records = [{"stage": name, **work} for name, work in by_stage.items()]
    return Table("Work by stage", header, rows, records=records)
