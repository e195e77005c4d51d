"""What the votes add up to.

Letters: N items, K categories (win, tie, lose).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gradsift.evaluation.agreement import Outcomes, agreement
from gradsift.evaluation.human.pairs import Key
from gradsift.evaluation.human.votes import Vote
from gradsift.evaluation.pws import Outcome, summarise_outcomes

KINDS: tuple[Outcome, ...] = ("win", "tie", "lose")


def describe(
    votes: Iterable[Vote], judged: Outcomes | None, *, bootstrap: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Counts and PWS of each rater and of their majority, agreement among raters and with the judge, position bias.

    Args:
        judged: outcomes of an LLM judge on the same items, if there is one.
        bootstrap, confidence, seed: see `gradsift.evaluation.pws.summarise`.

    Returns:
        JSON values. `raters`: by name, n, win, tie, lose, PWS with interval, and `position`. `majority`: the
        same per benchmark and pooled, where `split` counts the items without one (not in PWS). `agreement`:
        Cohen's kappa of each two raters, and Fleiss' kappa over the items that all of them rated. `judge`: its
        own counts on the voted items, and its agreement with the majority and each rater; None without one.
    """
    by_rater: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.choice is not None:
            by_rater.setdefault(vote.rater, []).append(vote)
    outcomes = {rater: {vote.key: vote.outcome for vote in found} for rater, found in by_rater.items()}
    settings: dict[str, Any] = {"bootstrap": bootstrap, "confidence": confidence, "seed": seed}
    raters = {}
    for rater, found in by_rater.items():
        cell = summarise_outcomes(outcomes[rater], **settings)["pooled"]
        del cell["invalid"]  # a vote is always one of the three
        raters[rater] = {**cell, "position": position(found)}
    decided = majority(outcomes.values())
    summary = summarise_outcomes(decided, **settings)
    return {
        **settings,
        "raters": raters,
        "majority": {
            "pooled": _with_split(summary["pooled"]),
            "benchmarks": {name: _with_split(cell) for name, cell in summary["benchmarks"].items()},
        },
        "agreement": {
            "pairwise": [
                {"raters": [a, b], **_compared(outcomes[a], outcomes[b])} for a, b in combinations(outcomes, 2)
            ],
            "fleiss": _fleiss_of(list(outcomes.values())),
        },
        "judge": None if judged is None else _against_judge(judged, outcomes, decided, settings),
    }


def majority(raters: Iterable[Outcomes]) -> dict[Key, Outcome]:
    """By item, the outcome that more than half of its raters chose; "invalid" where there is none."""
    votes: dict[Key, list[Outcome]] = {}
    for outcomes in raters:
        for key, found in outcomes.items():
            votes.setdefault(key, []).append(found)
    return {
        key: next((kind for kind in KINDS if 2 * found.count(kind) > len(found)), "invalid")
        for key, found in votes.items()
    }


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement of several raters beyond chance (Fleiss, 1971).

    Args:
        counts: (N, K) how many raters put item i into category j; each row has the same sum n >= 2.

    Returns:
        (P - Pe) / (1 - Pe) with P the mean over items of (sum_j n_ij^2 - n) / (n (n - 1)) and Pe the sum of the squared
        shares of the categories; None where all votes are one and the same, so that chance explains everything.
    """
    raters = counts[0].sum()
    observed = (((counts**2).sum(1) - raters) / (raters * (raters - 1))).mean()
    shares = counts.sum(0) / counts.sum()
    chance = (shares**2).sum()
    return None if np.count_nonzero(shares) == 1 else float((observed - chance) / (1 - chance))


def position(votes: Sequence[Vote]) -> dict[str, Any]:
    """How one rater's votes follow the place; `p_value` is that of the two-sided sign test of no preference."""
    from scipy.stats import binomtest

    first, tie, second = (sum(vote.choice == choice for vote in votes) for choice in ("first", "tie", "second"))
    decided = first + second
    return {
        "first": first,
        "tie": tie,
        "second": second,
        "first_share": first / decided if decided else None,
        "p_value": float(binomtest(first, decided).pvalue) if decided else None,
    }


def _with_split(cell: dict[str, Any]) -> dict[str, Any]:
    return {("split" if name == "invalid" else name): value for name, value in cell.items()}


def _compared(first: Outcomes, second: Outcomes) -> dict[str, Any]:
    """Accuracy and Cohen's kappa over the items that both decided."""
    shared = [key for key in first if "invalid" not in (first[key], second.get(key, "invalid"))]
    if not shared:
        return {"items": 0, "accuracy": None, "kappa": None}
    found = agreement(first, second)
    return {name: found[name] for name in ("items", "accuracy", "kappa")}


def _fleiss_of(raters: Sequence[Outcomes]) -> dict[str, Any]:
    shared = [key for key in raters[0] if all(key in outcomes for outcomes in raters)] if raters else []
    if len(raters) < 2 or not shared:
        return {"raters": len(raters), "items": 0 if len(raters) < 2 else len(shared), "kappa": None}
    counts = np.array([[sum(outcomes[key] == kind for outcomes in raters) for kind in KINDS] for key in shared])
    return {"raters": len(raters), "items": len(shared), "kappa": fleiss_kappa(counts)}


def _against_judge(
    judged: Outcomes, outcomes: dict[str, dict[Key, Outcome]], decided: Outcomes, settings: dict[str, Any]
) -> dict[str, Any]:
    voted = {key: judged[key] for key in decided if key in judged}
    return {
        "pooled": summarise_outcomes(voted, **settings)["pooled"],
        "majority": _compared(judged, decided),
        "raters": {rater: _compared(judged, found) for rater, found in outcomes.items()},
    }
