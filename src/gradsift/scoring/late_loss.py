"""Minus the members' mean loss at the late snapshot: a simple baseline to compare the gradient scores with."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores


def late_loss(late_losses: np.ndarray) -> Scores:
    """Return minus `late_losses` as scores.

    Args:
        late_losses: (N,) each example's loss at the late snapshot, averaged over the members. An example whose loss is
            NaN, because it has no response token, is `undefined`.
    """
    scores = Scores(-late_losses)
    scores.mark(np.isnan(late_losses), UNDEFINED, NO_RESPONSE)
    return scores
