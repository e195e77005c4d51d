"""Laws of scores from gradient directions: LESS, G2IS, and the direction-aware variant of GRADFILTERING."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SMOKE
from sklearn.decomposition import PCA
from test_config import composed

from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import Features, unit_rows
from gradsift.gradients.statistics import Statistics
from gradsift.scoring.g2is import g2is
from gradsift.scoring.gsnr_direction import gsnr_direction, shares_not_above
from gradsift.scoring.less import less
from gradsift.scoring.scores import NO_RESPONSE
from gradsift.scoring.similarity import agreement, spread

pytestmark = pytest.mark.numerics

TASKS = ("a",) * 4 + ("b",) * 3


def features(rows: int, tasks: tuple[str, ...] = (), seed: int = 0, silent: tuple[int, ...] = ()) -> Features:
    return Features(unit_rows(np.random.default_rng(seed).standard_normal((rows, 6))), tasks, silent)


# ----------------------------------------------------------------------------------------------- LESS


def test_less_is_the_best_tasks_mean_over_pairs() -> None:
    pool, target = features(30), features(7, TASKS, seed=1)
    expected = []
    for row in pool.vectors:
        by_task: dict[str, list[float]] = {}
        for other, task in zip(target.vectors, TASKS, strict=True):
            by_task.setdefault(task, []).append(sum(float(x) * float(y) for x, y in zip(row, other, strict=True)))
        expected.append({task: np.mean(values) for task, values in by_task.items()})
    scores = less(pool, target)
    np.testing.assert_allclose(scores.score, [max(each.values()) for each in expected], atol=1e-6)
    np.testing.assert_allclose(scores.parts["task:b"], [each["b"] for each in expected], atol=1e-6)
    assert list(scores.parts) == ["task:a", "task:b"]
    assert (scores.score == scores.parts["task:a"]).any()
    assert (scores.score == scores.parts["task:b"]).any()


def test_gradients_of_zero_agree_with_nothing() -> None:
    found = agreement(Features(np.zeros((3, 6), np.float32)), features(2).vectors)
    assert found.tolist() == [[0.0, 0.0]] * 3


def test_equal_gradients_tie_wherever_they_stand() -> None:
    """Also if the unrounded product depends on the place in a block (measured: 64 dimensions, one task)."""
    rng, places = np.random.default_rng(0), [5, 11, 1023, 1024, 1999, 2999, 3000]
    vectors = unit_rows(rng.standard_normal((3001, 64)))
    vectors[places] = vectors[11]
    for tasks in (("a",) * 7, TASKS):
        scores = less(Features(vectors), Features(unit_rows(rng.standard_normal((7, 64))), tasks))
        assert len(set(scores.score[places].tolist())) == 1


def test_gradients_that_do_not_separate_the_rows_give_a_warning() -> None:
    alike = Features(np.repeat(features(1).vectors, 9, axis=0))
    found = {each.name: each.verdict for each in less(alike, features(7, TASKS, seed=1)).diagnostics}
    assert found["gradient_spread"] == "warning"
    found = {each.name: each.verdict for each in less(features(9), features(7, TASKS, seed=1)).diagnostics}
    assert found["gradient_spread"] == "ok"


def test_the_lengths_of_gradients_do_not_count_as_likeness() -> None:
    directions, lengths = features(9).vectors, np.geomspace(0.1, 100, 9, dtype=np.float32)[:, None]
    cosines = [directions[i] @ directions[j] for i in range(9) for j in range(9) if i != j]
    scaled = spread(Features(directions * lengths), "gradient", "")
    assert scaled.values["mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)


def test_target_rows_without_a_gradient_are_not_averaged() -> None:
    pool, target = features(5), features(7, TASKS, seed=1)
    target.vectors[[0, 5]] = 0
    rest = Features(np.delete(target.vectors, [0, 5], axis=0), tuple(np.delete(TASKS, [0, 5])))
    np.testing.assert_allclose(less(pool, target).score, less(pool, rest).score, atol=1e-8)  # rounded to nine decimals


def test_a_task_without_any_gradient_is_left_out_and_said() -> None:
    pool, target = features(5), features(7, TASKS, seed=1)
    target.vectors[4:] = 0
    scores = less(pool, target)
    assert list(scores.parts) == ["task:a"]
    (diagnostic,) = (each for each in scores.diagnostics if each.name == "target_tasks")
    assert (diagnostic.verdict, diagnostic.values) == ("warning", {"tasks_without_gradient": 1})
    assert "no row of b has a gradient" in diagnostic.message


@pytest.mark.parametrize("scorer", [less, lambda pool, target: g2is(pool, target, explained=0.5)])
def test_a_target_set_of_zeros_is_refused(scorer: Callable[..., object]) -> None:
    target = Features(np.zeros((7, 6), dtype=np.float32), TASKS)
    with pytest.raises(GradsiftError, match="every gradient of the target set is zero"):
        scorer(features(5), target)


@pytest.mark.parametrize("scorer", [less, lambda pool, target: g2is(pool, target, explained=0.5)])
def test_rows_of_zeros_have_no_score_and_a_reason(scorer: Callable[..., object]) -> None:
    pool = features(5, silent=(2,))
    pool.vectors[[1, 2]] = 0
    scores = scorer(pool, features(7, TASKS, seed=1))
    assert scores.status.tolist() == ["scored", "undefined", "undefined", "scored", "scored"]
    assert scores.reason.tolist()[1:3] == ["the gradient is zero, so it has no direction", NO_RESPONSE]
    assert np.isnan(scores.score).tolist() == [False, True, True, False, False]


# ----------------------------------------------------------------------------------------------- G2IS


@pytest.mark.parametrize(("explained", "count"), [(0.2, 1), (0.5, 2), (1.0, 6)])
def test_g2is_weighs_projections_on_the_principal_components(explained: float, count: int) -> None:
    pool, target = features(20), features(7, TASKS, seed=1)
    pca = PCA().fit(target.vectors.astype(np.float64))
    signs = np.sign(pca.components_ @ target.vectors.mean(0))
    shares = pca.explained_variance_ratio_
    total = np.zeros(20)
    for k in range(count):
        total += shares[k] * (pool.vectors @ pca.components_[k]) * signs[k]
    scores = g2is(pool, target, explained=explained)
    assert list(scores.parts) == [f"component:{k}" for k in range(count)]
    np.testing.assert_allclose(scores.score, total / shares[:count].sum(), atol=1e-6)


# ----------------------------------------------------------------------------- direction-aware G-SNR


def statistics(count: int = 6, seed: int = 0) -> Statistics:
    rng = np.random.default_rng(seed)
    return Statistics(*(rng.random(count) for _ in range(6)))


def test_the_cosine_is_the_members_mean() -> None:
    cosines = np.random.default_rng(1).uniform(-1, 1, (3, 6))
    scores = gsnr_direction(statistics(), cosines, weigh="none", eps=1e-8)
    np.testing.assert_allclose(scores.score, cosines.mean(0))
    np.testing.assert_allclose(scores.parts["cosine_deviation"], cosines.std(0))


def test_the_weight_is_the_rank_of_the_gsnr() -> None:
    found, cosines = statistics(), np.random.default_rng(1).uniform(-1, 1, (3, 6))
    scores = gsnr_direction(found, cosines, weigh="gsnr", eps=1e-8)
    ratio = (found.G_s - found.G_t) / (found.G_s + 1e-8) / (found.V_t + 1e-8)
    for i in range(6):
        rank = sum(other <= ratio[i] for other in ratio) / 6
        assert scores.score[i] == pytest.approx(rank * cosines[:, i].mean())
    assert list(scores.parts) == ["cosine", "cosine_deviation", "gsnr", "gsnr_rank"]
    np.testing.assert_allclose(scores.parts["gsnr"], ratio)
    np.testing.assert_allclose(scores.parts["cosine"] * scores.parts["gsnr_rank"], scores.score)
    assert (ratio < 0).any()  # a product of two negatives would have been a high score
    assert shares_not_above(np.array([3.0, np.nan, 1.0, 3.0])).tolist() == pytest.approx(
        [1, np.nan, 1 / 3, 1], nan_ok=True
    )


def test_members_without_a_gradient_are_left_out_and_examples_without_any_are_undefined() -> None:
    found = statistics()
    cosines = np.random.default_rng(1).uniform(-1, 1, (3, 6))
    cosines[0, 1], cosines[:, 2], cosines[:, 3] = np.nan, np.nan, np.nan
    for column in (found.G_s, found.G_t, found.V_t):
        column[3] = np.nan
    scores = gsnr_direction(found, cosines, weigh="none", eps=1e-8)
    assert scores.score[1] == pytest.approx(cosines[1:, 1].mean())
    assert scores.parts["cosine_deviation"][1] == pytest.approx(cosines[1:, 1].std())
    assert scores.status.tolist() == ["scored", "scored", "undefined", "undefined", "scored", "scored"]
    assert scores.reason.tolist()[2:4] == ["the gradient is zero, so it has no direction", NO_RESPONSE]


# -------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["features.dimensions=0"], r"features\.dimensions=0 is out of range"),
        (["features.checkpoints=first"], "choose one of: all, last"),
        (["features.gradient_params=head"], "choose one of: lora, full"),
        (["features.gradient_params=full"], r"give features\.adam=false"),
        (["features.warmup.rows=10"], r"either features\.warmup\.share or features\.warmup\.rows"),
        (["features.warmup.share=null"], r"either features\.warmup\.share or features\.warmup\.rows"),
        (["features.warmup.share=1.5"], r"features\.warmup\.share=1.5 is out of range"),
        (["features=g2is", "features.warmup.rows=0"], r"features\.warmup\.rows=0 is out of range"),
        (["features.warmup.epochs=0"], r"features\.warmup\.epochs=0 is out of range"),
        (["features.warmup.warmup_ratio=1"], r"features\.warmup\.warmup_ratio=1.0 is out of range"),
        (["features.warmup.schedule=square"], "choose one of: constant, linear, cosine"),
        (["features.warmup.learning_rate=0"], r"features\.warmup\.learning_rate=0.0 is out of range"),
        (["scorer=g2is", "scorer.explained=0"], r"scorer\.explained=0.0 is out of range"),
        (["scorer=gsnr_direction", "scorer.weigh=loss"], "choose one of: none, gsnr"),
        (["scorer=gsnr_direction", "scorer.weigh=gsnr", "proxy.members=1"], "divides by a variance over members"),
    ],
)
def test_values_that_cannot_be_used_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*overrides)


def test_the_shipped_features_are_the_published_ones() -> None:
    config = composed("features=less").features
    warmup = config.warmup
    assert (warmup.share, warmup.epochs, warmup.learning_rate, warmup.warmup_ratio) == (0.05, 4, 2e-5, 0.03)
    assert (warmup.lora.rank, warmup.lora.alpha, warmup.lora.dropout) == (128, 512, 0.1)
    assert (config.dimensions, config.checkpoints, config.adam) == (8192, "all", True)
    assert (composed("features=g2is").features.warmup.share, composed("features=g2is").features.warmup.rows) == (
        None,
        5000,
    )
    assert composed("scorer=gsnr_direction", "proxy.members=1").proxy.members == 1


# --------------------------------------------------------------------------------------- command line


def test_methods_that_select_towards_a_target_share_their_features(gradsift) -> None:
    options = ("target_set=verifiable", "target_set.limit=2", "features.dimensions=32", "features.warmup.epochs=2")
    methods = ("scorer=less,g2is", "selector=topk,gradient_walk")
    assert gradsift("-m", *SMOKE, *methods, *options, "stop_after=selection") == 0
    runs = gradsift.runs()
    made = [[stage["name"] for stage in run["stages"] if not stage["reused"]] for run in runs]
    assert (made[0].count("warmup"), made[0].count("features"), made[0].count("member")) == (2, 2, 0)
    assert made[1:] == [["select"], ["score", "select"], ["select"]]
    assert [run["selection"]["rows"] for run in runs[::2]] == [12, 12]
    (less_table,) = gradsift.store.glob("score/less-*/scores.parquet")
    assert {"task:sort", "task:reverse"} <= set(pq.read_table(less_table).column_names)


def test_the_direction_of_the_pool_runs_without_features(after_smoke) -> None:
    assert after_smoke(*SMOKE, "scorer=gsnr_direction", "scorer.weigh=gsnr", "stop_after=selection") == 0
    made = [stage["name"] for stage in after_smoke.runs()[-1]["stages"] if not stage["reused"]]
    assert made == ["direction", "direction", "score", "select"]  # from gsnr's members


@pytest.mark.slow  # test_gradient_features has the law without the command line
def test_the_direction_of_the_pool_is_that_of_the_one_adapter_which_all_members_of_mc_dropout_share(gradsift) -> None:
    dropping = ("proxy.ensemble=mc_dropout", "proxy.lora.dropout=0.1")
    assert gradsift(*SMOKE, "scorer=gsnr_direction", *dropping, "stop_after=selection") == 0
    made = [stage["name"] for stage in gradsift.runs()[-1]["stages"] if not stage["reused"]]
    assert (made.count("member"), made.count("norms"), made.count("direction")) == (2, 4, 1)


def test_without_a_target_set_less_stops_before_it_trains(gradsift, capsys) -> None:
    assert gradsift(*SMOKE, "scorer=less", "stop_after=selection") == 2
    assert "target_set=none, and scorer=less selects towards a target set" in capsys.readouterr().err
    assert not (gradsift.store / "warmup").exists()


def test_the_embedded_worlds_features_are_refused_for_other_models(gradsift, capsys) -> None:
    options = ("proxy=tiny_bytes", "target_set=verifiable", "stop_after=selection")
    assert gradsift(*SMOKE, "scorer=less", *options) == 2
    assert "choose features=less or features=g2is" in capsys.readouterr().err
    assert gradsift(*SMOKE, "scorer=less", "target_set=verifiable", "features.warmup.share=0.001") == 2
    assert "of 120 rows is less than one row" in capsys.readouterr().err
