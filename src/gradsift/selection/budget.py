"""The number of examples to keep, and its division among C clusters, components or groups."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from gradsift.errors import ConfigError


def budget(alpha: float, count: int) -> int:
    """Return floor(alpha x count) without rounding error: alpha is read as a decimal number (0.29 of 100 is 29).

    Raises:
        ConfigError: the result is 0.
    """
    size = int(Fraction(str(alpha)) * count)
    if size == 0:
        if not count:
            raise ConfigError("there are no rows to select from; look at rejected.jsonl or at the scores' reasons")
        least = math.ceil(10**6 / count) / 10**6
        raise ConfigError(f"alpha={alpha} of {count:,} rows selects no example; give at least {least:g}")
    return size


def proportional_shares(size: int, weights: np.ndarray) -> np.ndarray:
    """Divide `size` into whole shares (C,) int64 in proportion to `weights` (C,), which are not negative.

    The shares add up to `size`. They are rounded with the largest-remainder method; if remainders are equal, the
    share with the lower index is rounded up first.
    """
    quotas = size * weights / weights.sum()
    shares: np.ndarray = np.floor(quotas).astype(np.int64)
    # a quota of 3 may be computed as 2.9999999999: its rounded remainder is 1, the largest, so it is rounded up
    remainders = np.round(quotas - shares, 9)
    shares[np.argsort(-remainders, kind="stable")[: size - shares.sum()]] += 1
    return shares


def capped_shares(size: int, weights: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Divide `size` into whole shares (C,) int64 in proportion to `weights` (C,), at most `capacities` (C,) each.

    What exceeds a group's capacity goes to the other groups in proportion to their weights; a group of weight 0 gets
    nothing. The shares add up to `size`, or to less if the groups with a weight are full.
    """
    shares: np.ndarray = np.minimum(proportional_shares(size, weights), capacities)
    # each round hands out all that is left or fills a group, so there are at most C rounds
    while (left := size - int(shares.sum())) and (room := np.flatnonzero((shares < capacities) & (weights > 0))).size:
        shares[room] += np.minimum(proportional_shares(left, weights[room]), (capacities - shares)[room])
    return shares


def equal_shares(size: int, capacities: np.ndarray) -> np.ndarray:
    """Divide `size` into whole shares (C,) int64 that are as equal as `capacities` (C,) allow.

    A remainder that cannot be divided equally goes to the first groups, 1 each. The shares add up to `size`, or to the
    sum of the capacities if that is smaller.
    """
    shares = np.zeros(len(capacities), dtype=np.int64)
    while (left := size - int(shares.sum())) and (room := np.flatnonzero(shares < capacities)).size:
        each = left // len(room)
        takers, take = (room, each) if each else (room[:left], 1)
        shares[takers] = np.minimum(shares[takers] + take, capacities[takers])
    return shares
