"""The material of a report: the folder of a run or a sweep, and the artifacts of its runs.

Everything is read from files, so a report can be made on any machine that has copies of the folder and the store. The
report names what is absent (`Material.gaps`, `Missing`) and never fills in a missing value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.examples import Example
from gradsift.data.load import Labels, labels_of, pool_of
from gradsift.errors import DataError, GradsiftError
from gradsift.gradients.statistics import Statistics, read_statistics
from gradsift.manifests import MANIFEST
from gradsift.pages import portable
from gradsift.report.run_tables import grouped, method_name, with_settings
from gradsift.report.table import percent
from gradsift.run_folder import RUN_FILE, config_values, is_run, job_folders, read_yaml
from gradsift.scoring.scores import Scores
from gradsift.scoring.stage import scores_of
from gradsift.selection.audit import AUDIT_FILE
from gradsift.selection.stage import positions_of
from gradsift.training.optimization import read_trajectory

BROKEN = "failed with"  # the reason begins so if an error, and not a missing file, prevented a figure or table
FAILED = ("failed", "interrupted", "unfinished")  # statuses of runs that ended before the stage they were asked for
# Overrides with these keys are left out of a method's name: the name has the scorer anyway, and the other keys
# distinguish datasets and cells of tables.
_TOLD_APART = ("scorer", "alpha", "data", "target", "judge")
T = TypeVar("T")


class Missing(GradsiftError):
    """Raised if a figure or table cannot be made from the files; the report shows the message as the reason."""


class Incomplete(GradsiftError):
    """Raised after a report was written without the parts that errors prevented; the message names these parts."""


def attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    """Return the value of `make` and "", or None and the reason if `make` raises an exception.

    So an error in one figure does not prevent the other figures. If the exception is not `Missing`, the reason begins
    with BROKEN.
    """
    try:
        return make(), ""
    except Missing as reason:
        return None, str(reason)
    except Exception as error:  # noqa: BLE001 - the report shows the error in place of the figure
        return None, f"{BROKEN} {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its folder, the content of its `run.json` and the values of its config."""

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]  # empty if the run failed before it had one
    method: str  # the scorer, with the settings that not all runs of the sweep share
    stores: Sequence[Path]  # where to look for artifacts that are not at the paths in `run.json`

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        """One of finished, stopped (as asked), failed, interrupted, or unfinished (killed, or still at work)."""
        return str(self.record["status"])

    @property
    def is_full(self) -> bool:
        return bool(self.record["scorer"] == "full")

    @property
    def alpha(self) -> float:
        """The selected share of the rows; 1 for the full-data run, which ignores the option `alpha`."""
        return 1.0 if self.is_full else float(self.record["alpha"])

    @property
    def data(self) -> str | None:
        """Fingerprint of the data; None if the run loaded no data. Runs with equal fingerprints have equal pools."""
        return next((stage["fingerprint"] for stage in self.record["stages"] if stage["name"] == "load"), None)

    @property
    def label(self) -> str:
        """Method and budget, as in "gsnr at 10 %"; the method alone if alpha is not known."""
        return self.method if self.record["alpha"] is None else f"{self.method} at {percent(self.alpha)}"

    @property
    def outcome(self) -> str:
        """The reason why a stage is absent: the run was stopped or failed, or its scorer does not need the stage."""
        if self.status == "stopped":
            after = self.config.get("stop_after")
            return f"it was stopped after {after}" if after else "it was stopped early"
        if self.status in FAILED:
            verb = {"interrupted": "was interrupted", "unfinished": "is unfinished"}.get(self.status, self.status)
            return f"it {verb}: {self.record.get('error')}"
        return f"scorer={self.record['scorer']} does not need it"

    @cached_property
    def artifacts(self) -> dict[str, list[Artifact]]:
        """The run's artifacts that still exist, grouped by stage, in the order of `run.json`."""
        opened = [artifact for stage in self.record["stages"] if (artifact := self._open(stage)) is not None]
        return grouped(opened, lambda artifact: artifact.stage)

    @cached_property
    def lost(self) -> list[str]:
        """Names of the artifacts in `run.json` that are neither at their recorded paths nor in one of `stores`."""
        known = {artifact.fingerprint for group in self.artifacts.values() for artifact in group}
        stages = [stage for stage in self.record["stages"] if stage["fingerprint"] not in known]
        return [f"{stage['name']}/{Path(stage['artifact']).name}" for stage in stages]

    def _open(self, stage: Mapping[str, Any]) -> Artifact | None:
        recorded = Path(stage["artifact"])
        for path in (recorded, *(store / stage["name"] / recorded.name for store in self.stores)):
            try:
                manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(manifest, dict) and manifest.get("fingerprint") == stage["fingerprint"]:
                return Artifact(stage["name"], path, stage["fingerprint"], manifest)
        return None

    def has(self, stage: str) -> bool:
        return bool(self.artifacts.get(stage))

    def one(self, stage: str) -> Artifact:
        """Return the run's first artifact of a stage, or raise `Missing` with the reason why there is none."""
        if self.has(stage):
            return self.artifacts[stage][0]
        if lost := [name for name in self.lost if name.startswith(f"{stage}/")]:
            raise Missing(f"{self.name}: the artifact {lost[0]} is not in the store any more")
        raise Missing(f"{self.name}: there is no stage {stage} ({self.outcome})")


@dataclass(frozen=True, eq=False)
class Material:
    """All runs of a folder. Each method reads artifacts of a run, and raises `Missing` if the run lacks them."""

    folder: Path
    runs: Sequence[Run]
    is_sweep: bool
    _cache: dict[tuple[Any, Path], Any] = field(default_factory=dict)

    @cached_property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "finished"]

    @cached_property
    def gaps(self) -> list[str]:
        """Texts on what is missing: one for each stopped run, each run with lost artifacts and each lost audit file.

        Failed runs are left out, because the report has a table of them.
        """
        gaps = [f"{run.name}: {run.outcome}" for run in self.runs if run.status == "stopped"]
        for run in self.runs:
            if run.lost:
                more = f" and {len(run.lost) - 1} more" if len(run.lost) > 1 else ""
                gaps.append(f"{run.name}: {run.lost[0]}{more} are not in the store any more")
            if run.record.get("audit") is not None and not (run.folder / AUDIT_FILE).is_file():
                gaps.append(f"{run.name}: {AUDIT_FILE} is not in the run's folder any more")
        return gaps

    def _read(self, reader: Callable[[Artifact], T], artifact: Artifact) -> T:
        key = (reader, artifact.path)
        if key not in self._cache:
            self._cache[key] = reader(artifact)
        value: T = self._cache[key]
        return value

    def examples(self, run: Run) -> list[Example]:
        """Return the N examples of the run's pool."""
        return self._read(pool_of, run.one("load"))

    def labels(self, run: Run) -> Labels | None:
        """Return the quality and family of each example; None for data without labels."""
        return self._read(labels_of, run.one("load"))

    def scores(self, run: Run) -> Scores:
        return self._read(scores_of, run.one("score"))

    def selected(self, run: Run) -> np.ndarray:
        """Return the positions of the selected examples in the pool, best first."""
        return self._read(positions_of, run.one("select"))

    def statistics(self, run: Run) -> Statistics:
        return self._read(read_statistics, run.one("statistics"))

    def members(self, run: Run) -> list[list[Artifact]]:
        """Return the adapters of the ensemble's members, as lists with the indices [member][epoch - 1]."""
        run.one("member")
        adapters: dict[int, dict[int, Artifact]] = {}
        for artifact in run.artifacts["member"]:
            config = artifact.manifest["config"]
            adapters.setdefault(config["member"], {})[config["epoch"]] = artifact
        return [[epochs[epoch] for epoch in sorted(epochs)] for _, epochs in sorted(adapters.items())]

    def norms(self, run: Run, epoch: int) -> list[list[Artifact]]:
        """Return the artifacts of the gradient norms after an epoch, as lists with the indices [member][shard]."""
        if (run.config.get("proxy") or {}).get("collect") == "during_training":
            return [[epochs[epoch - 1]] for epochs in self.members(run)]
        run.one("norms")
        # names of artifacts: m<member>-e<epoch>-<fingerprint>, or m<member>-e<epoch>-<shard>-<fingerprint>
        after_epoch = [artifact for artifact in run.artifacts["norms"] if f"-e{epoch}-" in artifact.path.name]
        if not after_epoch:
            raise Missing(f"{run.name}: no norms were collected after epoch {epoch}")
        by_member = grouped(after_epoch, lambda artifact: int(artifact.path.name[1:].partition("-")[0]))
        return [shards for _, shards in sorted(by_member.items())]

    def trajectories(self, run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each member's optimiser steps (P,) and points (P, D), as recorded by `gradsift.proxy.trajectory`."""
        trajectories = []
        for epochs in self.members(run):
            steps, points = zip(*(read_trajectory(artifact.path) for artifact in epochs), strict=True)
            trajectories.append((np.concatenate(steps), np.concatenate(points)))
        return trajectories


def read(folder: Path, artifacts: Path | None = None) -> Material:
    """Read the folder of a run or of a sweep.

    Args:
        artifacts: the folder of a store, which is searched for artifacts that are not at the paths in `run.json`. The
            store that the run's config names is searched next.

    Raises:
        DataError: there is no run in the folder, a run was only planned, or a `run.json` is broken.
    """
    is_sweep = not is_run(folder)
    folders = job_folders(folder) if is_sweep else [folder]
    if not folders:
        raise DataError(
            f"{folder} holds neither {RUN_FILE} nor folders of jobs; give the folder of a run or of a sweep"
        )
    records = [_record(job) for job in folders]
    # failed runs may lack overrides that all others share, so their settings are determined apart from the others'
    by_failure = grouped(records, lambda record: record["status"] in FAILED)
    with_names = {failed: iter(with_settings(group, _TOLD_APART)) for failed, group in by_failure.items()}
    runs = []
    for job, status in zip(folders, [record["status"] for record in records], strict=True):
        record, config = next(with_names[status in FAILED]), config_values(job)
        stores = [Path(store) for store in (artifacts, config.get("artifacts")) if store is not None]
        method = portable(method_name(record["scorer"], record["settings"]))
        runs.append(Run(job, record, config, method, stores))
    return Material(folder, runs, is_sweep)


def _record(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`, or a record with the status `unfinished` if there is no such file.

    A missing scorer or alpha is taken from the run's overrides.
    """
    path = folder / RUN_FILE
    if path.is_file():
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); run the job again or remove its folder") from error
    else:
        overrides = read_yaml(folder / ".hydra" / "overrides.yaml")
        overrides = list(map(str, overrides)) if isinstance(overrides, list) else []
        record = {"status": "unfinished", "error": "it was killed or is still at work", "overrides": overrides}
    if record.get("status") == "planned":
        raise DataError(f"{folder} holds a plan and no results; run the same command without plan=true")
    options = dict(o.split("=", 1) for o in record.get("overrides") or [] if "=" in o)
    try:
        alpha: float | None = float(options.get("alpha", "0.1"))
    except ValueError:  # the run failed because of this value
        alpha = None
    scorer = options.get("scorer", options.get("method", "?"))
    return {"stages": [], "scorer": scorer, "alpha": alpha, **record}
