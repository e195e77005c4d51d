"""Round robin equals a simple loop."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import composed

from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import Features, unit_rows
from gradsift.scoring.scores import EXCLUDED, Scores
from gradsift.selection import round_robin as module
from gradsift.selection.round_robin import round_robin, round_robin_queries


def naive(similarities: list[np.ndarray], rows: list[int], size: int) -> list[int]:
    """Let each of `similarities` (N,) in turn pick its best of `rows`, ties by row order."""
    chosen: list[int] = []
    while len(chosen) < min(size, len(rows)):
        similarity = similarities[len(chosen) % len(similarities)]
        chosen.append(min((row for row in rows if row not in chosen), key=lambda row: (-similarity[row], row)))
    return chosen


def published(similarities: list[np.ndarray], rows: list[int], size: int) -> list[int]:
    """Select as RDS+'s scripts: each of `similarities` (N,) in turn pops its next row, and loses its turn if taken."""
    own = [sorted(rows, key=lambda row, by=similarity: (-by[row], row)) for similarity in similarities]
    chosen: list[int] = []
    while len(chosen) < min(size, len(rows)):
        for ranking in own:
            row = ranking.pop(0)
            if row not in chosen and len(chosen) < size:
                chosen.append(row)
    return chosen


SLOW = {"original": published, "fixed": naive}


def test_tasks_take_turns_in_the_order_of_the_table() -> None:
    parts = {"loss": np.zeros(5), "task:b": np.array([5.0, 4, 3, 2, 1]), "task:a": np.array([9.0, 0, 0, 8, 7])}
    assert round_robin(Scores(np.zeros(5), parts), 5).positions.tolist() == [0, 3, 1, 4, 2]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4))
def test_tasks_taking_turns_are_the_loop(seed: int, count: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    parts = {f"task:{task}": rng.integers(0, 4, count).astype(float) for task in range(tasks)}
    scores = Scores(rng.normal(size=count), parts)
    scores.mark(rng.random(count) < 0.2, EXCLUDED, "no")
    rows = [row for row in range(count) if scores.status[row] != EXCLUDED]
    for size in (1, count // 2, count):
        assert round_robin(scores, size).positions.tolist() == naive(list(parts.values()), rows, size)


def test_a_score_table_without_tasks_is_refused_with_the_scorers_that_have_them() -> None:
    with pytest.raises(ConfigError, match="scorer=less, rds_plus or sbert with a target_set"):
        round_robin(Scores(np.zeros(3), {"loss": np.zeros(3)}), 2)


@pytest.mark.parametrize("scorer", ["gsnr", "g2is", "random"])
def test_a_scorer_of_ours_without_tasks_is_refused_before_anything_is_computed(scorer: str) -> None:
    with pytest.raises(
        ConfigError, match=f"scorer={scorer} gives no score per task; choose scorer=less, rds_plus, sbert"
    ):
        composed("selector=round_robin", f"scorer={scorer}")
    unreached = composed("selector=round_robin", f"scorer={scorer}", "target_set=verifiable", "stop_after=scores")
    assert unreached.selector_name == "round_robin"
    assert composed("selector=round_robin", "scorer=full").scorer_name == "full"  # it keeps all, whatever the selector


def test_a_task_that_lacks_a_score_of_a_scored_example_is_refused() -> None:
    with pytest.raises(GradsiftError, match=r"task:a .* position 1"):
        round_robin(Scores(np.zeros(3), {"task:a": np.array([0, np.nan, 0])}), 2)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 6), st.integers(0, 3))
def test_queries_taking_turns_are_the_loop(seed: int, count: int, queries: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, target = (unit_rows(rng.integers(-2, 3, (rows, 3)).astype(float)) for rows in (count, queries))
    target[0] = [1, 0, 0]  # one of them has a direction
    names = tuple(f"task {rng.integers(tasks)}" for _ in range(queries)) if tasks else ()
    scores = Scores(rng.normal(size=count))
    scores.mark(rng.random(count) < 0.2, EXCLUDED, "no")
    scored = [row for row in range(count) if scores.status[row] != EXCLUDED]
    rows = [row for row in scored if vectors[row].any()]
    rest = sorted((row for row in scored if not vectors[row].any()), key=lambda row: -scores.score[row])
    asking = [query for query in range(queries) if target[query].any()]
    cosines = np.round(target.astype(float) @ vectors.astype(float).T, 9)
    turns = [cosines[query] for query in asking]
    if len(used := list(dict.fromkeys(names[query] for query in asking if names))) > 1:
        turns = [cosines[[query for query in asking if names[query] == task]].max(0) for task in used]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", 2)
        for size, (fidelity, slow) in product((1, max(1, count // 2), count), SLOW.items()):
            pool, towards = Features(vectors), Features(target, names)
            chosen = round_robin_queries(scores, size, pool, towards, fidelity=fidelity).positions.tolist()
            assert chosen == [*slow(turns, rows, size), *rest][:size]


@pytest.mark.parametrize(("fidelity", "expected"), [("original", [0, 2, 1]), ("fixed", [0, 1, 2])])
@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_query_or_task_whose_row_is_taken_loses_the_turn(
    fidelity: str, expected: list[int], names: tuple[str, ...]
) -> None:
    """By hand: both rank row 0 first; the first continues with 2 and the second with 1."""
    pool = Features(unit_rows(np.array([[10.0, 10, 0], [0, 3, 4], [3, 0, 4], [-1, -1, 0]])))
    target = Features(unit_rows(np.array([[1.0, 0.1, 0], [0.1, 1, 0]])), names)
    assert round_robin_queries(Scores(np.zeros(4)), 3, pool, target, fidelity=fidelity).positions.tolist() == expected


def test_the_published_selection_is_the_default() -> None:
    config = composed("method=rds_plus", "target_set=verifiable", "stop_after=selection")
    assert config.selector.fidelity == "original"


@pytest.mark.parametrize("rows", [0, 2])
def test_a_target_set_without_direction_is_refused(rows: int) -> None:
    pool, target = Features(np.eye(3, dtype=np.float32)), Features(np.zeros((rows, 3), dtype=np.float32))
    with pytest.raises(GradsiftError, match="target set"):
        round_robin_queries(Scores(np.zeros(3)), 2, pool, target, fidelity="original")
