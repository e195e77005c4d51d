"""Per-sample gradients of a LoRA layer, and their norms, for a whole batch from one backward pass.

A LoRA layer computes y = W x + b + s B A x with s = alpha / rank. For example i, let X_i (T, I) be the layer's inputs
(activations) and D_i (T, O) the gradients of L_i with respect to the layer's outputs (backprops). Then

    grad_A L_i = s (D_i B)^T X_i          (R, I)
    grad_B L_i = s D_i^T (X_i A^T)        (O, R)
    |g_i|^2    = sum over layers of |grad_A L_i|_F^2 + |grad_B L_i|_F^2

where g_i is the gradient of GRADFILTERING (arXiv 2601.13697, section 3). The training needs the sum of these products
over the examples anyway, so computing them per example adds almost no cost (`per_sample_parts`). A padding token
contributes nothing, because no loss depends on it and its row of D_i is zero.

A probe is an additional input of the layer (`gradsift.training.adapted`). In the backward pass, the layer returns its
results as the probe's "gradient": squared norms of each example (`NormProbe`), which autograd adds up over the layers
on the device, or the gradients themselves (`GradientProbe`).

Shape letters: B examples of a batch, T tokens, I inputs and O outputs of a layer, R rank, P_l parameters in A
and B of layer l.
"""

from __future__ import annotations

from typing import Any

import torch

from gradsift.errors import GradsiftError

ADAPTER = "default"  # peft's name of the active adapter


def per_sample_parts(left: torch.Tensor, right: torch.Tensor, examples: int) -> torch.Tensor:
    """Return left_i^T right_i, a sum over tokens, for each example i, (B, R, K).

    Args:
        left: (B T, R), D_i B for the gradient of A, X_i A^T for the gradient of B.
        right: (B T, K), X_i for the gradient of A, D_i for the gradient of B.
        examples: B.
    """
    left = left.reshape(examples, -1, left.shape[-1])
    # (B, R, T) x (B, T, K): the sum over the tokens stays within an example
    return torch.bmm(left.transpose(1, 2), right.reshape(examples, -1, right.shape[-1]))


def is_recomputing() -> bool:
    """Return whether this forward pass runs within a backward pass, where a checkpointed block is computed again."""
    return torch._C._current_graph_task_id() != -1  # torch.utils.checkpoint makes this test too


class Passes:
    """Checks that each adapted layer is called only once per forward pass, with inputs that keep the examples apart."""

    def __init__(self) -> None:
        self._layers: set[int] = set()  # ids of the layers called so far
        self._examples: int | None = None

    def note(self, layer: object, activations: torch.Tensor) -> int:
        """Record that `layer` is called with the inputs `activations` (B, T, I), and return B.

        Raises:
            GradsiftError: the examples cannot be told apart, or the layer is called twice, so that its gradient would
                be a sum over two calls; the message names the layer.
        """
        name = getattr(layer, "path", "an adapted layer")
        if id(layer) in self._layers:
            raise GradsiftError(
                f"{name} is passed twice before a backward pass, so the gradients of the two passes cannot be told "
                "apart; run the backward pass in between, or leave the layer out of lora.targets"
            )
        self._layers.add(id(layer))
        if activations.dim() != 3:
            raise GradsiftError(
                f"{name} sees inputs of shape {tuple(activations.shape)}, not (batch, tokens, width), so the gradients "
                "of the examples cannot be told apart; leave it out of lora.targets"
            )
        if self._examples is None:
            self._examples = len(activations)
        if len(activations) != self._examples:
            raise GradsiftError(
                f"{name} sees {len(activations)} examples where another layer saw {self._examples}; leave layers that "
                "do not see the examples one by one out of lora.targets"
            )
        return self._examples

    def forget(self) -> None:
        self._layers.clear()
        self._examples = None


class NormProbe:
    """Sums the squared per-sample gradient norms over all adapted layers of a backward pass."""

    def __init__(self) -> None:
        self._probe: torch.Tensor | None = None
        self._passes = Passes()

    def of(self, layer: Any, activations: torch.Tensor) -> torch.Tensor:
        """Return the probe (2, B) float32 of the forward pass in which `layer` has the inputs `activations` (B, T, I).

        Raises:
            GradsiftError: see `Passes.note`.
        """
        # in the backward pass, a checkpointed block is computed again with the same examples; this is no second call
        if self._probe is not None and is_recomputing():
            return self._probe
        examples = self._passes.note(layer, activations)
        if self._probe is None:
            # One probe for all layers: autograd adds up what the layers report in the gradient of this tensor, so the
            # sum over the layers is made on the device, and the host waits for it once.
            self._probe = torch.zeros(2, examples, device=activations.device, requires_grad=True)
        return self._probe

    @staticmethod
    def gather(parts_a: torch.Tensor, parts_b: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the squared norms (2, B) of a layer's gradients of A and of B."""
        # A norm in bfloat16 would be rounded by up to .4 %, and the members may differ by only 3 % (`ensemble_checks`).
        # The scale s is applied here, to (2, B) numbers, and not to the (B, R, I) products.
        dtype = torch.promote_types(parts_a.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(part, dim=(1, 2), dtype=dtype) for part in (parts_a, parts_b)]
        return torch.stack(norms).mul_(scale).square_().to(torch.float32)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Run the backward pass of `loss` down to the probe and return the squared norms (2, B); no `.grad` changes.

        Raises:
            GradsiftError: no adapted layer was called with gradients on.
        """
        if self._probe is None:
            raise GradsiftError("no adapted layer was passed with gradients on; per-sample norms need a forward pass")
        (squares,) = torch.autograd.grad(loss, [self._probe])
        self._probe = None
        self._passes.forget()
        return squares

    def take(self) -> torch.Tensor | None:
        """Return and forget the squared norms (2, B) of the gradients of A and B; None if no backward pass has run."""
        probe, self._probe = self._probe, None
        self._passes.forget()
        return None if probe is None else probe.grad


class GradientProbe:
    """Collects the per-sample gradients of all adapted layers; each layer has a probe of its own, (B, P_l)."""

    def __init__(self) -> None:
        self.probes: dict[int, torch.Tensor] = {}  # by the layer's id, in the order of the forward pass
        self._passes = Passes()

    def of(self, layer: Any, activations: torch.Tensor) -> torch.Tensor:
        """Return the probe of the forward pass in which `layer` has the inputs `activations` (B, T, I).

        The probe is a single zero, expanded to (B, P_l) float32.

        Raises:
            GradsiftError: see `Passes.note`.
        """
        if is_recomputing():
            return self.probes[id(layer)]
        examples = self._passes.note(layer, activations)
        size = layer.lora_A[ADAPTER].weight.numel() + layer.lora_B[ADAPTER].weight.numel()
        # expanded: zeros of this shape would take as much memory as the gradients, and nothing reads their values
        probe = torch.zeros((), device=activations.device).expand(examples, size).requires_grad_()
        self.probes[id(layer)] = probe
        return probe

    @staticmethod
    def gather(parts_a: torch.Tensor, parts_b: torch.Tensor, scale: float) -> torch.Tensor:
        """Return a layer's gradients (B, P_l): the gradient of A (R, I) row by row, then the gradient of B (O, R)."""
        # parts_b is (B, R, O), the transpose of peft's B
        parts = [parts_a.flatten(1), parts_b.transpose(1, 2).flatten(1)]
        return torch.cat(parts, 1).to(torch.float32).mul_(scale)

    def forget(self) -> None:
        self.probes.clear()
        self._passes.forget()
