"""Reads JSON that other programs wrote. Every fault in the JSON raises a subclass of ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BLANK = " \t\n\r\ufeff"  # allowed between values: white space, and the byte order marks of joined files


class RepeatedKeyError(ValueError):
    """An object has a key twice. Python would silently keep the last value."""


def loads(text: str | bytes) -> Any:
    """Return the JSON value in `text`.

    Raises:
        json.JSONDecodeError: the JSON is invalid, or has a nesting of about a thousand levels or a number of thousands
            of digits, which Python cannot read. (For these two, `json.loads` raises other errors.)
        UnicodeDecodeError: the bytes are not valid UTF-8, UTF-16 or UTF-32.
    """
    with _one_kind_of_error(text):
        return json.loads(text)


def loads_all(text: str) -> list[Any]:
    """Return the JSON values in `text`, which follow each other with or without characters of `BLANK` between them.

    Raises:
        json.JSONDecodeError: see `loads`.
        RepeatedKeyError: an object has a key twice.
    """
    values = []
    end = _skip_blank(text, 0)
    while end < len(text):
        with _one_kind_of_error(text):
            value, end = _DECODER.raw_decode(text, end)
        values.append(value)
        end = _skip_blank(text, end)
    return values


def loads_first(text: str) -> tuple[Any, int]:
    """Return the JSON value at the beginning of `text`, and its length in characters; the rest of `text` is ignored.

    Raises:
        json.JSONDecodeError: see `loads`.
        RepeatedKeyError: an object has a key twice.
    """
    with _one_kind_of_error(text):
        return _DECODER.raw_decode(text)


def _skip_blank(text: str, start: int) -> int:
    while start < len(text) and text[start] in BLANK:
        start += 1
    return start


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
        return
    except (json.JSONDecodeError, UnicodeDecodeError, RepeatedKeyError):
        raise
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error).split(";")[0]  # what follows the semicolon is advice to programmers
    raise json.JSONDecodeError(reason, text if isinstance(text, str) else "", 0)
