"""A random projection with entries +-1/sqrt(D): inner products stay what they were, on average.

The matrix (P, D) is made of tiles of 1024 parameters, each drawn from the seed and its own number alone, so
it never has to be in memory, and no result depends, beyond rounding, on how many rows or tiles are worked on
at once. The error of an inner product has a standard deviation of at most sqrt((|x|^2 |y|^2 + <x,y>^2) / D)
(Johnson and Lindenstrauss; Achlioptas for signs).

Spelling out the signs costs one pass over P x D for every call, as much as the products of about ten rows:
give it as many rows as memory holds. Only bits go to a GPU, a 32nd of the signs, which spells them out itself.

Shape letters: B rows, P parameters, D dimensions, S parameters of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_TILE = 1024  # parameters; part of what the projection is
# the eight signs that a byte stands for
_SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1


@dataclass(frozen=True)
class Projection:
    """From `size` (P) to `dimensions` (D)."""

    size: int
    dimensions: int
    seed: int

    def __call__(self, gradients: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 of `gradients` (B, P) float32, on their device."""
        found = gradients.new_zeros(len(gradients), self.dimensions)
        for tile, start in enumerate(range(0, self.size, _TILE)):
            columns = gradients[:, start : start + _TILE]
            found.addmm_(columns, self.signs(tile, gradients.device)[: columns.shape[1]])
        return found.div_(self.dimensions**0.5)

    def signs(self, tile: int, device: torch.device) -> torch.Tensor:
        """(S, D) float32 of +1 and -1 on `device`: the tile's rows of the matrix, times sqrt(D)."""
        drawn = self._bytes(tile)
        spelt = on_cpu(drawn) if device.type == "cpu" else on_device(drawn, device)
        return spelt.view(_TILE, -1)[:, : self.dimensions]

    def _bytes(self, tile: int) -> np.ndarray:
        """Random bytes, of which each row of the tile takes a share that is the same for every row."""
        words = -(-self.dimensions // 64)  # a row begins with a new word, so that it does not depend on others
        drawn = np.random.PCG64([self.seed, tile]).random_raw(_TILE * words).astype("<u8", copy=False)
        return drawn.view(np.uint8)


def on_cpu(drawn: np.ndarray) -> torch.Tensor:
    """The signs (n, 8) that `drawn` (n,) uint8 stand for."""
    return torch.from_numpy(_SIGNS.take(drawn, axis=0))  # twice as fast here as torch's own


def on_device(drawn: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same, looked up on `device`."""
    table = torch.from_numpy(_SIGNS).to(device)
    return table.index_select(0, torch.from_numpy(drawn).to(device).int())
