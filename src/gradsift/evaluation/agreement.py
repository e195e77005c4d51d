"""How far a judge's outcomes agree with people's, and whether two models differ against one reference."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from gradsift.errors import DataError
from gradsift.evaluation.pws import SIGNS, Outcome, Outcomes


def agreement(outcomes: Outcomes, labels: Outcomes) -> dict[str, Any]:
    """Return accuracy and Cohen's kappa of the judge's outcomes against people's, over the items that have both.

    Returns:
        `{"items", "accuracy", "kappa", "unlabelled", "invalid"}`; kappa is None where both always give the same
        outcome, so that chance explains everything.

    Raises:
        DataError: no item has both.
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


def paired_test(first: Outcomes, second: Outcomes, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Test whether two models that met the same reference on the same items differ in PWS.

    Each item gives a difference of outcomes (win 1, tie 0, lose -1), so the item's difficulty cancels. The p-value is
    that of the two-sided sign-flip permutation test of a mean difference of zero, with the observed arrangement among
    the resamples; the interval is the percentile interval of a bootstrap.

    Returns:
        `{"items", "difference", "low", "high", "p_value", "resamples"}`; the difference is PWS(first) - PWS(second)
        over the items that are valid in both.

    Raises:
        DataError: no item is valid in both.
    """
    shared = [item for item in first if item in second and "invalid" not in (first[item], second[item])]
    if not shared:
        raise DataError("the two records share no item with a valid outcome in both; judge the same benchmark")
    differences = np.array([SIGNS[first[item]] - SIGNS[second[item]] for item in shared], dtype=float)
    rng = np.random.default_rng(seed)
    observed = differences.mean()
    # a difference has one of five values, so a resample is a few draws of counts
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
