"""IFD against a slow one-example implementation, and the edges of the published procedure."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradsift.config import FIDELITIES
from gradsift.data.examples import Example, Turn
from gradsift.data.tokens import Encoded
from gradsift.journal import Journal
from gradsift.scoring import superfilter as superfilter_module
from gradsift.scoring.scores import EXCLUDED, SCORED, UNDEFINED, Scores
from gradsift.scoring.superfilter import ifd_prompt, ifd_scores, published_scores, span_losses
from gradsift.selection.topk import topk
from gradsift.training import head as head_module
from gradsift.training.backbones import Backbone
from gradsift.training.head import OutputHead, token_losses

pytestmark = pytest.mark.numerics

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


def span(ids: np.ndarray, start: int) -> Encoded:
    return Encoded(0, 0, ids, np.arange(len(ids)) >= max(1, start))


@contextmanager
def no_bar(description: str, total: int):
    yield lambda done: None


@pytest.fixture
def backbone(byte_tokenizer: Any) -> Backbone:
    return Backbone(model_of("gpt2", len(byte_tokenizer)), byte_tokenizer)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def model_of(architecture: str, size: int) -> Any:
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = GPT2Config(vocab_size=size, n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
        return GPT2LMHeadModel(config).requires_grad_(False).eval()
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, **SMALL)).requires_grad_(False).eval()
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=size, **SMALL)).requires_grad_(False).eval()  # caps its logits


def superfilter(
    rows: Sequence[Example],
    backbone: Backbone,
    task: Any,
    *,
    max_length: int,
    fidelity: str = "fixed",
    keep: str = "high",
    journal: Journal | None = None,
) -> Scores:
    constants = {"max_length": max_length, "fidelity": fidelity, "keep": keep}
    return superfilter_module.superfilter(rows, backbone, task, journal or Journal(), **constants)


def examples() -> list[Example]:
    return [Example(i, f"{i}-0", str(i), (), *text, {}) for i, text in enumerate(TEXTS)]


exact_model = functools.lru_cache(maxsize=1)(exact_copy)


@torch.no_grad()
def slow_mean_loss(backbone: Backbone, ids: list[int], first_scored: int) -> float:
    """Mean NLL of ids[first_scored:] in float64, one token after the other; NaN if there is none."""
    losses = []
    for position in range(max(1, first_scored), len(ids)):
        logits = exact_model(backbone.model)(torch.tensor([ids[:position]])).logits[0, -1]
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


def assert_scores_close(found: np.ndarray, exact: np.ndarray) -> None:
    """Compare scores relative to themselves; NaN where the slow definition has none.

    512 roundings: an error of a loss is one of the perplexity's exponent, so it counts as often as the loss is large.
    """
    known = ~np.isnan(exact)
    assert np.isnan(found).tolist() == (~known).tolist()
    assert_close_by_norm(found[known], exact[known], k=512, dim=(), dtype=torch.float32)


def assert_apart(exact: np.ndarray) -> None:
    """Check that rounding changes no comparison: any two values are equal or far apart."""
    values = np.unique(exact[~np.isnan(exact)])
    assert (np.diff(values) > 2 * 512 * np.finfo(np.float32).eps * values[1:]).all()


@pytest.mark.parametrize("limit", [40, 128])
def test_ifd_equals_the_slow_one_example_way(backbone: Backbone, limit: int) -> None:
    expected = np.array([slow_ifd(backbone, *text, limit) for text in TEXTS])
    assert_apart(np.array([*expected, 1.0]))
    scores = superfilter(examples(), backbone, no_bar, max_length=limit)
    assert_scores_close(scores.score, expected)
    for value, status in zip(expected, scores.status, strict=True):
        assert status == (UNDEFINED if math.isnan(value) else EXCLUDED if value >= 1 else SCORED)
    assert {UNDEFINED, EXCLUDED, SCORED} == set(scores.status)  # every branch is in the cases


def test_undefined_rows_have_reasons(backbone: Backbone) -> None:
    scores = superfilter(examples(), backbone, no_bar, max_length=40)
    assert "single token" in scores.reason[4]
    assert "prompt leaves no token" in scores.reason[5]


def test_nothing_predicts_the_first_token_so_it_is_never_scored(backbone: Backbone) -> None:
    ids = np.arange(10, 16, dtype=np.int32)
    whole, rest = span_losses(backbone, [span(ids, 0), span(ids, 1)], lambda done: None, Journal())
    assert whole == rest == pytest.approx(slow_mean_loss(backbone, ids.tolist(), 1), rel=1e-5)


def test_an_ifd_of_exactly_one_is_excluded_and_the_largest_below_it_is_kept() -> None:
    alone, together = np.array([1.0, 2.0, 2.0]), np.array([1.0, np.nextafter(2.0, 0), 2.5])
    for scores in (ifd_scores(alone, together), published_scores(alone, together, np.zeros((2, 3), dtype=bool))):
        assert scores.status[[0, 2]].tolist() == [EXCLUDED, EXCLUDED]
        assert "at least 1" in scores.reason[0]
    assert ifd_scores(alone, together).status[1] == SCORED  # float32 cannot tell it from 1, as published


def test_the_prompt_of_a_conversation_is_all_before_the_last_response() -> None:
    turns = (Turn("user", "hello"), Turn("assistant", "good day"))
    talk = Example(0, "0-0", "0", turns, "name a colour", "of these: red", "red", {})
    assert ifd_prompt(talk) == "hello\ngood day\nname a colour\nof these: red\n"


def test_the_models_context_bounds_the_length(backbone: Backbone) -> None:
    long = [Example(0, "0-0", "0", (), "x" * 200, "", "answer", {})]
    assert superfilter(long, backbone, no_bar, max_length=1024).status.tolist() == [UNDEFINED]


def test_row_order_changes_no_score(backbone: Backbone) -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))
    rows = examples()
    shuffled = superfilter([rows[i] for i in order], backbone, no_bar, max_length=128).score
    assert_scores_close(shuffled, np.array([slow_ifd(backbone, *TEXTS[i], 128) for i in order]))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_ifd_equals_the_slow_way_for_every_architecture(architecture: str, byte_tokenizer: Any) -> None:
    backbone = Backbone(model_of(architecture, len(byte_tokenizer)), byte_tokenizer)
    expected = np.array([slow_ifd(backbone, *text, 128) for text in TEXTS])
    assert_scores_close(superfilter(examples(), backbone, no_bar, max_length=128).score, expected)


def test_equal_rows_tie_wherever_they_stand(backbone: Backbone) -> None:
    rows = [*examples(), *examples()[::-1]]
    scores = superfilter(rows, backbone, no_bar, max_length=128).score
    np.testing.assert_array_equal(scores[: len(TEXTS)], scores[len(TEXTS) :][::-1])


# ---------------------------------------------------------------------- the published slips, the other direction

PUBLISHED = [
    *TEXTS,
    ("nothing to say", "", ""),  # the published code leaves such a row out before it is scored; no token is no token
    ("an answer too long for the model and for the length", "", "word " * 30),
    ("a prompt too long " * 9, "", "word " * 3),
]


def published_ifd(backbone: Backbone, instruction: str, input_: str, output: str, limit: int) -> float:
    """Return perplexities row by row as the published code does, but in float64: 0 after any exception, NaN kept."""

    def perplexity(text: str, limit: int, masked: str) -> float:
        ids = backbone.tokenizer(text)["input_ids"][:limit]
        start = len(backbone.tokenizer(masked)["input_ids"]) if masked else 0
        try:
            with torch.no_grad():
                if not ids:
                    raise IndexError("no token")  # torch's own complaint differs from version to version
                logits = exact_model(backbone.model)(torch.tensor([ids])).logits[0, :-1]
            labels = torch.tensor([-100] * min(start, len(ids)) + ids[start:])[1:]
            return torch.exp(torch.nn.functional.cross_entropy(logits, labels)).item()
        except (IndexError, RuntimeError):
            return 0.0

    prompt = f"{instruction}\n{input_}\n" if input_ else f"{instruction}\n"
    p = len(backbone.tokenizer(prompt)["input_ids"][:limit])
    alone, conditioned = perplexity(output, limit - p + 1, ""), perplexity(prompt + output, limit, prompt)
    try:
        return conditioned / alone
    except ZeroDivisionError:
        return 0.0


@pytest.mark.parametrize("limit", [40, 128, 300])
def test_original_gives_what_the_published_code_gives(limit: int, backbone: Backbone) -> None:
    rows = [Example(i, f"{i}-0", str(i), (), *text, {}) for i, text in enumerate(PUBLISHED)]
    expected = np.array([published_ifd(backbone, *text, limit) for text in PUBLISHED])
    assert_apart(np.array([*expected, 1.0]))
    scores = superfilter(rows, backbone, no_bar, max_length=limit, fidelity="original")
    assert_scores_close(scores.score, expected)
    # the rows that the published code keeps, in its order
    kept = sorted((row for row in range(len(rows)) if expected[row] < 1), key=lambda row: -expected[row])
    assert topk(scores, len(rows)).positions.tolist() == kept
    failed = [row for row in kept if expected[row] == 0]
    assert failed == ([8, 9, 10] if limit == 300 else [8])  # 300 tokens are more than the model's 128
    assert kept[-len(failed) :] == failed
    assert scores.diagnostics[0].values == {"failed": float(len(failed))}
    assert (scores.diagnostics[0].name, scores.diagnostics[0].verdict) == ("failed_rows", "warning")
    fixed = superfilter(rows, backbone, no_bar, max_length=limit)
    assert fixed.status[8] == UNDEFINED


def test_original_and_fixed_agree_where_nothing_slips(backbone: Backbone) -> None:
    published, ours = (superfilter(examples(), backbone, no_bar, max_length=40, fidelity=f) for f in FIDELITIES)
    assert published.status.tolist() == ours.status.tolist()
    assert published.reason.tolist() == ours.reason.tolist()
    expected = np.array([slow_ifd(backbone, *text, 40) for text in TEXTS])
    for scores in (published, ours):
        assert_scores_close(scores.score, expected)
    assert published.diagnostics[0].verdict == "ok"


def test_perplexities_beyond_float32_are_infinite_in_the_published_code() -> None:
    losses = np.array([[100.0, 1.0, 100.0, 1.0], [1.0, 100.0, 100.0, 0.5]])
    scores = published_scores(*losses, np.zeros((2, 4), dtype=bool))
    assert scores.status.tolist() == [SCORED, EXCLUDED, UNDEFINED, SCORED]
    assert scores.score[0] == 0
    assert "float32" in scores.reason[2]


def test_original_counts_the_start_token_that_the_tokenizer_puts_there(backbone: Backbone) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = backbone.tokenizer
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{eos[0]} $A", special_tokens=[eos])
    one = [examples()[4]]  # an answer of one token has a token before it now
    scores = superfilter(one, backbone, no_bar, max_length=40, fidelity="original")
    assert_scores_close(scores.score, np.array([published_ifd(backbone, *TEXTS[4], 40)]))
    assert superfilter(one, backbone, no_bar, max_length=40).status.tolist() == [UNDEFINED]


def many() -> list[Example]:
    """Return 80 examples with answers of 1 to 30 bytes, some of them equal."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "seven", "a", "of the", "sum", "is", "ß", "north", "?"]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(least, most)))

    texts = [(text(1, 6), text(0, 3), text(1, 7)) for _ in range(70)]
    return [Example(i, f"{i}-0", str(i), (), *each, {}) for i, each in enumerate([*texts, *texts[:10]])]


def test_low_turns_the_ranking_of_the_scored_around(backbone: Backbone) -> None:
    high, low = (superfilter(many(), backbone, no_bar, max_length=128, keep=keep) for keep in ("high", "low"))
    assert high.status.tolist() == low.status.tolist()
    np.testing.assert_array_equal(low.score, -high.score)
    np.testing.assert_array_equal(low.parts["ifd"], high.parts["ifd"])
    defined = high.score[high.status == SCORED]
    assert high.score[topk(high, 1).positions] == defined.max()
    assert high.score[topk(low, 1).positions] == defined.min()


# ------------------------------------------------------------------------------------ the output head


@pytest.mark.parametrize(("architecture", "has_head"), [("gpt2", True), ("llama", True), ("gemma2", False)])
def test_a_head_is_taken_only_where_nothing_comes_after_it(architecture: str, has_head: bool) -> None:
    assert (OutputHead.of(model_of(architecture, 100)) is not None) == has_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_padded_vocabulary_change_no_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", 101).to(dtype)
    ids = torch.randint(101, (3, 20))
    positions, targets = torch.tensor([0, 7, 18, 25, 44, 59]), torch.tensor([5, 100, 0, 3, 2, 77])
    head = OutputHead.of(model)
    assert head is not None
    assert len(head.weight) == (128 if dtype == torch.bfloat16 else 101)
    with torch.no_grad():
        logits = exact_copy(model.float())(input_ids=ids).logits.flatten(0, 1)[positions]
        exact = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        model.to(dtype)
        for rows in (1, 4, 100):
            monkeypatch.setattr(head_module, "_CHUNK_LOGITS", rows * len(head.weight))
            for of_model in (head, None):  # all logits at once, or chunks of them
                found = token_losses(model, of_model, {"input_ids": ids}, positions, targets)
                assert_close_by_norm(found, exact, k=64 if dtype == torch.float32 else 8, dtype=dtype)


def test_no_tensor_holds_the_logits_of_a_batch(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head only gets the predicted positions, a chunk at a time."""
    monkeypatch.setattr(head_module, "_CHUNK_LOGITS", 8 * len(backbone.tokenizer))
    heights: list[int] = []
    buffers = OutputHead.buffers

    def watched(head: OutputHead, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        heights.append(count)
        logits, exact = buffers(head, count)
        assert logits.shape[0] == exact.shape[0] == count
        return logits, exact

    spans = [span(np.arange(start, start + 60, dtype=np.int32), 40) for start in range(4)]
    made = OutputHead.of(backbone.model)
    monkeypatch.setattr(OutputHead, "of", lambda model: made)
    monkeypatch.setattr(OutputHead, "buffers", watched)
    span_losses(backbone, spans, lambda done: None, Journal())
    assert sum(heights) == 4 * 20
    assert max(heights) == 8


def test_out_of_memory_halves_the_batch_and_changes_no_score(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spans = [span(np.arange(start, start + 20, dtype=np.int32), 5) for start in range(12)]
    expected = np.array([slow_mean_loss(backbone, one.input_ids.tolist(), 5) for one in spans])
    whole = superfilter_module._batch_losses

    def small(backbone: Backbone, head: Any, spans: Sequence[Encoded]) -> np.ndarray:
        if len(spans) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(backbone, head, spans)

    monkeypatch.setattr(superfilter_module, "_batch_losses", small)
    assert_scores_close(span_losses(backbone, spans, lambda done: None, Journal()), expected)
    assert "memory ran out with 240 tokens at once" in capsys.readouterr().out
