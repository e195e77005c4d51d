"""PWS: hand-computed cases, its laws, and the published replies of a real judge."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.errors import DataError
from gradsift.evaluation.judgments import Judgment
from gradsift.evaluation.pws import outcome, outcome_strings, outcomes_of, summarise


def judgment(item: str, order: str, model: float | None, reference: float | None, benchmark: str = "set") -> Judgment:
    valid = model is not None
    return Judgment(
        benchmark, item, order, "hash", "judge", "raw", model, reference, valid, None if valid else "garbage"
    )  # type: ignore[arg-type]


def pair(
    item: str, forward: tuple[float, float], reverse: tuple[float, float], benchmark: str = "set"
) -> list[Judgment]:
    return [judgment(item, "forward", *forward, benchmark), judgment(item, "reverse", *reverse, benchmark)]


WIN, TIE, LOSE = ((9, 8), (9, 8)), ((9, 8), (8, 9)), ((8, 9), (8, 9))


def summary(judgments: list[Judgment], combine: str = "signs", **options: float) -> dict:  # type: ignore[type-arg]
    return summarise(outcomes_of(judgments, combine), **{"confidence": 0.95, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forward", "reverse", "signs", "summed"),
    [
        ((9, 8), (9, 8), "win", "win"),
        ((9, 8), (8, 8), "win", "win"),  # a win and a tie
        ((9, 8), (8, 9), "tie", "tie"),  # a strict flip
        ((9, 3), (8, 9), "tie", "win"),  # the size of the margins counts only in the sum
        ((7, 7), (7, 7), "tie", "tie"),
        ((0, 0), (0, 1), "lose", "lose"),  # zeros are scores
        ((7.5, 8), (8, 8), "lose", "lose"),
        ((-0.2, -2.0), (-1.9, -0.3), "tie", "win"),  # log-probabilities under a position bias
    ],
)
def test_outcomes_by_hand(forward: tuple[float, float], reverse: tuple[float, float], signs: str, summed: str) -> None:
    both = pair("1", forward, reverse)
    assert outcome(both[0], both[1], "signs") == signs
    assert outcome(both[0], both[1], "sum") == summed


def test_pws_by_hand() -> None:
    shapes = [WIN] * 5 + [TIE] * 2 + [LOSE] * 3
    result = summary([j for n, shape in enumerate(shapes) for j in pair(str(n), *shape)])
    cell = result["pooled"]
    assert (cell["n"], cell["win"], cell["tie"], cell["lose"], cell["invalid"]) == (10, 5, 2, 3, 0)
    assert cell["pws"] == pytest.approx(1.2)
    assert 0 <= cell["pws_low"] < 1.2 < cell["pws_high"] <= 2
    assert result["benchmarks"]["set"]["win"] == 5


def test_invalid_is_never_counted_as_a_tie() -> None:
    judgments = [
        *pair("1", *WIN),
        judgment("2", "forward", 8, 8),  # its other order is missing
        judgment("3", "forward", 8, 8),
        judgment("3", "reverse", None, None),
    ]
    cell = summary(judgments)["pooled"]
    assert (cell["n"], cell["win"], cell["tie"], cell["lose"], cell["invalid"]) == (3, 1, 0, 0, 2)
    assert cell["pws"] == 2


def test_pws_without_a_valid_pair_is_null() -> None:
    result = summary([judgment("1", "forward", None, None), judgment("1", "reverse", 9, 8)])
    for cell in (result["pooled"], result["benchmarks"]["set"], summary([])["pooled"]):
        assert cell["pws"] is cell["pws_low"] is cell["pws_high"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_pooled_counts_items_not_benchmarks() -> None:
    judgments = pair("1", *WIN, "small")
    for n in range(9):
        judgments += pair(str(n), *LOSE, "large")
    result = summary(judgments)
    assert list(result["benchmarks"]) == ["large", "small"]
    assert result["benchmarks"]["small"]["pws"] == 2
    assert result["pooled"]["pws"] == pytest.approx((1 - 9) / 10 + 1)


scores = st.one_of(st.none(), st.tuples(st.integers(0, 10), st.integers(0, 10)))


@given(
    replies=st.lists(st.tuples(st.sampled_from("ab"), scores, scores), min_size=1, max_size=30),
    combine=st.sampled_from(["signs", "sum"]),
    seed=st.integers(0, 99),
)
def test_swapping_the_models_mirrors_pws_and_the_order_of_judgments_is_irrelevant(
    replies: list[tuple[str, tuple[int, int] | None, tuple[int, int] | None]], combine: str, seed: int
) -> None:
    judgments = []
    for n, (benchmark, forward, reverse) in enumerate(replies):
        judgments.append(judgment(str(n), "forward", *(forward or (None, None)), benchmark))
        judgments.append(judgment(str(n), "reverse", *(reverse or (None, None)), benchmark))
    result = summary(judgments, combine)
    shuffled = judgments.copy()
    random.Random(seed).shuffle(shuffled)
    assert summary(shuffled, combine) == result
    # the same judgments with model and reference exchanged: the order is reversed too
    swapped = [
        dataclasses.replace(
            j,
            order="reverse" if j.order == "forward" else "forward",
            score_model=j.score_reference,
            score_reference=j.score_model,
        )
        for j in judgments
    ]
    mirrored = summary(swapped, combine)
    for name in ("a", "b"):
        if name not in result["benchmarks"]:
            continue
        ours, theirs = result["benchmarks"][name], mirrored["benchmarks"][name]
        assert (ours["win"], ours["tie"], ours["invalid"]) == (theirs["lose"], theirs["tie"], theirs["invalid"])
        if ours["pws"] is not None:
            assert ours["pws"] + theirs["pws"] == pytest.approx(2)
            assert 0 <= ours["pws_low"] <= ours["pws_high"] <= 2


def test_the_interval_agrees_with_the_normal_approximation_and_narrows() -> None:
    def cell(count: int) -> dict[str, float]:
        shapes = [WIN] * (5 * count) + [TIE] * (2 * count) + [LOSE] * (3 * count)
        return summary([j for n, s in enumerate(shapes) for j in pair(str(n), *s)])["pooled"]  # type: ignore[no-any-return]

    for count in (20, 80):
        spread = math.sqrt((0.8 - 0.2**2) / (10 * count))
        assert cell(count)["pws_low"] == pytest.approx(1.2 - 1.96 * spread, abs=0.15 * spread)
        assert cell(count)["pws_high"] == pytest.approx(1.2 + 1.96 * spread, abs=0.15 * spread)


def test_another_benchmark_does_not_change_the_interval_of_a_benchmark() -> None:
    judgments = [j for n in range(20) for j in pair(str(n), *(WIN, TIE, LOSE)[n % 3], "a")]
    first = summary(judgments)
    more = summary(judgments + pair("1", *WIN, "b"))
    assert more["benchmarks"]["a"] == first["benchmarks"]["a"]


def test_outcome_strings_are_sorted_by_item_and_identify_the_items() -> None:
    outcomes = {("b", "2"): "lose", ("b", "1"): "win", ("a", "x"): "invalid", ("b", "3"): "tie"}
    strings = outcome_strings(outcomes)  # type: ignore[arg-type]
    assert {name: each["outcomes"] for name, each in strings.items()} == {"a": "i", "b": "wlt"}
    others = outcome_strings({("b", n): "win" for n in ("1", "2", "4")})
    assert others["b"]["items"] != strings["b"]["items"]


def test_two_judgments_of_one_order_are_refused() -> None:
    with pytest.raises(DataError, match="set/1 has two judgments in the order forward"):
        summary([judgment("1", "forward", 9, 8), judgment("1", "forward", 8, 9)])


# -------------------------------------------------------------------------------------- real replies

PUBLISHED = {
    "vicuna": (16, 58, 6),
    "koala": (32, 110, 38),
    "wizardlm": (50, 135, 33),
    "sinstruct": (40, 172, 40),
    "lima": (60, 210, 30),
}


@pytest.mark.skipif("GRADSIFT_DATA" not in os.environ, reason="GRADSIFT_DATA is not set")
def test_published_replies_give_the_published_counts() -> None:
    judgments = []
    for name in PUBLISHED:
        file = Path(os.environ["GRADSIFT_DATA"]) / "judge" / f"cherry5_vs_alpaca_{name}_gpt3.5.json"
        for n, row in enumerate(json.loads(file.read_text(encoding="utf-8"))["data"]):
            model, reference = json.loads(row["scores"])
            judgments.append(judgment(str(n), "forward", model, reference, name))
            reference, model = json.loads(row["scores_reverse"])  # as shown: Answer2 first
            judgments.append(judgment(str(n), "reverse", model, reference, name))
    result = summary(judgments)
    for name, counts in PUBLISHED.items():
        cell = result["benchmarks"][name]
        assert (cell["win"], cell["tie"], cell["lose"], cell["invalid"]) == (*counts, 0)
    pooled = result["pooled"]
    assert (pooled["win"], pooled["tie"], pooled["lose"]) == (198, 685, 147)
    assert round(pooled["pws"], 10) == 1.0495145631
    assert pooled["pws_low"] < pooled["pws"] < pooled["pws_high"]
