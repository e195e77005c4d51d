"""The highest scores, exactly as many as the budget says."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import SCORED, Scores


def topk(scores: Scores, size: int) -> np.ndarray:
    """Positions of the `size` highest scores, best first; ties by row order, only `scored` examples.

    Returns:
        (k,) int64, k = min(size, number of scored examples).
    """
    candidates = np.flatnonzero(scores.status == SCORED)
    order = np.argsort(-scores.score[candidates], kind="stable")
    return candidates[order][:size]
