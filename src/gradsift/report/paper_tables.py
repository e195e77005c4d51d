"""The paper's tables for a sweep: PWS by dataset, target and benchmark, and the ablations.

They are Tables 1 and 2 of GRADFILTERING (arXiv 2601.13697). A cell "matches or beats" if its PWS is at least
that of every baseline in the cell; how many of them differ by more than the interval is counted beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from gradsift.report.material import Material, Missing
from gradsift.report.run_tables import Row, flat_rows, method_name, over_seeds, pws_text
from gradsift.report.table import Table

METHOD = "gsnr"
ABLATIONS = ("gsnr_raw_drop", "gsnr_normalized_drop", "gsnr_variance_normalized")  # #1, #2 and #3 of the paper
_NO_BASELINES = (METHOD, *ABLATIONS, "gsnr_direction", "full")
Place = tuple[str, str, str]  # dataset, target, benchmark
Column = tuple[float, str]  # alpha, method
Cells = dict[tuple[Place, Column], Row]


@dataclass(frozen=True)
class Count:
    """In how many cells the method is at least as good as every baseline in the cell."""

    cells: int
    matches_or_beats: int
    beyond: int  # of these: cells where its whole interval is above the best baseline
    lost_beyond: int  # of the others: cells where its whole interval is below the best baseline
    baselines: tuple[str, ...]

    def __str__(self) -> str:
        lost = self.cells - self.matches_or_beats
        return (
            f"{METHOD} matches or beats {', '.join(self.baselines)} in {self.matches_or_beats} of {self.cells} cells "
            f"({self.beyond} of them beyond its interval; of the {lost} lost, {self.lost_beyond} beyond it)"
        )


def cells_of(material: Material) -> Cells:
    """Return the PWS of each place and column, averaged over runs that differ by seeds alone. Omits pooled figures.

    Raises:
        Missing: no run has a PWS.
    """
    cells: Cells = {}
    rows = [row for run in material.finished for row in flat_rows(run.record) if row["benchmark"] != "pooled"]
    for row in over_seeds(rows):
        if row["pws"] is not None and row["scorer"] != "full":
            place = (str(row["dataset"]), str(row["target"]), str(row["benchmark"]))
            cells[place, (float(row["alpha"]), method_name(row["scorer"], row["settings"]))] = row
    if not cells:
        raise Missing("no run got as far as a PWS against the full-data model")
    return cells


def _by_scorer(cells: Cells) -> dict[tuple[Place, float], dict[str, Row]]:
    """Return the rows of each place and alpha by scorer; of a scorer with several settings the first."""
    groups: dict[tuple[Place, float], dict[str, Row]] = {}
    for (place, (alpha, _)), row in cells.items():
        groups.setdefault((place, alpha), {}).setdefault(row["scorer"], row)
    return groups


def count(cells: Cells) -> Count:
    """Count the cells that the method wins (the paper's "19 of 24").

    Raises:
        Missing: no cell has both the method and a baseline.
    """
    pairs = []  # the method's row, and the best PWS among the baselines
    baselines: dict[str, None] = {}
    for group in _by_scorer(cells).values():
        others = {name: row["pws"] for name, row in group.items() if name not in _NO_BASELINES}
        if METHOD in group and others:
            pairs.append((group[METHOD], max(others.values())))
            baselines |= dict.fromkeys(others)
    if not pairs:
        raise Missing(f"no cell has both {METHOD} and a baseline such as random or superfilter")
    won = [(row, best) for row, best in pairs if row["pws"] >= best]
    lost = [(row, best) for row, best in pairs if row["pws"] < best]
    return Count(
        len(pairs),
        len(won),
        sum(row["pws_low"] is not None and row["pws_low"] > best for row, best in won),
        sum(row["pws_high"] is not None and row["pws_high"] < best for row, best in lost),
        tuple(baselines),
    )


def pws_table(material: Material) -> Table:
    """Return the PWS with a row for each place and a column for each alpha and method; the best of an alpha is bold."""
    cells = cells_of(material)
    places = list(dict.fromkeys(place for place, _ in cells))
    methods = list(dict.fromkeys(method for _, (_, method) in cells))
    columns = sorted({column for _, column in cells}, key=lambda column: (column[0], methods.index(column[1])))
    rows = [
        [" / ".join(place), *(pws_text(cells[place, c]) if (place, c) in cells else "-" for c in columns)]
        for place in places
    ]
    best = {key for key in cells if _is_best(cells, *key)}
    header = ["dataset / target / benchmark", *(f"{alpha:g}: {method}" for alpha, method in columns)]
    records = [
        {"dataset": place[0], "target": place[1], "benchmark": place[2], "alpha": column[0], "method": column[1]}
        | {name: row[name] for name in ("pws", "pws_low", "pws_high", "win", "tie", "lose", "invalid")}
        | {"runs": row["runs"], "best": (place, column) in best}
        for (place, column), row in cells.items()
    ]
    bold = frozenset((places.index(place), 1 + columns.index(column)) for place, column in best)
    averaged = any(row["runs"] > 1 for row in cells.values())
    note = "Means over seeds, with the least and the most." if averaged else "With confidence intervals over the items."
    note += " Bold: the best of a row at its alpha."
    with suppress(Missing):  # no cell to count
        note += f" {count(cells)}."
    return Table("PWS against the model tuned on all rows (1 is parity)", header, rows, bold, note, records)


def _is_best(cells: Cells, place: Place, column: Column) -> bool:
    """Whether no other cell of the row at this alpha is better; a method without others beside it is not the best."""
    beside = [row["pws"] for (where, (alpha, _)), row in cells.items() if where == place and alpha == column[0]]
    return len(beside) > 1 and cells[place, column]["pws"] == max(beside)


def ablation_table(material: Material) -> Table:
    """Return the PWS of the score and of its ablations, with the differences from the score."""
    groups = {
        key: group
        for key, group in _by_scorer(cells_of(material)).items()
        if METHOD in group and any(name in group for name in ABLATIONS)
    }
    if not groups:
        raise Missing(f"no cell has {METHOD} beside one of its ablations ({', '.join(ABLATIONS)})")
    shown = [name for name in ABLATIONS if any(name in group for group in groups.values())]
    rows, records = [], []
    for (place, alpha), group in groups.items():
        base = group[METHOD]["pws"]
        cells = dict.fromkeys(shown, "-")
        for name in (METHOD, *(name for name in shown if name in group)):
            pws = group[name]["pws"]
            cells[name] = f"{pws:.3f} ({pws - base:+.3f})"
            about = {"dataset": place[0], "target": place[1], "benchmark": place[2], "alpha": alpha}
            records.append({**about, "scorer": name, "pws": pws, "delta": pws - base})
        rows.append([f"{' / '.join(place)}, {alpha:g}", f"{base:.3f}", *(cells[name] for name in shown)])
    header = ["dataset / target / benchmark, alpha", METHOD, *shown]
    note = f"In brackets: the difference from {METHOD}; below zero the ablation is worse."
    return Table("Ablations of the score", header, rows, note=note, records=records)


TABLES: dict[str, Callable[[Material], Table]] = {"pws": pws_table, "ablations": ablation_table}
