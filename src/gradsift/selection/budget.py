"""How many examples are kept."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from gradsift.errors import ConfigError


def budget(alpha: float, count: int) -> int:
    """floor(alpha x count), exact: alpha is taken as the decimal number it is written as (0.29 of 100 is 29).

    Raises:
        ConfigError: the budget is empty.
    """
    size = int(Fraction(str(alpha)) * count)
    if size == 0:
        if not count:
            raise ConfigError("there are no rows to select from; look at rejected.jsonl or at the scores' reasons")
        least = math.ceil(10**6 / count) / 10**6
        raise ConfigError(f"alpha={alpha} of {count:,} rows selects no example; give at least {least:g}")
    return size


def proportional_shares(size: int, weights: np.ndarray) -> np.ndarray:
    """(C,) int64 that add up to `size`, in proportion to `weights` (C,) >= 0: largest remainder, ties to the first."""
    quotas = size * weights / weights.sum()
    shares: np.ndarray = np.floor(quotas).astype(np.int64)
    remainders = np.round(quotas - shares, 9)  # of 2.9999999999, a 3 that was rounded, it is 1 and so the largest
    shares[np.argsort(-remainders, kind="stable")[: size - shares.sum()]] += 1
    return shares


def equal_shares(size: int, capacities: np.ndarray) -> np.ndarray:
    """(C,) int64 as equal as `capacities` (C,) allow: what one cannot hold goes to the others, the rest to the first.

    They add up to `size`, or to all that the capacities hold.
    """
    shares = np.zeros(len(capacities), dtype=np.int64)
    while (left := size - int(shares.sum())) and (room := np.flatnonzero(shares < capacities)).size:
        each = left // len(room)
        takers, take = (room, each) if each else (room[:left], 1)
        shares[takers] = np.minimum(shares[takers] + take, capacities[takers])
    return shares
