"""Token losses of a causal language model without its (B, T, V) logits.

The output head is applied to the hidden states of the predicted positions alone, a chunk of them at
a time. Shape letters: B examples of a batch, T tokens, D hidden size, P predicted positions of the
batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_CHUNK_LOGITS = 2**24  # logits of a chunk, 64 MB in float32; no result depends on it
_MULTIPLE = 64  # of the vocabulary in bfloat16: other widths run at half speed (50,257 on AMX)


@dataclass(frozen=True)
class OutputHead:
    """The output embedding of a model whose logits are nothing but its product with the last hidden states."""

    model: nn.Module  # what gives the hidden states: the model below its head
    weight: torch.Tensor  # (V, D); in bfloat16 with zero rows up to a multiple of 64
    bias: torch.Tensor | None  # (V,), padded likewise
    vocabulary: int  # V, without padding

    @classmethod
    def of(cls, model: Any) -> OutputHead | None:
        """The head of a frozen model; None where its logits cannot be had this way.

        Some models scale or cap what the head returns (Gemma, Cohere, Granite). No list of them is
        kept: a short random batch is passed through both ways, and the logits must be the same bits.
        """
        embedding = model.get_output_embeddings()
        if type(embedding) is not nn.Linear or model.base_model is model:
            return None
        vocabulary = embedding.out_features
        if not _is_last_step(model, embedding):
            return None
        weight, bias = embedding.weight.detach(), None if embedding.bias is None else embedding.bias.detach()
        if weight.dtype == torch.bfloat16 and (lacking := -vocabulary % _MULTIPLE):
            weight = F.pad(weight, (0, 0, 0, lacking))
            bias = None if bias is None else F.pad(bias, (0, lacking))
        return cls(model.base_model, weight, bias, vocabulary)

    def hidden_states(self, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states at `positions`.

        Args:
            inputs: of the model's forward, (B, T) each.
            positions: (P,) int64 into the B x T tokens, on the model's device.

        Returns:
            (P, D)
        """
        hidden: torch.Tensor = self.model(**inputs, use_cache=False)[0]
        return hidden.flatten(0, 1).index_select(0, positions)

    def token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of `targets` (P,) after `hidden` (P, D), in nats; (P,) float32."""
        size = max(1, _CHUNK_LOGITS // len(self.weight))
        losses = [
            F.cross_entropy(self._logits(states).float(), chosen, reduction="none")
            for states, chosen in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(losses)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight, self.bias)[:, : self.vocabulary]


def token_losses(
    model: Any,
    head: OutputHead | None,
    inputs: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Negative log-likelihood of `targets` (P,) by the tokens at `positions` (P,) of the batch, in nats; (P,) float32.

    Args:
        head: of the model, or None: then all of its logits are made.
    """
    if head is not None:
        return head.token_losses(head.hidden_states(inputs, positions), targets)
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, positions)
    return F.cross_entropy(logits.float(), targets, reduction="none")


@torch.no_grad()
def _is_last_step(model: Any, embedding: nn.Linear) -> bool:
    """Whether the model's logits are `embedding` of the last hidden states, bit for bit: it is the same product."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 7), generator=torch.Generator().manual_seed(0)).to(embedding.weight.device)
    training = model.training
    model.eval()  # a dropout mask would be another one in each pass
    logits = model(input_ids=ids, use_cache=False).logits
    shortcut = embedding(model.base_model(input_ids=ids, use_cache=False)[0])
    model.train(training)
    return torch.equal(logits, shortcut.to(logits.dtype))
