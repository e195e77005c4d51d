"""One epoch of an adapter on the proxy's backbone: what the ensemble and the warm-up of gradient features share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.training import lora
from gradsift.training.backbones import Backbone
from gradsift.training.curves import write_curve
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.finetuning import fit, step_counts
from gradsift.training.modules import Optimization, ProxyMember

OPTIMIZER_FILE = "optimizer.safetensors"


class ProxyInputs(NamedTuple):
    """What every adapter trains on."""

    backbone: Backbone
    encoded: Sequence[Encoded]
    budget: TokenBudget  # of all adapters: what one of them learnt of the memory holds for the next


class EpochStart(NamedTuple):
    """Where an epoch goes on from."""

    first_step: int  # optimiser steps that earlier epochs took
    dropout_seed: int
    previous: Artifact | None  # the epoch before


@contextmanager
def adapter(backbone: Backbone, config: LoraConfig, seed: int, compute: ComputeConfig) -> Iterator[Any]:
    """The backbone with a fresh adapter, on the device; afterwards it is as it was."""
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
    callbacks: Sequence[L.Callback],
) -> dict[str, Any]:
    """Train over the steps of `plan` (positions in `inputs.encoded`); write adapter, optimiser state and curve.

    An epoch that was interrupted goes on within it (see `fit`).

    Returns:
        optimizer_steps, resumed_steps, rows, and the sizes of the adapter's factors.
    """
    backbone, encoded, budget = inputs
    module = ProxyMember(adapted, optimization, budget, backbone.pad_id, start.first_step, start.dropout_seed)
    if start.previous is not None:
        lora.load_adapter(adapted, start.previous.path)
        module.restore_from = start.previous.file(OPTIMIZER_FILE)
    keeper = OptimizerKeeper(folder / OPTIMIZER_FILE)
    callbacks = [*callbacks, keeper]
    steps = fit(module, encoded, plan, compute=compute, callbacks=callbacks, folder=folder)
    lora.save_adapter(adapted, folder)
    write_curve(folder, module.curve)
    return {**step_counts(module, steps), "rows": len(encoded), **lora.factor_sizes(adapted)}


class OptimizerKeeper(L.Callback):
    """Writes the optimiser's state when the training ends, for the next epoch to go on from."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_end(self, trainer: Any, module: Any) -> None:
        lora.save_optimizer(trainer.optimizers[0], lora.trainable_parameters(module.model), self._path)
