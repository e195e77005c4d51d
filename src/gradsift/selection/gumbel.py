"""Sampling by score: high scores are likely, not certain."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import Scores
from gradsift.selection.candidates import best_first
from gradsift.selection.choice import Choice


def gumbel(scores: Scores, size: int, *, temperature: float, seed: int) -> Choice:
    """Draw without replacement, each time with probabilities proportional to exp(z / temperature).

    z is the score less its mean, over its standard deviation, among the examples that are scored (0 where
    all are equal), so that a temperature means the same for every scorer: towards 0 it is the top k, towards
    infinity a uniform draw. Adding independent Gumbel noise to z / temperature and keeping the largest is
    that draw (Kool et al., arXiv 1903.06059). The noise goes by rank, so that row order decides nothing.

    Returns:
        min(size, number of scored examples) positions, in the order in which they are drawn.
    """
    ranked = best_first(scores)
    noise = np.random.default_rng(seed).gumbel(size=len(ranked))
    keys = _standardised(scores.score[ranked]) / temperature + noise
    return Choice(ranked[np.argsort(-keys, kind="stable")[:size]])


def _standardised(values: np.ndarray) -> np.ndarray:
    if len(values) == 0 or values.min() == values.max():
        return np.zeros(len(values))
    z: np.ndarray = (values - values.mean()) / values.std()
    return z
