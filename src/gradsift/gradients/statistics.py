"""Mean and variance over the ensemble of the gradient norms at the two snapshots.

GRADFILTERING (arXiv 2601.13697): G_i^(e) = mean over m of ||g_i^(m,e)||, V_i^(e) = variance over m.
The variance is the population's (divided by M). Members are read one at a time, so the memory needed grows with N
and not with M; the norms are read twice for it. Shape letters: M members, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact
from gradsift.errors import GradsiftError
from gradsift.gradients.norms_table import by_example
from gradsift.runtime import Runtime

VERSION = 1
STATISTICS_FILE = "statistics.parquet"


@dataclass(frozen=True)
class Statistics:
    """Per example, (N,) float64 each; NaN for an example that has no response token to learn from."""

    G_s: np.ndarray  # mean norm at the early snapshot
    G_t: np.ndarray  # mean norm at the late snapshot
    V_s: np.ndarray  # variance of the norm over members, early; norm squared
    V_t: np.ndarray  # the same, late
    loss_s: np.ndarray  # mean loss over members, early; nats a response token
    loss_t: np.ndarray  # the same, late


def norm_of(columns: Mapping[str, np.ndarray], scope: str, size_a: float, size_b: float) -> np.ndarray:
    """L2 norm over the LoRA factors in scope: `all`, `A`, `B` or `scaled`; (N,) float64.

    The gradient of A is proportional to B and the other way round, so a norm grows while B grows from
    zero, whatever the example does. `scaled` divides either factor's norm by the other factor's size.

    Args:
        size_a, size_b: Frobenius norms of the member's A and B over all layers, at the epoch's end.
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
    """Over the members: G (N,) and V (N,) float64, the variance divided by M.

    Args:
        norms: gives M times (N,), one member after the other; called twice.
    """
    mean = mean_over_members(norms())
    return mean, mean_over_members((one - mean) ** 2 for one in norms())


def mean_over_members(values: Iterable[np.ndarray]) -> np.ndarray:
    """M times (N,) to (N,) float64; no more than one of them is held at a time."""
    members, total = 0, np.zeros(1)
    for one in values:
        total = one.astype(np.float64) if not members else np.add(total, one, out=total)
        members += 1
    return total / members


def statistics(
    runtime: Runtime,
    early: Sequence[Sequence[Artifact]],
    late: Sequence[Sequence[Artifact]],
    snapshots: Sequence[int],
    scope: str,
    count: int,
) -> Artifact:
    """The statistics of the ensemble's members at the early and the late epoch.

    Args:
        early, late: the members' norms at the snapshots, as [member][shard].
        count: N, the number of examples.

    Raises:
        GradsiftError: the members' norms were computed with different numerics.
    """
    require_equal_numerics([shard for shards in (*early, *late) for shard in shards])
    settings = {"norm_scope": scope}

    def make(folder: Path) -> Mapping[str, Any]:
        write_statistics(folder / STATISTICS_FILE, compute_statistics(early, late, scope, count))
        return {"rows": count}

    slug = f"M{len(early)}-s{snapshots[0]}-t{snapshots[1]}"
    parents = [shard for shards in (*early, *late) for shard in shards]
    return runtime.store.obtain("statistics", slug, settings, parents, make, version=VERSION)


def require_equal_numerics(norms: Sequence[Artifact]) -> None:
    """Refuse an ensemble whose members computed in different ways: V_t would measure the ways and not the members.

    Raises:
        GradsiftError: names two members and their numerics.
    """
    first = norms[0]
    for other in norms[1:]:
        if other.computed_by != first.computed_by:
            raise GradsiftError(
                f"{first.path.name} was computed with {dict(first.computed_by)} and {other.path.name} with "
                f"{dict(other.computed_by)}; norms of one ensemble must be computed alike. Run the same command again: "
                "it computes what is missing in the numerics of this machine"
            )


def compute_statistics(
    early: Sequence[Sequence[Artifact]], late: Sequence[Sequence[Artifact]], scope: str, count: int
) -> Statistics:
    """The statistics of norms that are given as [member][shard]."""
    columns = {}
    for suffix, members in (("s", early), ("t", late)):

        def norms(members: Sequence[Sequence[Artifact]] = members) -> Iterable[np.ndarray]:
            return (_norms(shards, scope, count) for shards in members)

        columns[f"G_{suffix}"], columns[f"V_{suffix}"] = mean_and_variance(norms)
        columns[f"loss_{suffix}"] = mean_loss(members, count)
    return Statistics(**columns)


def _norms(shards: Sequence[Artifact], scope: str, count: int) -> np.ndarray:
    info = shards[0].info
    return norm_of(by_example(shards, ("norm_A", "norm_B"), count), scope, info["size_A"], info["size_B"])


def mean_loss(members: Sequence[Sequence[Artifact]], count: int) -> np.ndarray:
    """Mean over the members of the losses beside their norms, given as [member][shard]; (N,) float64, NaN for none."""
    return mean_over_members(by_example(shards, ("loss",), count)["loss"] for shards in members)


def write_statistics(path: Path, values: Statistics) -> None:
    pq.write_table(pa.table({field.name: getattr(values, field.name) for field in fields(values)}), path)


def read_statistics(artifact: Artifact) -> Statistics:
    with pq.ParquetFile(artifact.file(STATISTICS_FILE)) as file:  # a table and its copy are twice as much
        return Statistics(**{name: file.read([name])[name].to_numpy() for name in file.schema_arrow.names})
