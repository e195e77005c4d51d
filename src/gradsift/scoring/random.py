"""Uniform random scores for all rows (a baseline), or for the clean rows only (a reference with a perfect filter)."""

from __future__ import annotations

import numpy as np

from gradsift.data.load import Labels
from gradsift.errors import ConfigError
from gradsift.scoring.scores import EXCLUDED, Scores


def random(count: int, *, seed: int) -> Scores:
    """Return `count` independent uniform numbers from 0 to 1, drawn with `seed` (`scorer.seed`)."""
    return Scores(np.random.default_rng(seed).random(count))


def random_clean(labels: Labels | None, count: int, *, seed: int) -> Scores:
    """Return uniform numbers for the rows that are labelled clean; the other rows are excluded.

    This scorer is only a reference. It shows what a random selection achieves if all spoilt rows and copies are removed
    beforehand.
    """
    known = require_labels(labels)
    scores = random(count, seed=seed)
    scores.mark(np.array(known.quality) != "clean", EXCLUDED, "labelled as spoilt or as a copy")
    return scores


def require_labels(labels: Labels | None) -> Labels:
    """Return the labels, or raise a `ConfigError` if the data has none."""
    if labels is None:
        raise ConfigError(
            "scorer=random_clean needs rows with known quality; take data=verifiable, or corrupt rows with "
            "data.corruption.share"
        )
    return labels
