"""What finetunes of a large target will take on GPUs, by arithmetic, for `plan=true`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradsift.config import ComputeConfig
from gradsift.data.tokens import encode
from gradsift.line import Line
from gradsift.training import lora
from gradsift.training.backbones import config_of, load_description
from gradsift.training.divided import layers_of
from gradsift.training.memory import adapted_names, token_bytes

OPERATIONS = 1e14  # per second and GPU, of the forecast: an assumption, a third of an A100's peak in bfloat16
LARGE = 10**9  # parameters of the targets that have a forecast
_QUANTIZED = {"nf4": 9 / 16, "int8": 1}  # bytes of a number in a layer, with its scale
_SAMPLE = 256  # rows whose tokens are counted


@dataclass(frozen=True)
class Forecast:
    """The memory of one GPU in bytes, and GPU hours."""

    target: str
    parameters: int
    precision: str
    ranks: int  # that the layers are divided over
    weights: int  # frozen, with two layers gathered whole where they are divided
    adapter: int  # with its gradients and the optimizer's state
    per_token: int | None  # kept for each token that passes at once; None: not known for this kind of model
    per_token_checkpointed: int | None
    rows: Sequence[int]  # of each finetune: on the selection, and on all rows for the reference
    tokens: Sequence[int]  # that pass in each finetune
    hours: Sequence[float]  # that each finetune takes on one GPU


def forecast(line: Line) -> Forecast | None:
    """Return what the finetunes of a run will take; None for a target that is not large.

    The tokens of the rows are estimated from a sample of the pool.

    Raises:
        ConfigError: the adapter's layers are not among the target's.
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
    parts, quantized = _parts(compute), config.model.quantization in _QUANTIZED
    layers = (
        [sum(each.numel() for each in layer.parameters()) for layer in layers_of(model)]
        if parts > 1 or quantized
        else []
    )
    inside: int = sum(layers)
    weights = number * (parameters - inside)
    weights += round(_QUANTIZED.get(config.model.quantization, number) * (inside // parts))
    weights += 2 * number * max(layers) if parts > 1 else 0  # two layers are whole while they are passed through
    adapted = lora.add_adapter(model.requires_grad_(False), config.lora, seed=0)
    trained = sum(each.numel() for each in lora.trainable_parameters(adapted).values())
    names = adapted_names(adapted)
    rows = [line.budget, *([line.rows] if line.config.reaches("judge") and not line.keeps_all else [])]
    sample = line.pool[:: max(1, len(line.pool) // _SAMPLE)]
    encoded, _ = encode(sample, load_description(line.target, config.model)[0], config.template, config.max_length)
    length = sum(len(each.input_ids) for each in encoded) / max(1, len(encoded))
    passed = [
        (config.steps or 0) * config.batch_size if config.steps else count * (config.epochs or 0) for count in rows
    ]
    tokens = [round(count * length) for count in passed]
    # forward, and backward to the inputs alone; with checkpointing forward once more
    operations = (6 if compute.checkpointing else 4) * parameters
    return Forecast(
        target=config.name,
        parameters=parameters,
        precision=" and ".join(
            [{4: "float32", 2: "bfloat16"}[number], *([config.model.quantization] if quantized else [])]
        ),
        ranks=parts,
        weights=weights,
        adapter=16 * trained,  # float32: the factors, their gradients and two moments
        per_token=token_bytes(described, number, names, checkpointed=False),
        per_token_checkpointed=token_bytes(described, number, names, checkpointed=True),
        rows=rows,
        tokens=tokens,
        hours=[count * operations / OPERATIONS / 3600 for count in tokens],
    )


def _parts(compute: ComputeConfig) -> int:
    return compute.ranks if compute.strategy == "fsdp" else 1
