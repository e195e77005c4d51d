"""Errors of the disk that holds the store, as messages with a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gradsift.errors import GradsiftError, first_line

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ETIMEDOUT)
_NOT_WRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EIO, errno.EFBIG, errno.EEXIST, errno.ENOTEMPTY),
)


@contextmanager
def guarded(store: Path, unit: str, *, nameless: bool = True) -> Iterator[None]:
    """Turn errors of the store's disk into a GradsiftError that names `unit`, the folder and the remedy.

    Other errors are raised unchanged.

    Args:
        store: the folder of artifacts.
        nameless: whether an error that names no file counts as an error of the store; True while a stage works.

    Raises:
        GradsiftError: the store cannot be read or written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _concerns(store, error, nameless):
            raise
        number = getattr(error, "errno", None)
        if number in _NO_LOCKS:
            remedy = "its file system has no locks between processes; give one that has with artifacts=DIR "
            remedy += "(docs/sweeps.md)"
        elif number in _GONE:
            remedy = "a file or a folder of it is gone; was its disk unmounted, or did somebody delete it?"
        else:
            remedy = "give another folder with artifacts=DIR or GRADSIFT_ARTIFACTS, or free this one"
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GradsiftError(
            f"{unit} could not keep its work in {store}: {reason}; {remedy}; "
            "finished work is kept, and the same command continues from there"
        ) from error


def _concerns(store: Path, error: OSError | SafetensorError, nameless: bool) -> bool:
    """Return whether an error concerns the store and not a file that a stage reads elsewhere."""
    if isinstance(error, SafetensorError):
        return nameless
    if error.errno not in (*_NOT_WRITABLE, *_NO_LOCKS, *_GONE):
        return False
    if error.filename is None:
        return str(store) in str(error) if error.errno in _GONE else nameless
    # both made absolute, because libraries may resolve the paths that they are given
    return Path(os.fsdecode(error.filename)).absolute().is_relative_to(store.absolute())
