"""The objects that every stage receives besides its config: store, compute settings, progress display and seed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradsift.artifacts import Store
from gradsift.config import ComputeConfig
from gradsift.cost import peak_resident_gb
from gradsift.journal import Journal

Advance = Callable[[int], None]
Task = Callable[[str, int | None], AbstractContextManager[Advance]]  # a progress bar: description and total
_LOG_EVERY = 30.0  # seconds between progress lines without a terminal


class Display:
    """Prints messages and shows progress: on a terminal as a bar with an ETA, otherwise as a line every half minute."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if console is None and not self.console.is_terminal:
            self.console.width = 132  # columns of output that is not a terminal
        self._progress: Progress | None = None  # while any bar is shown

    def say(self, text: str) -> None:
        """Print a message without inserting line breaks, so that paths can be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show the progress of `total` units of work. Yields a function to call with the number of units just done.

        If `total` is None, the bar shows only that work goes on, and nothing is shown without a terminal.
        """
        if not self.console.is_terminal:
            yield self._lines(description, total) if total is not None else lambda done: None
            return
        if self._progress is None:
            width = min(30, max(8, self.console.width - 64))  # leaves room for the description and the numbers
            name, bar = TextColumn("{task.description}", markup=False), BarColumn(bar_width=width)
            columns = (name, bar, MofNCompleteColumn(), TimeElapsedColumn(), "eta", TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
        progress = self._progress
        row = progress.add_task(description, total=total)
        try:
            yield lambda done: progress.advance(row, done)
        finally:
            if len(progress.tasks) > 1:
                progress.remove_task(row)
            else:
                self._progress = None
                progress.stop()  # draws the last bar once more, and erases it

    def _lines(self, description: str, total: int) -> Advance:
        done, last, told = 0, time.monotonic(), 0  # units done; time of the last line, and units done by then

        def advance(more: int) -> None:
            nonlocal done, last, told
            done += more
            now = time.monotonic()
            if told < done < total and now - last >= _LOG_EVERY:
                eta = (now - last) / (done - told) * (total - done)  # since the last line: resumed units took no time
                last, told = now, done
                self.say(f"  {description}: {done:,} of {total:,}, about {eta / 60:.0f} min left")

        return advance


def weighed(advance: Advance, units: int, weight: int) -> Advance:
    """Return a function that takes the weight of the work just done and advances a bar that counts units.

    Use this if the time of a batch is proportional to its tokens (the weight), but the bar counts examples (the units).
    `units` and `weight` are the totals of all work that the bar shows.
    """
    done = 0

    def advance_by_weight(more: int) -> None:
        nonlocal done
        told = units * done // weight
        done += more
        advance(units * done // weight - told)

    return advance_by_weight


@contextmanager
def unseen(description: str, total: int | None) -> Iterator[Advance]:
    """A `Task` that shows nothing."""
    yield lambda done: None


@dataclass
class Runtime:
    """The objects that a run passes to each of its stages."""

    store: Store
    compute: ComputeConfig
    display: Display
    seed: int  # of the proxy ensemble and of the target

    def journal(self, folder: Path) -> Journal:
        """Return the journal of the artifact that is being made in `folder`."""
        return Journal(folder, self.compute.save_every, self.display.say)


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process over all its jobs, in GB (10^9 bytes).

    The dict has the peak of the resident memory, if it is known, and, if CUDA is available, the peak of the GPU memory
    of torch's tensors.
    """
    import torch

    resident = peak_resident_gb()
    peaks = {} if resident is None else {"process_peak_resident_gb": resident}
    if torch.cuda.is_available():
        peaks["process_peak_cuda_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peaks


def derive_seed(*parts: int | str) -> int:
    """Return a seed for one purpose, such as ("lora", member), that is independent of the seeds of other purposes."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")
