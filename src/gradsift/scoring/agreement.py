"""Inner products of gradient features with a few directions, and a check that the vectors of the examples differ.

Shape letters: N examples, K directions, D features.
"""

from __future__ import annotations

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.features.products import DECIMALS, blocks
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores

NO_GRADIENT = "the gradient is zero, so it has no direction"
# Mean cosine between two rows above which a warning is given. The bound is near 1 because last hidden states always
# have a high mean cosine (see docs/methods.md).
MOST_ALIKE = 0.9999


def agreement(features: Features, directions: np.ndarray) -> np.ndarray:
    """Return the features' inner products (N, K) float64 with `directions` (K, D), rounded so that equal rows tie."""
    inner = np.empty((len(features), len(directions)))
    columns = directions.astype(np.float64).T
    for where, rows in blocks(features, np.arange(len(features))):
        inner[where] = rows @ columns
    largest = np.abs(inner).max(initial=0.0)
    return np.round(inner / largest, DECIMALS) * largest if largest else inner


def mark_undirected(scores: Scores, features: Features) -> None:
    """Mark examples without a response or a gradient as undefined, and add the diagnostic `gradient_spread`."""
    scores.diagnostics.append(spread(features, "gradient", "the data for equal rows, and features.warmup"))
    silent = np.zeros(len(features), dtype=bool)
    silent[list(features.silent)] = True
    undirected = ~features.has_direction
    for values in (scores.score, *scores.parts.values()):
        values[undirected] = np.nan
    scores.mark(silent, UNDEFINED, NO_RESPONSE)
    scores.mark(undirected, UNDEFINED, NO_GRADIENT)


def spread(features: Features, kind: str, check: str) -> Diagnostic:
    """Return the diagnostic `<kind>_spread`: the mean cosine over all pairs of rows that have a direction.

    If the mean is near 1, the vectors do not separate the rows. The mean is computed from the length of the sum of N
    unit rows: |sum|^2 = N + N (N - 1) mean cosine. Rows of other lengths (`features.normalise=false`) are scaled first.

    Args:
        kind: embedding or gradient.
        check: what the user should check if the rows are alike.
    """
    name, value = f"{kind}_spread", "mean_cosine"
    total, count = np.zeros(features.vectors.shape[1]), 0
    for _, block in features.blocks():
        total += unit_rows(block).sum(axis=0, dtype=np.float64)
        count += int(np.any(block != 0, axis=1).sum())
    if count < 2:
        return Diagnostic.unknown(name, value, f"fewer than two rows have a {kind} with a direction")
    # |sum|^2 minus the N squared lengths is the sum of the cosines over all ordered pairs of different rows
    mean = float((total @ total - count) / (count * (count - 1)))
    message = f"two rows' {kind}s have a mean cosine of {mean:.4f}"
    if mean > MOST_ALIKE:
        message += ": they hardly tell the rows apart, and equal scores go by row order"
    return Diagnostic.judged(name, mean > MOST_ALIKE, {value: mean}, message, check)
