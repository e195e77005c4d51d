"""Training of the proxy ensemble and collection of its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their
initial A and their data order; each minimises its own loss. Member m's parameters after e epochs
are theta^(m,e), and ||g_i^(m,e)|| is the norm of example i's gradient there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.gradients.callback import GradientNorms
from gradsift.gradients.norms_table import write_norms
from gradsift.proxy.epochs import EpochStart, ProxyInputs, adapter, train_epoch
from gradsift.runtime import Runtime, derive_seed
from gradsift.training.finetuning import Optimization, ShowProgress

VERSION = 3


def train_ensemble(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
) -> list[list[Artifact]]:
    """All members through all epochs; each (member, epoch) is trained once, whoever asks.

    Args:
        load: called only if a member has to be trained.

    Returns:
        An artifact for each member and epoch, as [member][epoch - 1].
    """
    ensemble: list[list[Artifact]] = []
    for member in range(config.members):
        chain: list[Artifact] = []
        for epoch in range(1, config.total_epochs + 1):
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
        ensemble.append(chain)
    return ensemble


def member_settings(config: ProxyConfig, runtime: Runtime, member: int, epoch: int) -> dict[str, Any]:
    """What a member's epoch depends on: neither M, nor the snapshots, nor (for a constant rate) the epochs to come."""
    return {
        "member": member,
        "epoch": epoch,
        "seed": runtime.seed,
        "precision": runtime.compute.precision,
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
    plan = epoch_batches(lengths, config.batch_size, config.batching, derive_seed(runtime.seed, "order", member, epoch))
    optimization = Optimization(
        config.learning_rate,
        config.weight_decay,
        config.schedule,
        config.warmup_steps,
        total_steps=len(plan) * config.total_epochs,
    )
    start = EpochStart(len(plan) * (epoch - 1), derive_seed(runtime.seed, "dropout", member, epoch), previous)
    with adapter(inputs.backbone, config.lora, derive_seed(runtime.seed, "lora", member), runtime.compute) as adapted:
        norms = GradientNorms(adapted, inputs.encoded, config.collect, row_indices=inputs.row_indices, progress=advance)
        callbacks = [ShowProgress(advance), norms]
        info = train_epoch(adapted, inputs, optimization, plan, start, folder, runtime.compute, callbacks)
        write_norms(folder, norms.table(), inputs.encoded)
    return info
