"""The pairwise winning score (PWS) of a model against a reference model, with its uncertainty.

PWS = (win - lose) / (win + tie + lose) + 1 (arXiv 2601.13697, section 4, after Superfiltering). The PWS is 1 if the
model wins as many items as it loses, 2 if it wins every item, and 0 if it loses every item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from gradsift.errors import DataError
from gradsift.evaluation.intervals import mean_interval
from gradsift.evaluation.judges import Combine, Order, content_hash
from gradsift.evaluation.judgments import Judgment

Outcome = Literal["win", "tie", "lose", "invalid"]
Outcomes = Mapping[tuple[str, str], Outcome]  # by (benchmark, item)
SIGNS: Mapping[Outcome, int] = {"win": 1, "tie": 0, "lose": -1}


def estimate(outcomes: Iterable[Outcome], confidence: float) -> dict[str, Any]:
    """Return a cell of `pws.json`: the counts of the outcomes, and the PWS with its confidence interval.

    `confidence` is the coverage of the interval. `n` includes invalid items. PWS and interval are None if no item is
    valid.
    """
    outcomes = list(outcomes)
    counts = {kind: outcomes.count(kind) for kind in get_args(Outcome)}
    win, tie, lose, _ = counts.values()
    cell: dict[str, Any] = {"n": len(outcomes), **counts, "pws": None, "pws_low": None, "pws_high": None}
    if valid := win + tie + lose:
        low, high = mean_interval(np.repeat([1, 0, -1], [win, tie, lose])[None], confidence)
        cell |= {"pws": (win - lose) / valid + 1, "pws_low": low + 1, "pws_high": high + 1}
    return cell


def outcome(forward: Judgment | None, reverse: Judgment | None, combine: Combine) -> Outcome:
    """Return the outcome of one item for the model, from its judgments in the two orders.

    With "signs", the outcome is the sign of s1 + s2 (positive: win, 0: tie, negative: lose), where s1 and s2 in {+1, 0,
    -1} are the signs of the score differences in the two orders. With "sum", the outcome is the sign of the sum of the
    two score differences. An item without a valid judgment in both orders is "invalid", because the outcome of a single
    order would include the judge's position bias.
    """
    margins = []
    for judgment in (forward, reverse):
        if judgment is None or judgment.score_model is None or judgment.score_reference is None:
            return "invalid"
        margins.append(judgment.score_model - judgment.score_reference)
    if combine == "signs":
        margins = [float(np.sign(margin)) for margin in margins]
    total = sum(margins)
    return "win" if total > 0 else "lose" if total < 0 else "tie"


def in_both_orders(judgments: Iterable[Judgment]) -> dict[tuple[str, str], dict[Order, Judgment]]:
    """Return the judgments of each (benchmark, item) by order, sorted by benchmark and item.

    Raises:
        DataError: an item has two judgments in the same order, for example from two runs.
    """
    pairs: dict[tuple[str, str], dict[Order, Judgment]] = {}
    for judgment in judgments:
        orders = pairs.setdefault((judgment.benchmark, judgment.item_id), {})
        if judgment.order in orders:
            raise DataError(
                f"item {judgment.benchmark}/{judgment.item_id} has two judgments in the order {judgment.order}; "
                "give the judgments of one run only"
            )
        orders[judgment.order] = judgment
    return dict(sorted(pairs.items()))


def outcomes_of(judgments: Iterable[Judgment], combine: Combine) -> dict[tuple[str, str], Outcome]:
    """Return the outcome of each (benchmark, item) for the model."""
    pairs = in_both_orders(judgments)
    return {item: outcome(orders.get("forward"), orders.get("reverse"), combine) for item, orders in pairs.items()}


def summarise(outcomes: Outcomes, confidence: float) -> dict[str, Any]:
    """Return the cell of each benchmark and of all items, as `estimate` computes them.

    The form is `{"confidence", "benchmarks": {name: cell}, "pooled": cell of all items}`.
    """
    by_benchmark: dict[str, list[Outcome]] = {}
    for (benchmark, _), each in sorted(outcomes.items()):
        by_benchmark.setdefault(benchmark, []).append(each)
    cells = {name: estimate(each, confidence) for name, each in by_benchmark.items()}
    return {"confidence": confidence, "benchmarks": cells, "pooled": estimate(outcomes.values(), confidence)}


def outcome_strings(outcomes: Outcomes) -> dict[str, dict[str, str]]:
    """Return `{benchmark: {"items": hash of the item ids, "outcomes": one letter per item}}`.

    The letters w, t, l and i stand for win, tie, lose and invalid, and are in the order of the item ids. If two runs on
    the same data set have the same hash, they judged the same items, and their letters can be compared item by item.
    """
    by_benchmark: dict[str, dict[str, str]] = {}
    for (benchmark, item), kind in sorted(outcomes.items()):
        by_benchmark.setdefault(benchmark, {})[item] = kind[0]
    return {
        name: {"items": content_hash(*kinds)[:16], "outcomes": "".join(kinds.values())}
        for name, kinds in by_benchmark.items()
    }


def agreement(outcomes: Outcomes, labels: Outcomes) -> dict[str, Any]:
    """Return `{"items", "accuracy", "kappa"}`: how far `outcomes` and `labels` agree.

    `items` is the number of items that are valid in both; accuracy and Cohen's kappa are over these items, and are None
    if there are no such items. `kappa` is also None if all outcomes and labels are the same, because its denominator is
    then 0.
    """
    shared = [item for item, kind in outcomes.items() if "invalid" not in (kind, labels.get(item, "invalid"))]
    if not shared:
        return {"items": 0, "accuracy": None, "kappa": None}
    judged, labelled = ([source[item] for item in shared] for source in (outcomes, labels))
    accuracy = float(np.mean([a == b for a, b in zip(judged, labelled, strict=True)]))
    chance = sum(judged.count(kind) * labelled.count(kind) for kind in SIGNS) / len(shared) ** 2
    kappa = (accuracy - chance) / (1 - chance) if chance < 1 else None
    return {"items": len(shared), "accuracy": accuracy, "kappa": kappa}
