"""Cherry's IFD against a slow one-example implementation of its rules, and the rows that it excludes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from gradsift.config import FIDELITIES
from gradsift.data.examples import Example, Turn
from gradsift.journal import Journal
from gradsift.scoring.cherry import cherry, loss_ratios
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores
from gradsift.scoring.superfilter import span_losses
from gradsift.training.backbones import Backbone
from tests.test_superfilter import assert_apart, assert_scores_close, exact_model, model_of, no_bar, span

pytestmark = pytest.mark.numerics

BOTH = "Below is an instruction that describes a task, paired with an input that provides further context. "
ONE = "Below is an instruction that describes a task. "
REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"

TEXTS = [
    ("name a colour", "", "red"),
    ("repeat it", "red", "red red"),
    ("one byte", "", "x"),  # a token that is scored, unlike Superfiltering's
    ("say red", "", "### Response:red"),
    ("long answer", "", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4),
    ("add", "3 and 4", "the sum is 7"),
    ("a prompt that fills all the room there is " * 6, "", "lost"),
    ("one more", "", "a bird"),
    ("unicode", "", "ß😀"),
]


@pytest.fixture(params=["no start token", "start token"])
def backbone(request: pytest.FixtureRequest, byte_tokenizer: Any) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.test_superfilter import SMALL

    if request.param == "start token":
        start = ("<pad>", byte_tokenizer.pad_token_id)
        byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[start])
    model_of("llama", len(byte_tokenizer))  # seeds the weights
    config = LlamaConfig(vocab_size=len(byte_tokenizer), **{**SMALL, "max_position_embeddings": 512})
    return Backbone(LlamaForCausalLM(config).requires_grad_(False).eval(), byte_tokenizer)


def rows_of(texts: list[tuple[str, str, str]]) -> list[Example]:
    return [Example(i, f"{i}-0", str(i), (), *text, {}) for i, text in enumerate(texts)]


@torch.no_grad()
def mean_loss(backbone: Backbone, ids: list[int], first: int) -> float:
    """Return the mean NLL of ids[first:] in float64, token by token from the logits of one unpadded row."""
    predicted = torch.log_softmax(exact_model(backbone.model)(torch.tensor([ids])).logits[0], -1)
    losses = [-float(predicted[place - 1, ids[place]]) for place in range(first, len(ids))]
    return sum(losses) / len(losses)


def slow_cherry(
    backbone: Backbone, instruction: str, input_: str, output: str, limit: int, fidelity: str
) -> tuple[str, float]:
    """Return status and ratio of one row."""

    def tokens(text: str) -> list[int]:
        return backbone.tokenizer(text)["input_ids"]

    asked = f"{instruction}\n\n### Input:\n{input_}" if input_ else instruction
    prompt = f"{BOTH if input_ else ONE}{REQUEST}{asked}\n\n### Response:"
    p = len(tokens(prompt)[:limit])
    direct, line = tokens("### Response:" + output), len(tokens("### Response:"))
    if fidelity == "original":
        direct = direct[: limit - p + 4]
    answer = len(direct) - line
    whole = tokens(prompt + output)[:limit]
    if p + answer > limit:
        return EXCLUDED, math.nan
    if answer <= 0 or len(whole) <= len(tokens(prompt)):
        return UNDEFINED, math.nan
    ratio = mean_loss(backbone, whole, len(tokens(prompt))) / mean_loss(backbone, direct, line)
    return (EXCLUDED if ratio > 1 else SCORED), ratio


@pytest.mark.parametrize("fidelity", ["original", "fixed"])
@pytest.mark.parametrize("limit", [230, 300])
def test_cherry_equals_the_slow_one_example_way(limit: int, fidelity: str, backbone: Backbone) -> None:
    expected = [slow_cherry(backbone, *text, limit, fidelity) for text in TEXTS]
    scores = cherry(rows_of(TEXTS), backbone, no_bar, Journal(), max_length=limit, fidelity=fidelity)
    assert scores.status.tolist() == [status for status, _ in expected]
    ratios = np.array([ratio for _, ratio in expected])
    assert_apart(np.array([*ratios, 1.0]))
    defined = ~np.isnan(ratios)  # a row that is left out has no slow ratio
    assert_scores_close(scores.score[defined], ratios[defined])
    assert {SCORED, EXCLUDED} <= set(scores.status.tolist())


def test_fixed_leaves_out_what_original_cuts(backbone: Backbone) -> None:
    original, fixed = (
        cherry(rows_of(TEXTS), backbone, no_bar, Journal(), max_length=300, fidelity=fidelity)
        for fidelity in FIDELITIES
    )
    assert "longer than max_length" in fixed.reason[4]
    assert "longer than max_length" not in original.reason[4]  # its line alone takes 13 tokens, not the 4 reckoned with
    assert np.isfinite(original.score[4])
    others = [row for row in range(len(TEXTS)) if row not in (4, 6)]
    for scores in (original, fixed):
        expected = np.array([slow_cherry(backbone, *TEXTS[row], 300, "fixed")[1] for row in others])
        assert_scores_close(scores.score[others], expected)


def test_reasons_name_the_problem(backbone: Backbone) -> None:
    scores = cherry(rows_of(TEXTS), backbone, no_bar, Journal(), max_length=230, fidelity="original")
    assert "no token of the response" in scores.reason[6]
    above = scores.parts["ifd"] > 1
    assert above.any()
    assert all("above 1" in reason for reason in scores.reason[above])


def test_a_ratio_of_losses_is_not_one_of_perplexities(backbone: Backbone) -> None:
    scores = cherry(rows_of(TEXTS[:3]), backbone, no_bar, Journal(), max_length=300, fidelity="fixed")
    np.testing.assert_array_equal(scores.parts["ifd"], scores.parts["loss_with_prompt"] / scores.parts["loss_alone"])


def test_a_ratio_of_exactly_one_is_kept_and_nothing_is_divided_by_a_loss_of_zero() -> None:
    alone, together = np.array([2.0, 2.0, 0.0, 0.0]), np.array([2.0, 2.1, 1.0, 0.0])
    scores = loss_ratios(alone, together, *np.zeros((2, 4), dtype=bool))
    assert scores.status.tolist() == [SCORED, EXCLUDED, UNDEFINED, UNDEFINED]
    assert "loss of 0" in scores.reason[2]


def test_the_prompt_of_a_conversation_is_all_before_the_last_response(backbone: Backbone) -> None:
    history = (Turn("user", "hello"), Turn("assistant", "good day"))
    bare, talk = (Example(0, "0-0", "0", turns, "name a colour", "", "red", {}) for turns in ((), history))
    first, second = (
        cherry([row], backbone, no_bar, Journal(), max_length=400, fidelity="fixed").parts for row in (bare, talk)
    )
    direct, line = (backbone.tokenizer(text)["input_ids"] for text in ("### Response:red", "### Response:"))
    for parts in (first, second):
        assert_scores_close(parts["loss_alone"], np.array([mean_loss(backbone, direct, len(line))]))
    assert first["loss_with_prompt"] != pytest.approx(second["loss_with_prompt"], rel=1e-3)


def test_neither_order_nor_company_changes_a_score(backbone: Backbone) -> None:
    def scores_of(rows: list[Example]) -> Scores:
        return cherry(rows, backbone, no_bar, Journal(), max_length=300, fidelity="fixed")

    rows = rows_of(TEXTS)
    exact = np.array([slow_cherry(backbone, *text, 300, "fixed")[1] for text in TEXTS])
    order = np.random.default_rng(0).permutation(len(rows))
    assert_scores_close(scores_of([rows[i] for i in order]).score, exact[order])
    assert_scores_close(np.array([scores_of([row]).score[0] for row in rows]), exact)
    twice = scores_of([*rows, *rows]).score
    np.testing.assert_array_equal(twice[: len(rows)], twice[len(rows) :])


def test_progress_over_spans_is_by_their_tokens(backbone: Backbone) -> None:
    """The four long spans come first with half of the tokens; an equal one, and one without scored tokens, at once."""
    tokens = np.arange(120, dtype=np.int32)
    spans = [span(tokens + row, 3) for row in range(4)] + [span(tokens[:12] + row, 3) for row in range(40)]
    told: list[int] = []
    span_losses(backbone, [*spans, spans[-1], span(tokens[:3], 3)], told.append, Journal())
    assert told == [2, 22, 22]
