"""The representation filter equals a loop over pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.features import vectors as products
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import Scores
from gradsift.selection.repr_filter import repr_filter


def naive(scores: Scores, size: int, vectors: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for row in sorted(range(len(vectors)), key=lambda i: (not vectors[i].any(), -scores.score[i], i)):
        cosines = [round(float(vectors[row].astype(float) @ vectors[other]), 9) for other in kept]
        if len(kept) < size and all(min(cosine, 1) <= threshold for cosine in cosines):
            kept.append(row)
    return kept


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([1, 4, 99])
)
def test_it_is_the_loop_over_pairs(seed: int, count: int, threshold: float, block: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_rows(rng.normal(size=(count, 3)))
    vectors[rng.random(count) < 0.2] = vectors[0]
    vectors[rng.random(count) < 0.1] = 0
    scores = Scores(np.round(rng.normal(size=count), 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_MOST_ROWS", block)
        for size in (1, max(1, count // 2), count):
            chosen = repr_filter(scores, size, Features(vectors), threshold=threshold).positions
            assert chosen.tolist() == naive(scores, size, vectors, threshold)


def test_a_threshold_of_one_lets_even_the_identical_in() -> None:
    vectors = unit_rows(np.full((9, 7), 0.3))
    assert len(repr_filter(Scores(np.zeros(9)), 9, Features(vectors), threshold=1.0).positions) == 9


def test_of_copies_the_best_is_kept_and_the_shortfall_says_what_to_do() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    choice = repr_filter(Scores(np.array([1.0, 2, 3, 4, 5, 6])), 5, Features(vectors), threshold=0.9)
    assert choice.positions.tolist() == [5, 3, 1]
    (said,) = choice.diagnostics
    assert said.values == {"missing": 2, "budget": 5}
    assert "3 of 5 examples" in said.message
    assert "raise selector.threshold" in said.message
