"""Finished work, found by what it is.

An artifact is a folder `<store>/<stage>/<slug>-<fingerprint>/`. Its fingerprint hashes what changes
the result and nothing else: the stage's name and version, the config that the stage reads, and the
fingerprints of its parents. Work happens in a folder that ends in `.part`; `manifest.json`, with the
size and hash of every file, is written last and the folder is renamed when whole. So an artifact is
either complete or not there, a repeated command finds its work, and changed input never meets a
stale result.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gradsift.errors import GradsiftError

MANIFEST = "manifest.json"
_PATIENCE = 3.0  # seconds before a wait for another process is said
_HASH_LIMIT = 256 * 2**20  # bytes; beyond this reuse checks a file's size alone
_STORE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
    errno.EFBIG,
)
_PACKAGES = ("gradsift", "torch", "transformers", "peft", "lightning", "numpy")


@dataclass(frozen=True)
class Artifact:
    """One finished unit of work."""

    stage: str
    path: Path
    fingerprint: str
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def identity(self) -> str:
        """What children hash: the fingerprint, and for what came from outside also its content (`info["content"]`)."""
        return f"{self.fingerprint}:{self.info.get('content', '')}"

    @property
    def info(self) -> Mapping[str, Any]:
        """What the stage reported: rows, optimizer_steps and other counts."""
        info: Mapping[str, Any] = self.manifest["info"]
        return info


@dataclass(frozen=True)
class StageRecord:
    """What one run did about one unit of work (an entry of `run.json`)."""

    name: str
    artifact: str
    fingerprint: str
    reused: bool
    seconds: float  # spent by this run
    optimizer_steps: int  # taken by this run


@dataclass
class Store:
    """The folder of artifacts, and the record of what this run took from it or added to it."""

    root: Path
    say: Callable[[str], None] = print
    done: Callable[[StageRecord], None] = lambda record: None  # told of every unit, reused or made
    records: list[StageRecord] = field(default_factory=list)
    _other_commits: set[str | None] = field(default_factory=set)

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
    ) -> Artifact:
        """Return the artifact that `config` and `parents` describe; call `make` only if it is not there.

        Args:
            config: everything that changes the result besides the parents; JSON values.
            make: fills the folder it is given and returns its counts (`optimizer_steps` among them).
            version: raised in code whenever the stage's result changes.
            keep_part: leave what an interrupted `make` wrote for the next one to continue from;
                otherwise it starts from an empty folder.

        Raises:
            GradsiftError: the store cannot be written; names the unit, the folder and the remedy.
        """
        fingerprint = fingerprint_of(stage, version, config, parents)
        path = self.root / stage / f"{slug}-{fingerprint}"
        started = time.perf_counter()
        try:
            found = self._whole(stage, path, fingerprint)
            if found is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._locked(path):
                    found = self._whole(stage, path, fingerprint)  # another process may have finished it
                    if found is None:
                        return self._make(stage, path, fingerprint, config, parents, make, version, keep_part)
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and not self._is_ours(error):
                raise
            reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
            raise GradsiftError(
                f"stage {stage} could not keep its work in {path.parent}: {reason}; "
                "give another folder with artifacts=DIR or GRADSIFT_ARTIFACTS, or free this one"
            ) from error
        self._record(found, reused=True, seconds=time.perf_counter() - started, steps=0)
        return found

    def has(
        self, stage: str, slug: str, config: Mapping[str, Any], parents: Sequence[Artifact], *, version: int
    ) -> bool:
        """Whether `obtain` would find the artifact; its files are not looked into."""
        return (self.root / stage / f"{slug}-{fingerprint_of(stage, version, config, parents)}" / MANIFEST).is_file()

    def _is_ours(self, error: OSError) -> bool:
        """Whether an error is about writing to the store, and not about something that a stage reads elsewhere."""
        if error.errno not in _STORE_ERRORS:
            return False
        return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(self.root)

    def _make(
        self,
        stage: str,
        path: Path,
        fingerprint: str,
        config: Mapping[str, Any],
        parents: Sequence[Artifact],
        make: Callable[[Path], Mapping[str, Any]],
        version: int,
        keep_part: bool,
    ) -> Artifact:
        part = path.with_name(path.name + ".part")
        if part.exists() and not keep_part:
            shutil.rmtree(part)
        part.mkdir(exist_ok=True)
        (part / MANIFEST).unlink(missing_ok=True)  # of a process that died just before the rename
        started = time.perf_counter()
        info = dict(make(part))
        seconds = time.perf_counter() - started
        manifest = {
            "stage": stage,
            "version": version,
            "fingerprint": fingerprint,
            "config": config,
            "parents": [parent.fingerprint for parent in parents],
            "info": info,
            "seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "git_sha": git_sha(),
            "packages": package_versions(),
            "files": {name: _describe(part / name) for name in _files(part)},
        }
        _write_synced(part / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        part.rename(path)
        artifact = Artifact(stage, path, fingerprint, manifest)
        self._record(artifact, reused=False, seconds=seconds, steps=int(info.get("optimizer_steps", 0)))
        return artifact

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """One process at a time makes an artifact; the kernel frees the lock of a process that died."""
        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            self.say(f"  waiting for another process that makes {path.name}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _whole(self, stage: str, path: Path, fingerprint: str) -> Artifact | None:
        """The artifact at `path` if every file is as the manifest says; a damaged one is set aside."""
        if not path.is_dir():
            return None
        damage = None
        manifest: dict[str, Any] = {}
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if not {"files", "info", "git_sha"} <= set(manifest):
                raise KeyError
            for name, described in manifest["files"].items():
                if not (path / name).is_file() or _describe(path / name) != described:
                    damage = f"{name} is missing or is not what was written"
                    break
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            damage = f"{MANIFEST} cannot be read"
        if damage is None:
            return Artifact(stage, path, fingerprint, manifest)
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return None  # another process has just set it aside
        self.say(f"{stage}: {path.name} is damaged ({damage}); it was set aside as {aside.name} and is made again")
        return None

    def _record(self, artifact: Artifact, *, reused: bool, seconds: float, steps: int) -> None:
        if any(record.fingerprint == artifact.fingerprint for record in self.records):
            return  # the run already counted this unit
        made_at = artifact.manifest["git_sha"]
        if reused and made_at != git_sha() and made_at not in self._other_commits:
            self._other_commits.add(made_at)
            self.say(f"  reusing work of another commit ({made_at}), {artifact.stage}/{artifact.path.name} first")
        record = StageRecord(artifact.stage, str(artifact.path), artifact.fingerprint, reused, round(seconds, 3), steps)
        self.records.append(record)
        self.done(record)

    def records_as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 over JSON values, whatever the order of the keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint_of(stage: str, version: int, config: Mapping[str, Any], parents: Sequence[Artifact]) -> str:
    """12 hex digits over everything that changes the result."""
    identity = {"stage": stage, "version": version, "config": config, "parents": [p.identity for p in parents]}
    return content_hash(identity)[:12]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": file_hash(path) if size <= _HASH_LIMIT else None}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@functools.cache
def git_sha() -> str | None:
    """Short commit of the checkout that the package is run from; None for an installed wheel."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None  # git is not installed, or the checkout has no commit


@functools.cache
def package_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}
