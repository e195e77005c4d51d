"""Per-sample gradients themselves, as rows of a matrix.

Those of the LoRA parameters of a whole batch come from one backward pass (`GradientProbe`); those of all
parameters of the model come one example a backward pass, as nothing cheaper is exact in every layer.

Shape letters: B examples, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gradsift.data.batching import collate
from gradsift.data.tokens import Encoded
from gradsift.gradients.norms import probed_layers
from gradsift.training import lora
from gradsift.training.adapted import GradientProbe
from gradsift.training.modules import ResponseLosses

_BATCH_BYTES = 128 * 2**20  # of gradients that one backward pass may leave, beside what the token budget allows


class GradientPass:
    """Gradients of each example's mean response loss at fixed weights, dropout off, as float32 rows.

    Columns are the parameters in a fixed order: for `lora` that of `trainable_parameters`, for `full` that of
    the model's own parameters; each parameter row by row.
    """

    def __init__(self, size: int, work: Callable[[Sequence[Encoded]], torch.Tensor]) -> None:
        self.size = size  # P
        self._work = work

    def __call__(self, examples: Sequence[Encoded]) -> torch.Tensor:
        """(B, P) float32 on the model's device."""
        return torch.cat([found for _, found in self.parts(examples)])

    def parts(self, examples: Sequence[Encoded]) -> Iterator[tuple[Sequence[Encoded], torch.Tensor]]:
        """The examples and their gradients in parts that memory holds whatever P is, or one by one where it is huge."""
        size = max(1, _BATCH_BYTES // (4 * self.size))
        for start in range(0, len(examples), size):
            yield examples[start : start + size], self._work(examples[start : start + size])


@contextmanager
def gradient_pass(adapted: Any, parameters: str, pad_id: int, padding_side: str = "right") -> Iterator[GradientPass]:
    """A `GradientPass` through an adapted model; leaves neither gradients, nor probes, nor a changed mode behind.

    Args:
        parameters: `lora` (the trainable LoRA factors) or `full` (all weights of the backbone with the
            adapter merged into a copy of it: one backward pass an example and P as large as the model).

    Raises:
        GradsiftError: a layer of which per-sample gradients cannot be told, or `full` of a model that the adapter
            cannot be merged into.
    """
    with lora.evaluating(adapted), torch.enable_grad():
        if parameters == "full":
            yield _full_pass(adapted, pad_id, padding_side)
            return
        layers, probe = probed_layers(adapted), GradientProbe()
        for layer in layers:
            layer.probe = probe
        try:
            yield _lora_pass(adapted, layers, probe, pad_id, padding_side)
        finally:
            for layer in layers:
                layer.probe = None


def _lora_pass(
    adapted: Any, layers: Sequence[Any], probe: GradientProbe, pad_id: int, padding_side: str
) -> GradientPass:
    losses_of = ResponseLosses(adapted)
    device = next(adapted.parameters()).device

    def work(examples: Sequence[Encoded]) -> torch.Tensor:
        probe.forget()
        losses = losses_of(collate(examples, pad_id, padding_side).to(device))
        # of a sum of losses, each of which depends on one example alone; the layers stand in their own order
        parts = torch.autograd.grad(losses.sum(), [probe.probes[id(layer)] for layer in layers])
        probe.forget()
        return torch.cat(parts, 1)

    return GradientPass(sum(parameter.numel() for parameter in lora.trainable_parameters(adapted).values()), work)


def _full_pass(adapted: Any, pad_id: int, padding_side: str) -> GradientPass:
    lora.require_mergeable(adapted)
    # a copy: taking a merged adapter out again would leave rounding errors in the backbone that others use
    model: Any = copy.deepcopy(adapted).merge_and_unload()
    parameters = list(model.requires_grad_(True).parameters())
    losses_of = ResponseLosses(model)

    def one(example: Encoded) -> torch.Tensor:
        losses = losses_of(collate([example], pad_id, padding_side).to(parameters[0].device))
        parts = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten().to(torch.float32) for part in parts])

    def work(examples: Sequence[Encoded]) -> torch.Tensor:
        return torch.stack([one(example) for example in examples])

    return GradientPass(sum(parameter.numel() for parameter in parameters), work)
