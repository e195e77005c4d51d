"""Per-sample gradients, and their norms, for any model with peft's LoRA adapters (formulas: `gradients/probes.py`).

`per_sample_norms` and `per_sample_gradients` take a list of examples. gradsift's own stages use `attached` and
`gradient_pass` instead.

Shape letters: N examples, B examples of a batch, P parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from gradsift.data.batching import by_length, collate
from gradsift.data.tokens import Encoded
from gradsift.errors import DataError, GradsiftError
from gradsift.gradients.probes import ADAPTER, GradientProbe, NormProbe
from gradsift.training import lora
from gradsift.training.adapted import AdaptedLinear, fuse, layer_path, unfuse
from gradsift.training.device import numbers_at_once
from gradsift.training.head import ResponseLosses

_BATCH_BYTES = 128 * 2**20  # most bytes of the gradients of one backward pass on a CPU
IGNORED = -100  # transformers' label of a token without a loss
P = TypeVar("P", NormProbe, GradientProbe)


@contextmanager
def attached(model: nn.Module, probe: P) -> Iterator[P]:
    """Attach a probe to all adapted layers of a model, and yield the probe. On exit, the model is as it was before.

    Raises:
        GradsiftError: the model has no adapted layer, or an adapted layer does not support per-sample gradients (the
            message names the layer).
    """
    # the layers of a model that was adapted by peft alone have no probes
    changed = fuse(model)
    try:
        layers = dict(lora.lora_layers(model))
        if not layers:
            raise GradsiftError("per-sample gradients need a model with LoRA adapters; it has none")
        for name, layer in layers.items():
            if not isinstance(layer, AdaptedLinear):
                raise GradsiftError(
                    f"per-sample gradients need plain LoRA on frozen linear layers, but {layer_path(name)} is of class "
                    f"{type(layer.get_base_layer()).__name__} or its adapter is not plain (DoRA, a bias, a second "
                    "adapter, a name that is not default); leave it out of lora.targets, and load the model unquantised"
                )
        for layer in layers.values():
            layer.probe = probe
        yield probe
    finally:
        for _, layer in lora.lora_layers(model):
            vars(layer).pop("probe", None)
        unfuse(changed)
        probe.forget()


def per_sample_norms(model: Any, rows: Sequence[Mapping[str, Any]], *, tokens: int = 4096) -> np.ndarray:
    """Return the norm of each example's gradient with respect to the LoRA parameters, at the model's weights.

    An example's loss is the mean negative log-likelihood of its labelled tokens; dropout is off. The model's
    parameters, their `.grad` and its training mode do not change.

    Args:
        model: a `peft.PeftModel` with LoRA on linear layers, on any device.
        rows: one mapping per example. The values of `input_ids`, `labels` (-100 where a token has no loss) and, if the
            example is padded, `attention_mask` are lists or one-dimensional tensors of equal length.
        tokens: the largest number of tokens in a forward pass, padding included. It changes the result only by
            rounding.

    Returns:
        The L2 norms, (N,) float32, each over the factors A and B of all adapted layers together.

    Raises:
        DataError: a row lacks `input_ids` or `labels`, its lists differ in length, a label is not the token at its
            position, or no token has a loss; the message names the row.
        GradsiftError: a layer does not support per-sample gradients; the message names the layer.
    """
    encoded = encoded_rows(rows)
    norms_of_rows = np.zeros(len(encoded), dtype=np.float32)
    with lora.evaluating(model), torch.enable_grad():
        losses_of, device = ResponseLosses(model), next(model.parameters()).device
        with attached(model, NormProbe()) as probe:
            for batch in by_length(encoded, tokens):
                norm_a, norm_b = probe.backward(losses_of(collate(batch, _pad_id(model)).to(device)))
                # |g_i|^2 = |grad_A L_i|^2 + |grad_B L_i|^2
                norms_of_rows[[example.row for example in batch]] = torch.hypot(norm_a, norm_b).cpu().numpy()
    return norms_of_rows


def per_sample_gradients(model: Any, rows: Sequence[Mapping[str, Any]], *, tokens: int = 4096) -> torch.Tensor:
    """Return each example's gradient with respect to the LoRA parameters, (N, P) float32 on the CPU.

    Arguments and errors are those of `per_sample_norms`. The columns are the LoRA parameters in the order of
    `model.named_parameters()`, each flattened row by row.
    """
    encoded = encoded_rows(rows)
    with gradient_pass(model, "lora", _pad_id(model)) as gradients:
        gradients_of_rows = torch.zeros(len(encoded), gradients.size)
        for batch in by_length(encoded, tokens):
            for examples, part in gradients.parts(batch):
                gradients_of_rows[[example.row for example in examples]] = part.cpu()
    return gradients_of_rows


def encoded_rows(rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
    """Return the examples of `rows` without their padding; for the format and the errors, see `per_sample_norms`."""
    encoded = []
    for number, row in enumerate(rows):
        if missing := [name for name in ("input_ids", "labels") if row.get(name) is None]:
            raise DataError(f"row {number} has no {missing[0]}; give input_ids, and labels (-100: no loss)")
        ids, labels = (np.asarray(row[name], dtype=np.int64) for name in ("input_ids", "labels"))
        mask = np.asarray(row.get("attention_mask", np.ones_like(ids)), dtype=bool)
        if not ids.ndim == 1 or not ids.shape == labels.shape == mask.shape:
            raise DataError(
                f"row {number} has input_ids {ids.shape}, labels {labels.shape} and attention_mask {mask.shape}; give "
                "one sequence, all of one length"
            )
        has_loss = labels != IGNORED
        if (wrong := np.flatnonzero(has_loss & ((labels != ids) | ~mask))).size:
            raise DataError(
                f"row {number}: the label at position {wrong[0]} is {labels[wrong[0]]} and the token {ids[wrong[0]]}; "
                "labels have to be the input's own tokens (the model shifts them), and -100 in the padding"
            )
        example = Encoded(number, number, ids[mask].astype(np.int32), has_loss[mask])
        if not example.scored:
            raise DataError(f"row {number} has no label after its first token, so its gradient is not defined")
        encoded.append(example)
    return encoded


def _pad_id(model: Any) -> int:
    return int(getattr(model.config, "pad_token_id", None) or 0)  # any token will do, since padding has no loss


@dataclass(frozen=True)
class GradientPass:
    """Computes the gradient of each example's mean response loss at fixed weights, with dropout off, as a float32 row.

    The columns are the parameters, each flattened row by row. With `lora` (see `gradient_pass`), these are A and B of
    each adapted layer. With `full`, these are the parameters of the model with the adapter merged into it, in the order
    of `model.parameters()`.
    """

    size: int  # P
    device: torch.device
    work: Callable[[Sequence[Encoded]], torch.Tensor]  # returns the gradients (B, P) of all given examples at once

    def __call__(self, examples: Sequence[Encoded]) -> torch.Tensor:
        """Return the gradients of `examples`, (B, P) float32, on the model's device."""
        return torch.cat([gradients for _, gradients in self.parts(examples)])

    def parts(self, examples: Sequence[Encoded]) -> Iterator[tuple[Sequence[Encoded], torch.Tensor]]:
        """Yield parts of `examples`, each with its gradients (B, P).

        A part has so few examples that its gradients fit in memory.
        """
        size = max(1, numbers_at_once(self.device, _BATCH_BYTES // 4) // self.size)
        for start in range(0, len(examples), size):
            yield examples[start : start + size], self.work(examples[start : start + size])


@contextmanager
def gradient_pass(adapted: Any, parameters: str, pad_id: int) -> Iterator[GradientPass]:
    """Yield a `GradientPass` through an adapted model. On exit, the model is as it was before.

    Args:
        parameters: `lora` (the LoRA factors) or `full` (all weights of a copy of the model with the adapter merged into
            it). With `full`, P is the size of the model, and each example needs a backward pass of its own.

    Raises:
        GradsiftError: see `attached`; with `full`, the adapter cannot be merged into the model.
    """
    with lora.evaluating(adapted), torch.enable_grad():
        if parameters == "full":
            yield _full_pass(adapted, pad_id)
            return
        losses_of, device = ResponseLosses(adapted), next(adapted.parameters()).device
        with attached(adapted, GradientProbe()) as probe:
            layers = [layer for _, layer in lora.lora_layers(adapted)]

            def work(examples: Sequence[Encoded]) -> torch.Tensor:
                probe.forget()
                losses = losses_of(collate(examples, pad_id).to(device))
                # (B, P_l) for each layer: L_i depends on row i only, so row i of the sum's gradient is that of L_i
                parts = torch.autograd.grad(losses.sum(), [probe.probes[id(layer)] for layer in layers])
                probe.forget()
                return torch.cat(parts, 1)

            # counts frozen factors too, because peft freezes the adapters of a model that it loads
            factors = [factor[ADAPTER].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
            size = sum(factor.numel() for factor in factors)
            yield GradientPass(size, device, work)


def _full_pass(adapted: Any, pad_id: int) -> GradientPass:
    lora.require_mergeable(adapted)
    # a copy, because unmerging would leave rounding errors in the backbone, which other stages also use
    model: Any = copy.deepcopy(adapted).merge_and_unload()
    parameters = list(model.requires_grad_(True).parameters())
    losses_of = ResponseLosses(model)

    def one(example: Encoded) -> torch.Tensor:
        losses = losses_of(collate([example], pad_id).to(parameters[0].device))
        # an unused parameter, such as an expert that no token reaches, gets a gradient of zero
        parts = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten().to(torch.float32) for part in parts])

    def work(examples: Sequence[Encoded]) -> torch.Tensor:
        return torch.stack([one(example) for example in examples])

    return GradientPass(sum(parameter.numel() for parameter in parameters), parameters[0].device, work)
