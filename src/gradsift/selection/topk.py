"""Selection of the highest scores, as in the GRADFILTERING paper."""

from __future__ import annotations

from gradsift.scoring.scores import Scores
from gradsift.selection.choice import Choice, best_first


def topk(scores: Scores, size: int) -> Choice:
    """Select the `size` examples with the highest scores, or all scored examples if there are fewer.

    Of examples with equal scores, those that come first in the data are selected first.
    """
    return Choice(best_first(scores)[:size])
