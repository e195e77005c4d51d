"""What a run and a sweep print on the terminal or in a log, and the report at their end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from gradsift.artifacts import StageRecord
from gradsift.diagnostics import write_diagnostics
from gradsift.errors import GradsiftError
from gradsift.report.audit_tables import audit_tables, sweep_audit, write_audit
from gradsift.report.notes import against_random, remarks_of_all, warnings_of
from gradsift.report.plans import jobs_table, plan_lines, plan_table, stages_table
from gradsift.report.recorded import compared
from gradsift.report.run_tables import WORK_FILE, results_table, work_table
from gradsift.report.summary import one_line, summary
from gradsift.report.table import Table, write_records
from gradsift.run_folder import CONFIG_FILE, REPORT_FILE, RUN_FILE, config_values, job_number, read_yaml
from gradsift.runtime import Display
from gradsift.tracking import is_logged, log_report

RESULTS_FILE = "results.csv"
_LONG = 10.0  # seconds; in a sweep, only units that took at least this long have a line of their own
_MOST_WARNINGS = 3  # number of a sweep's own warnings that are printed in full


class RunView:
    """Prints a run's settings at its start, a line for every unit of work made, and its results at the end.

    For a run of a sweep, prints a heading, the units that took long, and one line of results. The settings are printed
    only for the sweep's first run, as the headings show the differences.
    """

    def __init__(self, number: int | None = None, display: Display | None = None, *, total: int | None = None) -> None:
        """`number` is that of the run in its sweep, from 1, and `total` the number of runs in the sweep, if known."""
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
        """Return a context that shows the name of a unit while it is made, if the output is a terminal."""
        return self.display.task(unit, None) if self.display.console.is_terminal else nullcontext()

    def stage_done(self, record: StageRecord) -> None:
        if record.reused or (self._number is not None and record.seconds < _LONG):
            return
        steps = f", {record.optimizer_steps:,} steps" if record.optimizer_steps else ""
        self.display.say(f"  {record.name:<10} {Path(record.artifact).name}  {record.seconds:.1f} s{steps}")

    def planned(self, folder: Path) -> None:
        """Print the plan of a run; in a sweep only its totals, as tables of all runs are printed at the end."""
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if self._number is not None:
            self.display.say(f"  {plan_lines([run])[0]}")
            return
        self.display.console.print(plan_table(run))
        for line in plan_lines([run]):
            self.display.say(f"  {line}")

    def finished(self, folder: Path, report: Path | None) -> None:
        """Print the results of this run and the paths of its files and of its report; in a sweep, only one line."""
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
                self.display.say_path(name, path)

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print a line for each label with its value; on a terminal a long value wraps beside its label."""
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


def sweep_finished(folder: Path, jobs: Sequence[Sequence[str]] | None = None) -> bool:
    """Print the tables of a sweep, write `results.csv`, `work.csv` and the report, and return whether no job failed.

    `jobs` are the overrides of every job; None if they were not known before the sweep.
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
            display.say_path(name, path)
    for line in [] if planned else compared(files, runs):
        display.say(line)
    return not failures


def report_at_end(folder: Path, display: Display) -> Path | None:
    """Write `report.html` and its files into the folder, and log them to W&B if the runs are logged there.

    Returns the path of the page; None if it could not be written: the reason is printed, and no result changes.
    """
    try:
        from gradsift.report.material import Incomplete
        from gradsift.report.page import write_report

        formats = ["svg", "png"] if is_logged(folder) else ["svg"]  # W&B takes PNG, the page SVG
        with display.task("write the report", None):
            try:
                write_report(folder, formats=formats)
            except Incomplete as error:
                display.say(f"report: {error}")
    except Exception as error:  # noqa: BLE001 - the run itself is done, whatever goes wrong here
        display.say(
            f"report: not written ({_reason(error)}); the results are in run.json, and `python -m gradsift.report "
            f"{folder}` tries again"
        )
        return None
    try:
        log_report(folder)
    except Exception as error:  # noqa: BLE001 - the report itself is written
        display.say(f"report: not logged to W&B ({_reason(error)}); its files are in {folder}")
    return folder / REPORT_FILE


def _reason(error: Exception) -> str:
    name = "" if isinstance(error, GradsiftError) else f"{type(error).__name__}: "
    return name + (str(error) or "no message").splitlines()[0]


def _print_and_write(table: Table, display: Display, file: Path) -> None:
    """Print the columns of a table that fit, and write its records as CSV."""
    write_records(file, table.records)
    fitted, left_out = table.fitted(display.console)
    display.console.print()
    display.console.print(fitted)
    if left_out:
        display.say(f"(too narrow here for {', '.join(left_out)}: see {file.name})")


def _print_audit(jobs: Sequence[tuple[Path, Mapping[str, Any]]], display: Display, folder: Path | None = None) -> bool:
    """Print the tables of a noise audit and write its files to `folder`, if given; return whether a job was audited."""
    if (audit := sweep_audit(jobs)) is None:
        return False
    if folder is not None:
        write_audit(folder, audit)
    for table in audit_tables(audit, brief=True):
        display.console.print()
        display.console.print(table)
    return True


def _warnings_and_notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines with the number of runs for each warning, the first warning in full, and the remarks."""
    messages: dict[str, list[str]] = {}
    for run in runs:
        for name, message in warnings_of(run.get("diagnostics")).items():
            messages.setdefault(name, []).append(message)
    lines = [f"note: {line}" for line in remarks_of_all(runs)]
    if messages:
        counts = ", ".join(f"{name} in {len(texts):,} of {len(runs):,}" for name, texts in messages.items())
        first = next(iter(messages))
        lines = [f"warnings of the runs: {counts}", f"the first: {messages[first][0]} [{first}]", *lines]
    return lines


def _failures(
    folder: Path, files: Sequence[Path], runs: Sequence[dict[str, Any]], jobs: Sequence[Sequence[str]] | None
) -> list[str]:
    """Return a line for each job that failed, and for each that left no `run.json`."""
    lines = [
        f"{path.parent.name} ({shlex.join(run['overrides'])}): {run['error']}"
        for path, run in zip(files, runs, strict=True)
        if run["status"] == "failed"
    ]
    with_record = {path.parent for path in files}
    begun = {path.parent for path in folder.glob("*/.hydra")} - with_record
    silent = {job_number(path): path.name for path in begun}
    numbers = {job_number(path)[0] for path in begun | with_record}
    for number, overrides in enumerate(jobs or ()):
        if number not in numbers:
            silent[(number, "")] = f"{number} ({shlex.join(overrides)})"
    reason = f"it left no {RUN_FILE}, so its process was killed or is still at work"
    return [*lines, *(f"{silent[key]}: {reason}" for key in sorted(silent))]
