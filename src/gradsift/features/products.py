"""Inner products of vectors that stay on disk, computed block by block, so that no (N, N) matrix is in memory.

Inner products of vectors of length 1 are cosines (`gradsift.features.vectors` says which vectors have other lengths).

`blocks` yields float64 rows, and `products` rounds their products to nine decimals. A product then depends neither on
the block size nor on the row's place in a block, and equal vectors have equal products, so that a selector can
break the tie by their order in the data.

Shape letters: N examples, n requested rows, D features, B rows of a block, C other vectors, K anchors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradsift.features.vectors import Features
from gradsift.runtime import Advance

DECIMALS = 9
_BLOCK_BYTES = 8 * 2**20  # of a float64 block, so that the block and its products fit in a CPU's caches
_MOST_ROWS = 1024  # of a block, however short the vectors are: a block may be multiplied with another block
_MATRIX_BYTES = 16 * 2**20  # of a matrix product; larger products are not faster


def blocks(features: Features, positions: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the rows at `positions` (n,) block by block: a slice of `positions`, and its rows (B, D) float64."""
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
    """Return the squared lengths (n,) float64 of the rows at `positions` (n,)."""
    squares = np.empty(len(positions))
    for where, rows in blocks(features, positions):
        squares[where] = np.einsum("bd,bd->b", rows, rows)
    return squares


def row_blocks(count: int, row_bytes: int, block_bytes: int = _MATRIX_BYTES) -> Iterator[slice]:
    """Yield slices that divide `count` rows of `row_bytes` each into blocks of at most `block_bytes` or one row."""
    size = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def nearest_cosines(features: Features, neighbours: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Return the mean cosine of each example to the `neighbours` other examples that are most similar to it.

    Returns:
        (N,) float64; NaN for a row without direction, and for all rows if at most `neighbours` rows have a direction.
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
    return means


def mean_cosines(features: Features) -> np.ndarray:
    """Return the mean cosine of each example to all other examples with a direction.

    Returns:
        (N,) float64; NaN for a row without direction, and for all rows if fewer than two have a direction.
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
    """Return the largest cosine of each example to the examples at the positions `anchors` (K,).

    An anchor is also compared with itself.

    Returns:
        (N,) float64; NaN for a row without direction, and for all rows if no anchor has a direction.
    """
    chosen = np.asarray(features.vectors[np.sort(anchors)], dtype=np.float32)
    chosen = chosen[np.any(chosen != 0, axis=1)]
    largest = np.full(len(features), np.nan)
    if len(chosen):
        for block in row_blocks(len(features), 4 * len(chosen)):
            largest[block] = (np.asarray(features.vectors[block], dtype=np.float32) @ chosen.T).max(1)
    largest[~features.has_direction] = np.nan
    return largest
