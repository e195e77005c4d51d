"""Training of the proxy ensemble, and its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their
initial A and their data order; each minimises its own loss. Member m's parameters after e epochs
are theta^(m,e), and ||g_i^(m,e)|| is the norm of example i's gradient there.

That is `lora_seeds`. The two other ensembles are the checks that the paper asks for, in our reading:

    bootstrap   all members start from one A; member m trains on as many draws with replacement from the
                examples as there are, the same ones in every epoch, in an order of its own
    mc_dropout  one adapter is trained, with dropout (member 0 of `lora_seeds`); member m is a pass over its
                weights after an epoch under dropout masks of its own

Norms are taken by a pass over the examples after an epoch (`gradsift.proxy.collection`), and only after
epochs that something asks for; those of `proxy.collect=during_training` come from the training itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import encoding_settings
from gradsift.errors import GradsiftError
from gradsift.gradients.callback import GradientNormCallback
from gradsift.gradients.norms_table import write_norms
from gradsift.proxy.collection import collect, is_collected
from gradsift.proxy.epochs import EpochStart, ProxyInputs, adapter, train_epoch
from gradsift.proxy.trajectory import Trajectory
from gradsift.runtime import Runtime, derive_seed
from gradsift.training.finetuning import ShowProgress
from gradsift.training.modules import Optimization

VERSION = 6


def ensemble_norms(
    runtime: Runtime,
    config: ProxyConfig,
    adapters: Sequence[Sequence[Artifact]],
    load: Callable[[], ProxyInputs],
    epoch: int,
) -> list[list[Artifact]]:
    """The members' norms after an epoch, as [member][shard]; each shard is collected once, whoever asks.

    Args:
        adapters: what `train_adapters` made.
        load: called only if a shard has to be collected.
    """
    if config.collect == "during_training":
        return [[chain[epoch - 1]] for chain in adapters]
    return [
        [collect(runtime, config, load, member, epoch, weights, shard) for shard in range(config.shards)]
        for member, weights in enumerate(_weights(config, adapters, epoch))
    ]


def collect_shard(
    runtime: Runtime,
    config: ProxyConfig,
    adapters: Sequence[Sequence[Artifact]],
    load: Callable[[], ProxyInputs],
    shard: int,
) -> list[int]:
    """Collect one shard of all members at both snapshots.

    Returns:
        The shards of which something is still missing: other processes' work, or work to be done.
    """
    missing = set()
    for epoch in config.snapshots:
        for member, weights in enumerate(_weights(config, adapters, epoch)):
            collect(runtime, config, load, member, epoch, weights, shard)
    for epoch in config.snapshots:
        for member, weights in enumerate(_weights(config, adapters, epoch)):
            there = (is_collected(runtime, config, member, epoch, weights, other) for other in range(config.shards))
            missing |= {other for other, is_there in enumerate(there) if not is_there}
    return sorted(missing)


def _weights(config: ProxyConfig, adapters: Sequence[Sequence[Artifact]], epoch: int) -> list[Artifact]:
    """Of each member after an epoch."""
    found = [chain[epoch - 1] for chain in adapters]
    return found * config.members if config.ensemble == "mc_dropout" else found


def train_adapters(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
) -> list[list[Artifact]]:
    """The adapters of the ensemble, as [adapter][epoch - 1]: one a member, but a single one for mc_dropout.

    Each (adapter, epoch) is trained once, whoever asks. Jobs of different shards begin with different members.
    """
    count = 1 if config.ensemble == "mc_dropout" else config.members
    first = config.shard or 0
    order = [(first + place) % count for place in range(count)]
    trained = {
        member: train_adapter(runtime, config, proxy, examples, load, member, config.total_epochs) for member in order
    }
    return [trained[member] for member in range(count)]


def train_adapter(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
    member: int,
    epochs: int,
) -> list[Artifact]:
    """One member's weights after each of its first `epochs` epochs; for `during_training` with the norms of each."""
    chain: list[Artifact] = []
    for epoch in range(1, epochs + 1):
        previous = chain[-1] if chain else None
        parents = [previous] if previous else [proxy, examples]
        settings = member_settings(config, runtime, member, epoch)
        label = f"proxy member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"
        make = _maker(runtime, config, load, label, settings, previous)
        slug = f"m{member}-e{epoch}"
        chain.append(runtime.store.obtain("member", slug, settings, parents, make, version=VERSION, divided=True))
    return chain


def member_settings(config: ProxyConfig, runtime: Runtime, member: int, epoch: int) -> dict[str, Any]:
    """What a member's epoch depends on: neither M, nor the snapshots, nor (for a constant rate) the epochs to come."""
    resampled = {"ensemble": "bootstrap"} if config.ensemble == "bootstrap" else {}
    # the weights are the same, but the norms are there only where they were taken
    collected = {"collect": "during_training"} if config.collect == "during_training" else {}
    return {
        **resampled,
        **collected,
        "member": member,
        "epoch": epoch,
        "seed": runtime.seed,
        "lora": config.lora.settings,
        **encoding_settings(config.template, config.max_length),
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "scheduled_epochs": None if config.schedule == "constant" else config.total_epochs,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "batch_size": config.batch_size,
        "batching": config.batching,
        "tokens": runtime.compute.mask_batches if config.lora.dropout else None,
    }


def _maker(
    runtime: Runtime,
    config: ProxyConfig,
    load: Callable[[], ProxyInputs],
    label: str,
    settings: Mapping[str, Any],
    previous: Artifact | None,
) -> Callable[[Path], Mapping[str, Any]]:
    def make(folder: Path) -> Mapping[str, Any]:
        inputs = load()
        with runtime.display.task(label, len(inputs.encoded)) as advance:
            return train_member_epoch(runtime, config, inputs, settings, previous, folder, advance)

    return make


def train_member_epoch(
    runtime: Runtime,
    config: ProxyConfig,
    inputs: ProxyInputs,
    settings: Mapping[str, Any],
    previous: Artifact | None,
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Train one member for one epoch from where the epoch before left it; write it, and norms taken on the way.

    Args:
        settings: of `member_settings`; they name the member and the epoch.
    """
    member, epoch = settings["member"], settings["epoch"]
    lengths = [len(example.input_ids) for example in inputs.encoded]
    plan = epoch_plan(config, lengths, runtime.seed, member, epoch)
    optimization = Optimization(
        config.learning_rate,
        config.weight_decay,
        config.schedule,
        config.warmup_steps,
        total_steps=len(plan) * (settings["scheduled_epochs"] or epoch),  # a constant rate does not depend on it
    )
    start_step = len(plan) * (epoch - 1)
    if not optimization.mean_rate(start_step, start_step + len(plan)):
        raise GradsiftError(
            f"proxy.warmup_steps={config.warmup_steps} starts at a learning rate of 0, and epoch {epoch} has that one "
            "step alone, so its snapshot would be of untrained weights; give proxy.warmup_steps=0 or a smaller "
            "proxy.batch_size"
        )
    start = EpochStart(start_step, derive_seed(runtime.seed, "dropout", member, epoch), previous)
    first = derive_seed(runtime.seed, "lora", 0 if config.ensemble == "bootstrap" else member)
    with adapter(inputs.backbone, config.lora, first, runtime.compute) as adapted:
        trajectory = Trajectory(adapted, start.first_step, len(plan))
        callbacks: list[L.Callback] = [ShowProgress(advance), trajectory]
        norms = None
        if config.collect == "during_training":
            norms = GradientNormCallback()
            callbacks.append(norms)
        info = train_epoch(adapted, inputs, optimization, plan, start, folder, runtime.compute, callbacks)
        trajectory.write(folder)
    if norms is not None:
        info |= write_norms(folder, norms.records.columns(inputs.encoded), inputs.encoded, shard=0, shards=1)
        info["all_rows"] = len(inputs.encoded)
    return info


def epoch_plan(config: ProxyConfig, lengths: Sequence[int], seed: int, member: int, epoch: int) -> list[list[int]]:
    """The batches that a member trains on in an epoch, as positions in `lengths` (in tokens, of the examples)."""
    order = derive_seed(seed, "order", member, epoch)
    if config.ensemble != "bootstrap":
        return epoch_batches(lengths, config.batch_size, config.batching, order)
    draws = resample(seed, member, len(lengths))
    plan = epoch_batches([lengths[draw] for draw in draws], config.batch_size, config.batching, order)
    return [[draws[position] for position in batch] for batch in plan]


def resample(seed: int, member: int, count: int) -> list[int]:
    """The positions that a bootstrap member trains on, in every epoch: `count` draws from as many with replacement."""
    draws: list[int] = (
        np.random.default_rng(derive_seed(seed, "bootstrap", member)).integers(count, size=count).tolist()
    )
    return draws
