"""Frozen linear layers in 4 or 8 bits (QLoRA, Dettmers et al., 2023), with a quarter or half of bfloat16's memory.

transformers and bitsandbytes quantise the weights of a model while it is loaded. Then each layer becomes a
`QuantizedLinear`, which restores its weight for each product, in the forward and in the backward pass, and rounds no
activation:

    nf4     a weight is one of 16 quantiles of a normal distribution, scaled to [-1, 1], times the largest absolute
            value (float32) in its block of 64 weights
    int8    a weight is a whole number from -127 to 127, times a 127th of its row's largest absolute value

So a quantised layer is linear, an example's gradient does not depend on its batch, and adapters and gradient norms are
computed as with any frozen layer (`gradsift.training.adapted`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradsift.errors import ConfigError
from gradsift.training.frozen import product_of


def load_options(described: Any, quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options with which transformers quantises a model while loading, or restores gpt-oss's mxfp4 weights.

    The options are empty if the weights are neither to be quantised nor stored in mxfp4.

    Args:
        described: transformers' config of the model.

    Raises:
        ConfigError: the model is to be quantised, but its files hold quantised weights already.
    """
    from transformers import BitsAndBytesConfig, Mxfp4Config

    stored = dict(getattr(described, "quantization_config", None) or {}).get("quant_method")
    if quantization == "none":  # the kernels for mxfp4 have no backward pass
        return {"quantization_config": Mxfp4Config(dequantize=True)} if stored == "mxfp4" else {}
    if stored:
        raise ConfigError(
            f"model.quantization={quantization}: the files of this model hold weights that are quantised already "
            f"({stored}); leave it out, or give the original model"
        )
    if quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}


def make_plain(model: Any, quantization: str) -> None:
    """Replace each bitsandbytes layer of a model that was just loaded with a `QuantizedLinear`."""
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
    """A frozen linear layer of O x I quantised weights.

    Args:
        layer: the layer of bitsandbytes.
        weight: (O I / 2, 1) uint8 with two nf4 numbers in each byte, or (O, I) int8.
        scale: float32, one for each block (O I / block,) with nf4, one for each row (O,) with int8.
        block: number of nf4 weights that share a scale.
    """

    scale: torch.Tensor

    def __init__(self, layer: nn.Linear, weight: torch.Tensor, scale: torch.Tensor, block: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale, persistent=False)
        self.block = block
        self.frozen_products = _Products(self)

    def restored(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (O, I) in `dtype`."""
        if self.weight.dtype == torch.int8:
            return (self.weight * self.scale[:, None]).to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(self.scale, shape=shape, dtype=dtype, blocksize=self.block, quant_type="nf4")
        weight: torch.Tensor = dequantize_4bit(self.weight, state)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product_of(x, self.frozen_products)


class _Products:
    """`gradsift.training.frozen.FrozenProducts` of a quantised layer."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._layer.restored(x.dtype), self._layer.bias)

    def to_inputs(self, backprops: torch.Tensor) -> torch.Tensor:
        return backprops @ self._layer.restored(backprops.dtype)


def quantized_share(model: nn.Module) -> float:
    """Return the share of a model's weights that is quantised; experts, embeddings and the output head are not."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    inside = sum(layer.in_features * layer.out_features for layer in layers)
    outside = sum(weight.numel() for weight in model.parameters()) - sum(layer.weight.numel() for layer in layers)
    return inside / (inside + outside)
