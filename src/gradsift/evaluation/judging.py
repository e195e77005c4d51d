"""Pairwise judging in both orders, kept reply by reply and written as `judgments.jsonl` in the order of the items."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift import outside_json
from gradsift.errors import DataError
from gradsift.evaluation.generation import ModelOutput, check_pairs, item_key
from gradsift.evaluation.judges import Judge, JudgeError, JudgeRequest, Order, Reply
from gradsift.journal import JOURNAL_FILE, sealed, unsealed
from gradsift.manifests import UNFINISHED

ORDERS: tuple[Order, Order] = ("forward", "reverse")


@dataclass(frozen=True)
class Judgment:
    """One reply of a judge about one pair in one order, as it stands in `judgments.jsonl`.

    The scores belong to the model and to the reference model, whichever was shown first; both are
    None, and `reason` says why, where `valid` is false. Beside scores, `reason` says what is odd about them.
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
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = print,
) -> list[Judgment]:
    """Have each pair of answers judged in both orders.

    Every reply is on disk before the next one is looked at, in `unfinished/` beside `path`. Called again with the same
    `path`, pairs whose prompt (by hash) this judge has already replied to are not asked again, so a run that was
    killed at any point goes on where it stopped. `path` itself is written at the end, in the order that is returned:
    the same judgments are the same bytes, whatever order the replies came in.

    Args:
        path: `judgments.jsonl`; made, with its folder, if it is not there.
        progress: called with the number of judgments found on disk, then with 1 for each new one.
        say: told of kept judgments that cannot be read; their pairs are judged again.

    Returns:
        Two judgments an item, forward then reverse, in the order of `model_outputs`.

    Raises:
        DataError: the two models' answers are not to the same items.
        JudgeError: a request failed for good, or a reply is missing.
    """
    check_pairs(model_outputs, reference_outputs)
    requests = _requests(model_outputs, reference_outputs)
    hashes = {_request_key(request): judge.prompt_hash(request) for request in requests}
    journal = path.parent / UNFINISHED / JOURNAL_FILE
    kept = {
        _judgment_key(judgment): judgment
        for judgment in _recover(journal, say)
        if judgment.judge == judge.name and hashes.get(_judgment_key(judgment)) == judgment.prompt_hash
    }
    if progress is not None and kept:
        progress(len(kept))
    missing = [request for request in requests if _request_key(request) not in kept]
    if missing:
        with journal.open("ab") as file:
            for request, reply in judge.judge(missing):
                judgment = _judgment(judge.name, hashes[_request_key(request)], request, reply)
                file.write(sealed(_record(judgment)))
                file.flush()
                os.fsync(file.fileno())
                kept[_request_key(request)] = judgment
                if progress is not None:
                    progress(1)
    lacking = [request for request in requests if _request_key(request) not in kept]
    if lacking:
        raise JudgeError(f"{judge.name} ended without a reply to {len(lacking)} of {len(requests)} requests")
    judgments = [kept[_request_key(request)] for request in requests]
    path.write_text("".join(f"{_record(judgment)}\n" for judgment in judgments), encoding="ascii")
    return judgments


def _record(judgment: Judgment) -> str:
    # ASCII escapes: replies may hold half a surrogate pair or U+2028
    return json.dumps(dataclasses.asdict(judgment), allow_nan=False)


def _recover(journal: Path, say: Callable[[str], None]) -> list[Judgment]:
    """The judgments that an interrupted run has kept; what was cut or changed is taken out of the file."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    whole = [(line, text) for line in lines if (text := unsealed(line)) is not None]
    if len(whole) < len(lines):
        say(f"  {len(lines) - len(whole)} of the kept judgments cannot be read; their pairs are judged again")
        fresh = journal.with_suffix(".new")
        fresh.write_bytes(b"".join(line for line, _ in whole))
        fresh.replace(journal)
    return [_from_record(json.loads(text)) for _, text in whole]


def read_judgments(path: Path) -> list[Judgment]:
    """Read `judgments.jsonl`, in the order of the file.

    A last line that is neither ended nor whole is passed over: earlier versions left such a one when they were killed.

    Raises:
        DataError: the file is missing, or a line is broken; names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); judge the answers first") from error
    lines = content.split(b"\n")
    judgments = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        try:
            judgments.append(_from_record(outside_json.loads(line)))
        # ValueError: broken JSON, broken UTF-8 or a value that no judgment has; OverflowError: a huge score
        except (ValueError, TypeError, OverflowError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number} is no judgment ({error}); mend or delete the line to have its pair judged again"
            ) from error
    return judgments


def _from_record(record: Any) -> Judgment:
    """A judgment from its JSON object; ValueError or TypeError if it is none."""
    judgment = Judgment(**record)
    texts = (judgment.benchmark, judgment.item_id, judgment.prompt_hash, judgment.judge, judgment.reply)
    if not all(isinstance(text, str) for text in texts) or judgment.order not in ORDERS:
        raise ValueError("a field has a value that it cannot have")
    scores = (judgment.score_model, judgment.score_reference)
    numbers = [s for s in scores if isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s)]
    if judgment.valid is not (len(numbers) == 2) or (not judgment.valid and scores != (None, None)):
        raise ValueError("`valid` and the scores contradict each other")
    return judgment


def _requests(rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]) -> list[JudgeRequest]:
    """Both orders of every item, side by side: a run that breaks off leaves whole items."""
    theirs = {item_key(row): row for row in reference_rows}
    requests = []
    for row in rows:
        answers = row["output"], theirs[item_key(row)]["output"]
        for order in ORDERS:
            first, second = answers if order == "forward" else answers[::-1]
            requests.append(
                JudgeRequest(
                    item_id=row["item_id"],
                    benchmark=row["dataset"],
                    order=order,
                    instruction=row["instruction"],
                    input=row["input"],
                    first=first,
                    second=second,
                    reference=row["reference"],
                )
            )
    return requests


def _judgment(judge: str, prompt_hash: str, request: JudgeRequest, reply: Reply) -> Judgment:
    scores, reason = reply.scores, reply.reason
    if scores is None:
        reason = reason or "no scores"
    elif not all(map(math.isfinite, scores)):
        scores, reason = None, "a score is not finite"
    else:
        scores = scores if request.order == "forward" else (scores[1], scores[0])
    return Judgment(
        benchmark=request.benchmark,
        item_id=request.item_id,
        order=request.order,
        prompt_hash=prompt_hash,
        judge=judge,
        reply=reply.text,
        score_model=scores[0] if scores else None,
        score_reference=scores[1] if scores else None,
        valid=scores is not None,
        reason=reason,
    )


def _request_key(request: JudgeRequest) -> tuple[str, str, Order]:
    return request.benchmark, request.item_id, request.order


def _judgment_key(judgment: Judgment) -> tuple[str, str, Order]:
    return judgment.benchmark, judgment.item_id, judgment.order
