"""The score stage: call a scorer with what it asks for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Score every example of the pool.

    Args:
        diagnose: given what the scorer asks for, diagnostics of these things; they are stored with the
            scores, so they must depend on nothing else.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        journal = runtime.journal(folder)
        scores: Scores = scorer(sources={**sources, "journal": Source(list, lambda: journal)})
        examples, rows = loaded.file(EXAMPLES_FILE), int(loaded.info["rows"])
        if len(scores.score) != rows:
            raise GradsiftError(
                f"scorer={scorer.name} gave {len(scores.score):,} scores for {rows:,} examples; a scorer gives one for "
                "each, in their order"
            )
        scores.require_finite(lambda: read_column(examples, "row_index").to_pylist())
        write_diagnostics(folder, [*diagnose(scorer.asked), *scores.diagnostics])
        write_scores(folder / SCORES_FILE, scores, read_column(examples, "example_id").chunks)
        statuses, counts = _counts(scores)
        return {"rows": rows, **dict(zip(statuses, counts, strict=True))}

    settings = scorer.settings(sources)
    parents = [loaded, *scorer.parents(sources)]
    return runtime.store.obtain("score", scorer.name, settings, parents, make, version=VERSION)


def _counts(scores: Scores) -> tuple[list[str], list[int]]:
    statuses = sorted(set(scores.status.tolist()))
    return statuses, [int((scores.status == status).sum()) for status in statuses]


def scores_of(artifact: Artifact) -> Scores:
    """What the score stage wrote."""
    return read_scores(artifact.file(SCORES_FILE))
