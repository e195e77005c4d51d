"""All figures of the report. Each is called with the material of a run or a sweep (see `gradsift.report.material`) and
returns a matplotlib `Figure`.

In a notebook:

    from gradsift.report.figures import selection
    from gradsift.report.material import read
    selection.overlap(read(Path("multirun/DATE/TIME")))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gradsift.report.figures import cost, outcomes, scores, selection, sensitivity, training
from gradsift.report.figures.style import FORMATS, Entry, bytes_of
from gradsift.report.material import Material, attempt
from gradsift.report.paper_tables import TABLES
from gradsift.report.table import Table

FIGURES: tuple[Entry, ...] = (
    outcomes.pws,
    sensitivity.members_and_snapshots,
    sensitivity.ensemble_size,
    sensitivity.eps,
    sensitivity.seeds,
    training.convergence,
    scores.score_distributions,
    scores.early_late_norms,
    scores.score_length,
    scores.variance_and_loss,
    selection.overlap,
    selection.labels,
    training.trajectories_pca,
    training.trajectories_tsne,
    training.collapse,
    training.member_loss,
    outcomes.judge_outcomes,
    outcomes.position_bias,
    outcomes.length_bias,
    selection.audit_spoilt,
    selection.audit_auroc,
    cost.cost,
)


def write_figures(material: Material, folder: Path, formats: Sequence[str]) -> dict[str, str]:
    """Write each figure to `folder` as `<name>.<format>`, after deleting the figures of an earlier report.

    Returns a dict from the name of each figure that could not be drawn to the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(entry: Entry) -> None:
        figure = entry(material)
        contents = {form: bytes_of(figure, form) for form in formats}  # all formats or, after an error, none
        for form, content in contents.items():
            (folder / f"{entry.name}.{form}").write_bytes(content)

    reasons = {}
    for entry in FIGURES:
        for form in FORMATS:
            (folder / f"{entry.name}.{form}").unlink(missing_ok=True)
        _, reason = attempt(partial(write, entry))
        if reason:
            reasons[entry.name] = reason
    return reasons


def write_tables(material: Material, folder: Path) -> tuple[dict[str, Table], dict[str, str]]:
    """Write each table to `folder` (see `Table.write`), after deleting the tables of an earlier report.

    Returns a dict of the tables by name, and a dict from the name of each table that could not be made to the reason.
    """
    makers = TABLES | {entry.name: entry.table for entry in FIGURES if entry.records is not None}
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
