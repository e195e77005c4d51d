"""The score stage: call a scorer with the inputs that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.examples import read_column
from gradsift.data.load import EXAMPLES_FILE
from gradsift.diagnostics import Diagnostic, write_diagnostics
from gradsift.errors import GradsiftError
from gradsift.runtime import Runtime
from gradsift.scoring.scores import Scores, read_scores, write_scores
from gradsift.sources import Method, Source

VERSION = 2
SCORES_FILE = "scores.parquet"


def score(
    runtime: Runtime,
    scorer: Method,
    loaded: Artifact,
    sources: Mapping[str, Source],
    diagnose: Callable[[Sequence[str]], Sequence[Diagnostic]],
) -> Artifact:
    """Return the artifact that holds the score of each example of the pool.

    Args:
        diagnose: takes the names of the scorer's inputs and returns diagnostics that depend on these inputs alone.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        journal = runtime.journal(folder)
        returned = scorer(sources={**sources, "journal": Source(list, lambda: journal)})
        scores = returned if isinstance(returned, Scores) else Scores(_numbers(returned, scorer.name))
        examples, rows = loaded.file(EXAMPLES_FILE), int(loaded.info["rows"])
        if len(scores.score) != rows:
            raise GradsiftError(
                f"scorer={scorer.name} gave {len(scores.score):,} scores for {rows:,} examples; a scorer gives one for "
                "each, in their order"
            )
        # a sort would place a NaN like a very low score
        scores.require_finite(lambda: read_column(examples, "row_index").to_pylist())
        write_diagnostics(folder, [*diagnose(scorer.asked), *scores.diagnostics])
        write_scores(folder / SCORES_FILE, scores, read_column(examples, "example_id").chunks)
        statuses, counts = np.unique(scores.status.astype(str), return_counts=True)
        return {"rows": rows, **dict(zip(statuses.tolist(), counts.tolist(), strict=True))}

    settings = scorer.settings(sources)
    parents = [loaded, *scorer.parents(sources)]
    return runtime.store.obtain("score", scorer.name, settings, parents, make, version=VERSION)


def _numbers(returned: Any, scorer: str) -> np.ndarray:
    """Return the numbers that a scorer has returned instead of `Scores`, as (N,) float64."""
    try:
        numbers = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(())
    if numbers.ndim != 1:
        raise GradsiftError(
            f"scorer={scorer} returned a {type(returned).__name__}; a scorer returns Scores, or one number per example"
        )
    return numbers


def scores_of(artifact: Artifact) -> Scores:
    """Return the scores that the score stage wrote."""
    return read_scores(artifact.file(SCORES_FILE))
