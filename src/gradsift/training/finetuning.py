"""Training with Lightning's `Trainer`, and the callbacks that every training has.

An interrupted training resumes from its last save point. All batches of a training are known before it starts, so a
save point only needs to hold the number of optimiser steps taken and the state that these steps changed: the adapter,
the optimiser's state, the training curve, the token budget and the state of the callbacks. Dropout masks need no state,
because each step seeds its own masks. A resumed training takes the remaining steps and writes the same bytes as an
uninterrupted training.

A save point is one safetensors file with a checksum. A new save point is written to a second file, which then replaces
the old file by renaming. So if the process is killed at any moment, a complete file is left, either the old or the new
one. If the file is damaged in another way, the training starts from the beginning.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from gradsift.config import ComputeConfig
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.manifests import UNFINISHED
from gradsift.training import lora, parallel
from gradsift.training.device import device_of
from gradsift.training.head import require_finite
from gradsift.training.modules import AdapterModule, Step

POINT_FILE = "training.safetensors"
_FORMAT = 4  # raised when the content of the file changes; files of other formats are ignored


def fit(
    module: AdapterModule,
    encoded: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    *,
    compute: ComputeConfig,
    callbacks: Sequence[L.Callback] = (),
    folder: Path | None = None,
) -> int:
    """Train `module`: take one optimiser step for each batch of `plan`, in order.

    Args:
        encoded: the examples to train on.
        plan: for each optimiser step, the positions of its examples in `encoded`.
        folder: the folder of the artifact that is being made, in which the save points are written; if None, no save
            points are written.

    Returns:
        The number of optimiser steps that this process took. `module.curve` also has the steps that interrupted runs
        took before.

    Raises:
        GradsiftError: a loss or gradient norm is not finite (the message names the rows), a weight is not finite, or
            memory runs out even with a single example at once.
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
    """Restore `module` from the save point in `folder`, if there is one, and return the callbacks for its training.

    The returned list has the given `callbacks`, the callback that stops at non-finite values and, unless `folder` is
    None, the callback that writes save points.
    """
    callbacks = [StopAtNonFinite(encoded), *callbacks]
    if folder is not None:
        point = SavePoint(folder, compute.save_every, len(plan), callbacks)
        point.restore(module)
        callbacks.append(point)
    return callbacks


def train(module: AdapterModule, loader: Any, compute: ComputeConfig, callbacks: Sequence[L.Callback]) -> None:
    """Train `module` on the steps that `loader` yields."""
    strategy: Strategy | str = "auto"
    if module.is_divided:
        strategy = ModelParallelStrategy(data_parallel_size=parallel.size(), tensor_parallel_size=1)
    elif parallel.size() > 1:
        # A layer may take no part in a pass (experts). Weights need no broadcast: every rank has loaded the same ones.
        strategy = DDPStrategy(find_unused_parameters=True, init_sync=False)
    trainer = quiet_trainer(compute, strategy, callbacks)
    with keyboard_interrupts():
        trainer.fit(module, loader)
    if trainer.strategy.root_device.type == "cuda":
        gc.collect()  # Lightning's reference cycles would keep the model on the device
        torch.cuda.empty_cache()


def require_finite_weights(module: AdapterModule) -> None:
    if not all(bool(p.isfinite().all()) for p in lora.trainable_parameters(module.model).values()):
        raise GradsiftError(
            "the adapter's weights are not finite after the last step, though all losses were; lower the learning "
            "rate, or take compute.precision=float32"
        )


def step_counts(module: AdapterModule, taken: int) -> dict[str, int]:
    """Return how many optimiser steps a training took.

    `optimizer_steps` counts all steps, `resumed_steps` only those that interrupted runs took.

    Args:
        taken: number of steps that this process took.
    """
    return {"optimizer_steps": len(module.curve), "resumed_steps": len(module.curve) - taken}


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C. Lightning would raise SystemExit and leave the signal ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def quiet_trainer(compute: ComputeConfig, strategy: Strategy | str, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """Return a Lightning trainer for one pass over a loader; the trainer itself writes, logs and prints nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # a loader over tokens in memory needs no workers, and the frozen backbone belongs in evaluation mode
    ignored = r".*(does not have many workers|module\(s\) in eval mode|LeafSpec|no `val_dataloader`).*"
    warnings.filterwarnings("ignore", ignored)
    shared, has_gpu = isinstance(strategy, Strategy), device_of(compute).type == "cuda"
    own_device: Any = [torch.cuda.current_device()] if has_gpu else 1
    return L.Trainer(
        accelerator="gpu" if has_gpu else "cpu",
        strategy=strategy,
        devices=compute.devices if shared else own_device,
        num_nodes=compute.num_nodes if shared else 1,
        use_distributed_sampler=False,  # the modules divide each step over the ranks
        inference_mode=False,  # a validation pass computes gradients
        precision="32-true",  # nothing is cast: the frozen weights were loaded in their precision
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


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

    Each check makes the host wait for the device. So the check runs only every 16 steps, before each save point and at
    the end of the training.
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
        """Check the recent losses and gradient norms, so that no save point contains a NaN; return an empty state."""
        self._check()
        return {}

    def _check(self) -> None:
        names = {"losses": "training loss", "norm_A": "gradient norm", "norm_B": "gradient norm"}
        for outputs in self._recent:
            for name in names.keys() & outputs.keys():
                require_finite(names[name], outputs["rows"], outputs[name], self._encoded)
        self._recent.clear()


class SavePoint(L.Callback):
    """Saves the state of a training in save points, and restores the state when the training is started again.

    A `SavePoint` must be the last callback, so that all other callbacks have processed a step before their state is
    saved.

    Args:
        folder: the folder of the artifact that is being made.
        every: least number of seconds between two save points. If 0, there is a save point after each optimiser step
            except the last.
        steps: number of optimiser steps of the whole training.
        callbacks: the callbacks whose `state_dict` (tensors and numbers) is saved and restored.
    """

    def __init__(self, folder: Path, every: float, steps: int, callbacks: Sequence[L.Callback]) -> None:
        self._path = folder / UNFINISHED / POINT_FILE
        self._every = every
        self._steps = steps
        self._callbacks = {callback.state_key: callback for callback in callbacks}
        self._saved_at = time.monotonic()

    def restore(self, module: AdapterModule) -> None:
        """Restore a fresh `module` and the callbacks from the save point, if there is an intact one."""
        if not self._path.exists():
            return
        point = _read(self._path)
        if point is None:
            unit = self._path.parents[1].name
            module.budget.say(f"  the save point of {unit} is damaged or of another version; its training begins anew")
            return
        tensors, about = point
        with torch.no_grad():
            for name, parameter in lora.trainable_parameters(module.model).items():
                parameter.copy_(tensors[f"adapter:{name}"])
        module.optimizer_state = _part(tensors, "optimizer")
        module.resume(tensors["curve:losses"], tensors["curve:tokens"].tolist())
        module.budget.tokens = min(module.budget.tokens, about["tokens"])  # halved, if memory had run out
        for key, callback in self._callbacks.items():
            if state := about["callbacks"].get(key, {}) | _part(tensors, key):
                callback.load_state_dict(state)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if not trainer.is_global_zero:
            return
        # no save point after the last step: Lightning calls no callback at the end of a training without steps
        is_last = len(module.curve) == self._steps
        if is_last or time.monotonic() - self._saved_at < self._every:
            return
        self._save(module)
        self._saved_at = time.monotonic()

    def _save(self, module: Any) -> None:
        parameters = lora.trainable_parameters(module.model)
        losses, tokens = module.curve_so_far()
        tensors = {f"adapter:{name}": parameter.detach() for name, parameter in parameters.items()}
        optimizer = lora.optimizer_tensors(module.optimizer, parameters)
        tensors |= {f"optimizer:{name}": tensor for name, tensor in optimizer.items()}
        tensors |= {"curve:losses": losses, "curve:tokens": tokens}
        states: dict[str, dict[str, Any]] = {}
        for key, callback in self._callbacks.items():
            for name, value in callback.state_dict().items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{key}:{name}"] = value
                else:
                    states.setdefault(key, {})[name] = value
        about = {"format": _FORMAT, "steps": len(tokens), "tokens": module.budget.tokens, "callbacks": states}
        text = json.dumps(about, allow_nan=False)
        # clones: safetensors refuses tensors that share memory
        plain = {name: torch.clone(each.cpu(), memory_format=torch.contiguous_format) for name, each in tensors.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        save_file(plain, fresh, metadata={"about": text, "checksum": _checksum(plain, text)})
        with fresh.open("rb+") as stream:
            os.fsync(stream.fileno())
        fresh.replace(self._path)


def steps_saved(folder: Path) -> int:
    """Return how many optimiser steps had been taken at the save point in `folder`; 0 if there is no save point.

    Args:
        folder: the folder of an artifact that is not finished.
    """
    point = _read(folder / UNFINISHED / POINT_FILE)
    return 0 if point is None else int(point[1]["steps"])


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return the tensors and the other values of a save point.

    The result is None if the file is missing, damaged or of another format version.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, UnicodeDecodeError):  # a truncated or changed file
        return None
    text = metadata.get("about", "{}")
    if metadata.get("checksum") != _checksum(tensors, text):
        return None
    about = json.loads(text)
    return (tensors, about) if about.get("format") == _FORMAT else None


def _checksum(tensors: Mapping[str, torch.Tensor], about: str) -> str:
    """Return the SHA-256 of `about` and of the names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(about.encode("utf-8"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose keys have the form `<prefix>:<name>`, with `<name>` as the new key."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}:")}
