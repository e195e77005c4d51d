"""Examples with their ids, rejected rows, the files that hold them, and seeded samples of examples."""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradsift.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK = 2**15  # rows read at once, about 50 MB of text


class SourceRow(NamedTuple):
    """A row of a data source."""

    row: int  # position among the rows, from 0
    content: Any  # the columns as a dict, or another JSON value if the row is not an object
    line: int | None = None  # line in the file, from 1, if the format has lines


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str  # system, user or assistant
    content: str
    is_trained: bool = True  # whether an assistant turn carries loss; not used for other roles


@dataclass(frozen=True, slots=True)
class Example:
    """A row that can be trained on. Its last exchange consists of `instruction`, `input` ("" if none) and `output`."""

    row_index: int  # position in the source, from 0; rejected rows are counted too
    example_id: str  # content hash and occurrence number; unique
    content_hash: str  # hash of history, instruction, input and output; equal for exact duplicates
    history: tuple[Turn, ...]  # turns before the last exchange, whose assistant turns may carry loss too
    instruction: str
    input: str
    output: str
    original: dict[str, Any]  # every column of the source row, as JSON values


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used."""

    row: int  # position in the source, from 0
    reason: str
    line: int | None  # line in the file, from 1, if the format has lines
    content: Any = field(default=None, compare=False)  # the row as it is in the source


def content_hash(history: Sequence[Turn], instruction: str, input: str, output: str) -> str:
    """Hash the arguments, written as JSON, with SHA-256; return the first 16 hex digits.

    The same text in another field gives another hash.
    """
    turns = [[turn.role, turn.content] + ([] if turn.is_trained else ["not trained"]) for turn in history]
    fields = [turns, instruction, input, output]
    return hashlib.sha256(json.dumps(fields).encode("ascii")).hexdigest()[:16]


def make_example(
    row_index: int,
    history: Sequence[Turn],
    instruction: str,
    input: str,
    output: str,
    original: dict[str, Any],
    occurrences: Counter[str],
) -> Example:
    """Return an example with its ids.

    `occurrences` has the number of earlier examples with each content hash. The example's id is its content hash
    followed by this number, which is then increased by 1.
    """
    digest = content_hash(history, instruction, input, output)
    example_id = f"{digest}-{occurrences[digest]}"
    occurrences[digest] += 1
    return Example(row_index, example_id, digest, tuple(history), instruction, input, output, original)


# ----------------------------------------------------------------------------------- JSON values


def json_value(value: Any) -> Any:
    """Return the value of a column, converted to a value that JSON can hold.

    NaN becomes null, since data frames use it for missing values. Infinities become "Infinity" or "-Infinity".
    Dates and times become ISO text; durations, decimals and UUIDs become their `str`; bytes become base64 text.

    Raises:
        TypeError: the value, or a value in it, has another type, such as an image.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"a {type(value).__name__}, which JSON cannot hold")


def json_type(value: Any) -> str:
    """Return the name of a value's JSON type for messages, with an article, as in `a list`."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", dict: "an object", list: "a list"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


# ------------------------------------------------------------------------------------------- files

_TEXTS = ("example_id", "content_hash", "instruction", "input", "output")


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to a parquet file; `read_examples` returns equal examples.

    `original` is written as JSON text, so that the source's columns may have any type, and different types in different
    rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("is_trained", pa.bool_())])
    types = {"row_index": pa.int64(), **dict.fromkeys(_TEXTS, pa.string())}
    columns = {name: [getattr(example, name) for example in examples] for name in types}
    columns["history"] = [[asdict(turn) for turn in example.history] for example in examples]
    # ASCII escapes: columns that are not trained on may hold half a surrogate pair, which UTF-8 cannot encode
    columns["original"] = [json.dumps(example.original, allow_nan=False) for example in examples]
    schema = pa.schema({**types, "history": pa.list_(turn), "original": pa.string()})
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def read_examples(path: Path) -> list[Example]:
    """Return the examples that `write_examples` wrote to `path`; raise DataError if the file is missing or broken."""
    with _reading(path):
        examples = []
        for block in read_blocks(path):
            for row in block.to_pylist():
                history = tuple(Turn(turn["role"], turn["content"], turn["is_trained"]) for turn in row["history"])
                texts = {name: row[name] for name in _TEXTS}
                original = json.loads(row["original"])
                examples.append(Example(row_index=row["row_index"], history=history, original=original, **texts))
        return examples


def read_blocks(path: Path, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the table that `write_examples` wrote, or only its columns `names`, in blocks of up to 32,768 rows."""
    import pyarrow.parquet as pq

    with _reading(path), pq.ParquetFile(path, pre_buffer=False) as file:
        yield from file.iter_batches(_BLOCK, columns=None if names is None else list(names), use_threads=False)


def read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Return one column of the table that `write_examples` wrote."""
    import pyarrow.parquet as pq

    with _reading(path), pq.ParquetFile(path) as file:
        return file.read([name], use_threads=False)[name]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is missing, broken or no file of examples ({error!r}); delete its folder and load the data again"
        ) from error


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write one line per rejected row: a JSON object with the keys row, reason, line and content.

    A value that JSON cannot hold is replaced with a text that states why.
    """
    with path.open("w", encoding="ascii") as stream:
        for row in rejected:
            if isinstance(row.content, dict):
                content: Any = {str(name): _kept_value(value) for name, value in row.content.items()}
            else:
                content = _kept_value(row.content)
            fields = {"row": row.row, "reason": row.reason, "line": row.line, "content": content}
            stream.write(json.dumps(fields) + "\n")


def _kept_value(value: Any) -> Any:
    try:
        kept = json_value(value)
        json.dumps(kept)
    except TypeError as error:
        return f"(not kept: {error})"
    except RecursionError:
        return "(not kept: nested too deep)"
    return kept


# ------------------------------------------------------------------------------------------ sample


def draw(
    examples: Sequence[Example], limit: int | None, holdout: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return a seeded sample of the examples (the pool), and `holdout` other examples, both in the order of the source.

    The held-out examples are drawn first, so they are the same for every `limit`. Then at most `limit` of the remaining
    examples are drawn for the pool (None: all). With the same seed, a smaller pool is part of every larger pool.

    Examples with equal prompts (history, instruction and input) form a group, which is held out as a whole. So the pool
    has no prompt of a held-out example. A group is divided only if the number `holdout` cannot be reached otherwise;
    the rest of the group is then neither held out nor in the pool.

    Raises:
        ConfigError: there are fewer than `holdout` examples, or no example is left for the pool.
    """
    import numpy as np

    # two random streams, so that held-out rows do not depend on `limit`, nor the order of the pool on `holdout`
    held_order, pool_order = (np.random.default_rng([seed, stream]).permutation(len(examples)) for stream in (0, 1))
    held, barred = _hold_out(examples, holdout, held_order.tolist())
    free = [index for index in pool_order.tolist() if index not in barred]
    if not free:
        raise ConfigError(
            f"data.holdout={holdout} leaves none of the {len(examples)} accepted rows to select from "
            "(rows with equal prompts stay together); give a smaller data.holdout"
        )
    pool = free if limit is None else free[:limit]
    return [examples[i] for i in sorted(pool)], [examples[i] for i in sorted(held)]


def _hold_out(examples: Sequence[Example], holdout: int, order: list[int]) -> tuple[list[int], set[int]]:
    """Return the positions to hold out, and the positions of all examples that have the prompt of a held-out example.

    `order` lists all positions in random order. Groups of examples with equal prompts are tried in the order in which
    `order` first names one of their positions.
    """
    if holdout == 0:
        return [], set()
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in order:
        example = examples[index]
        groups.setdefault((example.history, example.instruction, example.input), []).append(index)
    held: list[int] = []
    too_large = []
    for group in groups.values():
        if len(held) + len(group) <= holdout:
            held += group
        else:
            too_large.append(group)
    barred = set(held)
    if len(held) < holdout and too_large:
        smallest = min(too_large, key=len)
        held += smallest[: holdout - len(held)]
        barred.update(smallest)
    if len(held) < holdout:
        raise ConfigError(
            f"data.holdout={holdout}, but only {len(examples)} rows were accepted; give a smaller data.holdout"
        )
    return held, barred
