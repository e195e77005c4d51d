"""All figures of the report. Call a figure with the material of a run or a sweep to get a matplotlib `Figure`.

In a notebook:

    from gradsift.report.figures import selection
    from gradsift.report.material import read
    selection.overlap(read(Path("multirun/DATE/TIME")))
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import get_args

from gradsift.report.figures import audit, convergence, cost, ensemble, judge, pws, scores, selection, sensitivity
from gradsift.report.figures.style import Entry, Format, bytes_of
from gradsift.report.material import Material, attempt
from gradsift.report.paper_tables import TABLES
from gradsift.report.table import Table

__all__ = ["FIGURES", "Entry", "write_figures", "write_tables"]

FIGURES: tuple[Entry, ...] = (
    pws.pws,
    sensitivity.members_and_snapshots,
    sensitivity.ensemble_size,
    sensitivity.eps,
    sensitivity.seeds,
    convergence.convergence,
    scores.score_distributions,
    scores.early_late_norms,
    scores.score_length,
    selection.overlap,
    selection.labels,
    scores.variance_and_loss,
    ensemble.trajectories_pca,
    ensemble.trajectories_tsne,
    ensemble.collapse,
    ensemble.member_loss,
    judge.judge_outcomes,
    judge.position_bias,
    judge.length_bias,
    audit.audit_spoilt,
    audit.audit_auroc,
    cost.cost,
)


def write_figures(material: Material, folder: Path, formats: Iterable[Format] = ("png", "svg")) -> dict[str, str]:
    """Write each figure as `<name>.<format>`, and remove the figures of an earlier report.

    Returns:
        The reasons why figures could not be drawn, by the figures' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {}
    for entry in FIGURES:
        for form in get_args(Format):
            (folder / f"{entry.name}.{form}").unlink(missing_ok=True)
        _, reason = attempt(partial(_write, entry, material, folder, list(formats)))
        if reason:
            reasons[entry.name] = reason
    return reasons


def _write(entry: Entry, material: Material, folder: Path, formats: Iterable[Format]) -> None:
    figure = entry(material)
    for form, content in [(form, bytes_of(figure, form)) for form in formats]:
        (folder / f"{entry.name}.{form}").write_bytes(content)


def write_tables(material: Material, folder: Path) -> tuple[dict[str, Table], dict[str, str]]:
    """Write each table as CSV and, unless it is long, Markdown and LaTeX; remove the tables of an earlier report.

    Returns:
        The tables that were made, and the reasons why tables could not be made, both by name.
    """
    makers = TABLES | {figure.name: figure.table for figure in FIGURES if figure.records is not None}
    folder.mkdir(parents=True, exist_ok=True)
    tables, reasons = {}, {}
    for name, make in makers.items():
        for form in ("csv", "md", "tex"):
            (folder / f"{name}.{form}").unlink(missing_ok=True)
        table, reason = attempt(partial(make, material))
        if table is None:
            reasons[name] = reason
        else:
            tables[name] = table
            table.write(folder, name)
    return tables, reasons
