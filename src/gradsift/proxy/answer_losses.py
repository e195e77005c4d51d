"""Losses of the responses at one member's late snapshot: of the last token, and the mean over the tokens before it.

    body_i   mean loss of the response tokens before the last one
    end_i    loss of the last response token (the end token, unless the response was cut)
    other_i  body_i with example i's prompt replaced by another example's, drawn at random for each member

For a response of a single token, body and end are that token's loss. The losses take two forward passes over the pool,
with dropout off and without gradients. A conversation with several trained replies has no other_i (NaN), because its
later replies would keep their own prompts; nor has an example if the prompts that are drawn equal its own.

Shape letters: M members, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from gradsift.artifacts import Artifact
from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.journal import Journal
from gradsift.proxy.epochs import ProxyInputs, member_table
from gradsift.runtime import Advance, Runtime, derive_seed
from gradsift.training import lora
from gradsift.training.head import ResponseLosses, require_finite

VERSION = 3
_TRIES = 10  # prompts that are looked at for one that differs from the example's own
LOSSES_FILE = "answer_losses.parquet"


@dataclass(frozen=True)
class AnswerLosses:
    """Losses in nats, (M, N) float64 each; NaN for an example without a response token.

    `other` is also NaN for a conversation with several trained replies, and where no other prompt was drawn.
    """

    body: np.ndarray
    end: np.ndarray
    other: np.ndarray


def answer_losses(
    runtime: Runtime, config: LoraConfig, member: Artifact, index: int, load: Callable[[], ProxyInputs]
) -> Artifact:
    """Return the artifact of a table with the columns row (position in the pool), body, end and other.

    Args:
        member: the artifact of a member's epoch, which contains the adapter.
        index: number of the member; the seed of the draw of other prompts is derived from it and the run's seed.
        load: called only if the table has to be made.
    """
    collect = partial(collect_losses, seed=derive_seed(runtime.seed, "other prompts", index))
    return member_table(runtime, "losses", LOSSES_FILE, config, member, load, collect, passes=2, version=VERSION)


@torch.inference_mode()
def collect_losses(
    adapted: Any, inputs: ProxyInputs, advance: Advance, journal: Journal, *, seed: int
) -> dict[str, np.ndarray]:
    """Return columns row (N,) int64, body, end and other (N,) float32, in the order of the encoded examples.

    Args:
        seed: seed of the draw of other prompts.

    Raises:
        GradsiftError: a loss is not finite; the message names the rows.
    """
    losses_of = ResponseLosses(adapted)
    count = len(inputs.encoded)
    lone = [place for place, example in enumerate(inputs.encoded) if _replies(example) == 1]
    texts = with_other_prompts([inputs.encoded[place] for place in lone], seed)
    swapped = {place: text for place, text in zip(lone, texts, strict=True) if text is not None}
    losses = np.empty((2, count + len(swapped)), dtype=np.float32)  # body and end; own prompts first

    def of_batch(examples: list[Encoded]) -> tuple[list[int], torch.Tensor]:
        batch = collate(examples, inputs.backbone.pad_id)
        parts = losses_of.body_and_end(batch.to(inputs.backbone.model.device))
        return [example.row for example in examples], torch.stack(parts).cpu()

    placed = [replace(text, row=place) for place, text in enumerate([*inputs.encoded, *swapped.values()])]
    advance(2 * count - len(placed))
    with lora.evaluating(adapted):
        for batches in inputs.budget.passes(placed, of_batch, journal, advance):
            for where, values in batches:
                losses[:, where] = values.numpy()
    rows = np.array([example.row for example in inputs.encoded], dtype=np.int64)
    own, other = losses[:, :count], np.full(count, np.nan, dtype=np.float32)
    other[list(swapped)] = losses[0, count:]
    # a sum is finite only if all its losses are
    sums = own.sum(0)
    sums[list(swapped)] += losses[0, count:]
    require_finite("loss", torch.from_numpy(rows), torch.from_numpy(sums), inputs.encoded)
    return {"row": rows, "body": own[0], "end": own[1], "other": other}


def _replies(example: Encoded) -> int:
    """Return the number of runs of response tokens."""
    return int((np.diff(example.is_response.astype(int), prepend=0) == 1).sum())


def with_other_prompts(examples: Sequence[Encoded], seed: int) -> list[Encoded | None]:
    """Return each example with its prompt (all tokens before its response) replaced by another example's prompt.

    The other prompt is the next in a random cyclic order that differs from the example's own; None if the next _TRIES
    prompts do not differ. If the new text would be longer than the longest example, the prompt is cut at its start, but
    after a first token that all examples share, such as a start token.
    """
    limit = max((len(example.input_ids) for example in examples), default=0)
    kept = int(len({int(example.input_ids[0]) for example in examples}) == 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    place_in_order = np.argsort(order)
    texts: list[Encoded | None] = []
    for example, place in zip(examples, place_in_order, strict=True):
        own = _prompt(example)
        following = ((place + step) % len(order) for step in range(1, min(_TRIES + 1, len(order))))
        nearby = (_prompt(examples[order[position]]) for position in following)
        other = next((prompt for prompt in nearby if not np.array_equal(prompt, own)), None)
        texts.append(None if other is None else _after_prompt(example, other, kept, limit))
    return texts


def _prompt(example: Encoded) -> np.ndarray:
    ids: np.ndarray = example.input_ids[: int(example.is_response.argmax())]
    return ids


def _after_prompt(example: Encoded, prompt: np.ndarray, kept: int, limit: int) -> Encoded:
    """Return the example's response after `prompt`, of which the first `kept` tokens are never cut."""
    response = len(example.input_ids) - len(_prompt(example))
    cut = max(0, min(len(prompt) + response - limit, len(prompt) - kept))
    prompt = np.concatenate([prompt[:kept], prompt[kept + cut :]])
    return replace(
        example,
        input_ids=np.concatenate([prompt, example.input_ids[-response:]]),
        is_response=np.concatenate([np.zeros(len(prompt), dtype=bool), example.is_response[-response:]]),
    )


def read_answer_losses(members: Sequence[Artifact], count: int) -> AnswerLosses:
    """Return the losses of all members, for a pool of `count` examples; NaN where a member's table lacks an example."""
    losses = AnswerLosses(*(np.full((len(members), count), np.nan) for _ in range(3)))
    for member, artifact in enumerate(members):
        table = pq.read_table(artifact.file(LOSSES_FILE))
        rows = table["row"].to_numpy()
        for name, column in vars(losses).items():
            column[member, rows] = table[name].to_numpy()
    return losses
