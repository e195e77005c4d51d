"""Reads JSON that other programs wrote. Invalid JSON always raises a subclass of ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BLANK = " \t\n\r\ufeff"  # allowed between values: white space and the byte order marks of concatenated files


class RepeatedKeyError(ValueError):
    """Raised by `loads_all` and `loads_first` if an object has a key twice; `loads` silently keeps the last value."""


def loads(text: str | bytes) -> Any:
    """Return the JSON value in `text`. If an object has a key twice, the last value is kept.

    Raises:
        json.JSONDecodeError: the JSON is invalid, is nested too deep, or has an integer of more than 4,300 digits. In
            the last two cases, `json.loads` itself would raise a RecursionError or a plain ValueError.
        UnicodeDecodeError: the bytes are not valid UTF-8, UTF-16 or UTF-32.
    """
    with _one_kind_of_error(text):
        return json.loads(text)


def loads_all(text: str) -> list[Any]:
    """Return all JSON values in `text`. White space and byte order marks may surround each value.

    Raises:
        json.JSONDecodeError: see `loads`.
        RepeatedKeyError: an object has a key twice.
    """
    values: list[Any] = []
    end = 0
    while True:
        while end < len(text) and text[end] in BLANK:
            end += 1
        if end == len(text):
            return values
        value, end = loads_first(text, end)
        values.append(value)


def loads_first(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and the position where it ends; for errors see `loads_all`."""
    with _one_kind_of_error(text):
        return _DECODER.raw_decode(text, start)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"the key {repeated[:40]!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


@contextmanager
def _one_kind_of_error(text: str | bytes) -> Iterator[None]:
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, RepeatedKeyError):
        raise
    except (RecursionError, ValueError) as error:
        # after the semicolon, a ValueError advises to call sys.set_int_max_str_digits()
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise json.JSONDecodeError(reason, text if isinstance(text, str) else "", 0) from None
