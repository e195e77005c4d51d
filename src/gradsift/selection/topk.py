"""The highest scores: the selector of the paper."""

from __future__ import annotations

from gradsift.scoring.scores import Scores
from gradsift.selection.candidates import best_first
from gradsift.selection.choice import Choice


def topk(scores: Scores, size: int) -> Choice:
    """Positions of the `size` highest scores, best first; ties by row order, only `scored` examples.

    Returns:
        min(size, number of scored examples) positions.
    """
    return Choice(best_first(scores)[:size])
