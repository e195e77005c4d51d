"""Training of the proxy ensemble and collection of its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their
initial A and their data order; each minimises its own loss. Member m's parameters after e epochs
are theta^(m,e), and ||g_i^(m,e)|| is the norm of example i's gradient there.

That is `lora_seeds`. The two other ensembles are the checks that the paper asks for, in our reading:

    bootstrap   all members start from one A; member m trains on as many draws with replacement from the
                examples as there are, the same ones in every epoch, in an order of its own
    mc_dropout  one adapter is trained, with dropout (member 0 of `lora_seeds`); member m is a pass over its
                weights after each epoch under dropout masks of its own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.gradients.callback import GradientNorms, collect_norms
from gradsift.gradients.norms_table import write_norms
from gradsift.proxy.epochs import EpochStart, ProxyInputs, adapter, train_epoch
from gradsift.proxy.trajectory import Trajectory
from gradsift.runtime import Runtime, derive_seed
from gradsift.training import lora
from gradsift.training.device import device_of
from gradsift.training.finetuning import Optimization, ShowProgress

VERSION = 3
COLLECT_VERSION = 1


def train_ensemble(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
) -> list[list[Artifact]]:
    """All members through all epochs; each (member, epoch) is trained or passed once, whoever asks.

    Args:
        load: called only if a member has to be trained or passed.

    Returns:
        For each member and epoch an artifact with its gradient norms, as [member][epoch - 1]. Those of
        mc_dropout hold nothing else; where the weights are, `train_adapters` knows.
    """
    adapters = train_adapters(runtime, config, proxy, examples, load)
    if config.ensemble != "mc_dropout":
        return adapters
    return [
        [collect_under_masks(runtime, config, load, member, epoch, weights) for epoch, weights in enumerate(shared, 1)]
        for shared in adapters
        for member in range(config.members)
    ]


def train_adapters(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
) -> list[list[Artifact]]:
    """The adapters of the ensemble, as [adapter][epoch - 1]: one a member, but a single one for mc_dropout."""
    count = 1 if config.ensemble == "mc_dropout" else config.members
    return [
        train_adapter(runtime, config, proxy, examples, load, member, config.total_epochs) for member in range(count)
    ]


def train_adapter(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
    member: int,
    epochs: int,
) -> list[Artifact]:
    """One member's weights and norms after each of its first `epochs` epochs."""
    chain: list[Artifact] = []
    for epoch in range(1, epochs + 1):
        parents = [chain[-1]] if chain else [proxy, examples]
        chain.append(
            runtime.store.obtain(
                "member",
                f"m{member}-e{epoch}",
                member_settings(config, runtime, member, epoch),
                parents,
                _maker(runtime, config, load, member, epoch, chain[-1] if chain else None),
                version=VERSION,
            )
        )
    return chain


def member_settings(config: ProxyConfig, runtime: Runtime, member: int, epoch: int) -> dict[str, Any]:
    """What a member's epoch depends on: neither M, nor the snapshots, nor (for a constant rate) the epochs to come."""
    resampled = {"ensemble": "bootstrap"} if config.ensemble == "bootstrap" else {}
    return {
        **resampled,
        "member": member,
        "epoch": epoch,
        "seed": runtime.seed,
        **runtime.compute.numerics,
        "lora": asdict(config.lora),
        "template": config.template,
        "max_length": config.max_length,
        "collect": config.collect,
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "scheduled_epochs": None if config.schedule == "constant" else config.total_epochs,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "batch_size": config.batch_size,
        "batching": config.batching,
        "tokens": runtime.compute.tokens if config.lora.dropout else None,  # dropout masks are drawn batch by batch
    }


def _maker(
    runtime: Runtime,
    config: ProxyConfig,
    load: Callable[[], ProxyInputs],
    member: int,
    epoch: int,
    previous: Artifact | None,
) -> Callable[[Path], Mapping[str, Any]]:
    def make(folder: Path) -> Mapping[str, Any]:
        inputs = load()
        label = f"proxy member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"
        passes = 2 if config.collect == "epoch_end" else 1
        with runtime.display.task(label, passes * len(inputs.encoded)) as advance:
            return train_member_epoch(runtime, config, inputs, member, epoch, previous, folder, advance)

    return make


def train_member_epoch(
    runtime: Runtime,
    config: ProxyConfig,
    inputs: ProxyInputs,
    member: int,
    epoch: int,
    previous: Artifact | None,
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Train one member for one epoch from where the epoch before left it, collect the norms, write both."""
    lengths = [len(example.input_ids) for example in inputs.encoded]
    plan = epoch_plan(config, lengths, runtime.seed, member, epoch)
    optimization = Optimization(
        config.learning_rate,
        config.weight_decay,
        config.schedule,
        config.warmup_steps,
        total_steps=len(plan) * config.total_epochs,
    )
    start = EpochStart(len(plan) * (epoch - 1), derive_seed(runtime.seed, "dropout", member, epoch), previous)
    first = derive_seed(runtime.seed, "lora", 0 if config.ensemble == "bootstrap" else member)
    with adapter(inputs.backbone, config.lora, first, runtime.compute) as adapted:
        norms = GradientNorms(adapted, inputs.encoded, config.collect, row_indices=inputs.row_indices, progress=advance)
        trajectory = Trajectory(adapted, start.first_step, len(plan))
        callbacks = [ShowProgress(advance), norms, trajectory]
        info = train_epoch(adapted, inputs, optimization, plan, start, folder, runtime.compute, callbacks)
        trajectory.write(folder)
        write_norms(folder, norms.table(), inputs.encoded)
    return info


def epoch_plan(config: ProxyConfig, lengths: Sequence[int], seed: int, member: int, epoch: int) -> list[list[int]]:
    """The batches that a member trains on in an epoch, as positions in `lengths` (in tokens, of the examples)."""
    order = derive_seed(seed, "order", member, epoch)
    if config.ensemble != "bootstrap":
        return epoch_batches(lengths, config.batch_size, config.batching, order)
    count = len(lengths)
    draws = np.random.default_rng(derive_seed(seed, "bootstrap", member)).integers(count, size=count).tolist()
    plan = epoch_batches([lengths[draw] for draw in draws], config.batch_size, config.batching, order)
    return [[draws[position] for position in batch] for batch in plan]


def collect_under_masks(
    runtime: Runtime,
    config: ProxyConfig,
    load: Callable[[], ProxyInputs],
    member: int,
    epoch: int,
    weights: Artifact,
) -> Artifact:
    """Member `member` of mc_dropout: the norms and losses of all examples at `weights` under its own masks."""
    settings = {
        "member": member,
        "epoch": epoch,
        "seed": runtime.seed,
        "tokens": runtime.compute.tokens,  # the masks are drawn batch by batch
    }

    def make(folder: Path) -> Mapping[str, Any]:
        backbone, encoded, row_indices, budget = load()
        device = device_of(runtime.compute)
        label = f"dropout member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"
        with adapter(backbone, config.lora, 0, runtime.compute) as adapted:
            lora.load_adapter(adapted, weights.path)
            torch.manual_seed(derive_seed(runtime.seed, "mc_dropout", member, epoch))
            with runtime.display.task(label, len(encoded)) as advance:
                collected = collect_norms(adapted, encoded, budget, backbone.pad_id, device, advance, dropout=True)
        write_norms(folder, collected.columns(row_indices), encoded)
        return {"rows": len(encoded), "size_A": weights.info["size_A"], "size_B": weights.info["size_B"]}

    return runtime.store.obtain("dropout", f"m{member}-e{epoch}", settings, [weights], make, version=COLLECT_VERSION)
