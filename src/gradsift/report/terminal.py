"""What a run and a sweep show on the terminal, and in a log where there is none."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gradsift.artifacts import StageRecord
from gradsift.diagnostics import write_diagnostics
from gradsift.report.audit_tables import audit_tables, rich_table, sweep_audit, write_audit
from gradsift.report.automatic import report_at_end, wanted_by_jobs
from gradsift.report.notes import remarks_of_all, warnings_of
from gradsift.report.plans import jobs_table, plan_lines, plan_table, stages_table
from gradsift.report.recorded import compared
from gradsift.report.summary import one_line, summary
from gradsift.report.tables import against_random, job_number, pws_table, write_csv
from gradsift.report.work import WORK_FILE, work_by_stage, work_table, write_work
from gradsift.runtime import Display

RUN_FILE = "run.json"
_FIRST = ("report", "run", "selection")  # of the files that a run wrote, what a person opens next
_LONG = 10.0  # seconds from which on a unit has a line of its own in a sweep
_MOST_WARNINGS = 3  # of a sweep, shown whole


class RunView:
    """The settings before, a line for every unit of work that is done, the figures after.

    A sweep's run has its heading and a line at the end, and between them what took long.
    """

    def __init__(self, number: int | None = None, display: Display | None = None, *, total: int | None = None) -> None:
        """
        Args:
            number: of a sweep's run, from 1; None for a run of its own.
            total: how many runs the sweep has, where that is known.
        """
        self.display = display or Display()
        self._number = number
        self._of = "of the sweep" if total is None else f"of {total:,}"

    def starting(self, overrides: Sequence[str]) -> None:
        """The heading; in a sweep it tells the runs apart."""
        if self._number is not None:
            self.display.say(f"run {self._number:,} {self._of}: {' '.join(overrides)}")

    def settings(self, settings: list[tuple[str, Any]]) -> None:
        """One line a setting; of a sweep only the first run's, the others differ by their heading."""
        if self._number is None or self._number == 1:
            self._pairs([(name, str(value)) for name, value in settings])

    def at_work(self, unit: str) -> AbstractContextManager[Any]:
        """While a unit is made: its name on a terminal, nothing in a log, where its line will follow."""
        return self.display.task(unit, None) if self.display.console.is_terminal else nullcontext()

    def stage_done(self, record: StageRecord) -> None:
        if record.reused or (self._number is not None and record.seconds < _LONG):
            return
        steps = f", {record.optimizer_steps:,} steps" if record.optimizer_steps else ""
        self.display.say(f"  {record.name:<10} {Path(record.artifact).name}  {record.seconds:.1f} s{steps}")

    def planned(self, folder: Path, *, in_sweep: bool) -> None:
        """The plan; of a sweep's run its totals, as the sweep ends with a table of all."""
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if in_sweep:
            self.display.say(f"  {plan_lines([run])[0]}")
            return
        self.display.console.print(plan_table(run))
        for line in plan_lines([run]):
            self.display.say(f"  {line}")

    def finished(self, folder: Path, report: Path | None, *, in_sweep: bool) -> None:
        """The figures of this run and the paths of what it wrote.

        Args:
            report: where it is, if one was written.
        """
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if in_sweep:
            self.display.say(f"  {one_line(run)}")
            return
        _show_audit([(folder / RUN_FILE, run)], self.display)
        self.display.console.print()
        self._pairs(summary(run))
        self.display.console.print()
        paths = {"report": report, "run": folder / RUN_FILE, **run["files"]}
        for name in sorted(paths, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
            if paths[name] is not None:
                self.display.say_path(name, paths[name])

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values below each other: wrapped beside its name on a terminal, a line each in a log."""
        width = max((len(name) for name, _ in pairs), default=0)
        if not self.display.console.is_terminal:
            for name, value in pairs:
                self.display.say(f"{name:<{width}}  {value}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="dim")
        for name, value in pairs:
            table.add_row(name, Text(value))
        self.display.console.print(table)


def fitted(table: Table, display: Display) -> list[str]:
    """Take columns off the right until the table is no wider than the output; their headings."""
    options = display.console.options.update(max_width=10_000)
    left_out: list[str] = []
    while len(table.columns) > 3 and Measurement.get(display.console, options, table).maximum > display.console.width:
        left_out.insert(0, str(table.columns.pop().header))
    return left_out


def _show(table: Table, display: Display, file: Path) -> None:
    """Print a table that `file` has in full."""
    left_out = fitted(table, display)
    display.console.print()
    display.console.print(table)
    if left_out:
        display.say(f"(too narrow here for {', '.join(left_out)}: see {file.name})")


def _warn(found: Mapping[str, str], display: Display) -> None:
    for name, message in list(found.items())[:_MOST_WARNINGS]:
        display.say(f"warning: {message} [{name}]")
    if len(found) > _MOST_WARNINGS:
        display.say(f"and {len(found) - _MOST_WARNINGS:,} more warnings, in diagnostics.json and the report")


def _show_audit(jobs: Sequence[tuple[Path, dict[str, Any]]], display: Display, folder: Path | None = None) -> bool:
    """Print the tables of a noise audit and write its files to `folder`; False where no job was audited."""
    audit = sweep_audit(jobs)
    if audit is None:
        return False
    if folder is not None:
        write_audit(folder, audit)
    for table in audit_tables(audit, brief=True):
        display.console.print()
        display.console.print(rich_table(table))
    return True


def sweep_finished(folder: Path, jobs: Sequence[Sequence[str]] | None = None) -> bool:
    """Print the sweep's tables, write `results.csv` and the report; False if a job failed or left no `run.json`.

    Args:
        jobs: the overrides of every job; None where nobody knew them beforehand.
    """
    display = Display()
    files = sorted(folder.glob(f"*/{RUN_FILE}"), key=lambda file: job_number(file.parent))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    planned = [run for run in runs if run["status"] == "planned"]
    written = _results(folder, runs, display)
    for table in (jobs_table(planned), stages_table(planned)) if planned else ():
        display.console.print()
        display.console.print(table)
    for line in plan_lines(planned) if planned else ():
        display.say(line)
    if any(run.get("stages") for run in runs):
        by_stage = work_by_stage(runs)
        write_work(folder / WORK_FILE, by_stage)
        _show(work_table(by_stage), display, folder / WORK_FILE)
    if _show_audit(list(zip(files, runs, strict=True)), display, folder):
        written["audit"] = folder / "audit.md"
    display.console.print()
    for line in _beware(runs):
        display.say(line)
    if best := _best_trial(folder):
        display.say(f"best trial: {best}")
    failed = _failures(folder, files, runs, jobs)
    for line in failed:
        display.say(f"failed: {line}")
    report = report_at_end(folder, display) if wanted_by_jobs(folder) and not planned else None
    for name, path in {"report": report, **written, "runs": folder}.items():
        if path is not None:
            display.say_path(name, path)
    for line in [] if planned else compared(files, runs):
        display.say(line)
    return not failed


def _results(folder: Path, runs: Sequence[dict[str, Any]], display: Display) -> dict[str, Path]:
    """Show the table of the finished runs and how they compare with random rows; the files with all of it."""
    finished = [run for run in runs if run["status"] == "finished"]
    if not finished:
        return {}
    file = folder / "results.csv"
    write_csv(file, finished)
    _show(pws_table(finished), display, file)
    if compared := against_random(finished):
        write_diagnostics(folder, compared)
        _warn(warnings_of({diagnostic.name: diagnostic.as_json() for diagnostic in compared}), display)
    return {"table": file}


def _beware(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The runs' own warnings by name, with the first of them, and their remarks."""
    named: dict[str, list[str]] = {}
    for run in runs:
        for name, message in warnings_of(run.get("diagnostics")).items():
            named.setdefault(name, []).append(message)
    lines = [f"note: {line}" for line in remarks_of_all(runs)]
    if named:
        counts = ", ".join(f"{name} in {len(messages):,} of {len(runs):,}" for name, messages in named.items())
        first, messages = next(iter(named.items()))
        lines = [f"warnings of the runs: {counts}", f"the first: {messages[0]} [{first}]", *lines]
    return lines


def _failures(
    folder: Path, files: Sequence[Path], runs: Sequence[dict[str, Any]], jobs: Sequence[Sequence[str]] | None
) -> list[str]:
    """Which jobs failed, and why."""
    lines = [
        f"{path.parent.name} ({shlex.join(run['overrides'])}): {run['error']}"
        for path, run in zip(files, runs, strict=True)
        if run["status"] == "failed"
    ]
    silent = _silent(folder, files, jobs)
    return lines + [f"{job}: it left no {RUN_FILE}, so its process was killed or is still at work" for job in silent]


def _silent(folder: Path, files: Sequence[Path], jobs: Sequence[Sequence[str]] | None) -> list[str]:
    """The jobs that left no `run.json`: those that began and, where all are known, those that never did."""
    spoken = {path.parent for path in files}
    begun = {path.parent for path in folder.glob("*/.hydra")} - spoken
    silent = {job_number(path): path.name for path in begun}
    numbers = {job_number(path)[0] for path in begun | spoken}
    for number, overrides in enumerate(jobs or ()):
        if number not in numbers:
            silent[(number, "")] = f"{number} ({shlex.join(overrides)})"
    return [silent[key] for key in sorted(silent)]


def _best_trial(folder: Path) -> str | None:
    """What a search found, in one line; None after a plain sweep."""
    path = folder / "optimization_results.yaml"
    if not path.is_file():
        return None
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    params = " ".join(f"{key}={value}" for key, value in found["best_params"].items())
    return f"{params}: {found['best_value']:.4g}"
