"""The noise audit of a sweep: every method beside the others, on the terminal and as audit.json, audit.csv, audit.md.

Methods are compared on one and the same corrupted dataset; over several that differ by seeds their means are shown,
and the CSV has each. Where the sweep varies an option of the data, each value has tables of its own. A method that
failed on one of the datasets is in no mean.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gradsift.report.tables import SEED_KEYS, method_name, with_settings
from gradsift.report.text_table import TextTable, markdown, write_records
from gradsift.selection.audit import AUDIT_FILE

Run = Mapping[str, Any]
Figures = Mapping[str, Any]

ALL_ROWS = "(all rows)"
FAILED = "failed"
CLEANER, DIRTIER, TOO_FEW, AS_CHANCE = "cleaner", "dirtier", "too few rows", "no different"
# overrides that name no method: the scorer is named anyway, and the others change no audit
_TOLD_APART = ("scorer", "alpha", "target")
_SPREADS = 2  # of a random draw: a spoilt share within them of that of all rows is taken for chance
_READING = (
    "How to read it: a method is of use on this data where the spoilt share of its selection lies below that of all "
    "rows by more than a random draw varies, at the budgets that matter; `against chance` says at which alpha it lies "
    f"more than {_SPREADS} standard deviations of a random draw below (cleaner) or above (dirtier). AUROC is the "
    "chance that a clean row scores higher than a corrupted one (0.5: it cannot tell); it speaks of the whole pool, "
    "not of the head that is selected. A copy scores much as its original does, so AUROC cannot say how copies are "
    "dealt with; `kept twice` can: the share of selected copies whose original is selected too. Few families: the "
    "selection is of one kind."
)


@dataclass(frozen=True)
class SweepAudit:
    """All audits of a sweep."""

    # data (fingerprint), options, seeds, methods {name: figures}, overlap {alpha: {name: {name: Jaccard}}}
    datasets: list[dict[str, Any]]
    failed: list[dict[str, Any]]  # method, options, seeds, error


def sweep_audit(jobs: Sequence[tuple[Path, Run]]) -> SweepAudit | None:
    """The audits of these jobs (their `run.json` and its content); None where there is none."""
    datasets: dict[tuple[str, ...], dict[str, Any]] = {}
    failed: list[dict[str, Any]] = []
    of_data = {key for _, run in jobs for key in _keys(run) if key == "data" or key.startswith("data.")}
    runs = with_settings([run for _, run in jobs], (*_TOLD_APART, *of_data))
    for (path, _), run, about in zip(jobs, runs, _datasets([run for _, run in jobs], of_data), strict=True):
        name = _method(run)
        if "audit" not in run:
            if run["status"] in (FAILED, "interrupted"):
                failed.append({"method": name, **about, "error": run["error"]})
            continue
        figures = json.loads((path.parent / AUDIT_FILE).read_text(encoding="utf-8"))
        key = (figures["data"], *about["seeds"])
        dataset = datasets.setdefault(key, {"data": figures["data"], **about, "methods": {}})
        dataset["methods"][name] = figures
    for dataset in datasets.values():
        dataset["overlap"] = _overlap(dataset["methods"])
        for figures in dataset["methods"].values():
            for selection in figures["selections"]:
                del selection["positions"]
    return SweepAudit(list(datasets.values()), failed) if datasets else None


def _keys(run: Run) -> list[str]:
    return [override.split("=", 1)[0] for override in run.get("overrides") or []]


def _datasets(runs: Sequence[Run], of_data: Set[str]) -> list[dict[str, Any]]:
    """What a run's overrides say of its data: the seeds, and those options that not all runs share."""
    own = [run.get("overrides") or [] for run in runs]
    shared = set(own[0]).intersection(*own) if own else set()
    found = []
    for overrides in own:
        keyed = [(override.split("=", 1)[0], override) for override in overrides]
        options = [o for key, o in keyed if key in of_data and key not in SEED_KEYS and o not in shared]
        found.append({"options": " ".join(options), "seeds": [o for key, o in keyed if key in SEED_KEYS]})
    return found


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
    groups = dict.fromkeys(dataset["options"] for dataset in audit.datasets)
    return [table for options in groups for table in _tables_of(audit, options, brief)]


def _tables_of(audit: SweepAudit, options: str, brief: bool) -> list[TextTable]:
    """The tables of the datasets that differ by seeds alone."""
    datasets = [dataset for dataset in audit.datasets if dataset["options"] == options]
    failed = [failure for failure in audit.failed if failure["options"] == options]
    names = dict.fromkeys(name for dataset in datasets for name in dataset["methods"])
    whole = [name for name in names if all(name in dataset["methods"] for dataset in datasets)]
    if not whole:
        return []
    means = {name: mean_of([dataset["methods"][name] for dataset in datasets]) for name in whole}
    methods = dict(sorted(means.items(), key=lambda item: sum(cell["spoilt"] for cell in item[1]["selections"])))
    overlap = mean_of([dataset["overlap"] for dataset in datasets])
    different = len({dataset["data"] for dataset in datasets})
    means_of = f"{len(datasets)} {'datasets' if different == len(datasets) else 'runs'}"
    about = (f"; {options}" if options else "") + (f"; means of {means_of}" if len(datasets) > 1 else "")
    lost = [name for name in dict.fromkeys((*names, *(f["method"] for f in failed))) if name not in methods]
    said = [(name, _failed_on(name, datasets)) for name in lost]
    verdicts = {name: _verdict(figures, different) for name, figures in methods.items()}
    found = [_kept(methods, verdicts, said), _kinds(methods, said), _groups(methods)]
    if brief:
        middle = list(overlap)[len(overlap) // 2]
        overlap = {middle: overlap[middle]}
    tables = [table for table in found if table] + list(_overlaps(overlap, list(methods)))
    return [replace(table, title=table.title + about) for table in tables]


def _failed_on(name: str, datasets: Sequence[Mapping[str, Any]]) -> str:
    there = sum(name in dataset["methods"] for dataset in datasets)
    return FAILED if not there else f"{FAILED} on {len(datasets) - there} of {len(datasets)} datasets"


def _verdict(figures: Figures, datasets: int) -> dict[str, list[str]]:
    """The alphas at which a selection is cleaner than chance, dirtier, or could not have been either.

    Args:
        datasets: how many the figures are means over; a mean of random draws varies less, but not where the corrupted
            rows are the same ones.
    """
    found: dict[str, list[str]] = {CLEANER: [], DIRTIER: [], TOO_FEW: []}
    for cell in figures["selections"]:
        chance = _SPREADS * cell["spoilt_random_sd"] / math.sqrt(datasets)
        if cell["spoilt"] < figures["spoilt"] - chance:
            found[CLEANER].append(_alpha(cell))
        elif cell["spoilt"] > figures["spoilt"] + chance:
            found[DIRTIER].append(_alpha(cell))
        elif chance >= figures["spoilt"]:
            found[TOO_FEW].append(_alpha(cell))
    return found


def _in_words(verdict: Mapping[str, list[str]], alphas: Sequence[str]) -> str:
    """As in `cleaner`, `dirtier at 5 %`, `no different`; at no alpha in particular where it is all of them."""
    parts = [
        word if verdict[word] == alphas else f"{word} at {', '.join(verdict[word])}"
        for word in (CLEANER, DIRTIER)
        if verdict[word]
    ]
    return "; ".join(parts) or (TOO_FEW if verdict[TOO_FEW] == alphas else AS_CHANCE)


def _summary(methods: Mapping[str, Figures], verdicts: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Who can be trusted, in words: the note of the first table."""
    base = next(iter(methods.values()))
    alphas = [_alpha(cell) for cell in base["selections"]]
    middle = len(alphas) // 2

    def kept(name: str) -> str:
        return f"{name} ({methods[name]['selections'][middle]['families']:.1f})"

    cleaner = [kept(name) for name, verdict in verdicts.items() if verdict[CLEANER] == alphas]
    dirtier = [name for name, verdict in verdicts.items() if verdict[DIRTIER]]
    lines = [
        f"Cleaner than a random draw at every alpha: {', '.join(cleaner) or 'none'}"
        + (f" (families kept at {alphas[middle]}, of {base['families_pool']:.1f})." if cleaner else ".")
    ]
    if dirtier:
        lines.append(f"Dirtier than one somewhere: {', '.join(dirtier)}.")
    if short := list(_short(methods)):
        lines.append(f"Fewer rows than others selected: {', '.join(short)}.")
    if few := [alpha for alpha in alphas if any(alpha in verdict[TOO_FEW] for verdict in verdicts.values())]:
        lines.append(
            f"At {', '.join(few)} too few rows are selected to tell: one without a single spoilt row is within chance. "
            "Take more rows (data.limit), a larger data.corruption.share, or means over data.corruption.seed=0,1,2."
        )
    return " ".join(lines)


def _short(methods: Mapping[str, Figures]) -> Iterator[str]:
    """Selections that hold fewer rows than the largest at their alpha, as in `x (3 of 13 at 10 %)`."""
    for name, figures in methods.items():
        for place, cell in enumerate(figures["selections"]):
            most = max(theirs["selections"][place]["rows"] for theirs in methods.values())
            if cell["rows"] < most:
                yield f"{name} ({cell['rows']:.4g} of {most:.4g} at {_alpha(cell)})"


def _kept(
    methods: Mapping[str, Figures],
    verdicts: Mapping[str, Mapping[str, list[str]]],
    lost: Sequence[tuple[str, str]],
) -> TextTable:
    base = next(iter(methods.values()))
    cells = base["selections"]
    alphas = [_alpha(cell) for cell in cells]
    header = ["method", *(f"spoilt at {alpha}" for alpha in alphas), "against chance", "AUROC"]
    header += [f"families at {alpha}" for alpha in alphas]
    of_all = [[_number(base["spoilt"])] * len(cells), ["", ""], [_number(base["families_pool"], 1)] * len(cells)]
    rows = [[ALL_ROWS, *itertools.chain(*of_all)]]
    for name, figures in methods.items():
        spoilt, families = ([cell[key] for cell in figures["selections"]] for key in ("spoilt", "families"))
        told = [_in_words(verdicts[name], alphas), _number(figures["auroc_spoilt"])]
        rows.append([name, *map(_number, spoilt), *told, *(_number(f, 1) for f in families)])
    varies = ", ".join(f"{cell['spoilt_random_sd']:.3f} at {_alpha(cell)}" for cell in cells)
    kind = "clusters of prompts" if base["families"] == "clusters" else "kinds of task"
    title = f"spoilt share and effective families ({kind}); a random draw's spoilt share varies by {varies}"
    return TextTable(title, header, _with_lost(rows, lost, header), note=_summary(methods, verdicts))


def _kinds(methods: Mapping[str, Figures], lost: Sequence[tuple[str, str]]) -> TextTable:
    base = next(iter(methods.values()))
    kinds, cells = list(base["kinds"]), base["selections"]
    header = ["method", *(kind.replace("_", " ") for kind in kinds), *(f"twice at {_alpha(cell)}" for cell in cells)]
    rows = []
    for name, figures in methods.items():
        aurocs = [_number(figures["kinds"].get(kind, {}).get("auroc")) for kind in kinds]
        rows.append([name, *aurocs, *(_number(cell["kept_twice"]) for cell in figures["selections"])])
    title = "AUROC of clean rows against each kind; copies kept beside their original"
    return TextTable(title, header, _with_lost(rows, lost, header))


def _groups(methods: Mapping[str, Figures]) -> TextTable | None:
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
    return TextTable(title, header, rows)


def _overlaps(overlap: Mapping[str, Any], names: Sequence[str]) -> Iterator[TextTable]:
    if len(names) < 2:
        return
    for alpha, cells in overlap.items():
        rows = [[one, *(_number(cells[one].get(other)) for other in names)] for one in names]
        yield TextTable(f"overlap of the selections at {float(alpha):.4g} (Jaccard)", ["method", *names], rows)


def _with_lost(rows: list[list[str]], lost: Sequence[tuple[str, str]], header: Sequence[str]) -> list[list[str]]:
    return rows + [[name, why, *[""] * (len(header) - 2)] for name, why in lost]


def _alpha(cell: Figures) -> str:
    return f"{100 * cell['alpha']:g} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def rich_table(table: TextTable) -> Table:
    shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.caption, shown.caption_justify = table.note or None, "left"
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left", no_wrap=not number, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


# -------------------------------------------------------------------------------------------- files


def write_audit(folder: Path, audit: SweepAudit) -> None:
    """audit.json: everything but the positions; audit.csv: a line a method, dataset and alpha; audit.md: the tables."""
    content = {"datasets": audit.datasets, "failed": audit.failed}
    (folder / AUDIT_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    rows = [row for dataset in audit.datasets for row in _flat(dataset)]
    rows += [{**failure, "seeds": " ".join(failure["seeds"]), "status": FAILED} for failure in audit.failed]
    write_records(folder / "audit.csv", rows)
    parts = ["# Noise audit", _READING, *map(markdown, audit_tables(audit, brief=False))]
    for failure in audit.failed:
        about = [failure["method"], *filter(None, [failure["options"]]), *failure["seeds"]]
        parts.append(f"failed: {' '.join(about)}: {failure['error']}")
    (folder / "audit.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _flat(dataset: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    about = {"data": dataset["data"], "options": dataset["options"], "seeds": " ".join(dataset["seeds"])}
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
