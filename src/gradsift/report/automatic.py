"""The report at the end of a run or a sweep: written last, it changes no outcome; what fails is said in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradsift.errors import GradsiftError
from gradsift.runtime import Display
from gradsift.tracking import is_logged, log_report


def report_at_end(folder: Path, display: Display) -> Path | None:
    """Write `report.html` and its files into the folder and log it where asked; None, and why, if it is not written."""
    try:
        from gradsift.report.figures.style import Format
        from gradsift.report.material import Incomplete
        from gradsift.report.page import REPORT_FILE, write_report

        formats: list[Format] = ["svg", "png"] if is_logged(folder) else ["svg"]  # the page needs no PNG
        with display.task("write the report", None):
            try:
                write_report(folder, formats=formats)
            except Incomplete as error:
                display.say(f"report: {error}")
        report = folder / REPORT_FILE
    except Exception as error:  # noqa: BLE001 - whatever it is, the run itself is done
        display.say(
            f"report: not written ({_reason(error)}); the results stand in run.json, and `python -m gradsift.report "
            f"{folder}` tries again"
        )
        return None
    try:
        log_report(folder)
    except Exception as error:  # noqa: BLE001 - likewise
        display.say(f"report: not logged to W&B ({_reason(error)}); its files are in {folder}")
    return report


def _reason(error: Exception) -> str:
    name = "" if isinstance(error, GradsiftError) else f"{type(error).__name__}: "
    return name + (str(error) or "no message").splitlines()[0]


def wanted_by_jobs(folder: Path) -> bool:
    """Whether a sweep's jobs were run with `report=true`; not where none came as far as a config."""
    paths = sorted(folder.glob("*/config.yaml"))
    return bool(paths) and all(map(_wanted, paths))


def _wanted(path: Path) -> bool:
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return bool(found["values"].get("report", True))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return True
