"""Warnings and remarks that a reader needs to interpret the results of a run or a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradsift.diagnostics import Diagnostic
from gradsift.evaluation.intervals import holm
from gradsift.report.run_tables import (
    LEVEL,
    OUTCOMES,
    SEEDS,
    SETTINGS,
    Row,
    Run,
    compared,
    flat_rows,
    grouped,
    with_settings,
)
from gradsift.report.table import cell_text

_RATERS = {
    "local": "judge=local with a small model only checks that the pipeline runs: its ratings mean nothing",
    "verifier": "judge=verifier rated with the embedded world's right answers: these scores are an upper bound",
}
AGAINST_RANDOM = "against_random"
_BASELINES = ("random", "full")  # scorers that need no model


def remarks(run: Run) -> list[str]:
    """Return remarks on one run, one line each."""
    lines = []
    if rejected := run.get("data", {}).get("rejected"):
        lines.append(f"{rejected:,} rows of the data were rejected; the reasons are in rejected.jsonl")
    for group, count in run.get("refused", {}).items():
        lines.append(f"{group}.template cannot show {count:,} rows; the reasons are in the {group}'s refused.jsonl")
    if left_out := run.get("heldout_left_out"):
        lines.append(f"{left_out:,} held-out rows have no loss: target.template cannot show them, or no token is left")
    for reason, count in run.get("scores", {}).get("reasons", {}).items():
        lines.append(f"{count:,} rows have no score or are dropped by the method: {reason}")
    selection = run.get("selection", {})
    if sources := selection.get("sources"):
        pool = run["data"]["sources"]
        counts = ", ".join(f"{name} {sources.get(name, 0):,} of {rows:,}" for name, rows in pool.items())
        lines.append(f"selected rows by source: {counts}")
    if shortfall := selection.get("shortfall"):
        scored = run.get("scores", {}).get("statuses", {}).get("scored")
        early = scored is not None and selection["rows"] < scored
        why = "the selector stopped early" if early else "no more rows have a score"
        lines.append(f"the selection is {shortfall:,} rows short of its budget: {why}")
    if run.get("proxy") == "tiny_bytes" and "scores" in run and run.get("scorer") not in _BASELINES:
        lines.append(
            "proxy=tiny_bytes has random weights and only checks that the pipeline runs; its scores mean nothing"
        )
    if run.get("dry_run"):
        lines.append("judge.dry_run=true: nothing was sent; the same command without it continues from here")
    if run.get("scorer") == "llm_rating" and "scores" in run and run.get("judge") in _RATERS:
        lines.append(_RATERS[run["judge"]])
    if run.get("judge") == "local" and run.get("status") == "finished":
        lines.append("judge=local with a small model only checks that the pipeline runs: its PWS means nothing")
    return lines


def remarks_of_all(runs: Iterable[Run]) -> list[str]:
    """Return the remarks on several runs, each once, with the number of runs if a remark applies to several."""
    counts = Counter(line for run in runs for line in remarks(run))
    return [line + (f" ({times} runs)" if times > 1 else "") for line, times in counts.items()]


def warnings_of(diagnostics: Mapping[str, Mapping[str, Any]] | None) -> dict[str, str]:
    """Return a dict from the name of each diagnostic with the verdict `warning` to its message."""
    return {name: d["message"] for name, d in (diagnostics or {}).items() if d["verdict"] == "warning"}


def against_random(runs: Sequence[Run]) -> list[Diagnostic]:
    """Compare the PWS of each method (a scorer with its settings) with random selection; return a diagnostic for each.

    The pooled PWS of a run is compared with the pooled PWS of its counterparts. The counterparts of a run are the runs
    with random selection that have the same seeds and the same settings, apart from the scorer and its constants. A
    method without counterparts has no diagnostic. The p-values come from paired tests over all seeds, with Holm's
    correction over the methods. A method is not tested if one of its runs has several counterparts.
    """
    rows = [flat_rows(run)[-1] for run in with_settings(runs)]  # the pooled row, or the only one
    rows = [row for row in rows if row["pws"] is not None and row["scorer"] != "full"]
    named = [n for n in SETTINGS if n in ("scorer", "alpha") or len({row[n] for row in rows}) > 1]
    random = grouped([row for row in rows if row["scorer"] == "random"], _shared_with_random)
    methods = grouped(
        [row for row in rows if row["scorer"] != "random" and _shared_with_random(row) in random],
        lambda row: ", ".join(cell_text(row[n]) for n in named if row[n] != ""),
    )
    counterparts = {name: [random[_shared_with_random(row)] for row in own] for name, own in methods.items()}
    p_values = {}
    for name, own in methods.items():
        if all(len(known) == 1 for known in counterparts[name]):
            theirs = [known[0][OUTCOMES] for known in counterparts[name]]
            test = compared({OUTCOMES: [row[OUTCOMES] for row in own]}, {OUTCOMES: theirs})
            if test is not None:
                p_values[name] = test.p_value
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [_compared(name, own, counterparts[name], adjusted.get(name)) for name, own in methods.items()]


def _shared_with_random(row: Row) -> tuple[Any, ...]:
    """Return the values in which a run and its counterpart with random selection must be equal."""
    settings = tuple(o for o in row["settings"].split(" ") if not o.startswith(("scorer.", "method=")))
    return (*(row[name] for name in (*SETTINGS, *SEEDS) if name not in ("scorer", "settings")), settings)


def _compared(name: str, rows: Sequence[Row], random: Sequence[Sequence[Row]], p_value: float | None) -> Diagnostic:
    ours = [row["pws"] for row in rows]
    theirs = [sum(one["pws"] for one in known) / len(known) for known in random]
    pws, pws_random = sum(ours) / len(ours), sum(theirs) / len(theirs)
    lower = sum(one < other for one, other in zip(ours, theirs, strict=True))
    values = {"difference": pws - pws_random, "pws": pws, "pws_random": pws_random, "p_value": p_value}
    tested = "" if p_value is None else f" (a paired test {'tells' if p_value < LEVEL else 'does not tell'} them apart)"
    return Diagnostic.judged(
        f"{AGAINST_RANDOM} ({name})",
        pws < pws_random,
        values | {"pairs": len(rows), "pairs_lower": lower},
        f"{name}: PWS {pws:.3f} against {pws_random:.3f} for random rows, lower in {lower} of {len(rows)} pairs of "
        f"runs{tested}",
        "the runs' own warnings, the full-data baseline (scorer=full: near random there is little to select), "
        "and more seeds before relying on it",
    )
