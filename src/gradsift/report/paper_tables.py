"""The paper's tables for a sweep: PWS by dataset, target and benchmark, and the ablations.

They have the form of Tables 1 and 2 of GRADFILTERING (arXiv 2601.13697). A cell is one combination of dataset, target,
benchmark and alpha. The paper counts the cells in which the PWS of its method (G-SNR) is at least the PWS of every
baseline. This module counts the cells with equal PWS separately. It also counts significant differences: G-SNR is
compared with every baseline on the same items and seeds, with Holm's correction over all comparisons of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from gradsift.evaluation.intervals import holm
from gradsift.report.material import Material, Missing
from gradsift.report.run_tables import (
    COUNTS,
    LEVEL,
    Row,
    compared,
    flat_rows,
    grouped,
    intervals_text,
    method_name,
    over_seeds,
    pws_text,
)
from gradsift.report.table import Table

METHOD = "gsnr"
ABLATIONS = ("gsnr_raw_drop", "gsnr_normalized_drop", "gsnr_variance_normalized")  # #1, #2 and #3 of the paper
_NO_BASELINES = (METHOD, *ABLATIONS, "gsnr_direction", "full")
_RECORDED = ("pws", "pws_low", "pws_high", "p_value", "pws_length_controlled", *COUNTS)
Place = tuple[str, str, str]  # dataset, target, benchmark
Column = tuple[float, str]  # alpha, method
Cells = dict[tuple[Place, Column], Row]


@dataclass(frozen=True)
class Count:
    """Numbers of cells, by the result of comparing the method (G-SNR) with the baselines."""

    cells: int
    higher: int  # the method's PWS is above every baseline's
    tied: int  # the method's PWS equals the best baseline's
    better: int  # the method is significantly better than every baseline
    worse: int  # the method is significantly worse than some baseline
    baselines: tuple[str, ...]

    def __str__(self) -> str:
        undecided = self.cells - self.better - self.worse
        return (
            f"The PWS of {METHOD} is higher than that of {', '.join(self.baselines)} in {self.higher} of {self.cells} "
            f"cells and equal to the best in {self.tied}. Tested on the same items, it is better in {self.better}, "
            f"worse in {self.worse} and not distinguishable in {undecided} (level {LEVEL:g}, Holm's correction)"
        )


def cells_of(material: Material) -> Cells:
    """Return a dict from (place, column) to a row of results, averaged over the runs that differ only in seeds.

    A place is a dataset, target and benchmark; a column is an alpha and a method. Rows without a PWS, rows
    pooled over benchmarks, and full-data runs are left out. Raises `Missing` if no row is left.
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
    """Group the rows by place and alpha, then by scorer; if a scorer has several settings, keep the first row only."""
    groups: dict[tuple[Place, float], dict[str, Row]] = {}
    for (place, (alpha, _)), row in cells.items():
        groups.setdefault((place, alpha), {}).setdefault(row["scorer"], row)
    return groups


def count(cells: Cells) -> Count:
    """Compare G-SNR with the baselines in every cell and count the results (the paper's "19 of 24").

    Raises `Missing` if no cell has both G-SNR and a baseline.
    """
    groups = []  # the method's row, and the baselines' rows by name
    for group in _by_scorer(cells).values():
        baselines = {name: row for name, row in group.items() if name not in _NO_BASELINES}
        if METHOD in group and baselines:
            groups.append((group[METHOD], baselines))
    if not groups:
        raise Missing(f"no cell has both {METHOD} and a baseline such as random or superfilter")
    tests = [(cell, compared(row, b)) for cell, (row, others) in enumerate(groups) for b in others.values()]
    p_values = holm([1.0 if test is None else test.p_value for _, test in tests])
    signs: dict[int, list[float]] = {}  # by cell: 1 or -1 where the method is significantly better or worse, else 0
    for (cell, test), p_value in zip(tests, p_values, strict=True):
        sign = 0.0 if test is None or p_value >= LEVEL else float(np.sign(test.difference))
        signs.setdefault(cell, []).append(sign)
    better = sum(min(each) > 0 for each in signs.values())
    worse = sum(min(each) < 0 for each in signs.values())
    leads = [row["pws"] - max(other["pws"] for other in baselines.values()) for row, baselines in groups]
    names = dict.fromkeys(name for _, baselines in groups for name in baselines)
    return Count(len(groups), sum(d > 0 for d in leads), sum(d == 0 for d in leads), better, worse, tuple(names))


def is_distinguishable(cells: Cells) -> dict[tuple[Place, Column], bool]:
    """Return for each entry of `cells` whether its PWS differs significantly from 1, with Holm's correction."""
    adjusted = holm([1.0 if row["p_value"] is None else row["p_value"] for row in cells.values()])
    return {key: value < LEVEL for key, value in zip(cells, adjusted, strict=True)}


def pws_table(material: Material) -> Table:
    """Return the table of PWS, with a row for each place and a column for each pair of alpha and method."""
    cells = cells_of(material)
    places = list(dict.fromkeys(place for place, _ in cells))
    methods = list(dict.fromkeys(method for _, (_, method) in cells))
    columns = sorted({column for _, column in cells}, key=lambda column: (column[0], methods.index(column[1])))
    rows = [
        [" / ".join(place), *(pws_text(cells[place, c]) if (place, c) in cells else "-" for c in columns)]
        for place in places
    ]
    best = set()
    for at_alpha in grouped(cells, lambda key: (key[0], key[1][0])).values():  # cells of one place and alpha
        highest = max(cells[key]["pws"] for key in at_alpha)
        if len(at_alpha) > 1:
            best |= {key for key in at_alpha if cells[key]["pws"] == highest}
    header = ["dataset / target / benchmark", *(f"{alpha:g}: {method}" for alpha, method in columns)]
    records = [
        {"dataset": place[0], "target": place[1], "benchmark": place[2], "alpha": column[0], "method": column[1]}
        | {name: row[name] for name in _RECORDED}
        | {"runs": row["runs"], "best": (place, column) in best}
        for (place, column), row in cells.items()
    ]
    bold = frozenset((places.index(place), 1 + columns.index(column)) for place, column in best)
    averaged = any(row["runs"] > 1 for row in cells.values())
    sentences = ["Means over seeds" if averaged else "", intervals_text(cells.values())]
    note = ". ".join([*filter(None, sentences), "Bold: the highest of a row at its alpha."])
    with suppress(Missing):  # no cell to count
        note += f" {count(cells)}."
    return Table("PWS against the model tuned on all rows (1 is parity)", header, rows, bold, note, records)


def ablation_table(material: Material) -> Table:
    """Return a table with the PWS of G-SNR and of each ablation, and each ablation's difference from G-SNR."""
    by_cell = _by_scorer(cells_of(material)).items()
    groups = {key: group for key, group in by_cell if METHOD in group and not group.keys().isdisjoint(ABLATIONS)}
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
