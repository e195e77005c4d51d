"""Benchmark items: the questions that the finetuned models answer.

The config names the fields of each benchmark, with dots for nested fields, so a new benchmark needs no code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift import outside_json
from gradsift.config import BenchmarkSetConfig
from gradsift.data.download import fetch_url
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.matching import last_number


@dataclass(frozen=True)
class Item:
    """One question of one benchmark."""

    benchmark: str
    item_id: str
    instruction: str
    input: str  # empty if the benchmark has no such field
    reference: str | None
    after: str | None = None  # for a second turn: the benchmark of the first turn, which has the same id


def load_benchmark(
    name: str, spec: BenchmarkSetConfig, downloads: Path, limit: int | None = None, folder: Path | None = None
) -> list[Item]:
    """Read the items of one benchmark, in the order of its file.

    If the benchmark has conversations of two turns, the second turns come after all first turns and form the benchmark
    `<name>_turn_2`.

    Args:
        downloads: folder into which `spec.url` is downloaded (see `fetch_url`).
        limit: number of rows to read; None reads all.
        folder: folder with local copies of the files that would be downloaded (`benchmark.folder`).

    Raises:
        ConfigError: `spec` has neither path nor url.
        DataError: the file is missing or invalid, a row lacks a field or has a reference that `spec.match` cannot
            compare, or two rows have the same id. The message names the file, the row, the field and the config key.
    """
    file = _locate(name, spec, downloads, folder)
    key = f"benchmark.catalog.{name}"
    items: list[Item] = []
    second: list[Item] = []
    first_row: dict[str, int] = {}
    for number, row in enumerate(_read_rows(file, key, spec.rows)[:limit], start=1):
        part = _RowReader(row, file, number, key)
        item_id = str(number) if spec.id is None else part.text("id", spec.id, numbers=True)
        if item_id in first_row:
            raise DataError(
                f"{file}, rows {first_row[item_id]} and {number} have the same id {item_id!r} "
                f"in field {spec.id!r}; set {key}.id to a field with unique values, or to null for the row number"
            )
        first_row[item_id] = number
        instruction = part.text("instruction", spec.instruction, filled=True)
        input_text = "" if spec.input is None else part.text("input", spec.input)
        items.append(Item(name, item_id, instruction, input_text, _reference(part, spec)))
        if spec.second_turn is not None:
            question = part.text("second_turn", spec.second_turn, filled=True)
            second.append(Item(f"{name}_turn_2", item_id, question, "", None, after=name))
    return [*items, *second]


def _reference(part: _RowReader, spec: BenchmarkSetConfig) -> str | None:
    """Return the text of the field that `spec.reference` names; None if `spec.reference` is None.

    If `spec.reference_after` is set, return only the text after the last occurrence of this marker, without surrounding
    white space.
    """
    if spec.reference is None:
        return None
    text = part.text("reference", spec.reference, numbers=True, filled=True)
    if spec.reference_after is not None:
        _, marker, text = text.rpartition(spec.reference_after)
        text = text.strip()
        if not marker or not text:
            raise part.error("reference_after", spec.reference, f"has nothing after {spec.reference_after!r}")
    if spec.match == "number" and last_number(text) is None:
        raise part.error("match", spec.reference, f"has no number to compare with ({text[:40]!r})")
    return text


def _locate(name: str, spec: BenchmarkSetConfig, downloads: Path, folder: Path | None) -> Path:
    remedy = f"benchmark.catalog.{name}.path=FILE"
    if spec.path is not None:
        file = Path(spec.path).expanduser()
        if not file.is_file():
            raise DataError(f"{file} does not exist; give the benchmark's file with {remedy}")
        return file
    if spec.url is None:
        raise ConfigError(f"benchmark.catalog.{name} has neither path nor url; give {remedy}")
    if folder is not None:
        file = folder / (spec.file or spec.url.rsplit("/", 1)[-1])
        if not file.is_file():
            raise DataError(
                f"{file} does not exist; store {spec.url} there, name another file in benchmark.folder with "
                f"benchmark.catalog.{name}.file=NAME, or give {remedy}"
            )
        return file
    try:
        return fetch_url(spec.url, downloads)
    except DataError as error:
        raise DataError(f"benchmark {name}: {error}, or give a file with {remedy}") from error


def _read_rows(file: Path, key: str, holder: str | None) -> list[Any]:
    """Read the rows of a file: JSON lines, a JSON list, or the list under the key `holder` of a JSON object."""
    try:
        values = outside_json.loads_all(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}); check {key}.path") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check {key}.path") from error
    except ValueError as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{file}{place}: invalid JSON ({error}); check {key}.path") from error
    content = values[0] if len(values) == 1 else values
    rows: Any = content if isinstance(content, list) else values
    if holder is not None:
        rows = content.get(holder) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            keys = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
            raise DataError(f"{file} has no list of rows under the key {holder!r} (keys: {keys}); check {key}.rows")
    if not rows:
        raise DataError(f"{file} has no rows; check {key}.path")
    return list(rows)


@dataclass(frozen=True)
class _RowReader:
    """Reads the fields of row `number` (from 1) of a file; `key` is the config key of the benchmark, for errors."""

    row: Any
    file: Path
    number: int
    key: str

    def text(self, part: str, field: str, *, numbers: bool = False, filled: bool = False) -> str:
        """Return the text in `field`: a key of the row or, with dots, a path of keys and list positions.

        If a row has a key with exactly the name `field`, dots included, that key is read.

        Args:
            part: the config key that names the field, for errors.
            numbers: whether integers are accepted.
            filled: whether blank text is refused.
        """
        value = self.row
        undotted = isinstance(value, dict) and field in value  # a key may contain dots itself
        for step in [field] if undotted else field.split("."):
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                if not isinstance(self.row, dict):
                    raise self.error(part, field, f"is missing, because the row is of type {type(self.row).__name__}")
                fields = ", ".join(map(str, self.row)) or "none"
                remedy = f"if the rows are under a key, give {self.key}.rows, else "
                raise self.error(part, field, f"is missing (fields of the row: {fields})", remedy)
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.error(part, field, f"is of type {type(value).__name__}, not text")
        if filled and not value.strip():
            raise self.error(part, field, "is blank")
        return value

    def error(self, part: str, field: str, problem: str, remedy: str = "") -> DataError:
        return DataError(f"{self.file}, row {self.number}: field {field!r} {problem}; {remedy}check {self.key}.{part}")
