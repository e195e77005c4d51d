"""Lengths by hand, in both units, and what they ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import SMOKE

from gradsift.data.examples import Example, Turn
from gradsift.scoring.length import length_in_characters, length_in_tokens
from gradsift.selection.topk import topk
from gradsift.training.backbones import Backbone

ROWS = [
    Example(0, "0-0", "0", (), "name it", "", "red", {}),
    Example(1, "1-0", "1", (), "add", "1 2", "ß😀", {}),
    Example(2, "2-0", "2", (Turn("user", "hi"), Turn("assistant", "hello")), "go on", "", "x" * 9, {}),
]
CHARACTERS = {"response": [3, 2, 9], "prompt": [7, 6, 12], "both": [10, 8, 21]}
BYTES = {"response": [3, 6, 9], "prompt": [7, 6, 12], "both": [10, 12, 21]}  # a token a byte


@pytest.mark.parametrize("part", ["response", "prompt", "both"])
def test_lengths_are_those_counted_by_hand(part: str, byte_tokenizer: Any) -> None:
    characters = length_in_characters(ROWS, unit="characters", part=part, prefer="long")
    assert characters.score.tolist() == characters.parts["characters"].tolist() == CHARACTERS[part]
    assert characters.score.dtype == np.float64
    tokens = length_in_tokens(ROWS, Backbone(None, byte_tokenizer), unit="tokens", part=part, prefer="long")
    assert tokens.score.tolist() == tokens.parts["tokens"].tolist() == BYTES[part]


def test_short_turns_the_ranking_around_and_ties_keep_the_order_of_the_rows() -> None:
    rows = [ROWS[0], *ROWS, ROWS[2]]
    long, short = (length_in_characters(rows, unit="characters", part="response", prefer=p) for p in ("long", "short"))
    assert topk(long, 5).positions.tolist() == [3, 4, 0, 1, 2]
    assert topk(short, 5).positions.tolist() == [2, 0, 1, 3, 4]
    np.testing.assert_array_equal(long.parts["characters"], short.parts["characters"])


def test_characters_ask_for_no_model_and_tokens_for_the_proxys(gradsift: Any) -> None:
    arguments = (*SMOKE, "stop_after=selection", "scorer=length")
    assert gradsift("-m", *arguments, "scorer.unit=characters,tokens") == 0
    runs = gradsift.runs()
    names = [[stage["name"] for stage in run["stages"]] for run in runs]
    assert sorted("backbone" in stages for stages in names) == [False, True]
    assert len({stage["fingerprint"] for run in runs for stage in run["stages"] if stage["name"] == "score"}) == 2
