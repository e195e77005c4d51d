"""Mean losses of spans of text under a backbone, from which IFD (instruction-following difficulty) is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradsift.data.batching import collate
from gradsift.data.examples import Example
from gradsift.data.tokens import Encoded, chunks, start_of
from gradsift.journal import Journal
from gradsift.runtime import Advance
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget, tokens_factor
from gradsift.training.head import OutputHead, require_finite, token_losses

_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # of a batch, padding included; no effect on results. 512 fit in CPU caches


def span(row: int, example: Example, ids: np.ndarray, start: int) -> Encoded:
    """Return the span with the token ids (T,) of the example at position `row`, scored from position `start` on."""
    # from 1 at least: nothing precedes the first token, so no model predicts it
    return Encoded(row, example.row_index, ids, np.arange(len(ids)) >= max(1, start))


def token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool, limit: int | None = None) -> Iterator[np.ndarray]:
    """Yield token ids (T,) int32 of each text, in order.

    Args:
        special: whether the tokenizer adds its special tokens (such as a start token) as it does by default.
        limit: number of tokens that the caller uses, or None if it uses all. A text that is far longer is shortened
            before it is tokenised, and yields slightly more than `limit` tokens.
    """
    cut = texts if limit is None else (start_of(text, tokenizer, limit) for text in texts)
    for chunk in chunks(cut, len):
        for ids in tokenizer(chunk, add_special_tokens=special, verbose=False)["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def span_losses(backbone: Backbone, spans: Sequence[Encoded], advance: Advance, journal: Journal) -> np.ndarray:
    """Return the mean loss (nats) over each span's scored tokens, (N,) float64; NaN for a span without scored tokens.

    Only one of several equal spans passes through the model, so equal spans have exactly equal losses.

    Args:
        journal: keeps the losses batch by batch.

    Raises:
        GradsiftError: a loss is not finite; the message names the rows.
    """
    losses = np.full(len(spans), np.nan)
    equal: dict[tuple[bytes, bytes], list[int]] = {}
    for index, one in enumerate(spans):
        if one.scored:
            # equal spans in batches of different widths could have losses that differ in the last bit
            equal.setdefault((one.input_ids.tobytes(), one.is_response.tobytes()), []).append(index)
    groups = list(equal.values())
    different = [replace(spans[group[0]], row=place) for place, group in enumerate(groups)]
    advance(len(spans) - len(different))
    head = OutputHead.of(backbone.model)
    usual = _BATCH_TOKENS[backbone.model.device.type] * min(2, tokens_factor(backbone.model))

    def means_of(batch: list[Encoded]) -> list[list[Any]]:
        return [[one.row for one in batch], _batch_losses(backbone, head, batch).tolist()]

    for batches in TokenBudget(backbone.tokens or usual).passes(different, means_of, journal, advance):
        for places, means in batches:
            for place, mean in zip(places, means, strict=True):
                losses[groups[place]] = mean
            indices = [index for place in places for index in groups[place]]
            rows = torch.tensor([spans[index].row for index in indices])
            require_finite("loss", rows, torch.from_numpy(losses[indices]), spans)
    return losses


@torch.inference_mode()
def _batch_losses(backbone: Backbone, head: OutputHead | None, spans: Sequence[Encoded]) -> np.ndarray:
    """Return the mean loss of each span, (B,), averaged in float64; every span must have a scored token."""
    batch = collate(spans, backbone.pad_id).to(backbone.model.device)
    losses = token_losses(backbone.model, head, batch.model_inputs(), batch.places, batch.targets)
    ends = np.cumsum([one.scored for one in spans])
    return np.array([part.mean() for part in np.split(losses.cpu().double().numpy(), ends[:-1])])
