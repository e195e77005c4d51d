"""The highest scores: the selector of the paper."""

from __future__ import annotations

from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_first


def topk(scores: Scores, size: int) -> Choice:
    """Select the `size` examples with the highest scores (fewer if fewer are scored), equal scores in row order."""
    return Choice(best_first(scores)[:size])
