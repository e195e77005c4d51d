"""Gradient norms at fixed weights: a pass over the examples after an epoch, whole or in shards of rows.

The unit of work is (member, epoch, shard). Weights are those of a member after an epoch, dropout off: the paper's
g_i^(m,e). A member of mc_dropout is such a pass over weights that all members share, under masks of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import shard_of
from gradsift.gradients.callback import collect_norms
from gradsift.gradients.norms_table import write_norms
from gradsift.proxy.epochs import ProxyInputs, adapter
from gradsift.runtime import Runtime, derive_seed
from gradsift.training import lora
from gradsift.training.device import device_of

VERSION = 2


def collect(
    runtime: Runtime,
    config: ProxyConfig,
    load: Callable[[], ProxyInputs],
    member: int,
    epoch: int,
    weights: Artifact,
    shard: int,
) -> Artifact:
    """The norms and losses of one shard's examples at `weights`, those of `member` after `epoch`.

    Args:
        load: called only if the shard has to be collected.
        shard: which of `config.shards`, from 0.
    """

    label = f"norms of member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"
    label += f", shard {shard} of {config.shards}" if config.shards > 1 else ""

    def make(folder: Path) -> Mapping[str, Any]:
        return collect_rows(runtime, folder, config, load(), member, epoch, weights, shard, label)

    size = -(-(weights.size or 0) // config.shards)
    return runtime.store.obtain(
        **_identity(runtime, config, member, epoch, weights, shard), make=make, size=size, divided=True
    )


def collect_rows(
    runtime: Runtime,
    folder: Path,
    config: ProxyConfig,
    inputs: ProxyInputs,
    member: int,
    epoch: int,
    weights: Artifact,
    shard: int,
    label: str = "norms",
) -> dict[str, Any]:
    """Take the norms of one shard at `weights` and write them."""
    encoded = shard_of(inputs.encoded, shard, config.shards)
    with (
        adapter(inputs.backbone, config.lora, 0, runtime.compute) as adapted,
        runtime.display.task(label, len(encoded)) as advance,
    ):
        lora.load_adapter(adapted, weights.path)
        masks = _mask_seed(runtime, config, member, epoch, shard) if config.ensemble == "mc_dropout" else None
        journal = runtime.journal(folder)
        pad_id, device = inputs.backbone.pad_id, device_of(runtime.compute)
        found = collect_norms(adapted, encoded, inputs.budget, pad_id, device, advance, masks=masks, journal=journal)
    info = write_norms(folder, found.columns(), encoded, shard, config.shards)
    return {**info, "all_rows": len(inputs.encoded), **{name: weights.info[name] for name in ("size_A", "size_B")}}


def is_collected(runtime: Runtime, config: ProxyConfig, member: int, epoch: int, weights: Artifact, shard: int) -> bool:
    """Whether the store holds what `collect` would make."""
    return runtime.store.has(**_identity(runtime, config, member, epoch, weights, shard))


def _identity(
    runtime: Runtime, config: ProxyConfig, member: int, epoch: int, weights: Artifact, shard: int
) -> dict[str, Any]:
    settings: dict[str, Any] = {"shard": shard, "shards": config.shards}
    if config.ensemble == "mc_dropout":  # the masks are drawn batch by batch
        settings |= {"masks_of": member, "seed": runtime.seed, "tokens": runtime.compute.mask_batches}
    slug = f"m{member}-e{epoch}" + (f"-s{shard}of{config.shards}" if config.shards > 1 else "")
    return {"stage": "norms", "slug": slug, "config": settings, "parents": [weights], "version": VERSION}


def _mask_seed(runtime: Runtime, config: ProxyConfig, member: int, epoch: int, shard: int) -> int:
    parts = (runtime.seed, "mc_dropout", member, epoch)
    return derive_seed(*parts) if config.shards == 1 else derive_seed(*parts, shard, config.shards)
