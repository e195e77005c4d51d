"""Judging: both orders, the same bytes in any order of arrival; a local judge goes on where it was killed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gradsift.errors import DataError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import ModelOutput, model_outputs
from gradsift.evaluation.judges import Combine, JudgeError, JudgeRequest, Reply, content_hash
from gradsift.evaluation.judgments import judge_pairs, read_judgments


class LongerIsBetter:
    """Scores by length, in reverse order of the requests; remembers what it was asked."""

    name = "longer"
    combine: Combine = "signs"

    def __init__(self) -> None:
        self.asked: list[JudgeRequest] = []

    def prompt_hash(self, request: JudgeRequest) -> str:
        return content_hash(request.instruction, request.input, request.first, request.second)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Any]]]:
        for request in reversed(requests):
            self.asked.append(request)
            if request.first == "unclear":
                yield request, Reply("\u2028Hm \ud800", None, "not two scores")
            else:
                yield request, Reply("ok", (float(len(request.first)), float(len(request.second))))


def outputs(count: int = 4) -> tuple[list[ModelOutput], list[ModelOutput]]:
    items = [Item("set", str(n), f"question {n}", f"input {n}", "ref") for n in range(count)]
    return (
        model_outputs(items, ["long answer" + "!" * n for n in range(count)], "model"),
        model_outputs(items, ["short"] * count, "full"),
    )


def test_each_pair_is_shown_in_both_orders_and_scores_go_to_the_right_model(tmp_path: Path) -> None:
    judge = LongerIsBetter()
    judgments = judge_pairs(judge, *outputs(), tmp_path / "new" / "judgments.jsonl")
    assert [(j.item_id, j.order) for j in judgments] == [(str(n), o) for n in range(4) for o in ("forward", "reverse")]
    assert all((j.score_model, j.score_reference) == (11 + int(j.item_id), 5) and j.valid for j in judgments)
    shown = {(r.item_id, r.order): (r.first, r.second, r.input, r.reference) for r in judge.asked}
    assert shown["1", "forward"] == ("long answer!", "short", "input 1", "ref")
    assert shown["1", "reverse"] == ("short", "long answer!", "input 1", "ref")


def test_the_file_holds_what_was_returned(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    rows, reference_rows = outputs()
    rows[2]["output"] = "unclear"
    judgments = judge_pairs(LongerIsBetter(), rows, reference_rows, path)
    assert read_judgments(path) == judgments
    assert list(json.loads(path.read_text().splitlines()[0])) == [
        "benchmark", "item_id", "order", "prompt_hash", "judge", "reply",
        "score_model", "score_reference", "valid", "reason",
    ]  # fmt: skip
    (invalid,) = (j for j in judgments if not j.valid)
    assert (invalid.score_model, invalid.score_reference, invalid.reason) == (None, None, "not two scores")
    assert invalid.reply == "\u2028Hm \ud800"


class Shuffled(LongerIsBetter):
    """Replies as they come from several requests at a time: in another order in each run."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Any]]]:
        return super().judge(self.chance.sample(requests, len(requests)))


def test_the_bytes_are_the_same_whatever_order_the_replies_come_in(tmp_path: Path) -> None:
    contents = set()
    for seed in range(3):
        path = tmp_path / str(seed) / "judgments.jsonl"
        judge_pairs(Shuffled(seed), *outputs(), path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    rows = [json.loads(line) for line in contents.pop().splitlines()]
    assert [(row["item_id"], row["order"]) for row in rows[:3]] == [
        ("0", "forward"),
        ("0", "reverse"),
        ("1", "forward"),
    ]


def test_a_broken_line_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    judge_pairs(LongerIsBetter(), *outputs(), path)
    lines = path.read_text().splitlines()
    good = json.loads(lines[1])
    for broken in (
        lines[1][:20],
        "",
        "[]",
        json.dumps({**good, "valid": False}),
        json.dumps({**good, "score_model": None}),
        json.dumps({**good, "score_model": float("nan")}),
        json.dumps({**good, "order": "sideways"}),
        json.dumps({**good, "extra": 1}),
    ):
        path.write_text("\n".join([lines[0], broken, *lines[2:]]) + "\n")
        with pytest.raises(DataError, match=r"judgments\.jsonl, line 2 "):
            read_judgments(path)
    path.write_text(f"{lines[0]}\n{lines[1]}")
    assert len(read_judgments(path)) == 2
    with pytest.raises(DataError, match="cannot be read"):
        read_judgments(tmp_path / "nothing.jsonl")


def test_answers_to_other_items_are_refused_before_any_request(tmp_path: Path) -> None:
    rows, reference_rows = outputs()
    judge = LongerIsBetter()
    with pytest.raises(DataError, match="set/3"):
        judge_pairs(judge, rows, reference_rows[:3], tmp_path / "judgments.jsonl")
    assert judge.asked == []


def test_a_judge_that_keeps_a_reply_back_or_has_no_number_gives_no_score(tmp_path: Path) -> None:
    class Lazy(LongerIsBetter):
        def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Any]]]:
            yield requests[0], Reply("?", (float("nan"), 1.0))

    path = tmp_path / "judgments.jsonl"
    with pytest.raises(JudgeError, match="without a reply to 7 of 8"):
        judge_pairs(Lazy(), *outputs(), path)
    assert not path.exists()

    class Odd(LongerIsBetter):
        def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply[Any]]]:
            yield from ((request, Reply("?", (float("nan"), 1.0))) for request in requests)

    assert {(j.valid, j.reason) for j in judge_pairs(Odd(), *outputs(), path)} == {(False, "a score is not finite")}
