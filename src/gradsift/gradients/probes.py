"""Per-sample gradients of a LoRA layer, and their norms, for a whole batch from one backward pass.

A LoRA layer computes y = W x + b + s B A x with s = alpha / rank. Let L_i be the loss of example i, X_i (T, I) the
layer's inputs (activations) and D_i (T, O) the gradients of L_i with respect to the layer's outputs (backprops). Then

    grad_A L_i = s (D_i B)^T X_i          (R, I)
    grad_B L_i = s D_i^T (X_i A^T)        (O, R)
    |g_i|^2    = sum over layers of |grad_A L_i|_F^2 + |grad_B L_i|_F^2

where g_i is the gradient of GRADFILTERING (arXiv 2601.13697, section 3). The training computes the sum of these
products over the examples anyway, so computing them per example (`per_sample_parts`) adds almost no cost. A padding
token contributes nothing: no loss depends on it, so its row of D_i is zero.

A probe is an additional input of the layer (`gradsift.training.adapted`). In the backward pass, the layer returns its
per-sample results as the "gradient" with respect to the probe. For a `NormProbe`, these results are the squared norms
of each example's gradients, which autograd adds up over the layers on the device. For a `GradientProbe`, they are the
per-sample gradients.

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
        left: (B T, R), the tokens of all examples: D_i B for the gradient of A, or X_i A^T for the gradient of B.
        right: (B T, K), the tokens of all examples: X_i for the gradient of A (K = I), or D_i for the gradient of B
            (K = O).
        examples: B, the number of examples.
    """
    left = left.reshape(examples, -1, left.shape[-1])
    # (B, R, T) x (B, T, K): each sum is over the tokens of one example
    return torch.bmm(left.transpose(1, 2), right.reshape(examples, -1, right.shape[-1]))


def is_recomputing() -> bool:
    """Return whether this forward pass runs within a backward pass, to compute a checkpointed block again."""
    return torch._C._current_graph_task_id() != -1  # torch.utils.checkpoint makes this test too


class Probe:
    """Checks that each adapted layer is called only once per forward pass, with inputs (B, T, I) of all examples."""

    def __init__(self) -> None:
        self._layers: set[int] = set()  # ids of the layers called so far
        self._examples: int | None = None

    def _note(self, layer: object, activations: torch.Tensor) -> int:
        """Record that `layer` is called with the inputs `activations` (B, T, I), and return B."""
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
        """Forget the layers and the batch size that were recorded for the current pass."""
        self._layers.clear()
        self._examples = None


class NormProbe(Probe):
    """Computes the per-sample gradient norms over all adapted layers in a backward pass.

    The loss of the pass must be a sum (or mean) of losses, each of which depends on one example only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._probe: torch.Tensor | None = None  # (2, B); its gradient is the squared norms of A and B

    def of(self, layer: Any, activations: torch.Tensor) -> torch.Tensor:
        """Return the probe (2, B) float32 of the pass in which `layer` has the inputs `activations` (B, T, I)."""
        # a checkpointed block that is computed again in the backward pass does not count as a second call
        if self._probe is not None and is_recomputing():
            return self._probe
        examples = self._note(layer, activations)
        if self._probe is None:
            # One probe for all layers. Autograd adds up the layers' contributions to the gradient of this tensor, so
            # the sum over the layers is computed on the device.
            self._probe = torch.zeros(2, examples, device=activations.device, requires_grad=True)
        return self._probe

    @staticmethod
    def gather(parts_a: torch.Tensor, parts_b: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the squared norms (2, B) of a layer's gradients with respect to A and to B.

        `parts_a` and `parts_b` are the gradients of each example, before they are multiplied by s (`scale`).
        """
        # At least float32: a norm in bfloat16 would be rounded by up to .4 %, and the norms of the members may differ
        # by only 3 % (`ensemble_checks`). The scale s is applied to (2, B) norms instead of (B, R, I) products.
        dtype = torch.promote_types(parts_a.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(part, dim=(1, 2), dtype=dtype) for part in (parts_a, parts_b)]
        return torch.stack(norms).mul_(scale).square_().to(torch.float32)

    def backward(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backward pass of the losses (B,) as far as the adapted layers; no parameter's `.grad` changes.

        Returns:
            norm_A, norm_B: the norms of each example's gradient with respect to the factors A, and to the factors B, of
                all adapted layers, (B,) float32 each.
        """
        if self._probe is None:
            raise GradsiftError("no adapted layer was passed with gradients on; per-sample norms need a forward pass")
        # the sum and not the mean, which would divide every example's gradient by B
        (squares,) = torch.autograd.grad(losses.sum(), [self._probe])
        self.forget()
        norm_a, norm_b = squares.sqrt()
        return norm_a, norm_b

    def take(self, scale: float | torch.Tensor = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return norm_A and norm_B, as `backward` does, of the backward pass that has run since the last call.

        Args:
            scale: the number by which each example's loss is divided in the loss of the backward pass: 1 if that loss
                is a sum, and the batch size if it is a mean. A tensor (B,) gives each example its own number.
        """
        squares = None if self._probe is None else self._probe.grad
        self.forget()
        if squares is None:
            raise GradsiftError("no backward pass was seen since the last call; per-sample norms need one")
        norm_a, norm_b = squares.sqrt() * scale
        return norm_a, norm_b

    def forget(self) -> None:
        super().forget()
        self._probe = None


class GradientProbe(Probe):
    """Collects the per-sample gradients of all adapted layers; each layer has a probe of its own, (B, P_l)."""

    def __init__(self) -> None:
        super().__init__()
        self.probes: dict[int, torch.Tensor] = {}  # by the layer's id, in the order of the forward pass

    def of(self, layer: Any, activations: torch.Tensor) -> torch.Tensor:
        """Return the probe (B, P_l) float32 of `layer` for the forward pass with the inputs `activations` (B, T, I)."""
        if is_recomputing():
            return self.probes[id(layer)]
        examples = self._note(layer, activations)
        size = layer.lora_A[ADAPTER].weight.numel() + layer.lora_B[ADAPTER].weight.numel()
        # one expanded zero, because (B, P_l) zeros, which nothing reads, would take as much memory as the gradients
        probe = torch.zeros((), device=activations.device).expand(examples, size).requires_grad_()
        self.probes[id(layer)] = probe
        return probe

    @staticmethod
    def gather(parts_a: torch.Tensor, parts_b: torch.Tensor, scale: float) -> torch.Tensor:
        """Return a layer's gradients (B, P_l): the gradient of A (R, I) row by row, then that of B (O, R) row by row.

        `parts_a` (B, R, I) and `parts_b` (B, R, O) are not yet multiplied by s (`scale`), and `parts_b` is transposed.
        """
        # parts_b is (B, R, O), the transpose of peft's B
        parts = [parts_a.flatten(1), parts_b.transpose(1, 2).flatten(1)]
        return torch.cat(parts, 1).to(torch.float32).mul_(scale)

    def forget(self) -> None:
        super().forget()
        self.probes.clear()
