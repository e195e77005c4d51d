"""Examples and their ids, rejected rows, the files that hold them, and seeded samples."""

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
    """A row of a data source.

    row      position among the rows, from 0
    content  the columns as a dict; if the source has another JSON value in place of an object, that value
    line     line in the file, from 1, if the format has lines
    """

    row: int
    content: Any
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    role        system, user or assistant
    content     the text
    is_trained  whether an assistant turn carries loss; not used for other roles
    """

    role: str
    content: str
    is_trained: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """One row that can be trained on.

    row_index     position in the source, from 0; rejected rows are counted too
    example_id    content hash and occurrence number; unique
    content_hash  hash of history, instruction, input and output; equal for exact duplicates
    history       turns before the last exchange; an assistant turn in it carries loss too, unless its `is_trained` is
                  False
    instruction, input, output
                  the last exchange; input is "" if there is none
    original      every column of the source row, as JSON values
    """

    row_index: int
    example_id: str
    content_hash: str
    history: tuple[Turn, ...]
    instruction: str
    input: str
    output: str
    original: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used.

    row      position in the source, from 0
    reason   why it cannot be used
    line     line in the file, from 1, if the format has lines
    content  the row as it is in the source
    """

    row: int
    reason: str
    line: int | None
    content: Any = field(default=None, compare=False)


def content_hash(history: Sequence[Turn], instruction: str, input: str, output: str) -> str:
    """Return 16 hex digits of SHA-256 over the fields as JSON, so that moving text between fields changes the hash."""
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

    Args:
        occurrences: how often each content hash has occurred in the dataset so far; the example is added to the counts.
    """
    digest = content_hash(history, instruction, input, output)
    example_id = f"{digest}-{occurrences[digest]}"
    occurrences[digest] += 1
    return Example(row_index, example_id, digest, tuple(history), instruction, input, output, original)


# ----------------------------------------------------------------------------------- JSON values


def json_value(value: Any) -> Any:
    """Return the value of a column as a JSON value, so that a row can be written as JSON and read back unchanged.

    JSON values are returned as they are. NaN becomes null, which is its meaning in data frames, and an infinity
    becomes the text "Infinity" or "-Infinity". Dates and times become ISO text; durations, decimals and UUIDs become
    their `str`; bytes become base64 text; tuples become lists.

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
    """Return the JSON type of a value with an article (`a list`), for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    names = {"str": "a text", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


# ------------------------------------------------------------------------------------------- files

_TEXTS = ("example_id", "content_hash", "instruction", "input", "output")


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to a parquet file; `read_examples` returns equal examples.

    `original` is written as JSON text, so that a column may have any type, and different types in different rows.

    Raises:
        DataError: `original` holds a value that is not JSON (see `json_value`), or a text holds half a surrogate pair.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    originals = []
    for example in examples:
        try:
            # ASCII escapes: other columns may hold half a surrogate pair, which UTF-8 cannot encode
            originals.append(json.dumps(example.original, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {example.row_index}: its original columns are not JSON values ({error}); pass them through "
                "json_value"
            ) from error
    texts = {name: [getattr(example, name) for example in examples] for name in _TEXTS}
    history = [[asdict(turn) for turn in example.history] for example in examples]
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("is_trained", pa.bool_())])
    try:
        table = pa.table(
            {
                "row_index": pa.array([example.row_index for example in examples], pa.int64()),
                **{name: pa.array(values, pa.string()) for name, values in texts.items()},
                "history": pa.array(history, pa.list_(turn)),
                "original": pa.array(originals, pa.string()),
            }
        )
    except UnicodeEncodeError as error:
        raise DataError(f"an example's text holds half a surrogate pair ({error}); mend it in the source") from error
    pq.write_table(table, path, compression="zstd")


def read_examples(path: Path) -> list[Example]:
    """Return the examples that `write_examples` wrote, in the same order.

    Raises:
        DataError: the file is missing, broken, or holds something else.
    """
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
    """Yield the table that `write_examples` wrote, block by block, so that the table need not fit in memory.

    Args:
        names: the columns to read; None for all.

    Raises:
        DataError: see `read_examples`.
    """
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
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); delete its folder and load the data again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no file of examples ({error!r}); delete its folder and load the data again"
        ) from error


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write one JSON object per rejected row: row, reason, line, content.

    A value that JSON cannot hold is replaced with a text that states why.
    """
    with path.open("w", encoding="ascii") as stream:
        for row in rejected:
            content = row.content
            if isinstance(content, dict):
                kept: Any = {str(name): _kept_value(value) for name, value in content.items()}
            else:
                kept = _kept_value(content)
            fields = {"row": row.row, "reason": row.reason, "line": row.line, "content": kept}
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
    """Draw a seeded sample of the examples (the pool), and `holdout` other examples; both in the order of the source.

    The held-out examples are drawn first, so they are the same for every `limit`. Then at most `limit` of the remaining
    examples are drawn; with the same seed, a smaller pool is part of every larger pool. Examples with equal prompts
    (history, instruction and input) are held out together, so held-out examples and pool share no prompt and no content
    hash. A group of equal prompts is divided only if `holdout` cannot be reached otherwise. The rest of the group is
    then neither held out nor in the pool.

    Args:
        limit: largest size of the pool; None for no limit.

    Returns:
        The pool and the held-out examples.

    Raises:
        ConfigError: there are fewer than `holdout` examples, or none is left for the pool.
    """
    import numpy as np

    # two random streams: held-out rows must not depend on `limit`, nor the order of the pool's draw on `holdout`
    held_rng, pool_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    priority = pool_rng.permutation(len(examples))
    held, barred = (
        _hold_out(examples, holdout, held_rng.permutation(len(examples)).tolist()) if holdout else ([], set())
    )
    free = [index for index in priority.tolist() if index not in barred]
    if not free:
        raise ConfigError(
            f"data.holdout={holdout} leaves none of the {len(examples)} accepted rows to select from "
            "(rows with equal prompts stay together); give a smaller data.holdout"
        )
    pool = free if limit is None else free[:limit]
    return [examples[i] for i in sorted(pool)], [examples[i] for i in sorted(held)]


def _hold_out(examples: Sequence[Example], holdout: int, order: list[int]) -> tuple[list[int], set[int]]:
    """Return the held-out positions, and the positions of all examples whose prompt is held out.

    Args:
        order: a random order of all positions.
    """
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
