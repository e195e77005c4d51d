"""Logs the metrics of a run to `metrics.jsonl` in its folder and, with `tracker=wandb`, to Weights & Biases (W&B)."""

from __future__ import annotations

import csv
import json
import netrc
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gradsift.artifacts import Artifact
from gradsift.config import TrackerConfig
from gradsift.errors import ConfigError, GradsiftError, first_line
from gradsift.manifests import content_hash
from gradsift.run_folder import CONFIG_FILE, FIGURES_FOLDER, TABLES_FOLDER, config_values

METRICS_FILE = "metrics.jsonl"
_INIT_TIMEOUT = 30.0  # seconds
_LONGEST_NAME = 128  # characters that W&B accepts in an artifact's name
# matches all but the last name of an absolute path
_FOLDERS = re.compile(r"(?:~(?=/)|(?<![\w.:/])/|\b[A-Za-z]:\\)[^'\",=\[\]{}]*[/\\]")


def group_of(sweep: Path) -> str:
    """Return the W&B group of a sweep's runs: the name of the sweep's folder.

    If the name of the parent folder is a date, the group starts with this date.
    """
    day = sweep.parent.name
    return f"{day}_{sweep.name}" if re.fullmatch(r"\d{4}-\d\d-\d\d", day) else sweep.name


class Tracker:
    """A context manager that tracks one run; on leaving the context, the W&B run is finished, even after an error."""

    def __init__(self, config: TrackerConfig, folder: Path, group: str | None, about: Mapping[str, Any]) -> None:
        """
        Args:
            group: W&B group of the run if `config.group` is not set.
            about: settings that identify the run; W&B shows them as its config.
        """
        self._config, self._folder = config, folder
        self._group = config.group or group
        self._about = without_folders(dict(about))
        self._wandb: Any = None

    def __enter__(self) -> Tracker:
        if self._config.name == "wandb":
            name = str(self._about.get("name"))
            self._wandb = _start(self._config, self._folder, self._group, name, self._about, "run")
        return self

    def curve(self, name: str, curve: list[dict[str, float]]) -> None:
        """Log a training curve: for each entry of `curve`, the loss and the number of tokens seen so far."""
        tokens = 0.0
        for entry in curve:
            tokens += entry["tokens"]
            line = {"batch": entry["batch"], f"{name}/loss": entry["loss"], f"{name}/tokens": tokens}
            self._write(line)
            if self._wandb is not None:
                self._wandb.log(line)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log all numbers in `values`; the keys of nested mappings are joined by a slash."""
        numbers = dict(_flatten(values))
        self._write(numbers)
        if self._wandb is not None:
            self._wandb.summary.update(numbers)

    def _write(self, values: Mapping[str, Any]) -> None:
        with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def artifact(self, artifact: Artifact, file: str) -> None:
        """Send a file of an artifact to W&B if `tracker.artifacts` is true; W&B stores equal files once."""
        if self._wandb is None or not self._config.artifacts:
            return
        import wandb

        name = re.sub(r"[^\w.-]", "_", f"{artifact.stage}-{artifact.path.name}")[-_LONGEST_NAME:]  # keeps the hash
        sent = wandb.Artifact(name, type=artifact.stage, metadata=dict(artifact.info))
        sent.add_file(str(artifact.file(file)), skip_cache=True)
        self._wandb.log_artifact(sent)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def log_report(folder: Path) -> None:
    """Log the figures (PNG) and tables (CSV) of a report to W&B, if the run or sweep in `folder` is tracked there.

    The report is a separate W&B run with the job type `report`, because the runs that it shows have ended and may
    already be uploaded. If the report is about a sweep, it is in the W&B group of the sweep's runs.
    """
    if not is_logged(folder):
        return
    config = TrackerConfig(**_config_of(folder)["tracker"])
    is_sweep = not (folder / CONFIG_FILE).is_file()
    group = config.group or (group_of(folder) if is_sweep else None)
    import wandb

    with _start(config, folder, group, f"report-{folder.name}", {"report_of": folder.name}, "report") as run:
        logged: dict[str, Any] = {
            f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob(f"{FIGURES_FOLDER}/*.png"))
        }
        for path in sorted(folder.glob(f"{TABLES_FOLDER}/*.csv")):
            header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
            logged[f"tables/{path.stem}"] = wandb.Table(columns=header, data=rows)
        run.log(logged)


def is_logged(folder: Path) -> bool:
    """Return whether the run or sweep in `folder` is tracked by W&B."""
    return bool((_config_of(folder).get("tracker") or {}).get("name") == "wandb")


def _config_of(folder: Path) -> dict[str, Any]:
    """Return the config of the run in `folder`.

    If `folder` belongs to a sweep, return the config of the sweep's first job that has a config file. If there is no
    config file, return an empty dict.
    """
    folders = [folder, *(path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}")))]
    return next(filter(None, map(config_values, folders)), {})


def _start(
    config: TrackerConfig, folder: Path, group: str | None, name: str, about: dict[str, Any], job_type: str
) -> Any:
    """Start a W&B run and return it.

    Raises:
        ConfigError: `config.mode` is online, but there is no W&B login on this machine.
        GradsiftError: W&B does not start.
    """
    if config.mode == "online" and not os.environ.get("WANDB_API_KEY") and not _logged_in():
        raise ConfigError(
            "tracker.mode=online needs a login: set WANDB_API_KEY, run `wandb login`, or use tracker.mode=offline"
        )
    folder = folder.absolute()  # W&B's own process may run in another working directory
    run_id = _run_id(folder, about)
    os.environ["WANDB_DATA_DIR"] = str(folder)  # otherwise offline artifacts are written outside the run's folder
    if config.mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # offline must not contact any host
    import wandb

    options: dict[str, Any] = {"project": config.project, "entity": config.entity, "mode": config.mode}
    options |= {"id": run_id, "group": group, "name": name, "job_type": job_type, "config": about, "dir": str(folder)}
    settings: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": _INIT_TIMEOUT}
    settings |= {"save_code": False, "disable_git": True, "x_disable_meta": True}  # no paths or arguments
    try:
        return wandb.init(**options, settings=wandb.Settings(**settings))
    except wandb.Error as error:
        raise GradsiftError(
            f"W&B did not start ({first_line(error)}); use tracker.mode=offline or tracker=none"
        ) from error


def _run_id(folder: Path, about: Mapping[str, Any]) -> str:
    """Return the W&B id of the run in this folder. The id is drawn at random once and stored in the folder.

    A job that runs again in its folder (requeued by Slurm, for example) keeps its id and so replaces its earlier W&B
    run. If files of an earlier offline run are still in the folder, they are deleted.
    """
    file = folder / "wandb" / f"{content_hash(about)[:12]}.id"
    run_id = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not run_id:
        run_id = secrets.token_hex(8)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id, encoding="utf-8")
    for earlier in folder.glob(f"wandb/offline-run-*-{run_id}"):
        shutil.rmtree(earlier)
    return run_id


def without_folders(value: Any) -> Any:
    """Return `value` with absolute paths cut to their last part, so that W&B gets no folder names of this machine."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    return [without_folders(item) for item in value] if isinstance(value, list) else value


def _logged_in() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return path.is_file() and host in netrc.netrc(path).hosts
    except netrc.NetrcParseError:
        return False


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif value is None or isinstance(value, bool | int | float):
            yield prefix + key, value
