"""RDS+ and Sentence-BERT scores: worked out by hand, against slow loops, and through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SMOKE

from gradsift.errors import GradsiftError
from gradsift.features import vectors as products_module
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import SCORED, UNDEFINED
from gradsift.scoring.similarity import rds_plus, sbert, spread
from gradsift.selection.topk import topk

pytestmark = pytest.mark.numerics


def features(rows: Any, tasks: str = "") -> Features:
    return Features(np.array(rows, dtype=np.float32), tuple(tasks))


POOL = [[1, 0], [0, 1], [0.6, 0.8], [0, 0], [-1, 0]]
TARGETS = features([[1, 0], [0.8, 0.6], [0, 1]], "aba")  # tasks a: (1, 0), (0, 1); b: (.8, .6)


def random_features(count: int, tasks: int = 0, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    rows = unit_rows(rng.normal(size=(count, 7)).astype(np.float32))
    return Features(rows, tuple(f"t{place % tasks}" for place in range(count)) if tasks else ())


# ------------------------------------------------------------------------------------------ by hand


def test_rds_plus_by_hand() -> None:
    scores = rds_plus(features(POOL), TARGETS)
    np.testing.assert_allclose(scores.parts["task:a"], [1, 1, 0.8, np.nan, 0], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["task:b"], [0.8, 0.6, 0.96, np.nan, -0.8], rtol=1e-6)
    np.testing.assert_allclose(scores.score, [1, 1, 0.96, np.nan, 0], rtol=1e-6)


def test_sbert_by_hand() -> None:
    scores = sbert(features(POOL), TARGETS, over="mean")
    np.testing.assert_allclose(scores.parts["task:a"], [0.5, 0.5, 0.7, np.nan, -0.5], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["task:b"], [0.8, 0.6, 0.96, np.nan, -0.8], rtol=1e-6)
    np.testing.assert_allclose(scores.score, [1.8 / 3, 1.6 / 3, 2.36 / 3, np.nan, -1.8 / 3], rtol=1e-6)
    largest = sbert(features(POOL), TARGETS, over="max")
    np.testing.assert_allclose(largest.score, [1, 1, 0.96, np.nan, 0], rtol=1e-6)


def test_a_row_of_zeros_is_undefined_with_its_reason() -> None:
    scores = rds_plus(features(POOL), TARGETS)
    assert scores.status.tolist() == [SCORED, SCORED, SCORED, UNDEFINED, SCORED]
    assert "the text is empty" in scores.reason[3]


# -------------------------------------------------------------------------------------- against loops


@pytest.mark.parametrize("over", ["mean", "max"])
def test_blocks_change_nothing(over: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, targets = random_features(53), random_features(11, tasks=3, seed=1)
    monkeypatch.setattr(products_module, "_MOST_ROWS", 20)
    scores = sbert(pool, targets, over=over)
    reduce = np.mean if over == "mean" else np.max
    for row in range(53):
        cosines = [float(pool.vectors[row].astype(float) @ target.astype(float)) for target in targets.vectors]
        assert scores.score[row] == pytest.approx(reduce(cosines), abs=1e-6)
        for task in range(3):
            assert scores.parts[f"task:t{task}"][row] == pytest.approx(reduce(cosines[task::3]), abs=1e-6)


def test_the_mean_cosine_ranks_as_the_cosine_to_the_targets_mean() -> None:
    pool, targets = random_features(40), random_features(9, tasks=2, seed=1)
    scores = sbert(pool, targets, over="mean")
    center = targets.vectors.mean(axis=0, dtype=np.float64)
    cosine = pool.vectors.astype(np.float64) @ center / np.linalg.norm(center)
    np.testing.assert_allclose(scores.score, cosine * np.linalg.norm(center), atol=1e-6)
    assert (np.diff(np.sort(cosine)) > 1e-5).all()  # or rounding could exchange two of them
    assert np.argsort(scores.score).tolist() == np.argsort(cosine).tolist()


def test_equal_rows_tie_in_any_block_and_go_by_row_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "_MOST_ROWS", 11)
    rows = np.tile(random_features(1).vectors, (23, 1))
    scores = rds_plus(Features(rows), random_features(11, tasks=2, seed=1))
    assert len(set(scores.score.tolist())) == 1
    assert topk(scores, 4).positions.tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------- diagnostics


def verdicts(scores: Any) -> dict[str, str]:
    return {diagnostic.name: diagnostic.verdict for diagnostic in scores.diagnostics}


@pytest.mark.parametrize("count", [3, 12])
def test_spread_is_the_mean_cosine_of_different_rows(count: int) -> None:
    rows = random_features(count).vectors.copy()
    rows[1] = 0  # has no direction, so no cosine
    known = np.delete(rows, 1, axis=0).astype(np.float64)
    slow = np.mean([known[i] @ known[j] for i in range(count - 1) for j in range(count - 1) if i != j])
    assert spread(Features(rows), "embedding", "them").values["mean_cosine"] == pytest.approx(slow, abs=1e-6)


def test_embeddings_that_do_not_separate_the_rows_give_a_warning() -> None:
    targets = random_features(3, tasks=1, seed=1)
    alike = rds_plus(Features(np.tile(random_features(1).vectors, (9, 1))), targets)
    assert verdicts(alike) == {"embedding_spread": "warning"}
    assert "almost equal, and rows with equal scores are ranked in row order" in alike.diagnostics[0].message
    assert verdicts(rds_plus(random_features(9), targets)) == {"embedding_spread": "ok"}
    assert verdicts(rds_plus(random_features(1), targets)) == {"embedding_spread": "unknown"}


def test_target_rows_of_zeros_are_left_out_and_said() -> None:
    targets = features([[1, 0], [0, 0], [0, 1]], "aab")
    scores = sbert(features(POOL), targets, over="mean")
    np.testing.assert_allclose(scores.parts["task:a"], [1, 0, 0.6, np.nan, -1], rtol=1e-6)
    np.testing.assert_allclose(scores.score, [0.5, 0.5, 0.7, np.nan, -0.5], rtol=1e-6)
    assert verdicts(scores) == {"embedding_spread": "ok", "target_direction": "warning"}
    assert [dict(found.values) for found in scores.diagnostics if found.name == "target_direction"] == [{"rows": 1.0}]
    with pytest.raises(GradsiftError, match="no row of the target set's task 'b'"):
        rds_plus(features(POOL), features([[1, 0], [0, 0]], "ab"))


# ---------------------------------------------------------------------------------------- command line


def test_rds_plus_selects_in_the_embedded_world_and_trains_nothing(gradsift: Any) -> None:
    options = (*SMOKE, "scorer=rds_plus", "target_set=verifiable", "embedder=rds_plus", "stop_after=selection")
    assert gradsift(*options) == 0
    (run,) = gradsift.runs()
    made = [stage["name"] for stage in run["stages"]]
    assert made == ["load", "target_set", "overlap", "backbone", "embeddings", "embeddings", "score", "select"]
    assert sum(stage["optimizer_steps"] for stage in run["stages"]) == 0
    (path,) = gradsift.store.glob("score/*/scores.parquet")
    table = pq.read_table(path)
    parts = np.array([table["task:sort"].to_numpy(), table["task:reverse"].to_numpy()])
    np.testing.assert_array_equal(table["score"].to_numpy(), parts.max(0))
    (selection,) = gradsift.folder.glob("outputs/*/*/selection.jsonl")
    chosen = [json.loads(line)["gradsift"]["score"] for line in selection.read_text().splitlines()]
    assert chosen == sorted(table["score"].to_pylist(), reverse=True)[:12]

    assert gradsift(*options, "embedder.pooling=mean") == 0
    assert [s["name"] for s in gradsift.runs()[-1]["stages"] if not s["reused"]] == [
        "embeddings", "embeddings", "score", "select",
    ]  # fmt: skip


@pytest.mark.slow
def test_both_ways_of_sbert_share_their_embeddings_and_pools_shares_between_target_sets(gradsift: Any) -> None:
    options = ("-m", *SMOKE, "target_set=verifiable", "stop_after=selection")
    assert gradsift(*options, "scorer=sbert", "scorer.over=mean,max") == 0
    assert gradsift(*options, "scorer=sbert", "target_set.tasks=[add]") == 0
    done = [stage["name"] for run in gradsift.runs() for stage in run["stages"] if not stage["reused"]]
    assert done.count("embeddings") == 3  # the pool, and each target set
    assert done.count("score") == 3


@pytest.mark.parametrize("scorer", ["rds_plus", "sbert"])
def test_without_a_target_set_nothing_is_embedded(
    scorer: str, gradsift: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gradsift(*SMOKE, f"scorer={scorer}", "stop_after=selection") == 2
    assert f"target_set=none, and scorer={scorer} selects towards a target set" in capsys.readouterr().err
    assert gradsift.runs() == [] or not gradsift.runs()[-1]["stages"]  # type: ignore[attr-defined]
