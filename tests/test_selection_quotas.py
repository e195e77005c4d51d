"""Laws of quotas: the shares of the groups, and the highest scores within each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.config import QuotasConfig
from gradsift.data.examples import Example
from gradsift.errors import ConfigError
from gradsift.scoring.scores import EXCLUDED, Scores
from gradsift.selection.budget import capped_shares, proportional_shares
from gradsift.selection.choice import Choice
from gradsift.selection.quotas import quotas

SOURCES = ["code"] * 20 + ["chat"] * 10 + ["rare"] * 2


def examples(sources: list[Any], column: str = "source") -> list[Example]:
    return [Example(row, str(row), "", (), "", "", "", {column: name}) for row, name in enumerate(sources)]


def chosen(size: int, shares: dict[Any, float] | None, sources: list[Any] = SOURCES) -> tuple[dict[str, int], Choice]:
    scores = Scores(np.random.default_rng(0).normal(size=len(sources)))
    scores.mark(np.arange(len(sources)) == 3, EXCLUDED, "no")
    choice = quotas(scores, size, examples(sources), column="source", shares=shares)
    assert 3 not in choice.positions
    assert (np.diff(scores.score[choice.positions]) <= 0).all()
    for name in map(str, set(sources)):  # slow twin: the best of each group by sorting it
        rows = [row for row in range(len(sources)) if str(sources[row]) == name and row != 3]
        mine = [row for row in choice.positions.tolist() if str(sources[row]) == name]
        assert mine == sorted(rows, key=lambda row: -scores.score[row])[: len(mine)]
    return dict(Counter(sources[row] for row in choice.positions)), choice


@pytest.mark.parametrize(
    ("size", "shares", "expected"),
    [
        (16, None, {"code": 10, "chat": 5, "rare": 1}),
        (8, {"code": 1, "chat": 1, "rare": 0}, {"code": 4, "chat": 4}),
        (12, {"code": 0.5, "chat": 0.25, "rare": 0.25}, {"code": 7, "chat": 3, "rare": 2}),  # rare lacks a row
        (15, {"code": 0, "chat": 1, "rare": 0}, {"chat": 10}),
    ],
)
def test_each_group_gets_its_share(size: int, shares: dict[Any, float] | None, expected: dict[str, int]) -> None:
    counts, choice = chosen(size, shares)
    assert counts == expected
    said = {diagnostic.name: diagnostic for diagnostic in choice.diagnostics}
    assert (said["quotas"].verdict == "warning") == (size in (12, 15))
    assert ("shortfall" in said) == (size == 15)


def test_values_that_are_no_text_are_groups_too() -> None:
    counts, _ = chosen(4, {1: 1, "null": 1}, [1, None] * 6)
    assert counts == {1: 2, None: 2}


def test_what_the_data_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="names 'maths', but the groups are: chat, code, rare"):
        chosen(4, {"code": 1, "chat": 1, "maths": 1})
    with pytest.raises(ConfigError, match="does not name chat, rare; give every group a weight, 0"):
        chosen(4, {"code": 1})
    with pytest.raises(ConfigError, match=r"selector\.column=source is no column of the data; it has origin"):
        quotas(Scores(np.zeros(2)), 1, examples(["a", "b"], "origin"), column="source", shares=None)
    with pytest.raises(ConfigError, match=r"selector\.shares\.code=-1"):
        QuotasConfig(shares={"code": -1})
    for shares in ({"code": 0}, {}, {"code": "one"}, "code"):
        with pytest.raises(ConfigError, match="gives no group a weight above 0; give weights as in"):
            QuotasConfig(shares=shares)


GROUPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=1, max_size=6)


@given(size=st.integers(0, 60), groups=GROUPS.filter(lambda groups: any(weight for weight, _ in groups)))
def test_capped_shares_fill_the_size_and_no_group_gives_up_what_it_can_take(size: int, groups: Any) -> None:
    weights, capacities = (np.array(values) for values in zip(*groups, strict=True))
    shares = capped_shares(size, weights.astype(float), capacities)
    assert (shares <= capacities).all() and not shares[weights == 0].any()
    assert shares.sum() == min(size, capacities[weights > 0].sum())
    quota = proportional_shares(size, weights)
    assert (shares >= np.minimum(quota, capacities)).all()
    if (quota <= capacities).all():
        assert shares.tolist() == quota.tolist()
