"""The cost of work: tokens that pass through models, memory and time.

Forward tokens are the real tokens (no padding) that pass forward through a model on this machine, each once per pass,
whether a backward pass follows or not. Generation counts the tokens of the prompt and the generated tokens that are fed
back into the model. A batch that is repeated because memory ran out counts once. The tokens of a judge behind an
endpoint are not counted. Of an interrupted unit of work, only the tokens of the process that finished it are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

WORK_COLUMNS = ("made", "reused", "seconds", "optimizer_steps", "forward_tokens", "saved_steps", "saved_tokens")
_open: list[list[int]] = []  # the count of each unit of work in progress in this process, the innermost last


def passed(tokens: int) -> None:
    """Count tokens that have just passed through a model, for the innermost unit of work in progress."""
    if _open:
        _open[-1][0] += tokens


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count the forward tokens of one unit of work; yield a function that returns the count, also after the block."""
    count = [0]
    _open.append(count)
    try:
        yield lambda: count[0]
    finally:
        _open.pop()


def duration(seconds: float) -> str:
    """Return a time as text, such as `12 min`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_resident_gb() -> float | None:
    """Return the peak resident memory of this process so far in GB (10^9 bytes), or None if it is not known.

    On Linux the peak includes the memory that the parent process (a notebook, say) held when it started this process.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def work_of(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the sums, by `WORK_COLUMNS`, over units of work given as entries of `stages` in one or several `run.json`.

    A unit that several runs reused counts once for each run. The steps and tokens that were
    spent to make it count as saved once for each of these runs.
    """
    total: dict[str, float] = dict.fromkeys(WORK_COLUMNS, 0)
    for stage in stages:
        total["reused" if stage["reused"] else "made"] += 1
        for name in WORK_COLUMNS[2:]:
            total[name] += stage.get(name, 0)
    total["seconds"] = round(total["seconds"], 3)
    return total
