"""The score table: a score, its parts and a status for every example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError

SCORED = "scored"
UNDEFINED = "undefined"  # the method defines no score for this example
EXCLUDED = "excluded"  # the method drops this example

NO_RESPONSE = "no response token is left within the maximal length"


@dataclass
class Scores:
    """Scores of N examples, in their order. Examples that are not `scored` are never selected."""

    score: np.ndarray  # (N,) float64, higher = keep; NaN where undefined
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) each: what the score is made of
    diagnostics: list[Diagnostic] = field(default_factory=list)  # what the method noticed; not in the table
    status: np.ndarray = field(init=False)  # (N,) str
    reason: np.ndarray = field(init=False)  # (N,) str, empty where scored

    def __post_init__(self) -> None:
        self.status = np.full(len(self.score), SCORED, dtype=object)
        self.reason = np.full(len(self.score), "", dtype=object)

    def mark(self, where: np.ndarray, status: str, reason: str) -> None:
        """Give the examples in `where` (N,) bool a status other than scored, and its reason."""
        fresh = where & (self.status == SCORED)
        self.status[fresh] = status
        self.reason[fresh] = reason

    def require_finite(self, row_indices: Sequence[int] | np.ndarray) -> None:
        """Raise a `GradsiftError` that names the rows (of the source) whose score is no finite number."""
        bad = (self.status == SCORED) & ~np.isfinite(self.score)
        if bad.any():
            rows = ", ".join(str(row_indices[i]) for i in np.flatnonzero(bad)[:8])
            raise GradsiftError(
                f"{int(bad.sum())} scores are NaN or infinite, the first at row {rows}; look at these rows and at the "
                "training loss (a lower proxy.learning_rate or compute.precision=float32 may help)"
            )


def write_scores(path: Path, scores: Scores, example_ids: Sequence[str] | pa.ChunkedArray) -> None:
    own_ids = example_ids if isinstance(example_ids, pa.ChunkedArray) else pa.array(example_ids)
    columns = {"example_id": own_ids, "score": pa.array(scores.score)}
    columns |= {name: pa.array(np.asarray(values)) for name, values in scores.parts.items()}
    columns |= {"status": pa.array(scores.status.tolist()), "reason": pa.array(scores.reason.tolist())}
    pq.write_table(pa.table(columns), path)


def read_scores(path: Path) -> Scores:
    with pq.ParquetFile(path, read_dictionary=["status", "reason"]) as file:  # by column, as in `read_statistics`
        own = ("example_id", "score", "status", "reason")
        numbers = [name for name in file.schema_arrow.names if name not in own]
        parts = {name: file.read([name])[name].to_numpy() for name in numbers}
        scores = Scores(file.read(["score"])["score"].to_numpy(), parts)
        scores.status, scores.reason = (_texts(file.read([name])[name]) for name in ("status", "reason"))
    return scores


def _texts(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) str in which equal texts are one object: millions of rows share a handful of reasons."""
    chunks = [np.array(chunk.dictionary.to_pylist(), dtype=object)[chunk.indices] for chunk in column.chunks]
    return np.concatenate([np.empty(0, dtype=object), *chunks])
