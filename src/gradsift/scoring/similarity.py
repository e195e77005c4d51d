"""Similarity to a target set (RDS+, Sentence-BERT), and the functions shared by all scorers that compare vectors.

Shape letters: N examples, K directions, D features.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from gradsift.diagnostics import Diagnostic
from gradsift.errors import GradsiftError
from gradsift.features.vectors import DECIMALS, Features, blocks, unit_rows
from gradsift.scoring.scores import NO_RESPONSE, UNDEFINED, Scores

NO_GRADIENT = "the gradient is zero, so it has no direction"
# Largest mean cosine between two rows without a warning. It is near 1 because the last hidden states of different texts
# always have a high mean cosine (see docs/methods.md).
MOST_ALIKE = 0.9999


def rds_plus(embeddings: Features, target_embeddings: Features) -> Scores:
    """Return each example's largest cosine to a target row.

    The part `task:<name>` is the largest cosine to a row of that task.
    """
    return sbert(embeddings, target_embeddings, over="max")


def sbert(embeddings: Features, target_embeddings: Features, *, over: Literal["mean", "max"]) -> Scores:
    """Return each example's mean or largest cosine to the target rows.

    The part `task:<name>` is the mean or largest cosine to the rows of that task.

    Args:
        over: mean or max. The mean counts each target row once, so a task with more rows weighs more.
    """
    by_task = rows_by_task(target_embeddings)
    cosines = np.empty((len(embeddings), len(by_task)))
    for place, (task, positions) in enumerate(by_task.items()):
        if not len(positions):
            raise GradsiftError(
                f"no row of the target set's task {task!r} has an embedding with a direction; look at its texts, "
                "or take another embedder"
            )
        queries = np.asarray(target_embeddings.vectors[positions], dtype=np.float64)
        for where, rows in blocks(embeddings, np.arange(len(embeddings))):
            inner = rows @ queries.T  # (rows of the block, target rows of the task)
            cosines[where, place] = inner.max(axis=1) if over == "max" else inner.mean(axis=1)
    sizes = np.array([len(positions) for positions in by_task.values()])
    score = cosines.max(axis=1) if over == "max" else cosines @ (sizes / sizes.sum())
    blank = ~embeddings.has_direction
    # rounded to float32, so that equal rows tie: products in blocks of other sizes differ in the last bits of float64
    score, cosines = (values.astype(np.float32).astype(np.float64) for values in (score, cosines))
    score[blank], cosines[blank] = np.nan, np.nan
    parts = {f"task:{task}": cosines[:, place] for place, task in enumerate(by_task)}
    check = "the embedder: its model (random weights?), embedder.pooling and embedder.max_length"
    scores = Scores(score, parts, [spread(embeddings, "embedding", check)])
    scores.mark(blank, UNDEFINED, "the embedding has no direction: the text is empty, or the embedder gave it zeros")
    if left_out := len(target_embeddings) - int(sizes.sum()):
        message = f"{left_out} of {len(target_embeddings)} target rows have an embedding of zeros and are left out"
        values = {"rows": float(left_out)}
        scores.diagnostics.append(Diagnostic.judged("target_direction", True, values, message, "their texts"))
    return scores


def agreement(features: Features, directions: np.ndarray) -> np.ndarray:
    """Return the features' inner products (N, K) float64 with `directions` (K, D).

    The products are rounded, so that equal rows get equal values.
    """
    inner = np.empty((len(features), len(directions)))
    columns = directions.astype(np.float64).T
    for where, rows in blocks(features, np.arange(len(features))):
        inner[where] = rows @ columns
    largest = np.abs(inner).max(initial=0.0)
    return np.round(inner / largest, DECIMALS) * largest if largest else inner


def mark_undirected(scores: Scores, features: Features) -> None:
    """Mark examples without a response or with a zero gradient as undefined; add the diagnostic `gradient_spread`."""
    scores.diagnostics.append(spread(features, "gradient", "the data for equal rows, and features.warmup"))
    silent = np.zeros(len(features), dtype=bool)
    silent[list(features.silent)] = True
    undirected = ~features.has_direction
    for values in (scores.score, *scores.parts.values()):
        values[undirected] = np.nan
    scores.mark(silent, UNDEFINED, NO_RESPONSE)
    scores.mark(undirected, UNDEFINED, NO_GRADIENT)


def rows_by_task(targets: Features) -> dict[str, np.ndarray]:
    """Return a dict from each task of a target set to the positions of the task's rows that are not all zeros."""
    tasks = np.array(targets.tasks)
    return {task: np.flatnonzero((tasks == task) & targets.has_direction) for task in dict.fromkeys(targets.tasks)}


def spread(features: Features, kind: str, check: str) -> Diagnostic:
    """Return the diagnostic `<kind>_spread`: the mean cosine over all pairs of rows that are not all zeros.

    If the mean is near 1, the vectors hardly differ. The diagnostic is then a warning that tells the user to look at
    `check`.
    """
    name, value = f"{kind}_spread", "mean_cosine"
    total, count = np.zeros(features.vectors.shape[1]), 0
    for _, block in features.blocks():
        total += unit_rows(block).sum(axis=0, dtype=np.float64)
        count += int(np.any(block != 0, axis=1).sum())
    if count < 2:
        return Diagnostic.unknown(name, value, f"fewer than two rows have a {kind} with a direction")
    # |sum of N unit rows|^2 = N + N (N - 1) mean cosine
    mean = float((total @ total - count) / (count * (count - 1)))
    message = f"two rows' {kind}s have a mean cosine of {mean:.4f}"
    if mean > MOST_ALIKE:
        message += ": they are almost equal, and rows with equal scores are ranked in row order"
    return Diagnostic.judged(name, mean > MOST_ALIKE, {value: mean}, message, check)
