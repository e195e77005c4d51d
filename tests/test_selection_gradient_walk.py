"""The gradient walk equals its description, implemented vector by vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import EXCLUDED, Scores
from gradsift.selection.budget import proportional_shares
from gradsift.selection.core_knowledge import core_knowledge
from gradsift.selection.gradient_walk import gradient_walk

pytestmark = pytest.mark.numerics

OPTIONS: dict[str, Any] = {"explained": 0.5, "keep": 0.8, "fill": "strict", "graph": True, "neighbours": None}


def walk(scores: Scores, size: int, pool: np.ndarray, target: np.ndarray, **options: Any) -> list[int]:
    return gradient_walk(scores, size, Features(pool), Features(target), **(OPTIONS | options)).positions.tolist()


def said(pool: np.ndarray, target: np.ndarray, size: int, **options: Any) -> dict[str, Diagnostic]:
    scores = Scores(np.arange(float(len(pool))))
    choice = gradient_walk(scores, size, Features(pool), Features(target), **(OPTIONS | options))
    return {diagnostic.name: diagnostic for diagnostic in choice.diagnostics}


# ------------------------------------------------------------------------------- the slow, obvious twin


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def told(
    rows: list[int], pool: np.ndarray, K: np.ndarray, share: int, keep: float, neighbours: int | None
) -> list[int]:
    """Return one component's examples, from the unused `rows` of the candidates in `pool` (others are zero)."""
    towards = np.round(pool @ K, 9)
    near = np.round(pool @ pool.T, 9)
    everyone = [row for row in range(len(pool)) if pool[row].any()]
    taken: list[int] = []

    def passes(row: int) -> bool:
        if row in taken or any(near[row, other] < 0 for other in taken):
            return False
        total = pool[taken].sum(0)
        return abs(cosine(total + pool[row], K)) >= keep * abs(cosine(total, K)) - 1e-9

    while len(taken) < share:
        if not taken:
            order = sorted(rows, key=lambda row: (-towards[row], row))
            found = order[:1]
        else:
            last = taken[-1]
            scan = sorted((row for row in everyone if row != last), key=lambda row: (-near[last, row], row))[
                :neighbours
            ]
            scan += sorted(rows, key=lambda row: (-towards[row], row))
            found = [row for row in scan if row in rows and passes(row)][:1]
        if not found:
            break
        taken += found
    return taken


def twin(scores: Scores, size: int, pool: np.ndarray, target: np.ndarray, **options: Any) -> list[int]:
    options = OPTIONS | options
    core = core_knowledge(Features(target), options["explained"])
    pool = np.where((scores.status == "scored")[:, None], pool, 0).astype(float)
    unused = [row for row in range(len(pool)) if pool[row].any()]
    by_score = sorted(unused, key=lambda row: (-scores.score[row], row))
    shares = proportional_shares(min(size, len(unused)), core.variances)
    chosen: list[int] = []
    for K, share in zip(core.directions, shares, strict=True):
        if options["graph"]:
            taken = told(unused, pool, K, share, options["keep"], options["neighbours"])
        else:
            taken = sorted(unused, key=lambda row: (-round(float(pool[row] @ K), 9), row))[:share]
        unused = [row for row in unused if row not in taken]
        chosen += taken
    if options["fill"] == "topup":
        chosen += [row for row in by_score if row not in chosen]
    return chosen[:size]


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(2, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.6, 2.0]),
    st.sampled_from([None, 1, 3, 99]),
    st.sampled_from([0.0, 0.8, 0.99]),
    st.sampled_from(["strict", "topup"]),
    st.booleans(),
)
def test_the_walk_is_the_walk_as_told(
    seed: int,
    count: int,
    dimensions: int,
    targets: int,
    lean: float,
    neighbours: int | None,
    keep: float,
    fill: str,
    graph: bool,
) -> None:
    """On gradients with and without a common direction, with copies, zeros and unscored examples."""
    rng = np.random.default_rng(seed)
    pool = unit_rows(rng.normal(size=(count, dimensions)) + lean)
    pool[rng.random(count) < 0.1] = pool[0]
    pool[rng.random(count) < 0.1] = 0
    pool[-1] = unit_rows(np.ones((1, dimensions)))[0]
    target = unit_rows(rng.normal(size=(targets, dimensions)) + lean)
    scores = Scores(np.round(rng.normal(size=count), 1))
    scores.mark((rng.random(count) < 0.1) & (np.arange(count) < count - 1), EXCLUDED, "no")
    options = {"keep": keep, "fill": fill, "graph": graph, "neighbours": neighbours, "explained": 0.8}
    for size in (1, max(1, count // 2), count):
        assert walk(scores, size, pool, target, **options) == twin(scores, size, pool, target, **options)


# ------------------------------------------------------------------------------------- by hand


def test_a_walk_by_hand() -> None:
    """Walk with one target direction; `angles` of the pool from it, in degrees."""
    angles = np.radians([30, 0, -50, 60, 80, 180])
    pool = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    target = np.array([[1, 0]], dtype=np.float32)
    # The anchor is at 0 and its nearest at 30: the sum is at 15, cosine .97. From 30 to 60: sum at 30, .87 >= .8 x .97.
    # From 60 to 80: sum at 42, .75 >= .8 x .87. The one at -50 conflicts with 60, that at 180 with 0.
    assert walk(Scores(np.zeros(6)), 6, pool, target) == [1, 0, 3, 4]
    # With keep = .95, 60 would turn the sum to .87 < .95 x .97, and 80 to .81; from 30 the walk goes on at -50.
    assert walk(Scores(np.zeros(6)), 6, pool, target, keep=0.95) == [1, 0, 2]
    assert walk(Scores(np.zeros(6)), 6, pool, target, graph=False) == [1, 0, 2, 3, 4, 5]
    assert walk(Scores(np.arange(6.0)), 6, pool, target, keep=0.95, fill="topup") == [1, 0, 2, 5, 4, 3]


def test_a_right_angle_is_no_conflict() -> None:
    pool, target = np.eye(3, dtype=np.float32)[:, :2], np.array([[1, 0]], dtype=np.float32)
    assert walk(Scores(np.zeros(3)), 2, pool, target, keep=0.7) == [0, 1]  # the third has no direction
    assert walk(Scores(np.zeros(3)), 2, pool, target, keep=0.8) == [0]  # the sum at 45 degrees has a cosine of .71


def test_copies_keep_the_whole_direction_but_for_rounding() -> None:
    """With keep=1 the sum's cosine must not fall, but rounding lowers the last digits for a copy."""
    one = unit_rows(np.random.default_rng(0).normal(size=(1, 7)))
    pool, target = np.repeat(one, 30, axis=0), unit_rows(one + 0.3)
    assert walk(Scores(np.zeros(30)), 30, pool, target, keep=1.0) == list(range(30))


def test_a_walk_that_crosses_to_the_other_side_of_its_component_is_reported() -> None:
    """By hand: the best anchor is at 84 degrees, cosine .10; with 150 the sum is at 117, cosine -.45: larger."""
    pool, target = (
        np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        for angles in (np.radians([84, 150]), np.zeros(1))
    )
    assert walk(Scores(np.zeros(2)), 2, pool, target) == [0, 1]
    found = said(pool, target, 2)["gradient_walk"]
    assert (found.verdict, found.values["turned_away"]) == ("warning", 1)
    assert "point away from their component" in found.message
    assert said(pool, target, 1)["gradient_walk"].verdict == "ok"


@pytest.mark.parametrize("graph", [True, False])
def test_the_bar_of_a_walk_counts_the_examples_that_it_takes(graph: bool) -> None:
    done: list[int] = []

    @contextmanager
    def task(description: str, total: int) -> Iterator[Callable[[int], None]]:
        assert total == 5
        yield done.append

    pool = unit_rows(np.random.default_rng(0).normal(size=(20, 4)))
    taken = walk(Scores(np.zeros(20)), 5, pool, pool[:6], graph=graph, task=task)
    assert sum(done) == len(taken) > 0


def test_a_component_that_took_no_example_does_not_point_away() -> None:
    target = np.array([[3, 0, 1], [0, 2, 1], [0, 0, 1]], dtype=np.float32)
    found = said(unit_rows(target), target, 1, explained=1.0)["gradient_walk"]
    assert "0 of 0" in found.message and "1 of 1" in found.message
    assert (found.verdict, found.values["turned_away"]) == ("ok", 0)


def test_past_all_neighbours_the_walk_goes_by_core_knowledge() -> None:
    angles = np.radians([0, 10, 40, 50])
    pool = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    target = np.array([[1, 0]], dtype=np.float32)
    # the only neighbour of 10 is 0, which is used: by core knowledge the walk goes on at 40
    assert walk(Scores(np.zeros(4)), 4, pool, target, neighbours=1) == [0, 1, 2, 3]


def test_conflicts_stop_the_walk_and_are_reported() -> None:
    pool = np.array([[1, 0], [-1, 0], [-1, 0], [0, 0]], dtype=np.float32)
    target = np.array([[1, 0]], dtype=np.float32)
    found = said(pool, target, 4)
    assert found["gradient_walk"].verdict == "warning"
    assert found["gradient_walk"].values["selected"] == 1
    assert found["shortfall"].values == {"missing": 3, "budget": 4}
    assert "selector.fill=topup" in found["shortfall"].message
    found = said(pool, target, 4, fill="topup")
    assert found["topped_up"].values == {"topped_up": 0.5}
    assert found["shortfall"].values["missing"] == 1
    assert "gradient of zero" in found["shortfall"].message


# -------------------------------------------------------------------------------------- core knowledge


@pytest.mark.parametrize(("rows", "dimensions"), [(30, 8), (6, 40)])
@pytest.mark.parametrize("explained", [0.2, 0.5, 0.8, 1.0])
def test_core_knowledge_is_that_of_scikit_learn(rows: int, dimensions: int, explained: float) -> None:
    target = unit_rows(np.random.default_rng(rows).normal(size=(rows, dimensions)) + 0.5)
    core = core_knowledge(Features(target), explained)
    pca = PCA().fit(target.astype(float))
    shares = pca.explained_variance_ratio_
    count = next((k for k in range(1, len(shares) + 1) if shares[:k].sum() >= explained - 1e-9), len(shares))
    count = min(count, rows - 1, dimensions)
    np.testing.assert_allclose(core.variances, shares[:count], atol=1e-9)
    aligned = np.abs(np.sum(core.directions * pca.components_[:count], axis=1))
    np.testing.assert_allclose(aligned, 1, atol=1e-9)
    mean = target.astype(float).mean(0)
    assert (core.directions @ mean >= 0).all()


def test_half_of_the_variance_is_one_of_two_equal_components() -> None:
    """By hand: four gradients in a square, spread along both axes, so that each explains exactly a half."""
    corners = unit_rows(np.array([[1, 1, 5], [1, -1, 5], [-1, 1, 5], [-1, -1, 5]]))
    assert len(core_knowledge(Features(corners), 0.5).variances) == 1
    assert len(core_knowledge(Features(corners), 0.501).variances) == 2


@pytest.mark.parametrize("rows", [1, 5])
def test_without_variance_the_mean_is_the_core_knowledge(rows: int) -> None:
    target = np.repeat(unit_rows(np.random.default_rng(0).normal(size=(1, 7))), rows, axis=0)
    core = core_knowledge(Features(target), 0.5)
    np.testing.assert_allclose(core.directions, target[:1], atol=1e-7)
    assert core.variances.tolist() == [1]
    assert (core.conflicts is None) == (rows == 1)


def test_target_gradients_of_zero_are_left_out_and_nothing_else_is_an_error() -> None:
    target = unit_rows(np.random.default_rng(0).normal(size=(5, 7)))
    with_zeros = np.concatenate([target, np.zeros((2, 7), dtype=np.float32)])
    one, other = core_knowledge(Features(target), 0.5), core_knowledge(Features(with_zeros), 0.5)
    np.testing.assert_allclose(one.directions, other.directions, atol=1e-9)
    with pytest.raises(GradsiftError, match="every gradient of the target set is zero"):
        core_knowledge(Features(np.zeros((2, 7), dtype=np.float32)), 0.5)


def test_a_mean_of_zero_leaves_the_sign_to_the_largest_entry() -> None:
    target = unit_rows(np.array([[-3.0, 1.0], [3.0, -1.0]]))
    core = core_knowledge(Features(target), 0.5)
    np.testing.assert_allclose(core.directions, [[0.9486833, -0.3162278]], atol=1e-6)
    assert core.conflicts == 1.0


def test_conflicting_core_knowledge_is_a_warning() -> None:
    pool = unit_rows(np.random.default_rng(0).normal(size=(9, 3)))
    opposed = np.repeat(np.array([[1, 0, 0], [-1, 0.1, 0]]), 3, axis=0)
    assert said(pool, unit_rows(opposed), 3)["core_knowledge"].verdict == "warning"
    agreeing = unit_rows(np.random.default_rng(1).normal(size=(6, 3)) + 3)
    assert said(pool, agreeing, 3)["core_knowledge"].verdict == "ok"
    assert said(pool, agreeing[:1], 3)["core_knowledge"].verdict == "unknown"
