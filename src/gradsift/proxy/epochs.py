"""Training of an adapter on the proxy's backbone for one epoch; used for the ensemble and the warm-up of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.journal import Journal
from gradsift.runtime import Advance, Runtime
from gradsift.training import lora
from gradsift.training.backbones import Backbone
from gradsift.training.curves import write_curve
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.optimization import Optimization

if TYPE_CHECKING:
    from lightning import Callback

    from gradsift.training.modules import ProxyMember

OPTIMIZER_FILE = "optimizer.safetensors"


class ProxyInputs(NamedTuple):
    """Backbone and examples that every adapter trains on."""

    backbone: Backbone
    encoded: Sequence[Encoded]
    budget: TokenBudget  # shared by all adapters: after memory has run out, all take fewer tokens per pass


class EpochStart(NamedTuple):
    """The state from which an epoch starts."""

    first_step: int  # optimiser steps of earlier epochs
    dropout_seed: int
    previous: Artifact | None  # the epoch before; None for the first


def member_table(
    runtime: Runtime,
    stage: str,
    file: str,
    config: LoraConfig,
    member: Artifact,
    load: Callable[[], ProxyInputs],
    columns: Callable[[Any, ProxyInputs, Advance, Journal], Mapping[str, np.ndarray]],
    *,
    passes: int,
    version: int,
) -> Artifact:
    """Return the artifact of the table `file`, which `columns` computes from the examples at a member's weights.

    Args:
        stage: names the artifact and the progress bar.
        member: the artifact of a member's epoch, which contains the adapter.
        load: called only if the table has to be made.
        columns: computes the table from the adapted model, its inputs, a progress function and a journal.
        passes: how many times `columns` passes over the examples.
    """
    slug = member.path.name.rsplit("-", 1)[0]

    def make(folder: Path) -> Mapping[str, Any]:
        inputs = load()
        with (
            adapter(inputs.backbone, config, 0, runtime.compute) as adapted,
            runtime.display.task(f"{stage} of {slug}", passes * len(inputs.encoded)) as advance,
        ):
            lora.load_adapter(adapted, member.path)
            table = columns(adapted, inputs, advance, runtime.journal(folder))
        pq.write_table(pa.table(table), folder / file)
        return {"rows": len(inputs.encoded)}

    return runtime.store.obtain(stage, slug, {}, [member], make, version=version)


@contextmanager
def adapter(backbone: Backbone, config: LoraConfig, seed: int, compute: ComputeConfig) -> Iterator[Any]:
    """Yield the backbone with a fresh adapter, on the device; the adapter is removed afterwards."""
    adapted = lora.add_adapter(backbone.model, config, seed)
    try:
        yield adapted.to(device_of(compute))
    finally:
        # also after an error: all members, and the stages after them, share this backbone
        lora.remove_adapter(adapted)


def train_epoch(
    adapted: Any,
    inputs: ProxyInputs,
    optimization: Optimization,
    plan: Sequence[Sequence[int]],
    start: EpochStart,
    folder: Path,
    compute: ComputeConfig,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """Train on the batches of `plan` (positions in `inputs.encoded`); write adapter, optimiser state and curve.

    Returns:
        The counts `optimizer_steps`, `resumed_steps` (steps that interrupted runs had taken) and `rows`, and the
        Frobenius norms of the adapter's A and B over all layers, `size_A` and `size_B`.
    """
    # imported in the functions that train: Lightning takes seconds to import, and most runs reuse their trainings
    from gradsift.training.finetuning import fit

    module = start_epoch(adapted, inputs, optimization, start)
    callbacks = [*callbacks, optimizer_keeper(folder)]
    steps = fit(module, inputs.encoded, plan, compute=compute, callbacks=callbacks, folder=folder)
    return write_epoch(module, inputs, steps, folder)


def start_epoch(adapted: Any, inputs: ProxyInputs, optimization: Optimization, start: EpochStart) -> ProxyMember:
    """Return the module that trains an epoch, with weights and optimiser state of the epoch before if there is one."""
    from gradsift.training.modules import ProxyMember

    pad_id = inputs.backbone.pad_id
    module = ProxyMember(adapted, optimization, inputs.budget, pad_id, start.first_step, start.dropout_seed)
    if start.previous is not None:
        lora.load_adapter(adapted, start.previous.path)
        # a path and not the state, because Lightning makes the optimiser when the training starts
        module.restore_from = start.previous.file(OPTIMIZER_FILE)
    return module


def optimizer_keeper(folder: Path) -> Callback:
    """Return a callback that writes the optimiser's state after the training; the next epoch continues from it."""
    from lightning.pytorch.callbacks import LambdaCallback

    def save(trainer: Any, module: Any) -> None:
        lora.save_optimizer(module.optimizer, lora.trainable_parameters(module.model), folder / OPTIMIZER_FILE)

    return LambdaCallback(on_train_end=save)


def write_epoch(module: ProxyMember, inputs: ProxyInputs, steps: int, folder: Path) -> dict[str, Any]:
    """Write adapter and curve after `steps` steps of this process, and return what `train_epoch` returns."""
    from gradsift.training.finetuning import step_counts

    lora.save_adapter(module.model, folder)
    write_curve(folder, module.curve)
    return {**step_counts(module, steps), "rows": len(inputs.encoded), **lora.factor_sizes(module.model)}
