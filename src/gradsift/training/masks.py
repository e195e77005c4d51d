"""Random bits that depend on a seed and a position, and dropout masks that depend on the example and not on the batch.

A random generator with a state gives numbers that depend on how a batch is divided and on the order in which a device
draws. Here each random number is a hash. Hashes are computed in integer arithmetic, which is the same on every device,
because it wraps around and never rounds. A dropout mask is a function of the example's key, the layer, the position of
the token and the index of the input. So the mask does not depend on the batch, the padding, the rank or the device, and
a checkpointed block has the same mask when it is recomputed.

Shape letters: B rows of a batch, T tokens, I inputs of a layer, N columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gradsift.gradients.probes import ADAPTER

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64
_ODD = 0x7FEB352D  # of lowbias32 (Wellons)


def mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Return the splitmix64 hash (Steele, Lea and Flood, 2014), int64, of each of the int64 `numbers`."""
    x = numbers + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def bits(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return random numbers (..., N) over the whole range of int32, one for each pair of a row and a column.

    A random number is the product of a hash of its row and a hash of its column, with the bits mixed once more. Its
    upper bits are more random than its lower bits.

    Args:
        rows: (...) int64, any numbers.
        columns: (N,) int64, any numbers.
    """
    drawn = _odd(rows)[..., None] * _odd(columns)
    drawn ^= (drawn >> 15).bitwise_and_(0x1FFFF)
    return drawn.mul_(_ODD)


def _odd(numbers: torch.Tensor) -> torch.Tensor:
    """Return odd int32 hashes of `numbers`."""
    return ((mixed(numbers) & 0xFFFFFFFF) - 2**31).to(torch.int32) | 1


class PassedRows:
    """What the adapted layers of a model need to know about the rows of a batch besides their activations."""

    def __init__(self) -> None:
        self.drops = False  # whether any layer has dropout
        self.keys: torch.Tensor | None = None  # (B,) int64, the keys of the rows' dropout masks
        self.lanes: torch.Tensor | None = None  # (B,) int64, ascending: the adapter of each row, if there are several
        self.counts: list[int] = []  # rows of each adapter


class RowDropout(nn.Dropout):
    """Dropout of the inputs (B, T, I), with a mask for each row that depends on the row's key.

    If `rows.keys` is not set, or does not have one key for each of the B rows, torch's dropout is used.
    """

    def __init__(self, probability: float, rows: PassedRows, layer: str) -> None:
        super().__init__(probability)
        self._rows = rows
        self._place = zlib.crc32(layer.encode())  # the masks of different layers differ

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
