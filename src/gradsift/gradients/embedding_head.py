"""Statistics of each example's gradients with respect to the input embedding and the LM head (GrADS, arXiv 2511.08620).

The loss is the mean negative log-likelihood of the example's response tokens. Its gradients with respect to the
embedding and to the head are V x D matrices. The maximum, minimum, mean and standard deviation of the entries of each
matrix (zeros included) are exact, but no whole matrix is held in memory:

    embedding  The row of a token is the sum of the backprops (the gradients with respect to the embedded tokens) at the
               token's positions. The rows of tokens that the example does not contain are zero.
    head       The matrix is (Q - Y)^T H / n. The n rows of Q, Y and H belong to the example's n places (positions whose
               next token is a response token). Q has the predicted probabilities, Y the one-hot targets, and H the last
               hidden states. The product is computed for one chunk of the vocabulary at a time.

The mean of the head's gradient is 0, because the probabilities and the one-hot target of a place both sum to one. The
mean of the embedding's gradient is 0 up to rounding if every layer that reads the residual stream first subtracts the
stream's mean over the hidden dimensions. GPT-2's LayerNorm subtracts this mean; Llama's RMSNorm does not. If one tensor
is both embedding and head (GPT-2), its gradient is the sum of the two matrices, but the statistics are computed for
each matrix separately.

Shape letters: B examples of a batch, T tokens of an example, U distinct tokens of an example, P places of the batch,
n places of one example, D hidden size, V vocabulary, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional as F

from gradsift.artifacts import Artifact
from gradsift.data.batching import Batch, collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.journal import Journal
from gradsift.proxy.epochs import Ensemble, ProxyInputs, adapter
from gradsift.proxy.member_tables import member_table
from gradsift.runtime import Advance
from gradsift.training import lora
from gradsift.training.device import TokenBudget, numbers_at_once
from gradsift.training.head import OutputHead, require_finite

VERSION = 1
STATISTICS_FILE = "embedding_gradients.parquet"
_CHUNK = 2**18  # entries of the head's gradient at a time on a CPU: 1 MB in float32, which fits in a core's cache


@dataclass(frozen=True)
class EmbeddingGradients:
    """Statistics of the gradients of all examples, (N,) float64 each; NaN for an example without a response token."""

    embedding_max: np.ndarray
    embedding_min: np.ndarray
    embedding_mean: np.ndarray
    embedding_std: np.ndarray  # population std: std^2 + mean^2 = |gradient|^2 / (V x D)
    head_max: np.ndarray
    head_min: np.ndarray
    head_mean: np.ndarray  # always 0
    head_std: np.ndarray
    entries: int  # V x D


COLUMNS = tuple(field.name for field in fields(EmbeddingGradients))[:-1]


def embedding_gradients(ensemble: Ensemble, member: Artifact, count: int) -> Artifact:
    """Return an artifact with the statistics of all N = `count` examples' gradients at the weights of `member`."""

    def table(adapted: Any, inputs: ProxyInputs, advance: Advance, journal: Journal) -> dict[str, np.ndarray]:
        backbone, encoded, budget = inputs
        statistics = collect_statistics(adapted, encoded, budget, backbone.pad_id, advance, journal)  # (n, 8)
        # rows without a response token are not in `encoded` and stay NaN
        columns = np.full((len(COLUMNS), count), np.nan)
        columns[:, [example.row for example in encoded]] = statistics.T
        return dict(zip(COLUMNS, columns, strict=True))

    def info(inputs: ProxyInputs) -> dict[str, int]:
        return {"entries": inputs.backbone.model.get_input_embeddings().weight.numel()}

    stage = "embedding_gradients"
    return member_table(ensemble, stage, STATISTICS_FILE, member, table, passes=1, version=VERSION, info=info)


def with_check(ensemble: Ensemble) -> Ensemble:
    """Return `ensemble` with a check added to `load`: it raises the errors of `UseOfEmbedding` before any training."""

    def load() -> ProxyInputs:
        inputs = ensemble.load()
        with adapter(inputs.backbone, ensemble.config.lora, 0, ensemble.runtime.compute) as adapted:
            UseOfEmbedding(adapted)
        return inputs

    return ensemble._replace(load=load)


def read_embedding_gradients(artifact: Artifact) -> EmbeddingGradients:
    table = pq.read_table(artifact.file(STATISTICS_FILE))
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    return EmbeddingGradients(**columns, entries=int(artifact.info["entries"]))


def collect_statistics(
    adapted: Any,
    encoded: Sequence[Encoded],
    budget: TokenBudget,
    pad_id: int,
    progress: Advance = lambda done: None,
    journal: Journal | None = None,
) -> np.ndarray:
    """Return the statistics `COLUMNS` of all examples, computed with dropout off, (len(encoded), 8) float64.

    Raises:
        GradsiftError: see `UseOfEmbedding`, or a statistic is not finite (the message names the rows).
    """
    place_of = {example.row: place for place, example in enumerate(encoded)}
    statistics = np.empty((len(encoded), len(COLUMNS)))
    with lora.evaluating(adapted), torch.enable_grad(), UseOfEmbedding(adapted) as uses:

        def one_batch(examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
            return uses.statistics(collate(examples, pad_id))

        for parts in budget.passes(encoded, one_batch, journal, progress):
            for rows, values in parts:
                require_finite("embedding or head gradient", rows, values.sum(1), encoded)
                statistics[[place_of[int(row)] for row in rows]] = values.numpy()
    return statistics


class UseOfEmbedding:
    """A context manager that keeps the outputs of a model's input embedding.

    Gradients with respect to these outputs can then be computed.
    """

    def __init__(self, adapted: Any) -> None:
        """
        Raises:
            GradsiftError: the model scales or caps the outputs of its embedding or head, or one of them has an adapter.
        """
        head = OutputHead.of(adapted)
        causal = adapted.get_base_model()
        embedding = causal.get_input_embeddings()
        if head is None or type(embedding) is not nn.Embedding:
            raise GradsiftError(
                f"{type(causal).__name__} scales or caps what its embedding or head returns, or proxy.lora.targets "
                "names one of them, so their gradients cannot be computed from activations; take another proxy"
            )
        self._head = head
        self._embedding = embedding
        self._output = causal.get_output_embeddings()
        self._embedded = torch.empty(0)

    def __enter__(self) -> UseOfEmbedding:
        self._hook = self._embedding.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self._embedded = torch.empty(0)

    def _keep(self, module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        # a new leaf tensor: the backward pass ends here, and the V x D gradient of the weight is never formed
        self._embedded = embedded.detach().requires_grad_()
        return self._embedded

    def statistics(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return row numbers (B,) and statistics (B, 8) float64 of a batch's examples, on the CPU."""
        # `batch` stays on the CPU, where its sizes can be read without waiting for the device
        moved = batch.to(self._embedding.weight.device)
        hidden = self._head.hidden_states(moved.model_inputs(), moved.places)
        owners = moved.places // batch.input_ids.shape[1]  # (P,) examples
        # L_i = (1/n_i) sum_t l_it, so each token's loss is divided by its example's n_i before the sum over the batch
        losses = self._head.token_losses(hidden, moved.targets) / moved.counts[owners]
        (backprops,) = torch.autograd.grad(losses.sum(), self._embedded)
        embedding = embedding_statistics(batch, backprops, self._embedding.num_embeddings)
        sizes = batch.counts.long().tolist()
        parts = zip(hidden.detach().split(sizes), moved.targets.split(sizes), strict=True)
        head = torch.stack([head_statistics(self._output, *part) for part in parts])
        return batch.rows, torch.cat([embedding, head], 1).cpu()


def embedding_statistics(batch: Batch, backprops: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the statistics (B, 4) float64 of each example's gradient with respect to the input embedding.

    The four columns are maximum, minimum, mean and standard deviation.

    Args:
        batch: the examples, on the CPU.
        backprops: gradients of the loss with respect to the embedded tokens, (B, T, D), on the model's device.
        vocabulary: V, the number of rows of the embedding.
    """
    examples, columns = batch.attention_mask.nonzero(as_tuple=True)  # of the real tokens
    # one key per example and token, because a token that occurs in two examples has a row in the gradient of each
    tokens, inverse = torch.unique(examples * vocabulary + batch.input_ids[examples, columns], return_inverse=True)
    owners = tokens // vocabulary
    # an absent token's row is zero, so 0 counts in the extremes unless the example contains the whole vocabulary
    absent = torch.bincount(owners, minlength=len(batch.rows)) < vocabulary
    examples, columns, inverse, owners, absent = (
        index.to(backprops.device) for index in (examples, columns, inverse, owners, absent)
    )
    rows = torch.zeros(len(tokens), backprops.shape[2], device=backprops.device)  # (sum of U over the examples, D)
    # float32 also for a bfloat16 model, because the row of a frequent token is a sum of many backprops
    rows.index_add_(0, inverse, backprops[examples, columns].float())
    zero = backprops.new_zeros(len(batch.rows), dtype=torch.float32)
    largest = zero.where(absent, -torch.inf).scatter_reduce(0, owners, rows.amax(1), "amax")
    smallest = zero.where(absent, torch.inf).scatter_reduce(0, owners, rows.amin(1), "amin")
    # float64, because the variance is a difference of two means over V x D entries, nearly all of which are zero
    total, squares = (zero.double().index_add(0, owners, part.double().sum(1)) for part in (rows, rows.square()))
    return _of_moments(largest, smallest, total, squares, vocabulary * backprops.shape[2])


def head_statistics(output: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the statistics (4,) float64 of one example's gradient with respect to the head.

    They are maximum, minimum, mean and standard deviation.

    Args:
        output: the head, with which the logits are computed again.
        hidden: last hidden states at the example's places, (n, D).
        targets: the id of the token that follows each place, (n,).
    """
    with torch.no_grad():
        errors = torch.softmax(F.linear(hidden, output.weight, output.bias).float(), 1)  # (n, V)
        # Q - Y, the gradient of each place's loss with respect to its logits
        errors.scatter_add_(1, targets[:, None], errors.new_full((len(targets), 1), -1.0))
        hidden = hidden.float() / len(hidden)  # H / n
        extremes, squares = [], errors.new_zeros((), dtype=torch.float64)
        # the whole (V, D) gradient of GPT-2's head takes 154 MB in float32
        for chunk in errors.split(max(1, numbers_at_once(hidden.device, _CHUNK) // hidden.shape[1]), dim=1):
            gradient = chunk.t() @ hidden  # (rows of V, D)
            extremes.append(torch.stack(gradient.aminmax()))
            squares += torch.linalg.vector_norm(gradient).double().square()
        smallest, largest = torch.stack(extremes).unbind(1)
        return _of_moments(largest.amax(), smallest.amin(), torch.zeros_like(squares), squares, output.weight.numel())


def _of_moments(
    largest: torch.Tensor, smallest: torch.Tensor, total: torch.Tensor, squares: torch.Tensor, entries: int
) -> torch.Tensor:
    """Return maximum, minimum, mean and standard deviation of `entries` numbers, stacked on a new last axis.

    `total` is the sum of the numbers, and `squares` the sum of their squares.
    """
    mean = total / entries
    # the difference of equal numbers may round to just below zero
    deviation = (squares / entries - mean.square()).clamp_min(0).sqrt()
    return torch.stack([largest.double(), smallest.double(), mean, deviation], -1)
