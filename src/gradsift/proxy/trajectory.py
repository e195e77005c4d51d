"""The path of an adapter during its training, as points in D = 64 dimensions.

The points are written to `trajectory.safetensors`, beside the adapter's weights.

A point is a random projection of the update B A over all layers. The factors A and B themselves are not projected: A is
drawn anew for each member and stays near its initial value, so the members' factors are far apart from the start. The
members' updates, in contrast, all start at zero. Coordinate k is the sum over the layers of u_k^T B A v_k / sqrt(D),
where u_k and v_k are vectors of random signs, the same for all members. Distances between updates are preserved up to
the error of D random projections, and B A is never formed. (arXiv 2601.13697, Fig. 1, shows the adapters by t-SNE.)

Shape letters: P points, D dimensions, R rank, I inputs and O outputs of an adapted layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file

from gradsift.gradients.probes import ADAPTER
from gradsift.runtime import derive_seed
from gradsift.training import lora
from gradsift.training.optimization import TRAJECTORY_FILE

DIMENSIONS = 64
POINTS = 16  # per epoch


class Trajectory(L.Callback):
    """Records the projected update after evenly spaced optimiser steps, and before the first step of the first epoch.

    The callback draws from none of the training's random streams, so it does not change the training.
    """

    def __init__(self, first_step: int, steps: int, folder: Path) -> None:
        """
        Args:
            first_step: number of optimiser steps in earlier epochs.
            steps: number of optimiser steps in this epoch.
            folder: gets the file with `points` (P, D) float32 and `steps` (P,), the number of optimiser steps that
                had been taken at each point since the first epoch began.
        """
        self._first = first_step
        self._wanted = {round(steps * part / POINTS) for part in range(1, POINTS + 1)} - {0}
        self._folder = folder
        self._done = 0  # steps of this epoch
        self._steps: list[int] = []
        self._points: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._layers = [(layer, *_signs(name, layer)) for name, layer in lora.lora_layers(module.model)]
        if self._first == 0 and not self._steps:
            self._record()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self._done += 1
        if self._done in self._wanted:
            self._record()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        save_file(self._tensors(), self._folder / TRAJECTORY_FILE)

    @torch.no_grad()
    def _record(self) -> None:
        point = torch.zeros(DIMENSIONS)
        for layer, left, right in self._layers:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            # u^T B A v = sum over r of (u^T B)_r (A v)_r
            outward = left.to(b) @ b  # (D, R)
            inward = right.to(a) @ a.T  # (D, R)
            point += (outward * inward).sum(1).float().cpu()
        self._steps.append(self._first + self._done)
        self._points.append(point / DIMENSIONS**0.5)

    def _tensors(self) -> dict[str, torch.Tensor]:
        points = torch.stack(self._points) if self._points else torch.zeros(0, DIMENSIONS)
        return {"steps": torch.tensor(self._steps, dtype=torch.int64), "points": points}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"done": torch.tensor(self._done), **self._tensors()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = int(state_dict["done"])
        self._steps = state_dict["steps"].tolist()
        self._points = list(state_dict["points"])


def _signs(name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the random signs u (D, O) and v (D, I) of a layer: -1 or 1, int8."""
    # seeded by the layer's name: every member, and a resumed training, is projected on the same u and v
    generator = np.random.default_rng(derive_seed("trajectory", name))
    sizes = (layer.lora_B[ADAPTER].weight.shape[0], layer.lora_A[ADAPTER].weight.shape[1])
    left, right = (torch.from_numpy(generator.choice(np.array([-1, 1], np.int8), (DIMENSIONS, n))) for n in sizes)
    return left, right
