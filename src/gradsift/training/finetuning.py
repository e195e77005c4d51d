"""The one Lightning module that trains adapters, for the proxy and for the target.

Shape letters: B examples of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import inspect
import logging
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gradsift.config import ComputeConfig
from gradsift.data.batching import Batch, collate
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.training import lora


@dataclass(frozen=True)
class Optimization:
    """AdamW and its learning rate over `total_steps` optimiser steps."""

    learning_rate: float
    weight_decay: float
    schedule: str  # constant or linear (to zero at total_steps)
    warmup_steps: int
    total_steps: int

    def factor(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return warmup
        return warmup * max(0.0, 1.0 - step / max(1, self.total_steps))


def response_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of each example's response tokens, in nats, float32.

    Every example is weighed by its own tokens alone, so a loss does not depend on the batch.

    Returns:
        losses: (B,)
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(_forward_of(model)).parameters:
        inputs["position_ids"] = batch.position_ids  # so that the padding side changes nothing
    logits = model(**inputs).logits[:, :-1]  # (B, T-1, V)
    targets, weights = batch.input_ids[:, 1:], batch.loss_weights[:, 1:]
    predicted = weights > 0  # float32 only where a token is predicted
    token_losses = torch.zeros_like(weights)
    token_losses[predicted] = F.cross_entropy(logits[predicted].float(), targets[predicted], reduction="none")
    return (token_losses * weights).sum(1) / weights.sum(1)


def _forward_of(model: Any) -> Any:
    return model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward


class Finetuning(L.LightningModule):
    """Trains the trainable parameters of `model` on the mean of the examples' losses."""

    def __init__(self, model: nn.Module, optimization: Optimization, first_step: int = 0) -> None:
        super().__init__()
        self.model = model
        self.optimization = optimization
        self.first_step = first_step  # optimiser steps that earlier epochs took
        self.restore_from: Path | None = None  # an earlier epoch's optimiser state
        self.curve: list[dict[str, float]] = []  # one entry a batch

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, torch.Tensor]:
        losses = response_losses(self.model, batch)
        return {"loss": losses.mean(), "losses": losses.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        # kept on the device: reading a loss here would wait for it every step
        self.curve.append({"loss": outputs["losses"].mean(), "tokens": batch.attention_mask.sum()})  # type: ignore[dict-item]

    def configure_optimizers(self) -> Any:
        parameters = lora.trainable_parameters(self.model)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=self.optimization.learning_rate, weight_decay=self.optimization.weight_decay
        )
        if self.restore_from is not None:
            lora.load_optimizer(optimizer, parameters, self.restore_from)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.optimization.factor(self.first_step + step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(
    module: Finetuning,
    encoded: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    *,
    pad_id: int,
    compute: ComputeConfig,
    row_indices: Sequence[int],
    callbacks: Sequence[L.Callback] = (),
    accumulate: int = 1,
) -> int:
    """Train over the batches of `plan` (positions in `encoded`) in the order given.

    Args:
        row_indices: of the examples that `Encoded.row` counts, in the data's source; for errors.

    Returns:
        The number of optimiser steps taken.

    Raises:
        GradsiftError: a loss that is not finite; names the rows.
    """
    loader: Any = DataLoader(
        encoded,  # type: ignore[arg-type]
        batch_sampler=plan,  # type: ignore[arg-type]
        collate_fn=lambda examples: collate(examples, pad_id),
    )
    handler = signal.getsignal(signal.SIGINT)
    trainer = quiet_trainer(compute, [StopAtNonFiniteLoss(row_indices), *callbacks], accumulate)
    try:
        trainer.fit(module, loader)
    except SystemExit:  # Lightning turns Ctrl-C into an exit and leaves the signal ignored
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    if trainer.strategy.root_device.type == "cuda":
        gc.collect()  # Lightning's reference cycles would keep the model on the device
        torch.cuda.empty_cache()
    for entry in module.curve:
        entry["loss"], entry["tokens"] = float(entry["loss"]), int(entry["tokens"])
    return int(trainer.global_step)


def quiet_trainer(compute: ComputeConfig, callbacks: list[L.Callback], accumulate: int) -> L.Trainer:
    """A trainer for one pass over a loader that writes, logs and prints nothing by itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # a loader over tokens in memory needs no workers; the frozen backbone is in evaluation mode on purpose
    for message in (".*does not have many workers.*", r".*module\(s\) in eval mode.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    return L.Trainer(
        accelerator="gpu" if device_of(compute).type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if compute.precision == "bfloat16" else "32-true",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class ShowProgress(L.Callback):
    """Advances a bar by the examples of each batch."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._advance(len(batch.rows))


class StopAtNonFiniteLoss(L.Callback):
    """Ends the training at a NaN or infinite loss; looks every 16 batches, so as not to wait for the device."""

    def __init__(self, row_indices: Sequence[int]) -> None:
        self._row_indices = row_indices
        self._recent: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._recent.append((batch.rows, outputs["losses"]))
        if len(self._recent) == 16:
            self._check()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._check()

    def _check(self) -> None:
        for rows, losses in self._recent:
            require_finite("training loss", rows, losses, self._row_indices)
        self._recent.clear()


def require_finite(what: str, rows: torch.Tensor, values: torch.Tensor, row_indices: Sequence[int]) -> None:
    """Raise a `GradsiftError` that names the rows (of the source) whose value is NaN or infinite."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise GradsiftError(
            f"the {what} of row {', '.join(str(row_indices[int(r)]) for r in rows[bad][:8])} is not finite; lower the "
            "learning rate, or take compute.precision=float32"
        )


def device_of(compute: ComputeConfig) -> torch.device:
    """The device that `compute.device` asks for."""
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise GradsiftError("compute.device=cuda, but torch finds no CUDA device; take compute.device=auto")
    if compute.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")
