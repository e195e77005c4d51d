"""Score existing judge records: `python -m gradsift.evaluation.records FILE...` prints JSON.

Four kinds of file are recognised, by their suffix and content:

    judgments.jsonl       gradsift's own format: one line for each item and order
    two-order reviews     the format of Cherry_LLM's and Superfiltering's files: an object whose `data` is a list of
                          rows. Answer1 is the model's answer, and Answer2 is the reference model's. `scores` are the
                          scores of [Answer1, Answer2], from a judge that was shown Answer1 first. `scores_reverse` are
                          the scores of [Answer2, Answer1], from a judge that was shown Answer2 first
    two-query reviews     DiverseEvol's format: JSON lines with the scores `eval_QUERY0` and `eval_QUERY1`. Each of the
                          two is a list [model's score, reference model's score]. The model's answer is shown first in
                          QUERY0, and second in QUERY1. `assistant1_QUERY0` names the model
    annotations.json      alpaca_eval's format: rows with output_1, output_2 and `preference`, from 1 (output_1 is
                          better) to 2 (output_2 is better), with 1.5 or 0 for a draw. The model is by default
                          `generator_2` of the first row. A file holds one order; a second file, in which the outputs
                          are swapped, holds the other order

PWS needs both orders. If all judgments have the same order, `orders` in the result names this order, `one_order` has
the win rate and the PWS in this order alone, and `pws` is null for each benchmark and for all items together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gradsift import outside_json
from gradsift.config import in_range
from gradsift.errors import DataError, command
from gradsift.evaluation.bias import length_bias, length_controlled, position_bias
from gradsift.evaluation.intervals import difference
from gradsift.evaluation.judges import Combine, Order
from gradsift.evaluation.judgments import ORDERS, Judgment, read_judgments
from gradsift.evaluation.pws import SIGNS, Outcome, Outcomes, agreement, outcomes_of, summarise


@dataclass
class Records:
    """Judgments from any kind of file, and the lengths of the answers in characters if the file has the answers."""

    judgments: list[Judgment]
    lengths: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # of model and reference model
    combine: Combine = "signs"
    model: str | None = None  # the model's name, if the file has it

    def add(self, benchmark: str, item: str, order: Order, reply: str, scores: tuple[float, float] | None) -> None:
        """Add a judgment with the `scores` of the model and of the reference model; None marks an invalid judgment."""
        model, reference = scores or (None, None)
        valid, reason = (True, None) if scores else (False, "the record holds no scores")
        self.judgments.append(Judgment(benchmark, item, order, "", "record", reply, model, reference, valid, reason))

    def add_lengths(self, benchmark: str, item: str, model: Any, reference: Any) -> None:
        """Add the lengths of two answers, if both are text."""
        if isinstance(model, str) and isinstance(reference, str):
            self.lengths[benchmark, item] = (len(model), len(reference))


def read_records(path: Path, model: str | None = None) -> Records:
    """Read the judgments of one file.

    Args:
        model: the model's name in an alpaca_eval file; default: `generator_2` of the first row.

    Raises:
        DataError: the file cannot be read, is of an unknown kind, or has a broken row.
    """
    try:
        text = path.read_bytes().strip()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a file of judge records") from error
    if not text:
        raise DataError(f"{path} is empty; name a file with judge records")
    if path.suffix == ".jsonl":
        if b'"eval_QUERY0"' in text.split(b"\n", 1)[0]:
            return _queries(path)
        judgments = read_judgments(path)
        # a local judge's scores are log-probabilities (see `Judge.combine`)
        summed = bool(judgments) and all(judgment.judge.startswith("local:") for judgment in judgments)
        return Records(judgments, combine="sum" if summed else "signs")
    try:
        content = outside_json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fetch or write it again") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return _reviews(path, content)
    if isinstance(content, list) and content and isinstance(content[0], dict) and "preference" in content[0]:
        return _annotations(path, content, model)
    raise DataError(
        f"{path} is of no known kind: it must be a judgments.jsonl, an object with `data` (two-order reviews), JSON "
        "lines with `eval_QUERY0` (DiverseEvol's) or a list of rows with `preference` (alpaca_eval's annotations)"
    )


def _reviews(path: Path, content: Mapping[str, Any]) -> Records:
    about = content.get("Meta_Info")
    benchmark = str(about["dataset_name"]) if isinstance(about, dict) and "dataset_name" in about else path.stem
    records = Records([])
    for number, row in enumerate(content["data"], start=1):
        place = f"{path}, row {number}"
        _require_orders(row, "scores", "scores_reverse", place)
        forward, reverse = _pair(row["scores"], place), _pair(row["scores_reverse"], place)
        records.add(benchmark, str(number), "forward", str(row.get("review", "")), forward)
        swapped = None if reverse is None else (reverse[1], reverse[0])
        records.add(benchmark, str(number), "reverse", str(row.get("review_reverse", "")), swapped)
        records.add_lengths(benchmark, str(number), row.get("Answer1"), row.get("Answer2"))
    return records


def _queries(path: Path) -> Records:
    benchmark = path.parent.parent.name or path.stem  # BENCHMARK/MODEL/rd_0_vs_chat.jsonl
    records = Records([])
    models: list[Any] = []
    for position, (number, line) in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        try:
            row = outside_json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON ({error}); correct the line") from error
        _require_orders(row, "eval_QUERY0", "eval_QUERY1", place)
        shown = [row.get(f"assistant{side}_QUERY{query}") for query, side in ((0, 1), (0, 2), (1, 2), (1, 1))]
        models = models or shown[:2]  # the model and the reference model
        if shown != [*models, *models]:
            model, reference = models
            raise DataError(
                f"{place}: the assistants are not {(model, reference)} in the first query and {(reference, model)} in "
                "the second; correct the line"
            )
        records.model = str(models[0])
        item = str(row.get("question_id", position))  # not the line: blank lines must not shift items
        for query, order in enumerate(ORDERS):
            scores = _pair(row[f"eval_QUERY{query}"], place)
            records.add(benchmark, item, order, str(row.get(f"response_QUERY{query}", "")), scores)
    return records


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number (from 1) and the content of each line that is not blank."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _require_orders(row: Any, forward: str, reverse: str, place: str) -> None:
    if not isinstance(row, dict) or forward not in row:
        raise DataError(f"{place}: `{forward}` is missing; correct the row")
    if reverse not in row:
        raise DataError(f"{place}: `{reverse}` is missing, so the row holds only one order; PWS needs both")


def _pair(value: Any, place: str) -> tuple[float, float] | None:
    """Return the two scores in a list or its JSON text; None if a score is negative (-1: no score) or not finite."""
    try:
        first, second = map(float, outside_json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{place}: {value!r} is not a pair of scores ({error}); correct the row") from error
    return None if first < 0 or second < 0 or not np.isfinite([first, second]).all() else (first, second)


def _annotations(path: Path, rows: Sequence[Any], model: str | None) -> Records:
    model = model or str(rows[0].get("generator_2", "output_2"))
    records = Records([], model=model)
    repeats: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        if not isinstance(row, dict) or "preference" not in row:
            raise DataError(f"{place}: `preference` is missing; correct the row")
        preference = row["preference"]
        valid = type(preference) in (int, float) and -np.inf < preference < np.inf
        if valid and preference != 0 and not 1 <= preference <= 2:
            raise DataError(f"{place}: preference={preference} is neither from 1 to 2 nor 0; correct the row")
        benchmark = str(row.get("dataset") or "annotations")  # the files of the two orders have different names
        item = str(row.get("instruction", number))
        repeats[benchmark, item] = repeat = repeats.get((benchmark, item), 0) + 1
        item = item if repeat == 1 else f"{item} ({repeat})"
        generators = row.get("generator_1", "output_1"), row.get("generator_2", "output_2")
        if model not in generators:
            raise DataError(
                f"{place}: neither output is by {model!r}, but by {generators[0]} and {generators[1]}; give --model"
            )
        order: Order = "reverse" if generators[1] == model else "forward"
        scores = None
        if valid:
            second = 0.5 if preference == 0 else float(preference) - 1  # output_2's share
            scores = (second, 1 - second) if order == "reverse" else (1 - second, second)
        records.add(benchmark, item, order, json.dumps(row.get("raw_completion")), scores)
        texts = ("output_2", "output_1") if order == "reverse" else ("output_1", "output_2")
        records.add_lengths(benchmark, item, *(row.get(name) for name in texts))
    return records


def read_all(paths: Sequence[Path], model: str | None = None) -> Records:
    """Read several files into one `Records`: files of different benchmarks, or of the two orders of the same items.

    Raises:
        DataError: some files hold log-probabilities and others grades, or a file cannot be read.
    """
    merged = read_records(paths[0], model)
    model = model or merged.model  # the file with the outputs swapped has the same model
    for path in paths[1:]:
        records = read_records(path, model)
        model = model or records.model
        if records.combine != merged.combine:
            raise DataError("some of the files hold log-probabilities and others grades; score them separately")
        merged.judgments += records.judgments
        merged.lengths |= records.lengths
    return merged


def describe(records: Records, confidence: float) -> dict[str, Any]:
    """Return PWS with intervals, position and length bias, `orders` and, if there is only one order, `one_order`.

    Raises:
        DataError: an item has two judgments in the same order.
    """
    outcomes = outcomes_of(records.judgments, records.combine)
    summary = {
        "combine": records.combine,
        **summarise(outcomes, confidence),
        "position_bias": position_bias(records.judgments),
        "length_bias": length_bias(outcomes, records.lengths),
        "length_controlled": length_controlled(outcomes, records.lengths),
        "orders": sorted({judgment.order for judgment in records.judgments}),
    }
    if len(summary["orders"]) == 1:
        summary["one_order"] = _one_order(records.judgments)
    return summary


def _one_order(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """Return counts, PWS and alpaca_eval's win rate in percent, with the standard error of the win rate.

    For the win rate, a draw is half a win, and scores whose sum is 1 are shares of a win.
    """
    valid = [(each.score_model, each.score_reference) for each in judgments if each.valid]
    scores = np.array(valid, dtype=float).reshape(-1, 2)
    if not scores.size:
        return {"n": 0, "win_rate": None, "standard_error": None, "pws": None}
    margins = scores[:, 0] - scores[:, 1]
    # scores that sum to 1 are a preference's shares; of other scores only the sign of the difference counts
    shares = np.where(np.isclose(scores.sum(axis=1), 1), scores[:, 0], (np.sign(margins) + 1) / 2)
    return {
        "n": len(shares),
        "win": int((margins > 0).sum()),
        "tie": int((margins == 0).sum()),
        "lose": int((margins < 0).sum()),
        "invalid": len(judgments) - len(shares),
        "win_rate": float(100 * shares.mean()),
        "standard_error": float(100 * shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else None,
        "pws": float(np.sign(margins).mean() + 1),
    }


def paired_test(first: Outcomes, second: Outcomes, confidence: float) -> dict[str, Any]:
    """Test PWS(first) - PWS(second) over the items that are valid for both models (see `intervals.difference`).

    Raises:
        DataError: no item is valid for both models.
    """
    shared = [item for item in first if item in second and "invalid" not in (first[item], second[item])]
    if not shared:
        raise DataError("the two records share no item with a valid outcome in both; judge the same benchmark")
    ours, theirs = (np.array([[SIGNS[source[item]] for item in shared]]) for source in (first, second))
    return {"items": len(shared), **asdict(difference(ours, theirs, confidence))}


def compare_labels(outcomes: Outcomes, labels: Outcomes) -> dict[str, Any]:
    """Return the judge's `agreement` with people, and how many items have no label or an invalid outcome.

    Raises:
        DataError: no item has both a valid outcome and a valid label.
    """
    if {benchmark for benchmark, _ in labels} == {""}:  # labels of a single benchmark need not name it
        names = {benchmark for benchmark, _ in outcomes}
        if len(names) > 1:
            raise DataError("the records hold several benchmarks, so each label must name its `benchmark`")
        labels = {(name, item): label for name in names for (_, item), label in labels.items()}
    result = agreement(outcomes, labels)
    if not result["items"]:
        raise DataError("no item has both a valid judgment and a label; give each label the item's benchmark and id")
    unlabelled = sum(item not in labels for item in outcomes)
    return {**result, "unlabelled": unlabelled, "invalid": sum(kind == "invalid" for kind in outcomes.values())}


def read_labels(path: Path) -> Outcomes:
    """Read the outcomes that people chose, from JSON lines with the keys `item_id`, `label` and perhaps `benchmark`.

    `benchmark` is needed if there are several benchmarks.

    Raises:
        DataError: a line has another form, or an item has two different labels.
    """
    labels: dict[tuple[str, str], Outcome] = {}
    for number, line in _lines(path):
        try:
            row = outside_json.loads(line)
            item = str(row.get("benchmark", "")), str(row["item_id"])
            if row["label"] not in get_args(Outcome):
                raise ValueError(f"label={row['label']!r}")
            if labels.setdefault(item, row["label"]) != row["label"]:
                raise ValueError(f"a second, different label of {row['item_id']!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: {error}; a line has item_id, label (win, tie, lose or invalid) and, if there "
                "are several benchmarks, benchmark"
            ) from error
    return labels


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.evaluation.records", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="judge records of one model")
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="FILE", help="those of a second model")
    parser.add_argument("--model", help="whose wins are counted in annotations (default: generator_2 of the first row)")
    parser.add_argument("--labels", type=Path, help="people's outcomes, JSON lines of item_id, label, benchmark")
    parser.add_argument("--confidence", type=float, default=0.95, help="coverage of the intervals (default 0.95)")
    options = parser.parse_args(arguments)
    in_range("--confidence", options.confidence, above=0, below=1)
    records = read_all(options.files, options.model)
    result = describe(records, options.confidence)
    outcomes = outcomes_of(records.judgments, records.combine)
    if options.labels:
        result["agreement"] = compare_labels(outcomes, read_labels(options.labels))
    if options.against:
        other = read_all(options.against)
        result["against"] = describe(other, options.confidence)
        second = outcomes_of(other.judgments, other.combine)
        result["paired_test"] = paired_test(outcomes, second, options.confidence)
    if "one_order" in result:
        order = result["orders"][0]
        print(f"note: all judgments have one order ({order}); PWS needs both, see `one_order`", file=sys.stderr)
    print(json.dumps(result, indent=1, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
