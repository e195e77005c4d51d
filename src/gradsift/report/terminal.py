"""What a run and a sweep show on the terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from gradsift.artifacts import StageRecord
from gradsift.diagnostics import write_diagnostics
from gradsift.report.audit_tables import audit_tables, rich_table, sweep_audit, write_audit
from gradsift.report.automatic import report_at_end, wanted_by_jobs
from gradsift.report.plans import jobs_table, plan_lines, plan_table, stages_table
from gradsift.report.tables import against_random, pws_table, write_csv
from gradsift.report.work import WORK_FILE, work_by_stage, work_lines, work_of, work_table, write_work
from gradsift.runtime import Display

RUN_FILE = "run.json"
_MEMORY = {"process_peak_resident_gb": "resident", "process_peak_cuda_gb": "on the GPU"}
_RATERS = {
    "local": "judge=local rated with a small model: a plumbing check, its scores say nothing of the rows",
    "verifier": "judge=verifier rated as an oracle that knows the embedded world's right answers: an upper bound",
}
_BASELINES = ("random", "full")  # ask no model for anything


class RunView:
    """The settings before, a line for every unit of work that is done, a table after."""

    def __init__(self, number: int | None = None, display: Display | None = None) -> None:
        self.display = display or Display()
        self._number = number

    def starting(self, overrides: Sequence[str]) -> None:
        """The heading; in a sweep it tells the runs apart."""
        heading = "run" if self._number is None else f"run {self._number} of the sweep: {' '.join(overrides)}"
        self.display.console.rule(Text(f"gradsift: {heading}"), align="left", style="dim")

    def settings(self, settings: list[tuple[str, Any]]) -> None:
        """One line a setting; of a sweep only the first run's, the others differ by their heading."""
        if self._number is not None and self._number > 1:
            return
        table = Table.grid(padding=(0, 2))
        for name, value in settings:
            table.add_row(name, str(value))
        self.display.console.print(table)

    def stage_done(self, record: StageRecord) -> None:
        if record.reused:
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

    def finished(self, folder: Path, *, in_sweep: bool) -> None:
        """The table of this run and the paths of what it wrote."""
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        if stages := run.get("stages"):
            for line in work_lines(work_of(stages)):
                self.display.say(f"  {line}")
        if peaks := run.get("memory"):
            shown = ", ".join(f"{peak:.1f} GB {_MEMORY[name]}" for name, peak in peaks.items())
            self.display.say(f"  peak memory of the process so far: {shown}")
        for line in remarks(run):
            self.display.say(f"  note: {line}")
        for line in findings(run.get("diagnostics", {})):
            self.display.say(f"  {line}")
        if in_sweep:
            return
        if run["status"] == "finished":
            self.display.console.print()
            self.display.console.print(pws_table([run]))
        _show_audit([(folder / RUN_FILE, run)], self.display)
        self.display.say("")
        for name, path in {"run": str(folder / RUN_FILE), **run["files"]}.items():
            self.display.say(f"{name}: {path}")


def remarks(run: dict[str, Any]) -> list[str]:
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


def findings(diagnostics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for all diagnostics that found nothing, with the figure each judged, and one for every warning."""
    well, unknown, warnings = [], [], []
    for name, found in diagnostics.items():
        if found["verdict"] == "ok":
            well.append(f"{name} {next(iter(found['values'].values())):.3g}")
        elif found["verdict"] == "unknown":
            unknown.append(f"{name} ({found['message']})")
        else:
            warnings.append(f"warning: {found['message']} [{name}]")
    lines = [f"diagnostics, nothing found: {', '.join(well)}"] if well else []
    lines += [f"diagnostics, not known: {', '.join(unknown)}"] if unknown else []
    return lines + warnings


def _job_number(path: Path) -> tuple[int, str]:
    """Jobs in their order, where the folders' names begin with a number."""
    number = path.parent.name.split("-", 1)[0]
    return (int(number) if number.isdecimal() else 0, path.parent.name)


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
    """Print the sweep's table, write `results.csv` and the report; False if a job failed or left no word.

    Args:
        jobs: the overrides of every job; None where nobody knew them beforehand.
    """
    display = Display()
    files = sorted(folder.glob(f"*/{RUN_FILE}"), key=_job_number)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    failed = [(path, run) for path, run in zip(files, runs, strict=True) if run["status"] == "failed"]
    if shown := [run for run in runs if run["status"] == "finished"]:
        display.console.print()
        display.console.print(pws_table(shown))
        write_csv(folder / "results.csv", shown)
        if compared := against_random(shown):
            write_diagnostics(folder, compared)
            for line in findings({diagnostic.name: diagnostic.as_json() for diagnostic in compared}):
                display.say(line)
        display.say(f"\ntable: {folder / 'results.csv'}")
    if planned := [run for run in runs if run["status"] == "planned"]:
        for table in (jobs_table(planned), stages_table(planned)):
            display.console.print()
            display.console.print(table)
        for line in plan_lines(planned):
            display.say(line)
    if any(run.get("stages") for run in runs):
        by_stage = work_by_stage(runs)
        write_work(folder / WORK_FILE, by_stage)
        display.console.print()
        display.console.print(work_table(by_stage))
    if _show_audit(list(zip(files, runs, strict=True)), display, folder):
        display.say(f"\naudit: {folder / 'audit.md'}")
    if best := _best_trial(folder):
        display.say(f"best trial: {best}")
    if wanted_by_jobs(folder) and not planned:
        report_at_end(folder, display)
    display.say(f"runs: {folder}")
    for path, run in failed:
        display.say(f"failed: {path.parent.name} ({shlex.join(run['overrides'])}): {run['error']}")
    silent = _silent(folder, files, jobs)
    for job in silent:
        display.say(f"failed: {job}: it left no {RUN_FILE}, so its process was killed or is still at work")
    return not failed and not silent


def _silent(folder: Path, files: Sequence[Path], jobs: Sequence[Sequence[str]] | None) -> list[str]:
    """The jobs that left no `run.json`: those that began and, where all are known, those that never did."""
    spoken = {path.parent for path in files}
    begun = {path.parent for path in folder.glob("*/.hydra")} - spoken
    silent = {_job_number(path / RUN_FILE): path.name for path in begun}
    numbers = {_job_number(path / RUN_FILE)[0] for path in begun | spoken}
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
