"""Counts, PWS and agreement of people's votes.

Letters: N items, K categories (win, tie, lose).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gradsift.evaluation.agreement import agreement
from gradsift.evaluation.human.pairs import Key
from gradsift.evaluation.human.votes import Vote
from gradsift.evaluation.pws import Outcome, Outcomes, summarise

KINDS: tuple[Outcome, ...] = ("win", "tie", "lose")


def describe(votes: Iterable[Vote], judged: Outcomes | None, confidence: float) -> dict[str, Any]:
    """Return counts and PWS of each rater and of the majority, raters' position bias, and agreement between raters.

    Args:
        judged: outcomes of an LLM judge on the same items, if there is one.
        confidence: coverage of the intervals, between 0 and 1.

    Returns:
        JSON values. `raters` (by name): n, win, tie, lose, PWS with interval, `both_bad` (ties of two bad answers)
        and `position`. `majority`: counts and PWS per benchmark and pooled; `split` counts the items without a
        majority, which the PWS leaves out. `agreement`: Cohen's kappa of each pair of raters, and Fleiss' kappa over
        the items that all raters rated. `judge`: the LLM judge's counts on the voted items, and its agreement with the
        majority and with each rater; None without a judge. `comments`: the raters' comments.
    """
    by_rater: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.choice is not None:
            by_rater.setdefault(vote.rater, []).append(vote)
    outcomes = {rater: {vote.key: vote.outcome for vote in cast} for rater, cast in by_rater.items()}
    raters = {}
    for rater, cast in by_rater.items():
        cell = summarise(outcomes[rater], confidence)["pooled"]
        del cell["invalid"]  # a vote is always valid
        raters[rater] = {**cell, "both_bad": sum(vote.bad for vote in cast), "position": position(cast)}
    decided = majority(outcomes.values())
    summary = summarise(decided, confidence)
    for cell in (summary["pooled"], *summary["benchmarks"].values()):
        cell["split"] = cell.pop("invalid")
    shared = [key for key in decided if all(key in each for each in outcomes.values())] if len(outcomes) > 1 else []
    counts = np.array([[sum(each[key] == kind for each in outcomes.values()) for kind in KINDS] for key in shared])
    against_judge = None
    if judged is not None:
        voted = {key: judged[key] for key in decided if key in judged}
        against_judge = {
            "pooled": summarise(voted, confidence)["pooled"],
            "majority": _compared(judged, decided),
            "raters": {rater: _compared(judged, each) for rater, each in outcomes.items()},
        }
    return {
        "confidence": confidence,
        "raters": raters,
        "majority": {"pooled": summary["pooled"], "benchmarks": summary["benchmarks"]},
        "agreement": {
            "pairwise": [
                {"raters": [a, b], **_compared(outcomes[a], outcomes[b])} for a, b in combinations(outcomes, 2)
            ],
            "fleiss": {
                "raters": len(outcomes),
                "items": len(shared),
                "kappa": fleiss_kappa(counts) if shared else None,
            },
        },
        "judge": against_judge,
        "comments": [
            {"rater": vote.rater, "benchmark": vote.key[0], "item_id": vote.key[1], "comment": vote.comment}
            for cast in by_rater.values()
            for vote in cast
            if vote.comment
        ],
    }


def majority(raters: Iterable[Outcomes]) -> dict[Key, Outcome]:
    """Return for each item the outcome that more than half of its raters chose, or "invalid" without a majority."""
    votes: dict[Key, list[Outcome]] = {}
    for outcomes in raters:
        for key, kind in outcomes.items():
            votes.setdefault(key, []).append(kind)
    return {
        key: next((kind for kind in KINDS if 2 * kinds.count(kind) > len(kinds)), "invalid")
        for key, kinds in votes.items()
    }


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Return the agreement of several raters beyond chance (Fleiss, 1971).

    Args:
        counts: (N, K) how many raters put item i into category j; each row has the same sum n >= 2.

    Returns:
        (P - Pe) / (1 - Pe) with P the mean over items of (sum_j n_ij^2 - n) / (n (n - 1)) and Pe the sum of the squared
        shares of the categories; None if all votes are the same, because the denominator is then 0.
    """
    raters = counts[0].sum()
    observed = (((counts**2).sum(1) - raters) / (raters * (raters - 1))).mean()
    shares = counts.sum(0) / counts.sum()
    chance = (shares**2).sum()
    return None if np.count_nonzero(shares) == 1 else float((observed - chance) / (1 - chance))


def position(votes: Sequence[Vote]) -> dict[str, Any]:
    """Count one rater's votes by position. `p_value` is from a two-sided sign test for a preferred position."""
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


def _compared(first: Outcomes, second: Outcomes) -> dict[str, Any]:
    """Return accuracy and Cohen's kappa over the items that are valid in both; both None if there is no such item."""
    if not any("invalid" not in (first[key], second.get(key, "invalid")) for key in first):
        return {"items": 0, "accuracy": None, "kappa": None}
    compared = agreement(first, second)
    return {name: compared[name] for name in ("items", "accuracy", "kappa")}
