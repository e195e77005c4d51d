"""Mean losses of stretches of text under a backbone: what instruction-following difficulties are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradsift.data.batching import length_batches, spread_out
from gradsift.data.tokens import chunks, start_of
from gradsift.journal import Journal
from gradsift.runtime import Advance, weighed
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget, tokens_factor
from gradsift.training.finetuning import require_finite
from gradsift.training.head import OutputHead, token_losses

_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # padded; no result depends on it. A CPU has them in its caches


@dataclass(frozen=True)
class Span:
    """Token ids, of which those from `start` on are scored."""

    ids: np.ndarray  # (T,) int32
    start: int

    @property
    def first(self) -> int:
        """The first token that is scored: at least the second, as nothing predicts the first."""
        return max(1, self.start)

    @property
    def scored(self) -> int:
        return max(0, len(self.ids) - self.first)


def token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool, limit: int | None = None) -> Iterator[np.ndarray]:
    """Token ids (T,) int32 of each text, in order.

    Args:
        special: whether the tokenizer puts its start token (and the like) around a text, as it does unasked.
        limit: tokens that matter; a text that is far longer gives somewhat more than these. All matter when None.
    """
    cut = texts if limit is None else (start_of(text, tokenizer, limit) for text in texts)
    for chunk in chunks(cut, len):
        for ids in tokenizer(chunk, add_special_tokens=special, verbose=False)["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def span_losses(
    backbone: Backbone, spans: Sequence[Span], row_indices: Sequence[int], advance: Advance, journal: Journal
) -> np.ndarray:
    """Mean loss (nats) over each span's scored tokens, (N,) float64; NaN where a span scores none.

    Args:
        row_indices: of the spans in the data's source, for errors.
        journal: keeps the losses batch by batch.
    """
    losses = np.full(len(spans), np.nan)
    same: dict[tuple[int, bytes], list[int]] = {}  # equal spans are passed once, so that their losses tie
    for index, span in enumerate(spans):
        if span.scored:
            same.setdefault((span.first, span.ids.tobytes()), []).append(index)
    groups = list(same.values())
    advance(len(spans) - sum(map(len, groups)))
    head = OutputHead.of(backbone.model)
    budget = TokenBudget(_BATCH_TOKENS[backbone.model.device.type] * min(2, tokens_factor(backbone.model)))
    lengths = [len(spans[group[0]].ids) for group in groups]
    told = weighed(advance, sum(map(len, groups)), sum(lengths))
    for batch in spread_out(length_batches(lengths, budget.tokens)):

        def means_of(tokens: int, batch: Sequence[int] = batch) -> list[float]:
            means: list[float] = []
            for part in length_batches([lengths[position] for position in batch], tokens):  # keeps the order
                means += _batch_losses(backbone, head, [spans[groups[batch[index]][0]] for index in part]).tolist()
            return means

        work = functools.partial(budget.run, means_of, [lengths[position] for position in batch])
        for position, mean in zip(batch, journal.once(batch, work), strict=True):
            losses[groups[position]] = mean
        rows = [index for position in batch for index in groups[position]]
        require_finite("loss", torch.tensor(rows), torch.from_numpy(losses[rows]), row_indices)
        told(sum(lengths[position] for position in batch))
    return losses


@torch.inference_mode()
def _batch_losses(backbone: Backbone, head: OutputHead | None, spans: Sequence[Span]) -> np.ndarray:
    """Padded on the right, so that causal attention never sees the padding, and needs no mask."""
    device = backbone.model.device
    longest = max(len(span.ids) for span in spans)
    ids = torch.full((len(spans), longest), backbone.pad_id)
    for row, span in enumerate(spans):
        ids[row, : len(span.ids)] = torch.from_numpy(span.ids)
    # where to predict is worked out here and not by a mask on the device, which would have to be waited for
    predicted = [torch.arange(span.first, len(span.ids)) + row * longest for row, span in enumerate(spans)]
    positions = torch.cat(predicted)
    losses = token_losses(
        backbone.model,
        head,
        {"input_ids": ids.to(device)},
        (positions - 1).to(device),
        ids.flatten()[positions].to(device),
    )
    return np.array([float(part.mean()) for part in losses.cpu().double().split([span.scored for span in spans])])
