"""Agreement of a judge's outcomes with people's labels, and a test of two models judged against the same reference."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import numpy as np

from gradsift.errors import DataError
from gradsift.evaluation.intervals import difference
from gradsift.evaluation.pws import SIGNS, Outcome, Outcomes


def agreement(outcomes: Outcomes, labels: Outcomes) -> dict[str, Any]:
    """Return accuracy and Cohen's kappa of the judge's outcomes against people's labels.

    Returns:
        `{"items", "accuracy", "kappa", "unlabelled", "invalid"}`. `items` counts the items with a valid outcome and a
        valid label, which are compared. `unlabelled` counts the items without a label, and `invalid` the judge's
        invalid outcomes. `kappa` is None, because its denominator is 0, if judge and people give the same single
        outcome to all items.

    Raises:
        DataError: no item has both a valid outcome and a valid label.
    """
    shared = [item for item in outcomes if item in labels and outcomes[item] != "invalid" and labels[item] != "invalid"]
    if not shared:
        raise DataError("no item has both a valid judgment and a label; give each label the item's benchmark and id")
    judged, labelled = ([source[item] for item in shared] for source in (outcomes, labels))
    accuracy = float(np.mean([a == b for a, b in zip(judged, labelled, strict=True)]))
    chance = sum(judged.count(kind) * labelled.count(kind) for kind in get_args(Outcome)) / len(shared) ** 2
    return {
        "items": len(shared),
        "accuracy": accuracy,
        "kappa": (accuracy - chance) / (1 - chance) if chance < 1 else None,
        "unlabelled": sum(item not in labels for item in outcomes),
        "invalid": sum(kind == "invalid" for kind in outcomes.values()),
    }


def paired_test(first: Outcomes, second: Outcomes, confidence: float) -> dict[str, Any]:
    """Test whether two models that were judged against the same reference differ in PWS.

    Returns:
        `{"items", "difference", "low", "high", "p_value"}`; the difference is PWS(first) - PWS(second) over the items
        that are valid for both models, with interval and p-value from `gradsift.evaluation.intervals.difference`.

    Raises:
        DataError: no item is valid for both models.
    """
    shared = [item for item in first if item in second and "invalid" not in (first[item], second[item])]
    if not shared:
        raise DataError("the two records share no item with a valid outcome in both; judge the same benchmark")
    ours, theirs = (np.array([[SIGNS[source[item]] for item in shared]]) for source in (first, second))
    return {"items": len(shared), **asdict(difference(ours, theirs, confidence))}
