"""Laws of the score table, of G-SNR and of its ablations; worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.errors import GradsiftError
from gradsift.gradients.statistics import Statistics, mean_and_variance, norm_of
from gradsift.scoring.full import full
from gradsift.scoring.gsnr import gsnr, gsnr_normalized_drop, gsnr_raw_drop, gsnr_variance_normalized
from gradsift.scoring.late_loss import late_loss
from gradsift.scoring.random import random
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores, read_scores, write_scores

pytestmark = pytest.mark.numerics


def by_hand() -> Statistics:
    """Three examples: a falling norm, a rising one, and one without a response token."""
    return Statistics(
        G_s=np.array([4.0, 1.0, np.nan]),
        G_t=np.array([1.0, 2.0, np.nan]),
        V_s=np.array([0.0, 0.0, np.nan]),
        V_t=np.array([0.5, 0.25, np.nan]),
        loss_s=np.array([2.0, 2.0, np.nan]),
        loss_t=np.array([1.0, 3.0, np.nan]),
    )


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (gsnr, [3 / 4.5 / 1.0, -1 / 1.5 / 0.75]),
        (gsnr_raw_drop, [3.0, -1.0]),
        (gsnr_normalized_drop, [3 / 4.5, -1 / 1.5]),
        (gsnr_variance_normalized, [3 / 1.0, -1 / 0.75]),
    ],
)
def test_gsnr_and_its_ablations_by_hand(scorer, expected) -> None:  # eps = 0.5
    scores = scorer(by_hand(), eps=0.5)
    np.testing.assert_allclose(scores.score[:2], expected, rtol=1e-12)
    assert scores.status.tolist() == [SCORED, SCORED, UNDEFINED]
    assert "no response token" in scores.reason[2]
    assert scores.parts["drop"][:2].tolist() == [3.0, -1.0]


def test_the_variance_is_the_populations() -> None:
    mean, variance = mean_and_variance(lambda: np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]]))
    np.testing.assert_allclose(mean, [3.0, 1.0])
    np.testing.assert_allclose(variance, [8 / 3, 2.0])


@pytest.mark.parametrize(("scope", "expected"), [("all", 5.0), ("A", 3.0), ("B", 4.0), ("scaled", 4.272001872658765)])
def test_norm_scope(scope: str, expected: float) -> None:
    columns = {"norm_A": np.array([3.0], np.float32), "norm_B": np.array([4.0], np.float32)}
    assert norm_of(columns, scope, 1.0, 2.0).tolist() == [expected]  # scaled: 3 over 2 and 4 over 1


def test_an_adapter_that_is_zero_cannot_scale_a_norm() -> None:
    columns = {"norm_A": np.array([3.0], np.float32), "norm_B": np.array([4.0], np.float32)}
    with pytest.raises(GradsiftError, match="scaled"):
        norm_of(columns, "scaled", 1.0, 0.0)


def test_late_loss_prefers_what_the_ensemble_fits() -> None:
    scores = late_loss(np.array([2.0, 0.5, np.nan]))
    assert scores.score[:2].tolist() == [-2.0, -0.5]
    assert scores.status.tolist() == [SCORED, SCORED, UNDEFINED]


def test_random_is_seeded_and_full_keeps_all() -> None:
    assert np.array_equal(random(9, seed=1).score, random(9, seed=1).score)
    assert not np.array_equal(random(9, seed=1).score, random(9, seed=2).score)
    assert full(4).status.tolist() == [SCORED] * 4


def test_a_score_that_is_not_finite_stops_and_names_its_row() -> None:
    scores = Scores(np.array([1.0, np.inf, np.nan, np.nan]))
    scores.mark(np.array([False, False, False, True]), UNDEFINED, "none")
    with pytest.raises(GradsiftError, match="2 scores are NaN or infinite, the first at row 11, 12"):
        scores.require_finite(lambda: [10, 11, 12, 13])


def test_the_first_status_of_an_example_stays() -> None:
    scores = Scores(np.array([1.0, 2.0]))
    scores.mark(np.array([True, False]), UNDEFINED, "first")
    scores.mark(np.array([True, True]), EXCLUDED, "second")
    assert scores.reason.tolist() == ["first", "second"]


def test_scores_survive_the_disk(tmp_path) -> None:
    scores = Scores(np.array([1.5, np.nan]), {"ifd": np.array([0.5, np.nan])})
    scores.mark(np.isnan(scores.score), UNDEFINED, "why")
    write_scores(tmp_path / "scores.parquet", scores, [["a-0"], ["b-0"]])
    again = read_scores(tmp_path / "scores.parquet")
    assert list(again.parts) == ["ifd"]
    np.testing.assert_array_equal(again.score, scores.score)
    np.testing.assert_array_equal(again.parts["ifd"], scores.parts["ifd"])
    assert again.status.tolist() == scores.status.tolist()
    assert again.reason.tolist() == ["", "why"]
