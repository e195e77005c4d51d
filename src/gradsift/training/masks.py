"""Dropout masks that belong to an example, not to a batch.

The mask of an example in a layer depends on the example's key, the layer and the place in the sequence. So the mask
does not depend on the batch, the padding, the rank or the device, and a checkpointed block that is computed again has
the same mask.

Shape letters: B rows of a batch, T tokens, I inputs of a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gradsift.gradients.probes import ADAPTER
from gradsift.training.random_bits import bits, mixed


class PassedRows:
    """What the adapted layers of a model need to know about the rows of a batch, besides the activations."""

    def __init__(self) -> None:
        self.drops = False  # whether layers drop inputs
        self.keys: torch.Tensor | None = None  # (B,) int64, the keys of the rows' dropout masks
        self.lanes: torch.Tensor | None = None  # (B,) int64, ascending: the adapter of each row, if there are several
        self.counts: list[int] = []  # rows of each adapter


class RowDropout(nn.Dropout):
    """Dropout with a mask for each row; torch's own dropout unless the input is (B, T, I) and there are B keys."""

    def __init__(self, probability: float, rows: PassedRows, layer: str) -> None:
        """
        Args:
            rows: the `PassedRows` that all layers of a model share.
            layer: the layer's name, by which its masks differ from the masks of other layers.
        """
        super().__init__(probability)
        self._rows = rows
        self._place = zlib.crc32(layer.encode())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self._rows.keys
        if not self.training or keys is None or x.dim() != 3 or len(x) != len(keys):
            return super().forward(x)
        tokens = torch.arange(x.shape[1], device=x.device)
        inputs = torch.arange(x.shape[2], device=x.device)
        drawn = bits(mixed(keys + (self._place << 32))[:, None] + tokens, inputs)  # (B, T, I)
        kept = (drawn >= round(self.p * 2**32) - 2**31).to(x.dtype)
        return x * kept.mul_(1 / (1 - self.p))


def drop_by_row(layers: Iterable[tuple[str, Any]]) -> PassedRows:
    """Replace the dropout of the adapted layers by `RowDropout`, and return the `PassedRows` that they share."""
    rows = PassedRows()
    for name, layer in layers:
        if isinstance(dropout := layer.lora_dropout[ADAPTER], nn.Dropout):
            layer.lora_dropout[ADAPTER] = RowDropout(dropout.p, rows, name)
            rows.drops = True
    return rows
