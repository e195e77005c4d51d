"""Groups examples into batches and pads the examples of a batch to equal length.

Shape letters: B examples in a batch, T tokens of its longest example, P predicted tokens in the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch

from gradsift.data.tokens import Encoded

T = TypeVar("T")
_STRETCH = 50  # maximum number of batches in a stretch, whose examples are sorted by length together


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples, and the places where a response token is predicted.

    Padding is marked by `attention_mask` alone, since the pad id may also be a real token. Places are indices into the
    flattened B x T tokens. Places are computed on the CPU, because finding them on a GPU would make the CPU wait for
    the GPU in every training step.
    """

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64, 1 at real tokens
    position_ids: torch.Tensor  # (B, T) int64, positions among the real tokens
    places: torch.Tensor  # (P,) int64, tokens whose successor is a response token
    targets: torch.Tensor  # (P,) int64, the response token that follows each place
    counts: torch.Tensor  # (B,) float32, number of response tokens that are predicted in each example
    rows: torch.Tensor  # (B,) int64, `Encoded.row` of each example
    padding_side: str = "right"  # or left

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device. The CPU does not wait until the copy is done."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "padding_side"}
        if torch.device(device).type == "cuda":
            moved = {name: tensor.pin_memory() for name, tensor in moved.items()}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()}
        return Batch(**moved, padding_side=self.padding_side)

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Return the batch as keyword arguments of a causal language model.

        With causal attention, no token attends to padding on its right. If padding is on the right, mask and positions
        are therefore left out, so that attention can use its faster implementations, which take no mask.
        """
        inputs = {"input_ids": self.input_ids}
        if self.padding_side == "left":
            inputs |= {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return inputs


def collate(examples: Sequence[Encoded], pad_id: int, padding_side: str = "right") -> Batch:
    """Return a batch of the examples, padded on the `right` or the `left` to the length of the longest example.

    An example's first token is never predicted, even if it is marked as response, because no token precedes it.
    """
    width = max(len(example.input_ids) for example in examples)
    ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), width), dtype=np.int64)
    predicted = np.zeros((len(examples), width), dtype=bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        start = width - length if padding_side == "left" else 0
        ids[row, start : start + length] = example.input_ids
        mask[row, start : start + length] = 1
        predicted[row, start + 1 : start + length] = example.is_response[1:]
    following = np.flatnonzero(predicted)
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        "places": following - 1,
        "targets": ids.ravel()[following],
        "counts": predicted.sum(axis=1, dtype=np.float32),
        "rows": np.array([example.row for example in examples], dtype=np.int64),
    }
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()}, padding_side=padding_side)


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return batches of the examples' positions in `lengths`. The examples of a batch have similar lengths.

    A batch has at most `max_tokens` tokens, padding included.

    Use this only where results do not depend on the order of the examples. The longest examples come first, so that, if
    memory is too small, the first batch already fails. An example longer than `max_tokens` gets a batch of its own.
    """
    batches: list[list[int]] = []
    widest = 0
    for position in sorted(range(len(lengths)), key=lambda p: -lengths[p]):  # stable: ties in file order
        if not batches or (len(batches[-1]) + 1) * widest > max_tokens:
            batches.append([])
            widest = lengths[position]
        batches[-1].append(position)
    return batches


def capped_batches(lengths: Sequence[int], batch_size: int, max_tokens: int | None) -> list[list[int]]:
    """Return the batches of `length_batches`, each divided into batches of at most `batch_size` positions.

    If `max_tokens` is None, batches can have any number of tokens.
    """
    batches = length_batches(lengths, sys.maxsize if max_tokens is None else max_tokens)
    return [batch[start : start + batch_size] for batch in batches for start in range(0, len(batch), batch_size)]


def spread_out(batches: Sequence[T]) -> list[T]:
    """Return the first batch, then the others in a fixed random order.

    In the order of `length_batches` the slowest batches come first, so a progress bar would overestimate the remaining
    time. The first batch keeps its place because it needs the most memory: if memory is too small, it fails at once.
    """
    order = np.random.default_rng(0).permutation(max(0, len(batches) - 1)) + 1
    return [*batches[:1], *(batches[place] for place in order)]


def shard_of(examples: Sequence[Encoded], shard: int, shards: int) -> list[Encoded]:
    """Return the examples of part `shard` (counted from 0) of `shards` parts, in their order in `examples`.

    The examples are sorted from the longest to the shortest and dealt out in turn to `shards` parts, so that all parts
    take similar time.
    """
    by_falling_length = sorted(range(len(examples)), key=lambda position: -len(examples[position].input_ids))
    return [examples[position] for position in sorted(by_falling_length[shard::shards])]


def by_length(examples: Sequence[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """Return the examples themselves, grouped into the batches that `length_batches` makes of their lengths."""
    positions = length_batches([len(example.input_ids) for example in examples], max_tokens)
    return [[examples[position] for position in batch] for batch in positions]


def epoch_batches(lengths: Sequence[int], batch_size: int, batching: str, seed: int) -> list[list[int]]:
    """Return the batches of one epoch. Each position is in exactly one batch, and the order is drawn with `seed`.

    The value of `batching` says how the batches are made:

    random    a permutation, cut into batches
    bucketed  a permutation, divided into stretches of up to 50 batches. Each stretch is sorted by length and cut into
              batches, and all batches are shuffled. With at least 4 x `batch_size` examples there are at least four
              stretches, because with a single stretch every epoch would have nearly the same batches
    """
    rng = np.random.default_rng(seed)
    order: list[int] = rng.permutation(len(lengths)).tolist()
    if batching == "random":
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    stretch = batch_size * min(_STRETCH, max(1, len(lengths) // (4 * batch_size)))
    batches = []
    for start in range(0, len(order), stretch):
        by_length = sorted(order[start : start + stretch], key=lambda p: lengths[p])
        batches += [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    return [batches[b] for b in rng.permutation(len(batches)).tolist()]
