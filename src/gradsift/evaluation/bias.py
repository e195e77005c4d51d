"""How much a judge is influenced by the position in which an answer is shown, and by its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gradsift.evaluation.judgments import Judgment
from gradsift.evaluation.pws import SIGNS, Outcomes, in_both_orders

Lengths = Mapping[tuple[str, str], tuple[int, int]]  # (benchmark, item): characters of model's and reference answer


def position_bias(judgments: Iterable[Judgment]) -> dict[str, Any]:
    """Measure how much the judge prefers a position, over the items that are valid in both orders.

    Returns:
        `{"items", "flips", "flip_share", "to_first", "to_second", "first_share"}`. `items` is the number of items that
        are valid in both orders. A flip is an item for which the answer at the same position wins in both orders:
        `to_first` counts the flips to the first position, `to_second` those to the second. `flip_share` is the share of
        flips among the items. `first_share` is the share of judgments, ties left out, in which the answer shown first
        wins; it is near .5 if the judge prefers no position. A share is None if its denominator is 0.
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
    return {
        "items": items,
        "flips": to_first + to_second,
        "flip_share": (to_first + to_second) / items if items else None,
        "to_first": to_first,
        "to_second": to_second,
        "first_share": firsts / decided if decided else None,
    }


def _place(judgment: Judgment) -> int | None:
    """Return 1 if the answer shown first has the higher score, -1 if the second has, 0 for a tie, None if invalid."""
    if judgment.score_model is None or judgment.score_reference is None:
        return None
    margin = judgment.score_model - judgment.score_reference
    return int(np.sign(margin if judgment.order == "forward" else -margin))


def length_bias(outcomes: Outcomes, lengths: Lengths) -> dict[str, Any]:
    """Count how often the longer answer wins, over the items that are not ties and have answers of different lengths.

    Returns:
        `{"items", "longer_wins", "longer_share", "mean_model", "mean_reference", "rank_correlation"}`. `items` counts
        the items that are not ties and have answers of different lengths; `longer_share` is the share of these items in
        which the longer answer wins, near .5 if length has no influence. `mean_model` and `mean_reference` are the mean
        lengths of the two models' answers, in characters, over all items with known lengths. `rank_correlation` is
        Spearman's correlation of the outcome (+1, 0, -1) with the difference in length, over the valid items. Values
        that are not defined, such as the correlation of equal outcomes, are None.
    """
    from scipy.stats import spearmanr

    known = [item for item in outcomes if item in lengths]
    valid = [item for item in known if outcomes[item] != "invalid"]
    sign = np.array([SIGNS[outcomes[item]] for item in valid], dtype=int)
    difference = np.array([lengths[item][0] - lengths[item][1] for item in valid], dtype=int)
    decided = (sign != 0) & (difference != 0)
    items, longer = int(decided.sum()), int((decided & (sign == np.sign(difference))).sum())
    vary = len(valid) > 1 and np.ptp(sign) > 0 and np.ptp(difference) > 0
    means = [float(np.mean([lengths[item][side] for item in known])) if known else None for side in (0, 1)]
    return {
        "items": items,
        "longer_wins": longer,
        "longer_share": longer / items if items else None,
        "mean_model": means[0],
        "mean_reference": means[1],
        "rank_correlation": float(spearmanr(sign, difference).statistic) if vary else None,
    }


def length_controlled(outcomes: Outcomes, lengths: Lengths) -> dict[str, Any]:
    """Estimate the PWS that the model would have if its answers were as long as the reference model's.

    As in length-controlled AlpacaEval (arXiv 2404.04475), the outcomes (win 1, tie 1/2, lose 0) are fitted by a
    logistic regression on tanh(difference in length / its standard deviation). The length-controlled PWS is twice the
    outcome that the regression predicts at a difference of 0. AlpacaEval's term for the difficulty of each item is left
    out, because it needs the judgments of many models. If the difference in length is the same for all items, the
    result is the plain PWS.

    Returns:
        `{"items", "pws", "slope"}`: the number of valid items with known lengths, the length-controlled PWS, and the
        regression's slope (above 0 if longer answers win). If there are no such items, PWS and slope are None.
    """
    items = [item for item, kind in outcomes.items() if kind != "invalid" and item in lengths]
    if not items:
        return {"items": 0, "pws": None, "slope": None}
    share = np.array([(SIGNS[outcomes[item]] + 1) / 2 for item in items])
    difference = np.array([lengths[item][0] - lengths[item][1] for item in items], dtype=float)
    spread = difference.std()
    inputs = np.stack([np.ones(len(items)), np.tanh(difference / spread) if spread else np.zeros(len(items))], 1)
    weights = np.zeros(2)
    penalty = np.array([1e-6, 1.0])  # keeps the slope finite where the length decides every item
    for _ in range(100):  # Newton's method on a convex loss
        mean = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (mean - share) + penalty * weights
        curvature = inputs.T @ (inputs * (mean * (1 - mean))[:, None]) + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights -= step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return {"items": len(items), "pws": float(2 / (1 + np.exp(-weights[0]))), "slope": float(weights[1])}
