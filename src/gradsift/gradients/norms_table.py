"""The gradient norms of a member after an epoch, on disk: one `gradient_norms.parquet` for each shard of the rows."""

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
    """Write a table with row (position among the examples), all of `columns`, and n_tokens (number of response tokens).

    Args:
        columns: norm_A, norm_B and loss, (len(encoded),) each.

    Returns:
        Entries for the artifact's info. The caller adds `all_rows`, the number of rows of all shards, for `read_norms`.
    """
    table = {
        "row": np.array([example.row for example in encoded], dtype=np.int64),
        **columns,
        "n_tokens": np.array([int(example.is_response.sum()) for example in encoded], dtype=np.int32),
    }
    pq.write_table(pa.table(table), folder / NORMS_FILE)
    return {"rows": len(encoded), "shard": shard, "shards": shards}


def read_norms(shards: Sequence[Artifact], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return the table of a member's norms after an epoch, from all shards of this table, ascending by row.

    Args:
        names: columns to read besides `row`; None for all.

    Raises:
        GradsiftError: a shard or a row is missing or repeated; the message names it and says how to collect it.
    """
    wanted = None if names is None else ["row", *names]
    tables = [pq.read_table(artifact.file(NORMS_FILE), columns=wanted) for artifact in shards]
    _require_shards(shards, [table.num_rows for table in tables])
    joined = pa.concat_tables(tables)
    rows = joined["row"].to_numpy()
    if not (rows[1:] > rows[:-1]).all():  # several shards; a table in order is not copied, to save memory
        joined = joined.sort_by("row")
        rows = joined["row"].to_numpy()
    if len(twice := np.unique(rows[1:][rows[1:] == rows[:-1]])):
        raise GradsiftError(
            f"{_name(shards[0])}: rows {', '.join(map(str, twice[:8]))}{', ...' if len(twice) > 8 else ''} of the "
            "examples are in its norms twice; collect them again in another store (artifacts=DIR)"
        )
    return {name: joined[name].to_numpy() for name in joined.column_names}


def by_example(shards: Sequence[Artifact], names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """Return the columns `names` of a member's norms after an epoch, in the order of all `count` examples.

    Returns:
        (count,) float64 each; NaN for an example without a response token.
    """
    table = read_norms(shards, names)
    columns = {name: np.full(count, np.nan) for name in names}
    for name, column in columns.items():
        column[table["row"]] = table[name]
    return columns


def _require_shards(shards: Sequence[Artifact], row_counts: Sequence[int]) -> None:
    """Raise a `GradsiftError` unless these are all shards of one table, and each shard has all its rows."""
    name = _name(shards[0])
    count, rows = (int(shards[0].info[key]) for key in ("shards", "all_rows"))
    numbers = [int(artifact.info["shard"]) for artifact in shards]
    if len({(artifact.info["shards"], artifact.info["all_rows"]) for artifact in shards}) > 1:
        raise GradsiftError(f"{name}: its norms are shards of different tables; give one proxy.shards")
    if missing := sorted(set(range(count)) - set(numbers)):
        raise GradsiftError(
            f"{name}: its norms lack shard {', '.join(map(str, missing))} of {count}; give the command again with "
            f"proxy.shards={count} proxy.shard={missing[0]} stop_after=statistics"
        )
    if len(numbers) > count:
        raise GradsiftError(f"{name}: its norms have {len(numbers)} shards where there are {count}")
    for artifact, number, row_count in zip(shards, numbers, row_counts, strict=True):
        # of the rows sorted by length, a shard has every `count`-th one (`data.batching.shard_of`)
        expected = len(range(number, rows, count))
        if row_count != expected:
            raise GradsiftError(
                f"{name}: shard {number} of {count} of its norms holds {row_count} of {expected} rows; delete "
                f"{artifact.path.name} and give the command again"
            )


def _name(artifact: Artifact) -> str:
    return artifact.path.name.rsplit("-", 1)[0]
