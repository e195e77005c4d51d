"""A journal keeps the results of a pass over the data as they are computed, so that an interrupted run can continue.

A stage asks the runtime for the journal of the artifact that it makes:

    journal = runtime.journal(folder)
    for batch in batches:
        losses = journal.once(batch.rows, lambda: losses_of(batch))

If the n-th call of `once` has the same key as in the interrupted run, `once` returns the kept result; otherwise `once`
calls the function in its second argument and keeps the result. From the first key that differs (for example after a
change of the token budget), everything is computed again.

The file is `unfinished/journal.jsonl` in the artifact's folder. Each line has a checksum, and one key with its result
as JSON, from which every float32 and float64 is restored exactly. A line that was cut or changed is dropped, with all
lines after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gradsift.manifests import UNFINISHED

T = TypeVar("T")
JOURNAL_FILE = "journal.jsonl"
_DIGITS = 16  # hex digits of SHA-256 before each line's text
_TEXT = slice(_DIGITS + 1, -1)  # of a line


class Journal:
    """Keeps the results of a pass until the artifact that the pass makes is finished.

    Args:
        folder: the artifact's folder. If None, no results are kept.
        save_every: results on a GPU are written only when this many seconds have passed since the last writing,
            because copying the results waits for the GPU.
        say: called with a message if a damaged line, and all lines after it, are dropped.
    """

    def __init__(self, folder: Path | None = None, save_every: float = 0.0, say: Callable[[str], None] = print) -> None:
        self._path = None if folder is None else folder / UNFINISHED / JOURNAL_FILE
        self._save_every = save_every
        self._saved_at = time.monotonic()
        self._kept = deque([] if self._path is None else _read(self._path, say))  # lines that `once` has yet to return
        self._end = 0  # bytes of the lines that `once` has returned
        self._waiting: list[Any] = []  # keys and results to be written

    def once(self, key: Any, make: Callable[[], T], intact: Callable[[T], bool] = lambda value: True) -> T:
        """Return the kept result for `key`; if there is none, compute the result with `make` and keep it.

        Args:
            key: JSON value that identifies what is computed at this place of the pass.
            make: returns the result, a JSON value that may contain tensors. Restored tensors are on the CPU.
            intact: returns whether a kept result can still be used. For example, it returns False if the result
                describes a file that has changed since.
        """
        if self._path is not None and self._kept:
            kept: T
            kept_key, kept = json.loads(self._kept[0][_TEXT], object_hook=_tensor_from_json)
            if kept_key == key and intact(kept):
                self._end += len(self._kept.popleft())
                return kept
            self._kept.clear()
            os.truncate(self._path, self._end)
        made = make()
        if self._path is not None:
            self._waiting.append([key, made])
            if not _on_gpu(made) or time.monotonic() - self._saved_at >= self._save_every:
                self._write(self._path)
        return made

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            for entry in self._waiting:  # ASCII escapes: a model's answer may contain half a surrogate pair
                stream.write(_line(json.dumps(entry, default=_tensor_to_json).encode("ascii")))
        self._waiting.clear()
        self._saved_at = time.monotonic()


def _read(path: Path, say: Callable[[str], None]) -> list[bytes]:
    """Return the lines of a journal before its first damaged line, and cut off the rest of the file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    intact: list[bytes] = []
    for line in lines:
        if line != _line(line[_TEXT]):
            place = f"line {len(intact) + 1} of {path.parents[1].name}/{UNFINISHED}/{path.name}"
            say(f"  {place} is cut or damaged; its result, and those after it, are computed again")
            os.truncate(path, sum(map(len, intact)))
            break
        intact.append(line)
    return intact


def _line(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode("ascii") + b" " + text + b"\n"


def _on_gpu(value: Any) -> bool:
    return any(map(_on_gpu, value)) if isinstance(value, list | tuple) else bool(getattr(value, "is_cuda", False))


def _tensor_to_json(value: Any) -> dict[str, Any]:
    import torch  # imported here, because judging uses a journal without torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be kept in a journal")
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _tensor_from_json(record: dict[str, Any]) -> Any:
    if record.keys() != {"dtype", "values"}:
        return record
    import torch

    return torch.tensor(record["values"], dtype=getattr(torch, record["dtype"]))
