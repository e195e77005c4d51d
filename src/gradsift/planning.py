"""What a run would do: the line is walked as it is, over a store that makes nothing.

A unit of work is found by its fingerprint, so a plan knows what is done without doing anything. Light stages
(reading the data, pinning a model) are made in a folder that is thrown away, since everything behind them depends
on their content. Only a finetune depends on the content of heavy work: on which examples were selected. Where the
selection is not made, the finetune and what follows stand under a name of their own, `certain=False`: at most that
is to do, as another selection of the same examples may have led to the same finetune.

Estimates come from manifests of the same stage, method and models in the store, scaled by the number of examples;
where there is none they are None, which is said and never taken for 0.
"""

from __future__ import annotations

import atexit
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradsift.artifacts import Artifact, Store, lineage_of, text_of
from gradsift.errors import GradsiftError
from gradsift.manifests import MANIFEST, parse_manifest, read_manifest

if TYPE_CHECKING:
    from gradsift.run_record import RunRecord

DONE, TO_DO = "done", "to do"
QUESTIONS = {"alpagasus": 1, "deita": 2}  # calls an example, of scorer.style
_GROWS = (".parquet", ".npy", ".jsonl", ".json")  # files whose size goes with the number of examples


class NotMade(GradsiftError):
    """A plan came to where it would have to read what is not made yet."""


@dataclass(frozen=True)
class Planned(Artifact):
    """A unit of work that is not made: it has a name and a size, and no content."""

    planner: Planner
    certain: bool  # see Unit

    @property
    def identity(self) -> str:
        return f"{self.fingerprint}:{text_of(self.numerics)}"

    @property
    def info(self) -> Mapping[str, Any]:
        raise NotMade(f"{self.stage}/{self.path.name} is not made yet")

    @property
    def size(self) -> int | None:
        size: int | None = self.manifest["size"]
        return size

    def file(self, name: str) -> Path:
        raise NotMade(f"{self.stage}/{self.path.name} is not made yet, so there is no {name} to read")


@dataclass(frozen=True)
class Unit:
    """One unit of work in a plan (an entry of `plan` in `run.json`); estimates are None where nothing is known."""

    name: str  # of the stage
    artifact: str  # folder in the store
    fingerprint: str
    state: str  # done or to do
    certain: bool  # whether the fingerprint is that of the unit; else at most this is to do
    seconds: float | None = None
    bytes: int | None = None
    peak_gb: float | None = None  # of the process's resident memory
    calls: int = 0  # to a judge behind an endpoint, at most


@functools.cache
def _scratch() -> Path:
    """The folder of what light stages make for the plans of this process; gone at its end."""
    folder = tempfile.TemporaryDirectory(prefix="gradsift-plan-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


class Planner(Store):
    """A store that looks up what `store` has and writes nothing there."""

    def __init__(self, store: Path, say: Callable[[str], None]) -> None:
        super().__init__(_scratch(), say)
        self.store = store
        self._made = Store(store)
        self.units: dict[str, Unit] = {}
        self._earlier = Earlier(store)
        _show_downloads(store / "downloads", self.root / "downloads")

    def obtain(
        self,
        stage: str,
        slug: str,
        config: Mapping[str, Any],
        parents: Sequence[Artifact],
        make: Callable[[Path], Mapping[str, Any]],
        *,
        version: int,
        keep_part: bool = False,
        size: int | None = None,
        light: bool = False,
    ) -> Artifact:
        """The artifact if it is there or light, or else its name; notes which."""
        fingerprint, path = self._made.place(stage, slug, config, parents, version)
        manifest, damage = read_manifest(path, stage=stage, fingerprint=fingerprint)
        if damage is None:
            return self._note(Artifact(stage, path, fingerprint, manifest), DONE, certain=True)
        if light:
            made = super().obtain(stage, slug, config, parents, make, version=version)
            self._note(Artifact(stage, path, fingerprint, made.manifest), TO_DO, certain=True)
            return made
        return self._planned(stage, path, fingerprint, config, parents, size, certain=True)

    def has(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], *, version: int
    ) -> bool:
        return self._made.has(stage, slug, config, parents, version=version)

    def expect(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], size: int
    ) -> Artifact:
        """A name for what depends on the content of something that is not made.

        Args:
            config: names that too, to tell this from others that are to be expected of the same parents.
        """
        fingerprint, path = self._made.place(stage, slug, config, parents, 0)
        return self._planned(stage, path, fingerprint, config, parents, size, certain=False)

    def _planned(
        self,
        stage: str,
        path: Path,
        fingerprint: str,
        config: Mapping[str, Any],
        parents: Sequence[Artifact],
        size: int | None,
        *,
        certain: bool,
    ) -> Artifact:
        certain = certain and all(parent.certain for parent in parents if isinstance(parent, Planned))
        slug = path.name.rsplit("-", 1)[0]
        lineage = {**lineage_of(stage, slug, parents, size), "config": config}
        return self._note(Planned(stage, path, fingerprint, lineage, self, certain), TO_DO, certain=certain)

    def _note(self, artifact: Artifact, state: str, *, certain: bool) -> Artifact:
        if artifact.fingerprint not in self.units:
            estimate = self._earlier.estimate(artifact) if state == TO_DO else {}
            where = (artifact.stage, str(artifact.path), artifact.fingerprint)
            self.units[artifact.fingerprint] = Unit(*where, state, certain, **estimate)
        return artifact

    def units_as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(unit) for unit in self.units.values()]


def _show_downloads(there: Path, here: Path) -> None:
    """What was downloaded before is not downloaded again for a plan."""
    here.mkdir(parents=True, exist_ok=True)
    for file in there.iterdir() if there.is_dir() else ():
        if not (here / file.name).exists():
            (here / file.name).symlink_to(file.absolute())


@dataclass
class Earlier:
    """What units of work took, by the manifests of a store."""

    store: Path
    _by_stage: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    def estimate(self, unit: Artifact) -> dict[str, Any]:
        """Seconds, bytes and peak memory of what is to do, as far as they are known, and the judge's calls.

        By the median over those units of the same stage, method and models that share most settings with it.
        """
        size, models, config = unit.size or 0, list(unit.models), unit.manifest["config"]
        alike = [m for m in self._of(unit.stage) if m.get("models") == models and _method(m) == _method(unit.manifest)]
        counts = [_shared(manifest["config"], config) for manifest in alike]
        nearest = [m for m, count in zip(alike, counts, strict=True) if count == max(counts)]
        found: dict[str, Any] = {"calls": _calls(unit.stage, config, size)}
        if nearest:
            scales = [size / m["size"] if size and m.get("size") else 1.0 for m in nearest]
            pairs = list(zip(nearest, scales, strict=True))
            found["seconds"] = round(statistics.median(m["seconds"] * scale for m, scale in pairs), 3)
            found["bytes"] = round(statistics.median(_bytes(m, scale) for m, scale in pairs))
            found["peak_gb"] = statistics.median([m.get("peak_resident_gb") or 0.0 for m in nearest]) or None
        return found

    def _of(self, stage: str) -> list[Mapping[str, Any]]:
        if stage not in self._by_stage:
            files = sorted((self.store / stage).glob(f"*/{MANIFEST}"))
            self._by_stage[stage] = [found for file in files if (found := _read(file))]
        return self._by_stage[stage]


def _read(file: Path) -> Mapping[str, Any] | None:
    """A manifest, or None where it is not whole: then there is nothing to learn from it."""
    try:
        found = parse_manifest(file)
    except (OSError, ValueError):
        return None
    return found if {"config", "seconds", "files"} <= set(found) else None


def _method(manifest: Mapping[str, Any]) -> Any:
    """The scorer, selector or judge of a manifest: their costs tell nothing of each other's."""
    config = manifest["config"]
    return config.get("name") or (config.get("selector") or {}).get("name")


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Settings that are equal."""
    return sum(name in other and other[name] == value for name, value in one.items())


def _bytes(manifest: Mapping[str, Any], scale: float) -> float:
    sizes: dict[str, int] = {name: described["bytes"] for name, described in manifest["files"].items()}
    return sum(size * (scale if Path(name).suffix in _GROWS else 1.0) for name, size in sizes.items())


def _calls(stage: str, config: Mapping[str, Any], size: int) -> int:
    """Calls to a judge behind an endpoint, none of whose replies is known; a pair is judged in both orders."""
    if stage == "judge" and config.get("name") in ("openai", "alpaca_eval"):
        return 2 * size
    if stage == "score" and config.get("rater.name") == "openai":
        return QUESTIONS[config["style"]] * size
    return 0


class _Unread:
    """Stands in for a run's record where there is nothing to read: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: None


def unread() -> RunRecord:
    """Return a record that reads nothing."""
    return cast("RunRecord", _Unread())
