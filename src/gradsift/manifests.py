"""A manifest records how an artifact was made and which files it has, with checksums of the files and of itself."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradsift import outside_json

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # folder with the state of an interrupted run; absent in a finished artifact
_CHECKSUM = "checksum"  # key of the hash of everything else in the manifest
_HASH_LIMIT = 256 * 2**20  # bytes; of larger files only the size is checked


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest (JSON values) and its checksum, and flush them to the disk."""
    plain = json.loads(json.dumps({key: value for key, value in manifest.items() if key != _CHECKSUM}))
    text = json.dumps(plain | {_CHECKSUM: _checksum(plain)}, indent=1, sort_keys=True)
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def parse_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest; raise ValueError if it is no JSON object or does not match its checksum."""
    manifest = outside_json.loads(path.read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is no object")
    rest = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    if manifest.get(_CHECKSUM) != _checksum(rest):
        raise ValueError(f"{MANIFEST} does not fit its checksum")
    return manifest


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode("ascii")).hexdigest()[:16]


def read_manifest(path: Path, **request: Any) -> tuple[dict[str, Any], str | None]:
    """Return the manifest of the artifact at `path`, and a message about the artifact's damage (None if it is intact).

    A manifest that cannot be read is returned as {}. `request` gives entries that the manifest must have; a missing or
    different entry counts as damage.
    """
    try:
        manifest = parse_manifest(path / MANIFEST)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        if any(folder.is_file() for folder in path.parents):  # the store or the stage is a file
            raise
        return {}, f"{MANIFEST} is not there"
    except ValueError as error:
        return {}, f"{MANIFEST} cannot be read ({error})"
    for key, value in request.items():
        if manifest.get(key) != value:
            return manifest, f"{MANIFEST} has the {key} {manifest.get(key)!r}, not {value!r}"
    return manifest, _changed(path, manifest["files"])


def _changed(path: Path, files: Mapping[str, Any]) -> str | None:
    """Return a message that names a file that differs from its entry in `files`; None if all files match."""
    if not files and (present := files_of(path)):
        return f"{MANIFEST} names no file, and there is {present[0]}"
    for name, described in files.items():
        with suppress(FileNotFoundError):  # another process may set the artifact aside meanwhile
            if (path / name).is_file() and describe(path / name) == described:
                continue
        return f"{name} is missing or is not what was written"
    return None


def files_of(folder: Path) -> list[str]:
    """Return an artifact's file paths, relative to its folder, without `MANIFEST` and the files in `UNFINISHED`."""
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(str(file) for file in files if file.parts[0] not in (UNFINISHED, MANIFEST))


def describe(path: Path) -> dict[str, Any]:
    """Return a file's size and its SHA-256, which is None for a file larger than `_HASH_LIMIT`."""
    size = path.stat().st_size
    return {"bytes": size, "sha256": file_hash(path) if size <= _HASH_LIMIT else None}


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, independent of the order of their keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file; it is cached until the file's inode, size or modification time changes."""
    status = path.stat()
    return _hash_of(path.absolute(), status.st_ino, status.st_mtime_ns, status.st_size)


@functools.cache
def _hash_of(path: Path, inode: int, modified: int, size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
