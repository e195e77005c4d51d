"""`gradsift scores RUN --out FILE`: write the scores of a run as one table, for use in other programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
    """Write one row per example, in the order of the data. `gradsift.scoring.published` describes the columns.

    Args:
        run: the folder of a run that has scores.
        out: the file to write, in the format that its suffix (one of TYPES) names. An existing file is replaced.
        artifacts: the store's folder, if the store has moved.

    Returns:
        The number of rows.

    Raises:
        GradsiftError: the suffix of `out` is unknown, the folder of `out` does not exist, `run` is a sweep, the run's
            data or scores are not in the store, or a part of the score is named like another column of the file.
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
        raise DataError(f"a part of the score is named {clash[0]}, like a column of the file; rename this part or task")
    blocks = read_blocks(loaded.file(EXAMPLES_FILE), ("example_id", "row_index", "content_hash"))
    texts = pa.Table.from_batches(blocks)
    columns = {"id": texts["example_id"], "row_index": texts["row_index"], "text_hash": texts["content_hash"]}
    for name in sorted(scores.column_names, key=lambda name: name in OWN[4:]):  # status and reason last
        column = scores[name]
        is_number = pa.types.is_floating(column.type)
        columns[name] = pc.if_else(pc.is_nan(column), None, column) if is_number else column  # not defined: null
    table = pa.table(columns)
    part = require_no_link(out.with_name(f".{out.name}.part"))
    try:
        if out.suffix == ".parquet":
            pq.write_table(table, part)
        elif out.suffix == ".csv":
            pyarrow.csv.write_csv(table, part)
        else:
            with part.open("w", encoding="ascii") as stream:
                for batch in table.to_batches():
                    stream.writelines(json.dumps(json_value(row)) + "\n" for row in batch.to_pylist())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return len(table)


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
