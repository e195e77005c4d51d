"""Manifests: what an artifact is and which files it consists of, with checksums of the files and of itself."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsift import outside_json

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # folder of what an interrupted `make` goes on from; no artifact holds it
_CHECKSUM = "checksum"  # key of a manifest: hash of everything else in it; earlier versions wrote none
_HASH_LIMIT = 256 * 2**20  # bytes; beyond this reuse checks a file's size alone
_KINDS: dict[str, Any] = {  # of a manifest's entries
    "files": dict,
    "info": dict,
    "parents": list,
    "git_sha": str | None,
    "size": int | None,
    "models": list,
    "numerics": dict,
}
_LATER = ("size", "models", "numerics")  # earlier versions wrote none
_COUNTS = ("rows", "optimizer_steps", "resumed_steps", "forward_tokens")  # of `info`, where they are there


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` (JSON values) and its checksum, down to the disk."""
    plain = json.loads(json.dumps({key: value for key, value in manifest.items() if key != _CHECKSUM}))
    text = json.dumps(plain | {_CHECKSUM: _checksum(plain)}, indent=1, sort_keys=True)
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def parse_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest's file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or not what was written.
    """
    manifest = outside_json.loads(path.read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is no object")
    rest = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    if _CHECKSUM in manifest and manifest[_CHECKSUM] != _checksum(rest):
        raise ValueError(f"{MANIFEST} does not fit its checksum")
    return manifest


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode("ascii")).hexdigest()[:16]


def read_manifest(path: Path, **request: str) -> tuple[dict[str, Any], str | None]:
    """The manifest of the artifact at `path`, and what is damaged there: None where all is as it says.

    Args:
        request: what the manifest must say of `stage` and `fingerprint`.
    """
    try:
        manifest = parse_manifest(path / MANIFEST)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        if any(folder.is_file() for folder in path.parents):  # the store is a file, or a stage in it is
            raise
        return {}, f"{MANIFEST} is not there"
    except ValueError as error:
        return {}, f"{MANIFEST} cannot be read ({error})"
    damage = _misfit(manifest, request) or _changed(path, manifest["files"])
    return manifest, damage


def _misfit(manifest: Mapping[str, Any], request: Mapping[str, str]) -> str | None:
    """What a manifest lacks or says that cannot be."""
    for key, kind in _KINDS.items():
        if (key in manifest or key not in _LATER) and not isinstance(manifest.get(key, ...), kind):
            return f"{MANIFEST} has no readable {key}"
    for key, value in request.items():
        if manifest.get(key) != value:
            return f"{MANIFEST} has the {key} {manifest.get(key)!r}, not {value!r}"
    for key in _COUNTS:
        count = manifest["info"].get(key, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            return f"{MANIFEST} has {key}={count!r} in its info, which is no count"
    return None


def _changed(path: Path, files: Mapping[str, Any]) -> str | None:
    """Which of the files is not as it was described."""
    if not files and (found := files_of(path)):
        return f"{MANIFEST} names no file, and there is {found[0]}"
    for name, described in files.items():
        if not (path / name).is_file() or describe(path / name) != described:
            return f"{name} is missing or is not what was written"
    return None


def files_of(folder: Path) -> list[str]:
    """What belongs to an artifact besides its manifest, relative to its folder."""
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(str(file) for file in files if file.parts[0] not in (UNFINISHED, MANIFEST))


def describe(path: Path) -> dict[str, Any]:
    """A file's size, and its hash unless it is very large."""
    size = path.stat().st_size
    return {"bytes": size, "sha256": file_hash(path) if size <= _HASH_LIMIT else None}


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 over JSON values, whatever the order of the keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; they are read once a process while the file stays the same."""
    found = path.stat()
    return _hash_of(path.absolute(), found.st_ino, found.st_mtime_ns, found.st_size)


@functools.cache
def _hash_of(path: Path, inode: int, modified: int, size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
