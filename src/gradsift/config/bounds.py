"""The most that each whole number of a config can be: beyond it only a slip of the keyboard reaches, and memory ends.

Each bound is far above what was ever published or can be computed; none depends on the machine, as the jobs of a sweep
may run on another one than that which checks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from gradsift.errors import ConfigError

_SEED = (2**32 - 1, "the largest seed that numpy and scikit-learn take")
_TEXT = (2**24, "more than the context of any model")
_BATCH = (2**16, "more than any training or generation takes at once")
_EPOCHS = (10_000, "which nobody could train")
MOST: dict[str, tuple[int, str]] = {  # by the option's name, or by the last part of it
    "seed": _SEED,
    "projection_seed": _SEED,
    "max_length": _TEXT,
    "max_new_tokens": _TEXT,
    "max_tokens": _TEXT,
    "batch_size": _BATCH,
    "epochs": _EPOCHS,
    "snapshots": _EPOCHS,
    "steps": (1_000_000, "which nobody could train; the batches of all are known before the first"),
    "warmup_steps": (1_000_000, "more than the most steps"),
    "members": (1000, "as every member is trained by itself; the paper has 5"),
    "rank": (4096, "above the ranks that were ever published; beyond a layer's smaller side a rank adds nothing"),
    "shards": (10_000, "more jobs than a sweep may have"),
    "shard": (10_000, "more jobs than a sweep may have"),
    "size": (10_000_000, "as the embedded world is made in memory"),
    "benchmark_items": (1_000_000, "as the embedded world is made in memory"),
    "dimensions": (2**20, "above which a projection saves nothing"),
    "bootstrap": (100_000, "beyond which an interval does not change"),
    "concurrency": (1000, "as each has a thread"),
    "retries": (1000, "which would last for days"),
    "clusters": (1_000_000, "more than k-means could tell apart"),
    "threads": (4096, "more than any machine's"),
    "devices": (1024, "more than any machine's"),
    "num_nodes": (4096, "more machines than share one store"),
    "target_set.limit": (1_000_000, "as the embedded world is made in memory"),
    "tokens": (2**30, "more than any memory holds at once"),
}
_OTHERS = (10**12, "more than any data has")


def require_bounds(config: Any) -> None:
    """Refuse a whole number that nothing could come of.

    Args:
        config: a dataclass; what is below it is looked at too. Constants of the user's own methods are not.

    Raises:
        ConfigError: names the option, the value and the bound.
    """
    for option, value in _numbers("", config):
        most, why = MOST.get(option) or MOST.get(option.rpartition(".")[2], _OTHERS)
        if value > most:
            raise ConfigError(f"{option}={_shown(value)} is more than {most:,}, {why}; give less")


def require_resampling(bootstrap: int, confidence: float, seed: int | None) -> None:
    """The same for the options of a command that prints intervals.

    Raises:
        ConfigError: one of them is out of range.
    """
    most, most_seed = MOST["bootstrap"][0], _SEED[0]
    if not 1 <= bootstrap <= most or not 0 < confidence < 1 or not 0 <= (seed or 0) <= most_seed:
        raise ConfigError(
            f"--bootstrap must be at least 1 and at most {most:,}, --confidence between 0 and 1, and --seed from 0 to "
            f"{most_seed:,}"
        )


def _numbers(option: str, value: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers below `value`, each with its dotted name."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(f"{option}.{field.name}".lstrip("."), getattr(value, field.name))
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(option, each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield option, value


def _shown(value: int) -> str:
    """The number, or how long it is: Python refuses to spell out one of thousands of digits."""
    digits = round(value.bit_length() * 0.30103)  # log10(2)
    return str(value) if digits < 30 else f"(a number of about {digits:,} digits)"
