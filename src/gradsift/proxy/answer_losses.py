"""Losses of the answers at one member's late snapshot, the end of an answer apart from the rest.

    body_i  mean loss of the response tokens before the last one
    end_i   loss of the last response token, which ends the answer (the end token, unless the answer was cut)

A response of a single token has that token's loss for both. One forward pass over the pool, dropout off; no gradients.

Shape letters: M members, N examples, B of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from gradsift.runtime import Advance, Runtime
from gradsift.training import lora
from gradsift.training.head import ResponseLosses, require_finite

VERSION = 1
LOSSES_FILE = "answer_losses.parquet"


@dataclass(frozen=True)
class AnswerLosses:
    """Losses in nats, (M, N) float64 each; NaN for an example without a response token."""

    body: np.ndarray
    end: np.ndarray


def answer_losses(runtime: Runtime, config: LoraConfig, member: Artifact, load: Callable[[], ProxyInputs]) -> Artifact:
    """Return the artifact of a table of row (position among the examples), body and end.

    Args:
        member: a member's epoch, with its adapter.
        load: called only if the table has to be made.
    """
    return member_table(runtime, "losses", LOSSES_FILE, config, member, load, collect_losses, passes=1, version=VERSION)


@torch.inference_mode()
def collect_losses(adapted: Any, inputs: ProxyInputs, advance: Advance, journal: Journal) -> dict[str, np.ndarray]:
    """Return columns row (N,) int64, body and end (N,) float32, in the order of the encoded examples.

    Raises:
        GradsiftError: a loss is not finite; names the rows.
    """
    losses_of = ResponseLosses(adapted)
    rows = np.array([example.row for example in inputs.encoded], dtype=np.int64)
    places = {int(row): place for place, row in enumerate(rows)}
    losses = np.empty((2, len(rows)), dtype=np.float32)

    def of_batch(examples: list[Encoded]) -> tuple[list[int], torch.Tensor]:
        batch = collate(examples, inputs.backbone.pad_id)
        parts = losses_of.body_and_end(batch.to(inputs.backbone.model.device))
        return [places[example.row] for example in examples], torch.stack(parts).cpu()

    with lora.evaluating(adapted):
        for batches in inputs.budget.passes(inputs.encoded, of_batch, journal, advance):
            for where, values in batches:
                losses[:, where] = values.numpy()
    # a sum is finite only if both losses are
    require_finite("loss", torch.from_numpy(rows), torch.from_numpy(losses.sum(0)), inputs.encoded)
    return {"row": rows, "body": losses[0], "end": losses[1]}


def read_answer_losses(members: Sequence[Artifact], count: int) -> AnswerLosses:
    """Return the losses of all members, for `count` examples."""
    losses = AnswerLosses(np.full((len(members), count), np.nan), np.full((len(members), count), np.nan))
    for member, artifact in enumerate(members):
        table = pq.read_table(artifact.file(LOSSES_FILE))
        rows = table["row"].to_numpy()
        losses.body[member, rows], losses.end[member, rows] = table["body"].to_numpy(), table["end"].to_numpy()
    return losses
