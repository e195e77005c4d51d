"""Vectors of examples on disk, filled block by block, and their inner products.

A feature artifact has two files. `features.npy` is an array (N, D) float32 with one row per example, in the order of
the examples; it is memory-mapped when read. `ids.json` has the ids of the examples. A row has norm 1, or is all zeros
if its example has no direction, because its gradient is zero or its text is empty. There are two exceptions for
gradient features: a row has a norm between 0 and 1 if the gradient is zero at some of the checkpoints, and rows may
have any norm with `features.normalise=false`.

Inner products of rows with norm 1 are cosines. Inner products are computed block by block, so that no (N, N) matrix is
in memory. `blocks` yields float64 rows, and `products` rounds the inner products to nine decimals. So an inner product
does not depend on the block size or on the row's place in a block. Equal rows have equal inner products with any
other vector, so a selector can break the tie between them by the order of the data.

Shape letters: N examples, n requested rows, D features, B rows of a block, C other vectors, K anchors.
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
from gradsift.journal import Journal
from gradsift.manifests import UNFINISHED
from gradsift.runtime import Advance

FEATURES_FILE = "features.npy"
IDS_FILE = "ids.json"
DECIMALS = 9  # of inner products
_READ_BYTES = 64 * 2**20  # of a float32 block
_BLOCK_BYTES = 8 * 2**20  # of a float64 block, so that the block and its products fit in a CPU's caches
_MOST_ROWS = 1024  # of a block, however short the vectors are: a block may be multiplied with another block
_MATRIX_BYTES = 16 * 2**20  # of a matrix product; larger products are not faster


@dataclass(frozen=True)
class Features:
    """Vectors of N examples."""

    vectors: np.ndarray  # (N, D) float32, often memory-mapped
    tasks: tuple[str, ...] = ()  # (N,) the task of each row of a target set; empty for a pool
    silent: tuple[int, ...] = ()  # rows whose example has no response token; they are all zeros

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the vectors in blocks that fit in memory.

        For each block, yield the position of its first row and its rows (B, D) float32.
        """
        size = max(1, _READ_BYTES // max(1, 4 * self.vectors.shape[1]))
        for start in range(0, len(self.vectors), size):
            yield start, np.asarray(self.vectors[start : start + size], dtype=np.float32)

    @functools.cached_property
    def has_direction(self) -> np.ndarray:
        """Mask (N,) bool: True for the rows that are not all zeros.

        The mask is read-only. The first access to it reads all vectors.
        """
        nonzero = np.zeros(len(self), dtype=bool)
        for start, rows in self.blocks():
            nonzero[start : start + len(rows)] = np.any(rows != 0, axis=1)
        nonzero.flags.writeable = False
        return nonzero


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of `vectors` (B, D) scaled to norm 1, float32; rows of zeros stay zeros."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: np.ndarray = np.divide(vectors, lengths, out=np.zeros(vectors.shape), where=lengths > 0).astype(np.float32)
    return unit


def open_features(folder: Path, rows: int, dimensions: int) -> np.memmap:
    """Return an array (rows, dimensions) float32 on disk. Fill it with `fill_block`, then call `finish_features`.

    If an interrupted run has left an array, that array is opened again, with the blocks filled so far. A new array is
    all zeros.

    Raises:
        OSError: the disk has no room for the array.
    """
    path = folder / UNFINISHED / FEATURES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    with path.open("r+b" if path.exists() else "w+b") as stream:
        before = os.fstat(stream.fileno()).st_size
        np.lib.format.write_array_header_1_0(stream, layout | {"shape": (rows, dimensions)})
        start = stream.tell()
        stream.flush()
        if hasattr(os, "posix_fallocate"):
            # reserve the disk space, because writing to a mapped page of a full disk would kill the process
            size = start + 4 * rows * dimensions
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                stream.truncate(before)  # ext4 keeps the part that it could reserve, and the disk would stay full
                reason = f"{os.strerror(error.errno or 0)} for {size / 1e9:.1f} GB of vectors"
                raise OSError(error.errno, reason, str(path)) from error
    return np.memmap(path, dtype=np.float32, mode="r+", offset=start, shape=(rows, dimensions))


def fill_block(journal: Journal, vectors: np.ndarray, index: Any, key: Any, make: Callable[[], np.ndarray]) -> bool:
    """Write `make()` to `vectors[index]` unless an interrupted run has done so, and return whether `make` was called.

    The journal keeps a checksum of the block under `key` (a JSON value), so that a damaged block is computed again.
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
    """Move the filled array to the artifact's folder, and write `ids`, `tasks` and `silent` to a file beside it."""
    vectors.flush()
    (folder / UNFINISHED / FEATURES_FILE).replace(folder / FEATURES_FILE)
    names = {"ids": list(ids), "tasks": list(tasks), "silent": list(silent)}
    (folder / IDS_FILE).write_text(json.dumps(names), encoding="utf-8")


def read_features(artifact: Artifact) -> Features:
    """Return the features of an artifact, with memory-mapped vectors."""
    vectors = np.load(artifact.file(FEATURES_FILE), mmap_mode="r", allow_pickle=False)
    names = json.loads(artifact.file(IDS_FILE).read_text(encoding="utf-8"))
    return Features(vectors, tuple(names["tasks"]), tuple(names["silent"]))


def blocks(features: Features, positions: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the rows at `positions` (n,) block by block.

    For each block, yield a slice of `positions` and the rows at the positions in this slice, (B, D) float64.
    """
    size = max(1, min(_MOST_ROWS, _BLOCK_BYTES // max(1, 8 * features.vectors.shape[1])))
    for start in range(0, len(positions), size):
        rows = positions[start : start + size]
        adjoining = rows[-1] - rows[0] == len(rows) - 1 and bool(np.all(np.diff(rows) == 1))
        block = features.vectors[rows[0] : rows[-1] + 1] if adjoining else features.vectors[rows]  # a view, or a copy
        yield slice(start, start + len(rows)), np.asarray(block, dtype=np.float64)


def products(features: Features, positions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the inner products (n, C) float64 of the rows at `positions` (n,) with `others` (C, D)."""
    inner = np.empty((len(positions), len(others)))
    columns = others.astype(np.float64).T
    for where, rows in blocks(features, positions):
        inner[where] = rows @ columns
    return np.round(inner, DECIMALS)


def squared_lengths(features: Features, positions: np.ndarray) -> np.ndarray:
    """Return the squared norms (n,) float64 of the rows at `positions` (n,)."""
    squares = np.empty(len(positions))
    for where, rows in blocks(features, positions):
        squares[where] = np.einsum("bd,bd->b", rows, rows)
    return squares


def row_blocks(count: int, row_bytes: int, block_bytes: int = _MATRIX_BYTES) -> Iterator[slice]:
    """Yield slices that divide `count` rows of `row_bytes` bytes each into blocks of at most `block_bytes` bytes.

    If one row takes more than `block_bytes`, each block is one row.
    """
    size = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def nearest_cosines(features: Features, neighbours: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Return the mean cosine (N,) float64 of each example to the `neighbours` other examples most similar to it.

    The mean is NaN for a row without direction (all zeros), and for all rows if at most `neighbours` rows have a
    direction. It is rounded to six decimals, so that rounding errors do not rank rows that all have a copy.
    """
    usable = features.has_direction
    means = np.full(len(features), np.nan)
    for block in row_blocks(len(features), 4 * len(features)):
        cosines = np.asarray(features.vectors[block], dtype=np.float32) @ features.vectors.T  # (B, N)
        cosines[:, ~usable] = -np.inf
        cosines[np.arange(len(cosines)), np.arange(block.start, block.stop)] = -np.inf
        if usable.sum() > neighbours:
            means[block] = np.partition(cosines, -neighbours, axis=1)[:, -neighbours:].mean(1, dtype=np.float64)
        advance(len(cosines))
    means[~usable] = np.nan
    return np.round(means, 6)


def mean_cosines(features: Features) -> np.ndarray:
    """Return the mean cosine (N,) float64 of each example to all other examples with a direction.

    The mean is NaN for a row without direction (all zeros), and for all rows if fewer than two rows have a direction.
    """
    total = np.zeros(features.vectors.shape[1])
    for _, rows in features.blocks():
        total += rows.sum(0, dtype=np.float64)
    usable = features.has_direction
    others = int(usable.sum()) - 1
    if others < 1:
        return np.full(len(features), np.nan)
    sums = np.concatenate([rows @ total - np.square(rows, dtype=np.float64).sum(1) for _, rows in features.blocks()])
    sums[~usable] = np.nan
    means: np.ndarray = sums / others
    return means


def nearest_anchor_cosines(features: Features, anchors: np.ndarray) -> np.ndarray:
    """Return, for each example, its largest cosine to the examples at the positions `anchors` (K,): (N,) float64.

    An anchor is compared with itself too. The value is NaN for a row without direction (all zeros), and for all rows if
    no anchor has a direction.
    """
    chosen = np.asarray(features.vectors[np.sort(anchors)], dtype=np.float32)
    chosen = chosen[np.any(chosen != 0, axis=1)]
    largest = np.full(len(features), np.nan)
    if len(chosen):
        for block in row_blocks(len(features), 4 * len(chosen)):
            largest[block] = (np.asarray(features.vectors[block], dtype=np.float32) @ chosen.T).max(1)
    largest[~features.has_direction] = np.nan
    return largest
