"""The negative mean loss of the members at the late snapshot: a plain baseline beside the gradient scores."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores


def late_loss(late_losses: np.ndarray) -> Scores:
    """-(1/M) sum over m of example i's loss at the late snapshot, taken where `proxy.collect` says."""
    scores = Scores(-late_losses)
    scores.mark(np.isnan(late_losses), UNDEFINED, NO_RESPONSE)
    return scores
