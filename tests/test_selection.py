"""Laws of the budget and of the top-k selector."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.data.examples import Example, write_examples
from gradsift.errors import ConfigError
from gradsift.scoring.scores import EXCLUDED, SCORED, Scores
from gradsift.selection.budget import budget
from gradsift.selection.stage import write_selection
from gradsift.selection.topk import topk


@pytest.mark.parametrize(
    ("alpha", "count", "size"),
    [
        (0.1, 2000, 200),
        (0.15, 2000, 300),
        (0.29, 100, 29),
        (0.07, 100, 7),
        (1.0, 7, 7),
        (0.1, 19, 1),
        (0.05, 52002, 2600),
    ],
)
def test_the_budget_is_exact_for_the_alpha_as_written(alpha: float, count: int, size: int) -> None:
    assert budget(alpha, count) == size


@given(st.integers(1, 1000), st.integers(1, 10_000))
def test_the_budget_never_exceeds_its_share(thousandths: int, count: int) -> None:
    alpha = thousandths / 1000
    exact = Fraction(thousandths, 1000) * count
    if exact < 1:
        with pytest.raises(ConfigError):
            budget(alpha, count)
    else:
        assert budget(alpha, count) <= exact < budget(alpha, count) + 1


def test_an_empty_budget_names_the_smallest_alpha() -> None:
    with pytest.raises(ConfigError, match=r"alpha=0.0001 of 2,000 rows selects no example; give at least 0.0005"):
        budget(0.0001, 2000)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 50))
def test_topk_equals_a_stable_sort(values: list[int], size: int) -> None:
    scores = Scores(np.array(values, dtype=float))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:size]
    assert topk(scores, size).positions.tolist() == expected


def test_what_is_not_scored_is_never_selected() -> None:
    scores = Scores(np.array([9.0, 1.0, 2.0]))
    scores.mark(np.array([True, False, False]), EXCLUDED, "no")
    assert topk(scores, 3).positions.tolist() == [2, 1]
    assert scores.status[0] != SCORED


def test_a_selected_line_is_the_whole_original_row(tmp_path) -> None:
    original = {"instruction": "a", "output": "ß\u2028\U0001f600", "extra": {"deep": [1, None]}}
    example = Example(7, "abc-0", "abc", (), "a", "", "b", original)
    write_examples(tmp_path / "e.parquet", [example])
    write_selection(tmp_path / "s.jsonl", np.array([0]), Scores(np.array([0.5])), tmp_path / "e.parquet")
    (line,) = (tmp_path / "s.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    row = json.loads(line)
    assert row.pop("gradsift") == {"rank": 1, "score": 0.5, "example_id": "abc-0", "row_index": 7}
    assert row == original
