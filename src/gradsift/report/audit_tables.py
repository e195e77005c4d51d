"""The noise audit of a sweep: tables that compare all methods, and the files audit.json, audit.csv and audit.md.

If datasets differ by seeds alone, the tables show the means over the datasets, and the CSV has rows for each dataset.
If the sweep varies an option of the data, each value of the option gets tables of its own. A method that did not finish
on all datasets has a row without values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradsift.report.run_tables import SEED_KEYS, Run, grouped, method_name, with_settings
from gradsift.report.table import Table, fixed, percent, write_records
from gradsift.selection.audit import AUDIT_FILE

Figures = Mapping[str, Any]  # the audit of one method, as `selection.audit.audit` returns it
Verdict = Mapping[str, str]  # by alpha (as text): CLEANER, DIRTIER, TOO_FEW or ""

ALL_ROWS = "(all rows)"
FAILED = "failed"
CLEANER, DIRTIER, TOO_FEW = "cleaner", "dirtier", "too few rows"
# Overrides with these keys are left out of a method's name: the name has the scorer anyway, and the audit does not
# depend on the others.
_TOLD_APART = ("scorer", "alpha", "target")
_SPREADS = 2  # a spoilt share within so many standard deviations of a random draw counts as chance
_READING = (
    "How to read it: a method is useful on this data if the spoilt share of its selection is below that of all rows by "
    "more than a random draw varies, at the budgets that matter. `against chance` names the alphas at which it is more "
    f"than {_SPREADS} standard deviations of a random draw below (cleaner) or above (dirtier). AUROC is the chance "
    "that a clean row scores higher than a corrupted one (0.5: it cannot tell them apart); it describes the whole pool "
    "rather than the rows that are selected. A copy scores much like its original, so AUROC does not show how copies "
    "are treated; `kept twice` does: it is the share of selected copies whose original is selected too. Few families "
    "mean that the selection covers few kinds of task."
)


@dataclass(frozen=True)
class SweepAudit:
    """All audits of a sweep."""

    # keys: data (fingerprint), options, seeds, methods {name: figures}, overlap {alpha: {name: {name: Jaccard}}}
    datasets: list[dict[str, Any]]
    failed: list[dict[str, Any]]  # keys: method, options, seeds, error


def sweep_audit(jobs: Sequence[tuple[Path, Run]]) -> SweepAudit | None:
    """Return the audits of jobs; None if no job was audited.

    Each job is given as a pair: the path of its `run.json`, and the content of this file.
    """
    datasets: dict[tuple[str, ...], dict[str, Any]] = {}
    failed: list[dict[str, Any]] = []
    records = [run for _, run in jobs]
    overrides = [run.get("overrides") or [] for run in records]
    keys = {override.split("=", 1)[0] for own in overrides for override in own}
    of_data = {key for key in keys if key == "data" or key.startswith("data.")}
    runs, with_data = with_settings(records, (*_TOLD_APART, *of_data)), with_settings(records, tuple(keys - of_data))
    for (path, _), run, data_run, own in zip(jobs, runs, with_data, overrides, strict=True):
        given = dict(override.split("=", 1) for override in own if "=" in override)
        seeds = [override for override in own if override.split("=", 1)[0] in SEED_KEYS]
        about = {"options": data_run["settings"], "seeds": seeds}
        name = method_name(run.get("scorer") or given.get("scorer", "?"), run["settings"])
        if "audit" in run and not (path.parent / AUDIT_FILE).is_file():
            failed.append({"method": name, **about, "error": f"{AUDIT_FILE} is not in the run's folder any more"})
        elif "audit" in run:
            figures = json.loads((path.parent / AUDIT_FILE).read_text(encoding="utf-8"))
            key = (figures["data"], *seeds)
            dataset = datasets.setdefault(key, {"data": figures["data"], **about, "methods": {}})
            dataset["methods"][name] = figures
        elif run["status"] in (FAILED, "interrupted"):
            failed.append({"method": name, **about, "error": run["error"]})
    for dataset in datasets.values():
        positions: dict[str, dict[str, list[int]]] = {}  # by alpha and method
        for name, figures in dataset["methods"].items():
            for selection in figures["selections"]:
                positions.setdefault(f"{selection['alpha']:g}", {})[name] = selection.pop("positions")
        dataset["overlap"] = {
            alpha: {one: {other: jaccard(own[one], own[other]) for other in own} for one in own}
            for alpha, own in positions.items()
        }
    return SweepAudit(list(datasets.values()), failed) if datasets else None


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the Jaccard index of two selections: the size of their intersection divided by that of their union.

    The index is 1 if both selections are empty.
    """
    union = set(one) | set(other)
    return len(set(one) & set(other)) / len(union) if union else 1.0


def mean_of(values: Sequence[Any]) -> Any:
    """Return the mean of nested structures, number by number. A mean is None where any structure has None.

    Texts are taken from the first structure. Keys that any structure lacks are left out, and lists are cut to the
    length of the shortest.
    """
    first = values[0]
    if isinstance(first, Mapping):
        shared = [key for key in first if all(key in value for value in values)]
        return {key: mean_of([value[key] for value in values]) for key in shared}
    if isinstance(first, list):
        return [mean_of(items) for items in zip(*values, strict=False)]
    if any(value is None for value in values):
        return None
    return sum(values) / len(values) if isinstance(first, int | float) else first


def audit_tables(audit: SweepAudit, *, brief: bool) -> list[Table]:
    """Return the tables of an audit. If `brief`, the overlaps of the selections are shown at the middle alpha only."""
    by_options = grouped(audit.datasets, lambda dataset: str(dataset["options"]))
    tables = []
    for options, datasets in by_options.items():
        failed = [failure["method"] for failure in audit.failed if failure["options"] == options]
        tables += _tables_of(options, datasets, failed, brief)
    return tables


def _tables_of(options: str, datasets: Sequence[Mapping[str, Any]], failed: Sequence[str], brief: bool) -> list[Table]:
    """Return the tables for datasets that differ only by seeds; no table if no method was audited on all datasets."""
    names = dict.fromkeys(name for dataset in datasets for name in dataset["methods"])
    everywhere = [name for name in names if all(name in dataset["methods"] for dataset in datasets)]
    if not everywhere:
        return []
    means = {name: mean_of([dataset["methods"][name] for dataset in datasets]) for name in everywhere}
    methods = dict(sorted(means.items(), key=lambda item: sum(cell["spoilt"] for cell in item[1]["selections"])))
    different = len({dataset["data"] for dataset in datasets})
    tables = [_spoilt_table(methods, different), _kinds_table(methods)]
    for name in dict.fromkeys((*names, *failed)):
        if name not in methods:
            count = sum(name not in dataset["methods"] for dataset in datasets)
            where = f" on {count} of {len(datasets)} datasets" if name in names else ""
            row = [name, (FAILED if name in failed else "not run") + where]
            tables = [replace(each, rows=[*each.rows, [*row, *[""] * (len(each.header) - 2)]]) for each in tables]
    tables += _groups_table(methods)
    overlap = mean_of([dataset["overlap"] for dataset in datasets])
    alphas = [list(overlap)[len(overlap) // 2]] if brief else list(overlap)
    for alpha in alphas if len(methods) > 1 else ():
        rows = [[one, *(fixed(overlap[alpha][one].get(other), 2) for other in methods)] for one in methods]
        tables.append(Table(f"overlap of the selections at {float(alpha):.4g} (Jaccard)", ["method", *methods], rows))
    title = f"; {options}" if options else ""
    if len(datasets) > 1:
        title += f"; means of {len(datasets)} {'datasets' if different == len(datasets) else 'runs'}"
    return [replace(table, title=table.title + title) for table in tables]


def _verdict(figures: Figures, datasets: int) -> Verdict:
    """Return a verdict for each alpha: CLEANER or DIRTIER than chance, TOO_FEW, or "" if the share is within chance.

    Chance is the pool's spoilt share plus or minus `_SPREADS` standard deviations of a random draw. The verdict is
    TOO_FEW if even a selection without a spoilt row would be within chance and the selection is not DIRTIER. The
    figures are means over `datasets` datasets with different corrupted rows, so the standard deviation is divided by
    the square root of `datasets`.
    """
    verdict = {}
    for cell in figures["selections"]:
        chance = _SPREADS * cell["spoilt_random_sd"] / math.sqrt(datasets)
        outcome = TOO_FEW if chance >= figures["spoilt"] else ""
        if cell["spoilt"] < figures["spoilt"] - chance:
            outcome = CLEANER
        elif cell["spoilt"] > figures["spoilt"] + chance:
            outcome = DIRTIER
        verdict[percent(cell["alpha"])] = outcome
    return verdict


def _verdict_text(verdict: Verdict) -> str:
    """Return a verdict as text: "cleaner", "dirtier" or "too few rows" if the verdict is the same for all alphas.

    Otherwise the text names the alphas that are cleaner or dirtier, such as "dirtier at 5 %"; without such alphas it is
    "no different".
    """
    if set(verdict.values()) in ({CLEANER}, {DIRTIER}, {TOO_FEW}):
        return next(iter(verdict.values()))
    parts = []
    for word in (CLEANER, DIRTIER):
        if alphas := [alpha for alpha, outcome in verdict.items() if outcome == word]:
            parts.append(f"{word} at {', '.join(alphas)}")
    return "; ".join(parts) or "no different"


def _summary(methods: Mapping[str, Figures], verdicts: Mapping[str, Verdict]) -> str:
    """Return the note of the first table: it names the methods that are cleaner or dirtier than chance, and caveats."""
    base = next(iter(methods.values()))
    alphas = [percent(cell["alpha"]) for cell in base["selections"]]
    middle = len(alphas) // 2
    cleaner = [
        f"{name} ({methods[name]['selections'][middle]['families']:.1f})"
        for name, verdict in verdicts.items()
        if set(verdict.values()) == {CLEANER}
    ]
    dirtier = [name for name, verdict in verdicts.items() if DIRTIER in verdict.values()]
    families = f" (families kept at {alphas[middle]}, of {base['families_pool']:.1f})" if cleaner else ""
    lines = [f"Cleaner than a random draw at every alpha: {', '.join(cleaner) or 'none'}{families}."]
    if dirtier:
        lines.append(f"Dirtier than a random draw at some alpha: {', '.join(dirtier)}.")
    short = []
    for name, figures in methods.items():
        for place, cell in enumerate(figures["selections"]):
            most = max(other["selections"][place]["rows"] for other in methods.values())
            if cell["rows"] < most:
                short.append(f"{name} ({cell['rows']:.4g} of {most:.4g} at {percent(cell['alpha'])})")
    if short:
        lines.append(f"Fewer rows than others selected: {', '.join(short)}.")
    if few := [alpha for alpha in alphas if any(verdict[alpha] == TOO_FEW for verdict in verdicts.values())]:
        lines.append(
            f"At {', '.join(few)} too few rows are selected to tell: even a selection without a spoilt row is within "
            "chance. Take more rows (data.limit), a larger data.corruption.share, or means over "
            "data.corruption.seed=0,1,2."
        )
    return " ".join(lines)


def _spoilt_table(methods: Mapping[str, Figures], datasets: int) -> Table:
    base = next(iter(methods.values()))
    cells = base["selections"]
    alphas = [percent(cell["alpha"]) for cell in cells]
    verdicts = {name: _verdict(figures, datasets) for name, figures in methods.items()}
    header = ["method", *(f"spoilt at {alpha}" for alpha in alphas), "against chance", "AUROC"]
    header += [f"families at {alpha}" for alpha in alphas]
    spoilt_pool, families_pool = fixed(base["spoilt"], 2), fixed(base["families_pool"], 1)
    rows = [[ALL_ROWS, *[spoilt_pool] * len(cells), "", "", *[families_pool] * len(cells)]]
    for name, figures in methods.items():
        spoilt = [fixed(cell["spoilt"], 2) for cell in figures["selections"]]
        families = [fixed(cell["families"], 1) for cell in figures["selections"]]
        rows.append([name, *spoilt, _verdict_text(verdicts[name]), fixed(figures["auroc_spoilt"], 2), *families])
    varies = ", ".join(f"{cell['spoilt_random_sd']:.3f} at {percent(cell['alpha'])}" for cell in cells)
    kind = "clusters of prompts" if base["families"] == "clusters" else "kinds of task"
    title = f"spoilt share and effective families ({kind}); the spoilt share of a random draw varies by {varies}"
    return Table(title, header, rows, note=_summary(methods, verdicts))


def _kinds_table(methods: Mapping[str, Figures]) -> Table:
    base = next(iter(methods.values()))
    kinds, alphas = list(base["kinds"]), [percent(cell["alpha"]) for cell in base["selections"]]
    header = ["method", *(kind.replace("_", " ") for kind in kinds), *(f"kept twice at {alpha}" for alpha in alphas)]
    rows = []
    for name, figures in methods.items():
        aurocs = [fixed(figures["kinds"].get(kind, {}).get("auroc"), 2) for kind in kinds]
        rows.append([name, *aurocs, *(fixed(cell["kept_twice"], 2) for cell in figures["selections"])])
    return Table("AUROC of clean rows against each kind; copies kept beside their original", header, rows)


def _groups_table(methods: Mapping[str, Figures]) -> list[Table]:
    """Return a list with the table of the groups in `selection.audit.GROUPS`; an empty list if the data has none."""
    base = next(iter(methods.values()))
    header, pool = ["method"], [ALL_ROWS]
    for name, group in base["groups"].items():
        header += [*(f"{name} at {percent(cell['alpha'])}" for cell in base["selections"]), f"{name} AUROC"]
        pool += [*[fixed(group["share"], 2)] * len(base["selections"]), ""]
    rows = [pool]
    for method, figures in methods.items():
        row = [method]
        for name in base["groups"]:
            row += [fixed(cell["groups"][name], 2) for cell in figures["selections"]]
            row.append(fixed(figures["groups"][name]["auroc"], 2))
        rows.append(row)
    title = "delayed credit: share of the selection that is clean and of this group; AUROC against the other clean rows"
    return [Table(title, header, rows)] if base["groups"] else []


def write_audit(folder: Path, audit: SweepAudit) -> None:
    """Write audit.json, audit.csv (a row for each method, dataset and alpha) and audit.md (the tables) to `folder`."""
    text = json.dumps(asdict(audit), indent=1, allow_nan=False)
    (folder / AUDIT_FILE).write_text(text + "\n", encoding="utf-8")
    rows = [row for dataset in audit.datasets for row in _flat(dataset)]
    rows += [{**failure, "seeds": " ".join(failure["seeds"]), "status": FAILED} for failure in audit.failed]
    write_records(folder / "audit.csv", rows)
    parts = ["# Noise audit", _READING, *(table.markdown() for table in audit_tables(audit, brief=False))]
    for failure in audit.failed:
        about = [failure["method"], *filter(None, [failure["options"]]), *failure["seeds"]]
        parts.append(f"failed: {' '.join(about)}: {failure['error']}")
    (folder / "audit.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _flat(dataset: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    about = {"data": dataset["data"], "options": dataset["options"], "seeds": " ".join(dataset["seeds"])}
    for name, figures in dataset["methods"].items():
        pool = {f"{key}_pool": figures[key] for key in ("rows", "spoilt", "duplicates")}
        pool["families_pool"] = figures["families_pool"]
        aurocs = {"auroc_spoilt": figures["auroc_spoilt"]}
        aurocs |= {f"auroc_{key}": each["auroc"] for key, each in {**figures["kinds"], **figures["groups"]}.items()}
        for cell in figures["selections"]:
            plain = {key: value for key, value in cell.items() if not isinstance(value, Mapping)}
            shares = {f"share_{kind}": share for kind, share in {**cell["qualities"], **cell["groups"]}.items()}
            yield {"method": name, **about, "status": "ok", **plain, **pool, **aurocs, **shares}
