"""Locks for artifacts that are being made, and messages with a remedy for errors of the store's disk.

A lock ensures that only one process at a time makes an artifact. The locks are those of the file system, which the
kernel releases when the process that holds them dies. A file system without such locks is refused. Without them, the
existence of a file would have to serve as the lock. If a process on another machine died, its file would remain, and
other processes could not know that the lock is free.
"""

from __future__ import annotations

import errno
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gradsift.errors import GradsiftError, first_line
from gradsift.names import require_no_link

_PATIENCE = 3.0  # seconds before a wait for another process is reported
_POLL = 0.5  # seconds between attempts after that, so that a hundred waiting jobs do not load a file server
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ETIMEDOUT)
_NOT_WRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EIO, errno.EFBIG, errno.EEXIST, errno.ENOTEMPTY),
)


@contextmanager
def locked(
    path: Path, say: Callable[[str], None], at_work: Callable[[str], AbstractContextManager[Any]]
) -> Iterator[Callable[[], None]]:
    """Hold the lock of the artifact at `path`.

    While another process holds the lock, report this with `say`, and wait in the context that `at_work` returns.

    Yields:
        A function that raises GradsiftError if another process has started to make the same artifact, which can happen
        if the locks of the file system do not work. The function checks that the lock file still contains the name that
        this process wrote into it.
    """
    file = require_no_link(path.parent / f".{path.name}.lock")
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        say(f"  waiting for another process ({_holder(file)}) that makes {path.name}")
        with at_work(f"wait for {path.name}"):
            lock.acquire(poll_interval=_POLL)
    own = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"

    def require_held() -> None:
        with suppress(FileNotFoundError):  # a deleted lock file does not mean that another process works on the unit
            if file.read_text(encoding="utf-8", errors="replace") != own:
                raise GradsiftError(
                    f"{path.name} was taken over by {_holder(file)} while this process made it, so the locks of "
                    f"{file.parent} do not hold: its file system must have locks that all machines see, and nobody "
                    "may delete the .lock files of a store in use (docs/sweeps.md)"
                )

    try:
        file.write_text(own, encoding="utf-8")
        yield require_held
    finally:
        lock.release()


def _holder(file: Path) -> str:
    """Return the name of the process that held the lock `file` last, as messages show it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").split(",")[0] or "not named"
    except OSError:
        return "not named"


@contextmanager
def guarded(store: Path, unit: str, *, nameless: bool = True) -> Iterator[None]:
    """Turn errors of the store's disk into a GradsiftError that names `unit`, the folder and the remedy.

    Args:
        store: the folder of artifacts.
        unit: name of the work that failed; the message begins with it.
        nameless: whether errors that name no file are converted too; True while a stage works.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _concerns(store, error, nameless):
            raise
        number = getattr(error, "errno", None)
        if number in _NO_LOCKS:
            remedy = "its file system has no locks between processes; give another with artifacts=DIR (docs/sweeps.md)"
        elif number in _GONE:
            remedy = "a file or folder in it is gone; was its disk unmounted, or did somebody delete it?"
        else:
            remedy = "give another folder with artifacts=DIR or GRADSIFT_ARTIFACTS, or free this one"
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GradsiftError(
            f"{unit} could not store its work in {store}: {reason}; {remedy}; "
            "finished work is kept, and the same command continues from there"
        ) from error


def _concerns(store: Path, error: OSError | SafetensorError, nameless: bool) -> bool:
    """Return whether an error is about the store, and not about a file that a stage reads elsewhere."""
    if isinstance(error, SafetensorError):
        return nameless
    if error.errno not in (*_NOT_WRITABLE, *_NO_LOCKS, *_GONE):
        return False
    if error.filename is None:
        return str(store) in str(error) if error.errno in _GONE else nameless
    # both are made absolute, because the error may name a relative path and the store an absolute one, or vice versa
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(store.absolute())
