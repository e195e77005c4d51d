"""Existing judge records, scored again: `python -m gradsift.evaluation.records FILE...` prints JSON.

Three kinds of file are known by their content:

    judgments.jsonl       ours: one judgment a line, both orders
    two-order reviews     an object with `data`: rows of Answer1, Answer2, `scores` [first, second] and
                          `scores_reverse`, which stands as shown, i.e. [Answer2, Answer1]; Answer1 is the
                          model, Answer2 the reference (the shape of Cherry_LLM's and Superfiltering's files)
    annotations.json      alpaca_eval's: rows of output_1, output_2 and `preference` from 1 (output_1) to 2
                          (output_2), 1.5 or 0 for a draw; output_2 is the model. One order a file: with a
                          second file in which the outputs are swapped, both are had

PWS needs both orders; of a file with one the win rate is given, and PWS from that order under `one_order`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gradsift import outside_json
from gradsift.config.bounds import require_resampling
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.evaluation.agreement import Outcomes, agreement, paired_test
from gradsift.evaluation.bias import length_bias, position_bias
from gradsift.evaluation.judges import Combine, Order
from gradsift.evaluation.judgments import Judgment, read_judgments
from gradsift.evaluation.pws import Outcome, outcomes_of, summarise

_ANNOTATIONS = "annotations"  # benchmark of alpaca_eval's rows that name none


@dataclass
class Records:
    """Judgments of any origin, the lengths of the answers where the file holds them, and how orders combine."""

    judgments: list[Judgment]
    lengths: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # characters: model, reference
    combine: Combine = "signs"
    model: str | None = None  # where the file names it


def read_records(path: Path, model: str | None = None) -> Records:
    """The judgments of one file.

    Args:
        model: generator whose wins are counted in an alpaca_eval file; that of the first output_2 when empty.

    Raises:
        DataError: the file is missing, is none of the known kinds, or a row is broken; names file and row.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there; name a file of judge records")
    if path.suffix == ".jsonl":
        judgments = read_judgments(path)
        # log-probabilities are summed over the orders, grades vote by their signs: see judges.Judge.combine
        summed = bool(judgments) and all(judgment.judge.startswith("local:") for judgment in judgments)
        return Records(judgments, combine="sum" if summed else "signs")
    try:
        content = outside_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fetch or write it again") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return _reviews(path, content)
    if isinstance(content, list) and content and isinstance(content[0], dict) and "preference" in content[0]:
        return _annotations(path, content, model)
    raise DataError(
        f"{path} is of no known kind: it must be a judgments.jsonl, an object with `data` (two-order reviews) or a "
        "list of rows with `preference` (alpaca_eval's annotations)"
    )


def _reviews(path: Path, content: Mapping[str, Any]) -> Records:
    about = content.get("Meta_Info")
    benchmark = str(about["dataset_name"]) if isinstance(about, dict) and "dataset_name" in about else path.stem
    records = Records([])
    for number, row in enumerate(content["data"], start=1):
        place = f"{path}, row {number}"
        if not isinstance(row, dict) or not {"scores", "scores_reverse"} <= row.keys():
            raise DataError(f"{place}: `scores` or `scores_reverse` is missing; a review has both orders")
        first, second = _pair(row["scores"], place), _pair(row["scores_reverse"], place)
        replies = str(row.get("review", "")), str(row.get("review_reverse", ""))
        swapped = None if second is None else (second[1], second[0])
        records.judgments.append(_judgment(benchmark, str(number), "forward", replies[0], first))
        records.judgments.append(_judgment(benchmark, str(number), "reverse", replies[1], swapped))
        answers = row.get("Answer1"), row.get("Answer2")
        if isinstance(answers[0], str) and isinstance(answers[1], str):
            records.lengths[benchmark, str(number)] = (len(answers[0]), len(answers[1]))
    return records


def _pair(value: Any, place: str) -> tuple[float, float] | None:
    """Two scores, which the published files hold as text; [-1, -1] is how they mark a reply without scores."""
    try:
        found = outside_json.loads(value) if isinstance(value, str) else value
        first, second = (float(score) for score in found)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{place}: {value!r} is no pair of scores ({error}); mend or delete the row") from error
    return None if first < 0 or second < 0 or not np.isfinite([first, second]).all() else (first, second)


def _annotations(path: Path, rows: Sequence[Any], model: str | None) -> Records:
    model = model or str(rows[0].get("generator_2", "output_2"))
    records = Records([], model=model)
    seen: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        if not isinstance(row, dict) or "preference" not in row:
            raise DataError(f"{place}: `preference` is missing; mend or delete the row")
        preference = row["preference"]
        valid = isinstance(preference, int | float) and not isinstance(preference, bool)
        valid = valid and -math.inf < preference < math.inf  # numpy takes no whole number of hundreds of digits
        if valid and preference != 0 and not 1 <= preference <= 2:
            raise DataError(f"{place}: preference={preference} is neither from 1 to 2 nor 0; mend or delete the row")
        benchmark = str(row.get("dataset") or _ANNOTATIONS)  # not the file's name: its other order has another
        text = str(row.get("instruction", number))
        repeat = seen[benchmark, text] = seen.get((benchmark, text), 0) + 1
        item = text if repeat == 1 else f"{text} ({repeat})"
        share = (0.5 if preference == 0 else float(preference) - 1) if valid else None  # of output_2
        generators = row.get("generator_1", "output_1"), row.get("generator_2", "output_2")
        if model not in generators:
            raise DataError(f"{place}: neither output is by {model!r}, but by {generators[0]} and {generators[1]}")
        order: Order = "reverse" if generators[1] == model else "forward"
        ours = share if order == "reverse" or share is None else 1 - share
        scores = None if ours is None else (ours, 1 - ours)
        records.judgments.append(_judgment(benchmark, item, order, json.dumps(row.get("raw_completion")), scores))
        outputs = [row.get("output_1"), row.get("output_2")]
        if all(isinstance(output, str) for output in outputs):
            lengths = [len(str(output)) for output in outputs]
            records.lengths[benchmark, item] = (
                (lengths[1], lengths[0]) if order == "reverse" else (lengths[0], lengths[1])
            )
    return records


def _judgment(benchmark: str, item: str, order: Order, reply: str, scores: tuple[float, float] | None) -> Judgment:
    """`scores` are those of the model and of the reference, or None."""
    model, reference = scores or (None, None)
    reason = None if scores else "the record holds no scores"
    return Judgment(benchmark, item, order, "", "record", reply, model, reference, scores is not None, reason)


def read_all(paths: Iterable[Path], model: str | None = None) -> Records:
    """Several files as one: other benchmarks, or the other order of the same items.

    Raises:
        DataError: two files judge one item in one order, or their orders combine differently.
    """
    merged: Records | None = None
    for path in paths:
        records = read_records(path, model)
        model = model or records.model  # a file with the outputs swapped is about the same model
        if merged is None:
            merged = records
        elif merged.combine != records.combine:
            raise DataError("some of the files hold log-probabilities and others grades; score them apart")
        else:
            merged = Records(
                merged.judgments + records.judgments, merged.lengths | records.lengths, merged.combine, model
            )
    if merged is None:
        raise ConfigError("no file of judge records was given")
    return merged


def describe(records: Records, *, bootstrap: int, confidence: float, seed: int) -> dict[str, Any]:
    """Win, tie, lose, invalid, PWS and interval per benchmark and pooled, with position and length bias."""
    summary = summarise(records.judgments, records.combine, bootstrap, confidence, seed)
    summary["position_bias"] = position_bias(records.judgments)
    summary["length_bias"] = length_bias(records.judgments, records.combine, records.lengths)
    if len({judgment.order for judgment in records.judgments}) == 1:
        summary["one_order"] = _one_order(records.judgments)
    return summary


def _one_order(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """alpaca_eval's figures: the win rate in percent (a draw is half a win) and its standard error."""
    pairs = [(j.score_model, j.score_reference) for j in judgments]
    scores = np.array([(a, b) for a, b in pairs if a is not None and b is not None], dtype=float).reshape(-1, 2)
    margins = scores[:, 0] - scores[:, 1]
    if not margins.size:
        return {"n": 0, "win_rate": None, "standard_error": None, "pws": None}
    # a preference is shared out between the two answers; of other grades only the sign is a win
    shares = np.where(np.isclose(scores.sum(axis=1), 1), scores[:, 0], (np.sign(margins) + 1) / 2)
    spread = float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else None
    return {
        "n": len(shares),
        "win": int((margins > 0).sum()),
        "tie": int((margins == 0).sum()),
        "lose": int((margins < 0).sum()),
        "invalid": len(judgments) - len(shares),
        "win_rate": float(100 * shares.mean()),
        "standard_error": None if spread is None else 100 * spread,
        "pws": float(np.sign(margins).mean() + 1),
    }


def read_labels(path: Path) -> Outcomes:
    """People's verdicts: JSON lines of `item_id`, `label` (win, tie or lose of the model) and, if needed, `benchmark`.

    Raises:
        DataError: a line is none of that; names it.
    """
    labels: dict[tuple[str, str], Outcome] = {}
    for number, content in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not content.strip():
            continue
        try:
            row = outside_json.loads(content)
            item = str(row.get("benchmark", "")), str(row["item_id"])
            if row["label"] not in get_args(Outcome):
                raise ValueError(f"label={row['label']!r}")
            if labels.setdefault(item, row["label"]) != row["label"]:
                raise ValueError(f"a second label of {row['item_id']!r}, other than the first,")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: {error!s} is not understood; a line has item_id, label (win, tie, lose or "
                "invalid) and, where there are several, benchmark"
            ) from error
    return labels


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m gradsift.evaluation.records", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="judge records of one model")
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="FILE", help="those of a second model")
    parser.add_argument("--model", help="whose wins are counted in annotations (default: that of the first output_2)")
    parser.add_argument("--labels", type=Path, help="people's verdicts, JSON lines of item_id, label, benchmark")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples for the intervals (default 2000)")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        require_resampling(options.bootstrap, options.confidence, options.seed)
        print(json.dumps(_result(options), indent=1, allow_nan=False))
    except (GradsiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _result(options: argparse.Namespace) -> dict[str, Any]:
    records = read_all(options.files, options.model)
    settings = {"confidence": options.confidence, "seed": options.seed}
    result = describe(records, bootstrap=options.bootstrap, **settings)
    outcomes = outcomes_of(records.judgments, records.combine)
    if options.labels:
        labels = read_labels(options.labels)
        if {benchmark for benchmark, _ in labels} == {""}:  # one benchmark, which the labels need not name
            names = {benchmark for benchmark, _ in outcomes}
            if len(names) > 1:
                raise DataError("the records hold several benchmarks, so each label must name its `benchmark`")
            labels = {(name, item): label for name in names for (_, item), label in labels.items()}
        result["agreement"] = agreement(outcomes, labels)
    if options.against:
        other = read_all(options.against)
        result["against"] = describe(other, bootstrap=options.bootstrap, **settings)
        second = outcomes_of(other.judgments, other.combine)
        result["paired_test"] = paired_test(outcomes, second, resamples=options.bootstrap, **settings)
    return result


if __name__ == "__main__":
    sys.exit(main())
