"""Reads the rows of data files.

If a file's content does not fit the type that its name states, reading it raises a `DataError` that names the place.
Broken rows are neither repaired nor skipped.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from gradsift import outside_json
from gradsift.data.columns import KNOWN, folded, listed
from gradsift.data.examples import SourceRow, json_type
from gradsift.data.tables import AGAIN, column_rows, csv_rows
from gradsift.errors import DataError

_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_PACKED = (".gz", ".zst")
_COLUMN_KINDS = ("parquet", "arrow")
SUFFIXES = (
    *_TEXT_SUFFIXES,
    *(suffix + packed for packed in _PACKED for suffix in _TEXT_SUFFIXES),
    *(f".{kind}" for kind in _COLUMN_KINDS),
)
_WIDE_ENCODINGS = (  # UTF-32 first: its byte order mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_rows(path: Path, *, group: str = "data", holder: str | None = None) -> Iterator[SourceRow]:
    """Yield the rows of a .json, .jsonl, .csv, .tsv (each also with .gz or .zst), .parquet or .arrow file, in order.

    .json     an array of objects; an object in which one value is such an array, as {"data": [...]}; or JSON lines,
              since many files with JSON lines are named .json
    .jsonl    one object per line; several objects on a line are several rows, empty lines are skipped
    .csv, .tsv
              the first line has the column names and determines the delimiter; every cell is text
    .parquet, .arrow
              columns of any type

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Args:
        group: group of the options that name the file, for errors.
        holder: key of the array of rows, if a .json file's object has several arrays.

    Raises:
        DataError: the file is missing, a folder, not a regular file, empty, incomplete, of an unknown type, in another
            encoding or broken. The message names the file, the line if there is one, and the remedy.
    """
    kind = file_kind(path, group)
    with _reading(path):
        if kind in _COLUMN_KINDS:
            yield from column_rows(path, kind)
            return
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; fetch or write it again")
        with _opened(path) as opened:
            stream = _as_utf8(path, opened)
            if kind == "jsonl":
                rows = _unwrapped(path, _json_lines(path, stream))
            else:
                text = _decoded(path, stream.read(), 1).lstrip("\ufeff")
                rows = _json_rows(path, text, holder) if kind == "json" else csv_rows(path, text, kind)
            first = next(rows, None)
            if first is None:
                raise DataError(f"{path} is empty: it holds no row; fetch or write it again")
            yield first
            yield from rows


def file_kind(path: Path, group: str = "data") -> str:
    """Return the type that the file's name states: json, jsonl, csv, tsv, parquet or arrow.

    Raises:
        DataError: `path` is not a regular file, or its type is unknown.
    """
    if path.is_dir():
        raise DataError(f"{group}.path={path} is a folder; name one file in it")
    if not path.exists():
        raise DataError(f"{group}.path={path} does not exist; check the name (now in {Path.cwd()})")
    if not path.is_file():  # reading a pipe or a device may never end
        raise DataError(
            f"{group}.path={path} is no regular file but a pipe, a socket or a device; write the rows to a file first, "
            "and give that"
        )
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{group}.path={path} is of no known type; its name must end in one of: {', '.join(SUFFIXES)}")
    kind = _without_packing(name).rsplit(".", 1)[1]
    return "jsonl" if kind == "ndjson" else kind


def _without_packing(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".zst")


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Return a stream of the file's bytes, unpacked if it is a .gz or .zst file."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        import pyarrow as pa

        unpacked: Any = pa.input_stream(str(path), compression="zstd")
        return io.BufferedReader(unpacked)
    return path.open("rb")


def hash_of(path: Path) -> str:
    """Return the SHA-256 of the file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    with _reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the exceptions that a broken or unreadable file raises into a `DataError`."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise DataError(f"{path} is not gzip ({error}); remove .gz from its name if it is plain text") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is broken gzip ({error}); {AGAIN}") from error
    except OSError as error:
        if error.errno is None and path.name.lower().endswith(".zst"):
            raise DataError(f"{path} is broken zstd ({error}); {AGAIN}") from error
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------- encodings


def _as_utf8(path: Path, stream: gzip.GzipFile | io.BufferedReader) -> gzip.GzipFile | io.BufferedReader | io.BytesIO:
    """Return the stream, or a stream of its text in UTF-8 if a byte order mark shows that it is UTF-16 or UTF-32."""
    start = stream.peek(4)[:4]
    encoding = next((name for mark, name in _WIDE_ENCODINGS if start.startswith(mark)), None)
    if encoding is None:
        return stream
    try:
        text = stream.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not {encoding.upper()}, which the file's byte order mark announces "
            f"({error.reason}); save the file in UTF-8"
        ) from error
    return io.BytesIO(text.encode("utf-8"))


def _decoded(path: Path, data: bytes, line: int) -> str:
    """Return the text of UTF-8 bytes `data`, which begin at line `line` of the file."""
    if line == 1 and data[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is gzip; name it {path.name}.gz")
    if line == 1 and b"\0" in data[:4]:
        raise DataError(f"{path} holds NUL bytes, as UTF-16 without a byte order mark does; save the file in UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file in UTF-8"
        ) from error


# --------------------------------------------------------------------------------------------- JSON


def _values(path: Path, text: str, line: int) -> list[Any]:
    """Return the JSON values of `text`, which begins at line `line` of the file."""
    try:
        return outside_json.loads_all(text)
    except outside_json.RepeatedKeyError as error:
        place = f", line {line}" if "\n" not in text.strip() else ""
        raise DataError(f"{path}{place}: {error}; rename or delete one of the two") from error
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{path}, {place}: broken JSON ({error.msg}); {_remedy(path, text, error)}") from error


def _remedy(path: Path, text: str, error: json.JSONDecodeError) -> str:
    is_array = _without_packing(path.name.lower()).endswith(".json")
    rest = text[error.pos :].lstrip(outside_json.BLANK)
    before = text[: error.pos].rstrip(outside_json.BLANK)
    if not rest or error.msg.startswith("Unterminated"):
        return AGAIN if is_array else f"{AGAIN}, or let its name end in .json if its objects span lines"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments: delete them"
    if rest[0] in "]}" and before.endswith(","):
        return "delete the comma before that place"
    if rest[0] == "," and before.endswith("}"):
        return "delete the commas between the objects, or put the objects in brackets and let the name end in .json"
    return "mend that place"


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[SourceRow]:
    index = 0
    for line, data in enumerate(lines, start=1):
        text = _decoded(path, data, line).strip(outside_json.BLANK)
        if index == 0 and text.startswith("["):
            raise DataError(f"{path} holds a JSON array instead of one object a line; let its name end in .json")
        for value in _values(path, text, line):
            yield SourceRow(index, value, line)
            index += 1


def _json_rows(path: Path, text: str, holder: str | None) -> Iterator[SourceRow]:
    if holder is None and _is_json_lines(text):
        return _unwrapped(path, _json_lines(path, io.BytesIO(text.encode("utf-8"))))
    values = _values(path, text, 1)
    if all(isinstance(value, list) for value in values):  # several arrays, if files were concatenated
        return _numbered(chain.from_iterable(values))
    if all(isinstance(value, dict) for value in values) and len(values) > 1:
        return _numbered(values)
    value = values[0]
    if len(values) > 1 or not isinstance(value, dict):
        content = f"{len(values)} values" if len(values) > 1 else json_type(value)
        raise DataError(f"{path} holds {content}; it must hold an array of objects")
    rows = value.get(holder) if holder else _rows_in(path, value)
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return _numbered(rows)
    raise DataError(
        f"{path} holds one object with the keys {listed(value)}; it must hold an array of objects, one a row"
    )


def _is_json_lines(text: str) -> bool:
    """Return whether the first line that is not empty consists of complete JSON objects."""
    first = text.lstrip(outside_json.BLANK).partition("\n")[0]
    if not first.startswith("{"):
        return False
    try:
        outside_json.loads_all(first)
    except json.JSONDecodeError:
        return False
    except outside_json.RepeatedKeyError:
        return True  # `_json_lines` reports the error
    return True


def _unwrapped(path: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """Return the rows; if the only row is an object that holds the rows, as {"data": [...]}, return the rows in it."""
    first, second = next(rows, None), next(rows, None)
    if first is not None and second is None and isinstance(first.content, dict):
        inner = _rows_in(path, first.content)
        if inner is not None:
            return iter([first]) if inner == [first.content] else _numbered(inner)
    return chain((row for row in (first, second) if row is not None), rows)


def _rows_in(path: Path, content: dict[str, Any]) -> list[Any] | None:
    """Return the rows of a file that holds one object.

    If the object has a column of a known format, the object itself is the only row. Otherwise its only list of objects
    holds the rows. Return None if it has no such list.
    """
    if not KNOWN.isdisjoint(map(folded, content)):
        return [content]
    if len(content) == 1 and next(iter(content.values())) == []:
        return []
    names = [name for name, value in content.items() if _are_rows(value)]
    if len(names) > 1:
        raise DataError(
            f"{path} holds several lists of objects ({listed(names)}); write the one that holds the rows to a file of "
            "its own"
        )
    return content[names[0]] if names else None


def _are_rows(value: Any) -> bool:
    """Return whether a value is a list of objects that are not the turns of a conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return not any({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys() for item in value)


def _numbered(rows: Iterable[Any]) -> Iterator[SourceRow]:
    return (SourceRow(row, content) for row, content in enumerate(rows))
