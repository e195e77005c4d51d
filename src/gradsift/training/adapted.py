"""Frozen linear layers, plain or in 4 or 8 bits, and a layer with its LoRA adapter as one autograd function.

    y = W x + b + s B A x,   s = alpha / rank

peft computes s B A x separately, in float32. This separate computation takes a cast, a scaling and an addition, and
each of these operations reads and writes a tensor as wide as the layer. Here the adapter's matrix product adds its
result directly to W x + b, in the precision of the activations, and the backward pass computes no gradient of W. A and
B stay float32 parameters, and the examples' gradients are summed in float32.

A batch may hold rows of several adapters (`gradsift.training.lora`). All rows pass through W together, and each row
passes through the A and B of its own adapter.

In 4 or 8 bits (QLoRA, Dettmers et al., 2023), weights take a quarter or half of the memory that they take in bfloat16.
transformers and bitsandbytes quantise the weights while a model is loaded. Each quantised layer is then replaced by a
`QuantizedLinear`, which dequantises its weight for each matrix product of the forward and the backward pass.
Activations are not quantised, so an example's gradient does not depend on the other examples of its batch. The formats
of the weights are:

    nf4     a weight is one of 16 quantiles of a normal distribution, scaled to [-1, 1], times the largest absolute
            value (float32) in its block of 64 weights
    int8    a weight is a whole number from -127 to 127, times a 127th of its row's largest absolute value

Shape letters: M adapters, B examples of a batch, T tokens, I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from gradsift.errors import ConfigError
from gradsift.gradients.probes import ADAPTER, GradientProbe, NormProbe, per_sample_parts
from gradsift.training.masks import PassedRows

# Forward passes that are W x + b and nothing else. Falcon's class has its own forward pass, which differs only in
# rounding.
_PLAIN = (nn.Linear.forward, Conv1D.forward)
_FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"


class FrozenProducts:
    """The two matrix products of a frozen linear layer: its outputs, and the gradient with respect to its inputs.

    This class computes them with torch, for `nn.Linear` and GPT-2's `Conv1D`; subclasses compute them in other ways.
    If a layer has the attribute `frozen_products`, the instance in this attribute is used. This instance may hold
    copies of the weight, so the attribute must be deleted before the weight changes.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W (I, O) for inputs of `dtype`."""
        weight: torch.Tensor = self._layer.weight
        return weight if isinstance(self._layer, Conv1D) else weight.t()

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W + b, (B T, O), for x (B T, I)."""
        weight, bias = self._weight(x.dtype), self._layer.bias
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        """Return the gradient with respect to x (B T, I); `backprops` (B T, O) is that with respect to the outputs."""
        return backprops @ self._weight(backprops.dtype).t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., O) for x (..., I); autograd can differentiate them with respect to x."""
        y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, products: FrozenProducts) -> torch.Tensor:
        ctx.products, ctx.shape = products, x.shape
        return products.outputs(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backprops = gradients[0].reshape(-1, gradients[0].shape[-1])
        return ctx.products.to_inputs(backprops).view(ctx.shape), None


def trains(layer: Any) -> bool:
    """Return whether a weight or bias of the layer itself, and not of a child such as an adapter, is trainable."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


class AdaptedLinear(Linear):  # type: ignore[misc]
    """peft's LoRA layer with the forward pass of `_Map`. Weight names and saved files are the same as in peft."""

    probe: NormProbe | GradientProbe | None = None  # set while norms or gradients are gathered
    lanes: tuple[PassedRows, Sequence[nn.Linear]] | None = None  # with several adapters: rows, all A, then all B
    path: str  # the layer's name in the model without adapters

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # peft's own forward pass, because s B A x must be left out or is already part of W
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base: Any = self.get_base_layer()
        dropout: Any = self.lora_dropout[ADAPTER]
        drops = isinstance(dropout, nn.Dropout) and dropout.training
        # without gradients there is no backward pass: a probe that recorded this pass would refuse the next one
        probe = self.probe if torch.is_grad_enabled() else None
        taken = (probe.of(self, x), probe.gather) if probe is not None else (None, None)
        rows, factors = None, [self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight]
        if self.lanes is not None and self.lanes[0].lanes is not None:
            rows, factors = self.lanes[0], [factor.weight for factor in self.lanes[1]]
        products = vars(base).get("frozen_products") or FrozenProducts(base)
        # autocast, which a trainer may have switched on, does not apply: `_Map` computes in the precision of W
        if torch.is_autocast_enabled(x.device.type) and base.weight.is_floating_point():
            x = x.to(base.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y: torch.Tensor = _Map.apply(  # type: ignore[no-untyped-call]
                x, dropout(x) if drops else None, products, self.scaling[ADAPTER], *taken, rows, *factors
            )
        return y.view(*x.shape[:-1], -1)  # Falcon changes y in place: forbidden for a view made in `_Map`

    def merge(self, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_layer()
        if not base.weight.is_floating_point():
            raise ConfigError(
                "an adapter cannot be merged into a quantised model; merge it into the model without model.quantization"
            )
        # packed copies (`gradsift.cpu.blocks`) would still hold the weight as it was before the merge
        for name in ("frozen_products", "frozen_head"):
            vars(base).pop(name, None)
        super().merge(*args, **kwargs)


def fuse(adapted: nn.Module) -> list[Any]:
    """Turn the plain adapted layers of a model into `AdaptedLinear`, in place, and return the changed layers.

    An adapted layer is plain if its base layer is plain (`is_plain`) and frozen, and if its only active adapter has
    peft's default name and adds s B A x, without a variant such as DoRA and without a bias.
    """
    changed: list[Any] = []
    module: Any
    for name, module in adapted.named_modules():
        # exactly peft's class, so that a layer fused earlier is not returned and `unfuse` does not change it
        if type(module) is not Linear or not is_plain(module.get_base_layer()):
            continue
        variants = module.lora_variant or module.lora_bias.get(ADAPTER) or trains(module.get_base_layer())
        if list(module.active_adapters) == [ADAPTER] and not variants:
            module.__class__ = AdaptedLinear
            module.path = layer_path(name)
            changed.append(module)
    return changed


def unfuse(layers: list[Any]) -> None:
    """Restore peft's forward pass in the layers that `fuse` returned."""
    for layer in layers:
        layer.__class__ = Linear
        del layer.path


def is_plain(layer: Any) -> bool:
    """Return whether a layer computes W x + b and nothing else, so that `_Map` may take its place.

    A subclass of `nn.Linear` with its own forward pass may compute something else (Llama 4's router does), and a layer
    with forward hooks may too.
    """
    kind = type(layer)
    if "frozen_products" in vars(layer):
        return True
    if kind.forward not in _PLAIN and f"{kind.__module__}.{kind.__qualname__}" != _FALCON:
        return False
    return not ("forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks)


def layer_path(name: str) -> str:
    """Return a module's name in the model without adapters, given its name in the model with adapters."""
    return name.removeprefix("base_model.model.")


class _Map(torch.autograd.Function):
    """Computes y = W x + b + s B A x, (B T, O), and its gradients with respect to x, A and B.

    In the backward pass, the "gradient" with respect to `probe` is not a gradient: it holds what `gather` returns for
    each example, such as the norms of the example's gradients (`gradsift.gradients.probes`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., I)
        dropped: torch.Tensor | None,  # (..., I), the adapter's inputs, where dropout is on
        layer: FrozenProducts,
        scale: float,
        probe: torch.Tensor | None,  # (2, B) or (B, P_l)
        gather: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None,  # `gather` of the probe
        rows: PassedRows | None,  # with several adapters
        *factors: torch.Tensor,  # A (R, I) and B (O, R), or M times A and M times B
    ) -> torch.Tensor:
        inputs = x.reshape(-1, x.shape[-1])  # (B T, I)
        y = layer.outputs(inputs)  # (B T, O)
        count = len(factors) // 2
        a, b = (_of_rows(each, rows, x.dtype) for each in (factors[:count], factors[count:]))  # (R, I), (O, R)
        seen = inputs if dropped is None else dropped.reshape(-1, x.shape[-1])  # (B T, I)
        inner = _product(seen, a.mT)  # (B T, R)
        # in place: a separate product would be one more (B T, O) tensor to write and to read
        _add_product(y, inner, b.mT, scale)
        ctx.save_for_backward(x if dropped is None else dropped, inner, a, b)
        ctx.layer, ctx.scale, ctx.has_dropout, ctx.gather = layer, scale, dropped is not None, gather
        ctx.counts, ctx.dtype = None if rows is None else rows.counts, factors[0].dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, inner, a, b = ctx.saved_tensors
        backprops = gradients[0].reshape(-1, b.shape[-2])  # (B T, O)
        inner_backprops = _product(backprops, b)  # (B T, R), without the scale
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            # d L / d x = D W^T + s (D B) A; W is frozen, so no gradient of it is formed
            to_x = ctx.layer.to_inputs(backprops)
            if not ctx.has_dropout:
                _add_product(to_x, inner_backprops, a, ctx.scale)
            to_x = to_x.view_as(seen)
        # With dropout W and A see different inputs: x gets W's part of the gradient, the dropped copy gets A's, and
        # autograd carries the latter back through the mask.
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            to_dropped = _product(inner_backprops, a).mul_(ctx.scale).view_as(seen)
        # two-dimensional inputs do not separate the examples; a probe refuses them, so only the sum is needed
        examples = len(seen) if seen.dim() == 3 else 1
        # grad_A L_i = s (D_i B)^T X_i and (grad_B L_i)^T = s (X_i A^T)^T D_i (`gradsift.gradients.probes`); the factor
        # s is applied below
        parts_a = per_sample_parts(inner_backprops, seen, examples)  # (B, R, I)
        parts_b = per_sample_parts(inner, backprops, examples)  # (B, R, O)
        gathered = None if ctx.gather is None else ctx.gather(parts_a, parts_b, ctx.scale)
        to_a, to_b = (
            # Summed over the examples in float32, the parameters' dtype, even if the activations are bfloat16. The rows
            # of an adapter are consecutive, so each of several adapters gets the sum over its own rows.
            [part.sum(0, dtype=ctx.dtype).mul_(ctx.scale) for part in parts.split(ctx.counts or [examples])]
            for parts in (parts_a, parts_b)
        )
        return to_x, to_dropped, None, None, gathered, None, None, *to_a, *(each.t() for each in to_b)


def _of_rows(factors: Sequence[torch.Tensor], rows: PassedRows | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the adapter's A (R, I) or B (O, R); with several adapters, the A or B of each row of the batch.

    With several adapters, the shape is (B, R, I) or (B, O, R).

    Args:
        factors: the A of each adapter, or the B of each adapter.
    """
    if rows is None or rows.lanes is None:
        return factors[0].to(dtype)
    return torch.stack([factor.to(dtype) for factor in factors]).index_select(0, rows.lanes)


def _product(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `x` (B T, K) times `factor`: one (K, N) matrix for all rows, or (B, K, N) with a matrix for each row."""
    if factor.dim() == 2:
        return x @ factor
    return torch.bmm(x.view(len(factor), -1, x.shape[-1]), factor).flatten(0, 1)


def _add_product(total: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, scale: float) -> None:
    """Add `scale` times the `_product` of `x` and `factor` to `total` (B T, N), in place."""
    if factor.dim() == 2:
        total.addmm_(x, factor, alpha=scale)
    else:
        shape = (len(factor), -1)
        total.view(*shape, total.shape[-1]).baddbmm_(x.view(*shape, x.shape[-1]), factor, alpha=scale)


def load_options(described: Any, quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantise a model's weights, or dequantise gpt-oss's mxfp4 weights.

    Args:
        described: transformers' config of the model.
        quantization: `nf4`, `int8` or `none`. With `none`, there are options only for mxfp4 weights.
        dtype: dtype of the activations.

    Raises:
        ConfigError: the weights in the model's files are quantised already.
    """
    from transformers import BitsAndBytesConfig, Mxfp4Config

    stored = dict(getattr(described, "quantization_config", None) or {}).get("quant_method")
    if quantization == "none":  # the kernels for mxfp4 have no backward pass
        return {"quantization_config": Mxfp4Config(dequantize=True)} if stored == "mxfp4" else {}
    if stored:
        raise ConfigError(
            f"model.quantization={quantization}: the weights in this model's files are quantised already ({stored}); "
            "leave it out, or give the original model"
        )
    if quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}


def make_plain(model: Any, quantization: str) -> None:
    """Replace each bitsandbytes layer of a model by a `QuantizedLinear`, right after the model is loaded."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            model.set_submodule(name, QuantizedLinear(layer, layer.weight.data, state.absmax, state.blocksize))
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            model.set_submodule(name, QuantizedLinear(layer, layer.weight.data, layer.weight.SCB / 127))
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if name in vars(model):  # with these, transformers would refuse to move the model
            delattr(model, name)
    del model.config.quantization_config
    model.quantization = quantization


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of O x I quantised weights, made from a layer of bitsandbytes.

    Args:
        layer: the layer of bitsandbytes, whose size and bias the new layer has too.
        weight: with nf4, (O I / 2, 1) uint8 with two weights in each byte; with int8, (O, I) int8.
        scale: float32 factors of the weights: (O I / block,) with nf4, one for each block of weights; (O,) with int8,
            one for each row.
        block: number of nf4 weights that share a scale; unused with int8.
    """

    scale: torch.Tensor

    def __init__(self, layer: nn.Linear, weight: torch.Tensor, scale: torch.Tensor, block: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale, persistent=False)
        self.block = block
        self.frozen_products = _RestoredProducts(self)

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantised weight (O, I) in `dtype`."""
        if self.weight.dtype == torch.int8:
            return (self.weight * self.scale[:, None]).to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.scale, shape=shape, dtype=dtype, blocksize=self.block, quant_type="nf4")
        weight: torch.Tensor = dequantize_4bit(self.weight, state)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen_products(x)


class _RestoredProducts(FrozenProducts):
    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self._layer.restored(dtype).t()  # type: ignore[no-any-return]
