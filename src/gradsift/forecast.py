"""Estimates the memory and time that finetuning a large target takes on GPUs (printed by `plan=true`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradsift.data.tokens import encode
from gradsift.line import Line
from gradsift.training import lora
from gradsift.training.backbones import config_of, load_tokenizer
from gradsift.training.device import adapted_names, token_bytes
from gradsift.training.parallel import layers_of

OPERATIONS = 1e14  # operations of a GPU per second; an assumption: a third of an A100's peak in bfloat16
LARGE = 10**9  # parameters; a smaller target has no forecast
_QUANTIZED = {"nf4": 9 / 16, "int8": 1}  # bytes per weight of a quantised layer, scales of blocks included
_SAMPLE = 256  # rows whose tokens are counted


def forecast(line: Line) -> dict[str, Any] | None:
    """Return a forecast of the memory and time of a run's finetunes, for `run.json`.

    The result is None if the target has fewer than `LARGE` parameters. The number of tokens per row is estimated from a
    sample of the pool.

    Raises:
        ConfigError: the target does not have the layers that `target.lora.targets` names.
    """
    from transformers import AutoModelForCausalLM

    config, compute = line.config.target, line.config.compute
    described = config_of(line.target, config.model)
    number = 4 if "float32" in (config.model.dtype, compute.precision) and config.model.dtype != "bfloat16" else 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=config.model.trust_remote_code)
    parameters = sum(each.numel() for each in model.parameters())
    if parameters < LARGE:
        return None
    parts = compute.ranks if compute.strategy == "fsdp" else 1
    quantization = config.model.quantization
    weights, active = held_weights(model, number, quantization, parts), active_parameters(model)
    adapted = lora.add_adapter(model.requires_grad_(False), config.lora, seed=0)
    trained = sum(each.numel() for each in lora.trainable_parameters(adapted).values())
    names = adapted_names(adapted)
    rows = [line.budget, *([line.rows] if line.config.reaches("judge") and not line.keeps_all else [])]
    sample = line.pool[:: max(1, len(line.pool) // _SAMPLE)]
    encoded, _ = encode(sample, load_tokenizer(line.target, config.model), config.template, config.max_length)
    length = sum(len(each.input_ids) for each in encoded) / max(1, len(encoded))
    passed = [config.steps * config.batch_size if config.steps else count * (config.epochs or 0) for count in rows]
    tokens = [round(count * length) for count in passed]
    each = operations(active, checkpointed=bool(compute.checkpointing))
    precision = {4: "float32", 2: "bfloat16"}[number]
    return {
        "target": config.name,
        "parameters": parameters,
        "active": active,  # parameters that a token passes through
        "precision": f"{precision} and {quantization}" if quantization in _QUANTIZED else precision,
        "ranks": parts,  # ranks over which the layers are divided
        "weights": weights,  # bytes of the frozen weights on one GPU
        "adapter": 16 * trained,  # bytes: LoRA factors, gradients and Adam's two moments in float32
        # bytes of activations for each token of a pass; None if unknown for this model type
        "per_token": token_bytes(described, number, names, checkpointed=False),
        "per_token_checkpointed": token_bytes(described, number, names, checkpointed=True),
        "rows": rows,  # of each finetune: on the selection, and on all rows for the reference
        "tokens": tokens,  # of each finetune
        "hours": [count * each / OPERATIONS / 3600 for count in tokens],  # GPU hours of each finetune
    }


def held_weights(model: Any, number: int, quantization: str, parts: int) -> int:
    """Return how many bytes the weights of a model take on one GPU.

    Args:
        number: bytes per weight that is not quantised.
        parts: number of ranks over which the layers are divided. Quantised weights are never divided.
    """
    total: int = sum(each.numel() for each in model.parameters())
    if quantization in _QUANTIZED:  # only linear layers are quantised, not experts, embeddings, norms and output head
        head = model.get_output_embeddings()
        linear = [each for each in model.modules() if type(each) in (nn.Linear, Conv1D) and each is not head]
        inside: int = sum(each.weight.numel() for each in linear)
        return number * (total - inside) + round(_QUANTIZED[quantization] * inside)
    if parts == 1:
        return number * total
    layers: list[int] = [sum(each.numel() for each in layer.parameters()) for layer in layers_of(model)]
    # at most two layers at a time are gathered whole for their computation
    return number * (total - sum(layers) + sum(layers) // parts + 2 * max(layers))


def operations(parameters: int, *, checkpointed: bool) -> int:
    """Return the number of arithmetic operations per token of a finetune.

    Each token passes through `parameters` weights. A matrix product takes two operations per weight (a multiplication
    and an addition) in the forward pass, and two more in the backward pass to its inputs. The weights are frozen, so no
    operations are counted for their gradients. Checkpointing repeats the forward pass.
    """
    return (6 if checkpointed else 4) * parameters


def active_parameters(model: Any) -> int:
    """Return the number of parameters that a token passes through.

    In a model with experts, the experts that the router does not choose for the token are not counted.
    """
    total: int = sum(each.numel() for each in model.parameters())
    chosen = getattr(model.config, "num_experts_per_tok", None)
    if chosen is None:
        return total
    experts = [each for block in lora.expert_blocks(model).values() for each in block.parameters() if each.dim() > 2]
    idle: int = sum(each.numel() - each.numel() // len(each) * min(chosen, len(each)) for each in experts)
    return total - idle
