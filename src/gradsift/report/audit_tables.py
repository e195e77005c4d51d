"""The noise audit of a sweep: every method beside the others, on the terminal and as audit.json, audit.csv, audit.md.

Methods are compared on one and the same corrupted dataset; over several (seeds) their means are shown, and the CSV
has each. A method that failed is shown as failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gradsift.report.tables import SEED_KEYS, method_name, with_settings
from gradsift.report.text_table import TextTable, markdown, write_records

Run = Mapping[str, Any]
Figures = Mapping[str, Any]

AUDIT_FILE = "audit.json"
ALL_ROWS = "(all rows)"
FAILED = "failed"
# overrides that name no method: the scorer is named anyway, the data parts the tables, the others change no audit
_TOLD_APART = ("scorer", "data", "alpha", "target")
_READING = (
    "How to read it: a method is of use on this data where the spoilt share of its selection lies below that of all "
    "rows by more than a random draw varies, at the budgets that matter. AUROC is the chance that a clean row scores "
    "higher than a corrupted one (0.5: it cannot tell); it speaks of the whole pool, not of the head that is selected. "
    "A copy scores much as its original does, so AUROC cannot say how copies are dealt with; `kept twice` can: the "
    "share of selected copies whose original is selected too. Few families: the selection is of one kind."
)


@dataclass(frozen=True)
class SweepAudit:
    """All audits of a sweep."""

    datasets: list[dict[str, Any]]  # data, seeds, methods {name: figures}, overlap {alpha: {name: {name: Jaccard}}}
    failed: dict[str, str]  # method and why


def sweep_audit(jobs: Sequence[tuple[Path, Run]]) -> SweepAudit | None:
    """The audits of these jobs (their `run.json` and its content); None where there is none."""
    datasets: dict[tuple[str, ...], dict[str, Any]] = {}
    failed: dict[str, str] = {}
    runs = with_settings([run for _, run in jobs], _TOLD_APART)
    for (path, _), run in zip(jobs, runs, strict=True):
        name = _method(run)
        if "audit" not in run:
            if run["status"] in (FAILED, "interrupted"):
                failed[name] = run["error"]
            continue
        figures = json.loads((path.parent / AUDIT_FILE).read_text(encoding="utf-8"))
        seeds = [o for o in run.get("overrides") or [] if o.split("=", 1)[0] in SEED_KEYS]
        dataset = datasets.setdefault(
            (figures["data"], *seeds), {"data": figures["data"], "seeds": seeds, "methods": {}}
        )
        dataset["methods"][name] = figures
    for dataset in datasets.values():
        dataset["overlap"] = _overlap(dataset["methods"])
        for figures in dataset["methods"].values():
            for selection in figures["selections"]:
                del selection["positions"]
    return SweepAudit(list(datasets.values()), failed) if datasets else None


def _method(run: Run) -> str:
    scorer = run.get("scorer") or next((o.split("=", 1)[1] for o in run["overrides"] if o.startswith("scorer=")), "?")
    return method_name(scorer, run["settings"])


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Common positions by all positions of two selections; 1 where both are empty."""
    together = set(one) | set(other)
    return len(set(one) & set(other)) / len(together) if together else 1.0


def _overlap(methods: Mapping[str, Figures]) -> dict[str, dict[str, dict[str, float]]]:
    overlap: dict[str, dict[str, dict[str, float]]] = {}
    for one, its in methods.items():
        for other, theirs in methods.items():
            for ours, beside in zip(its["selections"], theirs["selections"], strict=False):
                if ours["alpha"] == beside["alpha"]:
                    cells = overlap.setdefault(f"{ours['alpha']:g}", {}).setdefault(one, {})
                    cells[other] = jaccard(ours["positions"], beside["positions"])
    return overlap


def mean_of(values: Sequence[Any]) -> Any:
    """The mean of equal structures, number by number: None where one has no number; of anything else the first."""
    first = values[0]
    if isinstance(first, Mapping):
        shared = [key for key in first if all(key in value for value in values)]
        return {key: mean_of([value[key] for value in values]) for key in shared}
    if isinstance(first, list):
        return [mean_of(items) for items in zip(*values, strict=False)]
    if any(value is None for value in values):
        return None
    return sum(values) / len(values) if isinstance(first, int | float) else first


# ------------------------------------------------------------------------------------------- tables


def audit_tables(audit: SweepAudit, *, brief: bool) -> list[TextTable]:
    """What the terminal (brief: the overlap at the middle alpha alone) and `audit.md` show."""
    names = {name: None for dataset in audit.datasets for name in dataset["methods"]}
    whole = [name for name in names if all(name in dataset["methods"] for dataset in audit.datasets)]
    if not whole:
        return []
    means = {name: mean_of([dataset["methods"][name] for dataset in audit.datasets]) for name in whole}
    methods = dict(sorted(means.items(), key=lambda item: sum(cell["spoilt"] for cell in item[1]["selections"])))
    overlap = mean_of([dataset["overlap"] for dataset in audit.datasets])
    seeds = f"; means of {len(audit.datasets)} datasets" if len(audit.datasets) > 1 else ""
    lost = [name for name in (*names, *audit.failed) if name not in methods]
    found = [_kept(methods, lost, seeds), _kinds(methods, lost, seeds), _groups(methods, seeds)]
    if brief:
        middle = list(overlap)[len(overlap) // 2]
        overlap = {middle: overlap[middle]}
    return [table for table in found if table] + list(_overlaps(overlap, list(methods)))


def _kept(methods: Mapping[str, Figures], lost: Sequence[str], seeds: str) -> TextTable:
    base = next(iter(methods.values()))
    cells = base["selections"]
    header = ["method", *(f"spoilt at {_alpha(cell)}" for cell in cells), "AUROC"]
    header += [f"families at {_alpha(cell)}" for cell in cells]
    rows = [[ALL_ROWS, *[_number(base["spoilt"])] * len(cells), "", *[_number(base["families_pool"], 1)] * len(cells)]]
    for name, figures in methods.items():
        spoilt, families = ([cell[key] for cell in figures["selections"]] for key in ("spoilt", "families"))
        rows.append([name, *map(_number, spoilt), _number(figures["auroc_spoilt"]), *(_number(f, 1) for f in families)])
    varies = ", ".join(f"{cell['spoilt_random_sd']:.3f} at {_alpha(cell)}" for cell in cells)
    kind = "clusters of prompts" if base["families"] == "clusters" else "kinds of task"
    title = f"spoilt share and effective families ({kind}); a random draw's spoilt share varies by {varies}"
    return TextTable(title + seeds, header, _with_lost(rows, lost, header))


def _kinds(methods: Mapping[str, Figures], lost: Sequence[str], seeds: str) -> TextTable:
    base = next(iter(methods.values()))
    kinds, cells = list(base["kinds"]), base["selections"]
    header = ["method", *(kind.replace("_", " ") for kind in kinds), *(f"twice at {_alpha(cell)}" for cell in cells)]
    rows = []
    for name, figures in methods.items():
        aurocs = [_number(figures["kinds"].get(kind, {}).get("auroc")) for kind in kinds]
        rows.append([name, *aurocs, *(_number(cell["kept_twice"]) for cell in figures["selections"])])
    title = "AUROC of clean rows against each kind; copies kept beside their original"
    return TextTable(title + seeds, header, _with_lost(rows, lost, header))


def _groups(methods: Mapping[str, Figures], seeds: str) -> TextTable | None:
    base = next(iter(methods.values()))
    if not base["groups"]:
        return None
    header = ["method"]
    rows = [[ALL_ROWS]]
    for name, group in base["groups"].items():
        header += [f"{name} at {_alpha(cell)}" for cell in base["selections"]] + [f"{name} AUROC"]
        rows[0] += [_number(group["share"])] * len(base["selections"]) + [""]
    for method, figures in methods.items():
        row = [method]
        for name in base["groups"]:
            row += [_number(cell["groups"][name]) for cell in figures["selections"]]
            row.append(_number(figures["groups"][name]["auroc"]))
        rows.append(row)
    title = "delayed credit: share of the selection that is clean and of this group; AUROC against the other clean rows"
    return TextTable(title + seeds, header, rows)


def _overlaps(overlap: Mapping[str, Any], names: Sequence[str]) -> Iterator[TextTable]:
    if len(names) < 2:
        return
    for alpha, cells in overlap.items():
        rows = [[one, *(_number(cells[one].get(other)) for other in names)] for one in names]
        yield TextTable(f"overlap of the selections at {float(alpha):.4g} (Jaccard)", ["method", *names], rows)


def _with_lost(rows: list[list[str]], lost: Sequence[str], header: Sequence[str]) -> list[list[str]]:
    return rows + [[name, FAILED, *[""] * (len(header) - 2)] for name in lost]


def _alpha(cell: Figures) -> str:
    return f"{100 * cell['alpha']:g} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def rich_table(table: TextTable) -> Table:
    shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


# -------------------------------------------------------------------------------------------- files


def write_audit(folder: Path, audit: SweepAudit) -> None:
    """audit.json: everything but the positions; audit.csv: a line a method, dataset and alpha; audit.md: the tables."""
    content = {"datasets": audit.datasets, "failed": audit.failed}
    (folder / AUDIT_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    rows = [row for dataset in audit.datasets for row in _flat(dataset)]
    rows += [{"method": name, "status": FAILED, "error": error} for name, error in audit.failed.items()]
    write_records(folder / "audit.csv", rows)
    parts = ["# Noise audit", _READING, *map(markdown, audit_tables(audit, brief=False))]
    parts += [f"failed: {name}: {error}" for name, error in audit.failed.items()]
    (folder / "audit.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _flat(dataset: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    about = {"data": dataset["data"], "seeds": " ".join(dataset["seeds"])}
    for name, figures in dataset["methods"].items():
        aurocs = {"auroc_spoilt": figures["auroc_spoilt"]}
        aurocs |= {f"auroc_{kind}": its["auroc"] for kind, its in figures["kinds"].items()}
        aurocs |= {f"auroc_{group}": its["auroc"] for group, its in figures["groups"].items()}
        whole = {f"{key}_pool": figures[key] for key in ("rows", "spoilt", "duplicates")}
        whole["families_pool"] = figures["families_pool"]
        for cell in figures["selections"]:
            plain = {key: value for key, value in cell.items() if not isinstance(value, Mapping)}
            shares = {f"share_{kind}": share for kind, share in {**cell["qualities"], **cell["groups"]}.items()}
            yield {"method": name, **about, "status": "ok", **plain, **whole, **aurocs, **shares}
