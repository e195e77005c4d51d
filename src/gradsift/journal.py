"""What a long computation has found so far: one line a result, in the order in which they were made.

    found = journal.once(key, make)

gives what an interrupted process found for the same `key` at the same place of the same computation, and else calls
`make`. A computation that asks for the same things in the same order is so handed what is there and goes on after it,
with the same batches and the same bytes; from the first key that differs (another token budget, say) all is made anew.

Each line has a checksum: one that was cut or changed is dropped with those after it, and their results are made anew.
JSON gives every float32 and float64 back as it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradsift.checked_lines import JOURNAL_FILE, sealed, unsealed
from gradsift.manifests import UNFINISHED

T = TypeVar("T")


class Journal:
    """The results that one artifact in the making consists of; outside of a folder nothing is kept."""

    def __init__(
        self, folder: Path | None = None, every: float = 0.0, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """
        Args:
            folder: of the artifact.
            every: seconds for which results on a GPU may stay there: to fetch one is to wait for the GPU.
            say: told of a line that was dropped.
        """
        self._path = None if folder is None else folder / UNFINISHED / JOURNAL_FILE
        self._reads = self._path is not None and self._path.exists()
        self._say = say
        self._known = 0  # bytes of the file that this computation has asked for or written
        self._number = 0  # of lines in them
        self._every = every
        self._written = time.monotonic()
        self._waiting: list[Any] = []

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """The result for `key`.

        Args:
            key: JSON value that tells what is asked for from what else might be at this place.
            make: returns a JSON value in which there may be tensors; what was kept of these is on the CPU.
        """
        if self._path is None:
            return make()
        if self._reads:
            line, found = self._next(self._path)
            if found is not None and found[0] == key:
                self._known += len(line)
                self._number += 1
                value: T = found[1]
                return value
            self._reads = False
        made = make()
        self._waiting.append([key, made])
        if not _on_gpu(made) or time.monotonic() - self._written >= self._every:
            self._write(self._path)
        return made

    def _next(self, path: Path) -> tuple[bytes, Any]:
        """The next line, and its key and result; None for a line that was cut or changed, or at the end."""
        with path.open("rb") as stream:
            stream.seek(self._known)
            line = stream.readline()
        text = unsealed(line)
        if text is not None:
            return line, json.loads(text, object_hook=_unpack)
        if line:
            self._say(
                f"  line {self._number + 1} of {path.parents[1].name}/{UNFINISHED}/{path.name} is cut or damaged; "
                "its result, and those after it, are made again"
            )
        return line, None

    def _write(self, path: Path) -> None:
        # ASCII escapes: a model's answer may hold half a surrogate pair
        lines = b"".join(sealed(json.dumps(each, default=_pack)) for each in self._waiting)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as stream:
            stream.seek(self._known)
            stream.truncate()
            stream.write(lines)
        self._known += len(lines)
        self._number += len(self._waiting)
        self._waiting.clear()
        self._written = time.monotonic()


def _on_gpu(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_cuda
    return isinstance(value, list | tuple) and any(map(_on_gpu, value))


def _pack(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be kept in a journal")
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _unpack(record: dict[str, Any]) -> Any:
    if record.keys() != {"dtype", "values"}:
        return record
    return torch.tensor(record["values"], dtype=getattr(torch, record["dtype"]))
