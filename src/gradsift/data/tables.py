"""Reads the rows of CSV files with any delimiter, of parquet files and of Arrow files."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradsift.data.columns import listed
from gradsift.data.examples import SourceRow
from gradsift.errors import DataError, first_line

AGAIN = "the file seems to be half-written; fetch or write it again"
_DELIMITERS = {"csv": ",;\t|", "tsv": "\t,;|"}  # if delimiters are equally frequent, the first is used


def csv_rows(path: Path, text: str, kind: str) -> Iterator[SourceRow]:
    """Return the rows of a CSV table, whose first line holds the column names.

    The delimiter is a comma, semicolon, tab or vertical bar: whichever is most frequent outside quotes in the first
    line. A line `sep=;` before the column names, which some spreadsheets write, sets the delimiter instead. A line that
    repeats the column names, as in concatenated files, is skipped.

    Args:
        text: the file's text, without a byte order mark.
        kind: csv or tsv. If several delimiters are equally frequent, a csv prefers the comma and a tsv prefers the tab.

    Raises:
        DataError: the quotes are broken, a row has more or fewer cells than columns, or a column name is repeated.
    """
    skipped = 0
    if named := re.match(r'"?sep=(.)"?\r?\n', text):
        text, skipped = text[named.end() :], 1
    delimiter = named[1] if named else max(_DELIMITERS[kind], key=_first_line(text).count)
    limit = csv.field_size_limit(sys.maxsize)  # the module's default is 131,072 characters per cell
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            strict=True,
            delimiter=delimiter,
            skipinitialspace=_has_blanks_before_quotes(text, delimiter),
        )
        header = next((cells for cells in reader if cells), [])
        _require_different(path, header)
        rows: list[SourceRow] = []
        line = reader.line_num + 1 + skipped  # where the next row begins; a quoted cell can contain line breaks
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells for {len(header)} columns; correct the quotes, or {AGAIN}"
                )
            if cells and [cells[0].lstrip("\ufeff"), *cells[1:]] != header:
                rows.append(SourceRow(len(rows), dict(zip(header, cells, strict=True)), line))
            line = reader.line_num + 1 + skipped
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num + skipped}: broken CSV ({error}); correct the quotes, or {AGAIN}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return iter(rows)


def _first_line(text: str) -> str:
    """Return the first line that is not blank (the column names), without the text inside quotes."""
    first = re.search(r"[^\r\n]*\S[^\r\n]*", text)
    return re.sub(r'"[^"]*"', '""', first[0]) if first else ""


def _has_blanks_before_quotes(text: str, delimiter: str) -> bool:
    """Return whether blanks after delimiters must be skipped, so that the csv module recognises the quotes of cells.

    The result is True if a blank follows every delimiter of the first line, and if somewhere in the text a quote
    follows a delimiter and a blank. Without skipping, the csv module would read such a quote as part of the cell's
    text.
    """
    cells = _first_line(text).split(delimiter)[1:]
    return bool(cells) and all(cell.startswith(" ") for cell in cells) and f'{delimiter} "' in text


def column_rows(path: Path, kind: str) -> Iterator[SourceRow]:
    """Yield the rows of a parquet file, or of an Arrow file in the file format or the stream format of `datasets`.

    Raises:
        DataError: the file is broken, or a value cannot be read. If a value cannot be read, the message names its row
            and column.
    """
    import pyarrow as pa

    index = 0
    try:
        for batch in _batches(path, kind):
            for row in _values(path, batch, index):
                yield SourceRow(index, row)
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a complete {kind} file ({first_line(error)[:120]}); {AGAIN}") from error


def _batches(path: Path, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            _require_different(path, file.schema_arrow.names)
            yield from file.iter_batches(use_threads=False)
        return
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source) as reader:
            _require_different(path, reader.schema.names)
            yield from map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


def _require_different(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns have the same name (columns: {listed(names)}); rename one")


def _values(path: Path, batch: Any, first: int) -> Sequence[dict[str, Any]]:
    """Return the rows of a batch. Error messages use `first`, the number in the file of the first row of the batch."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date outside of Python's range
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for row, value in enumerate(column):
                try:
                    value.as_py()
                except (ValueError, OverflowError) as cause:
                    raise DataError(
                        f"{path}, row {first + row}, column {name!r}: this {column.type} cannot be read ({cause}); "
                        "write the column as UTF-8 text"
                    ) from cause
        raise DataError(f"{path}, rows from {first}: {error}; write the file again") from error
    return rows
