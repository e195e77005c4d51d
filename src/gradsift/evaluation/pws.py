"""The pairwise winning score (PWS) of a model against a reference model, with its uncertainty.

PWS = (win - lose) / (win + tie + lose) + 1: 1 is parity, 2 wins every item, 0 loses every item
(arXiv 2601.13697, section 4, after Superfiltering).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradsift.errors import DataError
from gradsift.evaluation.judges import Combine, Order
from gradsift.evaluation.judgments import Judgment

Outcome = Literal["win", "tie", "lose", "invalid"]


def outcome(forward: Judgment | None, reverse: Judgment | None, combine: Combine) -> Outcome:
    """What became of the model on one item, from its judgments in the two orders.

    "signs": sign(s1 + s2), where s in {+1, 0, -1} is the sign of an order's score difference.
    "sum": the sign of the sum of the two differences. An item that lacks a valid judgment in
    either order is "invalid": one order alone would carry the judge's position bias.
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
    """The judgments of each (benchmark, item) by order, sorted by benchmark and item.

    Raises:
        DataError: an item has two judgments in one order, so one of them answers another prompt.
    """
    pairs: dict[tuple[str, str], dict[Order, Judgment]] = {}
    for judgment in judgments:
        orders = pairs.setdefault((judgment.benchmark, judgment.item_id), {})
        if judgment.order in orders:
            raise DataError(
                f"item {judgment.benchmark}/{judgment.item_id} has two judgments in the order {judgment.order}; "
                "keep those of one run"
            )
        orders[judgment.order] = judgment
    return dict(sorted(pairs.items()))


def outcomes_of(judgments: Iterable[Judgment], combine: Combine) -> dict[tuple[str, str], Outcome]:
    """What became of the model on each (benchmark, item); see `outcome`."""
    pairs = in_both_orders(judgments)
    return {item: outcome(orders.get("forward"), orders.get("reverse"), combine) for item, orders in pairs.items()}


def summarise(
    judgments: Iterable[Judgment], combine: Combine, bootstrap: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Outcomes and PWS for each benchmark, and pooled over all items.

    Args:
        judgments: at most one for each item and order, in any order.
        combine: the judge's rule, see `gradsift.evaluation.judges.Judge`.
        bootstrap: resamples of the items for the interval.
        confidence: the interval's coverage, between 0 and 1.
        seed: of the resampling.

    Returns:
        `{"combine", "bootstrap", "confidence", "seed", "benchmarks": {name: cell}, "pooled": cell}`
        with cell = `{"n", "win", "tie", "lose", "invalid", "pws", "pws_low", "pws_high"}`. n counts
        items, invalid ones too; the last three are None without a valid item.

    Raises:
        DataError: an item has two judgments in one order, so one of them answers another prompt.
    """
    summary = summarise_outcomes(outcomes_of(judgments, combine), bootstrap, confidence, seed)
    return {"combine": combine, **summary}


def summarise_outcomes(
    outcomes: Mapping[tuple[str, str], Outcome], bootstrap: int, confidence: float, seed: int
) -> dict[str, Any]:
    """`summarise` for outcomes by (benchmark, item), whoever decided them; without `combine`."""
    benchmarks: dict[str, list[Outcome]] = {}
    for (benchmark, _), found in sorted(outcomes.items()):
        benchmarks.setdefault(benchmark, []).append(found)
    # each cell has a random stream of its own: a further benchmark leaves the others' intervals alone
    cells = {
        name: _cell(found, bootstrap, confidence, np.random.default_rng([seed, *name.encode()]))
        for name, found in benchmarks.items()
    }
    return {
        "bootstrap": bootstrap,
        "confidence": confidence,
        "seed": seed,
        "benchmarks": cells,
        "pooled": _cell(list(outcomes.values()), bootstrap, confidence, np.random.default_rng([seed])),
    }


def _cell(outcomes: list[Outcome], bootstrap: int, confidence: float, rng: np.random.Generator) -> dict[str, Any]:
    win, tie, lose, invalid = (outcomes.count(kind) for kind in ("win", "tie", "lose", "invalid"))
    cell: dict[str, Any] = {"n": len(outcomes), "win": win, "tie": tie, "lose": lose, "invalid": invalid}
    valid = win + tie + lose
    if valid == 0:
        return {**cell, "pws": None, "pws_low": None, "pws_high": None}
    # drawing `valid` items with replacement and counting their outcomes is one multinomial draw
    drawn = rng.multinomial(valid, np.array([win, tie, lose]) / valid, size=bootstrap)
    resampled = (drawn[:, 0] - drawn[:, 2]) / valid + 1
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {**cell, "pws": (win - lose) / valid + 1, "pws_low": float(low), "pws_high": float(high)}


def write_pws(path: Path, summary: dict[str, Any]) -> None:
    """Write what `summarise` returned."""
    path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="ascii")


def read_pws(path: Path) -> dict[str, Any]:
    """Read a `pws.json`.

    Raises:
        DataError: the file is missing or is not whole.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run the judge stage first") from error
    except ValueError as error:
        raise DataError(f"{path} is not whole JSON ({error}); delete it and run the judge stage again") from error
    if not isinstance(summary, dict) or "pooled" not in summary or "benchmarks" not in summary:
        raise DataError(f"{path} is no pws.json: it lacks `benchmarks` or `pooled`")
    return summary
