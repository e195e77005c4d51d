"""The files in the folder of a run or a sweep, and how to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"
FIGURES_FOLDER, TABLES_FOLDER = "figures", "tables"  # beside the report
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None if the file is missing or invalid, for example binary or cut off."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506 - a safe loader
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def config_values(folder: Path) -> dict[str, Any]:
    """Return the values of a run's `config.yaml`; an empty dict if the file is missing or invalid."""
    content = read_yaml(folder / CONFIG_FILE)
    values = content.get("values") if isinstance(content, dict) else None
    return values if isinstance(values, dict) else {}


def is_run(folder: Path) -> bool:
    """Return whether a run was started in the folder, even if the run was killed before it wrote `run.json`."""
    return any((folder / name).exists() for name in (RUN_FILE, CONFIG_FILE, ".hydra"))


def job_number(folder: Path) -> tuple[int, str]:
    """Return the sort key of a job's folder: the number that its name begins with (or 0), then the name."""
    number = folder.name.split("-", 1)[0]
    return (int(number) if number.isdecimal() else 0, folder.name)


def job_folders(folder: Path) -> list[Path]:
    """Return the folders of a sweep's jobs, in the order of the jobs."""
    return sorted(filter(is_run, folder.iterdir()), key=job_number) if folder.is_dir() else []
