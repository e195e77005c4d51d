"""The two matrix products of a frozen linear layer: y = x W + b, and the gradient with respect to x.

A layer's attribute `frozen_products` may be an object that computes both products faster; it is valid as long as the
layer's weight does not change. Without this attribute, torch computes them.

Shape letters: M tokens of a batch, I inputs of a layer, O its outputs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class FrozenProducts(Protocol):
    """The products of a weight that does not train."""

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W + b, (M, O), for x (M, I)."""

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        """Return backprops W^T, (M, I), for backprops (M, O)."""


class TorchProducts:
    """The products of a layer's own weight, computed by torch."""

    def __init__(self, layer: Any) -> None:
        self._weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.t()  # (I, O)
        self._bias = layer.bias  # (O,) or None

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x @ self._weight if self._bias is None else torch.addmm(self._bias, x, self._weight)
        return y

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        to_x: torch.Tensor = backprops @ self._weight.t()
        return to_x


def frozen_products(layer: Any) -> FrozenProducts:
    """Return the products of a frozen linear layer (`nn.Linear` or GPT-2's `Conv1D`)."""
    own: FrozenProducts | None = layer.__dict__.get("frozen_products")
    return TorchProducts(layer) if own is None else own


def forget_products(layer: Any) -> None:
    """Remove a layer's copies of its weight; to be called before the weight changes (by merging, for example)."""
    layer.__dict__.pop("frozen_products", None)
    layer.__dict__.pop("frozen_head", None)  # see `gradsift.training.head`


def product_of(x: torch.Tensor, products: FrozenProducts) -> torch.Tensor:
    """Return the outputs (..., O) of a frozen layer for x (..., I); the backward pass uses `to_inputs`."""
    y: torch.Tensor = _Product.apply(x, products)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, products: FrozenProducts) -> torch.Tensor:
        ctx.products, ctx.shape = products, x.shape
        return products.outputs(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backprops = gradients[0].reshape(-1, gradients[0].shape[-1])
        return ctx.products.to_inputs(backprops).view(ctx.shape), None


def trains(layer: Any) -> bool:
    """Return whether a weight or bias of the layer itself is trainable."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
