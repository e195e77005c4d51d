"""The operations between the matrix products of a transformer's blocks, fused for a CPU.

transformers reads and writes whole tensors for every sum, product and cast, which takes half of a step's time. Here a
normalisation layer, an MLP activation or causal attention is computed in one pass over its inputs (`kernels.cpp`), with
float32 arithmetic. Layers that train or are adapted, and attention with a mask, a cache or dropout, use transformers'
code.

Shape letters: M tokens of a batch, D width, F inner width of an MLP, B examples, H heads, T tokens of an
example, E width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUTanh, SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradsift.cpu.compiled import kernels
from gradsift.cpu.products import PackedConv1D, PackedLinear, PackedProducts, is_packed
from gradsift.training.frozen import trains

ATTENTION = "gradsift_cpu"  # name of the fused attention in transformers' registry
LANES = 16  # numbers that a kernel processes at once; all widths must be multiples of this


def fuse_blocks(model: nn.Module, norms: list[Any]) -> None:
    """Replace the forward passes of a frozen model's normalisation layers, MLPs and rotary attention.

    Args:
        norms: the normalisation layers that read the float32 residual stream
            (`gradsift.training.residual.stream_readers`).
    """
    for norm in norms:
        _become(norm, _FusedNorm)
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "act", None), GELUTanh):
            _become(module, _GeluMlp)
        elif isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
            _become(module, _GatedMlp)
        elif hasattr(module, "q_proj") and not (hasattr(module, "q_norm") or module.head_dim % (2 * LANES)):
            # Not for Qwen3, which normalises queries and keys before it rotates them. The kernel rotates a head's two
            # halves into each other, so the width of a half must be a multiple of LANES.
            _become(module, _RotaryAttention)


def _become(module: Any, mixin: type) -> None:
    """Change a module's class to a subclass that has the forward pass of `mixin`."""
    if not isinstance(module, mixin):
        module.__class__ = _with(mixin, module.__class__)


@functools.cache
def _with(mixin: Any, kind: Any) -> type:
    return type(f"Fused{kind.__name__}", (mixin, kind), {})


class _FusedNorm:
    """LayerNorm or RMSNorm that reads the float32 residual stream and returns bfloat16."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if trains(self):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        eps = self.eps if isinstance(self, nn.LayerNorm) else self.variance_epsilon
        y: torch.Tensor = _Norm.apply(x.contiguous(), self.weight, getattr(self, "bias", None), eps, torch.bfloat16)  # type: ignore[no-untyped-call]
        return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, precision: torch.dtype
    ) -> torch.Tensor:
        y: torch.Tensor
        y, means, scales = kernels().norm(x, weight, bias, eps, precision)
        ctx.save_for_backward(x, weight, means, scales)
        ctx.centred = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # weight and bias are frozen (`trains`), so x alone has a gradient
        to_x = kernels().norm_backward(gradients[0].contiguous(), *ctx.saved_tensors, ctx.centred)
        return to_x, None, None, None, None


class _GeluMlp:
    """GPT-2's MLP. If a layer of it is adapted, only the activation is fused; with dropout, transformers' code runs."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = self.c_fc, self.c_proj
        if self.training and self.dropout.p:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        if not (type(first) is type(second) is PackedConv1D and is_packed(first) and is_packed(second)):
            return second(_Gelu.apply(first(x)))  # type: ignore[no-untyped-call, no-any-return]
        y: torch.Tensor = _ProductsAroundGelu.apply(x, first.frozen_products, second.frozen_products)  # type: ignore[no-untyped-call]
        return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor
        # value and derivative in one pass over x; the backward pass is a product and needs no second tanh
        y, slope = kernels().gelu(x.contiguous())
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * ctx.saved_tensors[0]  # type: ignore[no-any-return]


class _ProductsAroundGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: PackedProducts, second: PackedProducts) -> torch.Tensor:
        inner, slope = kernels().product_gelu(x.reshape(-1, x.shape[-1]), first.forward_weight, first.bias, first.width)
        ctx.save_for_backward(slope)  # (M, F)
        ctx.first, ctx.second, ctx.shape = first, second, x.shape
        return second.outputs(inner).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backprops = gradients[0].reshape(-1, ctx.second.width)  # (M, D)
        to_inner = kernels().product_times(backprops, ctx.second.backward_weight, ctx.saved_tensors[0])  # (M, F)
        return ctx.first.to_inputs(to_inner).view(ctx.shape), None, None


class _GatedMlp:
    """Llama's MLP, down(silu(gate x) * up x), with gate and up as one product.

    If one of its layers is adapted, transformers' code is used.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(type(layer) is PackedLinear and is_packed(layer) for layer in layers):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        # packed at the first pass, because only then is it known which layers are adapted
        if (both := self.__dict__.get("_both")) is None:
            weight = torch.cat([self.gate_proj.weight, self.up_proj.weight]).t()  # (D, 2 F)
            biases = [layer.bias for layer in layers[:2] if layer.bias is not None]
            both = self.__dict__["_both"] = PackedProducts(weight, torch.cat(biases) if biases else None)
        y: torch.Tensor = _Gated.apply(x, both, self.down_proj.frozen_products)  # type: ignore[no-untyped-call]
        return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, both: PackedProducts, down: PackedProducts) -> torch.Tensor:
        gate_and_up = both.outputs(x.reshape(-1, x.shape[-1]))  # (M, 2 F)
        ctx.save_for_backward(gate_and_up)
        ctx.both, ctx.down, ctx.shape = both, down, x.shape
        return down.outputs(kernels().gated(gate_and_up)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_inner = ctx.down.to_inputs(gradients[0].reshape(-1, ctx.down.width))  # (M, F)
        return ctx.both.to_inputs(kernels().gated_backward(to_inner, *ctx.saved_tensors)).view(ctx.shape), None, None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return None for plain causal attention (no left padding, window, cache or other mask), else a mask for SDPA."""
    # a batch padded on the right has no mask (`Batch.model_inputs`), so almost every pass is plain
    plain = kwargs.get("attention_mask") is None and kwargs.get("allow_is_causal_skip", True)
    if plain and kwargs.get("local_size") is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _attention(
    module: Any,
    q: torch.Tensor,  # (B, H, T, E)
    k: torch.Tensor,  # k and v may have fewer heads than q
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention's output (B, T, H, E), and None for its weights, as transformers' interface requires."""
    # with a cache, as in generation, there are fewer queries than keys; the kernel needs equally many
    if attention_mask is not None or dropout or q.shape[2] != k.shape[2] or not module.is_causal:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attend.apply(q, k, v, scale, None, None), None  # type: ignore[no-untyped-call]


class _RotaryAttention:
    """Llama's attention, which rotates queries and keys by their positions.

    Plain causal attention is one kernel, which includes the rotation. With a mask, a cache, dropout, or positions that
    differ between rows, transformers' code is used.
    """

    def forward(
        self: Any,
        hidden_states: torch.Tensor,  # (B, T, D)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # cosines and sines, (1 or B, T, E)
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        cos, sin = position_embeddings
        drops = self.training and self.attention_dropout
        if attention_mask is not None or past_key_values is not None or drops or len(cos) > 1 or not self.is_causal:
            output: tuple[torch.Tensor, None] = super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return output
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)  # (B, T, H, E)
        q, k, v = (
            layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = _Attend.apply(q, k, v, self.scaling, cos[0].float(), sin[0].float())  # type: ignore[no-untyped-call]
        return self.o_proj(out.flatten(2)), None  # o_proj reads (B, T, H E)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        cos: torch.Tensor | None,  # (T, E) float32
        sin: torch.Tensor | None,
    ) -> torch.Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out: torch.Tensor
        out, log_sums = kernels().attend(q, k, v, scale, cos, sin)
        # as in FlashAttention, the backward pass recomputes the (T, T) probabilities from the log sums of their rows
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.turn = (scale, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to = kernels().attend_backward(gradients[0].contiguous(), *ctx.saved_tensors, *ctx.turn)
        return *to, None, None, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
