"""The highest scores: the selector of the paper."""

from __future__ import annotations

from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_first


def topk(scores: Scores, size: int) -> Choice:
    """Return the `size` highest scores, best first, ties by row order; fewer if fewer examples are scored."""
    return Choice(best_first(scores)[:size])
