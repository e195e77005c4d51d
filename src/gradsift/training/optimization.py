"""The settings with which adapters (proxy members, warm-ups and targets) are trained, and two files of a training.

`curve.jsonl` has a line for each optimiser step. `trajectory.safetensors` has points on the path that an adapter's
update B A (the product of its LoRA matrices) takes during training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

CURVE_FILE = "curve.jsonl"
TRAJECTORY_FILE = "trajectory.safetensors"
BETAS = (0.9, 0.999)  # AdamW's betas for all adapters; gradient features need them too, and saved states lack them


@dataclass(frozen=True)
class Optimization:
    """The settings of AdamW, of its learning rate over `total_steps` optimiser steps, and of the loss of a step.

    The schedules and `loss="token"` work as in transformers' Trainer. The defaults are the settings of the proxy: its
    training minimises the mean of the examples' losses, which are the losses whose per-sample gradients are measured,
    and does not clip gradients (GRADFILTERING, section 3).
    """

    learning_rate: float
    weight_decay: float
    schedule: str  # constant, linear or cosine (both to zero at total_steps)
    warmup_steps: int
    total_steps: int
    loss: str = "example"  # example: mean of the examples' mean losses; token: mean over the step's response tokens
    max_grad_norm: float | None = None  # bound on the L2 norm of a step's gradient over all parameters; None: no bound

    def factor(self, step: int) -> float:
        """Return the learning rate at `step`, counted from 0, as a fraction of `learning_rate`.

        If w of the T steps are warm-up steps, the fraction is step / w during the warm-up. After the warm-up, with
        p = (step - w) / (T - w), the fraction is 1 (constant), 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).
        """
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def mean_rate(self, first: int, last: int) -> float:
        """Return the mean learning rate over the optimiser steps from `first` to `last` - 1."""
        return self.learning_rate * sum(self.factor(step) for step in range(first, last)) / (last - first)


def write_curve(folder: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Write the loss (nats per response token) and the number of tokens, prompts included, of each optimiser step."""
    lines = (json.dumps({"batch": index, **entry}) + "\n" for index, entry in enumerate(curve))
    (folder / CURVE_FILE).write_text("".join(lines), encoding="utf-8")


def read_curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()]


def read_trajectory(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the optimiser steps (P,) and the coordinates (P, D) of the P points of a trajectory.

    `gradsift.proxy.trajectory` explains the points.
    """
    tensors = load_file(folder / TRAJECTORY_FILE)
    return tensors["steps"], tensors["points"]
