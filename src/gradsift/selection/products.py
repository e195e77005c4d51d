"""Inner products with many vectors that stay on disk.

Everything is done block by block in float64 and rounded to nine decimals. A product then depends neither
on the size of the blocks nor on the place of a row in them, and equal vectors tie exactly, so that row
order decides between them.

Shape letters: n rows asked for, D features, B rows of a block, C other vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradsift.features.vectors import Features

DECIMALS = 9
_BLOCK_BYTES = 8 * 2**20  # of float64: a block and its products stay in a CPU's caches
_MOST_ROWS = 1024  # of a block, also where vectors are short: a block is multiplied with a block


def blocks(features: Features, positions: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows at `positions` (n,), as their places in `positions` and a block (B, D) float64."""
    size = max(1, min(_MOST_ROWS, _BLOCK_BYTES // max(1, 8 * features.vectors.shape[1])))
    for start in range(0, len(positions), size):
        rows = positions[start : start + size]
        adjoining = rows[-1] - rows[0] == len(rows) - 1 and bool(np.all(np.diff(rows) == 1))
        block = features.vectors[rows[0] : rows[-1] + 1] if adjoining else features.vectors[rows]  # a view, or a copy
        yield slice(start, start + len(rows)), np.asarray(block, dtype=np.float64)


def products(features: Features, positions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Inner products (n, C) float64 of the rows at `positions` (n,) with `others` (C, D)."""
    found = np.empty((len(positions), len(others)))
    columns = others.astype(np.float64).T
    for where, rows in blocks(features, positions):
        found[where] = rows @ columns
    return np.round(found, DECIMALS)


def squared_lengths(features: Features, positions: np.ndarray) -> np.ndarray:
    """(n,) float64 of the rows at `positions` (n,)."""
    found = np.empty(len(positions))
    for where, rows in blocks(features, positions):
        found[where] = np.einsum("bd,bd->b", rows, rows)
    return found
