"""What a report is made of: the folder of a run or a sweep, and the artifacts that its runs name.

Everything is read from files: `run.json`, `config.yaml`, `metrics.jsonl` and artifacts. No model is loaded and nothing
is computed anew, so a report can be made anywhere the folder and the store were copied to. What is not there is
said (`Material.gaps`, `Missing`) and never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example
from gradsift.data.load import EXAMPLES_FILE, Labels, labels_of, pool_of
from gradsift.errors import DataError, GradsiftError
from gradsift.evaluation.judgments import Judgment, read_judgments
from gradsift.gradients.statistics import Statistics, read_statistics
from gradsift.manifests import MANIFEST
from gradsift.pages import portable
from gradsift.report.tables import job_number, method_name, with_settings
from gradsift.scoring.scores import Scores
from gradsift.scoring.stage import scores_of
from gradsift.selection.stage import positions_of
from gradsift.training.curves import TRAJECTORY_FILE, read_curve, read_trajectory

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
BROKEN = "failed with"  # begins the reason of what is absent by an error
FAILED = ("failed", "interrupted", "unfinished")  # statuses of runs that did not come as far as they were asked to
# overrides that do not name a method: the scorer is named anyway, the others tell datasets, targets and cells apart
_TOLD_APART = ("scorer", "alpha", "data", "target", "judge")
T = TypeVar("T")
Curve = list[dict[str, float]]  # a line a step: batch, loss (nats a token), tokens


class Missing(GradsiftError):
    """A figure or table cannot be made of what is there; the message is the reason, for people."""


class Incomplete(GradsiftError):
    """A report is written, and something is absent from it by an error; the message names all of that."""


def in_a_line(error: Exception) -> str:
    """Type and message of an error."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def attempt(make: Callable[[], object]) -> str | None:
    """Make a figure or a table, so that a defect in one costs no other.

    Returns:
        Why there is none, where it could not be made; after an error other than Missing it begins with BROKEN.
    """
    try:
        make()
    except Missing as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the rest of the report stands
        return f"{BROKEN} {in_a_line(error)}"
    return None


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its folder, `run.json` as it stands there, and the values of its config."""

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]  # empty where the run failed before it had one
    method: str  # the scorer, and what else tells this way of selecting from the others of the sweep
    stores: Sequence[Path]  # where its artifacts may lie if not where `run.json` says

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        """finished, stopped, failed, interrupted, or unfinished (killed, or still at work)."""
        return str(self.record["status"])

    @property
    def error(self) -> str | None:
        return self.record.get("error")

    @property
    def is_full(self) -> bool:
        """Whether this is the full-data run."""
        return bool(self.record["scorer"] == "full")

    @property
    def alpha(self) -> float:
        """The share that is selected; 1 for the full-data run, which ignores the option."""
        return 1.0 if self.is_full else float(self.record["alpha"])

    @property
    def data(self) -> str | None:
        """Fingerprint of the data; runs that share it number their examples alike."""
        return next((stage["fingerprint"] for stage in self.record["stages"] if stage["name"] == "load"), None)

    @cached_property
    def _found(self) -> tuple[dict[str, list[Artifact]], list[str]]:
        found: dict[str, list[Artifact]] = {}
        lost = []
        for stage in self.record["stages"]:
            artifact = self._open(stage)
            if artifact is None:
                lost.append(f"{stage['name']}/{Path(stage['artifact']).name}")
            else:
                found.setdefault(stage["name"], []).append(artifact)
        return found, lost

    @property
    def artifacts(self) -> dict[str, list[Artifact]]:
        """By stage, in the order of the run."""
        return self._found[0]

    @property
    def lost(self) -> list[str]:
        """Artifacts that `run.json` names and that are nowhere to be found."""
        return self._found[1]

    def _open(self, stage: Mapping[str, Any]) -> Artifact | None:
        said = Path(stage["artifact"])
        for path in (said, *(store / stage["name"] / said.name for store in self.stores)):
            try:
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(manifest, dict) and manifest.get("fingerprint") == stage["fingerprint"]:
                return Artifact(stage["name"], path, stage["fingerprint"], manifest)
        return None

    def has(self, stage: str) -> bool:
        return bool(self.artifacts.get(stage))

    def one(self, stage: str, place: int = 0) -> Artifact:
        """The artifact of a stage; `place` counts those that the run has of it.

        Raises:
            Missing: there is none; says why.
        """
        found = self.artifacts.get(stage, [])
        if place < len(found):
            return found[place]
        if lost := [name for name in self.lost if name.startswith(f"{stage}/")]:
            raise Missing(f"{self.name}: the artifact {lost[0]} is not in the store any more")
        raise Missing(f"{self.name}: there is no stage {stage} ({self.outcome})")

    @property
    def outcome(self) -> str:
        """How the run ended, in words."""
        if self.status == "stopped":
            after = self.config.get("stop_after")
            return f"it was stopped after {after}" if after else "it was stopped early"
        if self.status in FAILED:
            return f"it {'was ' if self.status == 'interrupted' else 'is ' if self.status == 'unfinished' else ''}" + (
                f"{self.status}: {self.error}"
            )
        return f"scorer={self.record['scorer']} does not need it"


@dataclass(frozen=True, eq=False)
class Material:
    """All runs of a folder, with readers that keep what they read."""

    folder: Path
    runs: Sequence[Run]
    is_sweep: bool
    _kept: dict[tuple[Any, Path], Any] = field(default_factory=dict)

    @cached_property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "finished"]

    @cached_property
    def gaps(self) -> list[str]:
        """What a reader of the report has to know is not there, and why, beside the runs that did not finish."""
        gaps = [f"{run.name}: {run.outcome}" for run in self.runs if run.status == "stopped"]
        for run in self.runs:
            if run.lost:
                more = f" and {len(run.lost) - 1} more" if len(run.lost) > 1 else ""
                gaps.append(f"{run.name}: {run.lost[0]}{more} are not in the store any more")
        return gaps

    def _read(self, reader: Callable[[Artifact], T], artifact: Artifact) -> T:
        key = (reader, artifact.path)
        if key not in self._kept:
            self._kept[key] = reader(artifact)
        value: T = self._kept[key]
        return value

    # each raises Missing where the run has no such thing

    def examples(self, run: Run) -> list[Example]:
        """The pool, N examples."""
        return self._read(pool_of, run.one("load"))

    def examples_file(self, run: Run) -> Path:
        """The same, for what reads it a block of rows at a time."""
        return run.one("load").file(EXAMPLES_FILE)

    def labels(self, run: Run) -> Labels | None:
        """What is known of the examples; None for data without labels."""
        return self._read(labels_of, run.one("load"))

    def scores(self, run: Run) -> Scores:
        return self._read(scores_of, run.one("score"))

    def selected(self, run: Run) -> np.ndarray:
        """Positions of the selected examples in the pool, best first."""
        return self._read(positions_of, run.one("select"))

    def statistics(self, run: Run) -> Statistics:
        return self._read(read_statistics, run.one("statistics"))

    def curve(self, run: Run, which: str = "model") -> Curve:
        """The target's training: of the run's `model`, or of the full-data `reference`."""
        return self._read(_curve, run.one("finetune", 0 if which == "model" else 1))

    def members(self, run: Run) -> list[list[Artifact]]:
        """The ensemble's trained adapters, as [adapter][epoch - 1]."""
        run.one("member")
        chains: dict[int, dict[int, Artifact]] = {}
        for artifact in run.artifacts["member"]:
            config = artifact.manifest["config"]
            chains.setdefault(config["member"], {})[config["epoch"]] = artifact
        return [[chain[epoch] for epoch in sorted(chain)] for _, chain in sorted(chains.items())]

    def member_curves(self, run: Run) -> list[Curve]:
        """Training of each adapter, epoch after epoch."""
        return [[entry for artifact in chain for entry in self._read(_curve, artifact)] for chain in self.members(run)]

    def norms(self, run: Run, epoch: int) -> list[list[Artifact]]:
        """The members' gradient norms after an epoch, as [member][shard]; for `read_norms` and `compute_statistics`."""
        found: dict[int, list[Artifact]] = {}
        if (run.config.get("proxy") or {}).get("collect") == "during_training":
            return [[chain[epoch - 1]] for chain in self.members(run)]
        run.one("norms")
        for artifact in run.artifacts["norms"]:
            named = re.match(r"m(\d+)-e(\d+)-", artifact.path.name)
            if named and int(named[2]) == epoch:
                found.setdefault(int(named[1]), []).append(artifact)
        if not found:
            raise Missing(f"{run.name}: no norms were collected after epoch {epoch}")
        return [shards for _, shards in sorted(found.items())]

    def trajectories(self, run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each adapter: optimiser steps (P,) and points (P, D) of its way through all epochs."""
        ways = []
        for chain in self.members(run):
            for artifact in chain:
                if not artifact.file(TRAJECTORY_FILE).is_file():
                    raise Missing(
                        f"{run.name}: the members were trained before their ways were noted; train them again"
                    )
            steps, points = zip(*(self._read(_trajectory, artifact) for artifact in chain), strict=True)
            ways.append((np.concatenate(steps), np.concatenate(points)))
        return ways

    def judgments(self, run: Run) -> list[Judgment]:
        """Every reply of the judge, forward and reverse."""
        return self._read(_judgments, run.one("judge"))


def _curve(artifact: Artifact) -> Curve:
    return read_curve(artifact.path)


def _trajectory(artifact: Artifact) -> tuple[np.ndarray, np.ndarray]:
    return read_trajectory(artifact.path)


def _judgments(artifact: Artifact) -> list[Judgment]:
    return read_judgments(artifact.file("judgments.jsonl"))


def read(folder: Path, artifacts: Path | None = None) -> Material:
    """The material of a run's folder, or of a sweep's.

    Args:
        artifacts: the store, where it is neither at the paths in `run.json` nor where the config says.

    Raises:
        DataError: there is no run in the folder, or a `run.json` is broken.
    """
    is_sweep = not _is_job(folder)
    folders = sorted(_jobs(folder), key=job_number) if is_sweep else [folder]
    if not folders:
        raise DataError(
            f"{folder} holds neither {RUN_FILE} nor folders of jobs; give the folder of a run or of a sweep"
        )
    configs = [_config(job) for job in folders]
    records = _named([_record(job) for job in folders])
    runs = []
    for job, config, record in zip(folders, configs, records, strict=True):
        stores = [Path(store) for store in (artifacts, config.get("artifacts")) if store is not None]
        method = portable(method_name(record["scorer"], record["settings"]))
        runs.append(Run(job, record, config, method, stores))
    return Material(folder, runs, is_sweep)


def _named(records: Sequence[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """The records with their `settings`; a run that failed does not count in what the others have in common."""
    sound = [record for record in records if record["status"] not in FAILED]
    named = {id(record): found for record, found in zip(sound, with_settings(sound, _TOLD_APART), strict=True)}
    failed = with_settings([record for record in records if id(record) not in named], _TOLD_APART)
    others = iter(failed)
    return [named.get(id(record)) or next(others) for record in records]


def _jobs(folder: Path) -> list[Path]:
    """Folders of a sweep's jobs."""
    return [path for path in folder.iterdir() if _is_job(path)] if folder.is_dir() else []


def _is_job(folder: Path) -> bool:
    """Whether a run was begun in the folder, also one that was killed before it could write a `run.json`."""
    return any((folder / mark).exists() for mark in (RUN_FILE, CONFIG_FILE, ".hydra"))


def _record(folder: Path) -> dict[str, Any]:
    """`run.json`, completed where the run failed before it could say what it was."""
    path = folder / RUN_FILE
    record: dict[str, Any] = {"status": "unfinished", "error": "it was killed or is still at work", "overrides": []}
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is no JSON ({error}); run the job again, or move its folder away") from error
    else:
        record["overrides"] = _overrides(folder)
    given = dict(o.split("=", 1) for o in record.get("overrides") or [] if "=" in o)
    record.setdefault("stages", [])
    record.setdefault("scorer", given.get("scorer", given.get("method", "?")))
    record.setdefault("alpha", _number(given.get("alpha", "0.1")))
    return record


def _overrides(folder: Path) -> list[str]:
    path = folder / ".hydra" / "overrides.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    return [str(override) for override in found] if isinstance(found, list) else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _config(folder: Path) -> dict[str, Any]:
    """The values of `config.yaml`; empty where there is none."""
    try:
        found = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    values = found.get("values") if isinstance(found, dict) else None
    return values if isinstance(values, dict) else {}
