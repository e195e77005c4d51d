"""What a reader of a run's figures has to beware of, in a line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_RATERS = {
    "local": "judge=local rated with a small model: a plumbing check, its scores say nothing of the rows",
    "verifier": "judge=verifier rated as an oracle that knows the embedded world's right answers: an upper bound",
}
_BASELINES = ("random", "full")  # ask no model for anything


def remarks(run: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    lines = []
    if rejected := run.get("data", {}).get("rejected"):
        lines.append(f"{rejected:,} rows of the data were rejected; the reasons are in rejected.jsonl")
    for reason, count in run.get("scores", {}).get("reasons", {}).items():
        lines.append(f"{count:,} rows have no score or are dropped by the method: {reason}")
    selection = run.get("selection", {})
    if shortfall := selection.get("shortfall"):
        scored = run.get("scores", {}).get("statuses", {}).get("scored")
        early = scored is not None and selection["rows"] < scored
        why = "the selector stopped before" if early else "no more rows have a score"
        lines.append(f"the selection is {shortfall:,} rows short of its budget: {why}")
    if run.get("proxy") == "tiny_bytes" and "scores" in run and run.get("scorer") not in _BASELINES:
        lines.append("proxy=tiny_bytes has random weights: its scores are a plumbing check and say nothing of the rows")
    if run.get("dry_run"):
        lines.append("judge.dry_run=true: nothing was sent; the same command without it goes on from here")
    if run.get("scorer") == "llm_rating" and "scores" in run and run.get("judge") in _RATERS:
        lines.append(_RATERS[run["judge"]])
    if run.get("judge") == "local" and run.get("status") == "finished":
        lines.append("judge=local with a small model is a plumbing check: its PWS says nothing about quality")
    return lines


def remarks_of_all(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The remarks of several runs, each once, with the number of runs that it is about."""
    told: dict[str, int] = {}
    for run in runs:
        for line in remarks(run):
            told[line] = told.get(line, 0) + 1
    return [line + (f" ({times} runs)" if times > 1 else "") for line, times in told.items()]


def warnings_of(diagnostics: Mapping[str, Mapping[str, Any]] | None) -> dict[str, str]:
    """The messages of those diagnostics that warn, by name.

    They stand in the order of the line, ensemble before selection: the first may be the cause of the others.
    """
    found = (diagnostics or {}).items()
    return {name: diagnostic["message"] for name, diagnostic in found if diagnostic["verdict"] == "warning"}
