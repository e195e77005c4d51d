"""What moves a judge besides quality: the place in which an answer is shown, and its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gradsift.evaluation.judges import Combine
from gradsift.evaluation.judgments import Judgment
from gradsift.evaluation.pws import in_both_orders, outcome

Lengths = Mapping[tuple[str, str], tuple[int, int]]  # (benchmark, item): characters of the model's and the reference's


def position_bias(judgments: Iterable[Judgment]) -> dict[str, Any]:
    """How often the verdict follows the place, over the items with a valid judgment in both orders.

    A strict flip is an item whose two orders name opposite winners: the judge preferred a place, not an
    answer. `to_first` and `to_second` count towards which. `first_share` is the share of the single
    verdicts that are no tie in which the answer shown first wins; without a preference it is near .5.

    Returns:
        `{"items", "flips", "flip_share", "to_first", "to_second", "first_share"}`; shares are None where
        there is nothing to divide by.
    """
    items = to_first = to_second = firsts = decided = 0
    for orders in in_both_orders(judgments).values():
        places = [_place(judgment) for judgment in orders.values()]
        if len(places) < 2 or None in places:
            continue
        items += 1
        firsts += places.count(1)
        decided += 2 - places.count(0)
        to_first += places == [1, 1]
        to_second += places == [-1, -1]
    flips = to_first + to_second
    return {
        "items": items,
        "flips": flips,
        "flip_share": flips / items if items else None,
        "to_first": to_first,
        "to_second": to_second,
        "first_share": firsts / decided if decided else None,
    }


def _place(judgment: Judgment) -> int | None:
    """1 if the answer shown first has the higher score, -1 if the second has, 0 for a tie; None where invalid."""
    if judgment.score_model is None or judgment.score_reference is None:
        return None
    margin = judgment.score_model - judgment.score_reference
    return int(np.sign(margin if judgment.order == "forward" else -margin))


def length_bias(judgments: Iterable[Judgment], combine: Combine, lengths: Lengths) -> dict[str, Any]:
    """How often the longer answer wins, over the decided items whose answers differ in length.

    Returns:
        `{"items", "longer_wins", "longer_share", "mean_model", "mean_reference", "rank_correlation"}`: the
        share is near .5 where length counts for nothing; lengths in characters, means over all items with a
        known length; the correlation (Spearman) is that of the outcome (+1, 0, -1) with the difference of
        the lengths, over all valid items. None where there is nothing to divide by.
    """
    signs: list[int] = []
    differences: list[int] = []
    known: list[tuple[int, int]] = []
    for item, orders in in_both_orders(judgments).items():
        found = outcome(orders.get("forward"), orders.get("reverse"), combine)
        if item not in lengths:
            continue
        known.append(lengths[item])
        if found != "invalid":
            signs.append({"win": 1, "tie": 0, "lose": -1}[found])
            differences.append(lengths[item][0] - lengths[item][1])
    sign, difference = np.array(signs, dtype=int), np.array(differences, dtype=int)
    counted = (sign != 0) & (difference != 0)
    longer = int((sign[counted] == np.sign(difference[counted])).sum())
    return {
        "items": int(counted.sum()),
        "longer_wins": longer,
        "longer_share": longer / int(counted.sum()) if counted.any() else None,
        "mean_model": float(np.mean([pair[0] for pair in known])) if known else None,
        "mean_reference": float(np.mean([pair[1] for pair in known])) if known else None,
        "rank_correlation": _rank_correlation(sign, difference),
    }


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's correlation; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
