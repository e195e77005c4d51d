"""The lines and tables that a run or a sweep prints, and the report that is written at its end."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from gradsift.artifacts import StageRecord
from gradsift.cost import duration
from gradsift.diagnostics import write_diagnostics
from gradsift.errors import GradsiftError
from gradsift.report.audit_tables import audit_tables, sweep_audit, write_audit
from gradsift.report.notes import against_random, remarks, remarks_of_all, warnings_of
from gradsift.report.plans import jobs_table, plan_lines, stages_table
from gradsift.report.recorded import compared
from gradsift.report.run_tables import WORK_FILE, Run, flat_rows, outcomes_text, pws_text, results_table, work_table
from gradsift.report.table import Table, counted, write_records
from gradsift.run_folder import CONFIG_FILE, REPORT_FILE, RUN_FILE, config_values, job_number, read_yaml
from gradsift.runtime import Display
from gradsift.tracking import is_logged, log_report

RESULTS_FILE = "results.csv"
_LONG = 10.0  # seconds; a sweep prints a line only for units of work that took at least this long
_MOST_WARNINGS = 3  # number of a sweep's own warnings that are printed in full
_MEMORY = {"process_peak_resident_gb": "resident", "process_peak_cuda_gb": "on the GPU"}
_LONGEST_WARNING = 240  # characters of a message; the report and run.json have the complete message


class RunView:
    """Prints a run's settings at its start, a line for every unit of work made, and its results at the end.

    For a run of a sweep, it prints a heading, the units that took long, and one line of results. It prints the settings
    only for the first run of a sweep, as the headings show the differences.
    """

    def __init__(self, number: int | None = None, display: Display | None = None, *, total: int | None = None) -> None:
        """`number` is the run's number in its sweep, from 1; `total` is the number of runs in the sweep, if known."""
        self.display = display or Display()
        self._number = number
        self._of = "of the sweep" if total is None else f"of {total:,}"

    def starting(self, overrides: Sequence[str]) -> None:
        """Print the heading of the run, if it belongs to a sweep."""
        if self._number is not None:
            self.display.say(f"run {self._number:,} {self._of}: {' '.join(overrides)}")

    def settings(self, settings: list[tuple[str, Any]]) -> None:
        if self._number is None or self._number == 1:
            self._pairs([(name, str(value)) for name, value in settings])

    def at_work(self, unit: str) -> AbstractContextManager[Any]:
        """Return a context that shows the name of the unit in progress, if the output is a terminal."""
        return self.display.task(unit, None) if self.display.console.is_terminal else nullcontext()

    def stage_done(self, record: StageRecord) -> None:
        if record.reused or (self._number is not None and record.seconds < _LONG):
            return
        steps = f", {record.optimizer_steps:,} steps" if record.optimizer_steps else ""
        self.display.say(f"  {record.name:<10} {Path(record.artifact).name}  {record.seconds:.1f} s{steps}")

    def planned(self, folder: Path) -> None:
        """Print the plan of a run; in a sweep print only the plan's totals, as tables of all runs follow at the end."""
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if self._number is not None:
            self.display.say(f"  {plan_lines([run])[0]}")
            return
        self.display.console.print(stages_table([run]))
        for line in plan_lines([run]):
            self.display.say(f"  {line}")

    def finished(self, folder: Path, report: Path | None) -> None:
        """Print the results of this run, and the paths of its files and of its report.

        In a sweep, print only one line with the main results.
        """
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if self._number is not None:
            self.display.say(f"  {one_line(run)}")
            return
        _print_audit([(folder / RUN_FILE, run)], self.display)
        self.display.console.print()
        self._pairs(list(summary(run)))
        self.display.console.print()
        first = {"report": report, "run": folder / RUN_FILE, "selection": None}
        for name, path in {**first, **run["files"]}.items():
            if path is not None:
                self.display.say(f"{name}: {path}")

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print each pair of label and value; on a terminal, all lines of a long value stand right of its label."""
        width = max((len(name) for name, _ in pairs), default=0)
        if not self.display.console.is_terminal:
            for name, value in pairs:
                self.display.say(f"{name:<{width}}  {value}")
            return
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="dim")
        for name, value in pairs:
            grid.add_row(name, Text(value))
        self.display.console.print(grid)


def summary(run: Run) -> Iterator[tuple[str, str]]:
    """Yield pairs of label and text on selection, results, cost and warnings, and leave out what the run lacks."""
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
        for name, before, steps, tokens in (
            ("made", "with", work["optimizer_steps"], work["forward_tokens"]),
            ("reused", "that had taken", work["saved_steps"], work["saved_tokens"]),
        ):
            if work[name]:
                passed = [f"{count:,} {noun}" for count, noun in ((steps, "steps"), (tokens, "tokens")) if count]
                units = f"{counted(work[name], 'unit')} {name}"
                parts.append(f"{units} {before} {' and '.join(passed)}" if passed else units)
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
    """Return the main results of one run of a sweep in one line."""
    parts = [] if run["status"] == "finished" else [str(run["status"])]
    row = flat_rows(run)[-1]
    if row["pws"] is not None:
        parts.append(f"PWS {pws_text(row)}")
    if text := _kept(run):
        parts.append(text)
    if "seconds" in run and (work := run.get("work")):
        parts.append(f"{counted(work['made'], 'unit')} made in {duration(run['seconds'])}, {work['reused']:,} reused")
    if warnings := warnings_of(run.get("diagnostics")):
        parts.append(f"{counted(len(warnings), 'warning')} ({', '.join(warnings)})")
    return ", ".join(parts)


def _kept(run: Run) -> str:
    """Return the number of selected rows, as in "200 of 2,000 rows by gsnr"; "" without a selection."""
    if "rows" not in (selection := run.get("selection") or {}):
        return ""
    pool = (run.get("data") or {}).get("rows")
    by = "" if run.get("scorer") == "full" else f" by {run['scorer']}"
    return f"{selection['rows']:,}" + (f" of {pool:,}" if pool else "") + f" rows{by}"


def sweep_finished(folder: Path, jobs: Sequence[Sequence[str]] | None = None) -> bool:
    """Print the tables of a sweep, and write `results.csv`, `work.csv` and the report.

    Args:
        jobs: the overrides of every job; None if they were not known before the sweep.

    Returns:
        False if a job failed or left no `run.json`, else True.
    """
    display = Display()
    files = sorted(folder.glob(f"*/{RUN_FILE}"), key=lambda file: job_number(file.parent))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    planned = [run for run in runs if run["status"] == "planned"]
    written: dict[str, Path] = {}
    if finished := [run for run in runs if run["status"] == "finished"]:
        written["table"] = folder / RESULTS_FILE
        _print_and_write(results_table(finished), display, folder / RESULTS_FILE)
        if diagnostics := against_random(finished):
            write_diagnostics(folder, diagnostics)
            warnings = [f"{each.message} [{each.name}]" for each in diagnostics if each.verdict == "warning"]
            for line in warnings[:_MOST_WARNINGS]:
                display.say(f"warning: {line}")
            if (more := len(warnings) - _MOST_WARNINGS) > 0:
                display.say(f"and {more:,} more warnings, in diagnostics.json and the report")
    if planned:
        for table in (jobs_table(planned), stages_table(planned)):
            display.console.print()
            display.console.print(table)
        for line in plan_lines(planned):
            display.say(line)
    if any(run.get("stages") for run in runs):
        _print_and_write(work_table(runs), display, folder / WORK_FILE)
    if _print_audit(list(zip(files, runs, strict=True)), display, folder):
        written["audit"] = folder / "audit.md"
    display.console.print()
    for line in _warnings_and_notes(runs):
        display.say(line)
    if search := read_yaml(folder / "optimization_results.yaml"):  # written by Hydra's optuna sweeper
        params = " ".join(f"{key}={value}" for key, value in search["best_params"].items())
        display.say(f"best trial: {params}: {search['best_value']:.4g}")
    failures = _failures(folder, files, runs, jobs)
    for line in failures:
        display.say(f"failed: {line}")
    configs = [config_values(path.parent) for path in folder.glob(f"*/{CONFIG_FILE}")]
    wanted = configs and all(config.get("report", True) for config in configs) and not planned
    report = report_at_end(folder, display) if wanted else None
    for name, path in {"report": report, **written, "runs": folder}.items():
        if path is not None:
            display.say(f"{name}: {path}")
    for line in [] if planned else compared(files, runs):
        display.say(line)
    return not failures


def report_at_end(folder: Path, display: Display) -> Path | None:
    """Write `report.html` and its files into `folder`, and log them to W&B if the runs are logged there.

    Returns the path of the page. If the page cannot be written, prints the reason and returns None.
    """
    try:
        from gradsift.report.material import Incomplete
        from gradsift.report.page import write_report

        formats = ["svg", "png"] if is_logged(folder) else ["svg"]  # PNG is for W&B
        with display.task("write the report", None):
            try:
                write_report(folder, formats=formats)
            except Incomplete as error:
                display.say(f"report: {error}")
    except Exception as error:  # noqa: BLE001 - the run is finished, and its results are on the disk
        again = f"the results are in run.json, and `python -m gradsift.report {folder}` tries again"
        display.say(f"report: not written ({_reason(error)}); {again}")
        return None
    try:
        log_report(folder)
    except Exception as error:  # noqa: BLE001 - the report is written
        display.say(f"report: not logged to W&B ({_reason(error)}); its files are in {folder}")
    return folder / REPORT_FILE


def _reason(error: Exception) -> str:
    name = "" if isinstance(error, GradsiftError) else f"{type(error).__name__}: "
    return name + (str(error) or "no message").splitlines()[0]


def _print_and_write(table: Table, display: Display, file: Path) -> None:
    """Write a table's records as CSV and print the columns that fit the console."""
    write_records(file, table.records)
    fitted, left_out = table.fitted(display.console)
    display.console.print()
    display.console.print(fitted)
    if left_out:
        display.say(f"(the terminal is too narrow for {', '.join(left_out)}; see {file.name})")


def _print_audit(jobs: Sequence[tuple[Path, Mapping[str, Any]]], display: Display, folder: Path | None = None) -> bool:
    """Print the tables of the noise audit and, if `folder` is given, write the audit's files there.

    Returns whether any job was audited; if none was, nothing is printed or written.
    """
    if (audit := sweep_audit(jobs)) is None:
        return False
    if folder is not None:
        write_audit(folder, audit)
    for table in audit_tables(audit, brief=True):
        display.console.print()
        display.console.print(table)
    return True


def _warnings_and_notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines to print: the number of runs with each warning, the first warning in full, and the remarks."""
    warnings = [warning for run in runs for warning in warnings_of(run.get("diagnostics")).items()]
    lines = [f"note: {line}" for line in remarks_of_all(runs)]
    if warnings:
        counts = Counter(name for name, _ in warnings)
        shown = ", ".join(f"{name} in {count:,} of {len(runs):,}" for name, count in counts.items())
        name, message = warnings[0]
        lines = [f"warnings of the runs: {shown}", f"the first: {message} [{name}]", *lines]
    return lines


def _failures(
    folder: Path, files: Sequence[Path], runs: Sequence[dict[str, Any]], jobs: Sequence[Sequence[str]] | None
) -> list[str]:
    """Return a line for each job that failed and for each job without a `run.json`."""
    lines = [
        f"{path.parent.name} ({shlex.join(run['overrides'])}): {run['error']}"
        for path, run in zip(files, runs, strict=True)
        if run["status"] == "failed"
    ]
    with_record = {path.parent for path in files}
    begun = sorted({path.parent for path in folder.glob("*/.hydra")} - with_record, key=job_number)
    numbers = {job_number(path)[0] for path in (*with_record, *begun)}
    without_folder = [(n, overrides) for n, overrides in enumerate(jobs or ()) if n not in numbers]
    silent = [path.name for path in begun] + [f"{n} ({shlex.join(overrides)})" for n, overrides in without_folder]
    reason = f"it left no {RUN_FILE}, so its process was killed or is still at work"
    return [*lines, *(f"{job}: {reason}" for job in silent)]
