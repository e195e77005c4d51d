"""Similarity to a target set: RDS+ and Sentence-BERT.

Embeddings have length 1, so a dot product is a cosine. Products are taken in float64 and kept to
float32's precision: equal rows then have equal scores wherever in a block they stand.

Shape letters: N examples, Q target rows, D features, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import Features
from gradsift.scoring.scores import UNDEFINED, Scores
from gradsift.scoring.spread import spread

NO_DIRECTION = "the embedding has no direction: the text is empty, or the embedder gave it zeros"
_CHECK = "the embedder: its model (random weights?), embedder.pooling and embedder.max_length"
_PRODUCTS = 2**23  # cosines held at once, 64 MB; no result depends on it

Over = Literal["mean", "max"]


def rds_plus(embeddings: Features, target_embeddings: Features) -> Scores:
    """Largest cosine to a target row, the largest over tasks of the parts `task:<name>`.

    Dealing the budget out to target rows or tasks in turn is a selector's work (`round_robin_queries`).
    """
    return _scores(embeddings, target_embeddings, "max")


def sbert(embeddings: Features, target_embeddings: Features, *, over: Over) -> Scores:
    """Mean or largest cosine to the target rows, and by task in the parts `task:<name>`.

    Args:
        over: mean counts each row of the target set once, so a larger task weighs more. It ranks as the
            cosine to the rows' mean vector does, which differs from it by a constant factor.
    """
    return _scores(embeddings, target_embeddings, over)


def _scores(embeddings: Features, targets: Features, over: Over) -> Scores:
    by_task, lost = _columns(targets)
    sizes = np.array([len(columns) for columns in by_task.values()])
    cosines = task_cosines(embeddings, targets, by_task, over)
    score = cosines.max(axis=1) if over == "max" else cosines @ (sizes / sizes.sum())
    blank = ~embeddings.has_direction()
    score, cosines = _kept(score, blank), _kept(cosines, blank)
    parts = {f"task:{task}": cosines[:, place] for place, task in enumerate(by_task)}
    scores = Scores(score, parts, [spread(embeddings, "embedding", _CHECK), *lost])
    scores.mark(blank, UNDEFINED, NO_DIRECTION)
    return scores


def _kept(values: np.ndarray, blank: np.ndarray) -> np.ndarray:
    kept: np.ndarray = values.astype(np.float32).astype(np.float64)
    kept[blank] = np.nan
    return kept


def task_cosines(embeddings: Features, targets: Features, by_task: dict[str, np.ndarray], over: Over) -> np.ndarray:
    """Mean or largest cosine of each example to the target rows of each task.

    Args:
        by_task: positions of each task's rows in `targets`.

    Returns:
        (N, tasks) float64
    """
    found = np.empty((len(embeddings), len(by_task)))
    for place, columns in enumerate(by_task.values()):
        queries = np.asarray(targets.vectors[columns], dtype=np.float64)
        for rows, block in _blocks(embeddings, len(queries)):
            cosines = block @ queries.T
            found[rows, place] = cosines.max(axis=1) if over == "max" else cosines.mean(axis=1)
    return found


def _blocks(embeddings: Features, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Places and rows (B, D) float64, of which B x `columns` products are few enough to be held."""
    size = max(1, _PRODUCTS // columns)
    for start, block in embeddings.blocks():
        for first in range(0, len(block), size):
            part = block[first : first + size]
            yield slice(start + first, start + first + len(part)), part.astype(np.float64)


def _columns(targets: Features) -> tuple[dict[str, np.ndarray], list[Diagnostic]]:
    """Positions of the target rows that have a direction, by task, and what there is to say of the others."""
    tasks, pointing = np.array(targets.tasks), targets.has_direction()
    by_task = {task: np.flatnonzero((tasks == task) & pointing) for task in dict.fromkeys(targets.tasks)}
    for task, columns in by_task.items():
        if not len(columns):
            raise GradsiftError(
                f"no row of the target set's task {task!r} has an embedding that points anywhere; look at its texts, "
                "or take another embedder"
            )
    if pointing.all():
        return by_task, []
    blank = int((~pointing).sum())
    seen = f"{blank} of {len(tasks)} target rows have an embedding of zeros and are left out"
    return by_task, [Diagnostic.judged("target_direction", True, {"rows": float(blank)}, seen, "their texts")]
