"""The cost of work: tokens that pass through models, memory and time.

Forward tokens are the real tokens (no padding) that pass through a model on this machine. A token counts once per
forward pass, whether a backward pass follows or not. In generation, the prompt's tokens and those generated tokens that
are fed back into the model count. A batch that is repeated because memory ran out counts once. The tokens of a judge
behind an endpoint are not counted. If a unit of work was interrupted and continued, only the tokens of the process that
finished the unit are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

WORK_COLUMNS = ("made", "reused", "seconds", "optimizer_steps", "forward_tokens", "saved_steps", "saved_tokens")
_open: list[list[int]] = []  # the count of each unit of work in progress in this process, the innermost last


def passed(tokens: int) -> None:
    """Add tokens that have just passed through a model to the count of the innermost `counting` block, if any."""
    if _open:
        _open[-1][0] += tokens


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count the forward tokens of the block, which is one unit of work.

    Yields a function that returns the count so far; it can be called after the block too.
    """
    count = [0]
    _open.append(count)
    try:
        yield lambda: count[0]
    finally:
        _open.pop()


def duration(seconds: float) -> str:
    """Return a time in seconds as text with a fitting unit, such as `12 min`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_resident_gb() -> float | None:
    """Return the peak resident memory of this process so far in GB (10^9 bytes), or None on Windows.

    On Linux the peak includes the memory that the parent process (a notebook, say) held when it started this process.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def work_of(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the sum of each of `WORK_COLUMNS` over units of work.

    A unit that several runs reused counts once for each of these runs. The optimiser steps and tokens that were spent
    to make the unit are also added to `saved_steps` and `saved_tokens` once for each of these runs.

    Args:
        stages: the units of work, as in `stages` of `run.json`, from one run or several.
    """
    total: dict[str, float] = dict.fromkeys(WORK_COLUMNS, 0)
    for stage in stages:
        total["reused" if stage["reused"] else "made"] += 1
        for name in WORK_COLUMNS[2:]:
            total[name] += stage.get(name, 0)
    total["seconds"] = round(total["seconds"], 3)
    return total
