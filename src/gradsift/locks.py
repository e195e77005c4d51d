"""Who works on a unit: locks of the file system, which the kernel frees when their holder dies.

A file system without such locks is refused: a lock that is a mere file would outlive a holder that died elsewhere,
and whether that one is still at work could only be told by clocks.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gradsift.errors import GradsiftError
from gradsift.names import require_no_link

_PATIENCE = 3.0  # seconds before a wait for another process is said
_POLL = 0.5  # seconds between looks at a lock after that: a hundred waiting jobs shall not wear out a file server


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Holder:
    """The name that the process at work on a unit leaves in the lock's file."""

    file: Path
    unit: str
    name: str = field(default_factory=_own_name)

    def sign(self) -> None:
        self.file.write_text(self.name, encoding="utf-8")

    def named(self) -> str:
        """Who signed last."""
        try:
            return self.file.read_text(encoding="utf-8", errors="replace").split(",")[0] or "not named"
        except OSError:
            return "not named"

    def require(self) -> None:
        """Let no work through that another process has begun too, which happens where locks do not hold.

        Raises:
            GradsiftError: another process signed since.
        """
        try:
            found = self.file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return  # taken away by somebody, but nobody else is at work
        if found != self.name:
            raise GradsiftError(
                f"{self.unit} was taken over by {self.named()} while this process made it, so the locks of "
                f"{self.file.parent} do not hold: its file system must have locks that all machines see, and nobody "
                "may clear away the .lock files of a store in use (docs/sweeps.md)"
            )


@contextmanager
def locked(
    path: Path, say: Callable[[str], None], at_work: Callable[[str], AbstractContextManager[Any]]
) -> Iterator[Holder]:
    """One process at a time makes the artifact at `path`.

    Args:
        say: told for whom this process waits.
        at_work: entered while it waits.

    Raises:
        GradsiftError: the lock's file is a link.
    """
    holder = Holder(require_no_link(path.parent / f".{path.name}.lock"), path.name)
    lock = FileLock(holder.file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        say(f"  waiting for another process ({holder.named()}) that makes {path.name}")
        with at_work(f"wait for {path.name}"):
            lock.acquire(poll_interval=_POLL)
    try:
        holder.sign()
        yield holder
    finally:
        lock.release()
