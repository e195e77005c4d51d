"""Keeps the residual stream in float32 between blocks that compute in bfloat16.

Every block adds small terms to the residual stream. In bfloat16 each sum is rounded to three digits, and the rounding
errors of all blocks add up in the output and in every gradient. These errors cause most of a gradient norm's error,
more than the rounding of the weights (experiments/2026-11-22-gradient-engine).

In most models, the layers of a block that read the stream are the normalisation layers before attention and before the
MLP. These normalisation layers read float32 and return bfloat16. In OLMo 2 and 3, attention and the MLP read the stream
themselves, and their inputs are converted to bfloat16. So all matrix products are in bfloat16 in both cases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# By model type, the names of the blocks, of the layers of a block that read the stream, and of the norm after the last
# block. Models that scale the stream or its terms (Granite, Cohere) are not listed. Gemma 3 scales only the embeddings.
_LLAMA = ("layers", ("input_layernorm", "post_attention_layernorm"), "norm")
_OLMO = ("layers", ("self_attn", "mlp"), "norm")
_STREAMS = {
    "gemma3_text": ("layers", ("input_layernorm", "pre_feedforward_layernorm"), "norm"),
    "gpt2": ("h", ("ln_1", "ln_2"), "ln_f"),
    "gpt_oss": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
}


def residual_in_float32(model: Any) -> None:
    """Make the residual stream of a bfloat16 model float32, in place, if the model's type is one of `_STREAMS`.

    The normalisation layers that read the stream become float32, but their outputs stay bfloat16.
    """
    if model.dtype == torch.float32 or not (readers := stream_readers(model)):
        return
    blocks = getattr(model.base_model, _STREAMS[model.config.model_type][0])
    blocks[0].register_forward_pre_hook(_widen)  # every later sum has a float32 term
    for reader in readers:
        if any(reader.children()):  # attention or MLP, and not a normalisation layer
            reader.register_forward_pre_hook(_narrow_inputs, with_kwargs=True)
        else:
            reader.float()
            reader.register_forward_hook(lambda norm, inputs, output: output.to(torch.bfloat16))


def stream_readers(model: Any) -> list[Any]:
    """Return the layers that read a model's residual stream; an empty list if its type is not in `_STREAMS`."""
    kind = model.config.model_type
    if kind not in _STREAMS or not type(model).__module__.startswith("transformers.models."):
        return []  # a model with code of its own may use model_type=llama for other blocks
    blocks, names, last = _STREAMS[kind]
    readers = [getattr(block, name) for block in getattr(model.base_model, blocks) for name in names]
    return [*readers, getattr(model.base_model, last)]


def residual_precision(model: nn.Module) -> str:
    """Return the precision of a model's residual stream: float32 or bfloat16."""
    widened = any(_widen in module._forward_pre_hooks.values() for module in model.modules())
    return "float32" if widened or next(model.parameters()).dtype == torch.float32 else "bfloat16"


def _widen(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].float(), *inputs[1:]


def _narrow_inputs(
    layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the layer's arguments with the residual stream converted to bfloat16.

    The stream is the first positional argument or the keyword argument `hidden_states`.
    """
    if inputs:
        return (inputs[0].to(torch.bfloat16), *inputs[1:]), options
    return inputs, options | {"hidden_states": options["hidden_states"].to(torch.bfloat16)}
