"""Tables on the terminal and as CSV, from `run.json` files alone.

A row is one run and benchmark (and the pooled figure where there are several). Runs whose whole
configs differ in nothing but a seed share a line on the terminal: their mean, with the least and the
most. Overrides that some runs have and others have not stand in the column `settings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gradsift.diagnostics import Diagnostic
from gradsift.report.text_table import write_records

Run = Mapping[str, Any]
Row = dict[str, Any]

SETTINGS = ("dataset", "proxy", "members", "snapshots", "target", "judge", "scorer", "alpha", "settings", "benchmark")
SEEDS = ("data_seed", "seed")
_OWN_COLUMN = ("scorer", "alpha", "data", "proxy", "target", "judge", "proxy.members", "proxy.snapshots")
SEED_KEYS = ("seed", "data.seed", "data.corruption.seed", "scorer.seed", "selector.seed")
COUNTS = ("win", "tie", "lose", "invalid")
MEASURES = ("rows", "pws", "accuracy", "heldout_loss", "spoilt_share", "families")
UNTUNED = "(no finetuning)"
TITLE = "PWS against the model tuned on all rows"


def job_number(folder: Path) -> tuple[int, str]:
    """Jobs in their order, where the folders' names begin with a number."""
    number = folder.name.split("-", 1)[0]
    return (int(number) if number.isdecimal() else 0, folder.name)


def with_settings(runs: Sequence[Run], told_apart: Sequence[str] = _OWN_COLUMN) -> list[Run]:
    """The runs, each with the overrides that tell it from the others as `settings`.

    Args:
        told_apart: keys of overrides that are shown elsewhere.
    """
    elsewhere = (*told_apart, *SEED_KEYS)
    own = [[o for o in run.get("overrides") or [] if o.split("=", 1)[0] not in elsewhere] for run in runs]
    shared = set(own[0]).intersection(*own) if own else set()
    return [
        {**run, "settings": " ".join(o for o in overrides if o not in shared)}
        for run, overrides in zip(runs, own, strict=True)
    ]


def flat_rows(run: Run) -> list[Row]:
    """The rows of one run, as plain values; None where the run has no such figure."""
    cells: dict[str, Mapping[str, Any]] = dict(run.get("benchmarks") or {})
    if len(cells) != 1:
        name = "pooled" if cells else "+".join(run.get("benchmark_sets") or [])
        cells[name] = run.get("pooled") or {"pws": run.get("pws")}
    return [_row(run, benchmark, cell) for benchmark, cell in cells.items()]


def _row(run: Run, benchmark: str, cell: Mapping[str, Any]) -> Row:
    full = run.get("scorer") == "full"
    return {
        **{name: run.get(name) for name in ("variant", *SETTINGS, *SEEDS)},
        "snapshots": ",".join(map(str, run.get("snapshots") or [])),
        "alpha": "all" if full else run.get("alpha"),
        "benchmark": benchmark,
        "rows": _get(run, "selection", "rows"),
        **{name: cell.get(name) for name in ("pws", "pws_low", "pws_high", *COUNTS)},
        "accuracy": (_get(run, "accuracy", "benchmarks") or {}).get(benchmark, _get(run, "accuracy", "model")),
        "heldout_loss": _get(run, "heldout_loss", "model"),
        "spoilt_share": _get(run, "selection", "spoilt_share"),
        "families": _get(run, "selection", "families"),
        **{f"label_{name}": share for name, share in (_get(run, "selection", "labels") or {}).items()},
        "status": run.get("status"),
    }


def untuned_rows(runs: Iterable[Run]) -> list[Row]:
    """The target before any finetuning, once for each dataset, target and seed: the measure of every other row."""
    rows: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        accuracy, loss = _get(run, "accuracy", "untuned"), _get(run, "heldout_loss", "untuned")
        key = tuple(run.get(name) for name in ("dataset", "target", "settings", *SEEDS))
        if (accuracy is not None or loss is not None) and key not in rows:
            shared = {name: run.get(name) for name in ("dataset", "target", "settings", "status", *SEEDS)}
            rows[key] = dict.fromkeys(flat_rows(run)[0]) | shared
            rows[key] |= {"scorer": UNTUNED, "accuracy": accuracy, "heldout_loss": loss}
    return list(rows.values())


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ by seeds alone as one: means, summed outcomes; `pws_low` and `pws_high` are least and most."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["variant"], *(row[name] for name in SETTINGS)), []).append(row)
    return [_mean_row(group) if len(group) > 1 else group[0] | {"runs": 1} for group in groups.values()]


def _mean_row(group: Sequence[Row]) -> Row:
    mean: Row = {name: group[0][name] for name in SETTINGS} | {"runs": len(group)}
    for name in (*MEASURES, *COUNTS):
        values = [row[name] for row in group if row[name] is not None]
        # a mean over some of the runs would be compared with means over all of them
        whole = len(values) == len(group)
        mean[name] = None if not whole else sum(values) if name in COUNTS else sum(values) / len(values)
    known = [row["pws"] for row in group if row["pws"] is not None]
    mean |= {"pws_low": min(known, default=None), "pws_high": max(known, default=None)}
    return mean


def pws_table(runs: Sequence[Run]) -> Table:
    """The PWS table; columns without any value are left out, and settings that do not vary stand in no column."""
    runs = with_settings(runs)
    rows = over_seeds([row for run in runs for row in flat_rows(run)] + untuned_rows(runs))
    title = TITLE
    benchmarks = {row["benchmark"] for row in rows} - {None}
    if len(benchmarks) == 1:
        title += f", benchmark {benchmarks.pop()}"
    if (most := max(row["runs"] for row in rows)) > 1:
        title += f"; means of {most} seeds, PWS with least and most"
    always = ("scorer", "alpha")
    shown = [n for n in SETTINGS if n in always or len({row[n] for row in rows} - {None}) > 1]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = {name: [_text(row[name]) for row in rows] for name in shown} | _figures(rows)
    for name, values in columns.items():
        if any(value not in ("", "-") for value in values):
            left = name in ("scorer", "benchmark", "dataset", "target", "proxy", "settings")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
    kept = [values for values in columns.values() if any(value not in ("", "-") for value in values)]
    for cells in zip(*kept, strict=True):
        table.add_row(*map(Text, cells))
    return table


def _figures(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {
        "rows": [_text(row["rows"]) for row in rows],
        "PWS": [pws_text(row) for row in rows],
        "win/tie/lose": [outcomes_text(row) for row in rows],
        "accuracy": [_number(row["accuracy"]) for row in rows],
        "held-out": [_number(row["heldout_loss"]) for row in rows],
        "spoilt": [_number(row["spoilt_share"], 2) for row in rows],
        "families": [_number(row["families"], 1) for row in rows],
    }


def _text(value: Any) -> str:
    return "-" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def pws_text(row: Row) -> str:
    """The PWS of a row and its interval."""
    """A row's PWS with its interval."""
    if row["pws"] is None:
        return "-"
    if row["scorer"] == "full":
        return "1 (itself)"
    if row["pws_low"] is None:
        return f"{row['pws']:.3f}"
    return f"{row['pws']:.3f} [{row['pws_low']:.3f}, {row['pws_high']:.3f}]"


def outcomes_text(row: Row) -> str:
    """Its wins, ties and losses."""
    """Its win/tie/lose."""
    if row["win"] is None:
        return "-"
    invalid = f" ({row['invalid']} invalid)" if row["invalid"] else ""
    return f"{row['win']}/{row['tie']}/{row['lose']}{invalid}"


def _get(run: Run, *keys: str) -> Any:
    value: Any = run
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def against_random(runs: Sequence[Run]) -> list[Diagnostic]:
    """Does a subset do worse than random rows? One diagnostic for each scorer and setting that random stands beside.

    Pooled PWS are compared between runs that have the seeds and all but the scorer and its constants in
    common; where random selection was not run there is nothing to compare with, and nothing is said.
    """
    rows = [flat_rows(run)[-1] for run in with_settings(runs)]  # the last is the pooled one, or the only one
    rows = [row for row in rows if row["pws"] is not None and row["scorer"] != "full"]
    named = [n for n in SETTINGS if n in ("scorer", "alpha") or len({row[n] for row in rows}) > 1]
    random: dict[tuple[Any, ...], list[float]] = {}
    methods: dict[str, list[Row]] = {}
    for row in rows:
        if row["scorer"] == "random":
            random.setdefault(_beside(row), []).append(row["pws"])
        else:
            methods.setdefault(", ".join(_text(row[n]) for n in named if row[n] != ""), []).append(row)
    pairs = {
        name: [(row["pws"], sum(known) / len(known)) for row in group if (known := random.get(_beside(row)))]
        for name, group in methods.items()
    }
    return [_against_random(name, found) for name, found in pairs.items() if found]


def _beside(row: Row) -> tuple[Any, ...]:
    """What a run shares with the random selection that it is compared with."""
    own = ("scorer.", "method=")
    settings = tuple(o for o in row["settings"].split(" ") if not o.startswith(own))
    return (*(row[name] for name in (*SETTINGS, *SEEDS) if name not in ("scorer", "settings")), settings)


def _against_random(name: str, pairs: Sequence[tuple[float, float]]) -> Diagnostic:
    """
    Args:
        pairs: PWS of the method and of random selection, for each run that has a counterpart.
    """
    ours, theirs = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    worse = sum(pair[0] < pair[1] for pair in pairs)
    return Diagnostic.judged(
        f"against_random ({name})",
        ours < theirs,
        {"difference": ours - theirs, "pws": ours, "pws_random": theirs, "pairs": len(pairs), "pairs_lower": worse},
        f"{name}: PWS {ours:.3f} against {theirs:.3f} for random rows, lower in {worse} of {len(pairs)} pairs of runs",
        "the runs' own warnings, the full-data baseline (scorer=full: near random there is little to select), "
        "and more seeds before leaning on it",
    )


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Every row of every run, nothing averaged, plain values."""
    runs = with_settings(runs)
    rows = [row for run in runs for row in flat_rows(run)] + untuned_rows(runs)
    write_records(path, rows)
