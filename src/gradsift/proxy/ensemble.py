"""Training of the proxy ensemble, and its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their initial A and their data
order, and each minimises its own loss. theta^(m,e) are member m's parameters after e epochs, and |g_i^(m,e)| is the
norm of example i's gradient there.

That is `lora_seeds`. The two other ensembles are the ablations that the paper asks for, as we read it:

    bootstrap   all members start from one A; member m trains on N draws with replacement from the N examples, the same
                in every epoch, in an order of its own
    mc_dropout  one adapter is trained, with dropout (member 0 of `lora_seeds`); member m is a pass over its weights
                after an epoch under dropout masks of its own

Norms come from a pass over the examples after an epoch (`gradsift.proxy.collection`), for the epochs that a stage asks
for. With `proxy.collect=during_training` they come from the training steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import encoding_settings
from gradsift.errors import GradsiftError
from gradsift.gradients.norms_table import write_norms
from gradsift.proxy.collection import collect, is_collected
from gradsift.proxy.epochs import EpochStart, ProxyInputs, adapter, train_epoch
from gradsift.runtime import Runtime, derive_seed
from gradsift.training.optimization import Optimization

VERSION = 6


def ensemble_norms(
    runtime: Runtime,
    config: ProxyConfig,
    adapters: Sequence[Sequence[Artifact]],
    load: Callable[[], ProxyInputs],
    epoch: int,
) -> list[list[Artifact]]:
    """Return the members' norms after an epoch, as [member][shard].

    Args:
        adapters: from `train_adapters`.
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
        The shards of which a part does not exist yet.
    """
    weights_of = {epoch: _weights(config, adapters, epoch) for epoch in config.snapshots}
    members = [(member, epoch, w) for epoch, chain in weights_of.items() for member, w in enumerate(chain)]
    for member, epoch, weights in members:
        collect(runtime, config, load, member, epoch, weights, shard)
    return [
        other
        for other in range(config.shards)
        if not all(is_collected(runtime, config, member, epoch, weights, other) for member, epoch, weights in members)
    ]


def _weights(config: ProxyConfig, adapters: Sequence[Sequence[Artifact]], epoch: int) -> list[Artifact]:
    """Return each member's weights after an epoch; the members of mc_dropout share theirs."""
    weights = [chain[epoch - 1] for chain in adapters]
    return weights * config.members if config.ensemble == "mc_dropout" else weights


def train_adapters(
    runtime: Runtime, config: ProxyConfig, proxy: Artifact, examples: Artifact, load: Callable[[], ProxyInputs]
) -> list[list[Artifact]]:
    """Return the adapters of the ensemble, as [adapter][epoch - 1]: one per member, but a single one for mc_dropout.

    Jobs of different shards begin with different members, so that they train in parallel.
    """
    count = 1 if config.ensemble == "mc_dropout" else config.members
    first = config.shard or 0
    trained = {
        member: train_adapter(runtime, config, proxy, examples, load, member, config.total_epochs)
        for member in ((first + place) % count for place in range(count))
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
    """Return one member's weights after each of its first `epochs` epochs; for `during_training` with their norms."""
    chain: list[Artifact] = []
    for epoch in range(1, epochs + 1):
        previous = chain[-1] if chain else None
        settings = member_settings(config, runtime, member, epoch)
        label = f"proxy member {member + 1}/{config.members}, epoch {epoch}/{config.total_epochs}"

        def make(
            folder: Path, label: str = label, previous: Artifact | None = previous, settings: Any = settings
        ) -> Mapping[str, Any]:
            inputs = load()
            with runtime.display.task(label, len(inputs.encoded)) as advance:
                return train_member_epoch(runtime, config, inputs, settings, previous, folder, advance)

        unit = ("member", f"m{member}-e{epoch}", settings, [previous] if previous else [proxy, examples], make)
        chain.append(runtime.store.obtain(*unit, version=VERSION, divided=True))
    return chain


def member_settings(config: ProxyConfig, runtime: Runtime, member: int, epoch: int) -> dict[str, Any]:
    """Return what a member's epoch depends on: not M, not the snapshots, and for a constant rate no later epoch."""
    return {
        **({"ensemble": "bootstrap"} if config.ensemble == "bootstrap" else {}),
        # the weights are the same, but the norms exist only if they were taken
        **({"collect": "during_training"} if config.collect == "during_training" else {}),
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


def train_member_epoch(
    runtime: Runtime,
    config: ProxyConfig,
    inputs: ProxyInputs,
    settings: Mapping[str, Any],
    previous: Artifact | None,
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Train one member for one epoch and write it, with the norms of its steps where they are wanted.

    Args:
        settings: from `member_settings`; they name the member and the epoch.
        previous: the epoch before, which this one continues.

    Raises:
        GradsiftError: the learning rate is 0 throughout the epoch.
    """
    from gradsift.gradients.callback import GradientNormCallback
    from gradsift.proxy.trajectory import Trajectory
    from gradsift.training.finetuning import ShowProgress

    member, epoch = settings["member"], settings["epoch"]
    plan = epoch_plan(config, [len(example.input_ids) for example in inputs.encoded], runtime.seed, member, epoch)
    optimization = Optimization(
        config.learning_rate,
        config.weight_decay,
        config.schedule,
        config.warmup_steps,
        total_steps=len(plan) * (settings["scheduled_epochs"] or epoch),  # irrelevant for a constant rate
    )
    start_step = len(plan) * (epoch - 1)
    if not optimization.mean_rate(start_step, start_step + len(plan)):
        raise GradsiftError(
            f"proxy.warmup_steps={config.warmup_steps} starts at a learning rate of 0, and epoch {epoch} has that one "
            "step alone, so its snapshot would be of untrained weights; give proxy.warmup_steps=0 or a smaller "
            "proxy.batch_size"
        )
    start = EpochStart(start_step, derive_seed(runtime.seed, "dropout", member, epoch), previous)
    lora_seed = derive_seed(runtime.seed, "lora", 0 if config.ensemble == "bootstrap" else member)
    norms = GradientNormCallback() if config.collect == "during_training" else None
    with adapter(inputs.backbone, config.lora, lora_seed, runtime.compute) as adapted:
        trajectory = Trajectory(adapted, start.first_step, len(plan))
        callbacks = [ShowProgress(advance), trajectory, *([norms] if norms else [])]
        info = train_epoch(adapted, inputs, optimization, plan, start, folder, runtime.compute, callbacks)
        trajectory.write(folder)
    if norms is not None:
        info |= write_norms(folder, norms.records.columns(inputs.encoded), inputs.encoded, shard=0, shards=1)
        info["all_rows"] = len(inputs.encoded)
    return info


def epoch_plan(config: ProxyConfig, lengths: Sequence[int], seed: int, member: int, epoch: int) -> list[list[int]]:
    """Return a member's batches in an epoch, as positions in `lengths` (tokens of each example)."""
    order = derive_seed(seed, "order", member, epoch)
    if config.ensemble != "bootstrap":
        return epoch_batches(lengths, config.batch_size, config.batching, order)
    draws = resample(seed, member, len(lengths))
    plan = epoch_batches([lengths[draw] for draw in draws], config.batch_size, config.batching, order)
    return [[draws[position] for position in batch] for batch in plan]


def resample(seed: int, member: int, count: int) -> list[int]:
    """Return the positions of a bootstrap member, in every epoch: `count` draws with replacement from `count`."""
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", member))
    draws: list[int] = rng.integers(count, size=count).tolist()
    return draws
