"""Gumbel-top-k is sequential sampling without replacement."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from gradsift.scoring.scores import EXCLUDED, Scores
from gradsift.selection.gumbel import gumbel

DRAWS = 8000


def probability(order: tuple[int, ...], weights: np.ndarray) -> float:
    """Return the probability of drawing `order` in sequence, each in proportion to its weight among the rest."""
    left, found = weights.sum(), 1.0
    for row in order:
        found *= weights[row] / left
        left -= weights[row]
    return found


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_have_the_probabilities_of_sequential_sampling(temperature: float) -> None:
    score = np.array([3.0, -1.0, 0.5, 99.0, 1.0])
    scores = Scores(score)
    scores.mark(score == 99, EXCLUDED, "no")
    rows = [0, 1, 2, 4]
    z = (score[rows] - score[rows].mean()) / score[rows].std()
    weights = np.zeros(5)
    weights[rows] = np.exp(z / temperature)
    drawn = Counter(
        tuple(gumbel(scores, 2, temperature=temperature, seed=seed).positions.tolist()) for seed in range(DRAWS)
    )
    for order in itertools.permutations(rows, 2):
        expected = DRAWS * probability(order, weights)
        assert abs(drawn[order] - expected) <= 4 * np.sqrt(expected) + 1
    assert sum(drawn.values()) == DRAWS


def test_a_low_temperature_is_the_top_k_and_a_high_one_is_not() -> None:
    scores = Scores(np.arange(50.0))
    assert gumbel(scores, 10, temperature=1e-6, seed=0).positions.tolist() == list(range(49, 39, -1))
    assert set(gumbel(scores, 10, temperature=1e6, seed=0).positions) & set(range(30))


def test_scale_and_shift_of_the_score_change_nothing_and_equal_scores_are_a_uniform_draw() -> None:
    values = np.random.default_rng(0).normal(size=30)
    drawn = [gumbel(Scores(v), 9, temperature=1.0, seed=1).positions.tolist() for v in (values, 1000 * values + 7)]
    assert drawn[0] == drawn[1]
    firsts = [int(gumbel(Scores(np.full(4, 0.1)), 1, temperature=0.1, seed=seed).positions[0]) for seed in range(400)]
    assert min(Counter(firsts).values()) > 60
