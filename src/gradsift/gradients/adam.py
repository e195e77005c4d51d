"""Adam's update for the gradient of one example (LESS, section 3).

    m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2,   Gamma = m' / sqrt(v' + eps)

m and v are the optimiser's moments at the checkpoint. As in the published code, eps is inside the root and there is
no bias correction. An example whose gradient is zero gets the update 0 and not b1 m / sqrt(v' + eps), because m comes
from other examples.

Shape letters: B examples, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from gradsift.errors import GradsiftError
from gradsift.training.optimization import BETAS

EPS = 1e-8


@dataclass(frozen=True)
class AdamState:
    """Adam's first and second moments, (P,) float32 each, in the order of `lora.trainable_parameters`."""

    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def read(cls, path: Path, parameters: Mapping[str, nn.Parameter], device: torch.device) -> AdamState:
        """Return the moments that `lora.save_optimizer` wrote for these parameters.

        Raises:
            GradsiftError: the file has no moments for a parameter, or moments of another shape.
        """
        tensors = load_file(path)
        moments = []
        for kind in ("exp_avg", "exp_avg_sq"):
            parts = []
            for name, parameter in parameters.items():
                moment = tensors.get(f"{kind}:{name}")
                if moment is None or moment.shape != parameter.shape:
                    raise GradsiftError(f"{path.name} holds no Adam moments of {name}; delete {path.parent.name}")
                parts.append(moment.flatten())
            # in the order of the columns of a `GradientPass`
            moments.append(torch.cat(parts).to(device, torch.float32))
        return cls(*moments)

    def adjust(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return Gamma (B, P) for `gradients` (B, P) float32, which are overwritten."""
        silent = ~gradients.any(1)
        # the denominator first, since the numerator overwrites g; a second copy of (B, P) float32 may not fit in memory
        roots = gradients.square().mul_(1 - BETAS[1]).add_(self.second, alpha=BETAS[1]).add_(EPS).sqrt_()
        adjusted = gradients.mul_(1 - BETAS[0]).add_(self.first, alpha=BETAS[0]).div_(roots)
        adjusted[silent] = 0.0
        return adjusted
