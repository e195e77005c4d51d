"""The paper's tables of one sweep: PWS by dataset, target and benchmark (Table 1), and the ablations (Table 2).

GRADFILTERING, arXiv 2601.13697. A cell "matches or beats" when its PWS is at least that of every baseline in the cell;
how many of them are apart by more than the interval is counted beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.report.material import Material, Missing, attempt
from gradsift.report.tables import Row, flat_rows, over_seeds
from gradsift.report.text_table import TextTable, markdown, write_records

METHOD = "gsnr"
ABLATIONS = ("gsnr_raw_drop", "gsnr_normalized_drop", "gsnr_variance_normalized")  # #1, #2 and #3 of the paper
_OURS = (METHOD, *ABLATIONS, "gsnr_direction")
Place = tuple[str, str, str]  # dataset, target, benchmark
Column = tuple[float, str]  # alpha, method
Cells = dict[tuple[Place, Column], Row]


@dataclass(frozen=True)
class Count:
    """In how many cells a method is at least as good as every baseline beside it."""

    cells: int
    matches_or_beats: int
    beyond: int  # of these: its whole interval lies above the best baseline
    lost_beyond: int  # of the others: its whole interval lies below the best baseline
    baselines: tuple[str, ...]

    def __str__(self) -> str:
        lost = self.cells - self.matches_or_beats
        return (
            f"{METHOD} matches or beats {', '.join(self.baselines)} in {self.matches_or_beats} of {self.cells} cells "
            f"({self.beyond} of them beyond its interval; of the {lost} lost, {self.lost_beyond} beyond it)"
        )


def cells_of(material: Material) -> Cells:
    """PWS of each place and column; runs that differ by seeds alone are averaged. Pooled figures are left out."""
    rows = [row for run in material.finished for row in _rows(run.record)]
    found: Cells = {}
    for row in over_seeds(rows):
        if row["pws"] is None or row["scorer"] == "full":
            continue
        place = (str(row["dataset"]), str(row["target"]), str(row["benchmark"]))
        method = f"{row['scorer']} {row['settings'] or ''}".strip()
        found[place, (float(row["alpha"]), method)] = row
    if not found:
        raise Missing("no run came as far as a PWS against the full-data model")
    return found


def _rows(record: Mapping[str, Any]) -> list[Row]:
    rows = flat_rows(record)
    return rows[:-1] if len(rows) > 1 else rows  # the last of several is the pooled one


def count(cells: Cells) -> Count:
    """The paper's "19 of 24".

    Raises:
        Missing: no cell has both the method and a baseline.
    """
    by_cell: dict[tuple[Place, float], dict[str, Row]] = {}
    for (place, (alpha, _)), row in cells.items():
        group = by_cell.setdefault((place, alpha), {})
        if row["scorer"] not in _OURS or row["scorer"] == METHOD:
            group.setdefault(row["scorer"], row)  # where a scorer stands here with several settings, the first
    compared = [(group[METHOD], _others(group)) for group in by_cell.values() if METHOD in group and _others(group)]
    if not compared:
        raise Missing(f"no cell has both {METHOD} and a baseline such as random or superfilter")
    best = [max(row["pws"] for row in others.values()) for _, others in compared]
    pairs = [(ours, top) for (ours, _), top in zip(compared, best, strict=True)]
    won = [(ours, top) for ours, top in pairs if ours["pws"] >= top]
    lost = [(ours, top) for ours, top in pairs if ours["pws"] < top]
    return Count(
        len(pairs),
        len(won),
        sum(ours["pws_low"] is not None and ours["pws_low"] > top for ours, top in won),
        sum(ours["pws_high"] is not None and ours["pws_high"] < top for ours, top in lost),
        tuple(dict.fromkeys(name for _, others in compared for name in others)),
    )


def _others(group: Mapping[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in group.items() if name != METHOD}


def pws_table(material: Material) -> TextTable:
    """Rows: dataset x target x benchmark; columns: alpha x method; the best of each row and alpha in bold."""
    cells = cells_of(material)
    places = list(dict.fromkeys(place for place, _ in cells))
    order = {method: number for number, method in enumerate(dict.fromkeys(column[1] for _, column in cells))}
    columns = sorted({column for _, column in cells}, key=lambda column: (column[0], order[column[1]]))
    rows = [[" / ".join(place), *(_cell(cells.get((place, column))) for column in columns)] for place in places]
    best = frozenset(
        (i, 1 + j) for i, place in enumerate(places) for j, column in enumerate(columns) if _best(cells, place, column)
    )
    header = ["dataset / target / benchmark", *(f"{alpha:g}: {method}" for alpha, method in columns)]
    records = [
        {"dataset": place[0], "target": place[1], "benchmark": place[2], "alpha": column[0], "method": column[1]}
        | {name: row[name] for name in ("pws", "pws_low", "pws_high", "win", "tie", "lose", "invalid")}
        | {"runs": row["runs"], "best": _best(cells, place, column)}
        for (place, column), row in cells.items()
    ]
    return TextTable("PWS against the model tuned on all rows (1 is parity)", header, rows, best, _note(cells), records)


def _note(cells: Cells) -> str:
    several = any(row["runs"] > 1 for row in cells.values())
    note = "Means over seeds, with the least and the most." if several else "With bootstrap intervals over the items."
    note += " Bold: the best of a row at its alpha."
    try:
        return f"{note} {count(cells)}."
    except Missing:
        return note


def _best(cells: Cells, place: Place, column: Column) -> bool:
    """At its alpha; ties are all best, and a lone method is none."""
    if (place, column) not in cells:
        return False
    beside = [row["pws"] for (where, (alpha, _)), row in cells.items() if where == place and alpha == column[0]]
    return len(beside) > 1 and cells[place, column]["pws"] == max(beside)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    interval = "" if row["pws_low"] is None else f" [{row['pws_low']:.3f}, {row['pws_high']:.3f}]"
    return f"{row['pws']:.3f}{interval}"


def ablation_table(material: Material) -> TextTable:
    """PWS of the score and of its ablations, with the difference from the score."""
    cells = cells_of(material)
    groups: dict[tuple[Place, float], dict[str, Row]] = {}
    for (place, (alpha, _)), row in cells.items():
        groups.setdefault((place, alpha), {}).setdefault(row["scorer"], row)
    groups = {key: group for key, group in groups.items() if METHOD in group and any(a in group for a in ABLATIONS)}
    if not groups:
        raise Missing(f"no cell has {METHOD} beside one of its ablations ({', '.join(ABLATIONS)})")
    shown = [name for name in ABLATIONS if any(name in group for group in groups.values())]
    rows = []
    records = []
    for (place, alpha), group in groups.items():
        base = group[METHOD]["pws"]
        deltas = {name: group[name]["pws"] - base for name in shown if name in group}
        rows.append(
            [
                f"{' / '.join(place)}, {alpha:g}",
                f"{base:.3f}",
                *(f"{group[name]['pws']:.3f} ({deltas[name]:+.3f})" if name in group else "-" for name in shown),
            ]
        )
        about = {"dataset": place[0], "target": place[1], "benchmark": place[2], "alpha": alpha}
        for name in (METHOD, *(name for name in shown if name in group)):
            records.append({**about, "scorer": name, "pws": group[name]["pws"], "delta": deltas.get(name, 0.0)})
    header = ["dataset / target / benchmark, alpha", METHOD, *shown]
    note = f"In brackets the difference from {METHOD}; below zero the ablation loses."
    return TextTable("Ablations of the score", header, rows, frozenset(), note, records)


_MOST_LINES = 200  # of a table that people may want to read
TABLES = {"pws": pws_table, "ablations": ablation_table}


def write_tables(material: Material, folder: Path) -> dict[str, str]:
    """Write each table as `<name>.csv` (plain values) and, unless it is long, `<name>.md`; earlier ones are removed.

    Returns:
        The reasons of those that could not be made, by name.
    """
    from gradsift.report.figure_tables import FIGURE_TABLES  # its figures read the cells of this module

    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for name, make in {**TABLES, **FIGURE_TABLES}.items():
        for form in ("csv", "md"):
            (folder / f"{name}.{form}").unlink(missing_ok=True)
        reason = attempt(lambda: _write(make(material), folder / name))  # noqa: B023 - made at once
        if reason is not None:
            reasons[name] = reason
    return reasons


def _write(table: TextTable, path: Path) -> None:
    if len(table.rows) <= _MOST_LINES:
        path.with_suffix(".md").write_text(markdown(table) + "\n", encoding="utf-8")
    write_records(path.with_suffix(".csv"), table.records)
