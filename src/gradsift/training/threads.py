"""How many threads torch's kernels use on the CPU.

The threads of a kernel wait for each other by spinning. On a machine that is busy with other work, a single thread more
than there are free cores makes a step take many times longer. So `compute.threads=auto` uses the cores that are free.
"""

from __future__ import annotations

import functools
import os

import joblib
import psutil
import torch

from gradsift.config import ComputeConfig
from gradsift.training.device import device_of

_TORCH_THREADS = torch.get_num_threads()  # torch's own choice, before any run sets another number
_MEASURED_FOR = 0.25  # seconds


@functools.cache
def busy_cores() -> float:
    """Return how many cores of this machine are busy with other work, measured once per process.

    With a single measurement, all jobs of a sweep in one process use the same number of threads, on which the last
    digits of results depend.
    """
    return float(psutil.cpu_percent(interval=_MEASURED_FOR)) / 100 * (os.cpu_count() or 1)


def threads_of(compute: ComputeConfig) -> int:
    """Return the number of threads that `compute.threads` asks for.

    `auto` is the smallest of torch's own choice, the cores that affinity and cgroup allow, and the free cores. This
    number is divided by the number of ranks that run on this CPU; the result is at least 1. If `compute.threads` is
    None, or is `auto` while OMP_NUM_THREADS is set, the number is torch's own choice, which follows OMP_NUM_THREADS.
    """
    if compute.threads is None or (compute.threads == "auto" and "OMP_NUM_THREADS" in os.environ):
        return _TORCH_THREADS
    if compute.threads != "auto":
        return int(compute.threads)
    free = round((os.cpu_count() or 1) - busy_cores())
    processes = compute.devices if device_of(compute).type == "cpu" else 1
    return max(1, min(_TORCH_THREADS, int(joblib.cpu_count()), free) // processes)


def set_threads(compute: ComputeConfig) -> None:
    """Set the number of torch's threads in this process."""
    torch.set_num_threads(threads_of(compute))


def threads_in_words(compute: ComputeConfig) -> str:
    """Return a phrase such as "1 thread (auto: 2 cores, 1.0 of 2 busy with other work)"."""
    number = torch.get_num_threads()
    words = f"{number} thread{'s' if number > 1 else ''}"
    if compute.threads != "auto" or "OMP_NUM_THREADS" in os.environ:
        return words
    return f"{words} (auto: {joblib.cpu_count()} cores, {busy_cores():.1f} of {os.cpu_count()} busy with other work)"
