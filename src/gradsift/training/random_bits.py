"""Counter-based random bits: they depend on a seed and a position, but not on the device or the order of computation.

The numbers of a generator with a state depend on how a batch is divided and on the order in which a device draws. Here
each number is a function of a seed and of its position, in integer arithmetic, which wraps around and never rounds.

Shape letters: N columns.
"""

from __future__ import annotations

import torch

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64
_ODD = 0x7FEB352D  # of lowbias32 (Wellons)


def mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Return the splitmix64 hash (Steele, Lea and Flood, 2014) of each of `numbers`, int64."""
    x = numbers + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def bits(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return random numbers (..., N) over the whole range of int32, one for each pair of a row and a column.

    The upper bits are more random than the lower ones. A number is the product of its row's and its column's hash,
    mixed once more. Computing the numbers takes five passes over the result.

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
