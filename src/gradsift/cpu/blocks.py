"""The layers of a frozen bfloat16 model on a CPU: packed matrix products, and fused operations between them.

In every call, oneDNN copies a plain weight to its own memory layout, which takes a third of the matrix product's time.
`PackedProducts` therefore keeps two copies of a weight in this layout, one for the matrix product of the forward pass
and one for that of the backward pass. oneDNN also compiles new code for every new number of tokens in the input, so
this number is rounded up to a multiple of 32 (`kernels.cpp`).

transformers reads and writes whole tensors for every elementwise sum, product and cast, which takes half of the time of
a training step. Here a normalisation layer, an MLP activation or causal attention is computed in one pass over its
inputs (`kernels.cpp`), in float32. A layer that is trained or has an adapter uses transformers' code. Attention also
uses this code if it has a mask, a cache, dropout or positions that differ between rows.

Shape letters: M tokens of a batch, I inputs of a layer, O outputs, D width, F inner width of an MLP, B examples, H
heads, T tokens of an example, E width of a head, P places (tokens whose successor is predicted), V vocabulary.
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
from transformers.pytorch_utils import Conv1D

from gradsift.cpu.compiled import kernels
from gradsift.training.adapted import FrozenProducts, trains
from gradsift.training.device import become

ATTENTION = "gradsift_cpu"  # name of the fused attention in transformers' registry
LANES = 16  # numbers that a kernel processes at once; all widths must be multiples of this
BLOCK = 32  # numbers of rows are rounded up to a multiple of this, as oneDNN compiles a product for each number
_CHUNK_LOGITS = 2**24  # bfloat16 logits of a chunk, 32 MB; no result depends on it


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return y


class PackedProducts(FrozenProducts):
    """The matrix products of a layer, computed by oneDNN from packed copies of the layer's weight (I, O) bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.inputs, self.width = weight.shape
        # oneDNN takes a weight as (outputs, inputs); the backward pass is the same product with the two exchanged
        self.forward_weight = _pack(weight.detach().t())
        self.backward_weight = _pack(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedProducts:
        return self  # immutable

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = kernels().product(x, self.forward_weight, self.bias, self.width)
        return y

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        to_x: torch.Tensor = kernels().product(backprops, self.backward_weight, None, self.inputs)
        return to_x


class PackedLayer:
    """`nn.Linear` or `Conv1D` with packed weights."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.frozen_products(x) if _is_packed(self) else super().forward(x)  # type: ignore[misc, no-any-return]


def _is_packed(layer: Any) -> bool:
    """Return whether the layer uses packed weights; False if it is trained, has an adapter, or has a merged adapter."""
    return isinstance(layer, PackedLayer) and "frozen_products" in vars(layer) and not trains(layer)


class PackedHead:
    """Computes token losses with an output embedding (V, D) bfloat16 without bias, which is packed at first use.

    The weight gets an additional column of ones. Each hidden state gets an additional number, minus the offset of its
    logits (see `_less_rounded` in `gradsift.training.head`). The matrix product thus subtracts the offset from the
    logits before they are rounded to bfloat16.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._plain = weight.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedHead:
        return self  # immutable

    @functools.cached_property
    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The weights packed for the forward and for the backward pass, and V rounded up to a multiple of 64."""
        # AMX is twice as fast with a multiple of 64
        weight = nn.functional.pad(self._plain, (0, 0, 0, -len(self._plain) % 64))
        # a block of 32 columns, of which the ones need one, keeps the inner width a multiple of 32
        ones = weight.new_zeros(len(weight), BLOCK)
        ones[:, 0] = 1
        return _pack(torch.cat([weight, ones], 1)), _pack(weight.t()), len(weight)

    def chunk(self, count: int) -> int:
        """Return how many of `count` places get their logits at once, a multiple of BLOCK.

        The limit bounds the memory of the logits.
        """
        most = max(BLOCK, _CHUNK_LOGITS // self._weights[2] // BLOCK * BLOCK)
        each = -(-count // max(1, -(-count // most)))
        return max(BLOCK, -(-each // BLOCK) * BLOCK)

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        """Return the cross entropies (P,) float32 of the target tokens (P,) given the hidden states `hidden` (P, D).

        If `gradient` (P, D) is given, it is filled with the gradient of each loss with respect to its hidden state.
        """
        forward_weight, backward_weight, _ = self._weights
        count, width = hidden.shape
        own = (hidden.float() * self._plain[targets].float()).sum(1)  # (P,)
        # rounded before it is subtracted, so that own - offset is exactly the target's logit minus the offset
        offset = own.to(hidden.dtype)
        wider = hidden.new_zeros(count + -count % BLOCK, width + BLOCK)  # (P rounded up, D + 32)
        wider[:count, :width] = hidden
        wider[:count, width] = -offset
        logits = _product(wider, forward_weight)  # (P rounded up, padded V)
        losses: torch.Tensor = kernels().cross_entropy_(
            logits[:count], targets, own - offset.float(), len(self._plain), gradient is not None
        )
        if gradient is not None:
            # cross_entropy_ has written softmax minus one-hot to `logits`, and zeros to the padding of the vocabulary
            gradient.copy_(_product(logits, backward_weight)[:count])
        return losses


def fuse_blocks(model: nn.Module, head: nn.Module | None, norms: list[Any]) -> None:
    """Replace the forward methods of a frozen model's normalisation layers, MLPs and attention, and pack their weights.

    Args:
        head: the output embedding, whose weight is not packed here (see `PackedHead`); None if the model has none.
        norms: the normalisation layers that read the residual stream.
    """
    for norm in norms:
        become(norm, _FusedNorm)
    module: Any
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and module is not head:
            weight = module.weight if isinstance(module, Conv1D) else module.weight.t()
            module.frozen_products = PackedProducts(weight, module.bias)
            become(module, PackedLayer)
        elif isinstance(getattr(module, "act", None), GELUTanh):
            become(module, _GeluMlp)
        elif isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
            become(module, _GatedMlp)
        elif hasattr(module, "q_proj") and not (hasattr(module, "q_norm") or module.head_dim % (2 * LANES)):
            # Not for Qwen3, which normalises queries and keys before it rotates them. The kernel rotates numbers of a
            # head's two halves in pairs, so the width of a half must be a multiple of LANES.
            become(module, _RotaryAttention)


class _FusedNorm:
    """LayerNorm or RMSNorm that reads the float32 residual stream and returns bfloat16."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if trains(self):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        eps = self.eps if isinstance(self, nn.LayerNorm) else self.variance_epsilon
        y: torch.Tensor = _Norm.apply(x.contiguous(), self.weight, getattr(self, "bias", None), eps)  # type: ignore[no-untyped-call]
        return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        y: torch.Tensor
        y, means, scales = kernels().norm(x, weight, bias, eps, torch.bfloat16)
        ctx.save_for_backward(x, weight, means, scales)
        ctx.centred = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # weight and bias are frozen (`trains`), so x alone has a gradient
        to_x = kernels().norm_backward(gradients[0].contiguous(), *ctx.saved_tensors, ctx.centred)
        return to_x, None, None, None


class _GeluMlp:
    """GPT-2's MLP.

    If one of its layers has an adapter, only the activation is computed by a compiled kernel. With dropout in training,
    transformers' code is used.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = self.c_fc, self.c_proj
        if self.training and self.dropout.p:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        if not (_is_packed(first) and _is_packed(second)):
            return second(_Gelu.apply(first(x)))  # type: ignore[no-untyped-call, no-any-return]
        y: torch.Tensor = _ProductsAroundGelu.apply(x, first.frozen_products, second.frozen_products)  # type: ignore[no-untyped-call]
        return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor
        # value and derivative in one pass over x, so the backward pass is a product and needs no second tanh
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
    """Llama's MLP, down(silu(gate x) * up x).

    One matrix product computes both gate and up. If one of its layers has an adapter, transformers' code is used.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(map(_is_packed, layers)):
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
    """Return None if attention is plain and causal (no left padding, window, cache or other mask), else SDPA's mask."""
    # batches padded on the right have no mask (`Batch.model_inputs`), so almost every pass is plain
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
    """Return the attention's output (B, T, H, E), and None in place of attention weights, as transformers expects."""
    # with a cache, as in generation, there are fewer queries than keys; the kernel needs equally many
    if attention_mask is not None or dropout or q.shape[2] != k.shape[2] or not module.is_causal:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attend.apply(q, k, v, scale, None, None), None  # type: ignore[no-untyped-call]


class _RotaryAttention:
    """Llama's attention.

    If the attention is causal and has no mask, cache or dropout, and all rows have the same positions, one kernel
    applies the rotary embedding to queries and keys and computes the output.
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
