"""The representation filter: the best examples that are not too much alike (DEITA, arXiv 2312.15685).

Shape letters: n candidates, B of a block, k kept ones, D features.
"""

from __future__ import annotations

import numpy as np

from gradsift.features.vectors import Features
from gradsift.runtime import Task, unseen
from gradsift.scoring.scores import Scores
from gradsift.selection.candidates import best_by_direction, shortfall
from gradsift.selection.choice import Choice
from gradsift.selection.products import DECIMALS, blocks


def repr_filter(scores: Scores, size: int, embeddings: Features, task: Task = unseen, *, threshold: float) -> Choice:
    """By descending score, keep the next example if its largest cosine to those kept is at most `threshold`.

    An example without direction has the cosine 0 to everything and is looked at last.
    """
    ranked = np.concatenate(best_by_direction(scores, embeddings))
    kept = np.empty(0, dtype=np.int64)
    with task("filter by representation", size) as advance:
        for where, rows in blocks(embeddings, ranked):
            nearest = _largest_cosines(embeddings, kept, rows)
            among = np.round(rows @ rows.T, DECIMALS)
            fresh: list[int] = []
            for row in range(len(rows)):
                if len(kept) + len(fresh) < size and min(nearest[row], 1) <= threshold:
                    fresh.append(row)
                    nearest = np.maximum(nearest, among[row])
            kept = np.concatenate([kept, ranked[where][fresh]])
            advance(len(fresh))
            if len(kept) == size:
                break
    alike = (
        f"every other one has a cosine above selector.threshold={threshold} to one of them; raise selector.threshold, "
        "or lower alpha"
    )
    return Choice(kept, shortfall(len(kept), size, len(ranked), alike))


def _largest_cosines(features: Features, kept: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(B,) largest cosine of each of `rows` (B, D) to the examples at `kept` (k,); -1 where there is none."""
    largest = np.full(len(rows), -1.0)
    for _, others in blocks(features, kept):
        largest = np.maximum(largest, (others @ rows.T).max(0))
    return np.round(largest, DECIMALS)
