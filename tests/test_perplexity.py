"""Perplexity against the slow definition, and the three directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import SMOKE

from gradsift.data.examples import Example, Turn
from gradsift.data.tokens import encode
from gradsift.journal import Journal
from gradsift.proxy.epochs import ProxyInputs
from gradsift.scoring.perplexity import from_median, perplexity
from gradsift.scoring.scores import SCORED, UNDEFINED
from gradsift.selection.topk import topk
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget
from tests.test_superfilter import assert_scores_close, model_of, no_bar, slow_mean_loss

pytestmark = pytest.mark.numerics

TEXTS = ["red", "a longer answer than the others", "x", "ß😀", "seven of them", "yes", "no"]


@pytest.fixture(params=["gpt2", "gemma2"])
def backbone(request: pytest.FixtureRequest, byte_tokenizer: Any) -> Backbone:
    return Backbone(model_of(request.param, len(byte_tokenizer)), byte_tokenizer)


def rows_of(outputs: Sequence[str]) -> list[Example]:
    rows = [Example(3 * i, f"{i}-0", str(i), (), f"task {i}", "", output, {}) for i, output in enumerate(outputs)]
    turns = (Turn("user", "hello"), Turn("assistant", "good day"))
    return [*rows, Example(99, "99-0", "99", turns, "and now", "", "bye", {})]


def inputs_of(rows: list[Example], backbone: Backbone, tokens: int = 256) -> ProxyInputs:
    encoded, _ = encode(rows, backbone.tokenizer, "plain", 128)
    return ProxyInputs(backbone, encoded, TokenBudget(tokens))


def slow_loss(backbone: Backbone, row: Example) -> float:
    """Return the mean loss of the response tokens, computed one token at a time."""
    ((encoded,), _) = encode([row], backbone.tokenizer, "plain", 128)
    ids = encoded.input_ids.tolist()
    losses = [slow_mean_loss(backbone, ids[: place + 1], place) for place in np.flatnonzero(encoded.is_response)]
    return float(np.mean(losses))


def test_perplexity_equals_the_slow_one_token_way(backbone: Backbone) -> None:
    rows = rows_of(TEXTS)
    expected = np.array([slow_loss(backbone, row) for row in rows])
    scores = perplexity(inputs_of(rows, backbone), len(rows), no_bar, Journal(), prefer="low")
    assert_scores_close(scores.parts["loss"], expected)
    assert_scores_close(scores.parts["perplexity"], np.exp(expected))
    assert set(scores.status) == {SCORED}


def test_each_direction_takes_its_end_and_the_middle_the_median(backbone: Backbone) -> None:
    rows = rows_of(TEXTS[:-1])
    assert len(rows) % 2  # so that one row is the median
    inputs = inputs_of(rows, backbone)
    low, high, middle = (
        perplexity(inputs, len(rows), no_bar, Journal(), prefer=prefer) for prefer in ("low", "high", "middle")
    )
    found = low.parts["perplexity"]
    assert topk(low, len(rows)).positions.tolist() == np.argsort(found).tolist()
    assert topk(high, len(rows)).positions.tolist() == np.argsort(-found).tolist()
    order = np.argsort(found).tolist()
    assert found[topk(middle, 1).positions] == np.median(found)
    assert set(topk(middle, 3).positions) == set(order[2:5])  # the middle stretch of the ranking
    assert set(topk(middle, 5).positions) == set(order[1:6])


def test_the_middle_is_a_place_in_the_ranking_and_not_a_value() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 1e9, np.nan])
    np.testing.assert_allclose(from_median(values), [0.4, 0.2, 0.0, 0.2, 0.4, np.nan])
    np.testing.assert_allclose(from_median(np.array([5.0, 5.0, 1.0])), [1 / 6, 1 / 6, 1 / 3])  # equal values alike
    assert np.isnan(from_median(np.array([np.nan]))).all()


@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_neither_order_nor_batches_nor_padding_change_a_score(tokens: int, backbone: Backbone) -> None:
    rows = rows_of(TEXTS)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    found = perplexity(inputs_of(shuffled, backbone, tokens), len(rows), no_bar, Journal(), prefer="low")
    assert_scores_close(found.parts["loss"], np.array([slow_loss(backbone, row) for row in shuffled]))


def test_a_row_without_a_response_token_has_no_score(backbone: Backbone) -> None:
    rows = rows_of(TEXTS)
    inputs = inputs_of(rows, backbone)
    without = inputs._replace(encoded=[example for example in inputs.encoded if example.row != 2])
    for prefer in ("low", "high", "middle"):
        scores = perplexity(without, len(rows), no_bar, Journal(), prefer=prefer)
        assert np.flatnonzero(scores.status == UNDEFINED).tolist() == [2]
        assert 2 not in topk(scores, len(rows)).positions


def test_the_pipeline_scores_without_training(gradsift: Any) -> None:
    """Scores depend on the proxy's template; no member of the ensemble is trained."""
    arguments = (*SMOKE, "stop_after=selection", "scorer=perplexity")
    assert gradsift("-m", *arguments, "proxy.template=alpaca,plain") == 0
    stages = [stage for run in gradsift.runs() for stage in run["stages"]]
    assert len({stage["fingerprint"] for stage in stages if stage["name"] == "score"}) == 2
    assert {stage["name"] for stage in stages} == {"load", "backbone", "score", "select"}
