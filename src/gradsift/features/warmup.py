"""Warm-up training on a few random rows; gradient features are computed at its checkpoints (LESS, section 4).

The published code fixes the seed of the subset; here one seed determines the rows, their order and the initial
LoRA weights A. Every epoch is an artifact, from which the next epoch continues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig, WarmupConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import encoding_settings
from gradsift.errors import GradsiftError
from gradsift.proxy.epochs import EpochStart, ProxyInputs, adapter, train_epoch
from gradsift.runtime import Runtime, derive_seed
from gradsift.training.optimization import Optimization

VERSION = 3


def warm_up(
    runtime: Runtime,
    config: WarmupConfig,
    proxy_config: ProxyConfig,
    proxy: Artifact,
    loaded: Artifact,
    load: Callable[[], ProxyInputs],
) -> list[Artifact]:
    """Return a checkpoint (adapter and Adam's state) for each epoch; its `info` has the epoch's mean `learning_rate`.

    Args:
        load: called only if an epoch has to be trained.

    Raises:
        GradsiftError: there is no row to train on.
    """
    count = warmup_rows(config, int(loaded.info["rows"]))
    chain: list[Artifact] = []
    for epoch in range(1, config.epochs + 1):
        previous = chain[-1] if chain else None

        def make(folder: Path, epoch: int = epoch, previous: Artifact | None = previous) -> Mapping[str, Any]:
            return _train(runtime, folder, config, load(), int(loaded.info["rows"]), epoch, previous)

        settings = asdict(config) | {
            "lora": config.lora.settings,
            "share": None,
            "rows": count,
            "epochs": None if config.schedule == "constant" and not config.warmup_ratio else config.epochs,
            "epoch": epoch,
            "seed": runtime.seed if config.seed is None else config.seed,
            **encoding_settings(proxy_config.template, proxy_config.max_length),
            "tokens": runtime.compute.mask_batches if config.lora.dropout else None,
        }
        parents = [previous] if previous else [proxy, loaded]
        slug = f"{count}rows-e{epoch}"
        chain.append(
            runtime.store.obtain("warmup", slug, settings, parents, make, version=VERSION, size=count, divided=True)
        )
    return chain


def warmup_rows(config: WarmupConfig, rows: int) -> int:
    """Return the number of rows to train on: `config.rows` (at most `rows`) or, if None, `config.share` of `rows`.

    Raises:
        GradsiftError: there would be no row to train on.
    """
    count = min(config.rows, rows) if config.rows is not None else math.floor((config.share or 0) * rows + 1e-9)
    if count < 1:
        raise GradsiftError(
            f"features.warmup.share={config.share} of {rows:,} rows is not a single one; give a larger share, or "
            "features.warmup.rows=NUMBER"
        )
    return count


def draw_rows(config: WarmupConfig, rows: int, seed: int) -> np.ndarray:
    """Return the positions of the warm-up's rows in the pool, ascending."""
    rng = np.random.default_rng(derive_seed(seed, "warmup rows"))
    return np.sort(rng.permutation(rows)[: warmup_rows(config, rows)])


def _train(
    runtime: Runtime,
    folder: Path,
    config: WarmupConfig,
    inputs: ProxyInputs,
    rows: int,
    epoch: int,
    previous: Artifact | None,
) -> dict[str, Any]:
    from gradsift.training.finetuning import ShowProgress

    seed = runtime.seed if config.seed is None else config.seed
    drawn = set(draw_rows(config, rows, seed).tolist())
    inputs = inputs._replace(encoded=[example for example in inputs.encoded if example.row in drawn])
    if not inputs.encoded:
        raise GradsiftError(
            f"none of the {len(drawn):,} warm-up rows has a response token; raise features.warmup.share (or rows)"
        )
    lengths = [len(example.input_ids) for example in inputs.encoded]
    plan = epoch_batches(lengths, config.batch_size, "random", derive_seed(seed, "warmup order", epoch))
    total = len(plan) * config.epochs
    optimization = Optimization(config.learning_rate, 0.0, config.schedule, config.warmup_of(total), total_steps=total)
    first = len(plan) * (epoch - 1)
    start = EpochStart(first, derive_seed(seed, "warmup dropout", epoch), previous)
    label = f"warm-up, epoch {epoch}/{config.epochs}"
    with (
        adapter(inputs.backbone, config.lora, derive_seed(seed, "warmup lora"), runtime.compute) as adapted,
        runtime.display.task(label, len(inputs.encoded)) as advance,
    ):
        callbacks = [ShowProgress(advance)]
        info = train_epoch(adapted, inputs, optimization, plan, start, folder, runtime.compute, callbacks)
    return info | {"learning_rate": optimization.mean_rate(first, first + len(plan))}
