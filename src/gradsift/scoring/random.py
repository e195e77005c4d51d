"""Uniform random scores: the baseline that every method has to beat."""

from __future__ import annotations

import numpy as np

from gradsift.scoring.scores import Scores


def random(count: int, *, seed: int) -> Scores:
    """Return independent uniform numbers, drawn with `scorer.seed`."""
    return Scores(np.random.default_rng(seed).random(count))
