"""Judging: both orders, each reply kept as it arrives, nothing asked twice, nothing lost by kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import DataError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.generation import ModelOutput, model_outputs
from gradsift.evaluation.judges import Combine, JudgeError, JudgeRequest, Reply, content_hash
from gradsift.evaluation.judging import Judgment, _recover, judge_pairs, read_judgments
from gradsift.journal import JOURNAL_FILE
from gradsift.manifests import UNFINISHED


class LongerIsBetter:
    """Scores by length, in reverse order of the requests; remembers what it was asked; may fail after n replies."""

    name = "longer"
    combine: Combine = "signs"

    def __init__(self, fail_after: int | None = None, version: int = 1) -> None:
        self.asked: list[JudgeRequest] = []
        self.fail_after = fail_after
        self.version = version

    def prompt_hash(self, request: JudgeRequest) -> str:
        return content_hash(self.version, request.instruction, request.input, request.first, request.second)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply]]:
        for request in reversed(requests):
            if len(self.asked) == self.fail_after:
                raise JudgeError("the endpoint is down")
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


def journal(path: Path) -> Path:
    return path.parent / UNFINISHED / JOURNAL_FILE


def kept(path: Path) -> list[Judgment]:
    """What has arrived, all of it whole."""
    return _recover(journal(path), pytest.fail)


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


def test_resume_judges_each_pair_once(tmp_path: Path) -> None:
    path, progress = tmp_path / "judgments.jsonl", list[int]()
    with pytest.raises(JudgeError, match="down"):
        judge_pairs(LongerIsBetter(fail_after=3), *outputs(), path)
    assert len(kept(path)) == 3  # what had arrived is kept
    assert not path.exists()
    second = LongerIsBetter()
    judgments = judge_pairs(second, *outputs(), path, progress=progress.append)
    assert len(second.asked) == 5 and progress == [3, 1, 1, 1, 1, 1]
    third = LongerIsBetter()
    assert judge_pairs(third, *outputs(), path) == judgments
    assert third.asked == [] and len(read_judgments(path)) == 8


def test_a_changed_answer_or_judge_is_judged_anew(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    rows, reference_rows = outputs()
    judge_pairs(LongerIsBetter(), rows, reference_rows, path)
    rows[1]["output"] = "a"
    judge = LongerIsBetter()
    judgments = judge_pairs(judge, rows, reference_rows, path)
    assert {request.item_id for request in judge.asked} == {"1"}
    assert [j.score_model for j in judgments if j.item_id == "1"] == [1, 1]
    assert read_judgments(path) == judgments  # the stages behind this one read the file
    other = LongerIsBetter(version=2)
    judge_pairs(other, rows, reference_rows, path)
    assert len(other.asked) == 8


class Shuffled(LongerIsBetter):
    """Replies as they come from several requests at a time: in another order in each run."""

    def __init__(self, seed: int, fail_after: int | None = None) -> None:
        super().__init__(fail_after)
        self.chance = random.Random(seed)

    def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply]]:
        return super().judge(self.chance.sample(requests, len(requests)))


def test_the_bytes_are_the_same_whatever_order_the_replies_come_in(tmp_path: Path) -> None:
    contents = set()
    for seed in range(5):
        path = tmp_path / str(seed) / "judgments.jsonl"
        if seed > 2:
            with pytest.raises(JudgeError, match="down"):
                judge_pairs(Shuffled(seed, fail_after=seed), *outputs(), path)
        judge_pairs(Shuffled(9 - seed), *outputs(), path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    rows = [json.loads(line) for line in contents.pop().splitlines()]
    assert [(row["item_id"], row["order"]) for row in rows[:3]] == [
        ("0", "forward"),
        ("0", "reverse"),
        ("1", "forward"),
    ]


@settings(max_examples=20)
@given(cut=st.integers(min_value=0, max_value=2000))
def test_a_journal_cut_anywhere_is_completed(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "judgments.jsonl"
    judgments = judge_pairs(LongerIsBetter(), *outputs(), path)
    content = journal(path).read_bytes()
    cut = min(cut, len(content))
    journal(path).write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    judge, said = LongerIsBetter(), list[str]()
    assert judge_pairs(judge, *outputs(), path, say=said.append) == judgments
    assert len(judge.asked) == 8 - whole
    assert len(said) == (not content[:cut].endswith(b"\n") and cut > 0)
    assert len(kept(path)) == len(read_judgments(path)) == 8


@settings(max_examples=20)
@given(place=st.integers(min_value=0), bit=st.integers(min_value=0, max_value=7))
def test_a_judgment_that_was_changed_is_asked_again_with_a_word(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One digit of a score would else be another score."""
    path = tmp_path_factory.mktemp("flip") / "judgments.jsonl"
    judgments = judge_pairs(LongerIsBetter(), *outputs(), path)
    content = bytearray(journal(path).read_bytes())
    content[place % len(content)] ^= 1 << bit
    journal(path).write_bytes(content)
    judge, said = LongerIsBetter(), list[str]()
    assert judge_pairs(judge, *outputs(), path, say=said.append) == judgments
    assert 1 <= len(judge.asked) <= 2  # two where the end of a line was hit
    assert len(said) == 1 and "kept judgments cannot be read; their pairs are judged again" in said[0]
    assert judge_pairs(LongerIsBetter(0), *outputs(), path, say=pytest.fail) == judgments


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
    path.write_text(f"{lines[0]}\n{lines[1][:20]}")  # what earlier versions left when they were killed
    assert len(read_judgments(path)) == 1
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
        def judge(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, Reply]]:
            yield requests[0], Reply("?", (float("nan"), 1.0))

    path = tmp_path / "judgments.jsonl"
    with pytest.raises(JudgeError, match="without a reply to 7 of 8"):
        judge_pairs(Lazy(), *outputs(), path)
    (only,) = kept(path)
    assert isinstance(only, Judgment) and not only.valid and only.reason == "a score is not finite"


SLOW_RUN = """
import sys, time
from pathlib import Path
from test_judging import LongerIsBetter, outputs
from gradsift.evaluation.judging import judge_pairs

class Slow(LongerIsBetter):
    def judge(self, requests):
        for pair in super().judge(requests):
            time.sleep(0.02)
            yield pair

judge_pairs(Slow(), *outputs(200), Path(sys.argv[1]))
"""


def test_kill_9_loses_no_reply_that_was_received(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(path)], env=env)
    deadline = time.monotonic() + 30
    while not (journal(path).exists() and journal(path).read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    arrived = len(_recover(journal(path), lambda line: None))
    judge = LongerIsBetter()
    assert len(judge_pairs(judge, *outputs(200), path)) == 400
    assert 3 <= arrived < 400 and len(judge.asked) == 400 - arrived
