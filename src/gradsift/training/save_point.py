"""Save points, from which a training that was interrupted within an epoch continues.

The batches of a training are known before it starts, so a save point holds the number of steps taken and everything
that they changed: adapter, optimiser state, curve, token budget and the state of the callbacks. (Dropout masks need no
state, because they are seeded anew in each step.) A resumed training takes the remaining steps and ends with the same
bytes as an uninterrupted training.

A save point is one safetensors file with a checksum. A new save point is written beside the old file and then renamed,
so after a kill at any moment either the old or the new file is there, complete. A damaged save point is ignored, and
the training starts again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradsift.manifests import UNFINISHED
from gradsift.training import lora

if TYPE_CHECKING:
    from gradsift.training.modules import AdapterModule

POINT_FILE = "training.safetensors"
_FORMAT = 4  # raised when the content of the file changes: files of other formats are ignored
_SHARE = 0.01  # share of the time that saving may take, whatever `compute.save_every` asks for


class SavePoint(L.Callback):
    """Saves the state of a training at intervals, and restores it when the training is started again.

    It must be the last callback, so that all other callbacks have processed a step before their state is saved.
    """

    def __init__(self, folder: Path, every: float, steps: int, callbacks: Sequence[L.Callback]) -> None:
        """
        Args:
            folder: the folder of the artifact in the making.
            every: least number of seconds between two save points; 0 for a save point after each step.
            steps: the number of steps of the whole training.
            callbacks: the callbacks whose `state_dict` (tensors and numbers) is saved and restored.
        """
        self._path = folder / UNFINISHED / POINT_FILE
        self._every = every
        self._steps = steps
        self._callbacks = {callback.state_key: callback for callback in callbacks}
        self._wait = every
        self._saved_at = time.monotonic()
        self._tensors: dict[str, torch.Tensor] = {}  # still to be restored
        self._states: dict[str, dict[str, Any]] = {}  # numbers of the callbacks, still to be restored

    def restore(self, module: AdapterModule) -> None:
        """Restore adapter, curve and token budget of a fresh `module` from the save point, if there is an intact one.

        The states of the optimiser and of the callbacks are restored when the training starts.
        """
        if not self._path.exists():
            return
        point = _read(self._path)
        if point is None:
            unit = self._path.parents[1].name
            module.budget.say(f"  the save point of {unit} is damaged or of another version; its training begins anew")
            return
        self._tensors, about = point
        self._states = about["callbacks"]
        with torch.no_grad():
            for name, parameter in lora.trainable_parameters(module.model).items():
                parameter.copy_(self._tensors[f"adapter:{name}"])
        module.resume(self._tensors["curve:losses"], self._tensors["curve:tokens"].tolist())
        module.budget.tokens = min(module.budget.tokens, about["tokens"])  # memory may have run out before the kill

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._saved_at = time.monotonic()
        if not self._tensors:
            return
        parameters = lora.trainable_parameters(module.model)
        lora.restore_optimizer(module.optimizer, parameters, _part(self._tensors, "optimizer"))
        for key, callback in self._callbacks.items():
            state = self._states.get(key, {}) | _part(self._tensors, key)
            if state:
                callback.load_state_dict(state)
        self._tensors, self._states = {}, {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if not trainer.is_global_zero:
            return
        # no save point after the last step: a training that resumed with no step left would not end in the usual way
        is_last = len(module.curve) == self._steps
        if is_last or time.monotonic() - self._saved_at < self._wait:
            return
        started = time.monotonic()
        self._save(module)
        self._saved_at = time.monotonic()
        if self._every:
            self._wait = max(self._every, (self._saved_at - started) / _SHARE)

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
        _write(self._path, tensors, about)


def steps_saved(folder: Path) -> int:
    """Return the number of steps of the save point in the folder of an artifact in the making; 0 if there is none."""
    point = _read(folder / UNFINISHED / POINT_FILE)
    return 0 if point is None else int(point[1]["steps"])


def _write(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    # clones: safetensors refuses tensors that share memory
    plain = {name: torch.clone(each.cpu(), memory_format=torch.contiguous_format) for name, each in tensors.items()}
    text = json.dumps(about, allow_nan=False)
    save_file(plain, fresh, metadata={"about": text, "checksum": _checksum(plain, text)})
    with fresh.open("rb+") as stream:
        os.fsync(stream.fileno())
    fresh.replace(path)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return a save point's tensors and its other values; None if it is missing, damaged or of another format."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, UnicodeDecodeError):  # the file was truncated when a machine went down, or edited
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
    """Return the tensors whose key is `<prefix>:<name>`, by `<name>`."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}:")}
