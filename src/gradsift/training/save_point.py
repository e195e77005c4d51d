"""Where a training goes on from after a kill: a point within the epoch, saved as it goes.

The batches of a training are known before it begins, so a point is the number of steps taken and all that they
changed: adapter, optimiser state, the curve, the token budget, and the state of the callbacks. (Dropout masks are
seeded by the step.) What goes on from it takes the steps that are left, and ends with the same bytes.

One safetensors file, written beside the last one and put in its place: a kill at any moment leaves one of the two. It
has a checksum: a point that a crash or a disk changed is dropped, and the training begins anew.
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
_FORMAT = 4  # raised when the file changes: an older one is passed over
_SHARE = 0.01  # of the time that saving may take, whatever `compute.save_every` says


class SavePoint(L.Callback):
    """Saves the point that a training has come to, and puts a fresh one back to it.

    It stands last among the callbacks, so that the others have seen a step before it is saved.
    """

    def __init__(self, folder: Path, every: float, steps: int, callbacks: Sequence[L.Callback]) -> None:
        """
        Args:
            folder: of the artifact in the making.
            every: seconds between two points; 0 for one after each step.
            steps: of the whole training.
            callbacks: whose `state_dict` (tensors and numbers) is saved and given back to `load_state_dict`.
        """
        self._path = folder / UNFINISHED / POINT_FILE
        self._every = every
        self._steps = steps
        self._callbacks = {callback.state_key: callback for callback in callbacks}
        self._wait = every
        self._saved_at = time.monotonic()
        self._found: dict[str, torch.Tensor] = {}  # what is still to be put back
        self._states: dict[str, dict[str, Any]] = {}  # numbers of the callbacks, likewise

    def restore(self, module: AdapterModule) -> None:
        """Put adapter, curve and token budget of a fresh `module` back to the point, if there is one.

        The rest follows when the training begins.
        """
        if not self._path.exists():
            return
        found = _read(self._path)
        if found is None:
            unit = self._path.parents[1].name
            module.budget.say(f"  the save point of {unit} is damaged or of another version; its training begins anew")
            return
        self._found, about = found
        self._states = about["callbacks"]
        with torch.no_grad():
            for name, parameter in lora.trainable_parameters(module.model).items():
                parameter.copy_(self._found[f"adapter:{name}"])
        module.resume(self._found["curve:losses"], self._found["curve:tokens"].tolist())
        module.budget.tokens = min(module.budget.tokens, about["tokens"])  # memory may have run out before the kill

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._saved_at = time.monotonic()
        if not self._found:
            return
        parameters = lora.trainable_parameters(module.model)
        lora.restore_optimizer(trainer.optimizers[0], parameters, _part(self._found, "optimizer"))
        for key, callback in self._callbacks.items():
            state = self._states.get(key, {}) | _part(self._found, key)
            if state:
                callback.load_state_dict(state)
        self._found, self._states = {}, {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        if not trainer.is_global_zero:
            return
        is_last = len(module.curve) == self._steps  # a training without steps to take would not end as one with them
        if is_last or time.monotonic() - self._saved_at < self._wait:
            return
        started = time.monotonic()
        self._save(trainer, module)
        self._saved_at = time.monotonic()
        if self._every:
            self._wait = max(self._every, (self._saved_at - started) / _SHARE)

    def _save(self, trainer: Any, module: Any) -> None:
        parameters = lora.trainable_parameters(module.model)
        losses, tokens = module.curve_so_far()
        tensors = {f"adapter:{name}": parameter.detach() for name, parameter in parameters.items()}
        tensors |= _named("optimizer", lora.optimizer_tensors(trainer.optimizers[0], parameters))
        tensors |= _named("curve", {"losses": losses, "tokens": tokens})
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
    """Steps of the point that lies in the folder of an artifact in the making; 0 where there is none."""
    found = _read(folder / UNFINISHED / POINT_FILE)
    return 0 if found is None else int(found[1]["steps"])


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
    """Tensors and the rest; None where there is no point, or one that this code cannot go on from."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, UnicodeDecodeError):  # cut short by a machine that went down, or changed
        return None
    text = metadata.get("about", "{}")
    if metadata.get("checksum") != _checksum(tensors, text):
        return None
    about = json.loads(text)
    return (tensors, about) if about.get("format") == _FORMAT else None


def _checksum(tensors: Mapping[str, torch.Tensor], about: str) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256(about.encode("utf-8"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors that `_named` gave this prefix, under their own names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}:")}
