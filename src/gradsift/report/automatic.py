"""The report at the end of a run or a sweep. A failure to write it is printed and changes no result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradsift.errors import GradsiftError
from gradsift.run_folder import CONFIG_FILE, REPORT_FILE, config_values
from gradsift.runtime import Display
from gradsift.tracking import is_logged, log_report

if TYPE_CHECKING:
    from gradsift.report.figures.style import Format


def report_at_end(folder: Path, display: Display) -> Path | None:
    """Write `report.html` and its files into the folder, and log them to W&B if the runs are logged there.

    Returns:
        The path of the page; None if it could not be written, in which case the reason is printed.
    """
    try:
        from gradsift.report.material import Incomplete
        from gradsift.report.page import write_report

        formats: list[Format] = ["svg", "png"] if is_logged(folder) else ["svg"]  # W&B takes PNG, the page SVG
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


def wanted_by_jobs(folder: Path) -> bool:
    """Return whether all jobs of a sweep had `report=true`; False if no job has written its config."""
    paths = list(folder.glob(f"*/{CONFIG_FILE}"))
    return bool(paths) and all(config_values(path.parent).get("report", True) for path in paths)
