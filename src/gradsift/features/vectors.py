"""Vectors of examples on disk, filled block by block.

A feature artifact holds `features.npy`, (N, D) float32 in the order of the examples and memory-mapped when read, and
`ids.json`, which names the rows. A row has length 1, or length 0 if its example has no direction (a zero gradient, an
empty text). A row of gradient features has a length between 0 and 1 if the gradient is zero at some checkpoints only,
and any length with `features.normalise=false`.

Shape letters: N examples, D features, B rows of a block.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.errors import GradsiftError
from gradsift.journal import Journal
from gradsift.manifests import UNFINISHED

FEATURES_FILE = "features.npy"
IDS_FILE = "ids.json"
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Features:
    """Vectors of N examples."""

    vectors: np.ndarray  # (N, D) float32, often memory-mapped
    tasks: tuple[str, ...] = ()  # (N,) the task of each row of a target set; empty for a pool
    silent: tuple[int, ...] = ()  # rows of zeros whose example has no response token

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the vectors in blocks that fit in memory: the position of a block's first row, and its rows (B, D)."""
        size = max(1, _BLOCK_BYTES // max(1, 4 * self.vectors.shape[1]))
        for start in range(0, len(self.vectors), size):
            yield start, np.asarray(self.vectors[start : start + size], dtype=np.float32)

    @functools.cached_property
    def has_direction(self) -> np.ndarray:
        """Mask (N,) bool, read-only, of the rows that are not all zeros; the first access reads all vectors."""
        nonzero = np.zeros(len(self), dtype=bool)
        for start, rows in self.blocks():
            nonzero[start : start + len(rows)] = np.any(rows != 0, axis=1)
        nonzero.flags.writeable = False
        return nonzero


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows (B, D) scaled to length 1, float32; rows of zeros stay zeros."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: np.ndarray = np.divide(vectors, lengths, out=np.zeros(vectors.shape), where=lengths > 0).astype(np.float32)
    return unit


def open_features(folder: Path, rows: int, dimensions: int) -> np.memmap:
    """Return an array (rows, dimensions) float32 on disk. Fill it with `fill_block`, then call `finish_features`.

    The array of an interrupted run is opened again with the blocks that the run filled; a new array is all zeros.

    Args:
        folder: the folder of the unfinished artifact.

    Raises:
        OSError: the disk has no room for the array.
    """
    path = folder / UNFINISHED / FEATURES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    with path.open("r+b" if path.exists() else "w+b") as stream:
        np.lib.format.write_array_header_1_0(stream, layout | {"shape": (rows, dimensions)})
        start = stream.tell()
        stream.flush()
        if hasattr(os, "posix_fallocate"):  # writing to a mapped page when the disk is full would kill the process
            os.posix_fallocate(stream.fileno(), 0, start + 4 * rows * dimensions)
    return np.memmap(path, dtype=np.float32, mode="r+", offset=start, shape=(rows, dimensions))


def fill_block(journal: Journal, vectors: np.ndarray, index: Any, key: Any, make: Callable[[], np.ndarray]) -> bool:
    """Write `make()` to `vectors[index]` unless an interrupted run has done so; return whether `make` was called.

    Args:
        journal: keeps a checksum of each block under `key` (a JSON value).
    """
    called = False

    def checksum() -> str:
        return hashlib.sha256(np.ascontiguousarray(vectors[index]).data).hexdigest()[:16]

    def fill() -> str:
        nonlocal called
        called = True
        vectors[index] = make()
        return checksum()

    journal.once(key, fill, intact=lambda kept: bool(kept == checksum()))
    return called


def finish_features(
    folder: Path, vectors: np.memmap, ids: Sequence[str], tasks: Sequence[str] = (), silent: Sequence[int] = ()
) -> None:
    """Move the filled array to `FEATURES_FILE` in the artifact's folder, and write the names of its rows beside it.

    Args:
        vectors: the array of `open_features`.
        ids: example_id of each row, (N,).
        tasks, silent: see `Features`.
    """
    vectors.flush()
    (folder / UNFINISHED / FEATURES_FILE).replace(folder / FEATURES_FILE)
    names = {"ids": list(ids), "tasks": list(tasks), "silent": list(silent)}
    (folder / IDS_FILE).write_text(json.dumps(names), encoding="utf-8")


def read_features(artifact: Artifact) -> Features:
    """Return the features of an artifact; the vectors stay on disk until they are used.

    Raises:
        GradsiftError: the numbers of vectors and of ids differ.
    """
    vectors = np.load(artifact.file(FEATURES_FILE), mmap_mode="r", allow_pickle=False)
    names = json.loads(artifact.file(IDS_FILE).read_text(encoding="utf-8"))
    if len(names["ids"]) != len(vectors):
        raise GradsiftError(f"{artifact.path.name} holds {len(vectors)} vectors for {len(names['ids'])} examples")
    return Features(vectors, tuple(names["tasks"]), tuple(names["silent"]))
