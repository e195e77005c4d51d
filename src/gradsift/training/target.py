"""The finetune stage, which trains the target with LoRA on the selected examples.

The module also loads the target, with or without its adapter, and merges the adapter into the weights.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from gradsift.artifacts import Artifact, NotMade
from gradsift.config import ComputeConfig, TargetConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.chat_templates import file_text, is_file
from gradsift.data.examples import Example, write_rejected
from gradsift.data.tokens import REFUSED_FILE, EncodeReport, encode, encoding_settings, say_refused
from gradsift.errors import GradsiftError
from gradsift.runtime import Runtime, derive_seed
from gradsift.training import lora
from gradsift.training.adapted import AdaptedLinear, load_options
from gradsift.training.backbones import Backbone, config_of, load_plain, load_shown
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.optimization import Optimization, write_curve
from gradsift.training.parallel import divides, is_divided
from gradsift.training.probing import require_adaptable

VERSION = 4


def finetune(
    runtime: Runtime,
    config: TargetConfig,
    target: Artifact,
    loaded: Artifact,
    pool: Sequence[Example],
    positions: Callable[[], np.ndarray],
    rows: int,
) -> Artifact:
    """Return the artifact of the target finetuned on the selected examples.

    The order in which the examples were selected has no influence on the result.

    Args:
        pool: all examples to select from.
        positions: function that returns the positions of the selected examples in the pool. In a plan, it raises
            `NotMade` if the selection does not exist yet.
        rows: number of examples that a plan expects to be selected; unused if the selection exists.
    """
    settings: dict[str, Any] = asdict(config) | {
        **encoding_settings(config.template, config.max_length),
        "lora": config.lora.settings,
        "name": None,
        "model": None,  # the parent artifact represents the model
        "seed": runtime.seed,
        "tokens": runtime.compute.mask_batches if config.lora.dropout else None,
    }
    chosen: list[Example] = []
    try:
        # in the order of the pool, so that an example's rank in the selection does not enter the fingerprint
        chosen = [pool[position] for position in sorted(int(p) for p in positions())]
    except NotMade as missing:
        settings["examples"], exact = str(missing), False  # the message names the selection
    else:
        rows, exact = len(chosen), True
        settings["examples"] = hashlib.sha256("\n".join(each.example_id for each in chosen).encode()).hexdigest()

    def make(folder: Path) -> Mapping[str, Any]:
        return train_target(runtime, config, load_target(runtime, config, target), chosen, folder)

    passed_over = rows * config.epochs if config.epochs else (config.steps or 0) * min(config.batch_size, rows)
    unit = ("finetune", f"{config.name}-{rows}rows", settings, [target, loaded], make)
    return runtime.store.obtain(*unit, version=VERSION, size=passed_over, exact=exact, divided=True)


def planned_steps(config: TargetConfig, rows: int) -> int:
    """Return the number of optimiser steps of a finetune on `rows` examples."""
    return config.steps if config.steps is not None else (config.epochs or 0) * math.ceil(rows / config.batch_size)


def batch_plan(lengths: Sequence[int], config: TargetConfig, seed: int) -> list[list[int]]:
    """Return the batch of each optimiser step, as a list of positions in `lengths`.

    The number of steps is `config.steps` or, if that is None, as many as `config.epochs` epochs have.

    Args:
        lengths: number of tokens of each example.
    """
    if not len(lengths):
        raise GradsiftError("there is no example to finetune on")
    plan: list[list[int]] = []
    epoch = 0
    while epoch != config.epochs and (config.steps is None or len(plan) < config.steps):
        epoch += 1
        plan += epoch_batches(lengths, config.batch_size, config.batching, derive_seed(seed, "target order", epoch))
    return plan[: config.steps]


def train_target(
    runtime: Runtime, config: TargetConfig, backbone: Backbone, chosen: Sequence[Example], folder: Path
) -> dict[str, Any]:
    """Finetune the target on the examples `chosen`, and return the numbers of steps, rows, refused rows and tokens.

    The folder `adapter` (in peft's format), the training curve and the refused rows are written to `folder`.
    """
    from gradsift.training.finetuning import ShowProgress, fit, step_counts
    from gradsift.training.modules import TargetFinetuning

    limit = min(config.max_length, backbone.context)
    with runtime.display.task("tokenise for the target", len(chosen)) as advance:
        encoded, report = encode(chosen, backbone.tokenizer, config.template, limit, advance)
    backbone.require_embedded(encoded)
    say_report(runtime, report, len(chosen), "target")
    write_rejected(folder / REFUSED_FILE, list(report.refused.values()))
    if not encoded:
        raise GradsiftError(
            "no selected example has a response token with the target's tokenizer; look at the selection"
        )
    plan = batch_plan([len(example.input_ids) for example in encoded], config, runtime.seed)
    optimization = Optimization(
        config.learning_rate,
        config.weight_decay,
        config.schedule,
        config.warmup_of(len(plan)),
        total_steps=len(plan),
        loss=config.loss,
        max_grad_norm=config.max_grad_norm,
    )
    require_adaptable(backbone.model, config.lora, "target.lora", norms=False)
    if remark := lora.left_out(backbone.model, config.lora, "target.lora"):
        runtime.display.say(f"  {remark}")
    adapted = lora.add_adapter(backbone.model, config.lora, derive_seed(runtime.seed, "target lora"))
    adapted.to(device_of(runtime.compute))
    budget = TokenBudget.of(backbone.model, runtime.compute.tokens, runtime.display.say)
    dropout_seed = derive_seed(runtime.seed, "target dropout")
    module = TargetFinetuning(adapted, optimization, budget, backbone.pad_id, dropout_seed=dropout_seed)
    with runtime.display.task(f"finetune {config.name} on {len(chosen):,} rows", sum(map(len, plan))) as advance:
        bar = ShowProgress(advance)
        steps = fit(module, encoded, plan, compute=runtime.compute, callbacks=[bar], folder=folder)
    lora.save_adapter(adapted, folder / "adapter")
    write_curve(folder, module.curve)
    counts = {"rows": len(encoded), "refused": len(report.refused)}
    return {**step_counts(module, steps), **counts, "tokens": sum(int(e["tokens"]) for e in module.curve)}


def say_report(runtime: Runtime, report: EncodeReport, rows: int, group: str, what: str = "rows") -> None:
    """Print how many rows, if any, were cut or left out when they were tokenised.

    Args:
        rows: number of rows before any were left out.
        group: the model whose tokenizer was used, `proxy` or `target`.
        what: the word for the rows in the messages.
    """
    if report.truncated_prompts or report.truncated_responses:
        runtime.display.say(
            f"  of {rows:,} {what} {report.truncated_prompts:,} prompts and {report.truncated_responses:,} responses "
            f"were cut to {group}.max_length"
        )
    if report.rows_without_response:
        runtime.display.say(
            f"  {len(report.rows_without_response):,} of {rows:,} {what} have no response token with the {group}'s "
            "tokenizer and are left out"
        )
    say_refused(runtime, report.refused.values(), rows, group, what)


def load_target(runtime: Runtime, config: TargetConfig, target: Artifact) -> Backbone:
    """Load the target. With compute=fsdp, its layers are divided over the ranks if all ranks work on the stage."""
    return load_shown(runtime, target, config.model, divided=divides(runtime.compute))


def load_tuned(runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None) -> Backbone:
    """Return the target on its device, with the adapter of `tuned`, or without an adapter if `tuned` is None."""
    backbone = load_target(runtime, config, target)
    model: Any = backbone.model
    if tuned is not None:
        # the seed has no effect: the loaded weights replace the drawn ones
        model = lora.add_adapter(model, config.lora, seed=0)
        lora.load_adapter(model, tuned.file("adapter"))
    return Backbone(model.to(device_of(runtime.compute)).eval(), backbone.tokenizer)


def write_merged(target: Artifact, tuned: Artifact, config: TargetConfig, compute: ComputeConfig, folder: Path) -> None:
    """Write the target with the adapter of `tuned` merged into it (safetensors, dtype: `dtype_of`), and its tokenizer.

    If `config.template` is a file, the content of the file becomes the tokenizer's chat template.
    """
    model, tokenizer = load_plain(target, config.model, compute)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # see `require_mergeable`
        adapted = peft.PeftModel.from_pretrained(model, tuned.file("adapter"))
    lora.require_mergeable(adapted)
    # weights keep their names in the original files, unless they were dequantised while loading
    original = not load_options(config_of(target, config.model), "none", model.dtype)
    adapted.merge_and_unload().save_pretrained(folder, safe_serialization=True, save_original_format=original)
    if is_file(config.template):
        tokenizer.chat_template = file_text(config.template)
    tokenizer.save_pretrained(folder)


def load_to_answer(runtime: Runtime, config: TargetConfig, target: Artifact, tuned: Artifact | None) -> Backbone:
    """Load the target as `load_tuned` does, and merge the adapter into the weights, in place, if `can_merge`."""
    loaded = load_tuned(runtime, config, target, tuned)
    model: Any = loaded.model
    return replace(loaded, model=model.merge_and_unload().eval()) if can_merge(model) else loaded


def can_merge(model: Any) -> bool:
    """Return whether a model has an adapter whose merging, in place, changes results by float32 rounding only.

    In bfloat16 or with TF32 matrix products, the sum of weight and adapter would be rounded to three digits, which
    loses a part of the adapter. Quantised and divided weights cannot be changed. If the adapter is on
    the experts of a mixture-of-experts model, or on a weight that two layers share (such as a head that is also the
    embedding), the merged model would compute another function.
    """
    if not isinstance(model, peft.PeftModel) or is_divided(model) or torch.get_float32_matmul_precision() != "highest":
        return False
    layers = [layer for _, layer in lora.lora_layers(model)]
    in_float32 = all(type(each) is AdaptedLinear and each.weight.dtype == torch.float32 for each in layers)
    return in_float32 and not lora.shared_layers(model)
