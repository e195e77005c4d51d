"""The store of finished work: an artifact is found by a fingerprint of everything that determines its content.

An artifact is a folder `<store>/<stage>/<slug>-<fingerprint>/`. The fingerprint is a hash of the stage's name and
version, the config that the stage reads, and the identities of the parents (the artifacts that the stage reads);
nothing else changes the fingerprint. A stage writes its files to a folder with the artifact's name plus `.part`. The
last file is `manifest.json`, with the size and hash of every other file. Then the folder is renamed to the artifact's
name, so an artifact is either complete or absent.

While a stage works, `unfinished/` in its `.part` folder holds the state from which an interrupted run continues: the
save point of a training (`gradsift.training.finetuning`), or the results that a pass over the examples has computed so
far (`gradsift.journal`).

Several processes, on one machine or several, may use one store. A process locks an artifact while it makes the artifact
(`gradsift.disk`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gradsift.cost import counting, peak_resident_gb
from gradsift.disk import guarded, locked
from gradsift.errors import GradsiftError
from gradsift.manifests import MANIFEST, UNFINISHED, content_hash, describe, files_of, read_manifest, write_manifest
from gradsift.names import require_no_link
from gradsift.names import slug as safe_slug
from gradsift.versions import code_hash, differences, git_sha, package_versions

Make = Callable[[Path], Mapping[str, Any]]
MADE_BY = "made_by.json"  # in `unfinished/`: the versions of the code and the packages that started the work
_MODEL_STAGES = ("backbone", "sentence_encoder")


class NotMade(GradsiftError):
    """Raised if a plan reads the content of an artifact that does not exist yet."""


@dataclass(frozen=True)
class Artifact:
    """The result of one unit of work: finished or, in a plan (`plan=true`), still to be made."""

    stage: str
    path: Path
    fingerprint: str
    manifest: Mapping[str, Any]
    # for a model's artifact: how this process computes with it (see gradsift.training.numerics)
    numerics: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    planned: bool = field(default=False, kw_only=True)  # True: not made yet; only a plan returns such artifacts

    def file(self, name: str) -> Path:
        """Return the path of one of the artifact's files; raise NotMade if the artifact is only planned."""
        if self.planned:
            raise NotMade(f"{self.stage}/{self.path.name} is not made yet, so there is no {name} to read")
        return self.path / name

    @property
    def info(self) -> Mapping[str, Any]:
        """The counts and other values that the stage returned, such as `rows`.

        Raises NotMade if the artifact is only planned.
        """
        if self.planned:
            raise NotMade(f"{self.stage}/{self.path.name} is not made yet")
        return dict(self.manifest["info"])

    @property
    def identity(self) -> str:
        """The text that stands for this artifact in the fingerprints of later stages.

        It joins the artifact's own fingerprint, the hash of its content if that comes from outside (a dataset, say),
        and, for a model, how this process computes with the model (its numerics).
        """
        content = "" if self.planned else self.info.get("content", "")
        numerics = "".join(f":{name}={value}" for name, value in sorted(self.numerics.items()))
        return f"{self.fingerprint}:{content}{numerics}"

    @property
    def size(self) -> int | None:
        """Number of examples that the stage processed, or None if it is not known."""
        size: int | None = self.manifest.get("size") or (None if self.planned else self.info.get("rows"))
        return size

    @property
    def models(self) -> Sequence[str]:
        """Names of the models that processed examples in this stage or in the stages before it."""
        return list(self.manifest.get("models", ()))

    @property
    def computed_by(self) -> Mapping[str, Mapping[str, str]]:
        """The numerics of the models that computed this artifact's values, by the name of the model's folder.

        Numerics describe how a model computes, such as its precision (see gradsift.training.numerics).
        """
        return {self.path.name: self.numerics} if self.numerics else dict(self.manifest.get("numerics", {}))


@dataclass(frozen=True)
class StageRecord:
    """What one run did for one unit of work, which it made or reused; an entry of `stages` in `run.json`."""

    name: str
    artifact: str
    fingerprint: str
    reused: bool
    seconds: float  # spent by this run
    optimizer_steps: int  # taken by this run
    forward_tokens: int  # that this run passed through models (see gradsift.cost)
    saved_steps: int = 0  # of a reused unit: optimiser steps that were taken when it was made
    saved_tokens: int = 0  # of a reused unit: forward tokens that were passed when it was made


@dataclass
class Store:
    """The folder of artifacts, and the record of what this run reused and made."""

    root: Path
    say: Callable[[str], None] = print
    done: Callable[[StageRecord], None] = lambda record: None  # called for every unit, reused or made
    at_work: Callable[[str], AbstractContextManager[Any]] = nullcontext  # entered while a unit is made or waited for
    records: list[StageRecord] = field(default_factory=list)
    other_code: set[str] = field(default_factory=set)  # other versions of the code that made units reused by this run
    other_numerics: set[str] = field(default_factory=set)  # differences in numerics that were already printed
    _inode: int | None = None  # of the root, once it exists

    def obtain(
        self,
        stage: str,
        slug: str,
        config: Mapping[str, Any],
        parents: Sequence[Artifact],
        make: Make,
        *,
        version: int,
        size: int | None = None,
        light: bool = False,
        exact: bool = True,
        divided: bool = False,
    ) -> Artifact:
        """Return the artifact that `config` and `parents` determine; call `make` only if it does not exist.

        Args:
            config: everything besides the parents that changes the result, as JSON values.
            make: writes the files into the folder that it is called with, and returns the artifact's `info`. The info
                of a training has `optimizer_steps`, and `resumed_steps`, the number of these steps that interrupted
                runs had already taken. `make` may continue from the folder's `unfinished/`, which is deleted
                afterwards. If `make` makes several units at once, its info also has `seconds` and `forward_tokens`, the
                time and the tokens of this unit alone.
            version: version of the stage's code, increased whenever the stage's result changes.
            size: number of examples that the stage processes; None: as many as the largest parent has.
            light: True if the work takes seconds and needs no model. If such an artifact is missing, a plan makes it in
                a temporary folder. A plan makes no other artifacts; it only looks them up in the store.
            exact: False if `config` holds a placeholder for content that does not exist yet, as in a plan.
            divided: True if `make` divides its work over the ranks (processes) of a run (see
                gradsift.training.parallel).

        Raises:
            GradsiftError: the store cannot be read or written; the message names the unit, the folder and the remedy.
        """
        fingerprint, path = self.place(stage, slug, config, parents, version)
        numerics = {name: dict(values) for parent in parents for name, values in parent.computed_by.items()}
        passed_over = [parent.size or 0 for parent in parents if parent.stage not in _MODEL_STAGES]
        models = {slug} if stage in _MODEL_STAGES else set()
        described = {
            "stage": stage,
            "fingerprint": fingerprint,
            "version": version,
            "config": config,
            "size": size or max(passed_over, default=0) or None,
            "models": sorted(models.union(*(parent.models for parent in parents))),
            "numerics": numerics,
            "parents": [parent.fingerprint for parent in parents],
        }
        wanted = Artifact(stage, path, fingerprint, described, planned=True)
        return self._provide(wanted, make, light=light, exact=exact, divided=divided)

    def has(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], *, version: int
    ) -> bool:
        """Return whether `obtain` would find the artifact, without checking its files."""
        return (self.place(stage, slug, config, parents, version)[1] / MANIFEST).is_file()

    def place(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], version: int
    ) -> tuple[str, Path]:
        """Return the fingerprint of a unit and the folder of its artifact."""
        fingerprint = fingerprint_of(stage, version, config, parents)
        return fingerprint, self.root / stage / f"{safe_slug(slug)}-{fingerprint}"

    def _require_same_folder(self) -> None:
        """Raise GradsiftError if `root` is not the folder that it was when the run began, as after an unmount."""
        if self._inode is None:
            self.root.mkdir(parents=True, exist_ok=True)
        inode = self.root.stat().st_ino  # not the device's number: automounters change it
        if self._inode not in (None, inode):
            raise GradsiftError(
                f"{self.root} is not the folder that it was when this run began (was its disk unmounted?); "
                "mount it again, and the same command continues from there"
            )
        self._inode = inode

    def _provide(self, wanted: Artifact, make: Make, *, light: bool, exact: bool, divided: bool) -> Artifact:
        """Return the artifact `wanted`, and make it if it is missing or damaged.

        Only subclasses use `light`, `exact` and `divided` (see `obtain`).
        """
        started = time.perf_counter()
        with guarded(self.root, f"stage {wanted.stage} ({wanted.path.name})"):
            self._require_same_folder()
            artifact = self._whole(wanted, is_locked=False)
            if artifact is None:
                wanted.path.parent.mkdir(parents=True, exist_ok=True)
                with locked(wanted.path, self.say, self.at_work) as require_held:
                    artifact = self._whole(wanted, is_locked=True)  # another process may have made it
                    if artifact is None:
                        self._name_other_numerics(wanted)
                        with self.at_work(f"{wanted.stage} {wanted.path.name.rsplit('-', 1)[0]}"):
                            return self._make(wanted, make, require_held)
        self._record(artifact, reused=True, seconds=time.perf_counter() - started)
        return artifact

    def _name_other_numerics(self, wanted: Artifact) -> None:
        """Print why artifacts that differ from `wanted` only in how a model computes (its numerics) are not used.

        Artifacts of later stages differ in their parents as well, so only artifacts of the first stage that computes
        with a model are named.
        """
        own = wanted.manifest["numerics"]
        if not own:
            return
        request = {name: value for name, value in wanted.manifest.items() if name not in ("fingerprint", "numerics")}
        for path in sorted(wanted.path.parent.glob(f"{wanted.path.name.rsplit('-', 1)[0]}-*/{MANIFEST}")):
            manifest, damage = read_manifest(path.parent, **request)
            if damage or manifest["numerics"] == own:
                continue
            difference = _difference(manifest["numerics"], own)
            if difference not in self.other_numerics:
                self.other_numerics.add(difference)
                name = f"{wanted.stage}/{path.parent.name}"
                self.say(f"  {name} is not used, because it was computed with {difference}")

    def _make(self, wanted: Artifact, make: Make, require_held: Callable[[], None]) -> Artifact:
        part = self._part(wanted.path)
        started = time.perf_counter()
        with counting() as tokens:
            info = dict(make(part))
        if tokens():
            info.setdefault("forward_tokens", tokens())
        seconds = info.pop("seconds", time.perf_counter() - started)
        manifest = {
            **wanted.manifest,
            "info": info,
            "seconds": round(seconds, 3),
            "peak_resident_gb": peak_resident_gb(),  # of the process up to now
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "git_sha": git_sha(),
            "code": code_hash(),
            "packages": package_versions(),
            "files": {name: describe(part / name) for name in files_of(part)},
        }
        require_held()
        write_manifest(part, manifest)
        _clear(part / UNFINISHED)
        part.rename(wanted.path)
        artifact = replace(wanted, manifest=manifest, planned=False)
        self._record(artifact, reused=False, seconds=seconds)
        return artifact

    def _part(self, path: Path) -> Path:
        """Return the folder in which the stage works, empty except for an interrupted run's `unfinished/`."""
        part = require_no_link(path.with_name(path.name + ".part"))
        unfinished = part / UNFINISHED
        for entry in part.rglob("*"):
            require_no_link(entry)
        unfinished.mkdir(parents=True, exist_ok=True)
        for entry in part.iterdir():
            if entry.is_dir() and entry != unfinished:
                _clear(entry)
            elif entry != unfinished:
                entry.unlink()
        made_by = json.dumps({"code": code_hash(), "packages": package_versions()}, sort_keys=True)
        note = unfinished / MADE_BY
        if note.exists() and len(list(part.rglob("*"))) > 2:
            self.say(f"  {path.name}: continuing the work of an interrupted run")
            if note.read_bytes() != made_by.encode("utf-8"):  # bytes: the file may be damaged
                self.say("    which had other code or packages, so the files may differ from an uninterrupted run's")
        note.write_text(made_by, encoding="utf-8")
        return part

    def _whole(self, wanted: Artifact, *, is_locked: bool) -> Artifact | None:
        """Return the artifact if every file is as the manifest says; None if the artifact is missing or damaged.

        If `is_locked`, a damaged artifact is renamed, so that it can be made again.
        """
        stage, path = wanted.stage, wanted.path
        if not os.path.lexists(path):
            return None
        manifest, damage = read_manifest(path, stage=stage, fingerprint=wanted.fingerprint)
        if damage is None:
            return replace(wanted, manifest=manifest, planned=False)
        if is_locked:  # without the lock, another process may have repaired the artifact since the damage was seen
            aside = path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
            self.say(f"{stage}: {path.name} is damaged ({damage}); it was set aside as {aside.name} and is made again")
        return None

    def _record(self, artifact: Artifact, *, reused: bool, seconds: float) -> None:
        if any(record.fingerprint == artifact.fingerprint for record in self.records):
            return  # the unit is already counted
        if reused and (other := differences(artifact.manifest)) and other not in self.other_code:
            self.other_code.add(other)
            self.say(f"  reusing work of other code ({other}), for example {artifact.stage}/{artifact.path.name}")
        counts = [int(artifact.info.get(name, 0)) for name in ("optimizer_steps", "forward_tokens")]
        resumed = int(artifact.info.get("resumed_steps", 0))
        spent, saved = ([0, 0], counts) if reused else ([counts[0] - resumed, counts[1]], [0, 0])
        path, seconds = str(artifact.path), round(seconds, 3)
        record = StageRecord(artifact.stage, path, artifact.fingerprint, reused, seconds, *spent, *saved)
        self.records.append(record)
        self.done(record)

    def records_as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


def _difference(others: Mapping[str, Mapping[str, str]], own: Mapping[str, Mapping[str, str]]) -> str:
    """Return how the numerics of an artifact (`others`) differ from this run's (`own`), as in 'kernels=off (here
    kernels=3fa9)'.
    """
    parts = []
    for model, values in own.items():
        for name, value in values.items():
            if (other := others.get(model, {}).get(name, "unknown")) != value:
                parts.append(f"{name}={other} (here {name}={value})")
    return ", ".join(parts) or "models that are not known"


def fingerprint_of(stage: str, version: int, config: Mapping[str, Any], parents: Sequence[Artifact]) -> str:
    """Return the fingerprint: the first 12 hex digits of a hash of the arguments, which determine a stage's result."""
    identity = {"stage": stage, "version": version, "config": config, "parents": [p.identity for p in parents]}
    return content_hash(identity)[:12]


def _clear(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # the error names the file without its folder
        raise OSError(error.errno, error.strerror, str(folder)) from error
