"""The best of every cluster: shares by hand, and well separated clusters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.features import vectors as products
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import Scores
from gradsift.selection import clusters as module
from gradsift.selection.budget import equal_shares, proportional_shares
from gradsift.selection.clusters import clusters


def crowds(*sizes: int) -> np.ndarray:
    """Return `sizes` different rows near each axis."""
    axes = np.repeat(np.eye(len(sizes)), sizes, axis=0)
    return unit_rows(axes + 0.01 * np.random.default_rng(0).random(axes.shape))


def per_crowd(positions: np.ndarray, *sizes: int) -> list[int]:
    return np.bincount(np.repeat(np.arange(len(sizes)), sizes)[positions], minlength=len(sizes)).tolist()


@pytest.mark.parametrize(
    ("allocation", "size", "expected"),
    [
        ("proportional", 10, [6, 3, 1]),  # 6, 3 and 1 exactly
        ("proportional", 4, [3, 1, 0]),  # 2.4, 1.2, 0.4: the largest remainder, first on a tie
        ("equal", 9, [4, 3, 2]),  # 3 each; the last has 2, and what it cannot hold goes to the first
        ("equal", 14, [6, 6, 2]),
        ("equal", 20, [12, 6, 2]),
    ],
)
@pytest.mark.parametrize("seed", range(4))  # that number the clusters in different ways
def test_the_budget_is_shared_out(allocation: str, size: int, expected: list[int], seed: int) -> None:
    scores = Scores(-np.arange(20.0))  # clusters stand in the order of their best, so in that of the crowds
    features = Features(crowds(12, 6, 2))
    choice = clusters(scores, size, features, clusters=3, allocation=allocation, seed=seed)
    assert per_crowd(choice.positions, 12, 6, 2) == expected
    (found,) = choice.diagnostics
    assert found.verdict == "ok"
    assert found.values == {"clusters": 3, "asked": 3}


def test_within_a_cluster_the_best_are_taken() -> None:
    score = np.random.default_rng(1).permutation(20).astype(float)
    choice = clusters(Scores(score), 10, Features(crowds(12, 6, 2)), clusters=3, allocation="proportional", seed=0)
    expected = [
        *np.argsort(-score[:12])[:6],
        *(12 + np.argsort(-score[12:18])[:3]),
        *(18 + np.argsort(-score[18:])[:1]),
    ]
    assert sorted(choice.positions) == sorted(expected)
    assert (np.diff(score[choice.positions]) < 0).all()  # best first


@pytest.mark.parametrize("allocation", ["proportional", "equal"])
def test_at_most_as_many_clusters_as_different_embeddings_with_a_warning(allocation: str) -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), [5, 4, 1], axis=0)
    choice = clusters(Scores(np.arange(10.0)), 6, Features(vectors), clusters=8, allocation=allocation, seed=0)
    assert len(choice.positions) == 6
    (found,) = choice.diagnostics
    assert found.verdict == "warning"
    assert found.values["clusters"] == 3
    assert "selector.clusters=8" in found.message


def test_different_embeddings_are_counted_no_further_than_there_are_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(60, 5)))
    vectors[1::2] = vectors[::2]
    looked_at: list[int] = []

    def noting(features: Features, positions: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        for where, rows in products.blocks(features, positions):
            looked_at.extend(range(where.start, where.stop))
            yield where, rows

    monkeypatch.setattr(module, "blocks", noting)
    monkeypatch.setattr(products, "_MOST_ROWS", 4)
    assert module._different(Features(vectors), np.arange(60), 8) == 8
    assert len(looked_at) == 16  # each vector twice; the other 44 rows are not kept in memory
    assert module._different(Features(vectors), np.arange(60), 31) == 30
    zeros = np.array([[1, 0.0], [1, -0.0]], dtype=np.float32)  # equal, though not their bytes
    assert module._different(Features(zeros), np.arange(2), 8) == 1


def test_the_seed_is_that_of_k_means() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(200, 5)))
    chosen = {
        tuple(
            clusters(Scores(np.arange(200.0)), 20, Features(vectors), clusters=9, allocation="equal", seed=s).positions
        )
        for s in range(4)
    }
    assert len(chosen) > 1


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 50))
def test_equal_shares_are_those_of_giving_one_at_a_time(capacities: list[int], size: int) -> None:
    shares = equal_shares(size, np.array(capacities))
    one_at_a_time = [0] * len(capacities)
    for _ in range(min(size, sum(capacities))):
        room = [i for i, capacity in enumerate(capacities) if one_at_a_time[i] < capacity]
        one_at_a_time[min(room, key=lambda i: (one_at_a_time[i], i))] += 1
    assert shares.tolist() == one_at_a_time


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 50))
def test_proportional_shares_add_up_and_lie_within_one_of_their_quota(weights: list[int], size: int) -> None:
    shares = proportional_shares(size, np.array(weights))
    quotas = size * np.array(weights) / sum(weights)
    assert shares.sum() == size
    assert (np.abs(shares - quotas) < 1).all()


def test_the_largest_remainders_by_hand() -> None:
    assert proportional_shares(10, np.array([0.47, 0.16, 0.158, 0.12, 0.061, 0.031])).tolist() == [5, 2, 1, 1, 1, 0]
    assert proportional_shares(5, np.array([1.0, 1.0])).tolist() == [3, 2]
    assert proportional_shares(3, np.array([0.1, 0.2])).tolist() == [1, 2]  # 0.1 + 0.2 is no 0.3
