"""The target and its adapter as one model, for tools that know no adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, TargetConfig
from gradsift.data.chat_templates import file_text, is_chat
from gradsift.training import lora
from gradsift.training.backbones import load_plain


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
    adapted.merge_and_unload().save_pretrained(folder, safe_serialization=True)
    if is_chat(config.template) and config.template != "chat":
        tokenizer.chat_template = file_text(config.template)
    tokenizer.save_pretrained(folder)
