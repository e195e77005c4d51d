"""The gradient norms of one member and epoch on disk: `gradient_norms.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact
from gradsift.data.tokens import Encoded

NORMS_FILE = "gradient_norms.parquet"


def write_norms(folder: Path, columns: Mapping[str, np.ndarray], encoded: Sequence[Encoded]) -> None:
    """Write columns row (position among the examples), norm_A, norm_B, loss, n_tokens (response tokens)."""
    table = {
        "row": np.array([example.row for example in encoded], dtype=np.int64),
        **columns,
        "n_tokens": np.array([int(example.is_response.sum()) for example in encoded], dtype=np.int32),
    }
    pq.write_table(pa.table(table), folder / NORMS_FILE)


def read_norms(artifact: Artifact) -> dict[str, np.ndarray]:
    """What `write_norms` wrote."""
    table = pq.read_table(artifact.file(NORMS_FILE))
    return {name: table[name].to_numpy() for name in table.column_names}
