"""JSON that others wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BLANK = " \t\n\r\ufeff"  # what may stand between values: white space, and the byte order marks of joined files


class RepeatedKeyError(ValueError):
    """An object names a key twice, of which Python would keep the last value only."""


def loads(text: str | bytes) -> Any:
    """The value that `text` holds.

    Raises:
        json.JSONDecodeError: broken JSON, and JSON that Python does not read (nested about a thousand deep, a number
            of thousands of digits), for which `json.loads` has errors of other kinds.
        UnicodeDecodeError: bytes that are no text.
    """
    with _one_kind_of_error(text):
        return json.loads(text)


def loads_all(text: str) -> list[Any]:
    """The values that `text` holds one after the other, with nothing or `BLANK` between them.

    Raises:
        json.JSONDecodeError: see `loads`.
        RepeatedKeyError: an object names a key twice.
    """
    values = []
    end = _skip_blank(text, 0)
    while end < len(text):
        with _one_kind_of_error(text):
            value, end = _DECODER.raw_decode(text, end)
        values.append(value)
        end = _skip_blank(text, end)
    return values


def _skip_blank(text: str, start: int) -> int:
    while start < len(text) and text[start] in BLANK:
        start += 1
    return start


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"the key {repeated[:40]!r} stands twice in one object")
    return made


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
        reason = str(error).split(";")[0]  # what follows is advice to programmers
    raise json.JSONDecodeError(reason, text if isinstance(text, str) else "", 0)
