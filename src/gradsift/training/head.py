"""Token losses of a causal language model without its (B, T, V) logits.

A place is the position of a token whose next token is a response token. The output head is applied only to the hidden
states at the places, one chunk of places at a time. The gradient of a chunk's losses with respect to the chunk's hidden
states is computed in the forward pass too, so logits are computed once and never kept for the backward pass.

Shape letters: B examples of a batch, T tokens, D hidden size, P places of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradsift.data.batching import Batch
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.training.device import numbers_at_once, without_host_reads
from gradsift.training.lora import evaluating

_CHUNK_LOGITS = 2**23  # logits of a chunk on a CPU, 32 MB in float32
_MULTIPLE = 64  # a bfloat16 head's vocabulary is padded to a multiple of this; with 50,257 rows AMX has half the speed


class OutputHead:
    """The output head of a model: a linear layer that computes the logits from the last hidden states alone."""

    def __init__(self, below: nn.Module, embedding: nn.Linear) -> None:
        self._below = below  # the model without its head
        self.vocabulary = embedding.out_features
        weight, bias = embedding.weight.detach(), None if embedding.bias is None else embedding.bias.detach()
        # rows of zeros as padding: their logits are dropped, and they add nothing to the gradient
        if weight.dtype == torch.bfloat16 and (lacking := -self.vocabulary % _MULTIPLE):
            weight = F.pad(weight, (0, 0, 0, lacking))
            bias = None if bias is None else F.pad(bias, (0, lacking))
        self.weight, self.bias = weight, bias  # (V, D), (V,); in bfloat16 with zero rows up to a multiple of 64
        # a faster computation of the losses (`gradsift.cpu.blocks.PackedHead`)
        self.own: Any = vars(embedding).get("frozen_head")
        # kept between calls: allocating this much costs as much as the product that fills it
        self._logits = torch.empty(0)
        self._exact = torch.empty(0)

    @classmethod
    def of(cls, model: Any) -> OutputHead | None:
        """Return the output head of a causal language model, or None if the model has to compute its logits itself.

        The result is None if the head is not a plain `nn.Linear`, if the head is trainable or has an adapter, or if the
        model changes the head's inputs or outputs (Cohere and Granite scale the logits, Gemma 2 caps them; see
        `_is_last_step`).
        """
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        embedding = causal.get_output_embeddings()
        # `_TokenLosses` computes only the gradient with respect to the head's inputs
        if type(embedding) is not nn.Linear or embedding.weight.requires_grad or causal.base_model is causal:
            return None
        return cls(causal.base_model, embedding) if _is_last_step(causal, embedding) else None

    def hidden_states(self, inputs: Mapping[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        """Return the inputs (P, D) of the output head at `places`, for a batch with the model inputs `inputs` (B, T).

        Args:
            places: (P,) indices into the B x T tokens of the batch, flattened.
        """
        with without_host_reads():
            hidden: torch.Tensor = self._below(**inputs, use_cache=False)[0]
        # only places before a response token: prompt tokens have no loss, so they need no logits
        return hidden.flatten(0, 1).index_select(0, places)

    def token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihoods (P,) float32, in nats, of the token ids `targets` (P,).

        Args:
            hidden: (P, D), for each target the result of `hidden_states` at the token before the target.
        """
        # the gradient mode is an argument, because gradients are off within a Function's forward
        losses: torch.Tensor = _TokenLosses.apply(hidden, targets, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return losses

    def buffers(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two buffers for the logits of `count` places, which may share memory.

        The first is (count, padded V) in the weight's dtype, the second is (count, V) float32.
        """
        shape = (count, len(self.weight))
        if self._logits.numel() < count * shape[1]:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
                self._logits = self.weight.new_empty(count * shape[1])
                if self.weight.dtype != torch.float32:
                    self._exact = self.weight.new_empty(count * self.vocabulary, dtype=torch.float32)
        logits = self._logits[: count * shape[1]].view(shape)
        if self.weight.dtype == torch.float32:
            return logits, logits[:, : self.vocabulary]
        return logits, self._exact[: count * self.vocabulary].view(count, self.vocabulary)


class _TokenLosses(torch.autograd.Function):
    """Cross entropy of each place; its gradient with respect to the hidden states is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: OutputHead, wants_gradient: bool
    ) -> torch.Tensor:
        size = max(1, numbers_at_once(hidden.device, _CHUNK_LOGITS) // len(head.weight))  # places whose logits are kept
        if head.own is not None:
            size = head.own.chunk(len(hidden))
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient and ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            losses[chunk] = _chunk(hidden[chunk], targets[chunk], head, None if gradient is None else gradient[chunk])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # each loss depends only on the hidden state of its own place
        return (gradient * gradients[0][:, None]).to(gradient.dtype), None, None, None


def _chunk(
    hidden: torch.Tensor, targets: torch.Tensor, head: OutputHead, gradient: torch.Tensor | None
) -> torch.Tensor:
    """Return the losses (P,) of a chunk of P places.

    If `gradient` (P, D) is given, fill it with (softmax - one-hot) W, the gradient of each loss with respect to the
    hidden state of its place.
    """
    if head.own is not None:
        return head.own.losses(hidden, targets, gradient)  # type: ignore[no-any-return]
    logits, exact = head.buffers(len(hidden))  # (P, padded V), (P, V)
    if exact.dtype == logits.dtype:
        torch.mm(hidden, head.weight.t(), out=logits)
        if head.bias is not None:
            logits.add_(head.bias)
        chosen = exact.gather(1, targets[:, None])
    else:
        chosen = _less_rounded(hidden, targets, head, logits, exact)
    largest = exact.amax(1, keepdim=True)  # (P, 1)
    total = exact.sub_(largest).exp_().sum(1, keepdim=True)
    losses = (largest + total.log() - chosen)[:, 0]
    if gradient is not None:
        # softmax minus one-hot, the gradient with respect to the logits
        exact.div_(total).scatter_add_(1, targets[:, None], torch.full_like(total, -1.0))
        if exact.dtype != logits.dtype:
            logits[:, : head.vocabulary] = exact  # the padded columns may hold anything: their weights are zero
        torch.mm(logits, head.weight, out=gradient)
    return losses


def _less_rounded(
    hidden: torch.Tensor, targets: torch.Tensor, head: OutputHead, logits: torch.Tensor, exact: torch.Tensor
) -> torch.Tensor:
    """Fill `exact` with the logits minus an offset for each place; return the entries (P, 1) of `exact` at the targets.

    A logit of 20 in bfloat16 has an error of up to .06, and a loss computed from such logits has an error as large. But
    the same offset on all logits of a place does not change the loss. So the target's logit, rounded to bfloat16, is
    subtracted from all logits of its place within the matrix product, before the results are rounded. The logits of
    tokens about as likely as the target are then small numbers with small errors. The target's own logit is computed in
    float32.
    """
    own = (hidden.float() * head.weight[targets].float()).sum(1, keepdim=True)  # (P, 1)
    # rounded before it is subtracted, so that own - offset is exactly the target's logit minus the offset
    offset = own.to(logits.dtype)
    torch.addmm((-offset).expand_as(logits), hidden, head.weight.t(), out=logits)
    exact.copy_(logits[:, : head.vocabulary])
    chosen = own - offset.float()
    # also in the normaliser: with the rounded logit there, a loss could be negative
    exact.scatter_(1, targets[:, None], chosen)
    if head.bias is not None:
        bias = head.bias[: head.vocabulary].float()
        exact.add_(bias)
        chosen = chosen + bias[targets][:, None]
    return chosen


def token_losses(
    model: Any,
    head: OutputHead | None,
    inputs: Mapping[str, torch.Tensor],
    places: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return the negative log-likelihoods (P,) float32, in nats, of the token ids `targets` (P,).

    Args:
        head: the output head of `model`; if None, the model computes the logits of all tokens.
        places: (P,) the position of the token before each target, an index into the flattened B x T tokens.
    """
    if head is not None:
        return head.token_losses(head.hidden_states(inputs, places), targets)
    with without_host_reads():
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, places)
    return F.cross_entropy(logits.float(), targets, reduction="none")


class ResponseLosses:
    """Mean negative log-likelihood of each example's response tokens, in nats, float32.

    The mean is over an example's own tokens, so an example's loss does not depend on the other examples of its batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = OutputHead.of(model)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the losses (B,)."""
        return self._of_tokens(batch).sum(1) / batch.counts

    def body_and_end(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each example, the mean loss of all response tokens but the last, and the loss of the last token.

        Both tensors are (B,). If an example has a single response token, both values are the loss of this token.
        """
        of_tokens = self._of_tokens(batch)
        is_predicted = torch.zeros_like(of_tokens.flatten()).index_fill(0, batch.places, 1.0).view_as(of_tokens)
        is_last = is_predicted * (is_predicted.cumsum(1) == batch.counts[:, None])
        end = (of_tokens * is_last).sum(1)
        # clamped, because `where` computes both branches, and 0 / 0 in the branch not taken would give NaN gradients
        return torch.where(batch.counts > 1, (of_tokens.sum(1) - end) / (batch.counts - 1).clamp(min=1), end), end

    def _of_tokens(self, batch: Batch) -> torch.Tensor:
        """Return a tensor (B, T) that holds, at each place, the loss of the next token, and 0 at all other tokens."""
        of_tokens = token_losses(self._model, self._head, batch.model_inputs(), batch.places, batch.targets)
        # a scatter to different places and a sum along rows are deterministic; on a GPU, index_add adds in any order
        spread = of_tokens.new_zeros(batch.input_ids.numel()).scatter(0, batch.places, of_tokens)
        return spread.view_as(batch.input_ids)


@torch.no_grad()
def _is_last_step(causal: Any, embedding: nn.Linear) -> bool:
    """Return whether the model's logits for random tokens equal `embedding` applied to the last hidden states.

    The logits must be equal bit for bit.
    """
    vocabulary = causal.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 7), generator=torch.Generator().manual_seed(0)).to(embedding.weight.device)
    # with a mask, because transformers warns without one if an id is the pad id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(causal):  # without dropout, whose masks differ between the two passes
        logits = causal(**inputs, use_cache=False).logits
        hidden = causal.base_model(**inputs, use_cache=False)[0]
        if hidden.dtype != embedding.weight.dtype:
            return False  # the model casts the hidden states before its head
        shortcut = embedding(hidden)
    return torch.equal(logits, shortcut.to(logits.dtype))


def require_finite(quantity: str, rows: torch.Tensor, values: torch.Tensor, encoded: Sequence[Encoded]) -> None:
    """Raise a `GradsiftError` if one of `values` (B,) is NaN or infinite.

    The message names the examples by their row in the data's source.

    Args:
        quantity: what the message calls the values.
        rows: (B,) int64, `Encoded.row` of each value's example.
        encoded: examples that include those of `rows`.
    """
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row_index = {example.row: example.row_index for example in encoded}
        named = ", ".join(str(row_index[row]) for row in rows[bad][:8].tolist())
        raise GradsiftError(
            f"the {quantity} of row {named} is not finite; lower the learning rate, or take compute.precision=float32"
        )
