"""What every stage is given besides its own config: the store, the machine, and a way to show progress."""

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
_FILE_WIDTH = 132  # columns where the output is no terminal
_LOG_EVERY = 30.0  # seconds between progress lines where there is no terminal


class Display:
    """Bars with an ETA on a terminal, sparse lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if console is None and not self.console.is_terminal:
            self.console.width = _FILE_WIDTH
        self._progress: Progress | None = None  # while any bar is shown

    def say(self, text: str) -> None:
        """A line: in a log as it is, on a terminal wrapped between words; a path is never broken."""
        if self.console.is_terminal:
            text = "\n".join(_wrapped(line, self.console.width) for line in text.split("\n"))
        self.console.print(text, markup=False, soft_wrap=True)

    def say_path(self, name: str, path: object) -> None:
        """Where something lies, on one line however long it is, to be copied."""
        self.console.print(f"{name}: {path}", markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show the progress of `total` units of work; call what it yields with the number just done.

        None is work whose length nobody knows: a bar that only moves, and elsewhere a line once it took long. Bars
        of work that is part of other work stand below each other.
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
        last, told = time.monotonic(), 0  # when the last line was said, and of how much
        done = 0

        def advance(more: int) -> None:
            nonlocal done, last, told
            done += more
            now = time.monotonic()
            if told < done < total and now - last >= _LOG_EVERY:
                eta = (now - last) / (done - told) * (total - done)  # what an earlier run did took no time in this one
                last, told = now, done
                self.say(f"  {description}: {done:,} of {total:,}, about {eta / 60:.0f} min left")

        return advance


def weighed(advance: Advance, units: int, weight: int) -> Advance:
    """Tells `advance` of `units` in all while it is itself told of `weight` in all, such as the tokens of so many rows.

    Batches hold like numbers of tokens and take like times, be they of few long rows or of many short ones.
    """
    done = told = 0

    def heavier(more: int) -> None:
        nonlocal done, told
        done += more
        now = units * done // weight
        advance(now - told)
        told = now

    return heavier


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    rows = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(rows)


class _Count(MofNCompleteColumn):
    """Nothing where the total is not known."""

    def render(self, task: Row) -> Text:
        return super().render(task) if task.total is not None else Text()


class _Eta(TimeRemainingColumn):
    """Likewise."""

    def render(self, task: Row) -> Text:
        return Text("eta ") + super().render(task) if task.total is not None else Text()


def _bars(console: Console) -> Progress:
    """Bars that leave room for the words and the figures beside them."""
    width = min(30, max(8, console.width - 64))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=width),
        _Count(),
        TimeElapsedColumn(),
        _Eta(),
    )
    return Progress(*columns, console=console, transient=True)


@contextmanager
def unseen(description: str, total: int | None) -> Iterator[Advance]:
    """A `Task` that shows nothing."""
    yield lambda done: None


@dataclass
class Runtime:
    """What a run hands to each of its stages."""

    store: Store
    compute: ComputeConfig
    display: Display
    seed: int  # of the proxy ensemble and of the target

    def journal(self, folder: Path) -> Journal:
        """Return the journal of the artifact that is being made in `folder`."""
        return Journal(folder, self.compute.save_every, self.display.say)


def peak_memory() -> dict[str, float]:
    """The most memory this process has held so far, in GB (10^9 bytes); in a sweep over all its runs up to now.

    process_peak_resident_gb  resident memory (see `peak_resident_gb`)
    process_peak_cuda_gb      tensors on the current CUDA device, where there is one
    """
    import torch

    resident = peak_resident_gb()
    peaks = {} if resident is None else {"process_peak_resident_gb": resident}
    if torch.cuda.is_available():
        peaks["process_peak_cuda_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peaks


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose, such as ("lora", member); independent of every other purpose's."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")
