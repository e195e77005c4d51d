"""The gradient norms of one member and epoch on disk: `gradient_norms.parquet`, one for each shard of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError

NORMS_FILE = "gradient_norms.parquet"


def write_norms(
    folder: Path, columns: Mapping[str, np.ndarray], encoded: Sequence[Encoded], shard: int, shards: int
) -> dict[str, Any]:
    """Write columns row (position among the examples), norm_A, norm_B, loss, n_tokens (response tokens).

    Returns:
        What `read_norms` has to find in the artifact's info, beside `all_rows`: the rows of all shards.
    """
    table = {
        "row": np.array([example.row for example in encoded], dtype=np.int64),
        **columns,
        "n_tokens": np.array([int(example.is_response.sum()) for example in encoded], dtype=np.int32),
    }
    pq.write_table(pa.table(table), folder / NORMS_FILE)
    return {"rows": len(encoded), "shard": shard, "shards": shards}


def read_norms(shards: Sequence[Artifact], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The whole table of a member after an epoch, ascending by row: what `write_norms` wrote of all its shards.

    Args:
        names: of the columns to read besides `row`; all where None.

    Raises:
        GradsiftError: a shard or a row is missing or there twice; names it, and what collects it.
    """
    wanted = None if names is None else ["row", *names]
    tables = [pq.read_table(artifact.file(NORMS_FILE), columns=wanted) for artifact in shards]
    _require_shards(shards, [table.num_rows for table in tables])
    whole = pa.concat_tables(tables)
    columns = {name: whole[name].to_numpy() for name in whole.column_names}
    rows = columns["row"]
    if not (rows[1:] > rows[:-1]).all():
        order = np.argsort(rows, kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
        rows = columns["row"]
    if len(twice := np.unique(rows[1:][rows[1:] == rows[:-1]])):
        raise GradsiftError(
            f"{_name(shards[0])}: {_some(twice)} of the examples are in its norms twice; collect them again in another "
            "store (artifacts=DIR)"
        )
    return columns


def by_example(shards: Sequence[Artifact], names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """Columns of a member's norms after an epoch in the order of the `count` examples.

    Returns:
        (N,) float64 each; NaN for an example that has no response token to learn from.
    """
    table = read_norms(shards, names)
    columns = {name: np.full(count, np.nan) for name in names}
    for name, column in columns.items():
        column[table["row"]] = table[name]
    return columns


def _require_shards(shards: Sequence[Artifact], found: Sequence[int]) -> None:
    """Raise unless these are all shards of one table, each with all its rows."""
    count, rows = (int(shards[0].info[name]) for name in ("shards", "all_rows"))
    numbers = [int(artifact.info["shard"]) for artifact in shards]
    if len({(artifact.info["shards"], artifact.info["all_rows"]) for artifact in shards}) > 1:
        raise GradsiftError(f"{_name(shards[0])}: its norms are shards of different tables; give one proxy.shards")
    if missing := sorted(set(range(count)) - set(numbers)):
        raise GradsiftError(
            f"{_name(shards[0])}: its norms lack shard {', '.join(map(str, missing))} of {count}; give the command "
            f"again with proxy.shards={count} proxy.shard={missing[0]} stop_after=statistics"
        )
    if len(numbers) > count:
        raise GradsiftError(f"{_name(shards[0])}: its norms have {len(numbers)} shards where there are {count}")
    for number, there in zip(numbers, found, strict=True):
        expected = len(range(number, rows, count))
        if there != expected:
            raise GradsiftError(
                f"{_name(shards[0])}: shard {number} of {count} of its norms holds {there} of {expected} rows; delete "
                f"{shards[numbers.index(number)].path.name} and give the command again"
            )


def _name(artifact: Artifact) -> str:
    return artifact.path.name.rsplit("-", 1)[0]


def _some(rows: np.ndarray) -> str:
    return "rows " + ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
