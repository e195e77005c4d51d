"""The two matrix products of a frozen linear layer: y = x W + b, and the gradient of x.

A CPU's matrix unit wants a weight in an order of its own; brought into it anew in every call, that takes a
third of the product's time, and every new number of rows has a product compiled for it. `Packed` does the
first once and keeps the second to multiples of 32 rows (`kernels.cpp`). It keeps two copies of a weight.

Shape letters: M tokens of a batch, I inputs of a layer, O its outputs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from gradsift.training.kernels import kernels

BLOCK = 32  # rows of x: oneDNN compiles a product anew for every number of them


class Frozen(Protocol):
    """A weight that does not train."""

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """x W + b, (M, O), of x (M, I)."""

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        """backprops W^T, (M, I), of backprops (M, O)."""


class Plain:
    """By torch's own products."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias  # (I, O), (O,)

    @classmethod
    def of(cls, layer: Any) -> Plain:
        return cls(layer.weight if isinstance(layer, Conv1D) else layer.weight.t(), layer.bias)

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        return backprops @ self._weight.t()


class Packed:
    """In bfloat16 on a CPU, by oneDNN, from weights in its own order."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """
        Args:
            weight: (I, O)
        """
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.inputs, self.width = weight.shape
        self.forth = pack(weight.detach().t().contiguous())
        self.back = pack(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self  # it never changes

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = kernels().product(x, self.forth, self.bias, self.width)
        return y

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        to_x: torch.Tensor = kernels().product(backprops, self.back, None, self.inputs)
        return to_x


class _FrozenForward:
    """The forward pass of a linear layer whose weight is packed; where it trains it is the layer's own."""

    packed: Packed

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if trains(self):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        y: torch.Tensor = _Product.apply(x, self.packed)  # type: ignore[no-untyped-call]
        return y


class PackedLinear(_FrozenForward, nn.Linear):
    """torch's layer."""


class PackedConv1D(_FrozenForward, Conv1D):  # type: ignore[misc]
    """GPT-2's layer, whose weight is (I, O)."""


def pack_linear_layers(model: nn.Module, but: nn.Module | None) -> None:
    """Pack the frozen weights of a bfloat16 model's linear layers, all `but` one."""
    for module in model.modules():
        kinds = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}
        if (kind := kinds.get(type(module))) and module is not but:
            layer: Any = module
            weight = layer.weight if kind is PackedConv1D else layer.weight.t()
            layer.packed = Packed(weight, layer.bias)
            layer.__class__ = kind


def unpack(layer: Any) -> None:
    """Forget what is packed of a layer whose weight is about to change."""
    layer.__dict__.pop("packed_head", None)  # of `head.py`
    if isinstance(layer, PackedLinear | PackedConv1D):
        plain: Any = Conv1D if isinstance(layer, PackedConv1D) else nn.Linear
        layer.__class__ = plain
        del layer.packed


def trains(layer: Any) -> bool:
    """Whether a layer's own weight or bias does."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def frozen(layer: Any) -> Frozen:
    """The products of a linear layer that does not train."""
    return layer.packed if isinstance(layer, PackedLinear | PackedConv1D) else Plain.of(layer)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed, ctx.shape = packed, x.shape
        return packed.outputs(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], packed.width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backprops = gradients[0].reshape(-1, gradients[0].shape[-1])
        return ctx.packed.to_inputs(backprops).view(ctx.shape), None
