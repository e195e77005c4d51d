"""Norms of per-sample LoRA gradients, for a whole batch from one backward pass.

An adapted layer computes W x + (alpha / r) B A x. For the sum (or mean) of losses that depend on
one example each, autograd hands the backprop of every linear map to a hook example by example, and
the gradient that one example gives a linear map is the product of its backprops and activations
over its own tokens. So no loop over examples is needed.

Shape letters: B examples of a batch, T tokens, I inputs of a linear map, O its outputs.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from gradsift.errors import GradsiftError
from gradsift.training.lora import ADAPTER, lora_layers


def squared_norms(activations: torch.Tensor, backprops: torch.Tensor) -> torch.Tensor:
    """Squared L2 norm of each example's gradient of a linear map, float32.

    Args:
        activations: (B, T, I) input of the map.
        backprops: (B, T, O) gradient of the loss with respect to the map's output.

    Returns:
        (B,)
    """
    gradients = torch.einsum("bto,bti->boi", backprops.float(), activations.float())
    return gradients.square().sum((1, 2))


class PerSampleNorms:
    """Hooks on the active adapter that turn each backward pass into per-sample gradient norms.

    Use it as a context manager. After a backward pass `take()` returns the norms and starts anew.
    Padded positions contribute nothing: no loss depends on them, so their backprops are zero.
    """

    def __init__(self, adapted: nn.Module) -> None:
        self._layers = [layer for _, layer in lora_layers(adapted)]
        if not self._layers:
            raise GradsiftError("per-sample gradient norms need a model with LoRA adapters; it has none")
        self._handles: list[Any] = []
        self._squares: dict[str, list[torch.Tensor]] = {"A": [], "B": []}

    def __enter__(self) -> PerSampleNorms:
        for layer in self._layers:
            for factor, maps in (("A", layer.lora_A), ("B", layer.lora_B)):
                self._handles.append(maps[ADAPTER].register_forward_hook(self._forward_hook(factor)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, factor: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return  # a forward pass without gradients
            activations = inputs[0].detach()
            if activations.dim() != 3:
                raise GradsiftError(
                    f"an adapted layer sees inputs of shape {tuple(activations.shape)}, not (batch, tokens, width), so "
                    "its examples cannot be told apart; leave it out of lora.targets"
                )

            def backward(backprops: torch.Tensor) -> None:
                self._squares[factor].append(squared_norms(activations, backprops))

            output.register_hook(backward)

        return forward

    def take(self, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms of the gradients of A and of B since the last call, and forget them.

        Args:
            scale: what one example's loss was divided by in the loss that was backpropagated: 1 for
                a sum of losses, the batch size for their mean.

        Returns:
            norm_A, norm_B: (B,) float32 each, over all adapted layers.
        """
        squares, self._squares = self._squares, {"A": [], "B": []}
        if not squares["B"]:
            raise GradsiftError("no backward pass was seen since the last call; per-sample norms need one")
        norm_b = torch.stack(squares["B"]).sum(0).sqrt() * scale
        norm_a = torch.stack(squares["A"]).sum(0).sqrt() * scale if squares["A"] else torch.zeros_like(norm_b)
        return norm_a, norm_b
