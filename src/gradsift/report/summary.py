"""The figures of one run in a few lines for people, from its `run.json` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gradsift.cost import duration
from gradsift.report.notes import remarks, warnings_of
from gradsift.report.tables import flat_rows, outcomes_text, pws_text

Run = Mapping[str, Any]
Line = tuple[str, str]  # what it is about, and the figures

_MEMORY = {"process_peak_resident_gb": "resident", "process_peak_cuda_gb": "on the GPU"}
_CUT = 240  # characters of a warning; the report and run.json have all of it


def summary(run: Run) -> list[Line]:
    """What was selected, what came of it, what it took, and what to beware of; nothing of what the run has not."""
    return [*_selected(run), *_judged(run), *_measured(run), *_took(run), *_beware(run)]


def one_line(run: Run) -> str:
    """The same of a sweep's run; the sweep ends with a table of all."""
    parts = [] if run["status"] == "finished" else [str(run["status"])]
    parts += [f"PWS {pws_text(row)}" for row in flat_rows(run)[-1:] if row["pws"] is not None]
    parts += [text for _, text in _kept(run)]
    if "seconds" in run and (work := run.get("work")):
        made, reused = _count(work["made"], "unit"), work["reused"]
        parts.append(f"{made} made in {duration(run['seconds'])}, {reused:,} reused")
    if found := warnings_of(run.get("diagnostics")):
        parts.append(f"{_count(len(found), 'warning')} ({', '.join(found)})")
    return ", ".join(parts)


def _selected(run: Run) -> Iterator[Line]:
    for label, text in _kept(run):
        selection = run["selection"]
        if selection.get("spoilt_share") is not None:
            text += f", {selection['spoilt_share']:.0%} of them spoilt"
            text += _of_all(selection.get("spoilt_share_pool"), "{:.0%}")
        if selection.get("families") is not None:
            text += f", {selection['families']:.1f} families" + _of_all(selection.get("families_pool"), "{:.1f}")
        yield label, text


def _kept(run: Run) -> Iterator[Line]:
    if "rows" in (selection := run.get("selection") or {}):
        pool = (run.get("data") or {}).get("rows")
        by = "" if run.get("scorer") == "full" else f" by {run['scorer']}"
        yield "selected", f"{selection['rows']:,}" + (f" of {pool:,}" if pool else "") + f" rows{by}"


def _of_all(value: float | None, form: str) -> str:
    return "" if value is None else f" (all rows {form.format(value)})"


def _judged(run: Run) -> Iterator[Line]:
    if run.get("pws_by_definition"):
        yield "PWS", "1 by definition: this is the model tuned on all rows"
        return
    if run.get("pooled") is None:
        return
    for number, row in enumerate(reversed(flat_rows(run))):  # pooled first
        what = "against the model tuned on all rows" if not number else row["benchmark"]
        pws = "no valid pair" if row["pws"] is None else pws_text(row)
        yield "" if number else "PWS", f"{pws} {what}, win/tie/lose {outcomes_text(row)}"


def _measured(run: Run) -> Iterator[Line]:
    for label, key, unit in (("accuracy", "accuracy", ""), ("held-out", "heldout_loss", " nats a token")):
        found = run.get(key) or {}
        if found.get("model") is None:
            continue
        others = {"all rows": found.get("reference"), "no finetuning": found.get("untuned")}
        beside = ", ".join(f"{name} {value:.3f}" for name, value in others.items() if value is not None)
        yield label, f"{found['model']:.3f}{unit}" + (f" ({beside})" if beside else "")


def _took(run: Run) -> Iterator[Line]:
    if work := run.get("work"):
        parts = [duration(run["seconds"])] if "seconds" in run else []
        if work["made"]:
            steps, tokens = f"{work['optimizer_steps']:,} steps", f"{work['forward_tokens']:,} tokens"
            parts.append(f"{_count(work['made'], 'unit')} made with {steps} and {tokens}")
        if work["reused"]:
            saved = f"{work['saved_steps']:,} steps and {work['saved_tokens']:,} tokens"
            parts.append(f"{_count(work['reused'], 'unit')} reused that had taken {saved}")
        yield "work", ", ".join(parts)
    if peaks := run.get("memory"):
        yield "memory", "at most " + ", ".join(f"{peak:.1f} GB {_MEMORY[name]}" for name, peak in peaks.items())


def _beware(run: Run) -> Iterator[Line]:
    if found := warnings_of(run.get("diagnostics")):
        (first, message), *others = found.items()
        yield _count(len(found), "warning"), f"{_cut(message)} [{first}]"
        if others:
            yield "", f"and {', '.join(name for name, _ in others)}"
    for line in remarks(run):
        yield "note", line


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else text[: _CUT - 3].rstrip() + "..."


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
