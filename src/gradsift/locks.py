"""Locks on units of work, so that one process at a time makes an artifact.

They are locks of the file system, which the kernel frees when the holder dies. A file system without such locks is
refused: a plain lock file would remain after its holder died on another machine, and nothing but the file's age would
suggest that the holder is dead.
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

_PATIENCE = 3.0  # seconds before a wait for another process is reported
_POLL = 0.5  # seconds between attempts after that, so that a hundred waiting jobs do not load a file server


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; it writes its name into the lock file."""

    file: Path
    unit: str
    name: str = field(
        default_factory=lambda: f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
    )

    def sign(self) -> None:
        self.file.write_text(self.name, encoding="utf-8")

    def last(self) -> str:
        """Return the name of the process that signed the lock file last, or "not named"; for messages."""
        try:
            return self.file.read_text(encoding="utf-8", errors="replace").split(",")[0] or "not named"
        except OSError:
            return "not named"

    def require(self) -> None:
        """Check that no other process has begun the same unit, as can happen if the file system's locks do not work.

        Raises:
            GradsiftError: another process has signed the lock file since this one did.
        """
        try:
            signed = self.file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return  # somebody deleted the file, but no other process works on the unit
        if signed != self.name:
            raise GradsiftError(
                f"{self.unit} was taken over by {self.last()} while this process made it, so the locks of "
                f"{self.file.parent} do not hold: its file system must have locks that all machines see, and nobody "
                "may delete the .lock files of a store in use (docs/sweeps.md)"
            )


@contextmanager
def locked(
    path: Path, say: Callable[[str], None], at_work: Callable[[str], AbstractContextManager[Any]]
) -> Iterator[Holder]:
    """Hold the lock of the artifact at `path`.

    Args:
        say: called with a message if this process waits for another.
        at_work: context that is entered while this process waits.

    Raises:
        GradsiftError: the lock file is a link.
    """
    holder = Holder(require_no_link(path.parent / f".{path.name}.lock"), path.name)
    lock = FileLock(holder.file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        say(f"  waiting for another process ({holder.last()}) that makes {path.name}")
        with at_work(f"wait for {path.name}"):
            lock.acquire(poll_interval=_POLL)
    try:
        holder.sign()
        yield holder
    finally:
        lock.release()
