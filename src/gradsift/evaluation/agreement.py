"""What a judge's verdicts are worth: against people's, and between two models that met one reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from gradsift.errors import DataError
from gradsift.evaluation.pws import Outcome

Outcomes = Mapping[tuple[str, str], Outcome]  # by (benchmark, item)
_VALUES = {"win": 1, "tie": 0, "lose": -1}


def agreement(outcomes: Outcomes, labels: Outcomes) -> dict[str, Any]:
    """Accuracy and Cohen's kappa of the judge's outcomes against people's, over the items that have both.

    Returns:
        `{"items", "accuracy", "kappa", "unlabelled", "invalid"}`; kappa is None where both always say one
        and the same thing, so that chance explains everything.

    Raises:
        DataError: no item has both.
    """
    shared = [item for item in outcomes if item in labels and outcomes[item] != "invalid" and labels[item] != "invalid"]
    if not shared:
        raise DataError("no item has both a valid judgment and a label; give each label the item's benchmark and id")
    ours, theirs = ([found[item] for item in shared] for found in (outcomes, labels))
    accuracy = float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)]))
    chance = sum(ours.count(kind) * theirs.count(kind) for kind in get_args(Outcome)) / len(shared) ** 2
    return {
        "items": len(shared),
        "accuracy": accuracy,
        "kappa": (accuracy - chance) / (1 - chance) if chance < 1 else None,
        "unlabelled": sum(item not in labels for item in outcomes),
        "invalid": sum(found == "invalid" for found in outcomes.values()),
    }


def paired_test(first: Outcomes, second: Outcomes, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Is the PWS of `first` another than that of `second`? Both met the same reference on the same items.

    Each item gives a difference of outcomes (win 1, tie 0, lose -1), so an item that is hard for both
    cancels. The p-value is that of the sign-flip permutation test of a mean difference of zero, two-sided,
    with the observed arrangement counted among the resamples; the interval is the bootstrap's.

    Returns:
        `{"items", "difference", "low", "high", "p_value", "resamples"}`; the difference is PWS(first) -
        PWS(second) over the shared valid items.

    Raises:
        DataError: no item is valid in both.
    """
    shared = [item for item in first if item in second and "invalid" not in (first[item], second[item])]
    if not shared:
        raise DataError("the two records share no item with a valid outcome in both; judge the same benchmark")
    differences = np.array([_VALUES[first[item]] - _VALUES[second[item]] for item in shared], dtype=float)
    rng = np.random.default_rng(seed)
    observed = differences.mean()
    # an item's difference is one of five values, so a resample is a handful of draws of counts
    values, counts = np.unique(differences, return_counts=True)
    flipped = (values * (2 * rng.binomial(counts, 0.5, size=(resamples, len(values))) - counts)).sum(1) / len(shared)
    drawn = rng.multinomial(len(shared), counts / len(shared), size=resamples) @ values / len(shared)
    extreme = int((np.abs(flipped) >= abs(observed) - 1e-12).sum())
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "items": len(shared),
        "difference": float(observed),
        "low": float(low),
        "high": float(high),
        "p_value": (extreme + 1) / (resamples + 1),
        "resamples": resamples,
    }
