"""IFD against a slow one-example implementation, and the edges of the published procedure."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gradsift.data.examples import Example
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED
from gradsift.scoring.superfilter import superfilter
from gradsift.training.backbones import Backbone

TEXTS = [
    ("name a colour", "", "red"),
    ("repeat the word", "red", "red red"),
    ("say red", "", "red"),  # the answer stands in the prompt too: its last occurrence counts
    ("add the numbers", "3 and 4, and then some more of them", "the sum is 7"),
    ("one byte", "", "x"),  # nothing is scored in an answer of one token
    ("a prompt that is much longer than the context of forty tokens", "and an input", "lost"),
    ("unicode", "", "ß😀"),
    ("long answer", "", "a b c d e f g h i j k l m n o p q r s t u v w x y z and so on and on and on"),
]


@contextmanager
def no_bar(description: str, total: int):
    yield lambda done: None


@pytest.fixture
def backbone(byte_tokenizer: Any) -> Backbone:
    torch.manual_seed(0)
    size = len(byte_tokenizer)
    config = GPT2Config(vocab_size=size, n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return Backbone(GPT2LMHeadModel(config).eval(), byte_tokenizer)


def examples() -> list[Example]:
    return [Example(i, f"{i}-0", str(i), (), *text, {}) for i, text in enumerate(TEXTS)]


@torch.no_grad()
def slow_mean_loss(backbone: Backbone, ids: list[int], first_scored: int) -> float:
    """Mean NLL of ids[first_scored:], one token after the other; NaN if there is none."""
    losses = []
    for position in range(max(1, first_scored), len(ids)):
        logits = backbone.model(torch.tensor([ids[:position]])).logits[0, -1].double()
        losses.append(-float(torch.log_softmax(logits, -1)[ids[position]]))
    return sum(losses) / len(losses) if losses else math.nan


def slow_ifd(backbone: Backbone, instruction: str, input_: str, output: str, limit: int) -> float:
    def tokens(text: str) -> list[int]:
        return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = f"{instruction}\n{input_}\n" if input_ else f"{instruction}\n"
    p = len(tokens(prompt)[:limit])
    alone = slow_mean_loss(backbone, tokens(output)[: limit - p + 1], 1)
    whole = prompt + output
    start = len(tokens(whole[: whole.rindex(output)]))
    return math.exp(slow_mean_loss(backbone, tokens(whole)[:limit], start)) / math.exp(alone)


@pytest.mark.parametrize("limit", [40, 128])
def test_ifd_equals_the_slow_one_example_way(backbone: Backbone, limit: int) -> None:
    expected = np.array([slow_ifd(backbone, *text, limit) for text in TEXTS])
    scores = superfilter(examples(), backbone, no_bar, max_length=limit)
    np.testing.assert_allclose(scores.score, expected, rtol=1e-5)  # NaN where the slow way has none
    for value, status in zip(expected, scores.status, strict=True):
        assert status == (UNDEFINED if math.isnan(value) else EXCLUDED if value >= 1 else SCORED)
    assert {UNDEFINED, EXCLUDED, SCORED} == set(scores.status)  # every branch is in the cases


def test_undefined_rows_say_why(backbone: Backbone) -> None:
    scores = superfilter(examples(), backbone, no_bar, max_length=40)
    assert "single token" in scores.reason[4]
    assert "prompt leaves no token" in scores.reason[5]


def test_the_models_context_bounds_the_length(backbone: Backbone) -> None:
    long = [Example(0, "0-0", "0", (), "x" * 200, "", "answer", {})]
    assert superfilter(long, backbone, no_bar, max_length=1024).status.tolist() == [UNDEFINED]


def test_row_order_changes_no_score(backbone: Backbone) -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    rows = examples()
    shuffled = superfilter([rows[i] for i in order], backbone, no_bar, max_length=128).score
    np.testing.assert_allclose(shuffled, superfilter(rows, backbone, no_bar, max_length=128).score[order], rtol=1e-6)
