"""What may be selected, in which order, and why a method ended before its budget.

Shape letters: N examples of the pool, n candidates.
"""

from __future__ import annotations

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.scoring.scores import SCORED, Scores


def best_first(scores: Scores) -> np.ndarray:
    """(n,) int64 positions of the examples that are `scored`, highest score first, ties by row order."""
    positions = np.flatnonzero(scores.status == SCORED)
    return positions[np.argsort(-scores.score[positions], kind="stable")]


def best_by_direction(scores: Scores, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """`best_first` in two parts: the examples whose vectors have a direction, and those of zeros.

    The latter are neither like nor unlike anything; no method may prefer them for it, so they come last.

    Raises:
        GradsiftError: `features` are of another number of examples.
    """
    if len(features) != len(scores.score):
        raise GradsiftError(
            f"there are {len(features):,} vectors for {len(scores.score):,} scores; both must be of the same data, "
            "in its order"
        )
    ranked = best_first(scores)
    directed = features.has_direction()[ranked]
    return ranked[directed], ranked[~directed]


def shortfall(found: int, size: int, count: int, why: str) -> list[Diagnostic]:
    """A warning that the method stopped before `size` though there were `count` candidates; nothing if it did not."""
    if found >= min(size, count):
        return []
    values: dict[str, float | None] = {"missing": size - found, "budget": size}
    return [Diagnostic("shortfall", "warning", values, f"{found:,} of {size:,} examples were selected: {why}")]
