"""The representation filter: the best examples that are not too similar to each other (DEITA, arXiv 2312.15685).

Shape letters: n candidates, B rows of a block, D features.
"""

from __future__ import annotations

import numpy as np

from gradsift.features.vectors import DECIMALS, Features, blocks
from gradsift.runtime import Task, unseen
from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_by_direction, shortfall


def repr_filter(scores: Scores, size: int, embeddings: Features, task: Task = unseen, *, threshold: float) -> Choice:
    """Keep the examples, by descending score, whose cosine to every example kept before is at most `threshold`.

    Examples whose embedding is zero count as having cosine 0 to all others, and come last, whatever their score. The
    filter stops when it has kept `size` examples.
    """
    ranked = np.concatenate(best_by_direction(scores, embeddings))
    kept = np.empty(0, dtype=np.int64)
    with task("filter by representation", size) as advance:
        for where, rows in blocks(embeddings, ranked):
            nearest = np.full(len(rows), -1.0)  # largest cosine of each row to a kept example
            # all rows of the block are compared at once with the rows kept before it; only the decisions within the
            # block depend on each other
            for _, others in blocks(embeddings, kept):
                nearest = np.maximum(nearest, (others @ rows.T).max(0))
            nearest = np.round(nearest, DECIMALS)
            cosines = np.round(rows @ rows.T, DECIMALS)  # (B, B)
            added: list[int] = []
            for row in range(len(rows)):
                # capped at 1, so that threshold=1 keeps copies: by rounding, `nearest` may be above 1
                if len(kept) + len(added) < size and min(nearest[row], 1) <= threshold:
                    added.append(row)
                    nearest = np.maximum(nearest, cosines[row])
            kept = np.concatenate([kept, ranked[where][added]])
            advance(len(added))
            if len(kept) == size:
                break
    reason = (
        f"every other one has a cosine above selector.threshold={threshold} to one of them; raise selector.threshold, "
        "or lower alpha"
    )
    return Choice(kept, shortfall(len(kept), size, len(ranked), reason))
