"""Norms of per-sample LoRA gradients, for a whole batch from one backward pass.

For the sum (or mean) of losses that depend on one example each, the backward pass of an adapted layer
meets every example's gradient on its way to their sum (see `gradsift.training.adapted`).
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn

from gradsift.errors import GradsiftError
from gradsift.training.adapted import AdaptedLinear, NormProbe, layer_path
from gradsift.training.lora import lora_layers


def probed_layers(adapted: nn.Module) -> list[AdaptedLinear]:
    """The adapted layers, whose backward pass meets each example's gradient.

    Raises:
        GradsiftError: there is none, or one of another kind; names it.
    """
    layers = dict(lora_layers(adapted))
    if not layers:
        raise GradsiftError("per-sample gradients need a model with LoRA adapters; it has none")
    for name, layer in layers.items():
        if not isinstance(layer, AdaptedLinear):
            raise GradsiftError(
                f"per-sample gradients need plain linear layers, and {layer_path(name)} is of class "
                f"{type(layer.get_base_layer()).__name__}; leave it out of lora.targets, and load the model unquantised"
            )
    return list(layers.values())


class PerSampleNorms:
    """Turns each backward pass through the active adapter into per-sample gradient norms.

    Use it as a context manager. After a backward pass `take()` returns the norms and starts anew.
    Padded positions contribute nothing: no loss depends on them, so their backprops are zero.
    """

    def __init__(self, adapted: nn.Module) -> None:
        self._layers = probed_layers(adapted)
        self._probe = NormProbe()

    def __enter__(self) -> PerSampleNorms:
        for layer in self._layers:
            layer.probe = self._probe
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:
            layer.probe = None
        self.forget()

    def forget(self) -> None:
        """Drop what a pass that did not end has gathered."""
        self._probe.take()

    def take(self, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms of the gradients of A and of B since the last call, and forget them.

        Args:
            scale: what one example's loss was divided by in the loss that was backpropagated: 1 for
                a sum of losses, the batch size for their mean.

        Returns:
            norm_A, norm_B: (B,) float32 each, over all adapted layers.
        """
        squares = self._probe.take()
        if squares is None:
            raise GradsiftError("no backward pass was seen since the last call; per-sample norms need one")
        norm_a, norm_b = squares.sqrt() * scale
        return norm_a, norm_b
