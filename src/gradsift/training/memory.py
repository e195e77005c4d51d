"""The memory that a LoRA training takes on one GPU, computed instead of measured.

`tests/test_memory.py` compares it with what autograd keeps.

The forward pass keeps the tensors that the backward pass reads. In a frozen block these are the residual stream before
each normalisation layer, the queries, keys, values and outputs of attention (a fused kernel keeps no attention scores),
three tensors of the MLP (GPT-2: one), and the inputs of the layers that have an adapter. With activation checkpointing
only the residual stream before each block is kept, and the other tensors for one block at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_GATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model types whose kept activations are known, besides gpt2
_STREAM = 4  # bytes of a number in the residual stream, which is float32 (`gradsift.training.residual`)
# If a layer has an adapter, its inputs are kept: the hidden states before attention or before the MLP, or
# the MLP's inner activations. (GPT-2's attention has a c_proj too, but the outputs of attention are kept in any case.)
_READ_IN_ATTENTION = {"q_proj", "k_proj", "v_proj", "c_attn"}
_READ_IN_MLP = {"gate_proj", "up_proj", "c_fc"}
_READ_WIDE = {"down_proj", "c_proj"}
_SHARE = 0.8  # share of a GPU's memory to use; the rest is for chunks of logits and gradients, buffers and fragments
_ROOM = 4096  # tokens at once that keep a GPU busy: if fewer fit, recomputing activations costs less time than it saves


def token_bytes(config: Any, number: int, adapted: Collection[str], *, checkpointed: bool) -> int | None:
    """Return the number of bytes that a training keeps for each token; None for a model type that is not known here.

    Args:
        config: transformers' config of the model.
        number: bytes of a number in the model's products: 2 in bfloat16, 4 in float32.
        adapted: last parts of the names of the layers with an adapter.
    """
    block = _block_bytes(config, number, adapted)
    if block is None or not checkpointed:
        return None if block is None else int(config.num_hidden_layers) * block
    return int(config.num_hidden_layers) * _STREAM * int(config.hidden_size) + block


def _block_bytes(config: Any, number: int, adapted: Collection[str]) -> int | None:
    kind = str(config.model_type)
    if kind not in (*_GATED, "gpt2"):
        return None
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)  # other models may lack these
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    queries, keys = heads * size, int(getattr(config, "num_key_value_heads", None) or heads) * size
    mlp = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden)
    read = {*adapted}
    inputs = hidden * (bool(read & _READ_IN_ATTENTION) + bool(read & _READ_IN_MLP)) + mlp * bool(read & _READ_WIDE)
    attention, of_mlp = 2 * queries + 2 * keys, mlp if kind == "gpt2" else 3 * mlp
    norms = 2 * hidden + (queries + keys if kind == "qwen3" else 0)  # float32, whatever the products are
    return _STREAM * norms + number * (inputs + attention + of_mlp)


def adapted_names(model: Any) -> set[str]:
    """Return the last parts of the names of the layers that have an adapter."""
    names = (name.split(".lora_")[0] for name, each in model.named_parameters() if each.requires_grad)
    return {name.rsplit(".", 1)[-1] for name in names}


def fitting_tokens(model: Any, memory: int, *, checkpointed: bool) -> int | None:
    """Return how many tokens can pass through the model at once when it is trained on a GPU with `memory` bytes.

    Args:
        model: a causal language model. If it has no adapter yet, adapters on all layers are assumed, but their own
            size, which is not known, is not counted.

    Returns:
        The number, negative if the weights alone do not fit; None for a model type that is not known here.
    """
    adapted = adapted_names(model) or _READ_IN_ATTENTION | _READ_IN_MLP | _READ_WIDE
    each = token_bytes(model.config, next(model.parameters()).element_size(), adapted, checkpointed=checkpointed)
    if each is None:
        return None
    held = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a rank's part
        # a trainable number has a gradient and two moments of Adam
        held += local.numel() * (4 * local.element_size() if parameter.requires_grad else local.element_size())
    return int((_SHARE * memory - held) / each)


def needs_checkpointing(model: Any, memory: int) -> bool:
    """Return whether fewer than 4,096 tokens fit into `memory` bytes without checkpointing.

    For a model type that is not known here, the answer is False.
    """
    tokens = fitting_tokens(model, memory, checkpointed=False)
    return tokens is not None and tokens < _ROOM
