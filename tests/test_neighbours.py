"""Laws of cosines: blocks give the values of the full matrix, and a zero vector is no row's neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.features import vectors as module
from gradsift.features.vectors import (
    Features,
    mean_cosines,
    nearest_anchor_cosines,
    nearest_cosines,
    row_blocks,
    unit_rows,
)
from gradsift.selection.checks import coverage

pytestmark = pytest.mark.numerics

HAND = Features(unit_rows(np.array([[1, 0], [0, 2], [3, 4], [0, 0], [1, 0]], dtype=np.float32)))


def some_features(rows: int = 23, zero: tuple[int, ...] = (4, 11)) -> Features:
    vectors = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
    vectors[list(zero)] = 0
    return Features(unit_rows(vectors))


def test_cosines_by_hand() -> None:
    nan = np.nan
    np.testing.assert_allclose(nearest_cosines(HAND, 1), [1, 0.8, 0.8, nan, 1], atol=1e-6)
    np.testing.assert_allclose(nearest_cosines(HAND, 2), [0.8, 0.4, 0.7, nan, 0.8], atol=1e-6)
    np.testing.assert_allclose(mean_cosines(HAND), [1.6 / 3, 0.8 / 3, 2 / 3, nan, 1.6 / 3], atol=1e-6)
    np.testing.assert_allclose(nearest_anchor_cosines(HAND, np.array([1, 3])), [0, 1, 0.8, nan, 0], atol=1e-6)


@pytest.mark.parametrize("block", [1, 300, 10**6])
@pytest.mark.parametrize("neighbours", [1, 3, 20])
def test_blocks_change_nothing(block: int, neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "__defaults__", (block,))
    features, done = some_features(), []
    usable = [i for i in range(23) if i not in (4, 11)]
    cosines = features.vectors.astype(float) @ features.vectors.T.astype(float)
    near, mean = np.full(23, np.nan), np.full(23, np.nan)
    for i in usable:
        others = sorted(cosines[i, j] for j in usable if j != i)
        near[i], mean[i] = np.mean(others[-neighbours:]), np.mean(others)
    np.testing.assert_allclose(nearest_cosines(features, neighbours, done.append), near, atol=1e-6)
    np.testing.assert_allclose(mean_cosines(features), mean, atol=1e-6)
    anchors = np.array([7, 2, 4])
    expected = np.where(np.isnan(mean), np.nan, cosines[:, anchors[:2]].max(1))
    np.testing.assert_allclose(nearest_anchor_cosines(features, anchors), expected, atol=1e-6)
    assert sum(done) == 23
    assert (len(done) > 1) is (block < 10**6)


def test_too_few_others_are_no_neighbours() -> None:
    features = some_features(3, zero=(1,))
    assert np.isnan(nearest_cosines(features, 2)).all()
    assert np.isfinite(nearest_cosines(features, 1)[[0, 2]]).all()
    alone = some_features(2, zero=(1,))
    assert np.isnan(mean_cosines(alone)).all()
    assert np.isnan(nearest_anchor_cosines(alone, np.array([1]))).all()


def test_all_rows_with_a_copy_have_the_same_nearest_cosine() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(40, 33)).astype(np.float32))
    copied = np.concatenate([vectors, vectors[:30]])
    nearest = nearest_cosines(Features(copied), 1)
    assert set(nearest[np.r_[:30, 40:70]]) == {1.0}
    assert nearest[30:40].max() < 1


def test_blocks_hold_every_row_once() -> None:
    assert [(b.start, b.stop) for b in row_blocks(7, 10, 35)] == [(0, 3), (3, 6), (6, 7)]
    assert [(b.start, b.stop) for b in row_blocks(2, 10, 1)] == [(0, 1), (1, 2)]
    assert list(row_blocks(0, 10)) == []
    assert module._BLOCK_BYTES > 0


def test_the_rows_with_a_direction_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, reads, blocks = some_features(), [], Features.blocks
    monkeypatch.setattr(Features, "blocks", lambda self: reads.append(1) or blocks(self))
    found = features.has_direction
    assert np.flatnonzero(~found).tolist() == [4, 11]
    assert features.has_direction is found and len(reads) == 1
    with pytest.raises(ValueError, match="read-only"):  # it serves every caller
        found[0] = False
    assert len(Features(np.zeros((0, 3), dtype=np.float32)).has_direction) == 0


# ------------------------------------------------------------------------------------------ coverage


def clusters() -> Features:
    """Return thirty noisy copies of each of ten orthogonal directions."""
    rng = np.random.default_rng(1)
    return Features(unit_rows((np.repeat(np.eye(10), 30, 0) + 0.02 * rng.normal(size=(300, 10))).astype(np.float32)))


def test_coverage_by_hand() -> None:
    found = coverage(HAND, np.array([1]), radius=0.2)  # distances 1, 0, .2, -, 1
    assert found.values["distance"] == pytest.approx(2.2 / 4, abs=1e-6)
    assert found.values["covered"] == 0.5
    drawn = np.random.default_rng(0).choice([0, 1, 2, 4], 1)[0]
    distance = {0: (0 + 1 + 0.4 + 0) / 4, 1: 2.2 / 4, 2: (0.4 + 0.2 + 0 + 0.4) / 4, 4: 1.4 / 4}[int(drawn)]
    assert found.values["random_distance"] == pytest.approx(distance, abs=1e-6)
    assert found.values["distance_to_random"] == pytest.approx(0.55 / distance, abs=1e-5)


def test_a_selection_of_one_corner_is_warned_of_and_one_of_everything_is_not() -> None:
    corner = coverage(clusters(), np.arange(20), radius=0.1)
    assert corner.verdict == "warning"
    assert corner.values["covered"] == pytest.approx(0.1)
    assert corner.values["covered_randomly"] > 0.6
    spread = coverage(clusters(), np.arange(0, 300, 15), radius=0.1)
    assert spread.verdict == "ok"
    assert spread.values["covered"] == 1
    assert spread.values["distance_to_random"] < 1


def test_a_pool_of_copies_is_covered_by_anything() -> None:
    copies = Features(np.tile(np.float32([0.6, 0.8]), (6, 1)))
    found = coverage(copies, np.array([2]), radius=0.0)
    assert (found.verdict, found.values["covered"], found.values["distance_to_random"]) == ("ok", 1.0, 1.0)


def test_a_selection_without_direction_is_not_judged() -> None:
    assert coverage(HAND, np.array([3]), radius=0.2).verdict == "unknown"
