"""Datasets in: files and hub datasets to rows, rows to examples.

Two kinds of trouble are kept apart. A file that cannot be read as what it says it is raises a `DataError`
that names the place: nothing is guessed or skipped. A row that is read but cannot be trained on becomes
`Rejected`, with a reason, and the others go on.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gradsift import outside_json
from gradsift.config import DATA_FORMATS, FieldsConfig
from gradsift.data.examples import Example, Rejected, Turn, json_value, make_example
from gradsift.errors import ConfigError, DataError

SUFFIXES = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".json.gz",
    ".jsonl.gz",
    ".ndjson.gz",
    ".csv",
    ".csv.gz",
    ".parquet",
)
_AGAIN = "the file seems to be half-written; fetch or write it again"


class SourceRow(NamedTuple):
    """A row as it stands in its source.

    row      position among the rows, from 0
    content  the columns; another JSON value where the source has one in a row's place
    line     line in the file, from 1, where the format has lines
    """

    row: int
    content: Any
    line: int | None = None


# ------------------------------------------------------------------------------------------- files


def read_rows(path: Path, *, group: str = "data", holder: str | None = None) -> Iterator[SourceRow]:
    """The rows of a .json, .jsonl, .csv (each also with .gz) or .parquet file, in its order.

    .json     an array of objects; an object that holds one such array and nothing else, {"data": [...]};
              or JSON lines, which many files of that name are
    .jsonl    one object a line; empty lines do not count as rows
    .csv      UTF-8, commas, the column names in the first line; every cell is text
    .parquet  columns of any type

    Args:
        group: of the options that name the file, for errors.
        holder: key of the array, where a .json file's object holds other things beside it.

    Raises:
        DataError: the file is missing, a folder, empty, half-written, of no known type, not UTF-8 or
            broken; names the file, the line where there is one, and the remedy.
    """
    kind = file_kind(path, group)
    with _reading(path):
        if kind == "parquet":
            yield from _parquet_rows(path)
            return
        with _open(path) as stream:
            if kind == "jsonl":
                rows = _json_lines(path, stream)
            else:
                text = _decoded(path, stream.read(), 1)
                rows = _json_rows(path, text, holder) if kind == "json" else _csv_rows(path, text)
            first = next(rows, None)
            if first is None:
                raise DataError(f"{path} is empty: it holds no row; fetch or write it again")
            yield first
            yield from rows


def file_kind(path: Path, group: str = "data") -> str:
    """json, jsonl, csv or parquet, by the file's name."""
    if path.is_dir():
        raise DataError(f"{group}.path={path} is a folder; name one file in it")
    if not path.exists():
        raise DataError(f"{group}.path={path} does not exist; check the name (now in {Path.cwd()})")
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{group}.path={path} is of no known type; its name must end in one of: {', '.join(SUFFIXES)}")
    kind = name.removesuffix(".gz").rsplit(".", 1)[1]
    return "jsonl" if kind == "ndjson" else kind


def hash_of(path: Path) -> str:
    """SHA-256 of the file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    with _reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a broken file raises while it is read into a `DataError`."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise DataError(f"{path} is not gzip ({error}); remove .gz from its name if it is plain text") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is broken gzip ({error}); {_AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; fetch or write it again")
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _decoded(path: Path, data: bytes, line: int) -> str:
    """The text of `data`, which begins at a line of the file."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        if line == 1 and data[:2] == b"\x1f\x8b":
            raise DataError(f"{path} is gzip; name it {path.name}.gz") from error
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file in UTF-8"
        ) from error


def _loads(path: Path, text: str, line: int) -> Any:
    """The JSON value that `text`, which begins at a line of the file, holds."""
    try:
        return outside_json.loads(text)
    except json.JSONDecodeError as error:
        at_end = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(
            f"{path}, {place}: broken JSON ({error.msg}); {_AGAIN if at_end else 'mend that place'}"
        ) from error


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[SourceRow]:
    index = 0
    for line, data in enumerate(lines, start=1):
        text = _decoded(path, data, line).strip()
        if index == 0 and text.startswith("["):
            raise DataError(f"{path} holds a JSON array instead of one object a line; let its name end in .json")
        if text:
            yield SourceRow(index, _loads(path, text, line), line)
            index += 1


def _json_rows(path: Path, text: str, holder: str | None) -> Iterator[SourceRow]:
    if not text.strip():
        return iter(())
    if holder is None and _is_json_lines(text):
        return _json_lines(path, io.BytesIO(text.encode("utf-8")))
    value = _loads(path, text, 1)
    if isinstance(value, list):
        return _numbered(value)
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a single {_type(value)}; it must hold an array of objects")
    wrapped = value.get(holder) if holder else next(iter(value.values())) if len(value) == 1 else None
    if isinstance(wrapped, list) and all(isinstance(row, dict) for row in wrapped):
        return _numbered(wrapped)
    raise DataError(
        f"{path} holds one object with the keys {_listed(value)}; it must hold an array of objects, one a row"
    )


def _is_json_lines(text: str) -> bool:
    """Whether the first line that is not empty is a whole object, and so the first row.

    One object on one line that holds a single array stays in doubt; it counts as {"data": [...]} unless
    the array is a conversation's.
    """
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{"):
        return False
    try:
        value = outside_json.loads(first)
    except json.JSONDecodeError:
        return False
    if rest.strip() or len(value) != 1:
        return True
    (inner,) = value.values()
    return not isinstance(inner, list) or any(
        isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
        for item in inner
    )


def _csv_rows(path: Path, text: str) -> Iterator[SourceRow]:
    limit = csv.field_size_limit(sys.maxsize)  # the module's limit of 131,072 characters a cell guards nothing here
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next((cells for cells in reader if cells), [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}: column names must differ, but are {_listed(header)}; rename some")
        rows: list[SourceRow] = []
        line = reader.line_num + 1  # where the row begins: a quoted cell may span lines
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells for {len(header)} columns; mend the quotes, or {_AGAIN}"
                )
            if cells:
                rows.append(SourceRow(len(rows), dict(zip(header, cells, strict=True)), line))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: broken CSV ({error}); mend the quotes, or {_AGAIN}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return iter(rows)


def _numbered(rows: Iterable[Any]) -> Iterator[SourceRow]:
    return (SourceRow(row, content) for row, content in enumerate(rows))


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; fetch or write it again")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: column names must differ, but are {_listed(names)}; rename some")
            if file.metadata.num_rows == 0:
                raise DataError(f"{path} is empty: it holds no row; fetch or write it again")
            index = 0
            for batch in file.iter_batches(use_threads=False):
                for row in batch.to_pylist():
                    yield SourceRow(index, row)
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole parquet file ({str(error).splitlines()[0][:120]}); {_AGAIN}") from error


# --------------------------------------------------------------------------------------------- hub


def load_hub(id: str, revision: str | None, split: str) -> Iterator[SourceRow]:
    """The rows of a hub dataset, through `datasets`; from the local cache where HF_HUB_OFFLINE=1.

    Code that a dataset brings along is never run.

    Raises:
        DataError: the dataset, revision or split does not exist, is gated, or cannot be reached.
    """
    if Path(id).exists():  # `datasets` would take it for the dataset
        raise DataError(
            f"data.id={id} is a file or folder here; take data=json data.path=FILE, or another folder to run in"
        )
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(id, revision=revision, split=split)
    except DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            raise DataError(
                f"data.id={id} is gated: accept its terms on its hub page, then log in with `hf auth login`"
            ) from error
        at = f" at data.revision={revision}" if revision else ""
        raise DataError(
            f"data.id={id}{at} is no dataset of the hub (or a private one: log in with `hf auth login`); check the name"
        ) from error
    except HFValidationError as error:
        raise DataError(f"data.id={id} is no name of a hub dataset; give it as OWNER/NAME") from error
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, OSError) as error:
        raise DataError(
            f"data.id={id} is not in the local cache and the hub cannot be reached ({_first_line(error)}); connect "
            "once (with HF_HUB_OFFLINE unset), or take data=json data.path=FILE"
        ) from error
    except (
        DatasetsError,
        ValueError,
        RuntimeError,
    ) as error:  # no such split or configuration; a dataset with code
        raise DataError(
            f"data.id={id}, data.split={split}: {_first_line(error)}; check them, or take data=json data.path=FILE"
        ) from error
    return _numbered(dataset)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------- examples


class _Unusable(Exception):
    """Why a row cannot be trained on; becomes a `Rejected`."""


class _Conversation(NamedTuple):
    history: list[Turn]
    instruction: str
    input: str
    output: str


def parse_rows(
    rows: Iterable[SourceRow | tuple[int, Any]],
    format: str,
    fields: FieldsConfig,
    source: str = "the data",
    group: str = "data",
) -> tuple[list[Example], list[Rejected]]:
    """Turn rows into examples.

    alpaca             instruction, input (may be missing or null), output
    messages           [{"role": system | user | assistant, "content": text}, ...]
    sharegpt           [{"from": system | human | gpt, "value": text}, ...]
    prompt_completion  prompt and completion, both text or both messages
    auto               the first of these whose columns the data has; the first row that has any decides

    Texts are kept as they are; an input of white space alone counts as none. A conversation is
    system prompt, then user and assistant in turn; user turns after the last assistant turn teach
    nothing and are left out. Every column stays in `Example.original`, as JSON values.

    Args:
        rows: what a reader of this module gives; pairs of position and columns will do.
        source: name of the data in errors.
        group: of the options that describe the data, for errors.

    Raises:
        DataError: there is no row, no format fits, or not a single row can be used; lists the columns.
        ConfigError: an unknown format.
    """
    if format not in DATA_FORMATS:
        raise ConfigError(f"{group}.format={format!r} is not known; choose one of: {', '.join(DATA_FORMATS)}")
    found = [SourceRow(*row) for row in rows]
    if not found:
        raise DataError(f"{source} is empty: it holds no row")
    parse = _PARSERS[_recognised(found, fields, source, group) if format == "auto" else format]
    examples: list[Example] = []
    rejected: list[Rejected] = []
    occurrences: Counter[str] = Counter()
    for row, content, line in found:
        try:
            original = _original(content)
            parsed = parse(original, fields)
            examples.append(make_example(row, *parsed, original=original, occurrences=occurrences))
        except _Unusable as reason:
            rejected.append(Rejected(row, str(reason), line))
    if not examples:
        raise DataError(_nothing_usable(found, rejected, source, group))
    return examples, rejected


def _recognised(rows: Iterable[SourceRow], fields: FieldsConfig, source: str, group: str) -> str:
    needed = {
        "alpaca": {fields.instruction, fields.output},
        "messages": {fields.messages},
        "sharegpt": {fields.conversations},
        "prompt_completion": {fields.prompt, fields.completion},
    }
    for row in rows:
        for format, columns in needed.items():
            if isinstance(row.content, dict) and columns <= row.content.keys():
                return format
    wanted = "; ".join(f"{format}: {', '.join(sorted(columns))}" for format, columns in needed.items())
    raise DataError(
        f"{source} is in no format that {group}.format=auto knows: its columns are {_columns(rows)}, a format needs "
        f"({wanted}); set {group}.format, and the names of its columns as in {group}.fields.output=NAME"
    )


def _nothing_usable(rows: Iterable[SourceRow], rejected: list[Rejected], source: str, group: str) -> str:
    reasons = Counter(row.reason for row in rejected).most_common(3)
    told = "; ".join(f"{reason} ({count:,} rows)" for reason, count in reasons)
    return (
        f"{source}: none of its {len(rejected):,} rows can be used: {told}. Its columns are {_columns(rows)}; check "
        f"{group}.format, and the names of its columns as in {group}.fields.output=NAME"
    )


def _columns(rows: Iterable[SourceRow]) -> str:
    names = dict.fromkeys(name for row in rows if isinstance(row.content, dict) for name in row.content)
    return _listed(names) if names else "none (the rows are no objects)"


def _listed(names: Iterable[Any]) -> str:
    shown = [str(name)[:40] for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _original(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _Unusable(f"the row is a {_type(content)}, not an object")
    original = {}
    for name, value in content.items():
        try:
            original[str(name)] = json_value(value)
        except TypeError as error:
            raise _Unusable(f"column {name!r} holds {error}") from error
        except RecursionError:
            raise _Unusable(f"column {name!r} is nested too deep") from None
    return original


def _type(value: Any) -> str:
    """A value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    names = {"str": "text", "dict": "object"}
    return names.get(type(value).__name__, type(value).__name__)


def _text(holder: Mapping[str, Any], name: str, what: str | None = None) -> str:
    """A field that must be text which a tokenizer and a file can take."""
    what = what or f"field {name!r}"
    if name not in holder:
        raise _Unusable(f"{what} is missing")
    value = holder[name]
    if not isinstance(value, str):
        raise _Unusable(f"{what} is a {_type(value)}, not text" if value is not None else f"{what} is null, not text")
    if "\0" in value:
        raise _Unusable(f"{what} holds a NUL character")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise _Unusable(f"{what} holds half a surrogate pair, which is no character")
    return value


def _filled(holder: Mapping[str, Any], name: str, what: str | None = None) -> str:
    value = _text(holder, name, what)
    if not value.strip():
        raise _Unusable(f"{what or f'field {name!r}'} is empty")
    return value


def _alpaca(row: Mapping[str, Any], fields: FieldsConfig) -> _Conversation:
    instruction = _text(row, fields.instruction)
    given = "" if row.get(fields.input) is None else _text(row, fields.input)
    given = given if given.strip() else ""
    if not instruction.strip() and not given:
        raise _Unusable(f"fields {fields.instruction!r} and {fields.input!r} are both empty")
    return _Conversation([], instruction, given, _filled(row, fields.output))


def _prompt_completion(row: Mapping[str, Any], fields: FieldsConfig) -> _Conversation:
    prompt, completion = row.get(fields.prompt), row.get(fields.completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], _ROLES, "role", "content")
    if isinstance(prompt, list) or isinstance(completion, list):
        raise _Unusable(f"fields {fields.prompt!r} and {fields.completion!r} must both be text or both be lists")
    return _Conversation([], _filled(row, fields.prompt), "", _filled(row, fields.completion))


_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {**_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def _messages(row: Mapping[str, Any], fields: FieldsConfig) -> _Conversation:
    return _conversation(_turn_list(row, fields.messages), _ROLES, "role", "content")


def _sharegpt(row: Mapping[str, Any], fields: FieldsConfig) -> _Conversation:
    return _conversation(_turn_list(row, fields.conversations), _SHAREGPT_ROLES, "from", "value")


def _turn_list(row: Mapping[str, Any], name: str) -> list[Any]:
    if name not in row:
        raise _Unusable(f"field {name!r} is missing")
    if not isinstance(row[name], list):
        raise _Unusable(f"field {name!r} is a {_type(row[name])}, not a list of turns")
    turns: list[Any] = row[name]
    return turns


def _conversation(entries: list[Any], roles: Mapping[str, str], role_key: str, content_key: str) -> _Conversation:
    turns = [_turn(entry, number, roles, role_key, content_key) for number, entry in enumerate(entries, start=1)]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise _Unusable("no turn is the assistant's")
    first = 0
    if turns[0].role == "system":
        first = 1
        if not turns[0].content.strip():
            turns, first = turns[1:], 0
    for number, turn in enumerate(turns[first:]):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise _Unusable(
                f"user and assistant do not take turns: a turn of the {turn.role} where the {expected}'s is due"
            )
    return _Conversation(turns[:-2], turns[-2].content, "", turns[-1].content)


def _turn(entry: Any, number: int, roles: Mapping[str, str], role_key: str, content_key: str) -> Turn:
    if not isinstance(entry, dict):
        raise _Unusable(f"turn {number} is a {_type(entry)}, not an object")
    role = _text(entry, role_key, f"{role_key!r} of turn {number}")
    if role not in roles:
        raise _Unusable(f"turn {number} has the role {role[:40]!r}; known: {', '.join(roles)}")
    read = _text if roles[role] == "system" else _filled
    return Turn(roles[role], read(entry, content_key, f"{content_key!r} of turn {number}"))


_PARSERS: dict[str, Callable[[Mapping[str, Any], FieldsConfig], _Conversation]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
}
