"""Where metrics go: `metrics.jsonl` in the run folder always, Weights & Biases on top."""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from gradsift.config import TrackerConfig
from gradsift.errors import ConfigError, GradsiftError

METRICS_FILE = "metrics.jsonl"
_INIT_TIMEOUT = 30.0  # seconds


class Tracker:
    """A context manager around one run; W&B is always finished, also after an error."""

    def __init__(self, config: TrackerConfig, folder: Path, group: str | None, about: Mapping[str, Any]) -> None:
        self._config = config
        self._folder = folder
        self._group = config.group or group
        self._about = about
        self._wandb: Any = None

    def __enter__(self) -> Tracker:
        if self._config.name != "wandb":
            return self
        if self._config.mode == "online" and not os.environ.get("WANDB_API_KEY") and not _logged_in():
            raise ConfigError(
                "tracker.mode=online needs a login: set WANDB_API_KEY, run `wandb login`, or take tracker.mode=offline"
            )
        os.environ["WANDB_DATA_DIR"] = str(self._folder)  # else offline artifacts land outside the run's folder
        if self._config.mode == "offline":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # offline means no host at all
        import wandb

        try:
            self._wandb = wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                group=self._group,
                name=str(self._about.get("name")),
                mode=self._config.mode,  # type: ignore[arg-type]
                dir=str(self._folder),
                config=dict(self._about),
                settings=wandb.Settings(
                    silent=True, console="off", save_code=False, disable_git=True, init_timeout=_INIT_TIMEOUT
                ),
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0][:200]
            raise GradsiftError(f"W&B did not start ({reason}); take tracker.mode=offline or tracker=none") from error
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


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
