"""One epoch of an adapter on the proxy's backbone: shared by the ensemble and the warm-up of gradient features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.training import lora
from gradsift.training.backbones import Backbone
from gradsift.training.curves import write_curve
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.optimization import Optimization

if TYPE_CHECKING:
    from lightning import Callback

OPTIMIZER_FILE = "optimizer.safetensors"


class ProxyInputs(NamedTuple):
    """Backbone and examples that every adapter trains on."""

    backbone: Backbone
    encoded: Sequence[Encoded]
    budget: TokenBudget  # shared by all adapters: once memory ran out, all use fewer tokens


class EpochStart(NamedTuple):
    """The state from which an epoch starts."""

    first_step: int  # optimiser steps of earlier epochs
    dropout_seed: int
    previous: Artifact | None  # the epoch before


@contextmanager
def adapter(backbone: Backbone, config: LoraConfig, seed: int, compute: ComputeConfig) -> Iterator[Any]:
    """Yield the backbone with a fresh adapter, on the device; the adapter is removed afterwards."""
    adapted = lora.add_adapter(backbone.model, config, seed)
    try:
        yield adapted.to(device_of(compute))
    finally:
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
    """Train over the steps of `plan` (positions in `inputs.encoded`); write adapter, optimiser state and curve.

    Returns:
        optimizer_steps, resumed_steps, rows, and the sizes of the adapter's factors.
    """
    # here, as in every function that trains: Lightning takes seconds to import, and most runs reuse their trainings
    from lightning.pytorch.callbacks import LambdaCallback

    from gradsift.training.finetuning import fit, step_counts
    from gradsift.training.modules import ProxyMember

    backbone, encoded, budget = inputs
    module = ProxyMember(adapted, optimization, budget, backbone.pad_id, start.first_step, start.dropout_seed)
    if start.previous is not None:
        lora.load_adapter(adapted, start.previous.path)
        module.restore_from = start.previous.file(OPTIMIZER_FILE)
    # the next epoch continues from the optimiser's state
    keeper = LambdaCallback(
        on_train_end=lambda trainer, member: lora.save_optimizer(
            trainer.optimizers[0], lora.trainable_parameters(member.model), folder / OPTIMIZER_FILE
        )
    )
    steps = fit(module, encoded, plan, compute=compute, callbacks=[*callbacks, keeper], folder=folder)
    lora.save_adapter(adapted, folder)
    write_curve(folder, module.curve)
    return {**step_counts(module, steps), "rows": len(encoded), **lora.factor_sizes(adapted)}
