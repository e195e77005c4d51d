"""How many examples are kept."""

from __future__ import annotations

from fractions import Fraction

from gradsift.errors import ConfigError


def budget(alpha: float, count: int) -> int:
    """floor(alpha x count), exact: alpha is taken as the decimal number it is written as (0.29 of 100 is 29).

    Raises:
        ConfigError: the budget is empty.
    """
    size = int(Fraction(str(alpha)) * count)
    if size == 0:
        raise ConfigError(
            f"alpha={alpha} of {count:,} rows selects no example; give at least {1 / count:.6f}".rstrip("0")
            if count
            else f"alpha={alpha} has no rows to select from; look at the reasons in rejected.jsonl or at the scores"
        )
    return size
