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
rounding, so the fingerprints do not contain which members trained together.

Norms come from a pass over the examples after an epoch (`gradsift.proxy.collection`), for the epochs that a stage asks
for. With `proxy.collect=during_training` they come from the training steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import encoding_settings
from gradsift.errors import GradsiftError
from gradsift.proxy.collection import collect, is_collected
from gradsift.proxy.epochs import EpochStart, ProxyInputs, adapter, train_epoch
from gradsift.runtime import Runtime, derive_seed
from gradsift.training.lanes import lanes
from gradsift.training.optimization import Optimization

if TYPE_CHECKING:
    from gradsift.proxy.together import MemberEpoch

VERSION = 6
Unit = tuple[Mapping[str, Any], Artifact | None, Path]  # a member's settings, its previous epoch, its folder


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
    """Collect the norms of one shard of the examples, for all members and both snapshots.

    Returns:
        The numbers of the shards that are not yet collected for all members and both snapshots.
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
    """Return each member's weights after an epoch; with mc_dropout, all members have the weights of one adapter."""
    weights = [chain[epoch - 1] for chain in adapters]
    return weights * config.members if config.ensemble == "mc_dropout" else weights


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
        trained |= _train_group(runtime, config, proxy, examples, load, group, config.total_epochs)
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
    """Return the artifacts of one member's first `epochs` epochs.

    With `proxy.collect=during_training`, these artifacts also contain norms.
    """
    return _train_group(runtime, config, proxy, examples, load, [member], epochs)[member]


def _train_group(
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
        previous = {member: chain[-1] if chain else None for member, chain in chains.items()}
        settings = {member: member_settings(config, runtime, member, epoch) for member in members}
        place = f"/{config.members}, epoch {epoch}/{config.total_epochs}"

        def make(
            folders: Mapping[int, Path], place: str = place, previous: Any = previous, settings: Any = settings
        ) -> dict[int, Mapping[str, Any]]:
            inputs, started = load(), time.perf_counter()
            numbers = ", ".join(str(member + 1) for member in folders)
            with runtime.display.task(f"proxy member {numbers}{place}", len(folders) * len(inputs.encoded)) as advance:
                if len(folders) == 1:
                    ((member, folder),) = folders.items()
                    one = (settings[member], previous[member], folder, advance)
                    return {member: train_member_epoch(runtime, config, inputs, *one)}
                units = [(settings[member], previous[member], folder) for member, folder in folders.items()]
                infos = train_members_epoch(runtime, config, inputs, units, advance)
            # each unit's manifest gets an equal share of the time, on which plans base their estimates
            seconds = (time.perf_counter() - started) / len(folders)
            return {member: {**info, "seconds": seconds} for member, info in zip(folders, infos, strict=True)}

        units = {
            # the epoch before has proxy and examples among its ancestors, so its fingerprint stands for them
            member: (f"m{member}-e{epoch}", settings[member], [last] if last else [proxy, examples])
            for member, last in previous.items()
        }
        for member, made in _obtain_all(runtime, units, make).items():
            chains[member].append(made)
    return chains


def _obtain_all(
    runtime: Runtime,
    units: Mapping[int, tuple[str, Mapping[str, Any], Sequence[Artifact]]],
    make: Callable[[Mapping[int, Path]], Mapping[int, Mapping[str, Any]]],
) -> dict[int, Artifact]:
    """Return the artifacts of `units` (slug, config, parents); one call of `make` makes all that do not exist.

    The calls of `obtain`, each of which locks its unit, are nested in ascending order of the members. So two jobs that
    make the same units cannot deadlock: one waits for the other.
    """
    folders: dict[int, Path] = {}
    infos: dict[int, Mapping[str, Any]] = {}

    def obtain(member: int) -> Artifact:
        def make_with_rest(folder: Path) -> Mapping[str, Any]:
            # `obtain` holds this unit's lock while `make` runs, so all units of the group are locked before any is
            # trained
            folders[member] = folder
            for other in units:
                if other > member and other not in folders:
                    obtain(other)
            if not infos:
                infos.update(make(folders))
            return infos[member]

        slug, config, parents = units[member]
        return runtime.store.obtain("member", slug, config, parents, make_with_rest, version=VERSION, divided=True)

    return {member: obtain(member) for member in units}


def member_settings(config: ProxyConfig, runtime: Runtime, member: int, epoch: int) -> dict[str, Any]:
    """Return the settings that determine a member's epoch.

    They contain neither the number of members M nor the snapshots. With a constant learning rate they do not contain
    the number of epochs either.
    """
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


def train_member_epoch(
    runtime: Runtime,
    config: ProxyConfig,
    inputs: ProxyInputs,
    settings: Mapping[str, Any],
    previous: Artifact | None,
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Train one member for one epoch, write the epoch's files to `folder`, and return the artifact's `info`.

    With `proxy.collect=during_training` the files include the norms of the epoch's steps.

    Args:
        settings: from `member_settings`; they name the member and the epoch.
        previous: the artifact of the epoch before, from which this epoch starts; None for the first epoch.

    Raises:
        GradsiftError: the learning rate is 0 throughout the epoch.
    """
    one = _member_epoch(runtime, config, inputs, (settings, previous, folder))
    with adapter(inputs.backbone, config.lora, one.lora_seed, runtime.compute) as adapted:
        callbacks = one.callbacks(adapted, advance)
        info = train_epoch(adapted, inputs, one.optimization, one.plan, one.start, folder, runtime.compute, callbacks)
    return info | one.write(inputs)


def train_members_epoch(
    runtime: Runtime,
    config: ProxyConfig,
    inputs: ProxyInputs,
    units: Sequence[Unit],
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Train several members side by side for one epoch, and write files as `train_member_epoch` does.

    Returns:
        The `info` of each unit's artifact, in the order of the units.
    """
    from gradsift.proxy.together import train_together

    epochs = [_member_epoch(runtime, config, inputs, unit) for unit in units]
    with lanes(inputs.backbone.model, config.lora, [one.lora_seed for one in epochs]) as made:
        infos = train_together(made, inputs, epochs, runtime.compute, advance)
    return [info | one.write(inputs) for info, one in zip(infos, epochs, strict=True)]


def _member_epoch(runtime: Runtime, config: ProxyConfig, inputs: ProxyInputs, unit: Unit) -> MemberEpoch:
    # imported in the functions that train: Lightning takes seconds to import, and most runs reuse their trainings
    from gradsift.proxy.together import MemberEpoch

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
    start_step = len(plan) * (epoch - 1)
    if not optimization.mean_rate(start_step, start_step + len(plan)):
        raise GradsiftError(
            f"proxy.warmup_steps={config.warmup_steps} starts at a learning rate of 0, and epoch {epoch} has that one "
            "step alone, so its snapshot would be of untrained weights; give proxy.warmup_steps=0 or a smaller "
            "proxy.batch_size"
        )
    # Each epoch has its own seed, so an epoch that starts from the artifact of the epoch before needs no random state
    # of the process that trained it.
    start = EpochStart(start_step, derive_seed(runtime.seed, "dropout", member, epoch), previous)
    lora_seed = derive_seed(runtime.seed, "lora", 0 if config.ensemble == "bootstrap" else member)
    return MemberEpoch(plan, optimization, start, lora_seed, folder, config.collect == "during_training")


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
    """Return the positions of the examples that a bootstrap member trains on, the same in every epoch.

    They are `count` draws with replacement from range(count).
    """
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", member))
    draws: list[int] = rng.integers(count, size=count).tolist()
    return draws
