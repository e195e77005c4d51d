"""Finished work, found by what it is.

An artifact is a folder `<store>/<stage>/<slug>-<fingerprint>/`. Its fingerprint hashes what changes
the result and nothing else: the stage's name and version, the config that the stage reads, and the
fingerprints of its parents. Work happens in a folder that ends in `.part`; `manifest.json`, with the
size and hash of every file, is written last and the folder is renamed when whole. So an artifact is
either complete or not there, a repeated command finds its work, and changed input never meets a
stale result.

What long work needs to go on from after a kill lies in the folder's `unfinished/` until it is whole: the
state of a training (`gradsift.training.save_point`), the results of the batches so far (`gradsift.journal`).
As the folder's name holds the fingerprint, nobody goes on from the point of another config.

Processes, on this machine or on others that share the store, keep off each other's units by locks of
the file system, which it frees when their holder dies; no clock is ever compared.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gradsift.cost import counting, peak_resident_gb
from gradsift.errors import GradsiftError
from gradsift.locks import Holder, locked
from gradsift.manifests import MANIFEST, UNFINISHED, content_hash, describe, files_of, read_manifest, write_manifest
from gradsift.names import require_no_link
from gradsift.names import slug as safe_slug
from gradsift.versions import code_hash, differences, git_sha, package_versions

MADE_BY = "made_by.json"  # in `unfinished/`: the code and the packages that began
_STORE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTEMPTY,
)
_MODEL_STAGES = ("backbone", "sentence_encoder")
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ETIMEDOUT)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Artifact:
    """One finished unit of work."""

    stage: str
    path: Path
    fingerprint: str
    manifest: Mapping[str, Any]
    # of a model: how this process computes with it (see gradsift.training.numerics)
    numerics: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def identity(self) -> str:
        """What children hash: the fingerprint, the content of what came from outside, and a model's numerics."""
        return f"{self.fingerprint}:{self.info.get('content', '')}{text_of(self.numerics)}"

    @property
    def info(self) -> Mapping[str, Any]:
        """What the stage reported: rows, optimizer_steps and other counts."""
        info: Mapping[str, Any] = self.manifest["info"]
        return info

    @property
    def size(self) -> int | None:
        """Examples that the work on it passed over; None where that is not known."""
        size: int | None = self.manifest.get("size") or self.info.get("rows")
        return size

    @property
    def models(self) -> Sequence[str]:
        """Names of the models that it, or what it was made from, passed examples through."""
        models: Sequence[str] = self.manifest.get("models", ())
        return models

    @property
    def computed_by(self) -> Mapping[str, Mapping[str, str]]:
        """Numerics of the models that its values were computed with, by the model's folder in the store."""
        if self.numerics:
            return {self.path.name: self.numerics}
        computed_by: Mapping[str, Mapping[str, str]] = self.manifest.get("numerics", {})
        return computed_by


@dataclass(frozen=True)
class StageRecord:
    """What one run did about one unit of work (an entry of `run.json`)."""

    name: str
    artifact: str
    fingerprint: str
    reused: bool
    seconds: float  # spent by this run
    optimizer_steps: int  # taken by this run
    forward_tokens: int  # passed by this run (see gradsift.cost)
    saved_steps: int = 0  # of a unit that was reused, the optimiser steps that making it had taken
    saved_tokens: int = 0  # likewise


@dataclass
class Store:
    """The folder of artifacts, and the record of what this run took from it or added to it."""

    root: Path
    say: Callable[[str], None] = print
    done: Callable[[StageRecord], None] = lambda record: None  # told of every unit, reused or made
    at_work: Callable[[str], AbstractContextManager[Any]] = nullcontext  # entered while a unit is waited for or made
    records: list[StageRecord] = field(default_factory=list)
    other_code: set[str] = field(default_factory=set)  # that made what this run reused
    other_numerics: set[str] = field(default_factory=set)  # that were said to be in the store and not used
    _inode: int | None = None  # of the root, once it is there

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
        """Return the artifact that `config` and `parents` describe; call `make` only if it is not there.

        Args:
            config: everything that changes the result besides the parents; JSON values.
            make: fills the folder it is given and returns its counts: `optimizer_steps` among them, and
                `resumed_steps`, those of them that an interrupted process had taken. It may go on from what it
                finds in the folder's `unfinished/`, which it need not tidy up.
            version: raised in code whenever the stage's result changes.
            keep_part: leave all that an interrupted `make` wrote for the next one to continue from;
                otherwise it starts from a folder with nothing but `unfinished/`.
            size: examples that the work passes over, where that is another number than the parents'; a plan
                scales its estimates by it.
            light: takes seconds and no model, and what follows cannot be planned without its content: a plan
                makes it, in a folder that is thrown away.

        Raises:
            GradsiftError: the store cannot be written; names the unit, the folder and the remedy.
        """
        fingerprint, path = self.place(stage, slug, config, parents, version)
        started = time.perf_counter()
        with self.guarded(f"stage {stage} ({path.name})"):
            self._require_same_folder()
            found = self._whole(stage, path, fingerprint)
            if found is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path, self.say, self.at_work) as holder:
                    found = self._whole(stage, path, fingerprint)  # another process may have finished it
                    if found is None:
                        described = {"version": version, "config": config, **lineage_of(stage, slug, parents, size)}
                        self._say_other_numerics(stage, slug, described, parents)
                        with self.at_work(f"{stage} {slug}"):
                            return self._make(stage, path, fingerprint, described, parents, make, keep_part, holder)
        self._record(found, reused=True, seconds=time.perf_counter() - started)
        return found

    @contextmanager
    def guarded(self, unit: str, *, nameless: bool = True) -> Iterator[None]:
        """Turn errors of the store's disk into one that names `unit`, the folder and the remedy; others pass.

        Args:
            nameless: whether errors that name no file are the store's; in the midst of a stage they are.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if not self._is_ours(error, nameless):
                raise
            reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
            raise GradsiftError(
                f"{unit} could not keep its work in {self.root}: {reason}; {_remedy(error)}; "
                "what is finished is kept, and the same command goes on from there"
            ) from error

    def has(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], *, version: int
    ) -> bool:
        """Whether `obtain` would find the artifact; its files are not looked into."""
        return (self.place(stage, slug, config, parents, version)[1] / MANIFEST).is_file()

    def place(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], version: int
    ) -> tuple[str, Path]:
        """Fingerprint and folder of a unit."""
        fingerprint = fingerprint_of(stage, version, config, parents)
        return fingerprint, self.root / stage / f"{safe_slug(slug)}-{fingerprint}"

    def _is_ours(self, error: OSError | SafetensorError, nameless: bool) -> bool:
        """Whether an error is about the store, and not about something that a stage reads elsewhere."""
        if isinstance(error, SafetensorError):
            return nameless
        if error.errno in _GONE:  # of a file that is not there only what lies in the store is ours
            return str(self.root) in str(error)
        if error.errno not in (*_STORE_ERRORS, *_NO_LOCKS):
            return False
        if error.filename is None:
            return nameless
        return Path(os.fsdecode(error.filename)).is_relative_to(self.root)

    def _require_same_folder(self) -> None:
        """Under a mount that vanished lies another folder, mostly empty: no work may begin anew in there."""
        if self._inode is None:
            self.root.mkdir(parents=True, exist_ok=True)
        inode = self.root.stat().st_ino  # without the device's number: automounters change it
        if self._inode not in (None, inode):
            raise GradsiftError(
                f"{self.root} is not the folder that it was when this run began: was its disk unmounted? "
                "Bring it back; the same command goes on from there"
            )
        self._inode = inode

    def _make(
        self,
        stage: str,
        path: Path,
        fingerprint: str,
        described: Mapping[str, Any],
        parents: Sequence[Artifact],
        make: Callable[[Path], Mapping[str, Any]],
        keep_part: bool,
        holder: Holder,
    ) -> Artifact:
        part = self._part(path, keep_part)
        started = time.perf_counter()
        with counting() as tokens:
            info = dict(make(part))
        if tokens():
            info["forward_tokens"] = tokens()
        seconds = time.perf_counter() - started
        manifest = {
            "stage": stage,
            "fingerprint": fingerprint,
            **described,
            "parents": [parent.fingerprint for parent in parents],
            "info": info,
            "seconds": round(seconds, 3),
            "peak_resident_gb": peak_resident_gb(),  # of the process up to then
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "git_sha": git_sha(),
            "code": code_hash(),
            "packages": package_versions(),
            "files": {name: describe(part / name) for name in files_of(part)},
        }
        holder.require()
        write_manifest(part, manifest)
        _clear(part / UNFINISHED)
        part.rename(path)
        artifact = Artifact(stage, path, fingerprint, manifest)
        self._record(artifact, reused=False, seconds=seconds)
        return artifact

    def _part(self, path: Path, keep_part: bool) -> Path:
        """The folder to work in, with what an interrupted process left there to go on from."""
        part = require_no_link(path.with_name(path.name + ".part"))
        unfinished = part / UNFINISHED
        for left in part.rglob("*"):
            require_no_link(left)
        unfinished.mkdir(parents=True, exist_ok=True)
        (part / MANIFEST).unlink(missing_ok=True)  # of a process that died just before the rename
        if not keep_part:
            for left in part.iterdir():
                if left.is_dir() and left != unfinished:
                    _clear(left)
                elif left != unfinished:
                    left.unlink()
        ours = json.dumps({"code": code_hash(), "packages": package_versions()}, sort_keys=True)
        note = unfinished / MADE_BY
        if note.exists() and len(list(part.rglob("*"))) > 2:
            self.say(f"  {path.name}: going on from where an interrupted run was")
            if note.read_bytes() != ours.encode("utf-8"):  # bytes: it may be damaged
                self.say("    which had other code or packages: equal bytes are not promised then")
        note.write_text(ours, encoding="utf-8")
        return part

    def _whole(self, stage: str, path: Path, fingerprint: str) -> Artifact | None:
        """The artifact at `path` if every file is as the manifest says; a damaged one is set aside."""
        if not os.path.lexists(path):
            return None
        manifest, damage = read_manifest(path, stage=stage, fingerprint=fingerprint)
        if damage is None:
            return Artifact(stage, path, fingerprint, manifest)
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return None  # another process has just set it aside
        self.say(f"{stage}: {path.name} is damaged ({damage}); it was set aside as {aside.name} and is made again")
        return None

    def _say_other_numerics(
        self, stage: str, slug: str, described: Mapping[str, Any], parents: Sequence[Artifact]
    ) -> None:
        """Name the artifacts that differ from the one to be made in the numerics of a model alone."""
        if not any(parent.numerics for parent in parents):  # later stages differ by their parents
            return
        wanted = {**described, "parents": [parent.fingerprint for parent in parents]}
        ours = wanted.pop("numerics")
        for path in sorted((self.root / stage).glob(f"{safe_slug(slug)}-*/{MANIFEST}")):
            manifest, damage = read_manifest(path.parent)
            theirs = manifest.get("numerics")
            if damage or theirs == ours or any(manifest.get(name) != value for name, value in wanted.items()):
                continue
            difference = _difference(theirs, ours)
            if difference not in self.other_numerics:
                self.other_numerics.add(difference)
                self.say(f"  {stage}/{path.parent.name} is not used, because it was computed with {difference}")

    def _record(self, artifact: Artifact, *, reused: bool, seconds: float) -> None:
        if any(record.fingerprint == artifact.fingerprint for record in self.records):
            return  # the run already counted this unit
        if reused and (other := differences(artifact.manifest)) and other not in self.other_code:
            self.other_code.add(other)
            self.say(f"  reusing work of other code ({other}), {artifact.stage}/{artifact.path.name} first")
        counts = [int(artifact.info.get(name, 0)) for name in ("optimizer_steps", "forward_tokens")]
        resumed = int(artifact.info.get("resumed_steps", 0))
        spent, saved = ([0, 0], counts) if reused else ([counts[0] - resumed, counts[1]], [0, 0])
        path, seconds = str(artifact.path), round(seconds, 3)
        record = StageRecord(artifact.stage, path, artifact.fingerprint, reused, seconds, *spent, *saved)
        self.records.append(record)
        self.done(record)

    def records_as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


def lineage_of(stage: str, slug: str, parents: Sequence[Artifact], size: int | None) -> dict[str, Any]:
    """What a manifest says of where an artifact comes from: `size`, `models` and their `numerics`."""
    numerics = {name: dict(values) for parent in parents for name, values in parent.computed_by.items()}
    return {"size": size or size_of(parents), "models": models_of(stage, slug, parents), "numerics": numerics}


def size_of(parents: Sequence[Artifact]) -> int | None:
    """Examples that work on these parents passes over, where the stage does not say otherwise: the most of any."""
    return max((parent.size or 0 for parent in parents if parent.stage not in _MODEL_STAGES), default=0) or None


def models_of(stage: str, slug: str, parents: Sequence[Artifact]) -> list[str]:
    """See `Artifact.models`."""
    own = {slug} if stage in _MODEL_STAGES else set()
    return sorted(own.union(*(parent.models for parent in parents)))


def text_of(numerics: Mapping[str, str]) -> str:
    return "".join(f":{name}={value}" for name, value in sorted(numerics.items()))


def _difference(theirs: Any, ours: Mapping[str, Mapping[str, str]]) -> str:
    """How the numerics of an artifact in the store differ from ours, as in 'kernels=off (here kernels=3fa9...)'."""
    theirs = theirs if isinstance(theirs, Mapping) else {}
    parts = []
    for model, values in ours.items():
        others = theirs.get(model) or {}
        for name, value in values.items():
            if (other := others.get(name, "unknown")) != value:
                parts.append(f"{name}={other} (here {name}={value})")
    return ", ".join(parts) or "models that are not known"


def fingerprint_of(stage: str, version: int, config: Mapping[str, Any], parents: Sequence[Artifact]) -> str:
    """12 hex digits over everything that changes the result."""
    identity = {"stage": stage, "version": version, "config": config, "parents": [p.identity for p in parents]}
    return content_hash(identity)[:12]


def _clear(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # it names the file without its folder
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _remedy(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in _NO_LOCKS:
        return "its file system has no locks between processes; give one that has with artifacts=DIR (docs/sweeps.md)"
    if number in _GONE:
        return "a file or a folder of it is gone; was its disk unmounted, or did somebody clear it away?"
    return "give another folder with artifacts=DIR or GRADSIFT_ARTIFACTS, or free this one"
