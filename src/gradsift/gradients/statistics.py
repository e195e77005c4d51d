"""The members' gradient norms on disk, and their mean and variance over the ensemble at the two snapshots.

For example i after epoch e, GRADFILTERING (arXiv 2601.13697) uses G_i^(e), the mean over the members m of the norms
|g_i^(m,e)|, and V_i^(e), their variance over the members (the sum of squared deviations divided by M).

The norms are read twice, one member at a time, so the memory needed does not grow with M. For each member, epoch and
shard of the rows, there is one file `gradient_norms.parquet`.

Shape letters: M members, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact
from gradsift.data.tokens import Encoded
from gradsift.errors import GradsiftError
from gradsift.runtime import Runtime

VERSION = 1
NORMS_FILE = "gradient_norms.parquet"
STATISTICS_FILE = "statistics.parquet"


def write_norms(
    folder: Path,
    columns: Mapping[str, np.ndarray],
    encoded: Sequence[Encoded],
    all_rows: int,
    shard: int = 0,
    shards: int = 1,
) -> dict[str, Any]:
    """Write a table with `columns`, `row` (position among all examples), and `n_tokens` (number of response tokens).

    Args:
        columns: norm_A, norm_B and loss of the shard's examples `encoded`, (len(encoded),) each.
        all_rows: number of examples in all shards.

    Returns:
        Entries for the artifact's info.
    """
    table = {
        "row": np.array([example.row for example in encoded], dtype=np.int64),
        **columns,
        "n_tokens": np.array([int(example.is_response.sum()) for example in encoded], dtype=np.int32),
    }
    pq.write_table(pa.table(table), folder / NORMS_FILE)
    return {"rows": len(encoded), "shard": shard, "shards": shards, "all_rows": all_rows}


def read_norms(shards: Sequence[Artifact], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return the columns of a member's table of norms after an epoch, joined from all shards and sorted by `row`.

    Args:
        names: columns to read besides `row`; None for all.

    Raises:
        GradsiftError: the shards together do not have each row exactly once; the message names the shards and the rows.
    """
    wanted = None if names is None else ["row", *names]
    tables = [pq.read_table(artifact.file(NORMS_FILE), columns=wanted) for artifact in shards]
    joined = pa.concat_tables(tables)
    rows = joined["row"].to_numpy()
    if not (rows[1:] > rows[:-1]).all():  # sorting copies the table, and a single shard is sorted already
        joined = joined.sort_by("row")
        rows = joined["row"].to_numpy()
    twice, expected = np.unique(rows[1:][rows[1:] == rows[:-1]]), shards[0].info["all_rows"]
    if len(twice) or len(rows) != expected:
        sizes = zip(shards, tables, strict=True)
        parts = [f"{shard.path.name} ({table.num_rows} of {shard.info['rows']} rows)" for shard, table in sizes]
        raise GradsiftError(
            f"{', '.join(parts)}: together these tables have {len(rows):,} rows, but must have each of the "
            f"{expected:,} rows once; first rows that occur twice: {twice[:8].tolist()}; delete these folders and give "
            "the command again"
        )
    return {name: joined[name].to_numpy() for name in joined.column_names}


def by_example(shards: Sequence[Artifact], names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """Return the columns `names` of `read_norms` with an entry for each of `count` examples, (count,) float64 each.

    The entry of an example without a response token is NaN.
    """
    table = read_norms(shards, names)
    columns = {name: np.full(count, np.nan) for name in names}
    for name, column in columns.items():
        column[table["row"]] = table[name]
    return columns


@dataclass(frozen=True)
class Statistics:
    """Statistics of each example, (N,) float64; NaN for an example without a response token."""

    G_s: np.ndarray  # mean norm at the early snapshot
    G_t: np.ndarray  # mean norm at the late snapshot
    V_s: np.ndarray  # variance of the norm over the members at the early snapshot
    V_t: np.ndarray  # variance of the norm over the members at the late snapshot
    loss_s: np.ndarray  # mean loss over the members at the early snapshot, in nats per response token
    loss_t: np.ndarray  # mean loss over the members at the late snapshot, in nats per response token


def norm_of(columns: Mapping[str, np.ndarray], scope: str, size_a: float, size_b: float) -> np.ndarray:
    """Return the L2 norm (N,) float64 of each example's gradient with respect to the LoRA factors that `scope` names.

    The gradient with respect to A is proportional to B, and the gradient with respect to B is proportional to A. As B
    grows from zero, the norms of all examples tend to rise, whether or not the proxy learns the examples. The scope
    `scaled` therefore divides norm_A by the size of B, and norm_B by the size of A.

    Args:
        columns: norm_A and norm_B, (N,).
        scope: `all` (both factors), `A`, `B` or `scaled` (both factors).
        size_a, size_b: Frobenius norms of the member's A and B over all layers at the epoch's end.

    Raises:
        GradsiftError: the scope is `scaled`, and a factor of the adapter is still zero.
    """
    norm_a, norm_b = columns["norm_A"].astype(np.float64), columns["norm_B"].astype(np.float64)
    if scope == "scaled":
        if not (size_a > 0 and size_b > 0):
            raise GradsiftError(
                "proxy.norm_scope=scaled: an adapter is still zero; train it first, or take another scope"
            )
        return np.hypot(norm_a / size_b, norm_b / size_a)
    return {"A": norm_a, "B": norm_b, "all": np.hypot(norm_a, norm_b)}[scope]


def mean_and_variance(norms: Callable[[], Iterable[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean G and the variance V (divided by M, not M - 1) of the members' norms, (N,) float64 each.

    `norms` is called twice, and yields the norms of one member after the other, (N,) each.
    """
    # two passes instead of mean(x^2) - mean(x)^2: V_t is .001 to .01 of G_t^2 (`ensemble_checks`), so this difference
    # would lose two or three digits of V_t, by which Eq. 5 divides
    mean = _mean(norms())
    return mean, _mean((of_member - mean) ** 2 for of_member in norms())


def _mean(values: Iterable[np.ndarray]) -> np.ndarray:
    """Return the mean (N,) float64 of M arrays (N,), one of which is in memory at a time."""
    members, total = 0, np.zeros(1)
    for of_member in values:
        # `astype` copies, so the sum does not overwrite the caller's array
        total = of_member.astype(np.float64) if not members else np.add(total, of_member, out=total)
        members += 1
    return total / members


def mean_loss(members: Sequence[Sequence[Artifact]], count: int) -> np.ndarray:
    """Return each example's loss averaged over the members, (N,) float64.

    `members` are the artifacts with the members' norms and losses, as [member][shard].
    """
    return _mean(by_example(shards, ("loss",), count)["loss"] for shards in members)


def statistics(
    runtime: Runtime,
    early: Sequence[Sequence[Artifact]],
    late: Sequence[Sequence[Artifact]],
    snapshots: Sequence[int],
    scope: str,
    count: int,
) -> Artifact:
    """Return the artifact with the statistics of all N = `count` examples at the early and the late snapshot.

    Args:
        early, late: artifacts with the members' norms at the two snapshots, as [member][shard].
        snapshots: epochs of the early and the late snapshot.
        scope: see `norm_of`.

    Raises:
        GradsiftError: the members' norms were computed with different numerics; the message names two such tables.
    """
    parents = [shard for shards in (*early, *late) for shard in shards]
    for other in parents[1:]:
        if other.computed_by != parents[0].computed_by:  # V_t would measure the differences in numerics
            raise GradsiftError(
                f"{parents[0].path.name} was computed with {dict(parents[0].computed_by)} and {other.path.name} with "
                f"{dict(other.computed_by)}; norms of one ensemble must be computed alike. Give the command again: it "
                "computes the missing norms with the numerics of this machine"
            )

    def make(folder: Path) -> Mapping[str, Any]:
        values = compute_statistics(early, late, scope, count)
        pq.write_table(pa.table(vars(values)), folder / STATISTICS_FILE)
        return {"rows": count}

    slug = f"M{len(early)}-s{snapshots[0]}-t{snapshots[1]}"
    return runtime.store.obtain("statistics", slug, {"norm_scope": scope}, parents, make, version=VERSION)


def compute_statistics(
    early: Sequence[Sequence[Artifact]], late: Sequence[Sequence[Artifact]], scope: str, count: int
) -> Statistics:
    """Return the statistics of all `count` examples; for `early`, `late` and `scope`, see `statistics`."""
    columns = {}
    for suffix, members in (("s", early), ("t", late)):

        def norms(members: Sequence[Sequence[Artifact]] = members) -> Iterable[np.ndarray]:
            for shards in members:
                info, table = shards[0].info, by_example(shards, ("norm_A", "norm_B"), count)
                yield norm_of(table, scope, info["size_A"], info["size_B"])

        columns[f"G_{suffix}"], columns[f"V_{suffix}"] = mean_and_variance(norms)
        columns[f"loss_{suffix}"] = mean_loss(members, count)
    return Statistics(**columns)


def read_statistics(artifact: Artifact) -> Statistics:
    with pq.ParquetFile(artifact.file(STATISTICS_FILE)) as file:  # one column at a time needs half the memory
        return Statistics(**{name: file.read([name])[name].to_numpy() for name in file.schema_arrow.names})
