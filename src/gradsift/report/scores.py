"""`gradsift scores RUN --out FILE`: write the scores of a run as one table, which others can join to their data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from gradsift.data.examples import json_value, read_blocks
from gradsift.data.load import EXAMPLES_FILE
from gradsift.errors import ConfigError, DataError, command
from gradsift.names import require_no_link
from gradsift.report.material import read
from gradsift.scoring.published import OWN
from gradsift.scoring.stage import SCORES_FILE

TYPES = (".parquet", ".jsonl", ".csv")


def write_scores_of(run: Path, out: Path, artifacts: Path | None = None) -> int:
    """Write one row per example (columns: see `gradsift.scoring.published`), in the order of the data.

    Args:
        run: the folder of a run that has scores.
        out: the file to write; the end of its name (one of TYPES) decides the format. An existing file is replaced.
        artifacts: the store's folder, if it has moved.

    Returns:
        The number of rows.

    Raises:
        GradsiftError: the type is unknown, the folder of `out` does not exist, `run` is a sweep, its data or scores are
            not in the store, or a part of the score has the name of another column.
    """
    if out.suffix not in TYPES:
        raise ConfigError(f"--out {out} is of no known type; let its name end in one of: {', '.join(TYPES)}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")
    material = read(run, artifacts)
    if material.is_sweep:
        names = ", ".join(each.name for each in material.runs[:5])
        raise DataError(f"{run} is a sweep; give the folder of one of its runs: {names}")
    loaded, scored = material.runs[0].one("load"), material.runs[0].one("score")
    scores = pq.read_table(scored.file(SCORES_FILE), memory_map=True).drop_columns("example_id")
    if clash := [name for name in scores.column_names if name in ("id", "row_index", "text_hash")]:
        raise DataError(f"a part of the score is named {clash[0]}, as a column of the file is; rename that task")
    part, start = require_no_link(out.with_name(f".{out.name}.part")), 0
    try:
        with _writer(part, out.suffix) as write:
            for texts in read_blocks(loaded.file(EXAMPLES_FILE), ("example_id", "row_index", "content_hash")):
                write(_joined(pa.table(texts), scores.slice(start, texts.num_rows)))
                start += texts.num_rows
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return start


def _joined(texts: pa.Table, scores: pa.Table) -> pa.Table:
    """Return the rows of one block, with null for each score or part that is NaN (not defined for the example)."""
    columns = {"id": texts["example_id"], "row_index": texts["row_index"], "text_hash": texts["content_hash"]}
    for name in sorted(scores.column_names, key=lambda name: name in OWN[4:]):  # status and reason last
        column = scores[name]
        columns[name] = pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(column.type) else column
    return pa.table(columns)


@contextmanager
def _writer(path: Path, suffix: str) -> Iterator[Callable[[pa.Table], object]]:
    """Yield a function that appends a table to the file, in the format that `suffix` names."""
    if suffix == ".jsonl":
        with path.open("w", encoding="ascii") as stream:
            yield lambda table: stream.writelines(json.dumps(json_value(row)) + "\n" for row in table.to_pylist())
        return
    kind, writer = (pq.ParquetWriter if suffix == ".parquet" else pyarrow.csv.CSVWriter), None

    def write(table: pa.Table) -> None:
        nonlocal writer
        writer = writer or kind(str(path), table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="gradsift scores", description="Write the scores of a run as one table.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"a file of type {', '.join(TYPES)}")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="the store, if it has moved")
    options = parser.parse_args(arguments)
    rows = write_scores_of(options.run, options.out, options.artifacts)
    print(f"{rows:,} scores: {options.out}")
