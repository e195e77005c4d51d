"""Minus the members' mean loss at the late snapshot: a simple baseline to compare the gradient scores with."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores


def late_loss(late_losses: np.ndarray) -> Scores:
    """Return minus each example's loss at the late snapshot, averaged over the members."""
    scores = Scores(-late_losses)
    scores.mark(np.isnan(late_losses), UNDEFINED, NO_RESPONSE)
    return scores
