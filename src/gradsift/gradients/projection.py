"""A sparse random projection, which preserves inner products in expectation.

Every entry of a gradient is added, with a random sign, to one of the D dimensions of the projection (CountSketch:
Charikar, Chen and Farach-Colton, 2002; feature hashing: Weinberger et al., 2009). Two parameters go to the same
dimension with a probability of at most 1/D. So for two gradients x and y, the standard deviation of the error of <x, y>
is at most

    sqrt((|x|^2 |y|^2 + <x, y>^2) / D)

The same bound holds for a dense matrix of random signs. The parameters are divided into chunks of D: chunk c consists
of the parameters cD to cD + D - 1, and parameter i of a chunk goes to dimension (i + b_c) mod D. The shifts b_c and the
signs are functions of the seed and of the parameter's position (`training/masks.py`), so they are the same on every
device and do not depend on P.

The cost is memory traffic. For each row of P numbers, gathering the numbers, multiplying them by the signs and summing
takes 20 P bytes. (Multiplying a row by a dense matrix would take 2 P D operations.) Drawing the shifts and signs takes
about 60 P bytes per call, for all rows together. Take Llama-2-7B with rank 128 on q, k, v and o (P = 134 million), and
32 rows of 512 tokens in a call. Then the traffic is 3 GB per row. This takes 3 % of the time of the row's backward pass
on an A100 (at 2 TB/s and half of 312e12 bfloat16 operations per second), and 6 % on an H100 (at 3.35 TB/s and half of
990e12).

Shape letters: B rows, P parameters, D dimensions, C chunks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gradsift.training.device import numbers_at_once
from gradsift.training.masks import bits, mixed

_NUMBERS = 2**20  # most numbers of a temporary tensor on a CPU


@dataclass(frozen=True)
class Projection:
    """Projects gradients from `size` (P) to `dimensions` (D) numbers."""

    size: int
    dimensions: int
    seed: int

    def __call__(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return the projection (B, D) float32 of `gradients` (B, P) float32, on their device."""
        rows, width = len(gradients), self.dimensions
        projected = gradients.new_zeros(rows, width)
        at_once = max(1, numbers_at_once(gradients.device, _NUMBERS) // max(1, rows * width))
        for first in range(0, -(-self.size // width), at_once):
            columns = gradients[:, first * width : (first + at_once) * width]
            if lacking := -columns.shape[1] % width:  # only the last chunk is padded, because padding copies
                columns = F.pad(columns, (0, lacking))
            places, signs = self.drawn(first, columns.shape[1] // width, gradients.device)
            picked = columns.index_select(1, places.flatten()).view(rows, -1, width)  # (B, C, D)
            projected += picked.mul_(signs).sum(1)
        return projected

    def drawn(self, first: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which parameter of each chunk goes to each dimension, and with which sign.

        The chunks are `first` to `first + count - 1`.

        Returns:
            The parameters' positions, counted from the first parameter of chunk `first`, (C, D) int32, and their signs,
            (C, D) float32.
        """
        chunks = torch.arange(first, first + count, device=device)  # (C,)
        dimensions = torch.arange(self.dimensions, device=device)
        # the seed is hashed before the chunk is added; otherwise seed 1 would draw for chunk c what seed 0 draws for
        # chunk c + 1
        seeds = mixed(mixed(torch.tensor(self.seed, device=device)) + chunks)
        shifts = ((mixed(seeds) & 0x7FFFFFFF) % self.dimensions).int()
        places = dimensions.int() - shifts[:, None]
        places += (places >> 31).bitwise_and_(self.dimensions)  # adds D to negative places, faster than a remainder
        places += torch.arange(count, device=device, dtype=torch.int32)[:, None] * self.dimensions
        # the sign comes from the top bit, which the hash mixes best: the arithmetic shift returns 0 or -1, and | 1
        # turns these into 1 or -1
        return places, ((bits(seeds, dimensions) >> 31) | 1).float()
