"""Matrix products on a CPU with frozen bfloat16 weights, which are packed once into oneDNN's memory layout.

Without packing, oneDNN reorders a weight in every call, which takes a third of the product's time. It also compiles a
product for every new number of rows. `PackedProducts` keeps two packed copies of a weight, for the product of the
forward pass and for that of the backward pass. It rounds the number of rows up to a multiple of 32 (`kernels.cpp`).

Shape letters: M tokens of a batch, I inputs of a layer, O its outputs, P places (tokens whose successor is predicted),
D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradsift.cpu.compiled import kernels
from gradsift.training.frozen import product_of, trains

BLOCK = 32  # rows are padded to a multiple of this, as oneDNN compiles a product for each number of rows
_CHUNK_LOGITS = 2**24  # bfloat16 logits of a chunk, 32 MB; no result depends on it


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return y


class PackedProducts:
    """`gradsift.training.frozen.FrozenProducts` of a layer, computed by oneDNN from packed weights.

    Args:
        weight: (I, O) bfloat16.
        bias: (O,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.inputs, self.width = weight.shape
        # oneDNN takes a weight as (outputs, inputs); the backward pass is the same product with the two exchanged
        self.forward_weight = _pack(weight.detach().t())
        self.backward_weight = _pack(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedProducts:
        return self  # immutable

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = kernels().product(x, self.forward_weight, self.bias, self.width)
        return y

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        to_x: torch.Tensor = kernels().product(backprops, self.backward_weight, None, self.inputs)
        return to_x


class _PackedForward:
    """Computes a linear layer from its packed weights or, if the layer trains or was merged, with the original code."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not is_packed(self):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return product_of(x, self.frozen_products)


class PackedLinear(_PackedForward, nn.Linear):
    """`nn.Linear` with packed weights."""


class PackedConv1D(_PackedForward, Conv1D):  # type: ignore[misc]
    """GPT-2's `Conv1D`, whose weight is (I, O), with packed weights."""


def pack_linear_layers(model: nn.Module, but: nn.Module | None) -> None:
    """Pack the frozen weights of all linear layers of a bfloat16 model, except the layer `but`."""
    kinds = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}
    for module in model.modules():
        if (kind := kinds.get(type(module))) and module is not but:
            layer: Any = module
            weight = layer.weight if kind is PackedConv1D else layer.weight.t()
            layer.frozen_products = PackedProducts(weight, layer.bias)
            layer.__class__ = kind


def is_packed(layer: Any) -> bool:
    """Return whether the layer uses packed weights; False if it trains, has an adapter or has been merged."""
    return isinstance(layer, PackedLinear | PackedConv1D) and "frozen_products" in layer.__dict__ and not trains(layer)


class PackedHead:
    """`gradsift.training.head.FrozenHead` of an output embedding without bias, packed at first use.

    The weight gets an additional column of ones, and each hidden state an additional number, the negative offset of its
    logits (see `_less_rounded` in `head.py`). So the product subtracts the offset before the logits are rounded.
    (Further columns of zeros fill a block of 32.)

    Args:
        weight: (V, D) bfloat16.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._plain = weight.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedHead:
        return self  # immutable

    @functools.cached_property
    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The weight, packed for the forward and for the backward product, and the vocabulary size plus padding.

        The padded size is a multiple of 64, for which AMX is twice as fast.
        """
        weight = nn.functional.pad(self._plain, (0, 0, 0, -len(self._plain) % 64))
        # the ones need a single column; a whole block of 32 keeps the inner width a multiple of 32
        ones = weight.new_zeros(len(weight), BLOCK)
        ones[:, 0] = 1
        return _pack(torch.cat([weight, ones], 1)), _pack(weight.t()), len(weight)

    def chunk(self, count: int) -> int:
        """Return how many places' logits are computed at once (a multiple of BLOCK), if there are `count` places."""
        most = max(BLOCK, _CHUNK_LOGITS // self._weights[2] // BLOCK * BLOCK)
        each = -(-count // max(1, -(-count // most)))
        return max(BLOCK, -(-each // BLOCK) * BLOCK)

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        """Return the cross entropy (P,) float32 of `targets` (P,) given `hidden` (P, D).

        Args:
            gradient: (P, D), to be filled with each loss's gradient with respect to its hidden state; None to skip it.
        """
        forward_weight, backward_weight, _ = self._weights
        count, width = hidden.shape
        own = (hidden.float() * self._plain[targets].float()).sum(1)  # (P,)
        # rounded before it is subtracted, so that own - offset is exactly the target's logit minus the offset
        offset = own.to(hidden.dtype)
        wider = hidden.new_zeros(count + -count % BLOCK, width + BLOCK)  # (P rounded up, D + 32)
        wider[:count, :width] = hidden
        wider[:count, width] = -offset
        logits = _product(wider, forward_weight)  # (P rounded up, padded V)
        losses: torch.Tensor = kernels().cross_entropy_(
            logits[:count], targets, own - offset.float(), len(self._plain), gradient is not None
        )
        if gradient is not None:
            # cross_entropy_ has left softmax minus one-hot in `logits`, and zeros in the padding of the vocabulary
            gradient.copy_(_product(logits, backward_weight)[:count])
        return losses
