"""Gradient norms at fixed weights: a pass over all examples, or a shard of them, after an epoch.

The unit of work is (member, epoch, shard). The pass uses the member's weights after the epoch, with dropout off, so it
measures the paper's g_i^(m,e). With `proxy.ensemble=mc_dropout`, the members share the weights of one adapter, and the
pass of each member has dropout masks of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, ProxyConfig
from gradsift.data.batching import by_length, shard_of, spread_out
from gradsift.data.tokens import Encoded
from gradsift.gradients.norms_table import write_norms
from gradsift.journal import Journal
from gradsift.proxy.epochs import ProxyInputs, adapter
from gradsift.runtime import Advance, Runtime, derive_seed, weighed
from gradsift.training import lora, parallel
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.optimization import Optimization

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
    """Return the artifact with the norms and losses of one shard's examples.

    Args:
        load: called only if the shard has to be collected.
        weights: the artifact with the weights of `member` after `epoch`, at which the norms are taken.
        shard: number of the shard, from 0 to `config.shards` - 1.
    """
    label = f"norms of member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"
    label += f", shard {shard} of {config.shards}" if config.shards > 1 else ""

    def make(folder: Path) -> Mapping[str, Any]:
        return collect_rows(runtime, folder, config, load(), member, epoch, weights, shard, label)

    identity = _identity(runtime, config, member, epoch, weights, shard)
    # examples in a shard, rounded up; plans estimate the time from this
    size = -(-(weights.size or 0) // config.shards)
    return runtime.store.obtain(**identity, make=make, size=size, divided=True)


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
    """Collect the norms of one shard at `weights`, write them to `folder`, and return the artifact's `info`."""
    encoded = shard_of(inputs.encoded, shard, config.shards)
    masks = None
    if config.ensemble == "mc_dropout":
        masks = _mask_seed(runtime, member, epoch)
    with (
        # the seed 0 has no effect, because the member's weights replace the new adapter's
        adapter(inputs.backbone, config.lora, 0, runtime.compute) as adapted,
        runtime.display.task(label, len(encoded)) as advance,
    ):
        lora.load_adapter(adapted, weights.path)
        pass_over = (adapted, encoded, inputs.budget, inputs.backbone.pad_id, runtime.compute, advance)
        columns = collect_norms(*pass_over, masks=masks, journal=runtime.journal(folder))
    info = write_norms(folder, columns, encoded, shard, config.shards)
    return {**info, "all_rows": len(inputs.encoded), **{name: weights.info[name] for name in ("size_A", "size_B")}}


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
    """Return the norms and losses of all examples at fixed weights; the model is left as it was.

    The examples are divided over the ranks, and the results are gathered on every rank.

    Args:
        progress: called with the number of examples just done, estimated from their tokens.
        masks: seed of dropout masks. With a seed, the adapter's dropout stays on, and each example's gradient is taken
            under masks of its own; None turns dropout off.
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
    # the optimiser is never made: `Trainer.validate` takes no step
    module = ProxyMember(adapted, Optimization(0.0, 0.0, "constant", 0, 1), budget, pad_id)
    module.masks, module.journal = masks, journal
    advance = weighed(lambda done: progress(done * parallel.size()), len(mine), tokens(mine))
    bar = LambdaCallback(on_validation_batch_end=lambda *values: advance(tokens(values[3].examples)))
    norms = GradientNormCallback()
    groups: Any = spread_out(by_length(mine, budget.tokens))
    # a rank without examples, if there are more ranks than examples, still takes part in the gathering below
    if groups:
        loader = DataLoader(groups, batch_size=None, collate_fn=Step)
        with keyboard_interrupts():
            quiet_trainer(compute, "auto", [norms, bar]).validate(module, loader, verbose=False)
    return norms.records.of_all_ranks(len(encoded), device_of(compute)).columns(encoded)


def is_collected(runtime: Runtime, config: ProxyConfig, member: int, epoch: int, weights: Artifact, shard: int) -> bool:
    """Return whether the store has what `collect` would make."""
    return runtime.store.has(**_identity(runtime, config, member, epoch, weights, shard))


def _identity(
    runtime: Runtime, config: ProxyConfig, member: int, epoch: int, weights: Artifact, shard: int
) -> dict[str, Any]:
    settings: dict[str, Any] = {"shard": shard, "shards": config.shards}
    if config.ensemble == "mc_dropout":
        # the members share their parent, the weights, so without these entries they would share one fingerprint
        settings |= {"masks_of": member, "seed": runtime.seed}
    slug = f"m{member}-e{epoch}" + (f"-s{shard}of{config.shards}" if config.shards > 1 else "")
    return {"stage": "norms", "slug": slug, "config": settings, "parents": [weights], "version": VERSION}


def _mask_seed(runtime: Runtime, member: int, epoch: int) -> int:
    return derive_seed(runtime.seed, "mc_dropout", member, epoch)
