"""Losses of the responses at one member's late snapshot: of the last token, and the mean over the tokens before it.

    body_i   mean loss of the response tokens before the last one
    end_i    loss of the last response token (the end token, unless the response was cut)
    other_i  body_i with example i's prompt replaced by another example's, drawn at random for each member

For a response of a single token, body and end are that token's loss. The losses take two forward passes over the pool,
with dropout off and without gradients. In a conversation, the other example's prompt replaces all tokens before the
first response token.

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

VERSION = 2
LOSSES_FILE = "answer_losses.parquet"


@dataclass(frozen=True)
class AnswerLosses:
    """Losses in nats, (M, N) float64 each; NaN for an example without a response token."""

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
    texts = [*inputs.encoded, *with_other_prompts(inputs.encoded, seed)]
    losses = np.empty((2, 2 * count), dtype=np.float32)  # body and end; own prompts first

    def of_batch(examples: list[Encoded]) -> tuple[list[int], torch.Tensor]:
        batch = collate(examples, inputs.backbone.pad_id)
        parts = losses_of.body_and_end(batch.to(inputs.backbone.model.device))
        return [example.row for example in examples], torch.stack(parts).cpu()

    placed = [replace(text, row=place) for place, text in enumerate(texts)]
    with lora.evaluating(adapted):
        for batches in inputs.budget.passes(placed, of_batch, journal, advance):
            for where, values in batches:
                losses[:, where] = values.numpy()
    rows = np.array([example.row for example in inputs.encoded], dtype=np.int64)
    own, other = losses[:, :count], losses[0, count:]
    # a sum is finite only if all losses are
    require_finite("loss", torch.from_numpy(rows), torch.from_numpy(own.sum(0) + other), inputs.encoded)
    return {"row": rows, "body": own[0], "end": own[1], "other": other}


def with_other_prompts(examples: Sequence[Encoded], seed: int) -> list[Encoded]:
    """Return each example with its prompt (all tokens before its response) replaced by another example's prompt.

    Each example's prompt is used once. A prompt is cut at its start if the new text would be longer than the longest
    example.
    """
    limit = max(len(example.input_ids) for example in examples)
    order = np.random.default_rng(seed).permutation(len(examples))
    texts: list[Encoded | None] = [None] * len(examples)
    # each example gets the prompt of the next example in a random cyclic order, so none keeps its own
    for place, giver in zip(order, np.roll(order, -1), strict=True):
        texts[place] = _after_prompt(examples[place], examples[giver], limit)
    return [text for text in texts if text is not None]


def _after_prompt(example: Encoded, giver: Encoded, limit: int) -> Encoded:
    start, length = int(example.is_response.argmax()), int(giver.is_response.argmax())
    room = max(1, limit - (len(example.input_ids) - start))
    prompt = giver.input_ids[max(0, length - room) : length]
    return replace(
        example,
        input_ids=np.concatenate([prompt, example.input_ids[start:]]),
        is_response=np.concatenate([np.zeros(len(prompt), dtype=bool), example.is_response[start:]]),
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
