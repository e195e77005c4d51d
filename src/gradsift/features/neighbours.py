"""Cosines between examples, a block of rows at a time: no (N, N) matrix is ever held.

Vectors have length 1 or 0 (see `gradsift.features.vectors`), so products are cosines; a row without
direction is nobody's neighbour. Shape letters: N examples, D features, B rows of a block, K anchors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradsift.features.vectors import Features
from gradsift.runtime import Advance

_BLOCK_BYTES = 16 * 2**20  # of a matrix product; larger ones are no faster


def row_blocks(count: int, row_bytes: int, block_bytes: int = _BLOCK_BYTES) -> Iterator[slice]:
    """Slices of `count` rows of so many bytes, as many at a time as a block holds."""
    size = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def nearest_cosines(features: Features, neighbours: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Mean cosine of each example to the `neighbours` others that are most similar to it.

    Returns:
        (N,) float64; NaN for a row without direction, and where there are fewer others with one.
    """
    usable = features.has_direction()
    found = np.full(len(features), np.nan)
    for block in row_blocks(len(features), 4 * len(features)):
        cosines = np.asarray(features.vectors[block], dtype=np.float32) @ features.vectors.T  # (B, N)
        cosines[:, ~usable] = -np.inf
        cosines[np.arange(len(cosines)), np.arange(block.start, block.stop)] = -np.inf
        if usable.sum() > neighbours:
            found[block] = np.partition(cosines, -neighbours, axis=1)[:, -neighbours:].mean(1, dtype=np.float64)
        advance(len(cosines))
    found[~usable] = np.nan
    return found


def mean_cosines(features: Features) -> np.ndarray:
    """Mean cosine of each example to all others that have a direction, (N,) float64; NaN for those that have none."""
    total = np.zeros(features.vectors.shape[1])
    for _, rows in features.blocks():
        total += rows.sum(0, dtype=np.float64)
    usable = features.has_direction()
    others = int(usable.sum()) - 1
    if others < 1:
        return np.full(len(features), np.nan)
    found = np.concatenate([rows @ total - np.square(rows, dtype=np.float64).sum(1) for _, rows in features.blocks()])
    found[~usable] = np.nan
    means: np.ndarray = found / others
    return means


def nearest_anchor_cosines(features: Features, anchors: np.ndarray) -> np.ndarray:
    """Largest cosine of each example to one at the positions `anchors` (K,), itself perhaps; (N,) float64.

    NaN for a row without direction.
    """
    chosen = np.asarray(features.vectors[np.sort(anchors)], dtype=np.float32)
    chosen = chosen[np.any(chosen != 0, axis=1)]
    found = np.full(len(features), np.nan)
    if len(chosen):
        for block in row_blocks(len(features), 4 * len(chosen)):
            found[block] = (np.asarray(features.vectors[block], dtype=np.float32) @ chosen.T).max(1)
    found[~features.has_direction()] = np.nan
    return found
