"""Plan of a run, made by the pipeline with a store that looks artifacts up instead of making them.

A unit is the work that makes one artifact. An artifact is found by its fingerprint, so a plan finds out which artifacts
exist without computing them. The artifacts of light stages (reading the data, pinning a model) are made in a temporary
folder, because their content enters the fingerprints of all later stages. The selection is the only artifact of a heavy
stage whose content enters a fingerprint. Until the selection exists, the plan marks the finetune and the units after it
with `certain=False`: another run may have selected the same examples, so that the same finetune exists already.
"""

from __future__ import annotations

import functools
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
_GROWS = (".parquet", ".npy", ".jsonl", ".json")  # files whose size is proportional to the number of examples
_UNKNOWN = {"seconds": None, "bytes": None, "peak_gb": None, "calls": 0}  # the estimates of a unit


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Return the folder for the light stages' artifacts in all plans of this process; it is deleted at exit."""
    return tempfile.TemporaryDirectory(prefix="gradsift-plan-")


class Planner(Store):
    """A store for plans. It looks units up in the folder `store`, and writes only to a temporary folder."""

    def __init__(self, store: Path, say: Callable[[str], None]) -> None:
        super().__init__(Path(_temporary().name), say)
        self.store = store
        self.units: dict[str, dict[str, Any]] = {}  # entries of `plan` in `run.json`, by fingerprint
        self._earlier = functools.cache(self._manifests)  # several units to be made have the same stage
        downloads = self.root / "downloads"
        downloads.mkdir(exist_ok=True)
        for file in (store / "downloads").glob("*"):
            if not (downloads / file.name).exists():
                (downloads / file.name).symlink_to(file.absolute())  # a plan downloads nothing again

    def has(self, *unit: Any, **options: Any) -> bool:
        return Store(self.store).has(*unit, **options)

    def _provide(self, wanted: Artifact, make: Make, *, light: bool, exact: bool, divided: bool) -> Artifact:
        """Return the artifact if it exists.

        A light artifact that does not exist is made in a temporary folder. For any other artifact that does not exist,
        return a planned artifact without files.
        """
        unit = replace(wanted, path=self.store / wanted.stage / wanted.path.name)
        manifest, damage = read_manifest(unit.path, stage=unit.stage, fingerprint=unit.fingerprint)
        parents = [self.units[parent] for parent in unit.manifest["parents"] if parent in self.units]
        if unit.fingerprint not in self.units:
            self.units[unit.fingerprint] = {
                "name": unit.stage,
                "artifact": str(unit.path),
                "fingerprint": unit.fingerprint,
                "state": TO_DO if damage else DONE,
                "certain": not damage or (exact and all(parent["certain"] for parent in parents)),
                **(self.estimate(unit) if damage else _UNKNOWN),
            }
        if damage is None:
            return replace(unit, manifest=manifest, planned=False)
        if light:
            return super()._provide(wanted, make, light=light, exact=exact, divided=divided)
        return unit

    def estimate(self, unit: Artifact) -> dict[str, Any]:
        """Estimate the seconds, bytes, peak memory and judge calls of a unit that is to be made.

        Seconds, bytes and peak memory are taken from a finished unit of the same stage, method and models, and are None
        if there is no such unit. If there are several, the unit that shares the most settings with this unit is used.
        Seconds and the sizes of tables are scaled by the number of examples.
        """
        size, config = unit.size or 0, unit.manifest["config"]
        unknown = _UNKNOWN | {"calls": _calls(unit.stage, config, size)}
        alike = [
            manifest
            for manifest in self._earlier(unit.stage)
            if manifest.get("models") == unit.models and _method(manifest["config"]) == _method(config)
        ]
        if not alike:
            return unknown
        nearest = max(alike, key=lambda manifest: sum(config.get(k) == v for k, v in manifest["config"].items()))
        scale = size / nearest["size"] if size and nearest.get("size") else 1.0
        sizes = [file["bytes"] * (scale if name.endswith(_GROWS) else 1) for name, file in nearest["files"].items()]
        measured = {"seconds": round(nearest["seconds"] * scale, 3), "bytes": round(sum(sizes))}
        return unknown | measured | {"peak_gb": nearest.get("peak_resident_gb")}

    def _manifests(self, stage: str) -> list[dict[str, Any]]:
        """Return the manifests of a stage's finished units; damaged ones are left out."""
        manifests = []
        for file in sorted((self.store / stage).glob(f"*/{MANIFEST}")):
            with suppress(OSError, ValueError):
                manifests.append(parse_manifest(file))
        return manifests


def _method(config: Mapping[str, Any]) -> Any:
    """Return the name of the scorer, selector or judge in a unit's settings; None if the settings name none."""
    return config.get("name") or (config.get("selector") or {}).get("name")


def _calls(stage: str, config: Mapping[str, Any], size: int) -> int:
    """Return how many calls a unit sends to a judge behind an endpoint if no reply is cached.

    A pair of answers takes two calls, because it is judged in both orders.
    """
    if stage == "judge" and config.get("name") not in (None, "verifier", "local"):
        return 2 * size
    if stage == "score" and config.get("rater.name") not in (None, "verifier", "local"):
        return QUESTIONS[config["style"]] * size
    return 0
