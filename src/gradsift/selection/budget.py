"""How many examples are kept."""

from __future__ import annotations

import math
from fractions import Fraction

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
