"""The results of one run in a few lines, from its `run.json` alone."""

from __future__ import annotations

from collections.abc import Iterator

from gradsift.cost import duration
from gradsift.report.notes import remarks, warnings_of
from gradsift.report.run_tables import Run, flat_rows, outcomes_text, pws_text
from gradsift.report.table import counted

Line = tuple[str, str]  # label and text

_MEMORY = {"process_peak_resident_gb": "resident", "process_peak_cuda_gb": "on the GPU"}
_LONGEST_WARNING = 240  # characters of a message; the report and run.json have the whole message


def summary(run: Run) -> Iterator[Line]:
    """Yield lines on the selection, the results, the cost and the warnings of a run, as far as it has them."""
    if text := _kept(run):
        selection = run["selection"]
        for key, form, words in (("spoilt_share", ".0%", "of them spoilt"), ("families", ".1f", "families")):
            if (value := selection.get(key)) is not None:
                text += f", {value:{form}} {words}"
                if (pool := selection.get(f"{key}_pool")) is not None:
                    text += f" (all rows {pool:{form}})"
        yield "selected", text
    if run.get("pws_by_definition"):
        yield "PWS", "1 by definition: this is the model tuned on all rows"
    elif run.get("pooled") is not None:
        for number, row in enumerate(reversed(flat_rows(run))):  # pooled first
            where = "against the model tuned on all rows" if not number else row["benchmark"]
            pws = "no valid pair" if row["pws"] is None else pws_text(row)
            if row["pws_length_controlled"] is not None:
                where += f", {row['pws_length_controlled']:.3f} at equal length"
            yield "" if number else "PWS", f"{pws} {where}, win/tie/lose {outcomes_text(row)}"
    for label, key, unit in (("accuracy", "accuracy", ""), ("held-out", "heldout_loss", " nats a token")):
        values = run.get(key) or {}
        if values.get("model") is not None:
            others = {"all rows": values.get("reference"), "no finetuning": values.get("untuned")}
            beside = ", ".join(f"{name} {value:.3f}" for name, value in others.items() if value is not None)
            yield label, f"{values['model']:.3f}{unit}" + (f" ({beside})" if beside else "")
    if work := run.get("work"):
        parts = [duration(run["seconds"])] if "seconds" in run else []
        if work["made"]:
            passed = _passed(work["optimizer_steps"], work["forward_tokens"])
            parts.append(f"{counted(work['made'], 'unit')} made" + (f" with {passed}" if passed else ""))
        if work["reused"]:
            passed = _passed(work["saved_steps"], work["saved_tokens"])
            parts.append(f"{counted(work['reused'], 'unit')} reused" + (f" that had taken {passed}" if passed else ""))
        yield "work", ", ".join(parts)
    if peaks := run.get("memory"):
        yield "memory", "at most " + ", ".join(f"{peak:.1f} GB {_MEMORY[name]}" for name, peak in peaks.items())
    if warnings := warnings_of(run.get("diagnostics")):
        (first, message), *further = warnings.items()
        if len(message) > _LONGEST_WARNING:
            message = message[: _LONGEST_WARNING - 3].rstrip() + "..."
        yield counted(len(warnings), "warning"), f"{message} [{first}]"
        if further:
            yield "", f"and {', '.join(name for name, _ in further)}"
    for line in remarks(run):
        yield "note", line


def one_line(run: Run) -> str:
    """Return the main results of one run of a sweep as one line of text."""
    parts = [] if run["status"] == "finished" else [str(run["status"])]
    parts += [f"PWS {pws_text(row)}" for row in flat_rows(run)[-1:] if row["pws"] is not None]
    parts += [text for text in [_kept(run)] if text]
    if "seconds" in run and (work := run.get("work")):
        parts.append(f"{counted(work['made'], 'unit')} made in {duration(run['seconds'])}, {work['reused']:,} reused")
    if warnings := warnings_of(run.get("diagnostics")):
        parts.append(f"{counted(len(warnings), 'warning')} ({', '.join(warnings)})")
    return ", ".join(parts)


def _kept(run: Run) -> str:
    """Return how many rows were selected, as in "200 of 2,000 rows by gsnr"; "" if there is no selection."""
    if "rows" not in (selection := run.get("selection") or {}):
        return ""
    pool = (run.get("data") or {}).get("rows")
    by = "" if run.get("scorer") == "full" else f" by {run['scorer']}"
    return f"{selection['rows']:,}" + (f" of {pool:,}" if pool else "") + f" rows{by}"


def _passed(steps: int, tokens: int) -> str:
    return " and ".join(f"{count:,} {name}" for count, name in ((steps, "steps"), (tokens, "tokens")) if count)
