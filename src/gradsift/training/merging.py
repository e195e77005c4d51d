"""The target and its adapter as one model: for tools that know no adapters, and for answers in fewer operations."""

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
    """Write the merged model (safetensors, in `compute.precision`) and its tokenizer.

    A chat template of the user's own becomes the tokenizer's.

    Raises:
        ConfigError: the adapter is on a head that is the input embedding too.
    """
    model, tokenizer = load_plain(target, config.model, compute)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # refused where it matters
        adapted = peft.PeftModel.from_pretrained(model, tuned.file("adapter"))
    lora.require_mergeable(adapted)
    # under the names of the files; weights that were restored while they were loaded have none there
    original = not load_options(config_of(target, config.model), "none", model.dtype)
    adapted.merge_and_unload().save_pretrained(folder, safe_serialization=True, save_original_format=original)
    if is_file(config.template):
        tokenizer.chat_template = file_text(config.template)
    tokenizer.save_pretrained(folder)


def load_to_answer(runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None) -> Backbone:
    """Load what `load_tuned` loads, with the adapter merged into the weights if only rounding differs (`can_merge`).

    The weights belong to the caller alone: every stage loads its own.
    """
    loaded = load_tuned(runtime, config, target, tuned)
    model: Any = loaded.model
    return replace(loaded, model=model.merge_and_unload().eval()) if can_merge(model) else loaded


def can_merge(model: Any) -> bool:
    """Return whether the merged model computes the same, up to the rounding of float32, and can be made in place.

    In bfloat16, or with TF32 products, the sum of weight and adapter would be rounded to three digits, which loses a
    part of the adapter. Quantised and divided weights cannot be changed, and of experts or of a weight that two layers
    share, such as a head that is the embedding too, the sum would be another function.
    """
    if not isinstance(model, peft.PeftModel) or is_divided(model) or torch.get_float32_matmul_precision() != "highest":
        return False
    layers = [layer for _, layer in lora.lora_layers(model)]
    in_float32 = all(type(each) is AdaptedLinear and each.weight.dtype == torch.float32 for each in layers)
    return in_float32 and not lora.shared_layers(model)
