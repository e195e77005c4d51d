"""The number of examples to keep, and its division among clusters or components (C)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from gradsift.errors import ConfigError


def budget(alpha: float, count: int) -> int:
    """Return floor(alpha x count), exact for alpha as the decimal number that it is written as (0.29 of 100 is 29).

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
    """Divide `size` in proportion to `weights` (C,) >= 0: (C,) int64, by largest remainder, ties to the first."""
    quotas = size * weights / weights.sum()
    shares: np.ndarray = np.floor(quotas).astype(np.int64)
    remainders = np.round(quotas - shares, 9)  # the remainder of 2.9999999999, a rounded 3, is 1 and the largest
    shares[np.argsort(-remainders, kind="stable")[: size - shares.sum()]] += 1
    return shares


def capped_shares(size: int, weights: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Divide `size` as `proportional_shares` does, but give none more than its capacity (C,): (C,) int64.

    What a group cannot take goes to the other groups in proportion to their weights. The shares add up to `size`, or to
    the capacities of all groups with a weight if that is less.
    """
    shares: np.ndarray = np.minimum(proportional_shares(size, weights), capacities)
    # each round hands out all that is left or fills a group, so there are at most C of them
    while (left := size - int(shares.sum())) and (room := np.flatnonzero((shares < capacities) & (weights > 0))).size:
        shares[room] += np.minimum(proportional_shares(left, weights[room]), (capacities - shares)[room])
    return shares


def equal_shares(size: int, capacities: np.ndarray) -> np.ndarray:
    """Divide `size` as equally as `capacities` (C,) allow: (C,) int64, the remainder to the first.

    The shares add up to `size`, or to the sum of the capacities if that is smaller.
    """
    shares = np.zeros(len(capacities), dtype=np.int64)
    while (left := size - int(shares.sum())) and (room := np.flatnonzero(shares < capacities)).size:
        each = left // len(room)
        takers, take = (room, each) if each else (room[:left], 1)
        shares[takers] = np.minimum(shares[takers] + take, capacities[takers])
    return shares
