"""Training of the proxy ensemble and collection of its per-sample gradient norms.

GRADFILTERING (arXiv 2601.13697), section 3: M adapters on one frozen backbone differ by their
initial A and their data order; each minimises its own loss. Member m's parameters after e epochs
are theta^(m,e), and ||g_i^(m,e)|| is the norm of example i's gradient there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from gradsift.artifacts import Artifact
from gradsift.config import ProxyConfig
from gradsift.data.batching import epoch_batches
from gradsift.data.tokens import Encoded
from gradsift.gradients.callback import GradientNorms
from gradsift.gradients.norms_table import write_norms
from gradsift.runtime import Runtime, derive_seed
from gradsift.training import lora
from gradsift.training.backbones import Backbone
from gradsift.training.curves import write_curve
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.finetuning import Finetuning, Optimization, ShowProgress, fit
from gradsift.training.residual import residual_precision

VERSION = 3


class ProxyInputs(NamedTuple):
    """What every member trains on."""

    backbone: Backbone
    encoded: Sequence[Encoded]
    row_indices: Sequence[int]  # of the examples that `Encoded.row` counts, in the data's source
    budget: TokenBudget  # of all members: what one of them learnt of the memory holds for the next


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
        **runtime.compute.numerics,
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
    backbone, encoded, row_indices, budget = inputs
    lengths = [len(example.input_ids) for example in encoded]
    plan = epoch_batches(lengths, config.batch_size, config.batching, derive_seed(runtime.seed, "order", member, epoch))
    adapted = lora.add_adapter(backbone.model, config.lora, derive_seed(runtime.seed, "lora", member))
    try:
        adapted.to(device_of(runtime.compute))
        module = Finetuning(
            adapted,
            Optimization(
                config.learning_rate,
                config.weight_decay,
                config.schedule,
                config.warmup_steps,
                total_steps=len(plan) * config.total_epochs,
            ),
            budget,
            backbone.pad_id,
            first_step=len(plan) * (epoch - 1),
        )
        if previous is not None:
            lora.load_adapter(adapted, previous.path)
            module.restore_from = previous.file("optimizer.safetensors")
        norms = GradientNorms(adapted, encoded, config.collect, row_indices=row_indices, progress=advance)
        keeper = OptimizerKeeper(folder / "optimizer.safetensors")
        torch.manual_seed(derive_seed(runtime.seed, "dropout", member, epoch))
        steps = fit(
            module,
            encoded,
            plan,
            compute=runtime.compute,
            row_indices=row_indices,
            callbacks=[ShowProgress(advance), norms, keeper],
        )
        lora.save_adapter(adapted, folder)
        write_norms(folder, norms.table(), encoded)
        write_curve(folder, module.curve)
        sizes = lora.factor_sizes(adapted)
    finally:
        lora.remove_adapter(adapted)
    residual = residual_precision(backbone.model)
    return {"optimizer_steps": steps, "rows": len(encoded), "residual": residual, **sizes}


class OptimizerKeeper(L.Callback):
    """Writes the optimiser's state when the training ends, for the next epoch to go on from."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_end(self, trainer: Any, module: Any) -> None:
        lora.save_optimizer(trainer.optimizers[0], lora.trainable_parameters(module.model), self._path)
