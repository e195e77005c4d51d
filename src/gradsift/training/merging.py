"""Merging of the target's adapter into its weights, for tools that load no adapters, and to generate answers faster."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, TargetConfig
from gradsift.data.chat_templates import file_text, is_file
from gradsift.runtime import Runtime
from gradsift.training import lora
from gradsift.training.adapted import AdaptedLinear
from gradsift.training.backbones import Backbone, config_of, load_plain
from gradsift.training.divided import is_divided
from gradsift.training.quantized import load_options
from gradsift.training.target import load_tuned


def write_merged(target: Artifact, tuned: Artifact, config: TargetConfig, compute: ComputeConfig, folder: Path) -> None:
    """Write the merged model (safetensors, in the precision of `numerics.dtype_of`) and its tokenizer.

    If `config.template` is a file of a chat template, the tokenizer gets this template.

    Raises:
        ConfigError: the adapter is on a weight that two modules share, such as a head that is also the embedding.
    """
    model, tokenizer = load_plain(target, config.model, compute)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # see `require_mergeable`
        adapted = peft.PeftModel.from_pretrained(model, tuned.file("adapter"))
    lora.require_mergeable(adapted)
    # weights are saved under their names in the original files, unless they were dequantised while loading
    original = not load_options(config_of(target, config.model), "none", model.dtype)
    adapted.merge_and_unload().save_pretrained(folder, safe_serialization=True, save_original_format=original)
    if is_file(config.template):
        tokenizer.chat_template = file_text(config.template)
    tokenizer.save_pretrained(folder)


def load_to_answer(runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None) -> Backbone:
    """Load the target as `load_tuned` does, and merge the adapter into the weights if `can_merge`.

    The merge changes the weights in place. No other stage is affected, because every stage loads the weights again.
    """
    loaded = load_tuned(runtime, config, target, tuned)
    model: Any = loaded.model
    return replace(loaded, model=model.merge_and_unload().eval()) if can_merge(model) else loaded


def can_merge(model: Any) -> bool:
    """Return whether a model's adapter can be merged in place so that results change only by float32 rounding.

    In bfloat16, or with TF32 products, the sum of weight and adapter would be rounded to three digits, which loses a
    part of the adapter. Quantised and divided weights cannot be changed. If the adapter is on experts, or on a weight
    that two layers share (such as a head that is also the embedding), the merged model would compute another function.
    """
    if not isinstance(model, peft.PeftModel) or is_divided(model) or torch.get_float32_matmul_precision() != "highest":
        return False
    layers = [layer for _, layer in lora.lora_layers(model)]
    in_float32 = all(type(each) is AdaptedLinear and each.weight.dtype == torch.float32 for each in layers)
    return in_float32 and not lora.shared_layers(model)
