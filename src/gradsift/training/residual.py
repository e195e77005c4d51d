"""A residual stream in float32 between blocks in bfloat16.

Every block adds a small term to the stream. In bfloat16 each sum is rounded to three digits, and the roundings of all
blocks add up in the output and in every gradient: this, and not the rounding of the weights, causes most of a gradient
norm's error (experiments/2026-11-22-gradient-engine). Only the normalisation layers read the stream, so a float32
stream leaves all products in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Models whose residual stream is read only by these norms: the names of the blocks, of a block's norms, and of the norm
# after the last block. Models that scale the stream or its terms (Gemma, Granite) are not supported.
_LLAMA = ("layers", ("input_layernorm", "post_attention_layernorm"), "norm")
_STREAMS = {
    "gpt2": ("h", ("ln_1", "ln_2"), "ln_f"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def residual_in_float32(model: Any) -> bool:
    """Keep the residual stream and the norms of a bfloat16 model in float32; the norms' outputs are bfloat16.

    A float32 model, and one whose blocks are not known here, stay as they are.

    Args:
        model: a causal language model of transformers, without adapters.

    Returns:
        Whether the stream is float32 now.
    """
    if model.dtype == torch.float32:
        return True
    if not (norms := stream_norms(model)):
        return False
    blocks = getattr(model.base_model, _STREAMS[model.config.model_type][0])
    blocks[0].register_forward_pre_hook(_widen)  # every later sum has a float32 term
    for norm in norms:
        norm.float()
        norm.register_forward_hook(_narrow)
    return True


def stream_norms(model: Any) -> list[Any]:
    """Return the norms that read a model's residual stream; none for a model whose blocks are not known here."""
    kind = model.config.model_type
    if kind not in _STREAMS or not type(model).__module__.startswith("transformers.models."):
        return []  # code from outside may call its own blocks llama
    blocks, names, last = _STREAMS[kind]
    norms = [getattr(block, name) for block in getattr(model.base_model, blocks) for name in names]
    return [*norms, getattr(model.base_model, last)]


def residual_precision(model: nn.Module) -> str:
    """Return the precision of a model's residual stream: float32 or bfloat16."""
    if next(model.parameters()).dtype == torch.float32:
        return "float32"
    widened = any(_widen in module._forward_pre_hooks.values() for module in model.modules())
    return "float32" if widened else "bfloat16"


def _widen(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].float(), *inputs[1:]


def _narrow(norm: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(torch.bfloat16)
