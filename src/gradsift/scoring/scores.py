"""The score table: a score, its parts and a status for every example."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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

NO_RESPONSE = "no response token is left within the maximal length, or the template cannot show the row"


@dataclass
class Scores:
    """Scores of N examples, in the order of the examples. An example whose status is not `scored` is never selected."""

    score: np.ndarray  # (N,) float64, higher = keep; NaN where undefined
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) each: what the score is computed from
    diagnostics: list[Diagnostic] = field(default_factory=list)  # not in the table
    status: np.ndarray = field(init=False)  # (N,) str
    reason: np.ndarray = field(init=False)  # (N,) str, empty if scored

    def __post_init__(self) -> None:
        self.status = np.full(len(self.score), _one(SCORED), dtype=object)
        self.reason = np.full(len(self.score), _one(""), dtype=object)

    def mark(self, where: np.ndarray, status: str, reason: str) -> None:
        """Set status and reason of the examples in `where` (N,) bool, but only if their status is still `scored`."""
        fresh = where & (self.status == SCORED)
        self.status[fresh] = _one(status)
        self.reason[fresh] = _one(reason)

    def require_finite(self, row_indices: Callable[[], Sequence[int]]) -> None:
        """Raise a `GradsiftError` if the score of a `scored` example is not finite.

        `row_indices` returns each example's row number in the data's source, for the message.
        """
        bad = (self.status == SCORED) & ~np.isfinite(self.score)
        if bad.any():
            indices = row_indices()
            rows = ", ".join(str(indices[i]) for i in np.flatnonzero(bad)[:8])
            raise GradsiftError(
                f"{int(bad.sum())} scores are NaN or infinite, the first at row {rows}; look at these rows and at the "
                "training loss (a lower proxy.learning_rate or compute.precision=float32 may help)"
            )


def _one(text: str) -> np.ndarray:
    """Return the text as a 0-d array.

    Numpy fills an object array with references to this one text. If it were given the text as a str, it would store a
    copy of 55 bytes for each element.
    """
    return np.array(text, dtype=object)


def write_scores(path: Path, scores: Scores, example_ids: Iterable[Sequence[str] | pa.Array]) -> None:
    """Write the score table to a Parquet file; `example_ids` are the ids of the N examples, in blocks."""
    writer, start = None, 0
    with contextlib.ExitStack() as stack:
        for ids in example_ids:
            rows = slice(start, start + len(ids))
            columns = {"example_id": pa.array(ids, pa.string()), "score": pa.array(scores.score[rows])}
            columns |= {name: pa.array(np.asarray(values)[rows]) for name, values in scores.parts.items()}
            columns |= {"status": pa.array(scores.status[rows], pa.string())}
            columns |= {"reason": pa.array(scores.reason[rows], pa.string())}
            table = pa.table(columns)
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)
            start = rows.stop


def read_scores(path: Path) -> Scores:
    """Return the scores that `write_scores` wrote."""
    with pq.ParquetFile(path, read_dictionary=["status", "reason"]) as file:
        own = ("example_id", "score", "status", "reason")
        numbers = [name for name in file.schema_arrow.names if name not in own]
        parts = {name: file.read([name])[name].to_numpy() for name in numbers}
        scores = Scores(file.read(["score"])["score"].to_numpy(), parts)
        scores.status, scores.reason = (_texts(file.read([name])[name]) for name in ("status", "reason"))
    return scores


def _texts(column: pa.ChunkedArray) -> np.ndarray:
    """Return the column's texts (N,).

    Equal texts share one object, which saves memory: millions of rows have only a few different statuses and reasons.
    """
    chunks = column.unify_dictionaries().chunks
    texts = np.array(chunks[0].dictionary.to_pylist() if chunks else [], dtype=object)
    return np.concatenate([np.empty(0, dtype=object), *(texts[chunk.indices] for chunk in chunks)])
