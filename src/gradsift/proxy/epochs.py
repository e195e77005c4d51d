"""Trains an adapter on the proxy's backbone for one epoch, for the ensemble and the warm-up of gradient features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file

from gradsift.artifacts import Artifact
from gradsift.config import ComputeConfig, LoraConfig, ProxyConfig
from gradsift.data.tokens import Encoded
from gradsift.runtime import Runtime
from gradsift.training import lora
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.optimization import Optimization, write_curve

if TYPE_CHECKING:
    from lightning import Callback

    from gradsift.training.modules import ProxyMember

OPTIMIZER_FILE = "optimizer.safetensors"


class ProxyInputs(NamedTuple):
    """The backbone and the examples with which every adapter is trained."""

    backbone: Backbone
    encoded: Sequence[Encoded]
    budget: TokenBudget  # shared by all adapters, so after an out-of-memory error all take fewer tokens per pass


class Ensemble(NamedTuple):
    """Runtime, settings and inputs of a proxy ensemble."""

    runtime: Runtime
    config: ProxyConfig
    proxy: Artifact
    examples: Artifact
    load: Callable[[], ProxyInputs]  # called only if an artifact has to be made


class Epoch(NamedTuple):
    """One epoch of an adapter's training."""

    plan: Sequence[Sequence[int]]  # batches, as positions in the examples
    optimization: Optimization
    first_step: int  # optimiser steps of earlier epochs
    lora_seed: int  # of the initial A, before the first epoch
    dropout_seed: int
    previous: Artifact | None  # the previous epoch, from which this one continues; None for the first epoch
    folder: Path  # of the artifact that is being made
    callbacks: Sequence[Callback]

    def start(self, adapted: Any, inputs: ProxyInputs) -> ProxyMember:
        """Return the module that trains the model's active adapter. It continues from `previous`, if there is one."""
        # imported where a training starts: Lightning takes seconds to import, and most runs reuse their trainings
        from gradsift.training.modules import ProxyMember

        pad_id = inputs.backbone.pad_id
        module = ProxyMember(adapted, self.optimization, inputs.budget, pad_id, self.first_step, self.dropout_seed)
        if self.previous is not None:
            lora.load_adapter(adapted, self.previous.path)
            module.optimizer_state = load_file(self.previous.file(OPTIMIZER_FILE))
        return module

    def write(self, module: ProxyMember, inputs: ProxyInputs, steps: int) -> dict[str, Any]:
        """Write the adapter, the optimiser state and the loss curve; this process has taken `steps` optimiser steps.

        Returns:
            The counts `optimizer_steps`, `resumed_steps` (steps that interrupted runs had taken) and `rows`, and the
            Frobenius norms of the adapter's A and B over all layers, `size_A` and `size_B`.
        """
        from gradsift.training.finetuning import step_counts

        parameters = lora.trainable_parameters(module.model)
        lora.save_optimizer(module.optimizer, parameters, self.folder / OPTIMIZER_FILE)
        lora.save_adapter(module.model, self.folder)
        write_curve(self.folder, module.curve)
        return {**step_counts(module, steps), "rows": len(inputs.encoded), **lora.factor_sizes(module.model)}


@contextmanager
def adapter(backbone: Backbone, config: LoraConfig, seed: int, compute: ComputeConfig) -> Iterator[Any]:
    """Yield the backbone with a fresh adapter, on the device; the adapter is removed afterwards."""
    adapted = lora.add_adapter(backbone.model, config, seed)
    try:
        yield adapted.to(device_of(compute))
    finally:
        # also after an error, because all members and later stages use this backbone
        adapted.unload()


def train_epoch(inputs: ProxyInputs, epoch: Epoch, config: LoraConfig, compute: ComputeConfig) -> dict[str, Any]:
    """Train an adapter for one epoch, write its files with `Epoch.write`, and return what `Epoch.write` returns."""
    from gradsift.training.finetuning import fit

    with adapter(inputs.backbone, config, epoch.lora_seed, compute) as adapted:
        module = epoch.start(adapted, inputs)
        plan, callbacks, folder = epoch.plan, epoch.callbacks, epoch.folder
        steps = fit(module, inputs.encoded, plan, compute=compute, callbacks=callbacks, folder=folder)
        return epoch.write(module, inputs, steps)
