"""A frozen linear layer with its LoRA adapter as one differentiable map.

    y = W x + b + s B A x,   s = alpha / rank

peft computes the adapter beside the layer, in float32, with a cast, an addition and a product of the
layer's full width each. Here the adapter's product is added by the matrix product itself, in the
precision of the activations, and the backward pass knows that W is frozen. A and B stay float32
parameters; the examples' gradients are summed in float32, whether their norms are wanted or not, so that
a training does not depend on it.

The gradient that one example gives to A and B is a product of its backprops and its activations over
its own tokens. Their sum over the examples is the gradient that the optimiser needs anyhow, so the
norms of the parts cost next to nothing: `NormProbe` gathers them, as gradients of a probe, and no
loop over examples is needed. `GradientProbe` gathers the parts themselves in the same way.

Shape letters: B examples of a batch, T tokens, I inputs of a layer, O its outputs, R rank, P_l numbers
in the A and the B of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from gradsift.errors import GradsiftError
from gradsift.training.checkpointing import is_recomputing
from gradsift.training.frozen import FrozenProducts, forget_products, frozen_products

ADAPTER = "default"  # peft's name of the active adapter
_PEFT_PREFIX = "base_model.model."  # of module names in a model with adapters
# Forward passes that are W x + b and nothing else. Falcon's class has one of its own, which differs in rounding alone.
_PLAIN = (nn.Linear.forward, Conv1D.forward)
_FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"


class Passes:
    """Checks in each forward pass that every adapted layer sees the examples one by one, and once."""

    def __init__(self) -> None:
        self._layers: set[int] = set()  # that were passed
        self._examples: int | None = None

    def note(self, layer: object, activations: torch.Tensor) -> int:
        """B, where `layer` sees `activations` (B, T, I).

        Raises:
            GradsiftError: names the layer. The examples cannot be told apart, or the layer is passed twice: its
                gradient would be a sum of two.
        """
        name = getattr(layer, "path", "an adapted layer")
        if id(layer) in self._layers:
            raise GradsiftError(
                f"{name} is passed twice in one forward pass, so the gradients of the two passes cannot be told apart; "
                "leave it out of lora.targets"
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
    """Gathers squared per-sample gradient norms over all adapted layers of a backward pass.

    Each layer takes the probe as one more input and gives the squared norms of its A and its B as the
    probe's gradient; autograd adds them up, on the device, without a hook.
    """

    def __init__(self) -> None:
        self._probe: torch.Tensor | None = None
        self._passes = Passes()

    def of(self, layer: Any, activations: torch.Tensor) -> torch.Tensor:
        """The probe, (2, B) float32, of the pass in which `layer` sees `activations` (B, T, I).

        Raises:
            GradsiftError: see `Passes`.
        """
        if self._probe is not None and is_recomputing():
            return self._probe
        examples = self._passes.note(layer, activations)
        if self._probe is None:
            self._probe = torch.zeros(2, examples, device=activations.device, requires_grad=True)
        return self._probe

    @staticmethod
    def gather(parts_a: torch.Tensor, parts_b: torch.Tensor, scale: float) -> torch.Tensor:
        """Squared norms (2, B) of a layer's parts."""
        norms = [torch.linalg.vector_norm(p, dim=(1, 2), dtype=torch.float32) for p in (parts_a, parts_b)]
        return torch.stack(norms).mul_(scale).square_()

    def take(self) -> torch.Tensor | None:
        """Squared norms of the gradients of A and of B, (2, B), of the last pass; None if there was no backward."""
        probe, self._probe = self._probe, None
        self._passes.forget()
        return None if probe is None else probe.grad


class GradientProbe:
    """Gathers the per-sample gradients of all adapted layers: each layer has a probe of its own, (B, P_l)."""

    def __init__(self) -> None:
        self.probes: dict[int, torch.Tensor] = {}  # by the layer's id, in the order of the forward pass
        self._passes = Passes()

    def of(self, layer: Any, activations: torch.Tensor) -> torch.Tensor:
        """The probe, (B, P_l) float32 without memory of its own, of the pass in which `layer` sees `activations`.

        Raises:
            GradsiftError: see `Passes`.
        """
        if is_recomputing():
            return self.probes[id(layer)]
        examples = self._passes.note(layer, activations)
        size = layer.lora_A[ADAPTER].weight.numel() + layer.lora_B[ADAPTER].weight.numel()
        probe = torch.zeros((), device=activations.device).expand(examples, size).requires_grad_()
        self.probes[id(layer)] = probe
        return probe

    @staticmethod
    def gather(parts_a: torch.Tensor, parts_b: torch.Tensor, scale: float) -> torch.Tensor:
        """A layer's gradients (B, P_l): A's (R, I) row by row, then B's (O, R)."""
        parts = [parts_a.flatten(1), parts_b.transpose(1, 2).flatten(1)]
        return torch.cat(parts, 1).to(torch.float32).mul_(scale)

    def forget(self) -> None:
        self.probes.clear()
        self._passes.forget()


class AdaptedLinear(Linear):  # type: ignore[misc]
    """peft's adapted layer with the forward pass of this module; weights, names and files are peft's."""

    probe: NormProbe | GradientProbe | None = None  # set while norms or gradients are gathered
    path: str  # the layer's name in the model without adapters

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base: Any = self.get_base_layer()
        dropout: Any = self.lora_dropout[ADAPTER]
        drops = isinstance(dropout, nn.Dropout) and dropout.training
        probe = self.probe if torch.is_grad_enabled() else None
        taken = (probe.of(self, x), probe.gather) if probe is not None else (None, None)
        factors = (self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight)
        y: torch.Tensor = _Map.apply(  # type: ignore[no-untyped-call]
            x, dropout(x) if drops else None, frozen_products(base), *factors, self.scaling[ADAPTER], *taken
        )
        return y.view(*x.shape[:-1], -1)  # here: autograd forbids to change a view made in `_Map` (Falcon adds to it)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        forget_products(self.get_base_layer())
        super().merge(*args, **kwargs)


def fuse(adapted: nn.Module) -> None:
    """Give the plain adapted layers of a model the forward pass of `AdaptedLinear`."""
    module: Any
    for name, module in adapted.named_modules():
        if type(module) is Linear and is_plain(module.get_base_layer()):
            module.__class__ = AdaptedLinear
            module.path = layer_path(name)


def is_plain(layer: Any) -> bool:
    """Whether a layer computes W x + b and nothing else, so that `_Map` may take its place.

    A subclass of `nn.Linear` with a forward pass of its own may do anything (Llama 4's router), and so may hooks.
    """
    kind = type(layer)
    if "frozen_products" in vars(layer):  # its own products are those of W x + b (`frozen.py`)
        return True
    if kind.forward not in _PLAIN and f"{kind.__module__}.{kind.__qualname__}" != _FALCON:
        return False
    return not ("forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks)


def layer_path(name: str) -> str:
    """The name that a module of a model with adapters has in the model without them."""
    return name.removeprefix(_PEFT_PREFIX)


class _Map(torch.autograd.Function):
    """The map, (B T, O), and its gradients with respect to x, A and B; the probe's gradient is what it gathers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., I)
        dropped: torch.Tensor | None,  # (..., I) what the adapter sees, where dropout is on
        layer: FrozenProducts,
        factor_a: torch.Tensor,  # (R, I)
        factor_b: torch.Tensor,  # (O, R)
        scale: float,
        probe: torch.Tensor | None,  # (2, B) or (B, P_l)
        gather: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None,  # from the parts, like the probe
    ) -> torch.Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        y = layer.outputs(inputs)
        a, b = factor_a.to(x.dtype), factor_b.to(x.dtype)
        seen = inputs if dropped is None else dropped.reshape(-1, x.shape[-1])
        inner = seen @ a.t()  # (B T, R)
        y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(x if dropped is None else dropped, inner, a, b)
        ctx.layer, ctx.scale, ctx.has_dropout, ctx.gather = layer, scale, dropped is not None, gather
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, inner, a, b = ctx.saved_tensors
        backprops = gradients[0].reshape(-1, b.shape[0])  # (B T, O)
        inner_backprops = backprops @ b  # (B T, R), without the scale
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = ctx.layer.to_inputs(backprops)
            if not ctx.has_dropout:
                to_x.addmm_(inner_backprops, a, alpha=ctx.scale)
            to_x = to_x.view_as(seen)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            to_dropped = (inner_backprops @ a).mul_(ctx.scale).view_as(seen)
        examples = len(seen) if seen.dim() == 3 else 1
        parts_a = _parts(inner_backprops, seen, examples)  # (B, R, I)
        parts_b = _parts(inner, backprops, examples)  # (B, R, O)
        gathered = None if ctx.gather is None else ctx.gather(parts_a, parts_b, ctx.scale)
        to_a = parts_a.sum(0, dtype=torch.float32).mul_(ctx.scale)
        to_b = parts_b.sum(0, dtype=torch.float32).mul_(ctx.scale).t()
        return to_x, to_dropped, None, to_a, to_b, None, gathered, None


def _parts(left: torch.Tensor, right: torch.Tensor, examples: int) -> torch.Tensor:
    """Sum over each example's tokens of left (B T, R) times right (B T, I): (B, R, I)."""
    left = left.reshape(examples, -1, left.shape[-1])
    return torch.bmm(left.transpose(1, 2), right.reshape(examples, -1, right.shape[-1]))
