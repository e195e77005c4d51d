"""Gradient norms |g_i^(m,e)| of the ensemble: for each example i, member m and epoch e.

A unit of work is a pass over one shard of the examples at one member's weights.

Dropout is off, except with `proxy.ensemble=mc_dropout`. In that case all members have the weights of one adapter, and
each member's pass uses its own dropout masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, ProxyConfig
from gradsift.data.batching import by_length, shard_of, spread_out
from gradsift.data.tokens import Encoded
from gradsift.gradients.statistics import write_norms
from gradsift.journal import Journal
from gradsift.proxy.epochs import Ensemble, ProxyInputs, adapter
from gradsift.runtime import Advance, Runtime, derive_seed, weighed
from gradsift.training import lora, parallel
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.optimization import Optimization

VERSION = 2
Unit = tuple[int, int, Artifact]  # member, epoch, and the artifact with the member's weights after it


def ensemble_norms(ensemble: Ensemble, adapters: Sequence[Sequence[Artifact]], epoch: int) -> list[list[Artifact]]:
    """Return the artifacts with the norms at each member's weights after `epoch`, as [member][shard].

    Args:
        adapters: the adapters of the ensemble, as `train_adapters` returns them.
    """
    if ensemble.config.collect == "during_training":
        return [[chain[epoch - 1]] for chain in adapters]
    units, shards = _units(ensemble.config, adapters, epoch), range(ensemble.config.shards)
    return [[_collect(ensemble, unit, shard) for shard in shards] for unit in units]


def collect_shard(ensemble: Ensemble, adapters: Sequence[Sequence[Artifact]], shard: int) -> list[int]:
    """Collect the norms of one shard, for all members and both snapshots; return the shards that are not complete."""
    config, store = ensemble.config, ensemble.runtime.store
    units = [unit for epoch in config.snapshots for unit in _units(config, adapters, epoch)]
    for unit in units:
        _collect(ensemble, unit, shard)
    return [
        other
        for other in range(config.shards)
        if not all(store.has(**_identity(ensemble, unit, other)) for unit in units)
    ]


def _units(config: ProxyConfig, adapters: Sequence[Sequence[Artifact]], epoch: int) -> list[Unit]:
    weights = [chain[epoch - 1] for chain in adapters]
    if config.ensemble == "mc_dropout":  # all members have the weights of one adapter
        weights *= config.members
    return [(member, epoch, each) for member, each in enumerate(weights)]


def _collect(ensemble: Ensemble, unit: Unit, shard: int) -> Artifact:
    runtime, config, (member, epoch, weights) = ensemble.runtime, ensemble.config, unit
    # made here, because the norms do not depend on the number of members, and `make` must read only what they depend on
    label = f"norms of member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"
    label += f", shard {shard} of {config.shards}" if config.shards > 1 else ""

    def make(folder: Path) -> Mapping[str, Any]:
        return collect_rows(runtime, folder, config, ensemble.load(), unit, shard, label)

    # examples in a shard, rounded up; plans estimate the time from this number
    size = -(-(weights.size or 0) // config.shards)
    return runtime.store.obtain(**_identity(ensemble, unit, shard), make=make, size=size, divided=True)


def _identity(ensemble: Ensemble, unit: Unit, shard: int) -> dict[str, Any]:
    config, (member, epoch, weights) = ensemble.config, unit
    settings: dict[str, Any] = {"shard": shard, "shards": config.shards}
    if config.ensemble == "mc_dropout":
        # all members have the same parent (the weights), so without these entries they would share one fingerprint
        settings |= {"masks_of": member, "seed": ensemble.runtime.seed}
    slug = f"m{member}-e{epoch}" + (f"-s{shard}of{config.shards}" if config.shards > 1 else "")
    return {"stage": "norms", "slug": slug, "config": settings, "parents": [weights], "version": VERSION}


def collect_rows(
    runtime: Runtime, folder: Path, config: ProxyConfig, inputs: ProxyInputs, unit: Unit, shard: int, label: str
) -> dict[str, Any]:
    """Collect the norms of one shard and write them to `folder`.

    Args:
        label: name of the progress bar.

    Returns:
        The artifact's `info`.
    """
    member, epoch, weights = unit
    encoded = shard_of(inputs.encoded, shard, config.shards)
    masks = derive_seed(runtime.seed, "mc_dropout", member, epoch) if config.ensemble == "mc_dropout" else None
    with (
        # the seed 0 has no effect, because the member's weights replace the new adapter's
        adapter(inputs.backbone, config.lora, 0, runtime.compute) as adapted,
        runtime.display.task(label, len(encoded)) as advance,
    ):
        lora.load_adapter(adapted, weights.path)
        given = (adapted, encoded, inputs.budget, inputs.backbone.pad_id, runtime.compute, advance)
        columns = collect_norms(*given, masks=masks, journal=runtime.journal(folder))
    info = write_norms(folder, columns, encoded, len(inputs.encoded), shard, config.shards)
    return {**info, "size_A": weights.info["size_A"], "size_B": weights.info["size_B"]}


def collect_norms(
    adapted: Any,
    encoded: Sequence[Encoded],
    budget: TokenBudget,
    pad_id: int,
    compute: ComputeConfig,
    progress: Advance = lambda done: None,
    *,
    masks: int | None = None,
    journal: Journal | None = None,
) -> dict[str, np.ndarray]:
    """Return the norms and losses of all examples at fixed weights, on every rank.

    Args:
        progress: called with the number of examples just done, estimated from their tokens.
        masks: seed of the dropout masks; each example has its own masks. None turns dropout off.
        journal: keeps the norms of each batch, so that an interrupted pass can continue.

    Returns:
        norm_A, norm_B and loss, (N,) float32 each, in the order of `encoded`.
    """
    from lightning.pytorch.callbacks import LambdaCallback

    from gradsift.gradients.callback import GradientNormCallback
    from gradsift.training.finetuning import keyboard_interrupts, quiet_trainer
    from gradsift.training.modules import ProxyMember, Step

    def tokens(examples: Sequence[Encoded]) -> int:
        return sum(len(example.input_ids) for example in examples)

    mine = parallel.share(encoded)
    # these settings have no effect: `Trainer.validate` creates no optimiser
    module = ProxyMember(adapted, Optimization(0.0, 0.0, "constant", 0, 1), budget, pad_id)
    module.masks, module.journal = masks, journal
    advance = weighed(lambda done: progress(done * parallel.size()), len(mine), tokens(mine))
    bar = LambdaCallback(on_validation_batch_end=lambda *values: advance(tokens(values[3].examples)))
    norms = GradientNormCallback()
    groups: Any = spread_out(by_length(mine, budget.tokens))
    # if there are more ranks than examples, a rank without examples still takes part in the gathering below
    if groups:
        loader = DataLoader(groups, batch_size=None, collate_fn=Step)
        with keyboard_interrupts():
            quiet_trainer(compute, "auto", [norms, bar]).validate(module, loader, verbose=False)
    return norms.records.of_all_ranks(len(encoded), device_of(compute)).columns(encoded)
