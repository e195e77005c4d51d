"""The highest scores: the selector of the paper."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import SCORED, Scores
from gradsift.selection.choice import Choice


def topk(scores: Scores, size: int) -> Choice:
    """Positions of the `size` highest scores, best first; ties by row order, only `scored` examples.

    Returns:
        min(size, number of scored examples) positions.
    """
    candidates = np.flatnonzero(scores.status == SCORED)
    order = np.argsort(-scores.score[candidates], kind="stable")
    return Choice(candidates[order][:size])
