"""Finds the files that `data.path` names, and reads their rows.

The end of a file's name states its type. If the content has another type or is broken, reading raises a `DataError`
that names the file, and the line if there is one. Broken rows are neither repaired nor skipped.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from gradsift import outside_json
from gradsift.data.columns import KNOWN, folded, listed
from gradsift.data.examples import SourceRow, json_type
from gradsift.data.tables import AGAIN, column_rows, csv_rows
from gradsift.errors import DataError
from gradsift.manifests import file_hash

STANDARD_INPUT = "-"
_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (
    *(suffix + packed for packed in ("", ".gz", ".zst") for suffix in _TEXT_SUFFIXES),
    ".parquet",
    ".arrow",
)


def files_of(paths: str | Sequence[str], downloads: Path, group: str = "data") -> list[Path]:
    """Return the files that `data.path` names, in the order in which their rows are numbered.

    Args:
        paths: one or several paths. A path names a file, a pattern such as `folder/*.jsonl`, a folder, or `-` for
            standard input. A folder must have been written by `datasets.save_to_disk`, or contain files (shards) of one
            type, which are read in the order of their names.
        downloads: the folder into which standard input is copied.
        group: the config group whose option names the files (`data` or `target_set`); used in error messages.

    Raises:
        DataError: a file does not exist, is of an unknown type or is named twice, or a folder holds several types.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        place = Path(path).expanduser()
        if path == STANDARD_INPUT:
            files.append(_copy_of_standard_input(downloads))
        elif place.is_dir():
            files += _files_in(place, group)
        elif place.exists() or not any(character in path for character in "*?["):
            files.append(place)
        else:
            pattern = str(place.relative_to(place.anchor))
            matching = sorted(file for file in Path(place.anchor or ".").glob(pattern) if file.is_file())
            if not matching:
                raise DataError(
                    f"{group}.path={path}: no file matches this pattern; check it (working folder: {Path.cwd()})"
                )
            files += matching
    for file in files:
        file_kind(file, group)  # raises if its type is unknown
    if repeated := next((file for place, file in enumerate(files) if file in files[:place]), None):
        raise DataError(f"{group}.path names {repeated} twice; name each file once")
    return files


def require_files(paths: str | Sequence[str], group: str = "data") -> None:
    """Raise the DataError that `files_of` would raise for these paths, without reading standard input."""
    named = [paths] if isinstance(paths, str) else paths
    files_of([path for path in named if path != STANDARD_INPUT], Path(), group)


def _files_in(folder: Path, group: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file()))
        raise DataError(f"{group}.path={folder} holds several splits; name the folder of one: {splits}")
    state = folder / "state.json"  # `datasets.save_to_disk` writes it
    if state.is_file():
        try:
            names = [each["filename"] for each in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{state} was not written by datasets.save_to_disk ({error!r}); save it again") from error
        return [folder / Path(name).name for name in names]
    shown = (each for each in folder.iterdir() if each.is_file() and not each.name.startswith("."))
    files = sorted(file for file in shown if file.name.lower().endswith(SUFFIXES))
    kinds = sorted({file_kind(file) for file in files})
    if len(kinds) != 1:
        content = f"files of the types {', '.join(kinds)}" if kinds else "no file of a known type"
        raise DataError(
            f"{group}.path={folder} is a folder with {content}; give a pattern for the files with the rows, such as "
            f"{group}.path='{folder}/*.{kinds[0] if kinds else 'jsonl'}'"
        )
    return files


def _copy_of_standard_input(downloads: Path) -> Path:
    content = _standard_input()
    if not content.strip():
        raise DataError("data.path=-: standard input holds no row; pipe JSON rows into the command")
    copy = downloads / f"stdin-{hashlib.sha256(content).hexdigest()[:16]}.json"
    if not copy.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        part = copy.with_suffix(".part")
        part.write_bytes(content)
        part.replace(copy)
    return copy


@functools.cache  # standard input can be read only once, and every job of a sweep in this process needs it
def _standard_input() -> bytes:
    return sys.stdin.buffer.read()


def read_files(files: Sequence[Path]) -> Iterator[SourceRow]:
    """Yield the rows of files, numbered consecutively across all files.

    `SourceRow.line` is set only if there is a single file.
    """
    if len(files) == 1:
        return read_rows(files[0])
    return _numbered(row.content for file in files for row in read_rows(file))


def read_rows(path: Path, holder: str | None = None) -> Iterator[SourceRow]:
    """Yield the rows of a .json, .jsonl, .csv, .tsv (each also with .gz or .zst), .parquet or .arrow file, in order.

    .json     an array of objects; an object in which one value is such an array, such as {"data": [...]}; or one object
              per line, since many files with one object per line are named .json
    .jsonl    one object per line; several objects on a line are several rows, and empty lines are skipped. A file with
              a single line may also hold an object with an array of objects, as in .json
    .csv, .tsv
              the first line has the column names and determines the delimiter; every cell is text
    .parquet, .arrow
              columns of any type

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Args:
        holder: key of the array of rows in a .json file with a single object, needed if the object has several arrays.

    Raises:
        DataError: the file cannot be read. The message names the file, the line if there is one, and the remedy.
    """
    kind = file_kind(path)
    with _reading(path):
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; fetch or write it again")
        rows = column_rows(path, kind) if kind in ("parquet", "arrow") else _text_rows(path, kind, holder)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{path} is empty: it holds no row; fetch or write it again")
        yield first
        yield from rows


def _text_rows(path: Path, kind: str, holder: str | None) -> Iterator[SourceRow]:
    with _opened(path) as opened:
        stream = _as_utf8(path, opened)
        if kind == "jsonl":
            yield from _unwrapped(path, _json_lines(path, stream))
            return
        text = _decoded(path, stream.read(), 1).lstrip("\ufeff")
        yield from _json_rows(path, text, holder) if kind == "json" else csv_rows(path, text, kind)


def file_kind(path: Path, group: str = "data") -> str:
    """Return the type that a file's name states: json, jsonl, csv, tsv, parquet or arrow.

    Raises:
        DataError: the path does not exist, is no regular file, or has a name that states none of these types.
    """
    if path.is_dir():
        raise DataError(f"{group}.path={path} is a folder; name one file in it")
    if not path.exists():
        raise DataError(f"{group}.path={path} does not exist; check the name (working folder: {Path.cwd()})")
    if not path.is_file():  # reading a pipe or a device may never end
        raise DataError(
            f"{group}.path={path} is a pipe, a socket or a device; write the rows to a file, and give that file"
        )
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{group}.path={path} has no known type; its name must end in one of: {', '.join(SUFFIXES)}")
    kind = name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[1]
    return "jsonl" if kind == "ndjson" else kind


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":  # pyarrow refuses zeros after the last member, which tapes add
        return gzip.open(path, "rb")
    if suffix == ".zst":
        import pyarrow as pa

        unpacked: Any = pa.input_stream(str(path), compression="zstd")
        return io.BufferedReader(unpacked)
    return path.open("rb")


def hash_of(path: Path) -> str:
    """Return the SHA-256 of the file's bytes; raise DataError if the file cannot be read."""
    with _reading(path):
        return file_hash(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile as error:
        raise DataError(f"{path} is not gzip ({error}); remove .gz from its name if it is plain text") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is broken gzip ({error}); {AGAIN}") from error
    except OSError as error:
        if error.errno is None and path.suffix.lower() == ".zst":  # raised by pyarrow
            raise DataError(f"{path} is broken or not zstd ({error}); {AGAIN}") from error
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------- encodings


def _as_utf8(path: Path, stream: gzip.GzipFile | io.BufferedReader) -> gzip.GzipFile | io.BufferedReader | io.BytesIO:
    """Return the stream, converted to UTF-8 if it begins with a byte order mark of UTF-16 or UTF-32."""
    encoding = json.detect_encoding(stream.peek(4)[:4])
    if encoding not in ("utf-16", "utf-32"):  # `detect_encoding` returns these two only for a byte order mark
        return stream
    try:
        text = stream.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not {encoding.upper()}, the encoding of the file's byte order mark "
            f"({error.reason}); save the file in UTF-8"
        ) from error
    return io.BytesIO(text.encode("utf-8"))


def _decoded(path: Path, data: bytes, line: int) -> str:
    """Decode UTF-8 bytes. Error messages use `line`, the number in the file of the first line of `data`."""
    if line == 1 and data[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is gzip; name it {path.name}.gz")
    if line == 1 and b"\0" in data[:4]:
        raise DataError(
            f"{path} begins with NUL bytes, so it may be UTF-16 without a byte order mark; save the file in UTF-8"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file in UTF-8"
        ) from error


# --------------------------------------------------------------------------------------------- JSON


def _values(path: Path, text: str, line: int) -> list[Any]:
    """Return the JSON values of `text`.

    Error messages use `line`, the number in the file of the first line of `text`.
    """
    try:
        return outside_json.loads_all(text)
    except outside_json.RepeatedKeyError as error:
        place = f", line {line}" if "\n" not in text.strip() else ""
        raise DataError(f"{path}{place}: {error}; rename or delete one of them") from error
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{path}, {place}: broken JSON ({error.msg}); {_remedy(path, text, error)}") from error


def _remedy(path: Path, text: str, error: json.JSONDecodeError) -> str:
    is_array = file_kind(path) == "json"
    rest = text[error.pos :].lstrip(outside_json.BLANK)
    before = text[: error.pos].rstrip(outside_json.BLANK)
    if not rest or error.msg.startswith("Unterminated"):
        return AGAIN if is_array else f"{AGAIN}, or let its name end in .json if its objects span lines"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments: delete them"
    if rest[0] in "]}" and before.endswith(","):
        return "delete the comma before it"
    if rest[0] == "," and before.endswith("}"):
        return "delete the commas between the objects, or put the objects in brackets and let the name end in .json"
    return "correct the JSON there"


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[SourceRow]:
    index = 0
    for line, data in enumerate(lines, start=1):
        text = _decoded(path, data, line).strip(outside_json.BLANK)
        if index == 0 and text.startswith("["):
            raise DataError(f"{path} holds a JSON array instead of one object per line; let its name end in .json")
        for value in _values(path, text, line):
            yield SourceRow(index, value, line)
            index += 1


def _json_rows(path: Path, text: str, holder: str | None) -> Iterator[SourceRow]:
    if holder is None and _is_json_lines(text):
        return _unwrapped(path, _json_lines(path, io.BytesIO(text.encode("utf-8"))))
    values = _values(path, text, 1)
    if all(isinstance(value, list) for value in values):  # concatenated files have several arrays
        return _numbered(chain.from_iterable(values))
    if len(values) > 1 and all(isinstance(value, dict) for value in values):
        return _numbered(values)
    value = values[0]
    if len(values) > 1 or not isinstance(value, dict):
        content = f"{len(values)} values" if len(values) > 1 else json_type(value)
        raise DataError(f"{path} holds {content}; it must hold an array of objects")
    rows = value.get(holder) if holder else _rows_in(path, value)
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return _numbered(rows)
    missing = f"no list of objects {holder!r}" if holder else "no list of rows"
    raise DataError(f"{path} holds one object with {missing}: its keys are {listed(value)}; write an array of objects")


def _is_json_lines(text: str) -> bool:
    """Return whether the first line that is not blank consists of complete JSON objects."""
    first = text.lstrip(outside_json.BLANK).partition("\n")[0]
    if not first.startswith("{"):
        return False
    try:
        outside_json.loads_all(first)
    except json.JSONDecodeError:
        return False
    except outside_json.RepeatedKeyError:
        pass  # `_json_lines` reports the error with its line
    return True


def _unwrapped(path: Path, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """Return `rows`; if the only row is an object that holds a list of rows, return the rows of this list."""
    first, second = next(rows, None), next(rows, None)
    if first is not None and second is None and isinstance(first.content, dict):
        inner = _rows_in(path, first.content)
        if inner is not None:
            return iter([first]) if inner == [first.content] else _numbered(inner)
    return chain((row for row in (first, second) if row is not None), rows)


def _rows_in(path: Path, content: dict[str, Any]) -> list[Any] | None:
    """Return the rows of a file with a single object; None if the object holds no list of rows.

    If a key of the object is a column of a known format, the object itself is the only row. Otherwise the rows are the
    items of the object's only list of objects.
    """
    if not KNOWN.isdisjoint(map(folded, content)):
        return [content]
    if list(content.values()) == [[]]:
        return []
    names = [name for name, value in content.items() if _are_rows(value)]
    if len(names) > 1:
        raise DataError(
            f"{path} holds several lists of objects ({listed(names)}); write the list of rows to a separate file"
        )
    return content[names[0]] if names else None


def _are_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return not any({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys() for item in value)


def _numbered(rows: Iterable[Any]) -> Iterator[SourceRow]:
    return (SourceRow(row, content) for row, content in enumerate(rows))
