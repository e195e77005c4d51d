"""Vectors of examples on disk, and their blocks in memory.

A feature artifact holds `features.npy` (N, D) float32, memory-mapped when read, in the order of the
examples, and `ids.json`, whose entries name the rows. A row of zeros means that the example has no
direction (a zero gradient, an empty text); every other row has length 1, or less where a part of it is
missing (a gradient that is zero at some checkpoints), or any where `features.normalise` is off.

Shape letters: N examples, D features, B rows of a block.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.errors import GradsiftError
from gradsift.journal import sealed, unsealed
from gradsift.manifests import UNFINISHED

FEATURES_FILE = "features.npy"
IDS_FILE = "ids.json"
FILLED_FILE = "filled.jsonl"
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Features:
    """Vectors of N examples; `tasks` names each row's task where the rows are those of a target set."""

    vectors: np.ndarray  # (N, D) float32, often memory-mapped; length 1 a row, or 0 for a row without direction
    tasks: tuple[str, ...] = ()  # (N,) or empty
    silent: tuple[int, ...] = ()  # rows of zeros whose example has no response token

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Start and rows (B, D) of successive blocks that memory holds whatever N is."""
        size = max(1, _BLOCK_BYTES // max(1, 4 * self.vectors.shape[1]))
        for start in range(0, len(self.vectors), size):
            yield start, np.asarray(self.vectors[start : start + size], dtype=np.float32)

    def has_direction(self) -> np.ndarray:
        """(N,) bool, read-only: whether a row is anything but zeros. All rows are read for it, once."""
        return self._directed

    @functools.cached_property
    def _directed(self) -> np.ndarray:
        found = np.zeros(len(self), dtype=bool)
        for start, rows in self.blocks():
            found[start : start + len(rows)] = np.any(rows != 0, axis=1)
        found.flags.writeable = False
        return found


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows (B, D) float32 at length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: np.ndarray = np.divide(vectors, lengths, out=np.zeros(vectors.shape), where=lengths > 0).astype(np.float32)
    return unit


def open_features(folder: Path, rows: int, dimensions: int) -> np.memmap:
    """An array (rows, dimensions) float32 in `folder` to be filled block by block; call `flush` when done.

    What an interrupted process has filled is still there (see `FilledBlocks`); all else is zero.

    Raises:
        OSError: the disk has no room for the array.
    """
    path, header = folder / FEATURES_FILE, _header(rows, dimensions)
    if path.exists():
        with path.open("rb") as stream:
            there = stream.read(len(header)) == header  # numpy has errors of many kinds for one that was changed
    else:
        there = False
    mode = "r+" if there else "w+"
    written = np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=(rows, dimensions))
    if hasattr(os, "posix_fallocate"):  # a mapped page that finds the disk full would kill the process
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return written


def _header(rows: int, dimensions: int) -> bytes:
    """The first bytes of the file of an array (rows, dimensions) float32, up to its numbers."""
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, described | {"shape": (rows, dimensions)})
    return stream.getvalue()


class FilledBlocks:
    """The blocks of `features.npy` that are filled, in their order, each with a checksum of its numbers."""

    def __init__(
        self, folder: Path, content: Callable[[Sequence[int]], np.ndarray], say: Callable[[str], None]
    ) -> None:
        """Read what an interrupted process has noted, up to the first block that is not what was written.

        Args:
            folder: of the artifact in the making.
            content: the numbers of a block, by the place that it was noted with.
            say: told of a block that was dropped.
        """
        self._path = folder / UNFINISHED / FILLED_FILE
        self._content = content
        self.places: list[list[int]] = []
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        good = b""
        for line in lines:
            place = self._intact(line)
            if place is None:
                say(f"  block {len(self.places) + 1} of {folder.name} is damaged; it and those after it are made again")
                self._path.write_bytes(good)
                break
            self.places.append(place)
            good += line

    def add(self, place: Sequence[int]) -> None:
        """Note a block that has been filled and flushed."""
        self.places.append(list(place))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as stream:
            stream.write(sealed(json.dumps([list(place), self._checksum(place)])))

    def _intact(self, line: bytes) -> list[int] | None:
        text = unsealed(line)
        if text is None:
            return None
        place, checksum = json.loads(text)
        return place if self._checksum(place) == checksum else None

    def _checksum(self, place: Sequence[int]) -> str:
        return hashlib.sha256(np.ascontiguousarray(self._content(place)).data).hexdigest()[:16]


def write_ids(folder: Path, ids: Sequence[str], tasks: Sequence[str] = (), silent: Sequence[int] = ()) -> None:
    """What the rows of `features.npy` are."""
    content = {"ids": list(ids), "tasks": list(tasks), "silent": list(silent)}
    (folder / IDS_FILE).write_text(json.dumps(content), encoding="utf-8")


def read_features(artifact: Artifact) -> Features:
    """What a feature stage wrote; the vectors stay on disk until they are used.

    Raises:
        GradsiftError: the rows are not those that the ids name.
    """
    vectors = np.load(artifact.file(FEATURES_FILE), mmap_mode="r", allow_pickle=False)
    named = json.loads(artifact.file(IDS_FILE).read_text(encoding="utf-8"))
    if len(named["ids"]) != len(vectors):
        raise GradsiftError(f"{artifact.path.name} holds {len(vectors)} vectors for {len(named['ids'])} examples")
    return Features(vectors, tuple(named["tasks"]), tuple(named["silent"]))
