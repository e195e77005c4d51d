"""Where metrics go: `metrics.jsonl` in the run folder always, Weights & Biases on top."""

from __future__ import annotations

import csv
import json
import netrc
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from gradsift.artifacts import Artifact
from gradsift.config import TrackerConfig
from gradsift.errors import ConfigError, GradsiftError
from gradsift.manifests import content_hash
from gradsift.run_folder import CONFIG_FILE, FIGURES_FOLDER, TABLES_FOLDER, config_values

METRICS_FILE = "metrics.jsonl"
_INIT_TIMEOUT = 30.0  # seconds
_LONGEST_NAME = 128  # characters of an artifact's name that W&B takes
# of an absolute path: all but its last name
_FOLDERS = re.compile(r"(?:~(?=/)|(?<![\w.:/])/|\b[A-Za-z]:\\)[^'\",=\[\]{}]*[/\\]")


def group_of(sweep: Path) -> str:
    """The group of a sweep's runs: its folder's name, behind the day where that is the folder above."""
    day = sweep.parent.name
    return f"{day}_{sweep.name}" if re.fullmatch(r"\d{4}-\d\d-\d\d", day) else sweep.name


class Tracker:
    """A context manager around one run; W&B is always finished, also after an error."""

    def __init__(self, config: TrackerConfig, folder: Path, group: str | None, about: Mapping[str, Any]) -> None:
        self._config = config
        self._folder = folder
        self._group = config.group or group
        self._about = about
        self._wandb: Any = None

    def __enter__(self) -> Tracker:
        if self._config.name == "wandb":
            about = without_folders(dict(self._about))
            self._wandb = _start(self._config, self._folder, self._group, str(about.get("name")), about, "run")
        return self

    def curve(self, name: str, curve: list[dict[str, float]]) -> None:
        """Log a training curve: one entry a batch, with the tokens seen so far."""
        tokens = 0.0
        with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
            for entry in curve:
                tokens += entry["tokens"]
                line = {"batch": entry["batch"], f"{name}/loss": entry["loss"], f"{name}/tokens": tokens}
                stream.write(json.dumps(line) + "\n")
                if self._wandb is not None:
                    self._wandb.log(line)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the numbers of `values`, nested names joined by a slash."""
        flat = dict(_flatten(values))
        with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(flat) + "\n")
        if self._wandb is not None:
            self._wandb.summary.update(flat)

    def artifact(self, made: Artifact, file: str) -> None:
        """Send a file of a stage along where `tracker.artifacts` asks for it; equal ones of several runs are one."""
        if self._wandb is None or not self._config.artifacts:
            return
        import wandb

        name = re.sub(r"[^\w.-]", "_", f"{made.stage}-{made.path.name}")[-_LONGEST_NAME:]  # the fingerprint is last
        sent = wandb.Artifact(name, type=made.stage, metadata=dict(made.info))
        sent.add_file(str(made.file(file)), skip_cache=True)
        self._wandb.log_artifact(sent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def log_report(folder: Path) -> bool:
    """Log the figures (PNG) and tables (CSV) that a report wrote to `folder` to W&B, as a run of the job type `report`.

    It is a run of its own, in the sweep's group where there is one: the runs that it shows have ended, and may have
    been sent already.

    Returns:
        False where the runs were not tracked by W&B; nothing is done then.
    """
    if not is_logged(folder):
        return False
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
    return True


def is_logged(folder: Path) -> bool:
    """Whether the runs of a run's or a sweep's folder are tracked by W&B, and their report with them."""
    return bool((_config_of(folder).get("tracker") or {}).get("name") == "wandb")


def _config_of(folder: Path) -> dict[str, Any]:
    """Return the config of a run, or of the first job of a sweep that has one; empty if there is none."""
    folders = [folder, *(path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}")))]
    return next(filter(None, map(config_values, folders)), {})


def _start(
    config: TrackerConfig, folder: Path, group: str | None, name: str, about: dict[str, Any], job_type: str
) -> Any:
    """A W&B run.

    Raises:
        ConfigError: it shall be sent, and nobody is logged in.
        GradsiftError: W&B did not start; says why.
    """
    if config.mode == "online" and not os.environ.get("WANDB_API_KEY") and not _logged_in():
        raise ConfigError(
            "tracker.mode=online needs a login: set WANDB_API_KEY, run `wandb login`, or take tracker.mode=offline"
        )
    folder = folder.absolute()  # W&B's own process may be one that was started elsewhere
    run_id = _run_id(folder, about)
    os.environ["WANDB_DATA_DIR"] = str(folder)  # else offline artifacts land outside the run's folder
    if config.mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # offline means no host at all
    import wandb

    try:
        return wandb.init(
            id=run_id,
            project=config.project,
            entity=config.entity,
            group=group,
            name=name,
            job_type=job_type,
            mode=config.mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=about,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                x_disable_meta=True,  # folders and arguments of the process
                init_timeout=_INIT_TIMEOUT,
            ),
        )
    except wandb.Error as error:
        reason = str(error).splitlines()[0][:200]
        raise GradsiftError(f"W&B did not start ({reason}); take tracker.mode=offline or tracker=none") from error


def _run_id(folder: Path, about: Mapping[str, Any]) -> str:
    """The W&B id of what `about` describes in this folder: random, and kept there.

    So no two jobs share one, on whatever machine, and a job that is given again in its folder (put in the queue again
    by Slurm, say) takes the place of the run that it left, of which nothing unsent stays.
    """
    kept = folder / "wandb" / f"{content_hash(about)[:12]}.id"
    run_id = kept.read_text(encoding="utf-8") if kept.is_file() else ""
    if not run_id:
        run_id = secrets.token_hex(8)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(run_id, encoding="utf-8")
    for left in folder.glob(f"wandb/offline-run-*-{run_id}"):
        shutil.rmtree(left)
    return run_id


def without_folders(value: Any) -> Any:
    """The same with the last name alone of every absolute path: no folder of this machine belongs on W&B."""
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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float | None]]:
    flat: list[tuple[str, float | None]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}/")
        elif value is None or isinstance(value, bool | int | float):
            flat.append((prefix + key, value))
    return flat
