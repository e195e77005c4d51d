"""Laws of the journal: a kept result is not computed again, and is returned only for its own key."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOKE
from test_generation import ragged_prompts, tiny_model, tiny_tokenizer

from gradsift import journal as journal_module
from gradsift.data.tokens import Encoded
from gradsift.evaluation import generation
from gradsift.evaluation.generation import generate_answers
from gradsift.journal import JOURNAL_FILE, Journal
from gradsift.manifests import UNFINISHED
from gradsift.training.device import TokenBudget

ODD = [0.1, 1 / 3, 1e-45, 3.4e38, -0.0, float("nan"), float("inf")]
VALUES = ["a\ud800\u2028b", [1, None], {"loss": 0.1}, torch.tensor(ODD), torch.tensor([ODD], dtype=torch.float64)]


def asked(folder: Path, keys: Sequence[Any], say: Callable[[str], None] = print) -> tuple[list[Any], list[Any]]:
    """Return what the journal gives for these keys, and the keys that had to be computed."""
    made: list[Any] = []

    def make(key: Any) -> Callable[[], Any]:
        def work() -> Any:
            made.append(key)
            return f"{key} {next(serial)}"

        return work

    journal = Journal(folder, say=say)
    return [journal.once(key, make(key)) for key in keys], made


serial = count()


def lines(folder: Path) -> Path:
    return folder / UNFINISHED / JOURNAL_FILE


def test_kept_results_are_returned_in_their_order(tmp_path: Path) -> None:
    first, _ = asked(tmp_path, [[1], [2]])
    again, made = asked(tmp_path, [[1], [2], [3]])
    assert again[:2] == first
    assert made == [[3]]
    assert asked(tmp_path, [[1], [2], [3]]) == (again, [])


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_come_back_as_they_were(value: Any, tmp_path: Path) -> None:
    Journal(tmp_path).once("key", lambda: [value])
    (restored,) = Journal(tmp_path).once("key", lambda: pytest.fail("made again"))
    if isinstance(value, torch.Tensor):
        assert restored.dtype == value.dtype
        assert restored.numpy().tobytes() == value.numpy().tobytes()
    else:
        assert restored == value


def test_from_the_first_key_that_differs_all_is_computed_again(tmp_path: Path) -> None:
    asked(tmp_path, ["a", "b", "c"])
    values, made = asked(tmp_path, ["a", "B", "c"])
    assert made == ["B", "c"]
    assert asked(tmp_path, ["a", "B", "c"]) == (values, [])


def test_a_line_that_was_cut_is_computed_again(tmp_path: Path) -> None:
    first, _ = asked(tmp_path, ["a", "b"])
    content = lines(tmp_path).read_bytes()
    second = content.index(b"\n") + 1
    for cut in range(len(content)):
        lines(tmp_path).write_bytes(content[:cut])
        values, made = asked(tmp_path, ["a", "b"])
        assert made == (["a", "b"] if cut < second else ["b"])
        assert asked(tmp_path, ["a", "b"]) == (values, [])
        assert values[0] == first[0] or cut < second
    lines(tmp_path).write_bytes(content[:second] + b"\0" * 20)  # what a machine that went down may leave
    assert asked(tmp_path, ["a", "b"])[1] == ["b"]


def test_a_line_that_was_changed_is_reported_and_computed_again(tmp_path: Path) -> None:
    """Holds for every byte of the line, because one changed digit of a loss would be another loss."""
    first, _ = asked(tmp_path, ["a", "b", "c"])
    content = lines(tmp_path).read_bytes()
    second, third = content.index(b"\n") + 1, content.rindex(b"\n", 0, -1) + 1
    for place in range(second, third):
        lines(tmp_path).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        said: list[str] = []
        values, made = asked(tmp_path, ["a", "b", "c"], said.append)
        assert (values[0], made) == (first[0], ["b", "c"])
        (line,) = said
        assert f"line 2 of {tmp_path.name}/unfinished/journal.jsonl is cut or damaged" in line
        assert asked(tmp_path, ["a", "b", "c"], said.append) == (values, [])
        assert len(said) == 1


def test_a_line_without_a_checksum_is_computed_again(tmp_path: Path) -> None:
    asked(tmp_path, ["a"])
    lines(tmp_path).write_text('["a", "found"]\n')
    assert asked(tmp_path, ["a"])[1] == ["a"]


def test_a_result_that_is_not_intact_any_more_is_computed_again(tmp_path: Path) -> None:
    asked(tmp_path, ["a", "b", "c"])
    journal = Journal(tmp_path)
    values = [journal.once(key, lambda: "new", lambda value: value.startswith("a ")) for key in ("a", "b", "c")]
    assert values[0].startswith("a ")
    assert values[1:] == ["new", "new"]
    assert asked(tmp_path, ["a", "b", "c"]) == (values, [])


def test_a_failure_leaves_no_result(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Journal(tmp_path).once("a", lambda: 1 // 0)
    assert asked(tmp_path, ["a"])[1] == ["a"]


def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ndarray"):
        Journal(tmp_path).once("a", lambda: np.zeros(2))


def test_results_that_wait_on_a_gpu_are_written_with_the_next_that_is_due(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(journal_module, "_on_gpu", lambda value: True)
    journal = Journal(tmp_path, save_every=0.05)
    journal.once("a", lambda: 1)
    assert not lines(tmp_path).exists()
    time.sleep(0.06)
    journal.once("b", lambda: 2)
    assert asked(tmp_path, ["a", "b"]) == ([1, 2], [])


class Stop(Exception):
    """Stands for kill -9."""


def test_a_pass_continues_with_the_remaining_groups(tmp_path: Path) -> None:
    examples = [Encoded(row, row, np.zeros(2 + row % 5, np.int32), np.ones(2 + row % 5, bool)) for row in range(20)]
    left = [3]
    passed: list[int] = []

    def work(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        left[0] -= 1
        if not left[0]:
            raise Stop
        rows = torch.tensor([example.row for example in batch])
        passed.extend(rows.tolist())
        return rows, rows / 3

    def passed_with(folder: Path | None) -> list[list[Any]]:
        passes = TokenBudget(16).passes(examples, work, Journal(folder))
        return [[[part.tolist() for part in parts] for parts in results] for results in passes]

    with pytest.raises(Stop):
        passed_with(tmp_path)
    before = list(passed)
    left[0] = -1
    resumed = passed_with(tmp_path)
    assert sorted(passed) == list(range(20))
    assert 0 < len(before) < 20
    assert resumed == passed_with(None)


def test_answers_are_generated_once_each(tmp_path: Path, monkeypatch: Any) -> None:
    model, tokenizer, prompts = tiny_model("gpt2"), tiny_tokenizer(), ragged_prompts()
    decoded: list[list[int]] = []
    plain = generation.left_padded

    def noted(batch: list[list[int]], *arguments: Any) -> Any:
        decoded.extend(batch)
        return plain(batch, *arguments)

    monkeypatch.setattr(generation, "left_padded", noted)

    def answers(folder: Path | None, progress: Callable[[int], None] = lambda done: None) -> list[str]:
        options = {"max_new_tokens": 8, "batch_size": 3, "progress": progress, "journal": Journal(folder)}
        return generate_answers(model, tokenizer, prompts, **options)

    def die(done: int) -> None:
        if len(decoded) >= 6:
            raise Stop

    with pytest.raises(Stop):
        answers(tmp_path, die)
    resumed = answers(tmp_path)
    assert len(decoded) == len(prompts)
    assert resumed == answers(None)


@pytest.mark.parametrize("scorer", ["superfilter", "perplexity"])
def test_an_interrupted_scoring_pass_ends_with_the_same_table(gradsift, monkeypatch: Any, scorer: str) -> None:
    command = (*SMOKE, f"scorer={scorer}", "stop_after=scores", "compute.tokens=64")
    monkeypatch.setattr("gradsift.scoring.superfilter._BATCH_TOKENS", {"cpu": 64})
    assert gradsift(*command, f"artifacts={gradsift.folder / 'whole'}") == 0
    once, made = Journal.once, []

    def watched(journal: Journal, key: Any, make: Callable[[], Any]) -> Any:
        def noted() -> Any:
            if len(made) == 7:
                raise KeyboardInterrupt
            made.append(key)
            return make()

        return once(journal, key, noted)

    monkeypatch.setattr(Journal, "once", watched)
    assert gradsift(*command) == 130
    before, made[:] = list(made), [None] * 8  # beyond the stop
    assert gradsift(*command) == 0
    assert len(before) == 7
    assert not [key for key in made[8:] if key in before]
    (ours,), (theirs,) = (store.glob("score/*/scores.parquet") for store in (gradsift.store, gradsift.folder / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not list(gradsift.store.rglob(UNFINISHED))
