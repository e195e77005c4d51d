"""A random projection with entries +-1/sqrt(D): inner products stay what they were, on average.

The matrix (P, D) is made of tiles of 1024 parameters, each drawn from the seed and its own number alone, so
it never has to be in memory, and no result depends, beyond rounding, on how many rows or tiles are worked on
at once. The error of an inner product has a standard deviation of at most sqrt((|x|^2 |y|^2 + <x,y>^2) / D)
(Johnson and Lindenstrauss; Achlioptas for signs).

Spelling out the signs costs one pass over P x D for every call, as much as the products of about 25 rows (one
core): give it as many rows as memory holds. Only bits go to a GPU, a 32nd of the signs, which spells them out itself.

Shape letters: B rows, P parameters, D dimensions, S parameters of a tile.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

_TILE = 1024  # parameters; part of what the projection is
_STRIP = 512  # dimensions; 2 MB of signs, which a core multiplies with while they are in its cache
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
        for tile in range(-(-self.size // _TILE)):
            self._add(found, gradients, tile)
        return found.div_(self.dimensions**0.5)

    def seconds(self, rows: int, device: torch.device) -> float:
        """What a call with so many rows takes, by that of one tile."""
        trial = torch.zeros(rows, min(self.size, _TILE), device=device)
        for _ in range(2):  # the first time allocates
            start = time.perf_counter()
            self._add(trial.new_zeros(rows, self.dimensions), trial, 0).sum().item()  # waits for a GPU
            taken = time.perf_counter() - start
        return taken * -(-self.size // _TILE)

    def _add(self, found: torch.Tensor, gradients: torch.Tensor, tile: int) -> torch.Tensor:
        """Add to `found` (B, D) what a tile makes of its parameters, times sqrt(D)."""
        columns = gradients[:, tile * _TILE : (tile + 1) * _TILE]
        width = _STRIP if gradients.device.type == "cpu" else self.dimensions
        for start, signs in self.signs(tile, gradients.device, width):
            found[:, start : start + width].addmm_(columns, signs[: columns.shape[1]])
        return found

    def signs(self, tile: int, device: torch.device, width: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The tile's rows of the matrix times sqrt(D), +1 and -1 in float32 on `device`, a strip after the other.

        Args:
            width: dimensions of a strip, a multiple of 8 where it is not all of them.

        Yields:
            the first dimension of a strip, and the strip (S, at most `width`)
        """
        drawn = self._bytes(tile)
        spell = on_cpu if device.type == "cpu" else functools.partial(on_device, device=device)
        for start in range(0, self.dimensions, width):
            stop = min(start + width, self.dimensions)
            spelt = spell(drawn[:, start // 8 : -(-stop // 8)])
            yield start, spelt.reshape(_TILE, -1)[:, : stop - start]

    def _bytes(self, tile: int) -> np.ndarray:
        """(S, bytes) random bytes; a row's do not depend on how many there are of others."""
        words = -(-self.dimensions // 64)  # a row begins with a new word
        drawn = np.random.PCG64([self.seed, tile]).random_raw(_TILE * words).astype("<u8", copy=False)
        return drawn.view(np.uint8).reshape(_TILE, -1)


def on_cpu(drawn: np.ndarray) -> torch.Tensor:
    """The signs (..., 8) that `drawn` (...) uint8 stand for."""
    return torch.from_numpy(_SIGNS.take(drawn, axis=0))  # twice as fast here as torch's own


def on_device(drawn: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same, looked up on `device`."""
    table = torch.from_numpy(_SIGNS).to(device)
    places = torch.from_numpy(drawn.reshape(-1)).to(device).int()
    return table.index_select(0, places).view(*drawn.shape, 8)
