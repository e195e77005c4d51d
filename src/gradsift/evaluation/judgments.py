"""Judgments of pairs of answers, each pair shown in both orders, and the file `judgments.jsonl` that holds them.

After an interruption, `judge_pairs` starts again with all pairs. Stored results are reused: an endpoint's replies from
`gradsift.evaluation.replies`, and a local model's scores from `gradsift.journal`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradsift import outside_json
from gradsift.diagnostics import Diagnostic
from gradsift.errors import DataError
from gradsift.evaluation.generation import ModelOutput, check_pairs, first_turns, item_key
from gradsift.evaluation.judges import Judge, JudgeError, JudgeRequest, Order, Pair, Reply, with_input

_INVALID_LIMIT = 0.05  # share of invalid judgments above which a warning is given
ORDERS: tuple[Order, Order] = ("forward", "reverse")


@dataclass(frozen=True)
class Judgment:
    """A judge's reply about one pair in one order: a line of `judgments.jsonl`.

    In both orders, `score_model` is the score of the model's answer, and `score_reference` that of the reference
    model's answer. If `valid` is false, both scores are None and `reason` says why. If `valid` is true, `reason` is a
    remark about the scores, or None.
    """

    benchmark: str
    item_id: str
    order: Order
    prompt_hash: str
    judge: str
    reply: str
    score_model: float | None
    score_reference: float | None
    valid: bool
    reason: str | None


def judge_pairs(
    judge: Judge,
    model_outputs: Sequence[ModelOutput],
    reference_outputs: Sequence[ModelOutput],
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Judgment]:
    """Judge each pair of answers in both orders; write the judgments to a file and return them.

    Args:
        path: the file `judgments.jsonl`. The content of the file does not depend on the order in which the replies
            arrive.
        progress: called with 1 for each judgment.

    Returns:
        Two judgments per item: forward, with the model's answer first, then reverse. The items are in the order of
        `model_outputs`.

    Raises:
        DataError: the two models did not answer the same items.
        JudgeError: a request failed for good, or a reply is missing.
    """
    check_pairs(model_outputs, reference_outputs)
    requests = _requests(model_outputs, reference_outputs)
    judgments: dict[JudgeRequest, Judgment] = {}
    for request, reply in judge.judge(requests):
        judgments[request] = _judgment(judge, request, reply)
        progress(1)
    if missing := sum(request not in judgments for request in requests):
        raise JudgeError(f"{judge.name} ended without a reply to {missing} of {len(requests)} requests")
    in_order = [judgments[request] for request in requests]
    # ASCII escapes: replies may hold half a surrogate pair or U+2028
    lines = [json.dumps(asdict(judgment), allow_nan=False) for judgment in in_order]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    return in_order


def _requests(rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]) -> list[JudgeRequest]:
    reference_outputs = {item_key(row): row["output"] for row in reference_rows}
    before = first_turns(rows)
    requests = []
    for row in rows:
        earlier: tuple[str, str, str] | None = None
        swapped: tuple[str, str, str] | None = None
        if (turn := before.get(item_key(row))) is not None:
            question, reference = with_input(turn["instruction"], turn["input"]), reference_outputs[item_key(turn)]
            earlier, swapped = (question, turn["output"], reference), (question, reference, turn["output"])
        forward = JudgeRequest(
            item_id=row["item_id"],
            benchmark=row["dataset"],
            order="forward",
            instruction=row["instruction"],
            input=row["input"],
            first=row["output"],
            second=reference_outputs[item_key(row)],
            reference=row["reference"],
            earlier=earlier,
        )
        reverse = replace(forward, order="reverse", first=forward.second, second=forward.first, earlier=swapped)
        requests += [forward, reverse]
    return requests


def _judgment(judge: Judge, request: JudgeRequest, reply: Reply[Pair]) -> Judgment:
    scores, reason = reply.value, reply.reason
    if scores is None:
        reason = reason or "no scores"
    elif not all(map(math.isfinite, scores)):
        scores, reason = None, "a score is not finite"
    elif request.order == "reverse":
        scores = scores[1], scores[0]
    return Judgment(
        benchmark=request.benchmark,
        item_id=request.item_id,
        order=request.order,
        prompt_hash=judge.prompt_hash(request),
        judge=judge.name,
        reply=reply.text,
        score_model=scores[0] if scores else None,
        score_reference=scores[1] if scores else None,
        valid=scores is not None,
        reason=reason,
    )


def invalid_share(judgments: Sequence[Judgment]) -> Diagnostic:
    """Return the diagnostic `invalid_judgments`, about the share of judgments without scores.

    The PWS (pairwise winning score) leaves out each item that has a judgment without scores.
    """
    reasons = Counter(judgment.reason for judgment in judgments if not judgment.valid)
    invalid = reasons.total()
    share = invalid / len(judgments) if judgments else 0.0
    most = f", most of them because {reasons.most_common(1)[0][0]}" if reasons else ""
    return Diagnostic.judged(
        "invalid_judgments",
        share > _INVALID_LIMIT,
        {"invalid_share": share, "invalid": invalid, "judgments": len(judgments)},
        f"{share:.1%} of the judgments are invalid{most}",
        "the replies in judgments.jsonl, judge.parse and judge.max_tokens",
    )


def read_judgments(path: Path) -> list[Judgment]:
    """Read `judgments.jsonl`, in the order of the file.

    Raises:
        DataError: the file is missing, or a line is broken; the message names the line.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); judge the answers first") from error
    judgments = []
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n") if text else [], start=1):
        try:
            judgments.append(_from_record(outside_json.loads(line)))
        # ValueError: broken JSON, broken UTF-8 or an impossible value; OverflowError: a huge score
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}, line {number} is not a judgment ({error}); correct the line, or judge the answers again"
            ) from error
    return judgments


def _from_record(record: Any) -> Judgment:
    judgment = Judgment(**record)
    texts = (judgment.benchmark, judgment.item_id, judgment.prompt_hash, judgment.judge, judgment.reply)
    if not all(isinstance(text, str) for text in texts) or judgment.order not in ORDERS:
        raise ValueError("a field has a value of the wrong type")
    scores = (judgment.score_model, judgment.score_reference)
    numbers = [s for s in scores if isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s)]
    if judgment.valid is not (len(numbers) == 2) or (not judgment.valid and scores != (None, None)):
        raise ValueError("`valid` and the scores contradict each other")
    return judgment
