"""Training with Lightning's `Trainer`, and the callbacks of every training."""

from __future__ import annotations

import gc
import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader

from gradsift.config import ComputeConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.training import lora, parallel
from gradsift.training.device import device_of
from gradsift.training.head import require_finite
from gradsift.training.modules import AdapterModule, Step, TargetFinetuning
from gradsift.training.save_point import SavePoint


def fit(
    module: AdapterModule,
    encoded: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    *,
    compute: ComputeConfig,
    callbacks: Sequence[L.Callback] = (),
    folder: Path | None = None,
) -> int:
    """Take an optimiser step for each batch of `plan` (positions in `encoded`), in order.

    Args:
        folder: the folder of the artifact in the making. Save points are written there, and the training continues from
            the save point that an interrupted run left there. With None there are no save points.

    Returns:
        The number of optimiser steps that this process took; `module.curve` also has those of interrupted runs.

    Raises:
        GradsiftError: a loss or gradient norm is not finite (the message names the rows), a weight is not finite, or
            memory does not hold a single example.
    """
    callbacks = with_save_point(module, encoded, plan, callbacks, compute, folder)
    done = len(module.curve)
    loader: Any = DataLoader(encoded, batch_sampler=plan[done:], collate_fn=Step)  # type: ignore[arg-type]
    train(module, loader, compute, callbacks)
    require_finite_weights(module)
    return len(module.curve) - done


def with_save_point(
    module: AdapterModule,
    encoded: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    callbacks: Sequence[L.Callback],
    compute: ComputeConfig,
    folder: Path | None,
) -> list[L.Callback]:
    """Restore `module` from the save point in `folder`, if there is one, and return all callbacks of its training."""
    callbacks = [StopAtNonFinite(encoded), *callbacks]
    if folder is not None:
        point = SavePoint(folder, compute.save_every, len(plan), callbacks)
        point.restore(module)
        callbacks.append(point)
    return callbacks


def train(module: AdapterModule, loader: Any, compute: ComputeConfig, callbacks: Sequence[L.Callback]) -> None:
    """Train `module` on the steps that `loader` yields."""
    trainer = quiet_trainer(compute, strategy_of(compute, module), callbacks)
    with keyboard_interrupts():
        trainer.fit(module, loader)
    if trainer.strategy.root_device.type == "cuda":
        gc.collect()  # Lightning's reference cycles would keep the model on the device
        torch.cuda.empty_cache()


def require_finite_weights(module: AdapterModule) -> None:
    """Raise a `GradsiftError` if a trained weight is not finite."""
    if not all(bool(p.isfinite().all()) for p in lora.trainable_parameters(module.model).values()):
        raise GradsiftError(
            "the adapter's weights are not finite after the last step, though all losses were; lower the learning "
            "rate, or take compute.precision=float32"
        )


def step_counts(module: AdapterModule, taken: int) -> dict[str, int]:
    """Return the number of optimiser steps, and how many of them interrupted runs took.

    Args:
        taken: the number of steps that this process took.
    """
    return {"optimizer_steps": len(module.curve), "resumed_steps": len(module.curve) - taken}


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, where Lightning would raise SystemExit and leave the signal ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def quiet_trainer(compute: ComputeConfig, strategy: Strategy | str, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Return a trainer for one pass over a loader; the trainer itself writes, logs and prints nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # a loader over tokens in memory needs no workers; the frozen backbone is in evaluation mode on purpose
    for message in (
        ".*does not have many workers.*",
        r".*module\(s\) in eval mode.*",
        ".*LeafSpec.*",
        ".*no `val_dataloader`.*",
    ):
        warnings.filterwarnings("ignore", message)
    shared, has_gpu = isinstance(strategy, Strategy), device_of(compute).type == "cuda"
    own_device: Any = [torch.cuda.current_device()] if has_gpu else 1
    return L.Trainer(
        accelerator="gpu" if has_gpu else "cpu",
        strategy=strategy,
        devices=compute.devices if shared else own_device,
        num_nodes=compute.num_nodes if shared else 1,
        use_distributed_sampler=False,  # the modules divide each step over the ranks
        inference_mode=False,  # a validation pass computes gradients too
        precision="32-true",  # frozen weights were loaded in their precision; nothing is cast
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def strategy_of(compute: ComputeConfig, module: AdapterModule) -> Strategy | str:
    """Return Lightning's strategy for a training: auto with one process, FSDP2 for a divided target, else DDP."""
    if parallel.size() == 1:
        return "auto"
    if isinstance(module, TargetFinetuning) and module.is_divided:
        return ModelParallelStrategy(data_parallel_size=parallel.size(), tensor_parallel_size=1)
    # a layer may take no part in a pass (experts); every rank has loaded the same weights, so none are broadcast
    return DDPStrategy(find_unused_parameters=True, init_sync=False)


class ShowProgress(L.Callback):
    """Advances a progress bar by the number of examples of each step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._done = 0  # examples

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._done += len(batch.examples)
        self._advance(len(batch.examples))

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        self._advance(self._done)


class StopAtNonFinite(L.Callback):
    """Stops a training if a loss or gradient norm is NaN or infinite.

    Losses and norms are checked only every 16 steps, before each save point and at the end, because a check makes the
    host wait for the device.
    """

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = encoded
        self._recent: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._recent.append(outputs)
        if len(self._recent) == 16:
            self._check()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._check()

    def state_dict(self) -> dict[str, Any]:
        """Return no state, but check the recent losses and norms first: no save point may contain a NaN."""
        self._check()
        return {}

    def _check(self) -> None:
        names = {"losses": "training loss", "norm_A": "gradient norm", "norm_B": "gradient norm"}
        for outputs in self._recent:
            for name in names.keys() & outputs.keys():
                require_finite(names[name], outputs["rows"], outputs[name], self._encoded)
        self._recent.clear()
