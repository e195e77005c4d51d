"""Training of the proxy ensemble, and its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their initial LoRA factor A and
their data order, and each minimises its own loss. theta^(m,e) are member m's parameters after e epochs, and |g_i^(m,e)|
is the norm of example i's gradient at these parameters.

This is `proxy.ensemble=lora_seeds`. Two other ensembles implement the ablations that the paper asks for (our reading):

    bootstrap   All members start from the same A. Member m trains on N draws with replacement from the N examples. The
                draws are the same in every epoch, but their order is new.
    mc_dropout  One adapter is trained with dropout; it equals member 0 of `lora_seeds`. The norms of member m come from
                a pass at this adapter's weights with the dropout masks of member m.

With `proxy.together=K`, K members train side by side (`gradsift.proxy.together`). This changes their weights only by
rounding, so a member's fingerprint does not depend on the members that it trained with. The norms come from passes over
the examples (`gradsift.proxy.collection`) or, with `proxy.collect=during_training`, from the training steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import encoding_settings
from gradsift.errors import GradsiftError
from gradsift.gradients.statistics import write_norms
from gradsift.proxy.epochs import Ensemble, Epoch, ProxyInputs, train_epoch
from gradsift.runtime import Advance, Runtime, derive_seed
from gradsift.training.optimization import Optimization

VERSION = 6
Unit = tuple[Mapping[str, Any], Artifact | None, Path]  # a member's settings, its previous epoch, its folder


def train_adapters(ensemble: Ensemble) -> list[list[Artifact]]:
    """Return the adapters of the ensemble, as [adapter][epoch - 1]: one per member, or a single one for mc_dropout.

    Jobs that collect different shards start with different members, so that the members are trained in parallel.
    """
    config = ensemble.config
    count = 1 if config.ensemble == "mc_dropout" else config.members
    groups = [range(count)[first : first + config.together] for first in range(0, count, config.together)]
    begin = (config.shard or 0) % len(groups)
    trained: dict[int, list[Artifact]] = {}
    for group in groups[begin:] + groups[:begin]:
        trained |= train_members(ensemble, group, config.total_epochs)
    return [trained[member] for member in range(count)]


def train_members(ensemble: Ensemble, members: Sequence[int], epochs: int) -> dict[int, list[Artifact]]:
    """Return the artifacts of each member's first `epochs` epochs.

    In each epoch, the members whose artifact does not exist yet train side by side.
    """
    chains: dict[int, list[Artifact]] = {member: [] for member in members}
    for epoch in range(1, epochs + 1):
        # from the second epoch on, proxy and examples are in the fingerprint as ancestors of the previous epoch
        parents = {member: chain[-1:] or [ensemble.proxy, ensemble.examples] for member, chain in chains.items()}
        for member, artifact in _obtain_epoch(ensemble, parents, epoch).items():
            chains[member].append(artifact)
    return chains


def _obtain_epoch(ensemble: Ensemble, parents: Mapping[int, Sequence[Artifact]], epoch: int) -> dict[int, Artifact]:
    """Return the artifact of the epoch `epoch` of each member. All missing artifacts are made in one training.

    The calls of `obtain`, each of which locks its unit, are nested in ascending order of the members. Two jobs that
    make the same units therefore cannot deadlock: one job waits until the other has finished.
    """
    runtime, config = ensemble.runtime, ensemble.config
    settings = {member: member_settings(config, runtime, member, epoch) for member in parents}
    folders: dict[int, Path] = {}
    infos: dict[int, Mapping[str, Any]] = {}
    place = f"/{config.members}, epoch {epoch}/{config.total_epochs}"

    def train() -> None:
        started, inputs = time.perf_counter(), ensemble.load()
        numbers = ", ".join(str(member + 1) for member in folders)
        previous = {member: parents[member][0] if epoch > 1 else None for member in folders}
        units = [(settings[member], previous[member], folder) for member, folder in folders.items()]
        with runtime.display.task(f"proxy member {numbers}{place}", len(units) * len(inputs.encoded)) as advance:
            made = train_members_epoch(runtime, config, inputs, units, advance)
        # plans estimate the time from the manifests, so each gets an equal share
        seconds = (time.perf_counter() - started) / len(units)
        infos.update((member, {**info, "seconds": seconds}) for member, info in zip(folders, made, strict=True))

    def obtain(member: int) -> Artifact:
        def make(folder: Path) -> Mapping[str, Any]:
            # `obtain` holds this unit's lock while `make` runs: all units are locked before the training starts
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
    """Return all settings that determine a member's epoch.

    The number of members and the snapshots are not among these settings.
    """
    return {
        **({"ensemble": "bootstrap"} if config.ensemble == "bootstrap" else {}),
        # this setting does not change the weights, but only with it does the artifact contain norms
        **({"collect": "during_training"} if config.collect == "during_training" else {}),
        "member": member,
        "epoch": epoch,
        "seed": runtime.seed,
        "lora": config.lora.settings,
        **encoding_settings(config.template, config.max_length),
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        # if the rate decays, it depends on the number of epochs in every epoch
        "scheduled_epochs": None if config.schedule == "constant" else config.total_epochs,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "batch_size": config.batch_size,
        "batching": config.batching,
        "tokens": None,  # has no effect; without it, all fingerprints would change
    }


def train_members_epoch(
    runtime: Runtime, config: ProxyConfig, inputs: ProxyInputs, units: Sequence[Unit], advance: Advance
) -> list[dict[str, Any]]:
    """Train one or several members for one epoch, side by side, and return the `info` of each unit's artifact.

    With `proxy.collect=during_training`, the artifacts also contain the gradient norms that the training steps gave.

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
            f"proxy.warmup_steps={config.warmup_steps} starts at a learning rate of 0, and epoch {epoch} has only this "
            "one step, so its weights would be untrained; give proxy.warmup_steps=0 or a smaller proxy.batch_size"
        )
    callbacks = [ShowProgress(advance), Trajectory(first_step, len(plan), folder)]
    if config.collect == "during_training":
        callbacks.append(GradientNormCallback())
    return Epoch(
        plan,
        optimization,
        first_step,
        lora_seed=derive_seed(runtime.seed, "lora", 0 if config.ensemble == "bootstrap" else member),
        # each epoch has its own seed, so it can continue from the previous epoch's artifact without a random state
        dropout_seed=derive_seed(runtime.seed, "dropout", member, epoch),
        previous=previous,
        folder=folder,
        callbacks=callbacks,
    )


def epoch_plan(config: ProxyConfig, lengths: Sequence[int], seed: int, member: int, epoch: int) -> list[list[int]]:
    """Return a member's batches in an epoch, as positions in `lengths` (the number of tokens of each example)."""
    order = derive_seed(seed, "order", member, epoch)
    if config.ensemble != "bootstrap":
        return epoch_batches(lengths, config.batch_size, config.batching, order)
    draws = resample(seed, member, len(lengths))
    # `plan` has positions in `draws`; replace them by positions in `lengths`
    plan = epoch_batches([lengths[draw] for draw in draws], config.batch_size, config.batching, order)
    return [[draws[position] for position in batch] for batch in plan]


def resample(seed: int, member: int, count: int) -> list[int]:
    """Return the positions of a bootstrap member's examples: `count` draws with replacement from range(count)."""
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", member))
    draws: list[int] = rng.integers(count, size=count).tolist()
    return draws
