"""Inner products of gradient features with a few directions, and the examples that have none.

Shape letters: N examples, K directions, D features.
"""

from __future__ import annotations

import numpy as np

from gradsift.features.vectors import Features
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores
from gradsift.scoring.spread import spread
from gradsift.selection.products import DECIMALS, blocks

NO_GRADIENT = "the gradient is zero, so it has no direction"


def agreement(features: Features, directions: np.ndarray) -> np.ndarray:
    """(N, K) float64 inner products with `directions` (K, D); equal rows get equal values, wherever they stand."""
    found = np.empty((len(features), len(directions)))
    columns = directions.astype(np.float64).T
    for where, rows in blocks(features, np.arange(len(features))):
        found[where] = rows @ columns
    largest = np.abs(found).max(initial=0.0)
    return np.round(found / largest, DECIMALS) * largest if largest else found


def mark_undirected(scores: Scores, features: Features) -> None:
    """Undefined, with the reason, where an example has no response or no gradient; says whether the others differ."""
    scores.diagnostics.append(spread(features, "gradient", "the data for equal rows, and features.warmup"))
    silent = np.zeros(len(features), dtype=bool)
    silent[list(features.silent)] = True
    undirected = ~features.has_direction()
    for values in (scores.score, *scores.parts.values()):
        values[undirected] = np.nan
    scores.mark(silent, UNDEFINED, NO_RESPONSE)
    scores.mark(undirected, UNDEFINED, NO_GRADIENT)
