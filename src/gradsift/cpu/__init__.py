"""Compiled kernels for frozen bfloat16 models on a CPU: an optional package with one function, `accelerate`.

`accelerate` replaces the forward methods of a model's layers in place. The new methods compute the same functions but
read and write memory less often. Nothing else in gradsift depends on this package. With `compute.kernels=off`, without
a C++ compiler, or on a processor without bfloat16 matrix products, models run on torch's own kernels (docs/cpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradsift.cpu.blocks import ATTENTION, LANES, PackedHead, fuse_blocks
from gradsift.cpu.compiled import available, version
from gradsift.training.residual import residual_precision, stream_readers

_ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_SMALLEST = 256  # least width of a model that is changed; smaller models spend most of their time in Python
_TOKENS_FACTOR = 3  # see `tokens_factor` in `gradsift.training.device`


def accelerate(model: Any) -> bool:
    """Speed up a frozen causal language model of transformers, in place.

    GPT-2, Llama, Mistral, Qwen2 and Qwen3 are supported. The model must be in bfloat16 with a float32 residual stream
    and have a hidden size of at least 256, and its hidden size, MLP width and head width must be multiples of 16.
    Float32 models are not supported: at most a tenth of their run time could be saved, because most of this time goes
    into matrix products.

    A model on the meta device, which has no weights to pack, only gets the attributes that `gradsift.training.numerics`
    reads.

    Returns:
        True if the model is supported and the kernels are available. If False, the model is unchanged.
    """
    if not _is_supported(model) or not available():
        return False
    model.kernels_version = version()
    model.tokens_factor = _TOKENS_FACTOR
    model.set_attn_implementation(ATTENTION)
    # without weights to pack, such a model only serves to predict the numerics of a loaded model
    if model.device.type == "meta":
        return True
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        head.frozen_head = PackedHead(head.weight)
    fuse_blocks(model, head, stream_readers(model))
    return True


def _is_supported(model: Any) -> bool:
    if model.dtype != torch.bfloat16 or model.device.type not in ("cpu", "meta"):
        return False
    config = model.config
    known = stream_readers(model) and config.model_type in _ARCHITECTURES
    if not known or residual_precision(model) != "float32" or config.hidden_size < _SMALLEST:
        return False
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0
    if any(width % LANES for width in (config.hidden_size, head_width, inner_width)):
        return False
    # without AVX-512, oneDNN has no bfloat16 products
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
