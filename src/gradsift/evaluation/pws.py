"""The pairwise winning score (PWS) of a model against a reference model, with its uncertainty.

PWS = (win - lose) / (win + tie + lose) + 1 (arXiv 2601.13697, section 4, after Superfiltering). It is 1 at parity, 2 if
the model wins every item, and 0 if it loses every item.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradsift.errors import DataError
from gradsift.evaluation.intervals import mean_interval
from gradsift.evaluation.judges import Combine, Order, content_hash
from gradsift.evaluation.judgments import Judgment

Outcome = Literal["win", "tie", "lose", "invalid"]
Outcomes = Mapping[tuple[str, str], Outcome]  # by (benchmark, item)
SIGNS: Mapping[Outcome, int] = {"win": 1, "tie": 0, "lose": -1}


def estimate(outcomes: Iterable[Outcome], confidence: float) -> dict[str, Any]:
    """Return the PWS of some items with its score interval, as a cell of `pws.json`.

    Args:
        confidence: coverage of the interval, between 0 and 1.

    Returns:
        `{"n", "win", "tie", "lose", "invalid", "pws", "pws_low", "pws_high"}`; n includes invalid items, and the last
        three are None if no item is valid.
    """
    outcomes = list(outcomes)
    counts = {kind: outcomes.count(kind) for kind in ("win", "tie", "lose", "invalid")}
    win, tie, lose, _ = counts.values()
    cell: dict[str, Any] = {"n": len(outcomes), **counts, "pws": None, "pws_low": None, "pws_high": None}
    if valid := win + tie + lose:
        low, high = mean_interval(np.repeat([1, 0, -1], [win, tie, lose])[None], confidence)
        cell |= {"pws": (win - lose) / valid + 1, "pws_low": low + 1, "pws_high": high + 1}
    return cell


def outcome(forward: Judgment | None, reverse: Judgment | None, combine: Combine) -> Outcome:
    """Return the outcome of one item for the model, from its judgments in the two orders.

    "signs" gives sign(s1 + s2), where s in {+1, 0, -1} is the sign of an order's score difference. "sum" gives the sign
    of the sum of the two differences. An item without a valid judgment in both orders is "invalid", because one order
    alone would include the judge's position bias.
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
        DataError: an item has two judgments in the same order, as in the records of two runs.
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
    """Return the outcome of each (benchmark, item) for the model."""
    pairs = in_both_orders(judgments)
    return {item: outcome(orders.get("forward"), orders.get("reverse"), combine) for item, orders in pairs.items()}


def summarise(outcomes: Outcomes, confidence: float) -> dict[str, Any]:
    """Return outcomes and PWS for each benchmark, and pooled over all items.

    Returns:
        `{"confidence", "benchmarks": {name: cell}, "pooled": cell}`; each cell is a result of `estimate`.
    """
    by_benchmark: dict[str, list[Outcome]] = {}
    for (benchmark, _), each in sorted(outcomes.items()):
        by_benchmark.setdefault(benchmark, []).append(each)
    cells = {name: estimate(each, confidence) for name, each in by_benchmark.items()}
    return {"confidence": confidence, "benchmarks": cells, "pooled": estimate(outcomes.values(), confidence)}


def outcome_strings(outcomes: Outcomes) -> dict[str, dict[str, str]]:
    """Return the outcomes of each benchmark as one letter per item (w, t, l, i), in the order of the item ids.

    Returns:
        `{benchmark: {"items": hash of the item ids, "outcomes": letters}}`. If two runs on the same
        data set have the same hash, they judged the same items, and their letters can be compared item by item.
    """
    by_benchmark: dict[str, dict[str, str]] = {}
    for (benchmark, item), kind in sorted(outcomes.items()):
        by_benchmark.setdefault(benchmark, {})[item] = kind[0]
    return {
        name: {"items": content_hash(*kinds)[:16], "outcomes": "".join(kinds.values())}
        for name, kinds in by_benchmark.items()
    }


def write_pws(path: Path, summary: dict[str, Any]) -> None:
    """Write the result of the stage `pws`."""
    path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="ascii")


def read_pws(path: Path) -> dict[str, Any]:
    """Read a `pws.json`.

    Raises:
        DataError: the file is missing or incomplete.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run the judge stage first") from error
    except ValueError as error:
        raise DataError(f"{path} is not complete JSON ({error}); move it away and go on") from error
    if not isinstance(summary, dict) or "pooled" not in summary or "benchmarks" not in summary:
        raise DataError(f"{path} is not a pws.json: it lacks `benchmarks` or `pooled`")
    return summary
