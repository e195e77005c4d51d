"""The type `Choice`, which a selector returns, and functions that several selectors use.

Shape letters: N examples of the pool, n candidates, k selected examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.scoring.scores import SCORED, Scores


@dataclass(frozen=True)
class Choice:
    """The positions in the pool of the selected examples, best first, and the selector's diagnostics."""

    positions: np.ndarray  # (k,) int64, unique, of examples that are `scored`
    diagnostics: Sequence[Diagnostic] = ()


def best_first(scores: Scores) -> np.ndarray:
    """Return the positions (n,) int64 of the scored examples, highest score first; equal scores keep the row order."""
    positions = np.flatnonzero(scores.status == SCORED)
    # negated, because reversing a stable sort would put equal scores into descending row order
    return positions[np.argsort(-scores.score[positions], kind="stable")]


def best_by_direction(scores: Scores, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Return `best_first` in two parts: the positions whose vector is not zero, and those whose vector is zero.

    A zero vector has no cosine to other vectors, so methods that compare vectors select the second part last.

    Raises:
        GradsiftError: `features` and `scores` have different numbers of examples.
    """
    if len(features) != len(scores.score):
        raise GradsiftError(
            f"there are {len(features):,} vectors for {len(scores.score):,} scores; both must be of the same data, "
            "in its order"
        )
    ranked = best_first(scores)
    directed = features.has_direction[ranked]
    return ranked[directed], ranked[~directed]


def rank_within(groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return, for each of the n candidates, the number of candidates before it in the same group: (n,) int64.

    Args:
        groups: (n,) int64, the index of each candidate's group, from 0.
        sizes: number of candidates in each group, in the order of the groups' indices.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - starts[groups[order]]
    return ranks


def shortfall(selected: int, size: int, candidates: int, reason: str) -> list[Diagnostic]:
    """Return a list with a warning if fewer than `size` examples were selected although candidates were left, else [].

    Args:
        selected: number of selected examples.
        size: number of examples to select.
        candidates: number of examples that could be selected.
        reason: why the method stopped early; it is the end of the warning's message.
    """
    if selected >= min(size, candidates):
        return []
    values: dict[str, float | None] = {"missing": size - selected, "budget": size}
    message = f"{selected:,} of {size:,} examples were selected: {reason}"
    return [Diagnostic("shortfall", "warning", values, message)]
