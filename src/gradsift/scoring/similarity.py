"""Similarity to a target set: RDS+ and Sentence-BERT.

Embeddings have length 1, so an inner product is a cosine. Products are computed in float64 and rounded to float32, so
that equal rows have equal scores.

Shape letters: N examples, Q target rows, D features.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.products import blocks
from gradsift.features.vectors import Features
from gradsift.scoring.agreement import spread
from gradsift.scoring.scores import UNDEFINED, Scores

NO_DIRECTION = "the embedding has no direction: the text is empty, or the embedder gave it zeros"
_CHECK = "the embedder: its model (random weights?), embedder.pooling and embedder.max_length"

Over = Literal["mean", "max"]


def rds_plus(embeddings: Features, target_embeddings: Features) -> Scores:
    """Return the largest cosine to any target row; the part `task:<name>` is the largest cosine to a row of that task.

    With the selector `round_robin_queries`, the budget is divided among target rows or tasks.
    """
    return sbert(embeddings, target_embeddings, over="max")


def sbert(embeddings: Features, target_embeddings: Features, *, over: Over) -> Scores:
    """Return the mean or the largest cosine to the target rows; the part `task:<name>` uses only that task's rows.

    Args:
        over: mean or max. The mean counts each target row once, so a task with more rows weighs more. The mean
            gives the same ranking as the cosine to the mean of the target rows: the two differ by a constant factor.
    """
    targets = target_embeddings
    by_task, diagnostics = _rows_by_task(targets)
    cosines = np.empty((len(embeddings), len(by_task)))
    for place, positions in enumerate(by_task.values()):
        queries = np.asarray(targets.vectors[positions], dtype=np.float64)
        for where, rows in blocks(embeddings, np.arange(len(embeddings))):
            inner = rows @ queries.T  # (B, Q)
            cosines[where, place] = inner.max(axis=1) if over == "max" else inner.mean(axis=1)
    sizes = np.array([len(positions) for positions in by_task.values()])
    score = cosines.max(axis=1) if over == "max" else cosines @ (sizes / sizes.sum())
    blank = ~embeddings.has_direction
    # rounded to float32: with other block sizes, products differ in the last bits of float64, but equal rows must tie
    score, cosines = (values.astype(np.float32).astype(np.float64) for values in (score, cosines))
    score[blank], cosines[blank] = np.nan, np.nan
    parts = {f"task:{task}": cosines[:, place] for place, task in enumerate(by_task)}
    scores = Scores(score, parts, [spread(embeddings, "embedding", _CHECK), *diagnostics])
    scores.mark(blank, UNDEFINED, NO_DIRECTION)
    return scores


def _rows_by_task(targets: Features) -> tuple[dict[str, np.ndarray], list[Diagnostic]]:
    """Return the positions of each task's target rows that have a direction, and a warning if some rows have none.

    Raises:
        GradsiftError: no row of a task has a direction.
    """
    tasks, directed = np.array(targets.tasks), targets.has_direction
    by_task = {task: np.flatnonzero((tasks == task) & directed) for task in dict.fromkeys(targets.tasks)}
    for task, positions in by_task.items():
        if not len(positions):
            raise GradsiftError(
                f"no row of the target set's task {task!r} has an embedding that points anywhere; look at its texts, "
                "or take another embedder"
            )
    if directed.all():
        return by_task, []
    blank = int((~directed).sum())
    message = f"{blank} of {len(tasks)} target rows have an embedding of zeros and are left out"
    return by_task, [Diagnostic.judged("target_direction", True, {"rows": float(blank)}, message, "their texts")]
