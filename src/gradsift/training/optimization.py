"""The optimiser of every training: AdamW, its learning rate, and the loss of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

BETAS = (0.9, 0.999)  # AdamW's betas in every training: its saved state does not hold them


@dataclass(frozen=True)
class Optimization:
    """AdamW, its learning rate over `total_steps` optimiser steps, and the loss of a step.

    The schedules and `loss="token"` are those of transformers' Trainer. The defaults are the proxy's: it minimises the
    loss whose per-sample gradients are taken, and does not clip (GRADFILTERING, section 3).
    """

    learning_rate: float
    weight_decay: float
    schedule: str  # constant, linear or cosine (both to zero at total_steps)
    warmup_steps: int
    total_steps: int
    loss: str = "example"  # mean of the examples' means; token: mean over the response tokens of the step
    max_grad_norm: float | None = None  # L2, over all parameters, of a step's gradient

    def factor(self, step: int) -> float:
        """Return the fraction of the learning rate at `step`, counted from 0, with w warm-up steps of T in all.

        Warm-up: step / w. Then, with p = (step - w) / (T - w): 1 (constant), 1 - p (linear), (1 + cos(pi p)) / 2.
        """
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def mean_rate(self, first: int, last: int) -> float:
        """Return the mean learning rate over the steps from `first` to before `last`."""
        return self.learning_rate * sum(self.factor(step) for step in range(first, last)) / (last - first)
