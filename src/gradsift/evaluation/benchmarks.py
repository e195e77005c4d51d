"""Benchmark items: the questions that the finetuned models answer.

The fields of test sets have different names, and some fields are nested. The config gives the names of a set's fields,
with dots for nested fields, so a new set needs no code.
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
    input: str  # empty where the set has none
    reference: str | None
    after: str | None = None  # of a second turn: the benchmark of the first turn, which has the same id


def load_benchmark(
    name: str, spec: BenchmarkSetConfig, downloads: Path, limit: int | None = None, folder: Path | None = None
) -> list[Item]:
    """Read the items of one benchmark, in the order of its file.

    If the set has conversations, their second turns form a benchmark of their own, `<name>_turn_2`, and come last.

    Args:
        downloads: folder into which `spec.url` is downloaded (see `fetch_url`).
        limit: number of rows to read; None reads all.
        folder: folder with local copies of the files that would be downloaded (`benchmark.folder`).

    Raises:
        ConfigError: the set has neither path nor url.
        DataError: the file is missing or broken, a row lacks a field or has a reference that `spec.match` cannot
            compare, or two rows have the same id. The message names file, row, field and key.
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
                f"in field {spec.id!r} ({key}.id); name a unique field, or null for the row number"
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
    """Return the text of the reference field after the last `spec.reference_after`; None if no field is set."""
    if spec.reference is None:
        return None
    text = part.text("reference", spec.reference, numbers=True, filled=True)
    if spec.reference_after is not None:
        _, marker, text = text.rpartition(spec.reference_after)
        text = text.strip()
        if not marker or not text:
            raise part.error("reference_after", spec.reference, f"has nothing behind {spec.reference_after!r}")
    if spec.match == "number" and last_number(text) is None:
        raise part.error("match", spec.reference, f"holds no number to compare with ({text[:40]!r})")
    return text


def _locate(name: str, spec: BenchmarkSetConfig, downloads: Path, folder: Path | None) -> Path:
    remedy = f"benchmark.catalog.{name}.path=FILE"
    if spec.path is not None:
        file = Path(spec.path).expanduser()
        if not file.is_file():
            raise DataError(f"{file} is not there; give the benchmark's file with {remedy}")
        return file
    if spec.url is None:
        raise ConfigError(f"benchmark.catalog.{name} has neither path nor url; give {remedy}")
    if folder is not None:
        file = folder / (spec.file or spec.url.rsplit("/", 1)[-1])
        if not file.is_file():
            raise DataError(
                f"{file} is not there; put {spec.url} at that place, name another below benchmark.folder with "
                f"benchmark.catalog.{name}.file=NAME, or give {remedy}"
            )
        return file
    try:
        return fetch_url(spec.url, downloads)
    except DataError as error:
        raise DataError(f"benchmark {name}: {error}, or give its place with {remedy}") from error


def _read_rows(file: Path, key: str, holder: str | None) -> list[Any]:
    """Read the rows of a JSON list, of JSON lines, or under the key `holder` of a JSON object."""
    try:
        values = outside_json.loads_all(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}); check {key}.path") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check {key}.path") from error
    except ValueError as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{file}{place}: broken JSON ({error}); check {key}.path") from error
    content = values[0] if len(values) == 1 else values
    rows: Any = content if isinstance(content, list) else values
    if holder is not None:
        rows = content.get(holder) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            has = ", ".join(map(str, content)) if isinstance(content, dict) else "no keys"
            raise DataError(f"{file} holds no list of rows under {holder!r} (it has: {has}); check {key}.rows")
    if not rows:
        raise DataError(f"{file} holds no rows; check {key}.path")
    return list(rows)


@dataclass(frozen=True)
class _RowReader:
    """Reads the fields of one row; `number` counts rows from 1."""

    row: Any
    file: Path
    number: int
    key: str

    def text(self, part: str, field: str, *, numbers: bool = False, filled: bool = False) -> str:
        """Return the text in a dotted field; `numbers` accepts integers, `filled` refuses blank text."""
        value = self.row
        undotted = isinstance(value, dict) and field in value  # a key may contain dots itself
        for step in [field] if undotted else field.split("."):
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                if not isinstance(self.row, dict):
                    raise self.error(part, field, f"is missing: this row is of type {type(self.row).__name__}")
                has = ", ".join(map(str, self.row)) or "no field"
                remedy = f"if the rows are under a key, give {self.key}.rows, else "
                raise self.error(part, field, f"is missing (it has: {has})", remedy)
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.error(part, field, f"holds {type(value).__name__}, not text")
        if filled and not value.strip():
            raise self.error(part, field, "is blank")
        return value

    def error(self, part: str, field: str, problem: str, remedy: str = "") -> DataError:
        """Return an error about `field`, which the config key `part` names."""
        return DataError(f"{self.file}, row {self.number}: field {field!r} {problem}; {remedy}check {self.key}.{part}")
