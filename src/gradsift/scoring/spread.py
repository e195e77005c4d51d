"""Whether vectors tell the examples apart."""

from __future__ import annotations

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.features.vectors import Features

# Mean cosine between two rows from which on they are called alike. Last hidden states share much of their
# direction at the best of times (see the documentation's figures), so only what is beyond that is a finding.
MOST_ALIKE = 0.9999


def spread(features: Features, kind: str, check: str) -> Diagnostic:
    """Mean cosine between two different rows that have a direction; near 1 the vectors tell no row apart.

    It follows from the length of the rows' mean: |sum of N unit rows|^2 = N + N (N - 1) mean cosine.

    Args:
        kind: of the vectors, embedding or gradient; names the diagnostic.
        check: what to look at where they are alike.
    """
    name, value = f"{kind}_spread", "mean_cosine"
    total, count = np.zeros(features.vectors.shape[1]), 0
    for _, block in features.blocks():
        total += block.sum(axis=0, dtype=np.float64)
        count += int(np.any(block != 0, axis=1).sum())
    if count < 2:
        return Diagnostic.unknown(name, value, f"fewer than two rows have a {kind} with a direction")
    mean = float((total @ total - count) / (count * (count - 1)))
    return Diagnostic.judged(
        name,
        mean > MOST_ALIKE,
        {value: mean},
        f"two rows' {kind}s have a mean cosine of {mean:.4f}"
        + (": they hardly tell the rows apart, and equal scores go by row order" if mean > MOST_ALIKE else ""),
        check,
    )
