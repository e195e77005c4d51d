"""The largest value allowed for each integer option. A larger value is taken for a typing error.

Each bound is far above what was ever published or can be computed; a value above it could exhaust the memory. No bound
depends on the machine, because the jobs of a sweep may run on another machine than the one that checks the config.
"""

from __future__ import annotations

from gradsift.errors import ConfigError

_SEED = (2**32 - 1, "the largest seed that numpy and scikit-learn take")
_TEXT = (2**24, "more than the context of any model")
_BATCH = (2**16, "more than any training or generation takes at once")
_EPOCHS = (10_000, "which nobody could train")
MOST: dict[str, tuple[int, str]] = {  # full name of an option, or its last part: bound, reason in errors
    "seed": _SEED,
    "projection_seed": _SEED,
    "max_length": _TEXT,
    "max_new_tokens": _TEXT,
    "max_tokens": _TEXT,
    "batch_size": _BATCH,
    "epochs": _EPOCHS,
    "snapshots": _EPOCHS,
    "steps": (1_000_000, "which nobody could train; the batches of all steps are known before the first"),
    "warmup_steps": (1_000_000, "more than the most steps"),
    "members": (1000, "as every member is trained by itself; the paper has 5"),
    "rank": (4096, "above the ranks that were ever published; beyond a layer's smaller side a rank adds nothing"),
    "shards": (10_000, "more jobs than a sweep may have"),
    "shard": (10_000, "more jobs than a sweep may have"),
    "size": (10_000_000, "as the embedded world is made in memory"),
    "benchmark_items": (1_000_000, "as the embedded world is made in memory"),
    "dimensions": (2**20, "above which a projection saves nothing"),
    "concurrency": (1000, "as each request has a thread"),
    "retries": (1000, "which would last for days"),
    "clusters": (1_000_000, "more than k-means could tell apart"),
    "threads": (4096, "more than any machine's"),
    "devices": (1024, "more than any machine's"),
    "num_nodes": (4096, "more machines than share one store"),
    "target_set.limit": (1_000_000, "as the embedded world is made in memory"),
    "tokens": (2**30, "more than any memory holds at once"),
}
_OTHERS = (10**12, "more than any data has")


def require_bound(option: str, value: int) -> None:
    """Raise ConfigError if `value` is above the bound of the option."""
    most, why = MOST.get(option) or MOST.get(option.rpartition(".")[2], _OTHERS)
    if value > most:
        digits = round(value.bit_length() * 0.30103)  # log10(2); Python does not print a number of thousands of digits
        shown = str(value) if digits < 30 else f"(a number of about {digits:,} digits)"
        raise ConfigError(f"{option}={shown} is more than {most:,}, {why}; give less")


def require_confidence(confidence: float) -> None:
    """Raise ConfigError if the option `--confidence` of a command is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ConfigError(f"--confidence {confidence:g} is not between 0 and 1")
