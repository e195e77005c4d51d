"""What every stage gets besides its own config: the store, the compute settings, a way to show progress, the seed."""

from __future__ import annotations

import hashlib
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Task as Row
from rich.text import Text

from gradsift.artifacts import Store
from gradsift.config import ComputeConfig
from gradsift.cost import peak_resident_gb
from gradsift.journal import Journal

Advance = Callable[[int], None]
Task = Callable[[str, int | None], AbstractContextManager[Advance]]  # a progress bar: description and total
_FILE_WIDTH = 132  # columns of output that is not a terminal
_LOG_EVERY = 30.0  # seconds between progress lines without a terminal


class Display:
    """Shows messages, and progress as bars with an ETA on a terminal or as occasional lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if console is None and not self.console.is_terminal:
            self.console.width = _FILE_WIDTH
        self._progress: Progress | None = None  # while any bar is shown

    def say(self, text: str) -> None:
        """Print a message. On a terminal it is wrapped between words, so a path is never broken."""
        if self.console.is_terminal:
            text = "\n".join(_wrapped(line, self.console.width) for line in text.split("\n"))
        self.console.print(text, markup=False, soft_wrap=True)

    def say_path(self, name: str, path: object) -> None:
        """Print a path on one line, whatever its length, so that the user can copy it."""
        self.console.print(f"{name}: {path}", markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show the progress of `total` units of work. Yields a function to call with the number of units just done.

        If `total` is None, the bar shows only that work goes on; without a terminal, a line is printed at the end if
        the work took 30 seconds or more. The bars of nested tasks are shown below each other.
        """
        if not self.console.is_terminal:
            started = time.monotonic()
            yield self._lines(description, total) if total is not None else lambda done: None
            took = time.monotonic() - started
            if total is None and took >= _LOG_EVERY:
                self.say(f"  {description}: took {took:.0f} s")
            return
        if self._progress is None:
            self._progress = _bars(self.console)
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
        last, told = time.monotonic(), 0  # time of the last line, and the number of units that it showed as done
        done = 0

        def advance(more: int) -> None:
            nonlocal done, last, told
            done += more
            now = time.monotonic()
            if told < done < total and now - last >= _LOG_EVERY:
                eta = (now - last) / (done - told) * (total - done)  # since the last line, as resumed work took no time
                last, told = now, done
                self.say(f"  {description}: {done:,} of {total:,}, about {eta / 60:.0f} min left")

        return advance


def weighed(advance: Advance, units: int, weight: int) -> Advance:
    """Return a function that takes the weight of the work just done and advances a bar that counts units.

    The whole work has the total weight `weight` and the total number of units `units`; the bar advances in proportion
    to the weight. Batches hold similar numbers of tokens and take similar time, whether they have few long examples or
    many short ones, so progress is measured in tokens (the weight) and shown in examples (the units).
    """
    done = told = 0

    def advance_by_weight(more: int) -> None:
        nonlocal done, told
        done += more
        now = units * done // weight
        advance(now - told)
        told = now

    return advance_by_weight


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    rows = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(rows)


class _Count(MofNCompleteColumn):
    """Shows `done/total`, and nothing if the total is unknown."""

    def render(self, task: Row) -> Text:
        return super().render(task) if task.total is not None else Text()


class _Eta(TimeRemainingColumn):
    """Shows the remaining time, and nothing if the total is unknown."""

    def render(self, task: Row) -> Text:
        return Text("eta ") + super().render(task) if task.total is not None else Text()


def _bars(console: Console) -> Progress:
    width = min(30, max(8, console.width - 64))  # leaves room for the description and the numbers
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(bar_width=width), _Count(), TimeElapsedColumn(), _Eta())
    return Progress(*columns, console=console, transient=True)


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
    """Return the peak memory of this process so far, in GB (10^9 bytes), over all jobs that it has run.

    process_peak_resident_gb  resident memory (see `peak_resident_gb`)
    process_peak_cuda_gb      tensors on the current CUDA device, if there is one
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
