"""A random projection with entries +-1/sqrt(D), which keeps inner products on average.

The standard deviation of an inner product's error is at most sqrt((|x|^2 |y|^2 + <x,y>^2) / D) (Johnson and
Lindenstrauss; Achlioptas for signs). The matrix (P, D) consists of tiles of 1024 parameters, each drawn from the seed
and the tile's number, so it is never whole in memory, and results do not depend on the number of rows or tiles at once
beyond rounding.

Expanding the random bits to signs costs one pass over P x D per call, as much as the products of about 25 rows on one
core: call it with as many rows as memory holds. A GPU receives the bits and expands them itself.

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
# the eight signs of each byte
_SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1


@dataclass(frozen=True)
class Projection:
    """From `size` (P) to `dimensions` (D)."""

    size: int
    dimensions: int
    seed: int

    def __call__(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return the projection (B, D) float32 of `gradients` (B, P) float32, on their device."""
        projected = gradients.new_zeros(len(gradients), self.dimensions)
        for tile in range(-(-self.size // _TILE)):
            self._add(projected, gradients, tile)
        return projected.div_(self.dimensions**0.5)

    def seconds(self, rows: int, device: torch.device) -> float:
        """Estimate the seconds of a call with `rows` rows, from one tile."""
        trial = torch.zeros(rows, min(self.size, _TILE), device=device)
        for _ in range(2):  # the first time allocates
            start = time.perf_counter()
            self._add(trial.new_zeros(rows, self.dimensions), trial, 0).sum().item()  # waits for a GPU
            taken = time.perf_counter() - start
        return taken * -(-self.size // _TILE)

    def _add(self, total: torch.Tensor, gradients: torch.Tensor, tile: int) -> torch.Tensor:
        """Add the projection of a tile's parameters, times sqrt(D), to `total` (B, D)."""
        columns = gradients[:, tile * _TILE : (tile + 1) * _TILE]
        width = _STRIP if gradients.device.type == "cpu" else self.dimensions
        for start, signs in self.signs(tile, gradients.device, width):
            total[:, start : start + width].addmm_(columns, signs[: columns.shape[1]])
        return total

    def signs(self, tile: int, device: torch.device, width: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a tile's rows of the matrix times sqrt(D), +1 and -1 in float32 on `device`, in strips of dimensions.

        Args:
            width: dimensions of a strip; a multiple of 8 unless it is all of them.

        Yields:
            The first dimension of a strip, and the strip (S, at most `width`).
        """
        drawn = self._bytes(tile)
        spell = on_cpu if device.type == "cpu" else functools.partial(on_device, device=device)
        for start in range(0, self.dimensions, width):
            stop = min(start + width, self.dimensions)
            spelt = spell(drawn[:, start // 8 : -(-stop // 8)])
            yield start, spelt.reshape(_TILE, -1)[:, : stop - start]

    def _bytes(self, tile: int) -> np.ndarray:
        """Return random bytes (S, bytes); those of a row do not depend on the number of other rows."""
        words = -(-self.dimensions // 64)  # a row begins with a new word
        drawn = np.random.PCG64([self.seed, tile]).random_raw(_TILE * words).astype("<u8", copy=False)
        return drawn.view(np.uint8).reshape(_TILE, -1)


def on_cpu(drawn: np.ndarray) -> torch.Tensor:
    """Return the signs (..., 8) of the bits of `drawn` (...) uint8."""
    return torch.from_numpy(_SIGNS.take(drawn, axis=0))  # twice as fast here as torch's own


def on_device(drawn: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the signs of `on_cpu`, looked up on `device`."""
    table = torch.from_numpy(_SIGNS).to(device)
    places = torch.from_numpy(drawn.reshape(-1)).to(device).int()
    return table.index_select(0, places).view(*drawn.shape, 8)
