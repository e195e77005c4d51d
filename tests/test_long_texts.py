"""Texts far longer than `max_length` are cut before they are tokenised, which changes no token that is kept."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from gradsift.data import tokens, truncation
from gradsift.data.examples import Example, Turn
from gradsift.data.tokens import encode, encode_prompts
from gradsift.scoring.superfilter import token_ids

WORDS = [
    "the",
    "river",
    "runs",
    "to",
    "the",
    "sea,",
    "and",
    "seawater",
    "rises",
    "over",
    "rivers",
    "running",
    "ÄÖ",
    "日本",
    "1234",
    "<eos>",
]


def text(rng: random.Random, words: int) -> str:
    return "".join(word + rng.choice([" ", "\n", "  "]) for word in rng.choices(WORDS, k=words))


def examples(seed: int, words: int) -> list[Example]:
    rng = random.Random(seed)
    made = []
    for row in range(6):
        earlier = (Turn("user", text(rng, words)), Turn("assistant", text(rng, words), is_trained=row % 2 == 0))
        before = earlier if row > 2 else ()
        parts = [text(rng, rng.choice([3, words])) for _ in range(3)]
        made.append(Example(row, f"{row}-0", str(row), before, *parts, {}))
    return made


@pytest.fixture
def merging_tokenizer(byte_tokenizer: Any) -> Any:
    """Byte-pair tokenizer with merges: a cut within a word changes neighbouring tokens, also across boundaries."""
    corpus = [f"{text(random.Random(seed), 200)}\n\n\n### Instruction:\n" for seed in range(20)]
    trained = byte_tokenizer.train_new_from_iterator(corpus, 400)
    trained.chat_template = byte_tokenizer.chat_template
    return trained


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("max_length", [2, 31, 64])
def test_the_cut_changes_no_token_that_is_kept(
    template: str, max_length: int, merging_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = examples(max_length, 400)
    whole, report = encode(rows, merging_tokenizer, template, max_length)
    prompts = encode_prompts(rows, merging_tokenizer, template, max_length)
    monkeypatch.setattr(truncation, "_WINDOW", (50, 2))
    monkeypatch.setattr(truncation, "_MARGIN", 16)
    seen = _characters_seen(merging_tokenizer, monkeypatch)
    cut, cut_report = encode(rows, merging_tokenizer, template, max_length)
    assert sum(seen) < sum(len(one.instruction) + len(one.input) + len(one.output) for one in rows)
    assert [one.row for one in cut] == [one.row for one in whole]
    for ours, theirs in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(ours.is_response, theirs.is_response)
    assert (cut_report.truncated_prompts, cut_report.truncated_responses) == (
        report.truncated_prompts,
        report.truncated_responses,
    )
    shorter = encode_prompts(rows, merging_tokenizer, template, max_length)
    assert shorter[1] == prompts[1]
    for ids, expected in zip(shorter[0], prompts[0], strict=True):
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("cut", ["prompt", "response"])
def test_a_cut_leaves_the_token_between_a_response_and_the_next_prompt(
    cut: str, merging_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response ends with a line break, which forms one token with the first line break of the prompt."""
    long = text(random.Random(0), 400)
    response, instruction = (f"{long}\n", "list") if cut == "response" else ("no\n", long)
    before = (Turn("user", "say"), Turn("assistant", response))
    rows = [Example(0, "0-0", "0", before, instruction, "", "yes", {})]
    (whole,), _ = encode(rows, merging_tokenizer, "alpaca", 64)
    monkeypatch.setattr(truncation, "_WINDOW", (50, 2))
    monkeypatch.setattr(truncation, "_MARGIN", 16)
    seen = _characters_seen(merging_tokenizer, monkeypatch)
    (short,), _ = encode(rows, merging_tokenizer, "alpaca", 64)
    assert sum(seen) < len(long)
    np.testing.assert_array_equal(short.input_ids, whole.input_ids)
    np.testing.assert_array_equal(short.is_response, whole.is_response)


def _characters_seen(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of characters of each call of the tokenizer."""
    counts: list[int] = []
    call = type(tokenizer).__call__

    def counting(self: Any, given: Any, *args: Any, **options: Any) -> Any:
        counts.append(sum(map(len, given)))
        return call(self, given, *args, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    return counts


def test_what_is_tokenised_does_not_grow_with_the_row(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 1_000_000
    rows = [Example(0, "0-0", "0", (), long, "", "yes", {}), Example(1, "1-0", "1", (), "say", "", long, {})]
    seen = _characters_seen(byte_tokenizer, monkeypatch)
    encoded, report = encode(rows, byte_tokenizer, "alpaca", 64)
    assert [len(one.input_ids) for one in encoded] == [64, 64]
    assert (report.truncated_prompts, report.truncated_responses) == (2, 1)
    assert sum(seen) < 200_000


def test_of_a_long_conversation_the_last_exchanges_are_tokenised(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tuple(Turn(role, f"{role} {turn}") for turn in range(1000) for role in ("user", "assistant"))
    rows = [Example(0, "0-0", "0", earlier, "say", "", "yes", {})]
    whole, expected = encode(rows, byte_tokenizer, "plain", 64)
    monkeypatch.setattr(truncation, "_WINDOW", (1000, 2))
    seen = _characters_seen(byte_tokenizer, monkeypatch)
    cut, report = encode(rows, byte_tokenizer, "plain", 64)
    assert sum(seen) < 5000
    np.testing.assert_array_equal(cut[0].input_ids, whole[0].input_ids)
    assert report == expected


def test_a_prompt_of_several_parts_is_cut_as_a_whole(byte_tokenizer: Any) -> None:
    before = (Turn("user", "hello"), Turn("assistant", "good day", is_trained=False))
    rows = [Example(0, "0-0", "0", before, "and on", "", "yes", {})]
    (one,), _ = encode(rows, byte_tokenizer, "plain", 9)
    assert byte_tokenizer.decode(one.input_ids) == "d on\nyes<eos>"


def test_a_window_grows_until_it_holds_enough_tokens(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "_WINDOW", (8, 0))
    rows = [Example(0, "0-0", "0", (), "a" * 1000, "", "b" * 1000, {})]
    (one,), _ = encode(rows, byte_tokenizer, "plain", 300)
    assert byte_tokenizer.decode(one.input_ids) == "\n" + "b" * 299


def test_long_examples_are_tokenised_in_smaller_chunks(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CHUNK_CHARACTERS", 1000)
    rows = [Example(row, f"{row}-0", str(row), (), "a" * 400, "", "b" * 200, {}) for row in range(5)]
    done: list[int] = []
    encoded, _ = encode(rows, byte_tokenizer, "plain", 1000, progress=done.append)
    assert (len(encoded), done) == (5, [2, 2, 1])


def test_stretches_of_text_have_the_same_tokens_up_to_the_limit(
    merging_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text(random.Random(seed), words) for seed, words in enumerate([1, 40, 4000])]
    whole = list(token_ids(merging_tokenizer, texts, special=True))
    monkeypatch.setattr(truncation, "_WINDOW", (200, 2))
    cut = list(token_ids(merging_tokenizer, texts, special=True, limit=30))
    assert len(cut[2]) < 1000 < len(whole[2])
    for ours, theirs in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(ours[:30], theirs[:30])
        assert (len(ours) > 30) == (len(theirs) > 30)
