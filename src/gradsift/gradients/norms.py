"""Norms of per-sample LoRA gradients, for a whole batch from one backward pass (formula: `gradients/probes.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gradsift.errors import GradsiftError
from gradsift.gradients.probes import GradientProbe, NormProbe
from gradsift.training.adapted import AdaptedLinear, fuse, layer_path, unfuse
from gradsift.training.lora import lora_layers


@contextmanager
def attached(model: nn.Module, probe: NormProbe | GradientProbe) -> Iterator[list[AdaptedLinear]]:
    """Attach a probe to all adapted layers of a model and yield these layers, in the order of the model's modules.

    On exit the probe is removed, and the model is as before.

    Raises:
        GradsiftError: there is no adapted layer, or one that does not support per-sample gradients (the message names
            the layer).
    """
    # a model that was not adapted by gradsift has peft's own layers, which have no probes
    changed = fuse(model)
    try:
        layers = dict(lora_layers(model))
        if not layers:
            raise GradsiftError("per-sample gradients need a model with LoRA adapters; it has none")
        for name, layer in layers.items():
            if not isinstance(layer, AdaptedLinear):
                raise GradsiftError(
                    f"per-sample gradients need plain LoRA on frozen linear layers, and {layer_path(name)} is of class "
                    f"{type(layer.get_base_layer()).__name__} or its adapter is not plain (DoRA, a bias, a second "
                    "adapter, a name that is not default); leave it out of lora.targets, and load the model unquantised"
                )
        for layer in layers.values():
            layer.probe = probe
        yield list(layers.values())
    finally:
        for _, layer in lora_layers(model):
            vars(layer).pop("probe", None)
        unfuse(changed)


class PerSampleNorms:
    """A context manager in which every backward pass through the active adapter gives per-sample gradient norms.

    The loss of the pass must be a sum (or mean) of losses, each of which depends on one example only.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            GradsiftError: see `attached`.
        """
        self._model = model
        self._probe = NormProbe()
        self._attached: AbstractContextManager[Any] | None = None
        with attached(model, self._probe):
            pass  # raises here if the model is not supported

    def __enter__(self) -> PerSampleNorms:
        self._attached = attached(self._model, self._probe)
        self._attached.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attached is not None:
            self._attached.__exit__(None, None, None)
        self._attached = None
        self.forget()

    def forget(self) -> None:
        """Drop the norms that an unfinished pass has gathered."""
        self._probe.take()

    def of(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backward pass of losses (B,) and return their gradients' norms; no parameter's `.grad` changes.

        Returns:
            norm_A, norm_B: (B,) float32 each, over all adapted layers.
        """
        # the sum and not the mean, which would divide every example's gradient by B
        norm_a, norm_b = self._probe.backward(losses.sum()).sqrt()
        return norm_a, norm_b

    def take(self, scale: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norms of the backward pass since the last call, and forget them.

        Args:
            scale: the number that one example's loss was divided by in the loss of the backward pass: 1 for a sum of
                losses, the batch size for their mean; or one number per example, (B,).

        Returns:
            norm_A, norm_B: (B,) float32 each, over all adapted layers.

        Raises:
            GradsiftError: there was no backward pass.
        """
        squares = self._probe.take()
        if squares is None:
            raise GradsiftError("no backward pass was seen since the last call; per-sample norms need one")
        norm_a, norm_b = squares.sqrt() * scale
        return norm_a, norm_b
