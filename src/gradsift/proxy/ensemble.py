"""Training of the proxy ensemble, and its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their initial LoRA factor A and
their data order, and each is trained by itself. theta^(m,e) are member m's parameters after e epochs, and |g_i^(m,e)|
is the norm of example i's gradient at these parameters.

This is `proxy.ensemble=lora_seeds`. The two other ensembles are the ablations that the paper asks for, as we read it:

    bootstrap   all members start from the same A; member m trains on N draws with replacement from the N examples; the
                draws are the same in every epoch, their order is not
    mc_dropout  one adapter is trained, with dropout (it is member 0 of `lora_seeds`); the norms of member m come from a
                pass with the adapter's weights after an epoch, under dropout masks of member m

With `proxy.together=K`, K members train side by side (`gradsift.proxy.together`). This changes their weights only by
rounding, so the fingerprints do not contain which members trained together. The norms come from passes over the
examples (`gradsift.proxy.collection`) or, with `proxy.collect=during_training`, from the training steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import encoding_settings
from gradsift.errors import GradsiftError
from gradsift.gradients.statistics import write_norms
from gradsift.proxy.epochs import Epoch, ProxyInputs, train_epoch
from gradsift.runtime import Advance, Runtime, derive_seed
from gradsift.training.optimization import Optimization

VERSION = 6
Unit = tuple[Mapping[str, Any], Artifact | None, Path]  # a member's settings, its previous epoch, its folder


def train_adapters(
    runtime: Runtime, config: ProxyConfig, proxy: Artifact, examples: Artifact, load: Callable[[], ProxyInputs]
) -> list[list[Artifact]]:
    """Return the adapters of the ensemble, as [adapter][epoch - 1]: one per member, or a single one for mc_dropout.

    Jobs of different shards begin with different members, so that parallel jobs train different members.
    """
    count = 1 if config.ensemble == "mc_dropout" else config.members
    groups = [range(count)[first : first + config.together] for first in range(0, count, config.together)]
    begin = (config.shard or 0) % len(groups)
    trained: dict[int, list[Artifact]] = {}
    for group in groups[begin:] + groups[:begin]:
        trained |= train_members(runtime, config, proxy, examples, load, group, config.total_epochs)
    return [trained[member] for member in range(count)]


def train_members(
    runtime: Runtime,
    config: ProxyConfig,
    proxy: Artifact,
    examples: Artifact,
    load: Callable[[], ProxyInputs],
    members: Sequence[int],
    epochs: int,
) -> dict[int, list[Artifact]]:
    """Return the artifacts of each member's first `epochs` epochs.

    In each epoch, the members whose artifact does not exist yet train side by side.
    """
    chains: dict[int, list[Artifact]] = {member: [] for member in members}
    for epoch in range(1, epochs + 1):
        # the epoch before has proxy and examples among its ancestors, so its fingerprint stands for them
        parents = {member: chain[-1:] or [proxy, examples] for member, chain in chains.items()}
        for member, artifact in _obtain_epoch(runtime, config, parents, load, epoch).items():
            chains[member].append(artifact)
    return chains


def _obtain_epoch(
    runtime: Runtime,
    config: ProxyConfig,
    parents: Mapping[int, Sequence[Artifact]],
    load: Callable[[], ProxyInputs],
    epoch: int,
) -> dict[int, Artifact]:
    """Return the artifact of each member's epoch; all that do not exist are made at once.

    The calls of `obtain`, each of which locks its unit, are nested in ascending order of the members. So two jobs that
    make the same units cannot deadlock: one waits for the other.
    """
    settings = {member: member_settings(config, runtime, member, epoch) for member in parents}
    folders: dict[int, Path] = {}
    infos: dict[int, Mapping[str, Any]] = {}
    place = f"/{config.members}, epoch {epoch}/{config.total_epochs}"

    def train() -> None:
        started, inputs = time.perf_counter(), load()
        numbers = ", ".join(str(member + 1) for member in folders)
        previous = {member: parents[member][0] if epoch > 1 else None for member in folders}
        units = [(settings[member], previous[member], folder) for member, folder in folders.items()]
        with runtime.display.task(f"proxy member {numbers}{place}", len(units) * len(inputs.encoded)) as advance:
            made = train_members_epoch(runtime, config, inputs, units, advance)
        # each unit's manifest gets an equal share of the time, on which plans base their estimates
        seconds = (time.perf_counter() - started) / len(units)
        infos.update((member, {**info, "seconds": seconds}) for member, info in zip(folders, made, strict=True))

    def obtain(member: int) -> Artifact:
        def make(folder: Path) -> Mapping[str, Any]:
            # `obtain` holds this unit's lock while `make` runs, so all units are locked before any is trained
            folders[member] = folder
            for other in parents:
                if other > member and other not in folders:
                    obtain(other)
            if not infos:
                train()
            return infos[member]

        slug, own = f"m{member}-e{epoch}", settings[member]
        return runtime.store.obtain("member", slug, own, parents[member], make, version=VERSION, divided=True)

    return {member: obtain(member) for member in parents}


def member_settings(config: ProxyConfig, runtime: Runtime, member: int, epoch: int) -> dict[str, Any]:
    """Return the settings that determine a member's epoch, so neither the number of members nor the snapshots."""
    return {
        **({"ensemble": "bootstrap"} if config.ensemble == "bootstrap" else {}),
        # the weights do not depend on this setting, but only an epoch with it also has norms
        **({"collect": "during_training"} if config.collect == "during_training" else {}),
        "member": member,
        "epoch": epoch,
        "seed": runtime.seed,
        "lora": config.lora.settings,
        **encoding_settings(config.template, config.max_length),
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        # if the rate falls to zero at the end, every epoch depends on the number of epochs
        "scheduled_epochs": None if config.schedule == "constant" else config.total_epochs,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "batch_size": config.batch_size,
        "batching": config.batching,
        "tokens": None,  # in earlier versions it determined the dropout masks; kept so that fingerprints stay equal
    }


def train_members_epoch(
    runtime: Runtime, config: ProxyConfig, inputs: ProxyInputs, units: Sequence[Unit], advance: Advance
) -> list[dict[str, Any]]:
    """Train members for one epoch, several of them side by side, and return the `info` of each unit's artifact.

    With `proxy.collect=during_training` the epoch's files include the norms of its steps.

    Raises:
        GradsiftError: the learning rate is 0 throughout the epoch.
    """
    # imported in the functions that train: Lightning takes seconds to import, and most runs reuse their trainings
    from gradsift.proxy.together import train_together

    epochs = [_epoch(runtime, config, inputs, unit, advance) for unit in units]
    if len(epochs) == 1:
        infos = [train_epoch(inputs, epochs[0], config.lora, runtime.compute)]
    else:
        infos = train_together(inputs, epochs, config.lora, runtime.compute)
    if config.collect == "during_training":
        for epoch, info in zip(epochs, infos, strict=True):
            norms: Any = epoch.callbacks[-1]
            columns = norms.records.columns(inputs.encoded)
            info |= write_norms(epoch.folder, columns, inputs.encoded, len(inputs.encoded))
    return infos


def _epoch(runtime: Runtime, config: ProxyConfig, inputs: ProxyInputs, unit: Unit, advance: Advance) -> Epoch:
    from gradsift.gradients.callback import GradientNormCallback
    from gradsift.proxy.trajectory import Trajectory
    from gradsift.training.finetuning import ShowProgress

    settings, previous, folder = unit
    member, epoch = settings["member"], settings["epoch"]
    plan = epoch_plan(config, [len(example.input_ids) for example in inputs.encoded], runtime.seed, member, epoch)
    optimization = Optimization(
        config.learning_rate,
        config.weight_decay,
        config.schedule,
        config.warmup_steps,
        total_steps=len(plan) * (settings["scheduled_epochs"] or epoch),  # irrelevant for a constant rate
    )
    # every epoch has ceil(N / batch_size) batches, whatever their order
    first_step = len(plan) * (epoch - 1)
    if not optimization.mean_rate(first_step, first_step + len(plan)):
        raise GradsiftError(
            f"proxy.warmup_steps={config.warmup_steps} starts at a learning rate of 0, and epoch {epoch} has that one "
            "step alone, so its snapshot would be of untrained weights; give proxy.warmup_steps=0 or a smaller "
            "proxy.batch_size"
        )
    callbacks = [ShowProgress(advance), Trajectory(first_step, len(plan), folder)]
    if config.collect == "during_training":
        callbacks.append(GradientNormCallback())
    return Epoch(
        plan,
        optimization,
        first_step,
        lora_seed=derive_seed(runtime.seed, "lora", 0 if config.ensemble == "bootstrap" else member),
        # Each epoch has its own seed, so an epoch that starts from the artifact of the epoch before needs no random
        # state of the process that trained it.
        dropout_seed=derive_seed(runtime.seed, "dropout", member, epoch),
        previous=previous,
        folder=folder,
        callbacks=callbacks,
    )


def epoch_plan(config: ProxyConfig, lengths: Sequence[int], seed: int, member: int, epoch: int) -> list[list[int]]:
    """Return a member's batches in an epoch, as positions in `lengths` (tokens of each example)."""
    order = derive_seed(seed, "order", member, epoch)
    if config.ensemble != "bootstrap":
        return epoch_batches(lengths, config.batch_size, config.batching, order)
    draws = resample(seed, member, len(lengths))
    # Batches are made from the lengths of the N draws, among which an example may occur several times. Then the
    # positions among the draws are replaced by those of the examples.
    plan = epoch_batches([lengths[draw] for draw in draws], config.batch_size, config.batching, order)
    return [[draws[position] for position in batch] for batch in plan]


def resample(seed: int, member: int, count: int) -> list[int]:
    """Return the examples that a bootstrap member trains on: `count` draws with replacement from range(count)."""
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", member))
    draws: list[int] = rng.integers(count, size=count).tolist()
    return draws
