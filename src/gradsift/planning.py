"""Plan of a run: the pipeline runs as usual, but with a store that looks units up instead of making them.

An artifact is found by its fingerprint, so a plan knows what exists without computing anything. Light stages (reading
the data, pinning a model) are made in a temporary folder, because the fingerprints of all later stages contain their
content. The only heavy stage whose content enters a fingerprint is the selection. Until it exists, the finetune and the
units after it have `certain=False`: another run may have selected the same examples and made the same finetune.
"""

from __future__ import annotations

import atexit
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact, Make, Store
from gradsift.manifests import MANIFEST, parse_manifest, read_manifest

DONE, TO_DO = "done", "to do"
QUESTIONS = {"alpagasus": 1, "deita": 2}  # calls to a judge for each example, by scorer.style
_GROWS = (".parquet", ".npy", ".jsonl", ".json")  # files whose size grows with the number of examples
_UNKNOWN = {"seconds": None, "bytes": None, "peak_gb": None, "calls": 0}  # the estimates of a unit


class Planner(Store):
    """A store for plans: looks units up in the folder `store`, writes nothing there; makes light units elsewhere."""

    def __init__(self, store: Path, say: Callable[[str], None]) -> None:
        super().__init__(_temporary_folder(), say)
        self.store = store
        self.units: dict[str, dict[str, Any]] = {}  # entries of `plan` in `run.json`, by fingerprint
        self._earlier = functools.cache(self._read)  # the manifests of a stage's artifacts
        downloads = self.root / "downloads"
        downloads.mkdir(exist_ok=True)
        for file in (store / "downloads").glob("*"):
            if not (downloads / file.name).exists():
                (downloads / file.name).symlink_to(file.absolute())  # a plan downloads nothing again

    def has(self, *unit: Any, **options: Any) -> bool:
        return Store(self.store).has(*unit, **options)

    def _provide(self, wanted: Artifact, make: Make, *, light: bool, exact: bool, divided: bool) -> Artifact:
        """Return the artifact if it exists; else make it if it is light, or return a planned artifact without files."""
        unit = replace(wanted, path=self.store / wanted.stage / wanted.path.name)
        manifest, damage = read_manifest(unit.path, stage=unit.stage, fingerprint=unit.fingerprint)
        if damage is None:
            self._note(unit, DONE)
            return replace(unit, manifest=manifest, planned=False)
        parents = [self.units[parent] for parent in unit.manifest["parents"] if parent in self.units]
        self._note(unit, TO_DO, certain=exact and all(parent["certain"] for parent in parents))
        if light:
            return super()._provide(wanted, make, light=light, exact=exact, divided=divided)
        return unit

    def _note(self, unit: Artifact, state: str, *, certain: bool = True) -> None:
        """List a unit; `certain` is False if it may exist already."""
        if unit.fingerprint not in self.units:
            entry = {"name": unit.stage, "artifact": str(unit.path), "fingerprint": unit.fingerprint, "state": state}
            estimate = self.estimate(unit) if state == TO_DO else _UNKNOWN
            self.units[unit.fingerprint] = entry | {"certain": certain} | estimate

    def estimate(self, unit: Artifact) -> dict[str, Any]:
        """Return seconds, bytes, peak memory and judge calls of a unit that is to be made, as far as they are known.

        All but the calls are medians over the earlier units of the same stage, method and models that share the most
        settings with this unit. Time and the sizes of tables are scaled by the number of examples.
        """
        size, models, config = unit.size or 0, list(unit.models), unit.manifest["config"]
        estimate: dict[str, Any] = _UNKNOWN | {"calls": _calls(unit.stage, config, size)}
        alike = [
            manifest
            for manifest in self._earlier(unit.stage)
            if manifest.get("models") == models and _method(manifest["config"]) == _method(config)
        ]
        if alike:
            shared = [_shared(manifest["config"], config) for manifest in alike]
            nearest = [manifest for manifest, count in zip(alike, shared, strict=True) if count == max(shared)]
            scales = [size / m["size"] if size and m.get("size") else 1.0 for m in nearest]
            pairs = list(zip(nearest, scales, strict=True))
            estimate["seconds"] = round(statistics.median(m["seconds"] * scale for m, scale in pairs), 3)
            estimate["bytes"] = round(statistics.median(_bytes(m["files"], scale) for m, scale in pairs))
            estimate["peak_gb"] = statistics.median([m.get("peak_resident_gb") or 0.0 for m in nearest]) or None
        return estimate

    def _read(self, stage: str) -> list[Mapping[str, Any]]:
        """Return the manifests of a stage's artifacts; damaged and incomplete manifests are left out."""
        manifests: list[Mapping[str, Any]] = []
        for file in sorted((self.store / stage).glob(f"*/{MANIFEST}")):
            with suppress(OSError, ValueError):
                manifest = parse_manifest(file)
                if {"config", "seconds", "files"} <= set(manifest):
                    manifests.append(manifest)
        return manifests


@functools.cache
def _temporary_folder() -> Path:
    """Return the folder that light stages write to in all plans of this process; it is deleted at exit."""
    folder = tempfile.TemporaryDirectory(prefix="gradsift-plan-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _method(config: Mapping[str, Any]) -> Any:
    """Return the name of the unit's scorer, selector or judge, or None; estimates use only units with the same name."""
    return config.get("name") or (config.get("selector") or {}).get("name")


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Return the number of settings that have the same value in both configs."""
    return sum(name in other and other[name] == value for name, value in one.items())


def _bytes(files: Mapping[str, Mapping[str, int]], scale: float) -> float:
    return sum(file["bytes"] * (scale if Path(name).suffix in _GROWS else 1.0) for name, file in files.items())


def _calls(stage: str, config: Mapping[str, Any], size: int) -> int:
    """Return how many calls go to a judge behind an endpoint if no reply is cached; a pair is judged in both orders."""
    if stage == "judge" and config.get("name") not in (None, "verifier", "local"):
        return 2 * size
    if stage == "score" and config.get("rater.name") not in (None, "verifier", "local"):
        return QUESTIONS[config["style"]] * size
    return 0
