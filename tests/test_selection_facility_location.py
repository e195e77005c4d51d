"""Facility location equals the naive greedy, and the greedy is within its bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import Scores
from gradsift.selection import facility_location as module
from gradsift.selection.facility_location import facility_location

pytestmark = pytest.mark.numerics


def similarity_of(kind: str, x: np.ndarray, y: np.ndarray) -> float:
    """Return the similarity of two vectors by its definition."""
    x, y = x.astype(float), y.astype(float)
    if not x.any() or not y.any():
        return 0.0
    if kind == "cosine":
        return max(0.0, sum(a * b for a, b in zip(x, y, strict=True)))
    return math.exp(-math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True))) / len(x))


def value(near: np.ndarray, chosen: tuple[int, ...]) -> float:
    """Return f(S) for similarities (n, n)."""
    return float(near[:, list(chosen)].max(1).sum()) if chosen else 0.0


def naive(scores: Scores, size: int, vectors: np.ndarray, kind: str, share: float) -> list[int]:
    """Recompute every gain for every pick."""
    return naive_cover(scores, size, vectors, kind, share)[0]


def naive_cover(scores: Scores, size: int, vectors: np.ndarray, kind: str, share: float) -> tuple[list[int], float]:
    """Return the picks, and the candidates' mean similarity to the nearest pick."""
    ground = sorted(range(len(vectors)), key=lambda i: (not vectors[i].any(), -scores.score[i], i))
    ground = ground[: round(share * len(vectors))]
    near = np.array([[similarity_of(kind, vectors[i], vectors[j]) for j in ground] for i in ground])
    chosen: tuple[int, ...] = ()
    for _ in range(min(size, len(ground))):
        left = [place for place in range(len(ground)) if place not in chosen]
        gains = [round(value(near, (*chosen, place)) - value(near, chosen), 9) for place in left]
        chosen = (*chosen, left[gains.index(max(gains))])
    return [ground[place] for place in chosen], value(near, chosen) / len(ground)


def pool(seed: int, count: int, dimensions: int) -> tuple[Scores, np.ndarray]:
    """With ties among scores and embeddings, and embeddings of zero."""
    rng = np.random.default_rng(seed)
    vectors = unit_rows(rng.normal(size=(count, dimensions)))
    if rng.random() < 0.5:  # few different similarities, so that gains tie
        vectors = unit_rows(rng.integers(0, 2, (count, dimensions)).astype(float))
    vectors[rng.random(count) < 0.2] = vectors[0]
    vectors[rng.random(count) < 0.1] = 0
    return Scores(np.round(rng.normal(size=count), 1)), vectors


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 18),
    st.integers(2, 5),
    st.sampled_from(["cosine", "exp_distance"]),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([1, 16]),
)
def test_the_lazy_greedy_is_the_naive_greedy(
    seed: int, count: int, dimensions: int, kind: str, share: float, batch: int
) -> None:
    """However few gains are computed together, also with many ties."""
    count *= 2
    scores, vectors = pool(seed, count, dimensions)
    size = max(1, count // 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FIRST_BATCH", batch)
        choice = facility_location(scores, size, Features(vectors), similarity=kind, candidates=share)
    picks, covered = naive_cover(scores, size, vectors, kind, share)
    assert choice.positions.tolist() == picks
    assert choice.diagnostics[0].values["mean_similarity"] == pytest.approx(covered, abs=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "exp_distance"])
def test_the_lazy_greedy_is_the_naive_greedy_beyond_one_batch(kind: str) -> None:
    scores, vectors = pool(3, 90, 8)
    chosen = facility_location(scores, 20, Features(vectors), similarity=kind, candidates=1.0).positions
    assert chosen.tolist() == naive(scores, 20, vectors, kind, 1.0)


def test_a_bound_that_ties_with_a_gain_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by search: here an old bound equals the largest gain, the example comes first, and its gain is smaller."""
    monkeypatch.setattr(module, "_FIRST_BATCH", 1)
    rows = ["0001", "1000", "1111", "0000", "0000", "0100", "0000", "0100", "0100", "0110", "0111"]
    vectors = unit_rows(np.array([[float(bit) for bit in row] for row in rows]))
    scores = Scores(np.zeros(len(rows)))
    chosen = facility_location(scores, 5, Features(vectors), similarity="cosine", candidates=1.0).positions
    assert chosen.tolist() == naive(scores, 5, vectors, "cosine", 1.0) == [2, 5, 0, 1, 9]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from(["cosine", "exp_distance"]))
def test_the_greedy_reaches_its_share_of_the_best(seed: int, count: int, kind: str) -> None:
    """f(greedy) >= (1 - 1/e) f(S) for every S of the size (Nemhauser, Wolsey and Fisher, 1978)."""
    scores, vectors = pool(seed, count, 3)
    near = np.array([[similarity_of(kind, x, y) for y in vectors] for x in vectors])
    for size in range(1, min(count, 4) + 1):
        chosen = facility_location(scores, size, Features(vectors), similarity=kind, candidates=1.0).positions
        best = max(value(near, others) for others in itertools.combinations(range(count), size))
        assert value(near, tuple(chosen)) >= (1 - 1 / math.e) * best - 1e-9


def test_only_the_best_by_score_enter() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(20, 4)))
    scores = Scores(np.arange(20.0))
    chosen = facility_location(scores, 5, Features(vectors), similarity="cosine", candidates=0.25).positions
    assert sorted(chosen.tolist()) == [15, 16, 17, 18, 19]


def test_one_of_each_of_two_crowds_is_taken_before_a_second_of_either() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), [10, 5, 1], axis=0)
    choice = facility_location(Scores(np.arange(16.0)), 4, Features(vectors), similarity="cosine", candidates=1.0)
    assert choice.positions.tolist() == [9, 14, 15, 13]  # the larger crowd first; then all is covered: by score
    (told,) = choice.diagnostics
    assert told.name == "facility_location"  # beside the selection's `coverage`, which compares with random rows
    assert told.values == {"mean_similarity": 1.0, "candidates": 16}


def test_fewer_candidates_than_the_budget_is_refused() -> None:
    vectors = Features(np.eye(10, dtype=np.float32))
    with pytest.raises(ConfigError, match=r"selector.candidates=0.29 gives 2 cand.* budget is 3.*lower alpha"):
        facility_location(Scores(np.arange(10.0)), 3, vectors, similarity="cosine", candidates=0.29)
