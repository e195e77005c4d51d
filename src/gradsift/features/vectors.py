"""Vectors of examples on disk, and their blocks in memory.

A feature artifact holds `features.npy` (N, D) float32, memory-mapped when read, in the order of the
examples, and `ids.json`, whose entries name the rows. A row of zeros means that the example has no
direction (a zero gradient, an empty text); every other row has length 1, or less where a part of it is
missing (a gradient that is zero at some checkpoints), or any where `features.normalise` is off.

Shape letters: N examples, D features, B rows of a block.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.errors import GradsiftError

FEATURES_FILE = "features.npy"
IDS_FILE = "ids.json"
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


def open_features(folder: Path, rows: int, dimensions: int, continues: bool = False) -> np.ndarray:
    """An array (rows, dimensions) float32 in `folder` to be filled block by block; call `flush` when done.

    Args:
        continues: keep what an earlier process has filled; else all is zero.

    Raises:
        OSError: the disk has no room for the array.
    """
    path = folder / FEATURES_FILE
    if continues:
        written: np.ndarray = np.load(path, mmap_mode="r+", allow_pickle=False)
    else:
        written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dimensions))
        if hasattr(os, "posix_fallocate"):  # a mapped page that finds the disk full would kill the process
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return written


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
